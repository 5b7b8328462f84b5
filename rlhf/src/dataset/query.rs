//! Which feedback becomes which rows.

use serde::{Deserialize, Serialize};
use tidemill_store::records::{Feedback, Kind};

/// What a row is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Material {
    /// Two or more answers ranked.
    Comparison,
    /// A better text for an answer.
    Correction,
    /// Numbers given to answers of one prompt.
    Rating,
    /// Up or down.
    Thumb,
    /// A metric that [`Query::labels`] names.
    Metric,
}

/// What a row teaches; the variants of [`super::Example`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowKind {
    /// One answer over another.
    Preference,
    /// One answer, good or bad.
    Unpaired,
    /// An answer to imitate.
    Demonstration,
}

impl RowKind {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preference => "preference",
            Self::Unpaired => "unpaired",
            Self::Demonstration => "demonstration",
        }
    }
}

/// What happens when several people judged the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Raters {
    /// One row, as most of them said; an even split gives none. The row's origin names everyone, those outvoted too.
    #[default]
    Majority,
    /// One row per judgement, contradictions included.
    Each,
}

/// Answers whose metric lies in a range.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricRange {
    /// The metric.
    pub name: String,
    /// Lowest mean over its reports, inclusive.
    #[serde(default)]
    pub min: Option<f64>,
    /// Highest, inclusive.
    #[serde(default)]
    pub max: Option<f64>,
}

/// A metric that labels answers good and bad.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricLabel {
    /// The metric.
    pub name: String,
    /// A mean from here on is good: upwards when `good` is the larger of the two, downwards when it is the smaller.
    pub good: f64,
    /// A mean from here on in the other direction is bad; between the two no row is made.
    pub bad: f64,
}

/// A query over feedback. Empty lists mean "all".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Query {
    /// Rows wanted.
    pub rows: Vec<RowKind>,
    /// Feedback wanted.
    pub from: Vec<Material>,
    /// Models whose answers are wanted.
    pub models: Vec<String>,
    /// Variants whose answers are wanted.
    pub variants: Vec<String>,
    /// Feedback that carries any of these tags.
    pub tags: Vec<String>,
    /// Feedback that carries any of these tags is left out. By default `gold`: verdicts on test items say how good the raters are.
    pub exclude_tags: Vec<String>,
    /// Feedback that came from any of these sources, such as `console`.
    pub sources: Vec<String>,
    /// People whose requests are left out.
    pub exclude_users: Vec<String>,
    /// People whose judgements are left out.
    pub exclude_raters: Vec<String>,
    /// Feedback given at or after, in microseconds since 1970.
    pub since: Option<i64>,
    /// Feedback given before, in microseconds since 1970.
    pub until: Option<i64>,
    /// Fewest people behind a comparison, thumb, rating or metric label. A correction is one person's work and is not counted.
    pub min_raters: usize,
    /// Several people, one thing.
    pub raters: Raters,
    /// Least difference of two ratings (0 to 1) that makes a pair.
    pub margin: f64,
    /// Most pairs that the ratings of one prompt make; the widest differences come first.
    pub max_pairs_per_prompt: usize,
    /// An answer taught as good must lie in all of these ranges; one without the metric is left out.
    pub metrics: Vec<MetricRange>,
    /// Metrics that make unpaired rows.
    pub labels: Vec<MetricLabel>,
    /// Most rows from one person's requests; the newest are kept.
    pub max_rows_per_user: Option<usize>,
    /// Most rows from one rater; the newest are kept.
    pub max_rows_per_rater: Option<usize>,
    /// Teach answers as good that the token limit cut off.
    pub truncated: bool,
    /// Share of the rows to hold out for evaluation, 0 to 0.5, whole clusters of alike prompts at a time.
    pub held_out: f64,
    /// For the choice of what is held out.
    pub seed: u64,
}

