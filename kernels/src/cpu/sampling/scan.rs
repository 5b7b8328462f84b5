//! Passes over a whole row of logits.
//!
//! Written once as plain loops and compiled for each instruction path. No pass uses fused multiply-add and every sum has a fixed
//! number of lanes, so all paths give the same bits. NaN compares as absent and weighs nothing.

use crate::cpu::math;
use crate::isa::Isa;

/// Elements whose exponentials are held at a time.
pub(super) const CHUNK: usize = 1024;
/// Two of the widest vectors: enough independent sums to hide the latency of one.
const LANES: usize = 32;

/// A token with its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub value: f32,
    pub token: u32,
}

impl Candidate {
    /// Likeliest first, ties by smaller id. Values are never NaN.
    #[inline]
    pub fn order(&self, other: &Candidate) -> std::cmp::Ordering {
        other.value.partial_cmp(&self.value).unwrap_or(std::cmp::Ordering::Equal).then(self.token.cmp(&other.token))
    }
}

/// What one pass learns about a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Statistics {
    /// Largest logit; −∞ when there is none.
    pub max: f32,
    /// Its token, the smallest among equals; 0 when there is none.
    pub argmax: u32,
    /// `Σ exp((x − max) * inverse_temperature)`
    pub sum: f64,
}

/// Compiles a body for each instruction path.
macro_rules! per_isa {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?, $body:ident) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// The processor has the instructions of `isa`.
        pub(super) unsafe fn $name(isa: Isa, $($arg: $type),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) $(-> $out)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
                fn avx512($($arg: $type),*) $(-> $out)? {
                    $body($($arg),*)
                }
                match isa {
                    Isa::Portable => $body($($arg),*),
                    // SAFETY: the contract.
                    Isa::Avx2 => unsafe { avx2($($arg),*) },
                    // SAFETY: the contract.
                    Isa::Avx512 | Isa::Amx => unsafe { avx512($($arg),*) },
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = isa;
                $body($($arg),*)
            }
        }
    };
}

per_isa!(
    /// Maximum, where it is, and the sum of exponentials.
    statistics(x: &[f32], inverse_temperature: f32) -> Statistics, statistics_body
);
per_isa!(
    /// Per chunk of [`CHUNK`] tokens the sum of `exp((x − max) * inverse_temperature)` over `x >= least`; returns the sum of all.
    weigh_chunks(x: &[f32], max: f32, inverse_temperature: f32, least: f32, sums: &mut Vec<f64>) -> f64, weigh_chunks_body
);
per_isa!(
    /// How many logits are above `value`, or equal to it at a smaller id than `token`.
    count_before(x: &[f32], value: f32, token: u32) -> u32, count_before_body
);
per_isa!(
    /// The `k` likeliest tokens above −∞ in no particular order; fewer when there are fewer.
    select_top(x: &[f32], k: usize, out: &mut Vec<Candidate>), select_top_body
);
per_isa!(
    /// Adds each token's weight `exp((x − max) * inverse_temperature)` to the bucket of its distance from the maximum.
    fill_buckets(x: &[f32], max: f32, inverse_temperature: f32, buckets: &mut [f64]), fill_buckets_body
);
per_isa!(
    /// Tokens with `x >= least`, in the order of their ids.
    collect_from(x: &[f32], least: f32, out: &mut Vec<Candidate>), collect_from_body
);
per_isa!(
    /// `out[t] = x[t]` where bit `t % 32` of `words[t / 32]` is set, −∞ elsewhere.
    blend(x: &[f32], words: &[u32], out: &mut Vec<f32>), blend_body
);

#[inline(always)]
fn blend_body(x: &[f32], words: &[u32], out: &mut Vec<f32>) {
    let (groups, rest) = x.as_chunks::<32>();
    let pick = |word: u32, i: usize, value: f32| if (word >> i) & 1 == 0 { f32::NEG_INFINITY } else { value };
    let word = |index: usize| words.get(index).copied().unwrap_or(0);
    for (index, group) in groups.iter().enumerate() {
        let word = word(index);
        out.extend_from_slice(&std::array::from_fn::<f32, 32, _>(|i| pick(word, i, group[i])));
    }
    let word = word(groups.len());
    out.extend(rest.iter().enumerate().map(|(i, &value)| pick(word, i, value)));
}

#[inline(always)]
fn chunk_max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (groups, rest) = x.as_chunks::<LANES>();
    for group in groups {
        // A new array each time: a comparison that guards a store through a reference becomes a masked store.
        lanes = std::array::from_fn(|i| if group[i] > lanes[i] { group[i] } else { lanes[i] });
    }
    halve(&mut lanes, |a, b| if b > a { b } else { a });
    rest.iter().fold(lanes[0], |m, &v| if v > m { v } else { m })
}

#[inline(always)]
fn chunk_sum(x: &[f32]) -> f64 {
    let mut lanes = [0.0f32; LANES];
    let (groups, rest) = x.as_chunks::<LANES>();
    for group in groups {
        lanes = std::array::from_fn(|i| lanes[i] + group[i]);
    }
    halve(&mut lanes, |a, b| a + b);
    rest.iter().fold(f64::from(lanes[0]), |sum, &v| sum + f64::from(v))
}

/// Reduces all lanes into the first, always in the same order.
#[inline(always)]
fn halve(lanes: &mut [f32; LANES], reduce: impl Fn(f32, f32) -> f32) {
    let mut n = LANES / 2;
    while n > 0 {
        let (low, high) = lanes.split_at_mut(n);
        for (a, &b) in low.iter_mut().zip(&high[..n]) {
            *a = reduce(*a, b);
        }
        n /= 2;
    }
}

