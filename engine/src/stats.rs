//! Counts: a snapshot for the program, and the metrics, under vLLM's names with the prefix `tidemill:`.

use crate::request::FinishReason;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use std::time::{Duration, Instant};

/// Counts of an engine since its start, as of its last step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait, preempted ones too.
    pub waiting: usize,
    /// KV blocks.
    pub blocks_total: usize,
    /// Of these, owned by sequences.
    pub blocks_used: usize,
    /// Blocks that the prefix cache can find, used or free.
    pub blocks_cached: usize,
    /// Sequences sent back to wait.
    pub preemptions: u64,
    /// Of these, sequences whose blocks were kept in the machine's memory and came back.
    pub restored: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Of these, found.
    pub prefix_hits: u64,
    /// Prompt tokens of requests whose prompt is computed.
    pub prompt_tokens: u64,
    /// Generated tokens.
    pub generation_tokens: u64,
    /// Requests that ended, however.
    pub finished: u64,
    /// Steps.
    pub steps: u64,
    /// Kinds of steps that a card was to take as a whole (captured) and did not take: they go on, operation by operation.
    pub refused_captures: u64,
    /// Time inside the model. Where steps run ahead: that the engine waited for it.
    pub model_time: Duration,
    /// Time of the steps outside the model: scheduling, text, events. Where steps run ahead, most of it is beside the model's.
    pub overhead: Duration,
}

const LATENCY: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0];
const TOKEN_LATENCY: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
];
const REQUEST_LATENCY: &[f64] =
    &[0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0];
const TOKENS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5];
const STEP_TOKENS: &[f64] = &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Name and upper bounds of every histogram, for the recorder.
pub const HISTOGRAM_BUCKETS: &[(&str, &[f64])] = &[
    ("tidemill:time_to_first_token_seconds", LATENCY),
    ("tidemill:inter_token_latency_seconds", TOKEN_LATENCY),
    ("tidemill:request_time_per_output_token_seconds", TOKEN_LATENCY),
    ("tidemill:e2e_request_latency_seconds", REQUEST_LATENCY),
    ("tidemill:request_queue_time_seconds", REQUEST_LATENCY),
    ("tidemill:request_prefill_time_seconds", REQUEST_LATENCY),
    ("tidemill:request_decode_time_seconds", REQUEST_LATENCY),
    ("tidemill:request_inference_time_seconds", REQUEST_LATENCY),
    ("tidemill:request_prompt_tokens", TOKENS),
    ("tidemill:request_generation_tokens", TOKENS),
    ("tidemill:iteration_tokens_total", STEP_TOKENS),
];

/// Handles of the metrics, looked up once. They go to the recorder that is installed when the engine starts.
pub(crate) struct Metrics {
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    preemptions: Counter,
    restored: Counter,
    refused_captures: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    inference_time: Histogram,
    request_prompt: Histogram,
    request_generation: Histogram,
    step_tokens: Histogram,
    success: [(FinishReason, Counter); 3],
    failed: Counter,
}

/// Times and counts of one request that ended.
pub(crate) struct Ended {
    pub arrived: Instant,
    pub admitted: Option<Instant>,
    pub first_token: Option<Instant>,
    pub prompt_tokens: usize,
    pub generated: usize,
}

