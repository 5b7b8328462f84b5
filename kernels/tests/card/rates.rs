//! Bandwidth and rate of each kernel at the sizes of serving.
//!
//! A measurement is several series of launches, timed by the device's clock; the median series counts. A series begins with a long copy
//! of blocks, behind which its launches queue, so that the card never waits for this program. Weights and keys rotate through more
//! memory than the caches hold; activations are where serving would find them.

use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::*;

use super::clock::Clock;
use super::support::steps::{BLOCK, Sequence, append, greedy};
use super::support::{Noise, Weight};

/// Sizes of a model and of its steps.
pub struct Sizes {
    pub hidden: usize,
    pub ffn: usize,
    pub heads: HeadShape,
    pub vocabulary: usize,
    /// Rows of decoding steps.
    pub batches: [usize; 3],
    /// Tokens in the cache.
    pub contexts: [usize; 3],
    /// Rows of a step of prefill.
    pub chunk: usize,
    /// More bytes than the caches hold.
    cold: usize,
    launches: usize,
    series: usize,
    /// Of the cache whose blocks are copied.
    copied: KvSpec,
    /// Rows, output and input features of products, for the ceiling.
    products: [[usize; 3]; 3],
}

impl Sizes {
    /// An 8B Llama.
    pub fn serving() -> Self {
        Sizes {
            hidden: 4096,
            ffn: 14336,
            heads: HeadShape { heads: 32, kv_heads: 8, head_dim: 128 },
            vocabulary: 128_256,
            batches: [1, 32, 128],
            contexts: [1024, 2048, 8192],
            chunk: 2048,
            cold: 256 << 20,
            launches: 24,
            series: 5,
            // 16 layers of blocks of 32 MiB: a step that copies one moves 1 GiB, which it reads and writes.
            copied: KvSpec { layers: 16, blocks: 2, block_size: BLOCK, kv_heads: 4096, head_dim: 128, dtype: KvDtype::Bf16 },
            products: [[8192, 8192, 8192], [8192, 28672, 4096], [4096, 4096, 14336]],
        }
    }

    /// For a device that is a program.
    pub fn tiny() -> Self {
        Sizes {
            hidden: 128,
            ffn: 192,
            heads: HeadShape { heads: 4, kv_heads: 2, head_dim: 64 },
            vocabulary: 300,
            batches: [1, 2, 3],
            contexts: [40, 64, 100],
            chunk: 18,
            cold: 1,
            launches: 1,
            series: 1,
            copied: KvSpec { layers: 2, blocks: 2, block_size: BLOCK, kv_heads: 1, head_dim: 64, dtype: KvDtype::Bf16 },
            products: [[18, 32, 64], [20, 16, 32], [17, 16, 16]],
        }
    }

    pub fn spec(&self) -> AttentionSpec {
        AttentionSpec { scale: 1.0 / (self.heads.head_dim as f32).sqrt(), sliding_window: None, soft_cap: None, alibi: None }
    }

    fn qkv(&self) -> usize {
        (self.heads.heads + 2 * self.heads.kv_heads) * self.heads.head_dim
    }

    fn limits(&self) -> Limits {
        let max_tokens = self.chunk.max(self.batches[2]);
        Limits { max_tokens, max_samples: self.batches[2], max_positions: self.contexts[2] }
    }
}

/// What the card can do: bytes read and written by a copy, operations of a product, both per second. 0: not measured.
#[derive(Clone, Copy, Default)]
pub struct Ceilings {
    pub copy: f64,
    pub product: f64,
}

const COPY: &str = "copy of blocks, read and written, GB/s";
const PRODUCT: &str = "bf16 product of the library, TFLOP/s";

impl Ceilings {
    /// Reads a row of the ceilings' table.
    pub fn hear(&mut self, row: &str) {
        let mut cells = row.split('|').map(str::trim).skip(1);
        let (what, value) = (cells.next().unwrap_or_default(), cells.next().and_then(|cell| cell.parse::<f64>().ok()));
        match (what, value) {
            (COPY, Some(value)) => self.copy = value * 1e9,
            (PRODUCT, Some(value)) => self.product = value * 1e12,
            _ => {}
        }
    }
}

