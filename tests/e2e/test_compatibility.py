"""Every row of the compatibility table against the real server, and the page that is made of them.

`TIDEMILL_WRITE_COMPATIBILITY=1` writes docs/compatibility.md anew.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
from compatibility import IGNORED, REJECTED, Endpoint, Row, page
from compatibility.chat import CHAT
from compatibility.files import BATCH_LIST, BATCHES, FILE_LIST, FILES, LINE
from compatibility.fine_tuning import GRADE, JOB_LIST, JOBS, VALIDATE
from compatibility.messages import COUNT, MESSAGES
from compatibility.models import DETOKENIZE, EMBEDDINGS, MODERATIONS, TOKENIZE
from compatibility.responses import INPUT_ITEMS, RESPONSES, RETRIEVE, a_response
from compatibility.stored import STORED_LIST, STORED_MESSAGES, a_chat
from compatibility.text import COMPLETIONS
from openai._models import validate_type
from server import Answer

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
ENDPOINTS = [
    CHAT, STORED_LIST, STORED_MESSAGES, COMPLETIONS, RESPONSES, RETRIEVE, INPUT_ITEMS, MESSAGES, COUNT, EMBEDDINGS, MODERATIONS, FILES,
    FILE_LIST, BATCHES, BATCH_LIST, JOBS, JOB_LIST, VALIDATE, GRADE, TOKENIZE, DETOKENIZE,
]
ROWS = [
    pytest.param(endpoint, row, id=f"{endpoint.title} {row.name} {number}")
    for endpoint in ENDPOINTS for number, row in enumerate(endpoint.rows)
]
# What differs between two equal requests.
PASSING = {"id", "created", "created_at", "completed_at", "usage", "expires_at"}


@dataclass
class Came:
    """An answer as rows look at it."""

    answer: Answer

    @property
    def body(self) -> str:
        return self.answer.body.decode()

    @property
    def json(self) -> dict:
        return self.answer.json()

    @property
    def chunks(self) -> list[dict]:
        return [json.loads(line[6:]) for line in self.body.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]


class Ask:
    """Sends requests to one endpoint: its base, and what is given."""

    def __init__(self, server, endpoint: Endpoint, ids: dict[str, str]):
        self.server, self.endpoint, self.ids = server, endpoint, ids

    def __call__(self, **fields) -> Came:
        came = self.send(fields)
        assert came.answer.status == 200, came.body
        return came

    def send(self, fields: dict) -> Came:
        asked = {key: self.named(value) for key, value in {**self.endpoint.base, **fields}.items()}
        path = self.named(self.endpoint.path)
        match self.endpoint.how:
            case "query":
                return Came(self.server.get(f"{path}?{urlencode(asked)}"))
            case "form":
                return Came(self.server.request("POST", path, *form(asked)))
            case _:
                return Came(self.server.post(path, asked))

    def named(self, value):
        """Places for ids are filled."""
        if isinstance(value, str):
            return functools.reduce(lambda text, item: text.replace("{" + item[0] + "}", item[1]), self.ids.items(), value)
        return value


def form(fields: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    """A `multipart/form-data` body, with the field `file` as a file, and its header."""
    parts = []
    # The file last, as the official clients send it.
    for name, value in sorted(fields.items(), key=lambda item: item[0] == "file"):
        of_file = '; filename="in.jsonl"\r\nContent-Type: application/octet-stream' if name == "file" else ""
        parts.append(f'--tide\r\nContent-Disposition: form-data; name="{name}"{of_file}\r\n\r\n{value}\r\n')
    return ("".join(parts) + "--tide--\r\n").encode(), {"content-type": "multipart/form-data; boundary=tide"}


def a_file(server) -> str:
    """The id of a batch's input."""
    return server.request("POST", FILES.path, *form({"file": LINE, "purpose": "batch"})).json()["id"]


def a_bad_file(server) -> str:
    """The id of a file for fine-tuning in which nothing can be learnt."""
    return server.request("POST", FILES.path, *form({"file": "{}", "purpose": "fine-tune"})).json()["id"]


# What stands for the places in a path or a body.
PLACES = {
    RETRIEVE.path: ("id", a_response), INPUT_ITEMS.path: ("id", a_response), STORED_MESSAGES.path: ("id", a_chat),
    STORED_LIST.title: ("id", a_chat), BATCHES.title: ("file", a_file), FILE_LIST.title: ("id", a_file), JOBS.title: ("file", a_bad_file),
}


@pytest.fixture(scope="module")
def ids(server):
    """By endpoint: what it needs to be there."""
    @functools.cache
    def made(key: str) -> dict[str, str]:
        name, make = PLACES[key]
        return {name: make(server)}

    return lambda endpoint: next((made(key) for key in [endpoint.title, endpoint.path] if key in PLACES), {})


@pytest.mark.parametrize(("endpoint", "row"), ROWS)
def test_a_field_does_what_the_page_says(server, ids, endpoint, row: Row):
    ask = Ask(server, endpoint, ids(endpoint))
    got = ask.send(row.sends)
    if row.outcome == REJECTED:
        refused(endpoint, row, got)
        return
    assert got.answer.status == 200, got.body
    typed(endpoint, got)
    if row.seen is not None:
        row.seen(got, ask)
    if row.outcome == IGNORED and endpoint.method == "POST" and "stream" not in row.more and row.head not in ("messages", "input"):
        assert said(got.json) == said(ask(**row.more).json)


def typed(endpoint: Endpoint, got: Came):
    """What came is what the official client's types say, as strictly as its strict mode looks."""
    streamed = got.answer.headers["content-type"].startswith("text/event-stream")
    kind = endpoint.chunk if streamed else endpoint.answer
    for value in got.chunks if streamed else [got.json]:
        if kind is not None:
            validate_type(type_=kind, value=value)


def refused(endpoint: Endpoint, row: Row, got: Came):
    assert got.answer.status == (404 if "404" in row.note else 400), got.body
    param = row.param or row.name
    error = got.answer.error
    if endpoint in (MESSAGES, COUNT):
        assert error["type"] == "invalid_request_error" and param in error["message"], got.body
    else:
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error", got.body
        # The refusal may name a place inside.
        assert error["param"] == param or error["param"].startswith(param + "."), got.body


def said(body: dict):
    """An answer without what differs from call to call, at any depth, and without what only repeats the request."""
    kept = ["choices", "output", "content", "data", "input_tokens", "tokens"]
    return json.loads(
        json.dumps({key: body[key] for key in kept if key in body}),
        object_hook=lambda found: {key: value for key, value in found.items() if key not in PASSING},
    )


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.title)
def test_every_field_of_the_official_client_has_a_row(endpoint):
    rows = {row.head.split("[")[0] for row in endpoint.rows}
    assert endpoint.official - rows == set()


def test_the_page_is_what_the_rows_say():
    made = page(ENDPOINTS)
    if os.environ.get("TIDEMILL_WRITE_COMPATIBILITY"):
        PAGE.write_text(made, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == made
