//! `tidemill train`

mod args;
mod bar;
mod events;
mod register;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tidemill_engine::Device;
use tidemill_rlhf::dataset::Datasets;
use tidemill_rlhf::job::{Finished, Job, JobError, Rows, Spec};
use tidemill_rlhf::train::{Control, Ending, Outcome, Progress, TrainError};
use tidemill_rlhf::workplace::DriverCards;
use tidemill_store::{DataDir, Store, StoreError};
use tokio::signal::unix::{SignalKind, signal};

use super::store_args::StoreCommandError;
use crate::config::{Config, ConfigError, kernel_cache};
use crate::fine_tuning::{sign_in, take_turn, turn_file};
use crate::graders::DeskOracle;
pub use args::TrainArgs;

/// Exit status of a training that was stopped and can go on (`EX_TEMPFAIL` of sysexits.h).
const STOPPED: u8 = 75;
/// The specification inside a job's folder.
const SPEC: &str = "spec.json";

/// Why the command ended without an adapter.
#[derive(Debug, thiserror::Error)]
pub enum TrainCommandError {
    /// The store, its configuration, a file, or what was typed.
    #[error(transparent)]
    Store(#[from] StoreCommandError),
    /// The training.
    #[error(transparent)]
    Job(#[from] JobError),
}

impl From<StoreError> for TrainCommandError {
    fn from(error: StoreError) -> Self {
        StoreCommandError::from(error).into()
    }
}

impl From<ConfigError> for TrainCommandError {
    fn from(error: ConfigError) -> Self {
        StoreCommandError::from(error).into()
    }
}

/// Who hears how a training goes.
trait Audience: Send {
    /// Another process has the card.
    fn waits(&mut self) {}
    /// The card was waited for, and is had.
    fn waited(&mut self) {}
    fn prepared(&mut self, job: &Job);
    fn preparing(&mut self, done: usize, all: usize);
    fn progress(&mut self, progress: &Progress<'_>);
    fn ended(&mut self, folder: &Path, outcome: &Outcome, finished: Option<&Finished>);
    fn failed(&mut self, error: &TrainCommandError);
}

/// Runs the command.
pub fn run(args: &TrainArgs) -> Result<ExitCode, TrainCommandError> {
    if let Some(folder) = &args.job {
        args.priority.take();
        // A machine reads: whatever happens is a line.
        let mut audience = events::Lines;
        return Ok(match by_specification(args, folder, &mut audience) {
            Ok(code) => code,
            Err(error) => {
                audience.failed(&error);
                ExitCode::FAILURE
            }
        });
    }
    let config = args.place.config()?;
    let spec = args.spec(&config)?;
    let job = open(Some(&config), &spec)?;
    let mut bar = bar::Bar::new();
    bar.prepared(&job);
    if args.dry_run {
        bar.estimated(&spec, &job.estimate()?);
        return Ok(ExitCode::SUCCESS);
    }
    let folder = args.folder(&config, &spec);
    let ended = train(&job, &folder, Some(&spec), &mut bar, Arc::default())?;
    register::register(args, &config, &spec, &folder);
    Ok(ended)
}

fn by_specification(args: &TrainArgs, folder: &Path, audience: &mut dyn Audience) -> Result<ExitCode, TrainCommandError> {
    sign_in(folder).map_err(StoreCommandError::file(folder))?;
    let spec = Spec::read(&folder.join(SPEC))?;
    let turn = args.turn.as_deref().and_then(|data| turn_file(data, &spec.device));
    let mut waited = false;
    let mut waits = || {
        waited = true;
        audience.waits();
    };
    let take = |turn: PathBuf| take_turn(&turn, &mut waits).map_err(StoreCommandError::file(&turn));
    let _turn = turn.map(take).transpose()?;
    if waited {
        audience.waited();
    }
    // A server's job names its rows itself, and needs nothing of what the server was told.
    let needed = spec.dataset.is_some() || spec.device != Device::Cpu;
    let config = needed.then(|| args.place.config()).transpose()?;
    let stop = Arc::new(AtomicBool::new(false));
    let job = open(config.as_ref(), &spec)?.asking(Arc::new(DeskOracle::new(folder, Arc::clone(&stop), leave)));
    audience.prepared(&job);
    train(&job, folder, None, audience, stop)
}

/// Goes while a grade is waited for: the turn that wanted it is begun again by the next process.
fn leave() {
    std::process::exit(i32::from(STOPPED));
}

/// Reads the rows, from the store only where a dataset is named.
fn open(config: Option<&Config>, spec: &Spec) -> Result<Job, TrainCommandError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(StoreCommandError::Runtime)?;
    let rows = runtime.block_on(async {
        let Some(config) = config.filter(|_| spec.dataset.is_some()) else {
            return Ok::<_, TrainCommandError>(Rows::read(spec, None).await?);
        };
        let store = Store::open_for_command(&DataDir::new(&config.data), config.database.as_deref()).await?;
        let rows = Rows::read(spec, Some(&Datasets::new(store.clone(), config.datasets_root()))).await;
        store.close().await;
        Ok(rows?)
    })?;
    let job = Job::open(spec.clone(), rows)?;
    Ok(match config {
        Some(config) => job.with_cards(Arc::new(DriverCards { kernel_cache: Some(kernel_cache(&config.data)) }))?,
        None => job,
    })
}

/// Writes down what is trained in the folder; a second start with the same is the same training.
fn keep(folder: &Path, spec: &Spec) -> Result<(), TrainCommandError> {
    let path = folder.join(SPEC);
    let reason = |error: serde_json::Error| StoreCommandError::Json { path: path.clone(), reason: error.to_string() };
    let text = serde_json::to_string_pretty(spec).map_err(reason)?;
    std::fs::create_dir_all(folder).map_err(StoreCommandError::file(folder))?;
    let beside = folder.join("spec.partial");
    std::fs::write(&beside, text + "\n").map_err(StoreCommandError::file(&beside))?;
    Ok(std::fs::rename(&beside, &path).map_err(StoreCommandError::file(&path))?)
}

/// Trains. `spec` is written down as soon as the folder has taken the training: one that it refuses changes nothing there.
fn train(
    job: &Job,
    folder: &Path,
    spec: Option<&Spec>,
    audience: &mut dyn Audience,
    stop: Arc<AtomicBool>,
) -> Result<ExitCode, TrainCommandError> {
    stop_by_signal(Arc::clone(&stop))?;
    let audience = std::sync::Mutex::new(audience);
    let told = || audience.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut prepare = |done, all| {
        told().preparing(done, all);
        // Nothing is lost: what comes before the first step is computed again.
        if stop.load(Ordering::Relaxed) {
            std::process::exit(i32::from(STOPPED));
        }
    };
    let (mut unwritten, mut written) = (spec, Ok(()));
    let mut watch = |progress: &Progress<'_>| {
        told().progress(progress);
        if let Some(spec) = unwritten.take() {
            written = keep(folder, spec);
        }
        if written.is_err() || stop.load(Ordering::Relaxed) { Control::Stop } else { Control::Continue }
    };
    let (outcome, finished) = job.train(folder, &mut prepare, &mut watch)?;
    written?;
    // One that had taken its last step has nothing more to tell of.
    unwritten.map_or(Ok(()), |spec| keep(folder, spec))?;
    told().ended(folder, &outcome, finished.as_ref());
    Ok(if outcome.ending == Ending::Stopped { ExitCode::from(STOPPED) } else { ExitCode::SUCCESS })
}

/// Sets `seen` at the first SIGINT or SIGTERM; a second one ends the process at once.
fn stop_by_signal(seen: Arc<AtomicBool>) -> Result<(), TrainCommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(StoreCommandError::Runtime)?;
    let (mut term, mut int) = {
        let _guard = runtime.enter();
        let listen = |kind| signal(kind).map_err(StoreCommandError::Runtime);
        (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?)
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
                    if seen.swap(true, Ordering::Relaxed) {
                        std::process::exit(130);
                    }
                    let _ = writeln!(std::io::stderr(), "stopping after this step; once more to stop at once");
                }
            });
        })
        .map_err(StoreCommandError::Runtime)?;
    Ok(())
}

