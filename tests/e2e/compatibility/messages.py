"""Rows of Anthropic's Messages API."""

import json

from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase

from compatibility import Endpoint, honoured, ignored, rejected
from compatibility.chat import SCHEMA, WEATHER
from compatibility.effects import differs, holds, streamed, texts
from conftest import MODEL

QUESTION = [{"role": "user", "content": "What is gravity?"}]
TOOLS = [{"name": "weather", "strict": True, "input_schema": WEATHER["parameters"]}]
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"unit": "C"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}
CACHED = {"type": "ephemeral"}
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}


def text(got) -> str:
    return "".join(block["text"] for block in got.json["content"] if block["type"] == "text")


says, the_same_as, changes_with = texts(text)


def read(got) -> int:
    usage = got.json["usage"]
    return usage["input_tokens"] + usage["cache_read_input_tokens"]


other_prompt = differs(read)
other_count = differs(lambda got: got.json["input_tokens"])


def the_same_count(got, ask):
    assert got.json == ask().json


def used(got, ask):
    [block] = got.json["content"]
    assert block["type"] == "tool_use" and block["name"] == "weather" and block["input"]["unit"] in ["C", "F"], got.body


def turns(assistant, user) -> list[dict]:
    return [*QUESTION, {"role": "assistant", "content": assistant}, {"role": "user", "content": user}]


# Hints for Anthropic's own service.
HINTS = [
    ignored("cache_control", CACHED, "prefixes are shared without it"),
    ignored("user_profile_id", "p"),
    ignored("workspace_id", "w"),
    ignored("speed", "standard"),
]

MESSAGES = Endpoint(
    "POST", "/v1/messages", {"model": MODEL, "messages": QUESTION, "max_tokens": 6, "temperature": 0},
    [
        honoured("model", MODEL, holds(lambda body: body["model"] == MODEL)),
        honoured("max_tokens", 3, holds(lambda body: body["usage"]["output_tokens"] == 3)),
        honoured("messages.text", [{"role": "user", "content": [{"type": "text", "text": "What is gravity?", "cache_control": CACHED}]}], the_same_as()),
        honoured("messages.tool_use", turns([USE], [RESULT]), other_prompt, tools=TOOLS),
        honoured("messages.tool_result", turns([USE], [{**RESULT, "content": [{"type": "text", "text": "rain"}], "is_error": True}]), other_prompt, tools=TOOLS),
        honoured("messages.thinking", turns([{"type": "thinking", "thinking": "So.", "signature": ""}, {"type": "text", "text": "A force."}], "Go on."),
                 other_prompt, "earlier reasoning, for templates that read it"),
        ignored("messages.redacted_thinking", turns([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "A force."}], "Go on."), "left out"),
        rejected("messages.image", [{"role": "user", "content": [IMAGE]}], param="messages.0.content.0"),
        rejected("messages.document", [{"role": "user", "content": [DOCUMENT]}], param="messages.0.content.0"),
        honoured("system", "Be brief.", other_prompt),
        honoured("system", [{"type": "text", "text": "Be brief."}], other_prompt),
        honoured("stop_sequences", [" "], holds(lambda body: (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", " ")), max_tokens=60),
        honoured("stream", True, streamed),
        honoured("temperature", 1, changes_with(max_tokens=40), top_p=1, max_tokens=40),
        honoured("top_p", 0.000001, the_same_as(), temperature=1),
        honoured("top_k", 1, the_same_as(), temperature=1),
        honoured("tools", TOOLS, used, tool_choice={"type": "any", "disable_parallel_tool_use": True}, max_tokens=60),
        rejected("tools", [{"type": "web_search_20250305", "name": "web_search"}], "tools that run at Anthropic", "tools.0.type"),
        honoured("tool_choice", {"type": "auto"}, tools=TOOLS),
        honoured("tool_choice", {"type": "any", "disable_parallel_tool_use": True}, used, tools=TOOLS, max_tokens=60),
        honoured("tool_choice", {"type": "tool", "name": "weather"}, used, tools=TOOLS, max_tokens=60),
        honoured("tool_choice", {"type": "none"}, holds(lambda body: all(block["type"] == "text" for block in body["content"])), tools=TOOLS),
        honoured("thinking", {"type": "enabled", "budget_tokens": 1024}, note="for templates with a switch; the budget is not enforced"),
        honoured("output_config.format", {"format": {"type": "json_schema", "schema": SCHEMA}},
                 says(lambda said: json.loads(said)["warm"] in (True, False)), max_tokens=60),
        honoured("output_config.effort", {"effort": "low"}, note="for templates that read it"),
        ignored("metadata", {"user_id": "u-1"}, "recorded with the answer; erasure finds it"),
        ignored("service_tier", "auto"),
        *HINTS,
        ignored("inference_geo", "eu"),
        ignored("diagnostics", {}),
        rejected("container", "c"),
        rejected("mcp_servers", []),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(MessageCreateParamsBase.__annotations__),
    "Errors come in Anthropic's shape; their message names the field.", answer=Message, chunk=RawMessageStreamEvent,
)

COUNT = Endpoint(
    "POST", "/v1/messages/count_tokens", {"model": MODEL, "messages": QUESTION},
    [
        honoured("model", MODEL),
        honoured("messages", turns("A force.", "Go on."), other_count),
        honoured("system", "Be brief.", other_count),
        honoured("tools", TOOLS, other_count),
        honoured("tool_choice", {"type": "none"}, the_same_count, "`none` hides the tools", tools=TOOLS),
        honoured("thinking", {"type": "disabled"}),
        honoured("output_config.effort", {"effort": "low"}, note="for templates that read it"),
        *HINTS,
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(MessageCountTokensParams.__annotations__), answer=MessageTokensCount,
)
