use std::fs;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::{Limits, WeightFormat};

use super::*;
use crate::gguf::writer::Writer;
use crate::model::Decoder;

const LIMITS: Limits = Limits { max_tokens: 8, max_samples: 2, max_positions: 64 };

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(name)
}

/// A copy of a model directory that a test may damage.
fn copy(name: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && path.extension().is_none_or(|extension| extension != "gguf") {
            fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    directory
}

fn edit(directory: &TempDir, file: &str, change: impl FnOnce(&mut Value)) {
    let path = directory.path().join(file);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
}

fn failure(path: impl AsRef<Path>) -> String {
    match ModelFiles::open(path.as_ref()) {
        Ok(_) => panic!("{} was opened", path.as_ref().display()),
        Err(error) => error.to_string(),
    }
}

fn load(path: impl AsRef<Path>) -> Result<Decoder, LoadError> {
    let files = ModelFiles::open(path.as_ref())?;
    Decoder::load(&files, Box::new(Reference::new(LIMITS)), WeightFormat::F32, &mut |_, _| {})
}

fn load_failure(path: impl AsRef<Path>) -> String {
    match load(path) {
        Ok(_) => panic!("was loaded"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_directory_and_its_gguf_say_the_same() {
    let directory = ModelFiles::open(&golden("llama3")).unwrap();
    let gguf = ModelFiles::open(&golden("llama3/llama3.gguf")).unwrap();
    assert!(matches!(directory.config().rope_scaling, crate::RopeScaling::Llama3 { .. }));
    assert!(matches!(gguf.config().rope_scaling, crate::RopeScaling::Factors(_)));
    let ours = directory.config().inverse_frequencies();
    for (a, b) in ours.iter().zip(gguf.config().inverse_frequencies()) {
        assert!((a - b).abs() <= a * 1e-5, "{a} {b}");
    }
    let alike = |config: &ModelConfig| ModelConfig { rope_scaling: crate::RopeScaling::None, ..config.clone() };
    assert_eq!(alike(directory.config()), alike(gguf.config()));
    assert_eq!(directory.end_of_turn(), gguf.end_of_turn());
    // The GGUF holds the rotary factors as a tensor of their own.
    assert_eq!(gguf.parameters(), directory.parameters() + 8);
    assert_eq!(directory.name(), "llama3");
    assert!(directory.describe().contains("parameters in F32"), "{}", directory.describe());
    assert!(directory.tokenizer().adds_bos());
    assert_eq!(directory.file_bytes(), fs::metadata(golden("llama3/model.safetensors")).unwrap().len());
}

#[test]
fn sampling_defaults_come_with_the_model() {
    let defaults = ModelFiles::open(&golden("qwen3")).unwrap().generation_defaults().clone();
    assert!(defaults.temperature.is_some() && defaults.top_p.is_some(), "{defaults:?}");
}

#[test]
fn shards_are_found_by_their_index() {
    let directory = copy("llama");
    let files = ModelFiles::open(directory.path()).unwrap();
    assert_eq!(files.weights.files.len(), 3);
    fs::remove_file(directory.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert!(failure(directory.path()).contains("model-00002-of-00003.safetensors\" is missing"));
    edit(&directory, hugging_face_index(), |index| index["weight_map"] = json!({"w": "../elsewhere.safetensors"}));
    assert!(failure(directory.path()).contains("leads out of the directory"));
    edit(&directory, hugging_face_index(), |index| index["weight_map"] = json!([1]));
    assert!(failure(directory.path()).contains("weight_map"));
    fs::remove_file(directory.path().join(hugging_face_index())).unwrap();
    assert!(failure(directory.path()).contains("only safetensors weights are read"));
}

fn hugging_face_index() -> &'static str {
    "model.safetensors.index.json"
}

#[test]
fn a_shard_that_the_index_forgot_leaves_tensors_missing() {
    let directory = copy("llama");
    edit(&directory, hugging_face_index(), |index| {
        let map = index["weight_map"].as_object_mut().unwrap();
        map.retain(|_, file| file != "model-00003-of-00003.safetensors");
    });
    assert!(load_failure(directory.path()).contains("the tensor is missing; fetch the model again"));
}

#[test]
fn missing_parts_are_named_with_what_to_do() {
    assert!(failure("/nonexistent/model").contains("/nonexistent/model"));
    let empty = tempfile::tempdir().unwrap();
    assert!(failure(empty.path()).contains("neither config.json"));
    let directory = copy("qwen2");
    fs::remove_file(directory.path().join("tokenizer.json")).unwrap();
    assert!(failure(directory.path()).contains("tokenizer.json is missing; fetch it"));
    fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    assert!(failure(directory.path()).contains("tokenizer.json"));
    let directory = copy("qwen2");
    edit(&directory, "tokenizer.json", |tokenizer| {
        tokenizer["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true})
    });
    assert!(failure(directory.path()).contains("neither byte-level nor SentencePiece"));
}

#[test]
fn configurations_that_cannot_be_run_are_refused_by_name() {
    let cases: [(&str, Value, &[&str]); 22] = [
        ("architectures", json!(["GPT2LMHeadModel"]), &["\"GPT2LMHeadModel\" is not supported", "Qwen3"]),
        ("rope_scaling", json!({"rope_type": "longrope", "factor": 4}), &["\"longrope\" is not supported"]),
        ("rope_scaling", json!({"rope_type": "dynamic", "factor": 4}), &["\"dynamic\" is not supported"]),
        ("rope_scaling", json!({"type": "linear"}), &["factor is missing"]),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 0.0}), &["factor is 0"]),
        ("hidden_act", json!("gelu"), &["\"gelu\" is not supported"]),
        ("quantization_config", json!({"quant_method": "gptq"}), &["quantised safetensors", "GGUF"]),
        ("layer_types", json!(["full_attention", "chunked_attention"]), &["layer_types: \"chunked_attention\" is not supported"]),
        ("layer_types", json!(["full_attention", "sliding_attention"]), &["layer_types", "no sliding_window in use"]),
        ("rope_scaling", json!({"rope_type": "yarn"}), &["rope_scaling", "factor is missing"]),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}),
            &["rope_theta: is 1, but must be above 1"],
        ),
        ("rope_parameters", json!({"full_attention": {"rope_theta": 1}}), &["a rotation for each type of layers"]),
        ("rope_parameters", json!({"rope_type": "linear", "factor": 2}), &["rope_scaling: differs from rope_parameters"]),
        ("final_logit_softcapping", json!(30.0), &["final_logit_softcapping: 30.0 is not supported"]),
        ("clip_qkv", json!(8), &["clip_qkv: 8 is not supported"]),
        ("no_rope_layers", json!([0, 1]), &["no_rope_layers: [0,1] is not supported"]),
        ("num_attention_heads", json!(0), &["num_attention_heads", "is 0"]),
        ("num_attention_heads", json!(3), &["is not a multiple of num_key_value_heads"]),
        ("head_dim", json!(15), &["15 is odd"]),
        ("num_hidden_layers", json!(1u64 << 40), &["layers"]),
        ("hidden_size", json!("wide"), &["configuration"]),
        ("vocab_size", json!(10), &["do not belong together"]),
    ];
    for (field, value, parts) in cases {
        let directory = copy("qwen2");
        edit(&directory, "config.json", |config| {
            config[field] = value.clone();
            if field == "rope_parameters" && value["rope_type"].is_string() {
                config["rope_scaling"] = json!({"rope_type": "linear", "factor": 4});
            }
        });
        let error = failure(directory.path());
        for part in parts {
            assert!(error.contains(part), "{field} {value}: {error}");
        }
    }
    let directory = copy("qwen2");
    fs::write(directory.path().join("config.json"), "{\"hidden_size\": 1}").unwrap();
    assert!(failure(directory.path()).contains("no model's config.json"));
    fs::write(directory.path().join("config.json"), "not json").unwrap();
    assert!(failure(directory.path()).contains("config.json"));
}

