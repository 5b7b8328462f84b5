//! What every handler sees.

use crate::adapters::AdapterKeeper;
use crate::batches::Batches;
use crate::datasets::DatasetJobs;
use crate::feedback::Metrics;
use crate::fine_tuning::FineTuning;
use crate::flywheel::Flywheels;
use crate::http::auth::Auth;
use crate::http::cors::Origins;
use crate::http::drain::Drain;
use crate::http::limits::{BodyLimits, FileLimits};
use crate::http::responses::background::Background;
use crate::limits::Limiter;
use crate::recording::Recording;
use crate::rollout::keeper::Keeper;
use crate::telemetry::Observer;
use crate::upstream::Registry;
use metrics_exporter_prometheus::PrometheusHandle;
use std::sync::Arc;
use tidemill_store::{Files, Store};

/// Shared state of the server; cloning is cheap.
#[derive(Clone)]
pub struct App {
    /// Models.
    pub registry: Arc<Registry>,
    /// Registered adapters.
    pub adapters: AdapterKeeper,
    /// Requests being answered.
    pub drain: Drain,
    /// Bounds on request bodies.
    pub body: BodyLimits,
    /// Web pages that may call.
    pub origins: Origins,
    /// Traces and logs requests.
    pub observer: Observer,
    /// Renders `/metrics`; absent where no recorder was installed.
    pub metrics: Option<PrometheusHandle>,
    /// Durable records.
    pub store: Store,
    /// Keys.
    pub auth: Auth,
    /// What keys and models may be used.
    pub limits: Arc<Limiter>,
    /// Which answers are recorded.
    pub recording: Arc<Recording>,
    /// Datasets, and the builds under way.
    pub datasets: DatasetJobs,
    /// What clients upload and batches make.
    pub files: Files,
    /// Bounds on files.
    pub file_limits: FileLimits,
    /// Requests that are answered in the background.
    pub batches: Batches,
    /// Models that are made from files.
    pub fine_tuning: FineTuning,
    /// Loops from feedback to adapters.
    pub loops: Flywheels,
    /// Responses that are made while nobody waits.
    pub background: Background,
    /// Metrics that feedback may name.
    pub feedback_metrics: Arc<Metrics>,
    /// Which variants answer which public models.
    pub rollouts: Keeper,
    /// Lets testers without an administrator's key choose a variant.
    pub tester_secret: Option<Arc<str>>,
}
