//! What a step will do: a list of entries, filled by the operations and walked by all threads together.
//!
//! Weights are multiplied by converted rows (8-bit, bf16), not by f32 ones. Where the operation that produces a buffer handles
//! whole rows, the conversion is noted in its entry and done while the row is in the nearest cache; otherwise it becomes an
//! entry of its own. A buffer is converted once per form, however many matrices read it.

use crate::ops::{AttentionSpec, HeadShape, QkNorm, Store};

/// One operation of a step; numbers are indices into the backend's lists.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entry {
    Embedding { table: u32, out: u32 },
    RmsNorm { x: u32, weight: u32, eps: f32, out: u32 },
    RmsNormAdd { x: u32, weight: u32, eps: f32, out: u32 },
    LayerNorm { x: u32, weight: u32, eps: f32, out: u32 },
    Clamp { x: u32, limit: f32 },
    Scale { x: u32, factor: f32 },
    SoftCap { x: u32, cap: f32 },
    SiluAndMul { gate_up: u32, out: u32 },
    GeluTanhAndMul { gate_up: u32, out: u32 },
    Gelu { x: u32, out: u32 },
    GateRows { gate: u32, x: u32 },
    Route { logits: u32, normalised: bool, routing: u32 },
    Align { routing: u32 },
    ConvertRouted { x: u32, routing: u32, experts: u32 },
    ExpertLinear { x: u32, routing: u32, experts: u32, out: u32 },
    Combine { x: u32, routing: u32, out: u32, store: Store },
    Gather { x: u32, out: u32 },
    Convert { x: u32 },
    Linear { x: u32, form: u32, w: u32, bias: Option<u32>, out: u32, store: Store },
    Lora { x: u32, site: u32, out: u32 },
    RopeCache { qkv: u32, shape: HeadShape, norm: Option<QkNorm>, rope: u32, kv: u32, layer: u32 },
    Attention { qkv: u32, shape: HeadShape, spec: AttentionSpec, kv: u32, layer: u32, plan: u32, out: u32 },
    AttentionMerge { qkv: u32, shape: HeadShape, spec: AttentionSpec, kv: u32, layer: u32, plan: u32, out: u32 },
    Sample { logits: u32, vocabulary: u32 },
}

/// Kinds of entries, for the profile.
pub(super) const KINDS: [&str; 24] = [
    "embedding",
    "rms_norm",
    "silu_and_mul",
    "gather",
    "convert",
    "linear",
    "rope_cache",
    "paged_attention",
    "attention_merge",
    "sample",
    "lora",
    "gate_rows",
    "route",
    "align",
    "convert_routed",
    "expert_linear",
    "combine",
    "layer_norm",
    "clamp",
    "rms_norm_add",
    "scale",
    "soft_cap",
    "gelu_tanh_and_mul",
    "gelu",
];

impl Entry {
    /// Index into [`KINDS`].
    pub fn kind(&self) -> usize {
        match self {
            Entry::Embedding { .. } => 0,
            Entry::RmsNorm { .. } => 1,
            Entry::SiluAndMul { .. } => 2,
            Entry::Gather { .. } => 3,
            Entry::Convert { .. } => 4,
            Entry::Linear { .. } => 5,
            Entry::RopeCache { .. } => 6,
            Entry::Attention { .. } => 7,
            Entry::AttentionMerge { .. } => 8,
            Entry::Sample { .. } => 9,
            Entry::Lora { .. } => 10,
            Entry::GateRows { .. } => 11,
            Entry::Route { .. } => 12,
            Entry::Align { .. } => 13,
            Entry::ConvertRouted { .. } => 14,
            Entry::ExpertLinear { .. } => 15,
            Entry::Combine { .. } => 16,
            Entry::LayerNorm { .. } => 17,
            Entry::Clamp { .. } => 18,
            Entry::RmsNormAdd { .. } => 19,
            Entry::Scale { .. } => 20,
            Entry::SoftCap { .. } => 21,
            Entry::GeluTanhAndMul { .. } => 22,
            Entry::Gelu { .. } => 23,
        }
    }

    /// Whether each task finishes whole rows of the output, so that it can convert them too.
    fn makes_whole_rows(&self) -> bool {
        matches!(
            self,
            Entry::Embedding { .. }
                | Entry::RmsNorm { .. }
                | Entry::RmsNormAdd { .. }
                | Entry::LayerNorm { .. }
                | Entry::Clamp { .. }
                | Entry::Scale { .. }
                | Entry::SoftCap { .. }
                | Entry::SiluAndMul { .. }
                | Entry::GeluTanhAndMul { .. }
                | Entry::Gelu { .. }
                | Entry::GateRows { .. }
                | Entry::Combine { .. }
                | Entry::Gather { .. }
                | Entry::Convert { .. }
        )
    }
}

