//! Tokenizers from GGUF metadata: the same pipelines as the publishers' `tokenizer.json`, put together again from vocabulary,
//! merges or scores, and the name of the way texts are split.

mod write;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::{SpecialTokens, Tokenizer};
use crate::gguf::Gguf;
use crate::load_error::LoadError;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";

/// What a token is for (llama.cpp's `llama_token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// How a text is cut into words before merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Splitting {
    /// GPT-2.
    Gpt2,
    /// GPT-2 after single digits (SmolLM, StarCoder).
    Digits,
    /// Llama 3: up to three digits together.
    Llama3,
    /// Qwen2: single digits, composed characters.
    Qwen2,
    /// Mistral's Tekken: words end where capitals begin.
    Tekken,
    /// llama.cpp's for files without a name.
    Unnamed,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self, LoadError> {
        let tokens = gguf.texts(TOKENS)?.ok_or_else(|| {
            LoadError::invalid(
                gguf.path(),
                TOKENS,
                "missing: the file has no tokenizer; convert the model again with its tokenizer",
            )
        })?;
        let types = token_types(gguf, tokens.len())?;
        let roles = SpecialTokens {
            bos: gguf.token_id("tokenizer.ggml.bos_token_id")?,
            eos: gguf.token_id("tokenizer.ggml.eos_token_id")?,
            unknown: gguf.token_id("tokenizer.ggml.unknown_token_id")?,
            padding: gguf.token_id("tokenizer.ggml.padding_token_id")?,
        };
        for id in [roles.bos, roles.eos, roles.unknown, roles.padding].into_iter().flatten() {
            if id as usize >= tokens.len() {
                return Err(LoadError::corrupt(
                    gguf.path(),
                    TOKENS,
                    format!("has {} tokens, but token {id} has a role", tokens.len()),
                ));
            }
        }
        let (mut pipeline, bos_by_default) = match gguf.text(MODEL)?.ok_or_else(|| gguf.missing(MODEL))? {
            "gpt2" => byte_level(gguf, &tokens)?,
            "llama" => (sentence_piece(gguf, &tokens, roles.unknown)?, true),
            other => {
                return Err(LoadError::unsupported(
                    gguf.path(),
                    MODEL,
                    format!("\"{other}\""),
                    "use a model with \"gpt2\" or \"llama\"",
                ));
            }
        };
        let added: Vec<AddedToken> = tokens
            .iter()
            .zip(&types)
            .filter_map(|(&token, kind)| match kind {
                TokenType::Control | TokenType::Unknown => Some(AddedToken::from(token, true)),
                TokenType::UserDefined => Some(AddedToken::from(token, false)),
                TokenType::Normal | TokenType::Unused | TokenType::Byte => None,
            })
            .map(|token| token.normalized(false))
            .collect();
        pipeline.add_tokens(added).map_err(|error| LoadError::invalid(gguf.path(), TOKENS, error.to_string()))?;
        let bos = gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default).then_some(roles.bos).flatten();
        let eos = gguf.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false).then_some(roles.eos).flatten();
        if bos.is_some() || eos.is_some() {
            let surround = surround(&tokens, bos, eos).map_err(|detail| LoadError::invalid(gguf.path(), TOKENS, detail))?;
            pipeline.with_post_processor(Some(surround));
        }
        Self::assemble(pipeline, roles).map_err(|detail| LoadError::invalid(gguf.path(), TOKENS, detail))
    }
}

fn token_types(gguf: &Gguf, tokens: usize) -> Result<Vec<TokenType>, LoadError> {
    let Some(numbers) = gguf.numbers(TYPES)? else { return Ok(vec![TokenType::Normal; tokens]) };
    if numbers.len() != tokens {
        return Err(LoadError::corrupt(gguf.path(), TYPES, format!("has {} entries for {tokens} tokens", numbers.len())));
    }
    let kinds = numbers.iter().map(|&number| match number as i32 {
        2 => TokenType::Unknown,
        3 => TokenType::Control,
        4 => TokenType::UserDefined,
        5 => TokenType::Unused,
        6 => TokenType::Byte,
        _ => TokenType::Normal,
    });
    Ok(kinds.collect())
}

