//! The trainings under way as gauges for Prometheus: TRL's names behind `tidemill:training_`, a series for each job. They are gone when
//! the job ends, which a gauge of the process-wide recorder never would be.

use crate::fine_tuning::progress::{Latest, latest};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tidemill_store::FineTuningJob;
use uuid::Uuid;

/// Before every name.
const PREFIX: &str = "tidemill:training_";
/// Most metrics of a job: graders have names of the client's own.
const MAX_METRICS: usize = 128;

/// What is known of each. Cloning is cheap.
#[derive(Clone, Default)]
pub struct Trainings(Arc<Mutex<BTreeMap<Uuid, Shown>>>);

struct Shown {
    labels: String,
    latest: Latest,
    /// How much of what it said this is about.
    read_bytes: u64,
}

/// One of them; dropped, it is over.
pub struct Training {
    all: Trainings,
    job: Uuid,
}

impl Trainings {
    /// A job trains from now on.
    pub fn begin(&self, job: &FineTuningJob, name: &str) -> Training {
        let method = job.draft.method["type"].as_str().unwrap_or_default();
        let labels =
            format!("job=\"{}\",model_name=\"{}\",method=\"{}\"", escaped(name), escaped(&job.draft.base), escaped(method));
        self.lock().insert(job.draft.id, Shown { labels, latest: Latest::default(), read_bytes: 0 });
        Training { all: self.clone(), job: job.draft.id }
    }

    /// All of them, in Prometheus' text format; empty when nothing trains.
    pub fn render(&self) -> String {
        let shown = self.lock();
        let mut series: BTreeMap<String, Vec<(&str, f64)>> = BTreeMap::new();
        for Shown { labels, latest, .. } in shown.values() {
            let places = [
                ("step", latest.step as f64),
                ("steps", latest.steps as f64),
                ("epoch", latest.epoch),
                ("tokens", latest.tokens as f64),
            ];
            let measured = latest.metrics.iter().map(|(name, value)| (name.as_str(), *value)).take(MAX_METRICS);
            for (name, value) in places.into_iter().chain(measured) {
                series.entry(format!("{PREFIX}{}", metric_name(name))).or_default().push((labels, value));
            }
        }
        let mut text = String::new();
        for (name, values) in series {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# TYPE {name} gauge");
            for (labels, value) in values {
                let _ = writeln!(text, "{name}{{{labels}}} {value}");
            }
            text.push('\n');
        }
        text
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uuid, Shown>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Training {
    /// Takes over where the training is, when there is more than the last time. `read_bytes` is how much it has said.
    pub fn look(&self, said: &Path, read_bytes: u64) {
        if self.all.lock().get(&self.job).is_none_or(|shown| shown.read_bytes == read_bytes) {
            return;
        }
        let found = match latest(said) {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(job = %self.job, %error, "cannot read how far a training is");
                return;
            }
        };
        if let Some(shown) = self.all.lock().get_mut(&self.job) {
            (shown.latest, shown.read_bytes) = (found, read_bytes);
        }
    }
}

impl Drop for Training {
    fn drop(&mut self) {
        self.all.lock().remove(&self.job);
    }
}

/// `rewards/margins` as `rewards_margins`.
fn metric_name(name: &str) -> String {
    name.chars().take(100).map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect()
}

/// A label's value as Prometheus reads it.
pub fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fine_tuning::spec::tests::draft;
    use serde_json::json;
    use tidemill_store::{FineTuningDraft, FineTuningState};

    #[test]
    fn a_training_is_shown_for_as_long_as_it_runs() {
        let draft = FineTuningDraft { base: "a\"b".into(), method: json!({"type": "dpo"}), ..draft() };
        let job = FineTuningJob {
            draft,
            state: FineTuningState::Running,
            error: None,
            fine_tuned_model: None,
            served: false,
            has_result: false,
            finished: None,
            estimated_finish: None,
            trained_tokens: None,
            step: 0,
            steps: 0,
            read_bytes: 0,
            attempts: 0,
            evaluated: 0,
        };
        let said = tempfile::NamedTempFile::new().unwrap();
        let line = json!({"event": "progress", "step": 3, "steps": 9, "epoch": 0.5, "tokens": 70, "metrics": {"loss": 0.25, "rewards/margins": -1.5, "bad": null}});
        std::fs::write(said.path(), format!("{line}\n")).unwrap();
        let all = Trainings::default();
        assert_eq!(all.render(), "");
        let training = all.begin(&job, "ftjob-1");
        training.look(said.path(), 10);
        let text = all.render();
        let labels = r#"{job="ftjob-1",model_name="a\"b",method="dpo"}"#;
        for (name, value) in [("step", "3"), ("steps", "9"), ("epoch", "0.5"), ("loss", "0.25"), ("rewards_margins", "-1.5")] {
            assert!(
                text.contains(&format!("# TYPE tidemill:training_{name} gauge\ntidemill:training_{name}{labels} {value}\n")),
                "{text}"
            );
        }
        assert!(!text.contains("bad"));
        drop(training);
        assert_eq!(all.render(), "");
    }
}
