//! Loops through the real router, dataset builder, queue of trainings and keeper of rollouts; the program that trains and evaluates is a few
//! lines of shell.

#![cfg(test)]

use crate::stand_in::program;
use crate::support::{MODEL, Setup, get, no_loops, no_training, post};
use axum::Router;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tidemill::datasets::DatasetJobs;
use tidemill::fine_tuning::FineTuningOptions;
use tidemill::flywheel::{FlywheelOptions, Flywheels, read_policy};
use tidemill::http::{App, router};
use tidemill_rlhf::registry::{Base, Lineage};
use tidemill_store::{AdapterFilter, AdapterState, Audit, AuditFilter, FineTuningState, FineTunings, Viewer};
use tokio::task::JoinHandle;

const NAME: &str = "better";
/// Corrections, each of one answer.
const ROWS: usize = 8;

fn policy(gates: Value) -> Value {
    // The parrot says the same to everything.
    let allow = [
        "repeated_answer",
        "near_duplicates",
        "exact_duplicates",
        "diversity",
        "distinct",
        "language",
        "contradictions",
        "drift",
    ];
    json!({
        "model": MODEL,
        "when": {"preferences": ROWS, "raters": 2},
        "feedback": {"from": ["correction"], "held_out": 0.25},
        "quality": {"allow": allow, "thresholds": {"size": {"preferences": {"warn": 5, "fail": 2}}}},
        "gates": gates,
        "rollout": {"kind": "canary", "steps": [{"set_weight": 50}], "metrics": [{"metric": "error_rate", "guardrail": {"max": 0.5}}]},
    })
}

/// An evaluation whose only gate is open or shut.
fn evaluation(passed: bool) -> Value {
    let mut check = json!({"gate": "accuracy", "passed": passed, "value": 0.4, "threshold": 0.5, "finding": "won 3 of 8"});
    if !passed {
        check["change"] = json!("train on more preferences");
    }
    json!({
        "base": MODEL, "base_digest": "d", "rows": "better@1", "sampling": {"temperature": 1.0, "max_tokens": 8, "seed": 0},
        "contenders": [], "examples": [], "gates": {"passed": passed, "checks": [check]},
    })
}

