//! Paged attention of a ragged step: chunks of prefill and decode in one call.
//!
//! [`KvStorage`] holds the cache, [`AttentionPlan`] cuts a step into items once, and [`AttentionCall`] runs them for one layer from
//! inside a parallel region. Invariant: a query's result is bitwise the same in a long chunk, a short one or as decode, alone or in
//! a batch, on any number of threads (on one instruction path).

#[cfg(target_arch = "x86_64")]
mod amx;
pub(crate) mod lanes;
mod plan;
mod storage;
mod tile;
mod vector;

pub use plan::{AttentionPlan, SEGMENT};
pub(crate) use storage::bf16;
pub use storage::{BLOCK, KvStorage};

use crate::isa::Isa;
use crate::ops::{AttentionSpec, HeadShape, KvDtype, SequenceSpan};
use tile::ROWS;

/// Which instructions attention runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionPath {
    /// f32 cache, plain Rust.
    F32Portable,
    /// f32 cache, AVX2 and FMA.
    F32Avx2,
    /// f32 cache, AVX-512.
    F32Avx512,
    /// bf16 cache widened to f32, plain Rust.
    Bf16Portable,
    /// bf16 cache widened to f32, AVX2 and FMA.
    Bf16Avx2,
    /// bf16 cache widened to f32, AVX-512.
    Bf16Avx512,
    /// bf16 dot instructions (AVX-512 BF16).
    Bf16Dot,
    /// AMX tiles for the products, AVX-512 BF16 for the rest.
    Bf16Amx,
}

