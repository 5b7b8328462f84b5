//! What a job's process is told, and the name of what it makes.

use crate::fine_tuning::method::{Kind, Method};
use crate::fine_tuning::rows::Found;
use crate::fine_tuning::{TrainingDevice, is_of_loop};
use serde_json::json;
use std::path::Path;
use tidemill_rlhf::job::Spec;
use tidemill_store::FineTuningDraft;
use uuid::Uuid;

/// Learning rates that a multiplier of 1 means: ten times those of training all weights, as low-rank adapters want it.
const SUPERVISED_RATE: f64 = 2e-4;
const DPO_RATE: f64 = 1e-5;
const REINFORCEMENT_RATE: f64 = 5e-5;
/// Share of the steps over which the rate rises.
const WARMUP: f64 = 0.05;
/// Rank of an adapter, where the server takes it.
const RANK: usize = 16;
/// Longest conversation, where the model's context is not shorter.
const MAX_TOKENS: usize = 4096;
/// Models of earlier epochs that can be used beside the last, as OpenAI has it.
const EARLIER_EPOCHS: usize = 2;
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
    /// Where it computes.
    pub device: &'a TrainingDevice,
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
        Kind::Reinforcement => ("grpo", REINFORCEMENT_RATE),
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
        Kind::Reinforcement => {
            let answers = numbers.answers();
            config["reward_funcs"] = json!([{ "type": "grader", "grader": method.grader }]);
            config["num_generations"] = answers.into();
            config["per_device_train_batch_size"] = (numbers.batch_size.unwrap_or(1) * answers).into();
            // A prompt may be as long as a conversation of the other methods.
            let completion = numbers.max_completion_tokens.map_or(0, |tokens| tokens as usize);
            config["max_length"] = bench.context.min(MAX_TOKENS + completion).into();
            config["max_completion_length"] = numbers.max_completion_tokens.unwrap_or(1).into();
            config["num_generations_eval"] = numbers.eval_samples.unwrap_or(1).into();
            if bench.held_out.is_some() {
                config["eval_steps"] = numbers.eval_interval.into();
            }
        }
    }
    let rank = RANK.min(bench.max_rank);
    serde_json::from_value(json!({
        "base": { "name": bench.base.0, "path": bench.base.1 },
        "train_file": bench.train,
        "held_out_file": bench.held_out,
        "config": config,
        "adapter": bench.adapter,
        // A loop tries what the training ended with.
        "epoch_adapters": (!is_of_loop(draft)).then_some(EARLIER_EPOCHS),
        "lora": { "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05 },
        "threads": bench.threads,
        "device": bench.device.device.to_string(),
        "device_memory": bench.device.memory,
    }))
}

/// Between the name of a job's model and the step of one that it was earlier, as OpenAI has it.
const STEP: &str = ":ckpt-step-";

/// Name of the model as it was after a step.
pub fn checkpoint_name(model: &str, step: u64) -> String {
    format!("{model}{STEP}{step}")
}

/// The name of the model that a job ended with, of one that it was earlier, too.
pub fn last_name(model: &str) -> &str {
    model.rsplit_once(STEP).filter(|(_, step)| step.bytes().all(|b| b.is_ascii_digit())).map_or(model, |(last, _)| last)
}

/// What the registry calls the adapter of a job, after all steps or after so many: names there have no colons.
pub fn adapter_name(suffix: Option<&str>, job: Uuid, step: Option<u64>) -> String {
    let suffix = suffix.map(|suffix| format!("{suffix}-")).unwrap_or_default();
    let step = step.map(|step| format!("-step-{step}")).unwrap_or_default();
    format!("ft-{suffix}{}{step}", end_of(job))
}

/// The random end of a job's id.
fn end_of(job: Uuid) -> String {
    let id = job.simple().to_string();
    id[id.len() - 12..].to_owned()
}

/// Name of the model that a job makes: `ft:BASE:SUFFIX:ID`. The id is the random end of the job's.
pub fn model_name(base: &str, suffix: Option<&str>, job: Uuid) -> String {
    // What cannot stand in a model's name, and a length that leaves room for the rest.
    let fits = |c: char| !(c.is_whitespace() || c.is_control() || c == '@' || c == ':');
    let base: String = base.chars().take(80).map(|c| if fits(c) { c } else { '-' }).collect();
    format!("ft:{base}:{}:{}", suffix.unwrap_or_default(), end_of(job))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::fine_tuning::method::Hyperparameters;
    use serde_json::Value;

    pub fn draft() -> FineTuningDraft {
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
            device: &TrainingDevice::default(),
            train: Path::new("/job/train.jsonl"),
            held_out: None,
        };
        for (kind, turns) in [(Kind::Supervised, true), (Kind::Supervised, false), (Kind::Dpo, false)] {
            let asked = Hyperparameters { learning_rate_multiplier: Some(2.0), ..Hyperparameters::default() };
            let method = Method { kind, hyperparameters: asked, grader: None }.resolved(100, 2048);
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
    fn reinforcement_is_told_how_many_answers_a_step_has() {
        let grader = json!({"type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "b", "operation": "eq"});
        let asked =
            Hyperparameters { batch_size: Some(3), n_epochs: Some(1), eval_interval: Some(2), ..Hyperparameters::default() };
        let grader = Some(serde_json::from_value(grader).unwrap());
        let method = Method { kind: Kind::Reinforcement, hyperparameters: asked, grader }.resolved(9, 2048);
        let bench = Bench {
            base: ("m", Path::new("/models/m.gguf")),
            adapter: None,
            context: 2048,
            max_rank: 64,
            threads: 1,
            device: &TrainingDevice { device: "cuda:1".parse().unwrap(), memory: Some(1 << 30) },
            train: Path::new("/job/train.jsonl"),
            held_out: Some(Path::new("/job/held_out.jsonl")),
        };
        let spec = spec(&draft(), &method, Found { rows: 9, several_turns: false }, &bench).unwrap();
        let told = spec.config.reinforcement().unwrap();
        assert_eq!((told.group, told.answers, told.prompts(), told.draw.max_tokens), (8, 24, 3, 256));
        assert_eq!((spec.device.to_string().as_str(), spec.device_memory), ("cuda:1", Some(1 << 30)));
        spec.check().unwrap();
        assert_eq!((spec.config.eval_steps, method.steps(9), spec.epoch_adapters), (Some(2), 3, Some(2)));
    }

    #[test]
    fn a_model_of_an_earlier_step_knows_the_last_one() {
        assert_eq!(checkpoint_name("ft:b:s:1", 7), "ft:b:s:1:ckpt-step-7");
        assert_eq!(last_name("ft:b:s:1:ckpt-step-7"), "ft:b:s:1");
        assert_eq!((last_name("ft:b:s:1"), last_name("ft:b:s:1:ckpt-step-x")), ("ft:b:s:1", "ft:b:s:1:ckpt-step-x"));
        assert_eq!(adapter_name(Some("shop"), Uuid::nil(), Some(7)), "ft-shop-000000000000-step-7");
    }

    #[test]
    fn names_have_no_character_that_names_cannot_have() {
        let id = Uuid::try_parse("019a0000-0000-7000-8000-0123456789ab").unwrap();
        assert_eq!(model_name("org/base", Some("shop"), id), "ft:org/base:shop:0123456789ab");
        assert_eq!(model_name("a b:c@d", None, id), "ft:a-b-c-d::0123456789ab");
    }
}
