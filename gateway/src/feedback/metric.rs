//! Metrics that the configuration declares.

use std::collections::BTreeMap;
use tidemill_store::records::TargetKind;

/// What a metric's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Any finite number within the bounds.
    Number,
    /// `true` or `false`.
    Boolean,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Optimize {
    /// More.
    Max,
    /// Less.
    Min,
}

/// A declared metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// What its values are.
    pub kind: MetricKind,
    /// Which way is better.
    pub optimize: Optimize,
    /// Least value.
    pub min: Option<f64>,
    /// Greatest value.
    pub max: Option<f64>,
    /// Takes no more values.
    pub closed: bool,
    /// What it may be said about; `None` is both.
    pub level: Option<TargetKind>,
}

/// Metrics by name.
pub type Metrics = BTreeMap<String, Metric>;
