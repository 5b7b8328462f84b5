"""Leaving in good order, and saying no when there is no room."""

import http.client
import json
import signal
import threading
import time

import openai
import pytest

from conftest import MODEL
from server import PATIENCE, eventually
from test_chat import QUESTION, ask


class Stream(threading.Thread):
    """Reads a stream of `tokens` tokens in the background; `begun` is set at the first text."""

    def __init__(self, server, tokens: int):
        super().__init__(daemon=True)
        self.server, self.tokens = server, tokens
        self.begun = threading.Event()
        self.reason = self.usage = self.error = None
        self.start()

    def run(self) -> None:
        try:
            with self.server.client() as client:
                stream = ask(
                    client, stream=True, max_tokens=self.tokens, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
                )
                for chunk in stream:
                    self.usage = chunk.usage or self.usage
                    for choice in chunk.choices:
                        self.reason = choice.finish_reason or self.reason
                        if choice.delta.content:
                            self.begun.set()
        except openai.OpenAIError as error:
            self.error = error
        finally:
            self.begun.set()


@pytest.mark.timeout(600)
def test_sigterm_under_load_finishes_streams_refuses_new_ones_and_exits_0(start):
    server = start("--drain-timeout", "400s")
    # Long enough to be going on while the rest is asked.
    streams = [Stream(server, 400) for _ in range(4)]
    kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    kept.request("GET", "/ready")
    assert kept.getresponse().read()
    assert all(stream.begun.wait(PATIENCE) for stream in streams)
    server.terminate()
    eventually("it is not ready any more", lambda: server.get("/ready").status == 503)
    body = json.dumps({"model": MODEL, "messages": QUESTION, "max_tokens": 2})
    kept.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    refused = kept.getresponse()
    error = json.loads(refused.read())["error"]
    assert refused.status == 503
    assert int(refused.getheader("retry-after")) >= 1
    assert error["type"] == "server_error"
    with server.client() as client, pytest.raises(openai.InternalServerError) as raised:
        ask(client)
    assert raised.value.status_code == 503
    for stream in streams:
        stream.join(400)
        assert stream.error is None
        assert stream.reason == "length"
        assert stream.usage.completion_tokens == 400
    assert server.process.wait(PATIENCE) == 0, server.log()


def test_an_idle_server_leaves_at_once(start):
    # Not after the time that running answers would get.
    server = start("--drain-timeout", "100s")
    begin = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begin < 50


def test_ctrl_c_leaves_too(start):
    server = start()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE) == 0


def test_streams_that_outlive_the_deadline_are_ended_and_told(start):
    server = start("--drain-timeout", "1s")
    stream = Stream(server, 8000)
    assert stream.begun.wait(PATIENCE)
    assert server.stop() == 0
    stream.join(PATIENCE)
    # A bare disconnect would look like success: the stream's last event is an error.
    assert isinstance(stream.error, openai.APIError), (stream.error, stream.reason)


def test_a_full_queue_is_503_with_retry_after(start):
    server = start("--max-seqs", "1", "--max-waiting", "1")
    streams = [Stream(server, 6000)]
    assert streams[0].begun.wait(PATIENCE)
    streams.append(Stream(server, 1))
    eventually("the second waits", lambda: server.metrics()["tidemill:num_requests_waiting"] == 1)
    answer = server.post("/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "max_tokens": 2})
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.error["type"] == "server_error"
    with server.client() as client, pytest.raises(openai.InternalServerError) as raised:
        ask(client)
    assert raised.value.status_code == 503
