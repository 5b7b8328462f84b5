//! Models with experts: quantised, under every name that publishers give the tensors, and what is refused of them.

#![cfg(test)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::emulation::Emulated;
use crate::stepping::Stepper;
use serde_json::{Value, json};
use tidemill_engine::model::Model;
use tidemill_engine::{Adapter, Container, Decoder, LoraConfig, MergeError, MergeOptions, ModelFiles, Pair, Projection, merge};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::{Limits, Ops, WeightFormat};

const FAMILIES: [&str; 4] = ["mixtral", "qwen2_moe", "qwen3_moe", "dbrx"];
const LIMITS: Limits = Limits { max_tokens: 256, max_samples: 32, max_positions: 512 };

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

fn stepper(path: &Path, format: WeightFormat) -> Stepper {
    stepper_on(Box::new(CpuBackend::new(CpuOptions { threads: 2, isa: None, limits: LIMITS }).unwrap()), path, format)
}

fn stepper_on(ops: Box<dyn Ops>, path: &Path, format: WeightFormat) -> Stepper {
    Stepper::new(Decoder::load(&ModelFiles::open(path).unwrap(), ops, format, &mut |_, _| {}).unwrap())
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Logits of the golden positions, and what they should be.
fn logits(path: &Path, family: &str, format: WeightFormat) -> Vec<(Vec<f32>, Vec<f32>)> {
    let expected: Value = serde_json::from_slice(&fs::read(golden(family).join("expected.json")).unwrap()).unwrap();
    let tokens: Vec<u32> = ids(&expected["prompt_ids"]).into_iter().chain(ids(&expected["greedy"])).collect();
    let got = stepper(path, format).logits(&tokens, &ids(&expected["positions"]));
    let row = |row: &Value| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    got.into_iter().zip(expected["logits"].as_array().unwrap().iter().map(row)).collect()
}

/// Half of the positions are within a tenth of the logits' size: a router that rounding sends elsewhere changes the others.
#[test]
fn rounded_weights_compute_almost_the_same() {
    for family in FAMILIES {
        for format in [WeightFormat::Bf16, WeightFormat::Int8] {
            let mut off: Vec<f32> = logits(&golden(family), family, format)
                .iter()
                .map(|(got, want)| {
                    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
                    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
                })
                .collect();
            off.sort_by(f32::total_cmp);
            println!("{family} {format:?}: {off:?}");
            assert!(off[off.len() / 2] < 0.1, "{family} {format:?}: {off:?}");
        }
    }
}

/// The kernels of cards, run by the host, at the first of the golden positions: exact weights exactly, rounded ones almost.
#[test]
fn an_emulated_card_computes_what_transformers_computes() {
    for family in FAMILIES {
        let expected: Value = serde_json::from_slice(&fs::read(golden(family).join("expected.json")).unwrap()).unwrap();
        let positions: Vec<u32> = ids(&expected["positions"]).into_iter().filter(|&position| position < 20).collect();
        let tokens = &ids(&expected["prompt_ids"])[..20];
        assert!(positions.len() >= 3, "{positions:?}");
        let rounded = [(WeightFormat::Bf16, 0.1), (WeightFormat::Int8, 0.1), (WeightFormat::Fp8, 0.2)];
        let rounded = if family == "dbrx" { &rounded[..] } else { &[] };
        for &(format, most) in [(WeightFormat::F32, 1e-4)].iter().chain(rounded) {
            let card = Box::new(CudaBackend::new(Emulated::default(), LIMITS).capturing());
            let got = stepper_on(card, &golden(family), format).logits(tokens, &positions);
            let mut off: Vec<f32> = (got.iter().zip(expected["logits"].as_array().unwrap()))
                .map(|(got, want)| {
                    let want: Vec<f32> = want.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
                    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
                    norm(&mut got.iter().zip(&want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
                })
                .collect();
            off.sort_by(f32::total_cmp);
            println!("{family} {format:?}: {off:?}");
            let worst = if format == WeightFormat::F32 { off[off.len() - 1] } else { off[off.len() / 2] };
            assert!(worst < most, "{family} {format:?}: {off:?}");
        }
    }
}

/// A safetensors file as names to (shape, bytes), all f32.
fn read(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let (len, rest) = bytes.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(len.try_into().unwrap()) as usize);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    tensors
        .map(|(name, about)| {
            let [from, to] = [0, 1].map(|i| about["data_offsets"][i].as_u64().unwrap() as usize);
            let shape = about["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect();
            (name, (shape, data[from..to].to_vec()))
        })
        .collect()
}

fn write(path: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<u8>)>) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": offsets }));
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
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

#[test]
fn experts_one_by_one_and_all_in_one_tensor_are_the_same_model() {
    let folder = copy_of("qwen2_moe");
    let file = folder.path().join("model.safetensors");
    let mut tensors = read(&file);
    let together: Vec<String> = tensors.keys().filter(|name| name.contains(".experts.")).cloned().collect();
    assert_eq!(together.len(), 2 * 2, "gate_up_proj and down_proj of two layers: {together:?}");
    for name in together {
        let (shape, data) = tensors.remove(&name).unwrap();
        let base = name.rsplit_once('.').unwrap().0.to_owned();
        let parts: &[&str] = if name.ends_with("gate_up_proj") { &["gate_proj", "up_proj"] } else { &["down_proj"] };
        let rows = shape[1] / parts.len();
        for (index, bytes) in data.chunks(rows * shape[2] * 4).enumerate() {
            let (expert, part) = (index / parts.len(), parts[index % parts.len()]);
            tensors.insert(format!("{base}.{expert}.{part}.weight"), (vec![rows, shape[2]], bytes.to_vec()));
        }
    }
    write(&file, &tensors);
    for (got, want) in logits(folder.path(), "qwen2_moe", WeightFormat::F32) {
        assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-3));
    }
    // One expert less is missed by its name.
    tensors.remove("model.layers.1.mlp.experts.5.up_proj.weight");
    write(&file, &tensors);
    let ops = Box::new(CpuBackend::new(CpuOptions { threads: 1, isa: None, limits: LIMITS }).unwrap());
    let files = ModelFiles::open(folder.path()).unwrap();
    let missing = Decoder::load(&files, ops, WeightFormat::F32, &mut |_, _| {}).map(|_| ()).unwrap_err().to_string();
    assert!(missing.contains("model.layers.1.mlp.experts.5.up_proj.weight"), "{missing}");
}

