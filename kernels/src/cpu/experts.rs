//! A mixture of experts: which rows go to which expert, and the products of each expert's rows with its weights.
//!
//! Routing happens inside a step, so the step is planned for the most experts that can have rows; tasks of those that have none end at
//! once. An expert's rows are converted side by side, each expert's from a whole block of rows on, so that they are multiplied as a batch
//! of their own would be: its weights are read once, by the path that suits the number of its rows, and a row's result depends on no other.

use std::ops::Range;

use super::execute::Holdings;
use super::holdings::{Buffer, FORMS, form_index};
use super::math::exp;
use crate::activations::{Activations, ROW_BLOCK};
use crate::aligned::AlignedBuf;
use crate::error::KernelError;
use crate::ops::{RoutingShape, Rows};
use crate::packed::PackedMatrix;

/// One matrix of each expert, all of one shape.
pub(super) struct ExpertSet {
    matrices: Vec<PackedMatrix>,
    /// Forms of rows (one bit each) that they multiply with: packing may have chosen different ones.
    kinds: u32,
}

impl ExpertSet {
    pub fn new(matrices: Vec<PackedMatrix>) -> Self {
        let kinds = matrices.iter().fold(0, |bits, m| bits | 1 << form_index(m.activation_kind()));
        ExpertSet { matrices, kinds }
    }

    pub fn matrices(&self) -> impl Iterator<Item = &PackedMatrix> {
        self.matrices.iter()
    }

    pub fn kinds(&self) -> u32 {
        self.kinds
    }

    /// Parts that each expert's output features are divided into.
    pub fn parts(&self) -> usize {
        self.matrices.first().map_or(0, PackedMatrix::parts)
    }
}

/// The rows of a buffer as experts read them.
struct Input {
    x: u32,
    converted: [Option<Activations>; FORMS.len()],
}

/// A step's routing. Everything is reserved for the largest step; `choose` and `align` fill it.
pub(super) struct RoutingTables {
    shape: RoutingShape,
    /// `[tokens, each]` experts, likeliest first, and their weights.
    chosen: AlignedBuf<u32>,
    weights: AlignedBuf<f32>,
    /// `[tokens, each]` routed row of each choice, and the other way round.
    places: AlignedBuf<u32>,
    entries: AlignedBuf<u32>,
    /// `[experts + 1]` first routed row of each expert.
    offsets: AlignedBuf<u32>,
    /// `[experts]` where its converted rows begin.
    starts: AlignedBuf<u32>,
    /// How many experts have rows, then which.
    active: AlignedBuf<u32>,
    max_tokens: usize,
    inputs: Vec<Input>,
}

impl RoutingTables {
    pub fn new(shape: RoutingShape, max_tokens: usize) -> Result<Self, KernelError> {
        const WHAT: &str = "routing";
        let entries = max_tokens.checked_mul(shape.each).ok_or(KernelError::Memory { what: WHAT, bytes: usize::MAX })?;
        let list = |len: usize| AlignedBuf::<u32>::zeroed(len, WHAT);
        Ok(RoutingTables {
            shape,
            chosen: list(entries)?,
            weights: AlignedBuf::zeroed(entries, WHAT)?,
            places: list(entries)?,
            entries: list(entries)?,
            offsets: list(shape.experts + 1)?,
            starts: list(shape.experts)?,
            active: list(shape.experts + 1)?,
            max_tokens,
            inputs: Vec::new(),
        })
    }

    pub fn shape(&self) -> RoutingShape {
        self.shape
    }

    pub fn bytes(&self) -> usize {
        let lists = [&self.chosen, &self.places, &self.entries, &self.offsets, &self.starts, &self.active];
        let converted = self.inputs.iter().flat_map(|input| input.converted.iter().flatten());
        let lists = lists.into_iter().map(AlignedBuf::bytes).sum::<usize>() + self.weights.bytes();
        lists + converted.map(Activations::bytes).sum::<usize>()
    }

    /// Experts that can have rows when there are `rows` in all.
    pub fn most_active(&self, rows: usize) -> usize {
        self.shape.experts.min(rows)
    }

    /// Sees to it that there is room for the rows of buffer `x` in the forms that `kinds` says.
    pub fn prepare(&mut self, x: u32, width: usize, kinds: u32) -> Result<(), KernelError> {
        let rows = self.max_tokens * self.shape.each;
        // Each expert's rows begin with a block.
        let capacity = rows + self.most_active(rows) * (ROW_BLOCK - 1);
        let index = self.inputs.iter().position(|input| input.x == x).unwrap_or_else(|| {
            self.inputs.push(Input { x, converted: [const { None }; FORMS.len()] });
            self.inputs.len() - 1
        });
        for (form, converted) in self.inputs[index].converted.iter_mut().enumerate() {
            if kinds & 1 << form != 0 && converted.is_none() {
                *converted = Some(Activations::new(capacity, width)?);
            }
        }
        Ok(())
    }

