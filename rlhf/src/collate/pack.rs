//! Samples side by side in one forward pass, without padding.

use std::ops::Range;

use super::sample::{Completion, Sample};
use crate::batch::{Label, Packed};

/// A prompt with the completions that go on from it.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// Which sample of the caller's it is.
    pub sample: usize,
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Completions.
    pub completions: &'a [Completion],
}

impl<'a> Item<'a> {
    /// A sample as it is.
    pub fn of(index: usize, sample: &'a Sample) -> Self {
        Self { sample: index, prompt: &sample.prompt, completions: &sample.completions }
    }

    /// Rows that it takes.
    pub fn rows(&self, layout: Layout) -> usize {
        let completions = self.completions.iter().map(|completion| completion.tokens.len()).sum::<usize>();
        let prompts = if layout.share_prompt { 1 } else { self.completions.len() };
        prompts * self.prompt.len() + completions
    }
}

/// How samples are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Compute a prompt once for all its completions. Off only to measure what it is worth.
    pub share_prompt: bool,
    /// Keep the row of each completion's last token, which predicts nothing but has a hidden state to judge by.
    pub last_row: bool,
}

/// The labels of one completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// [`Item::sample`].
    pub sample: usize,
    /// Which of the item's completions.
    pub completion: usize,
    /// Its labels in the batch.
    pub labels: Range<usize>,
    /// The row of its last token; with [`Layout::last_row`] only.
    pub last_row: u32,
}

/// A packed batch, and whose labels are whose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Micro {
    /// What the model computes.
    pub batch: Packed,
    /// One per completion, in the order of the items; together they are all labels in order.
    pub spans: Vec<Span>,
}

impl Micro {
    /// The span that each label belongs to, `[labels]`.
    pub fn owners(&self) -> Vec<u32> {
        let owner = |(index, span): (usize, &Span)| std::iter::repeat_n(index as u32, span.labels.len());
        self.spans.iter().enumerate().flat_map(owner).collect()
    }
}

/// Lays items side by side.
pub fn pack<'a>(items: impl IntoIterator<Item = Item<'a>>, layout: Layout) -> Micro {
    let mut micro = Micro::default();
    for item in items {
        let shared = (layout.share_prompt && item.completions.len() > 1 && !item.prompt.is_empty())
            .then(|| micro.batch.push(item.prompt, None));
        for (index, completion) in item.completions.iter().enumerate() {
            place(&mut micro, &item, index, completion, shared, layout);
        }
    }
    micro
}

fn place(micro: &mut Micro, item: &Item<'_>, index: usize, completion: &Completion, shared: Option<usize>, layout: Layout) {
    let Micro { batch, spans } = micro;
    let tokens = &completion.tokens;
    let rows = if layout.last_row { tokens.len() } else { tokens.len().saturating_sub(1) };
    // The row that predicts the first token; none where there is no prompt.
    let (before, first) = match shared {
        Some(prefix) => {
            let segment = batch.segments[prefix];
            let first = batch.rows();
            if rows > 0 {
                batch.push(&tokens[..rows], Some(prefix));
            }
            (Some(segment.first + segment.len - 1), first)
        }
        None => {
            let start = batch.rows();
            let joined: Vec<u32> = item.prompt.iter().chain(&tokens[..rows]).copied().collect();
            if !joined.is_empty() {
                batch.push(&joined, None);
            }
            let first = start + item.prompt.len();
            (first.checked_sub(1).filter(|_| !item.prompt.is_empty()), first)
        }
    };
    let begin = batch.labels.len();
    for (place, token) in tokens.iter().enumerate().filter(|(place, _)| completion.learns(*place)) {
        let row = if place == 0 { before } else { Some(first + place - 1) };
        batch.labels.extend(row.map(|row| Label { row: row as u32, token: *token }));
    }
    let last_row = (first + rows).saturating_sub(1) as u32;
    spans.push(Span { sample: item.sample, completion: index, labels: begin..batch.labels.len(), last_row });
}

/// Groups items of these sizes into batches of at most `budget` rows: longest first, each into the first batch that has room. One
/// that is larger than the budget stands alone. Returns indices, longest batches' longest items first.
pub fn batches(sizes: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|index| (std::cmp::Reverse(sizes[*index]), *index));
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
    for index in order {
        match batches.iter_mut().find(|(used, _)| used + sizes[index] <= budget) {
            Some((used, members)) => {
                *used += sizes[index];
                members.push(index);
            }
            None => batches.push((sizes[index], vec![index])),
        }
    }
    batches.into_iter().map(|(_, members)| members).collect()
}
