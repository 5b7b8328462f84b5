//! f32 rows to the plain formats and the three simplest block formats, for tests and tools. Rounding follows
//! `quantize_row_*_ref` of `ggml-quants.c`.

use half::{bf16, f16};

use super::check_row;
use crate::error::KernelError;
use crate::ops::Format;

/// Encodes one row into `out`, which must have the format's row size.
///
/// F32, F16, Bf16, Q4_0, Q4_1 and Q8_0; the other formats are [`KernelError::Unsupported`].
pub fn quantize_row(format: Format, values: &[f32], out: &mut [u8]) -> Result<(), KernelError> {
    check_row(format, out.len(), values.len())?;
    match format {
        Format::F32 => {
            for (b, v) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *b = v.to_le_bytes();
            }
        }
        Format::F16 => {
            for (b, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *b = f16::from_f32(*v).to_le_bytes();
            }
        }
        Format::Bf16 => {
            for (b, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *b = bf16::from_f32(*v).to_le_bytes();
            }
        }
        Format::Q4_0 => each_block(values, out, q4_0),
        Format::Q4_1 => each_block(values, out, q4_1),
        Format::Q8_0 => each_block(values, out, q8_0),
        other => return Err(KernelError::Unsupported(format!("there is no encoder for {other:?}"))),
    }
    Ok(())
}

fn each_block<const BYTES: usize>(values: &[f32], out: &mut [u8], encode: impl Fn(&[f32; 32], &mut [u8; BYTES])) {
    for (values, block) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<BYTES>().0) {
        encode(values, block);
    }
}

fn invert(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn q4_0(values: &[f32; 32], block: &mut [u8; 18]) {
    // The signed value of largest magnitude becomes −8, the one quant without a positive twin.
    let extreme = values.iter().fold(0.0f32, |a, v| if v.abs() > a.abs() { *v } else { a });
    let d = extreme / -8.0;
    let quant = |v: f32| (v * invert(d) + 8.5).clamp(0.0, 15.0) as u8;
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for j in 0..16 {
        block[2 + j] = quant(values[j]) | quant(values[j + 16]) << 4;
    }
}

fn q4_1(values: &[f32; 32], block: &mut [u8; 20]) {
    let (min, max) = values.iter().fold((f32::MAX, f32::MIN), |(min, max), v| (min.min(*v), max.max(*v)));
    let d = (max - min) / 15.0;
    let quant = |v: f32| ((v - min) * invert(d) + 0.5).clamp(0.0, 15.0) as u8;
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
    for j in 0..16 {
        block[4 + j] = quant(values[j]) | quant(values[j + 16]) << 4;
    }
}

fn q8_0(values: &[f32; 32], block: &mut [u8; 34]) {
    let d = values.iter().fold(0.0f32, |a, v| a.max(v.abs())) / 127.0;
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (b, v) in block[2..].iter_mut().zip(values) {
        *b = ((v * invert(d)).round() as i8).cast_unsigned();
    }
}
