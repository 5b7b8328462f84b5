"""A server at work, as the console shows it: traffic, a rollout, a loop, a dataset, an adapter, a queue and a remote model."""

import json
import math
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

from conftest import MODEL, running
from queues import ask, new_key
from server import binary, default_model, eventually
from test_fine_tuning import question, said, supervised, upload
from test_registry import write_adapter

EVIL = "<img src=x onerror=\"window.pwned='yes'\">"
USERS = 24
EPOCHS = 8
# Of the canary, at most, each with an answer and a thumb.
CANARY_USERS = 400
# Answers of the last hours that a model which is not served any more has given.
HISTORY = 900
CONFIG = """
[upstreams.elsewhere]
url = "ELSEWHERE"

[models.closed]
upstreams = ["elsewhere"]
model = "MODEL"

[prices.closed]
input = 1
output = 10

[prices.archive]
input = 1
output = 10

[loop.shorter]
model = "MODEL"

[loop.shorter.when]
preferences = 40
raters = 5

[loop.shorter.feedback]
from = ["correction"]

[loop.shorter.train]
method = "dpo"

[loop.shorter.evaluate]
rules = [{ type = "length", max = 60, unit = "words" }]

[loop.shorter.gates]
text_loss = "off"

[loop.shorter.rollout]
kind = "canary"
steps = [{ set_weight = 25 }, { pause = { samples = 100 } }]
metrics = [{ metric = "error_rate", guardrail = { max = 0.02 } }, { metric = "feedback.thumb", goal = { min = 0 } }]
"""


def chat(server, model: str, text: str, **extra) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 6, **extra}
    return ask(server, "POST", "/v1/chat/completions", body)


def corrected(server, number: int) -> None:
    """An answer and a better one: a row to train on."""
    answer = chat(server, MODEL, f"What is {number} and {number}?", user=f"u{number}")
    ask(server, "POST", "/v1/feedback", {"target": answer["id"], "kind": "correction", "value": f"It is {2 * number}.", "author": f"r{number % 3}"})


def history(data: Path) -> None:
    """Answers from before this server began, in a database whose tables are there: three models, of which one is not served any more."""
    migration = (Path(__file__).parents[2] / "store/migrations/0015_traffic.sql").read_text()
    summed = next(part for part in migration.split(";") if "INSERT INTO traffic" in part)
    now = int(time.time() * 1e6)
    rows = []
    for number in range(HISTORY):
        # More by day than by night, and fewer and fewer of the closed model.
        hours = 1 + 21.5 * (1 - number / HISTORY) + 0.7 * math.sin(number / 40)
        model = ["archive", MODEL, "closed"][0 if number % 3 == 0 else 1 + (number * 7 % HISTORY > number)]
        first, whole = (30_000 + number * 7919 % 40_000, 300_000 + number * 104_729 % 500_000)
        scale = 1 if model == MODEL else 6
        rows.append((
            f"00000000-0000-7000-8000-{number:012d}", now - int(hours * 3.6e9), "chat", model, 0, "failed" if number % 90 == 30 else "ok", 0,
            400, 100, 150, first * scale, whole * scale, "c0ffee", "{}", 700,
        ))
    columns = "id, created, endpoint, model, adapter, status, compare, prompt_tokens, cached_tokens, output_tokens, first_token_us, " \
              "duration_us, config_hash, metadata, bytes"
    with closing(sqlite3.connect(data / "tidemill.db", timeout=60)) as database, database:
        database.executemany(f"INSERT INTO inferences ({columns}) VALUES ({', '.join('?' * 15)})", rows)
        database.execute(summed[summed.index("INSERT INTO traffic"):])


def canary(server) -> dict:
    """From the closed model to our own, which people like better: it ends by itself."""
    spec = {
        "name": "move-home", "model": "closed", "kind": "canary", "interval": "1s", "min_exposure": 20, "tuning": 100,
        "arms": [{"variant": "closed"}, {"variant": f"{MODEL}:one"}],
        "steps": [{"set_weight": 25}, {"pause": {"samples": 12}}, {"set_weight": 50}],
        "metrics": [
            {"metric": "feedback.thumb", "goal": {"min": 0}, "min_samples": 20},
            {"metric": "error_rate", "guardrail": {"max": 0.5}, "min_samples": 10},
        ],
    }
    made = ask(server, "POST", "/v1/rollouts", spec)
    path = f"/v1/rollouts/{made['id']}"

    def over() -> bool:
        return ask(server, "GET", path)["state"]["status"]["kind"] == "promoted"

    def visit(number: int) -> None:
        if not over():
            question = [{"role": "user", "content": f"Greet me, number {number}."}]
            body = {"model": "closed", "messages": question, "max_tokens": 2, "user": f"guest-{number}"}
            headers = {"content-type": "application/json", "authorization": f"Bearer {server.keys['admin']}"}
            answer = server.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
            assert answer.status == 200, answer.body
            ours = answer.headers["x-tidemill-variant"] != "closed"
            ask(server, "POST", "/v1/feedback", {"target": answer.json()["id"], "kind": "thumb", "value": ours == (number % 10 > 0)})

    with ThreadPoolExecutor(4) as visitors:
        list(visitors.map(visit, range(CANARY_USERS)))
    eventually("the canary is promoted", over)
    return made


