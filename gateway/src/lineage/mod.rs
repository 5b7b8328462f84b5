//! Where an answer comes from, and what came of a judgement: answers, adapters, jobs, datasets, rows and raters, as the store ties them
//! together.
//!
//! [`Tracer`] follows the ties in both directions, [`Trace`] is what it found, and [`Trace::tree`] shows it to people. Counts are always
//! there; the ids behind them only where they are asked for.

mod tracer;
mod tree;

pub use tracer::{TraceError, Tracer, Want};
pub use tree::Tree;

use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use tidemill_store::AnswerSpan;

/// What was found. Times are in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "of", rename_all = "snake_case")]
pub enum Trace {
    /// Where an answer comes from, and what learnt from it.
    Answer {
        /// The answer.
        answer: AnswerFacts,
        /// The rollout that it counts in.
        rollout: Option<RolloutFacts>,
        /// Adapters of the registry with the contents that answered.
        adapters: Vec<AdapterFacts>,
        /// Datasets that hold it, with what was trained on them.
        used_in: Vec<Use>,
    },
    /// Where an adapter comes from, and what came of it.
    Adapter {
        /// The adapter.
        adapter: Box<AdapterFacts>,
        /// What it answered, and what was trained on from it.
        made: Box<Offspring>,
    },
    /// What came of a job.
    Job {
        /// The job.
        job: JobFacts,
        /// The adapters that it made.
        made: Vec<Offspring>,
    },
    /// What came of a dataset.
    Dataset(Use),
    /// What came of a person's judgements.
    Rater {
        /// The person.
        rater: String,
        /// The datasets with judgements of theirs, and what came of those.
        used_in: Vec<Use>,
        /// The sums, each adapter counted once.
        total: Total,
    },
    /// What came of one judgement.
    Feedback {
        /// Its id.
        feedback: String,
        /// What sort.
        kind: Option<String>,
        /// What it is about.
        target: Option<String>,
        /// The datasets that hold it, and what came of those.
        used_in: Vec<Use>,
        /// The sums, each adapter counted once.
        total: Total,
    },
    /// Where a row of datasets comes from, and what came of it.
    Row {
        /// The row.
        row: RowFacts,
        /// The datasets that hold it, and what came of those.
        used_in: Vec<Use>,
        /// The sums, each adapter counted once.
        total: Total,
        /// Every dataset was looked through: rows are not indexed, and an erased person's datasets are left out.
        complete: bool,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AnswerFacts {
    /// Its bare id.
    pub id: String,
    /// When it came.
    pub created_at: i64,
    /// `chat`, `response` or `completion`.
    pub endpoint: String,
    /// The served model.
    pub model: String,
    /// The adapter or variant.
    pub variant: Option<String>,
    /// Generation of the weights, 16 hexadecimal digits; null for the base.
    pub generation: Option<String>,
    /// `ok`, `cancelled` or `failed`.
    pub status: &'static str,
    /// The key that asked.
    pub key_id: Option<String>,
    /// Hash of the configuration of model and engine.
    pub config_hash: String,
}

/// A rollout, and the arm that answered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RolloutFacts {
    /// Its id.
    pub id: String,
    /// Its name; null where its row is gone.
    pub name: Option<String>,
    /// The public model name.
    pub model: Option<String>,
    /// `ab`, `canary`, …
    pub kind: Option<String>,
    /// Which arm; 0 is the control.
    pub arm: u32,
    /// The arm's variant.
    pub variant: Option<String>,
}

/// An adapter and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterFacts {
    /// `NAME@GENERATION`.
    pub id: String,
    /// Its id in the registry.
    pub registered: String,
    /// The base model.
    pub base: String,
    /// Names the base's weights.
    pub base_hash: Option<String>,
    /// BLAKE3 of the factors.
    pub content_hash: String,
    /// `candidate`, `serving`, `retired` or `revoked`.
    pub state: &'static str,
    /// Why it should not be served.
    pub tainted: Option<Value>,
    /// When it was registered.
    pub created_at: i64,
    /// Version of the code that made it.
    pub code_version: Option<String>,
    /// The method of its training.
    pub method: Option<String>,
    /// The job that trained it.
    pub job: Option<JobFacts>,
    /// The dataset that it was trained on.
    pub dataset: Option<DatasetFacts>,
    /// What it was trained on where that is no dataset of this store: the name and the hash of a file.
    pub trained_on: Option<Value>,
    /// The adapter that its training went on from.
    pub parent: Option<Box<AdapterFacts>>,
}

/// A training job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobFacts {
    /// Its name in the API.
    pub id: String,
    /// Where it is; null where its row is not there.
    pub state: Option<&'static str>,
    /// `supervised`, `dpo` or `reinforcement`.
    pub method: Option<String>,
    /// The file that it learnt from.
    pub training_file: Option<String>,
    /// The key that made it.
    pub key_id: Option<String>,
    /// When it was made.
    pub created_at: Option<i64>,
}

