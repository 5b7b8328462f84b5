//! Writes GGUF files for tests, also such as nobody should write.

use super::pairs::{Pairs, put_description};

/// A file in the making.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    pub version: u32,
    pairs: Pairs,
    tensors: u64,
    descriptions: Vec<u8>,
    data: Vec<u8>,
}

const ALIGNMENT: usize = 32;

impl Writer {
    pub fn new() -> Self {
        Self { version: 3, pairs: Pairs::default(), tensors: 0, descriptions: Vec::new(), data: Vec::new() }
    }

    fn with(self, add: impl FnOnce(Pairs) -> Pairs) -> Self {
        Self { pairs: add(self.pairs), ..self }
    }

    /// A value of any kind, its bytes as they are.
    pub fn raw(self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        self.with(|pairs| pairs.raw(key, kind, bytes))
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.with(|pairs| pairs.text(key, value))
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.with(|pairs| pairs.u32(key, value))
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.with(|pairs| pairs.f32(key, value))
    }

    pub fn flag(self, key: &str, value: bool) -> Self {
        self.with(|pairs| pairs.flag(key, value))
    }

    pub fn texts<T: AsRef<str>>(self, key: &str, values: &[T]) -> Self {
        self.with(|pairs| pairs.texts(key, values))
    }

    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        self.with(|pairs| pairs.i32s(key, values))
    }

    pub fn f32s(self, key: &str, values: &[f32]) -> Self {
        self.with(|pairs| pairs.array(key, 6, values.len(), values.iter().flat_map(|value| value.to_le_bytes())))
    }

    /// A tensor; the shape outermost first.
    pub fn tensor(mut self, name: &str, shape: &[u64], storage: u32, data: &[u8]) -> Self {
        let offset = self.data.len() as u64;
        self = self.described(name, shape, storage, offset);
        self.data.extend(data);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self
    }

    /// A description without data.
    pub fn described(mut self, name: &str, shape: &[u64], storage: u32, offset: u64) -> Self {
        self.tensors += 1;
        put_description(&mut self.descriptions, name, shape, storage, offset);
        self
    }

    pub fn f32_tensor(self, name: &str, shape: &[u64], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, shape, 0, &bytes)
    }

    /// What `more` adds.
    pub fn then(self, more: impl FnOnce(Self) -> Self) -> Self {
        more(self)
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = self.pairs.head(self.version, self.tensors);
        file.extend(&self.descriptions);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(&self.data);
        file
    }
}
