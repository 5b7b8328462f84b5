"""Loops on the default model: feedback of simulated people becomes a promoted adapter with nobody touching it, also when the server is killed in
the middle; labels that say nothing are refused with the reason."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from judging import rows
from server import binary, eventually

sys.path.insert(0, str(Path(__file__).parents[1] / "demos"))

import flywheel  # noqa: E402
from flywheel import LOOPS, PEOPLE, Settings, ended, look  # noqa: E402
from loop import BASE, Loop  # noqa: E402

# Less than half of the demonstration's work.
SETTINGS = Settings(
    questions=44, max_tokens=80, held_out=0.4, prompts=8, exposures=12,
    train=dict(method="dpo", n_epochs=3, batch_size=4, learning_rate_multiplier=30, beta=0.1),
)
# Everything beyond a loop's own work: waiting for the other one's training, and a machine with other things to do.
SECONDS = 1500
TRAINING = ("--training-threads", "2")


def command(loop: Loop, *arguments: str) -> str:
    """`tidemill loop …` beside the server, where its configuration is."""
    done = subprocess.run(
        [str(part) for part in (binary(), "loop", *arguments, "--data", loop.data)],
        capture_output=True, text=True, timeout=60, cwd=loop.folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def now(loop: Loop, name: str) -> str:
    """A loop's state, as the database has it at this moment."""
    return next((row["state"] for row in rows(loop.data, "SELECT state FROM loops WHERE name = ?", name)), "none")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """All of it, once: two loops, one kill, and what became of them."""
    loop = Loop(tmp_path_factory.mktemp("loop"), threads=2)
    answers = flywheel.sampled(loop, SETTINGS)
    shown = flywheel.pairs(answers, SETTINGS.shorter)
    assert len(shown) >= 30, f"{len(shown)} pairs of {len(answers)} answers"
    (loop.folder / "tidemill.toml").write_text(flywheel.configuration(SETTINGS, len(shown)))
    usual = median(answer.words for answer in answers)
    told = {"loop": loop, "pairs": len(shown)}
    with loop.serving(arguments=TRAINING) as server:
        before = look(server, "short")
        assert (before["state"], before["cycle"], before["waits_for"]["have"]["preferences"]) == ("waiting", 0, 0)
        flywheel.say(server, flywheel.judgements(shown, SETTINGS.seed))
        eventually("the training is under way", lambda: now(loop, "short") == "training", 300)
        eventually("it has taken a step", lambda: look(server, "short")["waits_for"].get("step", 0) > 0, 600)
        server.kill()
    with loop.serving(arguments=TRAINING) as server:
        eventually("the canary has begun", lambda: "rollout" in look(server, "short")["waits_for"] or ended(server, "short"), SECONDS)
        told["canary"] = look(server, "short")
        with flywheel.traffic(server, SETTINGS, usual / 2):
            eventually("the cycle has ended", lambda: ended(server, "short"), SECONDS)
        eventually("the other one has ended", lambda: ended(server, "shuffled"), SECONDS)
        told |= {name: look(server, name) for name in LOOPS}
        told["metrics"] = server.get("/metrics").body.decode()
        told["models"] = [model["id"] for model in server.get("/v1/models").json()["data"]]
        told["adapters"] = server.get("/v1/adapters").json()["data"]
        told["status"] = command(loop, "status", "short")
        told["paused"] = [command(loop, word, "shuffled", "--json") for word in ("pause", "resume")]
        told["unknown"] = server.get("/v1/loops/none")
        told["again"] = server.post("/v1/loops/shuffled/run", b"")
        eventually("the next cycle has begun", lambda: now(loop, "shuffled") != "waiting", 60)
        told["twice"] = server.post("/v1/loops/shuffled/run", b"")
        # What was begun for it is ended with the server.
        server.post("/v1/loops/shuffled/pause", b"")
    return told


