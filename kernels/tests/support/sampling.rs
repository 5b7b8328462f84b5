//! Random rows to be sampled, with everything that can be asked of one.

use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

use super::backend::Backend;
use super::scenarios::{LIMITS, plain_step};
use super::{Noise, Weight};

pub const CASES: u64 = 60;

/// Tokens: in some cases more than a block of threads reads at once.
fn vocabulary(case: u64) -> usize {
    if case % 10 == 9 { 9_001 } else { 700 }
}

/// What the reference draws.
pub fn wanted(case: u64) -> Vec<Sampled> {
    drawn(&mut Reference::new(LIMITS), case)
}

/// What a backend draws.
pub fn drawn(ops: &mut dyn Backend, case: u64) -> Vec<Sampled> {
    let noise = &mut Noise::new(1000 + case);
    let vocabulary = vocabulary(case);
    let width = vocabulary + 12;
    let table = if case % 5 == 4 {
        // Wide apart, and many of them equal.
        let halves: Vec<f32> = noise.values(9 * width, 4.0).into_iter().map(|v| (v * 2.0).round() / 2.0).collect();
        ops.load_matrix(&[Weight::from_f32(width, &halves).source()], WeightFormat::F32).unwrap()
    } else {
        ops.load_table(noise, 9, width)
    };
    let x = ops.alloc_poisoned(Rows::Tokens, width);
    let logits = ops.alloc_poisoned(Rows::Samples, width);
    let mut step = plain_step(noise, 6, 9);
    step.samples.truncate(noise.between(1, 9));
    for sample in &mut step.samples {
        sample.score = (noise.unit() < 0.2).then(|| noise.below(vocabulary) as u32);
        sample.temperature = noise.pick(&[0.0, 0.3, 1.0, 1.7]);
        sample.top_k = noise.pick(&[0, 1, 5, 50, 5000]);
        sample.top_p = noise.pick(&[1.0, 0.95, 0.5, 0.01]);
        sample.min_p = noise.pick(&[0.0, 0.05, 0.3]);
        sample.repetition_penalty = noise.pick(&[1.0, 1.3]);
        sample.presence_penalty = noise.pick(&[0.0, 0.5]);
        sample.frequency_penalty = noise.pick(&[0.0, 0.7]);
        (sample.seed, sample.counter) = (noise.below(1000) as u64, noise.below(1000) as u64);
        sample.top_n = noise.pick(&[None, Some(0), Some(4)]);
        let (history, bias) = (step.history.len() as u32, step.bias.len() as u32);
        for _ in 0..noise.below(20) {
            let token = noise.below(vocabulary) as u32;
            step.history.push(TokenCount { token, in_prompt: noise.unit() < 0.5, generated: noise.below(3) as u32 });
        }
        for _ in 0..noise.below(4) {
            step.bias.push((noise.below(vocabulary) as u32, noise.pick(&[f32::NEG_INFINITY, 5.0, -3.0, 100.0])));
        }
        sample.history = history..step.history.len() as u32;
        sample.bias = bias..step.bias.len() as u32;
    }
    ops.begin(&step).unwrap();
    ops.embedding(table, x);
    ops.gather(x, logits);
    ops.sample(logits, vocabulary);
    ops.run().samples
}

/// Where two lists differ: tokens and ranks are equal, log-probabilities to `tolerance`.
pub fn difference(got: &[Sampled], want: &[Sampled], tolerance: f32) -> Option<String> {
    let close = |a: f32, b: f32| a == b || (a - b).abs() < tolerance;
    let same =
        |a: &[(u32, f32)], b: &[(u32, f32)]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && close(a.1, b.1));
    let agree = |got: &Sampled, want: &Sampled| {
        (got.token, got.rank) == (want.token, want.rank)
            && close(got.logprob, want.logprob)
            && close(got.processed_logprob, want.processed_logprob)
            && same(&got.top, &want.top)
            && same(&got.processed_top, &want.processed_top)
    };
    if got.len() != want.len() {
        return Some(format!("{} rows for {}", got.len(), want.len()));
    }
    got.iter().zip(want).find(|(got, want)| !agree(got, want)).map(|(got, want)| format!("{got:?}\n{want:?}"))
}
