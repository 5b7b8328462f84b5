//! `tidemill eval`

mod contest;
mod judge;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tidemill_engine::{Device, LoadError, ModelFiles};
use tidemill_rlhf::dataset::DatasetError;
use tidemill_rlhf::evaluate::answers::Sampling;
use tidemill_rlhf::evaluate::{EvaluateError, Evaluation, Gates, Referee, Rules, Trial, Work, evaluate};
use tidemill_rlhf::job::{Base, JobError};
use tidemill_rlhf::model::ModelOptions;
use tidemill_rlhf::registry::{RegistryError, check_base};
use tidemill_rlhf::reward::{RewardError, RewardFunction};
use tidemill_rlhf::train::{questions, read_questions};
use tidemill_rlhf::workplace::{DriverCards, Workplace};
use tidemill_store::StoreError;

use super::COMMAND_LINE;
use super::adapter::base_of;
use super::store_args::{DatasetStoreArgs, StoreCommandError, read_json};
use crate::clock::now;
use crate::config::value::size;
use crate::config::{Config, ConfigError, ModelSpec, Origin, kernel_cache, model_spec};
use crate::fine_tuning::{TrainingPriority, take_turn, turn_file};
use contest::{Contest, Named};
use judge::Judge;

/// Exit status of an adapter that the gates refuse. 1 is an error and 2 a wrong command line.
const REFUSED: u8 = 4;

/// Measure adapters: on held-out comparisons, on ordinary text, in their own answers, and against each other.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// An adapter's folder, NAME=FOLDER, or a registered adapter, which keeps what is found; a second one is compared with the first
    #[arg(long, value_name = "ADAPTER", required = true)]
    adapter: Vec<String>,
    /// A path or the name of a pulled model [default: that of the registered adapter, else the pulled default model]
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Snapshot whose held-out rows are used: NAME (its newest) or NAME@VERSION
    #[arg(long, value_name = "DATASET", conflicts_with = "file")]
    dataset: Option<String>,
    /// Rows that were not trained on, as a file
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Prompts to answer, as JSONL like that of `tidemill train grpo` [default: those of the rows]
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// How many prompts are answered; 0 for none
    #[arg(long, value_name = "N", default_value_t = 50)]
    prompts: usize,
    /// Ordinary text, to see whether the model still knows what it knew
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Judge of the first adapter against the second, or against the base: a reward model's adapter folder
    #[arg(long, value_name = "DIR", conflicts_with = "judge")]
    reward_model: Option<PathBuf>,
    /// The same: rules, as `tidemill train grpo --set reward_funcs=` takes them, such as [{"type":"json"}]
    #[arg(long, value_name = "JSON", conflicts_with_all = ["judge", "reward_model"])]
    reward_funcs: Option<String>,
    /// One number for each rule, such as [1,0.25] [default: 1 for each]
    #[arg(long, value_name = "JSON", requires = "reward_funcs")]
    reward_weights: Option<String>,
    /// The same: a model of an OpenAI-compatible server, asked twice with positions swapped
    #[arg(long, value_name = "MODEL")]
    judge: Option<String>,
    /// The judge's server; its key comes from OPENAI_API_KEY
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080/v1")]
    judge_url: String,
    /// Hold the first adapter against thresholds: JSON in a file, whose absent fields have their defaults, or `default`. The exit status
    /// is 0 when it passes and 4 when it is refused
    #[arg(long, value_name = "FILE|default")]
    gates: Option<String>,
    /// A control: turn half of the rows' labels around, so that gates must refuse
    #[arg(long)]
    shuffled_labels: bool,
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
    /// Where models are measured, answer and judge: cpu, cuda, cuda:N with the number of a card [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// Memory of the card that it may hold, such as 40GiB [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    device_memory: Option<usize>,
    /// How urgent it is beside a server: idle (what nobody else wants) or low [default: as urgent as any program]
    #[arg(long, value_enum)]
    priority: Option<TrainingPriority>,
    /// Folder for evaluation.json and evaluation.html [default: evaluation in the first adapter's parent folder; of a registered one
    /// evaluations/NAME@GENERATION in the data directory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Folder of a file that is locked while the card is used: a server's jobs and evaluations have it one after the other
    #[arg(long, value_name = "DIR", hide = true)]
    turn: Option<PathBuf>,
    /// Whom the audit names; a loop says its own name
    #[arg(long, hide = true, default_value = COMMAND_LINE)]
    by: String,
    #[command(flatten)]
    place: DatasetStoreArgs,
}

