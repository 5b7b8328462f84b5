//! Steps that are captured once and replayed: those that compute one token of each sequence, which have many small kernels and little
//! in each.
//!
//! A captured step has fixed addresses, grids and parameters, so what differs from step to step lies in memory: the step's lists and
//! the tiles of attention, in rooms that are written before each replay. Rows are padded to a size of a ladder; rows that only pad
//! write nothing to the cache and nothing to rows of others. What is captured under which key is a question of values and decided
//! here; the backend does it.
//!
//! A step of a new key is done as it is, which reserves all that it needs; the second is captured, the third replays. Whenever a room
//! has moved, what was captured is forgotten.

use super::device::Graph;
use super::plan::parts_of;
use crate::ops::*;

/// Rows that steps are padded to. Every limit between two kernels is one of them, so padding gives no row to another kernel.
const LADDER: [usize; 13] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];
/// Captured steps that are kept.
const MOST: usize = 256;
/// Sequences of operations that are told apart.
const MOST_PROGRAMS: usize = 16;
/// Captures of a key that are tried. What a driver or a library refuses once it may take later.
const MOST_TRIES: u8 = 3;

/// The size that a step is padded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Padded {
    /// Rows of tokens, and sequences.
    pub rows: usize,
    /// Rows of samples.
    pub samples: usize,
    /// Tiles of attention of few rows.
    pub tiles: usize,
    /// Whether some contexts are cut into parts, which are joined.
    pub split: bool,
}

impl Padded {
    /// What a step is padded to; `None` for one that is not to be captured: it has a chunk of a prompt, or too many rows.
    pub(super) fn of(batch: &StepBatch, limits: Limits) -> Option<Self> {
        let wanted = batch.tokens.len().max(batch.samples.len());
        let rows = LADDER.into_iter().find(|size| wanted <= *size)?.min(limits.max_tokens);
        let decodes = !batch.blocks.is_empty() && batch.sequences.iter().all(|s| s.rows == 1);
        if wanted == 0 || wanted > rows || !decodes {
            return None;
        }
        let parts = batch.sequences.iter().map(|s| parts_of(s.context_len as usize));
        let split = parts.clone().any(|parts| parts > 1);
        // Few numbers of tiles, so that few steps are captured; a tile with nothing to do costs next to nothing.
        let tiles = if split { (parts.sum::<usize>() + rows - batch.tokens.len()).next_power_of_two() } else { rows };
        Some(Padded { rows, samples: rows.min(limits.max_samples), tiles, split })
    }

    /// A sequence that only pads: a token of its own that reads a key of somebody's block and writes none.
    pub(super) fn span(row: usize, first_block: u32) -> SequenceSpan {
        SequenceSpan { first_row: row as u32, rows: 1, context_len: 1, first_block }
    }
}

/// An operation of a step, as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Op {
    Embedding { table: Matrix, out: Buf },
    RmsNorm { x: Buf, weight: Vector, eps: f32, out: Buf },
    LayerNorm { x: Buf, weight: Vector, eps: f32, out: Buf },
    RmsNormAdd { x: Buf, weight: Vector, eps: f32, out: Buf },
    Clamp { x: Buf, limit: f32 },
    Scale { x: Buf, factor: f32 },
    SoftCap { x: Buf, cap: f32 },
    Linear { x: Buf, w: Matrix, bias: Option<Vector>, out: Buf, store: Store },
    Lora { x: Buf, site: usize, out: Buf },
    RopeCache { qkv: Buf, shape: HeadShape, norm: Option<QkNorm>, rope: Rope, kv: KvCache, layer: usize },
    PagedAttention { qkv: Buf, shape: HeadShape, spec: AttentionSpec, kv: KvCache, layer: usize, out: Buf },
    SiluAndMul { gate_up: Buf, out: Buf },
    GeluTanhAndMul { gate_up: Buf, out: Buf },
    Gelu { x: Buf, out: Buf },
    Route { logits: Buf, normalised: bool, routing: Routing },
    ExpertLinear { x: Buf, experts: Experts, routing: Routing, out: Buf },
    Combine { x: Buf, routing: Routing, out: Buf, store: Store },
    GateRows { gate: Buf, x: Buf },
    Gather { x: Buf, out: Buf },
    EmbeddingShard { table: Matrix, first: u32, out: Buf },
    AllReduce { x: Buf },
    AllGather { x: Buf, out: Buf },
}