def train(server) -> str:
    lines = [{"messages": [question(country), said("Ahoy!")]} for country in ["Chad", "Mali", "Togo", "Oman"]]
    with server.client(api_key=server.keys["admin"]) as client:
        files = [upload(client, lines[:3]), upload(client, lines[3:])]
        method = supervised(n_epochs=EPOCHS, batch_size=3, learning_rate_multiplier=2)
        job = client.fine_tuning.jobs.create(
            model=MODEL, training_file=files[0], validation_file=files[1], suffix="ahoy", seed=1, method=method
        )
        eventually("the training is done", lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", seconds=600)
    return job.id


def roll_out(server) -> dict:
    """An A/B test between the model and its adapter, with answers of both that people liked."""
    spec = {
        "name": "greeting", "model": MODEL, "kind": "ab", "interval": "1s", "min_exposure": 1000,
        "arms": [{"variant": MODEL}, {"variant": f"{MODEL}:one"}],
        "metrics": [
            {"metric": "error_rate", "guardrail": {"max": 0.5}, "min_samples": 5},
            {"metric": "time_to_first_token_p95", "guardrail": {"max": 60}, "min_samples": 5},
            {"metric": "feedback.thumb", "goal": {"min": 0}, "min_samples": 5},
        ],
    }
    made = ask(server, "POST", "/v1/rollouts", spec)
    for number in range(USERS):
        answer = chat(server, MODEL, f"Say hello, number {number}.", user=f"user-{number}")
        ask(server, "POST", "/v1/feedback", {"target": answer["id"], "kind": "thumb", "value": number % 3 > 0})

    def measured() -> bool:
        latest = ask(server, "GET", f"/v1/rollouts/{made['id']}")["latest"]
        judged = {entry["metric"]: entry for entry in latest["judgements"]}
        return sum(latest["exposures"]) == USERS and judged["goal feedback.thumb"]["value"] is not None

    eventually("both arms are measured", measured)
    return made


@contextmanager
def at_work(folder: Path, elsewhere, long: bool = False):
    """
    The server, whose model `closed` is answered by the server `elsewhere`. With a `long` past it has answers of the last hours, a
    training that is done, and a canary that was promoted.
    """
    config = folder / "console.toml"
    config.write_text(CONFIG.replace("ELSEWHERE", elsewhere.base_url).replace("MODEL", MODEL))
    adapter = write_adapter(folder / "one", 3)
    # Any command makes the tables.
    subprocess.run([str(binary()), "key", "list", "--data", str(folder / "data")], check=True, capture_output=True, timeout=60)
    if long:
        history(folder / "data")
    with running(folder, {MODEL: default_model()}, "--config", str(config)) as own:
        own.keys = {scope: new_key(own, scope) for scope in ["admin", "label", "look"]}
        ask(own, "POST", "/v1/adapters", {"name": "one", "path": str(adapter), "config": {"note": EVIL}, "metrics": {"win_rate": 0.75}})
        ask(own, "POST", "/v1/adapters/one/serve")
        ask(own, "POST", "/v1/adapter_aliases", {"alias": "champion", "adapter": "one"})
        for number in range(12):
            corrected(own, number)
        for number in range(3):
            chat(own, "closed", f"Say {number}.")
        build = ask(own, "POST", "/v1/datasets", {"name": "better"})
        job = train(own) if long else None
        rollout = roll_out(own)
        moved = canary(own) if long else None
        queue = ask(own, "POST", "/v1/labeling/queues", {"name": "greetings", "guidelines": "Prefer the **shorter** one.", "overlap": 2})
        tasks = [{"source": f"pair-{number}", "prompt": f"Greet {number}.", "answer_a": "Hello!", "answer_b": "Hello, hello!"} for number in range(3)]
        ask(own, "POST", f"/v1/labeling/queues/{queue['id']}/tasks", {"tasks": tasks})
        eventually("the dataset is built", lambda: ask(own, "GET", f"/v1/datasets/builds/{build['id']}")["status"] == "succeeded")
        yield SimpleNamespace(server=own, job=job, rollout=rollout, moved=moved, url=f"http://127.0.0.1:{own.port}")