impl Default for Query {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            from: Vec::new(),
            models: Vec::new(),
            variants: Vec::new(),
            tags: Vec::new(),
            exclude_tags: vec!["gold".to_owned()],
            sources: Vec::new(),
            exclude_users: Vec::new(),
            exclude_raters: Vec::new(),
            since: None,
            until: None,
            min_raters: 1,
            raters: Raters::Majority,
            margin: 0.25,
            max_pairs_per_prompt: 8,
            metrics: Vec::new(),
            labels: Vec::new(),
            max_rows_per_user: None,
            max_rows_per_rater: None,
            truncated: false,
            held_out: 0.0,
            seed: 0,
        }
    }
}

/// A field that cannot be what it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{field}' {reason}")]
pub struct InvalidQuery {
    /// The field.
    pub field: &'static str,
    /// Why not, and what it may be.
    pub reason: String,
}

impl Query {
    /// Whether it looks at this feedback at all.
    pub(super) fn asks_for(&self, feedback: &Feedback) -> bool {
        let labelled = || self.labels.iter().any(|label| Some(&label.name) == feedback.metric.as_ref());
        let kind = self.takes(feedback.kind) && (feedback.kind != Kind::Metric || labelled());
        kind && self.since.is_none_or(|since| feedback.created >= since)
            && self.until.is_none_or(|until| feedback.created < until)
            && (self.tags.is_empty() || feedback.tags.iter().any(|tag| self.tags.contains(tag)))
            && !feedback.tags.iter().any(|tag| self.exclude_tags.contains(tag))
            && (self.sources.is_empty() || feedback.source.as_ref().is_some_and(|source| self.sources.contains(source)))
            && feedback.author.as_ref().is_none_or(|author| !self.exclude_raters.contains(author))
    }

    /// Whether feedback of this kind may become rows; of metrics only those that [`Query::labels`] names.
    pub fn takes(&self, kind: Kind) -> bool {
        let (material, kinds): (_, &[RowKind]) = match kind {
            Kind::Comparison => (Material::Comparison, &[RowKind::Preference]),
            Kind::Rating => (Material::Rating, &[RowKind::Preference]),
            Kind::Correction => (Material::Correction, &[RowKind::Preference, RowKind::Demonstration]),
            Kind::Thumb => (Material::Thumb, &[RowKind::Unpaired]),
            Kind::Metric => (Material::Metric, &[RowKind::Unpaired]),
            Kind::Comment => return false,
        };
        self.wants_material(material) && kinds.iter().any(|kind| self.wants(*kind))
    }

    /// Refuses what cannot be meant.
    pub fn check(&self) -> Result<(), InvalidQuery> {
        let wrong = |field, reason: String| Err(InvalidQuery { field, reason });
        if !(0.0..=0.5).contains(&self.held_out) {
            return wrong("held_out", format!("is {}; use a share from 0 to 0.5", self.held_out));
        }
        if !(self.margin > 0.0 && self.margin <= 1.0) {
            return wrong("margin", format!("is {}; ratings go from 0 to 1, so use more than 0 and at most 1", self.margin));
        }
        if let (Some(since), Some(until)) = (self.since, self.until)
            && since >= until
        {
            return wrong("until", "is not after 'since', so nothing lies between them".to_owned());
        }
        for (field, value) in [
            ("min_raters", Some(self.min_raters)),
            ("max_pairs_per_prompt", Some(self.max_pairs_per_prompt)),
            ("max_rows_per_user", self.max_rows_per_user),
            ("max_rows_per_rater", self.max_rows_per_rater),
        ] {
            if value == Some(0) {
                return wrong(field, "is 0; use 1 or more".to_owned());
            }
        }
        for range in &self.metrics {
            let bounds = [range.min, range.max];
            if bounds == [None, None] || bounds.iter().flatten().any(|bound| !bound.is_finite()) {
                return wrong("metrics", format!("asks nothing of '{}'; give 'min', 'max' or both, as numbers", range.name));
            }
            if let (Some(min), Some(max)) = (range.min, range.max)
                && min > max
            {
                return wrong("metrics", format!("wants '{}' from {min} to {max}; the first must not be the larger", range.name));
            }
        }
        for label in &self.labels {
            if !(label.good.is_finite() && label.bad.is_finite()) || label.good == label.bad {
                return wrong("labels", format!("of '{}' needs two different numbers, 'good' and 'bad'", label.name));
            }
        }
        if self.wants_material(Material::Metric) && self.from.contains(&Material::Metric) && self.labels.is_empty() {
            return wrong("labels", "is empty, but 'from' asks for metrics; say which values are good and bad".to_owned());
        }
        Ok(())
    }

