//! Steps of a model on several ranks that are submitted before the one before them is collected: the same tokens, bit for bit, as one after
//! the other; and a rank that fails at any call ends all ranks soon, with everything given back. Ranks are threads on emulated cards.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::emulation::Emulated;
use crate::faulty::{Faulty, Fuse};
use crate::llama::Llama;
use tidemill_engine::model::Model;
use tidemill_engine::{ModelFiles, TensorParallel};
use tidemill_kernels::collective::Member;
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::random::uniform;
use tidemill_kernels::{
    KernelError, KvDtype, Limits, Ops, SampleRow, Sampled, SequenceSpan, StepBatch, StepOutput, WeightFormat,
};

const LIMITS: Limits = Limits { max_tokens: 48, max_samples: 8, max_positions: 64 };
const BLOCK: usize = 32;
/// Of a sequence.
const BLOCKS: usize = 2;
const MOST_SEQUENCES: usize = 5;

/// Who takes part in each step, and with how many rows.
type Script = Vec<Vec<(usize, usize)>>;

/// Random numbers by their place.
struct Noise(u64, u64);

impl Noise {
    fn below(&mut self, n: usize) -> usize {
        self.1 += 1;
        (uniform(self.0, self.1) * n as f64) as usize
    }
}

/// Prompts that come in one or several chunks beside others that decode, and sequences that sit out a step; at last nothing but decoding,
/// which is captured.
fn script(noise: &mut Noise, prompts: &[usize], mixed: usize, decoded: usize) -> Script {
    let mut left = prompts.to_vec();
    let mut script = Vec::new();
    for step in 0..mixed {
        let mut room = LIMITS.max_tokens;
        let mut here = Vec::new();
        for (i, left) in left.iter_mut().enumerate().take(1 + step / 2) {
            if noise.below(5) == 0 {
                continue;
            }
            let rows = if *left > 1 { (1 + noise.below(*left)).min(room.saturating_sub(8)) } else { 1 };
            if rows > 0 {
                *left = left.saturating_sub(rows);
                room -= rows;
                here.push((i, rows));
            }
        }
        if !here.is_empty() {
            script.push(here);
        }
    }
    let done: Vec<(usize, usize)> = left.iter().enumerate().filter(|(_, left)| **left == 0).map(|(i, _)| (i, 1)).collect();
    script.extend(std::iter::repeat_n(done, decoded));
    script
}

struct Sequence {
    tokens: Vec<u32>,
    computed: usize,
}

/// What was drawn in each step that was handed over.
type Drawn = Vec<Vec<Sampled>>;

/// Does the script, each step after the one before it or one step ahead. What is drawn for a sequence is its next token. On the way the first
/// sequence's blocks go to the machine's memory and come back elsewhere. Stops at the first error.
fn run(model: &mut TensorParallel, script: &Script, prompts: &[usize], ahead: bool) -> Result<Drawn, KernelError> {
    let vocabulary = model.vocabulary();
    let noise = &mut Noise(9, 0);
    let tokens = |len: usize, noise: &mut Noise| (0..len).map(|_| noise.below(vocabulary) as u32).collect();
    let mut list: Vec<Sequence> = prompts.iter().map(|&len| Sequence { tokens: tokens(len, noise), computed: 0 }).collect();
    // The last places are nobody's at first.
    let mut tables: Vec<usize> = (0..prompts.len()).collect();
    let mut all = Drawn::new();
    let mut under_way: Option<Vec<usize>> = None;
    for (index, step) in script.iter().enumerate() {
        let mut batch = StepBatch::default();
        if index == script.len() / 2 {
            let (from, to) = (tables[0] * BLOCKS, prompts.len() * BLOCKS);
            batch.saved = (0..BLOCKS).map(|i| ((from + i) as u32, (BLOCKS - 1 - i) as u32)).collect();
            batch.restored = (0..BLOCKS).map(|i| ((BLOCKS - 1 - i) as u32, (to + i) as u32)).collect();
            tables[0] = prompts.len();
        }
        let mut draws = Vec::new();
        for &(i, rows) in step {
            let (sequence, first) = (&mut list[i], tables[i] * BLOCKS);
            let (from, to) = (sequence.computed, sequence.computed + rows);
            let first_row = batch.tokens.len() as u32;
            batch.sequences.push(SequenceSpan {
                first_row,
                rows: rows as u32,
                context_len: to as u32,
                first_block: batch.blocks.len() as u32,
            });
            batch.blocks.extend((first..first + BLOCKS).map(|block| block as u32));
            batch.slots.extend((from..to).map(|position| (first * BLOCK + position) as i64));
            batch.positions.extend(from as u32..to as u32);
            if from == sequence.tokens.len() {
                let entry = under_way.as_ref().and_then(|drew| drew.iter().position(|by| *by == i)).unwrap();
                batch.carried.push((first_row, entry as u32));
                batch.tokens.push(0);
            } else {
                batch.tokens.extend_from_slice(&sequence.tokens[from..to]);
            }
            sequence.computed = to;
            if to >= sequence.tokens.len() {
                let (row, temperature) = (batch.tokens.len() as u32 - 1, if i % 2 == 0 { 0.0 } else { 0.8 });
                let (seed, counter) = (i as u64, to as u64);
                batch.samples.push(SampleRow { temperature, seed, counter, top_n: Some(2), ..SampleRow::greedy(row) });
                draws.push(i);
            }
        }
        let mut hand_over = |drew: &[usize], out: StepOutput| {
            assert_eq!(out.samples.len(), drew.len());
            drew.iter().zip(&out.samples).for_each(|(i, sampled)| list[*i].tokens.push(sampled.token));
            all.push(out.samples);
        };
        let mut out = StepOutput::default();
        if !ahead {
            model.forward(&batch, &mut out)?;
            hand_over(&draws, out);
            continue;
        }
        model.submit(&batch)?;
        if let Some(drew) = under_way.replace(draws) {
            model.collect(&mut out)?;
            hand_over(&drew, out);
        }
    }
    if under_way.is_some() {
        let mut out = StepOutput::default();
        model.collect(&mut out)?;
        all.push(out.samples);
    }
    Ok(all)
}

