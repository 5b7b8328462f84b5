//! Whole trainings of a small model.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tidemill_engine::Adapter;

use super::*;
use crate::train::{Control, Ending, TrainError};

fn base() -> Base {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/qwen2");
    Base { name: "tiny".to_owned(), path }
}

/// Twelve comparisons that want one word and not the other.
fn pairs(folder: &Path) -> PathBuf {
    let path = folder.join("pairs.jsonl");
    let lines: Vec<String> = (0..12)
        .map(|index| {
            let line = json!({
                "prompt": [{ "role": "user", "content": format!("Question number {index} is which?") }],
                "chosen": [{ "role": "assistant", "content": "yes" }],
                "rejected": [{ "role": "assistant", "content": "no, not at all" }],
            });
            line.to_string()
        })
        .collect();
    fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn spec(folder: &Path, method: &str) -> Spec {
    let config = json!({
        "method": method, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1, "save_steps": 2,
    });
    let spec = json!({
        "base": base(), "train_file": pairs(folder), "held_out_share": 0.25, "config": config,
        "lora": { "r": 4, "target_modules": ["v_proj", "down_proj"] }, "threads": 1,
    });
    serde_json::from_value(spec).unwrap()
}

async fn job(spec: Spec) -> Job {
    let rows = Rows::read(&spec, None).await.unwrap();
    Job::open(spec, rows).unwrap()
}

fn run(job: &Job, folder: &Path, steps: u64) -> (Ending, Option<Finished>) {
    let (outcome, finished) = job
        .train(folder, &mut |_, _| {}, &mut |progress| if progress.step >= steps { Control::Stop } else { Control::Continue })
        .unwrap();
    (outcome.ending, finished)
}

#[tokio::test]
async fn a_specification_becomes_an_adapter_and_stopping_on_the_way_changes_no_byte_of_it() {
    let place = tempfile::tempdir().unwrap();
    let job = job(spec(place.path(), "dpo")).await;
    let prepared = job.prepared();
    assert_eq!((prepared.train + prepared.held_out, prepared.left_out.len()), (12, 0));
    assert!(prepared.held_out >= 1 && prepared.steps > 2, "{prepared:?}");

    let (whole, broken) = (place.path().join("whole"), place.path().join("broken"));
    let (ending, finished) = run(&job, &whole, u64::MAX);
    let finished = finished.unwrap();
    assert_eq!((ending, &finished.adapter), (Ending::Finished, &whole.join(ADAPTER)));
    assert_eq!(run(&job, &broken, 1), (Ending::Stopped, None));
    assert!(!broken.join(ADAPTER).exists());
    let (ending, again) = run(&job, &broken, u64::MAX);
    assert_eq!((ending, again.unwrap().digest), (Ending::Finished, finished.digest.clone()));
    for file in ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl"] {
        assert_eq!(fs::read(whole.join(file)).unwrap(), fs::read(broken.join(file)).unwrap(), "{file}");
    }
    // Again in a folder that is finished: nothing to do, the same adapter.
    assert_eq!(run(&job, &whole, u64::MAX).1.unwrap(), finished);

    let adapter = Adapter::read(&finished.adapter).unwrap();
    assert_eq!((adapter.base.as_str(), adapter.config.r, adapter.config.targets.len()), ("tiny", 4, 2));
    assert!(adapter.pairs.iter().any(|pair| pair.b.iter().any(|value| *value != 0.0)));
    let lineage: Value = serde_json::from_slice(&fs::read(whole.join(LINEAGE)).unwrap()).unwrap();
    assert_eq!((&lineage["base"]["name"], &lineage["data"]["source"]), (&json!("tiny"), &json!("pairs.jsonl")));
    assert_eq!(lineage["steps"], prepared.steps);
    assert!(lineage["metrics"]["eval_loss"].is_f64(), "{lineage}");
}

