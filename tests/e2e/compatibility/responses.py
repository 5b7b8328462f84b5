"""Rows of the Responses API."""

import json

from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.input_item_list_params import InputItemListParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from openai.types.responses.response_retrieve_params import ResponseRetrieveParamsBase

from compatibility import Endpoint, honoured, ignored, rejected
from compatibility.chat import SCHEMA, WEATHER
from compatibility.effects import differs, holds, streamed, texts
from conftest import MODEL

QUESTION = "What is gravity?"
TOOLS = [{"type": "function", **WEATHER}]
NAMED = {"type": "function", "name": "weather"}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"unit": "C"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
WILD = {"temperature": 2, "seed": 7}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def text(got) -> str:
    return "".join(part["text"] for item in got.json["output"] if item["type"] == "message" for part in item["content"])


says, the_same_as, changes_with = texts(text)


other_prompt = differs(lambda got: got.json["usage"]["input_tokens"])


def called(got, ask):
    [call] = [item for item in got.json["output"] if item["type"] == "function_call"]
    assert call["name"] == "weather" and json.loads(call["arguments"])["unit"] in ["C", "F"]


def kept(got, ask):
    assert ask.server.get(f"/v1/responses/{got.json['id']}").json()["metadata"] == {"team": "mill"}


def not_kept(got, ask):
    assert ask.server.get(f"/v1/responses/{got.json['id']}").status == 404


def cancels(got, ask):
    assert got.json["status"] == "in_progress" and got.json["output"] == []
    assert ask.server.post(f"/v1/responses/{got.json['id']}/cancel", b"").json()["status"] in ("cancelled", "completed", "incomplete")


def goes_on(got, ask):
    first = ask(store=True).json["id"]
    more = ask(store=True, previous_response_id=first)
    assert more.json["usage"]["input_tokens"] > ask().json["usage"]["input_tokens"]


def a_response(server) -> str:
    """The id of a stored response."""
    return server.post("/v1/responses", {"model": MODEL, "input": QUESTION, "max_output_tokens": 16}).json()["id"]


