//! What the model computes in one go: rows of several conversations side by side, without padding.

/// Consecutive rows of a packed forward pass. A row sees its own segment up to itself, and all of the segment that is its `prefix`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub first: usize,
    /// Number of rows, > 0.
    pub len: usize,
    /// Index of an earlier segment that all rows see whole: the prompt that two completions share. A prefix has no prefix itself.
    pub prefix: Option<usize>,
}

/// The log-probability of `token` given the hidden state of `row`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Row whose hidden state predicts; the label's own row is the next one, or the first of a completion whose prompt this row ends.
    pub row: u32,
    /// Token predicted.
    pub token: u32,
}

/// A batch: `tokens` and `positions` have one entry per row; `segments` cover the rows in order, without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Token ids, `[rows]`.
    pub tokens: Vec<u32>,
    /// Positions for the rotary embedding, `[rows]`; a completion goes on from the end of its prefix.
    pub positions: Vec<u32>,
    /// Which rows see which.
    pub segments: Vec<Segment>,
    /// Log-probabilities asked for, in the order in which the model returns them.
    pub labels: Vec<Label>,
}

impl Packed {
    /// Appends a segment, returns its index. Positions start at 0, or behind the prefix.
    pub fn push(&mut self, tokens: &[u32], prefix: Option<usize>) -> usize {
        let start = prefix.map_or(0, |index| self.segments[index].len) as u32;
        self.segments.push(Segment { first: self.tokens.len(), len: tokens.len(), prefix });
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(start..start + tokens.len() as u32);
        self.segments.len() - 1
    }

    /// So many rows, in texts of `longest` tokens of any kind, and labels for the first `labels` of them: to see what batches need.
    pub fn of_size(rows: usize, longest: usize, labels: usize) -> Self {
        let mut batch = Self::default();
        while batch.rows() < rows {
            batch.push(&vec![0; longest.max(1).min(rows - batch.rows())], None);
        }
        batch.labels = (0..rows.min(labels)).map(|row| Label { row: row as u32, token: 0 }).collect();
        batch
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_go_on_from_the_prompt_that_they_share() {
        let mut batch = Packed::default();
        let prompt = batch.push(&[5, 6, 7], None);
        batch.push(&[8, 9], Some(prompt));
        batch.push(&[4], Some(prompt));
        let other = batch.push(&[1, 2], None);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 3, 0, 1]);
        assert_eq!(batch.segments[2], Segment { first: 5, len: 1, prefix: Some(0) });
        assert_eq!((other, batch.rows()), (3, 8));
    }
}