impl Metrics {
    pub(crate) fn new(model_name: &str) -> Self {
        let name = model_name.to_owned();
        let success = |reason: FinishReason| {
            let finished = reason.to_string();
            (reason, counter!("tidemill:request_success_total", "model_name" => name.clone(), "finished_reason" => finished))
        };
        Self {
            running: gauge!("tidemill:num_requests_running", "model_name" => name.clone()),
            waiting: gauge!("tidemill:num_requests_waiting", "model_name" => name.clone()),
            kv_usage: gauge!("tidemill:kv_cache_usage_perc", "model_name" => name.clone()),
            preemptions: counter!("tidemill:num_preemptions_total", "model_name" => name.clone()),
            restored: counter!("tidemill:num_preemptions_restored_total", "model_name" => name.clone()),
            refused_captures: counter!("tidemill:num_captures_refused_total", "model_name" => name.clone()),
            prefix_queries: counter!("tidemill:prefix_cache_queries_total", "model_name" => name.clone()),
            prefix_hits: counter!("tidemill:prefix_cache_hits_total", "model_name" => name.clone()),
            prompt_tokens: counter!("tidemill:prompt_tokens_total", "model_name" => name.clone()),
            generation_tokens: counter!("tidemill:generation_tokens_total", "model_name" => name.clone()),
            first_token: histogram!("tidemill:time_to_first_token_seconds", "model_name" => name.clone()),
            inter_token: histogram!("tidemill:inter_token_latency_seconds", "model_name" => name.clone()),
            per_output_token: histogram!("tidemill:request_time_per_output_token_seconds", "model_name" => name.clone()),
            latency: histogram!("tidemill:e2e_request_latency_seconds", "model_name" => name.clone()),
            queue_time: histogram!("tidemill:request_queue_time_seconds", "model_name" => name.clone()),
            prefill_time: histogram!("tidemill:request_prefill_time_seconds", "model_name" => name.clone()),
            decode_time: histogram!("tidemill:request_decode_time_seconds", "model_name" => name.clone()),
            inference_time: histogram!("tidemill:request_inference_time_seconds", "model_name" => name.clone()),
            request_prompt: histogram!("tidemill:request_prompt_tokens", "model_name" => name.clone()),
            request_generation: histogram!("tidemill:request_generation_tokens", "model_name" => name.clone()),
            step_tokens: histogram!("tidemill:iteration_tokens_total", "model_name" => name.clone()),
            success: [success(FinishReason::Stop), success(FinishReason::Length), success(FinishReason::Cancelled)],
            failed: counter!("tidemill:request_failure_total", "model_name" => name),
        }
    }

    /// After each step and each change of the queue.
    pub(crate) fn publish(&self, stats: &Stats, step_tokens: usize) {
        self.running.set(stats.running as f64);
        self.waiting.set(stats.waiting as f64);
        self.kv_usage.set(stats.blocks_used as f64 / stats.blocks_total.max(1) as f64);
        self.preemptions.absolute(stats.preemptions);
        self.restored.absolute(stats.restored);
        self.refused_captures.absolute(stats.refused_captures);
        self.prefix_queries.absolute(stats.prefix_queries);
        self.prefix_hits.absolute(stats.prefix_hits);
        self.prompt_tokens.absolute(stats.prompt_tokens);
        self.generation_tokens.absolute(stats.generation_tokens);
        if step_tokens > 0 {
            self.step_tokens.record(step_tokens as f64);
        }
    }

    pub(crate) fn queued(&self, time: Duration) {
        self.queue_time.record(time);
    }

    /// A choice's token came after its last one, or, for the first, after the request.
    pub(crate) fn token(&self, first: bool, since: Duration) {
        if first { self.first_token.record(since) } else { self.inter_token.record(since) }
    }

    pub(crate) fn finished_choice(&self, reason: FinishReason) {
        if let Some((_, counter)) = self.success.iter().find(|(of, _)| *of == reason) {
            counter.increment(1);
        }
    }

    pub(crate) fn failed(&self) {
        self.failed.increment(1);
    }

    pub(crate) fn ended(&self, ended: &Ended, now: Instant) {
        self.latency.record(now - ended.arrived);
        self.request_prompt.record(ended.prompt_tokens as f64);
        self.request_generation.record(ended.generated as f64);
        if let Some(admitted) = ended.admitted {
            self.inference_time.record(now - admitted);
            if let Some(first) = ended.first_token {
                self.prefill_time.record(first - admitted);
                self.decode_time.record(now - first);
            }
        }
        if let (Some(first), true) = (ended.first_token, ended.generated > 1) {
            self.per_output_token.record((now - first).as_secs_f64() / (ended.generated - 1) as f64);
        }
    }
}
