//! One job, from its files to its model.

use crate::clock::now;
use crate::fine_tuning::device::{Move, TrainingDevice, job_arguments};
use crate::fine_tuning::method::Method;
use crate::fine_tuning::process::{LOCK, LOG, Process, SAID};
use crate::fine_tuning::progress::{self, Last, csv, listen};
use crate::fine_tuning::rows::convert;
use crate::fine_tuning::served;
use crate::fine_tuning::spec::{Bench, last_name, spec};
use crate::fine_tuning::trainings::{Training, Trainings};
use crate::fine_tuning::{FineTuningOptions, folder_of};
use crate::graders::Desk;
use crate::graders::desk::Petitioner;
use crate::http::inside::Inside;
use crate::http::{App, job_name};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};
use tidemill_kernels::cuda::driver;
use tidemill_rlhf::job::{ADAPTER, LINEAGE, Spec};
use tidemill_store::{
    FileRecord, FineTuningCheckpoint, FineTuningJob, FineTuningState as State, FineTunings, Heard, Made, News, StoreError,
    Viewer, write_atomically,
};
use tokio::sync::{Semaphore, watch};
use tokio::time::sleep;
use uuid::Uuid;

/// A training is looked at this often.
const POLL: Duration = Duration::from_millis(250);
/// Its row, every so many looks.
const ROW_POLLS: u32 = 4;
/// How long a training that was told to stop may take for its step and its checkpoint, before it is killed: when it is paused, when
/// nobody wants what it has, and when the server leaves. A kill costs what was learnt since the last checkpoint, and only time.
const PAUSING: Duration = Duration::from_secs(300);
const CANCELLING: Duration = Duration::from_secs(10);
const LEAVING: Duration = Duration::from_secs(20);
/// After the disk or the database failed, a job waits so long before it goes on.
const PAUSE: Duration = Duration::from_secs(5);
/// Processes that may end one after the other without a step.
const MAX_ATTEMPTS: u64 = 4;
/// Files that are looked through at once.
const LOOKS: usize = 1;
/// The rows and what the training is told, in a job's folder.
const TRAIN: &str = "train.jsonl";
const HELD_OUT: &str = "held_out.jsonl";
/// What the trainer keeps there beside the adapter.
const METRICS: &str = "metrics.jsonl";
const REPORT: &str = "report.html";
const SPEC: &str = "spec.json";
/// Begins the names of its checkpoints.
const CHECKPOINT: &str = "checkpoint-";
/// What a job has that takes no step yet.
const UNBEGUN: [&str; 6] = [TRAIN, HELD_OUT, SPEC, LOCK, SAID, LOG];

/// What is to be done about a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// Look through its files.
    LookThrough,
    /// Train.
    Train,
    /// End a process that nobody wants any more.
    End,
}

/// What runs jobs.
pub(super) struct Runner {
    rows: FineTunings,
    app: App,
    inside: Inside,
    options: FineTuningOptions,
    trainings: Trainings,
    looks: Semaphore,
    leaving: watch::Receiver<bool>,
}

/// A fault that passes: the job goes on later.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("its folder: {0}")]
    Disk(#[from] io::Error),
    #[error("its row: {0}")]
    Store(#[from] StoreError),
    #[error("its model: {0}")]
    Model(served::NotMade),
}

/// Why a job can have no model.
struct Failure {
    code: &'static str,
    param: Option<&'static str>,
    message: String,
}

impl Failure {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, param: None, message: message.into() }
    }
}

/// Why a process is not there any more.
enum End {
    /// It ended by itself; the status where it was started here.
    Over(Option<ExitStatus>),
    /// The job is not to run.
    Unwanted,
    /// The server leaves.
    Leaving,
}

impl Runner {
    pub(super) fn new(
        rows: FineTunings,
        app: App,
        options: FineTuningOptions,
        trainings: Trainings,
        leaving: watch::Receiver<bool>,
    ) -> Self {
        let inside = Inside::new(app.clone());
        Self { rows, app, inside, options, trainings, looks: Semaphore::new(LOOKS), leaving }
    }

