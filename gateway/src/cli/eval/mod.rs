//! `tidemill eval`

mod judge;

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tidemill_rlhf::dataset::{Datasets, Row};
use tidemill_rlhf::evaluate::answers::Sampling;
use tidemill_rlhf::evaluate::{EvaluateError, Evaluation, Referee, Trial, Work, evaluate};
use tidemill_rlhf::job::{Base, JobError, Rows};
use tidemill_rlhf::model::ModelOptions;
use tidemill_store::{DataDir, Store, StoreError};

use super::serve::utf8_environment;
use crate::config::{Config, ConfigError, Layer, Origin, model_spec};
use judge::Judge;

/// Measure adapters: on held-out comparisons, on ordinary text, in their own answers, and against each other.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// An adapter's folder, or NAME=FOLDER; a second one is compared with the first
    #[arg(long, value_name = "DIR", required = true)]
    adapter: Vec<String>,
    /// A path or the name of a pulled model [default: the pulled default model]
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Snapshot whose held-out rows are used: NAME (its newest) or NAME@VERSION
    #[arg(long, value_name = "DATASET", conflicts_with = "file")]
    dataset: Option<String>,
    /// Rows that were not trained on, as a file
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Prompts of the rows that are answered; 0 for none
    #[arg(long, value_name = "N", default_value_t = 50)]
    prompts: usize,
    /// Ordinary text, to see whether the model still knows what it knew
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Judge of the first adapter against the second, or against the base: a reward model's adapter folder
    #[arg(long, value_name = "DIR", conflicts_with = "judge")]
    reward_model: Option<PathBuf>,
    /// The same: a model of an OpenAI-compatible server, asked twice with positions swapped
    #[arg(long, value_name = "MODEL")]
    judge: Option<String>,
    /// The judge's server; its key comes from OPENAI_API_KEY
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080/v1")]
    judge_url: String,
    /// β of the rewards that log-probabilities imply
    #[arg(long, default_value_t = 0.1)]
    beta: f64,
    /// Temperature of answers
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Folder for evaluation.json and evaluation.html [default: evaluation in the first adapter's parent folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Directory for models and records [default: ./data]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Where records are kept: postgres://USER:PASSWORD@HOST/NAME [default: SQLite in the data directory]
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Folder or URL that holds the datasets' tables [default: datasets in the data directory]
    #[arg(long, value_name = "PLACE")]
    datasets: Option<String>,
    /// Configuration file [default: tidemill.toml where there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Why there is no evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvalCommandError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The rows.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The evaluation.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// What was typed.
    #[error("{0}")]
    Usage(String),
    /// The system gives no runtime.
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

/// Runs the command.
pub fn run(args: &EvalArgs) -> Result<(), EvalCommandError> {
    let mut layer = Layer::default();
    for (key, value) in [("data", &args.data), ("database", &args.database), ("datasets", &args.datasets)] {
        if let Some(value) = value {
            layer.push(key, value.clone(), Origin::Flag(key));
        }
    }
    let config = Config::load(layer, args.config.as_deref(), utf8_environment())?;
    let named: Vec<_> = args.base.iter().map(|model| (model.clone(), Origin::Flag("base"))).collect();
    let models = model_spec::resolve_all(&named, &config.data)?;
    let model = models.into_iter().next().ok_or_else(|| EvalCommandError::Usage("no model was found".to_owned()))?;
    let adapters = args.adapter.iter().map(|text| adapter(text)).collect::<Result<Vec<_>, _>>()?;
    let (rows, source) = rows(args, &config)?;
    let text = match &args.text {
        Some(path) => {
            Some(std::fs::read_to_string(path).map_err(|source| EvalCommandError::File { path: path.clone(), source })?)
        }
        None => None,
    };
    let trial = Trial {
        base: Base { name: model.name, path: model.path },
        adapters,
        rows,
        source,
        beta: args.beta,
        text,
        prompts: args.prompts,
        sampling: Sampling { temperature: args.temperature, max_tokens: args.max_tokens, seed: args.seed },
        model: ModelOptions { threads: args.threads.unwrap_or(0), ..ModelOptions::default() },
    };
    let folder = match &args.out {
        Some(folder) => folder.clone(),
        None => trial.adapters[0].1.parent().unwrap_or(Path::new(".")).join("evaluation"),
    };
    let found = measure(args, &trial)?;
    say(&table(&found));
    let page = folder.join("evaluation.html");
    let json = serde_json::to_string_pretty(&found).map_err(|error| EvalCommandError::Usage(error.to_string()))?;
    let put = |path: &Path, text: &str| {
        let failed = |source| EvalCommandError::File { path: path.to_owned(), source };
        std::fs::create_dir_all(&folder).map_err(failed)?;
        std::fs::write(path, text).map_err(failed)
    };
    put(&folder.join("evaluation.json"), &json)?;
    put(&page, &found.to_html())?;
    say(&format!("page  {}", page.display()));
    Ok(())
}

fn measure(args: &EvalArgs, trial: &Trial) -> Result<Evaluation, EvalCommandError> {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{msg:32} {wide_bar} {human_pos}/{human_len} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut watch = |work: Work, name: &str, done: usize, all: usize| {
        let what = match work {
            Work::Comparisons => "comparisons",
            Work::Text => "text",
            Work::Answers => "answers",
            Work::Duel => "duel",
        };
        bar.set_message(format!("{what} · {name}"));
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let mut judge = args.judge.as_ref().map(|model| Judge::new(&args.judge_url, model));
    let mut ask = |messages: &[_], first: &str, second: &str| match &mut judge {
        Some(judge) => judge.compare(messages, first, second),
        None => Err(EvaluateError::Judge("there is none".to_owned())),
    };
    let referee = match (&args.reward_model, &args.judge) {
        (Some(folder), _) => Referee::RewardModel(folder.clone()),
        (None, Some(name)) => Referee::Judge(name.clone(), &mut ask),
        (None, None) => Referee::None,
    };
    let found = evaluate(trial, referee, &mut watch);
    bar.finish_and_clear();
    Ok(found?)
}

/// `NAME=FOLDER`, or a folder that is called as its training is.
fn adapter(text: &str) -> Result<(String, PathBuf), EvalCommandError> {
    let (name, folder) = match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() => (Some(name.to_owned()), PathBuf::from(folder)),
        _ => (None, PathBuf::from(text)),
    };
    if !folder.is_dir() {
        return Err(EvalCommandError::Usage(format!("--adapter {text}: there is no such folder")));
    }
    let own = folder.file_name().filter(|own| *own != "adapter");
    let called = own.or_else(|| folder.parent()?.file_name()).unwrap_or_default().to_string_lossy().into_owned();
    let name = name.unwrap_or(if called.is_empty() { "adapter".to_owned() } else { called });
    Ok((name, folder))
}

/// The rows that were held out, and where they came from.
fn rows(args: &EvalArgs, config: &Config) -> Result<(Vec<Row>, String), EvalCommandError> {
    if args.dataset.is_none() && args.file.is_none() {
        return Ok((Vec::new(), "no rows".to_owned()));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(EvalCommandError::Runtime)?;
    runtime.block_on(async {
        if let Some(path) = &args.file {
            return Ok(Rows::unseen(path).await?);
        }
        let store = Store::open_for_command(&DataDir::new(&config.data), config.database.as_deref()).await?;
        let datasets = Datasets::new(store.clone(), config.datasets_root());
        let found = Rows::held_out_of(args.dataset.as_deref().unwrap_or_default(), &datasets).await;
        store.close().await;
        Ok(found?)
    })
}

/// The numbers side by side, for the terminal.
fn table(found: &Evaluation) -> String {
    let mut lines = vec![format!(
        "{:16} {:>9} {:>8} {:>8} {:>7} {:>7} {:>8} {:>9}",
        "", "won", "margin", "loss", "words", "refuse", "cut off", "KL/token"
    )];
    for one in &found.contenders {
        let cell = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
        lines.push(format!(
            "{:16} {:>9} {:>8} {:>8} {:>7} {:>7} {:>8} {:>9}",
            one.name,
            cell(one.preferences.map(|found| format!("{:.1} %", 100.0 * found.accuracy.share))),
            cell(one.preferences.map(|found| format!("{:.3}", found.margin))),
            cell(one.text.map(|found| format!("{:.3}", found.loss))),
            cell(one.answers.map(|found| format!("{:.0}", found.median_words))),
            cell(one.answers.map(|found| format!("{:.0} %", 100.0 * found.refusals.share))),
            cell(one.answers.map(|found| format!("{:.0} %", 100.0 * found.truncated.share))),
            cell(one.answers.and_then(|found| found.kl_per_token).map(|kl| format!("{kl:.4}"))),
        ));
    }
    if let (Some(duel), Some(judge), [first, second, ..]) = (&found.duel, &found.judge, found.contenders.as_slice()) {
        let interval =
            duel.decided.map_or_else(String::new, |found| format!(" ({:.2} to {:.2} of those decided)", found.low, found.high));
        lines.push(format!(
            "{} against {} by {judge}: {} won, {} lost, {} tied; win rate {:.2}{interval}",
            first.name, second.name, duel.won, duel.lost, duel.tied, duel.win_rate
        ));
    }
    lines.join("\n")
}

/// A closed standard output is no reason to stop.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}
