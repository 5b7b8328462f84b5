//! Which experts a token goes to, and the order of the routed rows.

use crate::ops::RoutingShape;

/// A step's choices.
pub(super) struct Choices {
    pub shape: RoutingShape,
    /// `[tokens, each]` experts, likeliest first, with their weights.
    pub chosen: Vec<(u32, f32)>,
    /// Entry of `chosen` that each routed row is for.
    pub rows: Vec<usize>,
}

impl Choices {
    pub fn new(shape: RoutingShape) -> Self {
        Choices { shape, chosen: Vec::new(), rows: Vec::new() }
    }

    /// Forgets the step before, takes the tokens' logits in and sorts.
    pub fn fill<'a>(&mut self, logits: impl Iterator<Item = &'a [f32]>, normalised: bool) {
        self.chosen.clear();
        for row in logits {
            self.chosen.extend(likeliest(row, self.shape.each, normalised));
        }
        self.rows.clear();
        self.rows.extend(0..self.chosen.len());
        // Stable: rows of one expert stay in the order of their tokens.
        self.rows.sort_by_key(|&entry| self.chosen[entry].0);
    }

    /// Expert and token of a routed row.
    pub fn of(&self, row: usize) -> (usize, usize) {
        let entry = self.rows[row];
        (self.chosen[entry].0 as usize, entry / self.shape.each)
    }
}

/// The `each` largest of a row, with their weights: softmax over all, or over them when `normalised`.
fn likeliest(logits: &[f32], each: usize, normalised: bool) -> Vec<(u32, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let power = |&i: &usize| (f64::from(logits[i]) - f64::from(logits[order[0]])).exp();
    let sum: f64 = if normalised { order[..each].iter().map(power).sum() } else { order.iter().map(power).sum() };
    order[..each].iter().map(|i| (*i as u32, (power(i) / sum) as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_chosen_and_rows_sorted_by_expert() {
        let logits: [&[f32]; 3] = [&[0.0, 2.0, 1.0, 2.0], &[5.0, 0.0, 0.0, 4.0], &[0.0; 4]];
        let mut choices = Choices::new(RoutingShape { experts: 4, each: 2 });
        choices.fill(logits.into_iter(), true);
        let experts: Vec<u32> = choices.chosen.iter().map(|c| c.0).collect();
        assert_eq!(experts, [1, 3, 0, 3, 0, 1]);
        assert_eq!(choices.rows, [2, 4, 0, 5, 1, 3]);
        assert_eq!(choices.of(3), (1, 2));
        assert!(choices.chosen.chunks(2).all(|pair| (pair[0].1 + pair[1].1 - 1.0).abs() < 1e-6));
        choices.fill(logits.into_iter(), false);
        let (two, all) = (2f32.exp(), 2.0 * 2f32.exp() + 1f32.exp() + 1.0);
        assert!((choices.chosen[0].1 - two / all).abs() < 1e-6 && (choices.chosen[4].1 - 0.25).abs() < 1e-6);
    }
}