/// A backend with the copy that launches queue behind.
struct Bench<'a, D: Clock> {
    ops: CudaBackend<D>,
    sizes: &'a Sizes,
    ceilings: Ceilings,
    noise: Noise,
    row: &'a mut dyn FnMut(String),
}

/// What one launch does, for its row of the table.
#[derive(Clone, Copy)]
struct Work {
    bytes: f64,
    operations: f64,
}

impl<'a, D: Clock> Bench<'a, D> {
    fn new(mut ops: CudaBackend<D>, sizes: &'a Sizes, ceilings: Ceilings, row: &'a mut dyn FnMut(String)) -> Self {
        ops.alloc_kv(sizes.copied).unwrap();
        Bench { ops, sizes, ceilings, noise: Noise::new(1), row }
    }

    /// Seconds of one `work`, which hears how many there were before.
    fn seconds(&mut self, step: &StepBatch, launches: usize, mut work: impl FnMut(&mut CudaBackend<D>, usize)) -> f64 {
        let step = StepBatch { copies: vec![(0, 1)], ..step.clone() };
        let mut out = StepOutput::default();
        let mut series: Vec<f64> = Vec::new();
        // The first prepares what is prepared once.
        for _ in 0..=self.sizes.series {
            self.ops.begin(&step).unwrap();
            work(&mut self.ops, 0);
            let from = self.ops.device().mark();
            (1..=launches).for_each(|i| work(&mut self.ops, i));
            let to = self.ops.device().mark();
            self.ops.finish(&mut out).unwrap();
            series.push(self.ops.device().seconds(&from, &to) / launches as f64);
        }
        series.remove(0);
        series.sort_by(f64::total_cmp);
        series[series.len() / 2]
    }

    fn measure(&mut self, kernel: &str, sizes: &str, step: &StepBatch, cost: Work, work: impl FnMut(&mut CudaBackend<D>, usize)) {
        let seconds = self.seconds(step, self.sizes.launches, work);
        let (bytes, operations) = (cost.bytes / seconds, cost.operations / seconds);
        let share =
            |value: f64, ceiling: f64| if ceiling > 0.0 { format!("{:.0} %", value / ceiling * 100.0) } else { "".into() };
        let rate =
            |value: f64, unit: f64, digits: usize| if value > 0.0 { format!("{:.digits$}", value / unit) } else { "".into() };
        (self.row)(format!(
            "| {kernel} | {sizes} | {:.1} | {} | {} | {} | {} |",
            seconds * 1e6,
            rate(bytes, 1e9, 0),
            share(bytes, self.ceilings.copy),
            rate(operations, 1e12, 1),
            if operations > 0.0 { share(operations, self.ceilings.product) } else { String::new() },
        ));
    }

    fn table(&mut self, rows: usize, width: usize, format: Format) -> Matrix {
        let weight = Weight::random(&mut self.noise, rows, width, format, 1.0);
        self.ops.load_matrix(&[weight.source()], WeightFormat::Auto).unwrap()
    }

    fn token_buffers<const N: usize>(&mut self, widths: [usize; N]) -> [Buf; N] {
        widths.map(|width| self.ops.alloc(Rows::Tokens, width).unwrap())
    }

