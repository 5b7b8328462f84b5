"""The answers that `transformers` gives with the same weights, over HTTP."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import FAMILIES, GOLDENS, MODEL, golden, running
from server import default_model

EXACT = ["--weights", "f32", "--kv-dtype", "f32"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The default model dequantised to float32."""
    with running(tmp_path_factory.mktemp("exact"), {MODEL: default_model()}, *EXACT) as server:
        yield server


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """All tiny models in one server: folders, and the GGUF files where there are any."""
    models = {name: GOLDENS / name for name in FAMILIES}
    models |= {f"{name}-gguf": GOLDENS / name / f"{name}.gguf" for name in FAMILIES if (GOLDENS / name / f"{name}.gguf").exists()}
    with running(tmp_path_factory.mktemp("families"), models, *EXACT, "--kv-memory", "64MiB") as server:
        yield server


def greedy(server, chat: dict) -> list[int]:
    body = {"model": MODEL, "messages": chat["messages"], "temperature": 0, "max_tokens": 64, "return_token_ids": True}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    answer = answer.json()
    assert answer["prompt_token_ids"] == chat["ids"]
    [choice] = answer["choices"]
    assert choice["finish_reason"] == chat["finish_reason"]
    if choice["token_ids"] == chat["greedy"]:
        assert choice["message"]["content"] == chat["greedy_text"]
    return choice["token_ids"]


@pytest.mark.parametrize(("threads", "count"), [(1, 4), (20, 20)], ids=["one by one", "all at once"])
def test_the_default_model_answers_as_transformers_does(exact, threads, count):
    chats = golden("smollm2/chats.json")["chats"][:count]
    assert len(chats) == count
    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(lambda chat: greedy(exact, chat), chats))
    wrong = {chat["messages"][-1]["content"]: (answer, chat["greedy"]) for answer, chat in zip(answers, chats) if answer != chat["greedy"]}
    assert not wrong


CASES = [name for name in FAMILIES] + [f"{name}-gguf" for name in ["llama", "llama3", "qwen2", "qwen3"]]


@pytest.mark.parametrize("model", CASES)
def test_every_family_answers_as_transformers_does(families, model):
    expected = golden(f"{model.removesuffix('-gguf')}/expected.json")
    body = {"model": model, "prompt": expected["prompt_ids"], "temperature": 0, "max_tokens": 64, "ignore_eos": True, "return_token_ids": True}
    answer = families.post("/v1/completions", {**body, "repetition_penalty": 1}).json()
    assert answer["choices"][0]["token_ids"] == expected["greedy"]
    # In a run of byte tokens that is not UTF-8 as a whole, transformers replaces every byte, a stream only those that are not. Only a
    # random model with byte fallback makes such runs.
    if model != "mistral":
        assert answer["choices"][0]["text"] == expected["greedy_text"]


@pytest.mark.parametrize("model", CASES)
def test_every_family_tokenizes_as_transformers_does(families, model):
    expected = golden(f"{model.removesuffix('-gguf')}/expected.json")
    for case in expected["encode"]:
        for special, key in [(False, "ids"), (True, "ids_with_special")]:
            answer = families.post("/tokenize", {"model": model, "prompt": case["text"], "add_special_tokens": special}).json()
            assert answer["tokens"] == case[key], case["text"]
        decoded = families.post("/detokenize", {"model": model, "tokens": case["ids"]}).json()["prompt"]
        assert decoded == case["decoded"]


@pytest.mark.parametrize("model", CASES)
def test_every_family_renders_its_template_as_transformers_does(families, model):
    for chat in golden(f"{model.removesuffix('-gguf')}/expected.json")["chats"]:
        if "tools" in chat:
            continue
        body = {"model": model, "messages": chat["messages"], "chat_template_kwargs": chat.get("kwargs", {})}
        answer = families.post("/tokenize", body)
        if "raises" in chat:
            assert answer.status == 400 and chat["raises"] in answer.error["message"]
        else:
            assert answer.json().get("tokens") == chat["ids"], (answer.body, chat["text"])
