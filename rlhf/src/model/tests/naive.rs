//! The decoder written down in candle's own operations, over the same parameters: what the fused ones are held against.

use candle_core::{D, Result};
use tidemill_engine::{ModelConfig, Part};

use super::*;

/// A weight as a tensor of the graph.
fn weight(model: &Model, weight: Weight) -> Result<Tensor> {
    let Kind::Whole(ends) = &model.kind else { panic!("a whole model is asked for") };
    let (var, range) = model.place(ends, weight).unwrap();
    let (n, k) = model.files().config().shape_of(weight);
    let flat = var.as_tensor().narrow(0, range.start, range.len())?;
    if k == 1 { Ok(flat) } else { flat.reshape((n, k)) }
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?.recip()?;
    x.broadcast_mul(&inverse)?.broadcast_mul(weight)
}

/// `[rows, heads, head_dim]`, halves rotated.
fn rotated(x: &Tensor, config: &ModelConfig, positions: &[u32]) -> Result<Tensor> {
    let half = config.head_dim / 2;
    let angles: Vec<f64> = positions
        .iter()
        .flat_map(|position| config.inverse_frequencies().into_iter().map(|f| f64::from(*position) * f64::from(f)))
        .collect();
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|angle| f(*angle) as f32 * config.rope_magnitude()).collect();
        Tensor::from_vec(values, (positions.len(), 1, half), &Device::Cpu)
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (first, second) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let turned = [
        (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
        (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?,
    ];
    Tensor::cat(&turned, 2)
}

/// 0 where a row sees another, far below where it does not.
fn mask(batch: &Packed) -> Result<Tensor> {
    let rows = batch.rows();
    let mut values = vec![-1e9f32; rows * rows];
    for segment in &batch.segments {
        for row in segment.first..segment.first + segment.len {
            let prefix = segment.prefix.map(|prefix| batch.segments[prefix]);
            let seen = prefix.map_or(0..0, |prefix| prefix.first..prefix.first + prefix.len);
            seen.chain(segment.first..row + 1).for_each(|seen| values[row * rows + seen] = 0.0);
        }
    }
    Tensor::from_vec(values, (rows, rows), &Device::Cpu)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let exponentials = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
}

/// The log-probabilities of the batch's labels.
pub(super) fn log_probs(model: &Model, batch: &Packed) -> Result<Tensor> {
    let config = model.files().config().clone();
    let rows = batch.rows();
    let ModelConfig { heads, kv_heads, head_dim, rms_eps: eps, .. } = config;
    let table = weight(model, Weight::Embedding)?;
    let mask = mask(batch)?;
    let mut x = table.index_select(&Tensor::new(batch.tokens.as_slice(), &Device::Cpu)?, 0)?;
    for layer in 0..config.layers {
        let of = |part: Part| weight(model, Weight::Layer(layer, part));
        let linear = |x: &Tensor, matrix: Part, bias: Part| -> Result<Tensor> {
            let out = x.matmul(&of(matrix)?.t()?)?;
            if config.has(bias) { out.broadcast_add(&of(bias)?) } else { Ok(out) }
        };
        let normed = rms_norm(&x, &of(Part::AttentionNorm)?, eps)?;
        let headed = |matrix: Part, bias: Part, norm: Option<Part>, heads: usize| -> Result<Tensor> {
            let out = linear(&normed, matrix, bias)?.reshape((rows, heads, head_dim))?;
            match norm.filter(|norm| config.has(*norm)) {
                Some(norm) => rms_norm(&out, &of(norm)?, eps),
                None => Ok(out),
            }
        };
        let queries = rotated(&headed(Part::Query, Part::QueryBias, Some(Part::QueryNorm), heads)?, &config, &batch.positions)?;
        let keys = rotated(&headed(Part::Key, Part::KeyBias, Some(Part::KeyNorm), kv_heads)?, &config, &batch.positions)?;
        let values = headed(Part::Value, Part::ValueBias, None, kv_heads)?;
        let mut attended = Vec::new();
        for head in 0..heads {
            let of_head = |x: &Tensor, head: usize| x.narrow(1, head, 1)?.squeeze(1)?.contiguous();
            let shared = head / (heads / kv_heads);
            let scores = (of_head(&queries, head)?.matmul(&of_head(&keys, shared)?.t()?)? / (head_dim as f64).sqrt())?;
            attended.push(softmax(&(scores + &mask)?)?.matmul(&of_head(&values, shared)?)?);
        }
        let attended = Tensor::cat(&attended, 1)?;
        x = (x + linear(&attended, Part::AttentionOutput, Part::AttentionOutputBias)?)?;
        let normed = rms_norm(&x, &of(Part::FeedForwardNorm)?, eps)?;
        let (gate, up) = (linear(&normed, Part::Gate, Part::GateBias)?, linear(&normed, Part::Up, Part::UpBias)?);
        x = (x + linear(&(gate.silu()? * up)?, Part::Down, Part::DownBias)?)?;
    }
    let picked: Vec<u32> = batch.labels.iter().map(|label| label.row).collect();
    let tokens: Vec<u32> = batch.labels.iter().map(|label| label.token).collect();
    let x = x.index_select(&Tensor::new(picked, &Device::Cpu)?, 0)?;
    let x = rms_norm(&x, &weight(model, Weight::FinalNorm)?, eps)?;
    let head = weight(model, model.files().output())?;
    let logits = x.matmul(&head.t()?)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_probs = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    log_probs.gather(&Tensor::new(tokens, &Device::Cpu)?.unsqueeze(1)?, 1)?.squeeze(1)
}
