//! Against TRL + PEFT on the default model: the same losses step by step, and adapters that mean the same on both sides.
//!
//! What is expected stands in `tests/goldens/trl`, written by `tests/oracle/trl_curves.py` and, for all weights of tiny models, `trl_full.py`.
//! Adapters are trained on the model that `TIDEMILL_TEST_MODEL` names; `make test` sets it. With `TIDEMILL_WRITE_ADAPTER=FOLDER` the adapter trained here is written there, for PEFT to read.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test stops at the first surprise and says how near it came"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tidemill_engine::{Adapter, LoraConfig, ModelFiles};
use tidemill_rlhf::batch::{Label, Packed};
use tidemill_rlhf::collate::{Encoder, Sample};
use tidemill_rlhf::dataset::{Example, Message, Origin, Row};
use tidemill_rlhf::model::{Model, ModelOptions, Pass, Precision};
use tidemill_rlhf::optimizer::SchedulerType;
use tidemill_rlhf::train::{Control, Method, Offline, Stage, TrainConfig, train};

const EXACT: ModelOptions = ModelOptions { threads: 0, precision: Precision::F32, recompute: false, frozen_gradients: false };

fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/trl")
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn default_model() -> Option<Arc<ModelFiles>> {
    let Some(path) = std::env::var_os("TIDEMILL_TEST_MODEL") else {
        println!("left out: TIDEMILL_TEST_MODEL is not set; `make test` sets it");
        return None;
    };
    Some(Arc::new(ModelFiles::open(Path::new(&path)).unwrap()))
}

fn samples(files: &ModelFiles, config: &TrainConfig) -> Vec<Sample> {
    let messages = |row: &Value, name: &str| -> Vec<Message> { serde_json::from_value(row[name].clone()).unwrap() };
    let text = std::fs::read_to_string(goldens().join("rows.jsonl")).unwrap();
    let rows: Vec<Row> = text
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            let [prompt, chosen, rejected] = ["prompt", "chosen", "rejected"].map(|name| messages(&row, name));
            Row::new(Example::Preference { prompt, chosen, rejected }, Origin::default())
        })
        .collect();
    let encoder = Encoder::new(files.chat_template().unwrap(), files.tokenizer(), config.encoding());
    encoder.rows(&rows, config.teaches()).samples
}

/// Trains an adapter as TRL did and compares what both say of each step. `None` without the default model.
fn same_curve(name: &str) -> Option<Model> {
    let files = default_model()?;
    let expected = json(&goldens().join(format!("{name}.json")));
    let lora = &expected["lora"];
    let lora = LoraConfig {
        r: lora["r"].as_u64().unwrap() as usize,
        alpha: lora["lora_alpha"].as_f64().unwrap(),
        dropout: 0.0,
        layers: lora.get("layers_to_transform").map(|layers| ids(layers).into_iter().map(|layer| layer as usize).collect()),
        ..LoraConfig::default()
    };
    let model = Model::new(files, &lora, expected["seed"].as_u64().unwrap(), EXACT).unwrap();
    trained_as(name, &model, &expected);
    Some(model)
}

/// The same of all weights of a tiny model.
fn same_full_curve(name: &str) {
    let expected = json(&goldens().join(format!("{name}.json")));
    let files = ModelFiles::open(&goldens().join("..").join(expected["model"].as_str().unwrap())).unwrap();
    let model = Model::whole(Arc::new(files), EXACT).unwrap();
    trained_as(name, &model, &expected);
}

