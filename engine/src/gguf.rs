//! GGUF files, versions 2 and 3: metadata and tensors in one file.
//!
//! Layout (ggml's `docs/gguf.md`): magic, version, counts, key-value pairs, tensor descriptions, padding, tensor data; all
//! little-endian. Nothing that the file claims is believed: every count and length is checked against the bytes that are left
//! before anything is reserved.

mod pairs;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use tidemill_kernels::Format;
use tidemill_kernels::mmap::Mmap;

use crate::load_error::LoadError;
use crate::tensor_file::{Placement, TensorFile};

pub(crate) use pairs::{Pairs, Planned, padding};

/// A parsed file.
pub(crate) struct Gguf {
    pub file: TensorFile,
    metadata: Metadata,
    /// Where the descriptions of tensors begin.
    descriptions: usize,
    alignment: usize,
}

/// What the file says of a tensor.
pub(crate) struct Description {
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// ggml's number.
    pub storage: u32,
    /// Bytes of the file; of a storage that we cannot read, up to the next tensor.
    pub bytes: Range<usize>,
}

type Metadata = HashMap<String, Entry>;
type Placements = HashMap<String, Placement>;

/// A metadata value. Texts and arrays stay in the file.
#[derive(Clone, Debug, PartialEq)]
enum Entry {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    Array(Array),
}

/// An array whose extent has been checked.
#[derive(Clone, Debug, PartialEq)]
struct Array {
    kind: Kind,
    len: usize,
    bytes: Range<usize>,
}

/// Types of metadata values, numbered as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Text = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

const MAGIC: &[u8] = b"GGUF";
const DEFAULT_ALIGNMENT: usize = 32;
const MAX_DIMENSIONS: usize = 4;

