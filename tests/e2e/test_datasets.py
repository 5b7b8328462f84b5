"""Datasets as other programs see them: Delta readers at every version, JSONL for trainers, exit statuses for pipelines."""

import io
import json
import subprocess
import time

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as parquet
import pytest
from deltalake import DeltaTable, write_deltalake

from server import binary

WORDS = "river stone window garden market letter winter bridge candle forest harbour meadow".split()


@pytest.fixture
def tidemill(tmp_path):
    """Runs `tidemill dataset …` on a data directory of the test's own."""

    def run(*arguments, status=0):
        done = subprocess.run(
            [binary(), "dataset", *map(str, arguments), "--data", tmp_path / "data"], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        assert done.returncode == status, f"{done.returncode}: {done.stdout}\n{done.stderr}"
        return done

    return run


def pair(number: int) -> dict:
    subject = f"{WORDS[number % 12]} {WORDS[number // 12 % 12]} {number}"
    return {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What about the {subject}?"}],
        "chosen": [{"role": "assistant", "content": f"The {subject} is old. 漢 \"quoted\"\n"}],
        "rejected": [{"role": "assistant", "content": f"I do not know the {subject}, sorry."}],
    }


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def plain(messages):
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def test_every_version_is_exactly_its_snapshot_to_any_delta_reader(tidemill, tmp_path):
    versions = [[pair(number) for number in numbers] for numbers in [range(0, 30), range(20, 25), range(100, 1300)]]
    for version, lines in enumerate(versions, start=1):
        output = tidemill("import", "pairs", write(tmp_path / "pairs.jsonl", lines)).stdout
        assert output.startswith(f"pairs@{version} "), output
    table = tmp_path / "data" / "datasets" / "pairs"
    assert DeltaTable(table).version() == len(versions)
    assert DeltaTable(table, version=0).to_pyarrow_table().num_rows == 0
    for version, lines in enumerate(versions, start=1):
        read = DeltaTable(table, version=version).to_pyarrow_table()
        assert [{side: plain(row[side]) for side in ["prompt", "chosen", "rejected"]} for row in read.to_pylist()] == lines
        assert set(read["kind"].to_pylist()) == {"preference"} and read["label"].null_count == len(lines)
        assert read["source"].to_pylist() == [f"pairs.jsonl:{line}" for line in range(1, len(lines) + 1)]
        assert len(set(read["id"].to_pylist())) == len(lines)
    schema = DeltaTable(table).to_pyarrow_table().schema
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.string())]))
    assert schema.field("prompt").type.equals(message) or str(schema.field("prompt").type) == str(message)
    for lineage in ["inferences", "feedback", "raters", "users", "variants"]:
        assert pa.types.is_list(schema.field(lineage).type)
    assert all(field.nullable for field in schema)
    commit = DeltaTable(table).history(1)[0]
    assert commit["operation"] == "WRITE" and commit["operationParameters"]["mode"] == "Overwrite"


