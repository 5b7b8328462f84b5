//! The engine alone, without HTTP: what `tidemill bench` measures.

use std::thread;
use std::time::{Duration, Instant};

use std::sync::Arc;
use tidemill_engine::{Engine, Event, Grammar, Request, RequestId, SamplingParams, SubmitError, Tenant};

/// One load: `streams` at a time, each request `prompt` tokens in and `generate` out, greedy, all prompts different.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests at once.
    pub streams: usize,
    /// Requests in all.
    pub requests: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens generated per request.
    pub generate: usize,
}

/// What came of it. Times in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Generated tokens per second over the whole run.
    pub output_per_s: f64,
    /// Prompt and generated tokens per second.
    pub total_per_s: f64,
    /// Median time to the first token.
    pub first_p50: f64,
    /// Median pause between tokens.
    pub gap_p50: f64,
    /// 99th percentile of the pauses.
    pub gap_p99: f64,
}

/// Errors of a run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The engine refused a request.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The engine failed one.
    #[error("a request failed: {0}")]
    Failed(String),
    /// A thread of the benchmark died.
    #[error("a measuring thread died")]
    Thread,
}

#[derive(Default)]
struct Times {
    first: Vec<f64>,
    gaps: Vec<f64>,
    tokens: usize,
}

/// Runs a load to its end, every answer within the grammar if there is one.
pub fn run(engine: &Engine, load: Load, grammar: Option<&Arc<Grammar>>) -> Result<Measured, BenchError> {
    let started = Instant::now();
    let times = thread::scope(|scope| {
        let workers: Vec<_> = (0..load.streams)
            .map(|stream| {
                scope.spawn(move || {
                    (stream..load.requests)
                        .step_by(load.streams)
                        .try_fold(Times::default(), |times, index| one(engine, load, index, grammar, times))
                })
            })
            .collect();
        workers.into_iter().try_fold(Times::default(), |mut all, worker| {
            let times = worker.join().map_err(|_| BenchError::Thread)??;
            all.first.extend(times.first);
            all.gaps.extend(times.gaps);
            all.tokens += times.tokens;
            Ok::<_, BenchError>(all)
        })
    })?;
    let wall = started.elapsed().as_secs_f64();
    let mut times = times;
    times.first.sort_by(f64::total_cmp);
    times.gaps.sort_by(f64::total_cmp);
    Ok(Measured {
        output_per_s: times.tokens as f64 / wall,
        total_per_s: (times.tokens + load.requests * load.prompt) as f64 / wall,
        first_p50: quantile(&times.first, 0.5),
        gap_p50: quantile(&times.gaps, 0.5),
        gap_p99: quantile(&times.gaps, 0.99),
    })
}

fn one(engine: &Engine, load: Load, index: usize, grammar: Option<&Arc<Grammar>>, mut times: Times) -> Result<Times, BenchError> {
    let submitted = Instant::now();
    let events = engine.submit(Request {
        id: RequestId(index as u128),
        prompt: prompt(index, load.prompt, engine.limits().vocabulary),
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens: Some(load.generate),
            ignore_eos: true,
            grammar: grammar.cloned(),
            ..SamplingParams::default()
        },
        priority: 0,
        cache_salt: Some(format!("bench-{index}")),
        adapter: None,
        tenant: Tenant::default(),
        deadline: None,
    })?;
    let mut last: Option<Instant> = None;
    while let Ok(event) = events.recv_timeout(Duration::from_secs(600)) {
        match event {
            Event::Token { .. } => {
                let now = Instant::now();
                match last {
                    None => times.first.push((now - submitted).as_secs_f64()),
                    Some(before) => times.gaps.push((now - before).as_secs_f64()),
                }
                last = Some(now);
                times.tokens += 1;
            }
            Event::Failed(reason) => return Err(BenchError::Failed(reason)),
            Event::Expired => return Err(BenchError::Failed("its deadline passed".into())),
            Event::Done(_) => return Ok(times),
            Event::Prompt { .. } | Event::Finished { .. } => {}
        }
    }
    Err(BenchError::Failed("no event for ten minutes".to_owned()))
}

/// Ids spread over the lower half of the vocabulary, where tokenizers keep ordinary text; different for each request.
fn prompt(index: usize, length: usize, vocabulary: usize) -> Vec<u32> {
    let span = (vocabulary / 2).max(1) as u64;
    let mut state = index as u64;
    (0..length)
        .map(|_| {
            // SplitMix64 (Steele, Lea and Flood 2014).
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            u32::try_from((mixed ^ (mixed >> 31)) % span).unwrap_or(0)
        })
        .collect()
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((q * last as f64).round() as usize).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_differ_and_stay_in_the_vocabulary() {
        let (one, two) = (prompt(1, 64, 1000), prompt(2, 64, 1000));
        assert_ne!(one, two);
        assert!(one.iter().chain(&two).all(|&token| token < 500));
        assert_eq!(prompt(1, 64, 1000), one);
    }

    #[test]
    fn quantiles_take_the_nearest_rank() {
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.5), 3.0);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.99), 5.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
