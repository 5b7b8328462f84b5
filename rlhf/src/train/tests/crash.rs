//! Processes that are killed.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use tidemill_engine::ModelFiles;

use super::*;
use crate::model::{Model, ModelOptions};

const FOLDER: &str = "TIDEMILL_TEST_TRAIN_FOLDER";
const EVENTS: &str = "TIDEMILL_TEST_TRAIN_EVENTS";
const METHOD: &str = "TIDEMILL_TEST_TRAIN_METHOD";
const WHOLE: &str = "TIDEMILL_TEST_TRAIN_WHOLE";

/// What is trained: the model that fits on a page, or every number of a small real one.
#[derive(Clone, Copy, Debug)]
struct Told {
    method: Method,
    whole: bool,
}

const DPO: Told = Told { method: Method::Dpo, whole: false };
const KTO: Told = Told { method: Method::Kto, whole: false };
const WHOLE_SFT: Told = Told { method: Method::Sft, whole: true };

impl Told {
    fn config(self) -> TrainConfig {
        let config = told(self.method);
        if self.whole { TrainConfig { learning_rate: Some(1e-3), ..config } } else { config }
    }

    fn model(self) -> Box<dyn Policy> {
        if !self.whole {
            return Box::new(Tiny::new());
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/qwen2");
        let files = Arc::new(ModelFiles::open(&path).unwrap());
        Box::new(Model::whole(files, ModelOptions { threads: 1, ..ModelOptions::default() }).unwrap())
    }
}

fn told(method: Method) -> TrainConfig {
    TrainConfig {
        logging_steps: 3,
        save_steps: 2,
        eval_steps: Some(5),
        save_total_limit: Some(2),
        load_best_model_at_end: true,
        disable_dropout: Some(false),
        ..config(method)
    }
}

/// Not a test of its own: the process that the tests below start and kill.
#[test]
fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let method: Method = serde_json::from_str(&std::env::var(METHOD).unwrap()).unwrap();
    let mut left: Option<u64> = std::env::var(EVENTS).ok().map(|events| events.parse().unwrap());
    let told = Told { method, whole: std::env::var_os(WHOLE).is_some() };
    let (folder, config, model) = (Path::new(&folder), told.config(), told.model());
    let (rows, held_out) = (samples(method, 24, 1), samples(method, 8, 2));
    let mut offline = Offline::new(&*model, &config, rows, held_out, Some(&folder.join("cache")), &mut |_, _| {}).unwrap();
    train(&*model, &mut offline, &config, folder, &mut |_| {
        if let Some(left) = &mut left {
            *left -= 1;
            if *left == 0 {
                // Neither destructors nor buffers.
                Command::new("kill").args(["-9", &std::process::id().to_string()]).status().unwrap();
                std::thread::sleep(Duration::from_secs(60));
            }
        }
        Control::Continue
    })
    .unwrap();
    let values: Vec<Vec<f32>> = model.parameters().iter().map(|parameter| parameter.values().unwrap()).collect();
    std::fs::write(folder.join("values"), format!("{values:?}")).unwrap();
}

fn start(folder: &Path, told: Told, events: Option<u64>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["train::tests::crash::child", "--exact", "--test-threads=1"]);
    command.env(FOLDER, folder).env(METHOD, serde_json::to_string(&told.method).unwrap());
    command.stdout(Stdio::null()).stderr(Stdio::null()).env_remove(EVENTS).env_remove(WHOLE);
    if told.whole {
        command.env(WHOLE, "1");
    }
    if let Some(events) = events {
        command.env(EVENTS, events.to_string());
    }
    command
}

/// Everything that a training leaves behind: log, report, the last checkpoint, and the values in memory in the end.
fn left_behind(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let files = ["metrics.jsonl", "report.html", "values", "checkpoint-12/parameters.safetensors"];
    let files = files.into_iter().chain(["checkpoint-12/optimizer.safetensors", "checkpoint-12/state.json"]);
    files.map(|name| (name.to_owned(), std::fs::read(folder.join(name)).unwrap())).collect()
}

fn same(found: &Path, expected: &Path) {
    for ((name, found), (_, expected)) in left_behind(found).into_iter().zip(left_behind(expected)) {
        assert!(found == expected, "{name} differs");
    }
}

fn straight(told: Told) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    assert!(start(folder.path(), told, None).status().unwrap().success());
    folder
}

#[test]
fn killed_after_every_few_events_it_leaves_the_same_bytes() {
    for told in [DPO, KTO, WHOLE_SFT] {
        let (expected, folder) = (straight(told), tempfile::tempdir().unwrap());
        let mut kills = 0;
        // Each process gets one to five steps and evaluations far; a checkpoint comes every two steps.
        while !start(folder.path(), told, Some(3 + kills % 3)).status().unwrap().success() {
            kills += 1;
            assert!(kills < 60, "it gets nowhere");
        }
        assert!(kills >= 3, "{kills}");
        same(folder.path(), expected.path());
    }
}

#[test]
fn killed_at_any_moment_it_leaves_the_same_bytes() {
    let (expected, folder) = (straight(DPO), tempfile::tempdir().unwrap());
    // From before the first file to the middle of a checkpoint, wherever it strikes; each process gets a little longer.
    for attempt in 0u64..150 {
        let mut child = start(folder.path(), DPO, None).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(3 + 4 * attempt));
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            break;
        }
    }
    assert!(start(folder.path(), DPO, None).status().unwrap().success());
    same(folder.path(), expected.path());
}

#[test]
fn a_damaged_checkpoint_costs_a_few_steps() {
    let (expected, folder) = (straight(DPO), tempfile::tempdir().unwrap());
    assert!(start(folder.path(), DPO, None).status().unwrap().success());
    let last = folder.path().join("checkpoint-12/parameters.safetensors");
    let mut bytes = std::fs::read(&last).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&last, bytes).unwrap();
    // What a kill in the middle of a checkpoint leaves.
    std::fs::create_dir(folder.path().join(".half-12")).unwrap();
    std::fs::write(folder.path().join(".half-12/state.json"), b"{").unwrap();
    assert!(start(folder.path(), DPO, None).status().unwrap().success());
    same(folder.path(), expected.path());
    assert!(!folder.path().join(".half-12").exists());
}
