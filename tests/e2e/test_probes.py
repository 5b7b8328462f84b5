"""Models, probes, version and metrics."""

import re

from conftest import MODEL
from test_chat import ask

# vLLM's names with our prefix, and what they must be.
METRICS = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter",
    "num_preemptions_total": "counter",
    "prefix_cache_queries_total": "counter",
    "prefix_cache_hits_total": "counter",
    "request_success_total": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "iteration_tokens_total": "histogram",
}


def test_models_are_listed_and_found(server, client):
    [model] = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert model.max_model_len > 0
    assert client.models.retrieve(MODEL).id == MODEL
    for path in ["/v1/models/nobody", "/v1/models/nobody%2Fhome", "/v1/models/nobody/home"]:
        answer = server.get(path)
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert "nobody/home" in server.get("/v1/models/nobody%2Fhome").error["message"]


def test_probes_answer(server):
    assert server.get("/health").status == 200
    assert server.get("/ready").status == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", server.get("/version").json()["version"])


def test_not_ready_before_the_weights_are_loaded(start):
    server = start(ready=False)
    statuses = set()
    while 200 not in statuses:
        assert server.process.poll() is None, server.log()
        try:
            statuses.add(server.get("/ready").status)
        except OSError:
            pass
    assert statuses <= {200, 503}


def test_metrics_have_the_names_that_dashboards_know(server, client):
    for stream in [True, False]:
        answer = ask(client, max_tokens=4, stream=stream)
        if stream:
            list(answer)
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.body.decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    missing = {name: kind for name, kind in METRICS.items() if kinds.get(f"tidemill:{name}") != kind}
    assert not missing, f"missing or of another kind: {missing}; there are {sorted(kinds)}"
    assert f'model_name="{MODEL}"' in text


def test_counters_count(server, client):
    before = server.wait_idle()
    usage = ask(client, max_tokens=9).usage
    after = server.wait_idle()
    grown = lambda name: after[f"tidemill:{name}"] - before[f"tidemill:{name}"]
    assert grown("generation_tokens_total") == 9
    assert grown("prompt_tokens_total") == usage.prompt_tokens
    assert grown("request_success_total") == 1
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("inter_token_latency_seconds_count") == 8