RESPONSES = Endpoint(
    "POST", "/v1/responses", {"model": MODEL, "input": QUESTION, "max_output_tokens": 16, "temperature": 0, "store": False},
    [
        honoured("model", MODEL, holds(lambda body: body["model"] == MODEL)),
        honoured("input", QUESTION, the_same_as()),
        honoured("input.message", user({"type": "input_text", "text": QUESTION}), the_same_as()),
        honoured("input.message", [*user({"type": "input_text", "text": QUESTION}), {"role": "assistant", "content": "A force."}], other_prompt),
        rejected("input.message", user({"type": "input_image", "image_url": "https://example.com/a.png"}), "images", "input.0.content.0.type"),
        rejected("input.message", user({"type": "input_file", "file_id": "file-1"}), "files", "input.0.content.0.type"),
        honoured("input.function_call", [*user({"type": "input_text", "text": QUESTION}), CALL, RESULT], other_prompt, tools=TOOLS, tool_choice="none"),
        rejected("input.function_call_output", [RESULT], "a result without its call", "input"),
        honoured("input.reasoning", [*user({"type": "input_text", "text": QUESTION}), {"type": "reasoning", "id": "rs_1", "summary": []}]),
        rejected("input.web_search_call", [{"type": "web_search_call", "id": "ws_1", "status": "completed"}], "items of tools that run at OpenAI", "input.0.type"),
        honoured("instructions", "Be brief.", other_prompt),
        honoured("max_output_tokens", 17, holds(lambda body: body["usage"]["output_tokens"] == 17), "16 or more", ignore_eos=True),
        honoured("temperature", 2, changes_with(seed=7), seed=7),
        honoured("top_p", 0.000001, the_same_as(), **WILD),
        honoured("top_logprobs", 2, holds(lambda body: all(len(entry["top_logprobs"]) == 2 for entry in body["output"][0]["content"][0]["logprobs"]))),
        honoured("include", ["message.output_text.logprobs"], holds(lambda body: body["output"][0]["content"][0]["logprobs"])),
        ignored("include", ["reasoning.encrypted_content"], "and what belongs to tools that run at OpenAI"),
        honoured("stream", True, streamed),
        ignored("stream_options.include_obfuscation", {"include_obfuscation": False}, "nothing is padded", stream=True),
        rejected("stream_options", {"include_obfuscation": False}, "without `stream`"),
        honoured("store", False, not_kept),
        honoured("store", True, kept, "the default", metadata={"team": "mill"}),
        honoured("metadata", {"team": "mill"}, kept, store=True),
        honoured("previous_response_id", None, goes_on, "everything that the earlier one was made from comes first"),
        rejected("previous_response_id", "resp_0190a0a0a0a07000800000000000000f", "one that is not there"),
        honoured("background", True, cancels, store=True, max_output_tokens=400),
        rejected("stream", True, "together with `background`", background=True, store=True),
        honoured("text.format", {"format": {"type": "json_object"}}, says(lambda said: said.lstrip().startswith("{"))),
        honoured("text.format", {"format": {"type": "json_schema", "name": "a", "strict": True, "schema": SCHEMA}},
                 says(lambda said: json.loads(said)["warm"] in (True, False)), max_output_tokens=60),
        rejected("text.format", {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}, "a schema that cannot be honoured", "text.format.schema"),
        ignored("text.verbosity", {"verbosity": "low"}),
        honoured("tools", TOOLS, called, tool_choice="required", parallel_tool_calls=False, max_output_tokens=60),
        *[rejected("tools", [{"type": kind}], param="tools.0.type") for kind in
          ["web_search", "file_search", "code_interpreter", "computer_use_preview", "image_generation", "mcp", "local_shell", "shell", "apply_patch", "custom"]],
        honoured("tool_choice", "none", holds(lambda body: all(item["type"] != "function_call" for item in body["output"])), tools=TOOLS),
        honoured("tool_choice", "auto", tools=TOOLS),
        honoured("tool_choice", "required", called, tools=TOOLS, parallel_tool_calls=False, max_output_tokens=60),
        honoured("tool_choice", NAMED, called, tools=TOOLS, max_output_tokens=60),
        honoured("tool_choice", {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}, called, tools=TOOLS, parallel_tool_calls=False,
                 max_output_tokens=60),
        rejected("tool_choice", {"type": "web_search_preview"}, param="tool_choice.type", tools=TOOLS),
        honoured("parallel_tool_calls", False, called, tools=TOOLS, tool_choice="required", max_output_tokens=60),
        rejected("reasoning.effort", {"effort": "low"}, "honoured by templates that read it; this model's does not"),
        ignored("reasoning.summary", {"summary": "auto"}, "reasoning is shown whole"),
        honoured("truncation", "auto", the_same_as(), "the beginning of what has grown too long is left out"),
        honoured("service_tier", "flex", holds(lambda body: body["service_tier"] in ("flex", "default")), "a class of priority"),
        rejected("conversation", "conv_1", "use `previous_response_id`"),
        rejected("prompt", {"id": "pmpt_1"}),
        rejected("context_management", [{"type": "compaction"}]),
        rejected("moderation", {"model": "omni-moderation-latest"}),
        rejected("background_options", {}),
        rejected("access_programs", {}),
        rejected("image", {}),
        ignored("max_tool_calls", 2, "counts calls of tools that run at OpenAI"),
        ignored("user", "u-1", "recorded with the answer; erasure finds it"),
        ignored("safety_identifier", "s-1", "recorded with the answer; erasure finds it"),
        ignored("prompt_cache_key", "k", "prefixes are shared without it"),
        ignored("prompt_cache_retention", "24h"),
        ignored("prompt_cache_options", {}),
        honoured("seed", 7, the_same_as(**WILD), temperature=2),
        honoured("stop", [" "], says(lambda said: said and " " not in said)),
        honoured("top_k", 1, the_same_as(), **WILD),
        honoured("logit_bias", {"500": 100}, holds(lambda body: body["usage"]["output_tokens"] == 16)),
        honoured("min_tokens", 20, holds(lambda body: body["usage"]["output_tokens"] >= 20), max_output_tokens=24),
        honoured("chat_template_kwargs", {"enable_thinking": False}, note="variables for the template"),
        honoured("cache_salt", "a", the_same_as(), "prefixes are shared between equal salts only"),
        honoured("tidemill", {"conversation": "c"}, the_same_as(), "see [feedback.md](feedback.md)"),
        rejected("n", 2, "a response is one answer"),
        rejected("max_tokens", 20, "its name is `max_output_tokens` here"),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(ResponseCreateParamsBase.__annotations__), answer=Response, chunk=ResponseStreamEvent,
)

RETRIEVE = Endpoint(
    "GET", "/v1/responses/{id}", {},
    [
        ignored("include", "message.output_text.logprobs", "a response is returned as it was made"),
        rejected("stream", "true", "fetch it until its `status` is another than `in_progress`"),
        rejected("starting_after", 3, "belongs to `stream`"),
        ignored("include_obfuscation", "false", "nothing is padded"),
    ],
    frozenset(ResponseRetrieveParamsBase.__annotations__), how="query", answer=Response,
)

INPUT_ITEMS = Endpoint(
    "GET", "/v1/responses/{id}/input_items", {},
    [
        honoured("limit", 1, holds(lambda body: len(body["data"]) == 1)),
        honoured("order", "asc", holds(lambda body: body["object"] == "list")),
        rejected("after", "msg_0", "an item that is not there"),
        ignored("include", "message.output_text.logprobs"),
        rejected("limit", 101, "1–100"),
    ],
    frozenset(InputItemListParams.__annotations__), how="query",
)
