"""The way from answers to an adapter as a user goes it: a server that is asked, feedback through its API, and the commands
`tidemill dataset build`, `train` and `eval` over the same data directory.

Everything lies in one folder. What is done there is not done again, so a demonstration that was interrupted goes on where it was.
"""

import json
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "e2e")]

from server import Server, binary, default_model  # noqa: E402

# Without a word about length the model talks until the limit of tokens cuts it off, and of such answers nobody knows where they would end.
BRIEFLY = "Explain in one or two sentences."
QUESTIONS = [f"{line} {BRIEFLY}" for line in (TESTS.parent / "docs/examples/questions.txt").read_text(encoding="utf-8").splitlines()]
# Ordinary text, to see whether a model still knows what it knew.
TEXT = TESTS / "goldens/smollm2/perplexity.txt"
BASE = "base"
# Requests at a time. An answer depends on its seed and not on what is computed beside it.
TOGETHER = 8


@dataclass(frozen=True)
class Answer:
    prompt: str
    id: str
    text: str
    # It ended by itself; the limit of tokens did not cut it off.
    whole: bool

    @property
    def words(self) -> int:
        return len(self.text.split())


class Loop:
    def __init__(self, folder: Path, threads: int):
        self.folder, self.threads = folder.resolve(), threads
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = self.folder / "data"
        self._costs = self.folder / "costs.json"
        # Stage to seconds of the clock and of processors.
        self.costs: dict[str, list[float]] = json.loads(self._costs.read_text()) if self._costs.exists() else {}

    @contextmanager
    def stage(self, name: str):
        """Adds up what a part costs, over interruptions too. Processes are counted that ended within it."""

        def processors() -> float:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            return used.ru_utime + used.ru_stime

        clock, before = time.monotonic(), processors()
        try:
            yield
        finally:
            wall, cpu = self.costs.get(name, [0.0, 0.0])
            self.costs[name] = [wall + time.monotonic() - clock, cpu + processors() - before]
            self._costs.write_text(json.dumps(self.costs))

    @contextmanager
    def serving(self, *adapters: str, arguments: tuple[str, ...] = ()):
        """A server with the base and these trained adapters. Its records are on the disk when it is gone."""
        modules = [part for name in adapters for part in ("--lora-modules", f"{name}={self.adapter(name)}")]
        server = Server(self.folder, {BASE: default_model()}, "--threads", str(self.threads), *modules, *arguments)
        try:
            yield server.wait_ready()
        finally:
            server.stop()

    def adapter(self, name: str) -> Path:
        return self.folder / name / "adapter"

    def ask(self, server: Server, file: str, prompts: list[str], *, model: str = BASE, n: int, seed: int, max_tokens: int) -> list[Answer]:
        """`n` answers to each prompt at temperature 1, in order. Those that `file` holds are not asked for again."""
        path, lock, found = self.folder / f"{file}.jsonl", Lock(), {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            answers = [Answer(**answer) for answer in json.loads(line)]
            found[answers[0].prompt] = answers

        def one(number: int) -> None:
            prompt = prompts[number]
            if prompt in found:
                return
            chat = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], n=n, seed=seed + number, temperature=1, max_tokens=max_tokens,
                extra_body={"tidemill": {"compare": True}} if n > 1 else {},
            )
            answers = [
                Answer(prompt, choice.tidemill["id"] if n > 1 else chat.id, choice.message.content, choice.finish_reason == "stop")
                for choice in chat.choices
            ]
            with lock, path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([asdict(answer) for answer in answers]) + "\n")
                found[prompt] = answers

        with server.client(timeout=1200) as client, ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(one, range(len(prompts))))
        return [answer for prompt in prompts for answer in found[prompt]]

    def judge(self, server: Server, judgements: list[dict]) -> None:
        """Sent one after the other, so that their rows are in this order in every dataset; what was sent before is not taken twice."""
        for judgement in judgements:
            answer = server.post("/v1/feedback", judgement)
            assert answer.status in (200, 201), answer.body

    def command(self, *arguments) -> list[str]:
        return [str(part) for part in (binary(), *arguments, "--data", self.data)]

    def run(self, *arguments) -> str:
        command = self.command(*arguments)
        with (self.folder / "commands.log").open("a") as log:
            log.write(f"\n$ tidemill {' '.join(command[1:])}\n")
            log.flush()
            lines = []
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                lines.append(line)
        if process.wait():
            sys.exit(f"`tidemill {' '.join(command[1:])}` failed; the same command again goes on from here")
        return "".join(lines)

    def dataset(self, name: str, *flags) -> str:
        """Builds a snapshot with a quarter of the prompts held out, where there is none yet; what it says of itself."""
        if subprocess.run(self.command("dataset", "show", name), capture_output=True).returncode:
            self.run("dataset", "build", name, "--held-out", "0.25", *flags)
        return self.run("dataset", "show", name)

    def prompts(self, name: str, part: str) -> set[str]:
        """Those of a snapshot's part that is trained on (`train`) or kept from it (`held_out`)."""
        folder = self.folder / f"export-{name}"
        self.run("dataset", "export", name, "--format", "trl", "--out", folder)
        rows = [json.loads(line) for path in sorted(folder.glob(f"*-{part}.jsonl")) for line in path.read_text().splitlines()]
        return {row["prompt"][-1]["content"] for row in rows}

    def train(self, method: str, name: str, *source, **settings) -> None:
        fields = [part for field, value in settings.items() for part in ("--set", f"{field}={json.dumps(value)}")]
        out = ["--base", default_model(), "--out", self.folder / name, "--threads", self.threads]
        self.run("train", method, *source, *out, *fields)

    def evaluate(self, name: str, adapters: list[str], *source) -> dict:
        out = self.folder / f"evaluation-{name}"
        if not (out / "evaluation.json").exists():
            named = [part for adapter in adapters for part in ("--adapter", f"{adapter}={self.adapter(adapter)}")]
            self.run("eval", *named, *source, "--base", default_model(), "--text", TEXT, "--threads", self.threads, "--out", out)
        found = json.loads((out / "evaluation.json").read_text())
        return {contender["name"]: contender for contender in found["contenders"]} | {"examples": found["examples"]}


def drift(evaluation: dict, name: str) -> float:
    """How much worse an adapter's loss on ordinary text is than its base's, as a part of it."""
    return evaluation[name]["text"]["loss"] / evaluation[BASE]["text"]["loss"] - 1


def excerpt(text: str, characters: int = 220) -> str:
    """As it fits into a cell of a table."""
    text = re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= characters else text[: text.rfind(" ", 0, characters)] + " …"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(head), line(["---"] + ["--:"] * (len(head) - 1)), *map(line, rows), ""]


def seconds(costs: dict[str, list[float]]) -> str:
    each = ", ".join(f"{name} {wall:.0f} ({cpu:.0f})" for name, (wall, cpu) in costs.items())
    return f"Seconds by the clock (and of processors): {each}."


def failed_checks(snapshot: str) -> str:
    """What the quality report holds against a dataset, by the names of its checks."""
    names = re.findall(r"^ +fail +(\w+):", snapshot, re.MULTILINE)
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def row_counts(snapshot: str) -> str:
    return re.search(r"rows +(.*)", snapshot)[1]
