//! Attention over packed segments: which rows meet is planned on the host, once for all layers of a pass.

use super::params::{TrainAttention, TrainInner};
use super::{DeviceCompute, Region, Values, fits};
use crate::cuda::device::{Address, Kernel, Launch, Source};
use crate::error::KernelError;
use crate::ops::HeadShape;
use crate::train::{Attention, Precision, Span};

/// Most words of the lists for a row: its position, and where it is a segment alone, two tiles of 4 and four runs of 2.
const WORDS: usize = 1 + 2 * 4 + 4 * 2;

const INNER: Kernel = Kernel::new(Source::TrainRows, "train_inner", 256);

/// Which rows of a pass see which, on the device.
pub struct Seen {
    lists: Region,
    /// Where in the lists they start.
    runs: usize,
    queries: usize,
    keys: usize,
    /// Tiles; as many of queries as of keys.
    tiles: usize,
    /// Rows of the pass.
    rows: usize,
    last_position: usize,
    /// Rows of a tile.
    each: usize,
}

impl Seen {
    pub(super) fn positions(&self) -> Address {
        self.lists.all().at
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn last_position(&self) -> usize {
        self.last_position
    }

    fn at(&self, word: usize) -> Address {
        self.lists.all().at.plus(4 * word)
    }
}

/// How a kernel is made up for a width of heads: `Shape` in `train.cu`.
struct Shape {
    head: usize,
    warps: usize,
    others: usize,
    pieces: usize,
    bytes: usize,
}

impl Shape {
    fn new(head_dim: usize, precision: Precision) -> Result<Self, KernelError> {
        let head = match head_dim {
            0..=64 => 64,
            65..=128 => 128,
            129..=256 => 256,
            _ => {
                let why = format!("heads of {head_dim} elements cannot be trained on a card; train with --device cpu");
                return Err(KernelError::Unsupported(why));
            }
        };
        let wide = head > 128;
        let (warps, others, bytes) = match precision {
            Precision::Bf16 => (if wide { 2 } else { 4 }, 32, 2),
            Precision::F32 => (if wide { 1 } else { 2 }, if wide { 16 } else { 32 }, 4),
        };
        Ok(Self { head, warps, others, pieces: head.div_ceil(128), bytes })
    }

    /// Shared memory for so many tiles of a block's own rows, two of those that they meet, and the weights between them.
    fn shared(&self, own: usize) -> usize {
        let apart = 16 / self.bytes;
        let rows = (own * self.warps * 16 + 2 * self.others) * (self.head + apart);
        (rows + self.warps * 16 * (self.others + apart)) * self.bytes
    }

    fn kernel(&self, names: [&'static str; 6]) -> Kernel {
        let width = match self.head {
            64 => 0,
            128 => 1,
            _ => 2,
        };
        Kernel::new(Source::Train, names[if self.bytes == 2 { width } else { 3 + width }], self.warps as u32 * 32)
    }
}

impl DeviceCompute {
    /// Plans who sees whom: `spans` and `positions` as in [`Attention`].
    pub fn seen(&mut self, spans: &[Span], positions: &[u32], shape: HeadShape) -> Result<Seen, KernelError> {
        let each = Shape::new(shape.head_dim, self.precision)?.warps * 16;
        let mut runs: Vec<u32> = Vec::new();
        let (mut queries, mut keys): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        let mut add = |span: &Span, met: &mut dyn Iterator<Item = &Span>, tiles: &mut Vec<u32>| {
            if span.len == 0 {
                return;
            }
            let from = runs.len() / 2;
            met.filter(|met| met.len > 0).for_each(|met| runs.extend([met.first as u32, met.len as u32]));
            let to = runs.len() / 2;
            for first in (0..span.len).step_by(each) {
                tiles.extend([span.first + first, (span.len - first).min(each), from, to].map(|word| word as u32));
            }
        };
        for (index, span) in spans.iter().enumerate() {
            let prefix = span.prefix.and_then(|prefix| spans.get(prefix));
            add(span, &mut prefix.into_iter().chain([span]), &mut queries);
            let dependants = spans.iter().filter(|other| other.prefix == Some(index));
            add(span, &mut [span].into_iter().chain(dependants), &mut keys);
        }
        let starts = [positions.len(), runs.len(), queries.len()];
        let mut words = [positions, &runs, &queries, &keys].concat();
        // As much for many short segments as for a long one, so that what a pass needs is a matter of its rows.
        words.resize(words.len().max(WORDS * positions.len()), 0);
        let lists = self.upload_words(&words)?;
        let [runs_at, queries_at, keys_at] = [starts[0], starts[0] + starts[1], starts.iter().sum()];
        let (tiles, rows) = (queries.len() / 4, positions.len());
        let last_position = positions.iter().max().map_or(0, |last| *last as usize);
        Ok(Seen { lists, runs: runs_at, queries: queries_at, keys: keys_at, tiles, rows, last_position, each })
    }

