//! A whole decoder: the CPU backend on every instruction path, and the CUDA backend with emulated kernels, against the scalar reference.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

mod support;

use support::decoder::{Decoder, DecoderShape, DecoderWeights};
use support::emulation::Emulated;
use support::steps::{ragged, sequences};
use support::{Noise, error};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::isa::Isa;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

const LIMITS: Limits = Limits { max_tokens: 96, max_samples: 8, max_positions: 256 };

fn shapes() -> Vec<DecoderShape> {
    let spec = |head_dim: usize| AttentionSpec { scale: 1.0 / (head_dim as f32).sqrt(), sliding_window: None, soft_cap: None };
    vec![
        DecoderShape {
            layers: 2,
            hidden: 96,
            heads: HeadShape { heads: 6, kv_heads: 2, head_dim: 64 },
            ffn: 160,
            vocabulary: 301,
            qk_norm: false,
            qkv_bias: false,
            spec: spec(64),
        },
        DecoderShape {
            layers: 2,
            hidden: 128,
            heads: HeadShape { heads: 4, kv_heads: 4, head_dim: 80 },
            ffn: 96,
            vocabulary: 257,
            qk_norm: true,
            qkv_bias: true,
            spec: AttentionSpec { sliding_window: Some(40), soft_cap: Some(30.0), ..spec(80) },
        },
    ]
}

fn cpu(isa: Isa, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, isa: Some(isa), limits: LIMITS }).unwrap()
}

#[test]
fn logits_agree_with_the_reference_on_every_path() {
    // f32 weights and cache must agree to rounding; 8- and 4-bit grids and bf16 products to theirs.
    let cases = [
        (Format::F32, WeightFormat::F32, KvDtype::F32, 2e-4),
        (Format::Bf16, WeightFormat::Auto, KvDtype::Bf16, 4e-2),
        (Format::Q8_0, WeightFormat::Auto, KvDtype::Bf16, 6e-2),
        (Format::Q4_0, WeightFormat::Auto, KvDtype::F32, 6e-2),
    ];
    for (case, shape) in shapes().into_iter().enumerate() {
        for (format, packed, dtype, tolerance) in cases {
            let weights = DecoderWeights::random(7, shape, format, format);
            let mut oracle = Decoder::new(Reference::new(LIMITS), &weights, packed, 48, dtype);
            let noise = &mut Noise::new(case as u64);
            let mut list = sequences(noise, 5, 150, shape.vocabulary, 48);
            let steps = ragged(noise, &mut list, LIMITS.max_tokens);
            let mut want = Vec::new();
            for step in &steps {
                oracle.forward(step, &mut StepOutput::default()).unwrap();
                want.push(oracle.ops.read(oracle.logits).unwrap());
            }
            let what = |backend: &str| format!("shape {case} {format:?} {dtype:?} {backend}");
            for isa in Isa::available() {
                let mut decoder = Decoder::new(cpu(isa, 2), &weights, packed, 48, dtype);
                compare(&what(isa.name()), &mut decoder, &steps, &want, tolerance);
            }
            let cuda = CudaBackend::new(Emulated::default(), LIMITS);
            // Emulated threads are slow: the first steps have prefill and decode together.
            compare(
                &what("CUDA"),
                &mut Decoder::new(cuda, &weights, packed, 48, dtype),
                &steps[..4.min(steps.len())],
                &want,
                tolerance,
            );
        }
    }
}

fn compare<O: Ops>(what: &str, decoder: &mut Decoder<O>, steps: &[StepBatch], want: &[Vec<f32>], tolerance: f64) {
    let mut out = StepOutput::default();
    for (i, (step, want)) in steps.iter().zip(want).enumerate() {
        decoder.forward(step, &mut out).unwrap();
        assert_eq!(out.samples.len(), step.samples.len());
        let off = error(&decoder.ops.read(decoder.logits).unwrap(), want);
        assert!(off < tolerance, "{what} step {i}: {off:e}");
    }
}
