//! GGUF files on their way out: metadata, and what stands before the tensors' data.

use super::MAGIC;

/// Key-value pairs in the making.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pairs {
    count: u64,
    bytes: Vec<u8>,
}

/// A tensor of a file to be.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// ggml's number.
    pub storage: u32,
    /// Bytes of its data.
    pub len: usize,
}

impl Pairs {
    fn key(mut self, key: &str, kind: u32) -> Self {
        self.count += 1;
        put_text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        self
    }

    /// A whole pair as it stands in another file.
    pub fn copied(&mut self, pair: &[u8]) {
        self.count += 1;
        self.bytes.extend(pair);
    }

    /// A value of any kind, its bytes as they are.
    pub fn raw(self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        let mut this = self.key(key, kind);
        this.bytes.extend(bytes);
        this
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        let mut this = self.key(key, 8);
        put_text(&mut this.bytes, value);
        this
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub fn flag(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, &[value.into()])
    }

    pub fn texts<T: AsRef<str>>(self, key: &str, values: &[T]) -> Self {
        let mut this = self.key(key, 9);
        this.bytes.extend(8u32.to_le_bytes());
        this.bytes.extend((values.len() as u64).to_le_bytes());
        for value in values {
            put_text(&mut this.bytes, value.as_ref());
        }
        this
    }

    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        self.array(key, 5, values.len(), values.iter().flat_map(|value| value.to_le_bytes()))
    }

    /// An array of numbers of one kind, as bytes.
    pub fn array(self, key: &str, kind: u32, len: usize, bytes: impl Iterator<Item = u8>) -> Self {
        let mut this = self.key(key, 9);
        this.bytes.extend(kind.to_le_bytes());
        this.bytes.extend((len as u64).to_le_bytes());
        this.bytes.extend(bytes);
        this
    }

    /// Everything before the tensors' descriptions.
    pub fn head(&self, version: u32, tensors: u64) -> Vec<u8> {
        let mut head = MAGIC.to_vec();
        head.extend(version.to_le_bytes());
        head.extend(tensors.to_le_bytes());
        head.extend(self.count.to_le_bytes());
        head.extend(&self.bytes);
        head
    }

    /// Everything before the data, which begins at once: that of each tensor, with [`padding`] behind it, in order.
    pub fn before_data(&self, tensors: &[Planned], alignment: usize) -> Vec<u8> {
        let mut head = self.head(3, tensors.len() as u64);
        let mut offset = 0usize;
        for Planned { name, shape, storage, len } in tensors {
            let shape: Vec<u64> = shape.iter().map(|size| *size as u64).collect();
            put_description(&mut head, name, &shape, *storage, offset as u64);
            offset += len + padding(*len, alignment);
        }
        head.resize(head.len().next_multiple_of(alignment), 0);
        head
    }
}

/// Zeros behind a tensor's data.
pub(crate) fn padding(len: usize, alignment: usize) -> usize {
    len.next_multiple_of(alignment) - len
}

/// What a file says of a tensor; the shape outermost first.
pub(crate) fn put_description(bytes: &mut Vec<u8>, name: &str, shape: &[u64], storage: u32, offset: u64) {
    put_text(bytes, name);
    bytes.extend((shape.len() as u32).to_le_bytes());
    // GGUF says the innermost dimension first.
    for size in shape.iter().rev() {
        bytes.extend(size.to_le_bytes());
    }
    bytes.extend(storage.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
