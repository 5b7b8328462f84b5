//! What is behind a row.

use tidemill_store::records::Feedback;

use super::Origin;
use super::answer::Answer;

/// The origin of rows made of feedback, without the answers.
pub fn origin<'f>(source: &str, feedback: impl IntoIterator<Item = &'f Feedback>) -> Origin {
    let mut origin = Origin { source: source.to_owned(), ..Origin::default() };
    for feedback in feedback {
        origin.feedback.push(feedback.id.to_string());
        origin.raters.extend(feedback.author.clone());
        origin.judged_at = origin.judged_at.max(feedback.created);
    }
    origin
}

/// Adds an answer.
pub fn note(origin: &mut Origin, answer: &Answer) {
    origin.inferences.push(answer.id.clone());
    origin.users.extend(answer.user.clone());
    origin.variants.extend(answer.variant.clone());
}

/// Adds what is behind another row that teaches the same.
pub fn merge(into: &mut Origin, other: Origin) {
    into.inferences.extend(other.inferences);
    into.feedback.extend(other.feedback);
    into.raters.extend(other.raters);
    into.users.extend(other.users);
    into.variants.extend(other.variants);
    into.judged_at = into.judged_at.max(other.judged_at);
    if into.chosen_position != other.chosen_position {
        into.chosen_position = None;
    }
    tidy(into);
}

/// Sorts, and drops repeats.
pub fn tidy(origin: &mut Origin) {
    for list in [&mut origin.inferences, &mut origin.feedback, &mut origin.raters, &mut origin.users, &mut origin.variants] {
        list.sort_unstable();
        list.dedup();
    }
}