/// Files that transformers 4.43 and later wrote from an older one.
#[test]
fn a_kind_of_rotation_may_stand_there_under_both_of_its_names() {
    let directory = copy("qwen2");
    edit(&directory, "config.json", |config| {
        config["rope_scaling"] = json!({"type": "linear", "rope_type": "linear", "factor": 2.0})
    });
    let files = ModelFiles::open(directory.path()).unwrap();
    assert_eq!(files.config().rope_scaling, crate::RopeScaling::Linear { factor: 2.0 });
}

/// As of transformers 4 and 5, with what is left out and with what nobody leaves out; and the same of GGUF.
#[test]
fn yarn_is_read_in_all_its_spellings() {
    use crate::{RopeScaling, Yarn};
    let read = |field: &str, value: Value, positions: usize| {
        let directory = copy("qwen2");
        edit(&directory, "config.json", |config| {
            config["max_position_embeddings"] = json!(positions);
            config["rope_scaling"] = Value::Null;
            config[field] = value.clone();
        });
        let files = ModelFiles::open(directory.path()).unwrap();
        (files.config().rope_scaling.clone(), files.config().max_positions, files.config().rope_magnitude())
    };
    let plain = Yarn {
        factor: 4.0,
        attention: 1.0 + 0.1 * 4f64.ln(),
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        original_positions: 256,
    };
    let wanted = (RopeScaling::Yarn(plain), 1024, plain.attention as f32);
    let of_4 = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256});
    assert_eq!(read("rope_scaling", of_4, 256), wanted);
    let of_5 = json!({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256,
        "beta_fast": 0, "mscale": 0.0, "truncate": null});
    assert_eq!(read("rope_parameters", of_5.clone(), 1024), wanted);
    // Whoever does not say what was before has all positions already.
    let silent = read("rope_parameters", json!({"rope_type": "yarn", "factor": 4.0}), 256);
    assert_eq!((silent.0, silent.1), (RopeScaling::Yarn(plain), 256));
    let mut full = of_5;
    for (name, value) in
        [("attention_factor", json!(1.5)), ("beta_fast", json!(8.0)), ("beta_slow", json!(2.0)), ("truncate", json!(false))]
    {
        full[name] = value;
    }
    let own = Yarn { attention: 1.5, beta_fast: 8.0, beta_slow: 2.0, truncate: false, ..plain };
    assert_eq!(read("rope_parameters", full, 1024).0, RopeScaling::Yarn(own));
    let scaled = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "mscale": 1.0, "mscale_all_dim": 1.0});
    assert_eq!(read("rope_scaling", scaled, 256).2, 1.0);

    let directory = tempfile::tempdir().unwrap();
    let read = |writer: Writer| {
        let files = ModelFiles::open(&written(&directory, "tiny.gguf", &writer)).unwrap();
        match files.config().rope_scaling {
            RopeScaling::Yarn(yarn) => (yarn, files.config().max_positions),
            ref other => panic!("{other:?}"),
        }
    };
    let gguf = || {
        let writer = tiny().text("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4.0);
        writer.u32("llama.rope.scaling.original_context_length", 256)
    };
    assert_eq!(read(gguf()), (plain, 1024));
    let own = gguf().f32("llama.rope.scaling.yarn_attn_factor", 1.5).f32("llama.rope.scaling.yarn_beta_fast", 8.0);
    assert_eq!(read(own).0, Yarn { attention: 1.5, beta_fast: 8.0, ..plain });
    let scaled = gguf().f32("llama.rope.scaling.yarn_log_multiplier", 1.0).f32("llama.rope.scaling.attn_factor", 2.0);
    assert_eq!(read(scaled).0.attention, 2.0);
}

