//! Rows of an embedding table that is trained.

use candle_core::{CpuStorage, CustomOp1, Device, Layout as Strides, Shape, Tensor};

use super::{ModelError, slice};
use crate::parameters::read;

/// `[vocabulary * width]` to the rows of `tokens`, `[tokens, width]`.
pub(super) struct Embedding {
    pub tokens: Vec<u32>,
    pub width: usize,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "trained embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, strides: &Strides) -> candle_core::Result<(CpuStorage, Shape)> {
        let (table, width) = (slice(table, strides)?, self.width);
        let mut out = Vec::with_capacity(self.tokens.len() * width);
        for token in &self.tokens {
            let start = *token as usize * width;
            let vocabulary = table.len() / width.max(1);
            out.extend_from_slice(table.get(start..start + width).ok_or(ModelError::Token { token: *token, vocabulary })?);
        }
        Ok((CpuStorage::F32(out), Shape::from((self.tokens.len(), width))))
    }

    /// Sums over the places of a token, in their order.
    fn bwd(&self, table: &Tensor, _: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let mut dtable = vec![0.0; table.elem_count()];
        read(dout, |dout| {
            for (token, dout) in self.tokens.iter().zip(dout.chunks(self.width)) {
                let start = *token as usize * self.width;
                dtable[start..start + self.width].iter_mut().zip(dout).for_each(|(sum, dout)| *sum += dout);
            }
        })?;
        Ok(Some(Tensor::from_vec(dtable, table.shape(), &Device::Cpu)?))
    }
}
