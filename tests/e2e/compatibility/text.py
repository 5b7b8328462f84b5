"""Rows of `POST /v1/completions`."""

from openai.types import Completion
from openai.types.completion_create_params import CompletionCreateParamsBase

from compatibility import Endpoint, honoured, ignored, rejected
from compatibility.effects import holds, streamed, texts
from conftest import MODEL

PROMPT = "The tide mill"
WILD = {"temperature": 2, "seed": 7, "max_tokens": 12}
LONG = {"max_tokens": 60, "ignore_eos": True}


def text(got) -> str:
    return got.json["choices"][0]["text"]


says, the_same_as, changes_with = texts(text)


def usage_last(got, ask):
    assert got.chunks[-1]["choices"] == [] and got.chunks[-1]["usage"]["completion_tokens"] == 4


COMPLETIONS = Endpoint(
    "POST", "/v1/completions", {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "temperature": 0},
    [
        honoured("model", MODEL, holds(lambda body: body["model"] == MODEL)),
        honoured("prompt", PROMPT, the_same_as()),
        honoured("prompt", [PROMPT, "A creek"], holds(lambda body: len(body["choices"]) == 2)),
        honoured("prompt", [500, 501], holds(lambda body: body["usage"]["prompt_tokens"] == 2), "token ids"),
        honoured("prompt", [[500, 501], [502]], holds(lambda body: len(body["choices"]) == 2 and body["usage"]["prompt_tokens"] == 3)),
        honoured("max_tokens", 3, holds(lambda body: body["usage"]["completion_tokens"] == 3), "without: 16"),
        honoured("temperature", 2, changes_with(seed=7, max_tokens=12), seed=7, max_tokens=12),
        honoured("top_p", 0.000001, the_same_as(max_tokens=12), **WILD),
        honoured("frequency_penalty", 2, changes_with(**LONG), **LONG),
        honoured("presence_penalty", 2, changes_with(**LONG), **LONG),
        honoured("logit_bias", {"500": 100}, holds(lambda body: len(set(body["choices"][0]["logprobs"]["tokens"])) == 1), logprobs=0),
        honoured("seed", 7, the_same_as(**WILD), temperature=2, max_tokens=12),
        honoured("n", 2, holds(lambda body: len(body["choices"]) == 2)),
        honoured("best_of", 2, holds(lambda body: len(body["choices"]) == 1), temperature=1, seed=7),
        rejected("best_of", 1, "below `n`", n=2),
        rejected("best_of", 2, "with `stream`", stream=True),
        honoured("stop", [" "], says(lambda said: " " not in said), max_tokens=40),
        honoured("logprobs", 2, holds(lambda body: all(len(top) == 2 for top in body["choices"][0]["logprobs"]["top_logprobs"]))),
        honoured("echo", True, holds(lambda body: body["choices"][0]["text"].startswith(PROMPT))),
        honoured("stream", True, streamed),
        honoured("stream_options.include_usage", {"include_usage": True}, usage_last, stream=True),
        rejected("stream_options", {"include_usage": True}, "without `stream`"),
        rejected("suffix", " end."),
        ignored("user", "u-1", "recorded with the answer; erasure finds it"),
        honoured("top_k", 1, the_same_as(max_tokens=12), **WILD),
        honoured("min_p", 1, the_same_as(max_tokens=12), **WILD),
        honoured("repetition_penalty", 2, changes_with(**LONG), **LONG),
        honoured("min_tokens", 4, holds(lambda body: body["usage"]["completion_tokens"] == 4)),
        honoured("ignore_eos", True, holds(lambda body: body["usage"]["completion_tokens"] == 4)),
        honoured("stop_token_ids", [500], holds(lambda body: body["usage"]["completion_tokens"] == 1), logit_bias={"500": 100}),
        honoured("include_stop_str_in_output", True, says(lambda said: said.index(" ") == len(said) - 1), stop=[" "], max_tokens=40),
        honoured("add_special_tokens", False, note="a beginning-of-text token, for models that have one"),
        honoured("response_format", {"type": "json_object"}, holds(lambda body: body["choices"][0]["text"].lstrip().startswith("{"))),
        honoured("guided_choice", ["yes", "no"], holds(lambda body: body["choices"][0]["text"] in ("yes", "no"))),
        honoured("guided_regex", "[0-9]{3}", holds(lambda body: body["choices"][0]["text"].isdigit())),
        honoured("prompt_logprobs", 1, holds(lambda body: len(body["choices"][0]["prompt_logprobs"]) == body["usage"]["prompt_tokens"])),
        honoured("return_token_ids", True, holds(lambda body: len(body["choices"][0]["token_ids"]) == 4)),
        honoured("priority", -1, the_same_as(), "lower runs first"),
        honoured("cache_salt", "a", the_same_as(), "prefixes are shared between equal salts only"),
        rejected("nonsense", 1, "any unknown field"),
    ],
    # No type for chunks: the client's has no null for `finish_reason`, which OpenAI's own streams have before the last chunk.
    frozenset(CompletionCreateParamsBase.__annotations__), answer=Completion,
)
