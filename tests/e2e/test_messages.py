"""Anthropic's Messages API through its official client."""

import subprocess

import anthropic
import pytest

from conftest import MODEL
from server import binary, eventually

QUESTION = [{"role": "user", "content": "What is gravity?"}]
# This client no longer names a temperature; the API still has it.
GREEDY = {"temperature": 0}
BASE = {"model": MODEL, "max_tokens": 24, "messages": QUESTION, "extra_body": GREEDY}
WEATHER = {
    "name": "get_weather",
    "description": "The weather at a place",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def claude(server):
    base_url = server.base_url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0, timeout=240, _strict_response_validation=True) as client:
        yield client


def ask(client, **options):
    return client.messages.create(**{**BASE, **options})


def test_a_message_has_text_and_counts(claude):
    message = ask(claude, system="Be brief.")
    assert message.id.startswith("msg_") and message.type == "message" and message.role == "assistant" and message.model == MODEL
    [block] = message.content
    assert block.type == "text" and block.text
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 24
    counted = claude.messages.count_tokens(model=MODEL, messages=QUESTION, system="Be brief.")
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_a_stream_adds_up_to_the_whole_message(claude):
    whole = ask(claude)
    with claude.messages.stream(**BASE) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens


def test_the_events_come_in_the_order_of_the_contract(claude):
    kinds = [event.type for event in ask(claude, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_a_stop_sequence_is_named(claude):
    message = ask(claude, max_tokens=200, stop_sequences=["force", "the"])
    assert message.stop_reason == "stop_sequence" and message.stop_sequence in ["force", "the"]


def test_the_answer_goes_on_from_the_last_turn(claude):
    message = ask(claude, messages=[*QUESTION, {"role": "assistant", "content": "Gravity is the force that"}])
    assert message.content[0].text and not message.content[0].text.startswith("Gravity is the force that")


def check_input(block):
    assert block.type == "tool_use" and block.name == "get_weather"
    assert set(block.input) == {"city", "unit"} and block.input["unit"] in ["C", "F"]


def test_a_tool_is_used_and_its_result_taken(claude):
    options = dict(max_tokens=120, tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"})
    message = ask(claude, **options)
    assert message.stop_reason == "tool_use"
    [block] = message.content
    check_input(block)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "Rain."}]}
    turns = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert ask(claude, messages=turns, tools=[WEATHER]).content


def test_a_streamed_tool_use_adds_up(claude):
    with claude.messages.stream(
        **{**BASE, "max_tokens": 120}, tools=[WEATHER], tool_choice={"type": "any", "disable_parallel_tool_use": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert final.stop_reason == "tool_use"
    check_input(final.content[0])


def test_errors_are_the_clients_own(claude):
    with pytest.raises(anthropic.BadRequestError) as raised:
        ask(claude, extra_body={"temperature": 3})
    assert raised.value.type == "invalid_request_error" and "temperature" in raised.value.message and raised.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        ask(claude, model="nobody/home")


def test_a_key_is_sent_as_the_client_sends_it(start):
    server = start()
    command = [binary(), "key", "create", "--name", "claude", "--scope", "chat", "--data", server.data]
    secret = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    base_url = server.base_url.removesuffix("/v1")

    def tokens(key):
        with anthropic.Anthropic(base_url=base_url, api_key=key, max_retries=0, timeout=240) as client:
            return ask(client, max_tokens=2).usage.output_tokens

    eventually("the first key closes the server", lambda: server.get("/v1/models").status == 401)
    assert tokens(secret) == 2
    with pytest.raises(anthropic.AuthenticationError) as raised:
        tokens("wrong")
    assert raised.value.type == "authentication_error"
