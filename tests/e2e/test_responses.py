"""The Responses API and stored chats through the official client, which checks every answer against its types."""

import json
import sqlite3
import subprocess
from typing import Literal

import openai
import pytest
from conftest import MODEL
from openai._exceptions import APIResponseValidationError
from pydantic import BaseModel
from server import Server, binary, default_model, eventually

QUESTION = "Name one colour of the rainbow."


@pytest.fixture(scope="module")
def strict(server):
    with server.client(_strict_response_validation=True) as client:
        yield client


def ask(client, **options):
    return client.responses.create(**{"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 24, **options})


def test_a_response_is_what_the_clients_types_say_and_is_kept(strict):
    made = ask(
        strict, instructions="Answer in one word.", metadata={"a": "b"}, user="u", include=["message.output_text.logprobs"], top_logprobs=2,
        reasoning={"summary": "auto"}, truncation="auto", service_tier="auto", prompt_cache_key="k", parallel_tool_calls=False,
    )
    assert made.status in ("completed", "incomplete") and made.output_text
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert made.output[0].content[0].logprobs[0].top_logprobs[1].token
    assert (made.metadata, made.instructions, made.user) == ({"a": "b"}, "Answer in one word.", "u")
    assert strict.responses.retrieve(made.id).to_dict() == made.to_dict()
    items = strict.responses.input_items.list(made.id)
    assert [item.content[0].text for item in items] == [QUESTION]
    counted = strict.responses.input_tokens.count(model=MODEL, input=QUESTION, instructions="Answer in one word.")
    assert counted.input_tokens == made.usage.input_tokens
    strict.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        strict.responses.retrieve(made.id)


def test_a_stream_tells_the_same_as_the_whole(strict):
    whole = ask(strict, max_output_tokens=16)
    events = list(ask(strict, max_output_tokens=16, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type] == ["response.created", "response.in_progress"]
    assert events[-1].type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    assert strict.responses.retrieve(events[-1].response.id).to_dict() == events[-1].response.to_dict()


def test_the_clients_stream_helper_gathers_it(strict):
    with strict.responses.stream(model=MODEL, input="Say hi.", temperature=0, max_output_tokens=200) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.status == "completed" and final.output_text == text


def test_a_conversation_goes_on_from_a_response_as_if_it_had_been_sent_whole(strict):
    first = ask(strict, max_output_tokens=16)
    second = ask(strict, input="And another one?", previous_response_id=first.id)
    sent = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "And another one?"}]
    whole = ask(strict, input=sent, store=False)
    assert (second.output_text, second.usage.input_tokens) == (whole.output_text, whole.usage.input_tokens)
    assert second.previous_response_id == first.id
    items = list(strict.responses.input_items.list(second.id, order="asc", limit=1))
    assert [item.role for item in items] == ["user", "assistant", "user"]
    with pytest.raises(openai.NotFoundError):
        strict.responses.retrieve(whole.id)
    referred = [{"role": "user", "content": QUESTION}, {"type": "item_reference", "id": first.output[0].id},
                {"role": "user", "content": "And another one?"}]
    assert ask(strict, input=referred).output_text == second.output_text
    with pytest.raises(openai.BadRequestError) as refused:
        ask(strict, previous_response_id="resp_" + "0" * 32)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


class Colour(BaseModel):
    name: Literal["red", "green"]
    is_warm: bool


def test_parse_gives_an_object_of_the_asked_form(strict):
    made = strict.responses.parse(model=MODEL, input="Describe red.", text_format=Colour, max_output_tokens=400, temperature=0)
    assert made.status == "completed", made
    assert isinstance(made.output_parsed, Colour) and isinstance(made.output_parsed.is_warm, bool)
    with strict.responses.stream(model=MODEL, input="Describe red.", text_format=Colour, max_output_tokens=400, temperature=0) as stream:
        assert stream.get_final_response().output_parsed == made.output_parsed
    made = ask(strict, text={"format": {"type": "json_object"}}, max_output_tokens=300, input="Write a short JSON object.")
    if made.status == "completed":
        assert isinstance(json.loads(made.output_text), dict)


WEATHER = {
    "type": "function", "name": "weather", "description": "The weather of a city.", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}, "required": ["city"],
                   "additionalProperties": False},
}


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]


