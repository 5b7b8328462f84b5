//! The same scenarios as in the tests of the emulated device, and decoders that only a card is fast enough for.

use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::Device;
use tidemill_kernels::cuda::train::DeviceCompute;
use tidemill_kernels::*;

use super::cases::Cases;
use super::clock::Clock;
use super::rates::Sizes;
use super::support::decoder::{self, Decoder, DecoderShape, DecoderWeights, Trial};
use super::support::scenarios::{self, LIMITS, Scenario, rows_in_company};
use super::support::steps::{ragged, sequences};
use super::support::{Noise, Weight, error, experts, low_rank, sampling, serving, training};

pub fn part<D: Clock>(open: impl Fn(Limits) -> CudaBackend<D>, what: &str, sizes: &Sizes, briefly: bool, cases: &mut Cases) {
    // The tests of the emulated device take all of them.
    let every = if briefly { 9 } else { 1 };
    let mut agree = |scenarios: Vec<Scenario>| {
        for scenario in scenarios.into_iter().step_by(every) {
            if !cases.take(&format!("{}, {}", scenario.operation, scenario.sizes)) {
                continue;
            }
            let off = scenario.error(&mut open(scenario.limits), &scenario.wanted());
            cases.seen(&scenario.operation, "reference", off, scenario.tolerance);
        }
    };
    match what {
        "rows" => agree(scenarios::rows()),
        "linears" => agree(scenarios::linears()),
        "attention" => {
            let all = [
                scenarios::attention(),
                scenarios::copies(),
                scenarios::long_contexts(),
                scenarios::prompts(),
                scenarios::prompts_behind_long_contexts(KvDtype::Bf16),
            ];
            all.into_iter().for_each(agree);
        }
        "attention wgmma" => {
            let mut all: Vec<Scenario> =
                scenarios::prompts().into_iter().chain(scenarios::attention_in(KvDtype::Bf16, 2e-2)).collect();
            all.extend(scenarios::prompts_behind_long_contexts(KvDtype::Bf16));
            all.iter_mut().for_each(|scenario| scenario.operation.push_str(", wgmma"));
            agree(all);
        }
        "fp8 activations" => agree(scenarios::fp8_activations()),
        "fp8" => agree(scenarios::only_on_cards()),
        "low-rank" => agree(low_rank::scenarios()),
        "experts" => [experts::scenarios(), experts::gates()].into_iter().for_each(agree),
        "sampling" => {
            for case in (0..sampling::CASES).step_by(every) {
                if !cases.take(&format!("sample, {case}")) {
                    continue;
                }
                let differs = sampling::difference(&sampling::drawn(&mut open(LIMITS), case), &sampling::wanted(case), 2e-5);
                if let Some(difference) = &differs {
                    eprintln!("sampling, case {case}:\n{difference}");
                }
                cases.seen("sample", "reference", if differs.is_some() { f64::INFINITY } else { 0.0 }, 0.0);
            }
        }
        "company" => {
            let noise = &mut Noise::new(11);
            for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0].into_iter().step_by(every) {
                let taken = cases.take(&format!("a row, with other neighbours, {format:?}"));
                let weight = Weight::random(noise, 640, 128, format, 0.1);
                let run = |neighbours: usize| rows_in_company(&mut open(LIMITS), &weight, &[8, 1, 1], neighbours);
                if !taken {
                    continue;
                }
                let (alone, off) = (run(0), |same: bool| if same { 0.0 } else { f64::INFINITY });
                [1, 5].into_iter().for_each(|n| cases.seen("a row, with other neighbours", "itself", off(run(n) == alone), 0.0));
            }
        }
        "decoders" => {
            for trial in Trial::all().step_by(every) {
                let name = format!("a decoder, {}", trial.name);
                if cases.take(&name) {
                    let off = trial.error(open(decoder::LIMITS), if briefly { 2 } else { usize::MAX });
                    cases.seen(&name, "reference", off, trial.tolerance);
                }
            }
        }
        "captures" => captures(&open, cases),
        _ => large(&open, sizes, cases),
    }
}

/// Steps that are captured and replayed, begun before the one before them is collected, with an adapter and with blocks that go to the machine's
/// memory and come back: the same as without captures, bit for bit.
fn captures<D: Clock>(open: &dyn Fn(Limits) -> CudaBackend<D>, cases: &mut Cases) {
    let decoder = |captures: bool| {
        let ops = open(serving::LIMITS);
        serving::decoder(if captures { ops.capturing() } else { ops })
    };
    let mut want = None;
    for (name, ahead) in [("captured steps", false), ("captured steps, one ahead", true)] {
        if !cases.take(name) {
            continue;
        }
        let want = want.get_or_insert_with(|| serving::serve(&mut decoder(false), false).unwrap());
        let mut decoder = decoder(true);
        let got = serving::serve(&mut decoder, ahead).unwrap();
        let (replayed, refused) = decoder.ops.captures();
        assert!(refused.is_none(), "a capture was refused: {}", refused.map_or(String::new(), ToString::to_string));
        assert!(replayed > 0, "nothing was replayed");
        cases.seen(name, "steps that are not", if got == *want { 0.0 } else { f64::INFINITY }, 0.0);
    }
}

/// The operations of training against the processor's; an error is a share of what is allowed.
pub fn training(open: &dyn Fn() -> Box<dyn Device>, cases: &mut Cases) {
    for (name, run) in training::ALL {
        if cases.take(name) {
            run(&|precision, _| DeviceCompute::new(open(), precision));
            cases.seen(name, "CPU backend", training::worst(), 1.0);
        }
    }
}

/// Two layers of the size that is measured, in every form of weights, against the CPU backend.
fn large<D: Clock>(open: &dyn Fn(Limits) -> CudaBackend<D>, sizes: &Sizes, cases: &mut Cases) {
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
        let what = format!("steps of 2 layers of the measured size, {format:?}");
        if !cases.take(&what) {
            continue;
        }
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
            cases.seen(&what, "CPU backend", error(got, want), tolerance);
        }
    }
}
