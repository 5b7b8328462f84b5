//! Fine-tuning jobs, the graders that some of them train by, and the models that they make.

use crate::openapi::Topic;
use crate::openapi::generation::metadata;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, either, flag, just, list, list_of, map, named, nullable, number, number_in, page, seconds, text, text_of,
    whole, word,
};
use serde_json::Value;
use tidemill_rlhf::reward::grader::Similarity;
use tidemill_store::Scope;

const TAG: &str = "fine-tuning";

/// `/v1/fine_tuning/jobs`, and `DELETE /v1/models/{id}`
pub fn topic() -> Topic {
    let of_train = |operation: Operation| operation.scope(Scope::Train).refuses(&[503]);
    let looks = |operation: Operation| operation.either_scope([Scope::Train, Scope::Look]).refuses(&[503]);
    let one = |operation: Operation| of_train(operation).refuses(&[404]);
    let seen = |operation: Operation| looks(operation).refuses(&[404]);
    let job = |operation: Operation| operation.answers(200, "The job.", named("FineTuningJob"));
    let pages = |item: &str| {
        let ids = page(named(item)).with("first_id", nullable(text())).with("last_id", nullable(text()));
        ids.with("has_more", flag()).schema()
    };
    let part = |operation: Operation| operation.query("after", text()).query("limit", whole(1, 1000));
    let deleted = Object::answer().with("id", text()).with("object", just("model")).with("deleted", flag());
    let operations =
        vec![
            of_train(Operation::post("/v1/fine_tuning/jobs", TAG, "Make a model from files"))
                .takes(new())
                .answers(200, "The job.", named("FineTuningJob"))
                .refuses(&[404, 409, 429]),
            looks(Operation::get("/v1/fine_tuning/jobs", TAG, "Jobs, the newest first"))
                .query("after", text())
                .query("limit", whole(1, 100))
                .answers(200, "A page of them.", pages("FineTuningJob")),
            job(seen(Operation::get("/v1/fine_tuning/jobs/{id}", TAG, "How far a job is"))),
            job(one(Operation::post("/v1/fine_tuning/jobs/{id}/cancel", TAG, "End a job"))).refuses(&[400]),
            job(one(Operation::post("/v1/fine_tuning/jobs/{id}/pause", TAG, "Have a job stand still"))).refuses(&[400]),
            job(one(Operation::post("/v1/fine_tuning/jobs/{id}/resume", TAG, "Have a paused job go on"))).refuses(&[400]),
            part(seen(Operation::get("/v1/fine_tuning/jobs/{id}/events", TAG, "What happened to a job, the newest first")))
                .answers(200, "A page of it.", pages("FineTuningEvent")),
            part(seen(Operation::get("/v1/fine_tuning/jobs/{id}/checkpoints", TAG, "Models of a job that can be used"))).answers(
                200,
                "A page of them.",
                pages("FineTuningCheckpoint"),
            ),
            of_train(Operation::post("/v1/fine_tuning/alpha/graders/validate", TAG, "Look through a grader"))
                .takes(Object::request().with("grader", named("Grader")).schema())
                .answers(200, "The grader as it was understood.", Object::answer().with("grader", named("Grader")).schema())
                .refuses(&[404]),
            of_train(Operation::post("/v1/fine_tuning/alpha/graders/run", TAG, "Grade one answer"))
                .takes(to_grade())
                .answers(200, "What it is worth.", named("Grade"))
                .refuses(&[404]),
            one(Operation::delete("/v1/models/{id}", TAG, "Delete a model that a job made"))
                .answers(200, "It is gone.", deleted.schema())
                .refuses(&[403]),
        ];
    let schemas = vec![
        ("FineTuningJob", shown()),
        ("FineTuningMethod", method()),
        ("FineTuningEvent", event()),
        ("FineTuningCheckpoint", checkpoint()),
        ("Grader", grader()),
        ("Grade", grade()),
    ];
    Topic { operations, schemas }
}

fn or_auto(schema: Value) -> Value {
    either([just("auto"), schema])
}

/// The numbers that every method has.
fn numbers() -> Object {
    Object::request()
        .may("batch_size", or_auto(whole(1, 256)))
        .may("learning_rate_multiplier", or_auto(number_in(0.0, 100.0)))
        .may("n_epochs", or_auto(whole(1, 50)))
}

fn method() -> Value {
    let supervised = Object::request().with("type", just("supervised"));
    let supervised = supervised.may("supervised", Object::request().may("hyperparameters", numbers().schema()).schema());
    let dpo = numbers().may("beta", or_auto(number_in(0.0, 2.0))).schema();
    let dpo = Object::request().with("type", just("dpo")).may("dpo", Object::request().may("hyperparameters", dpo).schema());
    let own = numbers()
        .may("compute_multiplier", or_auto(number_in(0.0, 8.0)))
        .may("eval_interval", or_auto(whole(1, 1_000_000_000)))
        .may("eval_samples", or_auto(whole(1, 64)))
        .may("max_completion_tokens", or_auto(whole(1, 16_384)))
        .may("reasoning_effort", just("default"));
    let own = Object::request().with("grader", named("Grader")).may("hyperparameters", own.schema()).schema();
    let own = Object::request().with("type", just("reinforcement")).with("reinforcement", own);
    either([supervised.schema(), dpo.schema(), own.schema()])
}

