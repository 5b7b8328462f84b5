//! Weight rows as files store them, decoded to f32.
//!
//! The block formats are GGUF's; layouts and arithmetic follow `ggml-quants.c` of the ggml project (`dequantize_row_*`). All
//! numbers are little-endian. A block covers consecutive weights of one row, so a row decodes on its own.

mod encode;
mod kquants;
mod legacy;

use half::{bf16, f16};

pub use encode::quantize_row;

use crate::error::KernelError;
use crate::ops::Format;

/// Decodes one row of `out.len()` weights from `bytes`.
///
/// Fails with [`KernelError::Weight`] when the row is not a whole number of blocks or `bytes` has another length.
pub fn dequantize_row(format: Format, bytes: &[u8], out: &mut [f32]) -> Result<(), KernelError> {
    check_row(format, bytes.len(), out.len())?;
    match format {
        Format::F32 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *v = f32::from_le_bytes(*b);
            }
        }
        Format::F16 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = f16::from_le_bytes(*b).to_f32();
            }
        }
        Format::Bf16 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = bf16::from_le_bytes(*b).to_f32();
            }
        }
        Format::Q4_0 => blocks::<18, 32>(bytes, out, legacy::q4_0),
        Format::Q4_1 => blocks::<20, 32>(bytes, out, legacy::q4_1),
        Format::Q5_0 => blocks::<22, 32>(bytes, out, legacy::q5_0),
        Format::Q5_1 => blocks::<24, 32>(bytes, out, legacy::q5_1),
        Format::Q8_0 => blocks::<34, 32>(bytes, out, legacy::q8_0),
        Format::Q4K => blocks::<144, 256>(bytes, out, kquants::q4_k),
        Format::Q5K => blocks::<176, 256>(bytes, out, kquants::q5_k),
        Format::Q6K => blocks::<210, 256>(bytes, out, kquants::q6_k),
    }
    Ok(())
}

/// Whether a format is 4-bit quants with a scale and an offset per 32 weights, which [`four_bit_row`] takes apart.
pub const fn is_four_bit(format: Format) -> bool {
    matches!(format, Format::Q4_0 | Format::Q4_1 | Format::Q4K)
}

/// Takes a row of a 4-bit format apart: weight `i` is `quants[i] * steps[i / 32].0 + steps[i / 32].1`.
///
/// Other formats and wrong lengths are errors, as in [`dequantize_row`].
pub(crate) fn four_bit_row(format: Format, bytes: &[u8], quants: &mut [u8], steps: &mut [(f32, f32)]) -> Result<(), KernelError> {
    check_row(format, bytes.len(), quants.len())?;
    if steps.len() * 32 != quants.len() {
        return Err(KernelError::Weight(format!("{} steps for {} quants", steps.len(), quants.len())));
    }
    let (quants, _) = quants.as_chunks_mut::<32>();
    match format {
        Format::Q4_0 => {
            for ((block, q), step) in bytes.as_chunks::<18>().0.iter().zip(quants).zip(steps) {
                *step = legacy::q4_0_quants(block, q);
            }
        }
        Format::Q4_1 => {
            for ((block, q), step) in bytes.as_chunks::<20>().0.iter().zip(quants).zip(steps) {
                *step = legacy::q4_1_quants(block, q);
            }
        }
        Format::Q4K => {
            let (q8, _) = quants.as_chunks_mut::<8>();
            let (step8, _) = steps.as_chunks_mut::<8>();
            for ((block, q), step) in bytes.as_chunks::<144>().0.iter().zip(q8).zip(step8) {
                kquants::q4_k_quants(block, q, step);
            }
        }
        other => return Err(KernelError::Weight(format!("{other:?} is not a 4-bit format"))),
    }
    Ok(())
}

fn check_row(format: Format, bytes: usize, k: usize) -> Result<(), KernelError> {
    match format.row_bytes(k) {
        None => {
            Err(KernelError::Weight(format!("{format:?} needs rows of a multiple of {} weights, got {k}", format.block_len())))
        }
        Some(want) if want != bytes => {
            Err(KernelError::Weight(format!("a {format:?} row of {k} weights takes {want} bytes, got {bytes}")))
        }
        Some(_) => Ok(()),
    }
}

fn blocks<const BYTES: usize, const WEIGHTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; WEIGHTS]),
) {
    for (block, weights) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<WEIGHTS>().0) {
        decode(block, weights);
    }
}

/// The f16 at byte `at` of a block.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests;
