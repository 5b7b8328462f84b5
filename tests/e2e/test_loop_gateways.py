"""A loop on two gateways that share a Postgres: one of them runs it, each act is done once, and the other one goes on when that is killed, as far as it
can without the other's files."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import GOLDENS
from postgres import Postgres
from server import Server, binary, eventually

sys.path.insert(0, str(Path(__file__).parents[1] / "demos"))

from flywheel import ended, look, toml  # noqa: E402

NAME = "better"
SUBJECTS = ["the sea", "old trains", "a quiet garden", "seven stars", "bread and salt", "snow in May", "the long road", "a red door"]
# Eight sentences that are alike, about a model that says nothing: no check is of interest here.
CHECKS = """truncated exact_duplicates near_duplicates contradictions length_bias length_model position_bias markdown_bias label_noise cycles agreement
reliability user_share rater_share overlap language diversity distinct repeated_answer drift""".split()
OFF = ["text_loss", "kl_per_token", "shortest", "longest", "refusals", "truncated"]
POLICY = {
    "model": "tiny",
    "when": {"preferences": len(SUBJECTS), "raters": 2},
    "feedback": {"from": ["correction"], "held_out": 0.25, "truncated": True},
    "quality": {"allow": CHECKS, "thresholds": {"size": {"preferences": {"warn": 5, "fail": 2}}}},
    "train": {"method": "dpo", "n_epochs": 1, "batch_size": 2},
    "evaluate": {"prompts": 0},
    "gates": dict.fromkeys(OFF, "off"),
    "rollout": {"kind": "canary", "steps": [{"set_weight": 50}], "metrics": [{"metric": "error_rate", "guardrail": {"max": 0.5}}]},
}


class Gateway:
    """A machine of its own: what has to be shared is, and nothing else."""

    def __init__(self, folder: Path, shared: Path, database: str):
        (folder / "data").mkdir(parents=True)
        for name in ("adapters", "datasets"):
            (shared / name).mkdir(parents=True, exist_ok=True)
        (folder / "data" / "adapters").symlink_to(shared / "adapters")
        (folder / "tidemill.toml").write_text(f"[loop.{NAME}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in POLICY.items()))
        self.folder, self.arguments = folder, ["--database", database, "--datasets", str(shared / "datasets")]
        self.server: Server | None = None

    def start(self, jobs: int) -> Server:
        arguments = [*self.arguments, "--training-jobs", str(jobs), "--training-threads", "1"]
        self.server = Server(self.folder, {"tiny": GOLDENS / "qwen2"}, *arguments).wait_ready()
        return self.server

    def status(self) -> str:
        """What the command line says where this machine's data are."""
        arguments = ["loop", "status", NAME, "--data", self.folder / "data", *self.arguments[:2]]
        done = subprocess.run([str(part) for part in (binary(), *arguments)], capture_output=True, text=True, timeout=60, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def runs_the_loop(self) -> bool:
        return "tidemill:loop_cycle" in self.server.metrics()

    def evaluated(self) -> bool:
        return os.path.exists(self.folder / "data" / "loops" / NAME / "1" / "evaluation.json")


def correct(asked: Server, told: Server) -> None:
    """Two people mend what one server answered, and tell another."""
    for number, subject in enumerate(SUBJECTS):
        messages = [{"role": "user", "content": f"Tell me about {subject}, please."}]
        answer = asked.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 8, "seed": number})
        assert answer.status == 200, answer.body
        text = f"There is much to say about {subject}: it is number {number} of the things that people like to hear about."
        said = {"target": answer.json()["id"], "kind": "correction", "value": text, "author": ["ann", "bob"][number % 2]}
        kept = told.post("/v1/feedback", said)
        assert kept.status == 201, kept.body


def test_of_two_gateways_one_runs_the_loop_and_the_other_goes_on_when_that_is_killed(tmp_path):
    postgres = Postgres()
    gateways = [Gateway(tmp_path / f"gateway{number}", tmp_path / "shared", postgres.url) for number in range(2)]
    first, second = gateways
    try:
        # It takes the training and leaves it waiting.
        leader = first.start(jobs=0)
        eventually("the first one leads", first.runs_the_loop)
        other = second.start(jobs=1)
        correct(leader, other)
        eventually("the training waits", lambda: look(leader, NAME)["waits_for"].get("job"), 180)
        assert first.runs_the_loop() and not second.runs_the_loop()
        here, there = look(leader, NAME)["waits_for"], look(other, NAME)["waits_for"]
        assert (here["elsewhere"], there["elsewhere"], here["job"]) == (False, True, there["job"])

        assert "another server" not in first.status() and "another server" in second.status()

        leader.kill()
        eventually("the other one leads", second.runs_the_loop)
        # Its files are on the disk of the one that was killed: it waits, and says what for.
        found = look(other, NAME)
        assert found["state"] == "training" and "its files are in the data directory of another server" in found["waits_for"]["text"], found
        assert f"cancel {there['job']} and run the loop again" in found["waits_for"]["text"]

        # Somebody is in the middle of editing: a cycle under way keeps its policy, and the evaluation needs no file.
        (second.folder / "tidemill.toml").write_text(f"[loop.{NAME}]\nmodel =\n")
        back = first.start(jobs=1)
        eventually("the cycle has ended", lambda: ended(other, NAME), 300)
        assert second.runs_the_loop() and not first.runs_the_loop()
        cycle = look(other, NAME)["cycles"][0]
        assert look(back, NAME)["cycles"][0] == cycle
        actions = [step["action"] for step in cycle["steps"]]
        # Of two comparisons no gate learns enough.
        assert actions == ["snapshot", "quality", "training", "evaluation", "refused", "waiting"], cycle
        assert {step["by"] for step in cycle["steps"]} == {f"loop:{NAME}"}
        assert (first.evaluated(), second.evaluated()) == (False, True)
        counted = lambda table: postgres.query(f"SELECT COUNT(*) FROM {table}")  # noqa: E731
        assert [counted(table) for table in ("fine_tuning_jobs", "snapshots", "adapters")] == [["1"], ["1"], ["1"]]
        audit = postgres.query("SELECT action FROM audit WHERE action LIKE 'loop.%' ORDER BY at, id")
        assert audit == [f"loop.{action}" for action in actions]
    finally:
        for gateway in gateways:
            if gateway.server is not None:
                gateway.server.kill()
        postgres.close()