impl AttentionPath {
    /// The fastest path for a cache of `dtype` with heads of `head_dim`, given what `isa` implies and the processor has besides.
    pub fn choose(isa: Isa, dtype: KvDtype, head_dim: usize) -> Self {
        match (dtype, isa) {
            (KvDtype::F32, Isa::Portable) => Self::F32Portable,
            (KvDtype::F32, Isa::Avx2) => Self::F32Avx2,
            (KvDtype::F32, _) => Self::F32Avx512,
            // 8-bit floats are refused where the storage is made.
            (KvDtype::Bf16, Isa::Portable) | (KvDtype::Fp8, _) => Self::Bf16Portable,
            (KvDtype::Bf16, Isa::Avx2) => Self::Bf16Avx2,
            (KvDtype::Bf16, isa) => Self::choose_bf16(isa == Isa::Amx, head_dim),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn choose_bf16(amx: bool, head_dim: usize) -> Self {
        match (is_x86_feature_detected!("avx512bf16"), amx && amx::fits(head_dim)) {
            (true, true) => Self::Bf16Amx,
            (true, false) => Self::Bf16Dot,
            (false, _) => Self::Bf16Avx512,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn choose_bf16(_: bool, _: usize) -> Self {
        Self::Bf16Portable
    }
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// A thread's working memory.
pub struct AttentionScratch {
    head_dim: usize,
    q_stride: usize,
    sum_stride: usize,
    q: Vec<Line>,
    scores: Vec<Line>,
    probabilities: Vec<Line>,
    sums: Vec<Line>,
    total: Vec<Line>,
    tail_values: Vec<Line>,
}

impl AttentionScratch {
    /// For heads of at most `head_dim` elements.
    pub fn new(head_dim: usize) -> Self {
        let floats = |n: usize| vec![Line([0; 64]); n.div_ceil(16)];
        let stride = head_dim.next_multiple_of(32);
        Self {
            head_dim,
            q_stride: stride,
            sum_stride: stride,
            q: floats(ROWS * stride),
            scores: floats(ROWS * SEGMENT),
            probabilities: floats(ROWS * SEGMENT),
            sums: floats(ROWS * stride),
            total: floats(ROWS * stride),
            tail_values: floats(BLOCK * stride),
        }
    }
}

/// Attention of one layer of a step.
#[derive(Clone, Copy)]
pub struct AttentionCall<'a> {
    /// From [`AttentionPath::choose`] for the storage's dtype.
    pub path: AttentionPath,
    /// Built from `sequences`, `blocks` and `shape`.
    pub plan: &'a AttentionPlan,
    /// [`crate::StepBatch::sequences`].
    pub sequences: &'a [SequenceSpan],
    /// [`crate::StepBatch::blocks`].
    pub blocks: &'a [u32],
    /// The cache, with the step's keys and values written.
    pub storage: &'a KvStorage,
    /// Layer of the cache.
    pub layer: usize,
    /// Heads.
    pub shape: HeadShape,
    /// How scores are made.
    pub spec: AttentionSpec,
    /// The slopes of `spec.alibi`, one for each query head.
    pub slopes: Option<&'a [f32]>,
    /// `[tokens][qkv_stride]`, queries first.
    pub qkv: *const f32,
    /// Floats from one row of `qkv` to the next.
    pub qkv_stride: usize,
    /// `[tokens][out_stride]`, of which `heads * head_dim` are written.
    pub out: *mut f32,
    /// Floats from one row of `out` to the next.
    pub out_stride: usize,
}

// SAFETY: a description; the unsafe methods state who may follow the pointers.
unsafe impl Sync for AttentionCall<'_> {}
// SAFETY: as above.
unsafe impl Send for AttentionCall<'_> {}

impl AttentionCall<'_> {
    /// Runs item `item` of the plan. On AMX the thread's tile configuration is replaced.
    ///
    /// # Safety
    /// - The processor has the instructions of `path`, which fits the storage's dtype.
    /// - `plan` was built from these `sequences`, `blocks` and `shape`; `shape` matches the storage; `item < plan.items()`.
    /// - Block tables cover their sequences' contexts with blocks of the storage, whose slots up to each context were written.
    /// - `qkv` and `out` have the rows that the sequences name; nobody else touches those rows of `out`, and each item runs on one
    ///   thread at a time.
    /// - `scratch` was made for at least this `head_dim`.
    pub unsafe fn run_item(&self, item: usize, scratch: &mut AttentionScratch) {
        // SAFETY: the contract.
        unsafe { self.run(self.plan.item(item), scratch) }
    }

    /// Runs merge `merge` of the plan, after all items of this layer.
    ///
    /// # Safety
    /// As [`AttentionCall::run_item`], with `merge < plan.merges()`, and every item of this layer has finished.
    pub unsafe fn run_merge(&self, merge: usize, scratch: &mut AttentionScratch) {
        // SAFETY: the contract.
        unsafe { self.run(self.plan.merge(merge), scratch) }
    }

    /// # Safety
    /// As [`AttentionCall::run_item`] or [`AttentionCall::run_merge`].
    unsafe fn run(&self, item: plan::Item, scratch: &mut AttentionScratch) {
        debug_assert!(self.shape.head_dim <= scratch.head_dim);
        // SAFETY: the contract.
        unsafe {
            match self.path {
                AttentionPath::F32Portable => tile::run::<tile::InVectors<vector::Single<lanes::Portable>>>(self, &item, scratch),
                AttentionPath::Bf16Portable => {
                    tile::run::<tile::InVectors<vector::Widened<lanes::Portable>>>(self, &item, scratch)
                }
                #[cfg(target_arch = "x86_64")]
                AttentionPath::F32Avx2 => x86::f32_avx2(self, &item, scratch),
                #[cfg(target_arch = "x86_64")]
                AttentionPath::Bf16Avx2 => x86::bf16_avx2(self, &item, scratch),
                #[cfg(target_arch = "x86_64")]
                AttentionPath::F32Avx512 => x86::f32_avx512(self, &item, scratch),
                #[cfg(target_arch = "x86_64")]
                AttentionPath::Bf16Avx512 => x86::bf16_avx512(self, &item, scratch),
                #[cfg(target_arch = "x86_64")]
                AttentionPath::Bf16Dot => x86::bf16_dot(self, &item, scratch),
                #[cfg(target_arch = "x86_64")]
                AttentionPath::Bf16Amx => x86::bf16_amx(self, &item, scratch),
                #[cfg(not(target_arch = "x86_64"))]
                _ => {}
            }
        }
    }
}

/// One function per path, so that the generic body is compiled for its instructions.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::lanes::{Avx2, Avx512};
    use super::plan::Item;
    use super::tile::{InTiles, InVectors, run};
    use super::vector::{Dot, Single, Widened};
    use super::{AttentionCall, AttentionScratch};

    macro_rules! path {
        ($name:ident, $features:literal, $products:ty) => {
            #[target_feature(enable = $features)]
            pub unsafe fn $name(call: &AttentionCall<'_>, item: &Item, scratch: &mut AttentionScratch) {
                // SAFETY: the contract of `AttentionCall::run_item`.
                unsafe { run::<$products>(call, item, scratch) }
            }
        };
    }

    path!(f32_avx2, "avx2,fma", InVectors<Single<Avx2>>);
    path!(bf16_avx2, "avx2,fma", InVectors<Widened<Avx2>>);
    path!(f32_avx512, "avx512f,avx512bw,avx512vl,avx512dq,fma", InVectors<Single<Avx512>>);
    path!(bf16_avx512, "avx512f,avx512bw,avx512vl,avx512dq,fma", InVectors<Widened<Avx512>>);
    path!(bf16_dot, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma", InVectors<Dot>);
    path!(bf16_amx, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma", InTiles);
}

#[cfg(test)]
mod tests;
