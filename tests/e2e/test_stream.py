"""Streams: the exact lines, and what the official client makes of them."""

import http.client
import json

from conftest import MODEL
from test_chat import QUESTION, ask


def lines_of(server, path: str, body: dict):
    """Raw lines of a stream, and the response's headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    connection.request("POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    text = response.read().decode()
    connection.close()
    return text, {name.lower(): value for name, value in response.getheaders()}


def chunks_of(text: str) -> list[dict]:
    """Parsed events; asserts that only `data:` lines and comments are there, one event per blank line, ended by [DONE]."""
    assert text.endswith("data: [DONE]\n\n")
    events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def chat_body(**options) -> dict:
    return {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 12, **options}


def test_a_stream_is_role_then_content_then_finish_then_done(server):
    text, headers = lines_of(server, "/v1/chat/completions", chat_body())
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"]
    chunks = chunks_of(text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert all(len(chunk["choices"]) == 1 and chunk["choices"][0]["index"] == 0 for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(set(choice["delta"]) == {"content"} and choice["delta"]["content"] for choice in choices[1:-1])
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert all(choice["logprobs"] is None for choice in choices)
    assert len(choices) > 4


def test_stream_and_single_answer_agree(client):
    single = ask(client, max_tokens=30)
    pieces, usage = [], None
    for chunk in ask(client, max_tokens=30, stream=True, stream_options={"include_usage": True}):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(pieces) == single.choices[0].message.content
    assert (usage.prompt_tokens, usage.completion_tokens) == (single.usage.prompt_tokens, single.usage.completion_tokens)


def test_usage_comes_last_and_only_when_asked_for(server):
    text, _ = lines_of(server, "/v1/chat/completions", chat_body(stream_options={"include_usage": True}))
    *chunks, last = chunks_of(text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
    assert last["id"] == chunks[0]["id"]


def test_each_of_several_choices_has_one_role_and_one_finish(server):
    text, _ = lines_of(server, "/v1/chat/completions", chat_body(n=3, temperature=1, seed=5))
    choices = [choice for chunk in chunks_of(text) for choice in chunk["choices"]]
    first_seen = list(dict.fromkeys(choice["index"] for choice in choices))
    assert first_seen == [0, 1, 2]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert sum("role" in choice["delta"] for choice in mine) == 1
        assert [choice["finish_reason"] for choice in mine].count(None) == len(mine) - 1
        assert mine[-1]["finish_reason"] in ("stop", "length")


def test_text_arrives_while_it_is_made(server, client):
    seen = 0
    stream = ask(client, max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    for chunk in stream:
        if chunk.choices[0].delta.content:
            seen += 1
        if seen == 3:
            assert server.metrics()["tidemill:num_requests_running"] >= 1
            break
    stream.close()
    server.wait_idle()


def test_no_chunk_ends_inside_a_character(server):
    messages = [{"role": "user", "content": "Repeat exactly: 🌊🚣‍♀️ 潮が満ちる — ½ é 👩🏽‍🔧 🌊🌊🌊"}]
    text, _ = lines_of(server, "/v1/chat/completions", chat_body(messages=messages, max_tokens=60))
    pieces = [choice["delta"].get("content", "") for chunk in chunks_of(text) for choice in chunk["choices"]]
    single = server.post("/v1/chat/completions", chat_body(messages=messages, max_tokens=60)).json()
    assert "".join(pieces) == single["choices"][0]["message"]["content"]
    # Only the last piece may hold the replacement character: half a character, when the length ends the answer inside one.
    assert not any("\ufffd" in piece for piece in pieces[:-2])


def test_completion_streams_have_their_own_shape(server):
    body = {"model": MODEL, "prompt": "The tide mill", "temperature": 0, "max_tokens": 8, "stream_options": {"include_usage": True}}
    text, _ = lines_of(server, "/v1/completions", body)
    *chunks, last = chunks_of(text)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
    single = server.post("/v1/completions", {key: body[key] for key in ["model", "prompt", "temperature", "max_tokens"]}).json()
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == single["choices"][0]["text"]
