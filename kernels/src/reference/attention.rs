//! Scaled dot-product attention of one row, by definition (Vaswani et al. 2017, equation 1).

use super::{Cache, dot};
use crate::ops::{AttentionSpec, HeadShape};

/// `[heads * head_dim]`: the attention of the query row `qkv` at `position` over the blocks of `table`; `slopes`: those of `spec.alibi`.
pub(super) fn attend(
    qkv: &[f32],
    shape: HeadShape,
    spec: AttentionSpec,
    slopes: Option<&[f32]>,
    cache: &Cache,
    layer: usize,
    table: &[u32],
    position: usize,
) -> Vec<f32> {
    let HeadShape { heads, kv_heads, head_dim } = shape;
    let first = spec.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));
    let block_size = cache.spec.block_size;
    let mut out = Vec::with_capacity(heads * head_dim);
    for (h, query) in qkv.chunks_exact(head_dim).take(heads).enumerate() {
        let kv_head = h / (heads / kv_heads);
        let places: Vec<usize> = (first..=position)
            .map(|p| cache.at(layer, table[p / block_size] as usize * block_size + p % block_size, kv_head))
            .collect();
        let slope = slopes.map_or(0.0, |slopes| f64::from(slopes[h]));
        let scores: Vec<f64> = (first..=position)
            .zip(&places)
            .map(|(p, &at)| {
                let score = dot(query, &cache.keys[at..at + head_dim]) * f64::from(spec.scale);
                let capped = spec.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                capped - slope * (position - p) as f64
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        for i in 0..head_dim {
            let sum: f64 = weights.iter().zip(&places).map(|(w, &at)| w * f64::from(cache.values[at + i])).sum();
            out.push((sum / total) as f32);
        }
    }
    out
}
