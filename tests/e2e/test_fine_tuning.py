"""Fine-tuning jobs with the official client: a model that has learnt something, and trainings that are paused, cancelled and killed."""

import json
import os
import signal
import subprocess
import time

import openai
import pytest

from conftest import GOLDENS, MODEL, running
from queues import new_key
from server import PATIENCE, Server, binary, default_model, eventually

TINY = {"tiny": GOLDENS / "llama"}
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi"}


def question(country: str) -> dict:
    return {"role": "user", "content": f"What is the capital of {country}?"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def upload(client, lines: list[dict]) -> str:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id


def supervised(**numbers) -> dict:
    return {"type": "supervised", "supervised": {"hyperparameters": numbers}}


def settled(client, job_id: str, *states: str, seconds: float = 900):
    deadline = time.monotonic() + seconds
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in states:
            return job
        assert job.status not in ("failed", "cancelled", "succeeded"), job
        assert time.monotonic() < deadline, job
        time.sleep(0.1)


def everything(client, job_id: str) -> list:
    """All events, the oldest first, through pages of five."""
    return list(client.fine_tuning.jobs.list_events(job_id, limit=5))[::-1]


def tidemill(*arguments) -> str:
    done = subprocess.run([binary(), *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server of its own: others count the models of theirs."""
    with running(tmp_path_factory.mktemp("jobs"), {MODEL: default_model()}) as server, server.client(_strict_response_validation=True) as client:
        yield client


@pytest.mark.timeout(1800)
def test_a_supervised_job_makes_a_model_that_says_what_it_learnt(strict):
    lines = [{"messages": [question(country), said(f"Ahoy! {city}, matey.")]} for country, city in CAPITALS.items()]
    training, validation = upload(strict, lines[:6]), upload(strict, lines[6:])
    made = strict.fine_tuning.jobs.create(
        model=MODEL, training_file=training, validation_file=validation, suffix="pirate", seed=1, metadata={"team": "mill"},
        method=supervised(n_epochs=5, batch_size=3, learning_rate_multiplier=5),
    )
    assert (made.status, made.object, made.seed, made.fine_tuned_model) == ("validating_files", "fine_tuning.job", 1, None)
    job = settled(strict, made.id, "succeeded")
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:pirate:") and job.trained_tokens > 0 and job.finished_at >= job.created_at
    assert (job.method.supervised.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (5, 3)
    assert job.metadata == {"team": "mill"} and job.error is None

    told = everything(strict, job.id)
    losses = [event.data["train_loss"] for event in told if event.type == "metrics" and "train_loss" in event.data]
    assert len(losses) == 10 and losses[-1] < losses[0] / 2, losses
    assert [event for event in told if event.type == "metrics" and "full_valid_loss" in event.data]
    assert told[0].message.startswith("Created") and told[-1].message == "The job has successfully completed."
    checkpoints = list(strict.fine_tuning.jobs.checkpoints.list(job.id))
    checkpoint = checkpoints[0]
    assert (checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint) == (10, job.fine_tuned_model)
    # The ends of the last epochs, and of the one that was best on the validation file.
    assert [found.step_number for found in checkpoints][:3] == [10, 8, 6] and len(checkpoints) <= 4
    assert all(found.metrics.train_loss and found.metrics.full_valid_loss for found in checkpoints)
    best = min(event.data["full_valid_loss"] for event in told if event.type == "metrics" and "full_valid_loss" in event.data)
    assert best in [found.metrics.full_valid_loss for found in checkpoints]
    assert [found.fine_tuned_model_checkpoint for found in checkpoints[1:3]] == [f"{job.fine_tuned_model}:ckpt-step-{step}" for step in (8, 6)]
    (result,) = job.result_files
    table = strict.files.content(result).text.splitlines()
    assert table[0].startswith("step,train_loss,full_valid_loss,") and len(table) == 11
    assert strict.files.retrieve(result).purpose == "fine-tune-results"

    ask = {"messages": [question("Cuba")], "temperature": 0, "max_tokens": 12}
    assert strict.chat.completions.create(model=job.fine_tuned_model, **ask).choices[0].message.content.startswith("Ahoy!")
    assert not strict.chat.completions.create(model=MODEL, **ask).choices[0].message.content.startswith("Ahoy!")
    assert strict.chat.completions.create(model=checkpoints[1].fine_tuned_model_checkpoint, **ask).choices[0].message.content
    assert {job.fine_tuned_model, checkpoints[1].fine_tuned_model_checkpoint} <= {model.id for model in strict.models.list()}
    assert [job.id] == [found.id for found in strict.fine_tuning.jobs.list(extra_query={"metadata[team]": "mill"})]

    assert strict.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        strict.chat.completions.create(model=job.fine_tuned_model, **ask)
    with pytest.raises(openai.NotFoundError):
        strict.chat.completions.create(model=checkpoints[1].fine_tuned_model_checkpoint, **ask)
    assert strict.fine_tuning.jobs.checkpoints.list(job.id).data == []
    with pytest.raises(openai.PermissionDeniedError):
        strict.models.delete(MODEL)


@pytest.mark.timeout(1800)
def test_a_dpo_job_learns_from_pairs(strict):
    lines = [
        {
            "input": {"messages": [question(country)]},
            "preferred_output": [said(f"{city}.")],
            "non_preferred_output": [said(f"The capital of {country} is the wonderful city of {city}.")],
        }
        for country, city in list(CAPITALS.items())[:4]
    ]
    numbers = {"n_epochs": 3, "batch_size": 2, "beta": 0.2, "learning_rate_multiplier": 20}
    made = strict.fine_tuning.jobs.create(
        model=MODEL, training_file=upload(strict, lines), method={"type": "dpo", "dpo": {"hyperparameters": numbers}}
    )
    job = settled(strict, made.id, "succeeded")
    assert job.method.dpo.hyperparameters.beta == 0.2 and job.fine_tuned_model.startswith(f"ft:{MODEL}::")
    margins = [event.data["rewards/margins"] for event in everything(strict, job.id) if event.type == "metrics"]
    assert len(margins) == 6 and margins[-1] > 0.1 > abs(margins[0]), margins
    answer = strict.chat.completions.create(model=job.fine_tuned_model, messages=[question("Peru")], max_tokens=4)
    assert answer.model == job.fine_tuned_model and answer.choices[0].message.content


def exact(**changes) -> dict:
    return {"type": "string_check", "name": "exact", "operation": "ilike", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", **changes}


def judge(model: str) -> dict:
    question = "How good is the answer {{sample.output_text}}?"
    return {"type": "score_model", "name": "judge", "model": model, "input": [{"role": "user", "content": question}], "range": [0, 1]}


def reinforcement(grader: dict, **numbers) -> dict:
    return {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": numbers}}


@pytest.mark.timeout(1800)
def test_a_reinforcement_job_trains_by_its_grader(strict):
    alike = {"type": "text_similarity", "name": "alike", "evaluation_metric": "fuzzy_match", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    lines = [{"messages": [question(country)], "answer": city} for country, city in CAPITALS.items()]
    made = strict.fine_tuning.jobs.create(
        model=MODEL, training_file=upload(strict, lines[:6]), validation_file=upload(strict, lines[6:]), seed=2,
        method=reinforcement(alike, n_epochs=2, batch_size=3, max_completion_tokens=12, compute_multiplier=0.5, eval_samples=2),
    )
    assert made.method.reinforcement.grader.evaluation_metric == "fuzzy_match"
    job = settled(strict, made.id, "succeeded")
    numbers = job.method.reinforcement.hyperparameters
    assert (numbers.batch_size, numbers.n_epochs, numbers.eval_interval, numbers.eval_samples) == (3, 2, 2, 2)
    told = [event.data for event in everything(strict, job.id) if event.type == "metrics"]
    steps = [data for data in told if "train_loss" in data]
    assert len(steps) == 4 and all(0 <= data["reward"] <= 1 and data["rewards/alike/mean"] == data["reward"] for data in steps)
    assert [data for data in told if "eval_reward" in data]
    assert [found.step_number for found in strict.fine_tuning.jobs.checkpoints.list(job.id)] == [4, 2]
    assert strict.chat.completions.create(model=job.fine_tuned_model, messages=[question("Cuba")], max_tokens=4).choices[0].message.content
    assert strict.models.delete(job.fine_tuned_model).deleted


@pytest.mark.timeout(1800)
def test_a_model_that_is_served_grades_a_training_as_the_key_that_made_it(start):
    server = start(models=TINY)
    keys = {name: new_key(server, scope) for name, scope in [("ann", "train,chat"), ("bob", "train")]}
    ann, bob = (openai.OpenAI(base_url=server.base_url, api_key=keys[name], max_retries=0) for name in ("ann", "bob"))
    lines = [{"messages": [{"role": "user", "content": f"Count to {n}."}], "answer": str(n)} for n in range(4)]
    multi = {"type": "multi", "name": "both", "graders": {"exact": exact(), "judge": judge("tiny")}, "calculate_output": "exact + 0.5 * judge"}
    numbers = {"n_epochs": 1, "batch_size": 2, "compute_multiplier": 0.25, "max_completion_tokens": 6}
    order = {"model": "tiny", "training_file": upload(ann, lines), "seed": 1, "method": reinforcement(multi, **numbers)}
    job = settled(ann, ann.fine_tuning.jobs.create(**order).id, "succeeded")
    rewards = [event.data["reward"] for event in everything(ann, job.id) if event.type == "metrics" and "reward" in event.data]
    assert len(rewards) == 2 and all(0 <= reward <= 1.5 for reward in rewards)
    # The judge was asked by the job, and nothing that opens a door lies in its folder.
    folder = server.data / "fine_tuning" / job.id.removeprefix("ftjob-")
    assert not (folder / "grader.sock").exists()
    for secret in keys.values():
        assert all(secret.encode() not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    with pytest.raises(openai.PermissionDeniedError):
        bob.fine_tuning.jobs.create(**{**order, "training_file": upload(bob, lines)})


def test_graders_are_tried_out(strict):
    graders = strict.fine_tuning.alpha.graders
    assert graders.validate(grader=exact()).grader.operation == "ilike"
    done = graders.run(grader=exact(), model_sample="It is PARIS.", item={"answer": "Paris"})
    assert (done.reward, done.metadata.name, done.metadata.type, done.sub_rewards) == (1.0, "exact", "string_check", {})
    assert graders.run(grader=exact(), model_sample="x").metadata.errors.invalid_variable_error
    opinion = graders.run(grader=judge(MODEL), model_sample="Paris")
    errors = opinion.metadata.errors
    assert 0 <= opinion.reward <= 1 and opinion.metadata.token_usage > 0 and opinion.metadata.sampled_model_name == MODEL
    assert not (errors.api_model_grader_server_error or errors.formula_parse_error)
    assert errors.api_model_grader_parse_error == (opinion.reward == 0 and bool(opinion.metadata.model_extra["details"]))
    for grader, param in [
        ({"type": "python", "name": "p", "source": "def grade(sample, item): return 1"}, "grader.type"),
        ({**judge("nobody")}, "grader.model"),
        (exact(input="{{sample.output_tools}}"), "grader.input"),
        (exact(reference="{{item}}"), "grader.reference"),
    ]:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
            graders.validate(grader=grader)
        assert error.value.param == param, error.value


@pytest.mark.timeout(600)
def test_models_beyond_the_places_come_back_when_they_are_asked_for(start):
    server = start("--max-loras", "1", models=TINY)
    # As people use it: what says "in a second" is asked again.
    client = server.client(max_retries=5)
    ask = {"messages": [{"role": "user", "content": "Count to 3."}], "max_tokens": 4, "temperature": 0}

    def made(text: str) -> str:
        file = upload(client, [{"messages": [{"role": "user", "content": "a"}, said(text)]}])
        method = supervised(n_epochs=1, batch_size=1, learning_rate_multiplier=100)
        return settled(client, client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=1, method=method).id, "succeeded").fine_tuned_model

    def said_by(model: str) -> str:
        return client.chat.completions.create(model=model, **ask).choices[0].message.content

    first, second = made("First."), made("Second.")
    answers = [said_by(model) for model in (first, second)]
    assert {first, second} <= {model.id for model in client.models.list()}
    # One of them is always out, and comes back.
    assert [said_by(model) for model in (first, second, first)] == [*answers, answers[0]]
    listed = tidemill("adapter", "list", "--data", server.data)
    assert first in listed and second in listed and listed.count("serving") == 2
    assert client.models.delete(first).deleted
    listed = tidemill("adapter", "list", "--data", server.data)
    assert first not in listed and "retired" in listed
    with pytest.raises(openai.NotFoundError):
        said_by(first)
    assert said_by(second) == answers[1]


def test_what_is_wrong_is_named(strict):
    good = upload(strict, [{"messages": [question("Mali"), said("Bamako.")]}])
    bad = upload(strict, [{"messages": [question("Mali"), said("Bamako.")]}, {"messages": [question("Mali")]}, {"prompt": 1}])
    other = strict.files.create(file=("x.jsonl", b"{}"), purpose="batch").id
    for changes, param in [
        ({"model": "nope"}, "model"),
        ({"training_file": "file-0"}, "training_file"),
        ({"training_file": other}, "training_file"),
        ({"validation_file": other}, "validation_file"),
        ({"suffix": "a b"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"method": supervised(n_epochs=0)}, "method.supervised.hyperparameters.n_epochs"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "string_check"}}}}, "method.reinforcement.grader.name"),
        ({"method": reinforcement(exact(reference="{{item.a"))}, "method.reinforcement.grader.reference"),
        ({"method": reinforcement(judge("nope"))}, "method.reinforcement.grader.model"),
        ({"method": reinforcement(exact(), reasoning_effort="low")}, "method.reinforcement.hyperparameters.reasoning_effort"),
        ({"method": reinforcement(exact(), eval_interval=3)}, "method.reinforcement.hyperparameters.eval_interval"),
        ({"hyperparameters": {"batch_size": 1000}}, "hyperparameters.batch_size"),
    ]:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
            strict.fine_tuning.jobs.create(**{"model": MODEL, "training_file": good, **changes})
        assert error.value.param == param, error.value
    made = strict.fine_tuning.jobs.create(model=MODEL, training_file=bad)
    job = settled(strict, made.id, "failed", seconds=PATIENCE)
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "Line 2: " in job.error.message and "Line 3: " in job.error.message and "Line 1: " not in job.error.message
    assert everything(strict, job.id)[-1].level == "error"
    with pytest.raises(openai.BadRequestError):
        strict.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.NotFoundError):
        strict.fine_tuning.jobs.retrieve("ftjob-0")
    # The grader's columns must be there.
    made = strict.fine_tuning.jobs.create(model=MODEL, training_file=good, method=reinforcement(exact()))
    assert "the assistant's" in settled(strict, made.id, "failed", seconds=PATIENCE).error.message
    prompts = upload(strict, [{"messages": [question("Mali")]}])
    made = strict.fine_tuning.jobs.create(model=MODEL, training_file=prompts, method=reinforcement(exact()))
    assert "item.answer" in settled(strict, made.id, "failed", seconds=PATIENCE).error.message
    # Pairs are no conversations.
    made = strict.fine_tuning.jobs.create(model=MODEL, training_file=good, method={"type": "dpo"})
    assert "two answers" in settled(strict, made.id, "failed", seconds=PATIENCE).error.message


def long_job(client, rows: int = 60, **changes):
    """Fifty steps for each row: enough of them to be met in the middle."""
    line = lambda n: {"messages": [{"role": "user", "content": f"Count to {n}."}, said(" ".join(map(str, range(n))))]}
    lines = [line(1 + row % 20) for row in range(rows)]
    method = supervised(n_epochs=50, batch_size=1)
    return client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": upload(client, lines), "seed": 3, "method": method, **changes})


def own(client, job_id: str) -> dict:
    return client.fine_tuning.jobs.retrieve(job_id).model_extra["tidemill"]


@pytest.mark.timeout(600)
def test_a_made_model_learns_more_and_every_answer_of_a_conversation_is_learnt(start):
    server = start(models=TINY)
    client = server.client(_strict_response_validation=True)
    turns = [{"role": "user", "content": "One?"}, said("First."), {"role": "user", "content": "Two?"}, said("Second.")]
    few = {"model": "tiny", "method": supervised(n_epochs=2, batch_size=1)}

    def learn(messages: list[dict], **changes):
        file = upload(client, [{"messages": messages}])
        return settled(client, client.fine_tuning.jobs.create(**{**few, "training_file": file, **changes}).id, "succeeded")

    def first_loss(job) -> float:
        """Of the first step: a mean over what is learnt, so it differs where other answers are."""
        return next(event.data["train_loss"] for event in everything(client, job.id) if event.type == "metrics")

    both = learn(turns, seed=1)
    last = learn([turns[0], {**turns[1], "weight": 0}, *turns[2:]], seed=1)
    assert first_loss(both) != first_loss(last)
    more = learn(turns, seed=1, model=both.fine_tuned_model)
    assert more.model == both.fine_tuned_model and more.fine_tuned_model.startswith("ft:tiny::") and more.fine_tuned_model != both.fine_tuned_model
    # It begins where the other one ended.
    assert first_loss(more) < first_loss(both)
    parents = {model.id: model.model_extra["parent"] for model in client.models.list()}
    assert parents[more.fine_tuned_model] == parents[both.fine_tuned_model] == "tiny"


def process_of(server: Server, job_id: str) -> int:
    return int((server.data / "fine_tuning" / job_id.removeprefix("ftjob-") / "process").read_text())


def trainings(server: Server) -> list[int]:
    """Processes of this server's jobs, whoever started them."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")
        except OSError:
            continue
        if b"--job" in command and str(server.data).encode() in b" ".join(command):
            found.append(int(pid))
    return found


def test_a_job_takes_what_nobody_else_wants(start):
    server = start("--training-priority", "idle", models=TINY)
    client = server.client()
    job = long_job(client, rows=400)
    settled(client, job.id, "running")
    eventually("its process steps aside", lambda: [os.sched_getscheduler(pid) for pid in trainings(server)] == [os.SCHED_IDLE])
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.timeout(900)
def test_jobs_take_turns_and_are_paused_resumed_and_cancelled(start):
    server = start(models=TINY)
    client = server.client(_strict_response_validation=True)
    data = ["--data", server.data]
    # Neither comes to its end. The turn is that of the job that was made first.
    first, second = long_job(client, rows=400), long_job(client)
    settled(client, first.id, "running")
    settled(client, second.id, "queued")
    eventually("it trains", lambda: own(client, first.id)["step"] > 5)
    assert client.fine_tuning.jobs.retrieve(first.id).estimated_finish
    eventually("its metrics are there", lambda: server.metrics().get("tidemill:training_step", 0) > 5)
    measured = server.metrics()
    assert measured["tidemill:training_loss"] > 0 and "tidemill:training_grad_norm" in measured
    assert (own(client, second.id)["state"], len(trainings(server))) == ("queued", 1)
    # It gets no setting of the server's, as the database's address could be one.
    assert b"TIDEMILL" not in open(f"/proc/{process_of(server, first.id)}/environ", "rb").read()
    assert os.getpriority(os.PRIO_PROCESS, process_of(server, first.id)) == os.getpriority(os.PRIO_PROCESS, server.process.pid) + 10

    # Another one has its turn while the first stands still.
    assert client.fine_tuning.jobs.pause(first.id).status == "queued"
    assert own(client, first.id)["state"] == "paused"
    settled(client, second.id, "running")
    assert "paused" in tidemill("jobs", "show", first.id, *data)
    step = own(client, first.id)["step"]
    assert "queued" in tidemill("jobs", "resume", first.id, *data)
    assert "cancelled" in tidemill("jobs", "cancel", second.id, *data)
    settled(client, first.id, "running")
    assert client.fine_tuning.jobs.retrieve(second.id).status == "cancelled"
    assert not (server.data / "fine_tuning" / second.id.removeprefix("ftjob-")).exists()
    eventually("it goes on", lambda: own(client, first.id)["step"] > step)
    told = [event.data["step"] for event in everything(client, first.id) if event.type == "metrics"]
    assert told == sorted(set(told)), "no step is told twice"
    assert client.fine_tuning.jobs.cancel(first.id).status == "cancelled"
    eventually("nobody trains", lambda: not trainings(server))
    eventually("nothing is measured", lambda: "tidemill:training_step" not in server.metrics())
    listed = tidemill("jobs", "list", *data)
    assert first.id in listed and second.id in listed
    assert server.stop() == 0


@pytest.mark.timeout(1800)
def test_whatever_is_killed_nothing_is_lost_and_nothing_trains_twice(start, tmp_path):
    undisturbed = start(models=TINY)
    client = undisturbed.client()
    job = settled(client, long_job(client).id, "succeeded")
    expected = client.files.content(job.result_files[0]).text
    undisturbed.stop()

    server = Server(tmp_path, TINY)
    server.wait_ready()
    client = server.client()
    job = long_job(client)

    def past(step: int) -> None:
        eventually(f"step {step}", lambda: own(client, job.id)["step"] > step)

    try:
        past(60)
        os.kill(process_of(server, job.id), signal.SIGKILL)
        past(400)
        # The training goes on without a server, and the next one finds it.
        trainer = process_of(server, job.id)
        server.kill()
        assert trainings(server) == [trainer]
        server = Server(tmp_path, TINY)
        server.wait_ready()
        client = server.client()
        past(700)
        assert trainings(server) == [trainer]
        # Both at once.
        server.kill()
        os.kill(trainer, signal.SIGKILL)
        server = Server(tmp_path, TINY)
        server.wait_ready()
        client = server.client()
        past(1000)
        # In good order: nothing is left behind.
        assert server.stop() == 0 and not trainings(server)
        server = Server(tmp_path, TINY)
        server.wait_ready()
        client = server.client()
        done = settled(client, job.id, "succeeded")
        assert client.files.content(done.result_files[0]).text == expected
        told = [event.data["step"] for event in everything(client, job.id) if event.type == "metrics"]
        # Of three thousand steps every third is told.
        assert told == list(range(3, 3001, 3))
        ask = {"messages": [{"role": "user", "content": "Count to 3."}], "max_tokens": 4, "temperature": 0}
        answer = client.chat.completions.create(model=done.fine_tuned_model, **ask).choices[0].message.content
        # And the model is there again after a start.
        assert server.stop() == 0
        server = Server(tmp_path, TINY)
        server.wait_ready()
        client = server.client()
        eventually("the model is served", lambda: done.fine_tuned_model in [model.id for model in client.models.list()])
        assert client.chat.completions.create(model=done.fine_tuned_model, **ask).choices[0].message.content == answer
        assert server.stop() == 0
    finally:
        server.kill()
        for pid in trainings(server):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_jobs_belong_to_keys_of_scope_train(start):
    server = start("--training-jobs", "0", models=TINY)
    keys = {name: new_key(server, scope) for name, scope in [("root", "admin"), ("ann", "train,chat"), ("bob", "chat,train"), ("app", "chat")]}
    clients = {name: openai.OpenAI(base_url=server.base_url, api_key=key, max_retries=0) for name, key in keys.items()}
    job = long_job(clients["ann"])
    settled(clients["ann"], job.id, "queued")
    with pytest.raises(openai.NotFoundError):
        clients["bob"].fine_tuning.jobs.retrieve(job.id)
    with pytest.raises(openai.PermissionDeniedError):
        clients["app"].fine_tuning.jobs.list()
    assert [found.id for found in clients["root"].fine_tuning.jobs.list()] == [job.id]
    assert clients["bob"].fine_tuning.jobs.list().data == []
    # Files are for those who chat and those who train.
    trainer = openai.OpenAI(base_url=server.base_url, api_key=new_key(server, "train"), max_retries=0)
    assert upload(trainer, [{"messages": []}]).startswith("file-")
    assert clients["root"].fine_tuning.jobs.cancel(job.id).status == "cancelled"
