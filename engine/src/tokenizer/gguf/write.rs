//! Tokenizers as GGUF metadata: the other way of [`Tokenizer::from_gguf`].

use std::path::Path;

use serde_json::Value;

use super::{MERGES, MODEL, PRE, Splitting, TOKENS, TYPES, TokenType};
use crate::gguf::Pairs;
use crate::load_error::LoadError;
use crate::tokenizer::Tokenizer;

const INSTEAD: &str = "GGUF files name byte-level tokenizers of GPT-2, SmolLM, Llama 3, Qwen2 and Tekken; merge into safetensors";

impl Tokenizer {
    /// Adds what a GGUF file says of the tokenizer that was read from `tokenizer.json`. `vocabulary` is the model's; ids past the
    /// tokenizer's are padding.
    pub(crate) fn to_gguf(&self, path: &Path, vocabulary: usize, pairs: Pairs) -> Result<Pairs, LoadError> {
        let text = std::fs::read(path).map_err(|error| LoadError::io(path, error))?;
        let json: Value =
            serde_json::from_slice(&text).map_err(|error| LoadError::invalid(path, "content", error.to_string()))?;
        let model = &json["model"];
        let Some(splitting) = Splitting::of_json(&json) else {
            return Err(LoadError::unsupported(path, "pre_tokenizer", "this way of cutting texts", INSTEAD));
        };
        let (tokens, types) = tokens(path, &json, vocabulary)?;
        let merges = model["merges"].as_array().map(Vec::as_slice).unwrap_or_default();
        let merges: Option<Vec<String>> = merges.iter().map(merge).collect();
        let merges = merges.ok_or_else(|| LoadError::invalid(path, "merges", "one of them is no pair of texts"))?;
        let roles = self.special_tokens();
        let named = [
            ("tokenizer.ggml.bos_token_id", roles.bos),
            ("tokenizer.ggml.eos_token_id", roles.eos),
            ("tokenizer.ggml.unknown_token_id", roles.unknown),
            ("tokenizer.ggml.padding_token_id", roles.padding),
        ];
        let ends = self.encode("a", true, false).ok().and_then(|tokens| tokens.last().copied());
        let adds_eos = roles.eos.is_some() && ends == roles.eos;
        let pairs = pairs.text(MODEL, "gpt2").text(PRE, splitting.name()).texts(TOKENS, &tokens).i32s(TYPES, &types);
        let pairs = pairs.texts(MERGES, &merges);
        let pairs = named.into_iter().filter_map(|(key, id)| Some((key, id?))).fold(pairs, |pairs, (key, id)| pairs.u32(key, id));
        Ok(pairs.flag("tokenizer.ggml.add_bos_token", self.adds_bos()).flag("tokenizer.ggml.add_eos_token", adds_eos))
    }
}

/// Every token's text and kind, by id.
fn tokens(path: &Path, json: &Value, vocabulary: usize) -> Result<(Vec<String>, Vec<i32>), LoadError> {
    let known = json["model"]["vocab"].as_object().into_iter().flatten();
    let known = known.map(|(token, id)| (token.as_str(), id, TokenType::Normal));
    let added = json["added_tokens"].as_array().into_iter().flatten().map(|token| {
        let kind = if token["special"] == true { TokenType::Control } else { TokenType::UserDefined };
        (token["content"].as_str().unwrap_or_default(), &token["id"], kind)
    });
    let mut tokens: Vec<String> = (0..vocabulary).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![TokenType::Unused.number(); vocabulary];
    for (token, id, kind) in known.chain(added) {
        let place = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocabulary);
        let Some(place) = place else {
            let detail = format!("token {id} lies outside the model's vocabulary of {vocabulary}");
            return Err(LoadError::invalid(path, "vocab", detail));
        };
        token.clone_into(&mut tokens[place]);
        types[place] = kind.number();
    }
    Ok((tokens, types))
}

/// `"a b"`, or `["a", "b"]` as newer files have it.
fn merge(merge: &Value) -> Option<String> {
    match merge {
        Value::String(text) => Some(text.clone()),
        Value::Array(halves) => match halves.as_slice() {
            [Value::String(left), Value::String(right)] => Some(format!("{left} {right}")),
            _ => None,
        },
        _ => None,
    }
}

/// What decides how a text is cut before merging.
#[derive(Debug, Default, PartialEq, Eq)]
struct Cuts {
    patterns: Vec<String>,
    /// Digits stand alone.
    digits: bool,
    /// GPT-2's words are told apart.
    words: bool,
}

impl Cuts {
    /// None for anything else.
    fn of(pre_tokenizer: &Value) -> Option<Self> {
        let mut cuts = Self::default();
        let alone = std::slice::from_ref(pre_tokenizer);
        let steps = pre_tokenizer["pretokenizers"].as_array().map_or(alone, Vec::as_slice);
        for step in steps {
            match step["type"].as_str()? {
                "Split" if step["behavior"] == "Isolated" && step["invert"] != true => {
                    cuts.patterns.push(step["pattern"]["Regex"].as_str()?.to_owned());
                }
                "Digits" if step["individual_digits"] == true => cuts.digits = true,
                "ByteLevel" if step["add_prefix_space"] != true => cuts.words = step["use_regex"] != false,
                _ => return None,
            }
        }
        Some(cuts)
    }
}

impl Splitting {
    const ALL: [Splitting; 6] =
        [Splitting::Gpt2, Splitting::Digits, Splitting::Llama3, Splitting::Qwen2, Splitting::Tekken, Splitting::Unnamed];

    /// The one that a `tokenizer.json` describes; none for SentencePiece and what has no name in GGUF.
    fn of_json(json: &Value) -> Option<Self> {
        let model = &json["model"];
        if model["type"].as_str().is_some_and(|kind| kind != "BPE") || model["byte_fallback"] == true {
            return None;
        }
        let cuts = Cuts::of(&json["pre_tokenizer"])?;
        let same = |splitting: &Splitting| {
            let own = splitting.pre_tokenizer().ok().and_then(|own| Cuts::of(&serde_json::to_value(own).ok()?));
            own.as_ref() == Some(&cuts)
        };
        let found = Splitting::ALL.into_iter().find(same)?;
        let composes = json["normalizer"]["type"] == "NFC";
        let fits = (composes || json["normalizer"].is_null()) && composes == (found == Splitting::Qwen2);
        // Where every token can be merged together, as training leaves them, it makes no difference to take whole words first.
        let fits = fits && (model["ignore_merges"] != true || found.takes_whole_words_first());
        fits.then_some(found)
    }

    /// What `tokenizer.ggml.pre` calls it.
    fn name(self) -> &'static str {
        match self {
            Splitting::Gpt2 => "gpt-2",
            Splitting::Digits => "smollm",
            Splitting::Llama3 => "llama-bpe",
            Splitting::Qwen2 => "qwen2",
            Splitting::Tekken => "tekken",
            Splitting::Unnamed => "default",
        }
    }
}

impl TokenType {
    /// As the file has it.
    fn number(self) -> i32 {
        match self {
            TokenType::Normal => 1,
            TokenType::Unknown => 2,
            TokenType::Control => 3,
            TokenType::UserDefined => 4,
            TokenType::Unused => 5,
            TokenType::Byte => 6,
        }
    }
}
