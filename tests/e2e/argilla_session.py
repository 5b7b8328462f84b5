"""What a person with the Argilla SDK does with a queue's export; run with the SDK's own Python.

    argilla_session.py SETTINGS RECORDS PLAN FOLDER

Builds a dataset's settings and its records with the SDK's classes, adds the plan's responses (a list of [record, user, answer, status,
comment]) and writes them as the SDK does: flat.json (`to_list(flatten=True)`), nested.json (`to_json`). Argilla's server needs
Elasticsearch and is not here: the client is told not to greet it, and nothing else of the SDK is changed.
"""

import json
import sys
import uuid
from pathlib import Path

import argilla as rg
from argilla.records._io import GenericIO, JsonIO


class Offline(rg.Argilla):
    def _validate_connection(self):
        pass


def main(settings_path: str, records_path: str, plan_path: str, folder: str) -> None:
    rg.Argilla._set_default(Offline(api_url="http://127.0.0.1:9", api_key="none"))
    settings = rg.Settings.from_json(settings_path)
    settings.validate()
    dataset = rg.Dataset(name="pairs", settings=settings)
    # As `dataset.records.from_json(path)` reads, before it sends them.
    records = JsonIO._records_from_json(records_path)
    for record in records:
        record.dataset = dataset
        record.api_model()
    for index, user, answer, status, comment in json.loads(Path(plan_path).read_text()):
        person = uuid.UUID(int=user)
        records[index].responses.add(rg.Response("preference", answer, user_id=person, status=status))
        if comment:
            records[index].responses.add(rg.Response("comment", comment, user_id=person, status=status))
    # The SDK checks questions and values when it makes what it would send.
    for record in records:
        record.api_model()
    out = Path(folder)
    (out / "flat.json").write_text(json.dumps(GenericIO.to_list(records, flatten=True)))
    JsonIO.to_json(records, out / "nested.json")
    facts = {
        "version": rg.__version__,
        "fields": [field.name for field in settings.fields],
        "labels": list(settings.questions["preference"].labels),
        "required": [question.name for question in settings.questions if question.required],
        "hidden": [item.name for item in settings.metadata if not item.visible_for_annotators],
        "min_submitted": settings.distribution.min_submitted,
        "guidelines": settings.guidelines,
        "prompt": [dict(turn) for turn in records[0].fields["prompt"]],
    }
    (out / "facts.json").write_text(json.dumps(facts))


main(*sys.argv[1:])
