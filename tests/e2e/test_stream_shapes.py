"""The shape of every chunk of every kind of stream, against what the APIs' contracts say: `stream_shapes/`, written by hand.

A shape is JSON: `"<string>"` and the like stand for any value of a type, a key that ends in `?` may be absent, a list of one shape
stands for any number of such items, and the key `...` lets further keys be there. All else must be exactly so, and nothing more.
"""

import json
from pathlib import Path

import pytest
from conftest import MODEL
from test_stream import lines_of

FOLDER = Path(__file__).parent / "stream_shapes"
TYPES = {"<string>": str, "<integer>": int, "<number>": (int, float), "<object>": dict, "<any>": object}


def fault(value, shape, path: str = "") -> str | None:
    """Where the value is not of the shape."""
    if isinstance(shape, str) and shape in TYPES:
        fits = isinstance(value, TYPES[shape]) and (shape == "<any>" or not isinstance(value, bool))
        return None if fits else f"{path} is {value!r}, not {shape}"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{path} is {value!r}, not an object"
        named = {key.removesuffix("?"): key for key in shape}
        missing = [name for name, key in named.items() if key == name and key != "..." and name not in value]
        further = [] if "..." in shape else [name for name in value if name not in named]
        if missing or further:
            return f"{path} lacks {missing} and has {further} too many"
        faults = (fault(value[name], shape[key], f"{path}.{name}") for name, key in named.items() if name in value)
        return next((found for found in faults if found), None)
    if isinstance(shape, list) and shape:
        if not isinstance(value, list):
            return f"{path} is {value!r}, not a list"
        return next((found for i, item in enumerate(value) if (found := fault(item, shape[0], f"{path}.{i}"))), None)
    return None if value == shape and isinstance(value, bool) == isinstance(shape, bool) else f"{path} is {value!r}, not {shape!r}"


def check(chunks: list[dict], sequence: list[dict]) -> None:
    """The chunks are the sequence. A step takes as many as it may, and leaves what the next one needs to be last."""
    at = 0
    for number, step in enumerate(sequence):
        taken, why = 0, "no chunk is left"
        most = 1 if step["times"] in ("once", "at most once") else len(chunks)
        while taken < most and at < len(chunks) and (why := fault(chunks[at], step["chunk"])) is None:
            taken, at = taken + 1, at + 1
        assert taken > 0 or step["times"] == "at most once", f"step {number}: {why}; at {at}: {json.dumps(chunks[at:at + 1])}"
    assert at == len(chunks), f"after the last step: {json.dumps(chunks[at])}"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_a_stream_has_the_shape_of_the_contract(server, name):
    contract = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    text, headers = lines_of(server, contract["path"], {"model": MODEL, **contract["request"]})
    assert headers["content-type"].startswith("text/event-stream")
    events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
    if contract.get("done"):
        assert events.pop() == f"data: {contract['done']}"
    chunks = []
    for event in events:
        *kind, data = event.split("\n")
        assert data.startswith("data: ")
        chunks.append(json.loads(data.removeprefix("data: ")))
        # Events of the two newer APIs carry their type beside the data, too; chunks have data alone.
        assert kind == ([f"event: {chunks[-1]['type']}"] if "type" in chunks[-1] else [])
    numbers = [chunk["sequence_number"] for chunk in chunks if "sequence_number" in chunk]
    assert numbers in ([], list(range(len(chunks))))
    if contract.get("by") == "choice":
        indices = [chunk["choices"][0]["index"] for chunk in chunks]
        assert list(dict.fromkeys(indices)) == list(range(max(indices) + 1)), "choices appear in order"
        for index in set(indices):
            check([chunk for chunk, found in zip(chunks, indices) if found == index], contract["sequence"])
    else:
        check(chunks, contract["sequence"])


@pytest.mark.parametrize(
    ("value", "shape", "fits"),
    [
        ({"a": 1}, {"a": "<integer>"}, True),
        ({"a": True}, {"a": "<integer>"}, False),
        ({"a": 1, "b": 2}, {"a": "<integer>"}, False),
        ({"a": 1, "b": 2}, {"a": "<integer>", "...": ""}, True),
        ({}, {"a?": "<integer>"}, True),
        ({"a": None}, {"a": "<string>"}, False),
        ({"a": [1, "x"]}, {"a": ["<integer>"]}, False),
        ({"a": []}, {"a": []}, True),
        ({"a": [1]}, {"a": []}, False),
    ],
)
def test_a_shape_says_no_to_what_it_does_not_name(value, shape, fits):
    assert (fault(value, shape) is None) == fits