/// What transformers' Qwen2 makes of the fields about windows.
#[test]
fn a_window_is_that_of_all_layers_or_of_none() {
    let window = |changes: Value| {
        let directory = copy("qwen2");
        edit(&directory, "config.json", |config| {
            for (field, value) in changes.as_object().unwrap() {
                config[field] = value.clone();
            }
        });
        ModelFiles::open(directory.path()).map(|files| files.config().sliding_window).map_err(|error| error.to_string())
    };
    let types = |kinds: [&str; 3]| json!(kinds.map(|kind| format!("{kind}_attention")));
    assert_eq!(window(json!({"use_sliding_window": false, "sliding_window": 8, "max_window_layers": 0})), Ok(None));
    assert_eq!(window(json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 3})), Ok(None));
    assert_eq!(window(json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0})), Ok(Some(8)));
    assert_eq!(window(json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0})), Ok(None));
    let some = window(json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2})).unwrap_err();
    assert!(some.contains("use_sliding_window: a window on some of the layers"), "{some}");
    let listed = |kinds| window(json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": types(kinds)}));
    assert_eq!(listed(["full"; 3]), Ok(None));
    assert_eq!(listed(["sliding"; 3]), Ok(Some(8)));
    assert!(listed(["full", "full", "sliding"]).is_err());
}

