mod naive;
mod whole;

use std::path::PathBuf;

use serde_json::Value;
use tidemill_engine::Projection;

use super::*;
use crate::batch::Label;
use crate::random::Random;

fn goldens(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

fn open(path: &str) -> Arc<ModelFiles> {
    Arc::new(ModelFiles::open(&goldens(path)).unwrap())
}

fn json(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

const EXACT: ModelOptions = ModelOptions { threads: 2, precision: Precision::F32, recompute: false, frozen_gradients: false };

/// Largest and root mean square difference between our log-probabilities and those of the recorded logits, over all tokens of the
/// recorded positions.
fn distance(model: &Model, expected: &Value, pass: Pass) -> (f64, f64) {
    let mut tokens = ids(&expected["prompt_ids"]);
    tokens.extend(ids(&expected["greedy"]));
    let mut batch = Packed::default();
    batch.push(&tokens, None);
    let mut want = Vec::new();
    for (position, logits) in ids(&expected["positions"]).into_iter().zip(expected["logits"].as_array().unwrap()) {
        let logits: Vec<f64> = logits.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let max = logits.iter().copied().fold(f64::MIN, f64::max);
        let lse = max + logits.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
        for (token, logit) in logits.iter().enumerate() {
            batch.labels.push(Label { row: position, token: token as u32 });
            want.push(logit - lse);
        }
    }
    let got = model.log_probs(&batch, pass).unwrap().to_vec1::<f32>().unwrap();
    let differences: Vec<f64> = got.iter().zip(&want).map(|(got, want)| (f64::from(*got) - want).abs()).collect();
    let squares: f64 = differences.iter().map(|d| d * d).sum();
    (differences.iter().copied().fold(0.0, f64::max), (squares / differences.len() as f64).sqrt())
}

/// For [`distance`] in f32, the largest, and in bf16, the root mean square. Attention of the tiny Gemma is so sharp that float32 itself is worth
/// 2e-4 in it (`float32_error`), ten times as much as in the others.
fn tolerances(family: &str) -> (f64, f64) {
    if family == "gemma3" { (5e-4, 0.4) } else { (2e-4, 0.15) }
}

#[test]
fn adapted_models_agree_with_peft() {
    for (family, name) in [("llama", "all"), ("llama", "some"), ("llama", "patterns"), ("qwen3", "all"), ("gemma3", "all")] {
        let folder = goldens(family).join("adapters").join(name);
        let adapter = Adapter::read(&folder).unwrap();
        let expected = json(folder.join("expected.json"));
        let model = Model::with_adapter(open(family), &adapter, EXACT).unwrap();
        let (exact, _) = distance(&model, &expected, Pass::EVALUATE);
        let (close, roughly) = tolerances(family);
        assert!(exact < close, "{family} {name}: {exact}");
        let rounded = Model::with_adapter(open(family), &adapter, ModelOptions { precision: Precision::Bf16, ..EXACT }).unwrap();
        let (_, rounded) = distance(&rounded, &expected, Pass::EVALUATE);
        assert!(rounded < roughly, "{family} {name} in bf16: {rounded}");
        // Without its adapter it is another model.
        let (_, without) = distance(&model, &expected, Pass::REFERENCE);
        assert!(without > 0.3 && rounded < without / 2.0, "{family} {name}: {rounded}, without the adapter {without}");
        // And what is written is what was read.
        let again = model.adapter(&adapter.base).unwrap();
        assert_eq!(again.pairs, adapter.pairs);
    }
}

#[test]
fn every_family_agrees_with_transformers() {
    for path in ["llama", "llama3", "mistral", "qwen2", "qwen3", "yarn", "gemma3"] {
        let model = Model::new(open(path), &LoraConfig::default(), 1, EXACT).unwrap();
        // A fresh adapter changes nothing: its B is zero.
        for pass in [Pass::REFERENCE, Pass::EVALUATE] {
            let (distance, _) = distance(&model, &json(goldens(path).join("expected.json")), pass);
            assert!(distance < tolerances(path).0, "{path}: {distance}");
        }
    }
    // The same weights in llama.cpp's container, whose queries and keys are permuted.
    let files = Arc::new(ModelFiles::open(&goldens("llama").join("llama.gguf")).unwrap());
    let model = Model::new(files, &LoraConfig::default(), 1, EXACT).unwrap();
    let (distance, _) = distance(&model, &json(goldens("llama").join("expected.json")), Pass::EVALUATE);
    assert!(distance < 2e-4, "gguf: {distance}");
}

/// Two prompts with two completions each, sharing their prompts or not.
fn pairs(shared: bool) -> Packed {
    let mut random = Random::new(3);
    let mut batch = Packed::default();
    // Some of it beyond a window of 24, which is Gemma 3's.
    for lengths in [[7, 4, 6], [22, 5, 3]] {
        let text: Vec<Vec<u32>> = lengths.iter().map(|len| (0..*len).map(|_| random.below(250) as u32 + 3).collect()).collect();
        let prompt = shared.then(|| batch.push(&text[0], None));
        for completion in &text[1..] {
            let (first, last) = match prompt {
                Some(prompt) => {
                    let index = batch.push(completion, Some(prompt));
                    let (prompt, own) = (batch.segments[prompt], batch.segments[index]);
                    (own.first, prompt.first + prompt.len - 1)
                }
                None => {
                    let index = batch.push(&[text[0].as_slice(), completion].concat(), None);
                    let first = batch.segments[index].first + text[0].len();
                    (first, first - 1)
                }
            };
            for (i, token) in completion.iter().enumerate() {
                let row = if i == 0 { last } else { first + i - 1 };
                batch.labels.push(Label { row: row as u32, token: *token });
            }
        }
    }
    batch
}

fn disturbed(files: Arc<ModelFiles>, lora: &LoraConfig, options: ModelOptions) -> Model {
    let model = Model::new(files, lora, 5, options).unwrap();
    let mut random = Random::new(9);
    for parameter in model.parameters().iter() {
        // A fresh B is zero, and with it the derivative along A.
        parameter.change(|values| values.iter_mut().for_each(|v| *v += (random.unit() - 0.5) as f32 * 0.2)).unwrap();
    }
    model
}

/// Σ weight · log-probability, the weights being drawn.
fn weighed(log_probs: &Tensor) -> Tensor {
    let mut random = Random::new(11);
    let weights: Vec<f32> = (0..log_probs.elem_count()).map(|_| random.unit() as f32 - 0.3).collect();
    let weights = Tensor::from_vec(weights, log_probs.elem_count(), &Device::Cpu).unwrap();
    (log_probs * weights).unwrap().sum_all().unwrap()
}

/// [`weighed`] and its derivatives along all parameters.
fn gradients(model: &Model, batch: &Packed, pass: Pass) -> (f64, Vec<f32>) {
    let loss = weighed(&model.log_probs(batch, pass).unwrap());
    let value = f64::from(loss.to_scalar::<f32>().unwrap());
    if !pass.gradient {
        return (value, Vec::new());
    }
    let store = loss.backward().unwrap();
    let grads = model.parameters().iter().flat_map(|p| store.get(p.var.as_tensor()).unwrap().to_vec1::<f32>().unwrap());
    (value, grads.collect())
}

fn near(a: &[f32], b: &[f32], tolerance: f64, what: &str) {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    let size = norm(&mut a.iter().map(|v| f64::from(*v)));
    assert!(size > 0.0 && difference <= tolerance * size, "{what}: differ by {difference} of {size}");
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let lora = LoraConfig { r: 3, alpha: 6.0, dropout: 0.3, ..LoraConfig::default() };
    let some = LoraConfig { targets: vec![Projection::Key, Projection::Up], layers: Some(vec![1]), ..lora.clone() };
    for (family, lora, dropout) in [
        ("llama", &lora, None),
        ("llama", &lora, Some(7)),
        ("qwen3", &lora, None),
        ("qwen2", &some, None),
        ("gemma3", &lora, None),
    ] {
        let model = disturbed(open(family), lora, EXACT);
        let batch = pairs(true);
        let pass = Pass { dropout, ..Pass::TRAIN };
        let (_, gradient) = gradients(&model, &batch, pass);
        let original: Vec<Vec<f32>> = model.parameters().iter().map(|p| p.values().unwrap()).collect();
        // Along random directions of each parameter alone, so that no layer hides behind another.
        let mut first = 0;
        for (index, parameter) in model.parameters().iter().enumerate() {
            let own = &gradient[first..first + original[index].len()];
            first += own.len();
            let mut random = Random::new(index as u64 + 20);
            for part in 0..4 {
                // Quarters, so that every kind of matrix is alone somewhere.
                let range = own.len() * part / 4..own.len() * (part + 1) / 4;
                let direction: Vec<f32> = range.clone().map(|_| random.unit() as f32 - 0.5).collect();
                let along = |step: f32| {
                    let mut moved = original[index].clone();
                    moved[range.clone()].iter_mut().zip(&direction).for_each(|(v, d)| *v += step * d);
                    parameter.set(&moved).unwrap();
                    gradients(&model, &batch, Pass { gradient: false, ..pass }).0
                };
                let step = 2e-3;
                let want = (along(step) - along(-step)) / (2.0 * f64::from(step));
                let got: f64 = own[range.clone()].iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                let size = own[range.clone()].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                assert!(
                    (got - want).abs() <= 0.02 * size.max(0.05),
                    "{family} {dropout:?} {} {part}: {got}, not {want}",
                    parameter.name
                );
            }
            parameter.set(&original[index]).unwrap();
        }
    }
}

#[test]
fn a_shared_prompt_packing_and_recomputation_change_nothing() {
    let lora = LoraConfig { r: 4, dropout: 0.0, ..LoraConfig::default() };
    let model = disturbed(open("llama"), &lora, EXACT);
    let (shared, separate) = (pairs(true), pairs(false));
    let (loss, gradient) = gradients(&model, &shared, Pass::TRAIN);
    let (other, apart) = gradients(&model, &separate, Pass::TRAIN);
    assert!((loss - other).abs() < 1e-3, "{loss} and {other}");
    near(&gradient, &apart, 1e-4, "shared and separate prompts");
    let got = model.log_probs(&shared, Pass::EVALUATE).unwrap().to_vec1::<f32>().unwrap();
    // Each text alone.
    let mut alone = Vec::new();
    let mut label = separate.labels.iter().peekable();
    for segment in &separate.segments {
        let mut batch = Packed::default();
        batch.push(&separate.tokens[segment.first..segment.first + segment.len], None);
        while let Some(next) = label.next_if(|label| (label.row as usize) < segment.first + segment.len) {
            batch.labels.push(Label { row: next.row - segment.first as u32, token: next.token });
        }
        alone.extend(model.log_probs(&batch, Pass::EVALUATE).unwrap().to_vec1::<f32>().unwrap());
    }
    near(&got, &alone, 1e-5, "packed and alone");
    let again = disturbed(open("llama"), &lora, ModelOptions { recompute: true, ..EXACT });
    let (_, recomputed) = gradients(&again, &shared, Pass::TRAIN);
    assert_eq!(recomputed, gradient, "recomputed values are the same values");
    let one = disturbed(open("llama"), &lora, ModelOptions { threads: 1, ..EXACT });
    assert_eq!(gradients(&one, &shared, Pass::TRAIN).1, gradient, "threads do not change sums");
}

#[test]
fn bad_input_is_refused() {
    let files = open("llama");
    let layers = files.config().layers;
    let beyond = LoraConfig { layers: Some(vec![layers]), ..LoraConfig::default() };
    assert!(matches!(Model::new(Arc::clone(&files), &beyond, 1, EXACT), Err(ModelError::Layers { .. })));
    let model = Model::new(files, &LoraConfig::default(), 1, EXACT).unwrap();
    let mut batch = Packed::default();
    batch.push(&[1, 2, 1_000_000], None);
    batch.labels.push(Label { row: 0, token: 2 });
    assert!(matches!(model.log_probs(&batch, Pass::TRAIN), Err(ModelError::Token { token: 1_000_000, .. })));
    let mut batch = Packed::default();
    batch.push(&[1, 2], None);
    batch.labels.push(Label { row: 5, token: 2 });
    assert!(model.log_probs(&batch, Pass::TRAIN).is_err());
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let cases = [
        ("gemma2", "all", "soft caps of scores or logits (Gemma 2)"),
        ("mpt", "all", "the model is an MPT"),
        ("mixtral", "attention", "mixture of experts"),
        ("dbrx", "attention", "mixture of experts"),
    ];
    for (family, adapter, said) in cases {
        let files = open(family);
        let adapter = Adapter::read(&goldens(&format!("{family}/adapters/{adapter}"))).unwrap();
        let refused = [
            Model::new(files.clone(), &LoraConfig::default(), 1, EXACT),
            Model::with_adapter(files.clone(), &adapter, EXACT),
            Model::untrained(files.clone(), EXACT),
            Model::whole(files, EXACT),
        ];
        for model in refused {
            let error = model.map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(said), "{family}: {error}");
        }
    }
    let whole = Model::whole(open("gemma3"), EXACT).map(|_| ()).unwrap_err().to_string();
    assert!(whole.contains("of Gemma models adapters are trained"), "{whole}");
}
