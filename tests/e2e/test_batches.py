"""Files and batches with the official client, and a server that is killed in the middle of a batch."""

import json
import random
import sqlite3
import time

import pytest

from conftest import GOLDENS
from server import Server, eventually

TINY = {"tiny": GOLDENS / "llama"}
URL = "/v1/chat/completions"


def chat_line(number: int, model: str, **extra) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": f"Count to {number}."}], "max_tokens": 24, "temperature": 0, **extra}
    return {"custom_id": f"line-{number}", "method": "POST", "url": URL, "body": body}


def jsonl(lines: list[dict]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def order(client, lines: list[dict], **extra):
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h", **extra)


def settled(client, batch_id: str, *states: str, seconds: float = 600):
    deadline = time.monotonic() + seconds
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in states:
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)


def rows(client, file_id: str | None) -> dict[str, dict]:
    if file_id is None:
        return {}
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {row["custom_id"]: row for row in found}
    assert len(by_id) == len(found), "a line is there twice"
    return by_id


@pytest.fixture
def strict(server):
    with server.client(_strict_response_validation=True) as client:
        yield client


def test_files_with_the_official_client(strict):
    content = b"\x00\x01" * 50_000
    file = strict.files.create(
        file=("data.bin", content), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.bytes, file.filename, file.purpose, file.status) == (100_000, "data.bin", "user_data", "processed")
    assert file.expires_at == file.created_at + 3600
    assert strict.files.retrieve(file.id) == file
    assert strict.files.content(file.id).read() == content
    assert strict.files.wait_for_processing(file.id) == file
    others = [strict.files.create(file=("x", b"x"), purpose="fine-tune").id for _ in range(3)]
    listed = [file.id for file in strict.files.list(limit=2, order="asc") if file.id in others]
    assert listed == others
    for file_id in [file.id, *others]:
        assert strict.files.delete(file_id).deleted
    assert file.id not in [kept.id for kept in strict.files.list(purpose="user_data")]


def test_a_batch_with_the_official_client(server, strict):
    lines = [chat_line(number, server.model) for number in range(20)] + [chat_line(20, "nope"), chat_line(21, server.model, n=0)]
    batch = order(strict, lines, metadata={"job": "nightly"}, output_expires_after={"anchor": "created_at", "seconds": 7200})
    assert (batch.status, batch.metadata, batch.endpoint) == ("validating", {"job": "nightly"}, URL) or batch.status == "in_progress"
    batch = settled(strict, batch.id, "completed")
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (22, 20, 2)
    answers, errors = rows(strict, batch.output_file_id), rows(strict, batch.error_file_id)
    assert len(answers) == 20 and set(errors) == {"line-20", "line-21"}
    assert errors["line-20"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert errors["line-21"]["response"]["body"]["error"]["param"] == "n"
    direct = strict.chat.completions.create(**lines[3]["body"])
    assert answers["line-3"]["response"]["body"]["choices"][0]["message"]["content"] == direct.choices[0].message.content
    total = sum(row["response"]["body"]["usage"]["total_tokens"] for row in answers.values())
    assert batch.usage.total_tokens == total
    output = strict.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.expires_at - output.created_at) == ("batch_output", 7200)
    assert batch.id in [found.id for found in strict.batches.list(limit=1)]


def test_a_refused_batch_says_why(server, strict):
    file = strict.files.create(file=("in.jsonl", b'{"custom_id": 7}\nnot json\n'), purpose="batch")
    batch = strict.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    batch = settled(strict, batch.id, "failed")
    assert [(error.line, error.code) for error in batch.errors.data] == [(1, "missing_required_parameter"), (2, "invalid_json_line")]


def result_files(data, batch_id: str) -> list[bytes]:
    """What is on the disk of a batch that has not ended: whole rows only."""
    connection = sqlite3.connect(f"file:{data / 'tidemill.db'}?mode=ro", uri=True, timeout=60)
    try:
        names = connection.execute(
            "SELECT output_file, error_file FROM batches WHERE id = ?", [batch_id.removeprefix("batch_")]
        ).fetchone()
    finally:
        connection.close()
    found = []
    for name in names:
        path = next((data / "files").glob(f"*/{name}"), data / "files" / name)
        text = path.read_bytes() if path.exists() else b""
        found += [line for line in text.split(b"\n")[:-1]]
    return found


