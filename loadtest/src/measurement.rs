//! What a load amounts to: rates, percentiles and everything that went wrong.

use crate::client::Exchange;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Percentiles of a latency, in milliseconds, each within 0.1 %.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest value.
    pub max: f64,
}

/// Counts durations between a microsecond and an hour.
struct Latencies(Histogram<u64>);

impl Latencies {
    const HOUR_US: u64 = 3_600_000_000;

    fn of(durations: impl IntoIterator<Item = Duration>) -> Option<Percentiles> {
        let mut latencies = Self(Histogram::new_with_bounds(1, Self::HOUR_US, 3).ok()?);
        for duration in durations {
            latencies.0.saturating_record((duration.as_micros() as u64).clamp(1, Self::HOUR_US));
        }
        let at = |quantile| latencies.0.value_at_quantile(quantile) as f64 / 1e3;
        (!latencies.0.is_empty()).then(|| Percentiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) })
    }
}

/// The result of one load on one server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measurement {
    /// Requests kept in flight.
    pub streams: usize,
    /// Requests that ended well.
    pub completed: u64,
    /// Requests that did not.
    pub failed: u64,
    /// Each reason for failure with its count.
    pub errors: BTreeMap<String, u64>,
    /// Completed requests with fewer tokens than were asked for.
    pub short_outputs: u64,
    /// From the first request to the end of the last, in seconds.
    pub wall_s: f64,
    /// Prompt tokens of completed requests, where the server counts them.
    pub prompt_tokens: u64,
    /// Generated tokens of completed requests.
    pub completion_tokens: u64,
    /// Whether the token counts are the server's own, not counted events.
    pub counted_by_server: bool,
    /// Generated tokens per second.
    pub output_tok_s: f64,
    /// Prompt and generated tokens per second.
    pub total_tok_s: f64,
    /// Completed requests per second.
    pub requests_s: f64,
    /// From sending a request to its first text, in milliseconds.
    pub ttft_ms: Option<Percentiles>,
    /// Between consecutive events with text, in milliseconds.
    pub inter_token_ms: Option<Percentiles>,
    /// Per request: the time from first to last text over the tokens after the first, in milliseconds.
    pub per_token_ms: Option<Percentiles>,
    /// The load was interrupted or ran into its time limit before all its requests were sent.
    pub cut_short: bool,
}

impl Measurement {
    /// Sums up `exchanges`; `asked_tokens` is what each request should have generated.
    pub fn of(streams: usize, asked_tokens: u64, wall: Duration, exchanges: &[Exchange], cut_short: bool) -> Self {
        let good: Vec<&Exchange> = exchanges.iter().filter(|exchange| exchange.error.is_none()).collect();
        let mut errors = BTreeMap::new();
        for error in exchanges.iter().filter_map(|exchange| exchange.error.clone()) {
            *errors.entry(error).or_insert(0) += 1;
        }
        let prompt_tokens: u64 = good.iter().filter_map(|exchange| exchange.usage).map(|usage| usage.prompt_tokens).sum();
        let completion_tokens: u64 = good.iter().map(|exchange| exchange.completion_tokens()).sum();
        let wall_s = wall.as_secs_f64();
        let rate = |count: u64| if wall_s > 0.0 { count as f64 / wall_s } else { 0.0 };
        Self {
            streams,
            completed: good.len() as u64,
            failed: (exchanges.len() - good.len()) as u64,
            errors,
            short_outputs: good.iter().filter(|exchange| exchange.completion_tokens() < asked_tokens).count() as u64,
            wall_s,
            prompt_tokens,
            completion_tokens,
            counted_by_server: !good.is_empty() && good.iter().all(|exchange| exchange.usage.is_some()),
            output_tok_s: rate(completion_tokens),
            total_tok_s: rate(prompt_tokens + completion_tokens),
            requests_s: rate(good.len() as u64),
            ttft_ms: Latencies::of(good.iter().filter_map(|exchange| exchange.first)),
            inter_token_ms: Latencies::of(good.iter().flat_map(|exchange| exchange.gaps.iter().copied())),
            per_token_ms: Latencies::of(good.iter().filter_map(|exchange| {
                let after_first = u32::try_from(exchange.completion_tokens()).ok()?.checked_sub(1).filter(|&count| count > 0)?;
                Some(exchange.gaps.iter().sum::<Duration>() / after_first)
            })),
            cut_short,
        }
    }

    /// What a reader must know before trusting the numbers; empty when nothing is wrong.
    pub fn warnings(&self) -> Vec<String> {
        let mut out: Vec<String> = self.errors.iter().map(|(error, count)| format!("{count} failed: {error}")).collect();
        if self.short_outputs > 0 {
            out.push(format!("{} answers are shorter than asked for", self.short_outputs));
        }
        if self.completed > 0 && !self.counted_by_server {
            out.push("the server reports no usage: tokens are counted as events".into());
        }
        if self.cut_short {
            out.push("stopped before all requests were sent".into());
        }
        if self.completed == 0 {
            out.push("no request completed".into());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Usage;

    fn exchange(first_ms: u64, gaps_ms: &[u64], tokens: u64) -> Exchange {
        Exchange {
            first: Some(Duration::from_millis(first_ms)),
            gaps: gaps_ms.iter().map(|&ms| Duration::from_millis(ms)).collect(),
            chunks: gaps_ms.len() as u64 + 1,
            usage: Some(Usage { prompt_tokens: 100, completion_tokens: tokens }),
            error: None,
        }
    }

    #[test]
    fn percentiles_of_one_to_a_thousand_milliseconds_are_their_ranks() {
        let percentiles = Latencies::of((1..=1000).map(Duration::from_millis)).unwrap();
        for (got, wanted) in
            [(percentiles.p50, 500.0), (percentiles.p90, 900.0), (percentiles.p99, 990.0), (percentiles.max, 1000.0)]
        {
            assert!((got - wanted).abs() <= wanted * 0.001, "{got} for {wanted}");
        }
        assert_eq!(Latencies::of([]), None);
    }

    #[test]
    fn rates_count_completed_requests_only() {
        let failed = Exchange { error: Some("boom".into()), ..exchange(1, &[1], 50) };
        let sum = Measurement::of(2, 3, Duration::from_secs(2), &[exchange(10, &[20, 30], 3), failed.clone(), failed], false);
        assert_eq!((sum.completed, sum.failed, sum.completion_tokens, sum.prompt_tokens), (1, 2, 3, 100));
        assert_eq!((sum.output_tok_s, sum.total_tok_s, sum.requests_s), (1.5, 51.5, 0.5));
        assert_eq!(sum.errors.get("boom"), Some(&2));
        assert_eq!(sum.warnings(), ["2 failed: boom"]);
        let per_token = sum.per_token_ms.unwrap().p50;
        assert!((per_token - 25.0).abs() < 0.1, "{per_token}");
    }

    #[test]
    fn short_answers_and_counted_events_are_flagged() {
        let uncounted = Exchange { usage: None, ..exchange(1, &[1], 0) };
        let sum = Measurement::of(1, 3, Duration::from_secs(1), &[exchange(1, &[1, 1], 3), uncounted], true);
        assert_eq!((sum.short_outputs, sum.completion_tokens, sum.counted_by_server), (1, 5, false));
        assert_eq!(sum.warnings().len(), 3);
    }
}
