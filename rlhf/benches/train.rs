//! DPO on a real model: pairs per second, processor time, peak memory and the loss on held-out rows; one JSON line per training.
//!
//! `cargo bench -p tidemill-rlhf --bench train -- [--model FILE] [--rows FILE] [--held-out N] [--steps N] [--threads N] [--recompute] [--without TRICK]…`
//!
//! Without `--without`, the whole product; a trick is one of `shared-prompt`, `packing`, `kept-reference`, `labels-only`, `frozen-weights` and
//! `bf16`, or `all` of them. `--each` measures them all in turn, each in a process of its own. The clock runs from tokens to the last step,
//! the reference's pass included; tokenising, loading and the evaluation are outside. The model is `TIDEMILL_TEST_MODEL` unless named;
//! without rows, some are made.

#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a benchmark stops at the first surprise and prints")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{D, DType, Device, Tensor};
use serde_json::{Value, json};
use tidemill_engine::{LoraConfig, ModelFiles, Weight};
use tidemill_rlhf::batch::{Label, Packed};
use tidemill_rlhf::collate::{Encoder, Sample};
use tidemill_rlhf::dataset::{Example, Message, Origin, Row};
use tidemill_rlhf::model::{Model, ModelOptions, Precision};
use tidemill_rlhf::optimizer::SchedulerType;
use tidemill_rlhf::parameters::Parameters;
use tidemill_rlhf::train::{Control, Method, Metrics, Offline, Pass, Policy, Stage, TrainConfig, Trainer, train};

const TRICKS: [&str; 6] = ["shared-prompt", "packing", "kept-reference", "labels-only", "frozen-weights", "bf16"];
const BATCH: usize = 4;
const SEED: u64 = 7;

struct Arguments {
    model: PathBuf,
    rows: Option<PathBuf>,
    held_out: usize,
    steps: usize,
    threads: usize,
    without: Vec<String>,
    each: bool,
    recompute: bool,
}

fn main() {
    let arguments = arguments();
    if arguments.each {
        let own = std::env::current_exe().expect("this program");
        let rest: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--each").collect();
        for trick in std::iter::once(None).chain(TRICKS.into_iter().chain(["all"]).map(Some)) {
            let without = trick.into_iter().flat_map(|trick| ["--without", trick]);
            assert!(Command::new(&own).args(&rest).args(without).status().expect("starts").success(), "{trick:?} failed");
        }
        return;
    }
    println!("{}", measure(&arguments));
}

fn arguments() -> Arguments {
    let mut found = Arguments {
        model: std::env::var_os("TIDEMILL_TEST_MODEL").map(PathBuf::from).unwrap_or_default(),
        rows: None,
        held_out: 16,
        steps: 16,
        threads: 0,
        without: Vec::new(),
        each: false,
        recompute: false,
    };
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} wants a value"));
        let number = |text: String| text.parse::<usize>().expect("a number");
        match word.as_str() {
            "--each" => found.each = true,
            "--recompute" => found.recompute = true,
            "--model" => found.model = value().into(),
            "--rows" => found.rows = Some(value().into()),
            "--held-out" => found.held_out = number(value()),
            "--steps" => found.steps = number(value()),
            "--threads" => found.threads = number(value()),
            "--without" => match value().as_str() {
                "all" => found.without = TRICKS.map(str::to_owned).to_vec(),
                trick if TRICKS.contains(&trick) => found.without.push(trick.to_owned()),
                other => panic!("{other} is not one of {TRICKS:?}"),
            },
            other => panic!("what is {other}?"),
        }
    }
    assert!(!found.model.as_os_str().is_empty(), "name a model with --model or TIDEMILL_TEST_MODEL");
    found
}

