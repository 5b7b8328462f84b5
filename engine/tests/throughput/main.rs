//! Tokens per second through the engine's own loop, of a Llama with random weights: prompts and answers at several batch sizes, beside what
//! reading the weights and multiplying would take. `make gpu-check` runs it on a card with the sizes of an 8B model (docs/gpu.md); without
//! arguments, as in `make test`, a tiny model runs on the CPU, which shows that the program works.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a measurement stops at the first error")]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a measurement prints its table")]

mod model;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use model::Llama;
use tidemill_engine::{
    Decoder, Engine, EngineOptions, Event, Frontend, ModelFiles, Request, RequestId, SamplingParams, ServedModel, Tenant,
};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::driver::Card;
use tidemill_kernels::cuda::trial::Trial;
use tidemill_kernels::{Limits, Ops, WeightFormat};

/// Exit status where nothing failed, but the time was over before all was measured.
const UNFINISHED: u8 = 4;

const USAGE: &str = "throughput: without arguments, a tiny model on the CPU
throughput card IMAGES FOLDER LAYERS FORMAT COPY PRODUCT [SECONDS]
    so many of the 32 layers of an 8B model, written to FOLDER unless they are there, on the first card, with kernels from IMAGES; weights in
    bf16, fp8 or int8; ceilings in bytes and operations per second";

/// What is measured.
struct Plan {
    llama: Llama,
    batches: [usize; 3],
    prompt: usize,
    answer: usize,
    /// Tokens of a step.
    step: usize,
    formats: Vec<(WeightFormat, &'static str, f64)>,
    deadline: Instant,
    /// Bytes read and written by a copy, and operations of a product, per second; 0 where nobody measured.
    copy: f64,
    product: f64,
}

impl Plan {
    fn length(&self) -> usize {
        self.prompt + self.answer
    }