#[test]
fn configurations_that_are_not_computed_are_refused_by_field() {
    for (family, field, value) in [
        ("qwen3_moe", "mlp_only_layers", json!([0])),
        ("qwen3_moe", "decoder_sparse_step", json!(2)),
        ("qwen3_moe", "num_experts_per_tok", json!(9)),
        ("qwen2_moe", "shared_expert_intermediate_size", json!(0)),
        ("mixtral", "num_experts", json!(0)),
    ] {
        let folder = copy_of(family);
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let own = if family == "mixtral" { "num_local_experts" } else { field };
        config[own] = value;
        fs::write(&path, config.to_string()).unwrap();
        let refused = ModelFiles::open(folder.path()).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains(field), "{refused}");
    }
}

fn adapter_of(files: &ModelFiles, projection: Projection) -> Adapter {
    let (out, input) = projection.shape(files.config());
    let pair = Pair { layer: 1, projection, rank: 1, scale: 0.5, a: vec![0.1; input], b: vec![0.1; out] };
    Adapter::new(LoraConfig { r: 1, targets: vec![projection], layers: Some(vec![1]), ..LoraConfig::default() }, "", vec![pair])
}

#[test]
fn adapters_change_attention_and_are_refused_elsewhere() {
    for family in FAMILIES {
        let files = ModelFiles::open(&golden(family)).unwrap();
        let is_dbrx = family == "dbrx";
        for projection in Projection::every() {
            let adapter = adapter_of(&files, projection);
            let why = match projection {
                Projection::DbrxQkv | Projection::DbrxOutput if is_dbrx => None,
                _ if is_dbrx => Some("adapt Wqkv and out_proj"),
                Projection::DbrxQkv | Projection::DbrxOutput => Some("made for DBRX"),
                _ if projection.is_of_mpt() => Some("made for MPT"),
                Projection::Gate | Projection::Up | Projection::Down => Some("experts"),
                _ => None,
            };
            match (why, adapter.check(files.config())) {
                (None, fits) => fits.unwrap(),
                (Some(why), refused) => {
                    let refused = refused.unwrap_err().to_string();
                    assert!(refused.contains(projection.name()) && refused.contains(why), "{refused}");
                }
            }
        }
    }
}

