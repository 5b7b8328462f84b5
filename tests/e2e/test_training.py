"""`tidemill train`: from rows to an adapter or a model that is served, killed and stopped on the way."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from conftest import GOLDENS, running
from server import binary, default_model
from trainings import content, killed_until_it_ends, steps

NOUNS = "river mountain bread engine music cat winter computer book garden ocean train doctor school coffee moon".split()
UNSEEN = "city tree bridge window paper fire".split()


def question(noun: str) -> list[dict]:
    return [{"role": "user", "content": f"What is a {noun}?"}]


def pair(noun: str) -> dict:
    short = f"A {noun} is a familiar thing."
    long = (
        f"Certainly! A {noun} is a very interesting subject with many different aspects. First, it has a long history that goes back many "
        f"years. Second, there are many kinds of {noun} in the world, and each of them has its own properties."
    )
    answer = lambda text: [{"role": "assistant", "content": text}]
    return {"prompt": question(noun), "chosen": answer(short), "rejected": answer(long)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "short.jsonl"
    path.write_text("".join(json.dumps(pair(noun)) + "\n" for noun in NOUNS))
    return path


SETTINGS = dict(learning_rate=2e-4, per_device_train_batch_size=4, max_steps=6, save_steps=1, logging_steps=1)


def command(rows: Path, out: Path, *more: str, method: str = "dpo", **settings) -> list[str]:
    base = ["--base", str(default_model()), "--data", str(out.parent / "data"), "--out", str(out), "--r", "8"]
    fields = [part for name, value in (SETTINGS | settings).items() for part in ("--set", f"{name}={value}")]
    return [str(binary()), "train", method, "--file", str(rows), *base, *fields, *more]


def train(rows: Path, out: Path, *more: str, **settings) -> str:
    return subprocess.run(command(rows, out, *more, **settings), check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "short"
    print(train(rows, out))
    return out


def test_a_training_that_is_killed_again_and_again_gives_the_same_bytes(rows, whole, tmp_path):
    out = tmp_path / "short"
    # Wherever it is then; every other one is left alone for two steps.
    killed_until_it_ends(command(rows, out), out, 8, lambda killed: 1 + killed % 2)
    assert content(out) == content(whole)


def test_a_signal_stops_it_after_a_step_and_the_same_command_goes_on(rows, whole, tmp_path):
    out = tmp_path / "short"
    process = subprocess.Popen(command(rows, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command goes on from there" in rest, rest
    assert not (out / "adapter").exists()
    train(rows, out)
    assert content(out) == content(whole)


def test_what_was_learnt_is_served(rows, tmp_path):
    out = tmp_path / "short"
    # The better answers of the pairs are what is imitated.
    train(rows, out, method="sft", learning_rate=1e-3, max_steps=10, lr_scheduler_type="constant")
    with running(tmp_path, {"base": default_model()}, "--lora-modules", f"short={out / 'adapter'}") as server, server.client() as client:

        def words(model: str) -> list[int]:
            lengths = []
            for noun in UNSEEN:
                chat = client.chat.completions.create(model=model, messages=question(noun), temperature=0, max_tokens=120)
                lengths.append(len(chat.choices[0].message.content.split()))
            return sorted(lengths)

        base, tuned = words("base"), words("base:short")
    print(f"\nwords of an answer: {base} became {tuned}")
    middle = len(UNSEEN) // 2
    assert tuned[middle] * 2 <= base[middle]


def test_an_adapter_is_evaluated_beside_its_base(rows, whole, tmp_path):
    text = GOLDENS / "smollm2" / "perplexity.txt"
    common = ["--base", str(default_model()), "--data", str(tmp_path), "--file", str(rows), "--text", str(text)]
    command = [str(binary()), "eval", "--adapter", f"short={whole / 'adapter'}", *common, "--prompts", "4", "--max-tokens", "32"]
    with running(tmp_path, {"judge": default_model()}) as server:
        judge = ["--judge", "judge", "--judge-url", server.base_url]
        said = subprocess.run([*command, *judge, "--out", str(tmp_path / "out")], check=True, capture_output=True, text=True, timeout=300).stdout
    print(said)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    short, base = found["contenders"]
    assert (short["name"], base["name"]) == ("short", "base")
    # These are the comparisons that it learnt.
    assert short["preferences"]["accuracy"]["share"] == 1 and short["preferences"]["accuracy"]["trials"] == len(NOUNS)
    assert short["text"]["tokens"] == base["text"]["tokens"] > 1000
    # A few small steps on sixteen rows change little of what it knows.
    assert abs(short["text"]["loss"] / base["text"]["loss"] - 1) < 0.05
    assert short["answers"]["answers"] == 4 and short["answers"]["kl_per_token"] > 0 and "kl_per_token" not in base["answers"]
    duel = found["duel"]
    assert duel["won"] + duel["lost"] + duel["tied"] == 4 and found["judge"] == "judge"
    assert "won" in said and (tmp_path / "out" / "evaluation.html").read_text().count("What is a") == 4


def test_a_machine_is_told_in_lines_and_wrong_things_by_name(rows, whole, tmp_path):
    job = tmp_path / "job"
    job.mkdir()
    spec = json.loads((whole / "spec.json").read_text())
    spec["config"] |= {"max_steps": 2}
    (job / "spec.json").write_text(json.dumps(spec))
    run = lambda: subprocess.run([str(binary()), "train", "--job", str(job)], capture_output=True, text=True, timeout=300, env=os.environ)
    done = run()
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done
    assert [event["event"] for event in events if event["event"] != "preparing"] == ["prepared", "progress", "progress", "finished"]
    assert events[0]["train"] == len(NOUNS) and events[0]["steps"] == 2
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["step"] for event in progress] == [1, 2]
    assert {"loss", "grad_norm", "learning_rate", "rewards/margins"} <= progress[1]["metrics"].keys()
    assert (Path(events[-1]["adapter"]) / "adapter_model.safetensors").exists()

    spec["lora"]["r"] = 0
    (job / "spec.json").write_text(json.dumps(spec))
    done = run()
    assert done.returncode == 1 and json.loads(done.stdout)["message"] == "lora.r: must be at least 1", done

    for more, text in [
        (["--set", "beta=-1"], "beta must be above 0"),
        (["--set", "betta=1"], "unknown field `betta`"),
        (["--target-modules", "lm_head"], "`lm_head` is none of"),
        (["--base", "nothing"], "no model `nothing`"),
    ]:
        wrong = [str(binary()), "train", "dpo", "--file", str(rows), "--base", str(default_model()), "--data", str(tmp_path), *more]
        if "--base" in more:
            wrong = [str(binary()), "train", "dpo", "--file", str(rows), "--data", str(tmp_path), *more]
        done = subprocess.run(wrong, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and text in done.stderr, (more, done)


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(rows, tmp_path):
    out = tmp_path / "short"
    said = train(rows, out, "--dry-run")
    assert "6 steps" in said and "memory" in said and "time" in said, said
    assert not out.exists()


def tidemill(*arguments: object, status: int = 0) -> str:
    done = subprocess.run([str(binary()), *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A training with forty pairs to learn and thirty-two held out, beside a store; and the same with shuffled labels."""
    home = tmp_path_factory.mktemp("kept")
    tidemill("key", "list", "--data", home / "data")
    many = [f"{colour} {noun}" for colour in ["red", "small", "old"] for noun in [*NOUNS, *UNSEEN]]
    for name, nouns in [("train", many[:40]), ("held", many[-32:]), ("prompts", UNSEEN)]:
        (home / f"{name}.jsonl").write_text("".join(json.dumps(pair(noun)) + "\n" for noun in nouns))
    for name, more in [("short", []), ("control", ["--shuffled-labels"])]:
        rows = home / "train.jsonl"
        subprocess.run(command(rows, home / name, *more, learning_rate=3e-4, max_steps=10), check=True, timeout=300)
    return home