@pytest.mark.timeout(2400)
def test_feedback_becomes_a_promoted_adapter_and_a_kill_changes_nothing(story):
    loop, found = story["loop"], story["short"]
    cycle = found["cycles"][0]
    assert cycle["outcome"] == "promoted", json.dumps(cycle, indent=1)
    actions = [step["action"] for step in cycle["steps"]]
    assert actions == ["snapshot", "quality", "training", "evaluation", "canary", "promoted", "waiting"]
    assert {step["by"] for step in cycle["steps"]} == {"loop:short"}
    assert cycle["steps"][0]["why"] == f"{story['pairs']} new judgements of {len(PEOPLE)} people"
    gates = {gate["gate"]: gate for gate in cycle["steps"][4]["numbers"]["gates"]}
    assert gates["accuracy"]["value"] > SETTINGS.accuracy and gates["raters"]["value"] == len(PEOPLE), gates
    assert gates["shortest"]["value"] < 0.8, "its answers are shorter"
    exposures = cycle["steps"][5]["numbers"]["exposures"]
    assert min(exposures) >= SETTINGS.exposures, exposures
    # The server was killed while it trained: each act was done once all the same.
    data = loop.data
    counted = lambda sql, *values: rows(data, f"SELECT COUNT(*) AS n FROM {sql}", *values)[0]["n"]  # noqa: E731
    assert counted("fine_tuning_jobs WHERE key_id = 'loop:short'") == 1
    assert counted("snapshots WHERE name = 'short'") == 1
    assert counted("rollouts WHERE name = 'loop-short-1'") == 1
    assert counted("files WHERE key_id = 'loop:short' AND purpose = 'fine-tune'") == 0, "copies of rows are gone"
    audit = [row["action"] for row in rows(data, "SELECT action FROM audit WHERE actor = 'loop:short' AND action LIKE 'loop.%' ORDER BY at, id")]
    assert audit == [f"loop.{action}" for action in actions]
    assert {row["actor"] for row in rows(data, "SELECT actor FROM audit WHERE action = 'adapter.evaluate'")} == {f"loop:{name}" for name in LOOPS}
    # The adapter is served and knows where it comes from.
    adapter = next(adapter for adapter in story["adapters"] if adapter["name"].startswith("ft-short-"))
    assert adapter["state"] == "serving" and adapter["aliases"] == ["loop-short-1"] and "loop-short-1" in story["models"]
    lineage = json.loads(rows(data, "SELECT lineage FROM adapters WHERE id = ?", adapter["id"])[0]["lineage"])
    assert lineage["dataset"] == "short@1" and sorted(lineage["raters"]) == sorted(PEOPLE)
    assert "tidemill:loop_cycle{loop=\"short\"} 1" in story["metrics"]
    assert "promoted" in story["status"] and f"0 of {story['pairs']} new judgements" in story["status"]
    assert story["canary"]["waits_for"]["rollout"] == "loop-short-1" and story["canary"]["model"] == BASE


@pytest.mark.timeout(2400)
def test_labels_that_say_nothing_are_refused_with_the_reason(story):
    loop, cycle = story["loop"], story["shuffled"]["cycles"][0]
    assert cycle["outcome"] == "refused", json.dumps(cycle, indent=1)
    shut = {finding["of"]: finding for finding in cycle["findings"]}
    assert "accuracy" in shut and "held-out comparisons" in shut["accuracy"]["found"], cycle
    assert all(finding["change"] for finding in shut.values())
    assert not rows(loop.data, "SELECT 1 FROM rollouts WHERE name LIKE 'loop-shuffled-%'"), "nothing of it reached the traffic"
    adapter = next(adapter for adapter in story["adapters"] if adapter["name"].startswith("ft-shuffled-"))
    assert adapter["state"] == "candidate"


@pytest.mark.timeout(2400)
def test_people_may_look_pause_resume_and_run(story):
    paused, resumed = (json.loads(said) for said in story["paused"])
    assert (paused["paused"], paused["waits_for"]["text"], resumed["paused"]) == (True, "a person: it is paused", False)
    assert (story["unknown"].status, story["unknown"].error["code"]) == (404, "loop_not_found")
    assert story["again"].status == 200
    assert (story["twice"].status, story["twice"].error["code"]) == (409, "invalid_state")
