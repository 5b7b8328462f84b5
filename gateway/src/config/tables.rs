//! The tables of `tidemill.toml`: `[metrics.NAME]`, `[recording.NAME]`, `[limits.MODEL]` and `[prices.MODEL]`; `parsers` reads
//! `[parsers.NAME]`, `upstreams` reads `[upstreams.NAME]` and `[models.NAME]`.

use crate::config::ConfigError;
use crate::config::layer::{Layer, NamedTable};
use crate::config::value;
use crate::feedback::{Metric, MetricKind, Metrics, Optimize};
use crate::keys::{LIMITS, dollars, set_limit};
use crate::limits::{Price, Prices};
use crate::recording::{Level, Route};
use std::collections::BTreeMap;
use tidemill_store::Limits;
use tidemill_store::records::TargetKind;

/// Every table that has named tables in it.
pub const TABLES: [&str; 7] = ["metrics", "recording", "limits", "prices", "parsers", "upstreams", "models"];

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

/// `[limits.MODEL]`: over all callers of the model together.
pub fn limits(layers: &[Layer]) -> Result<BTreeMap<String, Limits>, ConfigError> {
    let mut models = BTreeMap::new();
    for table in tables(layers, "limits") {
        known(table, &LIMITS)?;
        let mut limits = Limits::default();
        for (name, setting) in &table.settings {
            setting.parse(|text| set_limit(&mut limits, name, text))?;
        }
        models.insert(table.name.clone(), limits);
    }
    Ok(models)
}

/// `[prices.MODEL]`: dollars per million tokens. Cached tokens cost as others unless the table says less.
pub fn prices(layers: &[Layer]) -> Result<Prices, ConfigError> {
    let mut prices = Prices::new();
    for table in tables(layers, "prices") {
        known(table, &["input", "cached_input", "output"])?;
        let price = |key: &str| table.get(key).map(|s| s.parse(per_million)).transpose();
        let input = price("input")?.unwrap_or(0);
        let price = Price { input, cached_input: price("cached_input")?.unwrap_or(input), output: price("output")?.unwrap_or(0) };
        prices.insert(table.name.clone(), price);
    }
    Ok(prices)
}

/// Dollars per million tokens as billionths of a dollar per token.
fn per_million(text: &str) -> Result<i64, String> {
    let expected = || "expected dollars per million tokens, such as 0.15, to a thousandth of a dollar".to_owned();
    let nano = dollars(text).map_err(|_| expected())?.0;
    if nano % 1_000_000 == 0 { Ok(nano / 1_000_000) } else { Err(expected()) }
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