    /// A step of `rows` sequences that each have one token more than `context - 1`; tables in scattered order.
    fn decoding(&mut self, rows: usize, context: usize) -> StepBatch {
        let each = context.div_ceil(BLOCK);
        let mut blocks: Vec<u32> = (0..(rows * each) as u32).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, self.noise.below(i + 1));
        }
        let mut batch = StepBatch::default();
        for table in blocks.chunks_exact(each) {
            let tokens = vec![self.noise.below(64) as u32; context];
            append(&mut batch, &mut Sequence { tokens, table: table.to_vec(), computed: context - 1 }, 1);
            batch.samples.push(greedy(batch.tokens.len() as u32 - 1));
        }
        batch
    }

    /// A step of the last `rows` tokens of one sequence of `context`.
    fn prefill(&mut self, rows: usize, context: usize) -> StepBatch {
        let tokens = (0..context).map(|_| self.noise.below(64) as u32).collect();
        let table = (0..context.div_ceil(BLOCK) as u32).collect();
        let mut batch = StepBatch::default();
        append(&mut batch, &mut Sequence { tokens, table, computed: context - rows }, rows);
        batch.samples.push(greedy(rows as u32 - 1));
        batch
    }

    /// A step of `rows` rows, decoding up to the largest batch.
    fn any(&mut self, rows: usize) -> StepBatch {
        if rows <= self.sizes.batches[2] { self.decoding(rows, 1) } else { self.prefill(rows, rows) }
    }

    /// Random keys and values in all layers of a cache.
    fn fill(&mut self, kv: KvCache, layers: usize, blocks: usize, table: Matrix, qkv: Buf, rope: Rope) {
        let rows = self.sizes.chunk / BLOCK * BLOCK;
        let rows = if rows == 0 { self.sizes.chunk } else { rows };
        let mut out = StepOutput::default();
        for first in (0..blocks * BLOCK).step_by(rows) {
            let take = rows.min(blocks * BLOCK - first);
            let mut batch = StepBatch::default();
            let tokens = (0..take).map(|_| self.noise.below(64) as u32).collect();
            append(&mut batch, &mut Sequence { tokens, table: (0..take.div_ceil(BLOCK) as u32).collect(), computed: 0 }, take);
            batch.slots = (first as i64..(first + take) as i64).collect();
            for layer in 0..layers {
                self.ops.begin(&batch).unwrap();
                self.ops.embedding(table, qkv);
                self.ops.rope_cache(qkv, self.sizes.heads, None, rope, kv, layer);
                self.ops.finish(&mut out).unwrap();
            }
        }
    }
}

/// The two ceilings.
pub fn ceilings<D: Clock>(open: impl Fn(Limits) -> CudaBackend<D>, sizes: &Sizes, row: &mut dyn FnMut(String)) {
    let mut out = StepOutput::default();
    let limits = Limits { max_tokens: 1, max_samples: 1, max_positions: 1 };
    let mut ops = open(limits);
    ops.alloc_kv(sizes.copied).unwrap();
    let mut step = StepBatch { copies: vec![(0, 1)], ..StepBatch::default() };
    append(&mut step, &mut Sequence { tokens: vec![0], table: vec![0], computed: 0 }, 1);
    step.slots.fill(-1);
    let mut best = f64::MAX;
    for _ in 0..20.min(4 * sizes.series) {
        ops.begin(&step).unwrap();
        let from = ops.device().mark();
        (0..4).for_each(|_| ops.begin(&step).unwrap());
        let to = ops.device().mark();
        ops.finish(&mut out).unwrap();
        best = best.min(ops.device().seconds(&from, &to));
    }
    // Keys and values of a block, four times, read and written.
    let bytes = sizes.copied.block_bytes() * 4 * 2;
    row(format!("| {COPY} | {:.1} |", bytes as f64 / best / 1e9));
    drop(ops);

    let mut most: f64 = 0.0;
    for [rows, n, k] in sizes.products {
        let limits = Limits { max_tokens: rows, max_samples: 1, max_positions: rows };
        let mut bench = Bench::new(open(limits), sizes, Ceilings::default(), row);
        let (table, w) = (bench.table(64, k, Format::Bf16), bench.table(n, k, Format::Bf16));
        let [x, to] = bench.token_buffers([k, n]);
        let step = bench.prefill(rows, rows);
        bench.ops.begin(&step).unwrap();
        bench.ops.embedding(table, x);
        bench.ops.finish(&mut out).unwrap();
        let seconds = bench.seconds(&step, 1.max(sizes.launches / 4), |ops, _| ops.linear(x, w, None, to, Store::Replace));
        most = most.max(2.0 * (rows * n * k) as f64 / seconds);
    }
    row(format!("| {PRODUCT} | {:.1} |", most / 1e12));
}

