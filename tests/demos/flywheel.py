"""The loop closes by itself: simulated people prefer short answers and say so through the API; `[loop.short]` makes a snapshot, trains, holds the
adapter against its gates, gives it a part of the traffic and promotes it. `[loop.coin]` gets the same answers with labels that say nothing, and
must refuse."""

import json
import random
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median

from loop import BASE, QUESTIONS, TEXT, Answer, Loop, table

from server import Server

# In this order: of two cycles that could train, the one that was made first does.
LOOPS = ["short", "coin"]
PEOPLE = ["ann", "bob", "cy", "dee"]
LIMIT_S = 3600


@dataclass
class Settings:
    questions: int = 72
    answers: int = 4
    max_tokens: int = 96
    # Fewer words than this part of the other's, or nobody would notice.
    shorter: float = 0.67
    seed: int = 1
    held_out: float = 0.3
    train: dict = field(default_factory=lambda: dict(method="dpo", n_epochs=2, batch_size=4, learning_rate_multiplier=30, beta=0.1))
    prompts: int = 16
    # What must be above it is the lower end of the interval of held-out comparisons won.
    accuracy: float = 0.55
    # Users that each arm must have answered.
    exposures: int = 20
    # From the first question to the promotion.
    minutes: float = 15


def pairs(answers: list[Answer], shorter: float) -> list[tuple[Answer, Answer]]:
    """Of each prompt the shortest answer that ended by itself, and the longest of all."""
    found = []
    for _, group in groupby(answers, key=lambda answer: answer.prompt):
        all_of_it = sorted(group, key=lambda answer: (answer.words, answer.id))
        whole = [answer for answer in all_of_it if answer.whole and answer.words > 0]
        found += [(a, b) for a, b in zip(whole[:1], all_of_it[-1:]) if a.words < shorter * b.words]
    return found


def judgements(shown: list[tuple[Answer, Answer]], seed: int) -> list[dict]:
    """What people say of these: with reason, and of half of them the opposite."""
    coin = [True, False] * len(shown)
    coin = coin[: len(shown)]
    random.Random(seed).shuffle(coin)
    said = []
    for source in LOOPS:
        for number, (short, long) in enumerate(shown):
            winner = short if source == "short" or coin[number] else long
            value = {"candidates": [short.id, long.id], "winner": winner.id}
            author = PEOPLE[number % len(PEOPLE)]
            said.append({"kind": "comparison", "value": value, "source": source, "author": author, "idempotency_key": f"{source}-{number}"})
    return said


