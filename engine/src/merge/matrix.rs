//! One matrix on its way from the base's file into the merged one.

use std::io::Write;
use std::path::Path;

use tidemill_kernels::Format;
use tidemill_kernels::blocks::{dequantize_row, quantize_row};

use super::{MergeError, at};
use crate::adapter::Pair;
use crate::model_files::FileMatrix;

/// Largest finite f16.
const F16_MAX: f32 = 65504.0;

/// Whose order the rows are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As they lie in the base's file.
    File,
    /// As the publisher has them.
    Publisher,
}

/// A matrix with what an adapter adds to it.
pub(super) struct MergedMatrix<'a> {
    pub name: String,
    pub matrix: FileMatrix<'a>,
    pub pair: Option<&'a Pair>,
    pub storage: Format,
}

impl MergedMatrix<'_> {
    /// Writes all rows.
    pub fn write(&self, order: Order, path: &Path, out: &mut dyn Write) -> Result<(), MergeError> {
        let FileMatrix { n, k, format, data, row_order } = &self.matrix;
        let source_bytes = format.row_bytes(*k).unwrap_or(0);
        let target_bytes = self.storage.row_bytes(*k).ok_or_else(|| {
            let (name, storage) = (&self.name, self.storage);
            MergeError::Unsupported(format!("{name}: rows of {k} numbers cannot be stored as {storage:?}; choose f16 or bf16"))
        })?;
        // Output feature i is file row row_order[i].
        let features: Vec<usize> = match (order, row_order) {
            (Order::File, Some(rows)) => {
                let mut features = vec![0; *n];
                for (feature, row) in rows.iter().enumerate() {
                    features[*row as usize] = feature;
                }
                features
            }
            _ => (0..*n).collect(),
        };
        let file_row = |position: usize| match (order, row_order) {
            (Order::Publisher, Some(rows)) => rows[position] as usize,
            _ => position,
        };
        let (mut values, mut bytes) = (vec![0f32; *k], vec![0u8; target_bytes]);
        for (position, feature) in features.iter().enumerate() {
            let row = &data[file_row(position) * source_bytes..][..source_bytes];
            if self.pair.is_none() && self.storage == *format {
                at("write", path, out.write_all(row))?;
                continue;
            }
            dequantize_row(*format, row, &mut values)?;
            if let Some(pair) = self.pair {
                add(pair, *feature, &mut values);
            }
            if self.storage == Format::F16
                && let Some(value) = values.iter().find(|value| value.abs() > F16_MAX)
            {
                return Err(MergeError::Range { tensor: self.name.clone(), value: *value });
            }
            quantize_row(self.storage, &values, &mut bytes)?;
            at("write", path, out.write_all(&bytes))?;
        }
        Ok(())
    }
}

/// Adds row `feature` of `scale · B A`.
fn add(pair: &Pair, feature: usize, values: &mut [f32]) {
    let Pair { rank, scale, a, b, .. } = pair;
    for (factor, row) in b[feature * rank..][..*rank].iter().zip(a.chunks_exact(values.len())) {
        let factor = scale * factor;
        for (value, a) in values.iter_mut().zip(row) {
            *value += factor * a;
        }
    }
}
