"""Rollouts on the real model: started with one command, and decided with nobody touching them."""

import json
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from conftest import GOLDENS, MODEL, running
from postgres import Postgres
from server import PATIENCE, Server, binary, default_model, eventually
from test_registry import change, models, write_adapter

# The model answers `1 + 1 = 2` and stops, after eight tokens.
QUESTION = [{"role": "user", "content": "What is 1+1? Answer with a number."}]
CLIENTS = 6


def rollout(server: Server, *arguments, status: int = 0) -> str:
    """`tidemill rollout …` beside the server; what it said."""
    command = [binary(), "rollout", *arguments, "--base-url", server.base_url]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def begin(server: Server, **spec) -> dict:
    """Intervals of a second, so that what takes hours with people takes seconds here."""
    body = {"interval": 1, "min_exposure": 20, "tuning": 60, **spec}
    answer = server.post("/v1/rollouts", body)
    assert answer.status == 201, answer.body
    return answer.json()


def look(server: Server, name: str) -> dict:
    return server.get(f"/v1/rollouts/{name}").json()


ERRORS = {"metric": "error_rate", "guardrail": {"max": 0.2}, "min_samples": 10}
BROKEN = {"metric": "truncation_rate", "guardrail": {"of": "difference", "max": 0.25}, "min_samples": 8}


class Crowd:
    """
    Users who ask until told to stop, each with a name of its own, with so many seconds between an answer and the next question. `seen` has
    (user, variant, id, second) of every answer.
    """

    def __init__(self, server: Server, model: str, clients: int = CLIENTS, opinion=None, between: float = 0, **ask):
        self.server, self.model, self.opinion, self.ask = server, model, opinion, {"max_tokens": 1, "temperature": 0, **ask}
        self.between = between
        self.stop, self.begun = threading.Event(), time.monotonic()
        self.seen, self.faults = [], []
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self, number: int) -> None:
        turn = 0
        try:
            while not self.stop.is_set():
                user = f"user-{number}-{turn}"
                turn += 1
                body = {"model": self.model, "messages": QUESTION, "user": user, **self.ask}
                answer = self.server.post("/v1/chat/completions", body)
                assert answer.status == 200, answer.body
                variant, answer_id = answer.headers.get("x-tidemill-variant"), answer.json()["id"]
                self.seen.append((user, variant, answer_id, time.monotonic() - self.begun))
                if self.opinion:
                    said = {"target": answer_id, "kind": "thumb", "value": self.opinion(variant, turn)}
                    assert self.server.post("/v1/feedback", said).status in (200, 201)
                self.stop.wait(self.between)
        except Exception as error:  # noqa: BLE001: whatever it is, the test must hear of it
            self.faults.append(error)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(PATIENCE)

    def users(self, variant: str) -> int:
        return len({user for user, seen, *_ in self.seen if seen == variant})


def until_over(server: Server, name: str, crowd: Crowd, seconds: float = 120) -> dict:
    def over() -> bool:
        assert not crowd.faults, crowd.faults
        return look(server, name)["ended_at"] is not None

    eventually(f"{name} is over: {look(server, name)['latest']}", over, seconds)
    return look(server, name)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The default model with two adapters that are as good as it, one that is noise, and an alias that leads to the first."""
    folder = tmp_path_factory.mktemp("rollouts")
    # Takes connections and never says a word.
    silent = socket.create_server(("127.0.0.1", 0), backlog=256)
    config = folder / "tidemill.toml"
    config.write_text(f"""
[upstreams.silent]
url = "http://127.0.0.1:{silent.getsockname()[1]}/v1"

[models.stalling]
upstreams = ["silent"]
first_token_timeout = "1s"
timeout = "1s"
retries = 0
""")
    with running(folder, {MODEL: default_model()}, "--config", str(config)) as server:
        for seed, (name, strength) in enumerate([("one", 1e-6), ("two", 1e-6), ("noise", 3.0)]):
            path = write_adapter(folder / name, seed, strength=strength)
            change(server, "/v1/adapters", {"name": name, "path": str(path)})
            change(server, f"/v1/adapters/{name}/serve")
        change(server, "/v1/adapter_aliases", {"alias": "assistant", "adapter": "one"})
        yield server
    silent.close()


def test_a_canary_ends_in_a_promotion_with_nobody_touching_it(server, tmp_path):
    spec = tmp_path / "canary.toml"
    spec.write_text("""
name = "better"
model = "assistant"
kind = "canary"
arms = [{ variant = "assistant" }, { variant = "two" }]
steps = [{ set_weight = 20 }, { pause = { samples = 15 } }, { set_weight = 50 }, { pause = "2s" }]
interval = 1
min_exposure = 20
tuning = 60

