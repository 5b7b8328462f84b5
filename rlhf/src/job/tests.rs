//! Whole trainings of a small model.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tidemill_engine::{Adapter, ModelFiles, Part, Weight};
use tidemill_kernels::train::Precision;

use super::head::Asked;
use super::*;
use crate::dataset::{Example, Message, Origin, Row};
use crate::model::{Model, ModelOptions};
use crate::reward::{Answer, Judge};
use crate::train::{Control, Ending, Method, TrainConfig, TrainError};

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
    assert_eq!((ending, &finished.folder), (Ending::Finished, &whole.join(ADAPTER)));
    assert_eq!(run(&job, &broken, 1), (Ending::Stopped, None));
    assert!(!broken.join(ADAPTER).exists());
    let (ending, again) = run(&job, &broken, u64::MAX);
    assert_eq!((ending, again.unwrap().digest), (Ending::Finished, finished.digest.clone()));
    for file in ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl"] {
        assert_eq!(fs::read(whole.join(file)).unwrap(), fs::read(broken.join(file)).unwrap(), "{file}");
    }
    // Again in a folder that is finished: nothing to do, the same adapter.
    assert_eq!(run(&job, &whole, u64::MAX).1.unwrap(), finished);

    let adapter = Adapter::read(&finished.folder).unwrap();
    assert_eq!((adapter.base.as_str(), adapter.config.r, adapter.config.targets.len()), ("tiny", 4, 2));
    assert!(adapter.pairs.iter().any(|pair| pair.b.iter().any(|value| *value != 0.0)));
    let lineage: Value = serde_json::from_slice(&fs::read(whole.join(LINEAGE)).unwrap()).unwrap();
    assert_eq!((&lineage["base"]["name"], &lineage["data"]["source"]), (&json!("tiny"), &json!("pairs.jsonl")));
    assert_eq!(lineage["steps"], prepared.steps);
    assert!(lineage["metrics"]["eval_loss"].is_f64(), "{lineage}");
}

#[tokio::test]
async fn a_model_that_is_trained_whole_becomes_a_folder_and_stopping_on_the_way_changes_no_byte_of_it() {
    let place = tempfile::tempdir().unwrap();
    for (method, precision) in [("sft", "f32"), ("dpo", "bf16")] {
        let mut given = json!(spec(place.path(), method));
        given["finetuning_type"] = json!("full");
        given["precision"] = json!(precision);
        given.as_object_mut().unwrap().remove("lora");
        let job = job(serde_json::from_value(given).unwrap()).await;
        let folder = |name: &str| place.path().join(format!("{method}-{name}"));
        let finished = run(&job, &folder("whole"), u64::MAX).1.unwrap();
        assert_eq!((finished.kind, &finished.folder), (FinetuningType::Full, &folder("whole").join(MODEL)));
        assert_eq!(run(&job, &folder("broken"), 1), (Ending::Stopped, None));
        let again = run(&job, &folder("broken"), u64::MAX).1.unwrap();
        assert_eq!(again.digest, finished.digest, "{method}");
        for file in ["model/model.safetensors", "model/config.json", "model/tokenizer.json", "metrics.jsonl", LINEAGE] {
            assert_eq!(fs::read(folder("whole").join(file)).unwrap(), fs::read(folder("broken").join(file)).unwrap(), "{file}");
        }
        // Again in a folder that is finished.
        assert_eq!(run(&job, &folder("whole"), u64::MAX).1.unwrap(), finished);

        // What was written is the model as it was trained: another one than before, and trainable from there.
        let (base, trained) = (ModelFiles::open(&base().path).unwrap(), ModelFiles::open(&finished.folder).unwrap());
        assert_eq!((trained.config(), trained.digest()), (base.config(), finished.digest.clone()));
        let moved = |weight: Weight| {
            let (before, after) = (base.vector(weight).unwrap(), trained.vector(weight).unwrap());
            before.iter().zip(&after).map(|(before, after)| (before - after).abs()).fold(0.0, f32::max)
        };
        for weight in [Weight::FinalNorm, Weight::Layer(0, Part::AttentionNorm), Weight::Layer(2, Part::QueryBias)] {
            assert!((1e-4..0.1).contains(&moved(weight)), "{method} {weight:?} by {}", moved(weight));
        }
        let log = fs::read_to_string(folder("whole").join("metrics.jsonl")).unwrap();
        let losses: Vec<f64> =
            log.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64()).collect();
        assert!(losses[losses.len() - 1] < 0.8 * losses[0], "{method}: {losses:?}");
        let lineage: Value = serde_json::from_slice(&fs::read(folder("whole").join(LINEAGE)).unwrap()).unwrap();
        assert_eq!((&lineage["finetuning_type"], &lineage["lora"]), (&json!("full"), &Value::Null));
        let estimate = job.estimate().unwrap();
        assert_eq!((estimate.parameters, estimate.checkpoint), (base.parameters(), 12 * base.parameters()));
    }
}

