use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::model_config::ModelConfig;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens")
}

fn tiny() -> ModelConfig {
    ModelConfig::from_json(&goldens().join("llama/config.json")).unwrap().0
}

/// An adapter of the tiny llama on `targets` of all layers.
fn made(config: LoraConfig) -> Adapter {
    let model = tiny();
    let layers = config.layers.clone().unwrap_or_else(|| (0..model.layers).collect());
    let places = layers.into_iter().flat_map(|layer| config.targets.iter().map(move |projection| (layer, *projection)));
    let pairs = places.map(|(layer, projection)| {
        let (out, input) = projection.shape(&model);
        let noise = |n: usize, seed: usize| (0..n).map(|i| ((i * 37 + seed * 11) % 97) as f32 / 97.0 - 0.5).collect();
        Pair {
            layer,
            projection,
            rank: config.r,
            scale: config.scale(),
            a: noise(config.r * input, layer),
            b: noise(out * config.r, 5),
        }
    });
    let pairs = pairs.collect();
    Adapter::new(config, "tidemill/tiny-llama", pairs)
}

/// Writes a copy of a golden adapter whose configuration is changed by `change`, and reads it.
fn changed(change: impl FnOnce(&mut Map<String, Value>)) -> Result<Adapter, AdapterError> {
    let from = goldens().join("llama/adapters/all");
    let to = tempfile::tempdir().unwrap();
    fs::copy(from.join(TENSORS), to.path().join(TENSORS)).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(from.join(CONFIG)).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    fs::write(to.path().join(CONFIG), config.to_string()).unwrap();
    Adapter::read(to.path())
}

fn why(outcome: Result<Adapter, AdapterError>) -> String {
    outcome.unwrap_err().to_string()
}

#[test]
fn pefts_files_are_read() {
    let all = Adapter::read(&goldens().join("llama/adapters/all")).unwrap();
    all.check(&tiny()).unwrap();
    assert_eq!((all.pairs.len(), all.max_rank(), all.base.as_str()), (21, 4, "tidemill/tiny-llama"));
    assert_eq!(all.config, LoraConfig { r: 4, alpha: 8.0, ..LoraConfig::default() });
    assert!(all.pairs.iter().all(|pair| pair.scale == 2.0 && pair.rank == 4));

    let some = Adapter::read(&goldens().join("llama/adapters/some")).unwrap();
    some.check(&tiny()).unwrap();
    let places: Vec<_> = some.pairs.iter().map(|pair| (pair.layer, pair.projection)).collect();
    assert_eq!(places, [(0, Projection::Query), (0, Projection::Value), (2, Projection::Query), (2, Projection::Value)]);
    assert_eq!(some.config.layers, Some(vec![0, 2]));
}

#[test]
fn patterns_give_ranks_and_scales_of_their_own() {
    let adapter = Adapter::read(&goldens().join("llama/adapters/patterns")).unwrap();
    adapter.check(&tiny()).unwrap();
    let of = |layer, projection| {
        let pair = adapter.pairs.iter().find(|pair| (pair.layer, pair.projection) == (layer, projection)).unwrap();
        (pair.rank, pair.scale)
    };
    assert_eq!(adapter.pairs.len(), 8);
    assert_eq!(of(0, Projection::Query), (3, (5.0 / 3f64.sqrt()) as f32));
    assert_eq!(of(1, Projection::Query), (5, 5f64.sqrt() as f32));
    assert_eq!(of(0, Projection::Up), (7, (5.0 / 7f64.sqrt()) as f32));
    assert_eq!(of(1, Projection::Down), (3, (9.5 / 3f64.sqrt()) as f32));
}

#[test]
fn what_is_written_is_read_back_and_written_again_to_the_same_bytes() {
    let adapters = [
        made(LoraConfig { r: 3, alpha: 7.5, rslora: true, ..LoraConfig::default() }),
        made(LoraConfig {
            layers: Some(vec![1, 2]),
            targets: vec![Projection::Value, Projection::Down],
            ..LoraConfig::default()
        }),
        Adapter::read(&goldens().join("llama/adapters/patterns")).unwrap(),
        Adapter::read(&goldens().join("llama/adapters/some")).unwrap(),
    ];
    for adapter in adapters {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("one"), folder.path().join("deep/two"));
        adapter.write(&first).unwrap();
        let back = Adapter::read(&first).unwrap();
        back.check(&tiny()).unwrap();
        assert_eq!(back.pairs, adapter.pairs);
        assert_eq!(
            (back.config.r, back.config.alpha, back.config.rslora),
            (adapter.config.r, adapter.config.alpha, adapter.config.rslora)
        );
        assert_eq!(back.base, adapter.base);
        back.write(&second).unwrap();
        for name in [CONFIG, TENSORS] {
            assert!(fs::read(first.join(name)).unwrap() == fs::read(second.join(name)).unwrap(), "{name}");
        }
    }
}

