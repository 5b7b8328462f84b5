//! The tokens that remain after top-k, top-p and min-p, and the draw among them.
//!
//! Each of the three keeps a prefix of the tokens ordered by likelihood (ties by smaller id), so together they keep the shortest.
//! No step sorts the vocabulary: top-k is a selection, top-p tries the likeliest few hundred and otherwise finds, in buckets of
//! distance from the maximum, the one bucket in which the mass is reached, and sorts that.

use super::SamplingScratch;
use super::scan::{self, CHUNK, Candidate, Statistics};
use crate::cpu::math;
use crate::isa::Isa;
use crate::ops::SampleRow;

/// Buckets of width 1/32 in (max − x) / temperature: the last begins at e^−32 of the maximum.
pub(super) const BUCKETS: usize = 1025;
/// How many of the likeliest tokens top-p looks at before it fills buckets.
const FIRST_TRY: usize = 256;

/// Whether top-k drops any token.
pub(super) fn selects(row: &SampleRow, vocabulary: usize) -> bool {
    row.top_k > 0 && (row.top_k as usize) < vocabulary
}

/// The tokens that remain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kept {
    /// Those in `SamplingScratch::candidates`, in the order of their ids.
    Listed,
    /// All whose logit is at least this (and above −∞).
    From(f32),
}

impl Kept {
    /// `all` are the statistics of `logits`, with a finite maximum. Its sum, at this temperature, is used only for a top-p without
    /// top-k.
    ///
    /// # Safety
    /// The processor has the instructions of `isa`.
    pub(super) unsafe fn find(
        isa: Isa,
        logits: &[f32],
        row: &SampleRow,
        all: &Statistics,
        inverse_temperature: f32,
        scratch: &mut SamplingScratch,
    ) -> Kept {
        let top_k = row.top_k as usize;
        let weight = |c: &Candidate| math::exp((c.value - all.max) * inverse_temperature);
        let likely_enough = |c: &Candidate| row.min_p <= 0.0 || weight(c) >= row.min_p;
        let candidates = &mut scratch.candidates;
        if selects(row, logits.len()) {
            // SAFETY: the contract, here and below.
            unsafe { scan::select_top(isa, logits, top_k, candidates) };
            candidates.sort_unstable_by(Candidate::order);
            if row.top_p < 1.0 {
                let total: f64 = candidates.iter().map(|c| f64::from(weight(c))).sum();
                if let Some(kept) = reach(candidates, weight, 0.0, f64::from(row.top_p) * total) {
                    candidates.truncate(kept);
                }
            }
        } else if row.top_p < 1.0 {
            let wanted = f64::from(row.top_p) * all.sum;
            // SAFETY: as above.
            unsafe { scan::select_top(isa, logits, FIRST_TRY, candidates) };
            candidates.sort_unstable_by(Candidate::order);
            match reach(candidates, weight, 0.0, wanted) {
                Some(kept) => candidates.truncate(kept),
                None => {
                    // SAFETY: as above.
                    unsafe { nucleus(isa, logits, row.top_p, all.max, inverse_temperature, scratch) };
                    if row.min_p > 0.0 {
                        retain_likely(&mut scratch.candidates, likely_enough);
                    }
                    return Kept::Listed;
                }
            }
        } else if row.min_p > 0.0 {
            // The logarithm only bounds the candidates, generously; the weights decide.
            let least = all.max + (row.min_p.min(1.0).ln() - 0.01) / inverse_temperature;
            // SAFETY: as above.
            unsafe { scan::collect_from(isa, logits, least.max(f32::MIN), candidates) };
            retain_likely(candidates, likely_enough);
            return Kept::Listed;
        } else {
            return Kept::From(f32::MIN);
        }
        // Sorted by likelihood here, so min-p is a prefix.
        let kept = candidates.iter().take_while(|c| likely_enough(c)).count().max(1);
        candidates.truncate(kept);
        candidates.sort_unstable_by_key(|c| c.token);
        Kept::Listed
    }