/// A model on ranks of a group, on devices that `open` makes.
fn shared_out(path: &Path, format: WeightFormat, ranks: usize, mut open: impl FnMut(Member) -> Box<dyn Ops>) -> TensorParallel {
    let files = ModelFiles::open(path).unwrap();
    let members = Member::group(ranks);
    let abort = members[0].abort_handle();
    let ranks = members.into_iter().enumerate().map(|(rank, member)| (format!("rank {rank}"), open(member))).collect();
    let mut model = TensorParallel::load(&files, ranks, abort, format, &mut |_, _| {}).unwrap();
    let dtype = if format == WeightFormat::F32 { KvDtype::F32 } else { KvDtype::Bf16 };
    model.alloc_kv(MOST_SEQUENCES * BLOCKS, BLOCK, dtype).unwrap();
    model.alloc_swap(BLOCKS).unwrap();
    assert!(model.runs_ahead());
    model
}

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

#[test]
fn steps_that_run_ahead_on_several_ranks_give_the_same_tokens() {
    for (case, (family, format, ranks)) in [
        ("llama", WeightFormat::Bf16, 2),
        ("qwen3", WeightFormat::Int8, 4),
        ("mixtral", WeightFormat::F32, 2),
        ("qwen2_moe", WeightFormat::Bf16, 4),
        ("qwen3_moe", WeightFormat::Fp8, 2),
    ]
    .into_iter()
    .enumerate()
    {
        let prompts = [30, 5, 38, 1];
        let script = script(&mut Noise(case as u64, 0), &prompts, 10, 6);
        let card = |captures: bool| {
            move |member| -> Box<dyn Ops> {
                let backend = CudaBackend::new(Emulated::of_group(member), LIMITS);
                Box::new(if captures { backend.capturing() } else { backend })
            }
        };
        let want = run(&mut shared_out(&golden(family), format, ranks, card(false)), &script, &prompts, false).unwrap();
        assert!(want.iter().flatten().count() > 30 && want.iter().flatten().all(|sampled| sampled.logprob.is_finite()));
        // What is captured is the question; that the rest runs ahead shows once.
        for captures in [false, true].into_iter().skip(usize::from(case > 0)) {
            let got = run(&mut shared_out(&golden(family), format, ranks, card(captures)), &script, &prompts, true).unwrap();
            assert!(got == want, "{family} as {format:?} on {ranks} ranks, captures {captures}");
        }
    }
}

/// A small model on two ranks that fail when their fuse says so, and what hears of each when it ends.
fn fused(path: &Path) -> (TensorParallel, Vec<Fuse>, Receiver<usize>) {
    let (ends, ended) = channel();
    let mut fuses = Vec::new();
    let model = shared_out(path, WeightFormat::Bf16, 2, |member| {
        let mut device = Emulated::of_group(member);
        device.ends = Some(ends.clone());
        let device = Faulty::new(device);
        fuses.push(device.fuse());
        Box::new(CudaBackend::new(device, LIMITS).capturing())
    });
    (model, fuses, ended)
}

#[test]
fn whatever_call_fails_on_a_rank_all_end_soon_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let small = Llama { layers: 1, hidden: 32, ffn: 64, heads: 2, kv_heads: 2, head_dim: 16, vocabulary: 300, positions: 64 };
    small.write(folder.path()).unwrap();
    let prompts = [9, 4];
    let script: Script = [vec![vec![(0, 9), (1, 4)]], vec![vec![(0, 1), (1, 1)]; 7]].concat();
    let want = run(&mut fused(folder.path()).0, &script, &prompts, true).unwrap();
    for failing in 0..2 {
        let (mut failures, mut slowest) = (0, Duration::ZERO);
        for after in 0.. {
            let (mut model, fuses, ended) = fused(folder.path());
            *fuses[failing].lock().unwrap() = Some(after);
            let begun = Instant::now();
            let outcome = run(&mut model, &script, &prompts, true);
            let reached = fuses[failing].lock().unwrap().is_none();
            match outcome {
                // What failed was a capture, without which all went on.
                Ok(drawn) => assert!(drawn == want, "rank {failing} after {after}"),
                Err(KernelError::Device(why)) => {
                    failures += 1;
                    assert!(why.starts_with(&format!("rank {failing}: ")), "after {after}: {why}");
                    let again = model.collect(&mut StepOutput::default()).unwrap_err().to_string();
                    assert!(again.contains(&why), "{again}");
                }
                Err(other) => panic!("rank {failing} after {after}: {other}"),
            }
            drop(model);
            for _ in 0..2 {
                let left = ended.recv_timeout(Duration::from_secs(20)).unwrap();
                assert_eq!(left, 0, "rank {failing} after {after}");
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "rank {failing} after {after}: {:?}", begun.elapsed());
            slowest = slowest.max(begun.elapsed());
            if !reached {
                assert!(after > 100, "only {after} calls");
                break;
            }
        }
        println!("rank {failing}: {failures} failures, at most {slowest:?} each");
        assert!(failures > 80, "{failures}");
    }
}
