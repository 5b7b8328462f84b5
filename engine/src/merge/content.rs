//! What a tensor of a merged model holds, whatever its container.

use std::io::Write;
use std::path::Path;

use tidemill_kernels::Format;

use super::matrix::{MergedMatrix, Order};
use super::{MergeError, at};
use crate::adapter::Pair;
use crate::gguf::tensor_bytes;
use crate::model_files::FileMatrix;

/// A tensor's data, before it is written.
pub(super) enum Content<'a> {
    /// Bytes as the base's file has them.
    Copied(&'a [u8]),
    /// Rows of a matrix, perhaps with what the adapter adds.
    Matrix(MergedMatrix<'a>),
    /// f32.
    Vector(Vec<f32>),
    /// Bytes that are made when they are written.
    Made(Box<dyn Fn() -> Result<Vec<u8>, MergeError> + 'a>),
}

impl<'a> Content<'a> {
    /// A matrix as `storage`, with its size in bytes.
    pub fn matrix(name: &str, matrix: FileMatrix<'a>, pair: Option<&'a Pair>, storage: Format) -> (Self, usize) {
        let len = tensor_bytes(storage, &[matrix.n, matrix.k]).unwrap_or(0);
        (Self::Matrix(MergedMatrix { name: name.to_owned(), matrix, pair, storage }), len)
    }

    /// Writes all of it.
    pub fn write(&self, order: &Order, path: &Path, out: &mut dyn Write) -> Result<(), MergeError> {
        match self {
            Self::Copied(bytes) => at("write", path, out.write_all(bytes)),
            Self::Matrix(matrix) => matrix.write(order, path, out),
            Self::Made(make) => at("write", path, out.write_all(&make()?)),
            Self::Vector(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                at("write", path, out.write_all(&bytes))
            }
        }
    }
}
