"""What was acknowledged is there: after kill -9, and after a database that was away."""

import os
import random
import threading
import time

import pytest

from conftest import GOLDENS
from judging import Sender, bare, rows
from postgres import Postgres
from server import PATIENCE, Server

TINY = {"tiny": GOLDENS / "llama"}
LONG = os.environ.get("TIDEMILL_LONG_TESTS") == "1"
KILLS = 50
OUTAGE_SECONDS = 60 if LONG else 20


def complete(server, **options):
    return server.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 4, **options})


@pytest.mark.timeout(900)
def test_kill_9_fifty_times_loses_and_doubles_nothing(tmp_path):
    chance = random.Random(3)
    target, acknowledged, seconds = None, [], 0.0
    for kill in range(KILLS):
        server = Server(tmp_path, TINY)
        try:
            server.wait_ready()
            if target is None:
                target = complete(server).json()["id"]
            stop = threading.Event()
            begin = time.monotonic()
            senders = [Sender(server.port, target, f"{kill}-{number}", stop) for number in range(16)]
            time.sleep(chance.uniform(0.1, 1.2))
        finally:
            server.process.kill()
            server.process.wait()
        seconds += time.monotonic() - begin
        for sender in senders:
            sender.join(PATIENCE)
            assert not sender.refused, sender.refused[0]
            acknowledged += sender.acknowledged
    # One more start replays what waited on disk; its end makes all of it durable.
    server = Server(tmp_path, TINY)
    try:
        server.wait_ready()
        assert server.stop() == 0, server.log()
    finally:
        server.kill()
    kept = {row["id"]: row["value"].strip('"') for row in rows(server.data, "SELECT id, value FROM feedback")}
    rate = len(acknowledged) / seconds
    print(f"\n{len(acknowledged)} acknowledged in {KILLS} rounds, {rate:.0f} per second; {len(kept)} kept")
    missing = [entry for entry in acknowledged if kept.get(entry[0]) != entry[1]]
    assert not missing, f"{len(missing)} of {len(acknowledged)} acknowledged are missing, such as {missing[:3]}"
    assert len(set(kept.values())) == len(kept), "a feedback is there twice"
    # Two cores that do nothing else give well above 2,000; busy ones less, but each round must have been under load.
    assert len(acknowledged) > 20 * KILLS


class Asker(threading.Thread):
    """Asks one completion after another and notes every id and every refusal."""

    def __init__(self, server, stop: threading.Event):
        super().__init__(daemon=True)
        self.server, self.stop_flag = server, stop
        self.ids: list[str] = []
        self.refused: list[bytes] = []
        self.slowest = 0.0
        self.start()

    def run(self) -> None:
        while not self.stop_flag.is_set():
            begin = time.monotonic()
            answer = complete(self.server)
            self.slowest = max(self.slowest, time.monotonic() - begin)
            if answer.status == 200:
                self.ids.append(answer.json()["id"])
            else:
                self.refused.append(answer.body)


def test_the_database_may_be_away_under_load(tmp_path):
    postgres = Postgres()
    server = Server(tmp_path, TINY, "--database", postgres.url)
    try:
        server.wait_ready()
        target = complete(server).json()["id"]
        stop = threading.Event()
        askers = [Asker(server, stop) for _ in range(4)]
        senders = [Sender(server.port, target, f"s{number}", stop) for number in range(4)]
        time.sleep(2)
        postgres.stop()
        before = [len(asker.ids) for asker in askers]
        time.sleep(OUTAGE_SECONDS)
        during = [len(asker.ids) for asker in askers]
        postgres.start()
        time.sleep(5)
        stop.set()
        for thread in askers + senders:
            thread.join(PATIENCE)
            assert not thread.refused, thread.refused[0]
        # One that waited for the database as long as feedback does would come to one in five seconds.
        assert all(later - earlier > OUTAGE_SECONDS / 4 for earlier, later in zip(before, during)), "requests must go on"
        answers = {bare(answer_id) for asker in askers for answer_id in asker.ids} | {bare(target)}
        feedback = {feedback_id for sender in senders for feedback_id, _ in sender.acknowledged}
        print(f"\n{len(answers)} answers, {len(feedback)} feedback; slowest request {max(a.slowest for a in askers):.2f} s")
        deadline = time.monotonic() + 60
        while True:
            kept = postgres.query("SELECT id FROM inferences")
            judged = postgres.query("SELECT id FROM feedback")
            if len(kept) >= len(answers) and len(judged) >= len(feedback):
                break
            assert time.monotonic() < deadline, f"{len(kept)} of {len(answers)} answers, {len(judged)} of {len(feedback)} feedback"
            time.sleep(0.5)
        assert (set(kept), set(judged)) == (answers, feedback)
        assert (len(kept), len(judged)) == (len(answers), len(feedback)), "something is there twice"
        choices = postgres.query("SELECT COUNT(*), COUNT(DISTINCT inference_id) FROM choices")
        assert choices == [f"{len(answers)}|{len(answers)}"]
        assert server.stop() == 0, server.log()[-3000:]
    finally:
        server.kill()
        postgres.close()