/// A snapshot of a dataset.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DatasetFacts {
    /// `NAME@VERSION`.
    pub id: String,
    /// The snapshot's own id.
    pub snapshot: String,
    /// BLAKE3 over its rows.
    pub content_hash: String,
    /// `pass`, `warn` or `fail`.
    pub verdict: String,
    /// Why it must not be trained on.
    pub tainted: Option<Value>,
    /// When it was made.
    pub created_at: i64,
    /// Its rows.
    pub rows: u64,
    /// What is behind them, by kind: `inference`, `feedback`, `task`, `rater`, `user`.
    pub sources: BTreeMap<String, u64>,
    /// Who judged, where ids are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raters: Option<Vec<String>>,
    /// The rows, where ids are asked for and no person behind them was erased.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub row_ids: Option<Vec<RowFacts>>,
    /// There are more rows than were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub has_more: Option<bool>,
}

/// A row of a dataset, without its texts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowFacts {
    /// Its content address.
    pub id: String,
    /// `preference`, `unpaired` or `demonstration`.
    pub kind: &'static str,
    /// Who judged.
    pub raters: Vec<String>,
    /// Ids of the feedback.
    pub feedback: Vec<String>,
    /// Ids of the answers.
    pub answers: Vec<String>,
}

/// A dataset and what was trained on it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Use {
    /// The dataset.
    pub dataset: DatasetFacts,
    /// The adapters.
    pub adapters: Vec<Offspring>,
}

/// An adapter, what it answered, and the adapters whose training went on from it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Offspring {
    /// `NAME@GENERATION`.
    pub id: String,
    /// Its id in the registry.
    pub registered: String,
    /// The base model.
    pub base: String,
    /// What is done with it.
    pub state: &'static str,
    /// Whether a person behind it was erased.
    pub tainted: bool,
    /// How many answers, and from when to when.
    pub answers: Answers,
    /// Trained on from it.
    pub continued: Vec<Self>,
}

/// How many answers there are, and from when to when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Answers {
    /// How many.
    pub count: u64,
    /// The first.
    pub first: Option<i64>,
    /// The last.
    pub last: Option<i64>,
}

impl From<AnswerSpan> for Answers {
    fn from(span: AnswerSpan) -> Self {
        let seconds = |at: Option<i64>| at.map(|at| at.div_euclid(1_000_000));
        Self { count: span.answers, first: seconds(span.first), last: seconds(span.last) }
    }
}

/// What came of something in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// Datasets.
    pub datasets: usize,
    /// Different adapters.
    pub adapters: usize,
    /// Answers of those; adapters with the same contents under several names share theirs.
    pub answers: u64,
}

impl Total {
    /// Of these uses.
    pub fn of(uses: &[Use]) -> Self {
        fn walk<'o>(all: &'o [Offspring], seen: &mut BTreeMap<&'o str, &'o Offspring>) {
            for one in all {
                seen.insert(&one.registered, one);
                walk(&one.continued, seen);
            }
        }
        let mut seen = BTreeMap::new();
        uses.iter().for_each(|each| walk(&each.adapters, &mut seen));
        // The generation names the contents, and answers are counted by contents.
        let contents: BTreeMap<&str, u64> = seen
            .values()
            .map(|one| (one.id.rsplit_once('@').map_or(one.id.as_str(), |(_, generation)| generation), one.answers.count))
            .collect();
        Self { datasets: uses.len(), adapters: seen.len(), answers: contents.values().sum() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_behind_two_datasets_counts_once_and_so_do_answers_of_the_same_contents() {
        let one = |registered: &str, id: &str, count, continued| Offspring {
            id: id.into(),
            registered: registered.into(),
            base: "b".into(),
            state: "serving",
            tainted: false,
            answers: Answers { count, ..Answers::default() },
            continued,
        };
        let dataset = DatasetFacts {
            id: "d@1".into(),
            snapshot: "s".into(),
            content_hash: String::new(),
            verdict: "pass".into(),
            tainted: None,
            created_at: 0,
            rows: 0,
            sources: BTreeMap::new(),
            raters: None,
            row_ids: None,
            has_more: None,
        };
        let child = || one("2", "b@02", 5, vec![]);
        let uses = [
            Use { dataset: dataset.clone(), adapters: vec![one("1", "a@01", 3, vec![child()])] },
            Use { dataset, adapters: vec![child(), one("3", "other@02", 5, vec![])] },
        ];
        assert_eq!(Total::of(&uses), Total { datasets: 2, adapters: 3, answers: 8 });
        assert_eq!(Total::of(&[]), Total::default());
    }
}
