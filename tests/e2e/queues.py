"""Labeling queues over the API, on a server that its keys close."""

import json
import subprocess
from contextlib import contextmanager
from pathlib import Path

from conftest import MODEL, running
from server import Server, binary, default_model, eventually


@contextmanager
def closed_server(folder: Path):
    """A server of one's own: a key closes it for everybody."""
    with running(folder, {MODEL: default_model()}) as server:
        server.keys = {scope: new_key(server, scope) for scope in ["admin", "feedback", "label"]}
        yield server


def new_key(server: Server, scope: str) -> str:
    """Made beside the running server, which has noticed that it has keys when this is over."""
    command = [binary(), "key", "create", "--name", f"e2e-{scope}", "--scope", scope, "--data", server.data]
    said = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=True).stdout
    eventually("the server asks for a key", lambda: server.get("/v1/models").status == 401)
    return next(word for word in said.split() if word.startswith("tm-"))


def ask(server, method: str, path: str, body=None, scope: str = "admin"):
    headers = {"content-type": "application/json", "authorization": f"Bearer {server.keys[scope]}"}
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    answer = server.request(method, path, data, headers)
    assert answer.status < 300, answer.body
    return answer.json()


def standing(server: Server, queue: str, source: str) -> list[dict]:
    """Comparisons from a queue that are not withdrawn, the oldest first."""
    path = f"/v1/feedback?source={source}&tag=queue:{queue}&withdrawn=false&limit=100&order=asc"
    return ask(server, "GET", path)["data"]


def winner(row: dict) -> str:
    value = row["value"]
    if value["both_bad"]:
        return "both_bad"
    best = value["ranking"][0]
    return "tie" if len(best) == 2 else best[0].rsplit(":", 1)[1]


def did(summary: dict) -> dict:
    assert summary["refusals"] == [], summary
    return {name: count for name, count in summary.items() if name != "refusals" and count}