/// Trains and evaluates; each leaves a line in `acts`. A training waits while `hold` is in the same folder, an evaluation for `go` where `waits`
/// says so.
fn script(folder: &Path, passed: bool, waits: bool) -> String {
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama/adapters/all");
    let (acts, go, found) = (folder.join("acts"), folder.join("go"), folder.join("found.json"));
    std::fs::write(&found, evaluation(passed).to_string()).unwrap();
    let wait = if waits { format!("while [ ! -e {} ]; do sleep 0.05; done", go.display()) } else { String::new() };
    format!(
        r#"echo "$1" >> {acts}
if [ "$1" = eval ]; then
  all="$*"
  while [ $# -gt 0 ]; do [ "$1" = --out ] && out="$2"; [ "$1" = --gates ] && gates="$2"; shift; done
  [ -s "$gates" ] || exit 9
  echo "$all" > {acts}.eval
  {wait}
  cp {found} "$out/part"; mv "$out/part" "$out/evaluation.json"
  exit 4
fi
while [ -e {hold} ]; do sleep 0.05; done
mkdir -p "$3/adapter"; cp {adapter}/adapter_* "$3/adapter"
echo '{{"data":{{"train":6,"raters":["ann","bob"],"largest_rater_share":0.5}}}}' > "$3/lineage.json"
echo '{{"event":"progress","step":1,"steps":2,"tokens":10,"metrics":{{"loss":2.0}}}}'
cat "$3/train.jsonl" > {acts}.rows
echo '{{"event":"finished","steps":2,"tokens":20}}'"#,
        acts = acts.display(),
        hold = folder.join("hold").display(),
        found = found.display(),
        adapter = adapter.display(),
    )
}

fn datasets(app: &App, folder: &Path) -> DatasetJobs {
    DatasetJobs::new(app.store.clone(), &folder.join("datasets").to_string_lossy())
}

/// A server of which parts can be killed.
struct Bench {
    app: App,
    router: Router,
    options: FlywheelOptions,
    loops: JoinHandle<()>,
    folder: TempDir,
}

impl Bench {
    fn new(passed: bool, waits: bool, gates: Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = program(folder.path(), &script(folder.path(), passed, waits));
        let policies = BTreeMap::from([(NAME.to_owned(), read_policy(NAME, &policy(gates)).unwrap())]);
        let training = FineTuningOptions { program: program.clone(), jobs: 1, ..no_training() };
        let options = FlywheelOptions { policies, program, root: folder.path().join("loops"), ..no_loops() };
        let mut app = Setup { fine_tuning: Some(training), loops: Some(options.clone()), ..Setup::default() }.app();
        app.datasets = datasets(&app, folder.path());
        tokio::spawn(app.fine_tuning.clone().run(app.clone()));
        let loops = tokio::spawn(app.loops.clone().run(app.clone()));
        Self { router: router(app.clone()), app, options, loops, folder }
    }

    /// As after a `kill -9`: what runs the loops and builds snapshots is gone with all that it knew, and another one looks.
    async fn kill(&mut self) {
        self.loops.abort();
        (&mut self.loops).await.ok();
        self.app.datasets.close().await;
        self.app.datasets = datasets(&self.app, self.folder.path());
        self.app.loops = Flywheels::new(&self.app.store, self.options.clone());
        self.router = router(self.app.clone());
        self.loops = tokio::spawn(self.app.loops.clone().run(self.app.clone()));
    }

    async fn look(&self) -> Value {
        get(&self.router, &format!("/v1/loops/{NAME}")).await.json()
    }

    async fn until(&self, fits: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        loop {
            let found = self.look().await;
            if fits(&found) {
                return found;
            }
            assert!(begin.elapsed() < Duration::from_secs(120), "{found:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Two people mend the parrot's answers.
    async fn judge(&self) {
        let subjects = [
            "the sea",
            "old trains",
            "a quiet garden",
            "seven stars",
            "bread and salt",
            "snow in May",
            "the long road",
            "a red door",
        ];
        for (number, subject) in subjects.iter().enumerate() {
            let messages = json!([{"role": "user", "content": format!("Tell me about {subject}, please.")}]);
            let answer = post(&self.router, "/v1/chat/completions", json!({"model": MODEL, "messages": messages})).await.json();
            let author = ["ann", "bob"][number % 2];
            let text = format!(
                "There is much to say about {subject}: it is number {number} of the things that people like to hear about."
            );
            let mended = json!({"target": answer["id"], "kind": "correction", "value": text, "author": author});
            // The answer's row may be on its way.
            let sent = post(&self.router, "/v1/feedback", mended).await;
            assert_eq!(sent.status.as_u16(), 201, "{}", String::from_utf8_lossy(&sent.body));
        }
        self.app.store.flush().await;
    }

    fn acts(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.path().join("acts")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    async fn end(self) {
        self.app.loops.close().await;
        self.app.fine_tuning.close().await;
    }
}

fn actions(cycle: &Value) -> Vec<&str> {
    cycle["steps"].as_array().unwrap().iter().map(|step| step["action"].as_str().unwrap()).collect()
}

fn ended(found: &Value) -> bool {
    found["state"] == "waiting" && found["cycles"][0]["outcome"].is_string()
}

/// Gates that the stand-in knows.
fn plain() -> Value {
    json!({"text_loss": "off"})
}

#[tokio::test]
async fn feedback_becomes_an_adapter_that_a_shut_gate_refuses_with_the_reason() {
    let bench = Bench::new(false, false, plain());
    let before = bench.until(|found| found["created_at"].is_i64()).await;
    assert_eq!(
        (&before["state"], &before["cycle"], &before["waits_for"]["need"]["preferences"]),
        (&json!("waiting"), &json!(0), &json!(ROWS))
    );
    bench.judge().await;
    let found = bench.until(ended).await;
    let cycle = &found["cycles"][0];
    assert_eq!(actions(cycle), ["snapshot", "quality", "training", "evaluation", "refused", "waiting"], "{cycle:#}");
    assert_eq!((&cycle["outcome"], &cycle["why"]), (&json!("refused"), &json!("accuracy: won 3 of 8")));
    assert_eq!(cycle["findings"], json!([{"of": "accuracy", "found": "won 3 of 8", "change": "train on more preferences"}]));
    assert_eq!(cycle["steps"][0]["why"], "8 new judgements of 2 people");
    assert_eq!(cycle["steps"][4]["numbers"]["gates"][0]["value"], 0.4);
    assert_eq!(
        (&found["cycle"], &found["waits_for"]["have"]["preferences"]),
        (&json!(1), &json!(0)),
        "they are not new any more"
    );
    assert_eq!(bench.acts(), ["train", "eval"]);

    // The rows went to the training with the people behind them, and nothing of them stays where it is not needed.
    let rows = std::fs::read_to_string(bench.folder.path().join("acts.rows")).unwrap();
    assert!(rows.lines().count() >= 4 && rows.contains("\"ann\""), "{rows}");
    let jobs = FineTunings::new(bench.app.store.database())
        .list(&Viewer::Key(format!("loop:{NAME}")), &[], None, 9)
        .await
        .unwrap()
        .items;
    assert_eq!((jobs.len(), jobs[0].draft.suffix.as_deref()), (1, Some(NAME)));
    for file in [Some(jobs[0].draft.training_file), jobs[0].draft.validation_file].into_iter().flatten() {
        assert_eq!(bench.app.files.find(file, &Viewer::Anyone, 0).await.unwrap(), None);
        assert!(!bench.app.files.path(file).exists());
    }
    // It is a candidate, and knows its snapshot.
    let adapters = bench.app.adapters.registry().list(&AdapterFilter::default()).await.unwrap().items;
    assert_eq!(
        (adapters.len(), adapters[0].state, &adapters[0].lineage["dataset"]),
        (1, AdapterState::Candidate, &json!("better@1"))
    );
    assert!(bench.app.adapters.registry().aliases().await.unwrap().is_empty());
    let asked = std::fs::read_to_string(bench.folder.path().join("acts.eval")).unwrap();
    for part in [
        format!("--adapter {}", adapters[0].reference()),
        "--dataset better@1".into(),
        format!("--base {MODEL}=/"),
        "--priority low".into(),
        format!("--by loop:{NAME}"),
    ] {
        assert!(asked.contains(&part), "{part}: {asked}");
    }
    assert!(!asked.contains("postgres"), "no address of a database is in a list of processes");
    let gauges = bench.app.loops.gauges();
    assert!(gauges.contains("tidemill:loop_cycle{loop=\"better\"} 1\n"), "{gauges}");
    bench.end().await;
}

#[tokio::test]
async fn killed_while_it_works_it_goes_on_and_does_nothing_twice() {
    let mut bench = Bench::new(false, true, plain());
    bench.judge().await;
    for state in ["snapshot", "training", "evaluation"] {
        // Some states may be over before anybody looks; those that come next are not.
        bench.until(|found| found["cycle"] == 1 && (found["state"] == state || found["state"] == "evaluation")).await;
        bench.kill().await;
    }
    bench.until(|found| found["state"] == "evaluation").await;
    let begin = Instant::now();
    while bench.acts().len() < 2 {
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", bench.acts());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Its process is at work, and the next one finds it.
    bench.kill().await;
    bench.until(|found| found["state"] == "evaluation").await;
    std::fs::write(bench.folder.path().join("go"), "").unwrap();
    let found = bench.until(ended).await;
    assert_eq!(actions(&found["cycles"][0]), ["snapshot", "quality", "training", "evaluation", "refused", "waiting"]);
    assert_eq!(bench.acts(), ["train", "eval"], "each once");
    let snapshots = bench.app.datasets.datasets().list(Some(NAME), None, 9).await.unwrap();
    assert_eq!(snapshots.len(), 1);
    bench.end().await;
}

#[tokio::test]
async fn an_adapter_that_cannot_be_served_is_given_up_and_leaves_no_name() {
    // The stand-in of the model takes no adapters.
    let bench = Bench::new(true, false, plain());
    bench.judge().await;
    let found = bench.until(ended).await;
    let cycle = &found["cycles"][0];
    assert_eq!(
        actions(cycle),
        ["snapshot", "quality", "training", "evaluation", "canary", "failed", "failed", "refused", "waiting"],
        "{cycle:#}"
    );
    assert_eq!(cycle["findings"][0]["of"], "canary");
    let registry = bench.app.adapters.registry();
    assert!(registry.aliases().await.unwrap().is_empty());
    let adapters = registry.list(&AdapterFilter::default()).await.unwrap().items;
    assert_eq!(adapters[0].state, AdapterState::Retired);
    // Whatever was tried again, what was done is told once.
    let told = async |what: &str| {
        let filter = AuditFilter { what: Some(what.into()), ..AuditFilter::default() };
        Audit::new(bench.app.store.database()).list(&filter).await.unwrap().items.len()
    };
    assert_eq!((told("adapter.serve").await, told("adapter.alias").await, told("adapter.retire").await), (1, 1, 1));
    bench.end().await;
}

#[tokio::test]
async fn a_name_that_is_taken_bars_the_way_and_the_adapter_is_out_of_service_again() {
    let bench = Bench::new(true, false, plain());
    let registry = bench.app.adapters.registry();
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama/adapters/all");
    registry.register(&files, Lineage::new("mine", Base::named(MODEL))).await.unwrap();
    registry.serve("mine", false).await.unwrap();
    registry.alias(&format!("loop-{NAME}-1"), "mine").await.unwrap();
    bench.judge().await;
    let found = bench.until(ended).await;
    let cycle = &found["cycles"][0];
    assert_eq!((&cycle["outcome"], &cycle["findings"][0]["of"]), (&json!("refused"), &json!("canary")), "{cycle:#}");
    assert!(cycle["why"].as_str().unwrap().contains("leads to another adapter"), "{cycle:#}");
    let adapters = registry.list(&AdapterFilter::default()).await.unwrap().items;
    let made = adapters.iter().find(|adapter| adapter.name.starts_with("ft-")).unwrap();
    assert_eq!(made.state, AdapterState::Retired);
    bench.end().await;
}

#[tokio::test]
async fn an_erasure_in_the_middle_of_a_training_ends_it() {
    let bench = Bench::new(true, false, plain());
    std::fs::write(bench.folder.path().join("hold"), "").unwrap();
    bench.judge().await;
    let begin = Instant::now();
    while bench.acts().is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bench.app.store.erase_user("ann", "key boss").await.unwrap();
    let found = bench.until(ended).await;
    let cycle = &found["cycles"][0];
    assert_eq!(actions(cycle), ["snapshot", "quality", "training", "refused", "waiting"], "{cycle:#}");
    assert_eq!(cycle["why"], "training: a person behind better@1 was erased");
    assert_eq!(bench.acts(), ["train"]);
    let jobs = FineTunings::new(bench.app.store.database()).list(&Viewer::Anyone, &[], None, 9).await.unwrap().items;
    assert_eq!((jobs.len(), jobs[0].state), (1, FineTuningState::Cancelled));
    assert!(!bench.app.files.path(jobs[0].draft.training_file).exists(), "no copy of their rows is left");
    bench.end().await;
}

#[tokio::test]
async fn people_steer_a_loop_and_wrong_wishes_are_refused() {
    let bench = Bench::new(false, true, plain());
    let path = |word: &str| format!("/v1/loops/{NAME}/{word}");
    let want = async |word: &str| post(&bench.router, &path(word), Value::Null).await;
    bench.until(|found| found["created_at"].is_i64()).await;
    assert_eq!(want("pause").await.json()["waits_for"]["text"], "a person: it is paused");
    assert_eq!(want("pause").await.json()["paused"], true);
    assert_eq!(want("run").await.error(), (409, Some("name".into()), Some("invalid_state".into())));
    assert_eq!(want("resume").await.json()["paused"], false);
    // There is no feedback, so its build makes no rows: tried, and given up with what would change it.
    assert_eq!(want("run").await.status.as_u16(), 200);
    let found = bench.until(ended).await;
    let cycle = &found["cycles"][0];
    assert_eq!((&cycle["outcome"], &cycle["findings"][0]["of"]), (&json!("refused"), &json!("snapshot")), "{cycle:#}");
    assert!(cycle["why"].as_str().unwrap().contains("no feedback matches"), "{cycle:#}");
    assert!(cycle["steps"][0]["why"].as_str().unwrap().ends_with("wanted it"), "{cycle:#}");

    let listed = get(&bench.router, "/v1/loops").await.json();
    assert_eq!((listed["data"].as_array().unwrap().len(), &listed["first_id"]), (1, &json!(NAME)));
    assert_eq!(get(&bench.router, "/v1/loops/none").await.error(), (404, Some("name".into()), Some("loop_not_found".into())));
    assert_eq!(post(&bench.router, "/v1/loops/none/run", Value::Null).await.error().0, 404);
    assert_eq!(get(&bench.router, &format!("/v1/loops/{NAME}?cycles=0")).await.error().0, 400);
    bench.end().await;
}