/// What the log says of one thing, line by line.
fn logged(folder: &Path, name: &str) -> Vec<f64> {
    let log = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    log.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap()[name].as_f64()).collect()
}

#[tokio::test]
async fn methods_without_a_pair_or_a_reference_train_all_weights_too() {
    let place = tempfile::tempdir().unwrap();
    for method in ["kto", "orpo", "simpo"] {
        let given = spec(place.path(), method);
        let job = job(Spec { finetuning_type: FinetuningType::Full, lora: Lora::default(), ..given }).await;
        let folder = |name: &str| place.path().join(format!("{method}-{name}"));
        let finished = run(&job, &folder("whole"), u64::MAX).1.unwrap();
        assert_eq!(run(&job, &folder("broken"), 2), (Ending::Stopped, None));
        assert_eq!(run(&job, &folder("broken"), u64::MAX).1.unwrap().digest, finished.digest, "{method}");
        let losses = logged(&folder("whole"), "eval_loss");
        assert!(losses[losses.len() - 1] < losses[0], "{method}: {losses:?}");
        assert!(*logged(&folder("whole"), "eval_rewards/margins").last().unwrap() > 0.0, "{method}");
        assert_ne!(finished.digest, ModelFiles::open(&base().path).unwrap().digest());
    }
}

#[tokio::test]
async fn a_reward_model_that_is_trained_whole_judges_by_its_own_numbers() {
    let place = tempfile::tempdir().unwrap();
    let folder = |name: &str| place.path().join(name);
    let given = Spec { finetuning_type: FinetuningType::Full, lora: Lora::default(), ..spec(place.path(), "reward") };
    let whole = job(given).await;
    let finished = run(&whole, &folder("whole"), u64::MAX).1.unwrap();
    assert_eq!(run(&whole, &folder("broken"), 1), (Ending::Stopped, None));
    assert_eq!(run(&whole, &folder("broken"), u64::MAX).1.unwrap().digest, finished.digest);
    for file in ["model/model.safetensors", "model/head.safetensors", "metrics.jsonl"] {
        assert_eq!(fs::read(folder("whole").join(file)).unwrap(), fs::read(folder("broken").join(file)).unwrap(), "{file}");
    }
    assert_eq!(*logged(&folder("whole"), "eval_rewards/accuracies").last().unwrap(), 1.0);
    // The body learnt, and not the head alone.
    let (before, after) = (ModelFiles::open(&base().path).unwrap(), ModelFiles::open(&finished.folder).unwrap());
    assert_ne!(before.vector(Weight::FinalNorm).unwrap(), after.vector(Weight::FinalNorm).unwrap());

    let files = std::sync::Arc::new(before);
    let config = TrainConfig::new(Method::Grpo);
    let judge = Judge::RewardModel { path: finished.folder };
    let options = ModelOptions { threads: 1, ..ModelOptions::default() };
    let trained = Model::untrained(files, options).unwrap();
    let judge = judge_of(&trained, &judge, None, options, &config, Asked::default()).unwrap();
    let asked = json!({ "role": "user", "content": "Question number 3 is which?" });
    let (prompt, columns) = ([serde_json::from_value::<Message>(asked).unwrap()], serde_json::Map::new());
    let answer = |text| Answer { prompt: &prompt, columns: &columns, text, tokens: 1, ended: true };
    let rewards = judge.score(&[answer("yes"), answer("no, not at all")]).unwrap();
    assert!(rewards[0] > rewards[1], "{rewards:?}");
}

