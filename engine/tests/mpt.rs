//! MPT, beyond what its goldens compare with those of other families: what of its configuration changes what it computes, what is refused of it,
//! its adapters, and its kernels on an emulated card, in chunks and in company.

#![cfg(test)]

use std::fs;
use std::path::{Path, PathBuf};

use crate::emulation::Emulated;
use crate::stepping::Stepper;
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::model::Model;
use tidemill_engine::{
    Adapter, Container, Decoder, Engine, EngineOptions, Event, LoraConfig, MergeError, MergeOptions, ModelConfig, ModelFiles,
    Pair, Projection, Request, RequestId, SamplingParams, Tenant, merge,
};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::{KvDtype, Limits, Ops, WeightFormat};

const LIMITS: Limits = Limits { max_tokens: 256, max_samples: 32, max_positions: 512 };

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/mpt")
}

fn gguf() -> PathBuf {
    golden().join("mpt.gguf")
}

fn expected() -> Value {
    serde_json::from_slice(&fs::read(golden().join("expected.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn stepper_on(ops: Box<dyn Ops>, path: &Path, format: WeightFormat) -> Stepper {
    Stepper::new(Decoder::load(&ModelFiles::open(path).unwrap(), ops, format, &mut |_, _| {}).unwrap())
}

fn stepper(path: &Path) -> Stepper {
    stepper_on(Box::new(Reference::new(LIMITS)), path, WeightFormat::F32)
}

fn card() -> Box<dyn Ops> {
    Box::new(CudaBackend::new(Emulated::default(), LIMITS).capturing())
}

/// The golden model with another configuration.
fn changed(change: impl FnOnce(&mut Value)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        fs::copy(golden().join(name), folder.path().join(name)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(golden().join("config.json")).unwrap()).unwrap();
    change(&mut config);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn config(change: impl FnOnce(&mut Value)) -> ModelConfig {
    ModelFiles::open(changed(change).path()).unwrap().config().clone()
}

fn far(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max)
}

#[test]
fn slopes_are_those_of_transformers() {
    // `build_mpt_alibi_tensor(heads, 2, alibi_bias_max)[:, 0, 0]` without its sign.
    let cases: [(usize, f64, &[f32]); 5] = [
        (4, 8.0, &[0.25, 0.0625, 0.015_625, 0.003_906_25]),
        (6, 8.0, &[0.25, 0.0625, 0.015_625, 0.003_906_25, 0.5, 0.125]),
        (3, 8.0, &[0.062_5, 0.003_906_25, 0.25]),
        (1, 8.0, &[0.003_906_25]),
        (2, 16.0, &[0.003_906_25, 0.000_015_258_789]),
    ];
    for (heads, most, want) in cases {
        let config = config(|config| {
            config["n_heads"] = json!(heads);
            config["attn_config"]["alibi_bias_max"] = json!(most);
        });
        assert_eq!(config.alibi_slopes().unwrap(), want, "{heads} heads, {most}");
        assert!(config.inverse_frequencies().is_empty());
    }
}

#[test]
fn what_a_file_leaves_out_has_the_defaults_of_transformers() {
    let plain = config(|config| {
        for field in
            ["attn_config", "expansion_ratio", "layer_norm_epsilon", "tie_word_embeddings", "no_bias", "norm_type", "max_seq_len"]
        {
            config.as_object_mut().unwrap().remove(field);
        }
    });
    assert_eq!((plain.alibi, plain.clip_qkv, plain.softmax_scale), (Some(8.0), None, None));
    assert_eq!((plain.intermediate, plain.rms_eps, plain.tied_embeddings, plain.max_positions), (4 * 72, 1e-5, true, 2048));
    assert!(!plain.gated && plain.layer_norm && !plain.mlp_bias);
}

#[test]
fn what_scores_are_made_of_changes_what_is_computed() {
    let tokens: Vec<u32> = (20..60).collect();
    let plain = stepper(&golden()).logits(&tokens, &[39]);
    for (field, value) in [("alibi_bias_max", json!(4)), ("softmax_scale", json!(0.1)), ("clip_qkv", json!(0.5))] {
        let folder = changed(|config| config["attn_config"][field] = value);
        assert!(far(&stepper(folder.path()).logits(&tokens, &[39]), &plain) > 1e-2, "{field}");
    }
    // What is the default, said in words.
    let same = changed(|config| config["attn_config"]["softmax_scale"] = json!(1.0 / 12f64.sqrt()));
    assert!(far(&stepper(same.path()).logits(&tokens, &[39]), &plain) < 1e-4);
}

#[test]
fn what_mpt_does_not_compute_is_refused_by_field() {
    for (part, field, value, why) in [
        ("attn_config", "alibi", json!(false), "attn_config.alibi: false is not supported"),
        ("attn_config", "qk_ln", json!(true), "attn_config.qk_ln"),
        ("attn_config", "prefix_lm", json!(true), "attn_config.prefix_lm"),
        ("attn_config", "rope", json!(true), "attn_config.rope"),
        ("attn_config", "attn_type", json!("multiquery_attention"), "\"multiquery_attention\" is not supported"),
        ("attn_config", "sliding_window_size", json!(128), "sliding_window_size: 128"),
        ("attn_config", "alibi_bias_max", json!(-8), "alibi_bias_max"),
        ("attn_config", "softmax_scale", json!(0), "softmax_scale"),
        ("attn_config", "clip_qkv", json!(-1), "clip_qkv"),
        ("ffn_config", "ffn_act_fn", json!({ "name": "silu" }), "\"silu\" is not supported"),
        ("ffn_config", "ffn_act_fn", json!({ "name": "gelu", "approximate": "tanh" }), "\"tanh\" is not supported"),
        ("ffn_config", "ffn_type", json!("mptglu"), "\"mptglu\" is not supported"),
        ("", "no_bias", json!(false), "no_bias: false is not supported"),
        ("", "norm_type", json!("rmsnorm"), "\"rmsnorm\" is not supported"),
        ("", "logit_scale", json!("inv_sqrt_d_model"), "logit_scale"),
        ("", "n_heads", json!(7), "n_heads"),
        ("", "quantization_config", json!({ "quant_method": "awq" }), "quantization_config"),
    ] {
        let folder = changed(|config| *if part.is_empty() { &mut config[field] } else { &mut config[part][field] } = value);
        let refused = ModelFiles::open(folder.path()).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains(why), "{field}: {refused}");
    }
}

/// Exact weights give exactly what transformers gives; rounded ones almost.
#[test]
fn an_emulated_card_computes_what_transformers_computes() {
    let expected = expected();
    let positions: Vec<u32> = ids(&expected["positions"]).into_iter().filter(|&position| position < 60).collect();
    let tokens = &ids(&expected["prompt_ids"])[..60];
    assert!(positions.len() >= 3, "{positions:?}");
    for (path, format, most) in [
        (golden(), WeightFormat::F32, 1e-4),
        (gguf(), WeightFormat::F32, 1e-4),
        (golden(), WeightFormat::Bf16, 0.05),
        (golden(), WeightFormat::Int8, 0.1),
        (golden(), WeightFormat::Fp8, 0.4),
    ] {
        let got = stepper_on(card(), &path, format).logits(tokens, &positions);
        let mut off: Vec<f32> = (got.iter().zip(expected["logits"].as_array().unwrap()))
            .map(|(got, want)| {
                let want: Vec<f32> = want.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
                let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
                norm(&mut got.iter().zip(&want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
            })
            .collect();
        // Scores are sharp, so what is rounded grows from token to token: the middle one counts.
        off.sort_by(f32::total_cmp);
        println!("{} as {format:?}: {off:?}", path.display());
        assert!(off[off.len() / 2] < most, "{} as {format:?}: {off:?}", path.display());
    }
    // Prompts of three lengths, then their answers together, in captured steps.
    let prompt = ids(&expected["prompt_ids"]);
    let prompts = [&prompt[..20], &prompt[5..12], &prompt[..33]];
    let want = stepper(&golden()).greedy(&prompts, 8, &[]);
    assert_eq!(stepper_on(card(), &golden(), WeightFormat::F32).greedy(&prompts, 8, &[]), want);
}

/// An engine whose steps are shorter than the prompts: chunks of several sequences beside each other's answers, then from the prefix cache.
#[test]
fn chunks_in_company_and_from_the_prefix_cache_give_the_same_tokens() {
    let options = EngineOptions {
        threads: Some(2),
        max_seqs: 4,
        max_batch_tokens: 24,
        kv_memory: Some(64 << 20),
        weight_format: WeightFormat::F32,
        kv_dtype: KvDtype::F32,
        ..EngineOptions::new(golden())
    };
    let engine = Engine::start(options, &mut |_, _| {}).unwrap();
    let submit = |prompt: &[u32]| {
        let sampling = SamplingParams { temperature: 0.0, max_tokens: Some(64), ignore_eos: true, ..SamplingParams::default() };
        let request = Request {
            id: RequestId(0),
            prompt: prompt.to_vec(),
            sampling,
            priority: 0,
            cache_salt: None,
            adapter: None,
            tenant: Tenant::default(),
            deadline: None,
        };
        engine.submit(request).unwrap()
    };
    let expected = expected();
    let prompt = ids(&expected["prompt_ids"]);
    let others = [&prompt[20..70], &prompt[..33]];
    let wanted = stepper(&golden()).greedy(&others, 64, &[]);
    for _ in 0..2 {
        let receivers: Vec<_> = [&prompt[..], others[0], others[1]].into_iter().map(submit).collect();
        let answers: Vec<Vec<u32>> = receivers
            .into_iter()
            .map(|receiver| {
                let token = |event| if let Event::Token { record, .. } = event { Some(record.token) } else { None };
                receiver.into_iter().filter_map(token).collect()
            })
            .collect();
        assert_eq!(answers, [&ids(&expected["greedy"])[..], &wanted[0], &wanted[1]]);
    }
    assert!(engine.stats().prefix_hits > 0);
}

fn adapter_of(files: &ModelFiles, projection: Projection) -> Adapter {
    let (out, input) = projection.shape(files.config());
    // Numbers that differ: a norm of the stream takes away what is the same in all of it.
    let b = (0..out).map(|row| (row % 5) as f32 * 0.1 - 0.1).collect();
    let pair = Pair { layer: 1, projection, rank: 1, scale: 0.5, a: vec![0.1; input], b };
    Adapter::new(LoraConfig { r: 1, targets: vec![projection], layers: Some(vec![1]), ..LoraConfig::default() }, "", vec![pair])
}

#[test]
fn adapters_of_its_four_matrices_fit_and_others_are_refused() {
    let files = ModelFiles::open(&golden()).unwrap();
    for projection in Projection::every() {
        match (projection.is_of_mpt(), adapter_of(&files, projection).check(files.config())) {
            (true, fits) => fits.unwrap(),
            (false, refused) => {
                let refused = refused.unwrap_err().to_string();
                assert!(refused.contains("adapt Wqkv, out_proj, up_proj and down_proj"), "{refused}");
            }
        }
    }
}

#[test]
fn adapters_are_merged_into_the_container_of_the_base() {
    let out = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (20..60).collect();
    for (base, container) in [(golden(), Container::Safetensors), (gguf(), Container::Gguf)] {
        let files = ModelFiles::open(&base).unwrap();
        let plain = stepper(&base).logits(&tokens, &[0, 39]);
        for projection in Projection::MPT {
            let adapter = adapter_of(&files, projection);
            let to = out.path().join(format!("{projection:?}-{container:?}"));
            let options = MergeOptions { container, storage: None, files_from: None };
            merge(&files, &adapter, &to, &options).unwrap();
            let mut with = stepper(&base);
            with.decoder().load_adapter(0, &adapter).unwrap();
            with.use_adapters(&[0]);
            let want = with.logits(&tokens, &[0, 39]);
            assert!(far(&stepper(&to).logits(&tokens, &[0, 39]), &want) < 1e-3, "{projection:?} {container:?}");
            assert!(far(&plain, &want) > 1e-2, "{projection:?} {container:?}");
            let other = if container == Container::Gguf { Container::Safetensors } else { Container::Gguf };
            let refused = merge(&files, &adapter, &out.path().join("other"), &MergeOptions { container: other, ..options });
            assert!(matches!(refused, Err(MergeError::Unsupported(why)) if why.contains("one matrix")));
        }
    }
}

#[test]
fn adapters_keep_its_names_wherever_they_are_written() {
    let out = tempfile::tempdir().unwrap();
    let adapter = Adapter::read(&golden().join("adapters/all")).unwrap();
    assert_eq!(adapter.config.targets, Projection::MPT);
    let folder = out.path().join("again");
    adapter.write(&folder).unwrap();
    assert_eq!(Adapter::read(&folder).unwrap().pairs, adapter.pairs);
    let config: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], json!(["Wqkv", "down_proj", "out_proj", "up_proj"]));

    let file = out.path().join("adapter.gguf");
    adapter.write_gguf(ModelFiles::open(&golden()).unwrap().config(), &file).unwrap();
    let bytes = fs::read(&file).unwrap();
    let has = |name: &str| bytes.windows(name.len()).any(|window| window == name.as_bytes());
    assert!(has("blk.0.attn_qkv.weight.lora_a") && has("blk.1.ffn_up.weight.lora_b") && !has("attn_q.weight"));
}
