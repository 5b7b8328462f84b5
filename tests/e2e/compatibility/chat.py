"""Rows of `POST /v1/chat/completions`."""

import json

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from compatibility import Endpoint, honoured, ignored, rejected
from compatibility.effects import differs, holds, streamed, texts
from conftest import MODEL

QUESTION = [{"role": "user", "content": "What is gravity?"}]
SCHEMA = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"], "additionalProperties": False}
WEATHER = {
    "name": "weather", "strict": True,
    "parameters": {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"], "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": WEATHER}]
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"unit": "C"}'}}


def text(got) -> str:
    return got.json["choices"][0]["message"]["content"]


says, the_same_as, changes_with = texts(text)
other_prompt = differs(lambda got: got.json["usage"]["prompt_tokens"])


def called(got, ask):
    choice = got.json["choices"][0]
    assert choice["finish_reason"] == "tool_calls", got.body
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"])["unit"] in ["C", "F"]


def kept(got, ask):
    found = ask.server.get(f"/v1/chat/completions/{got.json['id']}")
    assert found.status == 200 and found.json()["metadata"] == {"team": "mill"}


def same_token_thrice(got, ask):
    tokens = [entry["token"] for entry in got.json["choices"][0]["logprobs"]["content"]]
    assert len(tokens) == 4 and len(set(tokens)) == 1, tokens


def seeded(got, ask):
    again = ask(seed=7, temperature=2, max_tokens=12)
    assert text(got) == text(again) != text(ask(seed=8, temperature=2, max_tokens=12))


def usage_last(got, ask):
    *chunks, last = got.chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4 and all(chunk["usage"] is None for chunk in chunks)


def message(**fields) -> list[dict]:
    return [*QUESTION, fields] if fields.get("role") not in ("system", "developer", "user") else [fields, *QUESTION]


WILD = {"temperature": 2, "seed": 7, "max_tokens": 12}
LONG = {"max_tokens": 60, "ignore_eos": True}
ANSWERED = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}]
SOUND = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]
FILE = [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]

OFFICIAL = [
    honoured("model", MODEL, holds(lambda body: body["model"] == MODEL)),
    honoured("messages.role", message(role="system", content="Be brief."), other_prompt, "`system`"),
    honoured("messages.role", message(role="developer", content="Be brief."), other_prompt, "`developer`: the same as `system`"),
    honoured("messages.role", message(role="assistant", content="A force."), other_prompt, "`assistant`"),
    honoured("messages.role", [*ANSWERED, {"role": "tool", "tool_call_id": "call_1", "content": "rain"}], other_prompt, "`tool`"),
    honoured("messages.role", message(role="function", name="weather", content="rain"), other_prompt, "`function`, the older name of `tool`"),
    honoured("messages.content", [{"role": "user", "content": [{"type": "text", "text": "What is gravity?"}]}], the_same_as(),
             "text parts are joined by line breaks"),
    rejected("messages.content", IMAGE, "images", "messages.0.content.0.type"),
    rejected("messages.content", SOUND, "sound", "messages.0.content.0.type"),
    rejected("messages.content", FILE, "files", "messages.0.content.0.type"),
    honoured("messages.name", [{"role": "user", "content": "What is gravity?", "name": "maren"}], note="for templates that read it"),
    honoured("messages.refusal", message(role="assistant", content=None, refusal="No."), other_prompt, "taken for the content where there is none"),
    honoured("messages.tool_calls", ANSWERED, other_prompt),
    rejected("messages.audio", message(role="assistant", content="a", audio={"id": "audio_1"}), param="messages.1.audio"),
    honoured("max_completion_tokens", 3, holds(lambda body: body["usage"]["completion_tokens"] == 3)),
    honoured("max_tokens", 3, holds(lambda body: body["usage"]["completion_tokens"] == 3), "without either: up to the context"),
    honoured("temperature", 2, changes_with(seed=7, max_tokens=12), seed=7, max_tokens=12),
    honoured("top_p", 0.000001, the_same_as(max_tokens=12), **WILD),
    honoured("frequency_penalty", 2, changes_with(**LONG), **LONG),
    honoured("presence_penalty", 2, changes_with(**LONG), **LONG),
    honoured("logit_bias", {"500": 100}, same_token_thrice, logprobs=True),
    honoured("seed", 7, seeded, temperature=2, max_tokens=12),
    honoured("n", 2, holds(lambda body: [choice["index"] for choice in body["choices"]] == [0, 1]), "1–128, and at most `--max-seqs`"),
    honoured("stop", [" "], says(lambda said: said and " " not in said), max_tokens=60),
    honoured("logprobs", True, holds(lambda body: all(entry["top_logprobs"] == [] for entry in body["choices"][0]["logprobs"]["content"]))),
    honoured("top_logprobs", 2, holds(lambda body: all(len(e["top_logprobs"]) == 2 for e in body["choices"][0]["logprobs"]["content"])), logprobs=True),
    rejected("top_logprobs", 2, "without `logprobs`"),
    honoured("stream", True, streamed),
    honoured("stream_options.include_usage", {"include_usage": True}, usage_last, stream=True),
    ignored("stream_options.include_obfuscation", {"include_obfuscation": True}, "nothing is padded", stream=True),
    rejected("stream_options", {"include_usage": True}, "without `stream`"),
    honoured("response_format", {"type": "text"}, the_same_as()),
    honoured("response_format", {"type": "json_object"}, says(lambda said: said.lstrip().startswith("{"))),
    honoured("response_format", {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}},
             says(lambda said: isinstance(json.loads(said)["warm"], bool)), max_tokens=60),
    rejected("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}, "a schema that cannot be honoured",
             "response_format.json_schema.schema"),
    honoured("tools", TOOLS, called, tool_choice="required", parallel_tool_calls=False, max_tokens=60),
    rejected("tools", [{"type": "custom", "custom": {"name": "a"}}], "functions only", "tools.0.type"),
    honoured("tool_choice", "none", holds(lambda body: "tool_calls" not in body["choices"][0]["message"]), tools=TOOLS),
    honoured("tool_choice", "auto", tools=TOOLS),
    honoured("tool_choice", "required", called, tools=TOOLS, parallel_tool_calls=False, max_tokens=60),
    honoured("tool_choice", NAMED, called, "a named function is called once", tools=TOOLS, max_tokens=60),
    honoured("tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}, called, tools=TOOLS,
             parallel_tool_calls=False, max_tokens=60),
    rejected("tool_choice", {"type": "function", "function": {"name": "nobody"}}, "a function that is not among `tools`",
             "tool_choice.function.name", tools=TOOLS),
    honoured("parallel_tool_calls", False, called, tools=TOOLS, tool_choice="required", max_tokens=60),
    honoured("functions", [WEATHER], other_prompt, "the older `tools`"),
    honoured("function_call", {"name": "weather"}, holds(lambda body: body["choices"][0]["message"]["function_call"]["name"] == "weather"),
             "the older `tool_choice`", functions=[WEATHER], max_tokens=60),
    honoured("store", True, kept, metadata={"team": "mill"}),
    honoured("metadata", {"team": "mill"}, kept, store=True),
    honoured("service_tier", "flex", holds(lambda body: body["service_tier"] in ("flex", "default")), "a class of priority: `flex`, `default`, `priority`"),
    rejected("reasoning_effort", "low", "honoured by templates that read it; this model's does not"),
    honoured("modalities", ["text"], the_same_as()),
    rejected("modalities", ["text", "audio"]),
    rejected("audio", {"voice": "alloy", "format": "wav"}),
    rejected("web_search_options", {}),
    rejected("moderation", {"model": "omni-moderation-latest"}),
    ignored("user", "u-1", "recorded with the answer; erasure finds it"),
    ignored("safety_identifier", "s-1", "recorded with the answer; erasure finds it"),
    ignored("prompt_cache_key", "k", "prefixes are shared without it"),
    ignored("prompt_cache_retention", "24h"),
    ignored("prompt_cache_options", {}),
    ignored("prediction", {"type": "content", "content": "Gravity"}),
    ignored("verbosity", "low"),
]

