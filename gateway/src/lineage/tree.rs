//! A trace as people read it.

use crate::lineage::{AdapterFacts, Answers, DatasetFacts, JobFacts, Offspring, RowFacts, Total, Trace, Use};
use std::fmt;
use tidemill_rlhf::dataset::query::date;

/// Most ids of one line.
const MOST_IDS: usize = 12;

/// A line with the lines that belong to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    text: String,
    below: Vec<Self>,
}

impl Tree {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), below: Vec::new() }
    }

    fn with(mut self, below: impl IntoIterator<Item = Self>) -> Self {
        self.below.extend(below);
        self
    }

    fn lines(&self, f: &mut fmt::Formatter<'_>, indent: &str) -> fmt::Result {
        for (index, tree) in self.below.iter().enumerate() {
            let last = index + 1 == self.below.len();
            let (branch, further) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            writeln!(f, "{indent}{branch}{}", clean(&tree.text))?;
            tree.lines(f, &format!("{indent}{further}"))?;
        }
        Ok(())
    }
}

/// Whatever a name holds, a line stays a line.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", clean(&self.text))?;
        self.lines(f, "")
    }
}

impl Trace {
    /// For people.
    pub fn tree(&self) -> Tree {
        match self {
            Self::Answer { answer, rollout, adapters, used_in } => {
                let generation = answer.generation.as_deref().unwrap_or("the base's own weights");
                let variant = answer.variant.as_ref().map_or_else(String::new, |variant| format!(", variant {variant}"));
                let mut tree = Tree::new(format!("answer {}  {}  {}", answer.id, at(answer.created_at), answer.status)).with([
                    Tree::new(format!("model {}{variant}  {generation}", answer.model)),
                    Tree::new(format!("configuration {}", answer.config_hash)),
                ]);
                if let Some(key) = &answer.key_id {
                    tree = tree.with([Tree::new(format!("asked with key {key}"))]);
                }
                if let Some(rollout) = rollout {
                    let name = rollout.name.as_deref().unwrap_or(&rollout.id);
                    let kind = rollout.kind.as_deref().unwrap_or("of which nothing is left");
                    let variant = rollout.variant.as_deref().unwrap_or("unknown");
                    tree = tree.with([Tree::new(format!("rollout {name} ({kind})  arm {}: {variant}", rollout.arm))]);
                }
                tree.with(adapters.iter().map(of_adapter)).with(used(used_in))
            }
            Self::Adapter { adapter, made } => {
                of_adapter(adapter).with([Tree::new(answers(made.answers))]).with(made.continued.iter().map(of_offspring))
            }
            Self::Job { job, made } => of_job(job).with(made.iter().map(of_offspring)),
            Self::Dataset(one) => of_use(one),
            Self::Rater { rater, used_in, total } => {
                Tree::new(format!("rater {rater}  {}", of_total(*total))).with(used(used_in))
            }
            Self::Feedback { feedback, kind, target, used_in, total } => {
                let about = target.as_ref().map_or_else(String::new, |target| format!(" of {target}"));
                let kind = kind.as_deref().unwrap_or_default();
                Tree::new(format!("judgement {feedback}  {kind}{about}  {}", of_total(*total))).with(used(used_in))
            }
            Self::Row { row, used_in, total, complete } => {
                let beyond = if *complete { "" } else { "  (not every dataset was looked through)" };
                of_row(row).with([Tree::new(format!("{}{beyond}", of_total(*total)))]).with(used(used_in))
            }
        }
    }
}

fn of_adapter(adapter: &AdapterFacts) -> Tree {
    let tainted = if adapter.tainted.is_some() { ", a person behind it was erased" } else { "" };
    let hash = adapter.base_hash.as_deref().unwrap_or("of unknown weights");
    let mut tree = Tree::new(format!("adapter {}  {}{tainted}  {}", adapter.id, adapter.state, at(adapter.created_at))).with([
        Tree::new(format!("base {}  {hash}", adapter.base)),
        Tree::new(format!("code {}", adapter.code_version.as_deref().unwrap_or("unknown"))),
    ]);
    if let Some(method) = &adapter.method {
        tree = tree.with([Tree::new(format!("trained by {method}"))]);
    }
    let file = adapter.trained_on.as_ref();
    let file = file.map(|file| Tree::new(format!("trained on {}", file["source"].as_str().unwrap_or_default())));
    tree.with(adapter.job.as_ref().map(of_job))
        .with(adapter.dataset.as_ref().map(of_dataset))
        .with(file)
        .with(adapter.parent.as_ref().map(|parent| Tree::new("went on from").with([of_adapter(parent)])))
}

