"""What happens to each field of each endpoint: a table that is sent to the real server row by row, and printed as a page.

A row's example is really sent. `REJECTED` rows must be refused with 400 and the name of the field; `HONOURED` rows must be accepted
and, where it can be seen cheaply, have the effect that their `seen` looks for; `IGNORED` rows must be accepted and change nothing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HONOURED, REJECTED, IGNORED = "honoured", "rejected", "ignored"


@dataclass(frozen=True)
class Row:
    """One example of one field."""

    name: str  # as a path, such as `stream_options.include_usage`
    outcome: str
    value: Any  # of the field at the head of the path
    note: str = ""
    more: dict = field(default_factory=dict)  # further fields that the example needs
    seen: Callable | None = None  # takes (what came, how to ask again); asserts the effect
    param: str = ""  # of the refusal, where it is not the path

    @property
    def head(self) -> str:
        return self.name.split(".")[0]

    @property
    def sends(self) -> dict:
        return {self.head: self.value, **self.more}


def honoured(name: str, value, seen: Callable | None = None, note: str = "", **more) -> Row:
    return Row(name, HONOURED, value, note, more, seen)


def ignored(name: str, value, note: str = "", **more) -> Row:
    return Row(name, IGNORED, value, note, more)


def rejected(name: str, value, note: str = "", param: str = "", **more) -> Row:
    return Row(name, REJECTED, value, note, more, param=param)


@dataclass(frozen=True)
class Endpoint:
    """The rows of one endpoint, and the request that they are added to."""

    method: str
    path: str
    base: dict
    rows: list[Row]
    # Fields of the official client's type for this request; each must have a row.
    official: frozenset[str]
    note: str = ""
    how: str = "JSON body"  # or: form, query
    answer: Any = None  # the official client's type of what comes back
    chunk: Any = None  # of each event of a stream

    @property
    def title(self) -> str:
        return f"{self.method} {self.path}"


def shown(value, base=None, longest: int = 110) -> str:
    """An example as it fits into a table: of a list, what the request without the field does not have."""
    if isinstance(value, list) and isinstance(base, list) and len(value) > 1:
        value = [item for item in value if item not in base]
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return "`" + text.replace("|", "\\|") + "`"


INTRODUCTION = """# Compatibility, field by field

Written by `tests/e2e/test_compatibility.py`, which sends every example below to the server and checks what comes back; do not edit.

- **honoured**: accepted, and the effect that the API's documentation promises is looked for and found. *(unseen)*: it does not show in
  one answer of the model that the tests use, and only that it is accepted was checked.
- **ignored**: accepted without effect on the answer; what is recorded with the answer says so.
- **rejected**: refused with 400 and the field's name, so that nobody believes it had an effect.

Every field of the official clients' own types for these requests has a row. A field that has none, anywhere, is refused as
`unknown_parameter`; `null` always means the default. What each field means is in [api.md](api.md) and the pages it links.
"""


def page(endpoints: list[Endpoint]) -> str:
    """The document."""
    parts = [INTRODUCTION]
    for endpoint in endpoints:
        parts.append(f"## `{endpoint.title}`\n")
        if endpoint.note:
            parts.append(f"{endpoint.note}\n")
        lines = ["| field | example | | |", "|---|---|---|---|"]
        for row in endpoint.rows:
            unseen = " *(unseen)*" if row.outcome == HONOURED and row.seen is None else ""
            example = shown(row.value, endpoint.base.get(row.head))
            lines.append(f"| `{row.name}` | {example} | {row.outcome}{unseen} | {row.note} |".replace("|  |", "| |"))
        parts.append("\n".join(lines) + "\n")
    counts = {outcome: sum(row.outcome == outcome for e in endpoints for row in e.rows) for outcome in (HONOURED, IGNORED, REJECTED)}
    parts.append("Examples: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ".\n")
    return "\n".join(parts)
