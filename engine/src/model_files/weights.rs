//! Weights as they lie in the files: for a backend that packs them, and for training, which reads them where they are.

use tidemill_kernels::blocks::{dequantize_row, is_four_bit, quantize_row};
use tidemill_kernels::{Format, KernelError, MatrixSource, WeightFormat};

use super::ModelFiles;
use super::experts::rows_of;
use crate::load_error::LoadError;
use crate::model::weight_names::{Part, Weight};
use crate::model_config::{Family, ModelConfig};

/// A matrix `[n, k]` (output features, input features) in its file's format.
#[derive(Debug)]
pub struct FileMatrix<'a> {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Storage format of `data`.
    pub format: Format,
    /// `n` rows.
    pub data: &'a [u8],
    /// Output feature `i` is file row `row_order[i]`.
    pub row_order: Option<Vec<u32>>,
}

/// What a format holds of a number; block formats hold none alone, and leave it as it is.
fn rounded(number: f32, format: Format) -> Result<f32, KernelError> {
    let Some(bytes) = format.row_bytes(1) else { return Ok(number) };
    let (mut stored, mut value) = (vec![0; bytes], [number]);
    quantize_row(format, &value, &mut stored)?;
    dequantize_row(format, &stored, &mut value)?;
    Ok(value[0])
}

impl FileMatrix<'_> {
    /// For kernels.
    pub fn source(&self) -> MatrixSource<'_> {
        let Self { n, k, format, data, row_order } = self;
        MatrixSource { n: *n, k: *k, format: *format, data, row_order: row_order.as_deref() }
    }
}

impl ModelConfig {
    /// `[n, k]` of a matrix; vectors are `[n, 1]`.
    pub fn shape_of(&self, weight: Weight) -> (usize, usize) {
        let &ModelConfig { hidden, intermediate, heads, kv_heads, head_dim, vocabulary, .. } = self;
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        match weight {
            Weight::Embedding | Weight::Output => (vocabulary, hidden),
            Weight::FinalNorm => (hidden, 1),
            Weight::Layer(_, part) => match part {
                Part::AttentionNorm | Part::FeedForwardNorm | Part::AttentionOutputBias | Part::DownBias => (hidden, 1),
                Part::PostAttentionNorm | Part::PostFeedForwardNorm => (hidden, 1),
                Part::Query => (queries, hidden),
                Part::Key | Part::Value => (keys, hidden),
                Part::QueryBias => (queries, 1),
                Part::KeyBias | Part::ValueBias => (keys, 1),
                Part::QueryNorm | Part::KeyNorm => (head_dim, 1),
                Part::AttentionOutput => (hidden, queries),
                Part::Gate | Part::Up => (intermediate, hidden),
                Part::GateBias | Part::UpBias => (intermediate, 1),
                Part::Down => (hidden, intermediate),
            },
        }
    }
}

impl ModelConfig {
    /// Rows of the one matrix that query, key and value are in some files, and the first of them that is this weight's.
    fn place_in_qkv(&self, weight: Weight) -> Option<(usize, usize)> {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let first = match weight {
            Weight::Layer(_, Part::Query) => 0,
            Weight::Layer(_, Part::Key) => queries,
            Weight::Layer(_, Part::Value) => queries + keys,
            _ => return None,
        };
        Some((queries + 2 * keys, first))
    }

    /// Whether layers of the model have this part.
    pub fn has(&self, part: Part) -> bool {
        match part {
            Part::QueryNorm | Part::KeyNorm => self.qk_norm,
            Part::QueryBias | Part::KeyBias | Part::ValueBias => self.qkv_bias,
            Part::AttentionOutputBias => self.output_bias,
            Part::GateBias => self.mlp_bias && self.gated,
            Part::UpBias | Part::DownBias => self.mlp_bias,
            Part::AttentionNorm | Part::FeedForwardNorm | Part::Query | Part::Key | Part::Value | Part::AttentionOutput => true,
            Part::Gate => self.experts.is_none() && self.gated,
            Part::Up | Part::Down => self.experts.is_none(),
            Part::PostAttentionNorm | Part::PostFeedForwardNorm => self.gemma.is_some(),
        }
    }

    /// Every tensor of the model, in the order of its layers, but for experts; a tied output matrix is none of its own.
    pub fn weights(&self) -> Vec<Weight> {
        let parts: Vec<Part> = Part::ALL.into_iter().filter(|part| self.has(*part)).collect();
        let layers = (0..self.layers).flat_map(|layer| parts.iter().map(move |part| Weight::Layer(layer, *part)));
        let output = (!self.tied_embeddings).then_some(Weight::Output);
        std::iter::once(Weight::Embedding).chain(layers).chain([Weight::FinalNorm]).chain(output).collect()
    }
}

