//! Adapters merged into their base, against what PEFT computed with base and adapter (`tests/goldens/*/adapters`).

#![cfg(test)]

use std::fs;
use std::path::{Path, PathBuf};

use crate::stepping::Stepper;
use serde_json::Value;
use tidemill_engine::{
    Adapter, Container, Decoder, LoraConfig, MergeError, MergeOptions, ModelConfig, ModelFiles, Pair, Part, Projection, Weight,
    merge,
};
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

/// An adapter of a model that changes nothing.
fn nothing(files: &ModelFiles) -> Adapter {
    let (out, input) = Projection::Query.shape(files.config());
    let pair = Pair { layer: 0, projection: Projection::Query, rank: 1, scale: 1.0, a: vec![1.0; input], b: vec![0.0; out] };
    Adapter::new(
        LoraConfig { r: 1, targets: vec![Projection::Query], layers: Some(vec![0]), ..LoraConfig::default() },
        "",
        vec![pair],
    )
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

/// `TIDEMILL_WRITE_MERGED` names a folder where the merged models stay, for `tests/oracle/merged.py`.
#[test]
fn a_merged_model_computes_what_peft_computed_in_every_container() {
    let families = [("llama", &["all", "some", "patterns"][..]), ("qwen3", &["all"]), ("gemma2", &["all"]), ("gemma3", &["all"])];
    for (family, names) in families {
        let folder = goldens(family);
        for name in names {
            let adapter = folder.join("adapters").join(name);
            let read = Adapter::read(&adapter).unwrap();
            let temporary = tempfile::tempdir().unwrap();
            let kept = std::env::var_os("TIDEMILL_WRITE_MERGED").map(|root| Path::new(&root).join(family).join(name));
            let out = kept.as_deref().unwrap_or(temporary.path());
            let gguf = folder.join(format!("{family}.gguf"));
            for (base, container, files_from, to) in [
                (folder.clone(), Container::Safetensors, None, "folder"),
                (gguf.clone(), Container::Gguf, None, "model.gguf"),
                (folder.clone(), Container::Gguf, None, "converted.gguf"),
                (gguf.clone(), Container::Safetensors, Some(folder.clone()), "from-gguf"),
            ] {
                let to = out.join(to);
                let files = ModelFiles::open(&base).unwrap();
                let options = MergeOptions { container, storage: Some(Format::F32), files_from };
                if family.starts_with("gemma") && to.ends_with("converted.gguf") {
                    let why = merge(&files, &read, &to, &options).unwrap_err().to_string();
                    assert!(why.contains("a Gemma model of safetensors is merged into safetensors"), "{why}");
                    continue;
                }
                let merged = merge(&files, &read, &to, &options).unwrap();
                assert_eq!(merged.matrices, read.pairs.len());
                answers_as_peft_did(&to, &adapter, &format!("{family} {name} {}", to.display()));
            }
            read.write_gguf(ModelFiles::open(&folder).unwrap().config(), &out.join("adapter.gguf")).unwrap();
            let written = if family.starts_with("gemma") { 4 } else { 5 };
            assert_eq!(fs::read_dir(out).unwrap().count(), written, "nothing is left beside them");
        }
    }
}

#[test]
fn a_gguf_file_of_a_base_in_safetensors_says_everything_that_its_folder_says() {
    for family in ["llama", "llama3", "qwen2", "qwen3", "yarn"] {
        let folder = goldens(family);
        let base = ModelFiles::open(&folder).unwrap();
        let out = tempfile::tempdir().unwrap();
        let to = out.path().join("model.gguf");
        merge(&base, &nothing(&base), &to, &options(Container::Gguf, None)).unwrap();
        answers_as_peft_did(&to, &folder, family);
        let merged = ModelFiles::open(&to).unwrap();
        // What gguf-py wrote of the same model.
        let known = ModelFiles::open(&folder.join(format!("{family}.gguf"))).unwrap();
        let like = ModelConfig { rope_scaling: known.config().rope_scaling.clone(), ..merged.config().clone() };
        assert_eq!(like, *known.config(), "{family}");
        for (own, other) in merged.config().inverse_frequencies().iter().zip(known.config().inverse_frequencies()) {
            assert!((own / other - 1.0).abs() < 1e-5, "{family}: {own} {other}");
        }
        assert_eq!((merged.name(), merged.end_of_turn()), (base.name(), base.end_of_turn()), "{family}");
        assert_eq!(merged.tokenizer().special_tokens(), base.tokenizer().special_tokens(), "{family}");
        assert_eq!(merged.tokenizer().vocabulary(), known.tokenizer().vocabulary(), "{family}");
        let expected: Value = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
        for case in expected["encode"].as_array().unwrap() {
            let ids =
                |key: &str| -> Vec<u32> { case[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect() };
            let text = case["text"].as_str().unwrap();
            assert_eq!(merged.tokenizer().encode(text, false, true).unwrap(), ids("ids"), "{family}: {text}");
            assert_eq!(merged.tokenizer().encode(text, true, true).unwrap(), ids("ids_with_special"), "{family}: {text}");
        }
        let (own, others) = (merged.chat_template().unwrap(), base.chat_template().unwrap());
        assert_eq!((own.source(), own.tool_source()), (others.source(), others.tool_source()), "{family}");
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
    // Pieces of SentencePiece have scores in GGUF, and `tokenizer.json` has none.
    let pieces = ModelFiles::open(&goldens("mistral")).unwrap();
    assert!(why(&pieces, &nothing(&pieces), &options(Container::Gguf, None)).contains("merge into safetensors"));
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
