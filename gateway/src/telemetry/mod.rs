//! Logs, metrics and traces. Texts of prompts and answers are in none of them, unless the log is asked for them.

mod outbox;
mod trail;

pub use outbox::{OutboxError, exporting, silent};
pub use trail::{Follower, Line, Observer, Outcome, Trail, method_label};

use crate::config::LogFormat;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tidemill_engine::stats::HISTOGRAM_BUCKETS;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer as _, fmt};

/// Answers of other servers: seconds.
const UPSTREAM_TIMES: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0];
const UPSTREAM_BUCKETS: [(&str, &[f64]); 2] =
    [("tidemill:upstream_time_to_first_token_seconds", UPSTREAM_TIMES), ("tidemill:upstream_request_seconds", UPSTREAM_TIMES)];

/// Why logs or metrics could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not one.
    #[error("the log filter `{filter}` is not valid ({reason}); write it like `info` or `info,tidemill=debug`")]
    Filter {
        /// As given.
        filter: String,
        /// What the parser said.
        reason: String,
    },
    /// Logs are already set up.
    #[error("cannot start logging: {0}")]
    Log(#[from] TryInitError),
    /// Metrics are already set up.
    #[error("cannot start metrics: {0}")]
    Metrics(#[from] BuildError),
    /// Spans cannot be exported.
    #[error("{0}")]
    Outbox(#[from] OutboxError),
}

/// Sends log lines to standard error.
pub fn init_logs(filter: &str, format: LogFormat) -> Result<(), TelemetryError> {
    let targets: Targets =
        filter.parse().map_err(|error| TelemetryError::Filter { filter: filter.to_owned(), reason: format!("{error}") })?;
    let lines = fmt::layer().with_writer(std::io::stderr);
    let layer = match format {
        LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    };
    tracing_subscriber::registry().with(layer.with_filter(targets)).try_init()?;
    Ok(())
}

/// Takes all metrics of the process. Call it before an engine starts.
pub fn init_metrics() -> Result<PrometheusHandle, TelemetryError> {
    let mut builder = PrometheusBuilder::new();
    for (name, buckets) in HISTOGRAM_BUCKETS.iter().chain(&UPSTREAM_BUCKETS) {
        builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets)?;
    }
    Ok(builder.install_recorder()?)
}
