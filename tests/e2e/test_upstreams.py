"""One server in front of another: the official client talks to the gateway, and the model runs behind it."""

import os
import subprocess
import time
from types import SimpleNamespace

import openai
import pytest

from conftest import MODEL
from queues import new_key
from server import PATIENCE, STOP_SECONDS, Server, binary, default_model
from test_network import Certificate, start_tls  # noqa: F401
from test_tools import QUESTION, WEATHER, check_weather, named

ASK = {"messages": [{"role": "user", "content": "What is a tide mill?"}], "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`origin` runs the model and wants a key; `gateway` runs none and has it."""
    origin = Server(tmp_path_factory.mktemp("origin"), {MODEL: default_model()})
    gateway = None
    try:
        secret = new_key(origin.wait_ready(), "chat")
        folder = tmp_path_factory.mktemp("gateway")
        (folder / "key").write_text(secret + "\n")
        (folder / "gateway.toml").write_text(f"""
[upstreams.origin]
url = "{origin.base_url}"
key_file = "{folder / "key"}"

[models.assistant]
upstreams = ["origin"]
model = "{MODEL}"

[prices.assistant]
input = 1
output = 10
""")
        gateway = Server(folder, {}, "--config", str(folder / "gateway.toml")).wait_ready()
        with gateway.client() as client, openai.OpenAI(base_url=origin.base_url, api_key=secret, max_retries=0) as direct:
            yield SimpleNamespace(origin=origin, gateway=gateway, client=client, direct=direct, secret=secret)
        for server in (origin, gateway):
            assert server.process.poll() is None and "panicked" not in server.log(), server.log()[-4000:]
        assert secret not in gateway.log()
    finally:
        origin.kill()
        if gateway:
            gateway.kill()


def test_a_chat_is_the_same_as_without_the_gateway(pair):
    direct = pair.direct.chat.completions.create(model=MODEL, logprobs=True, top_logprobs=2, **ASK)
    answer = pair.client.chat.completions.create(model="assistant", logprobs=True, top_logprobs=2, **ASK)
    assert answer.choices[0].message.content == direct.choices[0].message.content
    assert answer.choices[0].logprobs == direct.choices[0].logprobs
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (direct.usage.prompt_tokens, direct.usage.completion_tokens)
    assert (answer.model, answer.id.startswith("chatcmpl-"), answer.id != direct.id) == ("assistant", True, True)
    assert [model.id for model in pair.client.models.list()] == ["assistant"]


def test_a_stream_is_the_same_as_without_the_gateway(pair):
    def read(client, model):
        chunks = list(client.chat.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **ASK))
        assert len({chunk.id for chunk in chunks}) == 1 and {chunk.model for chunk in chunks} == {model}
        text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        return text, chunks[-1].usage.completion_tokens, [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]

    direct, proxied = read(pair.direct, MODEL), read(pair.client, "assistant")
    # How many tokens a chunk holds is the moment's affair.
    assert ("".join(proxied[0]), *proxied[1:]) == ("".join(direct[0]), *direct[1:])
    silent = list(pair.client.chat.completions.create(model="assistant", stream=True, **ASK))
    assert all(chunk.usage is None for chunk in silent)


def test_tools_and_completions_pass(pair):
    answer = pair.client.chat.completions.create(
        model="assistant", messages=QUESTION, temperature=0, max_tokens=120, tools=[WEATHER], tool_choice=named("get_weather")
    )
    [call] = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name, answer.choices[0].finish_reason) == ("function", "get_weather", "tool_calls")
    check_weather(call.function.arguments)
    completion = pair.client.completions.create(model="assistant", prompt="Once upon a", max_tokens=5, temperature=0)
    direct = pair.direct.completions.create(model=MODEL, prompt="Once upon a", max_tokens=5, temperature=0)
    assert completion.choices[0].text == direct.choices[0].text
    with pytest.raises(openai.BadRequestError) as error:
        pair.client.responses.create(model="assistant", input="Hi")
    assert error.value.code == "remote_model"
    # What the model's own server refuses is told in its words.
    with pytest.raises(openai.BadRequestError) as error:
        pair.client.chat.completions.create(model="assistant", extra_body={"colour": 1}, **ASK)
    assert error.value.code == "unknown_parameter" and error.value.param == "colour"


