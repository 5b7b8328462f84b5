"""Feedback through HTTP, keys, and the two commands beside a running server."""

import json
import subprocess

import openai
import pytest

from conftest import MODEL
from judging import bare, patch, rows
from server import PATIENCE, binary, eventually
from test_chat import ask

FEEDBACK = "/v1/feedback"
CONFIG = """
[metrics.helpfulness]
type = "number"
optimize = "max"
min = 0
max = 10

[metrics.solved]
type = "boolean"
optimize = "max"

[metrics.retired]
type = "boolean"
optimize = "max"
closed = true
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A server with metrics, one answer of it, and a pair."""
    from conftest import running
    from server import default_model

    folder = tmp_path_factory.mktemp("judged")
    (folder / "metrics.toml").write_text(CONFIG)
    with running(folder, {MODEL: default_model()}, "--config", str(folder / "metrics.toml")) as server:
        with server.client() as client:
            answer = ask(client, max_tokens=4, extra_body={"tidemill": {"conversation": "talk"}}).id
            pair = [c.tidemill["id"] for c in ask(client, n=2, temperature=1, max_tokens=4, extra_body={"tidemill": {"compare": True}}).choices]
            other = ask(client, [{"role": "user", "content": "Something else"}], max_tokens=4).id
        yield server, answer, pair, other


def test_every_kind_goes_in_and_comes_out(judged):
    server, answer, pair, _ = judged
    a, b = pair
    cases = [
        ({"target": answer, "kind": "thumb", "value": "up"}, True, 1.0),
        ({"target": bare(answer), "kind": "thumb", "value": False}, False, 0.0),
        ({"target": answer, "kind": "rating", "value": 4, "scale": [1, 5]}, {"given": 4, "scale": [1, 5]}, 0.75),
        ({"target": answer, "kind": "rating", "value": 0.25}, 0.25, 0.25),
        ({"target": answer, "kind": "correction", "value": "Gravity pulls."}, "Gravity pulls.", None),
        ({"target": "talk", "kind": "comment", "value": "friendly"}, "friendly", None),
        ({"target": answer, "kind": "metric", "metric": "helpfulness", "value": 7.5}, 7.5, 7.5),
        ({"target": "talk", "kind": "metric", "metric": "solved", "value": True}, True, 1.0),
        (
            {"kind": "comparison", "value": {"candidates": [a, b], "winner": b}, "shown": [b, a]},
            {"candidates": [bare(a), bare(b)], "ranking": [[bare(b)], [bare(a)]], "both_bad": False, "shown": [bare(b), bare(a)]},
            None,
        ),
        (
            {"kind": "comparison", "value": {"candidates": [a, b], "both_bad": True}},
            {"candidates": [bare(a), bare(b)], "ranking": [[bare(a), bare(b)]], "both_bad": True},
            None,
        ),
    ]
    for body, value, number in cases:
        body = {**body, "author": "ann", "source": "app", "latency_ms": 1200, "tags": ["x", "y"]}
        made = server.post(FEEDBACK, body)
        assert made.status == 201, made.body
        shown = server.get(f"{FEEDBACK}/{made.json()['id']}").json()
        assert shown == made.json()
        assert (shown["value"], shown["number"]) == (value, number), body
        assert (shown["author"], shown["source"], shown["latency_ms"], shown["tags"]) == ("ann", "app", 1200, ["x", "y"])
        [row] = rows(server.data, "SELECT * FROM feedback WHERE id = ?", shown["id"])
        assert (row["kind"], row["number"], row["author"]) == (body["kind"], number, "ann")
    listed = server.get(f"{FEEDBACK}?author=ann&limit=1000").json()
    assert len(listed["data"]) == len(cases) and not listed["has_more"]
    assert len(server.get(f"{FEEDBACK}?target={b}").json()["data"]) == 2


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"target": "chatcmpl-0198c0de-0000-7000-8000-00000000beef", "kind": "thumb", "value": True}, 404, "target", "target_not_found"),
        ({"target": "nobody-talked-so", "kind": "thumb", "value": True}, 404, "target", "target_not_found"),
        ({"target": "ANSWER", "kind": "rating", "value": 6, "scale": [1, 5]}, 400, "value", "decimal_above_max_value"),
        ({"target": "ANSWER", "kind": "metric", "metric": "retired", "value": True}, 400, "metric", "metric_closed"),
        ({"target": "ANSWER", "kind": "metric", "metric": "charm", "value": True}, 400, "metric", "unknown_metric"),
        ({"target": "ANSWER", "kind": "metric", "metric": "helpfulness", "value": 11}, 400, "value", "decimal_above_max_value"),
        ({"kind": "comparison", "value": {"candidates": ["ANSWER", "OTHER"], "tie": True}}, 400, "value.candidates.1", "different_prompts"),
        ({"kind": "comparison", "value": {"candidates": ["ANSWER"], "tie": True}}, 400, "value.candidates", "array_below_min_length"),
        ({"target": "ANSWER", "kind": "thumb", "value": True, "mood": 1}, 400, "mood", "unknown_parameter"),
        ({"target": "ANSWER", "kind": "thumb"}, 400, "value", "missing_required_parameter"),
    ],
)
def test_each_rejection_names_its_field(judged, body, status, param, code):
    server, answer, _, other = judged
    text = json.dumps(body).replace("ANSWER", answer).replace("OTHER", other)
    refused = server.post(FEEDBACK, text.encode())
    assert (refused.status, refused.error["param"], refused.error["code"]) == (status, param, code), refused.body


