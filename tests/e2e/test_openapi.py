"""`/openapi.json` against the server that it describes: schemathesis sends what fits it and what does not."""

import json
import os
import subprocess
import sys

from queues import new_key

from conftest import MODEL

EXAMPLES = 8
SECONDS = 90


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


def test_schemathesis_finds_no_fault(start, tmp_path):
    server = start()
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(described(server)))
    key = new_key(server.data, "admin")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", f"http://127.0.0.1:{server.port}",
        "--header", f"Authorization: Bearer {key}", "--phases", "examples,coverage,fuzzing",
        "--max-examples", str(EXAMPLES), "--max-time", str(SECONDS), "--generation-deterministic", "--request-timeout", "60",
        "--exclude-checks", "positive_data_acceptance",
        "--no-color",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-4000:]
    server.assert_alive()
