//! Real sampling and real training of a model of some thousand parameters.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Map, Value, json};
use tidemill_engine::{Engine, LoraConfig, ModelFiles};

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
    Model::new(files, &lora, 3, ModelOptions { threads: 2, precision: Precision::F32, ..ModelOptions::default() }).unwrap()
}

fn engine(sequences: usize, threads: usize) -> Engine {
    Engine::start(sampling(&golden("llama"), sequences, LONGEST, 4, Some(threads)), &mut |_, _| {}).unwrap()
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
    let engine = engine(16, 2);
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
    learns(Method::Grpo, json!({"max_steps": 36}));
}

#[test]
fn rloo_learns_from_its_own_answers() {
    learns(Method::Rloo, json!({"num_generations": 4, "beta": 0.0}));
}

#[test]
fn ppo_learns_from_its_own_answers() {
    let fields = json!({"num_ppo_epochs": 1, "max_steps": 200, "kl_coef": 0.0, "vf_coef": 0.01});
    learns(Method::Ppo, fields);
}

/// The last digits of a machine's arithmetic decide which way such a small training goes, so it is enough that it once got far, for
/// eight turns in a row; of answers that are not learnt from, no eight are like that.
fn learns(method: Method, fields: Value) {
    let folder = tempfile::tempdir().unwrap();
    let done = run(&config(method, fields), folder.path(), None);
    let reward = done.column("reward");
    println!("{method:?} {reward:?}");
    println!("{}", done.lines[1]);
    let (before, after) = (mean(&reward[..4]), reward.windows(8).map(mean).fold(0.0, f64::max));
    assert!(after > before + 0.15, "{method:?}: {before} to {after}, {reward:?}");
}

