use serde_json::Value;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

use super::*;
use crate::gguf::writer::Writer;

fn gguf(writer: &Writer) -> Gguf {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, writer.bytes()).unwrap();
    Gguf::open(&path).unwrap()
}

fn failure(writer: &Writer) -> String {
    Tokenizer::from_gguf(&gguf(writer)).unwrap_err().to_string()
}

/// `tests/goldens/sentencepiece.json` is made by `tests/oracle/sentencepiece_model.py`.
#[test]
fn sentence_piece_models_encode_as_sentence_piece_does() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/sentencepiece.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let list = |key: &str| golden[key].as_array().unwrap();
    let tokens: Vec<&str> = list("tokens").iter().map(|token| token.as_str().unwrap()).collect();
    let scores: Vec<f32> = list("scores").iter().map(|score| score.as_f64().unwrap() as f32).collect();
    let types: Vec<i32> = list("token_types").iter().map(|kind| kind.as_i64().unwrap() as i32).collect();
    let writer = Writer::new()
        .text(MODEL, "llama")
        .texts(TOKENS, &tokens)
        .f32s(SCORES, &scores)
        .i32s(TYPES, &types)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .u32("tokenizer.ggml.unknown_token_id", 0);
    let tokenizer = Tokenizer::from_gguf(&gguf(&writer)).unwrap();
    assert!(tokenizer.adds_bos() && tokenizer.drops_leading_space());
    for case in list("encode") {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text, false, true).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true), case["decoded"].as_str().unwrap(), "{text:?}");
        let with_bos: Vec<u32> = std::iter::once(1).chain(ids).collect();
        assert_eq!(tokenizer.encode(text, true, true).unwrap(), with_bos, "{text:?}");
    }
    let closed = writer.clone().flag("tokenizer.ggml.add_bos_token", false).flag("tokenizer.ggml.add_eos_token", true);
    let tokenizer = Tokenizer::from_gguf(&gguf(&closed)).unwrap();
    assert!(!tokenizer.adds_bos());
    assert_eq!(tokenizer.encode("", true, true).unwrap(), [2]);
    let bare = Tokenizer::from_gguf(&gguf(&writer.flag("tokenizer.ggml.add_space_prefix", false))).unwrap();
    assert_eq!(bare.decode(&bare.encode(" the", false, true).unwrap(), true), " the");
    assert_eq!(bare.token(bare.encode("the", false, true).unwrap()[0]).unwrap(), "t");
}

/// The pieces are those of Python's `regex` module with the publishers' patterns.
#[test]
fn texts_split_as_the_publishers_split_them() {
    const TEXT: &str = "It's 12345 gateWay's\n\n  gate(x)/ déjà";
    let cases: [(Splitting, &[&str]); 5] = [
        (Splitting::Gpt2, &["It", "'s", " 12345", " gateWay", "'s", "\n\n ", " gate", "(", "x", ")/", " déjà"]),
        (
            Splitting::Digits,
            &["It", "'s", " ", "1", "2", "3", "4", "5", " gateWay", "'s", "\n\n ", " gate", "(", "x", ")/", " déjà"],
        ),
        (Splitting::Llama3, &["It", "'s", " ", "123", "45", " gateWay", "'s", "\n\n", " ", " gate", "(x", ")/", " déjà"]),
        (
            Splitting::Qwen2,
            &["It", "'s", " ", "1", "2", "3", "4", "5", " gateWay", "'s", "\n\n", " ", " gate", "(x", ")/", " déjà"],
        ),
        (
            Splitting::Tekken,
            &["It", "'s", " ", "1", "2", "3", "4", "5", " gate", "Way", "'s", "\n\n", " ", " gate", "(x", ")/", " déjà"],
        ),
    ];
    for (splitting, expected) in cases {
        let mut pieces = PreTokenizedString::from(TEXT);
        splitting.pre_tokenizer().unwrap().pre_tokenize(&mut pieces).unwrap();
        let ranges = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let pieces: Vec<&str> = ranges.iter().map(|(_, (start, end), _)| &TEXT[*start..*end]).collect();
        assert_eq!(pieces, expected, "{splitting:?}");
    }
}

fn byte_level_file() -> Writer {
    Writer::new()
        .text(MODEL, "gpt2")
        .text(PRE, "gpt-2")
        .texts(TOKENS, &["a", "b", "ab", "Ġ", "<|end|>", "<tool>"])
        .i32s(TYPES, &[1, 1, 1, 1, 3, 4])
        .texts(MERGES, &["a b"])
        .u32("tokenizer.ggml.eos_token_id", 4)
}

#[test]
fn control_tokens_are_tokens_only_where_that_is_asked_for() {
    let tokenizer = Tokenizer::from_gguf(&gguf(&byte_level_file())).unwrap();
    assert_eq!(tokenizer.encode("ab<|end|> a<tool>", false, true).unwrap(), [2, 4, 3, 0, 5]);
    // Spelt out, its characters have no tokens here but a user-defined token stays one.
    assert_eq!(tokenizer.encode("ab<|end|> a<tool>", false, false).unwrap(), [2, 3, 0, 5]);
    assert!(tokenizer.is_special(4) && !tokenizer.is_special(5) && !tokenizer.is_special(99));
    assert_eq!(tokenizer.decode(&[2, 4, 3, 0, 5, 99], true), "ab a<tool>");
    assert_eq!(tokenizer.vocabulary(), 6);
    assert_eq!(tokenizer.special_tokens(), &SpecialTokens { eos: Some(4), ..SpecialTokens::default() });
}

#[test]
fn what_a_file_lacks_or_gets_wrong_is_named() {
    let base = || Writer::new().text(PRE, "gpt-2").texts(TOKENS, &["a", "b", "ab"]);
    assert!(failure(&Writer::new().text(MODEL, "gpt2")).contains("no tokenizer"));
    assert!(failure(&base()).contains(MODEL));
    assert!(failure(&base().text(MODEL, "bert")).contains("\"bert\" is not supported"));
    assert!(failure(&base().text(MODEL, "gpt2")).contains(MERGES));
    assert!(failure(&base().text(MODEL, "gpt2").texts(MERGES, &["ab"])).contains("is not a pair"));
    assert!(failure(&base().text(MODEL, "gpt2").texts(MERGES, &["a c"])).contains(MERGES));
    assert!(failure(&base().text(MODEL, "llama")).contains(SCORES));
    assert!(failure(&base().text(MODEL, "llama").f32s(SCORES, &[0.0])).contains("1 entries for 3"));
    let merges = |writer: Writer| writer.text(MODEL, "gpt2").texts(MERGES, &["a b"]);
    assert!(failure(&merges(base().i32s(TYPES, &[1]))).contains("1 entries for 3"));
    assert!(failure(&merges(base().u32("tokenizer.ggml.bos_token_id", 3))).contains("token 3"));
    let unknown = Writer::new().text(PRE, "nobody").texts(TOKENS, &["a", "b", "ab"]);
    assert!(failure(&merges(unknown)).contains("\"nobody\" is not supported"));
}