pub fn part<D: Clock>(
    open: impl Fn(Limits) -> CudaBackend<D>,
    what: &str,
    sizes: &Sizes,
    ceilings: Ceilings,
    row: &mut dyn FnMut(String),
) {
    let bench = Bench::new(open(sizes.limits()), sizes, ceilings, row);
    match what {
        "rows" => rows(bench),
        "bf16" => linears(bench, Format::Bf16, WeightFormat::Auto, "bf16", 2.0),
        "int8" => linears(bench, Format::Bf16, WeightFormat::Int8, "int8", 1.0),
        // Nibbles, and a scale and a minimum for 32.
        "int4" => linears(bench, Format::Q4_0, WeightFormat::Auto, "int4", 0.625),
        "fp8" => linears(bench, Format::Bf16, WeightFormat::Fp8, "fp8", 1.0),
        "fp8 activations" => linears(bench, Format::Bf16, WeightFormat::Fp8, "fp8, activations too", 1.0),
        "low-rank" => low_rank(bench),
        "decode" => decode(bench, KvDtype::Bf16),
        "decode fp8" => decode(bench, KvDtype::Fp8),
        "prefill" => prefill(bench, "prefill"),
        "prefill wgmma" => prefill(bench, "prefill by wgmma"),
        _ => sampling(bench),
    }
}

/// What is bound by activations. Those that a linear reads next have a bf16 copy.
fn rows<D: Clock>(mut bench: Bench<'_, D>) {
    let sizes = bench.sizes;
    let (hidden, ffn, heads) = (sizes.hidden, sizes.ffn, sizes.heads);
    let HeadShape { heads: queries, kv_heads, head_dim } = heads;
    let (table, wide) = (bench.table(1024, hidden, Format::Bf16), bench.table(64, sizes.qkv(), Format::Bf16));
    let (small, other) = (bench.table(16, hidden, Format::Bf16), bench.table(16, ffn, Format::Bf16));
    let weight = bench.ops.load_vector(&vec![1.0; hidden]).unwrap();
    let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    let rope = bench.ops.load_rope(&frequencies, 1.0).unwrap();
    let [x, normed, gate_up, gated, qkv, narrow] = bench.token_buffers([hidden, hidden, 2 * ffn, ffn, sizes.qkv(), 16]);
    let last = bench.ops.alloc(Rows::Samples, hidden).unwrap();
    let blocks = sizes.chunk.div_ceil(BLOCK).max(sizes.batches[2]);
    let cache = KvSpec { layers: 1, blocks, block_size: BLOCK, kv_heads, head_dim, dtype: KvDtype::Bf16 };
    let kv = bench.ops.alloc_kv(cache).unwrap();
    for count in sizes.batches.into_iter().chain([sizes.chunk]) {
        let step = bench.any(count);
        let mut out = StepOutput::default();
        bench.ops.begin(&step).unwrap();
        bench.ops.embedding(table, x);
        bench.ops.rms_norm(x, weight, 1e-5, normed);
        bench.ops.linear(normed, small, None, narrow, Store::Replace);
        bench.ops.embedding(wide, qkv);
        bench.ops.silu_and_mul(gate_up, gated);
        bench.ops.linear(gated, other, None, narrow, Store::Replace);
        bench.ops.finish(&mut out).unwrap();
        let sized = format!("{count} rows");
        let moved = |each: usize, width: usize| Work { bytes: (count * each * width) as f64, operations: 0.0 };
        bench.measure("embedding", &sized, &step, moved(2 + 4, hidden), |ops, _| ops.embedding(table, x));
        bench.measure("rms_norm", &sized, &step, moved(4 + 4 + 2, hidden), |ops, _| ops.rms_norm(x, weight, 1e-5, normed));
        bench.measure("silu_and_mul", &sized, &step, moved(8 + 4 + 2, ffn), |ops, _| ops.silu_and_mul(gate_up, gated));
        // Queries and keys are read and written, values read; keys and values go to the cache.
        let rotated = (queries + kv_heads) * 8 + kv_heads * 4 + 2 * kv_heads * 2;
        bench.measure("rope_cache", &sized, &step, moved(rotated, head_dim), |ops, _| {
            ops.rope_cache(qkv, heads, None, rope, kv, 0);
        });
        if step.samples.len() == count {
            bench.measure("gather", &sized, &step, moved(4 + 4, hidden), |ops, _| ops.gather(x, last));
        }
    }
}