fn grader() -> Value {
    let kind = |kind: &'static str| Object::request().with("type", just(kind)).with("name", text_of(1, 64));
    let compared = |kind: Object| kind.with("input", text()).with("reference", text());
    let block = Object::request().with("type", word(&["input_text", "output_text"])).with("text", text()).schema();
    let content = either([text(), block.clone(), list(either([text(), block]))]);
    let turn = Object::request().with("role", word(&["user", "assistant", "system", "developer"])).with("content", content);
    let turn = turn.may("type", just("message")).schema();
    let asking = |kind: Object| kind.with("model", text()).with("input", list_of(1, 64, turn.clone()));
    let sampling = Object::request()
        .may("temperature", number_in(0.0, 2.0))
        .may("top_p", number_in(0.0, 1.0))
        .may("seed", whole(i64::MIN, i64::MAX))
        .may("max_completions_tokens", whole(1, 4096));
    let metrics: Vec<&str> = Similarity::ALL.iter().map(|metric| metric.as_str()).collect();
    let labels = list_of(0, 64, text_of(1, 4096));
    either([
        compared(kind("string_check")).with("operation", word(&["eq", "ne", "like", "ilike"])).schema(),
        compared(kind("text_similarity")).with("evaluation_metric", word(&metrics)).schema(),
        asking(kind("score_model")).may("range", list_of(2, 2, number())).may("sampling_params", sampling.schema()).schema(),
        asking(kind("label_model")).with("labels", labels.clone()).with("passing_labels", labels).schema(),
        kind("multi").with("graders", map(named("Grader"))).with("calculate_output", text()).schema(),
    ])
}

fn to_grade() -> Value {
    let request = Object::request().with("grader", named("Grader")).with("model_sample", text());
    request.may("item", map(any())).schema()
}

fn grade() -> Value {
    let metadata = Object::answer()
        .with("name", text())
        .with("type", text())
        .with("scores", map(number()))
        .with("execution_time", number())
        .with("sampled_model_name", nullable(text()))
        .with("token_usage", nullable(count()))
        .with("errors", map(any()))
        .with("details", list(text()));
    Object::answer()
        .with("reward", number())
        .with("sub_rewards", map(number()))
        .with("model_grader_token_usage_per_model", map(count()))
        .with("metadata", metadata.schema())
        .schema()
}

fn new() -> Value {
    Object::request()
        .with("model", text())
        .with("training_file", text())
        .may("validation_file", text())
        .may("method", named("FineTuningMethod"))
        .may("hyperparameters", numbers().schema())
        .may("suffix", text_of(1, 64))
        .may("seed", whole(0, i64::from(i32::MAX)))
        .may("metadata", metadata())
        .may("integrations", list_of(0, 0, any()))
        .schema()
}

fn shown() -> Value {
    let error = Object::answer().with("code", text()).with("message", text()).with("param", nullable(text()));
    let words = ["validating_files", "queued", "running", "succeeded", "failed", "cancelled"];
    let own = Object::answer().with("state", text()).with("step", count()).with("steps", count());
    Object::answer()
        .with("id", text())
        .with("object", just("fine_tuning.job"))
        .with("model", text())
        .with("created_at", seconds())
        .with("finished_at", nullable(seconds()))
        .with("fine_tuned_model", nullable(text()))
        .with("organization_id", text())
        .with("result_files", list(text()))
        .with("status", word(&words))
        .with("validation_file", nullable(text()))
        .with("training_file", text())
        .with("hyperparameters", map(any()))
        .with("trained_tokens", nullable(count()))
        .with("error", nullable(error.schema()))
        .with("user_provided_suffix", nullable(text()))
        .with("seed", count())
        .with("estimated_finish", nullable(seconds()))
        .with("integrations", list(any()))
        .with("metadata", nullable(metadata()))
        .with("method", named("FineTuningMethod"))
        .with("tidemill", own.schema())
        .schema()
}

fn event() -> Value {
    Object::answer()
        .with("id", text())
        .with("object", just("fine_tuning.job.event"))
        .with("created_at", seconds())
        .with("level", word(&["info", "warn", "error"]))
        .with("message", text())
        .with("data", nullable(map(any())))
        .with("type", word(&["message", "metrics"]))
        .schema()
}

fn checkpoint() -> Value {
    Object::answer()
        .with("id", text())
        .with("object", just("fine_tuning.job.checkpoint"))
        .with("created_at", seconds())
        .with("fine_tuned_model_checkpoint", text())
        .with("fine_tuning_job_id", text())
        .with("metrics", map(number()))
        .with("step_number", count())
        .schema()
}