#[test]
fn adapters_are_merged_into_the_container_of_the_base() {
    let out = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        for (base, container) in
            [(golden(family), Container::Safetensors), (golden(family).join(format!("{family}.gguf")), Container::Gguf)]
        {
            let files = ModelFiles::open(&base).unwrap();
            let adapter = adapter_of(&files, if family == "dbrx" { Projection::DbrxQkv } else { Projection::Value });
            let to = out.path().join(format!("{family}-{container:?}"));
            let options = MergeOptions { container, storage: None, files_from: None };
            merge(&files, &adapter, &to, &options).unwrap();
            let mut with = stepper(&base, WeightFormat::F32);
            with.decoder().load_adapter(0, &adapter).unwrap();
            with.use_adapters(&[0]);
            let tokens: Vec<u32> = (20..60).collect();
            let want = with.logits(&tokens, &[0, 20, 39]);
            let got = stepper(&to, WeightFormat::F32).logits(&tokens, &[0, 20, 39]);
            assert!(got.iter().flatten().zip(want.iter().flatten()).all(|(g, w)| (g - w).abs() < 1e-3), "{family}");
            let other = if container == Container::Gguf { Container::Safetensors } else { Container::Gguf };
            let refused = merge(&files, &adapter, &out.path().join("other"), &MergeOptions { container: other, ..options });
            assert!(matches!(refused, Err(MergeError::Unsupported(why)) if why.contains("mixture of experts")));
        }
    }
}

#[test]
fn the_start_up_line_tells_all_parameters_from_those_of_a_token() {
    let files = ModelFiles::open(&golden("mixtral")).unwrap();
    // Two of four experts are idle in two layers of 64 by 96.
    assert_eq!(files.parameters() - files.active_parameters(), 2 * 2 * 3 * 64 * 96);
    assert!(files.describe().contains("2 of 4 experts"), "{}", files.describe());
}

/// DBRX's configuration has names of its own.
#[test]
fn what_dbrx_does_not_compute_is_refused_by_field() {
    for (part, field, value, why) in [
        ("ffn_config", "moe_normalize_expert_weights", json!(2.0), "the 2-norm of weights is not supported"),
        ("ffn_config", "ffn_act_fn", json!({ "name": "gelu" }), "\"gelu\" is not supported"),
        ("ffn_config", "uniform_expert_assignment", json!(true), "uniform_expert_assignment"),
        ("ffn_config", "moe_top_k", json!(5), "num_experts_per_tok"),
        ("attn_config", "clip_qkv", json!(0), "clip_qkv"),
        ("attn_config", "kv_n_heads", json!(3), "num_key_value_heads"),
        ("", "n_heads", json!(7), "n_heads"),
        ("", "quantization_config", json!({ "quant_method": "awq" }), "quantization_config"),
        ("", "rope_scaling", json!({ "type": "dynamic", "factor": 2 }), "\"dynamic\" is not supported"),
    ] {
        let folder = copy_of("dbrx");
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        *if part.is_empty() { &mut config[field] } else { &mut config[part][field] } = value;
        fs::write(&path, config.to_string()).unwrap();
        let refused = ModelFiles::open(folder.path()).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains(why), "{field}: {refused}");
    }
}

