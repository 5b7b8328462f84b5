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

/// In which order the rows are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As they lie in the base's file.
    File,
    /// As the publisher has them.
    Publisher,
    /// Output feature `i` at place `order[i]`.
    Of(Vec<u32>),
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
    pub fn write(&self, order: &Order, path: &Path, out: &mut dyn Write) -> Result<(), MergeError> {
        let FileMatrix { n, k, format, data, row_order } = &self.matrix;
        let source_bytes = format.row_bytes(*k).unwrap_or(0);
        let target_bytes = self.storage.row_bytes(*k).ok_or_else(|| {
            let (name, storage) = (&self.name, self.storage);
            MergeError::Unsupported(format!("{name}: rows of {k} numbers cannot be stored as {storage:?}; choose f16 or bf16"))
        })?;
        // Output feature i is file row row_order[i].
        let features = match (order, row_order) {
            (Order::File, Some(rows)) => features_by_place(rows),
            (Order::Of(places), _) => features_by_place(places),
            (Order::File, None) | (Order::Publisher, _) => (0..*n).collect(),
        };
        let row_of = |feature: usize| row_order.as_ref().map_or(feature, |rows| rows[feature] as usize);
        let (mut values, mut bytes) = (vec![0f32; *k], vec![0u8; target_bytes]);
        for feature in features {
            let row = &data[row_of(feature) * source_bytes..][..source_bytes];
            if self.pair.is_none() && self.storage == *format {
                at("write", path, out.write_all(row))?;
                continue;
            }
            dequantize_row(*format, row, &mut values)?;
            if let Some(pair) = self.pair {
                add(pair, feature, &mut values);
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

/// Which feature lies at each place, where feature `i` lies at `places[i]`.
fn features_by_place(places: &[u32]) -> Vec<usize> {
    let mut features = vec![0; places.len()];
    for (feature, place) in places.iter().enumerate() {
        features[*place as usize] = feature;
    }
    features
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
