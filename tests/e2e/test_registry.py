"""Adapters that are kept: registered, served over restarts, named by aliases that move under load, revoked, merged into the default model."""

import json
import math
import random
import struct
import subprocess
import threading
from array import array
from pathlib import Path

import openai
import pytest

from conftest import MODEL, running
from server import Answer, Server, binary, default_model, eventually

# SmolLM2-135M.
LAYERS, HIDDEN, KEYS = 30, 576, 192
QUESTION = [{"role": "user", "content": "Tell me something about the sea."}]
EXACT = ["--weights", "f32", "--kv-dtype", "f32"]


def write_adapter(folder: Path, seed: int, rank: int = 4, strength: float = 0.15) -> Path:
    """Random factors as PEFT would save them: enough to change what the model says."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "SmolLM2-135M-Instruct",
        "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    header, data = {}, bytearray()
    for layer in range(LAYERS):
        for name, out in [("q_proj", HIDDEN), ("v_proj", KEYS)]:
            for factor, shape, spread in [("A", [rank, HIDDEN], 1 / math.sqrt(HIDDEN)), ("B", [out, rank], strength)]:
                values = array("f", (draw.gauss(0, spread) for _ in range(shape[0] * shape[1]))).tobytes()
                module = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{factor}.weight"
                header[module] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
                data += values
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, seed) for seed, name in enumerate(["one", "two"])}


def adapter(data: Path, *arguments, status: int = 0) -> str:
    """`tidemill adapter …` beside the server; what it said."""
    command = [binary(), "adapter", *arguments, "--data", data]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, cwd=data.parent)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def base() -> str:
    return f"{MODEL}={default_model()}"


def text(server: Server, model: str, tokens: int = 12) -> str:
    with server.client() as client:
        completion = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=tokens, temperature=0)
    return completion.choices[0].message.content


def status(server: Server, model: str) -> int:
    body = {"model": model, "messages": QUESTION, "max_tokens": 1}
    return server.post("/v1/chat/completions", body).status


def change(server: Server, path: str, body=None) -> Answer:
    answer = server.post(path, body if body is not None else b"")
    assert answer.status in (200, 201), answer.body
    return answer


def models(server: Server) -> dict[str, str | None]:
    return {card["id"]: card.get("parent") for card in server.get("/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder of a server that is started several times."""
    return tmp_path_factory.mktemp("registry")


def test_what_is_registered_is_served_under_its_names_also_after_a_restart(home, adapters):
    with running(home, {MODEL: default_model()}) as server:
        plain = text(server, MODEL)
        said = adapter(server.data, "import", "one", adapters["one"], "--base", base())
        assert "as a candidate" in said
        assert status(server, "one") == 404
        adapter(server.data, "serve", "one")
        eventually("the running server follows", lambda: "one" in models(server))
        assert "leads to one@" in adapter(server.data, "alias", "champion", "one")
        eventually("the alias is known", lambda: "champion" in models(server))
        answers = {model: text(server, model) for model in ["one", f"{MODEL}:one", "champion", f"{MODEL}:champion"]}
        assert len(set(answers.values())) == 1 and answers["one"] != plain
        assert models(server) == {MODEL: None, "one": MODEL, "champion": MODEL}
        change(server, "/v1/adapters", {"name": "two", "path": str(adapters["two"])})
        change(server, "/v1/adapters/two/serve")
        second = text(server, "two")
        assert second not in (plain, answers["one"])
    # It was killed.
    with running(home, {MODEL: default_model()}) as server:
        # From the first request on.
        assert text(server, "champion") == answers["one"]
        assert (text(server, "two"), text(server, MODEL)) == (second, plain)
        listed = adapter(server.data, "list")
        assert listed.count("serving") == 2 and "champion" in listed
        shown = adapter(server.data, "show", "champion")
        assert "base hash" in shown and '"r":4' in shown
        row = server.get("/v1/adapters/champion").json()
        assert (row["name"], row["base"], row["state"], row["problem"]) == ("one", MODEL, "serving", None)
        assert len(row["base_hash"]) == 64