def judged(home: Path, adapter: object, *more: str, rows: str = "held", status: int = 0) -> tuple[dict, str]:
    """`tidemill eval` on comparisons alone."""
    gates = home / "gates.json"
    names = "win_rate text_loss kl_per_token shortest longest refusals truncated raters rater_share".split()
    gates.write_text(json.dumps(dict.fromkeys(names) | {"preferences": 40}))
    common = ["--base", default_model(), "--data", home / "data", "--file", home / f"{rows}.jsonl", "--prompts", "0", "--gates", gates]
    said = tidemill("eval", "--adapter", adapter, *common, "--out", home / "out", *more, status=status)
    print(said)
    return json.loads((home / "out" / "evaluation.json").read_text()), said


def test_what_was_trained_is_registered_and_keeps_its_evaluation(kept):
    data = ["--data", kept / "data"]
    listed = tidemill("adapter", "list", *data)
    assert listed.startswith("short@") and "candidate" in listed and "control" not in listed
    found, said = judged(kept, "short")
    assert found["contenders"][0]["trained_on"] == {"samples": 40, "raters": 0, "rater_share": 0.0, "shuffled_labels": False}
    assert found["gates"]["passed"] and "pass: all 3 gates are open" in said
    shown = tidemill("adapter", "show", "short", *data)
    assert "gates passed" in shown and "accuracy 1.000" in shown and "held.jsonl" in shown
    # The same training again is the same adapter.
    again = subprocess.run(
        command(kept / "train.jsonl", kept / "short", "--name", "short", learning_rate=3e-4, max_steps=10),
        check=True, capture_output=True, text=True, timeout=300,
    )
    assert "is registered for" in again.stdout
    assert len(tidemill("adapter", "list", *data).splitlines()) == 1
    # Other weights of the same shapes.
    other = kept / "other.gguf"
    bytes_ = bytearray(default_model().read_bytes())
    bytes_[-1] ^= 1
    other.write_bytes(bytes_)
    refused = tidemill("eval", "--adapter", "short", "--base", f"{default_model().stem}={other}", *data, "--file", kept / "held.jsonl", status=1)
    assert "other weights" in refused
    refused = tidemill("adapter", "import", "again", kept / "short", "--base", other, *data, status=1)
    assert "other weights" in refused and "--any-base" in refused
    tidemill("adapter", "import", "again", kept / "short", "--base", other, "--any-base", *data)
    assert "only shapes are compared" in tidemill("adapter", "show", "again", *data)
    other.unlink()