impl Gguf {
    /// Maps and parses a file.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let map = Mmap::open(path).map_err(|error| LoadError::io(path, error))?;
        Self::parse(path, map)
    }

    fn parse(path: &Path, map: Mmap) -> Result<Self, LoadError> {
        let Parsed { metadata, tensors, descriptions, alignment } = Cursor { path, bytes: &map, at: 0 }.file()?;
        Ok(Self { file: TensorFile { path: path.to_owned(), map, tensors }, metadata, descriptions, alignment })
    }

    /// The metadata as it stands in the file, without the keys that are left out.
    pub fn pairs(&self, left_out: &[&str]) -> Result<Pairs, LoadError> {
        // Behind the version.
        let mut cursor = Cursor { path: self.path(), bytes: &self.file.map, at: MAGIC.len() + size_of::<u32>() };
        cursor.size("tensor count")?;
        let count = cursor.count("metadata count", 13)?;
        let mut pairs = Pairs::default();
        for _ in 0..count {
            let start = cursor.at;
            let key = cursor.owned_text("metadata key")?;
            let kind = cursor.kind(&key)?;
            cursor.entry(&key, kind, 0)?;
            if !left_out.contains(&key.as_str()) {
                pairs.copied(&self.file.map[start..cursor.at]);
            }
        }
        Ok(pairs)
    }

    /// What the places of tensors are multiples of.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// All tensors, in the file's order.
    pub fn descriptions(&self) -> Result<Vec<Description>, LoadError> {
        let mut cursor = Cursor { path: self.path(), bytes: &self.file.map, at: self.descriptions };
        let described = (0..self.file.tensors.len()).map(|_| cursor.tensor()).collect::<Result<Vec<_>, _>>()?;
        let starts: Vec<usize> = self.file.tensors.values().map(|placement| placement.bytes.start).collect();
        let described = described.into_iter().map(|Described { name, shape, storage, .. }| {
            let mut bytes = self.file.tensors.get(&name).map(|placement| placement.bytes.clone()).unwrap_or_default();
            if bytes.is_empty() {
                let next = starts.iter().copied().filter(|start| *start > bytes.start).min();
                bytes.end = next.unwrap_or(self.file.map.len());
            }
            Description { name, shape, storage, bytes }
        });
        Ok(described.collect())
    }

    /// The file, for error texts.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// A whole number that is not negative.
    pub fn integer(&self, key: &str) -> Result<Option<usize>, LoadError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Entry::Integer(value)) => usize::try_from(*value)
                .map(Some)
                .map_err(|_| LoadError::invalid(self.path(), key, format!("{value} is out of range"))),
            Some(other) => Err(self.mismatch(key, "a whole number", other)),
        }
    }

    /// A token id.
    pub fn token_id(&self, key: &str) -> Result<Option<u32>, LoadError> {
        // Writers mark an absent token with -1, as an unsigned number or not.
        Ok(self
            .integer(key)
            .or_else(|error| self.is_minus_one(key).then_some(None).ok_or(error))?
            .and_then(|id| id.try_into().ok())
            .filter(|id| *id != u32::MAX))
    }

    fn is_minus_one(&self, key: &str) -> bool {
        matches!(self.metadata.get(key), Some(Entry::Integer(-1)))
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Entry::Float(value)) => Ok(Some(*value)),
            Some(Entry::Integer(value)) => Ok(Some(*value as f64)),
            Some(other) => Err(self.mismatch(key, "a number", other)),
        }
    }

    /// Yes or no.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Entry::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.mismatch(key, "true or false", other)),
        }
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Entry::Text(range)) => self.text_at(key, range.clone()).map(Some),
            Some(other) => Err(self.mismatch(key, "a text", other)),
        }
    }

    /// Texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, LoadError> {
        let Some(array) = self.array(key)? else { return Ok(None) };
        if array.kind != Kind::Text {
            return Err(LoadError::invalid(self.path(), key, format!("a list of {:?} where texts belong", array.kind)));
        }
        let mut cursor = Cursor { path: self.path(), bytes: &self.file.map, at: array.bytes.start };
        let mut texts = Vec::with_capacity(array.len);
        for _ in 0..array.len {
            let range = cursor.text(key)?;
            texts.push(self.text_at(key, range)?);
        }
        Ok(Some(texts))
    }

    /// Numbers of any kind.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f32>>, LoadError> {
        let Some(array) = self.array(key)? else { return Ok(None) };
        let mut cursor = Cursor { path: self.path(), bytes: &self.file.map, at: array.bytes.start };
        let mut numbers = Vec::with_capacity(array.len);
        for _ in 0..array.len {
            numbers.push(match cursor.entry(key, array.kind, 0)? {
                Entry::Integer(value) => value as f32,
                Entry::Float(value) => value as f32,
                other => return Err(self.mismatch(key, "a list of numbers", &other)),
            });
        }
        Ok(Some(numbers))
    }

    /// What is missing, as an error.
    pub fn missing(&self, key: &str) -> LoadError {
        LoadError::invalid(self.path(), key, "missing in the metadata; convert the model again with a current converter")
    }

    fn array(&self, key: &str) -> Result<Option<&Array>, LoadError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Entry::Array(array)) => Ok(Some(array)),
            Some(other) => Err(self.mismatch(key, "a list", other)),
        }
    }

    fn text_at(&self, key: &str, range: Range<usize>) -> Result<&str, LoadError> {
        let bytes = self.file.map.get(range).unwrap_or_default();
        std::str::from_utf8(bytes).map_err(|_| LoadError::corrupt(self.path(), key, "the text is not UTF-8"))
    }

    fn mismatch(&self, key: &str, wanted: &str, found: &Entry) -> LoadError {
        let found = match found {
            Entry::Integer(_) | Entry::Float(_) => "a number",
            Entry::Bool(_) => "true or false",
            Entry::Text(_) => "a text",
            Entry::Array(_) => "a list",
        };
        LoadError::invalid(self.path(), key, format!("{found} where {wanted} belongs"))
    }
}

/// A whole file.
struct Parsed {
    metadata: Metadata,
    tensors: Placements,
    descriptions: usize,
    alignment: usize,
}

/// A tensor as it is described.
struct Described {
    name: String,
    shape: Vec<usize>,
    storage: u32,
    offset: usize,
}