    fn attention_params(&self, call: &Attention<'_>, seen: &Seen, qkv: Values<'_>) -> TrainAttention {
        let HeadShape { heads, kv_heads, head_dim } = call.shape;
        TrainAttention {
            qkv: qkv.at,
            out: Address::NONE,
            lse: Address::NONE,
            dout: Address::NONE,
            inner: Address::NONE,
            dqkv: Address::NONE,
            positions: seen.positions(),
            tiles: seen.at(seen.queries),
            runs: seen.at(seen.runs),
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            window: call.spec.sliding_window.unwrap_or(0) as u32,
            scale: call.spec.scale,
            unused: 0,
        }
    }

    fn planned(&self, call: &Attention<'_>, seen: &Seen) -> Result<Shape, KernelError> {
        let shape = Shape::new(call.shape.head_dim, self.precision)?;
        fits("attention", seen.rows == call.positions.len() && seen.each == shape.warps * 16)?;
        Ok(shape)
    }

    /// [`crate::train::Compute::attention`]; `seen` is the plan of the call's spans and positions.
    pub fn attention(
        &mut self,
        call: &Attention<'_>,
        seen: &Seen,
        qkv: Values<'_>,
        out: Values<'_>,
        lse: Values<'_>,
    ) -> Result<(), KernelError> {
        call.check(qkv.len, out.len, lse.len)?;
        let shape = self.planned(call, seen)?;
        let params = TrainAttention { out: out.at, lse: lse.at, ..self.attention_params(call, seen, qkv) };
        let kernel = shape.kernel([
            "train_attention_bf16_64",
            "train_attention_bf16_128",
            "train_attention_bf16_256",
            "train_attention_f32_64",
            "train_attention_f32_128",
            "train_attention_f32_256",
        ]);
        let launch = Launch { grid: [seen.tiles as u32, call.shape.heads as u32, shape.pieces as u32], shared: 0 };
        self.launch(kernel, launch.with_shared(shape.shared(1)), params)
    }

    /// [`crate::train::Compute::attention_back`].
    pub fn attention_back(
        &mut self,
        call: &Attention<'_>,
        seen: &Seen,
        [qkv, out, lse, dout]: [Values<'_>; 4],
        dqkv: Values<'_>,
    ) -> Result<(), KernelError> {
        call.check(qkv.len, out.len, lse.len)?;
        fits("attention_back", dout.len == out.len && dqkv.len == qkv.len)?;
        let shape = self.planned(call, seen)?;
        let HeadShape { heads, kv_heads, head_dim } = call.shape;
        let inner = self.region(lse.len)?;
        let rows = lse.len;
        let sums = TrainInner { a: dout.at, b: out.at, out: inner.all().at, rows: rows as u32, width: head_dim as u32 };
        self.launch(INNER, Launch::blocks(rows.div_ceil(8)), sums)?;
        let params = TrainAttention {
            lse: lse.at,
            dout: dout.at,
            inner: inner.all().at,
            dqkv: dqkv.at,
            ..self.attention_params(call, seen, qkv)
        };
        let kernel = shape.kernel([
            "train_attention_queries_bf16_64",
            "train_attention_queries_bf16_128",
            "train_attention_queries_bf16_256",
            "train_attention_queries_f32_64",
            "train_attention_queries_f32_128",
            "train_attention_queries_f32_256",
        ]);
        let launch = Launch { grid: [seen.tiles as u32, heads as u32, shape.pieces as u32], shared: 0 };
        self.launch(kernel, launch.with_shared(shape.shared(2)), params)?;
        let params = TrainAttention { tiles: seen.at(seen.keys), ..params };
        let kernel = shape.kernel([
            "train_attention_keys_bf16_64",
            "train_attention_keys_bf16_128",
            "train_attention_keys_bf16_256",
            "train_attention_keys_f32_64",
            "train_attention_keys_f32_128",
            "train_attention_keys_f32_256",
        ]);
        let launch = Launch { grid: [seen.tiles as u32, kv_heads as u32, 2 * shape.pieces as u32], shared: 0 };
        self.launch(kernel, launch.with_shared(shape.shared(2)), params)
    }
}