def test_shuffled_labels_are_refused_by_the_gates(kept):
    for adapter, more in [("control/adapter", ["--shuffled-labels"]), ("short/adapter", ["--shuffled-labels"])]:
        found, said = judged(kept, kept / adapter, *more, status=4)
        shut = [check["gate"] for check in found["gates"]["checks"] if not check["passed"]]
        assert shut == ["accuracy"] and "refused: 1 of 3 gates are shut" in said
    assert found["contenders"][0]["preferences"]["accuracy"]["share"] == 0.5


def test_rules_judge_the_answers(kept):
    rules = json.dumps([{"type": "length", "max": 12, "unit": "words"}, {"type": "regex", "pattern": "^A "}])
    common = ["--base", default_model(), "--data", kept / "data", "--file", kept / "prompts.jsonl", "--max-tokens", "24"]
    said = tidemill(
        "eval", "--adapter", f"short={kept / 'short' / 'adapter'}", *common, "--reward-funcs", rules, "--reward-weights", "[1, 0.5]",
        "--gates", "default", "--out", kept / "rules", status=4,
    )
    print(said)
    found = json.loads((kept / "rules" / "evaluation.json").read_text())
    assert found["judge"] == "length + 0.5 × regex"
    names = ["short", "base"]

    def reward(text: str) -> float:
        words = len(text.split())
        return max(0.0, 1.0 - max(0, words - 12) / 12) + 0.5 * text.startswith("A ")

    totals = [[reward(example["answers"][place]) for example in found["examples"]] for place in range(2)]
    won = sum(one > other for one, other in zip(*totals, strict=True))
    lost = sum(one < other for one, other in zip(*totals, strict=True))
    assert (found["duel"]["won"], found["duel"]["lost"], found["duel"]["tied"]) == (won, lost, len(UNSEEN) - won - lost)
    for place, name in enumerate(names):
        rewards = found["contenders"][place]["rewards"]
        assert found["contenders"][place]["name"] == name
        assert rewards["length"] + 0.5 * rewards["regex"] == pytest.approx(sum(totals[place]) / len(UNSEEN))
    assert "win_rate" in said and "not measured" in said
    for wrong, text in [('[{"type": "jason"}]', "--reward-funcs"), ("[]", "name at least one"), ('[{"type": "length"}]', "give min, max or both")]:
        refused = tidemill("eval", "--adapter", kept / "short" / "adapter", *common, "--reward-funcs", wrong, status=1)
        assert text in refused
def test_all_weights_are_trained_and_the_folder_is_served(rows, tmp_path):
    out = tmp_path / "whole"
    fields = SETTINGS | dict(learning_rate=1e-4, lr_scheduler_type="constant", max_steps=8, save_steps=100)
    common = ["--file", str(rows), "--base", str(default_model()), "--data", str(tmp_path / "data"), "--out", str(out), "--full"]
    run = [str(binary()), "train", "sft", *common, *(part for name, value in fields.items() for part in ("--set", f"{name}={value}"))]
    try:
        said = subprocess.run(run, check=True, capture_output=True, text=True, timeout=600).stdout
        assert f"model    {out / 'model'}" in said, said
        assert json.loads((out / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        with running(tmp_path, {"whole": out / "model"}) as server, server.client() as client:
            chat = client.chat.completions.create(model="whole", messages=question(UNSEEN[0]), temperature=0, max_tokens=60)
        print(f"\n{chat.choices[0].message.content}")
        assert chat.choices[0].finish_reason == "stop" and len(chat.choices[0].message.content.split()) < 20
        # What cannot be done says so before anything is opened, and so does a folder that holds another training.
        rewarded = ["--set", 'reward_funcs=[{"type": "json"}]']
        for method, more, reason in [("grpo", rewarded, "all weights between turns"), ("reward", [], "holds a training with another configuration")]:
            wrong = subprocess.run([str(binary()), "train", method, *common, *more], capture_output=True, text=True, timeout=60)
            assert wrong.returncode == 1 and reason in wrong.stderr, wrong
    finally:
        # Checkpoints of all weights are large.
        shutil.rmtree(out, ignore_errors=True)
