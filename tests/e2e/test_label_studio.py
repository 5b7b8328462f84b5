"""A queue goes to the real Label Studio, people judge it there, and every judgement is here once: by webhook, and by its export."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from label_studio import OWNER, LabelStudio, comment, side, verdict
from queues import ask, closed_server, did, standing, winner
from server import binary, free_port

# Seven of them are judged; on which side an answer stands is chance.
PAIRS = 40
ACTIONS = ["ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"]


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory):
    program = os.environ.get("TIDEMILL_LABEL_STUDIO", "")
    if not Path(program).is_file():
        pytest.fail("TIDEMILL_LABEL_STUDIO must name the program `label-studio` (run `make test-e2e`)")
    studio = LabelStudio(tmp_path_factory.mktemp("label-studio"), free_port())
    try:
        yield studio.wait_ready()
    finally:
        studio.kill()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with closed_server(tmp_path_factory.mktemp("labeling")) as server:
        yield server


class Queue:
    """A queue here and its project there, with a webhook between them."""

    def __init__(self, server, studio: LabelStudio, name: str, pairs: int, hook: bool = True):
        self.server, self.studio, self.name = server, studio, name
        self.path = f"/v1/labeling/queues/{name}"
        ask(server, "POST", "/v1/labeling/queues", {"name": name, "guidelines": "Prefer <short> & true.", "overlap": 2})
        tasks = [{"prompt": f"What is {n} + {n}?", "answer_a": f"It is {2 * n}.", "answer_b": f"{2 * n}, I <b>think</b>"} for n in range(pairs)]
        ask(server, "POST", f"{self.path}/tasks", {"tasks": tasks})
        self.project = studio.call("POST", "/api/projects", ask(server, "GET", f"{self.path}/label-studio/project"))["id"]
        self.exported = ask(server, "GET", f"{self.path}/label-studio/tasks")
        studio.call("POST", f"/api/projects/{self.project}/import", self.exported)
        # Their numbers, in the order of the export.
        self.numbers = sorted(task["id"] for task in studio.call("GET", f"/api/tasks?project={self.project}&page_size=100")["tasks"])
        assert len(self.numbers) == pairs
        if hook:
            self.hook = studio.call("POST", "/api/webhooks/", {
                "project": self.project, "url": f"http://127.0.0.1:{server.port}{self.path}/label-studio/webhook",
                "headers": {"Authorization": f"Bearer {server.keys['feedback']}"},
                "send_payload": True, "send_for_all_actions": False, "actions": ACTIONS, "is_active": True,
            })

    def annotate(self, task: int, *result: dict, **fields) -> dict:
        return self.studio.call("POST", f"/api/tasks/{self.numbers[task]}/annotations/", {"result": list(result), "lead_time": 2.5, **fields})

    def better(self, task: int, answer: str, **fields) -> dict:
        """Clicks the side on which answer `a` or `b` stands."""
        left = self.exported[task]["meta"]["tidemill"]["answer1"]
        return self.annotate(task, side("left" if answer == left else "right"), **fields)

    def feedback(self) -> list[dict]:
        """What stands, the oldest first."""
        return standing(self.server, self.name, "label-studio")

    def said(self, task: int) -> list[str]:
        """Per rater, which answer of a task won."""
        of_task = self.exported[task]["data"]["tidemill_task"]
        return sorted(winner(row) for row in self.feedback() if row["task_id"] == of_task)

    def download(self) -> list[dict]:
        return self.studio.call("GET", f"/api/projects/{self.project}/export?exportType=JSON&download_all_tasks=true")

    def upload(self, export: list[dict]) -> dict:
        return did(ask(self.server, "POST", f"{self.path}/label-studio/import", export, scope="feedback"))

    def progress(self) -> dict:
        return ask(self.server, "GET", self.path)["progress"]


@pytest.fixture(scope="module")
def rater(label_studio) -> int:
    """A second person."""
    user = {"email": "rater@example.com", "username": "rater", "password": "correct-horse-2"}
    return label_studio.call("POST", "/api/users/", user)["id"]


@pytest.fixture(scope="module")
def judged(gateway, label_studio, rater):
    """Every kind of judgement, made while the webhook listens."""
    queue = Queue(gateway, label_studio, "all-kinds", PAIRS)
    queue.made = {
        "a": queue.better(0, "a"), "b": queue.better(1, "b"), "tie": queue.annotate(2, verdict("tie")),
        "both_bad": queue.annotate(3, verdict("both_bad")), "skip": queue.annotate(4, comment("no idea"), was_cancelled=True),
        "gold": queue.better(5, "a", ground_truth=True), "commented": queue.annotate(6, side("left"), comment("it is shorter")),
        "second": queue.better(0, "b", completed_by=rater),
    }
    return queue


def test_it_is_the_pinned_version(label_studio):
    pinned = (Path(__file__).parent / "label_studio.lock").read_text().splitlines()
    assert f"label-studio=={label_studio.version()}" in pinned


def test_label_studio_takes_our_project_and_shows_nothing_that_tells_the_models(gateway, label_studio):
    queue = Queue(gateway, label_studio, "project", 2, hook=False)
    project = label_studio.call("GET", f"/api/projects/{queue.project}")
    assert project["maximum_annotations"] == 2
    assert "Prefer &lt;short&gt; &amp; true." in project["expert_instruction"]
    controls = project["parsed_label_config"]
    assert {name: control["type"] for name, control in controls.items()} == {"comparison": "Pairwise", "verdict": "Choices", "comment": "TextArea"}
    assert controls["verdict"]["labels"] == ["tie", "both_bad"]
    task = label_studio.call("GET", f"/api/tasks/{queue.numbers[0]}")
    assert sorted(task["data"]) == ["answer1", "answer2", "prompt", "tidemill_task"]
    assert "<b>think</b>" in task["data"]["answer1"] + task["data"]["answer2"]


def test_webhooks_record_each_kind_of_judgement(judged):
    assert [judged.said(task) for task in range(7)] == [
        ["a", "b"], ["b"], ["tie"], ["both_bad"], [], [], ["a" if judged.exported[6]["meta"]["tidemill"]["answer1"] == "a" else "b"],
    ]
    rows = judged.feedback()
    assert len(rows) == 6
    assert {row["author"] for row in rows} == {"label-studio:1", f"label-studio:{judged.made['second']['completed_by']}"}
    assert all(row["latency_ms"] == 2500 and row["kind"] == "comparison" for row in rows)
    assert [row["value"].get("comment") for row in rows if row["value"].get("comment")] == ["it is shorter"]


def test_the_position_is_known(judged):
    sides = {task["data"]["tidemill_task"]: task["meta"]["tidemill"]["answer1"] for task in judged.exported}
    for row in judged.feedback():
        first = row["value"]["shown"][0]
        assert first.rsplit(":", 1)[1] == sides[row["task_id"]]
    # All on the same side by chance: once in 2³⁹.
    assert set(sides.values()) == {"a", "b"}


def test_skips_and_gold_are_no_votes(judged):
    progress = judged.progress()
    assert (progress["gold"], progress["verdicts"]) == (1, 6)
    tasks = ask(judged.server, "GET", f"{judged.path}/tasks")["data"]
    assert [task["gold"] for task in tasks if task["gold"]] == ["a"]


def test_the_export_says_what_the_webhooks_said(judged):
    export = judged.download()
    for _ in range(2):
        assert judged.upload(export) == {"unchanged": 8, "silent": PAIRS - 7}
    assert len(judged.feedback()) == 6


def test_an_update_edits_and_a_deletion_withdraws(gateway, label_studio):
    queue = Queue(gateway, label_studio, "changes", 2)
    first, second = queue.better(0, "a"), queue.better(1, "a")
    before = queue.download()
    [row] = [row for row in queue.feedback() if row["task_id"] == queue.exported[0]["data"]["tidemill_task"]]
    label_studio.call("PATCH", f"/api/annotations/{first['id']}/", {"result": [verdict("tie")]})
    assert queue.said(0) == ["tie"]
    [edited] = [row for row in queue.feedback() if row["task_id"] == queue.exported[0]["data"]["tidemill_task"]]
    assert (edited["id"], edited["revision"]) == (row["id"], 2)
    label_studio.call("DELETE", f"/api/annotations/{second['id']}/")
    assert queue.said(1) == []
    # An export from before either: nothing old comes back.
    assert queue.upload(before) == {"unchanged": 2}
    assert (queue.said(0), queue.said(1)) == (["tie"], [])
    # The same through a bulk action.
    label_studio.call(
        "POST", f"/api/dm/actions?id=delete_tasks_annotations&project={queue.project}",
        {"selectedItems": {"all": False, "included": [queue.numbers[0]]}},
    )
    assert queue.feedback() == []
    assert queue.progress()["verdicts"] == 0


def test_the_star_of_ground_truth_comes_and_goes(gateway, label_studio):
    queue = Queue(gateway, label_studio, "gold", 1)
    made = queue.better(0, "b")
    label_studio.call("PATCH", f"/api/annotations/{made['id']}/", {"ground_truth": True})
    assert (queue.progress()["gold"], queue.said(0)) == (1, [])
    label_studio.call("PATCH", f"/api/annotations/{made['id']}/", {"ground_truth": False})
    assert (queue.progress()["gold"], queue.said(0)) == (0, ["b"])


def test_what_no_webhook_brought_an_import_brings(gateway, label_studio, rater):
    queue = Queue(gateway, label_studio, "missed", 5, hook=False)
    for task, answer in enumerate(["a", "b", "b"]):
        queue.better(task, answer)
    queue.better(0, "a", completed_by=rater)
    queue.annotate(3, was_cancelled=True)
    assert queue.feedback() == []
    export = queue.download()
    assert queue.upload(export) == {"recorded": 4, "skipped": 1, "silent": 1}
    assert Counter(winner(row) for row in queue.feedback()) == {"a": 2, "b": 2}
    assert queue.upload(export) == {"unchanged": 5, "silent": 1}


def test_the_command_line_does_the_same_beside_the_running_server(gateway, label_studio, tmp_path):
    queue = Queue(gateway, label_studio, "by-command", 3, hook=False)
    command = [binary(), "label"]
    place = ["--queue", "by-command", "--format", "label-studio", "--data", gateway.data]

    def run(*arguments):
        return subprocess.run([str(part) for part in [*command, *arguments]], capture_output=True, text=True, timeout=240)

    exported = run("export", *place, "--project", tmp_path / "config.xml", tmp_path / "tasks.json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "tasks.json").read_text()) == queue.exported
    project = label_studio.call("GET", f"/api/projects/{queue.project}")
    assert (tmp_path / "config.xml").read_text().strip() == project["label_config"].strip()
    queue.better(0, "b")
    (tmp_path / "judged.json").write_text(json.dumps(queue.download()))
    imported = run("import", *place, tmp_path / "judged.json")
    assert imported.returncode == 0 and "1 recorded" in imported.stdout, imported
    assert queue.said(0) == ["b"]
    assert "1 unchanged" in run("import", *place, tmp_path / "judged.json").stdout
    # Another project's export: refused, and the exit status says so.
    foreign = queue.download()
    foreign[0]["data"].pop("tidemill_task")
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    refused = run("import", *place, tmp_path / "foreign.json")
    assert refused.returncode == 1 and "did not come from here" in refused.stdout, refused


def test_a_labelers_key_cannot_speak_for_others(gateway, label_studio):
    queue = Queue(gateway, label_studio, "keys", 1, hook=False)
    for scope in ["label", None]:
        headers = {"authorization": f"Bearer {gateway.keys[scope]}"} if scope else {}
        for path in ["webhook", "import"]:
            answer = gateway.request("POST", f"{queue.path}/label-studio/{path}", b"[]", {"content-type": "application/json", **headers})
            assert answer.status == (403 if scope else 401)
    assert OWNER not in json.dumps(queue.exported)