/// An entry with how it is shared out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned {
    pub entry: Entry,
    /// Tasks, and how many are claimed at once.
    pub tasks: u32,
    pub grain: u32,
    /// Forms (one bit each) that finished rows of the output are converted to.
    pub forms: u32,
}

/// The entries of a step. Memory is kept between steps.
#[derive(Debug, Default)]
pub(super) struct Program {
    entries: Vec<Planned>,
    /// For each buffer: the entry that wrote it last, and the forms that are current.
    buffers: Vec<(Option<usize>, u32)>,
}

impl Program {
    /// A program for the next step, for backends with `buffers` buffers.
    pub fn clear(&mut self, buffers: usize) {
        self.entries.clear();
        self.buffers.clear();
        self.buffers.resize(buffers, (None, 0));
    }

    /// Keeps the conversions but runs nothing twice: after a `finish`, before further operations of the same step.
    pub fn retire(&mut self) {
        self.entries.clear();
        self.buffers.iter_mut().for_each(|b| b.0 = None);
    }

    pub fn entries(&self) -> &[Planned] {
        &self.entries
    }

    /// Appends an entry that writes `out` (if any) with `tasks` tasks.
    pub fn push(&mut self, entry: Entry, out: Option<u32>, tasks: usize, grain: usize) {
        if let Some(out) = out {
            self.buffers[out as usize] = (Some(self.entries.len()), 0);
        }
        self.entries.push(Planned { entry, tasks: tasks as u32, grain: grain.max(1) as u32, forms: 0 });
    }

    /// Makes sure that the rows of `x` will have been converted to form `form` when the next entry runs.
    pub fn need(&mut self, x: u32, form: u32, rows: usize, grain: usize) {
        let (writer, ready) = self.buffers[x as usize];
        let bit = 1 << form;
        if ready & bit != 0 {
            return;
        }
        match writer.map(|w| &mut self.entries[w]) {
            Some(planned) if planned.entry.makes_whole_rows() => planned.forms |= bit,
            _ => {
                self.push(Entry::Convert { x }, Some(x), rows, grain);
                if let Some(planned) = self.entries.last_mut() {
                    planned.forms = bit;
                }
            }
        }
        self.buffers[x as usize].1 = ready | bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn norm(out: u32) -> Entry {
        Entry::RmsNorm { x: 9, weight: 0, eps: 0.0, out }
    }

    fn linear(x: u32, out: u32) -> Entry {
        Entry::Linear { x, form: 0, w: 0, bias: None, out, store: Store::Replace }
    }

    #[test]
    fn a_conversion_joins_the_operation_that_makes_the_rows() {
        let mut program = Program::default();
        program.clear(10);
        program.push(norm(1), Some(1), 4, 1);
        program.need(1, 0, 4, 1);
        program.push(linear(1, 2), Some(2), 4, 1);
        program.need(1, 0, 4, 1);
        program.push(linear(1, 3), Some(3), 4, 1);
        program.need(1, 1, 4, 1);
        assert_eq!(program.entries().len(), 3);
        assert_eq!(program.entries()[0].forms, 0b11);
    }

    #[test]
    fn a_linear_writes_parts_of_rows_so_its_output_is_converted_on_its_own_once() {
        let mut program = Program::default();
        program.clear(10);
        program.push(linear(1, 2), Some(2), 4, 1);
        program.need(2, 0, 4, 1);
        program.need(2, 0, 4, 1);
        program.need(2, 1, 4, 1);
        assert_eq!(program.entries().len(), 2);
        assert!(matches!(program.entries()[1].entry, Entry::Convert { x: 2 }));
        assert_eq!(program.entries()[1].forms, 0b11);
    }

    #[test]
    fn writing_a_buffer_again_makes_its_conversions_stale() {
        let mut program = Program::default();
        program.clear(10);
        program.push(norm(1), Some(1), 4, 1);
        program.need(1, 0, 4, 1);
        program.push(norm(1), Some(1), 4, 1);
        program.need(1, 0, 4, 1);
        assert!(program.entries().iter().all(|p| p.forms == 1));
    }

    #[test]
    fn conversions_outlive_a_finish_but_entries_do_not() {
        let mut program = Program::default();
        program.clear(10);
        program.push(norm(1), Some(1), 4, 1);
        program.need(1, 0, 4, 1);
        program.retire();
        program.need(1, 0, 4, 1);
        assert!(program.entries().is_empty());
        program.need(1, 1, 4, 1);
        assert_eq!(program.entries().len(), 1);
    }
}
