//! A verdict as feedback.

use super::{Assignment, Queue, Task, Verdict};
use crate::records::{Feedback, Kind, TargetKind};
use serde_json::json;
use uuid::Uuid;

/// The comparison that a verdict says. Candidates are the choices' ids when both are ours; otherwise `TASK:a` and `TASK:b`, whose
/// texts the task holds.
pub fn comparison(
    queue: &Queue,
    task: &Task,
    own: &Assignment,
    verdict: Verdict,
    finished: i64,
    source: &str,
    key_id: Option<&str>,
) -> Feedback {
    let (a, b, ours) = match (task.candidate_a, task.candidate_b) {
        (Some(a), Some(b)) => (a.to_string(), b.to_string(), true),
        _ => (format!("{}:a", task.id), format!("{}:b", task.id), false),
    };
    let ranking = match verdict {
        Verdict::A => json!([[a], [b]]),
        Verdict::B => json!([[b], [a]]),
        Verdict::Tie | Verdict::BothBad => json!([[a, b]]),
    };
    let shown = if own.a_is_left { [&a, &b] } else { [&b, &a] };
    let value = json!({"candidates": [a, b], "ranking": ranking, "both_bad": verdict == Verdict::BothBad, "shown": shown});
    let mut tags = vec![format!("queue:{}", queue.name)];
    if task.gold.is_some() {
        tags.push("gold".to_owned());
    }
    Feedback {
        id: Uuid::now_v7(),
        created: finished,
        updated: finished,
        revision: 1,
        withdrawn: false,
        target: if ours { a.clone() } else { task.id.to_string() },
        targets: if ours { vec![a, b] } else { vec![task.id.to_string()] },
        target_kind: if ours { TargetKind::Completion } else { TargetKind::Task },
        kind: Kind::Comparison,
        metric: None,
        value,
        number: None,
        author: Some(own.annotator.clone()),
        source: Some(source.to_owned()),
        latency_ms: Some((finished - own.started).max(0) / 1000),
        tags,
        key_id: key_id.map(str::to_owned),
        idempotency_key: None,
        task_id: Some(task.id),
    }
}
