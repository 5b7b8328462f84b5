//! `tidemill bench`

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;
use tidemill_engine::{Constraint, Device, Engine, EngineOptions, GrammarError, StartError};

use crate::config::ConfigError;
use crate::config::{Origin, kernel_cache, model_spec};
use crate::engine_bench::{self, BenchError, Load};

/// Tokens per second of the engine alone: no HTTP, no client on the same cores.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// A path or the name of a pulled model [default: the pulled default model]
    #[arg(long)]
    model: Option<String>,
    /// Directory for models and records
    #[arg(long, value_name = "DIR", default_value = "./data", env = "TIDEMILL_DATA")]
    data: PathBuf,
    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Where to compute: cpu, cuda, cuda:N or cuda:N,N with the numbers of cards, auto
    #[arg(long, default_value_t)]
    device: Device,
    /// Cards that compute the model together
    #[arg(long, value_name = "N")]
    tensor_parallel: Option<usize>,
    /// Requests at once, one line of the table each
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 8, 32])]
    streams: Vec<usize>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    prompt: usize,
    /// Tokens generated for each
    #[arg(long, value_name = "N", default_value_t = 64)]
    generate: usize,
    /// Requests per stream
    #[arg(long, value_name = "N", default_value_t = 4)]
    rounds: usize,
    /// Measure each row once more with answers confined to a JSON schema
    #[arg(long)]
    constrained: bool,
}

/// Why there are no numbers.
#[derive(Debug, thiserror::Error)]
pub enum BenchCommandError {
    /// The model was not found.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A run broke off.
    #[error(transparent)]
    Run(#[from] BenchError),
    /// The schema does not compile for this model.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// Numbers that make no sense together.
    #[error("{0}")]
    Usage(&'static str),
}

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<(), BenchCommandError> {
    if args.streams.contains(&0) || args.prompt == 0 || args.generate == 0 || args.rounds == 0 {
        return Err(BenchCommandError::Usage("--streams, --prompt, --generate and --rounds must be at least 1"));
    }
    let named: Vec<_> = args.model.iter().map(|model| (model.clone(), Origin::Flag("model"))).collect();
    let models = model_spec::resolve_all(&named, &args.data)?;
    let Some(model) = models.first() else { return Err(BenchCommandError::Usage("no model was found")) };
    let most = args.streams.iter().copied().max().unwrap_or(1);
    let defaults = EngineOptions::new(&model.path);
    let options = EngineOptions {
        device: args.device.clone(),
        tensor_parallel: args.tensor_parallel,
        kernel_cache: Some(kernel_cache(&args.data)),
        threads: args.threads,
        max_seqs: most,
        max_batch_tokens: defaults.max_batch_tokens.max(most),
        max_waiting: defaults.max_waiting.max(most),
        // Prompts come again from row to row; each must be computed.
        prefix_caching: false,
        ..defaults
    };
    let engine = Engine::start(options, &mut |_, _| {})?;
    say(&format!("{} · {}", model.name, engine.memory().backend));
    // The first step touches memory that no step has touched.
    engine_bench::run(&engine, Load { streams: 1, requests: 1, prompt: args.prompt, generate: 8 }, None)?;
    let grammar = if args.constrained { Some(engine.compile(&endless_records())?) } else { None };
    say(&format!(
        "{} tokens in, {} out\nstreams  output tok/s  total tok/s  first token p50  gap p50   gap p99",
        args.prompt, args.generate
    ));
    for &streams in &args.streams {
        let load = Load { streams, requests: streams * args.rounds, prompt: args.prompt, generate: args.generate };
        let measured = engine_bench::run(&engine, load, None)?;
        say(&format!(
            "{streams:7}  {:12.1}  {:11.1}  {:12.1} ms  {:5.2} ms  {:5.2} ms",
            measured.output_per_s,
            measured.total_per_s,
            measured.first_p50 * 1e3,
            measured.gap_p50 * 1e3,
            measured.gap_p99 * 1e3
        ));
        if let Some(grammar) = &grammar {
            let confined = engine_bench::run(&engine, load, Some(grammar))?;
            let cost = (measured.output_per_s / confined.output_per_s - 1.0) * 100.0;
            say(&format!(
                "   json  {:12.1}  {:11.1}  {:12.1} ms  {:5.2} ms  {:5.2} ms  a token costs {cost:+.1} %",
                confined.output_per_s,
                confined.total_per_s,
                confined.first_p50 * 1e3,
                confined.gap_p50 * 1e3,
                confined.gap_p99 * 1e3
            ));
        }
    }
    Ok(())
}

/// Records without end, so that every answer has its full length.
fn endless_records() -> Constraint {
    let record = json!({
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": 0},
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["red", "green", "blue"]},
            "price": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,12}$"}, "maxItems": 4},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}
        },
        "required": ["id", "name", "kind", "price", "tags", "note"],
        "additionalProperties": false
    });
    Constraint::JsonSchema { schema: json!({"type": "array", "items": record, "minItems": 10_000}), strict: false }
}

fn say(text: &str) {
    // A closed standard output is no reason to stop measuring.
    let _ = writeln!(std::io::stdout(), "{text}");
}
