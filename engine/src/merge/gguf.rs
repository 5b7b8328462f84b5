//! A merged GGUF file: the base's, with other matrices in it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use tidemill_kernels::Format;

use super::matrix::{MergedMatrix, Order};
use super::{MergeError, Merged, at, weight};
use crate::adapter::{Adapter, Pair};
use crate::gguf::{Description, Gguf, storage_number, tensor_bytes};
use crate::model::weight_names::Naming;
use crate::model_files::ModelFiles;

pub(super) fn write(base: &ModelFiles, adapter: &Adapter, to: &Path, storage: Option<Format>) -> Result<Merged, MergeError> {
    let source = Gguf::open(base.path())?;
    if source.integer("split.count")?.unwrap_or(1) > 1 {
        return Err(MergeError::Unsupported(
            "the base is split into several files; join them first (llama-gguf-split --merge)".into(),
        ));
    }
    let changed: HashMap<String, &Pair> =
        adapter.pairs.iter().map(|pair| (Naming::Gguf.name(weight(pair.layer, pair.projection)), pair)).collect();
    let descriptions = source.descriptions()?;
    // What each tensor will be stored as; those that are copied keep even what we could not read.
    let target = |name: &str| {
        let own = source.file.tensors.get(name).and_then(|placement| placement.format.clone().ok());
        changed.get(name).map(|_| storage.unwrap_or_else(|| plain(own)))
    };
    let mut out = BufWriter::with_capacity(1 << 20, at("create", to, File::create(to))?);
    let mut place = Place { path: to, written: 0, out: &mut out };
    place.put(source.head())?;
    let mut offset = 0usize;
    for Description { name, shape, storage, bytes } in &descriptions {
        let (number, len) = match target(name) {
            Some(format) => (storage_number(format), tensor_bytes(format, shape).unwrap_or(0)),
            None => (*storage, bytes.len()),
        };
        place.put(&(name.len() as u64).to_le_bytes())?;
        place.put(name.as_bytes())?;
        place.put(&(shape.len() as u32).to_le_bytes())?;
        for size in shape.iter().rev() {
            place.put(&(*size as u64).to_le_bytes())?;
        }
        place.put(&number.to_le_bytes())?;
        place.put(&(offset as u64).to_le_bytes())?;
        offset = (offset + len).next_multiple_of(source.alignment());
    }
    place.pad(source.alignment())?;
    for Description { name, bytes, .. } in &descriptions {
        match (changed.get(name.as_str()), target(name)) {
            (Some(pair), Some(storage)) => {
                let matrix = base.matrix(weight(pair.layer, pair.projection))?;
                MergedMatrix { name: name.clone(), matrix, pair: Some(pair), storage }.write(Order::File, to, &mut place)?;
            }
            _ => place.put(source.file.map.get(bytes.clone()).unwrap_or_default())?,
        }
        place.pad(source.alignment())?;
    }
    let bytes = place.written as u64;
    at("write", to, out.flush())?;
    at("write", to, out.get_ref().sync_all())?;
    Ok(Merged { matrices: changed.len(), bytes })
}

/// Quantising again would round away what the adapter adds.
fn plain(own: Option<Format>) -> Format {
    own.filter(|format| format.block_len() == 1).unwrap_or(Format::F16)
}

/// Where the file is being written.
struct Place<'a> {
    path: &'a Path,
    written: usize,
    out: &'a mut BufWriter<File>,
}

impl Place<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), MergeError> {
        let path = self.path;
        at("write", path, self.write_all(bytes))
    }

    fn pad(&mut self, alignment: usize) -> Result<(), MergeError> {
        let missing = self.written.next_multiple_of(alignment) - self.written;
        self.put(&vec![0; missing])
    }
}

impl Write for Place<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.written += written;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