fn linears<D: Clock>(mut bench: Bench<'_, D>, format: Format, packed: WeightFormat, form: &str, element: f64) {
    let sizes = bench.sizes;
    let (hidden, ffn) = (sizes.hidden, sizes.ffn);
    let matrices = [
        ("q, k, v", sizes.qkv(), hidden),
        ("attention's output", hidden, sizes.heads.heads * sizes.heads.head_dim),
        ("gate and up", 2 * ffn, hidden),
        ("down", hidden, ffn),
        ("head", sizes.vocabulary, hidden),
    ];
    for (name, n, k) in matrices {
        let bytes = (n * k) as f64 * element;
        let copies = ((sizes.cold as f64 / bytes).ceil() as usize).clamp(1, 16);
        let weight = Weight::random(&mut bench.noise, n, k, format, 0.02);
        let all: Vec<Matrix> = (0..copies).map(|_| bench.ops.load_matrix(&[weight.source()], packed).unwrap()).collect();
        drop(weight);
        let table = bench.table(64, k, Format::Bf16);
        let is_head = n == sizes.vocabulary;
        // The head sees sampled rows only.
        let kind = if is_head { Rows::Samples } else { Rows::Tokens };
        let [source] = bench.token_buffers([k]);
        let [x, out] = [k, n].map(|width| bench.ops.alloc(kind, width).unwrap());
        let counts: &[usize] = match is_head {
            true => &[sizes.batches[0], 16, sizes.batches[1], sizes.batches[2]],
            false => &[sizes.batches[0], 16, sizes.batches[1], sizes.batches[2], sizes.chunk],
        };
        let most = if is_head { sizes.batches[2] } else { sizes.chunk };
        for &count in counts.iter().filter(|count| **count <= most) {
            let step = bench.any(count);
            let mut done = StepOutput::default();
            bench.ops.begin(&step).unwrap();
            match kind {
                Rows::Samples => {
                    bench.ops.embedding(table, source);
                    bench.ops.gather(source, x);
                }
                _ => bench.ops.embedding(table, x),
            }
            bench.ops.finish(&mut done).unwrap();
            let cost = Work { bytes: bytes + (count * (2 * k + 4 * n)) as f64, operations: 2.0 * (count * n * k) as f64 };
            bench.measure(&format!("linear {form}"), &format!("{name}, {count} × {k} × {n}"), &step, cost, |ops, i| {
                ops.linear(x, all[i % copies], None, out, Store::Replace);
            });
        }
    }
}

fn low_rank<D: Clock>(mut bench: Bench<'_, D>) {
    let sizes = bench.sizes;
    let (k, n, rank) = (sizes.hidden, sizes.qkv(), 16);
    let (a, b) = (bench.noise.values(rank * k, 0.02), bench.noise.values(n * rank, 0.02));
    for slot in 0..4 {
        bench.ops.load_adapter(slot, &[vec![LowRank { column: 0, n, k, rank, scale: 1.0, a: &a, b: &b }]]).unwrap();
    }
    let table = bench.table(64, k, Format::Bf16);
    let [x, out] = bench.token_buffers([k, n]);
    for count in sizes.batches.into_iter().chain([sizes.chunk]) {
        let mut step = bench.any(count);
        step.adapters = (0..count as u32).map(|row| row % 4).collect();
        let mut done = StepOutput::default();
        bench.ops.begin(&step).unwrap();
        bench.ops.embedding(table, x);
        bench.ops.finish(&mut done).unwrap();
        let cost = Work {
            bytes: (4 * (count.min(4) * rank * (n + k) + count * (k + 2 * n))) as f64,
            operations: 2.0 * (count * rank * (n + k)) as f64,
        };
        bench.measure("lora, rank 16, 4 adapters", &format!("q, k, v, {count} rows"), &step, cost, |ops, _| ops.lora(x, 0, out));
    }
}

