//! Labels without a meaning: the control that every measure of preferences has to fail.

use super::{Example, Row};
use crate::random::Random;

/// Turns the labels of a random half of the judged rows around: the chosen answer becomes the rejected one, a good answer a bad one.
/// Half and not each by a coin: then the labels say exactly nothing, and a model that always prefers the same kind of answer is right in
/// half of the rows. Answers to imitate have no label and stay.
pub fn shuffle_labels(rows: &mut [Row], seed: u64) {
    let judged: Vec<usize> = (0..rows.len()).filter(|at| !matches!(rows[*at].example, Example::Demonstration { .. })).collect();
    for place in Random::new(seed).sample(judged.len(), judged.len() / 2) {
        let row = &mut rows[judged[place]];
        match &mut row.example {
            Example::Preference { chosen, rejected, .. } => std::mem::swap(chosen, rejected),
            Example::Unpaired { label, .. } => *label = !*label,
            Example::Demonstration { .. } => {}
        }
        // Another example has another id.
        *row = Row::new(row.example.clone(), row.origin.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Message, Origin};

    #[test]
    fn exactly_half_of_the_labels_are_turned_around_and_the_same_ones_each_time() {
        let row = |index: usize| {
            let (prompt, good, bad) =
                (vec![], vec![Message::assistant(&format!("good {index}"))], vec![Message::assistant("bad")]);
            Row::new(
                match index % 3 {
                    0 => Example::Unpaired { prompt, completion: good, label: true },
                    1 => Example::Preference { prompt, chosen: good, rejected: bad },
                    _ => Example::Demonstration { prompt, completion: good },
                },
                Origin::default(),
            )
        };
        let rows: Vec<Row> = (0..60).map(row).collect();
        let mut shuffled = rows.clone();
        shuffle_labels(&mut shuffled, 3);
        let turned: Vec<usize> = (0..60).filter(|at| shuffled[*at] != rows[*at]).collect();
        assert_eq!(turned.len(), 20, "half of the forty that are judged");
        for at in turned {
            assert_ne!(shuffled[at].id, rows[at].id);
            match &shuffled[at].example {
                Example::Unpaired { label, .. } => assert!(!label),
                Example::Preference { chosen, rejected, .. } => {
                    assert_eq!(
                        (chosen[0].content.as_str(), rejected[0].content.as_str()),
                        ("bad", format!("good {at}").as_str())
                    );
                }
                Example::Demonstration { .. } => panic!("an answer to imitate has no label"),
            }
        }
        let mut again = rows.clone();
        shuffle_labels(&mut again, 3);
        assert_eq!(again, shuffled);
        shuffle_labels(&mut again, 4);
        assert_ne!(again, shuffled);
        shuffle_labels(&mut [], 0);
    }
}
