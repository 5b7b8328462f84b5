//! The `run` command: one load on a running server, shown as it goes and summed up as a table or JSON.

use crate::cli::RunArgs;
use crate::error::LoadtestError;
use crate::interrupt::Interrupt;
use crate::load::Load;
use crate::measurement::{Measurement, Percentiles};
use crate::prompts::Prompts;
use crate::target::Target;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};
use std::cell::Cell;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Measures, prints; fails where any request did.
pub async fn run(args: &RunArgs) -> Result<ExitCode, LoadtestError> {
    let mut body: Map<String, Value> =
        serde_json::from_str(&args.body).map_err(|error| LoadtestError::Body(error.to_string()))?;
    if args.ignore_eos {
        body.insert("ignore_eos".into(), true.into());
    }
    let prompts = &args.prompts;
    let load = Load {
        target: Target::resolve(&args.base_url, args.allow_remote).await?,
        endpoint: args.endpoint,
        model: args.model.clone(),
        body,
        prompts: Prompts::new(prompts.seed, prompts.prefix, prompts.prompt_tokens, prompts.shared_tokens),
        streams: args.streams.max(1),
        requests: prompts.requests,
        warmup: args.warmup,
        max_tokens: args.max_tokens,
        duration: args.duration.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        request_timeout: Duration::try_from_secs_f64(args.request_timeout).unwrap_or(Duration::MAX),
    };
    let bar = progress_bar(load.requests);
    let measurement = load.run(&Interrupt::listen()?, |exchange| count(&bar, exchange)).await;
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&measurement)?)?;
    } else {
        write!(out, "{}", table(&measurement))?;
    }
    Ok(if measurement.failed == 0 && measurement.completed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A bar over `requests` requests; hidden where standard error is no terminal.
pub fn progress_bar(requests: u64) -> ProgressBar {
    let bar = ProgressBar::new(requests);
    if let Ok(style) = ProgressStyle::with_template("{prefix}{wide_bar} {pos}/{len} requests · {msg} · {elapsed}") {
        bar.set_style(style);
    }
    bar
}

/// Moves the bar on by one request.
pub fn count(bar: &ProgressBar, exchange: &crate::client::Exchange) {
    thread_local!(static TOKENS: Cell<u64> = const { Cell::new(0) });
    if bar.position() == 0 {
        TOKENS.set(0);
    }
    TOKENS.set(TOKENS.get() + exchange.completion_tokens());
    bar.set_message(format!("{:.0} tok/s", TOKENS.get() as f64 / bar.elapsed().as_secs_f64().max(1e-3)));
    bar.inc(1);
}

/// The measurement for a reader at a terminal.
pub fn table(sum: &Measurement) -> String {
    let mut out = format!(
        "streams {}   completed {}   failed {}   wall {:.1} s\n\
         output  {:>9.1} tok/s   {} tokens\n\
         total   {:>9.1} tok/s   {} prompt tokens, {:.0} per request\n\
         requests{:>9.2} /s\n",
        sum.streams,
        sum.completed,
        sum.failed,
        sum.wall_s,
        sum.output_tok_s,
        sum.completion_tokens,
        sum.total_tok_s,
        sum.prompt_tokens,
        sum.prompt_tokens as f64 / sum.completed.max(1) as f64,
        sum.requests_s,
    );
    out += &format!("{:<22}{:>10}{:>10}{:>10}{:>10}\n", "milliseconds", "p50", "p90", "p99", "max");
    let row = |name: &str, percentiles: &Option<Percentiles>| match percentiles {
        Some(at) => format!("{name:<22}{:>10.1}{:>10.1}{:>10.1}{:>10.1}\n", at.p50, at.p90, at.p99, at.max),
        None => format!("{name:<22}{:>10}\n", "-"),
    };
    out += &row("time to first text", &sum.ttft_ms);
    out += &row("between texts", &sum.inter_token_ms);
    out += &row("per token after first", &sum.per_token_ms);
    for warning in sum.warnings() {
        out += &format!("! {warning}\n");
    }
    out
}
