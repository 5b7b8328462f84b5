//! Gemma 2 and 3: beyond the window on an emulated card and in the engine, under every name and in every form that publishers have, and what
//! is refused of them.

#![cfg(test)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::emulation::Emulated;
use crate::stepping::Stepper;
use serde_json::{Value, json};
use tidemill_engine::{
    Decoder, Engine, EngineOptions, Event, ModelFiles, Request, RequestId, RopeScaling, SamplingParams, Tenant, Usage,
};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::{KvDtype, Limits, Ops, WeightFormat};

const FAMILIES: [&str; 2] = ["gemma2", "gemma3"];
const LIMITS: Limits = Limits { max_tokens: 256, max_samples: 32, max_positions: 512 };
/// That the golden models have.
const WINDOW: usize = 24;

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

fn expected(family: &str) -> Value {
    serde_json::from_slice(&fs::read(golden(family).join("expected.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn stepper(path: &Path, ops: Box<dyn Ops>, format: WeightFormat) -> Stepper {
    Stepper::new(Decoder::load(&ModelFiles::open(path).unwrap(), ops, format, &mut |_, _| {}).unwrap())
}

fn reference(path: &Path) -> Stepper {
    stepper(path, Box::new(Reference::new(LIMITS)), WeightFormat::F32)
}

fn card(path: &Path, format: WeightFormat) -> Stepper {
    stepper(path, Box::new(CudaBackend::new(Emulated::default(), LIMITS).capturing()), format)
}

#[test]
fn an_emulated_card_computes_what_transformers_computes_beyond_the_window() {
    for family in FAMILIES {
        let expected = expected(family);
        let tokens = &ids(&expected["prompt_ids"])[..3 * WINDOW];
        let positions: Vec<u32> = ids(&expected["positions"]).into_iter().filter(|&p| (p as usize) < tokens.len()).collect();
        assert!(positions.iter().any(|&position| position as usize > 2 * WINDOW), "{positions:?}");
        for (container, format, most) in [
            ("", WeightFormat::F32, 1e-4),
            (&*format!("{family}.gguf"), WeightFormat::F32, 1e-4),
            // Sharp attention makes much of what rounding changes.
            ("", WeightFormat::Bf16, 0.1),
            ("", WeightFormat::Int8, 0.3),
        ] {
            // In float32 itself the tiny Gemma 3 is worth ten times as much as others: rounded weights say nothing of it.
            if family == "gemma3" && format != WeightFormat::F32 {
                continue;
            }
            let got = card(&golden(family).join(container), format).logits(tokens, &positions);
            for ((got, want), position) in got.iter().zip(expected["logits"].as_array().unwrap()).zip(&positions) {
                let want: Vec<f32> = want.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
                let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
                let off = norm(&mut got.iter().zip(&want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied());
                println!("{family} {container} {format:?} at {position}: {off}");
                assert!(off < most, "{family} {container} {format:?} at {position}: {off}");
            }
        }
    }
}

/// Prompts beside each other on a card, then steps that are captured and replayed: each layer's own window and rotation.
#[test]
fn captured_steps_of_several_sequences_answer_as_each_does_alone() {
    for family in FAMILIES {
        let prompt = ids(&expected(family)["prompt_ids"]);
        let prompts = [&prompt[..2 * WINDOW], &prompt[..WINDOW - 2], &prompt[3..WINDOW + 9]];
        let mut card = card(&golden(family), WeightFormat::F32);
        let got = card.greedy(&prompts, 8, &[]);
        for (got, prompt) in got.iter().zip(prompts) {
            assert_eq!(*got, reference(&golden(family)).greedy(&[prompt], 8, &[])[0], "{family}");
        }
    }
}

fn start(family: &str, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options = EngineOptions {
        threads: Some(2),
        max_model_len: Some(512),
        max_seqs: 8,
        kv_memory: Some(16 << 20),
        weight_format: WeightFormat::F32,
        kv_dtype: KvDtype::F32,
        ..EngineOptions::new(golden(family))
    };
    change(&mut options);
    Engine::start(options, &mut |_, _| {}).unwrap()
}

fn submit(engine: &Engine, prompt: &[u32]) -> flume::Receiver<Event> {
    let sampling = SamplingParams { temperature: 0.0, max_tokens: Some(48), ignore_eos: true, ..Default::default() };
    let (prompt, tenant) = (prompt.to_vec(), Tenant::default());
    let request =
        Request { id: RequestId(0), prompt, sampling, priority: 0, cache_salt: None, adapter: None, tenant, deadline: None };
    engine.submit(request).unwrap()
}

fn tokens(receiver: &flume::Receiver<Event>) -> (Vec<u32>, Usage) {
    let mut tokens = Vec::new();
    loop {
        match receiver.recv_timeout(Duration::from_secs(60)).unwrap() {
            Event::Token { record, .. } => tokens.push(record.token),
            Event::Done(usage) => return (tokens, usage),
            Event::Prompt { .. } | Event::Finished { .. } => {}
            Event::Failed(error) => panic!("{error}"),
            Event::Expired => panic!("no deadline was set"),
        }
    }
}

#[test]
fn alone_batched_chunked_and_cached_runs_answer_as_transformers_does() {
    for family in FAMILIES {
        let expected = expected(family);
        let (prompt, greedy) = (ids(&expected["prompt_ids"]), ids(&expected["greedy"]));
        let prompts = [&prompt[..], &prompt[..80], &prompt[..33], &prompt[..7]];
        let engine = start(family, |options| options.prefix_caching = false);
        let alone: Vec<Vec<u32>> = prompts.iter().map(|prompt| tokens(&submit(&engine, prompt)).0).collect();
        assert_eq!(alone[0], greedy[..48], "{family}");
        // A budget below the window, and one above it.
        for (budget, caching) in [(512, false), (17, false), (40, false), (512, true)] {
            let engine = start(family, |options| (options.max_batch_tokens, options.prefix_caching) = (budget, caching));
            for round in 0..1 + usize::from(caching) {
                let receivers: Vec<_> = prompts.iter().map(|prompt| submit(&engine, prompt)).collect();
                let answers: Vec<_> = receivers.iter().map(tokens).collect();
                assert!(round == 0 || answers[0].1.cached_tokens >= 64, "{family}: {:?}", answers[0].1);
                let answers: Vec<Vec<u32>> = answers.into_iter().map(|(tokens, _)| tokens).collect();
                assert_eq!(answers, alone, "{family}, a budget of {budget}, round {round}");
            }
        }
    }
}

fn copy_of(family: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(family)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && path.extension().is_some_and(|e| e != "gguf") {
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    folder
}

fn edit(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

/// Renames the tensors of a folder, and puts one beside them that no decoder has.
fn rename(folder: &Path, name: impl Fn(&str) -> String) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let (len, rest) = bytes.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(len.try_into().unwrap()) as usize);
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).unwrap();
    let mut renamed: serde_json::Map<String, Value> =
        header.into_iter().map(|(old, about)| if old == "__metadata__" { (old, about) } else { (name(&old), about) }).collect();
    let image = json!({ "dtype": "F32", "shape": [1], "data_offsets": [data.len(), data.len() + 4] });
    renamed.insert("vision_tower.vision_model.embeddings.patch_embedding.weight".to_owned(), image);
    let header = Value::Object(renamed).to_string();
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data, &[0; 4]].concat()).unwrap();
}

fn logits(path: &Path) -> Vec<Vec<f32>> {
    let expected = expected("gemma3");
    reference(path).logits(&ids(&expected["prompt_ids"])[..40], &[0, 30, 39])
}

#[test]
fn fields_of_either_transformers_and_decoders_beside_an_image_part_are_the_same_model() {
    let want = logits(&golden("gemma3"));
    let five = |config: &mut Value| {
        for name in ["rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"] {
            config.as_object_mut().unwrap().remove(name);
        }
        config["rope_parameters"] = json!({
            "full_attention": { "rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 10_000.0 },
        });
        config["_sliding_window_pattern"] = json!(6);
        let types = (1..=6).map(|i| if i == 6 { "full_attention" } else { "sliding_attention" });
        config["layer_types"] = json!(types.collect::<Vec<_>>());
    };
    let folder = copy_of("gemma3");
    edit(folder.path(), five);
    assert_eq!(ModelFiles::open(folder.path()).unwrap().config(), ModelFiles::open(&golden("gemma3")).unwrap().config());
    assert_eq!(logits(folder.path()), want);

    for stem in ["language_model.model.", "model.language_model."] {
        let folder = copy_of("gemma3");
        rename(folder.path(), |name| format!("{stem}{}", name.strip_prefix("model.").unwrap()));
        edit(folder.path(), |config| {
            let (architecture, ends) = (json!(["Gemma3ForConditionalGeneration"]), config["eos_token_id"].clone());
            let mut text = config.take();
            for name in ["eos_token_id", "architectures"] {
                text.as_object_mut().unwrap().remove(name);
            }
            text["model_type"] = json!("gemma3_text");
            let vision = json!({ "model_type": "siglip_vision_model" });
            *config = json!({
                "architectures": architecture, "model_type": "gemma3", "text_config": text, "vision_config": vision,
                "eos_token_id": ends, "image_token_index": 445,
            });
        });
        let files = ModelFiles::open(folder.path()).unwrap();
        assert_eq!(files.config(), ModelFiles::open(&golden("gemma3")).unwrap().config());
        assert_eq!(files.end_of_turn(), [1, 5]);
        assert_eq!(logits(folder.path()), want, "{stem}");
    }
}

#[test]
fn what_files_leave_out_is_what_transformers_takes() {
    let folder = copy_of("gemma3");
    edit(folder.path(), |config| {
        for name in ["rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern", "sliding_window"] {
            config.as_object_mut().unwrap().remove(name);
        }
        for name in ["query_pre_attn_scalar", "final_logit_softcapping", "tie_word_embeddings", "max_position_embeddings"] {
            config.as_object_mut().unwrap().remove(name);
        }
    });
    let files = ModelFiles::open(folder.path()).unwrap();
    let config = files.config();
    let gemma = config.gemma.as_ref().unwrap();
    assert_eq!((config.rope_theta, gemma.local_rope_theta, &config.rope_scaling), (1e6, Some(1e4), &RopeScaling::None));
    assert_eq!((config.sliding_window, config.max_positions, config.tied_embeddings), (Some(4096), 131_072, true));
    assert_eq!((gemma.query_scalar, gemma.attention_cap, gemma.logit_cap), (256.0, None, None));
    assert_eq!(gemma.full_attention, [false, false, false, false, false, true]);
    assert_eq!((config.window(4), config.window(5)), (Some(4096), None));

    let folder = copy_of("gemma2");
    edit(folder.path(), |config| {
        for name in ["attn_logit_softcapping", "final_logit_softcapping", "layer_types"] {
            config.as_object_mut().unwrap().remove(name);
        }
    });
    let files = ModelFiles::open(folder.path()).unwrap();
    let gemma = files.config().gemma.as_ref().unwrap();
    assert_eq!((gemma.attention_cap, gemma.logit_cap, gemma.local_rope_theta), (Some(50.0), Some(30.0), None));
    assert_eq!(gemma.full_attention, [false, true, false, true]);
    assert!(files.config().local_inverse_frequencies().is_none());
}

#[test]
fn what_is_not_computed_is_refused_by_field() {
    let plain = json!({ "rope_type": "default", "rope_theta": 10_000.0 });
    let cases: [(&str, &str, Value, &[&str]); 15] = [
        ("gemma3", "use_bidirectional_attention", json!(true), &["use_bidirectional_attention: true"]),
        ("gemma3", "attn_logit_softcapping", json!(50.0), &["attn_logit_softcapping: 50.0"]),
        ("gemma3", "hidden_activation", json!("silu"), &["hidden_activation", "gelu_pytorch_tanh"]),
        ("gemma3", "quantization_config", json!({}), &["quantization_config"]),
        ("gemma3", "num_hidden_layers", json!(1_u64 << 62), &["num_hidden_layers", "must lie between"]),
        ("gemma3", "layer_types", json!(["full_attention"]), &["layer_types: names 1 layers, the model has 6"]),
        ("gemma3", "layer_types", json!(vec!["chunked_attention"; 6]), &["layer_types: \"chunked_attention\""]),
        ("gemma3", "sliding_window", json!(null), &["sliding_window: is missing"]),
        ("gemma3", "query_pre_attn_scalar", json!(-1.0), &["query_pre_attn_scalar: is -1"]),
        ("gemma3", "rope_parameters", plain.clone(), &["rope_parameters: must have a full_attention"]),
        (
            "gemma3",
            "rope_parameters",
            json!({ "full_attention": plain, "sliding_attention": { "rope_type": "linear", "factor": 2.0 } }),
            &["rope_parameters.sliding_attention: \"linear\""],
        ),
        ("gemma2", "rope_parameters", json!({ "full_attention": {}, "sliding_attention": {} }), &["Gemma 2 has one"]),
        ("gemma2", "final_logit_softcapping", json!(-3.0), &["final_logit_softcapping: is -3"]),
        ("gemma2", "architectures", json!(["GemmaForCausalLM"]), &["\"GemmaForCausalLM\" is not supported", "Gemma 3"]),
        ("gemma3", "architectures", json!(["Gemma3nForCausalLM"]), &["\"Gemma3nForCausalLM\" is not supported"]),
    ];
    for (family, field, value, parts) in cases {
        let folder = copy_of(family);
        edit(folder.path(), |config| {
            if field == "rope_parameters" {
                config.as_object_mut().unwrap().remove("rope_scaling");
            }
            config[field] = value;
        });
        let error = match ModelFiles::open(folder.path()) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{family} {field} was opened"),
        };
        assert!(parts.iter().all(|part| error.contains(part)), "{family} {field}: {error}");
    }
}

#[test]
fn a_context_that_is_stretched_is_as_long_as_that() {
    let folder = copy_of("gemma3");
    edit(folder.path(), |config| {
        config.as_object_mut().unwrap().remove("rope_scaling");
        config["max_position_embeddings"] = json!(128);
        config["rope_parameters"] = json!({
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128,
            },
            "sliding_attention": { "rope_type": "default", "rope_theta": 1e4 },
        });
    });
    assert_eq!(ModelFiles::open(folder.path()).unwrap().config().max_positions, 512);
}
