"""The error table of the HTTP contract, row by row: status, body, headers, and the exception that the client raises."""

import openai
import pytest

from conftest import MODEL
from test_chat import QUESTION

CHAT = "/v1/chat/completions"
MISSING, TYPE, VALUE = "missing_required_parameter", "invalid_type", "invalid_value"


def body(**options) -> dict:
    return {"model": MODEL, "messages": QUESTION, "max_tokens": 2, **options}


def without(key: str) -> dict:
    return {name: value for name, value in body().items() if name != key}


def assert_error(answer, status: int, param, code, kind: str = "invalid_request_error") -> None:
    assert answer.status == status, (answer.status, answer.body)
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]
    assert list(answer.json()) == ["error"]
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert (error["type"], error["param"], error["code"]) == (kind, param, code), error


REJECTED = [
    ("no messages", without("messages"), "messages", MISSING),
    ("no model", without("model"), "model", MISSING),
    ("no role", body(messages=[{"content": "a"}]), "messages.0.role", MISSING),
    ("no content", body(messages=[{"role": "user"}]), "messages.0.content", MISSING),
    ("messages is a string", body(messages="hi"), "messages", TYPE),
    ("messages is empty", body(messages=[]), "messages", "empty_array"),
    ("a message is a number", body(messages=[1]), "messages.0", TYPE),
    ("content is a number", body(messages=[{"role": "user", "content": 1}]), "messages.0.content", TYPE),
    ("unknown role", body(messages=[{"role": "wizard", "content": "a"}]), "messages.0.role", VALUE),
    ("temperature is a string", body(temperature="hot"), "temperature", TYPE),
    ("temperature above", body(temperature=2.1), "temperature", "decimal_above_max_value"),
    ("temperature below", body(temperature=-0.1), "temperature", "decimal_below_min_value"),
    ("top_p above", body(top_p=1.1), "top_p", "decimal_above_max_value"),
    ("frequency_penalty below", body(frequency_penalty=-2.1), "frequency_penalty", "decimal_below_min_value"),
    ("presence_penalty above", body(presence_penalty=3), "presence_penalty", "decimal_above_max_value"),
    ("n is 0", body(n=0), "n", "integer_below_min_value"),
    ("n is 129", body(n=129), "n", "integer_above_max_value"),
    ("n is 1.5", body(n=1.5), "n", TYPE),
    ("max_tokens is 0", body(max_tokens=0), "max_tokens", "integer_below_min_value"),
    ("max_tokens is negative", body(max_completion_tokens=-5), "max_completion_tokens", "integer_below_min_value"),
    ("max_tokens is a boolean", body(max_tokens=True), "max_tokens", TYPE),
    ("seed beyond 63 bits", body(seed=2**63), "seed", "integer_above_max_value"),
    ("seed beyond 64 bits", body(seed=2**64), "seed", "integer_above_max_value"),
    ("seed far below", body(seed=-(2**70)), "seed", "integer_below_min_value"),
    ("five stop strings", body(stop=list("abcde")), "stop", "array_above_max_length"),
    ("stop is a number", body(stop=1), "stop", TYPE),
    ("top_logprobs without logprobs", body(top_logprobs=2), "top_logprobs", VALUE),
    ("top_logprobs is 21", body(logprobs=True, top_logprobs=21), "top_logprobs", "integer_above_max_value"),
    ("logprobs is a number", body(logprobs=3), "logprobs", TYPE),
    ("bias above", body(logit_bias={"5": 101}), "logit_bias.5", "decimal_above_max_value"),
    ("stream is a string", body(stream="yes"), "stream", TYPE),
    ("stream_options without stream", body(stream_options={"include_usage": True}), "stream_options", VALUE),
    ("unknown field", body(best=1), "best", "unknown_parameter"),
    ("unknown field of a message", body(messages=[{"role": "user", "content": "a", "mood": "good"}]), "messages.0.mood", "unknown_parameter"),
    ("unknown tier", body(service_tier="gold"), "service_tier", VALUE),
    ("metadata with 17 entries", body(metadata={str(i): "x" for i in range(17)}), "metadata", "object_above_max_properties"),
    ("metadata value too long", body(metadata={"k": "x" * 513}), "metadata.k", "string_above_max_length"),
    ("top_k is a string", body(top_k="5"), "top_k", TYPE),
    ("min_p above", body(min_p=1.5), "min_p", "decimal_above_max_value"),
    ("min_tokens above max_tokens", body(min_tokens=3), "min_tokens", VALUE),
]