def test_trainers_can_read_the_jsonl(tidemill, tmp_path):
    lines = [pair(number) for number in range(40)]
    lines += [{"prompt": "Hi", "completion": f"Hello {number}.", "label": number % 2 == 0} for number in range(6)]
    lines += [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Good day, {number}."}]} for number in range(5)]
    tidemill("import", "mixed", write(tmp_path / "mixed.jsonl", lines), "--held-out", "0.2")
    refused = tidemill("export", "mixed", status=1)
    assert "--kind" in refused.stderr
    out = tmp_path / "out"
    tidemill("export", "mixed", "--out", out, "--dropped")
    read = {path.stem: pyarrow.json.read_json(path).to_pylist() for path in out.iterdir()}
    assert sum(map(len, read.values())) == len(lines)
    assert {name.split("-")[0] for name in read} == {"preference", "unpaired", "demonstration"}
    assert any(name.endswith("held_out") for name in read)
    for name, rows in read.items():
        columns = {"preference": ["prompt", "chosen", "rejected"], "unpaired": ["prompt", "completion", "label"], "demonstration": ["prompt", "completion"]}
        for row in rows:
            assert list(row) == columns[name.split("-")[0]]
            assert all(message["role"] and isinstance(message["content"], str) for message in row["prompt"])
    prompts = {part: {json.dumps(row["prompt"]) for name, rows in read.items() if name.endswith(part) for row in rows} for part in ["train", "held_out"]}
    assert not prompts["train"] & prompts["held_out"]

    openai = [json.loads(line) for line in tidemill("export", "mixed", "--format", "openai", "--kind", "preference", "--dropped").stdout.splitlines()]
    assert len(openai) == 40
    for line in openai:
        assert list(line) == ["input", "preferred_output", "non_preferred_output"] and list(line["input"]) == ["messages"]
    tuned = [json.loads(line) for line in tidemill("export", "mixed", "--format", "openai", "--kind", "demonstration", "--dropped").stdout.splitlines()]
    assert [[message["role"] for message in line["messages"]] for line in tuned] == [["user", "assistant"]] * 5


def test_export_and_import_keep_every_row(tidemill, tmp_path):
    lines = [pair(number) for number in range(25)]
    tidemill("import", "first", write(tmp_path / "a.jsonl", lines))
    exported = tidemill("export", "first", "--format", "tidemill", "--dropped").stdout
    (tmp_path / "b.jsonl").write_text(exported, encoding="utf-8")
    tidemill("import", "second", tmp_path / "b.jsonl")
    tidemill("import", "third", tmp_path / "data" / "datasets" / "first", "--at", 1)
    hashes = {json.loads(row)["id"] for row in exported.splitlines()}
    assert len(hashes) == 25 and len(tidemill("list").stdout.splitlines()) == 3
    for name in ["second", "third"]:
        assert {json.loads(row)["id"] for row in tidemill("export", name, "--format", "tidemill", "--dropped").stdout.splitlines()} == hashes
    shown = [tidemill("show", name).stdout for name in ["first", "second", "third"]]
    assert len({line for text in shown for line in text.splitlines() if line.startswith("  content")}) == 1


def test_tables_and_files_of_others_are_imported(tidemill, tmp_path):
    rows = [pair(number) for number in range(20)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "pairs.parquet")
    assert tidemill("import", "parquet", tmp_path / "pairs.parquet").stdout.startswith("parquet@1")
    write_deltalake(tmp_path / "theirs", table)
    write_deltalake(tmp_path / "theirs", table.slice(0, 5), mode="overwrite")
    assert "rows         20" in tidemill("import", "delta", tmp_path / "theirs", "--at", 0).stdout
    assert "rows         5" in tidemill("import", "delta", tmp_path / "theirs").stdout
    back = [json.loads(line) for line in tidemill("export", "parquet", "--dropped").stdout.splitlines()]
    assert back == rows
    bad = pa.Table.from_pylist([{"prompt": "Hi", "chosen": "a", "rejected": None}])
    parquet.write_table(bad, tmp_path / "bad.parquet")
    assert "line 1: there is no 'rejected'" in tidemill("import", "bad", tmp_path / "bad.parquet", status=1).stderr


def test_bad_lines_are_told_by_number_and_nothing_is_kept(tidemill, tmp_path):
    file = tmp_path / "bad.jsonl"
    good = json.dumps(pair(1))
    file.write_bytes("\n".join([good, "{", good, '{"prompt": "Hi", "chosen": 3, "rejected": "b"}', ""]).encode() + b'{"prompt": "\xff"}\n')
    refused = tidemill("import", "bad", file, status=1).stderr
    assert "line 2: it is no JSON" in refused and "line 4: 'chosen' is the number 3" in refused and "line 5: it is no JSON" in refused
    assert "3 lines are no rows" in refused
    assert tidemill("list").stdout == "" and not (tmp_path / "data" / "datasets").exists()
    kept = tidemill("import", "bad", file, "--skip-bad")
    assert "rows         2" in kept.stdout and "line 4" in kept.stderr


def test_a_pipeline_can_gate_on_the_report(tidemill, tmp_path):
    # Every chosen answer equals the rejected one: nothing may be trained on that.
    broken = [{**pair(number), "rejected": pair(number)["chosen"]} for number in range(50)]
    tidemill("import", "broken", write(tmp_path / "broken.jsonl", broken))
    assert "fail" in tidemill("report", "broken@1", "--gate", status=2).stdout
    tidemill("report", "missing", "--gate", status=3)
    tidemill("report", "broken")
    report = json.loads(tidemill("report", "broken", "--json").stdout)
    assert report["verdict"] == "fail" and len(report["rows"]) == 50
    tidemill("report", "broken", "--html", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html")
    # What the report drops is not exported unless asked for.
    assert tidemill("export", "broken").stdout == ""


def test_four_rows_do_not_pass_unless_thresholds_say_so(tidemill, tmp_path):
    file = write(tmp_path / "few.jsonl", [pair(number) for number in range(4)])
    assert "fail  size: To train on: 4 preferences (500 wanted, 50 needed)" in tidemill("import", "few", file, "--gate", status=2).stdout
    thresholds = tmp_path / "thresholds.json"
    thresholds.write_text(json.dumps({"size": {"preferences": {"warn": 4, "fail": 2}}}))
    tidemill("import", "few", file, "--gate", "--thresholds", thresholds)
    thresholds.write_text(json.dumps({"sizes": {}}))
    assert "unknown field `sizes`" in tidemill("import", "few", file, "--gate", "--thresholds", thresholds, status=3).stderr


def test_the_api_builds_a_dataset_from_feedback(start):
    server = start()
    ask = {"model": server.model, "messages": [{"role": "user", "content": "Name a colour."}], "n": 2, "max_tokens": 12, "seed": 5, "user": "ann"}
    for number in range(3):
        ask["messages"][0]["content"] = f"Name a colour, number {number}."
        answer = server.post("/v1/chat/completions", ask).json()
        sent = server.post("/v1/feedback", {"target": answer["id"], "kind": "correction", "value": f"Blue, {number}.", "author": "rater"})
        assert sent.status == 201, sent.body
    started = server.post("/v1/datasets", {"name": "colours", "query": {"rows": ["preference"], "since": "1d"}})
    assert started.status == 202, started.body
    build = started.json()
    deadline = time.monotonic() + 120
    while build["status"] in ("queued", "running") and time.monotonic() < deadline:
        time.sleep(0.1)
        build = server.get(f"/v1/datasets/builds/{build['id']}").json()
    assert build["status"] == "succeeded" and build["dataset"] == "colours@1", build
    shown = server.get("/v1/datasets/colours").json()
    assert shown["counts"]["kinds"] == {"preference": 3} and shown["counts"]["raters"] == 1 and shown["report"]["checks"]
    rows = server.get("/v1/datasets/colours@1/rows?limit=2").json()
    assert len(rows["data"]) == 2 and rows["has_more"] and rows["data"][0]["origin"]["users"] == ["ann"]
    assert server.get("/v1/datasets/colours/report?format=html").headers["content-type"].startswith("text/html")
    lines = pyarrow.json.read_json(io.BytesIO(server.get("/v1/datasets/colours/export?format=trl").body)).to_pylist()
    assert [list(line) for line in lines] == [["prompt", "chosen", "rejected"]] * len(lines)
    assert server.get("/v1/datasets").json()["data"][0]["id"] == "colours@1"
    assert server.get("/v1/datasets/none").status == 404
    for body, param in [({}, "name"), ({"name": "A b"}, "name"), ({"name": "a", "query": {"held_out": 3}}, "query.held_out"), ({"name": "a", "query": {"since": "soon"}}, "query.since")]:
        refused = server.post("/v1/datasets", body)
        assert (refused.status, refused.error["param"]) == (400, param), refused.body
