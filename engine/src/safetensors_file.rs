//! safetensors files: a JSON header, then the tensors.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use tidemill_kernels::Format;
use tidemill_kernels::mmap::Mmap;

use crate::gguf::tensor_bytes;
use crate::load_error::LoadError;
use crate::tensor_file::{Placement, TensorFile};

/// The format's own limit for its header.
const MAX_HEADER: usize = 100_000_000;

#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Tensor { dtype: String, shape: Vec<usize>, data_offsets: (usize, usize) },
    Other(serde::de::IgnoredAny),
}

/// Maps a file and reads its header.
pub(crate) fn open(path: &Path) -> Result<TensorFile, LoadError> {
    let map = Mmap::open(path).map_err(|error| LoadError::io(path, error))?;
    let tensors = header(path, &map)?;
    Ok(TensorFile { path: path.to_owned(), map, tensors })
}

fn header(path: &Path, bytes: &[u8]) -> Result<HashMap<String, Placement>, LoadError> {
    let corrupt = |detail: String| LoadError::corrupt(path, "header", detail);
    let (len, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| corrupt(format!("the file has {} bytes", bytes.len())))?;
    let len = u64::from_le_bytes(*len);
    let len = usize::try_from(len)
        .ok()
        .filter(|&len| len <= rest.len() && len <= MAX_HEADER)
        .ok_or_else(|| corrupt(format!("claims {len} bytes where {} are left", rest.len())))?;
    let (header, data) = rest.split_at(len);
    let entries: HashMap<String, Entry> = serde_json::from_slice(header).map_err(|error| corrupt(error.to_string()))?;
    let start = 8 + len;

    let mut tensors = HashMap::with_capacity(entries.len());
    let mut described = 0_usize;
    for (name, entry) in entries {
        let (dtype, shape, (begin, end)) = match entry {
            Entry::Tensor { dtype, shape, data_offsets } => (dtype, shape, data_offsets),
            Entry::Other(_) if name == "__metadata__" => continue,
            Entry::Other(_) => {
                return Err(LoadError::corrupt(path, name, "the description lacks dtype, shape or data_offsets"));
            }
        };
        if begin > end || end > data.len() {
            let detail = format!("lies at bytes {begin} to {end} of {}", data.len());
            return Err(LoadError::corrupt(path, name, detail));
        }
        let format = match dtype.as_str() {
            "F32" => Ok(Format::F32),
            "F16" => Ok(Format::F16),
            "BF16" => Ok(Format::Bf16),
            _ => Err(dtype),
        };
        if let Ok(format) = format
            && tensor_bytes(format, &shape) != Some(end - begin)
        {
            let detail = format!("has {} bytes, which is not what shape {shape:?} takes", end - begin);
            return Err(LoadError::corrupt(path, name, detail));
        }
        described = described.saturating_add(end - begin);
        tensors.insert(name, Placement { shape, format, bytes: start + begin..start + end });
    }
    // The format has no two tensors share bytes. A small file could otherwise be as much to read as its header cares to say.
    if described > data.len() {
        return Err(corrupt(format!(
            "describes {described} bytes of tensors where {} are: they lie over one another",
            data.len()
        )));
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
