//! Real sampling and real training of a model of some thousand parameters.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Map, Value, json};
use tidemill_engine::{LoraConfig, ModelFiles};

use super::*;
use crate::{
    model::{Model, ModelOptions, Precision},
    reward::Score,
    train::{Control, Ending, Method, train},
};

const LONGEST: usize = 64;

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

fn model() -> Model {
    let files = Arc::new(ModelFiles::open(&golden("llama")).unwrap());
    let lora = LoraConfig { r: 4, alpha: 8.0, dropout: 0.0, ..LoraConfig::default() };
    Model::new(files, &lora, 3, ModelOptions { threads: 2, precision: Precision::F32, recompute: false }).unwrap()
}

fn prompts(count: u32) -> Vec<Prompt> {
    let prompt = |index: u32| Prompt {
        question: Question { id: format!("q{index}"), messages: Vec::new(), columns: Map::new(), now: 0 },
        tokens: (0..5 + index % 3).map(|place| 20 + (index * 31 + place * 17) % 200).collect(),
    };
    (0..count).map(prompt).collect()
}

/// The share of an answer's characters that are capital letters: dense, and far from what the model does by itself.
fn capitals() -> Rewards {
    let share = |answer: &Answer<'_>| {
        let (all, capital) = (answer.text.chars().count(), answer.text.chars().filter(char::is_ascii_uppercase).count());
        Some(capital as f64 / all.max(1) as f64)
    };
    Rewards::of([("capitals".to_owned(), 1.0, Box::new(share) as Box<dyn Score>)])
}

fn config(method: Method, fields: Value) -> TrainConfig {
    let mut all = json!({
        "method": method,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 32,
        "max_completion_length": 12,
        "max_steps": 24,
        "logging_steps": 1,
        "seed": 7,
        "reward_funcs": [{"type": "json"}],
    });
    all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    TrainConfig::from_json(all).unwrap()
}

struct Run {
    lines: Vec<Value>,
    values: Vec<Vec<f32>>,
    ending: Ending,
}

impl Run {
    fn column(&self, name: &str) -> Vec<f64> {
        self.lines.iter().filter_map(|line| line[name].as_f64()).collect()
    }
}

fn run(config: &TrainConfig, folder: &Path, stop_after: Option<usize>) -> Run {
    let model = model();
    let engine = engine_for(&golden("llama"), 16, LONGEST, 4, Some(2)).unwrap();
    let sampler = EngineSampler::new(engine, || model.adapter("tiny"));
    let mut online = Online::new(&model, config, prompts(6), prompts(2), capitals(), sampler).unwrap();
    let mut heard = 0;
    let outcome = train(&model, &mut online, config, folder, &mut |_| {
        heard += 1;
        if stop_after.is_some_and(|after| heard >= after) { Control::Stop } else { Control::Continue }
    })
    .unwrap();
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut values: Vec<Vec<f32>> = model.parameters().iter().map(|parameter| parameter.values().unwrap()).collect();
    values.extend(online.parameters().iter().map(|parameter| parameter.values().unwrap()));
    Run { lines, values, ending: outcome.ending }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn grpo_learns_from_its_own_answers() {
    learns(Method::Grpo, json!({}));
}

#[test]
fn rloo_learns_from_its_own_answers() {
    learns(Method::Rloo, json!({"num_generations": 4, "beta": 0.0}));
}

#[test]
fn ppo_learns_from_its_own_answers() {
    learns(Method::Ppo, json!({"num_ppo_epochs": 2, "max_steps": 48, "kl_coef": 0.0}));
}

fn learns(method: Method, fields: Value) {
    let folder = tempfile::tempdir().unwrap();
    let done = run(&config(method, fields), folder.path(), None);
    let reward = done.column("reward");
    println!("{method:?} {reward:?}");
    println!("{}", done.lines[1]);
    let (before, after) = (mean(&reward[..4]), mean(&reward[reward.len() - 4..]));
    assert!(after > before + 0.15, "{method:?}: {before} to {after}, {reward:?}");
}
