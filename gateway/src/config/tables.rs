//! The tables of `tidemill.toml`: `[metrics.NAME]` and `[recording.NAME]`; `parsers` reads `[parsers.NAME]`.

use crate::config::ConfigError;
use crate::config::layer::{Layer, NamedTable};
use crate::config::value;
use crate::feedback::{Metric, MetricKind, Metrics, Optimize};
use crate::recording::{Level, Route};
use std::collections::BTreeMap;
use tidemill_store::records::TargetKind;

/// Every table that has named tables in it.
pub const TABLES: [&str; 3] = ["metrics", "recording", "parsers"];

/// How much of an answer is recorded.
pub fn level(text: &str) -> Result<Level, String> {
    value::choice(text, &[("full", Level::Full), ("metadata", Level::Metadata), ("off", Level::Off)])
}

/// `[recording.NAME]`, where NAME is a served model, `chat` or `completion`.
pub fn recording(layers: &[Layer]) -> Result<BTreeMap<String, Route>, ConfigError> {
    let mut routes = BTreeMap::new();
    for table in tables(layers, "recording") {
        known(table, &["record", "share"])?;
        let route = Route {
            level: table.get("record").map(|s| s.parse(level)).transpose()?,
            share: table.get("share").map(|s| s.parse(value::share)).transpose()?,
        };
        routes.insert(table.name.clone(), route);
    }
    Ok(routes)
}

/// `[metrics.NAME]`.
pub fn metrics(layers: &[Layer]) -> Result<Metrics, ConfigError> {
    let mut metrics = Metrics::default();
    for table in tables(layers, "metrics") {
        known(table, &["type", "optimize", "min", "max", "closed", "level"])?;
        let value = |key: &str, message: &str| ConfigError::Value {
            place: table.get(key).map_or(&table.origin, |setting| &setting.origin).to_string(),
            message: message.to_owned(),
        };
        let Some(kind) = table.get("type") else {
            return Err(value("type", "needs `type = \"number\"` or `type = \"boolean\"`"));
        };
        let kind = kind.parse(|text| value::choice(text, &[("number", MetricKind::Number), ("boolean", MetricKind::Boolean)]))?;
        let Some(optimize) = table.get("optimize") else {
            return Err(value("optimize", "needs `optimize = \"max\"` or `optimize = \"min\"`: which way is better"));
        };
        let optimize = optimize.parse(|text| value::choice(text, &[("max", Optimize::Max), ("min", Optimize::Min)]))?;
        let bound = |key: &str| table.get(key).map(|s| s.parse(number)).transpose();
        let (min, max) = (bound("min")?, bound("max")?);
        if kind == MetricKind::Boolean && (min.is_some() || max.is_some()) {
            let key = if min.is_some() { "min" } else { "max" };
            return Err(value(key, "a boolean metric has no bounds"));
        }
        if min.zip(max).is_some_and(|(min, max)| min >= max) {
            return Err(value("max", "must be above `min`"));
        }
        let closed = table.get("closed").map_or(Ok(false), |s| s.parse(value::switch))?;
        let levels = [("completion", TargetKind::Completion), ("conversation", TargetKind::Conversation)];
        let level = table.get("level").map(|s| s.parse(|text| value::choice(text, &levels))).transpose()?;
        metrics.insert(table.name.clone(), Metric { kind, optimize, min, max, closed, level });
    }
    Ok(metrics)
}

fn number(text: &str) -> Result<f64, String> {
    text.replace('_', "").parse().ok().filter(|n: &f64| n.is_finite()).ok_or_else(|| "expected a number".to_owned())
}

/// Only a file has tables, so there is nothing to merge.
pub(super) fn tables<'a>(layers: &'a [Layer], table: &'static str) -> impl Iterator<Item = &'a NamedTable> {
    layers.iter().flat_map(|layer| &layer.tables).filter(move |found| found.table == table)
}

/// Fails on a key that is none of `keys`.
pub(super) fn known(table: &NamedTable, keys: &[&str]) -> Result<(), ConfigError> {
    match table.settings.iter().find(|(key, _)| !keys.contains(&key.as_str())) {
        None => Ok(()),
        Some((key, setting)) => Err(ConfigError::UnknownKey {
            place: setting.origin.to_string(),
            key: key.clone(),
            hint: format!("; the keys of [{}.NAME] are {}", table.table, keys.join(", ")),
        }),
    }
}