    fn limits(&self) -> Limits {
        Limits { max_tokens: self.step, max_samples: self.batches[2], max_positions: self.length() }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["card", images, folder, layers, format, copy, product, rest @ ..] => {
            let format = match *format {
                "fp8" => (WeightFormat::Fp8, "fp8", 1.0),
                "int8" => (WeightFormat::Int8, "int8", 1.0),
                _ => (WeightFormat::Auto, "bf16", 2.0),
            };
            let number = |text: &str| text.parse().unwrap_or(0.0);
            let seconds = rest.first().map_or(180.0, |s| number(s));
            let plan = Plan {
                llama: Llama { layers: layers.parse().unwrap_or(32), ..Llama::eight_b() },
                batches: [1, 32, 128],
                prompt: 1024,
                answer: 192,
                step: 2048,
                formats: vec![format],
                deadline: Instant::now() + Duration::from_secs_f64(seconds),
                copy: number(copy),
                product: number(product),
            };
            let images = PathBuf::from(images);
            // As a server does.
            let open = |limits| -> Box<dyn Ops> {
                let mut card = Card::open(Some(&images)).unwrap();
                card.choose_prefill(None, &Trial::serving(), Some(&images)).unwrap();
                Box::new(CudaBackend::new(card, limits).capturing())
            };
            measure(&plan, Path::new(folder), &open)
        }
        // As the test harness is called: a filter of names, or flags.
        [] => tiny(),
        [flag, ..] if flag.starts_with('-') && *flag != "--help" && !words.contains(&"--list") => tiny(),
        [filter, ..] if !["--help", "card"].contains(filter) => ExitCode::SUCCESS,
        _ => {
            println!("{USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn tiny() -> ExitCode {
    let plan = Plan {
        llama: Llama::tiny(),
        batches: [1, 2, 3],
        prompt: 20,
        answer: 40,
        step: 16,
        formats: vec![(WeightFormat::Auto, "bf16", 2.0), (WeightFormat::Int8, "int8", 1.0)],
        deadline: Instant::now() + Duration::from_secs(600),
        copy: 1e9,
        product: 1e9,
    };
    let folder = tempfile::tempdir().unwrap();
    let open = |limits| -> Box<dyn Ops> { Box::new(CpuBackend::new(CpuOptions { threads: 1, isa: None, limits }).unwrap()) };
    measure(&plan, folder.path(), &open)
}

fn measure(plan: &Plan, folder: &Path, open: &dyn Fn(Limits) -> Box<dyn Ops>) -> ExitCode {
    let folder = folder.join("llama");
    if !folder.join("model.safetensors").is_file() {
        plan.llama.write(&folder).unwrap();
    }
    let mut whole = true;
    for &(format, name, bytes) in &plan.formats {
        let started = Instant::now();
        let engine = start(plan, &folder, open(plan.limits()), format);
        eprintln!("{name}: {}, loaded in {:.0} s", engine.memory().backend, started.elapsed().as_secs_f64());
        for batch in plan.batches {
            // Prompts alone, then answers; each is printed when it is known.
            for answer in [1, plan.answer] {
                match run(&engine, plan, batch, answer) {
                    Ok(rates) => {
                        whole &= rates.is_some();
                        match answer {
                            1 => print_prompts(plan, name, batch, rates.map(|rates| rates.prefill)),
                            _ => print_answers(plan, name, bytes, batch, rates.and_then(|rates| rates.decode)),
                        }
                    }
                    Err(why) => {
                        // What an engine says that has failed once, it says again.
                        println!("| Tidemill, {name} | {batch} | **failed**: {} | | |", why.replace(['|', '\n'], " "));
                        return ExitCode::FAILURE;
                    }
                }
            }
        }
        engine.drain(Duration::from_secs(5));
    }
    if whole { ExitCode::SUCCESS } else { ExitCode::from(UNFINISHED) }
}

fn start(plan: &Plan, folder: &Path, ops: Box<dyn Ops>, format: WeightFormat) -> Engine {
    let files = ModelFiles::open(folder).unwrap();
    let decoder = Decoder::load(&files, ops, format, &mut |_, _| {}).unwrap();
    let frontend = Frontend {
        tokenizer: files.tokenizer().clone(),
        chat_template: None,
        generation_defaults: files.generation_defaults().clone(),
        end_of_turn: Vec::new(),
        pooling: Err("only speed is measured".into()),
    };
    let description = files.describe();
    let served = ServedModel { model: Box::new(decoder), frontend, context: plan.llama.positions, description };
    let blocks = plan.length().div_ceil(32) * plan.batches[2];
    let options = EngineOptions {
        max_seqs: plan.batches[2],
        max_batch_tokens: plan.step,
        max_model_len: Some(plan.length()),
        kv_memory: Some(blocks * 32 * plan.llama.kv_bytes()),
        prefix_caching: false,
        max_adapters: 0,
        ..EngineOptions::new(folder)
    };
    Engine::with_model(served, options).unwrap()
}

/// Tokens per second.
struct Rates {
    /// Of the prompts, from the first request to the last first token.
    prefill: f64,
    /// Of the answers, from the last first token to the first end; none when an answer ended before.
    decode: Option<f64>,
}

/// `None` when the time is over; an error is what the engine says of a request that failed.
fn run(engine: &Engine, plan: &Plan, batch: usize, answer: usize) -> Result<Option<Rates>, String> {
    let sampling = SamplingParams { max_tokens: Some(answer), temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    let begun = Instant::now();
    let mut open: Vec<_> = (0..batch)
        .map(|i| {
            let token = |at: usize| ((at * 7919 + i * 104_729) % plan.llama.vocabulary) as u32;
            let request = Request {
                id: RequestId(i as u128),
                prompt: (0..plan.prompt).map(token).collect(),
                sampling: sampling.clone(),
                priority: 0,
                cache_salt: None,
                adapter: None,
                tenant: Tenant::default(),
                deadline: None,
            };
            Ok((engine.submit(request).map_err(|refused| refused.to_string())?, 0usize))
        })
        .collect::<Result<_, String>>()?;
    let (mut all_begun, mut tokens_then, mut early, mut decode) = (None, 0, false, None);
    while !open.is_empty() {
        if Instant::now() > plan.deadline {
            eprintln!("batch {batch}: the time is over");
            engine.cancel_all();
            return Ok(None);
        }
        let mut ended = false;
        for (events, tokens) in &mut open {
            for event in events.drain() {
                match event {
                    Event::Token { .. } => *tokens += 1,
                    Event::Done(_) => ended = true,
                    Event::Failed(why) => return Err(why.to_string()),
                    _ => {}
                }
            }
        }
        let now = Instant::now();
        let tokens: usize = open.iter().map(|(_, tokens)| tokens).sum();
        match all_begun {
            None if open.iter().all(|(_, tokens)| *tokens > 0) => (all_begun, tokens_then) = (Some(now), tokens),
            None => early |= ended,
            Some(then) if ended && !early && decode.is_none() && tokens > tokens_then => {
                decode = Some((tokens - tokens_then) as f64 / (now - then).as_secs_f64());
            }
            Some(_) => {}
        }
        if ended && all_begun.is_some() {
            // The rest is waited for, so that the next run finds the engine idle.
            open.retain(|(_, tokens)| *tokens < answer);
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    let rates = |all_begun: Instant| Rates { prefill: (batch * plan.prompt) as f64 / (all_begun - begun).as_secs_f64(), decode };
    Ok(all_begun.map(rates))
}

fn print_prompts(plan: &Plan, name: &str, batch: usize, rate: Option<f64>) {
    let ceiling = plan.product / (2.0 * plan.llama.multiplied() as f64);
    println!("| Tidemill, {name} | {batch} | prompts of {} | {} of the product |", plan.prompt, cells(rate, ceiling));
}

fn print_answers(plan: &Plan, name: &str, bytes: f64, batch: usize, rate: Option<f64>) {
    let Plan { llama, prompt, answer, copy, .. } = plan;
    // A step reads the weights once, and each sequence's keys and values so far.
    let read = llama.multiplied() as f64 * bytes + (batch * (prompt + answer / 2) * llama.kv_bytes()) as f64;
    let cells = cells(rate, batch as f64 * copy / read);
    println!("| Tidemill, {name} | {batch} | {answer} tokens after {prompt} | {cells} of the reading |");
}

/// A rate, and its share of what is possible.
fn cells(rate: Option<f64>, ceiling: f64) -> String {
    let share = |rate: f64| if ceiling > 0.0 { format!("{:.0} %", rate / ceiling * 100.0) } else { String::new() };
    rate.map_or("not measured |".to_owned(), |rate| format!("{rate:.0} | {}", share(rate)))
}