/// Two steps learn from each turn's answers, or four with PPO; stops fall between them and between turns.
#[test]
fn a_stopped_training_goes_on_as_if_it_had_not_been() {
    for (method, fields) in [
        (Method::Grpo, json!({"num_iterations": 2, "beta": 0.02})),
        (Method::Ppo, json!({"num_ppo_epochs": 2, "num_mini_batches": 2, "kl_target": 0.5, "kl_horizon": 50.0})),
    ] {
        let mut config = config(method, fields);
        (config.max_steps, config.eval_steps, config.logging_steps) = (6, Some(4), 2);
        let (straight, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let expected = run(&config, straight.path(), None);
        let mut stops = 0;
        let found = loop {
            // Each run has an engine of its own, whose cache is empty.
            let found = run(&config, folder.path(), Some(1));
            if found.ending == Ending::Finished {
                break found;
            }
            stops += 1;
            assert!(stops < 20, "it gets nowhere");
        };
        assert!(stops >= 5, "{stops}");
        assert_eq!(found.values, expected.values, "{method:?}");
        let read = |folder: &Path| std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
        assert_eq!(read(folder.path()), read(straight.path()), "{method:?}");
        let rewards = expected.column("eval_reward");
        assert_eq!(rewards.len(), 2, "{method:?}");
    }
}

#[test]
fn every_method_measures_under_trls_names() {
    for (method, fields, own) in [
        (Method::Grpo, json!({"beta": 0.02}), vec!["reward_std", "frac_reward_zero_std", "kl", "clip_ratio/region_mean"]),
        (Method::Rloo, json!({}), vec!["reward_std", "frac_reward_zero_std", "kl", "clip_ratio/region_mean"]),
        (
            Method::Ppo,
            json!({}),
            vec!["objective/kl", "objective/scores", "loss/value_avg", "val/clipfrac_avg", "policy/approxkl_avg"],
        ),
    ] {
        let mut config = config(method, fields);
        (config.max_steps, config.eval_steps) = (1, Some(1));
        let folder = tempfile::tempdir().unwrap();
        let lines = run(&config, folder.path(), None).lines;
        let common = [
            "loss",
            "grad_norm",
            "reward",
            "rewards/capitals/mean",
            "completions/mean_length",
            "completions/clipped_ratio",
            "entropy",
            "sampling/sampling_logp_difference/mean",
            "sampling/importance_sampling_ratio/mean",
            "num_tokens",
        ];
        for name in own.into_iter().chain(common) {
            assert!(lines[0][name].is_f64(), "{method:?}: {name} is not in {}", lines[0]);
        }
        assert!(lines[1]["eval_reward"].is_f64() && lines[1]["eval_completions/mean_length"].is_f64(), "{}", lines[1]);
        // The engine computes with other roundings than the trainer, no more.
        let difference = lines[0]["sampling/sampling_logp_difference/mean"].as_f64().unwrap();
        assert!(difference < 0.05, "{method:?}: {difference}");
    }
}

#[test]
fn the_engine_gives_the_same_answers_whatever_is_beside_them_and_others_for_other_parameters() {
    let model = model();
    let draw = config(Method::Grpo, json!({})).reinforcement().unwrap().draw;
    let prompts = prompts(3);
    let ask = |prompt: usize, answers: usize| Ask { prompt: &prompts[prompt].tokens, answers, seed: 11 + prompt as u64 };
    let mut sampler = EngineSampler::new(engine(8, 2), || model.adapter("tiny"));
    let alone = sampler.sample(&[ask(1, 10)], &draw).unwrap();
    assert_eq!((alone[0].len(), alone[0].iter().filter(|drawn| drawn.tokens.is_empty()).count()), (10, 0));
    assert!(alone[0].iter().all(|drawn| drawn.tokens.len() == drawn.log_probs.len()));
    let beside = sampler.sample(&[ask(0, 5), ask(1, 10), ask(2, 8)], &draw).unwrap();
    assert_eq!(beside[1], alone[0]);
    let mut another = EngineSampler::new(engine(8, 2), || model.adapter("tiny"));
    assert_eq!(another.sample(&[ask(1, 10)], &draw).unwrap(), alone);
    // What was trained meanwhile is what samples next.
    for parameter in model.parameters().iter() {
        parameter
            .change(|values| values.iter_mut().enumerate().for_each(|(i, value)| *value += ((i % 7) as f32 - 3.0) * 0.1))
            .unwrap();
    }
    assert_ne!(sampler.sample(&[ask(1, 10)], &draw).unwrap(), alone);
}

/// How a step is cut into batches is a matter of memory, and answers that teach nothing may be left out of them.
#[test]
fn batches_do_not_change_what_is_learnt() {
    let values = |tokens_per_batch: usize| {
        let mut config = config(Method::Grpo, json!({"beta": 0.02}));
        (config.max_steps, config.tokens_per_batch) = (1, tokens_per_batch);
        let folder = tempfile::tempdir().unwrap();
        let done = run(&config, folder.path(), None);
        (done.column("loss")[0], done.column("grad_norm")[0])
    };
    let whole = values(100_000);
    for budget in [40, 1] {
        let cut = values(budget);
        assert!((cut.0 - whole.0).abs() < 1e-5 && (cut.1 - whole.1).abs() < 1e-4 * whole.1, "{cut:?} {whole:?}");
    }
}

/// TRL's mean over answers counts those that are skipped, its mean over tokens does not.
#[test]
fn what_is_skipped_counts_as_an_answer_without_tokens() {
    let model = model();
    let mut answers = Vec::new();
    for skip in [false, true] {
        let config = config(
            Method::Grpo,
            json!({"mask_truncated_completions": skip, "loss_type": "grpo", "beta": 0.02, "max_completion_length": 40}),
        );
        let sampler = EngineSampler::new(engine(16, 2), || model.adapter("tiny"));
        let mut online = Online::new(&model, &config, prompts(6), Vec::new(), capitals(), sampler).unwrap();
        let batches = online.step(0, &model).unwrap();
        let turn = online.turn.as_ref().unwrap();
        let ended = turn.places().iter().filter(|(group, answer)| turn.groups[*group].answers[*answer].ended).count();
        let places: Vec<(usize, usize)> = batches.iter().flat_map(|batch| batch.places.clone()).collect();
        assert_eq!(places.len(), if skip { ended } else { 32 });
        assert!((1..32).contains(&ended), "{ended}");
        let tokens: usize = places.iter().map(|(group, answer)| turn.groups[*group].answers[*answer].tokens.len()).sum();
        assert!(batches.iter().all(|batch| batch.totals == Totals { answers: 32.0, tokens: tokens as f64 }));
        answers.push(places.len());
    }
    assert!(answers[0] > answers[1]);
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let refused = |fields: Value| {
        let mut all = json!({"method": "grpo", "reward_funcs": [{"type": "json"}]});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        TrainConfig::from_json(all).unwrap_err().to_string()
    };
    for (fields, part) in [
        (json!({"reward_funcs": []}), "reward_funcs says what answers are rewarded for"),
        (json!({"reward_funcs": [{"type": "json"}, {"type": "json"}]}), "two reward_funcs are called json"),
        (json!({"reward_weights": [1.0, 2.0]}), "reward_weights has 2 numbers for 1 reward_funcs"),
        (json!({"reward_funcs": [{"type": "regex", "pattern": "("}]}), "reward_funcs: regex: pattern"),
        (json!({"num_generations": 1}), "num_generations must be at least 2"),
        (json!({"num_generations": 3}), "must be a multiple of num_generations = 3"),
        (json!({"loss_type": "sigmoid"}), "loss_type must be one of grpo's: dapo, grpo, dr_grpo"),
        (json!({"temperature": 0.0}), "temperature must be above 0"),
        (json!({"top_p": 1.5}), "top_p must be at least 0 and at most 1"),
        (json!({"lam": 0.9}), "lam is not used by grpo; leave it out"),
        (json!({"method": "ppo", "num_generations": 2}), "num_generations is not used by ppo"),
        (json!({"method": "ppo", "gamma": 1.5}), "gamma must be at least 0 and at most 1"),
        (json!({"method": "dpo"}), "reward_funcs is not used by dpo"),
    ] {
        assert!(refused(fields.clone()).contains(part), "{fields}: {}", refused(fields.clone()));
    }
    let config = config(Method::Grpo, json!({}));
    let model = model();
    let engine = engine(2, 1);
    let sampler = EngineSampler::new(engine, || model.adapter("tiny"));
    let error = Online::new(&model, &config, Vec::new(), Vec::new(), capitals(), sampler).err().unwrap().to_string();
    assert!(error.contains("there is no prompt to ask"), "{error}");
    assert_eq!((config.best_metric(), config.greater_is_better()), ("eval_reward", true));
}