fn decode<D: Clock>(bench: Bench<'_, D>, dtype: KvDtype) {
    let sizes = bench.sizes;
    let steps = sizes.batches.into_iter().flat_map(|rows| sizes.contexts.map(|context| (rows, context)));
    attention(bench, "decode", dtype, steps.collect(), |bench, rows, context| {
        (bench.decoding(rows, context), rows * context, (rows * context) as f64)
    });
}

fn prefill<D: Clock>(bench: Bench<'_, D>, name: &str) {
    let (rows, longest) = (bench.sizes.chunk, bench.sizes.contexts[2]);
    attention(bench, name, KvDtype::Bf16, vec![(rows, rows), (rows, longest)], |bench, rows, context| {
        // Pairs of a query and a key that it sees.
        let seen = (context - rows) * rows + rows * (rows + 1) / 2;
        (bench.prefill(rows, context), context, seen as f64)
    });
}

/// `make`: a step, the tokens of its cache, and its pairs of a query row and a key.
fn attention<D: Clock>(
    mut bench: Bench<'_, D>,
    name: &str,
    dtype: KvDtype,
    steps: Vec<(usize, usize)>,
    make: impl Fn(&mut Bench<'_, D>, usize, usize) -> (StepBatch, usize, f64),
) {
    let (sizes, spec) = (bench.sizes, bench.sizes.spec());
    let HeadShape { heads, kv_heads, head_dim } = sizes.heads;
    let table = bench.table(64, sizes.qkv(), Format::Bf16);
    let rope = bench.ops.load_rope(&vec![0.1; head_dim / 2], 1.0).unwrap();
    let [qkv, out] = bench.token_buffers([sizes.qkv(), heads * head_dim]);
    for (rows, context) in steps {
        let (step, tokens, pairs) = make(&mut bench, rows, context);
        let bytes = tokens * kv_heads * head_dim * 2 * dtype.bytes();
        let layers = (sizes.cold / bytes + 1).min(sizes.launches);
        let blocks = step.blocks.len().max(2);
        let kv = bench.ops.alloc_kv(KvSpec { layers, blocks, block_size: BLOCK, kv_heads, head_dim, dtype }).unwrap();
        bench.fill(kv, layers, blocks, table, qkv, rope);
        let mut done = StepOutput::default();
        bench.ops.begin(&step).unwrap();
        bench.ops.embedding(table, qkv);
        bench.ops.finish(&mut done).unwrap();
        let cost = Work { bytes: bytes as f64, operations: 4.0 * (heads * head_dim) as f64 * pairs };
        bench.measure(
            &format!("attention, {name}, {dtype:?}"),
            &format!("{rows} rows, context {context}"),
            &step,
            cost,
            |ops, i| {
                ops.paged_attention(qkv, sizes.heads, spec, kv, i % layers, out);
            },
        );
    }
}

fn sampling<D: Clock>(mut bench: Bench<'_, D>) {
    let sizes = bench.sizes;
    let table = bench.table(64, sizes.vocabulary, Format::Bf16);
    // As many rows as are sampled: logits of a whole step would not fit everywhere.
    let most = sizes.batches[2];
    let logits = bench.ops.alloc(Rows::Samples, sizes.vocabulary).unwrap();
    let [source] = bench.token_buffers([sizes.vocabulary]);
    for count in sizes.batches.into_iter().filter(|count| *count <= most) {
        for (name, temperature, top_p, top_k) in [("greedy", 0.0, 1.0, 0), ("top-k 50, top-p 0.9", 0.8, 0.9, 50)] {
            let mut step = bench.decoding(count, 1);
            for (i, sample) in step.samples.iter_mut().enumerate() {
                (sample.temperature, sample.top_p, sample.top_k, sample.counter) = (temperature, top_p, top_k, i as u64);
            }
            let mut done = StepOutput::default();
            bench.ops.begin(&step).unwrap();
            bench.ops.embedding(table, source);
            bench.ops.gather(source, logits);
            bench.ops.finish(&mut done).unwrap();
            let cost = Work { bytes: (count * sizes.vocabulary * 4) as f64, operations: 0.0 };
            bench.measure(&format!("sample, {name}"), &format!("{count} rows"), &step, cost, |ops, _| {
                ops.sample(logits, sizes.vocabulary);
            });
        }
    }
}