    /// Chooses the experts of a token by its logits, `[experts]`.
    ///
    /// # Safety
    /// The token is one of the step's, and nobody else touches its choices meanwhile.
    pub unsafe fn choose(&self, token: usize, logits: &[f32], normalised: bool) {
        let each = self.shape.each;
        // SAFETY: `each` places for each token of the largest step, which are this call's.
        let (chosen, weights) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.chosen.as_shared_ptr().add(token * each), each),
                std::slice::from_raw_parts_mut(self.weights.as_shared_ptr().add(token * each), each),
            )
        };
        // Magnitudes compared as integers, by which a NaN is as good as any number.
        let key = |expert: usize| {
            let bits = logits[expert].to_bits().cast_signed();
            (bits ^ ((bits >> 31).cast_unsigned() >> 1).cast_signed(), std::cmp::Reverse(expert))
        };
        let mut last = None;
        for (expert, weight) in chosen.iter_mut().zip(weights.iter_mut()) {
            let best = (0..logits.len()).map(key).filter(|k| last.is_none_or(|last| *k < last)).max();
            last = best;
            *expert = best.map_or(0, |(_, std::cmp::Reverse(expert))| expert as u32);
            *weight = logits[*expert as usize];
        }
        let largest = weights[0];
        let all = if normalised { 0.0 } else { logits.iter().map(|&logit| exp(logit - largest)).sum::<f32>() };
        weights.iter_mut().for_each(|weight| *weight = exp(*weight - largest));
        let sum = if normalised { weights.iter().sum::<f32>() } else { all };
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }

    /// Sorts the choices of `tokens` tokens by expert.
    ///
    /// # Safety
    /// All were chosen, and nobody else touches the tables meanwhile.
    pub unsafe fn align(&self, tokens: usize) {
        let RoutingShape { experts, each } = self.shape;
        // SAFETY: the lists have these lengths; they are this call's alone.
        let (chosen, places, entries, offsets, starts, active) = unsafe {
            let list = |list: &AlignedBuf<u32>, len| std::slice::from_raw_parts_mut(list.as_shared_ptr(), len);
            let rows = tokens * each;
            (
                &*list(&self.chosen, rows),
                list(&self.places, rows),
                list(&self.entries, rows),
                list(&self.offsets, experts + 1),
                list(&self.starts, experts),
                list(&self.active, experts + 1),
            )
        };
        offsets.fill(0);
        for &expert in chosen {
            offsets[expert as usize + 1] += 1;
        }
        let (mut start, mut count) = (0, 0);
        for expert in 0..experts {
            let rows = offsets[expert + 1];
            offsets[expert + 1] += offsets[expert];
            starts[expert] = start;
            if rows > 0 {
                count += 1;
                active[count] = expert as u32;
            }
            start += rows.next_multiple_of(ROW_BLOCK as u32);
        }
        active[0] = count as u32;
        // Offsets serve as the next free row of each expert, and are moved back behind.
        for (entry, &expert) in chosen.iter().enumerate() {
            let next = &mut offsets[expert as usize];
            places[entry] = *next;
            entries[*next as usize] = entry as u32;
            *next += 1;
        }
        offsets.copy_within(..experts, 1);
        offsets[0] = 0;
    }

    /// The routed rows of a token, with the weights of their experts, likeliest first.
    pub fn rows_of(&self, token: usize) -> impl Iterator<Item = (usize, f32)> {
        let each = token * self.shape.each..(token + 1) * self.shape.each;
        self.places[each.clone()].iter().map(|&row| row as usize).zip(self.weights[each].iter().copied())
    }

    /// Expert of a routed row, and its token.
    fn of(&self, row: usize) -> (usize, usize) {
        let entry = self.entries[row] as usize;
        (self.chosen[entry] as usize, entry / self.shape.each)
    }

    /// First routed row of an expert, and how many it has.
    fn rows(&self, expert: usize) -> (usize, usize) {
        let (first, end) = (self.offsets[expert] as usize, self.offsets[expert + 1] as usize);
        (first, end - first)
    }

    fn input(&self, x: u32, form: usize) -> Option<&Activations> {
        self.inputs.iter().find(|input| input.x == x)?.converted[form].as_ref()
    }
}