def test_a_batch_has_a_result_for_each_item(judged):
    server, answer, _, _ = judged
    good = {"target": answer, "kind": "thumb", "value": True}
    mixed = server.post(FEEDBACK, [good, {**good, "value": 3}, good])
    assert (mixed.status, [item["status"] for item in mixed.json()["data"]]) == (207, [201, 400, 201])
    assert mixed.json()["data"][1]["error"]["param"] == "1.value"
    assert server.post(FEEDBACK, [good] * 1000).status == 201
    assert server.post(FEEDBACK, [good] * 1001).status == 400


def test_edit_withdraw_and_the_same_key_again(judged):
    server, answer, _, _ = judged
    body = {"target": answer, "kind": "thumb", "value": True, "idempotency_key": "once"}
    first, second = server.post(FEEDBACK, body), server.post(FEEDBACK, {**body, "value": False})
    assert (first.status, second.status, second.json()["value"]) == (201, 200, True)
    path = f"{FEEDBACK}/{first.json()['id']}"
    edited = patch(server, path, {"value": "down", "tags": ["changed"]}).json()
    assert (edited["value"], edited["revision"], edited["tags"]) == (False, 2, ["changed"])
    assert rows(server.data, "SELECT COUNT(*) FROM feedback_revisions WHERE feedback_id = ?", edited["id"])[0][0] == 1
    assert patch(server, path, {}, "DELETE").json()["withdrawn"] is True
    assert patch(server, path, {"value": True}).status == 409
    assert server.get(path).json()["withdrawn"] is True


def tidemill(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([binary(), *arguments], capture_output=True, text=True, timeout=PATIENCE, **options)


def test_keys_are_made_beside_a_running_server_and_close_it(start):
    server = start()
    data = ["--data", str(server.data)]
    made = tidemill("key", "create", "--name", "app", "--scope", "chat", *data)
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert secret.startswith("tm-") and "app" in made.stderr
    judge = tidemill("key", "create", "--name", "judge", "--scope", "feedback", *data).stdout.strip()
    listed = tidemill("key", "list", *data).stdout
    assert "app" in listed and "judge" in listed and secret not in listed
    assert not rows(server.data, "SELECT 1 FROM api_keys WHERE hash LIKE ?", f"%{secret[3:]}%"), "only a hash is kept"
    eventually("the first key closes the server", lambda: server.get("/v1/models").status == 401)
    with server.client() as anonymous, pytest.raises(openai.AuthenticationError) as refused:
        ask(anonymous, max_tokens=2)
    assert refused.value.code == "invalid_api_key"
    with server.client().with_options(api_key=secret) as client:
        answer = ask(client, max_tokens=2).id
        with pytest.raises(openai.PermissionDeniedError):
            client.post("/feedback", body={"target": answer, "kind": "thumb", "value": True}, cast_to=object)
    with server.client().with_options(api_key=judge) as client:
        assert client.post("/feedback", body={"target": answer, "kind": "thumb", "value": True}, cast_to=object)["kind"] == "thumb"
    assert tidemill("key", "revoke", "judge", *data).returncode == 0
    assert tidemill("key", "revoke", "judge", *data).returncode == 1
    headers = {"authorization": f"Bearer {judge}"}
    eventually("a revoked key stops working", lambda: server.request("GET", FEEDBACK, headers=headers).status == 401)


def test_without_a_key_only_this_machine_can_connect(tmp_path):
    from server import default_model

    common = ["serve", "--data", str(tmp_path / "data"), "--model", f"m={default_model()}", "--port", "0"]
    refused = tidemill(*common, "--host", "0.0.0.0", cwd=tmp_path)
    assert refused.returncode == 1 and "tidemill key create" in refused.stderr, refused


def test_erasure_removes_a_person_and_nobody_else(start):
    server = start()
    with server.client() as client:
        gone, stays = (ask(client, user=user, max_tokens=2).id for user in ["gone", "stays"])
    for answer in [gone, stays]:
        assert server.post(FEEDBACK, {"target": answer, "kind": "thumb", "value": True}).status == 201
    asked = tidemill("data", "erase", "--user", "gone", "--data", str(server.data), stdin=subprocess.DEVNULL)
    assert asked.returncode == 1 and "--yes" in asked.stderr
    done = tidemill("data", "erase", "--user", "gone", "--yes", "--data", str(server.data))
    assert done.returncode == 0, done.stderr
    assert "1 answers, 0 stored chats and responses, 1 judgements" in done.stdout, done.stdout
    assert [row["id"] for row in rows(server.data, "SELECT id FROM inferences")] == [bare(stays)]
    assert [row["target"] for row in rows(server.data, "SELECT target FROM feedback")] == [bare(stays)]
