"""Shadow and interleaved rollouts on the default model: copies that nobody sees or feels, and two answers to one person."""

import json
import statistics
import subprocess
import threading
import time
from pathlib import Path

import pytest

from conftest import MODEL, running
from judging import bare, rows
from server import Server, binary, default_model, eventually

NOUNS = "river mountain bread engine music cat winter computer".split()
PIRATE = {"variant": "pirate", "model": MODEL, "prompt_prefix": "You are a pirate. Answer in one short sentence."}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("shadow"), {MODEL: default_model()}) as server:
        yield server


def begin(server: Server, name: str, **more) -> dict:
    spec = {"name": name, "model": MODEL, "arms": [{"variant": MODEL}, PIRATE], "interval": 1, **more}
    answer = server.post("/v1/rollouts", spec)
    assert answer.status == 201, answer.body
    return answer.json()


def end(server: Server, name: str) -> None:
    assert server.post(f"/v1/rollouts/{name}/rollback", {}).status == 200


def ask(server: Server, user: str, noun: str, **more) -> dict:
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"What is a {noun}?"}], "user": user, "max_tokens": 24, "temperature": 0, **more}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return answer.json()


def exposures(data: Path, rollout: str) -> dict[int, dict[str, int]]:
    """Answers by arm and status."""
    counted: dict[int, dict[str, int]] = {0: {}, 1: {}}
    for row in rows(data, "SELECT arm, status, COUNT(*) AS n FROM inferences WHERE rollout_id = ? GROUP BY arm, status", rollout):
        counted[row["arm"]][row["status"]] = row["n"]
    return counted


def median_of(server: Server, label: str) -> tuple[float, list[str]]:
    """Time of an answer and the answers, of people who ask one after the other without a pause."""
    times, texts = [], []
    for noun in NOUNS:
        begun = time.monotonic()
        answer = ask(server, f"{label}-{noun}", noun)
        times.append(time.monotonic() - begun)
        assert len(answer["choices"]) == 1
        texts.append(answer["choices"][0]["message"]["content"])
    return statistics.median(times), texts


def test_a_shadow_is_answered_when_there_is_nothing_else_to_do_and_changes_no_answer(server):
    median_of(server, "warm")
    before, plain = median_of(server, "before")
    rollout = begin(server, "quiet", kind="shadow", metrics=[{"metric": "error_rate", "guardrail": {"max": 0.1}}])
    during, shadowed = median_of(server, "during")
    assert shadowed == plain, "an answer is the same with a shadow behind it"
    print(f"\nmedian of {len(NOUNS)} answers: {before:.3f} s without, {during:.3f} s with a shadow")
    # Between people's questions there is nothing to do: the last copy at the latest is answered.
    eventually("a copy is answered", lambda: exposures(server.data, rollout["id"])[1].get("ok", 0) >= 1)
    eventually("no copy is left", lambda: sum(exposures(server.data, rollout["id"])[1].values()) == sum(exposures(server.data, rollout["id"])[0].values()))
    print(exposures(server.data, rollout["id"]))
    texts = rows(
        server.data,
        "SELECT c.output_text, i.variant, i.prompt_text FROM inferences i JOIN choices c ON c.inference_id = i.id "
        "WHERE i.rollout_id = ? AND i.arm = 1 AND i.status = 'ok'",
        rollout["id"],
    )
    assert all(row["variant"] == "pirate" and "pirate" in row["prompt_text"] and row["output_text"] not in plain for row in texts)
    # Under load copies give way, and everybody is answered.
    failed: list[bytes] = []

    def user(number: int) -> None:
        for noun in NOUNS[:4]:
            try:
                ask(server, f"load-{number}-{noun}", noun)
            except AssertionError as error:
                failed.append(str(error).encode())

    people = [threading.Thread(target=user, args=(number,)) for number in range(4)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert not failed, failed[0]
    print(exposures(server.data, rollout["id"]))
    status = server.get("/v1/rollouts/quiet").json()
    assert status["status"] in ("running", "completed"), status
    if status["status"] == "running":
        end(server, "quiet")
    assert "panicked" not in server.log()


def test_one_person_gets_both_answers_and_says_which_is_better(server):
    begin(
        server, "taste", kind="interleaved", min_exposure=1,
        metrics=[{"metric": "comparison", "goal": {"min": 0.5}, "min_samples": 5}],
    )
    pirates_first = 0
    for index, noun in enumerate(NOUNS):
        answer = ask(server, f"person-{index}", noun)
        ids = [choice["tidemill"]["id"] for choice in answer["choices"]]
        assert len(ids) == 2 and ids[0] == answer["id"] and answer["model"] == MODEL
        eventually("both are recorded", lambda: len(rows(server.data, "SELECT 1 FROM inferences WHERE id IN (?, ?)", *map(bare, ids))) == 2)
        variants = {
            row["id"]: row["variant"]
            for row in rows(server.data, "SELECT id, variant FROM inferences WHERE id IN (?, ?)", *map(bare, ids))
        }
        assert sorted(variants.values()) == ["pirate", MODEL]
        # Everybody likes the pirate.
        winner = next(id for id in ids if variants[bare(id)] == "pirate")
        pirates_first += winner == ids[0]
        said = server.post("/v1/feedback", {"kind": "comparison", "value": {"candidates": ids, "winner": winner}, "author": f"person-{index}"})
        assert said.status == 201, said.body
    judged = lambda: server.get("/v1/rollouts/taste").json()["latest"]["judgements"]
    eventually("the comparisons are measured", lambda: judged() and judged()[0]["samples"] == len(NOUNS))
    print(f"\nshown first {pirates_first} of {len(NOUNS)} times: {json.dumps(judged()[0])}")
    assert judged()[0]["value"] == 1.0
    # Streamed: two choices in one stream.
    with server.client() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "What is a cat?"}], user="person-0", max_tokens=12, stream=True
        )
        texts = ["", ""]
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert all(texts), texts
    shown = subprocess.run(
        [str(binary()), "rollout", "status", "taste", "--base-url", server.base_url], capture_output=True, text=True, timeout=60, cwd=server.data.parent
    )
    print(shown.stdout, shown.stderr)
    status = server.get("/v1/rollouts/taste").json()["status"]
    if status == "running":
        end(server, "taste")
