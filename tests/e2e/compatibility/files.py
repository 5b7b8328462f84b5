"""Rows of files and batches."""

import json

from openai.types import Batch, FileObject
from openai.types.batch_create_params import BatchCreateParams
from openai.types.batch_list_params import BatchListParams
from openai.types.file_create_params import FileCreateParams
from openai.types.file_list_params import FileListParams

from compatibility import Endpoint, honoured, rejected
from compatibility.effects import holds
from conftest import MODEL

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
LINE = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY})


FILES = Endpoint(
    "POST", "/v1/files", {"file": LINE, "purpose": "batch"},
    [
        honoured("file", "a text", holds(lambda body: body["bytes"] == 6)),
        honoured("purpose", "user_data", holds(lambda body: body["purpose"] == "user_data")),
        honoured("purpose", "fine-tune", holds(lambda body: body["purpose"] == "fine-tune")),
        rejected("purpose", "assistants", "no assistants here"),
        rejected("purpose", "vision", "no model here can read images"),
        honoured("expires_after[anchor]", "created_at", holds(lambda body: body["expires_at"] == body["created_at"] + 3600), **{"expires_after[seconds]": "3600"}),
        honoured("expires_after[seconds]", "3600", holds(lambda body: body["expires_at"] == body["created_at"] + 3600), **{"expires_after[anchor]": "created_at"}),
        rejected("expires_after[seconds]", "60", "3,600 to 2,592,000", **{"expires_after[anchor]": "created_at"}),
        rejected("nonsense", "1", "any unknown field"),
    ],
    frozenset(FileCreateParams.__annotations__), how="form", answer=FileObject,
)

FILE_LIST = Endpoint(
    "GET", "/v1/files", {},
    [
        honoured("purpose", "user_data", holds(lambda body: {file["purpose"] for file in body["data"]} <= {"user_data"})),
        honoured("limit", 1, holds(lambda body: len(body["data"]) == 1)),
        rejected("limit", 10001, "1–10,000"),
        honoured("order", "asc", holds(lambda body: body["object"] == "list")),
        rejected("after", "file-0", "one that is not there"),
    ],
    frozenset(FileListParams.__annotations__), how="query",
)

# The file's id is put in by the test.
BATCHES = Endpoint(
    "POST", "/v1/batches", {"input_file_id": "{file}", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    [
        honoured("input_file_id", "{file}", holds(lambda body: body["input_file_id"].startswith("file-"))),
        rejected("input_file_id", "file-0", "one that is not there"),
        *[honoured("endpoint", path, holds(lambda body: body["object"] == "batch")) for path in
          ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]],
        rejected("endpoint", "/v1/moderations"),
        honoured("completion_window", "24h", holds(lambda body: body["expires_at"] - body["created_at"] == 24 * 3600)),
        rejected("completion_window", "1h"),
        honoured("metadata", {"team": "mill"}, holds(lambda body: body["metadata"] == {"team": "mill"})),
        honoured("output_expires_after", {"anchor": "created_at", "seconds": 7200}),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(BatchCreateParams.__annotations__), answer=Batch,
)

BATCH_LIST = Endpoint(
    "GET", "/v1/batches", {},
    [
        honoured("limit", 1, holds(lambda body: len(body["data"]) <= 1)),
        rejected("limit", 101, "1–100"),
        rejected("after", "batch_0", "one that is not there"),
    ],
    frozenset(BatchListParams.__annotations__), how="query",
)