    /// Does what is to be done, or as much of it as there is time for before the server leaves.
    pub(super) async fn run(&self, id: Uuid, task: Task) {
        loop {
            let done = match task {
                Task::LookThrough => self.look_through(id).await,
                Task::Train => self.train(id).await,
                Task::End => self.end(id).await,
            };
            let Err(trouble) = done else { return };
            tracing::warn!(job = %id, error = %trouble, "a fine-tuning job stands still because of a fault; it goes on in some seconds");
            let mut leaving = self.leaving.clone();
            tokio::select! {
                _ = leaving.wait_for(|leaving| *leaving) => return,
                () = sleep(PAUSE) => {}
            }
        }
    }

    fn folder(&self, id: Uuid) -> PathBuf {
        folder_of(&self.options.root, id)
    }

    /// Lets it wait for its turn, or fails it with all that is wrong with its files.
    async fn look_through(&self, id: Uuid) -> Result<(), Trouble> {
        let Ok(_turn) = self.looks.acquire().await else { return Ok(()) };
        let Some(job) = self.rows.find(id, &Viewer::Anyone).await? else { return Ok(()) };
        if job.state != State::ValidatingFiles {
            return Ok(());
        }
        match self.prepare(&job).await? {
            Ok((method, steps, rows)) => {
                let word = if rows == 1 { "example" } else { "examples" };
                let news = News::info(format!("The files are valid: {rows} {word}, {steps} steps. The job waits for its turn."));
                if !self.rows.validated(id, &method.to_json(), steps, &[news], now()).await? {
                    // Cancelled meanwhile.
                    self.clear_if_ended(id).await?;
                }
            }
            Err(failure) => self.fail(&job, failure).await?,
        }
        Ok(())
    }

    /// Starts the process that trains in a folder; `None` when somebody is at work there.
    fn start(&self, folder: &Path) -> io::Result<Option<Process>> {
        let FineTuningOptions { program, priority, data, .. } = &self.options;
        Process::start(program, folder, *priority, &job_arguments(&std::path::absolute(data)?))
    }