#[test]
fn a_folder_is_written_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine");
    let adapter = made(LoraConfig::default());
    adapter.write(&path).unwrap();
    adapter.write(&path).unwrap();
    let other = made(LoraConfig { alpha: 3.0, ..LoraConfig::default() });
    let error = other.write(&path).unwrap_err().to_string();
    assert!(error.contains("holds something else"), "{error}");
    assert_eq!(Adapter::read(&path).unwrap().pairs, adapter.pairs);
    // Nothing else is left beside it.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_would_change_the_result_is_refused_by_name() {
    type Change = fn(&mut Map<String, Value>);
    let cases: [(&str, Change); 14] = [
        ("use_dora", |c| drop(c.insert("use_dora".into(), json!(true)))),
        ("use_something_new", |c| drop(c.insert("use_something_new".into(), json!({"a": 1})))),
        ("bias", |c| drop(c.insert("bias".into(), json!("lora_only")))),
        ("modules_to_save", |c| drop(c.insert("modules_to_save".into(), json!(["lm_head"])))),
        ("target_modules: \"lm_head\"", |c| drop(c.insert("target_modules".into(), json!(["q_proj", "lm_head"])))),
        ("target_modules: \"embed_tokens\"", |c| drop(c.insert("target_modules".into(), json!(["embed_tokens"])))),
        ("target_modules", |c| drop(c.remove("target_modules"))),
        ("target_modules", |c| drop(c.insert("target_modules".into(), json!("(q_proj")))),
        ("init_lora_weights", |c| drop(c.insert("init_lora_weights".into(), json!("pissa")))),
        ("peft_type", |c| drop(c.insert("peft_type".into(), json!("IA3")))),
        ("r: is 0", |c| drop(c.insert("r".into(), json!(0)))),
        ("lora_alpha", |c| drop(c.remove("lora_alpha"))),
        ("rank_pattern.q_proj", |c| drop(c.insert("rank_pattern".into(), json!({"q_proj": -1})))),
        ("layers_to_transform", |c| drop(c.insert("layers_to_transform".into(), json!("all")))),
    ];
    for (name, change) in cases {
        let error = why(changed(change));
        assert!(error.contains(name), "{name}: {error}");
    }
    assert!(changed(|_| {}).is_ok());
    assert!(changed(|c| drop(c.insert("target_modules".into(), json!("all-linear")))).is_ok());
}

#[test]
fn tensors_must_be_those_that_the_configuration_names() {
    let error = why(changed(|c| drop(c.insert("r".into(), json!(8)))));
    assert!(error.contains("layers.0.self_attn.q_proj.lora_A") && error.contains("rank 8"), "{error}");
    let error = why(changed(|c| drop(c.insert("target_modules".into(), json!(["q_proj"])))));
    assert!(error.contains("k_proj") && error.contains("not among"), "{error}");
    // The file lacks what the configuration promises.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine");
    made(LoraConfig { targets: vec![Projection::Query], ..LoraConfig::default() }).write(&path).unwrap();
    let text = fs::read_to_string(path.join(CONFIG)).unwrap().replace("\"q_proj\"", "\"q_proj\", \"v_proj\"");
    fs::write(path.join(CONFIG), text).unwrap();
    let error = Adapter::read(&path).unwrap().check(&tiny()).unwrap_err().to_string();
    assert!(error.contains("layers.0.self_attn.v_proj") && error.contains("missing"), "{error}");
}

#[test]
fn an_adapter_of_another_base_or_with_numbers_that_are_none_is_refused_by_its_tensor() {
    let adapter = Adapter::read(&goldens().join("llama/adapters/all")).unwrap();
    let refuse = |model: &ModelConfig, adapter: &Adapter| adapter.check(model).unwrap_err().to_string();
    let model = tiny();
    let error = refuse(&ModelConfig { intermediate: 192, ..model.clone() }, &adapter);
    assert!(
        error.contains("layers.0.mlp.gate_proj.lora_B") && error.contains("[160, 4]") && error.contains("another base"),
        "{error}"
    );
    let error = refuse(&ModelConfig { layers: 2, ..model.clone() }, &adapter);
    assert!(error.contains("layers.2") && error.contains("has 2 layers"), "{error}");
    let error = refuse(&ModelConfig { layers: 4, ..model.clone() }, &adapter);
    assert!(error.contains("layers.3") && error.contains("missing"), "{error}");
    let mut broken = adapter.clone();
    broken.pairs[4].b[3] = f32::NAN;
    let error = refuse(&model, &broken);
    assert!(error.contains("layers.0.mlp.gate_proj.lora_B") && error.contains("number 3 is NaN"), "{error}");
    let mut loud = adapter.clone();
    (loud.pairs[4].scale, loud.pairs[4].b[3]) = (1e30, 1e10);
    let error = refuse(&model, &loud);
    assert!(error.contains("layers.0.mlp.gate_proj.lora_B") && error.contains("lora_alpha"), "{error}");
    broken.pairs.clear();
    assert!(refuse(&model, &broken).contains("no tensors"));
}

#[test]
fn folders_that_hold_no_adapter_say_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    assert!(why(Adapter::read(&folder.path().join("none"))).contains("no such folder"));
    assert!(why(Adapter::read(folder.path())).contains("save_pretrained"));
    fs::copy(goldens().join("llama/adapters/all").join(CONFIG), folder.path().join(CONFIG)).unwrap();
    assert!(why(Adapter::read(folder.path())).contains("adapter_model.safetensors is missing"));
    fs::write(folder.path().join("adapter_model.bin"), b"x").unwrap();
    assert!(why(Adapter::read(folder.path())).contains("run code"));
    fs::write(folder.path().join(TENSORS), b"short").unwrap();
    assert!(why(Adapter::read(folder.path())).contains("damaged"));
}