#[test]
fn weights_that_differ_from_the_configuration_are_refused() {
    let cases = [
        ("hidden_size", json!(128), "shape"),
        ("intermediate_size", json!(161), "shape"),
        ("num_hidden_layers", json!(9), "model.layers.3.input_layernorm.weight"),
        ("head_dim", json!(32), "shape"),
        ("vocab_size", json!(10_000), "model.embed_tokens.weight"),
        ("tie_word_embeddings", json!(false), "lm_head.weight"),
    ];
    for (field, value, part) in cases {
        let directory = copy("qwen2");
        edit(&directory, "config.json", |config| config[field] = value);
        let error = load_failure(directory.path());
        assert!(error.contains(part), "{field}: {error}");
    }
}

#[test]
fn a_weight_in_a_storage_that_we_cannot_read_is_named() {
    let directory = copy("qwen2");
    let path = directory.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + len].to_vec()).unwrap();
    let mut header: Value = serde_json::from_str(&header).unwrap();
    header["model.norm.weight"]["dtype"] = json!("F8_E4M3");
    let header = header.to_string();
    let damaged = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + len..]].concat();
    fs::write(&path, damaged).unwrap();
    let error = load_failure(directory.path());
    assert!(error.contains("model.norm.weight: storage as F8_E4M3 is not supported"), "{error}");
}

#[test]
fn truncated_models_never_open() {
    let whole = fs::read(golden("llama/llama.gguf")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut.gguf");
    for len in (0..whole.len()).step_by(whole.len() / 150) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(failure(&path).contains("cut.gguf"), "{len}");
    }
    let directory = copy("qwen2");
    let path = directory.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for len in (0..whole.len()).step_by(whole.len() / 50) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(failure(directory.path()).contains("model.safetensors"), "{len}");
    }
}

#[test]
fn flipped_bytes_in_a_header_never_panic() {
    let whole = fs::read(golden("qwen3/qwen3.gguf")).unwrap();
    // Metadata keys, token types and tensor descriptions; texts in between make most of the rest.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("flipped.gguf");
    let descriptions = whole.windows(17).position(|window| window == b"token_embd.weight").unwrap() - 8;
    for at in (0..1400).step_by(7).chain((descriptions..descriptions + 1400).step_by(9)) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&path, &damaged).unwrap();
        let _ = load(&path);
    }
}

#[test]
fn flipped_bytes_in_a_tokenizer_never_panic() {
    for family in ["mistral", "qwen3"] {
        let directory = copy(family);
        let path = directory.path().join("tokenizer.json");
        let whole = fs::read(&path).unwrap();
        // Samples of the settings before the vocabulary, then of vocabulary and merges.
        for at in (0..2000).step_by(5).chain((2000..whole.len()).step_by(499)) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 7);
            fs::write(&path, &damaged).unwrap();
            if let Ok(tokenizer) = Tokenizer::from_json(&path, &Value::Null) {
                let ids = tokenizer.encode(" Le creek: 潮 12\n", true, true).unwrap_or_default();
                tokenizer.decode(&ids, false);
            }
        }
    }
}

