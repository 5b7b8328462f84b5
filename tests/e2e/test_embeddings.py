"""Embeddings with the official client, against what transformers made of the same model."""

import base64
import struct

import openai
import pytest

from conftest import GOLDENS, golden, running

TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    models = {"llama": GOLDENS / "llama", "qwen3": GOLDENS / "qwen3"}
    with running(tmp_path_factory.mktemp("embed"), models, "--weights", "f32", "--kv-dtype", "f32") as server:
        yield server


def unit(vector: list[float]) -> list[float]:
    length = sum(x * x for x in vector) ** 0.5
    return [x / length for x in vector]


def near(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_vectors_equal_transformers_in_every_form(tiny, family):
    texts = golden(f"{family}/embeddings.json")["texts"]
    wanted = [unit(text["last"]) for text in texts]
    tokens = sum(len(text["ids"]) for text in texts)
    with tiny.client() as client:
        # The client asks for base64 by itself, and decodes it only behind its own strict validation.
        answer = client.embeddings.create(model=family, input=[text["text"] for text in texts])
        assert [item.index for item in answer.data] == list(range(len(texts)))
        assert all(near(item.embedding, vector) for item, vector in zip(answer.data, wanted))
    with tiny.client(_strict_response_validation=True) as client:
        floats = client.embeddings.create(model=family, input=[text["ids"] for text in texts], encoding_format="float")
        assert floats.usage.prompt_tokens == floats.usage.total_tokens == answer.usage.prompt_tokens == tokens
        for item, same in zip(floats.data, answer.data):
            assert [struct.pack("<f", x) for x in item.embedding] == [struct.pack("<f", x) for x in same.embedding]
        one = client.embeddings.create(model=family, input=texts[1]["ids"], encoding_format="float")
        assert one.data[0].embedding == floats.data[1].embedding
    raw = tiny.post("/v1/embeddings", {"model": family, "input": texts[0]["text"], "encoding_format": "base64"}).json()
    data = base64.b64decode(raw["data"][0]["embedding"])
    assert near(list(struct.unpack(f"<{len(data) // 4}f", data)), wanted[0])


def test_two_thousand_texts_and_no_more(tiny):
    with tiny.client() as client:
        answer = client.embeddings.create(model="llama", input=["creek"] * 2048)
        assert len({tuple(item.embedding) for item in answer.data}) == 1 and len(answer.data) == 2048
        with pytest.raises(openai.BadRequestError) as error:
            client.embeddings.create(model="llama", input=["creek"] * 2049)
        assert (error.value.param, error.value.code) == ("input", "array_above_max_length")


@pytest.mark.parametrize(
    "body, param, code",
    [
        ({"input": ""}, "input", "string_below_min_length"),
        ({"input": "x " * 2000}, "input", "context_length_exceeded"),
        ({"input": [1_000_000]}, "input", "invalid_value"),
        ({"input": "x", "dimensions": 8}, "dimensions", "invalid_value"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "x", "model": "nope"}, "model", "model_not_found"),
        ({"input": "x", "colour": 1}, "colour", "unknown_parameter"),
    ],
)
def test_refusals_name_the_field(tiny, body, param, code):
    error = tiny.post("/v1/embeddings", {"model": "llama", **body}).error
    assert (error["param"], error["code"]) == (param, code)


def test_moderations_are_honestly_refused(tiny):
    with tiny.client() as client, pytest.raises(openai.NotFoundError) as error:
        client.moderations.create(input="x")
    assert error.value.code == "model_not_found"
