//! The structures that kernels take, field by field as in `kernels/cuda/*.cu`. The host emulation compares their sizes.

use super::device::{Address, Params};

macro_rules! params {
    ($($name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        pub(super) struct $name {
            $(pub $field: $type,)*
        }

        impl Params for $name {
            fn bytes(&self) -> &[u8] {
                // No byte between or after the fields is left out, or the kernel would get what was never written.
                const { assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*, "padding") };
                // SAFETY: a structure of plain numbers without padding, for as long as it is borrowed.
                unsafe { std::slice::from_raw_parts((self as *const Self).cast(), size_of::<Self>()) }
            }
        }
    )*};
}

pub(super) use params;

params! {
    Weights { data: Address, scales: Address, form: u32, n: u32, k: u32, stride: u32 }
    Embedding { table: Weights, tokens: Address, out: Address, half: Address, half_stride: u32, first: u32, width: u32, unused: u32 }
    Norm { x: Address, weight: Address, out: Address, half: Address, width: u32, half_stride: u32, eps: f32, add: u32 }
    Clamp { x: Address, width: u32, limit: f32 }
    Scale { x: Address, width: u32, factor: f32 }
    SoftCap { x: Address, width: u32, cap: f32 }
    SiluAndMul { gate_up: Address, out: Address, half: Address, width: u32, half_stride: u32 }
    Gelu { x: Address, out: Address, half: Address, width: u32, half_stride: u32 }
    Gather { x: Address, rows: Address, out: Address, half: Address, width: u32, half_stride: u32 }
    Halve { x: Address, half: Address, width: u32, half_stride: u32 }
    AddBias { bias: Address, out: Address, width: u32, unused: u32 }
    Widen { from: Weights, to: Address }
    CopyBlock { cache: Address, from: u64, to: u64, layer_bytes: u64, block_bytes: u32, unused: u32 }
    Carry { tokens: Address, drawn: Address, pairs: Address, count: u32, words: u32 }
    RopeCache {
        qkv: Address, q_norm: Address, k_norm: Address, cosines: Address, sines: Address, positions: Address, slots: Address,
        keys: Address, values: Address, heads: u32, kv_heads: u32, head_dim: u32, half: u32, block_size: u32, cache_form: u32,
        eps: f32, unused: u32,
    }
    LoraPart { b: Address, column: u32, n: u32, rank: u32, first_rank: u32, scale: f32, unused: u32 }
    LoraSite { a: Address, first: u32, count: u32, ranks: u32, unused: u32 }
    LoraTile { slot: u32, first: u32, count: u32 }
    Lora {
        x: Address, out: Address, inner: Address, rows: Address, tiles: Address, sites: Address, parts: Address, sites_per_slot: u32,
        site: u32, x_width: u32, out_width: u32, ranks: u32, unused: u32,
    }
    TopK { logits: Address, tokens: Address, chosen: Address, weights: Address, rows: u32, experts: u32, each: u32, normalised: u32 }
    Align {
        chosen: Address, rows: Address, places: Address, tiles: Address, tile_count: Address, entries: u32, experts: u32, height: u32,
        unused: u32,
    }
    ExpertTile { expert: u32, first: u32, rows: u32, unused: u32 }
    ExpertLinear {
        x: Address, experts: Address, entries: Address, tiles: Address, tile_count: Address, out: Address, n: u32, each: u32,
    }
    Combine {
        x: Address, weights: Address, places: Address, tokens: Address, out: Address, width: u32, each: u32, add: u32, unused: u32,
    }
    GateRows { gate: Address, x: Address, half: Address, width: u32, half_stride: u32 }
    Round { x: Address, to: Address, scales: Address, width: u32, stride: u32 }
    Rescale {
        products: Address, row_scales: Address, scales: Address, bias: Address, out: Address, n: u32, add: u32,
    }
    Linear { x: Address, w: Weights, bias: Address, out: Address, rows: u32, add: u32 }
    Tile { first_row: u32, rows: u32, context: u32, first_block: u32, packed: u32, from: u32, to: u32, partial: u32 }
    Attention {
        qkv: Address, keys: Address, values: Address, blocks: Address, tiles: Address, out: Address, half: Address, partials: Address,
        slopes: Address,
        half_stride: u32, heads: u32, kv_heads: u32, head_dim: u32, block_size: u32, cache_form: u32, window: u32, scale: f32,
        soft_cap: f32, unused: u32,
    }
    SampleRow {
        uniform: f64, score: u32, top_k: u32, temperature: f32, top_p: f32, min_p: f32, repetition: f32, presence: f32,
        frequency: f32, history_from: u32, history_to: u32, bias_from: u32, bias_to: u32, mask: u32, mask_words: u32, top_n: u32,
        unused: u32,
    }
    TokenCount { token: u32, in_prompt: u32, generated: u32 }
    TokenBias { token: u32, value: f32 }
    Drawn { token: u32, rank: u32, logprob: f32, processed: f32, top: u32, processed_top: u32 }
    Likely { token: u32, logprob: f32 }
    Sample {
        logits: Address, values: Address, rows: Address, history: Address, bias: Address, masks: Address, sampled: Address,
        top: Address, vocabulary: u32, width: u32, most_top: u32, unused: u32,
    }
}

/// A list of structures as bytes.
pub(super) fn all_bytes<T: Params>(list: &[T]) -> Vec<u8> {
    list.iter().flat_map(|item| item.bytes().iter().copied()).collect()
}
