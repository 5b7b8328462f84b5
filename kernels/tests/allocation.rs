//! A step allocates nothing once the first ones of its kind have run.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use support::Noise;
use support::decoder::{Decoder, DecoderShape, DecoderWeights};
use support::steps::{ragged, sequences};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::isa::Isa;
use tidemill_kernels::*;

/// Counts what any thread asks for.
struct Counting;

static ASKED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ASKED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_allocate_nothing_after_the_first_round() {
    let limits = Limits { max_tokens: 96, max_samples: 8, max_positions: 256 };
    let shape = DecoderShape {
        layers: 2,
        hidden: 96,
        heads: HeadShape { heads: 6, kv_heads: 2, head_dim: 64 },
        ffn: 160,
        experts: None,
        vocabulary: 301,
        qk_norm: false,
        qkv_bias: true,
        spec: AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None },
    };
    for isa in Isa::available() {
        let weights = DecoderWeights::random(7, shape, Format::Q4_0, Format::Q8_0);
        let backend = CpuBackend::new(CpuOptions { threads: 2, isa: Some(isa), limits }).unwrap();
        let mut decoder = Decoder::new(backend, &weights, WeightFormat::Auto, 48, KvDtype::Bf16);
        let noise = &mut Noise::new(2);
        let mut list = sequences(noise, 6, 150, 301, 48);
        let mut steps = ragged(noise, &mut list, 96);
        for step in &mut steps {
            for sample in &mut step.samples {
                (sample.temperature, sample.top_p, sample.top_k, sample.top_n) = (0.8, 0.9, 40, Some(5));
            }
        }
        let mut out = StepOutput::default();
        // Two rounds: results are swapped with the caller's, so lists inside them grow on both sides.
        for _ in 0..2 {
            steps.iter().for_each(|step| decoder.forward(step, &mut out).unwrap());
        }
        let before = ASKED.load(Ordering::Relaxed);
        steps.iter().for_each(|step| decoder.forward(step, &mut out).unwrap());
        assert_eq!(ASKED.load(Ordering::Relaxed) - before, 0, "{isa:?}");
    }
}