    /// Writes everything that the process needs.
    async fn prepare(&self, job: &FineTuningJob) -> Result<Result<(Method, u64, usize), Failure>, Trouble> {
        let draft = &job.draft;
        let Ok(method) = Method::stored(&draft.method) else {
            return Ok(Err(Failure::new("invalid_method", "The job's method is not one that this server knows; make it again.")));
        };
        let gone = |name: &str| {
            let message = format!("The model `{name}` is not served here any more; choose another, or start the server with it.");
            Ok(Err(Failure { param: Some("model"), ..Failure::new("model_not_found", message) }))
        };
        let model = served::base(&self.app.registry, &draft.base);
        let (Some(model), Some(base)) = (model, self.options.models.get(&draft.base)) else { return gone(&draft.base) };
        let adapter = if draft.model == draft.base {
            None
        } else {
            let made = self.rows.find_model(last_name(&draft.model), &Viewer::Anyone).await?;
            let parent = served::folder_of_model(&self.app, &draft.model).await?.filter(|_| made.is_some());
            let Some(parent) = parent else { return gone(&draft.model) };
            Some(std::path::absolute(parent)?)
        };
        let folder = std::path::absolute(self.folder(draft.id))?;
        std::fs::create_dir_all(&folder)?;
        let (train, held_out) = (folder.join(TRAIN), folder.join(HELD_OUT));
        let files = [(Some(draft.training_file), &train, "training_file"), (draft.validation_file, &held_out, "validation_file")];
        let mut found = Vec::new();
        for (file, output, param) in files {
            let Some(file) = file else { continue };
            let (input, output, name) = (self.app.files.path(file), output.clone(), crate::http::file_name(file));
            let of = method.clone();
            let work = move || convert(&input, &output, &name, &of);
            let failure = |message: String| {
                let code = if param == "training_file" { "invalid_training_file" } else { "invalid_validation_file" };
                Failure { param: Some(param), ..Failure::new(code, message) }
            };
            match tokio::task::spawn_blocking(work).await.map_err(io::Error::other)? {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Err(failure(format!("The file of '{param}' is not there any more; upload it again."))));
                }
                Err(error) => return Err(error.into()),
                Ok(Err(why)) => return Ok(Err(failure(format!("The file of '{param}' cannot be trained on. {why}")))),
                Ok(Ok(rows)) => found.push(rows),
            }
        }
        let rows = found.first().copied().unwrap_or_default();
        let method = method.resolved(rows.rows, model.context());
        let bench = Bench {
            base: (&draft.base, &std::path::absolute(base)?),
            adapter: adapter.as_deref(),
            context: model.context(),
            max_rank: model.engine().options().max_adapter_rank,
            threads: self.options.threads,
            device: &self.options.device,
            train: &train,
            held_out: draft.validation_file.map(|_| held_out.as_path()),
        };
        match spec(draft, &method, rows, &bench) {
            Ok(spec) => {
                let text = serde_json::to_vec_pretty(&spec).map_err(io::Error::other)?;
                write_atomically(&folder.join(SPEC), &text)?;
                let steps = method.steps(rows.rows);
                Ok(Ok((method, steps, rows.rows)))
            }
            Err(error) => Ok(Err(Failure::new("invalid_method", format!("{error}.")))),
        }
    }

    /// Trains, with as many processes as it takes.
    async fn train(&self, id: Uuid) -> Result<(), Trouble> {
        let Some(job) = self.rows.find(id, &Viewer::Anyone).await? else { return Ok(()) };
        let folder = std::path::absolute(self.folder(id))?;
        let said = folder.join(SAID);
        let mut heard = Heard {
            read_bytes: job.read_bytes,
            step: job.step,
            steps: job.steps,
            evaluated: job.evaluated,
            tokens: job.trained_tokens,
            ..Heard::default()
        };
        let mut news = vec![match (job.state, job.step) {
            (State::Running, _) => News::info("The server was started again; the training goes on."),
            (_, 0) => News::info("The training has begun."),
            (_, step) => News::info(format!("The training goes on after step {step}.")),
        }];
        let unfinished = progress::last(&said)? != Some(Last::Finished);
        if unfinished && Process::left(&folder)?.is_none() {
            let (moved, told) = self.place(&folder)?;
            news.extend(told);
            if moved == Move::BeginsAnew {
                // Of what the earlier training said that was not heard nothing is true any more.
                let read_bytes = std::fs::metadata(&said).map_or(heard.read_bytes, |file| file.len());
                heard = Heard { step: 0, evaluated: 0, tokens: None, read_bytes, ..heard };
            }
        }
        let _desk = self.desk(&job, &folder)?;
        let training = self.trainings.begin(&job, &job_name(id));
        loop {
            let left = Process::left(&folder)?;
            // What a server that was killed has not heard any more.
            let over = left.is_none() && progress::last(&said)? == Some(Last::Finished) && folder.join(ADAPTER).is_dir();
            let more = u64::from(left.is_none() && !over);
            let Some(attempts) = self.rows.begin(id, more, &std::mem::take(&mut news), now()).await? else {
                // Cancelled or paused just before.
                return self.end(id).await;
            };
            self.hear(id, &said, &mut heard).await;
            if over {
                return self.finish(&job, &heard).await;
            }
            if attempts > MAX_ATTEMPTS {
                let message =
                    format!("The training process ended {MAX_ATTEMPTS} times without taking a step; the server's log says how.");
                return self.fail(&job, Failure::new("training_failed", message)).await;
            }
            let mut process = match left {
                Some(left) => left,
                None => match self.start(&folder) {
                    Ok(Some(started)) => started,
                    not_started => {
                        // There was no process that could have taken a step.
                        self.rows.forgive(id, now()).await?;
                        let busy = || io::Error::new(io::ErrorKind::ResourceBusy, "another process trains in it");
                        return Err(not_started.err().unwrap_or_else(busy).into());
                    }
                },
            };
            tracing::info!(job = %id, adopted = more == 0, "training");
            // What one says that was found at work may have been heard by the server before.
            let before = if more == 0 { 0 } else { heard.read_bytes };
            let status = match self.watch(&training, id, &mut process, (&said, before), &mut heard).await? {
                End::Leaving => {
                    self.rows.forgive(id, now()).await?;
                    return Ok(());
                }
                End::Unwanted => return self.clear_if_ended(id).await,
                End::Over(status) => status,
            };
            match progress::last(&said)? {
                Some(Last::Finished) => return self.finish(&job, &heard).await,
                Some(Last::Failed(why)) => {
                    // Where it lies is nobody's business.
                    let why = why.replace(&*folder.to_string_lossy(), "the job's folder");
                    let message = format!("The training failed: {}.", why.trim_end_matches('.'));
                    return self.fail(&job, Failure::new("training_failed", message)).await;
                }
                Some(Last::Stopped) | None => {
                    let how = status.map_or_else(|| "in an unknown way".to_owned(), |status| status.to_string());
                    tracing::warn!(job = %id, how, log = %folder.join(LOG).display(), "a training ended before its time");
                    news.push(News::warn(format!(
                        "The training process ended before its time ({how}); it goes on from its last checkpoint."
                    )));
                }
            }
            sleep(POLL).await;
        }
    }

    /// Writes down where the job's next process computes and on how many threads, by today's settings; what is to be told of it.
    fn place(&self, folder: &Path) -> Result<(Move, Option<News>), Trouble> {
        let path = folder.join(SPEC);
        // What is wrong with it the process says, and ends the job.
        let Ok(mut spec) = Spec::read(&path) else { return Ok((Move::Stays, None)) };
        let mut entries = std::fs::read_dir(folder)?.flatten();
        let begun = entries.any(|entry| entry.file_name().to_string_lossy().starts_with(CHECKPOINT));
        let (told, now) = (TrainingDevice { device: spec.device.clone(), memory: spec.device_memory }, &self.options.device);
        let moved = if told == *now { Move::Stays } else { Move::of(&told, begun, now, driver::has_card) };
        if moved == Move::Stays && spec.threads == self.options.threads {
            return Ok((moved, None));
        }
        let news = match moved {
            Move::Stays => None,
            Move::Follows => (begun && told.card() != now.card()).then(|| {
                News::info(format!(
                    "The training goes on on {}, where trainings are now; it began on {}.",
                    now.device, told.device
                ))
            }),
            Move::BeginsAnew => {
                clear_but(folder, &UNBEGUN)?;
                Some(News::warn(format!(
                    "The card that the training began on ({}) is not there any more; it begins anew on the processor.",
                    told.device
                )))
            }
        };
        if moved != Move::Stays {
            (spec.device, spec.device_memory) = (now.device.clone(), now.memory);
        }
        spec.threads = self.options.threads;
        let text = serde_json::to_vec_pretty(&spec).map_err(io::Error::other)?;
        write_atomically(&path, &text)?;
        Ok((moved, news))
    }

    /// Where the job's process asks models, if its grader names any.
    fn desk(&self, job: &FineTuningJob, folder: &Path) -> Result<Option<Desk>, Trouble> {
        let grader = Method::stored(&job.draft.method).ok().and_then(|method| method.grader);
        let models: Vec<String> = grader.iter().flat_map(|grader| grader.models()).map(|(_, model)| model.to_owned()).collect();
        if models.is_empty() {
            return Ok(None);
        }
        let petitioner = Petitioner { job: job_name(job.draft.id), key_id: job.draft.key_id.clone(), models };
        Ok(Some(Desk::open(folder, self.inside.clone(), self.app.store.clone(), petitioner)?))
    }

    /// Follows a process until it is gone. It speaks behind the first `before` bytes of what was said.
    async fn watch(
        &self,
        training: &Training,
        id: Uuid,
        process: &mut Process,
        (said, before): (&Path, u64),
        heard: &mut Heard,
    ) -> Result<End, Trouble> {
        let mut told: Option<(End, Instant)> = None;
        let (mut polls, mut queued) = (0_u32, false);
        loop {
            sleep(POLL).await;
            polls = polls.wrapping_add(1);
            let ended = process.ended()?;
            let waits = ended.is_none() && progress::waits(said, before).unwrap_or(queued);
            if waits != queued && told.is_none() {
                // Without a database it is still heard and asked to stop.
                match self.rows.wait(id, waits, now()).await {
                    Ok(_) => queued = waits,
                    Err(error) => tracing::warn!(job = %id, %error, "cannot write down whether a training waits for its card"),
                }
            }
            // After it is gone, so that nothing that it said is missed.
            self.hear(id, said, heard).await;
            training.look(said, heard.read_bytes);
            if let Some(status) = ended {
                return Ok(told.map_or(End::Over(status), |(end, _)| end));
            }
            let leaving = *self.leaving.borrow();
            match &mut told {
                Some((end, deadline)) => {
                    if leaving && !matches!(end, End::Leaving) {
                        *end = End::Leaving;
                        *deadline = (*deadline).min(Instant::now() + LEAVING);
                    }
                    if Instant::now() >= *deadline {
                        tracing::warn!(job = %id, "a training did not stop in time and is killed");
                        process.kill();
                    }
                }
                None if leaving => {
                    process.ask();
                    told = Some((End::Leaving, Instant::now() + LEAVING));
                }
                None if polls.is_multiple_of(ROW_POLLS) => {
                    let patience = match self.rows.state(id).await {
                        // It goes on while the database is away.
                        Err(error) => {
                            tracing::warn!(job = %id, %error, "cannot look up a fine-tuning job");
                            continue;
                        }
                        Ok(Some(State::Running)) => continue,
                        // Also where it was written and the answer did not come.
                        Ok(Some(State::Queued)) if queued || waits => continue,
                        Ok(Some(State::Paused | State::Queued)) => PAUSING,
                        Ok(_) => CANCELLING,
                    };
                    process.ask();
                    told = Some((End::Unwanted, Instant::now() + patience));
                }
                None => {}
            }
        }
    }

    /// Takes over what was said since the last time.
    async fn hear(&self, id: Uuid, said: &Path, heard: &mut Heard) {
        loop {
            let more = match listen(said, heard, now()) {
                Ok(Some(more)) => more,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(job = %id, %error, "cannot read how far a training is");
                    return;
                }
            };
            // What cannot be written now is read again the next time.
            if let Err(error) = self.rows.hear(id, &more, now()).await {
                tracing::warn!(job = %id, %error, "cannot write down how far a training is");
                return;
            }
            *heard = Heard { news: Vec::new(), ..more };
        }
    }

    /// Ends a process that no job wants, where there is one.
    async fn end(&self, id: Uuid) -> Result<(), Trouble> {
        let folder = self.folder(id);
        let Some(mut process) = Process::left(&folder)? else { return self.clear_if_ended(id).await };
        process.ask();
        let deadline = Instant::now() + CANCELLING;
        while process.ended()?.is_none() {
            if Instant::now() >= deadline {
                process.kill();
            }
            sleep(POLL).await;
        }
        self.clear_if_ended(id).await
    }

    /// Serves the models, shows the metrics, and ends the job.
    async fn finish(&self, job: &FineTuningJob, heard: &Heard) -> Result<(), Trouble> {
        let (draft, folder, now) = (&job.draft, self.folder(job.draft.id), now());
        let models = match served::publish(&self.app, draft, &folder).await {
            Ok(models) => models,
            Err(error) if error.is_final() => {
                return self.fail(job, Failure::new("invalid_model", format!("The model cannot be served: {error}."))).await;
            }
            Err(error) => return Err(Trouble::Model(error)),
        };
        let log = std::fs::read_to_string(folder.join(METRICS)).unwrap_or_default();
        let (mut news, mut checkpoints, mut model) = (Vec::new(), Vec::new(), String::new());
        for made in &models {
            let metrics = match made.step {
                Some(step) => progress::metrics(
                    step,
                    made.metrics.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?))),
                ),
                None => last_metrics(&log, heard.step),
            };
            let step = made.step.unwrap_or(heard.step);
            checkpoints.push(FineTuningCheckpoint { step, created: now, model: made.name.clone(), metrics });
            news.push(News::info(match made.step {
                Some(step) => format!("The model after step {step} was kept as `{}`.", made.name),
                None => format!("The model `{}` was made.", made.name),
            }));
            news.extend(
                made.problem.iter().map(|why| News::warn(format!("The model is not served now: {}.", why.trim_end_matches('.')))),
            );
            // The last of them is the job's.
            model.clone_from(&made.name);
        }
        let table = csv(&log);
        let result = self.app.files.path(draft.result_file);
        write_atomically(&result, table.as_bytes())?;
        let result = FileRecord {
            id: draft.result_file,
            created: now,
            key_id: draft.key_id.clone(),
            filename: "step_metrics.csv".to_owned(),
            purpose: "fine-tune-results".to_owned(),
            bytes: table.len() as u64,
            expires: None,
            place: draft.place.clone(),
        };
        news.push(News::info("The job has successfully completed."));
        let made = Made { model: model.clone(), result: Some(result), checkpoints };
        if self.rows.succeed(draft.id, &made, &news, now).await? {
            tracing::info!(job = %draft.id, model, "fine-tuning job succeeded");
        } else {
            // Cancelled or paused in this very moment.
            let names: Vec<String> = models.into_iter().map(|model| model.name).collect();
            let withdrawn = served::withdraw(&self.app, &names, &job_name(draft.id).into()).await;
            withdrawn.map_err(|error| Trouble::Model(error.into()))?;
        }
        self.clear_if_ended(draft.id).await
    }

    async fn fail(&self, job: &FineTuningJob, failure: Failure) -> Result<(), Trouble> {
        let Failure { code, param, message } = failure;
        tracing::info!(job = %job.draft.id, code, "fine-tuning job failed");
        let error = json!({ "code": code, "message": message, "param": param });
        self.rows.fail(job.draft.id, &error, &[News::error(message)], now()).await?;
        self.clear_if_ended(job.draft.id).await
    }

    /// Removes from the folder of a job that has ended what nobody needs any more: of a cancelled one everything, of one with a model
    /// all but how it came to be, of a failed one all but its logs.
    async fn clear_if_ended(&self, id: Uuid) -> Result<(), Trouble> {
        let state = self.rows.state(id).await?;
        let kept: &[&str] = match state {
            // The registry has the adapters.
            Some(State::Succeeded) => &[LINEAGE, METRICS, SPEC, LOG, SAID, REPORT],
            Some(State::Failed) => &[METRICS, SPEC, LOG, SAID],
            Some(State::Cancelled) => &[],
            // Without a row it is another database's.
            _ => return Ok(()),
        };
        let folder = self.folder(id);
        if kept.is_empty() {
            return Ok(absent_is_fine(std::fs::remove_dir_all(&folder))?);
        }
        clear_but(&folder, kept)?;
        // Of one that never trained nothing is left; a folder with something in it stays.
        let _ = std::fs::remove_dir(&folder);
        Ok(())
    }
}

/// Removes what is in a folder, if there is one, but what has these names.
fn clear_but(folder: &Path, kept: &[&str]) -> io::Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        if kept.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let path = entry.path();
        absent_is_fine(if entry.file_type()?.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) })?;
    }
    Ok(())
}

fn absent_is_fine(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The last of each metric in a training's log, in the form of the API.
fn last_metrics(log: &str, step: u64) -> Value {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Map<String, Value>>(line).ok());
    let last: BTreeMap<String, f64> =
        lines.flatten().filter_map(|(name, value)| Some((name, value.as_f64()?))).filter(|(name, _)| name != "step").collect();
    progress::metrics(step, last.iter().map(|(name, value)| (name.as_str(), *value)))
}
