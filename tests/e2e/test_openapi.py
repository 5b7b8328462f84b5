"""`/openapi.json` against the server that it describes: schemathesis sends what fits it and what does not."""

import json
import os
import subprocess
import sys

import pytest

from conftest import MODEL
from queues import ask, new_key

EXAMPLES = 8
# The examples are the bound; this is one for a machine with other work.
SECONDS = 600
# They would take the key away that all this is asked with.
EXCLUDED = ["delete_admin_keys_id", "patch_admin_keys_id", "post_admin_keys_id_rotate"]


def described(server) -> dict:
    """The document, with the model that is here, so that requests get as far as an answer; and with short ones."""
    document = server.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for name in ["ChatRequest", "CompletionRequest"]:
        properties = schemas[name]["properties"]
        properties["model"] = {"const": MODEL}
        for key in ["max_tokens", "max_completion_tokens", "n", "best_of"]:
            if key in properties:
                least = 0 if (name, key) == ("CompletionRequest", "max_tokens") else 1
                properties[key] = {"type": "integer", "minimum": least, "maximum": 2}
        if name == "ChatRequest":
            schemas[name]["required"] = [*schemas[name]["required"], "max_completion_tokens"]
    return document


def test_the_document_is_an_openapi_document(server):
    from openapi_spec_validator import validate

    validate(server.get("/openapi.json").json())


@pytest.mark.timeout(900)
def test_schemathesis_finds_no_fault(start, tmp_path):
    server = start()
    document = described(server)
    server.keys = {"admin": new_key(server, "admin")}
    # Something to be found behind the paths of queues.
    ask(server, "POST", "/v1/labeling/queues", {"name": "pairs"})
    ask(server, "POST", "/v1/labeling/queues/pairs/tasks", {"tasks": [{"prompt": "a", "answer_a": "b", "answer_b": "c"}]})
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                if parameter["name"] == "queue":
                    parameter["example"] = "pairs"
    path, report = tmp_path / "openapi.json", tmp_path / "report.json"
    path.write_text(json.dumps(document))
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", path, "--url", f"http://127.0.0.1:{server.port}",
        "--header", f"Authorization: Bearer {server.keys['admin']}", "--phases", "examples,coverage,fuzzing",
        "--max-examples", EXAMPLES, "--max-time", SECONDS, "--generation-deterministic", "--request-timeout", 60,
        # That a request fits the document does not mean that its ids exist or its fields go together.
        "--exclude-checks", "positive_data_acceptance",
        *(f"--exclude-operation-id={name}" for name in EXCLUDED),
        "--no-color", "--report", "json", "--report-json-path", report,
    ]
    environment = {**os.environ, "COLUMNS": "200"}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=800, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-4000:]
    done = json.loads(report.read_text())
    assert done["complete"] and done["operations"]["tested"] == done["operations"]["total"] - len(EXCLUDED) > 50
    assert {name: phase["status"] for name, phase in done["phases"].items()}["coverage"] == "success"
    assert done["test_cases"]["generated"] > 5 * done["operations"]["total"] and done["test_cases"]["errored"] == 0
    assert server.process.poll() is None and "panicked" not in server.log()