/// The smallest llama that loads.
fn tiny() -> Writer {
    tiny_metadata().then(tiny_tensors)
}

fn tiny_metadata() -> Writer {
    Writer::new()
        .text("general.architecture", "llama")
        .text("general.name", "Tiny")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 32)
        .u32("llama.embedding_length", 4)
        .u32("llama.feed_forward_length", 2)
        .u32("llama.attention.head_count", 2)
        .u32("llama.attention.head_count_kv", 1)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .texts("tokenizer.ggml.tokens", &["a", "b", "ab", "<|im_end|>", "<|endoftext|>"])
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 3, 3])
        .texts("tokenizer.ggml.merges", &["a b"])
        .u32("tokenizer.ggml.eos_token_id", 4)
}

fn tiny_tensors(writer: Writer) -> Writer {
    writer.f32_tensor("token_embd.weight", &[5, 4], &[0.1; 20]).f32_tensor("output_norm.weight", &[4], &[1.0; 4]).then(tiny_layer)
}

fn tiny_layer(writer: Writer) -> Writer {
    writer
        .f32_tensor("blk.0.attn_norm.weight", &[4], &[1.0; 4])
        .f32_tensor("blk.0.attn_q.weight", &[4, 4], &[0.1; 16])
        .f32_tensor("blk.0.attn_k.weight", &[2, 4], &[0.1; 8])
        .f32_tensor("blk.0.attn_v.weight", &[2, 4], &[0.1; 8])
        .f32_tensor("blk.0.attn_output.weight", &[4, 4], &[0.1; 16])
        .f32_tensor("blk.0.ffn_norm.weight", &[4], &[1.0; 4])
        .f32_tensor("blk.0.ffn_gate.weight", &[2, 4], &[0.1; 8])
        .f32_tensor("blk.0.ffn_up.weight", &[2, 4], &[0.1; 8])
        .f32_tensor("blk.0.ffn_down.weight", &[4, 2], &[0.1; 8])
}

fn written(directory: &TempDir, name: &str, writer: &Writer) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, writer.bytes()).unwrap();
    path
}

#[test]
fn sampling_defaults_lie_beside_a_gguf_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(&directory, "tiny.gguf", &tiny());
    let defaults = |path: &Path| ModelFiles::open(path).unwrap().into_frontend().generation_defaults;
    assert_eq!(defaults(&path), crate::GenerationDefaults::default());
    fs::write(directory.path().join("generation_config.json"), r#"{"temperature": 0.2, "top_p": 0.9}"#).unwrap();
    let found = defaults(&path);
    assert_eq!((found.temperature, found.top_p), (Some(0.2), Some(0.9)));
}

#[test]
fn a_directory_with_one_gguf_is_a_model_with_two_it_is_a_question() {
    let directory = tempfile::tempdir().unwrap();
    written(&directory, "one.gguf", &tiny());
    let files = ModelFiles::open(directory.path()).unwrap();
    assert_eq!((files.name(), files.parameters()), ("Tiny", 20 + 4 + 4 + 16 + 8 + 8 + 16 + 4 + 8 + 8 + 8));
    assert_eq!(files.end_of_turn(), [3, 4]);
    assert!(files.chat_template().is_none());
    fs::write(directory.path().join("config.json"), "{}").unwrap();
    assert_eq!(ModelFiles::open(directory.path()).unwrap().name(), "Tiny");
    written(&directory, "two.GGUF", &tiny());
    let error = failure(directory.path());
    assert!(error.contains("one.gguf, two.GGUF"), "{error}");
}

#[test]
fn progress_counts_up_to_the_matrices() {
    let directory = tempfile::tempdir().unwrap();
    let files = ModelFiles::open(&written(&directory, "tiny.gguf", &tiny())).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut progress = |done, total| seen.lock().unwrap().push((done, total));
    Decoder::load(&files, Box::new(Reference::new(LIMITS)), WeightFormat::F32, &mut progress).unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.is_sorted() && seen.iter().all(|&(done, total)| done <= total && total == files.file_bytes()), "{seen:?}");
    assert_eq!(seen.last().unwrap().0, 4 * (20 + 16 + 8 + 8 + 16 + 8 + 8 + 8));
}