fn trained_as(name: &str, model: &Model, expected: &Value) {
    let files = model.files();
    let method: Method = serde_json::from_value(expected["method"].clone()).unwrap();
    let losses = numbers(&expected["loss"]);
    let config = TrainConfig {
        learning_rate: Some(expected["learning_rate_peak"].as_f64().unwrap()),
        lr_scheduler_type: SchedulerType::Linear,
        warmup_steps: expected["warmup_steps"].as_u64().unwrap(),
        per_device_train_batch_size: expected["batch"].as_u64().unwrap() as usize,
        max_steps: losses.len() as i64,
        weight_decay: expected.get("weight_decay").map_or(0.0, |decay| decay.as_f64().unwrap()),
        shuffle: false,
        max_length: None,
        ..TrainConfig::new(method)
    };
    let mut rows = samples(files, &config);
    let held_out_rows = expected["held_out"].as_u64().unwrap() as usize;
    rows.truncate(losses.len() * config.per_device_train_batch_size + held_out_rows);
    let held_out = rows.split_off(rows.len() - held_out_rows);
    // Both cut text into the same tokens.
    let first = [rows[0].prompt.as_slice(), &rows[0].completions[0].tokens].concat();
    assert_eq!(first, ids(&expected["first_row_ids"]));
    let folder = tempfile::tempdir().unwrap();
    let mut offline = Offline::new(model, &config, rows, held_out, None, &mut |_, _| {}).unwrap();
    let mut found: Vec<BTreeMap<String, f64>> = Vec::new();
    let mut evaluated = None;
    train(model, &mut offline, &config, folder.path(), &mut |progress| {
        match progress.stage {
            Stage::Training => found.push(progress.metrics.clone()),
            Stage::Evaluating => evaluated = progress.metrics.get("eval_loss").copied(),
        }
        Control::Continue
    })
    .unwrap();
    let metrics = [
        ("loss", 2e-4),
        ("grad_norm", 1e-3),
        ("learning_rate", 1e-9),
        ("rewards/margins", 1e-3),
        ("logps/chosen", 5e-3),
        ("logps/rejected", 5e-3),
    ];
    for (metric, tolerance) in metrics {
        let Some(expected) = expected.get(metric).map(numbers) else { continue };
        assert_eq!(found.len(), expected.len());
        let apart = found.iter().zip(&expected).map(|(found, want)| (found[metric] - want).abs()).fold(0.0, f64::max);
        println!("{name} {metric}: at most {apart:.2e} apart");
        assert!(apart <= tolerance, "{name} {metric}: {apart} apart");
    }
    let (found, want) = (evaluated.unwrap(), expected["eval_loss"].as_f64().unwrap());
    println!("{name} eval_loss: {:.2e} apart", (found - want).abs());
    // A mean over the held-out tokens; for fine-tuning transformers takes the mean of the batches' means instead.
    let tolerance = if method == Method::Sft { 5e-3 } else { 2e-4 };
    assert!((found - want).abs() <= tolerance, "{name} eval_loss: {found}, not {want}");
    // It did learn.
    assert!(losses[losses.len() - 1] < losses[0] - 0.1, "{losses:?}");
}

/// Largest difference between the model's log-probabilities and those that `transformers` + PEFT computed.
fn apart(model: &Model, expected: &Value, pass: Pass) -> f64 {
    let mut batch = Packed::default();
    batch.push(&ids(&expected["ids"]), None);
    let step = expected["token_step"].as_u64().unwrap() as usize;
    let mut want = Vec::new();
    for (row, values) in ids(&expected["positions"]).into_iter().zip(expected["log_probs"].as_array().unwrap()) {
        for (place, value) in numbers(values).into_iter().enumerate() {
            batch.labels.push(Label { row, token: (place * step) as u32 });
            want.push(value);
        }
    }
    let found = model.log_probs(&batch, pass).unwrap().to_vec1::<f32>().unwrap();
    found.iter().zip(&want).map(|(found, want)| (f64::from(*found) - want).abs()).fold(0.0, f64::max)
}

#[test]
fn fine_tuning_goes_as_with_trl() {
    same_curve("sft");
}

#[test]
fn preference_optimisation_goes_as_with_trl() {
    same_curve("dpo");
}

#[test]
fn training_all_weights_goes_as_with_trl() {
    for name in ["full-sft", "full-dpo"] {
        same_full_curve(name);
    }
}

#[test]
fn a_small_adapter_is_the_one_that_trl_trains() {
    let Some(model) = same_curve("dpo-small") else { return };
    let folder = goldens().join("dpo-small");
    let (theirs, expected) = (Adapter::read(&folder).unwrap(), json(&folder.join("expected.json")));
    if let Some(folder) = std::env::var_os("TIDEMILL_WRITE_ADAPTER") {
        model.adapter(&theirs.base).unwrap().write(Path::new(&folder)).unwrap();
    }
    // Trained there, read here.
    let files = default_model().unwrap();
    let read = Model::with_adapter(files, &theirs, EXACT).unwrap();
    let distance = apart(&read, &expected, Pass::EVALUATE);
    println!("their adapter here: {distance:.2e} apart");
    assert!(distance <= 1e-3, "their adapter here: {distance}");
    // It is not the base model, by far.
    assert!(apart(&read, &expected, Pass::REFERENCE) > 0.1);
    // Trained here, with the same outcome.
    let distance = apart(&model, &expected, Pass::EVALUATE);
    println!("our adapter beside theirs: {distance:.2e} apart");
    assert!(distance <= 1e-3, "our adapter beside theirs: {distance}");
}

#[test]
fn an_adapter_trained_here_means_the_same_to_peft() {
    let Some(files) = default_model() else { return };
    // Written by `TIDEMILL_WRITE_ADAPTER`, read by PEFT in `tests/oracle/trl_ours.py`.
    let folder = goldens().join("ours");
    let model = Model::with_adapter(files, &Adapter::read(&folder).unwrap(), EXACT).unwrap();
    let distance = apart(&model, &json(&folder.join("expected.json")), Pass::EVALUATE);
    println!("our adapter with PEFT: {distance:.2e} apart");
    assert!(distance <= 1e-3, "our adapter with PEFT: {distance}");
}