fn vocabulary(gguf: &Gguf, tokens: &[&str]) -> Result<Vocab, LoadError> {
    let mut vocabulary = Vocab::with_capacity(tokens.len());
    for (id, &token) in tokens.iter().enumerate() {
        let id = u32::try_from(id).map_err(|_| LoadError::corrupt(gguf.path(), TOKENS, "more than 2³² tokens"))?;
        vocabulary.insert(token.to_owned(), id);
    }
    Ok(vocabulary)
}

/// Byte-level BPE; also says whether such models begin texts with a BOS token when the file does not say.
fn byte_level(gguf: &Gguf, tokens: &[&str]) -> Result<(tokenizers::Tokenizer, bool), LoadError> {
    let splitting = match gguf.text(PRE)? {
        None | Some("default") => Splitting::Unnamed,
        Some("gpt-2" | "phi-2" | "olmo" | "mpt" | "jina-en" | "roberta-bpe") => Splitting::Gpt2,
        Some("smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone") => Splitting::Digits,
        Some("llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "smaug-bpe" | "dbrx") => Splitting::Llama3,
        Some("qwen2" | "deepseek-r1-qwen" | "megrez") => Splitting::Qwen2,
        Some("tekken") => Splitting::Tekken,
        Some(other) => {
            return Err(LoadError::unsupported(
                gguf.path(),
                PRE,
                format!("\"{other}\""),
                "supported are default, gpt-2, smollm, llama-bpe, qwen2 and tekken; or use the safetensors of the model",
            ));
        }
    };
    let merges = gguf.texts(MERGES)?.ok_or_else(|| gguf.missing(MERGES))?;
    let merges = merges
        .iter()
        .map(|merge| {
            let pair = merge.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()));
            pair.ok_or_else(|| LoadError::corrupt(gguf.path(), MERGES, format!("\"{merge}\" is not a pair")))
        })
        .collect::<Result<Merges, LoadError>>()?;
    let whole_words_first = splitting.takes_whole_words_first();
    let model = BPE::builder()
        .vocab_and_merges(vocabulary(gguf, tokens)?, merges)
        .ignore_merges(whole_words_first)
        .build()
        .map_err(|error| LoadError::corrupt(gguf.path(), MERGES, error.to_string()))?;
    let mut pipeline = tokenizers::Tokenizer::new(model);
    if splitting == Splitting::Qwen2 {
        pipeline.with_normalizer(Some(NFC)).map_err(|error| LoadError::invalid(gguf.path(), TOKENS, error.to_string()))?;
    }
    let pre_tokenizer = splitting.pre_tokenizer().map_err(|error| LoadError::invalid(gguf.path(), PRE, error.to_string()))?;
    pipeline.with_pre_tokenizer(Some(pre_tokenizer));
    pipeline.with_decoder(Some(ByteLevel::default()));
    Ok((pipeline, whole_words_first))
}

impl Splitting {
    /// A word that is a token is not merged together; such models also begin texts with a BOS token.
    fn takes_whole_words_first(self) -> bool {
        matches!(self, Splitting::Llama3 | Splitting::Tekken)
    }

    /// The publishers' own patterns: `pre_tokenizer` of their `tokenizer.json`.
    fn pre_tokenizer(self) -> tokenizers::Result<PreTokenizers> {
        let patterns: &[&str] = match self {
            Splitting::Gpt2 => return Ok(PreTokenizers::new(vec![gpt2_words().into()])),
            Splitting::Digits => return Ok(PreTokenizers::new(vec![Digits::new(true).into(), gpt2_words().into()])),
            Splitting::Llama3 => &[concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )],
            Splitting::Qwen2 => &[concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )],
            Splitting::Tekken => &[concat!(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )],
            Splitting::Unnamed => &[
                r"[\p{P}\$\+<=>\^~\|]+",
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
                r"\p{N}+",
                "[0-9][0-9][0-9]",
            ],
        };
        let mut steps: Vec<PreTokenizerWrapper> = Vec::with_capacity(patterns.len() + 1);
        for &pattern in patterns {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(PreTokenizers::new(steps))
    }
}

