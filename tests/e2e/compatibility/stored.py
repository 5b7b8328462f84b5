"""Rows of the lists of stored chats."""

from openai.types.chat.completion_list_params import CompletionListParams
from openai.types.chat.completions.message_list_params import MessageListParams

from compatibility import Endpoint, honoured, rejected
from compatibility.chat import QUESTION
from compatibility.effects import holds
from conftest import MODEL


def a_chat(server) -> str:
    """The id of a stored chat."""
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 2, "store": True, "metadata": {"row": "one"}}
    return server.post("/v1/chat/completions", body).json()["id"]


STORED_LIST = Endpoint(
    "GET", "/v1/chat/completions", {},
    [
        honoured("limit", 1, holds(lambda body: len(body["data"]) == 1)),
        rejected("limit", 101, "1–100"),
        honoured("order", "desc", holds(lambda body: body["object"] == "list")),
        honoured("model", "nobody", holds(lambda body: body["data"] == [])),
        honoured("metadata[row]", "none", holds(lambda body: body["data"] == []), "`metadata[key]=value`"),
        rejected("after", "chatcmpl-0", "one that is not there"),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(CompletionListParams.__annotations__), how="query",
)

STORED_MESSAGES = Endpoint(
    "GET", "/v1/chat/completions/{id}/messages", {},
    [
        honoured("limit", 1, holds(lambda body: len(body["data"]) == 1)),
        honoured("order", "desc", holds(lambda body: body["object"] == "list")),
        rejected("after", "msg_0", "one that is not there"),
    ],
    frozenset(MessageListParams.__annotations__), how="query",
)