@pytest.mark.timeout(900)
def test_kill_9_in_the_middle_of_a_batch_loses_no_line_and_does_none_twice(tmp_path):
    chance = random.Random(5)
    count, kills = 1500, 8
    lines = [chat_line(number, "tiny" if number % 50 else "nope", metadata={"line": str(number)}) for number in range(count)]
    done: dict[str, bytes] = {}
    batch_id, seen = None, []
    for kill in range(kills + 1):
        server = Server(tmp_path, TINY, "--max-seqs", "8")
        last = kill == kills or len(done) == count
        try:
            server.wait_ready()
            client = server.client()
            if batch_id is None:
                batch_id = order(client, lines).id
            # At least one more row each time, then killed at a random moment.
            deadline = time.monotonic() + 120
            while not last and len(result_files(server.data, batch_id)) <= len(done):
                assert time.monotonic() < deadline, server.log()[-2000:]
                time.sleep(0.01)
            if not last:
                time.sleep(chance.uniform(0, 0.2))
                server.kill()
                now = {json.loads(row)["custom_id"]: row for row in result_files(server.data, batch_id)}
                for custom_id, row in done.items():
                    assert now[custom_id] == row, "a line that was done changed"
                done = now
                seen.append(len(done))
                continue
            batch = settled(client, batch_id, "completed")
            output, errors = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
            assert server.stop() == 0, server.log()[-3000:]
            break
        finally:
            server.kill()
    print(f"\nrows at each kill: {seen} of {count}")
    # On a machine with other work a kill may come late.
    assert sum(rows < count for rows in seen) >= kills // 2, seen
    assert not set(output) & set(errors)
    assert set(output) | set(errors) == {line["custom_id"] for line in lines}
    assert len(errors) == count / 50
    assert (batch.request_counts.completed, batch.request_counts.failed) == (len(output), len(errors))
    for custom_id, row in done.items():
        assert {**output, **errors}[custom_id] == json.loads(row), "a line that was done before the last kill ran again"
    # What ran and was recorded, but had no row yet, ran again: never more than one line per place and kill.
    connection = sqlite3.connect(f"file:{server.data / 'tidemill.db'}?mode=ro", uri=True)
    recorded = connection.execute("SELECT COUNT(*) FROM inferences WHERE status = 'ok'").fetchone()[0]
    connection.close()
    assert recorded <= len(output) + kills * 8, (recorded, len(output))


def test_what_expires_while_the_server_is_away_is_named(tmp_path):
    server = Server(tmp_path, TINY, "--max-seqs", "2")
    try:
        server.wait_ready()
        client = server.client()
        batch_id = order(client, [chat_line(number, "tiny") for number in range(3000)]).id
        eventually("a row is there", lambda: result_files(server.data, batch_id))
        server.kill()
        connection = sqlite3.connect(server.data / "tidemill.db")
        connection.execute("UPDATE batches SET expires = 1")
        connection.commit()
        connection.close()
        server = Server(tmp_path, TINY)
        server.wait_ready()
        client = server.client(_strict_response_validation=True)
        batch = settled(client, batch_id, "expired")
        output, errors = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
        assert batch.expired_at and output and len(output) + len(errors) == 3000
        assert {row["error"]["code"] for row in errors.values()} == {"batch_expired"}
        assert server.stop() == 0
    finally:
        server.kill()


@pytest.mark.timeout(900)
def test_fifty_thousand_lines_take_no_more_memory_than_five_hundred(tmp_path):
    server = Server(tmp_path, TINY, "--max-seqs", "8", "--record", "off")
    try:
        server.wait_ready()
        client = server.client()

        def resident() -> int:
            status = (server.process.pid, open(f"/proc/{server.process.pid}/status").read())[1]
            return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024

        settled(client, order(client, [chat_line(number, "nope") for number in range(500)]).id, "completed")
        before = resident()
        # Refused one by one by the real router: what is measured is the batch, not the model.
        big = order(client, [chat_line(number, "nope", metadata={"filler": "x" * 500}) for number in range(50_000)])
        batch = settled(client, big.id, "completed")
        assert batch.request_counts.failed == 50_000
        print(f"\nresident before {before} MiB, after {resident()} MiB")
        assert resident() - before < 64, (before, resident())
    finally:
        server.kill()