#[tokio::test]
async fn a_reward_model_is_known_by_its_numbers_and_not_by_its_place() {
    let place = tempfile::tempdir().unwrap();
    let folder = |name: &str| place.path().join(name);
    let other = |given: Spec, rate: f64| Spec { config: TrainConfig { learning_rate: Some(rate), ..given.config }, ..given };
    run(&job(spec(place.path(), "reward")).await, &folder("one"), u64::MAX);
    run(&job(other(spec(place.path(), "reward"), 2e-3)).await, &folder("two"), u64::MAX);
    let judged = |path: PathBuf| sampled(place.path(), "grpo", json!([{ "type": "reward_model", "path": path }]));
    let own = folder("one").join(ADAPTER);
    assert_eq!(run(&job(judged(own.clone())).await, &folder("grpo"), 1).0, Ending::Stopped);

    // The same numbers elsewhere.
    fs::rename(&own, folder("moved")).unwrap();
    // Others in the old place.
    fs::rename(folder("two").join(ADAPTER), &own).unwrap();
    let error = job(judged(own)).await.train(&folder("grpo"), &mut |_, _| {}, &mut |_| Control::Continue).unwrap_err();
    assert!(error.to_string().contains("a training with another reward model"), "{error}");
    assert_eq!(run(&job(judged(folder("moved"))).await, &folder("grpo"), u64::MAX).0, Ending::Finished);
    let lineage: Value = serde_json::from_slice(&fs::read(folder("grpo").join(LINEAGE)).unwrap()).unwrap();
    assert_eq!(lineage["reward_models"]["reward_model"].as_str().unwrap().len(), 64, "{lineage}");
}

#[tokio::test]
async fn a_lineage_tells_of_what_was_learnt_and_of_the_checkpoint_that_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let mut given = spec(place.path(), "dpo");
    // The first evaluation has the smallest margin.
    given.config.metric_for_best_model = "rewards/margins".to_owned();
    given.config.greater_is_better = Some(false);
    (given.config.load_best_model_at_end, given.config.eval_steps) = (true, Some(1));
    let mut rows = Rows::read(&given, None).await.unwrap();
    rows.train.iter_mut().for_each(|row| row.origin.raters = vec!["ann".to_owned()]);
    let thumb = Example::Unpaired {
        prompt: rows.train[0].example.prompt().to_vec(),
        completion: vec![Message::assistant("no")],
        label: false,
    };
    rows.train.push(Row::new(thumb, Origin { raters: vec!["bob".to_owned()], ..Origin::default() }));
    let job = Job::open(given, rows).unwrap();
    let folder = place.path().join("out");
    run(&job, &folder, u64::MAX).1.unwrap();
    let lineage: Value = serde_json::from_slice(&fs::read(folder.join(LINEAGE)).unwrap()).unwrap();
    // A thumb is nothing to DPO, and who gave it taught nothing.
    assert_eq!(lineage["data"]["raters"], json!(["ann"]));
    assert_eq!((&lineage["best"]["step"], &lineage["metrics"]["step"]), (&json!(1), &json!(1)));
    assert_eq!(lineage["metrics"]["eval_rewards/margins"], lineage["best"]["metric"]);
    assert!(logged(&folder, "eval_rewards/margins").len() > 2);
}

#[tokio::test]
async fn a_folder_is_for_one_adapter_and_one_precision() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("out");
    let given = spec(place.path(), "sft");
    run(&job(given.clone()).await, &folder, 1);
    // The first numbers of an adapter are the same whatever it is scaled by.
    let other = |change: &dyn Fn(&mut Spec)| {
        let mut other = given.clone();
        change(&mut other);
        other
    };
    for other in [
        other(&|spec| spec.lora.lora_alpha = 7.0),
        other(&|spec| spec.lora.lora_dropout = 0.5),
        other(&|spec| spec.lora.use_rslora = true),
        other(&|spec| spec.precision = Precision::F32),
    ] {
        let error = job(other).await.train(&folder, &mut |_, _| {}, &mut |_| Control::Continue).unwrap_err().to_string();
        assert!(error.contains("a training with another model, adapter or precision"), "{error}");
    }
    let same = other(&|spec| (spec.threads, spec.recompute) = (2, true));
    assert_eq!(run(&job(same).await, &folder, u64::MAX).0, Ending::Finished);
}

