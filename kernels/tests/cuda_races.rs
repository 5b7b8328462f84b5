//! Threads of the CUDA kernels neither race nor depend on the order in which they run, and who leaves out a barrier hears of it. The
//! kernels are emulated on the host, where every access to memory is watched (`kernels/emulation/races.cpp`).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first error; the lint knows test functions only")]

use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::support::emulation::Emulated;
use crate::support::scenarios::{self, LIMITS, Scenario};
use crate::support::{Noise, experts, low_rank, sampling};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::{HEADER, Source};
use tidemill_kernels::cuda::train::{DeviceCompute, LogProbs, Product, Region};
use tidemill_kernels::train::{Attention, Pieces, Precision, Span};
use tidemill_kernels::*;

/// Work for the kernels of a file, and the bits that come of it.
struct Work {
    what: String,
    run: Box<dyn Fn(Emulated) -> Vec<u32>>,
}

fn of_scenario(scenario: Scenario) -> Work {
    let what = format!("{}, {}", scenario.operation, scenario.sizes);
    Work { what, run: Box::new(move |device| scenario.bits(&mut CudaBackend::new(device, scenario.limits))) }
}

fn rounding(scenario: Scenario) -> Work {
    let what = format!("{}, {}", scenario.operation, scenario.sizes);
    let ops = |device, limits| CudaBackend::new(device, limits).with_activations(Activations::Fp8).unwrap();
    Work { what, run: Box::new(move |device| scenario.bits(&mut ops(device, scenario.limits))) }
}

fn training(what: &str, precision: Precision, run: impl Fn(&mut DeviceCompute) -> Vec<Region> + 'static) -> Work {
    let what = format!("{what}, {precision:?}");
    let all = move |device| {
        let compute = &mut DeviceCompute::new(Box::new(device), precision);
        let regions = run(compute);
        regions.iter().flat_map(|region| compute.download(region.all()).unwrap()).map(f32::to_bits).collect()
    };
    Work { what, run: Box::new(all) }
}

/// Steps of every kernel that are small: watched threads are slow.
fn works(source: Source) -> Vec<Work> {
    let some = |all: Vec<Scenario>, which: &[usize]| -> Vec<Work> {
        let kept = all.into_iter().enumerate().filter(|(i, _)| which.contains(i));
        kept.map(|(_, scenario)| of_scenario(scenario)).collect()
    };
    match source {
        // Heads of 80 and 6 elements: lanes read what others rotate.
        Source::Rows => [
            some(scenarios::rows(), &[0, 1, 2, 3, 41, 43]),
            some(scenarios::copies(), &[0]),
            some(scenarios::brief_attention(), &[1, 2]),
        ]
        .into_iter()
        .flatten()
        .collect(),
        Source::Linear => some(scenarios::linears(), &[0, 5, 10, 14, 20]),
        Source::Lora => some(low_rank::scenarios(), &[1]),
        Source::Attention => some(scenarios::brief_attention(), &[0, 1, 2, 3, 4]),
        // Its copies and products are done by whoever waits for them, with checks of their own (`kernels/emulation/hopper.h`).
        Source::AttentionHopper => Vec::new(),
        Source::Fp8 => scenarios::fp8_activations().into_iter().map(rounding).collect(),
        Source::Sampling => (0..6).map(sampled).collect(),
        Source::Moe => [some(experts::scenarios(), &[0, 7, 10, 13, 24]), some(experts::many_choices(), &[0, 3])]
            .into_iter()
            .flatten()
            .collect(),
        Source::Train => {
            let both = [Precision::F32, Precision::Bf16].into_iter();
            both.flat_map(|precision| [multiplied(precision), attended(precision)]).collect()
        }
        Source::TrainRows => vec![walked(), normed()],
    }
}