/// Why there is no evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvalCommandError {
    /// The store, its configuration, a file, or what was typed.
    #[error(transparent)]
    Store(#[from] StoreCommandError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The base model's files.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The rows.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The prompts.
    #[error("--prompt-file: {0}")]
    Prompts(DatasetError),
    /// The rules.
    #[error(transparent)]
    Rules(#[from] RewardError),
    /// The evaluation.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
}

impl From<StoreError> for EvalCommandError {
    fn from(error: StoreError) -> Self {
        StoreCommandError::from(error).into()
    }
}

impl From<ConfigError> for EvalCommandError {
    fn from(error: ConfigError) -> Self {
        StoreCommandError::from(error).into()
    }
}

/// Runs the command; the exit status is the gates', where they were asked.
pub fn run(args: &EvalArgs) -> Result<ExitCode, EvalCommandError> {
    if let Some(priority) = args.priority {
        priority.take();
    }
    let config = args.place.config()?;
    // Before the hours of work.
    let workplace = workplace(args, &config)?;
    let device = args.device.clone().unwrap_or_default();
    let turn = args.turn.as_deref().and_then(|data| turn_file(data, &device));
    let take = |turn: PathBuf| take_turn(&turn, || {}).map_err(StoreCommandError::file(&turn));
    let _turn = turn.map(take).transpose()?;
    let (gates, rules) = (args.gates.as_deref().map(gates).transpose()?, rules(args)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(StoreCommandError::Runtime)?;
    let Contest { adapters, rows, source } = runtime.block_on(contest::look_up(args, &config))?;
    let model = base(args, &config, &adapters)?;
    let text = args.text.as_deref().map(|path| std::fs::read_to_string(path).map_err(StoreCommandError::file(path)));
    let trial = Trial {
        base: Base { name: model.name, path: model.path },
        adapters: adapters.iter().map(|named| named.entrant.clone()).collect(),
        questions: match &args.prompt_file {
            Some(path) => read_questions(path).map_err(EvalCommandError::Prompts)?,
            None => questions(&rows),
        },
        rows,
        source,
        beta: args.beta,
        text: text.transpose()?,
        prompts: args.prompts,
        sampling: Sampling { temperature: args.temperature, max_tokens: args.max_tokens, seed: args.seed },
        model: ModelOptions { threads: args.threads.unwrap_or(0), ..ModelOptions::default() },
        workplace,
    };
    let folder = match (&args.out, adapters.first()) {
        (Some(folder), _) => folder.clone(),
        (None, Some(first)) => contest::place(&config, first),
        (None, None) => PathBuf::from("evaluation"),
    };
    let mut found = measure(args, &trial, rules)?;
    found.gates = gates.map(|gates| gates.judge(&found));
    say(&table(&found));
    let page = std::path::absolute(folder.join("evaluation.html")).map_err(StoreCommandError::file(&folder))?;
    let json = serde_json::to_string_pretty(&found)
        .map_err(|error| StoreCommandError::Json { path: folder.join("evaluation.json"), reason: error.to_string() })?;
    let put = |path: &Path, text: &str| {
        std::fs::create_dir_all(&folder).map_err(StoreCommandError::file(&folder))?;
        std::fs::write(path, text).map_err(StoreCommandError::file(path))
    };
    put(&folder.join("evaluation.json"), &json)?;
    put(&page, &found.to_html())?;
    if args.shuffled_labels {
        say("a control, which is not kept beside the adapter");
    } else {
        runtime.block_on(contest::attach(&config, &adapters, &found, &page, &args.by, now()))?;
    }
    say(&format!("page  {}", page.display()));
    let Some(report) = &found.gates else { return Ok(ExitCode::SUCCESS) };
    say(&report.to_text());
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::from(REFUSED) })
}

/// `default`, or a file.
fn gates(text: &str) -> Result<Gates, EvalCommandError> {
    let gates = if text == "default" { Gates::default() } else { read_json(Path::new(text))? };
    if gates.any() {
        return Ok(gates);
    }
    Err(StoreCommandError::Usage(format!("--gates {text}: all gates are off, so there is nothing to pass; leave --gates out"))
        .into())
}

/// The card, or the processor.
fn workplace(args: &EvalArgs, config: &Config) -> Result<Workplace, EvalCommandError> {
    let cards = Arc::new(DriverCards { kernel_cache: Some(kernel_cache(&config.data)) });
    Ok(Workplace::new(&args.device.clone().unwrap_or_default(), args.device_memory, cards)?)
}

fn rules(args: &EvalArgs) -> Result<Option<Rules>, EvalCommandError> {
    let wrong = |flag: &str, error: serde_json::Error| StoreCommandError::Usage(format!("{flag}: {error}"));
    let Some(text) = &args.reward_funcs else { return Ok(None) };
    let functions: Vec<RewardFunction> = serde_json::from_str(text).map_err(|error| wrong("--reward-funcs", error))?;
    let weights = args.reward_weights.as_deref().map(serde_json::from_str::<Vec<f64>>).transpose();
    Ok(Some(Rules::new(functions, weights.map_err(|error| wrong("--reward-weights", error))?)?))
}

/// The base model; of registered adapters the one that they were registered for, or nothing would be said of them.
fn base(args: &EvalArgs, config: &Config, adapters: &[Named]) -> Result<ModelSpec, EvalCommandError> {
    let rows = || adapters.iter().filter_map(|named| named.row.as_ref());
    let model = match rows().next() {
        Some(row) => base_of(config, row, args.base.as_deref())?,
        None => {
            let named: Vec<_> = args.base.iter().map(|model| (model.clone(), Origin::Flag("base"))).collect();
            let models = model_spec::resolve_all(&named, &config.data)?;
            models.into_iter().next().ok_or_else(|| StoreCommandError::Usage("no model was found".to_owned()))?
        }
    };
    if rows().any(|row| row.base_hash.is_some()) {
        let found = ModelFiles::open(&model.path)?.digest();
        for row in rows() {
            check_base(&row.reference(), row.base_hash.as_deref(), Some(&found))?;
        }
    }
    Ok(model)
}

fn measure(args: &EvalArgs, trial: &Trial, rules: Option<Rules>) -> Result<Evaluation, EvalCommandError> {
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
    let referee = match (&args.reward_model, rules, &args.judge) {
        (Some(folder), ..) => Referee::RewardModel(folder.clone()),
        (None, Some(rules), _) => Referee::Rules(rules),
        (None, None, Some(name)) => Referee::Judge(name.clone(), &mut ask),
        (None, None, None) => Referee::None,
    };
    let found = evaluate(trial, referee, &mut watch);
    bar.finish_and_clear();
    Ok(found?)
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
    for one in found.contenders.iter().filter(|one| !one.rewards.is_empty()) {
        let rewards: Vec<String> = one.rewards.iter().map(|(rule, reward)| format!("{rule} {reward:.3}")).collect();
        lines.push(format!("{:16} rewards: {}", one.name, rewards.join(", ")));
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