#[tokio::test]
async fn every_method_trains_and_a_training_goes_on_from_an_adapter() {
    let place = tempfile::tempdir().unwrap();
    let folder = |name: &str| place.path().join(name);
    for method in ["sft", "reward", "kto", "orpo", "simpo"] {
        let (_, finished) = run(&job(spec(place.path(), method)).await, &folder(method), u64::MAX);
        let adapter = finished.unwrap().folder;
        assert_eq!(adapter.join("head.safetensors").exists(), method == "reward", "{method}");
    }
    let next = Spec { adapter: Some(folder("sft").join(ADAPTER)), ..spec(place.path(), "dpo") };
    let (_, finished) = run(&job(next).await, &folder("next"), u64::MAX);
    let (before, after) =
        (Adapter::read(&folder("sft").join(ADAPTER)).unwrap(), Adapter::read(&finished.unwrap().folder).unwrap());
    assert_ne!(before.digest(), after.digest());
    let distance = |a: &Adapter, b: &Adapter| -> f32 {
        let both = a.pairs.iter().zip(&b.pairs);
        both.flat_map(|(a, b)| a.a.iter().zip(&b.a)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    // It begins at its reference, which is the adapter that it goes on from.
    assert!((logged(&folder("next"), "loss")[0] - 2f64.ln()).abs() < 1e-6, "{:?}", logged(&folder("next"), "loss"));
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
        (json!({ "finetuning_type": "all" }), "unknown variant `all`, expected `lora` or `full`"),
        (json!({ "finetuning_type": "full" }), "lora: does not go with finetuning_type full"),
        (json!({ "finetuning_type": "full", "lora": {}, "adapter": "x" }), "adapter: does not go with finetuning_type full"),
        (
            json!({ "finetuning_type": "full", "lora": {}, "epoch_adapters": 2 }),
            "epoch_adapters: does not go with finetuning_type full",
        ),
        (
            json!({ "finetuning_type": "full", "lora": {}, "config": { "method": "grpo", "reward_funcs": [{ "type": "json" }] } }),
            "full with grpo needs an engine that is given all weights",
        ),
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

/// A file of prompts, and rewards that only some answers of the tiny model get.
fn sampled(folder: &Path, method: &str, rewards: Value) -> Spec {
    let prompts = folder.join("prompts.jsonl");
    let lines: Vec<String> = (0..8)
        .map(|index| json!({ "prompt": format!("Question number {index} is which?"), "answer": "a" }).to_string())
        .collect();
    fs::write(&prompts, lines.join("\n")).unwrap();
    let config = json!({
        "method": method, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_steps": 2, "logging_steps": 1, "save_steps": 1,
        "max_completion_length": 8, "reward_funcs": rewards,
    });
    let spec = json!({
        "base": base(), "train_file": prompts, "held_out_share": 0.25, "config": config,
        "lora": { "r": 4, "target_modules": ["v_proj", "down_proj"] }, "threads": 1,
    });
    serde_json::from_value(spec).unwrap()
}

#[tokio::test]
async fn methods_that_sample_ask_a_files_prompts_and_are_rewarded_by_functions_and_models() {
    let place = tempfile::tempdir().unwrap();
    let folder = |name: &str| place.path().join(name);
    run(&job(spec(place.path(), "reward")).await, &folder("reward"), u64::MAX);
    let rewards = json!([
        { "type": "length", "unit": "characters", "max": 5 },
        { "name": "judge", "type": "reward_model", "path": folder("reward").join(ADAPTER) },
    ]);
    for method in ["grpo", "rloo", "ppo"] {
        let job = job(sampled(place.path(), method, rewards.clone())).await;
        let prepared = job.prepared();
        assert_eq!((prepared.train + prepared.held_out, prepared.steps), (8, 2), "{method}");
        assert!(prepared.held_out >= 1 && prepared.tokens > 0);
        let (whole, broken) = (folder(method), folder(&format!("{method}-broken")));
        let finished = run(&job, &whole, u64::MAX).1.unwrap();
        assert_eq!(run(&job, &broken, 1), (Ending::Stopped, None));
        assert_eq!(run(&job, &broken, u64::MAX).1.unwrap().digest, finished.digest, "{method}");
        let log = fs::read_to_string(whole.join("metrics.jsonl")).unwrap();
        let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        for name in ["reward", "rewards/length/mean", "rewards/judge/mean", "completions/mean_length"] {
            assert!(first[name].is_f64(), "{method}: {name} is not in {first}");
        }
        let lineage: Value = serde_json::from_slice(&fs::read(whole.join(LINEAGE)).unwrap()).unwrap();
        assert_eq!((&lineage["data"]["source"], &lineage["data"]["train"]), (&json!("prompts.jsonl"), &json!(prepared.train)));
        assert!(lineage["metrics"]["eval_reward"].is_f64(), "{lineage}");
    }
    // One that goes on from an adapter is held to that.
    let mut next = Spec { adapter: Some(folder("grpo").join(ADAPTER)), ..sampled(place.path(), "rloo", rewards.clone()) };
    next.config.max_steps = 1;
    run(&job(next).await, &folder("next"), u64::MAX);
    assert_eq!(logged(&folder("next"), "kl")[0], 0.0);
    assert!(logged(&folder("rloo"), "kl").iter().any(|kl| *kl != 0.0));
    let grpo = sampled(place.path(), "grpo", rewards);
    let estimate = job(grpo.clone()).await.estimate().unwrap();
    assert!(estimate.steps == 2 && !estimate.step.is_zero(), "{estimate:?}");

    // The prompts of rows that hold answers, too.
    let rows = Rows::read(&Spec { train_file: Some(pairs(place.path())), ..grpo.clone() }, None).await.unwrap();
    assert_eq!(rows.questions.len() + rows.held_out_questions.len(), 12);
    assert!(rows.train.is_empty());

    let mut long = grpo.clone();
    long.config.max_completion_length = Some(5000);
    let rows = Rows::read(&long, None).await.unwrap();
    let error = Job::open(long, rows).err().unwrap().to_string();
    assert!(error.contains("max_completion_length is 5000, and with a prompt no more than"), "{error}");
    let gone = json!([{ "type": "reward_model", "path": folder("nowhere") }]);
    let error = job(sampled(place.path(), "grpo", gone)).await.train(&folder("gone"), &mut |_, _| {}, &mut |_| Control::Continue);
    assert!(error.unwrap_err().to_string().starts_with("the reward model in "));
}

/// Teaches the model that `TIDEMILL_TEST_MODEL` names to answer in JSON, and prints how that goes. Takes minutes; where
/// `TIDEMILL_TEST_TRAIN_OUT` names a folder, what came of it stays there.
#[tokio::test]
#[ignore = "a demonstration: minutes of computing"]
async fn the_default_model_learns_to_answer_in_json() {
    let Some(model) = std::env::var_os("TIDEMILL_TEST_MODEL").map(PathBuf::from) else {
        println!("left out: TIDEMILL_TEST_MODEL is not set; `make test` sets it");
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let out = std::env::var_os("TIDEMILL_TEST_TRAIN_OUT").map_or_else(|| place.path().join("out"), PathBuf::from);
    let things = ["person", "book", "city", "animal", "recipe", "car", "film", "song", "country", "planet", "plant", "computer"];
    let lines: Vec<String> = things
        .iter()
        .map(|thing| json!({ "prompt": format!("Describe a {thing} as a JSON object with three keys. Answer with the JSON object only.") }))
        .map(|line| line.to_string())
        .collect();
    let prompts = place.path().join("prompts.jsonl");
    fs::write(&prompts, lines.join("\n")).unwrap();
    let steps: i64 = std::env::var("TIDEMILL_TEST_TRAIN_STEPS").ok().map_or(40, |steps| steps.parse().unwrap());
    let config = json!({
        "method": "grpo", "learning_rate": 3e-4, "lr_scheduler_type": "constant", "per_device_train_batch_size": 16, "max_steps": steps,
        "logging_steps": 1, "save_steps": 20, "max_completion_length": 64,
        "reward_funcs": [
            { "type": "json" }, { "name": "opens", "type": "regex", "pattern": "^\\{" }, { "name": "closes", "type": "regex", "pattern": "\\}$" },
        ],
        "reward_weights": [1.0, 0.25, 0.25],
    });
    let spec: Spec = serde_json::from_value(json!({
        "base": { "name": "default", "path": model }, "train_file": prompts, "config": config,
    }))
    .unwrap();
    let job = job(spec).await;
    let began = std::time::Instant::now();
    let mut json = Vec::new();
    let (_, finished) = job
        .train(&out, &mut |_, _| {}, &mut |progress| {
            let of = |name: &str| progress.metrics.get(name).copied().unwrap_or(f64::NAN);
            json.push(of("rewards/json/mean"));
            println!(
                "step {} of {}: json {:.3} reward {:.3} std {:.3} length {:.1} cut off {:.2} difference {:.4} ratio {:.3} capped {:.3} entropy {:.2} after {:.0} s",
                progress.step,
                progress.steps,
                of("rewards/json/mean"),
                of("reward"),
                of("reward_std"),
                of("completions/mean_length"),
                of("completions/clipped_ratio"),
                of("sampling/sampling_logp_difference/mean"),
                of("sampling/importance_sampling_ratio/mean"),
                of("sampling/importance_sampling_ratio/capped"),
                of("entropy"),
                began.elapsed().as_secs_f64(),
            );
            Control::Continue
        })
        .unwrap();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let quarter = json.len() / 4;
    let (before, after) = (mean(&json[..quarter]), mean(&json[json.len() - quarter..]));
    println!("valid JSON: {before:.3} in the first quarter, {after:.3} in the last; {}", finished.unwrap().digest);
    assert!(after > before + 0.2, "{before} to {after}");
}
