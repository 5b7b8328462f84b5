"""Rows of the endpoints that ask a model without generating: embeddings, moderations, tokens."""

import base64
import struct

from openai.types.embedding_create_params import EmbeddingCreateParams

from compatibility import Endpoint, honoured, ignored, rejected
from compatibility.effects import holds
from conftest import MODEL


def vectors(got) -> list:
    return [item["embedding"] for item in got.json["data"]]


def the_same_vectors(got, ask):
    assert vectors(got) == vectors(ask())


def the_same_numbers(got, ask):
    [text] = vectors(got)
    data = base64.b64decode(text)
    [numbers] = vectors(ask())
    assert len(data) == 4 * len(numbers) and all(abs(a - b) < 1e-6 for a, b in zip(struct.unpack(f"<{len(numbers)}f", data), numbers))


EMBEDDINGS = Endpoint(
    "POST", "/v1/embeddings", {"model": MODEL, "input": "creek"},
    [
        honoured("model", MODEL, holds(lambda body: body["model"] == MODEL)),
        honoured("input", "creek", holds(lambda body: len(body["data"]) == 1)),
        honoured("input", ["creek", "sea"], holds(lambda body: [item["index"] for item in body["data"]] == [0, 1]), "up to 2,048"),
        honoured("input", [500, 501], holds(lambda body: body["usage"]["prompt_tokens"] == 2), "token ids"),
        honoured("input", [[500, 501], [502]], holds(lambda body: body["usage"]["prompt_tokens"] == 3)),
        rejected("input", "", "an empty text"),
        honoured("encoding_format", "float", the_same_vectors),
        honoured("encoding_format", "base64", the_same_numbers, "little-endian singles"),
        rejected("dimensions", 8, "allowed where the model's own files say so"),
        ignored("user", "u-1"),
        honoured("priority", -1, note="lower runs first"),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(EmbeddingCreateParams.__annotations__),
)

MODERATIONS = Endpoint(
    "POST", "/v1/moderations", {"input": "a"}, [rejected("model", "omni-moderation-latest", "404: no classifier is served")], frozenset(),
)

TOKENIZE = Endpoint(
    "POST", "/tokenize", {"model": MODEL, "prompt": "The tide mill"},
    [
        honoured("model", MODEL),
        honoured("prompt", "The tide", holds(lambda body: body["count"] == len(body["tokens"]) > 0)),
        honoured("add_special_tokens", False),
        honoured("return_token_strs", True, holds(lambda body: len(body["token_strs"]) == body["count"])),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(), "`messages` in place of `prompt` takes what chat takes for its prompt.",
)

DETOKENIZE = Endpoint(
    "POST", "/detokenize", {"model": MODEL, "tokens": [500, 501]},
    [honoured("model", MODEL), honoured("tokens", [500], holds(lambda body: body["prompt"])), rejected("nonsense", 1, "any unknown field")],
    frozenset(),
)
