//! Where all the numbers of a layer lie when all of them are trained: its matrices in one flat parameter, norms and biases, which do not
//! decay, in another.

use std::ops::Range;

use tidemill_engine::{FileMatrix, ModelConfig, ModelFiles, Part, Weight};
use tidemill_kernels::blocks;

use super::ModelError;
use super::layout::Group;

/// The layout of a layer's two parameters.
#[derive(Clone, Debug)]
pub(super) struct Whole {
    /// By group: its matrices on top of each other, `[Σ out, in]`.
    pub matrices: [Range<usize>; 4],
    /// Norms and biases that the family has, in the order of [`VECTORS`].
    vectors: Vec<(Part, Range<usize>)>,
}

/// The parts that are no matrices; biases of a group lie side by side.
const VECTORS: [Part; 11] = [
    Part::AttentionNorm,
    Part::FeedForwardNorm,
    Part::QueryNorm,
    Part::KeyNorm,
    Part::QueryBias,
    Part::KeyBias,
    Part::ValueBias,
    Part::AttentionOutputBias,
    Part::GateBias,
    Part::UpBias,
    Part::DownBias,
];

/// First and last bias of a group.
const fn biases(group: Group) -> (Part, Part) {
    match group {
        Group::Qkv => (Part::QueryBias, Part::ValueBias),
        Group::AttentionOutput => (Part::AttentionOutputBias, Part::AttentionOutputBias),
        Group::GateUp => (Part::GateBias, Part::UpBias),
        Group::Down => (Part::DownBias, Part::DownBias),
    }
}

impl Whole {
    pub fn new(config: &ModelConfig) -> Self {
        let mut len = 0;
        let matrices = Group::ALL.map(|group| {
            let first = len;
            for projection in group.projections() {
                let (n, k) = projection.shape(config);
                len += n * k;
            }
            first..len
        });
        let mut len = 0;
        let vectors = VECTORS.into_iter().filter(|part| config.has(*part)).map(|part| {
            let first = len;
            len += config.shape_of(Weight::Layer(0, part)).0;
            (part, first..len)
        });
        Self { matrices, vectors: vectors.collect() }
    }

    /// Numbers of the first parameter.
    pub fn matrices_len(&self) -> usize {
        self.matrices[Group::Down as usize].end
    }

    /// Numbers of the second one.
    pub fn vectors_len(&self) -> usize {
        self.vectors.last().map_or(0, |(_, range)| range.end)
    }

    /// Where a norm or bias lies in the second parameter; empty for one that the family does not have.
    pub fn vector(&self, part: Part) -> Range<usize> {
        self.vectors.iter().find(|(own, _)| *own == part).map_or(0..0, |(_, range)| range.clone())
    }

    /// The biases of a group; empty without.
    pub fn bias(&self, group: Group) -> Range<usize> {
        let (first, last) = biases(group);
        self.vector(first).start..self.vector(last).end
    }

    /// Where one matrix lies in the first parameter.
    pub fn matrix(&self, config: &ModelConfig, part: Part) -> Option<Range<usize>> {
        let group = Group::ALL.into_iter().find(|group| group.projections().iter().any(|own| own.part() == part))?;
        let mut first = self.matrices[group as usize].start;
        for projection in group.projections() {
            let (n, k) = projection.shape(config);
            if projection.part() == part {
                return Some(first..first + n * k);
            }
            first += n * k;
        }
        None
    }

    /// The numbers that the files hold for layer `index`: both parameters.
    pub fn read(&self, files: &ModelFiles, index: usize) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
        let mut matrices = Vec::with_capacity(self.matrices_len());
        for projection in Group::ALL.iter().flat_map(|group| group.projections()) {
            append(&files.matrix(Weight::Layer(index, projection.part()))?, &mut matrices)?;
        }
        let mut vectors = Vec::with_capacity(self.vectors_len());
        for (part, _) in &self.vectors {
            vectors.extend(files.vector(Weight::Layer(index, *part))?);
        }
        Ok((matrices, vectors))
    }
}

/// Appends a matrix's numbers, output feature by output feature.
pub(super) fn append(matrix: &FileMatrix<'_>, to: &mut Vec<f32>) -> Result<(), ModelError> {
    let FileMatrix { n, k, format, data, row_order } = matrix;
    let bytes = format.row_bytes(*k).unwrap_or(0);
    let first = to.len();
    to.resize(first + n * k, 0.0);
    for (feature, out) in to[first..].chunks_mut(*k).enumerate() {
        let row = row_order.as_ref().map_or(feature, |order| order[feature] as usize);
        blocks::dequantize_row(*format, &data[row * bytes..(row + 1) * bytes], out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tidemill_engine::Projection;

    use super::*;

    #[test]
    fn every_number_of_a_layer_has_a_place_of_its_own() {
        for family in ["llama", "qwen2", "qwen3"] {
            let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family);
            let files = ModelFiles::open(&path).unwrap();
            let (config, whole) = (files.config(), Whole::new(files.config()));
            let (matrices, vectors) = whole.read(&files, 1).unwrap();
            assert_eq!((matrices.len(), vectors.len()), (whole.matrices_len(), whole.vectors_len()), "{family}");
            let mut seen = 0;
            for projection in Projection::ALL {
                let part = projection.part();
                let range = whole.matrix(config, part).unwrap();
                let mut own = Vec::new();
                append(&files.matrix(Weight::Layer(1, part)).unwrap(), &mut own).unwrap();
                assert_eq!(matrices[range.clone()], own, "{family} {part:?}");
                seen += range.len();
            }
            assert_eq!(seen, matrices.len());
            for part in VECTORS {
                let range = whole.vector(part);
                assert_eq!(!range.is_empty(), config.has(part), "{family} {part:?}");
                if !range.is_empty() {
                    assert_eq!(vectors[range], files.vector(Weight::Layer(1, part)).unwrap(), "{family} {part:?}");
                }
            }
            assert_eq!(whole.bias(Group::Qkv).is_empty(), family != "qwen2");
        }
    }
}