def test_an_alias_that_moves_under_load_loses_no_request_and_takes_effect_at_once(home, adapters):
    with running(home, {MODEL: default_model()}) as server:
        wanted = {name: text(server, name, 6) for name in ["one", "two"]}
        assert wanted["one"] != wanted["two"]
        seen, faults, stop = [], [], threading.Event()

        def ask() -> None:
            try:
                while not stop.is_set():
                    seen.append(text(server, "champion", 6))
            except Exception as error:  # noqa: BLE001: whatever it is, the test must hear of it
                faults.append(error)

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        for turn in range(8):
            name = ["two", "one"][turn % 2]
            moved = change(server, "/v1/adapter_aliases", {"alias": "champion", "adapter": name})
            assert moved.json()["aliases"] == ["champion"]
            assert text(server, "champion", 6) == wanted[name], turn
        stop.set()
        for client in clients:
            client.join()
        assert not faults
        assert set(seen) <= set(wanted.values()) and len(seen) >= 8


def test_a_damaged_adapter_is_reported_and_keeps_nothing_from_starting(home, adapters):
    listed = adapter(home / "data", "list").splitlines()
    generation = next(line for line in listed if line.startswith("two@")).split()[0].split("@")[1]
    tensors = home / "data" / "adapters" / generation / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with running(home, {MODEL: default_model()}) as server:
        assert status(server, "champion") == 200
        assert status(server, "two") == 404
        assert "two" not in models(server)
        row = server.get("/v1/adapters/two").json()
        assert row["state"] == "serving" and "damaged" in row["problem"]
        assert "an adapter cannot be served" in server.log()
        refused = server.post("/v1/adapters/two/serve", b"")
        assert (refused.status, refused.error["code"]) == (409, "adapter_damaged")
        tensors.write_bytes(whole)
        change(server, "/v1/adapters/two/serve")
        assert status(server, "two") == 200


def test_what_is_revoked_is_not_served_again(home):
    with running(home, {MODEL: default_model()}) as server:
        assert status(server, "champion") == 200
        said = adapter(server.data, "retire", "one", status=1)
        assert "champion leads to" in said
        assert "and with it champion" in adapter(server.data, "revoke", "one")
        eventually("the running server follows", lambda: status(server, "one") == 404)
        with server.client() as client, pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model="champion", messages=QUESTION, max_tokens=1)
        assert error.value.code == "model_not_found"
        assert "was revoked" in adapter(server.data, "serve", "one", status=1)
        assert status(server, "two") == 200
    with running(home, {MODEL: default_model()}) as server:
        assert status(server, "one") == status(server, "champion") == 404
        assert server.get("/v1/adapters?state=revoked").json()["data"][0]["name"] == "one"


def logprobs(server: Server, model: str, prompt: list[int]) -> list[float]:
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
    answer = server.post("/v1/completions", body)
    assert answer.status == 200, answer.body
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(prompt)]


def greedy(server: Server, model: str) -> tuple[str, list[int]]:
    with server.client() as client:
        completion = client.completions.create(
            model=model, prompt="The sea is", max_tokens=24, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True}
        )
    return completion.choices[0].text, completion.choices[0].token_ids


def test_the_merged_model_answers_as_base_and_adapter_do(home, adapters, tmp_path):
    data, merged = home / "data", tmp_path / "merged.gguf"
    said = adapter(data, "merge", "two", "--out", merged, "--base", base())
    assert "60 matrices merged" in said
    assert "is there already" in adapter(data, "merge", "two", "--out", merged, "--base", base(), status=1)
    with running(home, {MODEL: default_model()}, *EXACT) as server:
        wanted, tokens = greedy(server, "two")
        plain, _ = greedy(server, MODEL)
        expected, base_only = logprobs(server, "two", tokens), logprobs(server, MODEL, tokens)
    folder = tmp_path / "run"
    folder.mkdir()
    with running(folder, {"merged": merged}, *EXACT) as server:
        assert greedy(server, "merged")[0] == wanted != plain
        got = logprobs(server, "merged", tokens)
    # What f16 rounds away is far below what the adapter adds.
    worst = max(abs(a - b) for a, b in zip(got, expected, strict=True))
    added = max(abs(a - b) for a, b in zip(base_only, expected, strict=True))
    assert worst < 0.02 < added, (worst, added)


def test_an_adapter_comes_out_as_peft_wrote_it(home, adapters, tmp_path):
    adapter(home / "data", "export", "two", "--out", tmp_path / "two")
    for name in ["adapter_config.json", "adapter_model.safetensors"]:
        assert (tmp_path / "two" / name).read_bytes() == (adapters["two"] / name).read_bytes()
