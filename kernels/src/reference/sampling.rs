//! One row of logits to one token, in the order that [`SampleRow`] lays down. A NaN logit counts as −∞, +∞ as the largest float;
//! when every token is forbidden, the token is the first of the mask, or 0, with log-probabilities of −∞.

use std::cmp::Ordering;

use crate::ops::{SampleRow, Sampled, StepBatch};
use crate::random::uniform;

/// Likeliest first, ties by smaller id; NaN is least likely.
fn likeliest(values: &[f64]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    ids.sort_by(|&a, &b| compare(values, a, b));
    ids
}

fn compare(values: &[f64], a: u32, b: u32) -> Ordering {
    values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b))
}

fn log_softmax(values: &[f64]) -> Vec<f64> {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return values.to_vec();
    }
    let total = values.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
    values.iter().map(|v| v - max - total).collect()
}

fn top(logprobs: &[f64], n: Option<u32>) -> Vec<(u32, f32)> {
    let finite = |t: &u32| logprobs[*t as usize] > f64::NEG_INFINITY;
    let ids = likeliest(logprobs).into_iter().filter(finite);
    ids.take(n.unwrap_or(0) as usize).map(|t| (t, logprobs[t as usize] as f32)).collect()
}

pub(super) fn sample(logits: &[f32], wanted: &SampleRow, batch: &StepBatch) -> Sampled {
    let clean = |v: &f32| if v.is_nan() { f64::NEG_INFINITY } else { f64::from(v.min(f32::MAX)) };
    let mut values: Vec<f64> = logits.iter().map(clean).collect();
    let raw = log_softmax(&values);
    let rank = |token: u32| 1 + (0..raw.len() as u32).filter(|&t| compare(&raw, t, token) == Ordering::Less).count() as u32;
    if let Some(token) = wanted.score {
        let logprob = raw[token as usize] as f32;
        let top = top(&raw, wanted.top_n);
        return Sampled { token, logprob, processed_logprob: logprob, rank: rank(token), top, processed_top: Vec::new() };
    }

    for &(token, bias) in &batch.bias[wanted.bias.start as usize..wanted.bias.end as usize] {
        if let Some(value) = values.get_mut(token as usize) {
            *value += f64::from(bias);
        }
    }
    for seen in &batch.history[wanted.history.start as usize..wanted.history.end as usize] {
        let Some(value) = values.get_mut(seen.token as usize) else { continue };
        if seen.in_prompt || seen.generated > 0 {
            let penalty = f64::from(wanted.repetition_penalty);
            *value = if *value > 0.0 { *value / penalty } else { *value * penalty };
        }
        *value -= f64::from(wanted.frequency_penalty) * f64::from(seen.generated);
        if seen.generated > 0 {
            *value -= f64::from(wanted.presence_penalty);
        }
    }

    let mut first = 0;
    if let Some(mask) = &wanted.mask {
        let words = mask.wait();
        let allowed = |t: usize| words.get(t / 32).is_some_and(|word| (word >> (t % 32)) & 1 == 1);
        first = (0..values.len()).find(|&t| allowed(t)).unwrap_or(0) as u32;
        values.iter_mut().enumerate().filter(|(t, _)| !allowed(*t)).for_each(|(_, v)| *v = f64::NEG_INFINITY);
    }
    let greedy = wanted.temperature == 0.0;
    if !greedy {
        values.iter_mut().for_each(|v| *v /= f64::from(wanted.temperature));
        keep_only(&mut values, wanted);
    }
    let processed = log_softmax(&values);
    let token = match processed.iter().any(|p| *p > f64::NEG_INFINITY) {
        false => first,
        true if greedy => likeliest(&processed)[0],
        true => draw(&processed, uniform(wanted.seed, wanted.counter)),
    };
    Sampled {
        token,
        logprob: raw[token as usize] as f32,
        processed_logprob: processed[token as usize] as f32,
        rank: rank(token),
        top: top(&raw, wanted.top_n),
        processed_top: top(&processed, wanted.top_n),
    }
}

/// Top-k, then top-p over what is left, then min-p: the rest becomes −∞.
fn keep_only(values: &mut [f64], wanted: &SampleRow) {
    let order = likeliest(values);
    let mut kept = order.len();
    if wanted.top_k > 0 {
        kept = kept.min(wanted.top_k as usize);
    }
    let best = values[order[0] as usize];
    let weight = |t: u32| (values[t as usize] - best).exp();
    if wanted.top_p < 1.0 {
        let total: f64 = order[..kept].iter().map(|&t| weight(t)).sum();
        let mut sum = 0.0;
        let reached = order[..kept].iter().position(|&t| {
            sum += weight(t);
            sum >= f64::from(wanted.top_p) * total
        });
        kept = reached.map_or(kept, |last| last + 1);
    }
    kept = order[..kept].iter().take_while(|&&t| weight(t) >= f64::from(wanted.min_p)).count().max(1);
    for &t in &order[kept..] {
        values[t as usize] = f64::NEG_INFINITY;
    }
}

/// Inverse CDF over the kept tokens in the order of their ids; see [`uniform`].
fn draw(logprobs: &[f64], u: f64) -> u32 {
    let total: f64 = logprobs.iter().map(|p| p.exp()).sum();
    let mut sum = 0.0;
    let mut last = 0;
    for (t, p) in logprobs.iter().enumerate().filter(|(_, p)| **p > f64::NEG_INFINITY) {
        sum += p.exp();
        last = t as u32;
        if sum > u * total {
            break;
        }
    }
    last
}
