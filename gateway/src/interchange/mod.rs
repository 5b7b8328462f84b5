//! Labeling queues in other people's tools: Label Studio and Argilla.
//!
//! [`label_studio`] and [`argilla`] write our tasks as the tool takes them and read what its raters said as [`External`] judgements.
//! Everything here is a function of values; the endpoints and the command line do the reading and writing.
//!
//! Invariants: raters see a prompt and two answers, and nothing that tells which model wrote which; which answer stands first is
//! decided by the task's id ([`first_is_a`]), so that two exports agree and the position is known when the judgement comes back; what
//! cannot be understood is refused with the place and the reason, never guessed.

pub mod argilla;
mod format;
pub mod label_studio;
mod summary;
mod timestamp;
pub mod transcript;

pub use format::{Format, take};
pub use summary::{Refusal, Summary};

use tidemill_store::label::{External, Verdict, a_is_left};
use uuid::Uuid;

/// Whether a task's `answer_a` is shown first: fair over tasks, and the same whenever the task is exported.
pub fn first_is_a(task: Uuid) -> bool {
    a_is_left(task)
}

/// A judgement as raters give it: of what they see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    /// `answer1`, on the left.
    First,
    /// `answer2`, on the right.
    Second,
    /// Equally good.
    Tie,
    /// Neither is acceptable.
    BothBad,
}

impl Choice {
    /// The same judgement of the task's own answers.
    fn verdict(self, first_is_a: bool) -> Verdict {
        match (self, first_is_a) {
            (Choice::First, true) | (Choice::Second, false) => Verdict::A,
            (Choice::First, false) | (Choice::Second, true) => Verdict::B,
            (Choice::Tie, _) => Verdict::Tie,
            (Choice::BothBad, _) => Verdict::BothBad,
        }
    }
}

/// What a file or a webhook said: judgements that were understood, and what was not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// In the order of the file.
    pub judgements: Vec<External>,
    /// Entries that say nothing: drafts, and tasks of which nobody said anything.
    pub silent: u64,
    /// What could not be understood.
    pub refused: Vec<Refusal>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_becomes_the_answer_that_stood_there() {
        for (choice, first_is_a, verdict) in [
            (Choice::First, true, Verdict::A),
            (Choice::First, false, Verdict::B),
            (Choice::Second, true, Verdict::B),
            (Choice::Second, false, Verdict::A),
            (Choice::Tie, false, Verdict::Tie),
            (Choice::BothBad, false, Verdict::BothBad),
        ] {
            assert_eq!(choice.verdict(first_is_a), verdict, "{choice:?} {first_is_a}");
        }
    }

    #[test]
    fn either_answer_stands_first_half_of_the_time() {
        let first = (0..2000_u128).filter(|&n| first_is_a(Uuid::from_u128(n << 20))).count();
        // Six standard deviations of 22.4 around half.
        assert!((866..=1134).contains(&first), "{first}");
    }
}
