//! The same scenarios as in the tests of the emulated device, and decoders that only a card is fast enough for.

use std::collections::BTreeMap;

use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::*;

use super::clock::Clock;
use super::rates::Sizes;
use super::support::decoder::{self, Decoder, DecoderShape, DecoderWeights, Trial};
use super::support::scenarios::{self, LIMITS, Scenario, rows_in_company};
use super::support::steps::{ragged, sequences};
use super::support::{Noise, Weight, error, low_rank, sampling};

/// The cases of one operation.
#[derive(Default)]
struct Seen {
    cases: usize,
    worst: f64,
    allowed: f64,
    wrong: bool,
}

/// Rows of the table, in the order in which operations were first seen.
#[derive(Default)]
struct Rows {
    order: Vec<(String, &'static str)>,
    seen: BTreeMap<(String, &'static str), Seen>,
}

impl Rows {
    fn note(&mut self, operation: &str, against: &'static str, error: f64, allowed: f64) {
        let key = (operation.to_owned(), against);
        if !self.seen.contains_key(&key) {
            self.order.push(key.clone());
        }
        let seen = self.seen.entry(key).or_default();
        seen.cases += 1;
        seen.worst = seen.worst.max(error);
        seen.allowed = seen.allowed.max(allowed);
        seen.wrong |= error > allowed;
    }

    fn print(&self, row: &mut dyn FnMut(String)) {
        for key in &self.order {
            let Seen { cases, worst, allowed, wrong } = self.seen[key];
            let verdict = if wrong { "**wrong**" } else { "ok" };
            row(format!("| {} | {} | {cases} | {worst:.1e} | {allowed:.1e} | {verdict} |", key.0, key.1));
        }
    }
}

pub fn part<D: Clock>(
    open: impl Fn(Limits) -> CudaBackend<D>,
    what: &str,
    sizes: &Sizes,
    briefly: bool,
    row: &mut dyn FnMut(String),
) {
    // The tests of the emulated device take all of them.
    let every = if briefly { 9 } else { 1 };
    let mut rows = Rows::default();
    let mut agree = |scenarios: Vec<Scenario>| {
        for scenario in scenarios.into_iter().step_by(every) {
            let off = scenario.error(&mut open(scenario.limits), &scenario.wanted());
            if off > scenario.tolerance {
                eprintln!("{}, {}: {off:e}", scenario.operation, scenario.sizes);
            }
            rows.note(&scenario.operation, "reference", off, scenario.tolerance);
        }
    };
    match what {
        "rows" => agree(scenarios::rows()),
        "linears" => agree(scenarios::linears()),
        "attention" => {
            let all = [scenarios::attention(), scenarios::copies(), scenarios::long_contexts(), scenarios::prompts()];
            all.into_iter().for_each(agree);
        }
        "attention wgmma" => {
            let mut all: Vec<Scenario> =
                scenarios::prompts().into_iter().chain(scenarios::attention_in(KvDtype::Bf16, 2e-2)).collect();
            all.iter_mut().for_each(|scenario| scenario.operation.push_str(", wgmma"));
            agree(all);
        }
        "fp8 activations" => agree(scenarios::fp8_activations()),
        "fp8" => agree(scenarios::only_on_cards()),
        "low-rank" => agree(low_rank::scenarios()),
        "sampling" => {
            for case in (0..sampling::CASES).step_by(every) {
                let differs = sampling::difference(&sampling::drawn(&mut open(LIMITS), case), &sampling::wanted(case), 2e-5);
                if let Some(difference) = &differs {
                    eprintln!("sampling, case {case}:\n{difference}");
                }
                rows.note("sample", "reference", if differs.is_some() { f64::INFINITY } else { 0.0 }, 0.0);
            }
        }
        "company" => {
            let noise = &mut Noise::new(11);
            for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0].into_iter().step_by(every) {
                let weight = Weight::random(noise, 640, 128, format, 0.1);
                let run = |neighbours: usize| rows_in_company(&mut open(LIMITS), &weight, &[8, 1, 1], neighbours);
                let (alone, off) = (run(0), |same: bool| if same { 0.0 } else { f64::INFINITY });
                [1, 5].into_iter().for_each(|n| rows.note("a row, with other neighbours", "itself", off(run(n) == alone), 0.0));
            }
        }
        "decoders" => {
            for trial in Trial::all().step_by(every) {
                let off = trial.error(open(decoder::LIMITS), if briefly { 2 } else { usize::MAX });
                rows.note(&format!("a decoder, {}", trial.name), "reference", off, trial.tolerance);
            }
        }
        _ => large(&open, sizes, &mut rows),
    }
    rows.print(row);
}

/// Two layers of the size that is measured, in every form of weights, against the CPU backend.
fn large<D: Clock>(open: &dyn Fn(Limits) -> CudaBackend<D>, sizes: &Sizes, rows: &mut Rows) {
    let shape = DecoderShape {
        layers: 2,
        hidden: sizes.hidden,
        heads: sizes.heads,
        ffn: sizes.ffn,
        experts: None,
        vocabulary: sizes.vocabulary.min(8192),
        qk_norm: false,
        qkv_bias: false,
        spec: sizes.spec(),
    };
    let limits = Limits { max_tokens: 256, max_samples: 4, max_positions: sizes.contexts[1] };
    for (format, tolerance) in [(Format::Bf16, 4e-2), (Format::Q8_0, 6e-2), (Format::Q4_0, 6e-2)] {
        let weights = DecoderWeights::random(7, shape, format, format);
        let noise = &mut Noise::new(1);
        let blocks = 4 * sizes.contexts[1].div_ceil(32);
        let mut list = sequences(noise, 4, sizes.contexts[1], shape.vocabulary, blocks);
        let steps = ragged(noise, &mut list, limits.max_tokens);
        let steps = &steps[..steps.len().min(12)];
        let cpu = CpuBackend::new(CpuOptions { threads: 0, isa: None, limits }).unwrap();
        let want = Decoder::new(cpu, &weights, WeightFormat::Auto, blocks, KvDtype::Bf16).logits_of(steps);
        let got = Decoder::new(open(limits), &weights, WeightFormat::Auto, blocks, KvDtype::Bf16).logits_of(steps);
        for (got, want) in got.iter().zip(&want) {
            let what = format!("a step of 2 layers of the measured size, {format:?}");
            rows.note(&what, "CPU backend", error(got, want), tolerance);
        }
    }
}
