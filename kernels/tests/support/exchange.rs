//! A model of a table and nothing else, of which each rank has a part: a step of it has every exchange.

use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

use super::backend::Backend;
use super::steps::{BLOCK, Sequence, append, greedy};
use super::{Noise, Weight, error};

pub const LIMITS: Limits = Limits { max_tokens: 40, max_samples: 9, max_positions: 100 };
const WIDTH: usize = 24;
/// Tokens of a rank's part of the table.
const PART: usize = 7;

pub fn sequence(noise: &mut Noise, block: u32, vocabulary: usize, len: usize) -> Sequence {
    let tokens = (0..len).map(|_| noise.below(vocabulary) as u32).collect();
    Sequence { tokens, table: vec![block], computed: 0 }
}

/// A step of the next `rows` tokens of each sequence, whose last is sampled.
pub fn step(sequences: &mut [Sequence], rows: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    for sequence in sequences {
        append(&mut batch, sequence, rows);
        batch.samples.push(greedy(batch.tokens.len() as u32 - 1));
    }
    batch
}

/// What comes out for a token are its products with all tokens.
pub struct Table<O: Ops> {
    pub ops: O,
    table: Matrix,
    hidden: Buf,
    last: Buf,
    part: Buf,
    logits: Buf,
}

impl<O: Backend> Table<O> {
    pub fn new(mut ops: O, weight: &Weight) -> Self {
        let Place { rank, ranks } = ops.place();
        let bytes = weight.data.len() / ranks;
        let data = &weight.data[rank * bytes..(rank + 1) * bytes];
        let part = MatrixSource { n: weight.n / ranks, data, ..weight.source() };
        Table {
            table: ops.load_matrix(&[part], WeightFormat::F32).unwrap(),
            hidden: ops.alloc_poisoned(Rows::Tokens, WIDTH),
            last: ops.alloc_poisoned(Rows::Samples, WIDTH),
            part: ops.alloc_poisoned(Rows::Samples, PART),
            logits: ops.alloc_poisoned(Rows::Samples, weight.n),
            ops,
        }
    }

    pub fn forward(&mut self, batch: &StepBatch) -> Result<Vec<f32>, KernelError> {
        let ops = &mut self.ops;
        ops.begin(batch)?;
        ops.embedding_shard(self.table, (ops.place().rank * PART) as u32, self.hidden);
        ops.all_reduce(self.hidden);
        ops.gather(self.hidden, self.last);
        ops.linear(self.last, self.table, None, self.part, Store::Replace);
        ops.all_gather(self.part, self.logits);
        ops.finish(&mut StepOutput::default())?;
        ops.read(self.logits)
    }
}

/// A prompt, then steps of one token each, of four sequences and of three; and of a whole table what they should give.
pub fn steps_and_logits(ranks: usize) -> (Weight, Vec<StepBatch>, Vec<Vec<f32>>) {
    let noise = &mut Noise::new(ranks as u64);
    let weight = Weight::random(noise, ranks * PART, WIDTH, Format::F32, 1.0);
    let mut list: Vec<_> = (0..4).map(|block| sequence(noise, block, weight.n, BLOCK)).collect();
    let mut steps = vec![step(&mut list, 9)];
    steps.extend((0..6).map(|_| step(&mut list, 1)));
    steps.extend((0..3).map(|_| step(&mut list[..3], 1)));
    let mut ops = Reference::new(LIMITS);
    let table = ops.load_matrix(&[weight.source()], WeightFormat::F32).unwrap();
    let (hidden, last) = (ops.alloc(Rows::Tokens, WIDTH).unwrap(), ops.alloc(Rows::Samples, WIDTH).unwrap());
    let logits = ops.alloc(Rows::Samples, weight.n).unwrap();
    let mut whole = |batch: &StepBatch| {
        ops.begin(batch).unwrap();
        ops.embedding(table, hidden);
        ops.gather(hidden, last);
        ops.linear(last, table, None, logits, Store::Replace);
        ops.finish(&mut StepOutput::default()).unwrap();
        ops.read(logits).unwrap()
    };
    let wanted = steps.iter().map(&mut whole).collect();
    (weight, steps, wanted)
}

/// The largest error of any rank in any step; each backend runs on a thread of its own.
pub fn worst_of<O: Backend>(ranks: Vec<O>) -> (f64, Vec<O>) {
    let (weight, steps, wanted) = steps_and_logits(ranks.len());
    let run = |ops: O| {
        let mut table = Table::new(ops, &weight);
        let off = |(step, wanted): (&StepBatch, &Vec<f32>)| error(&table.forward(step).unwrap(), wanted);
        let worst = steps.iter().zip(&wanted).map(off).fold(0.0, f64::max);
        (worst, table.ops)
    };
    let outcomes: Vec<(f64, O)> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|ops| scope.spawn(|| run(ops))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let worst = outcomes.iter().map(|(worst, _)| *worst).fold(0.0, f64::max);
    (worst, outcomes.into_iter().map(|(_, ops)| ops).collect())
}