/// How a step is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Operation by operation.
    Plain,
    /// The same, for the first time: [`Graphs::undo_first`] when it goes wrong.
    First,
    /// Captured, then replayed; the outcome is for [`Graphs::keep`] with this number.
    Capture(usize),
    /// Replayed.
    Replay(Graph),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Done once: everything it needs is reserved.
    Seen,
    Ready(Graph),
    /// The device did not take it, however often it was tried.
    Refused,
}

#[derive(Debug)]
struct Entry {
    size: Padded,
    program: usize,
    state: State,
    /// Captures that were refused.
    refused: u8,
}

impl Entry {
    /// Whether it is given up.
    fn refuse(&mut self) -> bool {
        self.refused += 1;
        if self.refused < MOST_TRIES {
            return false;
        }
        self.state = State::Refused;
        true
    }
}

/// What was captured.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    programs: Vec<Vec<Op>>,
    entries: Vec<Entry>,
    /// How often rooms had moved when the first of them was seen.
    moves: usize,
    /// Given up, to be handed back to the device.
    dropped: Vec<Graph>,
}

impl Graphs {
    /// How to do a step. `moves`: how often rooms have moved so far.
    pub(super) fn way(&mut self, size: Padded, program: &[Op], moves: usize) -> Way {
        if moves != self.moves {
            self.forget();
            self.moves = moves;
        }
        let known = self.programs.iter().position(|p| p == program);
        let found = known.and_then(|program| self.entries.iter().position(|e| e.size == size && e.program == program));
        if let Some(index) = found {
            return match self.entries[index].state {
                State::Seen => Way::Capture(index),
                State::Ready(graph) => Way::Replay(graph),
                State::Refused => Way::Plain,
            };
        }
        if self.entries.len() >= MOST || (known.is_none() && self.programs.len() >= MOST_PROGRAMS) {
            self.forget();
        }
        // Looked for again: what is forgotten is of no use here.
        let program = self.programs.iter().position(|p| p == program).unwrap_or_else(|| {
            self.programs.push(program.to_vec());
            self.programs.len() - 1
        });
        self.entries.push(Entry { size, program, state: State::Seen, refused: 0 });
        Way::First
    }

    /// The step that came as the first of its key went wrong, so it may not have reserved all that a captured one needs.
    pub(super) fn undo_first(&mut self) {
        self.entries.pop();
    }

    /// Notes what became of a capture. Whether it is given up.
    pub(super) fn keep(&mut self, index: usize, captured: Option<Graph>) -> bool {
        match (self.entries.get_mut(index), captured) {
            (Some(entry), Some(graph)) => entry.state = State::Ready(graph),
            (Some(entry), None) => return entry.refuse(),
            (None, captured) => self.dropped.extend(captured),
        }
        false
    }

    /// Notes that the card had no memory for one, which is given back. Whether steps of its key are captured no more.
    pub(super) fn give_back(&mut self, graph: Graph) -> bool {
        let entry = self.entries.iter_mut().find(|entry| entry.state == State::Ready(graph));
        entry.is_some_and(|entry| {
            self.dropped.push(graph);
            entry.state = State::Seen;
            entry.refuse()
        })
    }

    /// Gives up everything.
    pub(super) fn forget(&mut self) {
        self.programs.clear();
        let graphs = self.entries.drain(..).filter_map(|entry| match entry.state {
            State::Ready(graph) => Some(graph),
            State::Seen | State::Refused => None,
        });
        self.dropped.extend(graphs);
    }

    /// Gives up what reads adapters.
    pub(super) fn forget_adapters(&mut self) {
        let Graphs { programs, entries, dropped, .. } = self;
        let reads = |entry: &Entry| programs[entry.program].iter().any(|op| matches!(op, Op::Lora { .. }));
        entries.retain(|entry| {
            let goes = reads(entry);
            if let (true, State::Ready(graph)) = (goes, entry.state) {
                dropped.push(graph);
            }
            !goes
        });
    }

    /// What was given up since the last call.
    pub(super) fn dropped(&mut self) -> Vec<Graph> {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_tokens: 300, max_samples: 40, max_positions: 10_000 };

