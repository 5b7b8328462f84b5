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
        self.enqueue(batch)?;
        self.ops.finish(&mut StepOutput::default())?;
        self.ops.read(self.logits)
    }

    fn enqueue(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        let ops = &mut self.ops;
        ops.begin(batch)?;
        ops.embedding_shard(self.table, (ops.place().rank * PART) as u32, self.hidden);
        ops.all_reduce(self.hidden);
        ops.gather(self.hidden, self.last);
        ops.linear(self.last, self.table, None, self.part, Store::Replace);
        ops.all_gather(self.part, self.logits);
        Ok(())
    }

    /// A step that draws the likeliest token of each row, set going.
    fn submit(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.enqueue(batch)?;
        let vocabulary = self.ops.place().ranks * PART;
        self.ops.sample(self.logits, vocabulary);
        self.ops.submit()
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
    let outcomes = on_threads(ranks, |ops| {
        let mut table = Table::new(ops, &weight);
        let off = |(step, wanted): (&StepBatch, &Vec<f32>)| error(&table.forward(step).unwrap(), wanted);
        let worst = steps.iter().zip(&wanted).map(off).fold(0.0, f64::max);
        (worst, table.ops)
    });
    let worst = outcomes.iter().map(|(worst, _)| *worst).fold(0.0, f64::max);
    (worst, outcomes.into_iter().map(|(_, ops)| ops).collect())
}

/// What each rank makes of its backend, on a thread of its own.
fn on_threads<O: Send, T: Send>(ranks: Vec<O>, run: impl Fn(O) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|ops| scope.spawn(|| run(ops))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Steps that are begun while the one before them runs, so that the first rank draws tokens and tells them to the others: the tokens
/// that it draws, and those that steps one after the other give.
pub fn ahead<O: Backend>(ranks: Vec<O>) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    const STEPS: usize = 8;
    let noise = &mut Noise::new(77);
    let weight = Weight::random(noise, ranks.len() * PART, WIDTH, Format::F32, 1.0);
    let list: Vec<_> = (0..4).map(|block| sequence(noise, block, weight.n, BLOCK)).collect();
    let tokens = |out: &StepOutput| out.samples.iter().map(|sampled| sampled.token).collect::<Vec<u32>>();
    let batch = |list: &mut Vec<Sequence>, number: usize, known: Option<&Vec<u32>>| {
        if let Some(known) = known {
            list.iter_mut().zip(known).for_each(|(sequence, token)| sequence.tokens[sequence.computed] = *token);
        }
        // A prompt at first, then one token of each.
        self::step(list, if number == 0 { 5 } else { 1 })
    };
    let drawn = on_threads(ranks, |ops| {
        let (mut table, mut list) = (Table::new(ops, &weight), list.clone());
        let (mut out, mut all) = (StepOutput::default(), Vec::new());
        for number in 0..STEPS {
            let mut next = batch(&mut list, number, None);
            if number > 0 {
                // Whatever stands there is not what the row computes.
                next.tokens.fill(0);
                next.carried = (0..4).map(|row| (row, row)).collect();
            }
            table.submit(&next).unwrap();
            if number > 0 {
                table.ops.collect(&mut out).unwrap();
                all.push(tokens(&out));
            }
        }
        table.ops.collect(&mut out).unwrap();
        all.push(tokens(&out));
        all
    });
    let mut ops = Reference::new(LIMITS);
    let table = ops.load_matrix(&[weight.source()], WeightFormat::F32).unwrap();
    let (hidden, last) = (ops.alloc(Rows::Tokens, WIDTH).unwrap(), ops.alloc(Rows::Samples, WIDTH).unwrap());
    let logits = ops.alloc(Rows::Samples, weight.n).unwrap();
    let (mut list, mut out, mut wanted) = (list.clone(), StepOutput::default(), Vec::new());
    for number in 0..STEPS {
        ops.begin(&batch(&mut list, number, wanted.last())).unwrap();
        ops.embedding(table, hidden);
        ops.gather(hidden, last);
        ops.linear(last, table, None, logits, Store::Replace);
        ops.sample(logits, weight.n);
        ops.finish(&mut out).unwrap();
        wanted.push(tokens(&out));
    }
    (drawn.into_iter().next().unwrap(), wanted)
}