fn of_job(job: &JobFacts) -> Tree {
    let state = job.state.unwrap_or("of which nothing is left here");
    let file = job.training_file.as_ref().map_or_else(String::new, |file| format!("  {file}"));
    let method = job.method.as_deref().unwrap_or_default();
    Tree::new(format!("job {}  {state}  {method}{file}", job.id).trim_end().to_owned())
}

fn of_dataset(dataset: &DatasetFacts) -> Tree {
    let tainted = if dataset.tainted.is_some() { ", a person in it was erased" } else { "" };
    let count = |kind: &str| dataset.sources.get(kind).copied().unwrap_or_default();
    let behind = format!(
        "{} rows from {} judgements of {} answers by {} raters",
        dataset.rows,
        count("feedback"),
        count("inference"),
        count("rater")
    );
    let mut tree = Tree::new(format!("dataset {}  {}{tainted}  {}", dataset.id, dataset.verdict, at(dataset.created_at)))
        .with([Tree::new(format!("content {}", dataset.content_hash)), Tree::new(behind)]);
    if let Some(raters) = &dataset.raters {
        tree = tree.with([Tree::new(format!("raters {}", ids(raters)))]);
    }
    if let Some(rows) = &dataset.row_ids {
        let more = dataset.has_more.unwrap_or_default().then(|| Tree::new("…"));
        tree = tree.with(rows.iter().map(of_row)).with(more);
    }
    tree
}

fn of_row(row: &RowFacts) -> Tree {
    Tree::new(format!("row {}  {}", row.id, row.kind)).with([
        Tree::new(format!("raters {}", ids(&row.raters))),
        Tree::new(format!("judgements {}", ids(&row.feedback))),
        Tree::new(format!("answers {}", ids(&row.answers))),
    ])
}

fn of_offspring(made: &Offspring) -> Tree {
    let tainted = if made.tainted { ", a person behind it was erased" } else { "" };
    Tree::new(format!("adapter {}  {}{tainted}  {}", made.id, made.state, answers(made.answers)))
        .with(made.continued.iter().map(of_offspring))
}

fn of_use(one: &Use) -> Tree {
    of_dataset(&one.dataset).with(one.adapters.iter().map(of_offspring))
}

fn used(uses: &[Use]) -> Option<Tree> {
    (!uses.is_empty()).then(|| Tree::new("learnt from in").with(uses.iter().map(of_use)))
}

fn of_total(total: Total) -> String {
    let Total { datasets, adapters, answers } = total;
    format!("{datasets} datasets, {adapters} adapters, {answers} answers")
}

fn answers(answers: Answers) -> String {
    match (answers.first, answers.last) {
        (Some(first), Some(last)) => format!("{} answers from {} to {}", answers.count, at(first), at(last)),
        _ => "no answers".to_owned(),
    }
}

fn ids(ids: &[String]) -> String {
    match ids.len() {
        0 => "none".to_owned(),
        count if count > MOST_IDS => format!("{} and {} more", ids[..MOST_IDS].join(", "), count - MOST_IDS),
        _ => ids.join(", "),
    }
}

fn at(seconds: i64) -> String {
    date(seconds.saturating_mul(1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_are_drawn_and_a_name_does_not_break_a_line() {
        let tree = Tree::new("a")
            .with([Tree::new("b\nc").with([Tree::new("d"), Tree::new("e")]), Tree::new("f").with([Tree::new("g")])]);
        assert_eq!(tree.to_string(), "a\n├─ b\u{FFFD}c\n│  ├─ d\n│  └─ e\n└─ f\n   └─ g\n");
    }

    #[test]
    fn many_ids_are_cut_and_counted() {
        let many: Vec<String> = (0..14).map(|i| i.to_string()).collect();
        assert!(ids(&many).ends_with("10, 11 and 2 more"));
        assert_eq!((ids(&many[..2]).as_str(), ids(&[]).as_str()), ("0, 1", "none"));
    }
}
