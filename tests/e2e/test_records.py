"""Every answer is remembered: rows of the database against what the API returned."""

import json
import time

import pytest

from conftest import MODEL
from judging import bare, floats, integers, rows
from server import PATIENCE
from test_chat import QUESTION, ask


def record(server, answer_id: str) -> dict:
    """The row of an answer, once it is written."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = rows(server.data, "SELECT * FROM inferences WHERE id = ?", bare(answer_id))
        if found:
            return dict(found[0])
        assert time.monotonic() < deadline, f"{answer_id} was not recorded"
        time.sleep(0.05)


def choices(server, answer_id: str) -> list[dict]:
    record(server, answer_id)
    return [dict(row) for row in rows(server.data, "SELECT * FROM choices WHERE inference_id = ? ORDER BY position", bare(answer_id))]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_recorded_as_it_was_answered(server, stream):
    body = {
        "model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0.7, "top_p": 0.8, "seed": 11, "stream": stream,
        "return_token_ids": True, "logprobs": True, "safety_identifier": "person-7", "user": "ignored", "metadata": {"a": "b"},
        "tidemill": {"conversation": "talk-1"},
    }
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: {")]
        content = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        ids = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or []]
        logprobs = [entry["logprob"] for chunk in chunks for choice in chunk["choices"] for entry in (choice["logprobs"] or {}).get("content") or []]
        head, prompt, finish = chunks[0], chunks[0]["prompt_token_ids"], chunks[-1]["choices"][0]["finish_reason"]
    else:
        head = answer.json()
        [choice] = head["choices"]
        content, ids, finish = choice["message"]["content"], choice["token_ids"], choice["finish_reason"]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        prompt = head["prompt_token_ids"]
    row = record(server, head["id"])
    assert (row["endpoint"], row["model"], row["status"], row["compare"]) == ("chat", MODEL, "ok", 0)
    assert (row["user_key"], row["conversation"], json.loads(row["metadata"])) == ("person-7", "talk-1", {"a": "b"})
    assert json.loads(row["messages"]) == QUESTION
    assert integers(row["prompt_ids"]) == prompt
    params = json.loads(row["params"])
    assert {key: params[key] for key in ["temperature", "top_p", "seed", "max_tokens"]} == {"temperature": 0.7, "top_p": 0.8, "seed": 11, "max_tokens": 12}
    assert row["config_hash"] == head["system_fingerprint"]
    assert 0 < row["first_token_us"] <= row["duration_us"] < 60_000_000
    [choice] = choices(server, head["id"])
    assert (choice["id"], choice["output_text"], choice["finish_reason"]) == (bare(head["id"]), content, finish)
    assert integers(choice["output_ids"]) == ids
    raw, processed = floats(choice["raw_logprobs"]), floats(choice["logprobs"])
    assert len(raw) == len(processed) == len(ids) == row["output_tokens"]
    assert raw[: len(logprobs)] == pytest.approx(logprobs, abs=1e-6)
    # Temperature and top_p change the distribution that was drawn from.
    assert raw != processed and all(value <= 1e-6 for value in processed)


def test_the_seed_that_was_drawn_repeats_the_answer(server, client):
    first = ask(client, temperature=1, max_tokens=12)
    seed = json.loads(record(server, first.id)["params"])["seed"]
    again = ask(client, temperature=1, max_tokens=12, seed=seed)
    assert again.choices[0].message.content == first.choices[0].message.content


def test_a_stream_that_its_client_left_is_recorded(server):
    with server.client() as client:
        stream = ask(client, stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
        got, answer_id = "", None
        for chunk in stream:
            answer_id = chunk.id
            got += chunk.choices[0].delta.content or ""
            if len(got) > 40:
                break
        stream.close()
    row = record(server, answer_id)
    assert row["status"] == "cancelled"
    [choice] = choices(server, answer_id)
    assert choice["finish_reason"] is None
    assert choice["output_text"].startswith(got[:40])
    assert 0 < row["output_tokens"] < 2000


def test_two_answers_on_purpose(server, client):
    options = dict(n=2, temperature=1.0, seed=3, max_tokens=24, extra_body={"tidemill": {"compare": True}})
    whole = ask(client, **options)
    ids = [choice.tidemill["id"] for choice in whole.choices]
    assert ids[0] == whole.id and len(set(ids)) == 2
    kept = choices(server, whole.id)
    assert [f"chatcmpl-{choice['id']}" for choice in kept] == ids
    assert [choice["output_text"] for choice in kept] == [choice.message.content for choice in whole.choices]
    assert kept[0]["output_text"] != kept[1]["output_text"], "two draws at temperature 1"
    assert record(server, whole.id)["compare"] == 1
    shown = {}
    for chunk in ask(client, stream=True, **options):
        for choice in chunk.choices:
            if choice.delta.role:
                shown[choice.index] = choice.tidemill["id"]
    assert len(set(shown.values())) == 2
    assert [f"chatcmpl-{choice['id']}" for choice in choices(server, shown[0])] == [shown[0], shown[1]]


def test_sigterm_keeps_every_answer(start):
    server = start()
    with server.client() as client:
        ids = [ask(client, max_tokens=2).id for _ in range(20)]
    assert server.stop() == 0
    kept = {row["id"] for row in rows(server.data, "SELECT id FROM inferences")}
    assert {bare(answer_id) for answer_id in ids} <= kept


def test_metadata_only_and_off(start):
    server = start("--record", "metadata")
    with server.client() as client:
        answer = ask(client, user="u", max_tokens=3)
    row = record(server, answer.id)
    assert (row["messages"], row["prompt_text"], row["user_key"], row["output_tokens"]) == (None, None, "u", 3)
    [choice] = choices(server, answer.id)
    assert (choice["output_text"], choice["output_ids"] or b"") == (None, b"")
    server = start("--record", "off")
    with server.client() as client:
        ask(client, max_tokens=2)
    assert server.stop() == 0
    assert rows(server.data, "SELECT id FROM inferences") == []
