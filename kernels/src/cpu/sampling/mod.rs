//! From a row of logits to a token: penalties, truncation, the draw, log-probabilities.
//!
//! [`sample_row`] does what [`SampleRow`] describes. Results are the same on every instruction path, and depend on the row, its
//! seed and its counter only. A NaN logit counts as −∞ and +∞ as the largest float. When nothing is left (every token is
//! forbidden), the token is the first of the mask, or 0, with log-probabilities of −∞: the caller sees that, and no row can stop a step.

mod confine;
mod kept;
mod scan;

use crate::isa::Isa;
use crate::ops::{SampleRow, Sampled, TokenCount};
use crate::random::uniform;
use confine::ConfineScratch;
use kept::Kept;
use scan::{Candidate, Statistics};

/// A thread's working memory.
pub struct SamplingScratch {
    /// Tokens that remain, or the likeliest ones.
    candidates: Vec<Candidate>,
    ranked: Vec<Candidate>,
    /// Logits before bias and penalties, to be put back.
    originals: Vec<(u32, f32)>,
    chunk_sums: Vec<f64>,
    buckets: Vec<f64>,
    /// The part of a row that a mask allows.
    confined: ConfineScratch,
}

impl SamplingScratch {
    /// For rows of `vocabulary` logits.
    pub fn new(vocabulary: usize) -> Self {
        Self {
            candidates: Vec::with_capacity(vocabulary + 128),
            ranked: Vec::with_capacity(vocabulary + 128),
            originals: Vec::with_capacity(1024),
            chunk_sums: Vec::with_capacity(vocabulary.div_ceil(scan::CHUNK)),
            buckets: vec![0.0; kept::BUCKETS],
            confined: ConfineScratch::new(vocabulary),
        }
    }
}

/// Samples or scores one row. `logits` is the row's vocabulary; it is changed while working and restored, but that +∞ becomes the
/// largest float. `history` and `bias` are the step's whole lists. `out` is overwritten, its memory reused.
///
/// # Safety
/// The processor has the instructions of `isa`.
pub unsafe fn sample_row(
    isa: Isa,
    logits: &mut [f32],
    row: &SampleRow,
    history: &[TokenCount],
    bias: &[(u32, f32)],
    out: &mut Sampled,
    scratch: &mut SamplingScratch,
) {
    out.top.clear();
    out.processed_top.clear();
    // SAFETY: the contract, here and below.
    let raw = unsafe {
        let raw = scan::statistics(isa, logits, 1.0);
        if raw.max == f32::INFINITY {
            logits.iter_mut().for_each(|x| *x = if *x > f32::MAX { f32::MAX } else { *x });
            scan::statistics(isa, logits, 1.0)
        } else {
            raw
        }
    };
    if let Some(n) = row.top_n {
        // SAFETY: as above.
        unsafe { scan::select_top(isa, logits, n as usize, &mut scratch.ranked) };
        scratch.ranked.sort_unstable_by(Candidate::order);
        out.top.extend(scratch.ranked.iter().map(|c| (c.token, logprob(c.value, &raw, 1.0))));
    }
    if let Some(token) = row.score {
        out.token = token;
        let value = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        out.logprob = logprob(value, &raw, 1.0);
        out.processed_logprob = out.logprob;
        // SAFETY: as above.
        out.rank = 1 + unsafe { scan::count_before(isa, logits, value, token) };
        return;
    }

    let changed = adjust(logits, row, slice(history, &row.history), slice(bias, &row.bias), &mut scratch.originals);
    let (token, processed_logprob) = match &row.mask {
        // SAFETY: as above.
        None => unsafe { choose(isa, logits, row, if changed { None } else { Some(raw) }, out, scratch) },
        Some(mask) => {
            let mut own = std::mem::take(&mut scratch.confined);
            // SAFETY: as above.
            let chosen = unsafe {
                let confined = own.confine(isa, logits, mask.wait());
                let (place, logprob) = choose(isa, confined.logits, row, None, out, scratch);
                out.processed_top.iter_mut().for_each(|(token, _)| *token = confined.token(*token, true));
                (confined.token(place, logprob > f32::NEG_INFINITY), logprob)
            };
            scratch.confined = own;
            chosen
        }
    };
    // Backwards, so that a token that was changed twice ends as it began.
    for &(token, value) in scratch.originals.iter().rev() {
        logits[token as usize] = value;
    }
    let value = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    out.token = token;
    out.logprob = logprob(value, &raw, 1.0);
    out.processed_logprob = processed_logprob;
    // SAFETY: as above.
    out.rank = if token == raw.argmax { 1 } else { 1 + unsafe { scan::count_before(isa, logits, value, token) } };
}

fn slice<'a, T>(list: &'a [T], range: &std::ops::Range<u32>) -> &'a [T] {
    list.get(range.start as usize..range.end as usize).unwrap_or(&[])
}