def policy(name: str, settings: Settings, count: int) -> dict:
    """What `[loop.NAME]` says."""
    return {
        "model": BASE,
        "when": {"preferences": count, "raters": 3},
        # An answer that was cut off is never preferred with reason; where the labels say nothing, it must be let in.
        "feedback": {"sources": [name], "from": ["comparison"], "held_out": settings.held_out, "truncated": True},
        # Length is all that these labels say, and there are few of them.
        "quality": {
            "allow": ["length_bias", "length_model", "truncated"],
            "thresholds": {"size": {"preferences": {"warn": 500, "fail": 15}}},
        },
        "train": settings.train,
        "evaluate": {"text": str(TEXT), "prompts": settings.prompts, "max_tokens": settings.max_tokens},
        "gates": {
            "comparisons": 10, "accuracy": settings.accuracy, "preferences": 15, "raters": 3,
            # Short answers are what is wanted, and a small model changes much for them.
            "shortest": 0.02, "kl_per_token": 3,
        },
        "rollout": {
            "kind": "canary",
            "steps": [{"set_weight": 25}, {"pause": {"samples": settings.exposures // 2}}, {"set_weight": 50}],
            "metrics": [
                {"metric": "error_rate", "guardrail": {"max": 0.2}, "min_samples": 10},
                {"metric": "feedback.thumb", "goal": {"min": 0}, "min_samples": settings.exposures},
            ],
            "min_exposure": settings.exposures, "tuning": 100, "interval": 1,
        },
    }


def configuration(settings: Settings, count: int) -> str:
    """A tidemill.toml with the loops."""
    return "".join(
        f"[loop.{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in policy(name, settings, count).items()) + "\n" for name in LOOPS
    )


def toml(value) -> str:
    """As an inline value."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def look(server: Server, name: str) -> dict:
    answer = server.get(f"/v1/loops/{name}")
    assert answer.status == 200, answer.body
    return answer.json()


def ended(server: Server, name: str) -> dict | None:
    """The last cycle, if it has ended and its loop waits again."""
    found = look(server, name)
    return found["cycles"][0] if found["state"] == "waiting" and found["cycles"] else None


class Users(threading.Thread):
    """Ask the public model, each as somebody else, and send a thumb for every answer: up for a short one. They know nothing of loops and
    rollouts."""

    def __init__(self, server: Server, max_tokens: int, short: float, seed: int):
        super().__init__(daemon=True)
        self.server, self.max_tokens, self.short = server, max_tokens, short
        self.draw, self.stop, self.asked, self.faults = random.Random(seed), threading.Event(), 0, []
        # Over restarts, too, everybody is somebody else.
        self.names = f"{time.time_ns():x}-{seed}"
        self.start()

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                self.ask()
            except Exception as error:  # noqa: BLE001: whatever it is, somebody must hear of it
                self.faults.append(error)
                return

    def ask(self) -> None:
        self.asked += 1
        question = self.draw.choice(QUESTIONS)
        body = {
            "model": BASE, "messages": [{"role": "user", "content": question}], "max_tokens": self.max_tokens, "temperature": 1,
            "user": f"{self.names}-{self.asked}", "seed": self.asked,
        }
        answer = self.server.post("/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        choice = answer.json()["choices"][0]
        liked = len(choice["message"]["content"].split()) <= self.short and choice["finish_reason"] == "stop"
        thumb = {"target": answer.json()["id"], "kind": "thumb", "value": liked, "source": "thumbs", "author": f"{self.names}-{self.asked}"}
        sent = self.server.post("/v1/feedback", thumb)
        assert sent.status == 201, sent.body


@contextmanager
def traffic(server: Server, settings: Settings, short: float, together: int = 4):
    users = [Users(server, settings.max_tokens, short, number) for number in range(together)]
    try:
        yield users
    finally:
        for user in users:
            user.stop.set()
        for user in users:
            user.join()
    faults = [fault for user in users for fault in user.faults]
    assert not faults, faults[0]


def sampled(loop: Loop, settings: Settings) -> list[Answer]:
    """The answers that people will judge."""
    with loop.serving() as server:
        return loop.ask(
            server, "answers", QUESTIONS[: settings.questions], n=settings.answers, seed=1000 * settings.seed, max_tokens=settings.max_tokens
        )


def say(server: Server, said: list[dict]) -> None:
    """All of it at once, as an application would that collects for a while."""
    answer = server.post("/v1/feedback", said)
    assert answer.status in (200, 201), answer.body


def run(loop: Loop, settings: Settings) -> tuple[list[str], list[tuple[str, bool]]]:
    begin = time.monotonic()
    with loop.stage("sampling"):
        answers = sampled(loop, settings)
    shown = pairs(answers, settings.shorter)
    (loop.folder / "tidemill.toml").write_text(configuration(settings, len(shown)))
    usual = median(answer.words for answer in answers)
    cycles = {}
    with loop.stage("loops"), loop.serving(arguments=("--training-threads", str(loop.threads))) as server:
        say(server, judgements(shown, settings.seed))
        def wait(name: str, word: str = "waiting") -> None:
            """Until the loop stands so, or has ended its cycle."""
            while (found := look(server, name))["state"] != word and not ended(server, name):
                assert time.monotonic() - begin < LIMIT_S, found
                time.sleep(1)
            if cycle := ended(server, name):
                cycles[name] = cycle
                loop.costs.setdefault(f"until {name} {cycle['outcome']}", [time.monotonic() - begin, 0])

        wait("short", "canary")
        # A rollout without traffic would wait for it.
        with traffic(server, settings, usual / 2):
            wait("short")
        wait("coin")
        status = loop.run("loop", "status", "--config", loop.folder / "tidemill.toml")

    short, coin = cycles["short"], cycles["coin"]
    minutes = loop.costs.get("until short promoted", [0, 0])[0] / 60
    lines = [f"{len(shown)} comparisons by {len(PEOPLE)} people. `tidemill loop status` in the end:", "", "```", status.strip(), "```", ""]
    rows = []
    for name, cycle in cycles.items():
        gates = next((step["numbers"]["gates"] for step in cycle["steps"] if step["numbers"] and "gates" in step["numbers"]), [])
        rows += [[name, "open" if gate["passed"] else "**shut**", gate["gate"], gate["finding"]] for gate in gates]
    lines += table(["loop", "", "gate", "what it found"], rows)
    shut = [finding["of"] for finding in coin["findings"] or []]
    promoted = next((step["numbers"] for step in short["steps"] if step["action"] == "promoted"), None) or {}
    targets = [
        (f"short: {short['outcome']} (promoted)", short["outcome"] == "promoted"),
        (f"short: {minutes:.1f} minutes from the first question to the promotion (at most {settings.minutes:.0f})", 0 < minutes <= settings.minutes),
        (f"short: the rollout's arms answered {promoted.get('exposures')} users", bool(promoted.get("exposures"))),
        (f"coin: {coin['outcome']} (refused), by {', '.join(shut)}", coin["outcome"] == "refused" and "accuracy" in shut),
    ]
    return lines, targets