def test_feedback_on_a_remote_answer_becomes_a_dataset(pair):
    for number in range(2):
        messages = [{"role": "user", "content": f"Name a colour, number {number}."}]
        answer = pair.client.chat.completions.create(model="assistant", messages=messages, max_tokens=8, user="ann")
        sent = pair.gateway.post("/v1/feedback", {"target": answer.id, "kind": "correction", "value": f"Blue, {number}.", "author": "rater"})
        assert sent.status == 201, sent.body
    started = pair.gateway.post("/v1/datasets", {"name": "colours", "query": {"rows": ["preference"], "since": "1d"}})
    assert started.status == 202, started.body
    build, deadline = started.json(), time.monotonic() + 120
    while build["status"] in ("queued", "running") and time.monotonic() < deadline:
        time.sleep(0.1)
        build = pair.gateway.get(f"/v1/datasets/builds/{build['id']}").json()
    assert build["status"] == "succeeded", build
    rows = pair.gateway.get("/v1/datasets/colours@1/rows").json()["data"]
    assert sorted(row["prompt"][0]["content"] for row in rows) == ["Name a colour, number 0.", "Name a colour, number 1."]
    assert all(row["rejected"][0]["content"] and row["chosen"][0]["content"].startswith("Blue") for row in rows), rows


def test_tokens_cost_and_times_are_counted(pair):
    before = pair.gateway.metrics()
    usage = pair.client.chat.completions.create(model="assistant", **ASK).usage
    after = pair.gateway.metrics()
    spent = {name: after[name] - before.get(name, 0.0) for name in after if name.startswith("tidemill:upstream_")}
    assert spent["tidemill:upstream_requests_total"] == 1
    assert spent["tidemill:upstream_request_seconds_count"] == 1
    cached = usage.prompt_tokens_details.cached_tokens
    assert spent["tidemill:upstream_tokens_total"] == usage.prompt_tokens + cached + usage.completion_tokens
    assert spent["tidemill:upstream_cost_nanodollars_total"] == 1000 * usage.prompt_tokens + 10_000 * usage.completion_tokens
    assert after["tidemill:upstream_requests_running"] == 0


def test_the_short_form_and_a_key_that_is_refused(pair, start, monkeypatch):
    monkeypatch.setenv("RIGHT_KEY", pair.secret)
    monkeypatch.setenv("WRONG_KEY", "sk-hunter2-is-not-the-key")
    url = pair.origin.base_url
    gateway = start("--upstream", f"right={MODEL}@{url}#RIGHT_KEY", "--upstream", f"wrong={MODEL}@{url}#WRONG_KEY", models={})
    with gateway.client() as client:
        assert client.chat.completions.create(model="right", **ASK).choices[0].message.content
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as error:
                client.chat.completions.create(model="wrong", stream=stream, **ASK)
            assert (error.value.status_code, error.value.code) == (502, "upstream_key_refused")
            assert "hunter2" not in str(error.value)
    assert "hunter2" not in gateway.log() and pair.secret not in gateway.log()


def test_a_server_behind_tls_is_asked_when_the_machine_trusts_it(tmp_path, start, start_tls, monkeypatch):  # noqa: F811
    certificate, another = (Certificate(tmp_path, name, "basicConstraints=critical,CA:FALSE") for name in ("far", "another"))
    origin = start_tls(certificate)
    for trusted, status in ((certificate, 200), (another, 502)):
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted.chain))
        gateway = start("--upstream", f"m={MODEL}@{origin.base_url}", models={})
        answer = gateway.post("/v1/chat/completions", {"model": "m", **ASK})
        assert answer.status == status, answer.body
        if status == 200:
            with gateway.client() as client:
                chunks = list(client.chat.completions.create(model="m", stream=True, **ASK))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                assert text == answer.json()["choices"][0]["message"]["content"]
        else:
            assert answer.error["code"] == "upstream_unreachable", answer.body


def test_without_its_key_a_gateway_does_not_start(tmp_path):
    command = [binary(), "serve", "--port", "0", "--data", tmp_path / "data", "--upstream", "m=http://127.0.0.1:1/v1#NO_SUCH_KEY"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_") and name != "NO_SUCH_KEY"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=PATIENCE)
    assert done.returncode != 0 and "NO_SUCH_KEY" in done.stderr, done.stderr


def test_a_stopped_gateway_ends_what_is_left(pair, start, monkeypatch):
    monkeypatch.setenv("RIGHT_KEY", pair.secret)
    gateway = start("--upstream", f"m={MODEL}@{pair.origin.base_url}#RIGHT_KEY", "--drain-timeout", "1s", models={})
    with gateway.client() as client:
        stream = client.chat.completions.create(model="m", stream=True, **{**ASK, "max_tokens": 4000}, extra_body={"ignore_eos": True})
        next(iter(stream))
        gateway.terminate()
        with pytest.raises(openai.APIError) as error:
            for _ in stream:
                pass
        assert error.value.body["code"] == "cancelled"
    assert gateway.process.wait(STOP_SECONDS) == 0
    # The model's server is free again.
    pair.origin.wait_idle()
