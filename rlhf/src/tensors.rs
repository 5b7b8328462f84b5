//! Named lists of f32 as a safetensors file. The same numbers give the same bytes.

use std::borrow::Cow;

use safetensors::{Dtype, SafeTensors, View};

/// Why bytes are not such a file.
#[derive(Debug, thiserror::Error)]
pub enum TensorsError {
    /// Not safetensors.
    #[error("not a safetensors file: {0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// A tensor that is missing, or not f32 of the expected length.
    #[error("tensor {name}: {detail}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong with it.
        detail: String,
    },
}

struct List<'a>(&'a [f32], [usize; 1]);

impl View for List<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.1
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.0.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        size_of_val(self.0)
    }
}

/// The file's bytes; tensors are sorted by name and have one dimension.
pub(crate) fn write<'a>(lists: impl IntoIterator<Item = (String, &'a [f32])>) -> Result<Vec<u8>, TensorsError> {
    let views = lists.into_iter().map(|(name, values)| (name, List(values, [values.len()])));
    Ok(safetensors::serialize(views, None)?)
}

/// A file that was read.
pub(crate) struct Lists<'a>(SafeTensors<'a>);

impl<'a> Lists<'a> {
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, TensorsError> {
        Ok(Self(SafeTensors::deserialize(bytes)?))
    }

    /// The numbers of one tensor, `length` of them.
    pub(crate) fn get(&self, name: &str, length: usize) -> Result<Vec<f32>, TensorsError> {
        let fail = |detail: String| TensorsError::Tensor { name: name.to_owned(), detail };
        let view = self.0.tensor(name).map_err(|_| fail("it is not in the file".to_owned()))?;
        if view.dtype() != Dtype::F32 || view.data().len() != 4 * length {
            return Err(fail(format!("expected {length} numbers of f32, found {:?} {:?}", view.shape(), view.dtype())));
        }
        let (numbers, _) = view.data().as_chunks::<4>();
        Ok(numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// How many tensors there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
