//! Metrics that answers must meet to be taught as good.

use std::collections::BTreeMap;

use tidemill_store::records::Kind;

use super::answer::Gathered;
use super::query::Query;

/// Means of the metrics that the query asks ranges of, per answer.
pub struct Metrics<'a> {
    query: &'a Query,
    sums: BTreeMap<(&'a str, &'a str), (f64, usize)>,
}

impl<'a> Metrics<'a> {
    /// Of all reports that stand.
    pub fn new(gathered: &'a Gathered, query: &'a Query) -> Self {
        let mut sums: BTreeMap<(&str, &str), (f64, usize)> = BTreeMap::new();
        for feedback in gathered.feedback.iter().filter(|feedback| feedback.kind == Kind::Metric && !feedback.withdrawn) {
            if let (Some(metric), Some(number)) = (&feedback.metric, feedback.number) {
                let (sum, count) = sums.entry((feedback.target.as_str(), metric.as_str())).or_default();
                *sum += number;
                *count += 1;
            }
        }
        Self { query, sums }
    }

    /// Whether the answer has every metric that the query names, in its range.
    pub fn in_range(&self, id: &str) -> bool {
        self.query.metrics.iter().all(|range| {
            self.sums.get(&(id, range.name.as_str())).is_some_and(|(sum, count)| {
                let mean = sum / *count as f64;
                range.min.is_none_or(|min| mean >= min) && range.max.is_none_or(|max| mean <= max)
            })
        })
    }
}
