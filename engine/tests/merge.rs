//! Adapters merged into their base, against what PEFT computed with base and adapter (`tests/goldens/*/adapters`).

#![cfg(test)]

mod stepping;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stepping::Stepper;
use tidemill_engine::{Adapter, Container, Decoder, MergeError, MergeOptions, ModelFiles, Part, Projection, Weight, merge};
use tidemill_kernels::reference::Reference;
use tidemill_kernels::{Format, Limits, WeightFormat};

const TOLERANCE: f32 = 1e-3;
const LIMITS: Limits = Limits { max_tokens: 256, max_samples: 32, max_positions: 512 };

fn goldens(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

fn options(container: Container, storage: Option<Format>) -> MergeOptions {
    MergeOptions { container, storage, files_from: None }
}

/// The merged model answers what PEFT answered with base and adapter.
fn answers_as_peft_did(merged: &Path, adapter: &Path, label: &str) {
    let expected: Value = serde_json::from_slice(&fs::read(adapter.join("expected.json")).unwrap()).unwrap();
    let ids =
        |key: &str| -> Vec<u32> { expected[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect() };
    let (prompt, greedy, positions) = (ids("prompt_ids"), ids("greedy"), ids("positions"));
    let logits = expected["logits"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
    let files = ModelFiles::open(merged).unwrap();
    let decoder = Decoder::load(&files, Box::new(Reference::new(LIMITS)), WeightFormat::F32, &mut |_, _| {}).unwrap();
    let mut stepper = Stepper::new(decoder);
    let tokens: Vec<u32> = prompt.iter().chain(&greedy).copied().collect();
    let got = stepper.logits(&tokens, &positions);
    let worst =
        got.iter().flatten().zip(logits).map(|(got, want)| (got - want.as_f64().unwrap() as f32).abs()).fold(0f32, f32::max);
    assert!(worst <= TOLERANCE, "{label}: the largest difference of a logit is {worst}");
    assert_eq!(stepper.greedy(&[&prompt], 32, &[])[0], greedy[..32.min(greedy.len())], "{label}");
}

#[test]
fn a_merged_model_computes_what_peft_computed_in_every_container() {
    for (family, names) in [("llama", &["all", "some", "patterns"][..]), ("qwen3", &["all"])] {
        let folder = goldens(family);
        for name in names {
            let adapter = folder.join("adapters").join(name);
            let read = Adapter::read(&adapter).unwrap();
            let out = tempfile::tempdir().unwrap();
            let gguf = folder.join(format!("{family}.gguf"));
            for (base, container, files_from, to) in [
                (folder.clone(), Container::Safetensors, None, "folder"),
                (gguf.clone(), Container::Gguf, None, "model.gguf"),
                (gguf.clone(), Container::Safetensors, Some(folder.clone()), "from-gguf"),
            ] {
                let to = out.path().join(to);
                let files = ModelFiles::open(&base).unwrap();
                let options = MergeOptions { container, storage: Some(Format::F32), files_from };
                let merged = merge(&files, &read, &to, &options).unwrap();
                assert_eq!(merged.matrices, read.pairs.len());
                answers_as_peft_did(&to, &adapter, &format!("{family} {name} {}", to.display()));
            }
            assert_eq!(fs::read_dir(out.path()).unwrap().count(), 3, "nothing is left beside them");
        }
    }
}

#[test]
fn what_no_adapter_touches_is_copied_byte_for_byte() {
    let folder = goldens("llama");
    let adapter = Adapter::read(&folder.join("adapters/some")).unwrap();
    let out = tempfile::tempdir().unwrap();
    for (base, container, to) in
        [(folder.clone(), Container::Safetensors, "folder"), (folder.join("llama.gguf"), Container::Gguf, "model.gguf")]
    {
        let to = out.path().join(to);
        let base = ModelFiles::open(&base).unwrap();
        merge(&base, &adapter, &to, &options(container, None)).unwrap();
        let merged = ModelFiles::open(&to).unwrap();
        assert_eq!((merged.parameters(), merged.tokenizer().vocabulary()), (base.parameters(), base.tokenizer().vocabulary()));
        assert_eq!(merged.end_of_turn(), base.end_of_turn());
        let adapted = |layer, part| {
            let of = |projection| match projection {
                Projection::Query => Part::Query,
                Projection::Value => Part::Value,
                other => panic!("{other:?} is not adapted by it"),
            };
            adapter.pairs.iter().any(|pair| pair.layer == layer && of(pair.projection) == part)
        };
        let mut changed = 0;
        for layer in 0..base.config().layers {
            for part in [Part::Query, Part::Key, Part::Value, Part::AttentionOutput, Part::Gate, Part::Up, Part::Down] {
                let (old, new) =
                    (base.matrix(Weight::Layer(layer, part)).unwrap(), merged.matrix(Weight::Layer(layer, part)).unwrap());
                assert_eq!(old.format, new.format);
                assert_eq!(old.data != new.data, adapted(layer, part), "{layer} {part:?}");
                changed += usize::from(adapted(layer, part));
            }
        }
        assert_eq!(changed, adapter.pairs.len());
        assert!(base.matrix(Weight::Embedding).unwrap().data == merged.matrix(Weight::Embedding).unwrap().data);
    }
}

#[test]
fn merged_matrices_can_be_quantised_again() {
    let folder = goldens("llama");
    let adapter = Adapter::read(&folder.join("adapters/all")).unwrap();
    let base = ModelFiles::open(&folder.join("llama.gguf")).unwrap();
    let out = tempfile::tempdir().unwrap();
    for (storage, size) in [(Format::F32, 32 * 4), (Format::F16, 32 * 2), (Format::Q8_0, 34), (Format::Q4_0, 18)] {
        let to = out.path().join(format!("{storage:?}.gguf"));
        let weight = Weight::Layer(0, Part::Up);
        let bytes = base.config().shape_of(weight);
        merge(&base, &adapter, &to, &options(Container::Gguf, Some(storage))).unwrap();
        let merged = ModelFiles::open(&to).unwrap();
        let matrix = merged.matrix(weight).unwrap();
        assert_eq!((matrix.format, matrix.data.len()), (storage, bytes.0 * bytes.1 / 32 * size));
    }
}

#[test]
fn what_cannot_be_merged_is_refused_with_the_reason_and_leaves_nothing() {
    let folder = goldens("llama");
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("model");
    let (base, gguf) = (ModelFiles::open(&folder).unwrap(), ModelFiles::open(&folder.join("llama.gguf")).unwrap());
    let adapter = Adapter::read(&folder.join("adapters/all")).unwrap();
    let other = Adapter::read(&goldens("qwen3").join("adapters/all")).unwrap();
    let why = |base: &ModelFiles, adapter: &Adapter, options: &MergeOptions| {
        merge(base, adapter, &to, options).unwrap_err().to_string()
    };
    assert!(why(&base, &other, &options(Container::Safetensors, None)).contains("another base model"));
    assert!(why(&base, &adapter, &options(Container::Gguf, None)).contains("base in GGUF only"));
    assert!(why(&base, &adapter, &options(Container::Safetensors, Some(Format::Q8_0))).contains("f32, f16 or bf16"));
    assert!(why(&gguf, &adapter, &options(Container::Gguf, Some(Format::Q5_0))).contains("choose f32"));
    let from = |family: &str| MergeOptions { files_from: Some(goldens(family)), ..options(Container::Safetensors, None) };
    assert!(why(&gguf, &adapter, &from("qwen3")).contains("another model"));
    let mut huge = adapter.clone();
    huge.pairs[0].scale = 1e9;
    assert!(why(&gguf, &huge, &options(Container::Gguf, Some(Format::F16))).contains("more than f16 holds"));
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
    fs::write(&to, "mine").unwrap();
    assert!(matches!(merge(&base, &adapter, &to, &options(Container::Safetensors, None)), Err(MergeError::Exists(_))));
    assert_eq!(fs::read(&to).unwrap(), b"mine");
}
