//! Writes GGUF files for tests.

/// A file in the making.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    pub version: u32,
    pairs: u64,
    metadata: Vec<u8>,
    tensors: u64,
    descriptions: Vec<u8>,
    data: Vec<u8>,
}

const ALIGNMENT: usize = 32;

impl Writer {
    pub fn new() -> Self {
        Self { version: 3, pairs: 0, metadata: Vec::new(), tensors: 0, descriptions: Vec::new(), data: Vec::new() }
    }

    fn key(mut self, key: &str, kind: u32) -> Self {
        self.pairs += 1;
        put_text(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        self
    }

    /// A value of any kind, its bytes as they are.
    pub fn raw(self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        let mut this = self.key(key, kind);
        this.metadata.extend(bytes);
        this
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        let mut this = self.key(key, 8);
        put_text(&mut this.metadata, value);
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
        this.metadata.extend(8u32.to_le_bytes());
        this.metadata.extend((values.len() as u64).to_le_bytes());
        for value in values {
            put_text(&mut this.metadata, value.as_ref());
        }
        this
    }

    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        self.array(key, 5, values.len(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    pub fn f32s(self, key: &str, values: &[f32]) -> Self {
        self.array(key, 6, values.len(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn array(self, key: &str, kind: u32, len: usize, bytes: Vec<u8>) -> Self {
        let mut this = self.key(key, 9);
        this.metadata.extend(kind.to_le_bytes());
        this.metadata.extend((len as u64).to_le_bytes());
        this.metadata.extend(bytes);
        this
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
        put_text(&mut self.descriptions, name);
        self.descriptions.extend((shape.len() as u32).to_le_bytes());
        for size in shape.iter().rev() {
            self.descriptions.extend(size.to_le_bytes());
        }
        self.descriptions.extend(storage.to_le_bytes());
        self.descriptions.extend(offset.to_le_bytes());
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
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.tensors.to_le_bytes());
        file.extend(self.pairs.to_le_bytes());
        file.extend(&self.metadata);
        file.extend(&self.descriptions);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(&self.data);
        file
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