fn gpt2_words() -> ByteLevel {
    ByteLevel::new(false, true, true)
}

/// SentencePiece BPE: pieces merge in the order of their scores, and what has no piece is spelt in bytes.
fn sentence_piece(gguf: &Gguf, tokens: &[&str], unknown: Option<u32>) -> Result<tokenizers::Tokenizer, LoadError> {
    let scores = gguf.numbers(SCORES)?.ok_or_else(|| gguf.missing(SCORES))?;
    if scores.len() != tokens.len() {
        return Err(LoadError::corrupt(gguf.path(), SCORES, format!("has {} entries for {} tokens", scores.len(), tokens.len())));
    }
    let vocabulary = vocabulary(gguf, tokens)?;
    let merges = merges_by_score(&vocabulary, tokens, &scores);
    let mut builder = BPE::builder().fuse_unk(true).byte_fallback(vocabulary.contains_key("<0x00>"));
    if let Some(token) = unknown.and_then(|id| tokens.get(id as usize)) {
        builder = builder.unk_token((*token).to_owned());
    }
    let model = builder
        .vocab_and_merges(vocabulary, merges)
        .build()
        .map_err(|error| LoadError::corrupt(gguf.path(), TOKENS, error.to_string()))?;
    let mut pipeline = tokenizers::Tokenizer::new(model);
    let space_first = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let regex = |error: tokenizers::Error| LoadError::invalid(gguf.path(), MODEL, error.to_string());
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if space_first {
        normalizers.push(Prepend::new("▁".to_owned()).into());
    }
    normalizers.push(Replace::new(" ", "▁").map_err(regex)?.into());
    pipeline
        .with_normalizer(Some(Normalizers::new(normalizers)))
        .map_err(|error| LoadError::invalid(gguf.path(), TOKENS, error.to_string()))?;

    let mut decoders: Vec<DecoderWrapper> = vec![tokenizers::decoders::byte_fallback::ByteFallback::new().into()];
    if space_first {
        decoders.push(tokenizers::decoders::strip::Strip::new(' ', 1, 0).into());
    }
    pipeline.with_decoder(Some(tokenizers::decoders::sequence::Sequence::new(decoders)));
    Ok(pipeline)
}

/// Every way to make a piece from two pieces, best score first; ties go to the longer left half, then to the halves
/// with smaller ids (as transformers' `generate_merges` lists them).
fn merges_by_score(vocabulary: &Vocab, tokens: &[&str], scores: &[f32]) -> Merges {
    let mut ways = Vec::new();
    for (&piece, &score) in tokens.iter().zip(scores) {
        let mut halves: Vec<(u32, u32, &str, &str)> = piece
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = piece.split_at(at);
                Some((*vocabulary.get(left)?, *vocabulary.get(right)?, left, right))
            })
            .collect();
        halves.sort_unstable_by_key(|&(left, right, ..)| (left, right));
        ways.extend(halves.into_iter().map(|(_, _, left, right)| (score, left, right)));
    }
    let lengths = |left: &str, right: &str| (left.chars().count(), right.chars().count());
    ways.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| lengths(b.1, b.2).cmp(&lengths(a.1, a.2))));
    ways.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect()
}

/// Puts BOS and EOS around a text.
fn surround(tokens: &[&str], bos: Option<u32>, eos: Option<u32>) -> Result<TemplateProcessing, String> {
    let named = |id: Option<u32>| id.and_then(|id| Some((tokens.get(id as usize)?.to_string(), id)));
    let (bos, eos) = (named(bos), named(eos));
    // The template's own language gives ':' and '$' a meaning; a BOS token spelt with them cannot be named in it.
    let mut pieces: Vec<&str> = Vec::new();
    pieces.extend(bos.as_ref().map(|(token, _)| token.as_str()));
    pieces.push("$A");
    pieces.extend(eos.as_ref().map(|(token, _)| token.as_str()));
    let special: Vec<(String, u32)> = bos.clone().into_iter().chain(eos.clone()).collect();
    TemplateProcessing::builder().try_single(pieces)?.special_tokens(special).build().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
