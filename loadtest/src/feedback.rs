//! The `feedback` command: how fast judgements of one answer are taken and acknowledged.

use crate::cli::FeedbackArgs;
use crate::client::Client;
use crate::error::LoadtestError;
use crate::target::Target;
use bytes::Bytes;
use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Value, json};
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const REQUEST_TIME: Duration = Duration::from_secs(30);

/// What was measured.
#[derive(Debug, Serialize)]
struct Measured {
    connections: usize,
    batch: usize,
    seconds: f64,
    acknowledged: u64,
    failed: u64,
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    first_error: Option<String>,
}

/// Counts of one connection.
struct Counts {
    acknowledged: u64,
    failed: u64,
    first_error: Option<String>,
    /// Microseconds per request.
    times: Histogram<u64>,
}

/// Measures, prints; fails where any request did.
pub async fn run(args: &FeedbackArgs) -> Result<ExitCode, LoadtestError> {
    let target = Target::resolve(&args.base_url, args.allow_remote).await?;
    let answer = json!({"model": args.model, "prompt": "To be judged:", "max_tokens": 1}).to_string();
    let judged = match Client::new(target.clone(), "/completions").post(answer.into(), REQUEST_TIME).await {
        Ok((status, body)) if status.is_success() => {
            let answer: Value = serde_json::from_slice(&body)?;
            answer.get("id").and_then(Value::as_str).unwrap_or_default().to_owned()
        }
        Ok((status, body)) => return Err(LoadtestError::Answer(format!("{status}: {}", String::from_utf8_lossy(&body)))),
        Err(why) => return Err(LoadtestError::Answer(why)),
    };
    let one = json!({"target": judged, "kind": "thumb", "value": true, "author": "load test"});
    let body = if args.batch > 1 { Value::Array(vec![one; args.batch]) } else { one };
    let body = Bytes::from(body.to_string());
    let start = Instant::now();
    let end = start + Duration::try_from_secs_f64(args.duration).unwrap_or(Duration::from_secs(10));
    let mut connections = JoinSet::new();
    for _ in 0..args.connections.max(1) {
        connections.spawn(send_until(end, Client::new(target.clone(), "/feedback"), body.clone(), args.batch.max(1) as u64));
    }
    let mut sum = Counts::new()?;
    while let Some(counts) = connections.join_next().await {
        let counts = counts.map_err(|error| LoadtestError::Answer(error.to_string()))??;
        sum.acknowledged += counts.acknowledged;
        sum.failed += counts.failed;
        sum.first_error = sum.first_error.or(counts.first_error);
        sum.times.add(&counts.times).ok();
    }
    let seconds = start.elapsed().as_secs_f64();
    let ms = |micros: u64| micros as f64 / 1e3;
    let measured = Measured {
        connections: args.connections.max(1),
        batch: args.batch.max(1),
        seconds,
        acknowledged: sum.acknowledged,
        failed: sum.failed,
        per_second: sum.acknowledged as f64 / seconds,
        p50_ms: ms(sum.times.value_at_quantile(0.5)),
        p99_ms: ms(sum.times.value_at_quantile(0.99)),
        max_ms: ms(sum.times.max()),
        first_error: sum.first_error,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&measured)?)?;
    } else {
        write!(out, "{}", table(&measured))?;
    }
    Ok(if measured.failed == 0 && measured.acknowledged > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Counts {
    fn new() -> Result<Self, LoadtestError> {
        // One microsecond to one minute in three digits.
        let times = Histogram::new_with_bounds(1, 60_000_000, 3).map_err(|error| LoadtestError::Answer(error.to_string()))?;
        Ok(Self { acknowledged: 0, failed: 0, first_error: None, times })
    }
}

async fn send_until(end: Instant, mut client: Client, body: Bytes, items: u64) -> Result<Counts, LoadtestError> {
    let mut counts = Counts::new()?;
    while Instant::now() < end {
        let sent = Instant::now();
        let failure = match client.post(body.clone(), REQUEST_TIME).await {
            Ok((status, _)) if status == 201 => None,
            Ok((status, body)) => Some(format!("{status}: {}", String::from_utf8_lossy(&body))),
            Err(why) => Some(why),
        };
        match failure {
            None => {
                counts.acknowledged += items;
                counts.times.saturating_record(u64::try_from(sent.elapsed().as_micros()).unwrap_or(u64::MAX));
            }
            Some(why) => {
                counts.failed += items;
                counts.first_error.get_or_insert(why);
                // A server that is down answers at once; asking it a million times helps nobody.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    Ok(counts)
}

fn table(measured: &Measured) -> String {
    let mut text = format!(
        "connections {}   per request {}   acknowledged {}   failed {}   wall {:.1} s\nfeedback {:>9.0} /s\nmilliseconds per request   p50 {:.2}   p99 {:.2}   max {:.2}\n",
        measured.connections,
        measured.batch,
        measured.acknowledged,
        measured.failed,
        measured.seconds,
        measured.per_second,
        measured.p50_ms,
        measured.p99_ms,
        measured.max_ms
    );
    if let Some(error) = &measured.first_error {
        text += &format!("! {error}\n");
    }
    text
}
