"""Tool calls through the official client. The small model cannot choose tools well, so calls are demanded."""

import json

import openai
import pytest
from pydantic import BaseModel

from conftest import MODEL

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
QUESTION = [{"role": "user", "content": "What is the weather in Emden, in Celsius?"}]


def ask(client, **options):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 120, "tools": [WEATHER, ADD], **options}
    )


def check_weather(arguments: str):
    arguments = json.loads(arguments)
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ["C", "F"] and isinstance(arguments["city"], str)


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture
def strict(server):
    with server.client(_strict_response_validation=True) as client:
        yield client


def test_a_named_function_is_called_with_arguments_that_fit(strict):
    choice = ask(strict, tool_choice=named("get_weather")).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.id.startswith("call_") and call.type == "function" and call.function.name == "get_weather"
    check_weather(call.function.arguments)


def test_a_required_call_is_one_of_the_functions(strict):
    for seed in range(3):
        choice = ask(strict, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=seed).choices[0]
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            check_weather(call.function.arguments)
        else:
            assert call.function.name == "add" and all(0 <= arguments[key] <= 99 for key in ["a", "b"])


def test_only_allowed_tools_are_called(client):
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("add")]}}
    choice = ask(client, tool_choice=allowed, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]


def test_a_streamed_call_adds_up_to_the_whole_one(strict):
    whole = ask(strict, tool_choice=named("get_weather")).choices[0].message.tool_calls[0].function
    with strict.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=120, tools=[WEATHER, ADD], tool_choice=named("get_weather")
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in events and "tool_calls.function.arguments.done" in events
    assert final.finish_reason == "tool_calls"
    [call] = final.message.tool_calls
    assert (call.function.name, call.function.arguments) == (whole.name, whole.arguments)


def test_raw_deltas_name_the_call_once(client):
    chunks = list(ask(client, tool_choice=named("get_weather"), stream=True))
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert deltas[0].id and deltas[0].type == "function" and deltas[0].function.name == "get_weather"
    assert all(delta.id is None and delta.type is None and delta.function.name is None for delta in deltas[1:])
    check_weather("".join(delta.function.arguments or "" for delta in deltas))


def test_a_pydantic_tool_is_parsed(client):
    class GetWeather(BaseModel):
        """The weather at a place"""

        celsius: bool

    tool = openai.pydantic_function_tool(GetWeather)
    completion = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, tools=[tool], tool_choice=named("GetWeather"), temperature=0, max_tokens=80
    )
    [call] = completion.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_a_conversation_goes_on_after_a_call(client):
    message = ask(client, tool_choice=named("add")).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}
    answer = client.chat.completions.create(
        model=MODEL, messages=[*QUESTION, message.to_dict(), result], tools=[ADD], max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_no_tool_is_called_when_none_may_be(client):
    message = ask(client, tool_choice="none", max_tokens=20).choices[0].message
    assert message.tool_calls is None and message.content


def test_the_older_functions_still_work(client):
    choice = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=120, functions=[ADD["function"]], function_call={"name": "add"}
    ).choices[0]
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    assert choice.message.function_call.name == "add" and set(json.loads(choice.message.function_call.arguments)) == {"a", "b"}


def test_a_strict_schema_that_cannot_be_honoured_is_refused(client):
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["parameters"]["additionalProperties"] = True
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, tools=[tool])
    assert raised.value.param.startswith("tools.0.function.parameters")


def test_a_strict_tool_leaves_the_model_free_to_answer_in_words(client):
    choice = ask(client, tool_choice="auto", max_tokens=20).choices[0]
    assert choice.message.content or choice.message.tool_calls


def test_an_answer_may_have_to_be_a_call_or_json(client):
    schema = {"type": "object", "properties": {"answer": {"type": "boolean"}}, "required": ["answer"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    message = ask(client, response_format=form, parallel_tool_calls=False).choices[0].message
    if message.tool_calls:
        assert message.tool_calls[0].function.name in ["get_weather", "add"]
    else:
        assert set(json.loads(message.content)) == {"answer"}
