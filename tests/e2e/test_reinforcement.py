"""`tidemill train grpo`: answers sampled while training, rewarded by functions and by a program, killed on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server import binary, default_model
from trainings import content, killed_until_it_ends

JUDGE = """
import json, sys
question = json.load(sys.stdin)
assert question["prompt"][0]["role"] == "user" and question["wanted"] == "short"
print(1 / (1 + len(question["completion"].split())))
"""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    nouns = "river mountain bread engine".split()
    path.write_text("".join(json.dumps({"prompt": f"What is a {noun}?", "wanted": "short"}) + "\n" for noun in nouns))
    return path


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> str:
    judge = tmp_path_factory.mktemp("judge") / "judge.py"
    judge.write_text(JUDGE)
    program = {"name": "short", "type": "program", "command": [sys.executable, str(judge)], "timeout_s": 60}
    return json.dumps([program, {"type": "length", "max": 4}])


def command(prompts: Path, out: Path, rewards: str, **settings) -> list[str]:
    fields = dict(
        learning_rate=1e-4, per_device_train_batch_size=4, num_generations=4, max_completion_length=12, max_steps=4, num_iterations=2,
        save_steps=1, logging_steps=1, reward_funcs=rewards,
    )
    fields = [part for name, value in (fields | settings).items() for part in ("--set", f"{name}={value}")]
    base = ["--base", str(default_model()), "--data", str(out.parent / "data"), "--out", str(out), "--r", "4"]
    return [str(binary()), "train", "grpo", "--file", str(prompts), *base, *fields]


def test_a_training_on_its_own_answers_that_is_killed_gives_the_same_bytes(prompts, rewards, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(command(prompts, whole, rewards), check=True, capture_output=True, text=True, timeout=300)
    assert "4 samples to learn" in done.stdout and "reward" in done.stdout, done.stdout
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for name in ["reward", "rewards/short/mean", "rewards/length/mean", "completions/mean_length", "frac_reward_zero_std"]:
        assert name in lines[0], lines[0]
    # Half of the kills fall between two steps that learn from the same answers.
    killed_until_it_ends(command(prompts, out, rewards), out, 6, lambda _: 1)
    assert content(out) == content(whole)


def test_what_is_wrong_is_said_before_anything_is_computed(prompts, tmp_path):
    out = tmp_path / "out"
    for settings, part in [
        (dict(reward_funcs="[]"), "reward_funcs says what answers are rewarded for"),
        (dict(reward_funcs='[{"type": "regexp"}]'), "unknown variant `regexp`"),
        (dict(num_generations=3), "must be a multiple of num_generations = 3"),
    ]:
        wrong = command(prompts, out, settings.pop("reward_funcs", '[{"type": "json"}]'), **settings)
        told = subprocess.run(wrong, capture_output=True, text=True, timeout=120)
        assert told.returncode != 0 and part in told.stderr, told.stderr
    assert not out.exists()