impl From<TrainError> for TrainCommandError {
    fn from(error: TrainError) -> Self {
        Self::Job(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::fs;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        train: TrainArgs,
    }

    #[test]
    fn a_training_that_does_not_fit_the_folder_changes_nothing_there() {
        let place = tempfile::tempdir().unwrap();
        let (rows, out) = (place.path().join("rows.jsonl"), place.path().join("out"));
        let row = r#"{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}"#;
        fs::write(&rows, format!("{row}\n{row}\n")).unwrap();
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/qwen2");
        let train = |steps: &str| {
            let paths = [("--file", &rows), ("--base", &base), ("--out", &out), ("--data", &place.path().join("data"))]
                .map(|(flag, path)| format!("{flag}={}", path.display()));
            let set = [format!("--set=max_steps={steps}"), "--no-register".to_owned(), "--threads=1".to_owned()];
            let line = ["train".to_owned(), "sft".to_owned()].into_iter().chain(paths).chain(set);
            run(&Line::parse_from(line).train)
        };
        train("2").unwrap();
        let spec = fs::read_to_string(out.join(SPEC)).unwrap();
        assert!(spec.contains("\"max_steps\": 2"), "{spec}");
        let error = train("3").unwrap_err().to_string();
        assert!(error.contains("a training with another configuration"), "{error}");
        assert_eq!(fs::read_to_string(out.join(SPEC)).unwrap(), spec);
        // The same again: nothing to train, and what was asked is written down.
        fs::remove_file(out.join(SPEC)).unwrap();
        train("2").unwrap();
        assert_eq!(fs::read_to_string(out.join(SPEC)).unwrap(), spec);
    }

    #[test]
    fn a_job_waits_for_the_card_of_its_specification_and_says_so() {
        #[derive(Default)]
        struct Heard(Vec<&'static str>, Option<std::sync::mpsc::Sender<()>>);
        impl Audience for Heard {
            fn waits(&mut self) {
                self.0.push("waits");
                self.1.take().unwrap().send(()).unwrap();
            }
            fn waited(&mut self) {
                self.0.push("waited");
            }
            fn prepared(&mut self, _: &Job) {}
            fn preparing(&mut self, _: usize, _: usize) {}
            fn progress(&mut self, _: &Progress<'_>) {}
            fn ended(&mut self, _: &Path, _: &Outcome, _: Option<&Finished>) {}
            fn failed(&mut self, _: &TrainCommandError) {}
        }
        let place = tempfile::tempdir().unwrap();
        let (job, data) = (place.path().join("job"), place.path().join("data"));
        fs::create_dir(&job).unwrap();
        let spec = r#"{"base": {"name": "m", "path": "/nowhere"}, "train_file": "/nowhere", "config": {"method": "sft"}, "device": "cuda:2"}"#;
        fs::write(job.join(SPEC), spec).unwrap();
        let paths = [("--job", &job), ("--turn", &data), ("--data", &data)];
        let told = paths.map(|(flag, path)| format!("{flag}={}", path.display()));
        let line = ["train".to_owned()].into_iter().chain(told).chain(["--config=/dev/null".to_owned()]);
        let args = Line::parse_from(line).train;
        let refused = by_specification(&args, &job, &mut Heard::default()).unwrap_err().to_string();
        let turn = data.join("cuda-2.turn");
        assert!(refused.starts_with(&turn.display().to_string()), "{refused}");

        fs::create_dir(&data).unwrap();
        let other = take_turn(&turn, || panic!("nobody has it")).unwrap();
        let (say, said) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn(move || {
            let mut heard = Heard(Vec::new(), Some(say));
            let refused = by_specification(&args, &job, &mut heard).unwrap_err().to_string();
            (heard.0, refused)
        });
        said.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
        drop(other);
        let (heard, refused) = waiting.join().unwrap();
        assert_eq!(heard, ["waits", "waited"]);
        assert!(refused.contains("/nowhere"), "{refused}");
    }
}
