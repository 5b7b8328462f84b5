"""DPO for short answers: of the model's own answers to a question, the shorter one is better. A second model learns from the same pairs
with labels thrown by a coin, as a control."""

import random
from dataclasses import dataclass, field
from itertools import groupby

from loop import BASE, QUESTIONS, Answer, Loop, drift, excerpt, failed_checks, row_counts, table


@dataclass
class Settings:
    questions: int = len(QUESTIONS)
    answers: int = 4
    # Answers that this cuts off are not compared: where they would have ended nobody knows.
    max_tokens: int = 256
    pairs: int = 1
    seed: int = 1
    control: bool = True
    train: dict = field(default_factory=lambda: dict(learning_rate=1e-4, num_train_epochs=2, beta=0.1))
    # Of the base's median length; of the held-out pairs; of the loss on ordinary text.
    at_most: float = 0.5
    accuracy: float = 0.85
    forgotten: float = 0.03


def pairs(answers: list[Answer], most: int) -> list[tuple[Answer, Answer]]:
    """Shortest and longest answer of each prompt, then the next inner two."""
    found = []
    for _, group in groupby(answers, key=lambda answer: answer.prompt):
        whole = sorted((answer for answer in group if answer.whole), key=lambda answer: (answer.words, answer.id))
        found += [(a, b) for a, b in list(zip(whole, reversed(whole)))[: min(most, len(whole) // 2)] if a.words < b.words]
    return found


def comparison(source: str, number: int, shown: tuple[Answer, Answer], winner: Answer) -> dict:
    value = {"candidates": [answer.id for answer in shown], "winner": winner.id}
    return {"kind": "comparison", "value": value, "source": source, "idempotency_key": f"{source}-{number}"}


def run(loop: Loop, settings: Settings) -> tuple[list[str], list[tuple[str, bool]]]:
    models = {"short": "length"} | ({"control": "coin"} if settings.control else {})
    with loop.stage("sampling"), loop.serving() as server:
        asked = QUESTIONS[: settings.questions]
        answers = loop.ask(server, "answers", asked, n=settings.answers, seed=1000 * settings.seed, max_tokens=settings.max_tokens)
        coin = random.Random(settings.seed)
        for number, pair in enumerate(pairs(answers, settings.pairs)):
            judgements = [comparison("length", number, pair, pair[0])]
            if settings.control:
                judgements.append(comparison("coin", number, pair, coin.choice(pair)))
            loop.judge(server, judgements)
    snapshots, evaluations = {}, {}
    for model, source in models.items():
        snapshots[model] = loop.dataset(model, "--source", source)
        with loop.stage("training"):
            loop.train("dpo", model, "--dataset", model, "--despite-report", logging_steps=1, seed=settings.seed, **settings.train)
    with loop.stage("evaluation"):
        limit = ["--max-tokens", settings.max_tokens]
        for model in models:
            # A control is held against labels of its own kind; the others' say nothing about what it learnt.
            evaluations[model] = loop.evaluate(model, [model], "--dataset", model, *limit)

    base = evaluations["short"][BASE]
    rows = []
    for model, found, evaluation in [(BASE, base, None), *((model, evaluations[model][model], evaluations[model]) for model in models)]:
        said, text = found["answers"], f"{found['text']['loss']:.3f}"
        if evaluation:
            won = found["preferences"]["accuracy"]
            judged = f"{won['share']:.2f} ({won['interval']['low']:.2f}–{won['interval']['high']:.2f}) of {won['trials']}"
            rows.append([model, f"{said['median_words']:.0f}", f"{said['truncated']['share']:.0%}", judged, f"{text} ({drift(evaluation, model):+.1%})", f"{said['kl_per_token']:.3f}"])
        else:
            rows.append([model, f"{said['median_words']:.0f}", f"{said['truncated']['share']:.0%}", "", text, ""])
    lines = [f"Rows: {row_counts(snapshots['short'])}. The quality report fails {failed_checks(snapshots['short'])}, and rightly: length is all that these labels say.", ""]
    lines += table(["", "median words, held-out prompts", "cut off", "held-out pairs won", "loss on text", "KL per token"], rows)
    examples = evaluations["short"]["examples"][:3]
    lines += table(["held-out prompt", "base", "short"], [[excerpt(e["prompt"]), excerpt(e["answers"][1]), excerpt(e["answers"][0])] for e in examples])

    short = evaluations["short"]["short"]
    ratio = lambda found: found["answers"]["median_words"] / base["answers"]["median_words"]
    share, worse = short["preferences"]["accuracy"]["share"], drift(evaluations["short"], "short")
    targets = [
        (f"median length {ratio(short):.2f} of the base's (at most {settings.at_most})", ratio(short) <= settings.at_most),
        (f"held-out pairs won {share:.2f} (at least {settings.accuracy})", share >= settings.accuracy),
        (f"loss on text {worse:+.1%} (at most {settings.forgotten:+.0%})", worse <= settings.forgotten),
    ]
    if settings.control:
        control = evaluations["control"]["control"]
        won = control["preferences"]["accuracy"]["interval"]
        targets += [
            (f"control: median length {ratio(control):.2f} of the base's (at least 0.75)", ratio(control) >= 0.75),
            (f"control: 0.5 within the interval of held-out pairs won, {won['low']:.2f}–{won['high']:.2f}", won["low"] <= 0.5 <= won["high"]),
        ]
    return lines, targets
