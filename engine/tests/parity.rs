//! Every family, from its files to its logits, tokens and prompts, against what `transformers` made of the same files
//! (`tests/goldens`, see its README).

#![cfg(test)]

use std::path::{Path, PathBuf};

use crate::stepping::Stepper;
use serde_json::Value;
use tidemill_engine::{ChatInput, Decoder, Detokenizer, ModelFiles, TemplateError};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::reference::Reference;
use tidemill_kernels::{Limits, Ops, WeightFormat};

const FAMILIES: [&str; 13] = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "dbrx",
    "yarn",
    "mpt",
    "gemma2",
    "gemma3",
];
const TOLERANCE: f32 = 1e-3;
const LIMITS: Limits = Limits { max_tokens: 256, max_samples: 32, max_positions: 512 };

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens")
}

/// The directory of a family and, where there is one, the GGUF file of the same weights.
fn models(family: &str) -> Vec<PathBuf> {
    let directory = goldens().join(family);
    let gguf = directory.join(format!("{family}.gguf"));
    let mut models = vec![directory];
    if gguf.is_file() {
        models.push(gguf);
    }
    models
}

fn json(path: &Path) -> Value {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}; make oracle writes it", path.display()));
    serde_json::from_slice(&text).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap().try_into().unwrap()).collect()
}

fn backends() -> Vec<(&'static str, Box<dyn Ops>)> {
    let cpu = CpuBackend::new(CpuOptions { threads: 2, isa: None, limits: LIMITS }).unwrap();
    vec![("reference", Box::new(Reference::new(LIMITS))), ("cpu", Box::new(cpu))]
}

fn logits_and_greedy_tokens_equal(family: &str) {
    let expected = json(&goldens().join(family).join("expected.json"));
    let prompt = ids(&expected["prompt_ids"]);
    let greedy = ids(&expected["greedy"]);
    let positions = ids(&expected["positions"]);
    assert_eq!(greedy.len(), 64);
    for path in models(family) {
        let files = ModelFiles::open(&path).unwrap();
        for (backend, ops) in backends() {
            let label = format!("{} on {backend}", path.display());
            let decoder = Decoder::load(&files, ops, WeightFormat::F32, &mut |_, _| {}).unwrap();
            let mut stepper = Stepper::new(decoder);

            let tokens: Vec<u32> = prompt.iter().chain(&greedy).copied().collect();
            let logits = stepper.logits(&tokens, &positions);
            let mut worst = 0f32;
            for (row, expected) in logits.iter().zip(expected["logits"].as_array().unwrap()) {
                let expected = expected.as_array().unwrap();
                assert_eq!(row.len(), expected.len(), "{label}");
                for (logit, expected) in row.iter().zip(expected) {
                    worst = worst.max((logit - expected.as_f64().unwrap() as f32).abs());
                }
            }
            println!("{label}: the largest difference of a logit is {worst}");
            assert!(worst <= TOLERANCE, "{label}: the largest difference of a logit is {worst}");
            assert_eq!(stepper.greedy(&[&prompt], 64, &[])[0], greedy, "{label}");
        }
    }
}

#[test]
fn llama_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("llama");
}

#[test]
fn llama3_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("llama3");
}

#[test]
fn yarn_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("yarn");
}

#[test]
fn mistral_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("mistral");
}

#[test]
fn qwen2_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("qwen2");
}

#[test]
fn qwen3_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("qwen3");
}

#[test]
fn mixtral_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("mixtral");
}

#[test]
fn dbrx_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("dbrx");
}

#[test]
fn gemma2_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("gemma2");
}

#[test]
fn gemma3_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("gemma3");
}

#[test]
fn mpt_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("mpt");
}

#[test]
fn qwen2_moe_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("qwen2_moe");
}

#[test]
fn qwen3_moe_computes_what_transformers_computes() {
    logits_and_greedy_tokens_equal("qwen3_moe");
}

/// Texts to ids and back.
fn check_texts(label: &str, files: &ModelFiles, expected: &Value) {
    let tokenizer = files.tokenizer();
    for case in expected["encode"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        assert_eq!(tokenizer.encode(text, false, true).unwrap(), expected, "{label}: {text:?}");
        if let Some(with_special) = case.get("ids_with_special") {
            assert_eq!(tokenizer.encode(text, true, true).unwrap(), ids(with_special), "{label}: {text:?}");
        }
        for (key, skip_special) in [("decoded", false), ("decoded_without_special", true)] {
            assert_eq!(tokenizer.decode(&expected, skip_special), case[key].as_str().unwrap(), "{label}: {text:?}");
            let mut detokenizer = Detokenizer::new(tokenizer, skip_special);
            let mut text = String::new();
            for &id in &expected {
                detokenizer.push(id, &mut text);
            }
            detokenizer.finish(&mut text);
            assert_eq!(text, case[key].as_str().unwrap(), "{label}");
        }
    }
}

