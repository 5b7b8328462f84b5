//! The rows as the checks read them, and what the checks find in them.

use super::{
    report::{Check, EXAMPLES, Keep, Reason, RowVerdict, Status},
    split,
    words::{pairs, spoken, words},
};
use crate::{
    dataset::{Example, Row, row::text},
    quality::Limit,
    statistics::Proportion,
};

/// Rows with their texts and words, made once.
pub(super) struct Corpus<'a> {
    /// The rows.
    pub rows: &'a [Row],
    /// Each row's prompt without the system's messages.
    pub prompts: Vec<Text>,
    /// Each row's answers: chosen and rejected, or the one.
    pub answers: Vec<Vec<Text>>,
    /// Word pairs of the prompts.
    pub prompt_pairs: Vec<Vec<u32>>,
    /// The cluster of each prompt, named by its first row.
    pub clusters: Vec<usize>,
}

/// A text and its words.
pub(super) struct Text {
    /// As written.
    pub text: String,
    /// As numbers.
    pub words: Vec<u32>,
}

impl Text {
    fn new(text: String) -> Self {
        let words = words(&text);
        Self { text, words }
    }
}

impl<'a> Corpus<'a> {
    /// Reads all rows.
    pub fn new(rows: &'a [Row], cluster_similarity: f64) -> Self {
        let prompts: Vec<Text> = rows.iter().map(|row| Text::new(spoken(row.example.prompt()))).collect();
        let answers =
            rows.iter().map(|row| row.example.answers().into_iter().map(|answer| Text::new(text(answer))).collect()).collect();
        let prompt_pairs: Vec<Vec<u32>> = prompts.iter().map(|prompt| pairs(&prompt.words)).collect();
        let clusters = split::cluster_sets(&prompt_pairs, cluster_similarity);
        Self { rows, prompts, answers, prompt_pairs, clusters }
    }

    /// The chosen and the rejected answer of the rows that have them, with the row's index.
    pub fn comparisons(&self) -> impl Iterator<Item = (usize, &Text, &Text)> {
        self.answers.iter().enumerate().filter_map(|(index, answers)| match answers.as_slice() {
            [chosen, rejected] => Some((index, chosen, rejected)),
            _ => None,
        })
    }

    /// The answer that a row teaches to give; none for an answer that was judged bad.
    pub fn taught(&self, index: usize) -> Option<&Text> {
        match self.rows[index].example {
            Example::Unpaired { label: false, .. } => None,
            _ => self.answers[index].first(),
        }
    }
}

/// What was found, row by row.
pub(super) struct Findings {
    rows: Vec<RowVerdict>,
}

impl Findings {
    /// Every row is kept until something is found.
    pub fn new(rows: &[Row]) -> Self {
        let keep = |row: &Row| RowVerdict { id: row.id.clone(), verdict: Keep::Keep, reasons: Vec::new() };
        Self { rows: rows.iter().map(keep).collect() }
    }

    /// Something that a check found in a row. The detail must not repeat personal data.
    pub fn add(&mut self, row: usize, check: &str, verdict: Keep, detail: impl Into<String>) {
        let found = &mut self.rows[row];
        found.verdict = found.verdict.max(verdict);
        found.reasons.push(Reason { check: check.to_owned(), detail: detail.into() });
    }

    /// What is to be done with a row, by what was found so far.
    pub fn verdict(&self, row: usize) -> Keep {
        self.rows[row].verdict
    }

    /// The rows in which a check found something.
    pub fn of(&self, check: &str) -> Vec<usize> {
        let has = |row: &RowVerdict| row.reasons.iter().any(|reason| reason.check == check);
        self.rows.iter().enumerate().filter(|(_, row)| has(row)).map(|(index, _)| index).collect()
    }

    /// The check over the share of the rows, of those it looked at, in which it found something. The share decides whether it warns,
    /// the lower end of its interval whether it fails.
    pub fn share(&self, name: &str, looked_at: usize, limit: Limit, explanation: impl FnOnce(&str) -> String) -> Check {
        let found = self.of(name);
        let Some(share) = Proportion::new(found.len() as u64, looked_at.max(found.len()) as u64) else {
            return Check::not_applicable(name, "No row has what this check looks at.");
        };
        let text =
            if found.is_empty() { format!("Nothing found in {looked_at} rows.") } else { explanation(&count(found.len())) };
        let mut check = Check::held(name, share.share, share.share, limit, text).within(Some(share.interval));
        // One row of five is a reason to look, and no proof that a twentieth of what the source gives is like it.
        if check.status == Status::Fail && limit.status(share.interval.low) != Status::Fail {
            check.status = Status::Warn;
        }
        check.examples = self.ids(&found);
        check
    }

    /// The ids of the first few rows.
    pub fn ids(&self, rows: &[usize]) -> Vec<String> {
        rows.iter().take(EXAMPLES).map(|index| self.rows[*index].id.clone()).collect()
    }

    /// The verdicts, in the order of the rows.
    pub fn into_rows(self) -> Vec<RowVerdict> {
        self.rows
    }
}

/// A number of rows in words.
pub(super) fn count(rows: usize) -> String {
    if rows == 1 { "1 row".to_owned() } else { format!("{rows} rows") }
}
