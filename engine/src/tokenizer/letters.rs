//! A tokenizer for tests.

use super::Tokenizer;
use serde_json::{Value, json};

/// A byte-level tokenizer of 92 tokens: 0 to 25 are the letters a to z, 26 and 27 the two bytes of 'é', the others have names.
pub(crate) fn letters() -> Tokenizer {
    let mut vocabulary = serde_json::Map::new();
    let bytes = ('a'..='z').chain(['Ã', '©']).map(String::from);
    for (id, token) in bytes.chain((28..92).map(|id| format!("t{id}"))).enumerate() {
        vocabulary.insert(token, json!(id));
    }
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let model = json!({"type": "BPE", "vocab": Value::Object(vocabulary), "merges": [], "ignore_merges": false});
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model});
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), tokenizer.to_string()).unwrap();
    Tokenizer::from_json(file.path(), &Value::Null).unwrap()
}
