"""Chat completions that do not stream, through the official client."""

import re
import time

import openai
import pytest
from openai.types.chat import ChatCompletion

from conftest import MODEL, golden

QUESTION = [{"role": "user", "content": "What is gravity?"}]


def ask(client, messages=QUESTION, **options) -> ChatCompletion:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"temperature": 0, "max_tokens": 16, **options})


def test_an_answer_has_every_field_of_the_contract(client):
    before = int(time.time())
    answer = ask(client)
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", answer.id)
    assert answer.object == "chat.completion"
    assert before <= answer.created <= time.time() + 1
    assert answer.model == MODEL
    assert answer.system_fingerprint
    [choice] = answer.choices
    assert choice.index == 0
    assert choice.logprobs is None
    assert choice.message.role == "assistant"
    assert choice.message.refusal is None
    assert choice.message.annotations == []
    assert choice.message.content
    assert choice.finish_reason == "length"


def test_usage_counts_prompt_and_completion(client):
    expected = next(chat for chat in golden("smollm2/chats.json")["chats"] if chat["messages"] == QUESTION)
    usage = ask(client, max_tokens=7).usage
    assert usage.prompt_tokens == len(expected["ids"])
    assert usage.completion_tokens == 7
    assert usage.total_tokens == usage.prompt_tokens + 7
    assert usage.completion_tokens_details.reasoning_tokens == 0
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_a_repeated_prompt_is_found_in_the_prefix_cache(client):
    messages = [{"role": "system", "content": "The tide turned the wheel of the mill. " * 20}, *QUESTION]
    first = ask(client, messages, max_tokens=8)
    second = ask(client, messages, max_tokens=8)
    assert first.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    assert first.choices[0].message.content == second.choices[0].message.content


def test_an_answer_that_ends_by_itself_says_stop(client):
    answer = ask(client, [{"role": "user", "content": "Name three colours of the rainbow."}], max_tokens=400)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.choices[0].message.content
    assert answer.usage.completion_tokens < 400


def test_max_completion_tokens_wins_over_max_tokens(client):
    assert ask(client, max_completion_tokens=3, max_tokens=9).usage.completion_tokens == 3


def test_every_role_and_shape_of_content_is_accepted_back(client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}], "name": "maren"},
        {"role": "assistant", "content": "Three.", "refusal": None},
        {"role": "user", "content": "Four?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "count", "arguments": "{\"upto\": 4}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
        {"role": "user", "content": "And then?"},
    ]
    assert ask(client, messages).choices[0].message.content


def test_what_the_client_answered_can_be_sent_back_as_it_is(client):
    first = ask(client)
    again = ask(client, [*QUESTION, first.choices[0].message.to_dict(), {"role": "user", "content": "Go on."}])
    assert again.choices[0].message.content


def test_fields_that_only_inform_are_accepted(client):
    answer = ask(
        client, user="u-1", safety_identifier="s-1", prompt_cache_key="k", metadata={"team": "mill"}, store=False,
        service_tier="auto", response_format={"type": "text"}, parallel_tool_calls=True, verbosity="low",
        prediction={"type": "content", "content": "Gravity"}, tools=[], tool_choice="none",
    )
    assert answer.choices[0].message.content


def test_null_means_the_default(server):
    body = {
        "model": MODEL, "messages": QUESTION, "max_tokens": 4, "temperature": 0,
        **dict.fromkeys(["top_p", "n", "stop", "seed", "logit_bias", "logprobs", "top_logprobs", "stream", "stream_options",
                         "frequency_penalty", "presence_penalty", "max_completion_tokens", "tools", "response_format", "user"]),
    }
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_every_response_carries_a_request_id(server, client):
    assert client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, max_tokens=1
    ).headers["x-request-id"]
    assert server.get("/nowhere").headers["x-request-id"]
    sent = server.request("GET", "/health", headers={"x-request-id": "mine-7"})
    assert sent.headers["x-request-id"] == "mine-7"


def test_the_answer_may_continue_the_last_message(client):
    messages = [*QUESTION, {"role": "assistant", "content": "Gravity is the force that"}]
    options = dict(extra_body={"continue_final_message": True, "add_generation_prompt": False})
    plain = ask(client, messages, **options).choices[0].message.content
    assert plain and not plain.startswith("Gravity is the force that")
    options["extra_body"]["echo"] = True
    assert ask(client, messages, **options).choices[0].message.content == "Gravity is the force that" + plain


def test_token_ids_are_returned_when_asked_for(server):
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    answer = server.post("/v1/chat/completions", body).json()
    expected = next(chat for chat in golden("smollm2/chats.json")["chats"] if chat["messages"] == QUESTION)
    assert answer["prompt_token_ids"] == expected["ids"]
    assert len(answer["choices"][0]["token_ids"]) == 5


def test_an_unknown_model_is_named(client):
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="nobody/home", messages=QUESTION)
    assert raised.value.code == "model_not_found"
    assert "nobody/home" in raised.value.message