    fn decode(contexts: &[u32]) -> StepBatch {
        let row = |(i, &context_len): (usize, &u32)| SequenceSpan { first_row: i as u32, rows: 1, context_len, first_block: 0 };
        StepBatch {
            tokens: vec![0; contexts.len()],
            sequences: contexts.iter().enumerate().map(row).collect(),
            blocks: vec![0],
            samples: (0..contexts.len() as u32).map(SampleRow::greedy).collect(),
            ..StepBatch::default()
        }
    }

    #[test]
    fn rows_and_tiles_are_padded_to_few_sizes() {
        let size = |contexts: &[u32]| Padded::of(&decode(contexts), LIMITS);
        assert_eq!(size(&[7]), Some(Padded { rows: 1, samples: 1, tiles: 1, split: false }));
        assert_eq!(size(&[256; 9]), Some(Padded { rows: 16, samples: 16, tiles: 16, split: false }));
        // 3 parts, 2 of one, and one for the row that pads.
        assert_eq!(size(&[700, 3, 4]), Some(Padded { rows: 4, samples: 4, tiles: 8, split: true }));
        assert_eq!(size(&[9; 33]), Some(Padded { rows: 48, samples: 40, tiles: 48, split: false }));
        assert_eq!(size(&[9; 257]), None);
    }

    #[test]
    fn steps_with_chunks_are_not_captured() {
        let mut batch = decode(&[5, 6]);
        batch.sequences[1].rows = 2;
        assert_eq!(Padded::of(&batch, LIMITS), None);
        assert_eq!(Padded::of(&StepBatch::default(), LIMITS), None);
        // Nor are those that would be padded beyond what there is.
        let tight = Limits { max_tokens: 5, ..LIMITS };
        assert_eq!(Padded::of(&decode(&[5; 5]), tight).map(|size| size.rows), Some(5));
    }

    #[test]
    fn a_key_is_done_then_captured_then_replayed_until_a_room_moves() {
        let mut graphs = Graphs::default();
        let size = Padded { rows: 1, samples: 1, tiles: 1, split: false };
        let program = [Op::Embedding { table: Matrix(0), out: Buf(0) }];
        assert_eq!(graphs.way(size, &program, 3), Way::First);
        graphs.undo_first();
        assert_eq!(graphs.way(size, &program, 3), Way::First);
        assert_eq!(graphs.way(size, &program, 3), Way::Capture(0));
        graphs.keep(0, Some(Graph(7)));
        assert_eq!(graphs.way(size, &program, 3), Way::Replay(Graph(7)));
        // Another sequence of operations and another size are other keys.
        assert_eq!(graphs.way(size, &[], 3), Way::First);
        assert_eq!(graphs.way(Padded { split: true, ..size }, &program, 3), Way::First);
        assert!(graphs.dropped().is_empty());
        assert_eq!(graphs.way(size, &program, 4), Way::First);
        assert_eq!(graphs.dropped(), [Graph(7)]);
        assert_eq!(graphs.way(size, &program, 4), Way::Capture(0));
    }

    #[test]
    fn what_the_device_does_not_take_however_often_is_done_plainly() {
        let mut graphs = Graphs::default();
        let size = Padded { rows: 1, samples: 1, tiles: 1, split: false };
        graphs.way(size, &[], 0);
        for round in 1..=MOST_TRIES {
            assert_eq!(graphs.way(size, &[], 0), Way::Capture(0));
            assert_eq!(graphs.keep(0, None), round == MOST_TRIES);
        }
        assert_eq!(graphs.way(size, &[], 0), Way::Plain);
        // What it takes in the end is replayed.
        graphs.forget();
        graphs.way(size, &[], 0);
        graphs.keep(0, None);
        assert_eq!(graphs.way(size, &[], 0), Way::Capture(0));
        graphs.keep(0, Some(Graph(7)));
        assert_eq!(graphs.way(size, &[], 0), Way::Replay(Graph(7)));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut graphs = Graphs::default();
        for tiles in 0..3 * MOST {
            let size = Padded { rows: 1, samples: 1, tiles, split: true };
            graphs.way(size, &[], 0);
            if let Way::Capture(index) = graphs.way(size, &[], 0) {
                graphs.keep(index, Some(Graph(tiles as u64)));
            }
            assert!(graphs.entries.len() <= MOST);
        }
        assert_eq!(graphs.dropped().len() + graphs.entries.len(), 3 * MOST);
    }
}