impl ModelFiles {
    /// A matrix of the model, checked against the configuration.
    pub fn matrix(&self, weight: Weight) -> Result<FileMatrix<'_>, LoadError> {
        let (n, k) = self.config.shape_of(weight);
        let (rows, first) = if self.naming().joins_qkv() { self.config.place_in_qkv(weight) } else { None }.unwrap_or((n, 0));
        let matrix = rows_of(self.need(weight)?, &[rows], first, n, k)?;
        Ok(FileMatrix { row_order: self.row_order(weight, n), ..matrix })
    }

    /// Query, key and value of a layer in one matrix, of files that have them so.
    pub(crate) fn joined_qkv(&self, layer: usize) -> Result<FileMatrix<'_>, LoadError> {
        let query = Weight::Layer(layer, Part::Query);
        let (n, k) = (self.config.place_in_qkv(query).map_or(0, |(rows, _)| rows), self.config.hidden);
        rows_of(self.need(query)?, &[n], 0, n, k)
    }

    /// A norm's weight or a bias.
    pub fn vector(&self, weight: Weight) -> Result<Vec<f32>, LoadError> {
        let (width, _) = self.config.shape_of(weight);
        let tensor = self.need(weight)?;
        tensor.expect_shape(&[width])?;
        let mut values = tensor.to_f32()?;
        if self.norms_are_offset() && weight.is_norm() {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(match self.row_order(weight, width) {
            None => values,
            Some(order) => order.iter().filter_map(|&row| values.get(row as usize).copied()).collect(),
        })
    }

    /// Whether the files hold what norms multiply with less 1: a publisher's files of Gemma do, llama.cpp's do not.
    pub(crate) fn norms_are_offset(&self) -> bool {
        self.config.gemma.is_some() && !self.naming().is_gguf()
    }

    /// What rows of the embedding table are multiplied with: in Gemma the root of the width, which transformers rounds to the table's
    /// type and llama.cpp does not.
    pub fn embedding_scale(&self) -> Result<Option<f32>, LoadError> {
        if self.config.gemma.is_none() {
            return Ok(None);
        }
        let format = if self.naming().is_gguf() { Format::F32 } else { self.need(Weight::Embedding)?.format };
        let scale = rounded((self.config.hidden as f64).sqrt() as f32, format);
        scale.map(Some).map_err(|source| {
            let what = "embedding scale".to_owned();
            LoadError::Kernel { path: self.path.clone(), what, source }
        })
    }

    /// About how many bytes the weights take when a card has packed them.
    pub(crate) fn packed_bytes(&self, packed: WeightFormat) -> Result<u64, LoadError> {
        let bits = |format: Format| match (packed, format) {
            (WeightFormat::F32, _) | (WeightFormat::Auto, Format::F32) => 32,
            (WeightFormat::Bf16, _) | (WeightFormat::Auto, Format::F16 | Format::Bf16) => 16,
            // Nibbles, and two halves for 32 of them.
            (WeightFormat::Auto, format) if is_four_bit(format) => 5,
            (WeightFormat::Int8 | WeightFormat::Fp8 | WeightFormat::Auto, _) => 8,
        };
        let add = |sum: u64, n: usize, k: usize, format: Format| {
            sum.saturating_add((n as u64).saturating_mul(k as u64).saturating_mul(bits(format)) / 8)
        };
        let dense = self.config.weights().into_iter().try_fold(0, |sum, weight| {
            let (n, k) = self.config.shape_of(weight);
            Ok(add(sum, n, k, self.need(weight)?.format))
        })?;
        let mixtures = self.config.mixtures();
        let mut all = (0..self.config.layers).flat_map(|layer| mixtures.iter().map(move |which| (layer, *which)));
        all.try_fold(dense, |sum, (layer, which)| {
            let matrix = self.mixture(layer, which)?;
            Ok(add(sum, matrix.n, matrix.k, matrix.format))
        })
    }

    /// The output matrix: the embedding table where the two are tied.
    pub fn output(&self) -> Weight {
        if self.config.tied_embeddings { Weight::Embedding } else { Weight::Output }
    }

    fn row_order(&self, weight: Weight, rows: usize) -> Option<Vec<u32>> {
        self.naming().is_gguf().then(|| self.config.gguf_row_order(weight, rows)).flatten()
    }
}

impl ModelConfig {
    /// The order in which a GGUF file has the rows of a matrix: output feature `i` is file row `order[i]`. None for the publisher's own.
    ///
    /// llama.cpp's converter reorders the rows of q and k in llama-family models so that rotated pairs are neighbours
    /// (`LlamaModel.permute`); ours rotates halves, as the publishers' models do.
    pub(crate) fn gguf_row_order(&self, weight: Weight, rows: usize) -> Option<Vec<u32>> {
        let rotated = matches!(weight, Weight::Layer(_, Part::Query | Part::Key | Part::QueryBias | Part::KeyBias));
        if !(rotated && matches!(self.family, Family::Llama | Family::Mistral | Family::Mixtral)) {
            return None;
        }
        let (head_dim, half) = (self.head_dim, self.head_dim / 2);
        let order = (0..rows).map(|row| {
            let (head, within) = (row / head_dim, row % head_dim);
            head * head_dim + within % half * 2 + within / half
        });
        order.map(|row| u32::try_from(row).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_a_width_is_rounded_as_the_table_is() {
        // What transformers says of 3072 in bfloat16.
        let root = 3072f32.sqrt();
        assert_eq!(rounded(root, Format::Bf16).unwrap(), 55.5);
        assert_eq!(rounded(root, Format::F16).unwrap(), 55.4375);
        assert_eq!(rounded(root, Format::F32).unwrap(), root);
        assert_eq!(rounded(root, Format::Q8_0).unwrap(), root);
    }
}
