"""`/tokenize` and `/detokenize` against the tokens that transformers makes."""

import pytest

from conftest import MODEL, golden

GOLDEN = golden("smollm2/tokenizer.json")


@pytest.mark.parametrize("case", GOLDEN["encode"], ids=lambda case: repr(case["text"][:30]))
def test_texts_become_the_published_tokens_and_come_back(server, case):
    answer = server.post("/tokenize", {"model": MODEL, "prompt": case["text"]}).json()
    assert answer["tokens"] == case["ids"]
    assert answer["count"] == len(case["ids"])
    assert server.post("/detokenize", {"model": MODEL, "tokens": case["ids"]}).json()["prompt"] == case["decoded"] == case["text"]


@pytest.mark.parametrize("case", GOLDEN["chats"], ids=lambda case: case["messages"][-1]["content"][:30])
def test_conversations_become_the_published_tokens(server, case):
    answer = server.post("/tokenize", {"model": MODEL, "messages": case["messages"]}).json()
    assert answer["tokens"] == case["ids"]


def test_bad_tokens_are_named(server):
    for tokens, param in [([10**6], "tokens"), ([-1], "tokens.0"), (["a"], "tokens.0"), (5, "tokens"), (None, "tokens")]:
        answer = server.post("/detokenize", {"model": MODEL, "tokens": tokens})
        assert answer.status == 400 and answer.error["param"] == param, answer.body
    assert server.post("/tokenize", {"model": MODEL}).error["code"] == "missing_required_parameter"
