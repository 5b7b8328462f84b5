//! Super-blocks of 256 weights: Q4_K, Q5_K, Q6_K.
//!
//! Q4_K and Q5_K: 8 sub-blocks of 32 with a 6-bit scale and a 6-bit minimum each, multiplied by the super-block's two f16 factors.
//! Q6_K: 16 sub-blocks of 16 with an 8-bit scale each, multiplied by one f16 factor.

use super::half_at;

/// The eight `(scale, minimum)` pairs in 12 bytes: bytes 0–3 and 4–7 hold six bits of the first four scales and minima, bytes 8–11
/// the low nibbles of the last four, whose high bits sit on top of bytes 0–7.
fn scales_and_minima(packed: &[u8]) -> [(f32, f32); 8] {
    std::array::from_fn(|j| {
        let (scale, minimum) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
        };
        (f32::from(scale), f32::from(minimum))
    })
}

/// Sub-block `j`: `w = q * steps[j].0 + steps[j].1`.
pub(super) fn q4_k_quants(block: &[u8; 144], q: &mut [[u8; 32]; 8], steps: &mut [(f32, f32); 8]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (step, (scale, minimum)) in steps.iter_mut().zip(scales_and_minima(&block[4..16])) {
        *step = (d * scale, -dmin * minimum);
    }
    for (pair, bytes) in q.as_chunks_mut::<2>().0.iter_mut().zip(block[16..].as_chunks::<32>().0) {
        let [low, high] = pair;
        for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
            *low = byte & 15;
            *high = byte >> 4;
        }
    }
}

pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let mut q = [[0; 32]; 8];
    let mut steps = [(0.0, 0.0); 8];
    q4_k_quants(block, &mut q, &mut steps);
    store(&q, &steps, out);
}

pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let steps = scales_and_minima(&block[4..16]).map(|(scale, minimum)| (d * scale, -dmin * minimum));
    let high_bits = &block[16..48];
    let mut q = [[0; 32]; 8];
    for (j, sub) in q.iter_mut().enumerate() {
        let bytes = &block[48 + j / 2 * 32..][..32];
        for ((q, byte), bits) in sub.iter_mut().zip(bytes).zip(high_bits) {
            *q = byte >> (4 * (j % 2)) & 15 | (bits >> j & 1) << 4;
        }
    }
    store(&q, &steps, out);
}

fn store(q: &[[u8; 32]; 8], steps: &[(f32, f32); 8], out: &mut [f32; 256]) {
    for ((weights, q), (d, m)) in out.as_chunks_mut::<32>().0.iter_mut().zip(q).zip(steps) {
        for (w, q) in weights.iter_mut().zip(q) {
            *w = f32::from(*q) * d + m;
        }
    }
}

pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    let scales = &block[192..208];
    for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let low = &block[half * 64..][..64];
        let high = &block[128 + half * 32..][..32];
        for (quarter, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = &low[quarter % 2 * 32..][..32];
            let (low_shift, high_shift) = (quarter / 2 * 4, quarter * 2);
            for (sixteenth, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let scale = d * f32::from(scales[half * 8 + quarter * 2 + sixteenth].cast_signed());
                let at = sixteenth * 16;
                for ((w, low), high) in out.iter_mut().zip(&low[at..]).zip(&high[at..]) {
                    let q = low >> low_shift & 15 | (high >> high_shift & 3) << 4;
                    *w = (f32::from(q) - 32.0) * scale;
                }
            }
        }
    }
}