#[tokio::test]
async fn every_method_trains_and_a_training_goes_on_from_an_adapter() {
    let place = tempfile::tempdir().unwrap();
    let folder = |name: &str| place.path().join(name);
    for method in ["sft", "reward", "kto", "orpo", "simpo"] {
        let (_, finished) = run(&job(spec(place.path(), method)).await, &folder(method), u64::MAX);
        let adapter = finished.unwrap().adapter;
        assert_eq!(adapter.join("head.safetensors").exists(), method == "reward", "{method}");
    }
    let next = Spec { adapter: Some(folder("sft").join(ADAPTER)), ..spec(place.path(), "dpo") };
    let (_, finished) = run(&job(next).await, &folder("next"), u64::MAX);
    let (before, after) =
        (Adapter::read(&folder("sft").join(ADAPTER)).unwrap(), Adapter::read(&finished.unwrap().adapter).unwrap());
    assert_ne!(before.digest(), after.digest());
    let distance = |a: &Adapter, b: &Adapter| -> f32 {
        let both = a.pairs.iter().zip(&b.pairs);
        both.flat_map(|(a, b)| a.a.iter().zip(&b.a)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    // A new adapter has other first numbers; this one moved a little from where it was.
    assert!(distance(&before, &after) < 0.05, "{}", distance(&before, &after));
    let estimate = job(spec(place.path(), "dpo")).await.estimate().unwrap();
    assert!(estimate.steps > 2 && estimate.parameters > 0 && !estimate.step.is_zero(), "{estimate:?}");
}

#[tokio::test]
async fn what_cannot_be_trained_is_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let good = spec(place.path(), "dpo");
    let refused = |change: Value| {
        let mut value = json!(good);
        for (key, new) in change.as_object().unwrap() {
            value[key] = new.clone();
        }
        let path = place.path().join("spec.json");
        fs::write(&path, value.to_string()).unwrap();
        Spec::read(&path).unwrap_err().to_string()
    };
    for (change, part) in [
        (json!({ "lora": { "r": 0 } }), "lora.r: must be at least 1"),
        (json!({ "lora": { "lora_dropout": 1.0 } }), "lora.lora_dropout: must be from 0"),
        (json!({ "lora": { "target_modules": ["lm_head"] } }), "`lm_head` is none of q_proj"),
        (json!({ "lora": { "layers_to_transform": [] } }), "lora.layers_to_transform: names no layer"),
        (json!({ "dataset": "a@1" }), "name a dataset or a train_file, one of them"),
        (json!({ "held_out_share": 0.9 }), "held_out_share: must be from 0 to 0.5"),
        (json!({ "held_out_file": "x" }), "does not go with a held_out_file"),
        (json!({ "precision": "fp8" }), "`fp8` is neither bf16 nor f32"),
        (json!({ "nonsense": 1 }), "nonsense"),
        (json!({ "config": { "method": "dpo", "beta": -1 } }), "beta"),
    ] {
        assert!(refused(change.clone()).contains(part), "{change}: {}", refused(change.clone()));
    }
    let bad = place.path().join("bad.jsonl");
    fs::write(&bad, "{\"prompt\": \"a\"}\n").unwrap();
    let error = Rows::read(&Spec { train_file: Some(bad), ..good.clone() }, None).await.unwrap_err().to_string();
    assert!(error.contains("bad.jsonl: line 1"), "{error}");
    let wrong = Spec { base: Base { path: place.path().join("none"), ..base() }, ..good.clone() };
    let rows = Rows::read(&good, None).await.unwrap();
    assert!(Job::open(wrong, rows).err().unwrap().to_string().contains("none"));
    // No pair among rows that only imitate.
    let file = place.path().join("sft.jsonl");
    fs::write(
        &file,
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n",
    )
    .unwrap();
    let job = job(Spec { train_file: Some(file), held_out_share: 0.0, ..good }).await;
    assert_eq!(job.prepared().left_out[0].1, 1);
    let error = job.train(&place.path().join("x"), &mut |_, _| {}, &mut |_| Control::Continue).unwrap_err();
    assert!(matches!(error, JobError::Train(TrainError::Data(_))), "{error}");
}
