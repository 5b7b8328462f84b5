"""Governance on a running server: what was acknowledged is in the audit after kill -9, who may look acts on nothing, and an answer of the
default model leads to the dataset and the raters behind its adapter, and back."""

import json
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from conftest import GOLDENS, MODEL, running
from server import PATIENCE, Answer, Server, binary, default_model, eventually

TINY = {"tiny": GOLDENS / "llama"}
KILLS = 6
NOUNS = "river mountain bread engine music cat winter computer book garden ocean train".split()


def tidemill(*arguments: object, status: int = 0) -> str:
    """The command's standard output."""
    done = subprocess.run([str(binary()), *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stdout if status == 0 else done.stdout + done.stderr


def key(data: Path, name: str, scopes: str) -> str:
    return tidemill("key", "create", "--name", name, "--scope", scopes, "--data", data).strip()


def call(server: Server, secret: str, method: str, path: str, body=None) -> Answer:
    headers = {"content-type": "application/json", "authorization": f"Bearer {secret}"}
    return server.request(method, path, None if body is None else json.dumps(body).encode(), headers)


def acts(data: Path, *arguments: object) -> list[dict]:
    lines = tidemill("audit", "--json", "--limit", 100_000, *arguments, "--data", data).splitlines()
    return [json.loads(line) for line in lines]


class Maker(threading.Thread):
    """Makes one key after another until the server dies; what was acknowledged is in `made`."""

    def __init__(self, server: Server, secret: str, label: str):
        super().__init__(daemon=True)
        self.server, self.secret, self.label = server, secret, label
        self.made: list[str] = []
        self.start()

    def run(self) -> None:
        number = 0
        while True:
            name = f"{self.label}-{number}"
            number += 1
            try:
                answer = call(self.server, self.secret, "POST", "/v1/admin/keys", {"name": name, "scopes": ["chat"]})
            except OSError:
                return
            if answer.status != 201:
                return
            self.made.append(name)


def test_an_acknowledged_act_is_in_the_audit_after_kill_9(tmp_path):
    chance = random.Random(5)
    data = tmp_path / "data"
    boss = key(data, "boss", "admin")
    made: list[str] = []
    for kill in range(KILLS):
        server = Server(tmp_path, TINY)
        try:
            server.wait_ready()
            makers = [Maker(server, boss, f"{kill}-{number}") for number in range(4)]
            eventually("there are acts", lambda: sum(len(maker.made) for maker in makers) > 5)
            time.sleep(chance.uniform(0.0, 0.4))
        finally:
            server.process.kill()
            server.process.wait()
        for maker in makers:
            maker.join(PATIENCE)
            made += maker.made
    told = acts(data, "--what", "key.create", "--by", "boss")
    subjects = [act["subject"] for act in told]
    print(f"\n{len(made)} acknowledged in {KILLS} rounds, {len(subjects)} in the audit")
    assert not set(made) - set(subjects)
    # Nor is an act told twice, or told of a key that is not there.
    listed = {line.split()[1] for line in tidemill("key", "list", "--data", data).splitlines()[1:]}
    assert len(subjects) == len(set(subjects)) and set(subjects) == listed - {"boss"}
    assert {act["actor"] for act in told} == {"key boss"} and len({act["key_id"] for act in told}) == 1


def test_who_may_look_sees_the_same_as_the_command_line_and_acts_on_nothing(tmp_path):
    data = tmp_path / "data"
    boss, look = key(data, "boss", "admin"), key(data, "auditor", "look")
    with running(tmp_path, TINY) as server:
        assert call(server, boss, "POST", "/v1/admin/keys", {"name": "app", "scopes": ["chat"]}).status == 201
        assert call(server, boss, "POST", "/v1/datasets", {"name": "d"}).status == 202
        assert call(server, boss, "DELETE", "/v1/admin/keys/app").status == 200
        page = call(server, look, "GET", "/v1/audit?order=asc&limit=1000").json()
        told = [(act["actor"], act["action"], act["subject"]) for act in page["data"]]
        assert told == [
            ("command line", "key.create", "boss"),
            ("command line", "key.create", "auditor"),
            ("key boss", "key.create", "app"),
            ("key boss", "dataset.build", "d"),
            ("key boss", "key.revoke", "app"),
        ]
        assert acts(data) == page["data"][::-1]
        assert [act["subject"] for act in acts(data, "--by", "boss", "--what", "key")] == ["app", "app"]
        assert acts(data, "--until", "1d") == [] and len(acts(data, "--since", "1d")) == 5
        table = tidemill("audit", "--data", data, "--limit", 1)
        assert "key boss" in table and "key.revoke" in table and len(table.splitlines()) == 2
        for secret in (boss, look):
            assert secret not in json.dumps(page)
        for method, path in [
            ("POST", "/v1/completions"), ("POST", "/v1/datasets"), ("POST", "/v1/adapters"), ("POST", "/v1/fine_tuning/jobs"),
            ("POST", "/v1/admin/keys"), ("GET", "/v1/admin/keys"),
        ]:
            refused = call(server, look, method, path, {})
            assert (refused.status, refused.error["code"]) == (403, "insufficient_permissions"), (method, path, refused.body)
            assert "lacks the scope" in refused.error["message"]


def ask(server: Server, secret: str, model: str, noun: str, **fields) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": f"What is a {noun}?"}], "max_tokens": 12, **fields}
    answer = call(server, secret, "POST", "/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return answer.json()


@pytest.mark.timeout(900)
def test_an_answer_leads_to_its_dataset_and_raters_and_back(tmp_path):
    data = tmp_path / "data"
    boss, look = key(data, "boss", "admin"), key(data, "auditor", "look")
    with running(tmp_path, {MODEL: default_model()}) as server:
        # People prefer one of two answers.
        for index, noun in enumerate(NOUNS):
            two = ask(
                server, boss, MODEL, noun, n=2, temperature=1.0, seed=index, user=f"user-{index}", tidemill={"compare": True}, stop=["."],
                max_tokens=80,
            )
            ids = [choice["tidemill"]["id"] for choice in two["choices"]]
            body = {
                "kind": "comparison", "value": {"candidates": ids, "winner": ids[index % 2]},
                "author": ["rita", "rob"][index % 2],
            }
            said = call(server, boss, "POST", "/v1/feedback", body)
            assert said.status == 201, said.body
        # What they said becomes a dataset, and that an adapter.
        tidemill("dataset", "build", "prefs", "--data", data)
        settings = dict(learning_rate=3e-4, per_device_train_batch_size=4, max_steps=2, save_steps=2)
        fields = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        base = ["--base", f"{MODEL}={default_model()}"]
        tidemill("train", "dpo", "--dataset", "prefs@1", "--despite-report", *base, "--data", data, "--out", tmp_path / "short", "--r", "4", *fields)
        served = call(server, boss, "POST", "/v1/adapters/short/serve")
        assert served.status == 200, served.body
        first = ask(server, boss, "short", "city")

        path = f"/v1/lineage/{first['id']}"
        eventually("the answer is recorded", lambda: call(server, look, "GET", path).status == 200)
        trace = call(server, look, "GET", f"{path}?rows=true").json()
        assert (trace["of"], trace["answer"]["model"], trace["answer"]["variant"]) == ("answer", MODEL, f"{MODEL}:short")
        [adapter] = trace["adapters"]
        assert adapter["id"] == f"short@{trace['answer']['generation']}" and adapter["method"] == "dpo"
        assert len(adapter["base_hash"]) == 64 and adapter["code_version"].startswith("tidemill ")
        dataset = adapter["dataset"]
        assert (dataset["id"], dataset["raters"]) == ("prefs@1", ["rita", "rob"])
        assert dataset["rows"] == len(dataset["row_ids"]) > 0 and dataset["sources"]["rater"] == 2
        assert all(row["feedback"] and row["answers"] and row["raters"] for row in dataset["row_ids"])
        # The command line says the same, and shows it to people.
        assert json.loads(tidemill("lineage", first["id"], "--rows", "--json", "--data", data)) == trace
        tree = tidemill("lineage", first["id"], "--rows", "2", "--data", data)
        print(tree)
        for part in [f"adapter {adapter['id']}", "dataset prefs@1", "raters rita, rob", "trained by dpo", dataset["row_ids"][0]["id"], "…"]:
            assert part in tree, part

        # Back, from the person, the row and the dataset to answers.
        ask(server, boss, "short", "bridge")
        for target in ["rater:rob", dataset["row_ids"][0]["id"], "prefs@1", adapter["id"]]:
            found = lambda: call(server, look, "GET", f"/v1/lineage/{target}").json()

            def answers() -> int:
                trace = found()
                made = trace.get("made") or (trace["used_in"][0]["adapters"] if "used_in" in trace else trace["adapters"])[0]
                return made["answers"]["count"]

            eventually(f"both answers are counted for {target}", lambda: answers() == 2)
        assert call(server, look, "GET", "/v1/lineage/rater:rob").json()["total"] == {"datasets": 1, "adapters": 1, "answers": 2}
        back = tidemill("lineage", "rater:rob", "--data", data)
        print(back)
        assert "1 datasets, 1 adapters, 2 answers" in back

        # A person is erased: nobody finds them by name, and their judgements are not shown.
        tidemill("data", "erase", "--user", "rob", "--yes", "--data", data)
        assert call(server, look, "GET", "/v1/lineage/rater:rob").json()["total"]["datasets"] == 0
        after = call(server, look, "GET", f"{path}?rows=true").json()
        assert "rob" not in json.dumps(after) and after["adapters"][0]["tainted"] and after["adapters"][0]["dataset"]["tainted"]
        erased = acts(data, "--what", "erase")
        assert len(erased) == 1 and "rob" not in json.dumps(erased) and "short@" in json.dumps(erased)
    tidemill("lineage", "chatcmpl-nothing", "--data", data, status=1)