/// Reads the file front to back.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn file(&mut self) -> Result<Parsed, LoadError> {
        if self.bytes.len() < MAGIC.len() || &self.bytes[..MAGIC.len()] != MAGIC {
            return Err(LoadError::not_a_model(self.path, "not a GGUF file: it does not begin with \"GGUF\""));
        }
        self.at = MAGIC.len();
        match self.u32("version")? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(LoadError::unsupported(self.path, "version", "big-endian GGUF", "use the little-endian file"));
            }
            version => {
                return Err(LoadError::unsupported(
                    self.path,
                    "version",
                    format!("GGUF version {version}"),
                    "use version 2 or 3",
                ));
            }
        }
        // The shortest description of a tensor takes 24 bytes, the shortest key with a value 13.
        let tensors = self.count("tensor count", 24)?;
        let pairs = self.count("metadata count", 13)?;

        let mut metadata = HashMap::with_capacity(pairs.min(1024));
        for _ in 0..pairs {
            let key = self.owned_text("metadata key")?;
            let kind = self.kind(&key)?;
            let value = self.entry(&key, kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(LoadError::corrupt(self.path, key, "the key occurs twice"));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Entry::Integer(value)) => usize::try_from(*value)
                .ok()
                .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 24)
                .ok_or_else(|| LoadError::corrupt(self.path, "general.alignment", format!("{value} is not a power of two")))?,
            Some(_) => return Err(LoadError::corrupt(self.path, "general.alignment", "not a whole number")),
        };
        let descriptions = self.at;
        Ok(Parsed { metadata, tensors: self.tensors(tensors, alignment)?, descriptions, alignment })
    }

    fn tensors(&mut self, count: usize, alignment: usize) -> Result<Placements, LoadError> {
        let mut described = Vec::with_capacity(count.min(1024));
        for _ in 0..count {
            described.push(self.tensor()?);
        }
        let start = self.at.next_multiple_of(alignment);
        let mut tensors = HashMap::with_capacity(described.len());
        for Described { name, shape, storage: number, offset } in described {
            let mut placement = Placement { shape, format: storage(number), bytes: 0..0 };
            let corrupt = |detail: &str| LoadError::corrupt(self.path, &name, detail);
            if !offset.is_multiple_of(alignment) {
                return Err(corrupt("the offset is not aligned"));
            }
            let begin = start.checked_add(offset).ok_or_else(|| corrupt("the offset is out of range"))?;
            // A storage that we cannot read has a size that we do not know; the tensor may still be one we do not need.
            let len = match &placement.format {
                Ok(format) => tensor_bytes(*format, &placement.shape).ok_or_else(|| corrupt("the sizes make no sense"))?,
                Err(_) => 0,
            };
            let end = begin
                .checked_add(len)
                .filter(|&end| end <= self.bytes.len())
                .ok_or_else(|| corrupt(&format!("needs {len} bytes from {begin} on, the file ends at {}", self.bytes.len())))?;
            placement.bytes = begin..end;
            if tensors.insert(name.clone(), placement).is_some() {
                return Err(LoadError::corrupt(self.path, name, "the tensor occurs twice"));
            }
        }
        Ok(tensors)
    }

    fn tensor(&mut self) -> Result<Described, LoadError> {
        let name = self.owned_text("tensor name")?;
        let dimensions = self.u32(&name)? as usize;
        if dimensions > MAX_DIMENSIONS {
            return Err(LoadError::corrupt(self.path, name, format!("{dimensions} dimensions")));
        }
        let mut shape = Vec::with_capacity(dimensions);
        for _ in 0..dimensions {
            shape.push(self.size(&name)?);
        }
        // GGUF says the innermost dimension first.
        shape.reverse();
        let storage = self.u32(&name)?;
        let offset = self.size(&name)?;
        Ok(Described { name, shape, storage, offset })
    }

    fn entry(&mut self, key: &str, kind: Kind, depth: usize) -> Result<Entry, LoadError> {
        Ok(match kind {
            Kind::U8 => Entry::Integer(u8::from_le_bytes(self.take(key)?).into()),
            Kind::I8 => Entry::Integer(i8::from_le_bytes(self.take(key)?).into()),
            Kind::U16 => Entry::Integer(u16::from_le_bytes(self.take(key)?).into()),
            Kind::I16 => Entry::Integer(i16::from_le_bytes(self.take(key)?).into()),
            Kind::U32 => Entry::Integer(u32::from_le_bytes(self.take(key)?).into()),
            Kind::I32 => Entry::Integer(i32::from_le_bytes(self.take(key)?).into()),
            Kind::U64 => Entry::Integer(u64::from_le_bytes(self.take(key)?).into()),
            Kind::I64 => Entry::Integer(i64::from_le_bytes(self.take(key)?).into()),
            Kind::F32 => Entry::Float(f32::from_le_bytes(self.take(key)?).into()),
            Kind::F64 => Entry::Float(f64::from_le_bytes(self.take(key)?)),
            Kind::Bool => Entry::Bool(self.take::<1>(key)? != [0]),
            Kind::Text => Entry::Text(self.text(key)?),
            Kind::Array => Entry::Array(self.array(key, depth)?),
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Array, LoadError> {
        // Lists of lists exist in the format, not in any model that we know.
        if depth > 2 {
            return Err(LoadError::corrupt(self.path, key, "lists nested too deep"));
        }
        let kind = self.kind(key)?;
        let len = self.count(key, kind.smallest())?;
        let start = self.at;
        match kind {
            Kind::Text => {
                for _ in 0..len {
                    self.text(key)?;
                }
            }
            Kind::Array => {
                for _ in 0..len {
                    self.array(key, depth + 1)?;
                }
            }
            // `count` has checked that so many bytes are left.
            _ => self.at += len * kind.smallest(),
        }
        Ok(Array { kind, len, bytes: start..self.at })
    }

    fn kind(&mut self, key: &str) -> Result<Kind, LoadError> {
        let number = self.u32(key)?;
        Kind::from_number(number).ok_or_else(|| LoadError::corrupt(self.path, key, format!("unknown value type {number}")))
    }

    fn text(&mut self, field: &str) -> Result<Range<usize>, LoadError> {
        let len = self.count(field, 1)?;
        let range = self.at..self.at + len;
        self.at = range.end;
        Ok(range)
    }

    fn owned_text(&mut self, field: &str) -> Result<String, LoadError> {
        let range = self.text(field)?;
        let text = std::str::from_utf8(&self.bytes[range]);
        Ok(text.map_err(|_| LoadError::corrupt(self.path, field, "the text is not UTF-8"))?.to_owned())
    }

    /// A count of things that take at least `smallest` bytes each: no more than the file has room for.
    fn count(&mut self, field: &str, smallest: usize) -> Result<usize, LoadError> {
        let count = self.size(field)?;
        let left = self.bytes.len() - self.at;
        if count.checked_mul(smallest).is_none_or(|bytes| bytes > left) {
            return Err(LoadError::corrupt(self.path, field, format!("claims {count} entries where {left} bytes are left")));
        }
        Ok(count)
    }

    fn size(&mut self, field: &str) -> Result<usize, LoadError> {
        let size = u64::from_le_bytes(self.take(field)?);
        usize::try_from(size).map_err(|_| LoadError::corrupt(self.path, field, format!("the size {size} is out of range")))
    }

    fn u32(&mut self, field: &str) -> Result<u32, LoadError> {
        Ok(u32::from_le_bytes(self.take(field)?))
    }

    fn take<const N: usize>(&mut self, field: &str) -> Result<[u8; N], LoadError> {
        let (taken, _) = self.bytes[self.at..]
            .split_first_chunk::<N>()
            .ok_or_else(|| LoadError::corrupt(self.path, field, format!("the file ends at byte {}", self.bytes.len())))?;
        self.at += N;
        Ok(*taken)
    }
}

impl Kind {
    fn from_number(number: u32) -> Option<Self> {
        use Kind::{Array, Bool, F32, F64, I8, I16, I32, I64, Text, U8, U16, U32, U64};
        [U8, I8, U16, I16, U32, I32, F32, Bool, Text, Array, U64, I64, F64].into_iter().find(|kind| *kind as u32 == number)
    }

    /// Bytes of the shortest value.
    fn smallest(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 | Kind::Text => 8,
            Kind::Array => 12,
        }
    }
}

/// ggml's numbers for storage formats (`ggml_type`).
fn storage(number: u32) -> Result<Format, String> {
    Ok(match number {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q4_0,
        3 => Format::Q4_1,
        6 => Format::Q5_0,
        7 => Format::Q5_1,
        8 => Format::Q8_0,
        12 => Format::Q4K,
        13 => Format::Q5K,
        14 => Format::Q6K,
        30 => Format::Bf16,
        10 => return Err("Q2_K".to_owned()),
        11 => return Err("Q3_K".to_owned()),
        15 => return Err("Q8_K".to_owned()),
        other => return Err(format!("ggml type {other}")),
    })
}

/// The same the other way round.
pub(crate) const fn storage_number(format: Format) -> u32 {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q5_0 => 6,
        Format::Q5_1 => 7,
        Format::Q8_0 => 8,
        Format::Q4K => 12,
        Format::Q5K => 13,
        Format::Q6K => 14,
        Format::Bf16 => 30,
    }
}

/// Bytes of a tensor, or `None` when its sizes overflow or are no whole number of blocks.
pub(crate) fn tensor_bytes(format: Format, shape: &[usize]) -> Option<usize> {
    let Some((&row, outer)) = shape.split_last() else {
        return format.row_bytes(1);
    };
    // `row_bytes` cannot overflow where the row alone fits twice over.
    let row = if row > usize::MAX / 8 { return None } else { format.row_bytes(row)? };
    outer.iter().try_fold(row, |bytes, &dimension| bytes.checked_mul(dimension))
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod writer;
