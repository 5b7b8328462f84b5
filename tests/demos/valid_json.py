"""GRPO for answers that are valid JSON by a schema, on prompts that ask for it and a model that seldom manages."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from loop import BASE, Loop, drift, excerpt, table

FORMS = [
    "Describe {} as a JSON object with the keys name, kind and about. Answer with the JSON object only.",
    "Give me a JSON object about {}. Its keys are name, kind and about. No other text, please.",
    "Answer in JSON only, with the keys name, kind and about: what is {}?",
]
TRAIN = (
    "Paris|a violin|honey|the moon|a penguin|bread|chess|a bridge|winter|coffee|a tiger|the Nile|a doctor|paper|a volcano|rice|soap|"
    "a library|gold|a dentist|the sea|a bicycle|cheese|Rome|an owl|tennis|a candle|the heart|cotton|a farmer|rain|a castle|tomatoes|"
    "a piano|the sun|a spider|glass|Japan|a train|butter|a teacher|the desert|a clock|salt|a horse|Brazil|a garden|milk|a robot|silk|"
    "a lighthouse|apples|the brain|a drum|Egypt|a whale|ice|a baker|football|a telescope"
).split("|")
UNSEEN = (
    "London|a guitar|sugar|the planet Mars|a dolphin|noodles|a tunnel|autumn|tea|an elephant|the Amazon|a nurse|wood|an earthquake|beans|"
    "a museum|silver|a pilot|a lake|a motorcycle|yoghurt|Berlin|an eagle|basketball|a lamp|the lungs|wool|a fisherman|snow|a temple|"
    "potatoes|a flute|the wind|an ant|plastic|Canada|an aeroplane|olive oil|a painter|a compass"
).split("|")
SCHEMA = {
    "type": "object",
    "required": ["name", "kind", "about"],
    "properties": {
        "name": {"type": "string", "minLength": 2},
        "kind": {"type": "string", "minLength": 3},
        "about": {"type": "string", "minLength": 20},
    },
}
# Whole JSON is rare at first: the braces show the way. The other two are there so that an answer says something, and about its question.
REWARDS = [
    (1.0, {"type": "json"}),
    (0.5, {"name": "says", "type": "regex", "pattern": '"about"\\s*:\\s*"[^"]{20,}"'}),
    (0.5, {"name": "subject", "type": "exact_match", "column": "subject", "inside": True, "ignore_case": True}),
    (0.25, {"name": "opens", "type": "regex", "pattern": "^\\{"}),
    (0.25, {"name": "closes", "type": "regex", "pattern": "\\}$"}),
]


@dataclass
class Settings:
    subjects: int = len(TRAIN)
    unseen: int = len(UNSEEN)
    answers: int = 4
    seed: int = 3
    train: dict = field(
        default_factory=lambda: dict(
            learning_rate=3e-4, lr_scheduler_type="constant", per_device_train_batch_size=16, num_generations=8, max_completion_length=96,
            max_steps=40, save_steps=5,
        )
    )
    # Points of valid answers. What a collapse would miss: shares of different answers, of answers that another prompt got, too, and of those
    # that name their subject.
    gain: float = 0.30
    different: float = 0.75
    shared: float = 0.02
    naming: float = 0.75


def questions(subjects: list[str]) -> list[dict]:
    """Each subject in one of the forms, with its name as an answer would hold it."""
    bare = lambda subject: subject.removeprefix("a ").removeprefix("an ").removeprefix("the ").removeprefix("planet ")
    return [{"prompt": FORMS[number % len(FORMS)].format(subject), "subject": bare(subject)} for number, subject in enumerate(subjects)]


def read(text: str) -> dict | list | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, (dict, list)) else None


def follows(found) -> bool:
    properties = SCHEMA["properties"]
    return isinstance(found, dict) and all(isinstance(found.get(key), str) and len(found[key]) >= of["minLength"] for key, of in properties.items())


def run(loop: Loop, settings: Settings) -> tuple[list[str], list[tuple[str, bool]]]:
    asked, unseen = questions(TRAIN[: settings.subjects]), questions(UNSEEN[: settings.unseen])
    prompts = loop.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
    with loop.stage("training"):
        weights, functions = zip(*REWARDS)
        loop.train(
            "grpo", "json", "--file", prompts, logging_steps=1, seed=settings.seed, reward_funcs=functions, reward_weights=weights, **settings.train
        )
    limit = settings.train["max_completion_length"]
    said, evaluated = {}, loop.folder / "held-out.jsonl"
    with loop.stage("answers"), loop.serving("json") as server:
        for model in [BASE, "json"]:
            name = model if model == BASE else f"{BASE}:{model}"
            texts = [row["prompt"] for row in unseen]
            said[model] = loop.ask(server, f"said-{model}", texts, model=name, n=settings.answers, seed=1000 * settings.seed, max_tokens=limit)
    # An evaluation wants rows with answers; which ones they are makes no difference to how far the adapter's own are from its base.
    rows = [{"prompt": row["prompt"], "completion": "{}"} for row in unseen]
    evaluated.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with loop.stage("evaluation"):
        evaluation = loop.evaluate("json", ["json"], "--file", evaluated, "--max-tokens", limit)

    subject = {row["prompt"]: row["subject"].lower() for row in unseen}
    measured, rows = {}, []
    for model, answers in said.items():
        count, prompts_of = len(answers), defaultdict(set)
        for answer in answers:
            prompts_of[answer.text.strip()].add(answer.prompt)
        found = [read(answer.text) for answer in answers]
        measured[model] = one = {
            "valid": sum(value is not None for value in found) / count,
            "schema": sum(map(follows, found)) / count,
            "naming": sum(subject[answer.prompt] in answer.text.lower() for answer in answers) / count,
            "different": len(prompts_of) / count,
            "shared": sum(len(prompts_of[answer.text.strip()]) > 1 for answer in answers) / count,
            "words": statistics.median(answer.words for answer in answers),
        }
        text = evaluation[model]["text"]["loss"]
        own = ["", f"{text:.3f}"] if model == BASE else [f"{evaluation[model]['answers']['kl_per_token']:.3f}", f"{text:.3f} ({drift(evaluation, model):+.1%})"]
        rows.append([model, *(f"{one[key]:.1%}" for key in ("valid", "schema", "naming", "different", "shared")), f"{one['words']:.0f}", *own])
    lines = [f"{len(asked)} prompts to learn on, {len(unseen)} held out with {settings.answers} answers each.", ""]
    head = ["", "valid JSON", "by the schema", "name their subject", "different answers", "shared by prompts", "median words", "KL per token", "loss on text"]
    lines += table(head, rows)
    first = {model: {answer.prompt: answer.text for answer in reversed(answers)} for model, answers in said.items()}
    lines += table(["held-out prompt", *said], [[excerpt(row["prompt"]), *(excerpt(first[model][row["prompt"]]) for model in said)] for row in unseen[:4]])
    before, after = measured[BASE], measured["json"]
    gain = after["valid"] - before["valid"]
    targets = [
        (f"valid JSON {before['valid']:.0%} to {after['valid']:.0%}, {100 * gain:+.0f} points (at least {100 * settings.gain:+.0f})", gain >= settings.gain),
        (f"different answers {after['different']:.0%} (at least {settings.different:.0%})", after["different"] >= settings.different),
        (f"answers that name their subject {after['naming']:.0%} (at least {settings.naming:.0%})", after["naming"] >= settings.naming),
        (f"answers that another prompt got, too, {after['shared']:.0%} (at most {settings.shared:.0%})", after["shared"] <= settings.shared),
    ]
    return lines, targets
