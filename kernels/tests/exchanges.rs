//! What ranks exchange in a step, on the scalar reference and on emulated devices, each rank on a thread of its own: that all have the
//! same, captured or not, and that one that fails or refuses leaves the others neither waiting nor with other numbers.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

mod support;

use support::backend::Backend;
use support::emulation::Emulated;
use support::faulty::Faulty;
use support::steps::{BLOCK, Sequence, append, greedy};
use support::{Noise, Weight};
use tidemill_kernels::collective::Member;
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

const LIMITS: Limits = Limits { max_tokens: 40, max_samples: 9, max_positions: 100 };
const WIDTH: usize = 24;
/// Tokens of a rank's part of the table.
const PART: usize = 7;

/// What `work` gives on each rank.
fn each<T: Send>(ranks: usize, work: impl Fn(Member) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = Member::group(ranks).into_iter().map(|member| scope.spawn(|| work(member))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn sequence(noise: &mut Noise, block: u32, vocabulary: usize, len: usize) -> Sequence {
    let tokens = (0..len).map(|_| noise.below(vocabulary) as u32).collect();
    Sequence { tokens, table: vec![block], computed: 0 }
}

/// A step of the next `rows` tokens of each sequence, whose last is sampled.
fn step(sequences: &mut [Sequence], rows: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    for sequence in sequences {
        append(&mut batch, sequence, rows);
        batch.samples.push(greedy(batch.tokens.len() as u32 - 1));
    }
    batch
}

/// A model of a table and nothing else: what comes out for a token are its products with all tokens.
struct Table<O: Ops> {
    ops: O,
    table: Matrix,
    hidden: Buf,
    last: Buf,
    part: Buf,
    logits: Buf,
}

impl<O: Backend> Table<O> {
    fn new(mut ops: O, weight: &Weight) -> Self {
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

    fn forward(&mut self, batch: &StepBatch) -> Result<Vec<f32>, KernelError> {
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
fn steps_and_logits(ranks: usize) -> (Weight, Vec<StepBatch>, Vec<Vec<f32>>) {
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

fn agree<O: Backend>(ranks: usize, open: impl Fn(Member) -> O + Sync) -> Vec<O> {
    let (weight, steps, wanted) = steps_and_logits(ranks);
    each(ranks, |member| {
        let rank = member.place().rank;
        let mut table = Table::new(open(member), &weight);
        for (i, (step, wanted)) in steps.iter().zip(&wanted).enumerate() {
            let off = support::error(&table.forward(step).unwrap(), wanted);
            assert!(off < 1e-6, "rank {rank} of {ranks}, step {i}: {off:e}");
        }
        table.ops
    })
}

#[test]
fn parts_of_a_table_are_a_whole_one() {
    for ranks in [1, 2, 3, 4] {
        agree(ranks, |member| Reference::of_group(LIMITS, member));
        agree(ranks, |member| CudaBackend::new(Emulated::of_group(member), LIMITS));
    }
}

#[test]
fn captured_exchanges_are_replayed_on_every_rank() {
    for ranks in [2, 4] {
        let backends = agree(ranks, |member| CudaBackend::new(Emulated::of_group(member), LIMITS).capturing());
        let replays: Vec<usize> = backends.iter().map(|backend| backend.device().replays).collect();
        assert!(replays.iter().all(|count| *count >= 4 && *count == replays[0]), "{replays:?}");
    }
}

/// A rank whose captures are refused.
fn refusing(member: Member) -> Faulty<Emulated> {
    let refuses = member.place().rank == 1;
    let mut device = Faulty::new(Emulated::of_group(member));
    device.refuses = refuses;
    device
}

#[test]
fn where_one_rank_refuses_a_capture_none_replays() {
    let backends = agree(2, |member| CudaBackend::new(refusing(member), LIMITS).capturing());
    assert!(backends.iter().all(|backend| backend.device().inner().replays == 0));
}

#[test]
fn a_rank_that_fails_ends_the_step_of_all() {
    let (weight, steps, _) = steps_and_logits(3);
    let mut failed = 0;
    for after in 0..40 {
        let outcomes = each(3, |member| {
            let (rank, abort) = (member.place().rank, member.abort_handle());
            let device = Faulty::new(Emulated::of_group(member));
            let mut table = Table::new(CudaBackend::new(device, LIMITS).capturing(), &weight);
            if rank == 1 {
                table.ops.device().fail_after(after);
            }
            let outcome = steps.iter().try_for_each(|step| table.forward(step).map(|_| ()));
            if outcome.is_err() {
                abort.abort("a rank failed");
            }
            outcome.map_err(|error| error.to_string())
        });
        match &outcomes[1] {
            Err(first) => {
                assert!(!first.contains("broken off"), "failure after {after}: {first}");
                assert!(outcomes.iter().all(Result::is_err), "failure after {after}: {outcomes:?}");
                failed += 1;
            }
            // What failed was a capture, without which all went on.
            Ok(()) => assert!(outcomes.iter().all(Result::is_ok), "failure after {after}: {outcomes:?}"),
        }
    }
    assert!(failed > 30, "{failed}");
}

#[test]
fn an_exchange_that_does_not_fit_is_named() {
    let mut ops = CudaBackend::new(Emulated::default(), LIMITS);
    let (x, out) = (ops.alloc_poisoned(Rows::Samples, 3), ops.alloc_poisoned(Rows::Samples, 4));
    let batch = step(&mut [sequence(&mut Noise::new(1), 0, 5, 4)], 2);
    ops.begin(&batch).unwrap();
    ops.all_gather(x, out);
    let error = ops.finish(&mut StepOutput::default()).unwrap_err().to_string();
    assert!(error.contains("all_gather") && error.contains("should be 3"), "{error}");
}
