"""Rows of fine-tuning jobs."""

from openai.types.fine_tuning import FineTuningJob
from openai.types.fine_tuning.alpha import GraderRunParams, GraderRunResponse, GraderValidateParams, GraderValidateResponse
from openai.types.fine_tuning.job_create_params import JobCreateParams
from openai.types.fine_tuning.job_list_params import JobListParams

from compatibility import Endpoint, honoured, rejected
from compatibility.effects import holds
from conftest import MODEL


def supervised(**numbers) -> dict:
    return {"type": "supervised", "supervised": {"hyperparameters": numbers}}


def dpo(**numbers) -> dict:
    return {"type": "dpo", "dpo": {"hyperparameters": numbers}}


METRICS = ["fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_l"]
GRADER = {"type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"}


def reinforcement(**numbers) -> dict:
    return {"type": "reinforcement", "reinforcement": {"hyperparameters": numbers, "grader": GRADER}}


def multi(formula: str) -> dict:
    return {"type": "multi", "name": "m", "calculate_output": formula, "graders": {"exact": GRADER}}


def alike(metric: str) -> dict:
    return {"type": "text_similarity", "evaluation_metric": metric, "name": "s", "input": "{{sample.output_text}}", "reference": "tide"}


def judge(**changes) -> dict:
    return {"type": "score_model", **changes, "name": "j", "model": changes.get("model", MODEL), "input": [{"role": "user", "content": "{{sample.output_text}}"}]}


def has(**fields):
    return holds(lambda body: fields.items() <= body.items())


# The file's id is put in by the test; its lines are none that could be trained on, so that what is asked for is not done.
JOBS = Endpoint(
    "POST", "/v1/fine_tuning/jobs", {"model": MODEL, "training_file": "{file}"},
    [
        honoured("model", MODEL, has(model=MODEL, fine_tuned_model=None)),
        rejected("model", "nope", "404: not served"),
        honoured("training_file", "{file}", holds(lambda body: body["training_file"].startswith("file-"))),
        rejected("training_file", "file-0", "one that is not there"),
        honoured("validation_file", "{file}", holds(lambda body: body["validation_file"].startswith("file-"))),
        honoured("method", supervised(n_epochs=2), holds(lambda body: body["hyperparameters"]["n_epochs"] == 2)),
        honoured("method", dpo(beta=0.3, batch_size="auto"), holds(lambda body: body["method"]["dpo"]["hyperparameters"]["beta"] == 0.3)),
        rejected("method", dpo(beta=3), "above 0, up to 2"),
        rejected("method", supervised(n_epochs=51), "1–50"),
        honoured(
            "method", reinforcement(n_epochs=2, compute_multiplier=0.5),
            holds(lambda body: body["method"]["reinforcement"]["grader"] == GRADER and body["hyperparameters"]["n_epochs"] == 2),
        ),
        rejected("method", {"type": "reinforcement", "reinforcement": {"grader": {"type": "python", "name": "p", "source": "x"}}}, "runs no code of clients"),
        rejected("method", reinforcement(reasoning_effort="high"), "the models have no such setting"),
        rejected("method", reinforcement(eval_samples=2), "without a `validation_file`"),
        honoured("hyperparameters", {"batch_size": 4}, holds(lambda body: body["hyperparameters"]["batch_size"] == 4), "older; for `supervised`"),
        rejected("hyperparameters", {"batch_size": 257}, "1–256"),
        rejected("hyperparameters", {"learning_rate_multiplier": 0}, "above 0, up to 100"),
        honoured("suffix", "shop-1.2", has(user_provided_suffix="shop-1.2")),
        rejected("suffix", "x" * 65, "at most 64 characters"),
        rejected("suffix", "a b", "letters, digits, `-`, `_`, `.`"),
        honoured("seed", 7, has(seed=7)),
        rejected("seed", -1, "0–2,147,483,647"),
        honoured("metadata", {"team": "mill"}, has(metadata={"team": "mill"})),
        honoured("integrations", [], has(integrations=[])),
        rejected("integrations", [{"type": "wandb", "wandb": {"project": "p"}}], "no services of others"),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(JobCreateParams.__annotations__), answer=FineTuningJob,
)

GRADE = Endpoint(
    "POST", "/v1/fine_tuning/alpha/graders/run", {"grader": GRADER, "model_sample": "tide", "item": {"answer": "tide"}},
    [
        honoured("grader", GRADER, has(reward=1.0)),
        honoured("grader", multi("2 * exact - min(exact, 0.5)"), has(reward=1.5, sub_rewards={"exact": 1.0})),
        *[honoured("grader", alike(metric), holds(lambda body: 0 < body["reward"] <= 1)) for metric in METRICS],
        rejected("grader", alike("cosine"), "embeddings are not compared"),
        honoured("grader", judge(), holds(lambda body: body["metadata"]["token_usage"] > 0)),
        rejected("grader", judge(range=[1, 0]), "the smaller one first"),
        rejected("grader", judge(model="nope"), "404: not served"),
        rejected("grader", multi("exact +"), "a formula"),
        rejected("grader", multi("other"), "names that are graders"),
        rejected("grader", {"input": "{{sample.output_tools}}", **{key: value for key, value in GRADER.items() if key != "input"}}, "`sample.output_text`, `sample.output_json`"),
        rejected("grader", {"reference": "{{answer}}", **{key: value for key, value in GRADER.items() if key != "reference"}}, "`item.…` or `sample.…`"),
        honoured("model_sample", "ebb", has(reward=0.0)),
        honoured("item", {"answer": "ebb"}, has(reward=0.0)),
        rejected("item", "tide", "an object"),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(GraderRunParams.__annotations__), answer=GraderRunResponse,
)

VALIDATE = Endpoint(
    "POST", "/v1/fine_tuning/alpha/graders/validate", {"grader": GRADER},
    [
        honoured("grader", GRADER, has(grader=GRADER)),
        rejected("grader", {"type": "string_check"}, "every field is needed"),
        rejected("nonsense", 1, "any unknown field"),
    ],
    frozenset(GraderValidateParams.__annotations__), answer=GraderValidateResponse,
)

JOB_LIST = Endpoint(
    "GET", "/v1/fine_tuning/jobs", {},
    [
        honoured("limit", 1, holds(lambda body: len(body["data"]) <= 1)),
        rejected("limit", 101, "1–100"),
        rejected("after", "ftjob-0", "not the id of a job"),
        honoured("metadata[team]", "nobody", holds(lambda body: body["data"] == [])),
    ],
    frozenset(JobListParams.__annotations__), how="query",
)
