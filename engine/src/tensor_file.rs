//! A mapped file of named tensors, whatever its container.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tidemill_kernels::Format;
use tidemill_kernels::mmap::Mmap;

use crate::load_error::LoadError;

/// A GGUF or safetensors file with the places of its tensors. Every place lies inside the file.
pub(crate) struct TensorFile {
    pub path: PathBuf,
    pub map: Mmap,
    pub tensors: HashMap<String, Placement>,
}

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// Outermost dimension first, as PyTorch says it.
    pub shape: Vec<usize>,
    /// How the elements are stored, or the file's name for a storage that we cannot read.
    pub format: Result<Format, String>,
    /// Bytes of the file.
    pub bytes: Range<usize>,
}

/// A tensor's bytes with their meaning.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor<'a> {
    pub path: &'a Path,
    pub name: &'a str,
    pub shape: &'a [usize],
    pub format: Format,
    pub data: &'a [u8],
}

impl TensorFile {
    /// The tensor called `name`, if the file has it.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, LoadError> {
        let Some((name, placement)) = self.tensors.get_key_value(name) else {
            return Ok(None);
        };
        let format = placement.format.clone().map_err(|storage| {
            LoadError::unsupported(
                &self.path,
                name,
                format!("storage as {storage}"),
                "use F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K",
            )
        })?;
        let data = self
            .map
            .get(placement.bytes.clone())
            .ok_or_else(|| LoadError::corrupt(&self.path, name, "the tensor lies beyond the end of the file"))?;
        Ok(Some(Tensor { path: &self.path, name, shape: &placement.shape, format, data }))
    }
}

impl Placement {
    /// Elements, where the file's sizes make sense.
    pub fn elements(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |product, &dimension| product.checked_mul(dimension))
    }
}

impl Tensor<'_> {
    /// Checks the shape.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<(), LoadError> {
        if self.shape == expected {
            return Ok(());
        }
        let detail =
            format!("shape {:?} where the configuration says {expected:?}; weights and configuration differ", self.shape);
        Err(LoadError::invalid(self.path, self.name, detail))
    }

    /// The elements of a plain (not block-quantised) tensor as f32.
    pub fn to_f32(self) -> Result<Vec<f32>, LoadError> {
        let pairs = || self.data.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        match self.format {
            Format::F32 => {
                let words = self.data.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
                Ok(words.map(f32::from_le_bytes).collect())
            }
            Format::Bf16 => Ok(pairs().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect()),
            Format::F16 => Ok(pairs().map(f16_to_f32).collect()),
            quantised => Err(LoadError::unsupported(
                self.path,
                self.name,
                format!("a vector stored as {quantised:?}"),
                "vectors are F32, F16 or BF16",
            )),
        }
    }
}

/// IEEE 754 binary16 to binary32, exact.
fn f16_to_f32(bits: u16) -> f32 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(bits >> 10 & 0x1f);
    let fraction = f32::from(bits & 0x3ff);
    match exponent {
        0 => sign * fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => sign * f32::INFINITY,
        31 => f32::NAN,
        _ => sign * (1024.0 + fraction) * 2f32.powi(exponent - 25),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_become_singles_exactly() {
        let cases = [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0400, 6.103_515_6e-5),
            (0x0001, 5.960_464_5e-8),
            (0x3555, 0.333_251_95),
            (0x7c00, f32::INFINITY),
            (0xfc00, f32::NEG_INFINITY),
        ];
        for (bits, expected) in cases {
            assert_eq!(f16_to_f32(bits), expected, "{bits:#06x}");
        }
        assert!(f16_to_f32(0x7e00).is_nan());
    }
}