#[test]
fn a_split_model_is_read_from_all_its_parts() {
    let directory = tempfile::tempdir().unwrap();
    let split =
        |writer: Writer, number: u16| writer.raw("split.no", 2, &number.to_le_bytes()).raw("split.count", 2, &2u16.to_le_bytes());
    let layer = split(tiny_layer(Writer::new()), 1);
    let first = split(tiny_metadata(), 0).f32_tensor("token_embd.weight", &[5, 4], &[0.1; 20]).f32_tensor(
        "output_norm.weight",
        &[4],
        &[1.0; 4],
    );
    let path = written(&directory, "tiny-00001-of-00002.gguf", &first);
    assert!(failure(&path).contains("tiny-00002-of-00002.gguf"));
    let second = written(&directory, "tiny-00002-of-00002.gguf", &layer);
    assert!(load(&path).is_ok());
    assert!(load(directory.path()).is_ok());
    assert!(failure(&second).contains("name the first part"));

    written(&directory, "tiny-00002-of-00002.gguf", &split(tiny_layer(Writer::new()), 0));
    assert!(failure(&path).contains("is not part 2"));
    written(&directory, "tiny-00002-of-00002.gguf", &layer.f32_tensor("output_norm.weight", &[4], &[1.0; 4]));
    assert!(failure(&path).contains("lies in two files"));
    assert!(failure(written(&directory, "renamed.gguf", &first)).contains("names must end in -00001-of-00002.gguf"));
}

#[test]
fn gguf_metadata_that_cannot_be_run_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |writer: Writer| failure(written(&directory, "tiny.gguf", &writer));
    let other = Writer::new().text("general.architecture", "gemma3n");
    assert!(refused(other).contains("\"gemma3n\" is not supported"));
    assert!(refused(Writer::new()).contains("general.architecture"));
    assert!(refused(Writer::new().text("general.architecture", "llama")).contains("llama.embedding_length: missing"));
    assert!(refused(tiny().u32("llama.expert_count", 8)).contains("llama.expert_used_count"));
    assert!(refused(tiny().u32("llama.rope.dimension_count", 1)).contains("head dimension 2"));
    assert!(refused(tiny().text("llama.rope.scaling.type", "longrope")).contains("\"longrope\" is not supported"));
    assert!(refused(tiny().text("llama.rope.scaling.type", "yarn")).contains("llama.rope.scaling.factor"));
    let yarn = || tiny().text("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4.0);
    assert!(refused(yarn().f32("llama.rope.scaling.yarn_ext_factor", 0.5)).contains("yarn_ext_factor: 0.5 is not supported"));
    assert!(refused(yarn().f32("llama.rope.scaling.yarn_beta_slow", 0.0)).contains("yarn_beta_slow"));
    assert!(refused(tiny().f32("llama.rope.scaling.attn_factor", 2.0)).contains("attn_factor: 2 is not supported"));
    assert!(refused(tiny().text("llama.rope.scaling.type", "linear")).contains("llama.rope.scaling.factor"));
    assert!(refused(tiny().f32_tensor("rope_freqs.weight", &[2], &[1.0; 2])).contains("rope_freqs.weight"));
    let both = tiny().text("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 2.0);
    assert!(refused(both.f32_tensor("rope_freqs.weight", &[1], &[1.0])).contains("scaling beside rope_freqs.weight"));
    assert!(refused(tiny().f32("llama.logit_scale", 0.5)).contains("llama.logit_scale: 0.5 is not supported"));
    assert!(refused(tiny().f32("llama.attention.clamp_kqv", -8.0)).contains("clip_qkv"));
    let small = tiny_metadata().then(|writer| writer.f32_tensor("token_embd.weight", &[2, 4], &[0.1; 8])).then(tiny_layer);
    assert!(refused(small).contains("has 5 tokens, the model 2"));
    assert!(refused(tiny().text("tokenizer.chat_template", "{% if %}")).contains("chat_template"));
}

/// The smallest MPT that loads.
fn tiny_mpt(most: f32) -> Writer {
    Writer::new()
        .text("general.architecture", "mpt")
        .u32("mpt.block_count", 1)
        .u32("mpt.context_length", 32)
        .u32("mpt.embedding_length", 4)
        .u32("mpt.feed_forward_length", 8)
        .u32("mpt.attention.head_count", 2)
        .f32("mpt.attention.layer_norm_epsilon", 1e-5)
        .f32("mpt.attention.max_alibi_bias", most)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "mpt")
        .texts("tokenizer.ggml.tokens", &["a", "b", "ab", "<|im_end|>", "<|endoftext|>"])
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 3, 3])
        .texts("tokenizer.ggml.merges", &["a b"])
        .u32("tokenizer.ggml.eos_token_id", 4)
        .f32_tensor("token_embd.weight", &[5, 4], &[0.1; 20])
        .f32_tensor("output_norm.weight", &[4], &[1.0; 4])
        .f32_tensor("blk.0.attn_norm.weight", &[4], &[1.0; 4])
        .f32_tensor("blk.0.attn_qkv.weight", &[12, 4], &[0.1; 48])
        .f32_tensor("blk.0.attn_output.weight", &[4, 4], &[0.1; 16])
        .f32_tensor("blk.0.ffn_norm.weight", &[4], &[1.0; 4])
        .f32_tensor("blk.0.ffn_up.weight", &[8, 4], &[0.1; 32])
        .f32_tensor("blk.0.ffn_down.weight", &[4, 8], &[0.1; 32])
}

