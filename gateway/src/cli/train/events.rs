//! How a training goes, as lines of JSON on standard output.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use tidemill_rlhf::job::{FinetuningType, Finished, Job};
use tidemill_rlhf::train::{Outcome, Progress, Stage};

use super::{Audience, TrainCommandError};

/// One object per line; `event` says which.
pub struct Lines;

fn say(value: &Value) {
    // Who started the training may be gone; the training is not.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{value}");
    let _ = out.flush();
}

impl Audience for Lines {
    fn waits(&mut self) {
        say(&json!({ "event": "waits" }));
    }

    fn waited(&mut self) {
        say(&json!({ "event": "waited" }));
    }

    fn prepared(&mut self, job: &Job) {
        let prepared = job.prepared();
        let left_out: Vec<Value> =
            prepared.left_out.iter().map(|(reason, rows)| json!({ "reason": reason, "rows": rows })).collect();
        say(&json!({
            "event": "prepared",
            "train": prepared.train,
            "held_out": prepared.held_out,
            "truncated": prepared.truncated,
            "dropped_by_report": prepared.dropped_by_report,
            "left_out": left_out,
            "steps": prepared.steps,
            "tokens": prepared.tokens,
        }));
    }

    fn preparing(&mut self, done: usize, all: usize) {
        say(&json!({ "event": "preparing", "done": done, "all": all }));
    }

    fn progress(&mut self, progress: &Progress<'_>) {
        let event = match progress.stage {
            Stage::Training => "progress",
            Stage::Evaluating => "evaluated",
        };
        say(&json!({
            "event": event,
            "step": progress.step,
            "steps": progress.steps,
            "epoch": progress.epoch,
            "tokens": progress.tokens,
            "metrics": progress.metrics,
            "elapsed_s": progress.elapsed.as_secs_f64(),
            "remaining_s": progress.remaining.map(|left| left.as_secs_f64()),
        }));
    }

    fn ended(&mut self, _: &Path, outcome: &Outcome, finished: Option<&Finished>) {
        let best = outcome.best.map(|(step, metric)| json!({ "step": step, "metric": metric }));
        say(&match finished {
            Some(Finished { kind, folder, digest }) => {
                let what = match kind {
                    FinetuningType::Lora => "adapter",
                    FinetuningType::Full => "model",
                };
                json!({
                    "event": "finished",
                    "steps": outcome.steps,
                    "tokens": outcome.tokens,
                    "best": best,
                    what: folder,
                    "digest": digest,
                })
            }
            None => json!({ "event": "stopped", "steps": outcome.steps, "tokens": outcome.tokens, "best": best }),
        });
    }

    fn failed(&mut self, error: &TrainCommandError) {
        say(&json!({ "event": "failed", "message": error.to_string() }));
    }
}