/// The fields of both versions of transformers, and what is left out.
#[test]
fn dbrx_reads_its_fields_where_either_transformers_writes_them() {
    let read = |change: &dyn Fn(&mut Value)| {
        let folder = copy_of("dbrx");
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(&path, config.to_string()).unwrap();
        ModelFiles::open(folder.path()).unwrap().config().clone()
    };
    let plain = read(&|_| {});
    assert_eq!((plain.rope_theta, plain.clip_qkv, plain.experts.unwrap().normalised), (500_000.0, Some(1.5), true));
    let newer = read(&|config| {
        config["attn_config"].as_object_mut().unwrap().remove("rope_theta");
        config["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 500000.0 });
    });
    assert_eq!(newer, plain);
    let without = read(&|config| {
        config["attn_config"]["clip_qkv"] = Value::Null;
        config["ffn_config"]["moe_normalize_expert_weights"] = Value::Null;
    });
    assert_eq!((without.clip_qkv, without.experts.unwrap().normalised), (None, false));
}

#[test]
fn adapters_of_dbrx_keep_its_names_wherever_they_are_written() {
    let out = tempfile::tempdir().unwrap();
    let adapter = Adapter::read(&golden("dbrx").join("adapters/attention")).unwrap();
    assert_eq!(adapter.config.targets, Projection::DBRX);
    let folder = out.path().join("again");
    adapter.write(&folder).unwrap();
    assert_eq!(Adapter::read(&folder).unwrap().pairs, adapter.pairs);
    let config: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], json!(["Wqkv", "out_proj"]));
    let names: Vec<String> = read(&folder.join("adapter_model.safetensors")).into_keys().collect();
    assert_eq!(names[0], "base_model.model.transformer.blocks.0.norm_attn_norm.attn.Wqkv.lora_A.weight");

    let file = out.path().join("adapter.gguf");
    adapter.write_gguf(ModelFiles::open(&golden("dbrx")).unwrap().config(), &file).unwrap();
    let bytes = fs::read(&file).unwrap();
    let has = |name: &str| bytes.windows(name.len()).any(|window| window == name.as_bytes());
    assert!(has("blk.0.attn_qkv.weight.lora_a") && has("blk.1.attn_output.weight.lora_b") && !has("attn_q.weight"));
}

/// A part of the matrix of query, key and value each, which rows are whose being what can go wrong.
#[test]
fn an_adapter_of_the_joined_matrix_does_what_its_rows_do_to_query_key_and_value() {
    let files = ModelFiles::open(&golden("dbrx")).unwrap();
    let tokens: Vec<u32> = (20..60).collect();
    let base = stepper(&golden("dbrx"), WeightFormat::F32).logits(&tokens, &[39]);
    for rows in [0..64, 64..96, 96..128] {
        let mut adapter = adapter_of(&files, Projection::DbrxQkv);
        adapter.pairs[0].b.iter_mut().enumerate().for_each(|(row, b)| *b = if rows.contains(&row) { 0.3 } else { 0.0 });
        let out = tempfile::tempdir().unwrap();
        let to = out.path().join("merged");
        merge(&files, &adapter, &to, &MergeOptions { container: Container::Safetensors, storage: None, files_from: None })
            .unwrap();
        let want = stepper(&to, WeightFormat::F32).logits(&tokens, &[39]);
        let mut with = stepper(&golden("dbrx"), WeightFormat::F32);
        with.decoder().load_adapter(0, &adapter).unwrap();
        with.use_adapters(&[0]);
        let got = with.logits(&tokens, &[39]);
        let far = |a: &[Vec<f32>], b: &[Vec<f32>]| {
            a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max)
        };
        assert!(far(&got, &want) < 1e-3, "{rows:?}: {}", far(&got, &want));
        assert!(far(&got, &base) > 1e-2, "{rows:?}: {}", far(&got, &base));
    }
}
