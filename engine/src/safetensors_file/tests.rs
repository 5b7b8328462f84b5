use proptest::prelude::*;

use super::*;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn read(bytes: &[u8]) -> Result<HashMap<String, Placement>, LoadError> {
    header(Path::new("model.safetensors"), bytes)
}

fn failure(bytes: &[u8]) -> String {
    read(bytes).unwrap_err().to_string()
}

const HEADER: &str = r#"{"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}, "i": {"dtype": "I64", "shape": [1], "data_offsets": [10, 18]}}"#;

#[test]
fn reads_shapes_and_places() {
    let bytes = file(HEADER, &[1; 18]);
    let tensors = read(&bytes).unwrap();
    let start = bytes.len() - 18;
    assert_eq!(tensors["w"], Placement { shape: vec![2, 1], format: Ok(Format::F32), bytes: start..start + 8 });
    assert_eq!(tensors["b"], Placement { shape: vec![], format: Ok(Format::Bf16), bytes: start + 8..start + 10 });
    assert_eq!(tensors["i"].format, Err("I64".to_owned()));
    assert_eq!(tensors.len(), 3);
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let bytes = file(HEADER, &[1; 18]);
    for len in 0..bytes.len() {
        let error = failure(&bytes[..len]);
        assert!(error.contains("model.safetensors"), "{len}: {error}");
    }
}

#[test]
fn every_flipped_byte_is_read_or_refused() {
    let bytes = file(HEADER, &[1; 18]);
    for at in 0..bytes.len() {
        for flip in [0x01, 0x10, 0x80] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            for placement in read(&damaged).into_iter().flat_map(HashMap::into_values) {
                assert!(damaged.get(placement.bytes).is_some());
            }
        }
    }
}

#[test]
fn what_contradicts_itself_is_named() {
    let tensor = |text: &str| failure(&file(&format!("{{\"w\": {text}}}"), &[0; 16]));
    assert!(tensor(r#"{"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}"#).contains("shape [5]"));
    assert!(tensor(r#"{"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}"#).contains("bytes 16 to 0"));
    assert!(tensor(r#"{"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}"#).contains("bytes 0 to 32"));
    assert!(tensor(r#"{"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 16]}"#).contains("w: "));
    assert!(tensor(r#"{"dtype": "F32", "shape": [-1], "data_offsets": [0, 16]}"#).contains("lacks"));
    assert!(tensor(r#"{"dtype": "F32"}"#).contains("lacks"));
    let twice = r#"{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#;
    assert!(failure(&file(twice, &[0; 16])).contains("over one another"));
    assert!(failure(&file("[]", &[])).contains("header"));
    assert!(failure(&u64::MAX.to_le_bytes()).contains("claims"));
    assert!(failure(b"short").contains("5 bytes"));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(header in proptest::collection::vec(any::<u8>(), 0..200), len in 0u64..300) {
        let _ = read(&[&len.to_le_bytes()[..], &header].concat());
    }
}