fn measure(arguments: &Arguments) -> Value {
    let without = |trick: &str| arguments.without.iter().any(|other| other == trick);
    let files = Arc::new(ModelFiles::open(&arguments.model).expect("a model"));
    let options = ModelOptions {
        threads: arguments.threads,
        precision: if without("bf16") { Precision::F32 } else { Precision::Bf16 },
        frozen_gradients: without("frozen-weights"),
        recompute: arguments.recompute,
    };
    let lora = LoraConfig { r: 16, alpha: 32.0, dropout: 0.0, ..LoraConfig::default() };
    let model = Model::new(Arc::clone(&files), &lora, SEED, options).expect("a model");
    let head = without("labels-only").then(|| head(&files));
    let policy = Bench { model: &model, padding: without("packing"), head };

    let config = TrainConfig {
        learning_rate: Some(1e-4),
        lr_scheduler_type: SchedulerType::Linear,
        warmup_steps: 2,
        per_device_train_batch_size: BATCH,
        max_steps: arguments.steps as i64,
        shuffle: false,
        max_length: None,
        eval_steps: Some(u64::MAX),
        precompute_ref_log_probs: Some(!without("kept-reference")),
        ..TrainConfig::new(Method::Dpo)
    };
    let mut samples = samples(arguments, &files, &config);
    let held_out = samples.split_off(samples.len() - arguments.held_out);
    samples.truncate(arguments.steps * BATCH);
    let tokens: usize =
        samples.iter().map(|s| 2 * s.prompt.len() + s.completions.iter().map(|c| c.tokens.len()).sum::<usize>()).sum();

    let folder = tempfile::tempdir().expect("a folder");
    let (began, cpu) = (Instant::now(), processor_time());
    let share = !without("shared-prompt");
    let mut offline = Offline::laid_out(share, &policy, &config, samples, Vec::new(), None, &mut |_, _| {}).expect("rows");
    let prepared = began.elapsed();
    let (mut wall, mut spent, mut first_loss) = (0.0, 0.0, None);
    train(&policy, &mut offline, &config, folder.path(), &mut |progress| {
        if progress.stage == Stage::Training {
            first_loss.get_or_insert(progress.metrics["loss"]);
            (wall, spent) = (began.elapsed().as_secs_f64(), processor_time() - cpu);
        }
        Control::Continue
    })
    .expect("a training");
    let peak = peak_mib();
    let pairs = arguments.steps * BATCH;
    json!({
        "without": arguments.without,
        "pairs": pairs,
        "tokens_a_side": tokens as f64 / (2 * pairs) as f64,
        "wall_s": wall,
        "cpu_s": spent,
        "reference_s": prepared.as_secs_f64(),
        "peak_mib": peak,
        "first_loss": first_loss,
        "held_out_loss": held_out_loss(&policy, &config, held_out),
    })
}

/// The loss on rows that were not trained on.
fn held_out_loss(policy: &Bench<'_>, config: &TrainConfig, rows: Vec<Sample>) -> f64 {
    let mut offline = Offline::new(policy, config, rows.clone(), rows, None, &mut |_, _| {}).expect("rows");
    let batches = offline.held_out(policy).expect("rows");
    let loss = |batch| {
        let loss = offline.loss(batch, policy, Pass::EVALUATE, &mut Metrics::default()).expect("a loss");
        f64::from(loss.to_scalar::<f32>().expect("a number"))
    };
    batches.iter().map(loss).sum()
}

/// Enough pairs from the file, as tokens.
fn samples(arguments: &Arguments, files: &ModelFiles, config: &TrainConfig) -> Vec<Sample> {
    let wanted = arguments.steps * BATCH + arguments.held_out;
    let examples: Vec<Example> = match &arguments.rows {
        Some(path) => {
            let text = std::fs::read_to_string(path).expect("rows");
            text.lines()
                .map(|line| serde_json::from_str(&line.replacen('{', "{\"kind\":\"preference\",", 1)).expect("a row"))
                .collect()
        }
        None => (0..wanted).map(example).collect(),
    };
    assert!(examples.len() >= wanted, "{} rows, {wanted} wanted", examples.len());
    // Training takes them from the front, the held-out ones are the last.
    let (front, back) = (arguments.steps * BATCH, examples.len() - arguments.held_out);
    let chosen = examples[..front].iter().chain(&examples[back..]);
    let rows: Vec<Row> = chosen.map(|example| Row::new(example.clone(), Origin::default())).collect();
    let template = files.chat_template().expect("a chat template");
    Encoder::new(template, files.tokenizer(), config.encoding()).rows(&rows, config.teaches()).samples
}

