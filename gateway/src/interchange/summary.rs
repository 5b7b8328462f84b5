//! What an import did.

use serde::Serialize;
use tidemill_store::label::Applied;

/// Refusals that are listed; the rest is only counted.
const MOST_LISTED: usize = 100;

/// Something in a file that could not be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// Where: `task 17, annotation 33`.
    pub place: String,
    /// Why, and what to do.
    pub message: String,
}

impl Refusal {
    /// At `place`, because of `message`.
    pub fn new(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { place: place.into(), message: message.into() }
    }
}

/// Counts over the judgements of one import.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// New feedback.
    pub recorded: u64,
    /// Feedback that says something else now.
    pub edited: u64,
    /// Feedback that was taken back.
    pub withdrawn: u64,
    /// Tasks that a rater passed over.
    pub skipped: u64,
    /// Right verdicts of gold tasks.
    pub gold: u64,
    /// Known already, or older than what is known.
    pub unchanged: u64,
    /// Entries that say nothing yet, such as drafts.
    pub silent: u64,
    /// What could not be taken.
    pub refused: u64,
    /// The first hundred of them.
    pub refusals: Vec<Refusal>,
}

impl Summary {
    /// Counts what became of one judgement.
    pub fn count(&mut self, applied: Applied) {
        let counter = match applied {
            Applied::Recorded => &mut self.recorded,
            Applied::Edited => &mut self.edited,
            Applied::Withdrawn => &mut self.withdrawn,
            Applied::Skipped => &mut self.skipped,
            Applied::Gold => &mut self.gold,
            Applied::Unchanged => &mut self.unchanged,
        };
        *counter += 1;
    }

    /// Counts what could not be taken.
    pub fn refuse(&mut self, refusal: Refusal) {
        self.refused += 1;
        if self.refusals.len() < MOST_LISTED {
            self.refusals.push(refusal);
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} recorded, {} edited, {} withdrawn, {} skipped, {} gold, {} unchanged, {} silent, {} refused",
            self.recorded, self.edited, self.withdrawn, self.skipped, self.gold, self.unchanged, self.silent, self.refused
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_refusals_are_counted_and_a_hundred_listed() {
        let mut summary = Summary::default();
        for n in 0..1000 {
            summary.refuse(Refusal::new(format!("task {n}"), "no"));
        }
        summary.count(Applied::Edited);
        assert_eq!((summary.refused, summary.refusals.len(), summary.edited), (1000, MOST_LISTED, 1));
        assert_eq!(summary.refusals[99].place, "task 99");
    }
}
