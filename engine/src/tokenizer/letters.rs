//! Tokenizers for tests.

use super::Tokenizer;
use super::alphabet::byte_of;
use serde_json::{Value, json};

/// A byte-level tokenizer of 92 tokens: 0 to 25 are the letters a to z, 26 and 27 the two bytes of 'é', the others have names.
pub(crate) fn letters() -> Tokenizer {
    let mut vocabulary = serde_json::Map::new();
    let bytes = ('a'..='z').chain(['Ã', '©']).map(String::from);
    for (id, token) in bytes.chain((28..92).map(|id| format!("t{id}"))).enumerate() {
        vocabulary.insert(token, json!(id));
    }
    byte_level(vocabulary, json!([]))
}

/// Token `i` below 256 is byte `i`; then comes `<|end|>`, a control token, then tokens of several bytes that JSON is made of.
pub(crate) fn bytes() -> Tokenizer {
    const SEVERAL: [&str; 14] =
        ["{\"", "\":", "\": ", "\",", "\"}", "\"]", "true", "null", " \"", "\n ", "  ", "10", "abc", "}}"];
    let spelt = |byte: u8| (0..0x200).filter_map(char::from_u32).find(|c| byte_of(*c) == Some(byte)).unwrap();
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..=u8::MAX {
        vocabulary.insert(spelt(byte).to_string(), json!(byte));
    }
    for (index, text) in SEVERAL.iter().enumerate() {
        vocabulary.insert(text.bytes().map(spelt).collect(), json!(257 + index));
    }
    let end = json!({"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    byte_level(vocabulary, json!([end]))
}

fn byte_level(vocabulary: serde_json::Map<String, Value>, added: Value) -> Tokenizer {
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let model = json!({"type": "BPE", "vocab": Value::Object(vocabulary), "merges": [], "ignore_merges": false});
    let tokenizer = json!({"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model});
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), tokenizer.to_string()).unwrap();
    Tokenizer::from_json(file.path(), &Value::Null).unwrap()
}
