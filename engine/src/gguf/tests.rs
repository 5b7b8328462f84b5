use proptest::prelude::*;

use super::writer::Writer;
use super::*;

fn parse(bytes: &[u8]) -> Result<Gguf, LoadError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

fn failure(bytes: &[u8]) -> String {
    match parse(bytes) {
        Ok(_) => panic!("was read"),
        Err(error) => error.to_string(),
    }
}

fn sample() -> Writer {
    Writer::new()
        .text("general.architecture", "llama")
        .u32("llama.block_count", 30)
        .f32("llama.rope.freq_base", 1e5)
        .flag("tokenizer.ggml.add_bos_token", true)
        .texts("tokenizer.ggml.tokens", &["<s>", "▁", "Ġé"])
        .f32s("tokenizer.ggml.scores", &[0.0, -1.5, -2.0])
        .i32s("tokenizer.ggml.token_type", &[3, 1, 1])
        .raw("small", 1, &[0xff])
        .raw("large", 10, &u64::MAX.to_le_bytes())
        .raw("double", 12, &2.5f64.to_le_bytes())
        .f32_tensor("a", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        .tensor("q", &[2, 32], 2, &[7; 36])
        .tensor("odd", &[4], 16, &[0; 4])
}

#[test]
fn reads_what_was_written() {
    let gguf = parse(&sample().bytes()).unwrap();
    assert_eq!(gguf.text("general.architecture").unwrap(), Some("llama"));
    assert_eq!(gguf.integer("llama.block_count").unwrap(), Some(30));
    assert_eq!(gguf.number("llama.rope.freq_base").unwrap(), Some(1e5));
    assert_eq!(gguf.number("double").unwrap(), Some(2.5));
    assert_eq!(gguf.flag("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
    assert_eq!(gguf.texts("tokenizer.ggml.tokens").unwrap().unwrap(), ["<s>", "▁", "Ġé"]);
    assert_eq!(gguf.numbers("tokenizer.ggml.scores").unwrap().unwrap(), [0.0, -1.5, -2.0]);
    assert_eq!(gguf.numbers("tokenizer.ggml.token_type").unwrap().unwrap(), [3.0, 1.0, 1.0]);
    assert_eq!(gguf.integer("absent").unwrap(), None);
    assert_eq!(gguf.token_id("small").unwrap(), None);
    assert!(gguf.integer("small").is_err());

    let a = gguf.file.tensor("a").unwrap().unwrap();
    assert_eq!((a.shape, a.format), (&[2, 3][..], Format::F32));
    assert_eq!(a.to_f32().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let q = gguf.file.tensor("q").unwrap().unwrap();
    assert_eq!((q.shape, q.format, q.data), (&[2, 32][..], Format::Q4_0, &[7; 36][..]));
    assert!(gguf.file.tensor("absent").unwrap().is_none());
    let error = gguf.file.tensor("odd").unwrap_err().to_string();
    assert!(error.contains("ggml type 16") && error.contains("Q4_K"), "{error}");
}

#[test]
fn version_2_reads_alike() {
    let mut writer = sample();
    writer.version = 2;
    assert_eq!(parse(&writer.bytes()).unwrap().integer("llama.block_count").unwrap(), Some(30));
}

#[test]
fn a_value_of_the_wrong_kind_is_named() {
    let gguf = parse(&sample().bytes()).unwrap();
    for error in [
        gguf.integer("general.architecture").unwrap_err(),
        gguf.text("llama.block_count").unwrap_err(),
        gguf.texts("tokenizer.ggml.scores").unwrap_err(),
        gguf.numbers("tokenizer.ggml.tokens").unwrap_err(),
        gguf.flag("double").unwrap_err(),
        gguf.number("tokenizer.ggml.tokens").unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(text.contains("model.gguf") && text.contains("belong"), "{text}");
    }
}

#[test]
fn other_files_are_told_apart() {
    assert!(failure(b"").contains("not a GGUF file"));
    assert!(failure(b"PK\x03\x04 a zip").contains("not a GGUF file"));
    let mut writer = sample();
    writer.version = 1;
    assert!(failure(&writer.bytes()).contains("version 1"));
    writer.version = 3u32.swap_bytes();
    assert!(failure(&writer.bytes()).contains("big-endian"));
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let bytes = sample().tensor("last", &[8], 0, &[1; 32]).bytes();
    for len in 0..bytes.len() {
        let error = failure(&bytes[..len]);
        assert!(error.contains("model.gguf"), "{len}: {error}");
    }
}

#[test]
fn every_flipped_byte_is_read_or_refused() {
    let bytes = sample().bytes();
    for at in 0..bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            let Ok(gguf) = parse(&damaged) else { continue };
            // What was read can be asked for without harm.
            let _ = gguf.texts("tokenizer.ggml.tokens");
            let _ = gguf.numbers("tokenizer.ggml.scores");
            for name in gguf.file.tensors.keys() {
                let _ = gguf.file.tensor(name).map(|tensor| tensor.map(|tensor| tensor.to_f32()));
            }
        }
    }
}

#[test]
fn absurd_claims_reserve_nothing() {
    let absurd = u64::MAX.to_le_bytes();
    for claim in [absurd, (1u64 << 60).to_le_bytes(), (1u64 << 33).to_le_bytes()] {
        let mut counts = sample().bytes();
        counts[8..16].copy_from_slice(&claim);
        assert!(failure(&counts).contains("tensor count"));
        let mut counts = sample().bytes();
        counts[16..24].copy_from_slice(&claim);
        assert!(failure(&counts).contains("metadata count"));
        assert!(failure(&Writer::new().raw("text", 8, &claim).bytes()).contains("text"));
        for kind in 0u32..=12 {
            let list = [&kind.to_le_bytes()[..], &claim].concat();
            assert!(failure(&Writer::new().raw("list", 9, &list).bytes()).contains("list"));
        }
    }
}

#[test]
fn tensors_must_lie_in_the_file() {
    let at = |shape: &[u64], storage: u32, offset: u64| Writer::new().described("w", shape, storage, offset).bytes();
    assert!(failure(&at(&[8], 0, 0)).contains("needs 32 bytes"));
    assert!(failure(&at(&[0], 0, 1 << 40)).contains("w: "));
    assert!(failure(&at(&[0], 0, !31)).contains("w: "));
    assert!(failure(&at(&[0], 0, 8)).contains("aligned"));
    assert!(failure(&at(&[u64::MAX, u64::MAX], 0, 0)).contains("sizes make no sense"));
    assert!(failure(&at(&[1 << 62, 4], 0, 0)).contains("w: "));
    assert!(failure(&at(&[33], 2, 0)).contains("sizes make no sense"));
    assert!(failure(&at(&[1, 1, 1, 1, 1], 0, 0)).contains("5 dimensions"));
    assert!(failure(&sample().f32_tensor("a", &[1], &[0.0]).bytes()).contains("occurs twice"));
    assert!(failure(&sample().u32("llama.block_count", 1).bytes()).contains("occurs twice"));
    assert!(failure(&sample().u32("general.alignment", 48).bytes()).contains("power of two"));
    assert!(failure(&Writer::new().raw("k", 13, &[]).bytes()).contains("unknown value type 13"));
    let not_utf8 = parse(&Writer::new().raw("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).bytes()).unwrap();
    assert!(not_utf8.text("k").unwrap_err().to_string().contains("not UTF-8"));
}

#[test]
fn lists_nested_without_end_are_refused() {
    let mut value = Vec::new();
    for _ in 0..100_000 {
        value.extend(9u32.to_le_bytes());
        value.extend(1u64.to_le_bytes());
    }
    assert!(failure(&Writer::new().raw("list", 9, &value).bytes()).contains("nested too deep"));
}

proptest! {
    #[test]
    fn any_bytes_after_the_magic_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(bytes);
        let _ = parse(&file);
    }
}