/// Conversations to texts and ids.
fn check_chats(label: &str, files: &ModelFiles, expected: &Value) {
    let template = files.chat_template().unwrap();
    for case in expected["chats"].as_array().unwrap() {
        let input = ChatInput {
            messages: case["messages"].as_array().unwrap(),
            tools: case.get("tools").and_then(Value::as_array).map(Vec::as_slice),
            variables: case.get("kwargs").and_then(Value::as_object),
            add_generation_prompt: true,
            ..ChatInput::default()
        };
        let rendered = template.render(&input);
        if let Some(part) = case.get("raises") {
            let Err(TemplateError::Raised(text)) = rendered else { panic!("{label}: {rendered:?}") };
            assert!(text.contains(part.as_str().unwrap()), "{label}: {text}");
            continue;
        }
        let rendered = rendered.unwrap();
        assert_eq!(rendered, case["text"].as_str().unwrap(), "{label}");
        assert_eq!(files.tokenizer().encode(&rendered, false, true).unwrap(), ids(&case["ids"]), "{label}: {rendered:?}");
    }
}

#[test]
fn every_family_reads_and_writes_text_as_transformers_does() {
    for family in FAMILIES {
        let expected = json(&goldens().join(family).join("expected.json"));
        for path in models(family) {
            let label = path.display().to_string();
            let files = ModelFiles::open(&path).unwrap();
            check_texts(&label, &files, &expected);
            check_chats(&label, &files, &expected);
            let prompt = expected["prompt"].as_str().unwrap();
            assert_eq!(files.tokenizer().encode(prompt, true, true).unwrap(), ids(&expected["prompt_ids"]), "{label}");
        }
    }
}

#[test]
fn all_end_of_turn_tokens_are_known() {
    for family in FAMILIES {
        let config = json(&goldens().join(family).join("config.json"));
        let named = match &config["eos_token_id"] {
            Value::Array(_) => ids(&config["eos_token_id"]),
            one => vec![one.as_u64().unwrap() as u32],
        };
        for path in models(family) {
            let files = ModelFiles::open(&path).unwrap();
            for id in &named {
                assert!(files.end_of_turn().contains(id), "{}: {:?} lacks {id}", path.display(), files.end_of_turn());
            }
        }
    }
}

/// The default model, where `make` has put it.
fn default_model() -> Option<PathBuf> {
    let path = std::env::var_os("TIDEMILL_TEST_MODEL").map(PathBuf::from);
    if path.is_none() {
        println!("left out: TIDEMILL_TEST_MODEL is not set; `make test` sets it");
    }
    path
}

#[test]
fn the_default_model_reads_and_writes_text_as_transformers_does() {
    let Some(path) = default_model() else { return };
    let files = ModelFiles::open(&path).unwrap();
    let expected = json(&goldens().join("smollm2/tokenizer.json"));
    check_texts("smollm2", &files, &expected);
    check_chats("smollm2", &files, &expected);
}

#[test]
fn the_default_model_answers_as_transformers_does() {
    let Some(path) = default_model() else { return };
    let files = ModelFiles::open(&path).unwrap();
    let limits = Limits { max_tokens: 1024, max_samples: 32, max_positions: 2048 };
    let ops = Box::new(CpuBackend::new(CpuOptions { threads: 2, isa: None, limits }).unwrap());
    let mut stepper = Stepper::new(Decoder::load(&files, ops, WeightFormat::F32, &mut |_, _| {}).unwrap());
    let expected = json(&goldens().join("smollm2/chats.json"));
    let chats = expected["chats"].as_array().unwrap();
    assert_eq!(chats.len(), 20);
    let prompts: Vec<Vec<u32>> = chats.iter().map(|chat| ids(&chat["ids"])).collect();
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let answers = stepper.greedy(&prompts, 64, files.end_of_turn());
    for (answer, chat) in answers.iter().zip(chats) {
        assert_eq!(*answer, ids(&chat["greedy"]), "{}", chat["text"]);
    }
}