def test_a_function_is_called_and_its_result_goes_back(strict):
    options = {"input": "What is the weather in Rome?", "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    called = ask(strict, tools=[WEATHER], **options)
    assert called.status == "completed", called
    calls = [item for item in called.output if item.type == "function_call"]
    assert calls and all(call.name == "weather" and json.loads(call.arguments)["city"] in ("Oslo", "Rome") for call in calls)
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    told = ask(strict, input=results, previous_response_id=called.id, tools=[WEATHER], tool_choice="none")
    assert told.output_text
    with pytest.raises(openai.BadRequestError) as refused:
        ask(strict, input="Well?", previous_response_id=called.id, tools=[WEATHER])
    assert "No tool output found" in refused.value.message

    events = list(ask(strict, tools=[WEATHER], stream=True, **options))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    pieces = "".join(event.delta for event in events
                     if event.type == "response.function_call_arguments.delta" and event.item_id == done[0].item_id)
    assert pieces == done[0].arguments == calls[0].arguments

    parsed = strict.responses.parse(model=MODEL, temperature=0, tools=[openai.pydantic_function_tool(Weather)], **options)
    assert isinstance(next(item for item in parsed.output if item.type == "function_call").parsed_arguments, Weather)


def test_work_in_the_background_is_fetched_later_and_can_be_called_off(strict):
    begun = ask(strict, background=True)
    assert begun.status == "in_progress" and begun.output == []
    while (now := strict.responses.retrieve(begun.id)).status == "in_progress":
        pass
    assert now.output_text == ask(strict).output_text
    long = ask(strict, background=True, max_output_tokens=4000, extra_body={"ignore_eos": True})
    cancelled = strict.responses.cancel(long.id)
    assert cancelled.status == "cancelled"
    assert strict.responses.retrieve(long.id).to_dict() == cancelled.to_dict()


def test_work_in_the_background_ends_with_its_server(tmp_path):
    server = Server(tmp_path, {MODEL: default_model()})
    try:
        with server.wait_ready().client(_strict_response_validation=True) as client:
            kept = ask(client)
            begun = ask(client, background=True, max_output_tokens=8000, extra_body={"ignore_eos": True})
    finally:
        server.kill()
    # The promise of a server that was killed lasts for a while: here it is over.
    with sqlite3.connect(server.data / "tidemill.db") as database:
        assert database.execute("UPDATE responses SET alive_until = 1 WHERE alive_until IS NOT NULL").rowcount == 1
    database.close()
    server = Server(tmp_path, {MODEL: default_model()})
    try:
        with server.wait_ready().client(_strict_response_validation=True) as client:
            assert client.responses.retrieve(kept.id).to_dict() == kept.to_dict()
            failed = client.responses.retrieve(begun.id)
            assert (failed.status, failed.error.code) == ("failed", "server_error")
    finally:
        server.kill()


def test_each_key_sees_its_own_and_erasure_takes_a_persons(start):
    server = start()
    secrets = []
    for name in ["one", "two"]:
        made = subprocess.run([binary(), "key", "create", "--name", name, "--scope", "chat", "--data", server.data], check=True,
                              capture_output=True, text=True)
        secrets.append(made.stdout.strip())
    eventually("the server asks for a key", lambda: server.get("/v1/models").status == 401)
    mine, other = [openai.OpenAI(base_url=server.base_url, api_key=secret, max_retries=0) for secret in secrets]
    made = ask(mine, safety_identifier="ann")
    after = ask(mine, previous_response_id=made.id)
    stays = ask(mine)
    chat = mine.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": QUESTION}], store=True, max_tokens=8,
                                        safety_identifier="ann")
    for fetch in [lambda: other.responses.retrieve(made.id), lambda: other.responses.input_items.list(made.id),
                  lambda: other.chat.completions.retrieve(chat.id)]:
        with pytest.raises(openai.NotFoundError):
            fetch()
    with pytest.raises(openai.BadRequestError):
        ask(other, previous_response_id=made.id)
    assert mine.responses.retrieve(made.id).id == made.id
    erased = subprocess.run([binary(), "data", "erase", "--user", "ann", "--yes", "--data", server.data], check=True, capture_output=True, text=True)
    assert "3 stored chats and responses" in erased.stdout
    for fetch in [lambda: mine.responses.retrieve(made.id), lambda: mine.responses.retrieve(after.id),
                  lambda: mine.chat.completions.retrieve(chat.id)]:
        with pytest.raises(openai.NotFoundError):
            fetch()
    assert mine.responses.retrieve(stays.id).id == stays.id


def test_stored_chats_are_found_changed_and_deleted(server, strict):
    def chat(topic, **options):
        return strict.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": QUESTION}], store=True, max_tokens=8,
                                              temperature=0, metadata={"test": "stored", "topic": topic}, **options)

    one, two = chat("a"), chat("b")
    chunks = list(chat("c", stream=True))
    mine = {"test": "stored"}
    found = list(strict.chat.completions.list(metadata=mine, limit=2))
    assert [one.id, two.id, chunks[0].id] == [kept.id for kept in found]
    assert [kept.choices[0].message.content for kept in found] == [one.choices[0].message.content] * 3
    assert [kept.id for kept in strict.chat.completions.list(metadata={**mine, "topic": "b"})] == [two.id]
    assert strict.chat.completions.retrieve(one.id).usage == one.usage
    # The client's type says that every message is the assistant's; OpenAI's own answers are the questions, too.
    with pytest.raises(APIResponseValidationError):
        strict.chat.completions.messages.list(one.id)
    with server.client() as client:
        messages = list(client.chat.completions.messages.list(one.id))
    assert [(message.role, message.content) for message in messages] == [("user", QUESTION)]
    changed = strict.chat.completions.update(one.id, metadata={"topic": "new"})
    assert changed.metadata == {"topic": "new"}
    for kept in [one, two, chunks[0]]:
        assert strict.chat.completions.delete(kept.id).deleted
    with pytest.raises(openai.NotFoundError):
        strict.chat.completions.retrieve(one.id)
    assert list(strict.chat.completions.list(metadata=mine)) == []
