"""A word that the model is to avoid: by DPO from pairs of its own answers, of which one holds the word, and by KTO from thumbs alone."""

import re
from dataclasses import dataclass, field
from itertools import groupby

from loop import BASE, QUESTIONS, Answer, Loop, drift, excerpt, row_counts, table
from short import comparison


@dataclass
class Settings:
    word: str = "can"
    questions: int = len(QUESTIONS)
    answers: int = 4
    max_tokens: int = 256
    pairs: int = 2
    seed: int = 1
    dpo: dict = field(default_factory=lambda: dict(learning_rate=2e-4, num_train_epochs=3, beta=0.1))
    # Thumbs down are a third; their weight makes up for it in part.
    kto: dict = field(
        default_factory=lambda: dict(learning_rate=3e-4, num_train_epochs=1, per_device_train_batch_size=16, beta=0.1, undesirable_weight=1.5)
    )
    # Of the base's share of answers that hold the word; of the loss on ordinary text.
    at_most: float = 0.1
    forgotten: float = 0.03


def run(loop: Loop, settings: Settings) -> tuple[list[str], list[tuple[str, bool]]]:
    pattern = re.compile(rf"\b{settings.word}\b", re.IGNORECASE)
    holds = lambda answer: bool(pattern.search(answer.text))
    sampling = dict(n=settings.answers, max_tokens=settings.max_tokens)
    with loop.stage("sampling"), loop.serving() as server:
        answers = loop.ask(server, "answers", QUESTIONS[: settings.questions], seed=1000 * settings.seed, **sampling)
        # What an answer that was cut off would have said yet, nobody knows.
        whole = [answer for answer in answers if answer.whole]
        found = []
        for _, group in groupby(whole, key=lambda answer: answer.prompt):
            group = list(group)
            clean, tainted = ([answer for answer in group if holds(answer) is held] for held in (False, True))
            found += list(zip(clean, tainted))[: settings.pairs]
        loop.judge(server, [comparison("pairs", number, pair, pair[0]) for number, pair in enumerate(found)])
        loop.judge(server, [
            {"target": answer.id, "kind": "thumb", "value": not holds(answer), "source": "thumbs", "idempotency_key": f"thumb-{number}"}
            for number, answer in enumerate(whole)
        ])
    snapshots = {"dpo": loop.dataset("dpo", "--source", "pairs"), "kto": loop.dataset("kto", "--source", "thumbs")}
    for method in snapshots:
        with loop.stage("training"):
            told = getattr(settings, method)
            loop.train(method, method, "--dataset", method, "--despite-report", logging_steps=1, seed=settings.seed, **told)
    # Neither of the two has seen these; that they are among those asked above changes nothing: nobody learnt from the answers.
    unseen = sorted(set(loop.held_out("dpo")) & set(loop.held_out("kto")))
    said: dict[str, list[Answer]] = {}
    with loop.stage("answers again"), loop.serving(*snapshots) as server:
        for model in [BASE, *snapshots]:
            name = model if model == BASE else f"{BASE}:{model}"
            said[model] = loop.ask(server, f"said-{model}", unseen, model=name, seed=500_000 + 1000 * settings.seed, **sampling)
    with loop.stage("evaluation"):
        evaluations = {method: loop.evaluate(method, [method], "--dataset", method, "--max-tokens", settings.max_tokens) for method in snapshots}

    rate = {model: sum(map(holds, answers)) / len(answers) for model, answers in said.items()}
    targets, rows = [], []
    for model, answers in said.items():
        words = sorted(answer.words for answer in answers)
        own = evaluations.get(model)
        cells = [f"{rate[model]:.1%}", f"{1000 * sum(len(pattern.findall(answer.text)) for answer in answers) / sum(words):.2f}"]
        cells += ["" if own is None else f"{rate[model] / rate[BASE]:.2f}", f"{words[len(words) // 2]}"]
        text = (own or evaluations["dpo"])[model]["text"]["loss"]
        cells.append(f"{text:.3f}" if own is None else f"{text:.3f} ({drift(own, model):+.1%})")
        cells.append("" if own is None else f"{own[model]['answers']['kl_per_token']:.3f}")
        rows.append([model, *cells])
        if own is not None:
            left, worse = rate[model] / rate[BASE], drift(own, model)
            targets += [
                (f"{model}: “{settings.word}” at {left:.2f} of the base's rate (at most {settings.at_most})", left <= settings.at_most),
                (f"{model}: loss on text {worse:+.1%} (at most {settings.forgotten:+.0%})", worse <= settings.forgotten),
            ]
    lines = [
        f"The word is “{settings.word}”. {len(unseen)} held-out prompts, {settings.answers} answers each. Rows of pairs: {row_counts(snapshots['dpo'])}; "
        f"of thumbs: {row_counts(snapshots['kto'])}.",
        "",
        *table(["", "answers with the word", "per 1,000 words", "of the base's rate", "median words", "loss on text", "KL per token"], rows),
    ]
    first = {model: {answer.prompt: answer for answer in reversed(answers)} for model, answers in said.items()}
    shown = [prompt for prompt in unseen if holds(first[BASE][prompt])][:3]
    lines += table(["held-out prompt", *said], [[prompt, *(excerpt(first[model][prompt].text) for model in said)] for prompt in shown])
    return lines, targets