/// A pair of about 190 tokens a side, for when no file is named.
fn example(index: usize) -> Example {
    let words = ["gate", "wheel", "winch", "pump", "lamp", "rope", "sluice", "gauge"];
    let word = |i: usize| words[(index * 7 + i * 5) % words.len()];
    let prompt: Vec<String> = (0..12).map(|i| format!("The {} stands beside the {}.", word(i), word(i + 3))).collect();
    let good: Vec<String> = (0..12).map(|i| format!("Please look at the {} first.", word(i + 1))).collect();
    let bad: Vec<String> = (0..12).map(|i| format!("HIT the {} harder!!!", word(i + 2))).collect();
    Example::Preference {
        prompt: vec![Message { role: "user".to_owned(), ..Message::assistant(&prompt.join(" ")) }],
        chosen: vec![Message::assistant(&good.join(" "))],
        rejected: vec![Message::assistant(&bad.join(" "))],
    }
}

/// The model with some of what makes it fast undone.
struct Bench<'a> {
    model: &'a Model,
    /// Fill up all texts of a batch to the length of the longest.
    padding: bool,
    /// `[hidden, vocabulary]`: make all logits of all rows at once, with candle's own operations.
    head: Option<Tensor>,
}

impl Policy for Bench<'_> {
    fn frozen(&self) -> candle_core::Result<String> {
        Ok("bench".to_owned())
    }

    fn parameters(&self) -> &Parameters {
        self.model.parameters()
    }

    fn log_probs(&self, batch: &Packed, pass: Pass) -> candle_core::Result<Tensor> {
        let padded;
        let batch = if self.padding {
            padded = pad(batch);
            &padded
        } else {
            batch
        };
        let Some(head) = &self.head else { return self.model.log_probs(batch, pass).map_err(candle_core::Error::wrap) };
        let rows: Vec<u32> = (0..batch.rows() as u32).collect();
        let logits = self.model.hidden(batch, &rows, pass).map_err(candle_core::Error::wrap)?.matmul(head)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_probs = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
        let vocabulary = head.dim(1)? as u32;
        let picked: Vec<u32> = batch.labels.iter().map(|label| label.row * vocabulary + label.token).collect();
        log_probs.flatten_all()?.index_select(&Tensor::new(picked, &Device::Cpu)?, 0)
    }

    fn hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> candle_core::Result<Tensor> {
        self.model.hidden(batch, rows, pass).map_err(candle_core::Error::wrap)
    }

    fn width(&self) -> usize {
        self.model.files().config().hidden
    }
}

/// The output matrix as a tensor, `[hidden, vocabulary]`.
fn head(files: &ModelFiles) -> Tensor {
    let matrix = files.matrix(if files.config().tied_embeddings { Weight::Embedding } else { files.output() }).expect("a head");
    let mut values = vec![0.0f32; matrix.n * matrix.k];
    let row = matrix.data.len() / matrix.n;
    for (bytes, out) in matrix.data.chunks(row).zip(values.chunks_mut(matrix.k)) {
        tidemill_kernels::blocks::dequantize_row(matrix.format, bytes, out).expect("whole rows");
    }
    let head = Tensor::from_vec(values, (matrix.n, matrix.k), &Device::Cpu).expect("a tensor");
    head.t().and_then(|head| head.contiguous()).and_then(|head| head.to_dtype(DType::F32)).expect("a tensor")
}

/// The same texts, all as long as the longest.
fn pad(batch: &Packed) -> Packed {
    let is_prefix = |index: usize| batch.segments.iter().any(|segment| segment.prefix == Some(index));
    let whole = |index: usize| {
        let segment = batch.segments[index];
        segment.len + segment.prefix.map_or(0, |prefix| batch.segments[prefix].len)
    };
    let longest = (0..batch.segments.len()).map(whole).max().unwrap_or(0);
    let mut padded = Packed::default();
    let mut moved = vec![0u32; batch.rows()];
    for (index, segment) in batch.segments.iter().enumerate() {
        let rows = segment.first..segment.first + segment.len;
        let mut tokens = batch.tokens[rows.clone()].to_vec();
        if !is_prefix(index) {
            tokens.resize(tokens.len() + longest - whole(index), 0);
        }
        let start = padded.rows();
        rows.enumerate().for_each(|(place, row)| moved[row] = (start + place) as u32);
        padded.push(&tokens, segment.prefix);
    }
    padded.labels = batch.labels.iter().map(|label| Label { row: moved[label.row as usize], token: label.token }).collect();
    padded
}

/// Seconds of processor time of this process, its own and the system's for it.
fn processor_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields[index].parse::<f64>().expect("a number");
    (ticks(11) + ticks(12)) / 100.0
}

fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).expect("a number") / 1024.0
}
