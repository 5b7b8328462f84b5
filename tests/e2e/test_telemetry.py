"""Traces and logs: spans at a collector that the test is, one line per request, no texts unless asked for."""

import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from conftest import MODEL
from queues import new_key
from server import PATIENCE

CHAT = "/v1/chat/completions"
SECRET = "the lighthouse keeper's password is gorgonzola"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "temperature": 0}


class Collector:
    """Takes OTLP over HTTP, as protobuf."""

    def __init__(self):
        self.spans, self.resources, self.paths, self.answer = [], [], set(), 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.headers["content-type"] == "application/x-protobuf"
                collector.paths.add(self.path)
                if collector.answer == 200:
                    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                        collector.resources.append(attributes(resource.resource.attributes))
                        for scope in resource.scope_spans:
                            collector.spans.extend(scope.spans)
                self.send_response(collector.answer)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait(self, condition, seconds: float = PATIENCE):
        """The spans that meet the condition, once there are some."""
        deadline = time.monotonic() + seconds
        while not (found := [span for span in list(self.spans) if condition(span)]):
            assert time.monotonic() < deadline, [span.name for span in self.spans]
            time.sleep(0.05)
        return found

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


def attributes(pairs) -> dict:
    def plain(value):
        kind = value.WhichOneof("value")
        return [plain(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in pairs}


def log_lines(server, condition, seconds: float = PATIENCE) -> list[dict]:
    deadline = time.monotonic() + seconds
    while True:
        lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
        if found := [line for line in lines if condition(line)]:
            return found
        assert time.monotonic() < deadline, server.log()[-4000:]
        time.sleep(0.05)


def traceparent(sampled: bool = True) -> tuple[str, str, dict]:
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    return trace, parent, {"content-type": "application/json", "traceparent": f"00-{trace}-{parent}-0{int(sampled)}"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_goes_on_with_the_callers_trace_as_spans_and_in_the_log(start, collector, stream):
    server = start("--otlp-endpoint", collector.url, "--log-format", "json")
    trace, parent, headers = traceparent()
    answer = server.request("POST", CHAT, json.dumps({**ASK, "stream": stream, "seed": 7}).encode(), headers)
    assert answer.status == 200
    request, = collector.wait(lambda span: span.trace_id.hex() == trace and span.name == f"POST {CHAT}")
    assert request.parent_span_id.hex() == parent and request.kind == 2
    seen = attributes(request.attributes)
    assert seen["http.route"] == CHAT and seen["http.response.status_code"] == 200
    assert seen["tidemill.request_id"] == answer.headers["x-request-id"]

    chat, = collector.wait(lambda span: span.trace_id.hex() == trace and span.name == f"chat {MODEL}")
    assert chat.parent_span_id == request.span_id
    assert request.start_time_unix_nano <= chat.start_time_unix_nano <= chat.end_time_unix_nano <= request.end_time_unix_nano
    seen = attributes(chat.attributes)
    assert seen["gen_ai.operation.name"] == "chat" and seen["gen_ai.provider.name"] == "tidemill"
    assert seen["gen_ai.request.model"] == seen["gen_ai.response.model"] == MODEL
    assert seen["gen_ai.usage.output_tokens"] == 5 and seen["gen_ai.usage.input_tokens"] > 5
    assert seen["gen_ai.request.max_tokens"] == 5 and seen["gen_ai.request.seed"] == 7
    assert seen["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < seen["gen_ai.response.time_to_first_chunk"] < 60
    if not stream:
        assert answer.json()["id"] == f"chatcmpl-{seen['gen_ai.response.id']}"
        assert answer.json()["usage"]["prompt_tokens"] == seen["gen_ai.usage.input_tokens"]
    assert collector.paths == {"/v1/traces"}
    assert collector.resources[0]["service.name"] == "tidemill"

    line, = log_lines(server, lambda line: line.get("trace_id") == trace and line["target"] == "tidemill::requests")
    assert line["level"] == "INFO"
    assert (line["method"], line["route"], line["status"], line["model"]) == ("POST", CHAT, 200, MODEL)
    assert line["output_tokens"] == 5 and line["input_tokens"] > 5 and line["ms"] > 0
    assert "key" not in line and "client_left" not in line
    # No text of anyone in the log or in a span.
    assert "gorgonzola" not in server.log()
    assert all(b"gorgonzola" not in span.SerializeToString() for span in collector.spans)


def test_who_asked_what_went_wrong_and_who_left(start, collector):
    server = start("--otlp-endpoint", collector.url, "--log-format", "json")
    key = new_key(server, "chat")
    trace, _, headers = traceparent()
    assert server.request("POST", CHAT, b"{}", headers).status == 401
    line, = log_lines(server, lambda line: line.get("trace_id") == trace)
    assert line["status"] == 401 and "key" not in line and "model" not in line
    span, = collector.wait(lambda span: span.trace_id.hex() == trace)
    assert attributes(span.attributes)["http.response.status_code"] == 401

    # The caller's choice: not sampled. It is logged all the same, and no span comes although a later one does.
    unsampled, _, headers = traceparent(sampled=False)
    headers["authorization"] = f"Bearer {key}"
    assert server.request("POST", CHAT, json.dumps(ASK).encode(), headers).status == 200
    line, = log_lines(server, lambda line: line.get("trace_id") == unsampled)
    assert line["key"]
    # Half an answer, then the client is gone.
    trace, _, headers = traceparent()
    headers["authorization"] = f"Bearer {key}"
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    long = {**ASK, "stream": True, "max_tokens": 4000, "ignore_eos": True}
    connection.request("POST", CHAT, json.dumps(long).encode(), headers)
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()
    line, = log_lines(server, lambda line: line.get("trace_id") == trace and line["target"] == "tidemill::requests")
    assert line["client_left"] is True and line["output_tokens"] < 4000
    left, = collector.wait(lambda span: span.trace_id.hex() == trace and span.kind == 2)
    assert attributes(left.attributes)["error.type"] == "client_left"
    assert not [span for span in collector.spans if span.trace_id.hex() == unsampled]

    # Broken context is no context: a new trace.
    broken = {"content-type": "application/json", "traceparent": "00-xyz-abc-01", "authorization": f"Bearer {key}", "x-request-id": "broken-1"}
    assert server.request("POST", CHAT, json.dumps(ASK).encode(), broken).status == 200
    line, = log_lines(server, lambda line: line.get("request_id") == "broken-1")
    assert len(line["trace_id"]) == 32 and int(line["trace_id"], 16)


def test_a_collector_that_is_away_costs_spans_and_no_request(start, collector):
    server = start("--otlp-endpoint", collector.url)
    collector.answer = 503
    for _ in range(20):
        assert server.post(CHAT, {**ASK, "max_tokens": 1}).status == 200
    deadline = time.monotonic() + PATIENCE
    while (dropped := server.metrics().get("tidemill:spans_dropped_total", 0)) < 40:
        assert time.monotonic() < deadline, dropped
        time.sleep(0.1)
    assert "do not reach the collector" in server.log()
    # It is back: spans arrive again, and that is said.
    collector.answer = 200
    assert server.post(CHAT, {**ASK, "max_tokens": 1}).status == 200
    collector.wait(lambda span: span.name == f"POST {CHAT}")
    assert server.metrics()["tidemill:spans_exported_total"] > 0
    # What waits is sent on the way out.
    before = len(collector.spans)
    server.post("/tokenize", {"prompt": "a"})
    assert server.stop() == 0
    assert any(span.name == "POST /tokenize" for span in collector.spans[before:])


def test_texts_are_in_the_log_when_asked_for(start):
    server = start("--log-content", "true", "--log-format", "json")
    answer = server.post(CHAT, ASK).json()["choices"][0]["message"]["content"]
    line, = log_lines(server, lambda line: line["target"] == "tidemill::content")
    assert SECRET in line["prompts"] and len(line["trace_id"]) == 32
    assert json.dumps(answer, ensure_ascii=False).strip('"')[:10] in line["answers"]


def test_an_address_that_is_none_stops_the_start(start):
    server = start("--otlp-endpoint", "localhost:4318", ready=False)
    assert server.process.wait(PATIENCE) != 0
    assert "http://localhost:4318" in server.log()
