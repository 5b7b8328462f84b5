"""Answers confined to a schema, an expression, a choice or a grammar: what comes always parses, however hot it is drawn."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from conftest import MODEL

CHAT = "/v1/chat/completions"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "mood": {"enum": ["calm", "cross"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}

# One schema per keyword (and the ways in which they meet). All of them bound what they allow, so that every answer can end.
SCHEMAS = {
    "enum": {"enum": ["a", 2, None, {"b": [1]}]},
    "const": {"const": {"x": "é\n"}},
    "integer": {"type": "integer", "minimum": -5, "exclusiveMaximum": 40, "multipleOf": 5},
    "number": {"type": "number", "minimum": 0.5, "maximum": 0.75, "multipleOf": 0.125},
    "length": {"type": "string", "minLength": 3, "maxLength": 12},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time", "maxLength": 25},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 24},
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2},
    "object": PERSON,
    "optional": {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}}, "additionalProperties": False},
    "anyOf": {"anyOf": [{"type": "null"}, {"type": "boolean"}, PERSON]},
    "oneOf": {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "$defs": {
            kind: {"type": "object", "properties": {"kind": {"const": kind}, sound: {"type": "boolean"}},
                   "required": ["kind", sound], "additionalProperties": False}
            for kind, sound in [("cat", "purrs"), ("dog", "barks")]
        },
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 7}, {"maximum": 9}]},
    "ref": {
        "$ref": "#/$defs/pair",
        "$defs": {
            "pair": {"type": "array", "prefixItems": [{"$ref": "#/$defs/digit"}] * 2, "items": False, "minItems": 2},
            "digit": {"type": "integer", "minimum": 0, "maximum": 9},
        },
    },
}


def body(text="Invent something and write it as JSON.", **more) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 200, **more}


def schema_format(schema: dict, strict: bool = False) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": strict}}


def choices(server, **more) -> list[dict]:
    answer = server.post(CHAT, body(**more))
    assert answer.status == 200, answer.body
    return answer.json()["choices"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_generated_satisfies_the_schema(server, name):
    schema = SCHEMAS[name]
    for temperature in [0, 1.6]:
        for choice in choices(server, response_format=schema_format(schema), temperature=temperature, seed=7, n=3):
            assert choice["finish_reason"] == "stop", choice
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_an_answer_that_does_not_fit_ends_with_length_and_nothing_else_does_not_parse(server):
    for limit in [1, 5, 12, 60]:
        for choice in choices(server, response_format=schema_format(PERSON), max_tokens=limit, n=4, seed=limit, temperature=1.2):
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
            else:
                assert choice["finish_reason"] == "length"


def test_json_mode_gives_an_object(server):
    for choice in choices(server, response_format={"type": "json_object"}, n=3, seed=1, temperature=0.8, max_tokens=400):
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_min_tokens_and_ignore_eos_do_not_break_the_form(server):
    for more in [{"min_tokens": 60}, {"ignore_eos": True}]:
        [choice] = choices(server, response_format=schema_format(PERSON), seed=3, **more)
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


def test_expressions_choices_and_grammars(server):
    [choice] = choices(server, guided_regex=r"^\d{4}-(0[1-9]|1[0-2])$", temperature=1.5, seed=2)
    assert re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", choice["message"]["content"])
    for field in [{"guided_choice": ["ebb", "flood"]}, {"structured_outputs": {"choice": ["ebb", "flood"]}}]:
        assert choices(server, temperature=1.5, **field)[0]["message"]["content"] in ["ebb", "flood"]
    lark = 'start: NUMBER (" + " NUMBER){1,3}\nNUMBER: /[0-9]{1,2}/\n'
    gbnf = 'root ::= number (" + " number){1,3}\nnumber ::= [0-9]{1,2}\n'
    for grammar in [lark, gbnf]:
        [choice] = choices(server, structured_outputs={"grammar": grammar}, temperature=1.5)
        assert re.fullmatch(r"\d{1,2}( \+ \d{1,2}){1,3}", choice["message"]["content"])


def test_text_completions_are_confined_too(server):
    answer = server.post("/v1/completions", {
        "model": MODEL, "prompt": ["The tide is", "A mill is"], "n": 2, "max_tokens": 60, "guided_json": SCHEMAS["array"],
    })
    assert answer.status == 200, answer.body
    for choice in answer.json()["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), SCHEMAS["array"])


def test_log_probabilities_are_raw_or_of_what_was_drawn_from(server):
    asked = {"response_format": schema_format(SCHEMAS["allOf"]), "logprobs": True, "top_logprobs": 3, "temperature": 1.0, "seed": 5}
    raw = choices(server, **asked)[0]
    processed = choices(server, logprobs_mode="processed_logprobs", **asked)[0]
    assert raw["message"] == processed["message"]
    first_raw, first_processed = raw["logprobs"]["content"][0], processed["logprobs"]["content"][0]
    assert first_raw["logprob"] < first_processed["logprob"] <= 0
    # Unconstrained, the model would not begin with a digit; constrained, nothing else is there.
    assert any(not top["token"].strip().isdigit() for top in first_raw["top_logprobs"])
    assert all(top["token"].strip() in ["7", "8", "9", ""] for top in first_processed["top_logprobs"])


def test_the_stream_adds_up_to_json(server, client):
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "A person."}], response_format=schema_format(PERSON, strict=True),
        max_tokens=200, seed=4, stream=True,
    )
    chunks = [choice for chunk in stream for choice in chunk.choices]
    assert chunks[-1].finish_reason == "stop"
    jsonschema.validate(json.loads("".join(chunk.delta.content or "" for chunk in chunks)), PERSON)


def test_a_stop_string_cuts_where_it_appears(server):
    [choice] = choices(server, response_format=schema_format({"const": {"a": 1, "b": 2}}), stop=['"b"'])
    assert choice["finish_reason"] == "stop" and '"b"' not in choice["message"]["content"]


def test_many_different_schemas_at_once_and_preempted(start):
    """Blocks for about four answers: the others are preempted and computed again, each within its own schema."""
    server = start("--kv-memory", "24MiB", "--max-seqs", "16", "--max-model-len", "512")
    names = ["object", "array", "pattern", "uuid", "oneOf", "date", "length", "ref"] * 3

    def one(job):
        index, name = job
        [choice] = choices(server, response_format=schema_format(SCHEMAS[name]), seed=index, temperature=1.3)
        assert choice["finish_reason"] == "stop", choice
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMAS[name])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, enumerate(names)))


def test_a_schema_that_cannot_be_honoured_is_refused_by_its_keyword(server):
    for schema, param in [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "properties.a.not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(?<=a)b"}, "pattern"),
    ]:
        answer = server.post(CHAT, body(response_format=schema_format(schema)))
        assert answer.status == 400
        assert answer.error["param"] == f"response_format.json_schema.schema.{param}"
        assert answer.error["code"] == "invalid_json_schema"
    answer = server.post(CHAT, body(response_format=schema_format({"type": "object", "properties": {"a": {}}}, strict=True)))
    assert answer.status == 400 and "additionalProperties" in answer.error["message"]