EXTENSIONS = [
    honoured("top_k", 1, the_same_as(max_tokens=12), **WILD),
    honoured("min_p", 1, the_same_as(max_tokens=12), **WILD),
    honoured("repetition_penalty", 2, changes_with(**LONG), **LONG),
    honoured("min_tokens", 60, holds(lambda body: body["usage"]["completion_tokens"] >= 60), messages=[{"role": "user", "content": "Say hi."}], max_tokens=80),
    honoured("ignore_eos", True, holds(lambda body: body["choices"][0]["finish_reason"] == "length"),
             messages=[{"role": "user", "content": "Say hi."}], max_tokens=120),
    honoured("stop_token_ids", [500], holds(lambda body: body["usage"]["completion_tokens"] == 1), logit_bias={"500": 100}),
    honoured("include_stop_str_in_output", True, says(lambda said: said.index(" ") == len(said) - 1), stop=[" "], max_tokens=60),
    honoured("skip_special_tokens", False, note="special tokens are shown in the text"),
    honoured("structured_outputs", {"choice": ["yes", "no"]}, says(lambda said: said in ("yes", "no"))),
    honoured("guided_json", SCHEMA, says(lambda said: "warm" in json.loads(said)), max_tokens=60),
    honoured("guided_regex", "[0-9]{3}", says(lambda said: len(said) == 3 and said.isdigit())),
    honoured("guided_choice", ["yes", "no"], says(lambda said: said in ("yes", "no"))),
    honoured("guided_grammar", 'start: "a" "b"', says(lambda said: said == "ab")),
    rejected("guided_whitespace_pattern", " "),
    honoured("chat_template_kwargs", {"enable_thinking": False}, note="variables for the template"),
    honoured("add_generation_prompt", False, other_prompt),
    honoured("continue_final_message", True, other_prompt, messages=message(role="assistant", content="A force that")),
    honoured("echo", True, says(lambda said: said.startswith("A force that")), continue_final_message=True,
             messages=message(role="assistant", content="A force that")),
    honoured("prompt_logprobs", 1, holds(lambda body: len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"])),
    honoured("return_token_ids", True, holds(lambda body: len(body["choices"][0]["token_ids"]) == 4)),
    honoured("logprobs_mode", "processed_logprobs", holds(lambda body: body["choices"][0]["logprobs"]["content"][0]["logprob"] == 0), logprobs=True, top_p=0.01, temperature=1),
    honoured("priority", -1, the_same_as(), "lower runs first"),
    honoured("cache_salt", "a", the_same_as(), "prefixes are shared between equal salts only"),
    honoured("tidemill", {"conversation": "c", "compare": True}, the_same_as(n=2, temperature=1, seed=7), "see [feedback.md](feedback.md)", n=2,
             temperature=1, seed=7),
    rejected("nonsense", 1, "any unknown field"),
]

CHAT = Endpoint(
    "POST", "/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "max_tokens": 4, "temperature": 0}, [*OFFICIAL, *EXTENSIONS],
    frozenset(CompletionCreateParamsBase.__annotations__), answer=ChatCompletion, chunk=ChatCompletionChunk,
)
