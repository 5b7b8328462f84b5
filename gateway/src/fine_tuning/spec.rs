//! What a job's process is told, and the name of what it makes.

use crate::fine_tuning::method::{Kind, Method};
use crate::fine_tuning::rows::Found;
use serde_json::json;
use std::path::Path;
use tidemill_rlhf::job::Spec;
use tidemill_store::FineTuningDraft;
use uuid::Uuid;

/// Learning rates that a multiplier of 1 means: ten times those of training all weights, as low-rank adapters want it.
const SUPERVISED_RATE: f64 = 2e-4;
const DPO_RATE: f64 = 1e-5;
/// Share of the steps over which the rate rises.
const WARMUP: f64 = 0.05;
/// Rank of an adapter, where the server takes it.
const RANK: usize = 16;
/// Longest conversation, where the model's context is not shorter.
const MAX_TOKENS: usize = 4096;
/// A training keeps about this many checkpoints in its time, and the last two on the disk.
const CHECKPOINTS: u64 = 20;

/// Where and how a job trains.
pub struct Bench<'a> {
    /// The base model's name and files.
    pub base: (&'a str, &'a Path),
    /// The adapter that learns more; without it, a new one.
    pub adapter: Option<&'a Path>,
    /// Most tokens that the model takes.
    pub context: usize,
    /// Largest rank that the server serves.
    pub max_rank: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Its rows.
    pub train: &'a Path,
    /// Rows that it is measured on.
    pub held_out: Option<&'a Path>,
}

/// What the process of a job whose method is resolved is told.
pub fn spec(draft: &FineTuningDraft, method: &Method, found: Found, bench: &Bench<'_>) -> serde_json::Result<Spec> {
    let numbers = method.hyperparameters;
    let steps = method.steps(found.rows);
    let (name, rate) = match method.kind {
        Kind::Supervised => ("sft", SUPERVISED_RATE),
        Kind::Dpo => ("dpo", DPO_RATE),
    };
    let mut config = json!({
        "method": name,
        "learning_rate": rate * numbers.learning_rate_multiplier.unwrap_or(1.0),
        "warmup_ratio": WARMUP,
        "per_device_train_batch_size": numbers.batch_size.unwrap_or(1),
        "num_train_epochs": f64::from(numbers.n_epochs.unwrap_or(1)),
        "seed": draft.seed,
        "max_length": bench.context.min(MAX_TOKENS),
        "logging_steps": 1,
        "save_steps": steps.div_ceil(CHECKPOINTS).clamp(1, 100),
        "save_total_limit": 2,
    });
    match method.kind {
        Kind::Supervised if found.several_turns => config["assistant_only_loss"] = true.into(),
        Kind::Supervised => {}
        Kind::Dpo => config["beta"] = numbers.beta.unwrap_or(0.1).into(),
    }
    let rank = RANK.min(bench.max_rank);
    serde_json::from_value(json!({
        "base": { "name": bench.base.0, "path": bench.base.1 },
        "train_file": bench.train,
        "held_out_file": bench.held_out,
        "config": config,
        "adapter": bench.adapter,
        "lora": { "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05 },
        "threads": bench.threads,
    }))
}

/// Name of the model that a job makes: `ft:BASE:SUFFIX:ID`. The id is the random end of the job's.
pub fn model_name(base: &str, suffix: Option<&str>, job: Uuid) -> String {
    // What cannot stand in a model's name, and a length that leaves room for the rest.
    let fits = |c: char| !(c.is_whitespace() || c.is_control() || c == '@' || c == ':');
    let base: String = base.chars().take(80).map(|c| if fits(c) { c } else { '-' }).collect();
    let id = job.simple().to_string();
    format!("ft:{base}:{}:{}", suffix.unwrap_or_default(), &id[id.len() - 12..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fine_tuning::method::Hyperparameters;
    use serde_json::Value;

    fn draft() -> FineTuningDraft {
        FineTuningDraft {
            id: Uuid::nil(),
            created: 0,
            key_id: None,
            model: "m".into(),
            base: "m".into(),
            method: Value::Null,
            suffix: None,
            seed: 7,
            training_file: Uuid::nil(),
            validation_file: None,
            metadata: None,
            result_file: Uuid::nil(),
            place: String::new(),
        }
    }

    #[test]
    fn the_trainer_takes_what_it_is_told() {
        let bench = Bench {
            base: ("m", Path::new("/models/m.gguf")),
            adapter: None,
            context: 2048,
            max_rank: 8,
            threads: 1,
            train: Path::new("/job/train.jsonl"),
            held_out: None,
        };
        for (kind, turns) in [(Kind::Supervised, true), (Kind::Supervised, false), (Kind::Dpo, false)] {
            let asked = Hyperparameters { learning_rate_multiplier: Some(2.0), ..Hyperparameters::default() };
            let method = Method { kind, hyperparameters: asked }.resolved(100);
            let spec = spec(&draft(), &method, Found { rows: 100, several_turns: turns }, &bench).unwrap();
            let config = &spec.config;
            config.objective().unwrap();
            let rate = if kind == Kind::Dpo { 2e-5 } else { 4e-4 };
            assert_eq!((config.learning_rate, config.seed, config.max_length), (Some(rate), 7, Some(2048)));
            assert_eq!(config.assistant_only_loss, turns.then_some(true));
            assert_eq!((config.save_steps, spec.lora.r, spec.lora.lora_alpha), (5, 8, 16.0));
        }
    }

    #[test]
    fn names_have_no_character_that_names_cannot_have() {
        let id = Uuid::try_parse("019a0000-0000-7000-8000-0123456789ab").unwrap();
        assert_eq!(model_name("org/base", Some("shop"), id), "ft:org/base:shop:0123456789ab");
        assert_eq!(model_name("a b:c@d", None, id), "ft:a-b-c-d::0123456789ab");
    }
}