[[metrics]]
metric = "error_rate"
guardrail = { max = 0.2 }
min_samples = 10

[[metrics]]
metric = "feedback.thumb"
goal = { min = 0 }
min_samples = 20
""")
    assert "tidemill rollout status better --watch" in rollout(server, "start", spec)
    assert "better" in rollout(server, "list")
    # People like what is new, and of what there was every third answer.
    with Crowd(server, "assistant", opinion=lambda variant, turn: variant == "two" or turn % 3 == 0) as crowd:
        watched = rollout(server, "status", "better", "--watch")
        ended = until_over(server, "better", crowd)
        asked = len(crowd.seen)
    assert ended["status"] == "promoted", ended["latest"]
    decisions = [row["action"]["kind"] for row in ended["decisions"]]
    assert decisions[0] == "start" and decisions.count("step") == 3 and decisions[-1] == "promote"
    assert all(row["by"] is None for row in ended["decisions"][1:])
    took = ended["ended_at"] - ended["created_at"]
    print(f"\npromoted after {took} s and {asked} answers: {ended['latest']['reason']}\n{watched[-2500:]}")
    assert "two" in watched and "promote" in watched and "error_rate" in watched
    # The alias leads there: the registry, its list and the rollouts agree.
    assert server.get("/v1/adapters/assistant").json()["name"] == "two"
    for number in range(5):
        body = {"model": "assistant", "messages": QUESTION, "max_tokens": 1, "user": f"later-{number}"}
        assert server.post("/v1/chat/completions", body).status == 200
    assert "assistant" in {card["id"] for card in server.get("/v1/models").json()["data"]}
    metrics = server.get("/metrics").body.decode()
    for name in ["tidemill:rollout_decisions_total", "tidemill:rollout_share", "tidemill:rollout_exposed_units", "tidemill:rollout_metric",
                 "tidemill:variant_requests_total", "tidemill:rollout_leader"]:
        assert name in metrics, name


def test_a_broken_adapter_is_rolled_back_before_anybody_has_said_a_word(server):
    begin(server, name="broken", model=MODEL, kind="canary", arms=[{"variant": MODEL}, {"variant": "noise"}],
          steps=[{"set_weight": 25}, {"pause": "1h"}], metrics=[ERRORS, BROKEN])
    with Crowd(server, MODEL, max_tokens=24) as crowd:
        ended = until_over(server, "broken", crowd)
        exposed, seconds = crowd.users("noise"), ended["ended_at"] - ended["created_at"]
    assert (ended["status"], ended["latest"]["reason"]) == ("rolled_back", "the guardrail truncation_rate is broken"), ended["latest"]
    print(f"\na broken adapter: gone after {seconds} s, {exposed} users exposed of {len(crowd.seen)}")
    assert exposed <= 60
    with Crowd(server, MODEL, clients=2) as crowd:
        eventually("twenty answers", lambda: len(crowd.seen) >= 20)
    assert {variant for _, variant, *_ in crowd.seen} == {None}


def test_an_adapter_that_has_drifted_from_its_base_is_rolled_back_by_what_the_base_says(server):
    drifted = {"metric": "kl_to_base", "guardrail": {"max": 0.5}, "min_samples": 8, "share": 1}
    begin(server, name="drift", model=MODEL, kind="canary", arms=[{"variant": MODEL}, {"variant": "noise"}],
          steps=[{"set_weight": 50}, {"pause": "1h"}], metrics=[drifted])
    # One person after the other: between two of them the base has time for the answers.
    with Crowd(server, MODEL, clients=1, between=0.5, max_tokens=16, temperature=1) as crowd:
        ended = until_over(server, "drift", crowd)
        exposed, seconds = crowd.users("noise"), ended["ended_at"] - ended["created_at"]
    assert (ended["status"], ended["latest"]["reason"]) == ("rolled_back", "the guardrail kl_to_base is broken"), ended["latest"]
    judged = ended["latest"]["judgements"][0]
    print(f"\na drifted adapter: {judged['value']:.2f} nats per token from its base, gone after {seconds} s, {exposed} users exposed")
    assert server.metrics()["tidemill:base_scores_total"] >= 8

    # An adapter that has learnt next to nothing is where its base is.
    begin(server, name="still", model=MODEL, kind="canary", arms=[{"variant": MODEL}, {"variant": "one"}],
          steps=[{"set_weight": 50}], min_exposure=8, metrics=[drifted])
    with Crowd(server, MODEL, clients=1, between=0.5, max_tokens=16, temperature=1) as crowd:
        ended = until_over(server, "still", crowd)
    judged = ended["latest"]["judgements"][0]
    assert ended["status"] == "promoted" and abs(judged["value"]) < 0.05, ended["latest"]

    # One command takes the promotion back, and the next request is where it was before.
    assert "rolled back" in rollout(server, "rollback", "still")
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 1, "user": "after"}
    assert server.post("/v1/chat/completions", body).headers.get("x-tidemill-variant") is None
    assert "rollout is over" in rollout(server, "rollback", "still", status=1)


def test_a_variant_that_stalls_is_felt_by_nobody_for_long_and_rolled_back(server):
    begin(server, name="stall", model=MODEL, kind="canary", arms=[{"variant": MODEL}, {"variant": "stalling"}],
          steps=[{"set_weight": 25}, {"pause": "1h"}], metrics=[ERRORS])
    with Crowd(server, MODEL) as crowd:
        ended = until_over(server, "stall", crowd)
    assert (ended["status"], ended["latest"]["reason"]) == ("rolled_back", "the guardrail error_rate is broken"), ended["latest"]
    # Every one of them was answered, by what was there before.
    assert {variant for _, variant, *_ in crowd.seen} <= {MODEL, None}
    units = ended["latest"]["exposures"][1]
    print(f"\na stalling variant: gone after {ended['ended_at'] - ended['created_at']} s, {units} users waited a second")
    assert 2 <= units <= 40


def test_a_bandit_gives_the_better_arm_more(server):
    begin(server, name="bandit", model=MODEL, kind="bandit", arms=[{"variant": MODEL}, {"variant": "one"}, {"variant": "two"}], floor=0.1,
          metrics=[{"metric": "feedback.thumb", "goal": {"min": 0}, "min_samples": 20}], min_exposure=1000)

    def favours(variant: str) -> bool:
        shares = {arm["variant"]: arm["share"] for arm in look(server, "bandit")["arms"]}
        assert all(share >= 0.0999 for share in shares.values()), shares
        return shares[variant] > 0.6

    with Crowd(server, MODEL, opinion=lambda variant, turn: variant == "two" or turn % 4 == 0) as crowd:
        eventually("the better arm has most of the traffic", lambda: crowd.faults or favours("two"))
    assert not crowd.faults
    assert "reallocate" in {row["action"]["kind"] for row in look(server, "bandit")["decisions"]}
    assert "rolled back" in rollout(server, "rollback", "bandit")


def test_the_kill_switch_under_load(server):
    begin(server, name="kill", model=MODEL, kind="ab", arms=[{"variant": MODEL}, {"variant": "two"}],
          metrics=[{"metric": "feedback.thumb", "goal": {"min": 0}}])
    late = []
    with Crowd(server, MODEL) as crowd:
        eventually("both arms answer", lambda: min(crowd.users(MODEL), crowd.users("two")) >= 5)
        began = time.monotonic()
        said = json.loads(rollout(server, "rollback", "kill", "--json"))
        took = time.monotonic() - began
        assert said["status"] == "rolled_back" and said["servers"] == {"all": 1, "serving": 1}

        def ask(number: int) -> str | None:
            body = {"model": MODEL, "messages": QUESTION, "max_tokens": 1, "user": f"late-{number}"}
            return server.post("/v1/chat/completions", body).headers.get("x-tidemill-variant")

        with ThreadPoolExecutor(8) as pool:
            late = list(pool.map(ask, range(60)))
    assert not crowd.faults and set(late) == {None}
    print(f"\nthe kill switch under load was acknowledged after {1000 * took:.0f} ms, the command's start included")
    again = rollout(server, "resume", "kill", status=1)
    assert "the rollout is over" in again and "409" in again


@contextmanager
def two_gateways(tmp_path):
    """Two servers with the tiny model and its adapter on one Postgres; registered adapters are in a folder that they share."""
    postgres = Postgres()
    servers = []
    (tmp_path / "adapters").mkdir()
    try:
        for number in range(2):
            folder = tmp_path / f"gateway{number}"
            (folder / "data").mkdir(parents=True)
            (folder / "data" / "adapters").symlink_to(tmp_path / "adapters")
            arguments = ["--database", postgres.url, "--lora-modules", f"all={GOLDENS / 'llama' / 'adapters' / 'all'}"]
            servers.append(Server(folder, {"tiny": GOLDENS / "llama"}, *arguments).wait_ready())
        yield postgres, servers
    finally:
        for server in servers:
            server.kill()
        postgres.close()


def leads(server: Server) -> bool:
    return server.metrics().get("tidemill:rollout_leader") == 1


def complete(server: Server, user: str) -> str | None:
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2, "user": user})
    assert answer.status == 200, answer.body
    return answer.headers.get("x-tidemill-variant")


def test_two_gateways_on_one_postgres_decide_once_and_go_on_when_the_leader_is_killed(tmp_path):
    with two_gateways(tmp_path) as (postgres, servers):
        eventually("one of them leads", lambda: [leads(server) for server in servers].count(True) == 1)
        spec = {"model": "tiny", "arms": [{"variant": "tiny"}, {"variant": "all"}], "kind": "ab"}
        begin(servers[0], name="kill", **spec, metrics=[{"metric": "feedback.thumb", "goal": {"min": 0}}])
        users = [f"user-{number}" for number in range(40)]
        eventually("both assign", lambda: all(complete(server, "user-0") for server in servers))
        # They agree without talking.
        shown = [[complete(server, user) for user in users] for server in servers]
        assert shown[0] == shown[1] and set(shown[0]) == {"tiny", "all"}
        # The kill switch of one holds for the other when it is acknowledged.
        for turn in range(3):
            said = servers[turn % 2].post(f"/v1/rollouts/kill/{['pause', 'resume', 'rollback'][turn]}", b"").json()
            assert said["servers"] == {"all": 2, "serving": 2}, said
        assert {complete(server, user) for server in servers for user in users} == {None}

        begin(servers[1], name="goes-on", **{**spec, "kind": "canary"}, steps=[{"set_weight": 50}, {"pause": {"samples": 30}}], metrics=[ERRORS])
        leader = next(server for server in servers if leads(server))
        other = next(server for server in servers if server is not leader)
        eventually("the leader measures", lambda: look(other, "goes-on")["version"] >= 2)
        leader.kill()
        began = time.monotonic()
        version = look(other, "goes-on")["version"]
        eventually("the other one measures", lambda: look(other, "goes-on")["version"] > version)
        took = time.monotonic() - began
        for number in range(120):
            complete(other, f"later-{number}")
        eventually("it is promoted", lambda: look(other, "goes-on")["status"] == "promoted")
        assert leads(other)
        print(f"\nthe leader was killed; the other one had measured {took:.1f} s later")
        # One decision for each version, whoever made it.
        decisions = postgres.query("SELECT rollout_id || ' ' || version FROM rollout_decisions")
        assert len(decisions) == len(set(decisions))
        assert {complete(other, f"last-{number}") for number in range(10)} == {"all"}


def test_a_promotion_is_taken_back_at_every_gateway_with_its_alias(tmp_path):
    with two_gateways(tmp_path) as (_, servers):
        for name, files in [("a", "all"), ("b", "some")]:
            change(servers[0], "/v1/adapters", {"name": name, "path": str(GOLDENS / "llama" / "adapters" / files)})
            change(servers[0], f"/v1/adapters/{name}/serve")
        change(servers[0], "/v1/adapter_aliases", {"alias": "champion", "adapter": "a"})
        eventually("both know the alias", lambda: all("champion" in models(server) for server in servers))

        def said(server: Server, model: str) -> list[int]:
            body = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            answer = server.post("/v1/completions", body)
            assert answer.status == 200, answer.body
            return answer.json()["choices"][0]["token_ids"]

        def champions() -> list[list[int]]:
            return [said(server, "champion") for server in servers]

        def act(server: Server, name: str, wanted: str) -> None:
            answer = change(server, f"/v1/rollouts/{name}/{wanted}").json()
            assert answer["servers"] == {"all": 2, "serving": 2}, answer

        def compare(server: Server, name: str) -> None:
            begin(server, name=name, model="champion", kind="ab", arms=[{"variant": "champion"}, {"variant": "b"}],
                  metrics=[{"metric": "feedback.thumb", "goal": {"min": 0}}])

        before, after = said(servers[0], "a"), said(servers[0], "b")
        assert before != after
        for turn, name in enumerate(["there", "and-back"]):
            # Begun, promoted and taken back by one and the other in turn; each holds for both from the next request on.
            compare(servers[turn], name)
            act(servers[1 - turn], name, "promote")
            assert champions() == [after, after]
            act(servers[turn], name, "rollback")
            assert champions() == [before, before]
        compare(servers[0], "below")
        act(servers[0], "below", "promote")
        begin(servers[1], name="above", model="champion", kind="ab", arms=[{"variant": "champion"}, {"variant": "a"}],
              metrics=[{"metric": "feedback.thumb", "goal": {"min": 0}}])
        refused = servers[0].post("/v1/rollouts/below/rollback", b"")
        assert refused.status == 409 and "`above` runs on `champion`" in refused.json()["error"]["message"], refused.body
        act(servers[0], "above", "rollback")
        act(servers[1], "below", "rollback")
        assert champions() == [before, before]
