"""Requests that no sane client sends: an answer each, and the server lives."""

import contextlib
import json
import random
import socket

import pytest

from conftest import MODEL
from test_chat import QUESTION

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def the_server_lives(server):
    yield
    server.assert_alive()


def raw(server, data: bytes, seconds: float = 10) -> bytes:
    """Sends bytes and reads until the server closes or says nothing more."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        # A server that closes before it has read everything resets the connection, in the middle of any of these calls.
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                received += piece
    return received


def body(content) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 1}


def test_a_body_of_more_than_10_mb(server):
    answer = server.post(CHAT, body("a" * (11 << 20)))
    assert answer.status == 413
    assert set(answer.error) == {"message", "type", "param", "code"}


def test_a_body_of_almost_10_mb_is_too_long_for_the_context(server):
    answer = server.post(CHAT, body("word " * ((10 << 20) // 5 - 100)))
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"


def test_ten_megabytes_without_a_space(server):
    answer = server.post(CHAT, body("a" * ((10 << 20) - 1000)))
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"


def test_a_declared_length_that_never_comes(server):
    answer = raw(server, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{}")
    assert not answer or b" 400 " in answer.split(b"\r\n")[0] or b" 408 " in answer.split(b"\r\n")[0]


@pytest.mark.parametrize("broken", [b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"])
def test_invalid_utf8(server, broken):
    answer = server.post(CHAT, json.dumps(body("SPOT")).encode().replace(b"SPOT", broken))
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_half_a_surrogate_pair(server):
    answer = server.post(CHAT, json.dumps(body("SPOT")).encode().replace(b"SPOT", rb"\ud83c"))
    assert answer.status == 400


def test_nul_and_control_characters_are_text(server):
    assert server.post(CHAT, body("a\0b\x1b[31m\x7f")).status == 200


@pytest.mark.parametrize("unit", [(b"[", b"]"), (b'{"a":', b"}")], ids=["arrays", "objects"])
@pytest.mark.parametrize("depth", [200, 100_000])
def test_deep_json(server, unit, depth):
    deep = unit[0] * depth + b"1" + unit[1] * depth
    assert server.post(CHAT, deep).status == 400
    sent = json.dumps({**body("a"), "chat_template_kwargs": {"deep": "SPOT"}}).encode().replace(b'"SPOT"', deep)
    assert server.post(CHAT, sent).status == 400
    # Open brackets that are never closed.
    assert server.post(CHAT, unit[0] * depth).status == 400


@pytest.mark.parametrize("number", ["1e400", "-1e400", "99999999999999999999999999", "NaN", "Infinity", "0x10", "1e-400"])
@pytest.mark.parametrize("field", ["temperature", "max_tokens", "seed", "top_p", "n"])
def test_numbers_that_fit_nothing(server, field, number):
    sent = json.dumps({**body("a"), field: "SPOT"}).encode().replace(b'"SPOT"', number.encode())
    status = server.post(CHAT, sent).status
    assert status == 400 or (status == 200 and number == "1e-400")


def test_the_wrong_type_in_every_field(server):
    fields = [
        "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "logit_bias", "logprobs",
        "top_logprobs", "stream", "stream_options", "tools", "tool_choice", "response_format", "metadata", "user", "frequency_penalty",
        "presence_penalty", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "priority", "cache_salt",
        "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "echo", "prompt_logprobs", "return_token_ids",
        "include_stop_str_in_output", "skip_special_tokens", "service_tier", "store", "reasoning_effort", "parallel_tool_calls",
    ]
    for field in fields:
        for wrong in [{"x": []}, [[]], [{"y": 1}]]:
            if field == "chat_template_kwargs" and isinstance(wrong, dict):
                continue
            answer = server.post(CHAT, {**body("a"), field: wrong})
            assert answer.status == 400, (field, wrong, answer.body)
            assert answer.error["param"].split(".")[0] == field, (field, wrong, answer.error)


def test_random_bytes_and_mutated_requests(server):
    random_source = random.Random(7)
    good = json.dumps({**body("Hello, 潮!"), "stop": ["a"], "logit_bias": {"5": 1}, "stream": True}).encode()
    for _ in range(300):
        mutated = bytearray(good)
        for _ in range(random_source.randint(1, 6)):
            at = random_source.randrange(len(mutated))
            kind = random_source.randrange(3)
            if kind == 0:
                mutated[at] = random_source.randrange(256)
            elif kind == 1:
                del mutated[at : at + random_source.randint(1, 8)]
            else:
                mutated[at:at] = random_source.choice([b"null", b"[", b"}", b'"', b"\\u0000", b"-1", b"\xff", b"1e9"])
        answer = server.post(CHAT, bytes(mutated))
        assert answer.status in (200, 400, 404), (bytes(mutated), answer.status, answer.body)


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 500,
    ],
    ids=["zeros", "no path", "version", "negative length", "huge length", "bad chunk", "long header", "long path", "tls"],
)
def test_what_is_not_http(server, data):
    received = raw(server, data)
    assert not received or received.startswith(b"HTTP/1.1 4"), received[:200]


def test_prompts_at_the_edge_of_the_context(server, client):
    context = client.models.retrieve(MODEL).max_model_len
    ids = [504] * context
    send = lambda count, **options: server.post("/v1/completions", {"model": MODEL, "prompt": ids[:count], "temperature": 0, **options}).status
    assert send(context, max_tokens=1) == 400
    assert send(context - 1, max_tokens=2) == 400
    assert send(context + 1, max_tokens=1) == 400


def test_a_template_that_raises_is_a_400(start):
    from conftest import GOLDENS

    server = start(models={"mistral": GOLDENS / "mistral"})
    answer = server.post(CHAT, {"model": "mistral", "messages": [QUESTION[0], QUESTION[0]]})
    assert answer.status == 400
    assert "roles must alternate" in answer.error["message"]
    assert answer.error["param"] == "messages"
    assert server.post(CHAT, {"model": "mistral", "messages": QUESTION, "max_tokens": 2}).status == 200