#[inline(always)]
fn statistics_body(x: &[f32], inverse_temperature: f32) -> Statistics {
    let mut weights = [0.0f32; CHUNK];
    let (mut max, mut sum, mut best) = (f32::NEG_INFINITY, 0.0f64, 0);
    for (index, chunk) in x.chunks(CHUNK).enumerate() {
        let local = chunk_max(chunk);
        if local == f32::NEG_INFINITY {
            continue;
        }
        let weights = &mut weights[..chunk.len()];
        for (w, &v) in weights.iter_mut().zip(chunk) {
            *w = math::exp((v - local) * inverse_temperature);
        }
        let local_sum = chunk_sum(weights);
        let factor = |low: f32, high: f32| (f64::from(low - high) * f64::from(inverse_temperature)).exp();
        if local > max {
            sum = sum * factor(max, local) + local_sum;
            (max, best) = (local, index);
        } else {
            sum += local_sum * factor(local, max);
        }
    }
    let start = best * CHUNK;
    let argmax = x.iter().skip(start).position(|&v| v == max).map_or(0, |at| start + at);
    Statistics { max, argmax: argmax as u32, sum }
}

#[inline(always)]
fn weigh_chunks_body(x: &[f32], max: f32, inverse_temperature: f32, least: f32, sums: &mut Vec<f64>) -> f64 {
    let mut weights = [0.0f32; CHUNK];
    sums.clear();
    let mut total = 0.0;
    for chunk in x.chunks(CHUNK) {
        let weights = &mut weights[..chunk.len()];
        for (w, &v) in weights.iter_mut().zip(chunk) {
            let weight = math::exp((v - max) * inverse_temperature);
            *w = if v >= least { weight } else { 0.0 };
        }
        let sum = chunk_sum(weights);
        sums.push(sum);
        total += sum;
    }
    total
}

#[inline(always)]
fn count_before_body(x: &[f32], value: f32, token: u32) -> u32 {
    let (before, after) = x.split_at((token as usize).min(x.len()));
    let mut count = 0u32;
    for &v in before {
        count += u32::from(v >= value);
    }
    for &v in after {
        count += u32::from(v > value);
    }
    count
}

#[inline(always)]
fn any_above(x: &[f32; 64], least: f32) -> bool {
    let mut any = 0u32;
    for &v in x {
        any |= u32::from(v > least);
    }
    any != 0
}

#[inline(always)]
fn select_top_body(x: &[f32], k: usize, out: &mut Vec<Candidate>) {
    out.clear();
    if k == 0 {
        return;
    }
    let room = k.saturating_mul(2).max(64);
    let mut least = f32::NEG_INFINITY;
    let (groups, rest) = x.as_chunks::<64>();
    for (index, group) in groups.iter().enumerate() {
        if any_above(group, least) {
            push_above(group, index * 64, least, out);
            if out.len() >= room {
                out.select_nth_unstable_by(k - 1, Candidate::order);
                // Later tokens of equal value lose the tie, so only larger values can still enter.
                least = out[k - 1].value;
                out.truncate(k);
            }
        }
    }
    push_above(rest, groups.len() * 64, least, out);
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, Candidate::order);
        out.truncate(k);
    }
}

#[inline(always)]
fn push_above(x: &[f32], first: usize, least: f32, out: &mut Vec<Candidate>) {
    for (offset, &value) in x.iter().enumerate() {
        if value > least {
            out.push(Candidate { value, token: (first + offset) as u32 });
        }
    }
}

/// Buckets per unit of (max − x) / temperature.
const BUCKETS_PER_UNIT: f32 = 32.0;

/// Where a logit falls; the last bucket takes all beyond.
#[inline(always)]
pub(super) fn bucket(x: f32, max: f32, inverse_temperature: f32, buckets: usize) -> usize {
    let distance = (max - x) * inverse_temperature * BUCKETS_PER_UNIT;
    let last = (buckets - 1) as f32;
    // NaN goes last, where its weight of zero does no harm.
    let distance = if distance < last { distance } else { last };
    // SAFETY: between 0 and `buckets`, which fits; saturating conversion does not vectorise.
    unsafe { distance.to_int_unchecked::<i32>() as usize }
}

#[inline(always)]
fn fill_buckets_body(x: &[f32], max: f32, inverse_temperature: f32, buckets: &mut [f64]) {
    let mut weights = [0.0f32; CHUNK];
    let mut places = [0u32; CHUNK];
    buckets.fill(0.0);
    let count = buckets.len();
    for chunk in x.chunks(CHUNK) {
        let (weights, places) = (&mut weights[..chunk.len()], &mut places[..chunk.len()]);
        for ((w, p), &v) in weights.iter_mut().zip(places.iter_mut()).zip(chunk) {
            *w = math::exp((v - max) * inverse_temperature);
            *p = bucket(v, max, inverse_temperature, count) as u32;
        }
        for (&w, &p) in weights.iter().zip(places.iter()) {
            buckets[p as usize] += f64::from(w);
        }
    }
}

#[inline(always)]
fn collect_from_body(x: &[f32], least: f32, out: &mut Vec<Candidate>) {
    out.clear();
    let below = least.next_down();
    let (groups, rest) = x.as_chunks::<64>();
    for (index, group) in groups.iter().enumerate() {
        if any_above(group, below) {
            push_above(group, index * 64, below, out);
        }
    }
    push_above(rest, groups.len() * 64, below, out);
}
