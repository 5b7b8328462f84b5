//! Rollouts.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, flag, just, list, list_of, map, named, nullable, number, number_in, page, seconds, text, text_of, uuid,
    whole, word,
};
use serde_json::{Value, json};
use tidemill_store::Scope;

const TAG: &str = "rollouts";

/// `/v1/rollouts`
pub fn topic() -> Topic {
    let of_admin = |operation: Operation| operation.scope(Scope::Admin).refuses(&[503]);
    let looks = |operation: Operation| operation.scope(Scope::Look).refuses(&[503]);
    let act = |path, summary| {
        let operation = of_admin(Operation::post(path, TAG, summary)).refuses(&[400, 404, 408, 409, 413]);
        let servers = Object::answer().with("all", count()).with("serving", count());
        let with_servers = Object::answer().with("servers", servers.schema()).schema();
        operation.answers(
            200,
            "The rollout as it is now, and how many of the servers on this database assign by it.",
            json!({"allOf": [named("Rollout"), with_servers]}),
        )
    };
    let promoted = Object::request().may("variant", text_of(0, 100));
    let question = Object::request()
        .with("baseline", number_in(-1e12, 1e12))
        .with("effect", number_in(-1e12, 1e12))
        .may("deviation", number_in(-1e12, 1e12))
        .may("power", number_in(-1e12, 1e12))
        .may("alpha", number_in(-1e12, 1e12))
        .may("share", number_in(-1e12, 1e12));
    let sizes = Object::answer()
        .with("object", just("rollout.plan"))
        .with("one_look", count())
        .with("expected", count())
        .with("at_the_latest", count())
        .with("tuning", count());
    let operations = vec![
        looks(Operation::get("/v1/rollouts", TAG, "Rollouts, the newest first"))
            .query("model", text())
            .query("over", word(&["true", "false"]))
            .query("after", uuid())
            .query("limit", whole(1, 100))
            .answers(200, "A page of them.", page(named("Rollout")).with("has_more", flag()).schema()),
        of_admin(Operation::post("/v1/rollouts", TAG, "Start a rollout"))
            .takes(named("RolloutSpec"))
            .answers(201, "The rollout, which assigns from the next request on.", named("Rollout"))
            .refuses(&[404, 409]),
        looks(Operation::get("/v1/rollouts/{id}", TAG, "One rollout, by id or name")).refuses(&[404]).answers(
            200,
            "With the decisions that were kept, each with the numbers that it stood on.",
            json!({"allOf": [named("Rollout"), Object::answer().with("decisions", list(map(any()))).schema()]}),
        ),
        act("/v1/rollouts/{id}/pause", "Leave the shares as they are; guardrails are watched"),
        act("/v1/rollouts/{id}/resume", "Go on with a paused rollout"),
        act("/v1/rollouts/{id}/approve", "Yes to what a rollout waits for"),
        act("/v1/rollouts/{id}/promote", "Give a treatment all the traffic, whatever the numbers say")
            .takes(promoted.schema())
            .optional_body(),
        act("/v1/rollouts/{id}/rollback", "Give the control all the traffic, now; of a promotion, what was served before it"),
        of_admin(Operation::post("/v1/rollout_plan", TAG, "How much traffic it takes to find a change"))
            .takes(question.schema())
            .answers(200, "Observations of both arms together.", sizes.schema()),
    ];
    Topic { operations, schemas: vec![("Rollout", rollout()), ("RolloutSpec", spec())] }
}

fn rollout() -> Value {
    let arm = Object::answer().with("variant", text()).with("share", number()).with("units", count());
    Object::answer()
        .with("object", just("rollout"))
        .with("id", uuid())
        .with("name", text())
        .with("model", text())
        .with("kind", any())
        .with("status", nullable(text()))
        .with("reason", nullable(text()))
        .with("created_at", seconds())
        .with("updated_at", seconds())
        .with("ended_at", nullable(seconds()))
        .with("version", count())
        .with("arms", list(arm.schema()))
        .with("spec", any())
        .with("state", any())
        .with("latest", any())
        .schema()
}

/// The parts of it are described in docs/rollouts.md; which of them go together depends on the kind.
fn spec() -> Value {
    Object::request()
        .with("name", text_of(1, 100))
        .with("model", text_of(1, 100))
        .with("kind", word(&["ab", "canary", "shadow", "interleaved", "bandit"]))
        .with("arms", list_of(2, 16, map(any())))
        .with("metrics", list_of(1, 50, map(any())))
        .may("steps", list_of(1, 100, map(any())))
        .may("traffic", number_in(0.0001, 1.0))
        .may("sticky", word(&["user", "conversation", "request"]))
        .may("layer", map(any()))
        .may("seed", text_of(0, 100))
        .may("alpha", number_in(1e-6, 0.5))
        .may("tuning", number_in(10.0, 1e9))
        .may("min_exposure", whole(1, 1_000_000_000))
        .may("interval", any())
        .may("deadline", any())
        .may("at_deadline", word(&["pause", "rollback"]))
        .may("approval", flag())
        .may("four_eyes", flag())
        .may("floor", number_in(1e-4, 0.5))
        .schema()
}