    /// Whether rows of this kind are wanted.
    pub fn wants(&self, kind: RowKind) -> bool {
        self.rows.is_empty() || self.rows.contains(&kind)
    }

    /// Whether rows made from this are wanted.
    pub fn wants_material(&self, material: Material) -> bool {
        self.from.is_empty() || self.from.contains(&material)
    }
}

/// A point in time, in microseconds since 1970: a date (from midnight UTC), a time as RFC 3339 has it, or a span before `now` such as
/// `30d`, `12h` or `90m`.
pub fn time(text: &str, now: i64) -> Result<i64, String> {
    if let Some((count, unit)) = text.split_at_checked(text.len().saturating_sub(1))
        && let Ok(count) = count.parse::<u32>()
        && let Some(seconds) = match unit {
            "m" => Some(60),
            "h" => Some(3600),
            "d" => Some(86_400),
            "w" => Some(604_800),
            _ => None,
        }
    {
        return Ok(now - i64::from(count) * seconds * 1_000_000);
    }
    if let Ok(date) = chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return Ok(date.and_time(chrono::NaiveTime::MIN).and_utc().timestamp_micros());
    }
    match chrono::DateTime::parse_from_rfc3339(text) {
        Ok(time) => Ok(time.timestamp_micros()),
        Err(_) => Err(format!("'{text}' is no time; write 2026-11-30, 2026-11-30T12:00:00Z, or a span such as 30d")),
    }
}

/// Such as `2026-11-30 12:00 UTC`.
pub fn date(micros: i64) -> String {
    chrono::DateTime::from_timestamp_micros(micros)
        .map_or_else(|| "at no time".to_owned(), |time| time.format("%Y-%m-%d %H:%M UTC").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_that_cannot_be_meant_names_its_field() {
        let label = |good, bad| MetricLabel { name: "m".into(), good, bad };
        let range = |min, max| MetricRange { name: "m".into(), min, max };
        for (query, field) in [
            (Query { held_out: 0.9, ..Query::default() }, "held_out"),
            (Query { held_out: f64::NAN, ..Query::default() }, "held_out"),
            (Query { margin: 0.0, ..Query::default() }, "margin"),
            (Query { since: Some(5), until: Some(5), ..Query::default() }, "until"),
            (Query { min_raters: 0, ..Query::default() }, "min_raters"),
            (Query { max_rows_per_user: Some(0), ..Query::default() }, "max_rows_per_user"),
            (Query { metrics: vec![range(None, None)], ..Query::default() }, "metrics"),
            (Query { metrics: vec![range(Some(2.0), Some(1.0))], ..Query::default() }, "metrics"),
            (Query { labels: vec![label(1.0, 1.0)], ..Query::default() }, "labels"),
            (Query { from: vec![Material::Metric], ..Query::default() }, "labels"),
        ] {
            assert_eq!(query.check().unwrap_err().field, field);
        }
        assert_eq!(Query::default().check(), Ok(()));
    }

    #[test]
    fn times_are_dates_instants_and_spans() {
        let now = 1_767_225_600_000_000;
        for (text, time) in
            [("2026-01-01", now), ("2026-01-01T02:00:00+02:00", now), ("2d", now - 172_800_000_000), ("90m", now - 5_400_000_000)]
        {
            assert_eq!(super::time(text, now), Ok(time), "{text}");
        }
        for bad in ["", "d", "yesterday", "2026-13-01", "5y", "€"] {
            assert!(super::time(bad, now).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_misspelt_field_is_refused_and_a_missing_one_has_its_default() {
        assert!(serde_json::from_str::<Query>(r#"{"modles":["a"]}"#).is_err());
        assert_eq!(serde_json::from_str::<Query>("{}").unwrap(), Query::default());
    }
}