    /// The first token, in the order of ids, at which the weights sum to more than `u` times their total; and that total.
    ///
    /// # Safety
    /// As [`Kept::find`].
    pub(super) unsafe fn draw(
        self,
        isa: Isa,
        logits: &[f32],
        all: &Statistics,
        inverse_temperature: f32,
        u: f64,
        scratch: &mut SamplingScratch,
    ) -> (Candidate, f64) {
        let weight = |value: f32| f64::from(math::exp((value - all.max) * inverse_temperature));
        let mut chosen = Candidate { value: all.max, token: all.argmax };
        let least = match self {
            Kept::From(least) => least,
            Kept::Listed => {
                let total: f64 = scratch.candidates.iter().map(|c| weight(c.value)).sum();
                let mut sum = 0.0;
                for c in &scratch.candidates {
                    let w = weight(c.value);
                    // A weight of zero is never drawn, not even where rounding leaves `u` unreached.
                    if w > 0.0 {
                        chosen = *c;
                    }
                    sum += w;
                    if sum > u * total {
                        break;
                    }
                }
                return (chosen, total);
            }
        };
        // SAFETY: the contract.
        let total = unsafe { scan::weigh_chunks(isa, logits, all.max, inverse_temperature, least, &mut scratch.chunk_sums) };
        let target = u * total;
        let mut before = 0.0;
        let mut at = 0;
        for (index, &sum) in scratch.chunk_sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
            at = index;
            if before + sum > target {
                break;
            }
            before += sum;
        }
        // Rounding can leave the target unreached: then it is the last token of weight, of this chunk or of all.
        let start = at * CHUNK;
        for (offset, &value) in logits[start..].iter().take(CHUNK).enumerate() {
            if value >= least && weight(value) > 0.0 {
                chosen = Candidate { value, token: (start + offset) as u32 };
                before += weight(value);
                if before > target {
                    break;
                }
            }
        }
        (chosen, total)
    }
}

/// How many of `sorted` it takes until `sum` and their weights reach `wanted`; `None` when they do not.
fn reach(sorted: &[Candidate], weight: impl Fn(&Candidate) -> f32, mut sum: f64, wanted: f64) -> Option<usize> {
    let at = sorted.iter().position(|c| {
        sum += f64::from(weight(c));
        sum >= wanted
    });
    at.map(|last| last + 1)
}

/// Drops unlikely tokens but never the likeliest.
fn retain_likely(candidates: &mut Vec<Candidate>, likely_enough: impl Fn(&Candidate) -> bool) {
    let best = candidates.iter().copied().min_by(Candidate::order);
    candidates.retain(|c| likely_enough(c));
    if candidates.is_empty() {
        candidates.extend(best);
    }
}

/// Leaves in `candidates`, by id, the smallest set of likeliest tokens whose weights reach `top_p` of all.
///
/// # Safety
/// As [`Kept::find`].
unsafe fn nucleus(isa: Isa, logits: &[f32], top_p: f32, max: f32, inverse_temperature: f32, scratch: &mut SamplingScratch) {
    let SamplingScratch { candidates, ranked, buckets, .. } = scratch;
    // SAFETY: the contract, here and below.
    unsafe { scan::fill_buckets(isa, logits, max, inverse_temperature, buckets) };
    let wanted = f64::from(top_p) * buckets.iter().sum::<f64>();
    let mut before = 0.0;
    let mut crossing = BUCKETS - 1;
    for (index, &mass) in buckets.iter().enumerate() {
        if before + mass >= wanted {
            crossing = index;
            break;
        }
        before += mass;
    }
    let place = |value: f32| scan::bucket(value, max, inverse_temperature, BUCKETS);
    // One bucket more than needed, so that rounding of the bound loses nothing.
    let least = max - (crossing + 2) as f32 / 32.0 / inverse_temperature;
    let least = if crossing == BUCKETS - 1 { f32::MIN } else { least.max(f32::MIN) };
    // SAFETY: as above.
    unsafe { scan::collect_from(isa, logits, least, candidates) };
    candidates.retain(|c| place(c.value) <= crossing);
    ranked.clear();
    ranked.extend(candidates.iter().filter(|c| place(c.value) == crossing));
    ranked.sort_unstable_by(Candidate::order);
    let weight = |c: &Candidate| math::exp((c.value - max) * inverse_temperature);
    let inside = reach(ranked, weight, before, wanted).unwrap_or(ranked.len());
    if let Some(last) = inside.checked_sub(1).and_then(|last| ranked.get(last)) {
        candidates.retain(|c| c.order(last).is_le());
    }
}
