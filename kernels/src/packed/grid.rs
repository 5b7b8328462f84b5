//! The int8 grid of an output feature, and how 4-bit blocks expand to it.

use super::INT4_BLOCK;

/// Added to the 8-bit weight so that it is unsigned, which is what the dot-product instructions take.
pub(crate) const ZERO: u8 = 128;

/// Grid unit for a feature whose largest weight magnitude is `largest`.
pub(super) fn unit(largest: f32) -> f32 {
    largest / 127.0
}

/// The grid point nearest to `w`.
#[inline(always)]
pub(super) fn point(w: f32, inverse_unit: f32) -> u8 {
    (w * inverse_unit + 128.5) as u8
}

/// The weight at a grid point.
#[inline(always)]
pub(crate) fn value(point: u8, unit: f32) -> f32 {
    (f32::from(point) - f32::from(ZERO)) * unit
}

/// D and M of a block with `w = q * step + offset`, so that `(q * D + M) >> 8` is the grid point. They are exact modulo 2¹⁶ even when a
/// block's step alone exceeds the grid: only the sum has to fit.
pub(super) fn step(step: f32, offset: f32, unit: f32) -> (u16, u16) {
    if unit == 0.0 {
        return (0, u16::from(ZERO) << 8);
    }
    let scaled = 256.0 / f64::from(unit);
    let d = (f64::from(step) * scaled).round();
    let m = (f64::from(offset) * scaled).round() + f64::from(ZERO) * 256.0 + 128.0;
    (d as i64 as u16, m as i64 as u16)
}

/// The grid point of quant `q`.
#[inline(always)]
pub(crate) fn expand(q: u8, d: u16, m: u16) -> u8 {
    (u16::from(q).wrapping_mul(d).wrapping_add(m) >> 8) as u8
}

/// Nibble position of each of 8 consecutive weights in its 32-bit word. The order lets a kernel split the word's two 16-bit
/// lanes into nibbles, expand each in 16-bit lanes, and join pairs of results to bytes that are already in `[k / 4][16][4]` order.
pub(crate) const NIBBLE: [u32; 8] = [0, 1, 4, 5, 2, 3, 6, 7];

/// Writes a lane's 32 quants and its D and M into a block.
pub(super) fn put_lane(block: &mut [u8; INT4_BLOCK], lane: usize, quants: &[u8; 32], (d, m): (u16, u16)) {
    let word = u32::from(d) | u32::from(m) << 16;
    block[lane * 4..][..4].copy_from_slice(&word.to_le_bytes());
    for (eighth, quants) in quants.as_chunks::<8>().0.iter().enumerate() {
        let word = quants.iter().zip(NIBBLE).fold(0u32, |word, (q, at)| word | u32::from(*q) << (4 * at));
        block[64 + eighth * 64 + lane * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

/// A lane's 32 grid points.
#[inline(always)]
pub(crate) fn expand_lane(block: &[u8; INT4_BLOCK], lane: usize) -> [u8; 32] {
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| block[at + lane * 4 + i]));
    let (d, m) = (word(0) as u16, (word(0) >> 16) as u16);
    let mut out = [0; 32];
    for (eighth, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let word = word(64 + eighth * 64);
        for (o, at) in out.iter_mut().zip(NIBBLE) {
            *o = expand((word >> (4 * at) & 15) as u8, d, m);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expanded_quants_are_the_nearest_grid_points() {
        // Step and offset of ordinary blocks, a negative step, and one whose step alone leaves the grid.
        for (step_size, offset, used) in
            [(0.01f32, -0.08f32, 0..16u8), (-0.011, 0.088, 0..16), (1.0, -7.0, 7..8), (0.0, 0.0, 0..16)]
        {
            let largest = used.clone().map(|q| (f32::from(q) * step_size + offset).abs()).fold(0.127, f32::max);
            let unit = unit(largest);
            let (d, m) = step(step_size, offset, unit);
            for q in used {
                let exact = f32::from(q) * step_size + offset;
                let got = value(expand(q, d, m), unit);
                assert!((got - exact).abs() <= 0.54 * unit, "q {q}: {got} for {exact}, unit {unit}");
            }
        }
    }

    #[test]
    fn a_lane_comes_back_from_its_block() {
        let mut block = [0; INT4_BLOCK];
        let quants: [[u8; 32]; 16] = std::array::from_fn(|lane| std::array::from_fn(|i| ((i * 7 + lane * 3) % 16) as u8));
        for (lane, quants) in quants.iter().enumerate() {
            put_lane(&mut block, lane, quants, (256 + lane as u16, 1000));
        }
        for (lane, quants) in quants.iter().enumerate() {
            let want = quants.map(|q| expand(q, 256 + lane as u16, 1000));
            assert_eq!(expand_lane(&block, lane), want);
        }
    }
}
