//! Blocks of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! In the 4- and 5-bit formats byte `j` of the quants holds weight `j` in its low and weight `j + 16` in its high nibble; the fifth
//! bits lie in a 32-bit word, bit `i` for weight `i`.

use super::half_at;

/// `(scale, offset)` with `w = q * scale + offset`.
pub(super) fn q4_0_quants(block: &[u8; 18], q: &mut [u8; 32]) -> (f32, f32) {
    nibbles(&block[2..], q);
    let d = half_at(block, 0);
    (d, -8.0 * d)
}

/// `(scale, offset)` with `w = q * scale + offset`.
pub(super) fn q4_1_quants(block: &[u8; 20], q: &mut [u8; 32]) -> (f32, f32) {
    nibbles(&block[4..], q);
    (half_at(block, 0), half_at(block, 2))
}

pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let mut q = [0; 32];
    let (d, _) = q4_0_quants(block, &mut q);
    for (w, q) in out.iter_mut().zip(q) {
        *w = (f32::from(q) - 8.0) * d;
    }
}

pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let mut q = [0; 32];
    let (d, m) = q4_1_quants(block, &mut q);
    for (w, q) in out.iter_mut().zip(q) {
        *w = f32::from(q) * d + m;
    }
}

pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let mut q = [0; 32];
    nibbles(&block[6..], &mut q);
    fifth_bits(&block[2..6], &mut q);
    let d = half_at(block, 0);
    for (w, q) in out.iter_mut().zip(q) {
        *w = (f32::from(q) - 16.0) * d;
    }
}

pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let mut q = [0; 32];
    nibbles(&block[8..], &mut q);
    fifth_bits(&block[4..8], &mut q);
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (w, q) in out.iter_mut().zip(q) {
        *w = f32::from(q) * d + m;
    }
}

pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (w, q) in out.iter_mut().zip(&block[2..]) {
        *w = f32::from(q.cast_signed()) * d;
    }
}

fn nibbles(bytes: &[u8], q: &mut [u8; 32]) {
    let (low, high) = q.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

fn fifth_bits(bytes: &[u8], q: &mut [u8; 32]) {
    let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (i, q) in q.iter_mut().enumerate() {
        *q |= ((word >> i & 1) as u8) << 4;
    }
}