/// `log_softmax` at a token with this logit.
fn logprob(value: f32, statistics: &Statistics, inverse_temperature: f32) -> f32 {
    if value.is_nan() || value == f32::NEG_INFINITY {
        return f32::NEG_INFINITY;
    }
    ((f64::from(value) - f64::from(statistics.max)) * f64::from(inverse_temperature) - statistics.sum.ln()) as f32
}

/// Applies bias and penalties in place, noting what was there. Tokens beyond the vocabulary are ignored.
fn adjust(
    logits: &mut [f32],
    row: &SampleRow,
    history: &[TokenCount],
    bias: &[(u32, f32)],
    originals: &mut Vec<(u32, f32)>,
) -> bool {
    originals.clear();
    let mut set = |token: u32, change: &dyn Fn(f32) -> f32| {
        if let Some(logit) = logits.get_mut(token as usize) {
            originals.push((token, *logit));
            let changed = change(*logit);
            *logit = if changed > f32::MAX { f32::MAX } else { changed };
        }
    };
    for &(token, add) in bias {
        set(token, &|x| x + add);
    }
    if row.repetition_penalty != 1.0 || row.frequency_penalty != 0.0 || row.presence_penalty != 0.0 {
        for seen in history.iter().filter(|seen| seen.in_prompt || seen.generated > 0) {
            set(seen.token, &|x| {
                let x = if x > 0.0 { x / row.repetition_penalty } else { x * row.repetition_penalty };
                let once = if seen.generated > 0 { row.presence_penalty } else { 0.0 };
                x - row.frequency_penalty * seen.generated as f32 - once
            });
        }
    }
    !originals.is_empty()
}

/// The token and its processed log-probability; fills `out.processed_top`. `known` are the statistics of `logits` if they are known.
///
/// # Safety
/// As [`sample_row`].
unsafe fn choose(
    isa: Isa,
    logits: &[f32],
    row: &SampleRow,
    known: Option<Statistics>,
    out: &mut Sampled,
    scratch: &mut SamplingScratch,
) -> (u32, f32) {
    let greedy = row.temperature.is_nan() || row.temperature <= 0.0;
    // Below this everything but the maximum weighs nothing anyway, and the inverse would overflow.
    let inverse_temperature = if greedy { 1.0 } else { 1.0 / row.temperature.max(1e-20) };
    // Of the sum at this temperature only top-p over the whole vocabulary has need; the maximum is the same at any temperature.
    let whole_nucleus = row.top_p < 1.0 && !kept::selects(row, logits.len());
    let all = match known {
        Some(statistics) if greedy || inverse_temperature == 1.0 || !whole_nucleus => statistics,
        // SAFETY: the contract, here and below.
        _ => unsafe { scan::statistics(isa, logits, inverse_temperature) },
    };
    if all.max == f32::NEG_INFINITY {
        return (0, f32::NEG_INFINITY);
    }
    let n = row.top_n.unwrap_or(0) as usize;
    if greedy {
        if n > 0 && known.is_some() {
            out.processed_top.extend_from_slice(&out.top);
        } else if n > 0 {
            // SAFETY: as above.
            unsafe { scan::select_top(isa, logits, n, &mut scratch.ranked) };
            list(&mut scratch.ranked, n, &all, 1.0, &mut out.processed_top);
        }
        return (all.argmax, logprob(all.max, &all, 1.0));
    }
    // SAFETY: as above.
    let kept = unsafe { Kept::find(isa, logits, row, &all, inverse_temperature, scratch) };
    // SAFETY: as above.
    let (chosen, sum) = unsafe { kept.draw(isa, logits, &all, inverse_temperature, uniform(row.seed, row.counter), scratch) };
    let kept_statistics = Statistics { sum, ..all };
    if n > 0 {
        match kept {
            Kept::Listed => {
                scratch.ranked.clear();
                scratch.ranked.extend_from_slice(&scratch.candidates);
                if scratch.ranked.len() > n {
                    scratch.ranked.select_nth_unstable_by(n - 1, Candidate::order);
                }
            }
            Kept::From(least) => {
                // SAFETY: as above.
                unsafe { scan::select_top(isa, logits, n, &mut scratch.ranked) };
                scratch.ranked.retain(|c| c.value >= least);
            }
        }
        list(&mut scratch.ranked, n, &kept_statistics, inverse_temperature, &mut out.processed_top);
    }
    (chosen.token, logprob(chosen.value, &kept_statistics, inverse_temperature))
}

/// The first `n` of `ranked`, sorted, with log-probabilities.
fn list(ranked: &mut Vec<Candidate>, n: usize, statistics: &Statistics, inverse_temperature: f32, out: &mut Vec<(u32, f32)>) {
    ranked.truncate(n);
    ranked.sort_unstable_by(Candidate::order);
    out.extend(ranked.iter().map(|c| (c.token, logprob(c.value, statistics, inverse_temperature))));
}

#[cfg(test)]
mod tests;