fn sampled(case: u64) -> Work {
    let bits = move |device| {
        let drawn = sampling::drawn(&mut CudaBackend::new(device, LIMITS), case);
        let row = |s: &Sampled| {
            let top = s.top.iter().chain(&s.processed_top).flat_map(|(token, logprob)| [*token, logprob.to_bits()]);
            [s.token, s.rank, s.logprob.to_bits(), s.processed_logprob.to_bits()].into_iter().chain(top).collect::<Vec<_>>()
        };
        drawn.iter().flat_map(row).collect()
    };
    Work { what: format!("sampling {case}"), run: Box::new(bits) }
}

fn multiplied(precision: Precision) -> Work {
    training("products", precision, |compute| {
        let noise = &mut Noise::new(1);
        let (m, n, k) = (37, 70, 40);
        let (left, right) =
            (compute.upload(&noise.values(m * k, 1.0)).unwrap(), compute.upload(&noise.values(n * k, 1.0)).unwrap());
        let out = compute.zeros(m * n).unwrap();
        let (left, right) = (left.all().columns(m), right.all().rows(n));
        compute.matmul(&Product { m, n, k, left, right, scale: 1.0, store: Store::Replace }, out.all(), n).unwrap();
        vec![out]
    })
}

fn attended(precision: Precision) -> Work {
    training("attention", precision, |compute| {
        let noise = &mut Noise::new(2);
        let shape = HeadShape { heads: 2, kv_heads: 1, head_dim: 40 };
        let spans = [Span { first: 0, len: 40, prefix: None }, Span { first: 40, len: 9, prefix: Some(0) }];
        let positions: Vec<u32> = (0..49).collect();
        let spec = AttentionSpec { scale: 0.2, sliding_window: Some(30), soft_cap: None, alibi: None };
        let call = Attention { spans: &spans, positions: &positions, shape, spec };
        let seen = compute.seen(&spans, &positions, shape).unwrap();
        let [qkv, dout] = [160, 80].map(|width| compute.upload(&noise.values(49 * width, 1.0)).unwrap());
        let [out, lse, dqkv] = [80, 2, 160].map(|width| compute.zeros(49 * width).unwrap());
        compute.attention(&call, &seen, qkv.all(), out.all(), lse.all()).unwrap();
        compute.attention_back(&call, &seen, [qkv.all(), out.all(), lse.all(), dout.all()], dqkv.all()).unwrap();
        vec![out, lse, dqkv]
    })
}

fn walked() -> Work {
    training("log-probabilities", Precision::F32, |compute| {
        let noise = &mut Noise::new(3);
        let (rows, width, vocabulary) = (3, 24, 300);
        let [hidden, head] = [rows, vocabulary].map(|lines| compute.upload(&noise.values(lines * width, 1.0)).unwrap());
        let [out, sums] = [0; 2].map(|_| compute.zeros(rows).unwrap());
        let [slopes, dhead] = [rows, vocabulary].map(|lines| compute.zeros(lines * width).unwrap());
        let dout = compute.upload(&noise.values(rows, 1.0)).unwrap();
        let call = LogProbs {
            hidden: hidden.all(),
            width,
            head: head.all().rows(width),
            vocabulary,
            tokens: &[0, 299, 128],
            scale: 0.8,
        };
        compute.log_probs(call, out.all(), sums.all(), Some(slopes.all())).unwrap();
        compute.log_probs_back_head(call, sums.all(), dout.all(), dhead.all()).unwrap();
        vec![out, sums, slopes, dhead]
    })
}

fn normed() -> Work {
    training("norms", Precision::F32, |compute| {
        let noise = &mut Noise::new(4);
        let pieces = Pieces { stride: 53, offset: 4, count: 3, width: 16 };
        let [x, dy] = [0; 2].map(|_| compute.upload(&noise.values(43 * 53, 1.0)).unwrap());
        let [weight, dweight] = [0; 2].map(|_| compute.upload(&noise.values(16, 1.0)).unwrap());
        let [out, inverse, dx] = [43 * 53, 129, 43 * 53].map(|len| compute.zeros(len).unwrap());
        compute.rms_norm(x.all(), pieces, weight.all(), 1e-5, out.all(), inverse.all()).unwrap();
        let given = [x.all(), weight.all(), inverse.all(), dy.all()];
        compute.rms_norm_back(given, pieces, dx.all(), Store::Add).unwrap();
        compute.rms_norm_back_weight([x.all(), inverse.all(), dy.all()], pieces, dweight.all()).unwrap();
        vec![out, inverse, dx, dweight]
    })
}