#[test]
fn an_mpt_file_is_read_and_what_it_may_have_besides_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = written(&directory, "tiny.gguf", &tiny_mpt(16.0));
    assert!(load(&path).is_ok());
    let config = ModelFiles::open(&path).unwrap().config().clone();
    assert_eq!((config.alibi, config.clip_qkv, config.gated, config.kv_heads), (Some(16.0), None, false, 2));
    let refused = |writer: Writer| failure(written(&directory, "tiny.gguf", &writer));
    assert!(refused(tiny_mpt(0.0)).contains("mpt.attention.max_alibi_bias: no bias is not supported"));
    assert!(refused(tiny_mpt(-1.0)).contains("alibi_bias_max"));
    assert!(refused(tiny_mpt(8.0).u32("mpt.expert_count", 4)).contains("mpt.expert_count"));
    for name in ["position_embd.weight", "blk.0.attn_qkv.bias", "blk.0.attn_q_norm.weight", "blk.0.ffn_act.scales"] {
        let why = refused(tiny_mpt(8.0).f32_tensor(name, &[4], &[1.0; 4]));
        assert!(why.contains(&format!("{name}: a tensor of this name is not supported")), "{why}");
    }
    // Everybody else's biases are refused still.
    assert!(refused(tiny().f32("llama.attention.max_alibi_bias", 8.0)).contains("llama.attention.max_alibi_bias"));
}

#[test]
fn a_factor_without_a_kind_of_scaling_is_a_linear_one() {
    let directory = tempfile::tempdir().unwrap();
    let scaling =
        |writer: Writer| ModelFiles::open(&written(&directory, "tiny.gguf", &writer)).unwrap().config().rope_scaling.clone();
    assert_eq!(scaling(tiny().f32("llama.rope.scaling.factor", 4.0)), crate::RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(tiny().f32("llama.rope.scale_linear", 2.0)), crate::RopeScaling::Linear { factor: 2.0 });
    assert_eq!(scaling(tiny().f32("llama.rope.scale_linear", 1.0)), crate::RopeScaling::None);
    assert_eq!(
        scaling(tiny().text("llama.rope.scaling.type", "none").f32("llama.rope.scaling.factor", 4.0)),
        crate::RopeScaling::None
    );
}
