//! Rows to train and to evaluate on, from where the specification says.

use std::collections::BTreeSet;
use std::path::Path;

use super::{JobError, Spec};
use crate::dataset::control::shuffle_labels;
use crate::dataset::import::{BadLines, Input};
use crate::dataset::{Datasets, Example, Message, Origin, Row, StoredRow};
use crate::quality::{Keep, Split, by_prompt_cluster};
use crate::train::{Question, questions, read_questions};

/// The rows of a training.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// To learn.
    pub train: Vec<Row>,
    /// To evaluate on.
    pub held_out: Vec<Row>,
    /// What methods that sample ask: the rows' prompts, or those of a file of prompts.
    pub questions: Vec<Question>,
    /// What they are evaluated on.
    pub held_out_questions: Vec<Question>,
    /// Left out because the quality report drops them.
    pub dropped: usize,
    /// `NAME@VERSION` of the snapshot, or the name of the file.
    pub source: String,
    /// The snapshot's hash over its rows.
    pub content_hash: Option<String>,
}

impl Rows {
    /// Reads them. `datasets` is where snapshots are; files need none.
    pub async fn read(spec: &Spec, datasets: Option<&Datasets>) -> Result<Self, JobError> {
        let mut rows = Self::default();
        if let (true, Some(path)) = (spec.config.method.samples(), &spec.train_file) {
            rows.ask(path, spec)?;
            return Ok(rows);
        }
        match (&spec.dataset, &spec.train_file) {
            (Some(name), _) => {
                let fix = || "needs the store that keeps it; use a train_file without one".to_owned();
                let datasets = datasets.ok_or_else(|| JobError::Spec { field: "dataset", fix: fix() })?;
                rows.snapshot(name, spec.despite_report, datasets).await?;
            }
            (None, Some(path)) => {
                rows.source = Input::at(&path.to_string_lossy(), None)?.name();
                let found = file(path).await?;
                rows.add(found);
            }
            (None, None) => spec.check()?,
        }
        if let Some(path) = &spec.held_out_file {
            // Whatever part a line says that it belongs to: this file is for evaluation.
            if spec.config.method.samples() {
                rows.held_out_questions = read_questions(path)?;
            } else {
                let found = file(path).await?;
                rows.held_out.extend(found.into_iter().map(|stored| stored.row));
            }
        }
        if spec.held_out_share > 0.0 && rows.held_out.is_empty() {
            let parts = by_prompt_cluster(&rows.train, spec.held_out_share, spec.config.seed);
            let (held_out, train): (Vec<_>, Vec<_>) =
                rows.train.drain(..).zip(parts).partition(|(_, part)| *part == Split::HeldOut);
            rows.train = train.into_iter().map(|(row, _)| row).collect();
            rows.held_out = held_out.into_iter().map(|(row, _)| row).collect();
        }
        if spec.shuffled_labels {
            shuffle_labels(&mut rows.train, spec.config.seed);
            shuffle_labels(&mut rows.held_out, spec.config.seed);
        }
        if spec.config.method.samples() {
            rows.questions = questions(&rows.train);
            rows.held_out_questions.extend(questions(&rows.held_out));
        }
        Ok(rows)
    }

    /// The prompts of a file.
    fn ask(&mut self, path: &Path, spec: &Spec) -> Result<(), JobError> {
        self.source = Input::at(&path.to_string_lossy(), None)?.name();
        self.questions = read_questions(path)?;
        if let Some(path) = &spec.held_out_file {
            self.held_out_questions = read_questions(path)?;
        }
        if spec.held_out_share > 0.0 {
            // Alike prompts are told by their text, and a prompt alone is a row without an answer.
            let row = |question: &Question| {
                let (prompt, completion) = (question.messages.clone(), vec![Message::assistant("")]);
                Row::new(Example::Demonstration { prompt, completion }, Origin::default())
            };
            let rows: Vec<Row> = self.questions.iter().map(row).collect();
            let parts = by_prompt_cluster(&rows, spec.held_out_share, spec.config.seed);
            let (held_out, train): (Vec<_>, Vec<_>) =
                self.questions.drain(..).zip(parts).partition(|(_, part)| *part == Split::HeldOut);
            self.questions = train.into_iter().map(|(question, _)| question).collect();
            self.held_out_questions = held_out.into_iter().map(|(question, _)| question).collect();
        }
        Ok(())
    }

    /// All rows of a file that nobody trained on, and its name.
    pub async fn unseen(path: &Path) -> Result<(Vec<Row>, String), JobError> {
        let found = file(path).await?;
        let name = Input::at(&path.to_string_lossy(), None)?.name();
        Ok((found.into_iter().map(|stored| stored.row).collect(), name))
    }

    /// The held-out rows of a snapshot, and its name.
    pub async fn held_out_of(dataset: &str, datasets: &Datasets) -> Result<(Vec<Row>, String), JobError> {
        let mut rows = Self::default();
        // What fails the report is not learnt, but may be measured on.
        rows.snapshot(dataset, true, datasets).await?;
        Ok((rows.held_out, rows.source))
    }

    /// Everyone who judged a row that is learnt.
    pub fn raters(&self) -> BTreeSet<&str> {
        self.train.iter().flat_map(|row| &row.origin.raters).map(String::as_str).collect()
    }

    async fn snapshot(&mut self, name: &str, despite_report: bool, datasets: &Datasets) -> Result<(), JobError> {
        let snapshot = datasets.find(name).await?;
        self.source = format!("{}@{}", snapshot.name, snapshot.version);
        self.content_hash = Some(snapshot.content_hash.clone());
        if snapshot.tainted.is_some() {
            return Err(JobError::Tainted(self.source.clone()));
        }
        if snapshot.verdict == "fail" && !despite_report {
            return Err(JobError::Quality(self.source.clone()));
        }
        let mut stream = datasets.rows(&snapshot).await?;
        while let Some(found) = stream.next_rows().await? {
            self.add(found);
        }
        Ok(())
    }

    fn add(&mut self, found: Vec<StoredRow>) {
        for stored in found {
            match (stored.verdict, stored.split) {
                (Some(Keep::Drop), _) => self.dropped += 1,
                (_, Split::Train) => self.train.push(stored.row),
                (_, Split::HeldOut) => self.held_out.push(stored.row),
            }
        }
    }
}

/// All rows of a file; one bad line refuses it.
async fn file(path: &Path) -> Result<Vec<StoredRow>, JobError> {
    let place = path.to_string_lossy();
    let mut reading = Input::at(&place, None)?.open().await?;
    let (mut rows, mut bad) = (Vec::new(), BadLines::default());
    while let Some(portion) = reading.next().await? {
        for row in portion.rows {
            match row {
                Ok(row) => rows.push(row),
                Err(line) => bad.push(line),
            }
        }
    }
    if bad.count > 0 { Err(JobError::Lines { place: place.into_owned(), bad }) } else { Ok(rows) }
}