# What does not exist yet is refused by name instead of being answered as if it did.
UNSUPPORTED = [
    ("custom tools", body(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools.0.type"),
    ("audio", body(modalities=["text", "audio"]), "modalities"),
    ("web search", body(web_search_options={}), "web_search_options"),
    ("image part", body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "messages.0.content.0.type"),
]


@pytest.mark.parametrize(("sent", "param", "code"), [row[1:] for row in REJECTED], ids=[row[0] for row in REJECTED])
def test_a_rejection_names_the_parameter_and_the_reason(server, sent, param, code):
    assert_error(server.post(CHAT, sent), 400, param, code)


@pytest.mark.parametrize(("sent", "param"), [row[1:] for row in UNSUPPORTED], ids=[row[0] for row in UNSUPPORTED])
def test_what_does_not_exist_yet_is_refused_by_name(server, sent, param):
    answer = server.post(CHAT, sent)
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"].startswith(param.rsplit(".type", 1)[0]), answer.error
    assert answer.error["code"] in ("unsupported_parameter", "unsupported_value", "invalid_value"), answer.error


@pytest.mark.parametrize("stream", [False, True])
def test_rejections_come_before_the_200(server, stream):
    assert_error(server.post(CHAT, body(stream=stream, temperature=9)), 400, "temperature", "decimal_above_max_value")


def test_not_json(server):
    for sent in [b"", b"{", b"nonsense", b"[1, 2", b'{"model": "a"} trailing']:
        assert_error(server.post(CHAT, sent), 400, None, None)
    assert_error(server.post(CHAT, [1, 2]), 400, None, None)


def test_a_prompt_longer_than_the_context_is_told_both_numbers(server, client):
    context = client.models.retrieve(MODEL).max_model_len
    long = " tide" * (context + 10)
    for path, sent, param in [
        (CHAT, body(messages=[{"role": "user", "content": long}]), "messages"),
        ("/v1/completions", {"model": MODEL, "prompt": long}, "prompt"),
    ]:
        answer = server.post(path, sent)
        assert_error(answer, 400, param, "context_length_exceeded")
        assert str(context) in answer.error["message"]
        numbers = [int(word) for word in answer.error["message"].replace(",", " ").replace(".", " ").split() if word.isdigit()]
        assert any(number > context for number in numbers), answer.error["message"]
    # Prompt and output together, too.
    assert_error(server.post(CHAT, body(max_tokens=context)), 400, "messages", "context_length_exceeded")


def test_unknown_model_path_and_method(server):
    assert_error(server.post(CHAT, body(model="gpt-9")), 404, "model", "model_not_found")
    for path in ["/v1/nothing", "/", "/v2/chat/completions"]:
        assert server.get(path).status == 404
        assert set(server.get(path).error) == {"message", "type", "param", "code"}
    for method, path in [("GET", "/v1/completions"), ("PUT", CHAT), ("DELETE", "/health"), ("POST", "/v1/models")]:
        answer = server.request(method, path, b"{}" if method != "GET" else None)
        assert answer.status == 405, (method, path, answer.status)
        assert set(answer.error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("sent", "exception", "code"),
    [
        (dict(model=MODEL, messages=[]), openai.BadRequestError, "empty_array"),
        (dict(model=MODEL, messages=QUESTION, temperature=3), openai.BadRequestError, "decimal_above_max_value"),
        (dict(model=MODEL, messages=QUESTION, extra_body={"nope": 1}), openai.BadRequestError, "unknown_parameter"),
        (dict(model="gpt-9", messages=QUESTION), openai.NotFoundError, "model_not_found"),
    ],
    ids=["empty messages", "temperature", "unknown field", "unknown model"],
)
def test_the_client_raises_its_own_exception(client, sent, exception, code):
    with pytest.raises(exception) as raised:
        client.chat.completions.create(**sent)
    assert raised.value.code == code
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id