/// Barriers in the text of a file and in what it is compiled after: file and line.
fn barriers(source: Source) -> Vec<(String, u32)> {
    let text = format!("#line 1 \"device.cuh\"\n{HEADER}\n#line 1 \"{}\"\n{}", source.name(), source.text());
    let (mut file, mut line, mut all) = (String::new(), 0, Vec::new());
    for words in text.lines() {
        line += 1;
        if let Some(name) = words.strip_prefix("#line 1 ") {
            (file, line) = (name.trim_matches('"').to_owned(), 0);
        } else if ["block_barrier();", "warp_barrier();"].iter().any(|call| words.contains(call)) && !words.starts_with("DEVICE")
        {
            all.push((file.clone(), line));
        }
    }
    all
}

/// What went wrong.
fn outcome(work: &Work, device: Emulated) -> Result<Vec<u32>, String> {
    catch_unwind(AssertUnwindSafe(|| (work.run)(device))).map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(other) => format!("{:?}", other.downcast_ref::<&str>()),
    })
}

fn neither_race_nor_depend_on_an_order(source: Source) {
    for work in works(source) {
        let want = outcome(&work, Emulated::checked(0)).unwrap_or_else(|text| panic!("{source:?}, {}: {text}", work.what));
        for order in [0, 1, 2, 77] {
            let got = (work.run)(Emulated::in_order(order));
            assert!(got == want, "{source:?}, {}: order {order} gives other bits", work.what);
        }
    }
}

fn every_barrier_is_missed(source: Source) {
    let works = works(source);
    let mut unmissed = Vec::new();
    for (file, line) in barriers(source) {
        // Functions of the header meet at barriers in any file; all of them are called in this one.
        if file == "device.cuh" && source != Source::Sampling {
            continue;
        }
        let found = works.iter().any(|work| {
            let mut device = Emulated::checked(0);
            device.left_out = Some((CString::new(file.as_str()).unwrap(), line));
            outcome(work, device).is_err_and(|text| text.contains("race: "))
        });
        if !found {
            unmissed.push(format!("{file}:{line}"));
        }
    }
    assert!(unmissed.is_empty(), "nothing is found without the barriers at {unmissed:?}: no work needs them, or nobody does");
}

#[test]
fn blocks_that_write_what_others_read_are_found_in_any_order() {
    // Each block alone does nothing wrong: 256 elements are copied to behind themselves.
    let copied = training("a copy onto itself", Precision::F32, |compute| {
        let all = compute.upload(&[1.0; 768]).unwrap();
        compute.copy(all.part(0..512), all.part(256..768)).unwrap();
        vec![all]
    });
    for (order, found) in [(0, "another block wrote"), (1, "another block reads")] {
        let text = outcome(&copied, Emulated::checked(order)).unwrap_err();
        assert!(text.contains("race: kernel train_copy") && text.contains(found), "{text}");
    }
    assert!(outcome(&copied, Emulated::in_order(0)).is_ok());
}

macro_rules! for_each_file {
    ($($name:ident $source:ident)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn threads_neither_race_nor_depend_on_an_order() {
                neither_race_nor_depend_on_an_order(Source::$source);
            }

            #[test]
            fn a_barrier_that_is_left_out_is_missed() {
                every_barrier_is_missed(Source::$source);
            }
        }
    )*};
}

for_each_file! {
    of_rows Rows of_linear Linear of_lora Lora of_attention Attention of_sampling Sampling of_moe Moe of_fp8 Fp8 of_train Train of_train_rows TrainRows
}
