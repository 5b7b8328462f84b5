//! What every handler sees.

use crate::http::drain::Drain;
use crate::http::limits::BodyLimits;
use crate::upstream::Registry;
use metrics_exporter_prometheus::PrometheusHandle;
use std::sync::Arc;

/// Shared state of the server; cloning is cheap.
#[derive(Clone)]
pub struct App {
    /// Models.
    pub registry: Arc<Registry>,
    /// Requests being answered.
    pub drain: Drain,
    /// Bounds on request bodies.
    pub body: BodyLimits,
    /// Renders `/metrics`; absent where no recorder was installed.
    pub metrics: Option<PrometheusHandle>,
}
