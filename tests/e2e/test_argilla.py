"""A queue goes through the real Argilla SDK and comes back; its server needs Elasticsearch and is not part of this."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from queues import ask, closed_server, did, standing, winner

SESSION = Path(__file__).parent / "argilla_session.py"
PATH = "/v1/labeling/queues/argilla"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with closed_server(tmp_path_factory.mktemp("argilla")) as server:
        yield server


@pytest.fixture(scope="module")
def written(gateway, tmp_path_factory):
    """What the SDK made of a queue of four pairs: facts about the settings, and the two files that it writes."""
    python = os.environ.get("TIDEMILL_ARGILLA_PYTHON", "")
    if not Path(python).is_file():
        pytest.fail("TIDEMILL_ARGILLA_PYTHON must name a Python that has `argilla` (run `make test-e2e`)")
    folder = tmp_path_factory.mktemp("sdk")
    ask(gateway, "POST", "/v1/labeling/queues", {"name": "argilla", "guidelines": "Be fair.", "overlap": 2})
    tasks = [{"prompt": f"What is {n} + {n}?", "answer_a": f"{2 * n}", "answer_b": "no idea"} for n in range(4)]
    ask(gateway, "POST", f"{PATH}/tasks", {"tasks": tasks})
    records = ask(gateway, "GET", f"{PATH}/argilla/records")
    (folder / "settings.json").write_text(json.dumps(ask(gateway, "GET", f"{PATH}/argilla/settings")))
    (folder / "records.json").write_text(json.dumps(records))
    plan = [
        (0, 5, "answer1", "submitted", "it is right"), (0, 6, "answer2", "submitted", None), (1, 5, "tie", "submitted", None),
        (1, 6, "both_bad", "draft", None), (2, 5, "both_bad", "submitted", None), (2, 6, None, "discarded", None),
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [python, "-W", "ignore", SESSION, folder / "settings.json", folder / "records.json", folder / "plan.json", folder]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = {name: json.loads((folder / f"{name}.json").read_text()) for name in ["facts", "flat", "nested"]}
    return {**files, "records": records}


def test_it_is_the_pinned_version(written):
    assert f"argilla=={written['facts']['version']}" in (Path(__file__).parent / "argilla.lock").read_text().splitlines()


def test_the_sdk_reads_our_settings(written):
    facts = written["facts"]
    assert facts["fields"] == ["prompt", "answer1", "answer2"]
    assert facts["labels"] == ["answer1", "answer2", "tie", "both_bad"]
    assert (facts["required"], facts["hidden"], facts["min_submitted"]) == (["preference"], ["tidemill_answer1"], 2)
    assert facts["guidelines"] == "Be fair."
    assert facts["prompt"] == [{"role": "user", "content": "What is 0 + 0?"}]


def test_a_file_without_statuses_is_refused_whole(gateway, written):
    summary = ask(gateway, "POST", f"{PATH}/argilla/import", written["nested"], scope="feedback")
    assert (summary["recorded"], summary["refused"]) == (0, 6)
    assert "to_list(flatten=True)" in summary["refusals"][0]["message"]
    assert standing(gateway, "argilla", "argilla") == []


def test_what_the_sdk_writes_comes_back_once(gateway, written):
    assert did(ask(gateway, "POST", f"{PATH}/argilla/import", written["flat"], scope="feedback")) == {
        "recorded": 4, "skipped": 1, "unchanged": 1, "silent": 1,
    }
    rows = standing(gateway, "argilla", "argilla")
    first = written["records"][0]["metadata"]["tidemill_answer1"]
    other = {"a": "b", "b": "a"}[first]
    assert sorted(winner(row) for row in rows) == sorted([first, other, "tie", "both_bad"])
    assert {row["author"].split(":")[0] for row in rows} == {"argilla"}
    again = ask(gateway, "POST", f"{PATH}/argilla/import", written["flat"], scope="feedback")
    assert did(again) == {"unchanged": 6, "silent": 1}
    assert standing(gateway, "argilla", "argilla") == rows


def test_a_changed_mind_edits(gateway, written):
    changed = json.loads(json.dumps(written["flat"]))
    changed[1]["preference.responses"][0] = "answer2"
    assert did(ask(gateway, "POST", f"{PATH}/argilla/import", changed, scope="feedback"))["edited"] == 1
    assert did(ask(gateway, "POST", f"{PATH}/argilla/import", written["flat"], scope="feedback"))["edited"] == 1