impl Holdings {
    /// Converts routed rows of `x` to what their experts multiply with.
    ///
    /// # Safety
    /// As [`Holdings::run`], for these rows.
    pub unsafe fn convert_routed(&self, rows: Range<usize>, x: u32, routing: u32, experts: u32) {
        let (tables, buffer) = (&self.routings[routing as usize], &self.buffers[x as usize]);
        for row in rows {
            let (expert, token) = tables.of(row);
            let kind = self.experts[experts as usize].matrices[expert].activation_kind();
            let Some(target) = tables.input(x, form_index(kind)) else { continue };
            let to = tables.starts[expert] as usize + row - tables.rows(expert).0;
            let from = if buffer.rows == Rows::Tokens { token } else { row };
            // SAFETY: rows have places of their own, up to the capacity that `prepare` gave; an earlier entry wrote what is read.
            unsafe { target.set_row(self.isa, kind, to, buffer.row(from)) };
        }
    }

    /// Multiplies the rows of experts with parts of their weights: task `t` is about part `t % parts` of the expert that is the
    /// `t / parts`th to have rows.
    ///
    /// # Safety
    /// As [`Holdings::run`], for these tasks.
    pub unsafe fn expert_linear(&self, tasks: Range<usize>, x: u32, routing: u32, experts: u32, out: u32, thread: usize) {
        let (tables, set) = (&self.routings[routing as usize], &self.experts[experts as usize]);
        let out: &Buffer = &self.buffers[out as usize];
        let parts = set.parts();
        // SAFETY: this thread's.
        let scratch = unsafe { self.tile_scratch.get_mut(thread) };
        let (active, list) = tables.active.split_at(1);
        for task in tasks {
            let Some(&expert) = list[..active[0] as usize].get(task / parts) else { return };
            let matrix = &set.matrices[expert as usize];
            let kind = matrix.activation_kind();
            let (first, rows) = tables.rows(expert as usize);
            let Some(input) = tables.input(x, form_index(kind)) else { continue };
            let input = input.rows_from(self.isa, kind, tables.starts[expert as usize] as usize, matrix.k());
            // The part's weights meet one block of the expert's rows after the other.
            for item in (task % parts..matrix.items(rows)).step_by(parts) {
                // SAFETY: the expert's rows were converted, and are within the output; parts are given to one task each.
                unsafe {
                    let to = out.start().add(first * out.stride);
                    matrix.run_item_of(self.isa, item, input, rows, to, out.stride, None, false, scratch);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    #[test]
    fn every_choice_has_a_row_among_those_of_its_expert() {
        for (experts, each, tokens) in [(1, 1, 1), (4, 2, 9), (60, 4, 33), (8, 8, 5), (5, 3, 0)] {
            let tables = RoutingTables::new(RoutingShape { experts, each }, 40).unwrap();
            for token in 0..tokens {
                let logit = |i: u64| (uniform(token as u64, i) * 3.0) as f32 - if i == 2 { 9.0 } else { 0.0 };
                let mut logits: Vec<f32> = (0..experts as u64).map(logit).collect();
                if token == 3 {
                    logits.fill(f32::NAN);
                }
                // SAFETY: one thread.
                unsafe { tables.choose(token, &logits, true) };
                let mut chosen = tables.chosen[token * each..(token + 1) * each].to_vec();
                if token == 3 {
                    assert!(chosen.iter().zip(0..).all(|(&expert, i)| expert == i), "a NaN is as good as another");
                } else {
                    assert!(chosen.windows(2).all(|pair| logits[pair[0] as usize] >= logits[pair[1] as usize]));
                    assert!((tables.weights[token * each..][..each].iter().sum::<f32>() - 1.0).abs() < 1e-5);
                }
                chosen.sort_unstable();
                chosen.dedup();
                assert_eq!(chosen.len(), each);
            }
            // SAFETY: one thread.
            unsafe { tables.align(tokens) };
            let mut next = 0;
            for expert in 0..experts {
                let (first, rows) = tables.rows(expert);
                assert_eq!(first, next);
                next += rows;
                let entries = &tables.entries[first..next];
                assert!(entries.is_sorted() && entries.iter().all(|&entry| tables.chosen[entry as usize] == expert as u32));
                assert!((tables.starts[expert] as usize).is_multiple_of(ROW_BLOCK));
            }
            assert_eq!(next, tokens * each);
            assert!((0..next).all(|row| tables.places[tables.entries[row] as usize] as usize == row));
            let (active, list) = tables.active.split_at(1);
            let with_rows: Vec<u32> = (0..experts as u32).filter(|&expert| tables.rows(expert as usize).1 > 0).collect();
            assert_eq!(list[..active[0] as usize], with_rows);
        }
    }
}
