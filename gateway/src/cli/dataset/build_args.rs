//! The flags of a build as a query.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;
use tidemill_rlhf::dataset::Query;
use tidemill_rlhf::dataset::import::{self, Input};
use tidemill_rlhf::dataset::query::{Material, MetricLabel, MetricRange, Raters, RowKind, time};
use tidemill_rlhf::quality::QualityOptions;

use super::DatasetCommandError;
use crate::cli::store_args::read_json;
use crate::clock::now;

/// What `dataset build` is asked.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// What it is called
    pub name: String,
    /// A query as JSON in a file; flags add to it
    #[arg(long, value_name = "FILE")]
    query: Option<PathBuf>,
    /// Kinds of rows wanted [default: all]
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = named::<RowKind>)]
    rows: Vec<RowKind>,
    /// Kinds of feedback wanted: comparison, correction, rating, thumb, metric [default: all]
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = named::<Material>)]
    from: Vec<Material>,
    /// Only answers of this model; may be repeated
    #[arg(long)]
    model: Vec<String>,
    /// Only answers of this variant; may be repeated
    #[arg(long)]
    variant: Vec<String>,
    /// Only feedback with this tag; may be repeated
    #[arg(long)]
    tag: Vec<String>,
    /// Only feedback from this source, such as console; may be repeated
    #[arg(long)]
    source: Vec<String>,
    /// Leave out requests of this person; may be repeated
    #[arg(long, value_name = "USER")]
    exclude_user: Vec<String>,
    /// Leave out judgements of this person; may be repeated
    #[arg(long, value_name = "RATER")]
    exclude_rater: Vec<String>,
    /// Only feedback from then on: 2026-11-30, an RFC 3339 time, or a span such as 30d
    #[arg(long, value_name = "TIME", value_parser = point)]
    since: Option<i64>,
    /// Only feedback before then
    #[arg(long, value_name = "TIME", value_parser = point)]
    until: Option<i64>,
    /// Fewest raters behind a comparison, thumb or rating [default: 1]
    #[arg(long, value_name = "N")]
    min_raters: Option<usize>,
    /// What happens when several people judged the same: majority, each [default: majority]
    #[arg(long, value_name = "HOW", value_parser = named::<Raters>)]
    raters: Option<Raters>,
    /// Least difference of two ratings, 0 to 1, that makes a pair [default: 0.25]
    #[arg(long, value_name = "0..1")]
    margin: Option<f64>,
    /// An answer taught as good must have this metric in this range: NAME=MIN..MAX, either end may be missing
    #[arg(long, value_name = "RANGE", value_parser = range)]
    metric: Vec<MetricRange>,
    /// A metric makes unpaired rows: NAME=GOOD:BAD, the values from which an answer is good and bad
    #[arg(long, value_name = "LABEL", value_parser = label)]
    label: Vec<MetricLabel>,
    /// Most rows from one person's requests
    #[arg(long, value_name = "N")]
    max_rows_per_user: Option<usize>,
    /// Most rows from one rater
    #[arg(long, value_name = "N")]
    max_rows_per_rater: Option<usize>,
    /// Teach answers as good that the token limit cut off
    #[arg(long)]
    truncated: bool,
    /// Share to hold out for evaluation, by clusters of alike prompts
    #[arg(long, value_name = "0..0.5")]
    held_out: Option<f64>,
    /// For the choice of what is held out [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    pub quality: QualityArgs,
}

/// How a new snapshot is checked.
#[derive(Debug, Args)]
pub struct QualityArgs {
    /// Prompts of evaluations, as JSONL with a 'prompt' or 'messages': rows that repeat them are found
    #[arg(long, value_name = "FILE")]
    evaluation_prompts: Option<PathBuf>,
    /// When checks warn and fail, as JSON: {"size": {"preferences": {"warn": 500, "fail": 50}}, …}; what it leaves out stays
    #[arg(long, value_name = "FILE")]
    thresholds: Option<PathBuf>,
    /// Exit as `dataset report --gate` does
    #[arg(long)]
    pub gate: bool,
}

