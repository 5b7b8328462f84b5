"""Adapters over the API: named in requests, loaded and unloaded while others are answered, and written into records."""

import threading

import openai
import pytest

from conftest import GOLDENS, golden, running
from queues import new_key
from test_records import record

BASE = "tiny"
FOLDER = GOLDENS / "llama" / "adapters"
EXACT = ["--weights", "f32", "--kv-dtype", "f32"]
PROMPT = golden("llama/expected.json")["prompt_ids"]
TOKENS = 32


def greedy(name: str) -> list[int]:
    """What PEFT, or for the base transformers, answers to the prompt."""
    place = "llama/expected.json" if name == BASE else f"llama/adapters/{name}/expected.json"
    return golden(place)["greedy"][:TOKENS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    arguments = [*EXACT, "--lora-modules", f"all={FOLDER / 'all'}", "--max-loras", "3"]
    with running(tmp_path_factory.mktemp("tiny"), {BASE: GOLDENS / "llama"}, *arguments) as server:
        yield server


def answer(client: openai.OpenAI, model: str):
    completion = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    return completion, completion.choices[0].token_ids


def load(server, name: str, path, **more):
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})


def unload(server, name: str):
    return server.post("/v1/unload_lora_adapter", {"lora_name": name})


def listed(client) -> dict[str, str | None]:
    return {model.id: model.parent for model in client.models.list()}


def test_an_adapter_is_asked_for_with_its_base_or_alone(tiny):
    with tiny.client() as client:
        for model, name in [("tiny:all", "all"), ("all", "all"), (BASE, BASE)]:
            completion, tokens = answer(client, model)
            assert completion.model == model
            assert tokens == greedy(name), model
        assert listed(client) == {BASE: None, "all": BASE}
        assert client.models.retrieve("tiny:all").id == "all"
        for unknown in ["tiny:none", "none", "other:all"]:
            with pytest.raises(openai.NotFoundError) as error:
                answer(client, unknown)
            assert error.value.code == "model_not_found"


def test_loading_and_unloading_answers_as_vllm_does(tiny):
    done = load(tiny, "some", FOLDER / "some")
    assert (done.status, done.body.decode()) == (200, "Success: LoRA adapter 'some' added successfully.")
    assert done.headers["content-type"].startswith("text/plain")
    with tiny.client() as client:
        assert answer(client, "some")[1] == greedy("some")
        again = load(tiny, "some", FOLDER / "patterns")
        assert again.status == 400 and "already been loaded" in again.error["message"]
        assert answer(client, "some")[1] == greedy("some")
        assert load(tiny, "some", FOLDER / "patterns", load_inplace=True).status == 200
        assert answer(client, "some")[1] == greedy("patterns")
        gone = unload(tiny, "some")
        assert (gone.status, gone.body.decode()) == (200, "Success: LoRA adapter 'some' removed successfully.")
        assert unload(tiny, "some").status == 404
        with pytest.raises(openai.NotFoundError):
            answer(client, "some")
        assert listed(client) == {BASE: None, "all": BASE}


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        (GOLDENS / "qwen3" / "adapters" / "all", 400, "another base model"),
        (GOLDENS / "llama", 404, "adapter_config.json"),
        ("/nowhere", 404, "no such folder"),
    ],
)
def test_a_wrong_adapter_is_refused_and_changes_nothing(tiny, path, status, said):
    with tiny.client() as client:
        before = listed(client)
        refused = load(tiny, "wrong", path)
        assert refused.status == status and refused.error["param"] == "lora_path"
        assert said in refused.error["message"]
        assert load(tiny, "all", path, load_inplace=True).status == status
        assert listed(client) == before
        assert answer(client, "all")[1] == greedy("all")
    for body in [{}, {"lora_name": "a"}, {"lora_name": "a b", "lora_path": str(FOLDER / "all")}, {"lora_name": BASE, "lora_path": "x"}]:
        assert tiny.post("/v1/load_lora_adapter", body).status == 400


def test_the_record_names_the_adapter(tiny):
    with tiny.client() as client:
        row = record(tiny, answer(client, "all")[0].id)
        generation = next(model.generation for model in client.models.list() if model.id == "all")
        assert (row["model"], row["variant"]) == (BASE, "tiny:all")
        assert f"{row['adapter']:016x}" == generation
        row = record(tiny, answer(client, BASE)[0].id)
        assert (row["adapter"], row["variant"]) == (0, None)


def test_publishing_under_load_loses_no_answer(tiny):
    """Every answer is whole and one of the two generations', and the base beside them stays itself."""
    assert load(tiny, "live", FOLDER / "some").status == 200
    wanted = [greedy("some"), greedy("patterns")]
    faults, seen = [], set()

    def ask(model: str) -> None:
        try:
            with tiny.client() as client:
                for _ in range(10):
                    tokens = answer(client, model)[1]
                    right = [greedy(BASE)] if model == BASE else wanted
                    assert tokens in right, tokens
                    seen.add((model, right.index(tokens)))
        except Exception as error:  # noqa: BLE001: whatever it is, the test must hear of it
            faults.append(error)

    clients = [threading.Thread(target=ask, args=(model,)) for model in ["live"] * 4 + [BASE]]
    for client in clients:
        client.start()
    published = 0
    while any(client.is_alive() for client in clients):
        done = load(tiny, "live", FOLDER / ["patterns", "some"][published % 2], load_inplace=True)
        # Two replaced generations that still answer are the most there may be.
        assert done.status in (200, 503), done.body
        published += done.status == 200
    for client in clients:
        client.join()
    assert not faults
    assert published >= 2 and ("live", 0) in seen and (BASE, 0) in seen
    assert unload(tiny, "live").status == 200


def test_only_the_administrator_loads(start):
    server = start(*EXACT, models={BASE: GOLDENS / "llama"})
    keys = {scope: new_key(server, scope) for scope in ["admin", "chat"]}
    for scope, status in [("chat", 403), ("admin", 200)]:
        headers = {"authorization": f"Bearer {keys[scope]}", "content-type": "application/json"}
        body = b'{"lora_name": "all", "lora_path": "%s"}' % str(FOLDER / "all").encode()
        assert server.request("POST", "/v1/load_lora_adapter", body, headers).status == status
    with openai.OpenAI(base_url=server.base_url, api_key=keys["chat"], max_retries=0) as client:
        assert answer(client, "tiny:all")[1] == greedy("all")
