//! The structures that the kernels of training take, field by field as in `kernels/cuda/train*.cu`.

use crate::cuda::device::{Address, Params};
use crate::cuda::params::params;

params! {
    TrainMatmul {
        left: Address, right: Address, out: Address, left_stride: u32, right_stride: u32, out_stride: u32, m: u32, n: u32, k: u32,
        right_half: u32, left_quads: u32, right_quads: u32, add: u32, scale: f32, unused: u32,
    }
    TrainAttention {
        qkv: Address, out: Address, lse: Address, dout: Address, inner: Address, dqkv: Address, positions: Address, tiles: Address,
        runs: Address, heads: u32, kv_heads: u32, head_dim: u32, window: u32, scale: f32, unused: u32,
    }
    PiecesAt { rows: u32, stride: u32, offset: u32, count: u32, width: u32 }
    TrainNorm { x: Address, weight: Address, out: Address, inverse: Address, at: PiecesAt, eps: f32 }
    TrainNormBack { x: Address, weight: Address, inverse: Address, dy: Address, dx: Address, at: PiecesAt, add: u32 }
    TrainSums { dy: Address, x: Address, inverse: Address, out: Address, at: PiecesAt, add: u32 }
    TrainRotate {
        x: Address, cosines: Address, sines: Address, positions: Address, at: PiecesAt, half: u32, back: u32, unused: u32,
    }
    TrainGate { gate_up: Address, dy: Address, out: Address, width: u32, gelu: u32 }
    TrainDropout { x: Address, out: Address, count: u64, key: u64, dropped: u32, scale: f32, add: u32, unused: u32 }
    TrainCopy { from: Address, to: Address, count: u64, add: u32, unused: u32 }
    TrainScatter { x: Address, starts: Address, picks: Address, out: Address, width: u32, unused: u32 }
    TrainInner { a: Address, b: Address, out: Address, rows: u32, width: u32 }
    TrainLogSum {
        logits: Address, tokens: Address, chosen: Address, largest: Address, totals: Address, slopes: Address, stride: u32, n: u32,
        first: u32, width: u32,
    }
    TrainLogProbs {
        tokens: Address, out: Address, largest: Address, totals: Address, slopes: Address, head: Address, width: u32, half: u32,
        scale: f32, unused: u32,
    }
    TrainSoftmaxBack {
        logits: Address, tokens: Address, sums: Address, dout: Address, stride: u32, n: u32, first: u32, scale: f32,
    }
    TrainScale { x: Address, factors: Address, width: u32, unused: u32 }
}