/// What a value of an enum is called in JSON, it is called here.
pub(super) fn named<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(Value::String(text.to_owned())).map_err(|error| error.to_string())
}

fn point(text: &str) -> Result<i64, String> {
    time(text, now())
}

fn range(text: &str) -> Result<MetricRange, String> {
    let wrong = || format!("'{text}' is no range; write NAME=MIN..MAX, such as seconds=..5");
    let (name, bounds) = text.split_once('=').ok_or_else(wrong)?;
    let (min, max) = bounds.split_once("..").ok_or_else(wrong)?;
    let bound = |text: &str| if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(|_| wrong()) };
    Ok(MetricRange { name: name.to_owned(), min: bound(min)?, max: bound(max)? })
}

fn label(text: &str) -> Result<MetricLabel, String> {
    let wrong = || format!("'{text}' is no label; write NAME=GOOD:BAD, such as solved=1:0");
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    let (good, bad) = values.split_once(':').ok_or_else(wrong)?;
    let value = |text: &str| text.parse().map_err(|_| wrong());
    Ok(MetricLabel { name: name.to_owned(), good: value(good)?, bad: value(bad)? })
}

impl BuildArgs {
    /// The query of the file and the flags.
    pub fn query(&self) -> Result<Query, DatasetCommandError> {
        let mut query = self.query.as_deref().map(read_json::<Query>).transpose()?.unwrap_or_default();
        query.rows.extend(&self.rows);
        query.from.extend(&self.from);
        query.models.extend(self.model.iter().cloned());
        query.variants.extend(self.variant.iter().cloned());
        query.tags.extend(self.tag.iter().cloned());
        query.sources.extend(self.source.iter().cloned());
        query.exclude_users.extend(self.exclude_user.iter().cloned());
        query.exclude_raters.extend(self.exclude_rater.iter().cloned());
        query.metrics.extend(self.metric.iter().cloned());
        query.labels.extend(self.label.iter().cloned());
        query.since = self.since.or(query.since);
        query.until = self.until.or(query.until);
        query.min_raters = self.min_raters.unwrap_or(query.min_raters);
        query.raters = self.raters.unwrap_or(query.raters);
        query.margin = self.margin.unwrap_or(query.margin);
        query.max_rows_per_user = self.max_rows_per_user.or(query.max_rows_per_user);
        query.max_rows_per_rater = self.max_rows_per_rater.or(query.max_rows_per_rater);
        query.truncated |= self.truncated;
        query.held_out = self.held_out.unwrap_or(query.held_out);
        query.seed = self.seed.unwrap_or(query.seed);
        Ok(query)
    }
}

impl QualityArgs {
    /// The options of the quality report.
    pub async fn options(&self) -> Result<QualityOptions, DatasetCommandError> {
        let mut options = QualityOptions::default();
        if let Some(path) = &self.evaluation_prompts {
            let input = Input::Jsonl { path: path.clone() };
            options.evaluation_prompts = import::prompts(&input).await?;
        }
        if let Some(path) = &self.thresholds {
            options.thresholds = read_json(path)?;
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_labels_are_read_as_they_are_written() {
        assert_eq!(range("seconds=..5").unwrap(), MetricRange { name: "seconds".into(), min: None, max: Some(5.0) });
        assert_eq!(range("score=0.5..").unwrap(), MetricRange { name: "score".into(), min: Some(0.5), max: None });
        assert_eq!(label("solved=1:0").unwrap(), MetricLabel { name: "solved".into(), good: 1.0, bad: 0.0 });
        for bad in ["", "x", "x=", "x=1", "x=a..b", "x=1..2..3"] {
            assert!(range(bad).is_err(), "{bad}");
        }
        for bad in ["", "x", "x=1", "x=a:b"] {
            assert!(label(bad).is_err(), "{bad}");
        }
    }
}
