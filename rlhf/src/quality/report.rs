//! What a quality report says.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{options::Limit, reliability::Rater, share::Share};
use crate::statistics::Interval;

/// Whether a dataset may be trained on, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QualityReport {
    /// `fail` when a check failed, `warn` when one warned, else `pass`. A pipeline gates on this.
    pub verdict: Verdict,
    /// Counts.
    pub summary: Summary,
    /// One entry per check, always all of them and in the same order.
    pub checks: Vec<Check>,
    /// One verdict per row, in the order of the rows.
    pub rows: Vec<RowVerdict>,
    /// What the page draws.
    pub plots: Plots,
}

/// The verdict over a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Train on it.
    Pass,
    /// Look at the findings first.
    Warn,
    /// Do not train on it.
    Fail,
}

/// The outcome of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Nothing found beyond what the threshold allows.
    Pass,
    /// Past the first threshold.
    Warn,
    /// Past the second threshold.
    Fail,
    /// The dataset has nothing, or too little, to check.
    NotApplicable,
}

/// Counts over a dataset.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// All rows.
    pub rows: usize,
    /// Rows with a chosen and a rejected answer.
    pub preferences: usize,
    /// Rows with one judged answer.
    pub unpaired: usize,
    /// Rows with an answer to imitate.
    pub demonstrations: usize,
    /// Different people who judged.
    pub raters: usize,
    /// Different people whose requests were answered.
    pub users: usize,
    /// Groups of prompts that say nearly the same.
    pub prompt_clusters: usize,
    /// Words over all prompts and answers.
    pub words: usize,
    /// Rows per language that was recognised (ISO 639-3).
    pub languages: BTreeMap<String, usize>,
    /// Rows to train on.
    pub keep: usize,
    /// Rows that a person should look at.
    pub review: usize,
    /// Rows to leave out.
    pub drop: usize,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Its name, as in [`Reason::check`].
    pub name: String,
    /// Its outcome.
    pub status: Status,
    /// What was measured; none when it could not be.
    pub value: Option<f64>,
    /// 95 % interval of the value, where there is one.
    pub interval: Option<Interval>,
    /// Past `warn` it warns, past `fail` it fails; what is compared with it, the explanation says.
    pub threshold: Option<Limit>,
    /// What the value is and what to do about it, in one or two sentences.
    pub explanation: String,
    /// Ids of the first few rows that show it.
    pub examples: Vec<String>,
}

/// The verdict over one row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowVerdict {
    /// The row's id.
    pub id: String,
    /// What to do with it.
    pub verdict: Keep,
    /// Why; empty when it is kept.
    pub reasons: Vec<Reason>,
}

/// What to do with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Train on it.
    Keep,
    /// A person should look at it.
    Review,
    /// Leave it out.
    Drop,
}

/// A finding in one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The check that found it.
    pub check: String,
    /// What it found, without repeating personal data.
    pub detail: String,
}

/// The numbers behind the plots.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plots {
    /// Characters of the chosen answer less those of the rejected; bins of equal width.
    pub length_differences: Vec<Bin>,
    /// Share of the rows per user, largest first, the first twenty.
    pub users: Vec<Share>,
    /// Share of the rows per rater, largest first, the first twenty.
    pub raters: Vec<Share>,
    /// Raters by skill, worst first.
    pub reliability: Vec<Rater>,
}

/// A bar of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// Lower edge.
    pub low: f64,
    /// Upper edge.
    pub high: f64,
    /// Values in [low, high), and in the last bin up to and with `high`.
    pub count: usize,
}

/// Examples that a check names.
pub const EXAMPLES: usize = 8;

impl Check {
    /// A check that could not be made, and why.
    pub fn not_applicable(name: &str, why: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            status: Status::NotApplicable,
            value: None,
            interval: None,
            threshold: None,
            explanation: why.into(),
            examples: Vec::new(),
        }
    }

    /// A check whose `evidence` is held against a limit; the value that readers see may be another, as a share is beside the
    /// distance of its interval.
    pub fn held(name: &str, value: f64, evidence: f64, limit: Limit, explanation: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            status: limit.status(evidence),
            value: Some(value),
            interval: None,
            threshold: Some(limit),
            explanation: explanation.into(),
            examples: Vec::new(),
        }
    }

    /// The same with an interval.
    pub fn within(mut self, interval: Option<Interval>) -> Self {
        self.interval = interval;
        self
    }
}
