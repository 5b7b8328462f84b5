//! Whole trainings on a device, its kernels emulated on the host: the losses, gradients and parameters are the processor's.

#![allow(
    dead_code,
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops at the first surprise; the emulated device is that of the kernels' tests, and uses more of it"
)]

#[path = "device/cards.rs"]
mod cards;
#[path = "../../kernels/tests/support/emulation.rs"]
mod emulation;
#[path = "../../kernels/tests/support/faulty.rs"]
mod faulty;
#[path = "device/online.rs"]
mod online;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde_json::json;
use tidemill_engine::{LoraConfig, ModelFiles, Projection};
use tidemill_rlhf::batch::{Label, Packed};
use tidemill_rlhf::collate::{Completion, Sample};
use tidemill_rlhf::job::{Job, Rows, Spec};
use tidemill_rlhf::model::{Model, ModelError, ModelOptions, Pass, Precision};
use tidemill_rlhf::optimizer::SchedulerType;
use tidemill_rlhf::random::Random;
use tidemill_rlhf::train::{Control, Method, Offline, Stage, TrainConfig, train};

use emulation::Emulated;
use faulty::Faulty;

const EXACT: ModelOptions = ModelOptions { threads: 1, precision: Precision::F32, recompute: false, frozen_gradients: false };
const ROUNDED: ModelOptions = ModelOptions { precision: Precision::Bf16, ..EXACT };

fn open(path: &str) -> Arc<ModelFiles> {
    let goldens = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    Arc::new(ModelFiles::open(&goldens.join(path)).unwrap())
}

fn on_device(model: Model, reversed: bool) -> Model {
    model.computing_on(Box::new(Emulated::new(reversed)), None).unwrap()
}

/// Two prompts with two completions each, sharing their prompts, and a text alone.
fn batch() -> Packed {
    let mut random = Random::new(3);
    let mut text = |len: usize| -> Vec<u32> { (0..len).map(|_| random.below(250) as u32 + 3).collect() };
    let mut batch = Packed::default();
    for lengths in [[7, 4, 6], [12, 5, 3]] {
        let prompt = batch.push(&text(lengths[0]), None);
        for len in &lengths[1..] {
            let completion = text(*len);
            let index = batch.push(&completion, Some(prompt));
            let (first, last) = (batch.segments[index].first, batch.segments[prompt].first + lengths[0] - 1);
            for (i, token) in completion.iter().enumerate() {
                batch.labels.push(Label { row: if i == 0 { last } else { first + i - 1 } as u32, token: *token });
            }
        }
    }
    // Longer than Gemma 3's window of 24.
    let alone = text(30);
    let index = batch.push(&alone, None);
    let first = batch.segments[index].first;
    batch.labels.extend((1..30).map(|i| Label { row: (first + i - 1) as u32, token: alone[i] }));
    batch
}

fn disturb(model: &Model) {
    let mut random = Random::new(9);
    for parameter in model.parameters().iter() {
        // A fresh B is zero, and with it the derivative along A; a fresh norm is one everywhere.
        parameter.change(|values| values.iter_mut().for_each(|v| *v += (random.unit() - 0.5) as f32 * 0.2)).unwrap();
    }
}

/// Σ weight · log-probability plus the same of some states, the weights being drawn, with its derivatives along all parameters.
fn gradients(model: &Model, pass: Pass) -> (f64, Vec<f32>) {
    let (log_probs, states) = model.log_probs_and_hidden(&batch(), &[3, 20, 3], pass).unwrap();
    let mut random = Random::new(11);
    let mut weighed = |values: &Tensor| -> Tensor {
        let weights: Vec<f32> = (0..values.elem_count()).map(|_| random.unit() as f32 - 0.3).collect();
        (values * Tensor::from_vec(weights, values.shape(), &Device::Cpu).unwrap()).unwrap().sum_all().unwrap()
    };
    let loss = (weighed(&log_probs) + weighed(&states)).unwrap();
    let value = f64::from(loss.to_scalar::<f32>().unwrap());
    if !pass.gradient {
        return (value, Vec::new());
    }
    let store = loss.backward().unwrap();
    let grads = model.parameters().iter().flat_map(|p| store.get(p.var.as_tensor()).unwrap().to_vec1::<f32>().unwrap());
    (value, grads.collect())
}

fn near(got: &[f32], want: &[f32], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b)));
    let size = norm(&mut want.iter().map(|v| f64::from(*v)));
    assert!(size > 0.0 && difference <= tolerance * size, "{what}: differ by {difference} of {size}");
}

#[test]
fn an_adapters_gradient_is_the_processors() {
    let lora = LoraConfig { r: 3, alpha: 6.0, dropout: 0.3, ..LoraConfig::default() };
    let some = LoraConfig { targets: vec![Projection::Key, Projection::Up], layers: Some(vec![1]), ..lora.clone() };
    // Plain, stretched frequencies and a window, biases, norms on heads, norms behind and windows of some layers; a file of another order of
    // rows.
    let cases = [
        ("llama", &lora, None),
        ("llama/llama.gguf", &lora, Some(7)),
        ("mistral", &lora, None),
        ("qwen2", &some, Some(5)),
        ("qwen3", &lora, Some(9)),
        ("gemma3", &lora, Some(3)),
    ];
    for (index, (path, lora, dropout)) in cases.into_iter().enumerate() {
        // Attention of the tiny Gemma is so sharp that rounding is worth much, on the processor, too.
        let rounded = if path == "gemma3" { 0.4 } else { 6e-2 };
        for (options, tolerance) in [(EXACT, 1e-4), (ROUNDED, rounded)] {
            let make = || {
                let model = Model::new(open(path), lora, 5, options).unwrap();
                disturb(&model);
                model
            };
            let exact = Model::new(open(path), lora, 5, EXACT).unwrap();
            disturb(&exact);
            let pass = Pass { dropout, temperature: 0.9, ..Pass::TRAIN };
            let (loss, want) = gradients(&exact, pass);
            let model = on_device(make(), index % 2 == 1);
            assert_eq!(model.device().as_deref(), Some("emulated"));
            let (found, got) = gradients(&model, pass);
            assert!((found - loss).abs() <= tolerance * loss.abs().max(1.0), "{path} {options:?}: {found}, not {loss}");
            near(&got, &want, tolerance, &format!("{path} {options:?}"));
            // The same again, bit for bit; and computing values again changes none.
            assert_eq!(gradients(&model, pass), (found, got.clone()));
            let again = Model::new(open(path), lora, 5, ModelOptions { recompute: true, ..options }).unwrap();
            disturb(&again);
            assert_eq!(gradients(&on_device(again, index % 2 == 1), pass), (found, got));
        }
    }
}

#[test]
fn a_whole_models_gradient_is_the_processors() {
    for (index, path) in ["llama", "qwen2", "qwen3"].into_iter().enumerate() {
        let make = |options| {
            let model = Model::whole(open(path), options).unwrap();
            disturb(&model);
            model
        };
        let (loss, want) = gradients(&make(EXACT), Pass::TRAIN);
        for (options, tolerance) in [(EXACT, 1e-4), (ROUNDED, 6e-2)] {
            let model = on_device(make(options), index % 2 == 1);
            let (found, got) = gradients(&model, Pass::TRAIN);
            assert!((found - loss).abs() <= tolerance * loss.abs().max(1.0), "{path} {options:?}: {found}, not {loss}");
            near(&got, &want, tolerance, &format!("{path} {options:?}"));
        }
        // The reference stays what the files hold.
        let (model, exact) = (on_device(make(EXACT), false), make(EXACT));
        let reference = |model: &Model| model.log_probs(&batch(), Pass::REFERENCE).unwrap().to_vec1::<f32>().unwrap();
        near(&reference(&model), &reference(&exact), 1e-5, path);
    }
}

#[test]
fn the_gradient_is_that_of_differences() {
    let lora = LoraConfig { r: 2, alpha: 4.0, dropout: 0.2, ..LoraConfig::default() };
    let model = Model::new(open("qwen3"), &lora, 5, EXACT).unwrap();
    disturb(&model);
    let model = on_device(model, false);
    let pass = Pass { dropout: Some(4), ..Pass::TRAIN };
    let (_, gradient) = gradients(&model, pass);
    let mut first = 0;
    for (index, parameter) in model.parameters().iter().enumerate() {
        let original = parameter.values().unwrap();
        let own = &gradient[first..first + original.len()];
        first += original.len();
        let mut random = Random::new(index as u64 + 20);
        let direction: Vec<f32> = original.iter().map(|_| random.unit() as f32 - 0.5).collect();
        let along = |step: f32| {
            let moved: Vec<f32> = original.iter().zip(&direction).map(|(value, d)| value + step * d).collect();
            parameter.set(&moved).unwrap();
            gradients(&model, Pass { gradient: false, ..pass }).0
        };
        let step = 2e-3;
        let want = (along(step) - along(-step)) / (2.0 * f64::from(step));
        parameter.set(&original).unwrap();
        let got: f64 = own.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let size = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!((got - want).abs() <= 0.02 * size.max(0.05), "{}: {got}, not {want}, of {size}", parameter.name);
    }
}

#[test]
fn before_training_an_adapter_changes_no_bit() {
    for options in [EXACT, ROUNDED] {
        let model = Model::new(open("qwen2"), &LoraConfig::default(), 1, options).unwrap();
        assert_eq!(model.device_memory().unwrap(), None);
        let model = on_device(model, false);
        let most = || model.device_memory().unwrap().unwrap().most;
        let weights = most();
        let values = |pass: Pass| model.log_probs(&batch(), pass).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(Pass::REFERENCE), values(Pass::EVALUATE));
        assert_eq!(values(Pass::REFERENCE), values(Pass { gradient: false, ..Pass::TRAIN }));
        assert!(weights > 0 && most() > weights);
    }
}

/// Comparisons in which the better answer holds low tokens and the worse one high tokens.
fn samples(count: usize) -> Vec<Sample> {
    let mut random = Random::new(17);
    let mut sample = |index: usize| {
        let mut answer = |from: usize| Completion {
            tokens: (0..2 + random.below(4)).map(|_| (from + random.below(90)) as u32).collect(),
            learnt: None,
        };
        let completions = vec![answer(5), answer(120)];
        let prompt = (0..3 + random.below(5)).map(|_| 5 + random.below(200) as u32).collect();
        let (raters, users) = (vec![format!("rater{}", index % 3)], vec![format!("user{}", index % 5)]);
        Sample { id: format!("row{index}"), prompt, completions, good: true, weight: 1.0, raters, users }
    };
    (0..count).map(&mut sample).collect()
}

/// Losses of the steps, the loss on what is held out, and the parameters.
fn trained(model: &Model, method: Method, rate: f64, folder: &Path) -> (Vec<f64>, f64, Vec<f32>) {
    let config = TrainConfig {
        learning_rate: Some(rate),
        lr_scheduler_type: SchedulerType::Linear,
        per_device_train_batch_size: 3,
        max_steps: 4,
        shuffle: false,
        max_length: None,
        ..TrainConfig::new(method)
    };
    // Each step is of the same three rows, so that its loss falls.
    let mut rows = samples(6);
    if method == Method::Sft {
        rows.iter_mut().for_each(|row| row.completions.truncate(1));
    }
    let held_out = rows.split_off(3);
    let mut offline = Offline::new(model, &config, rows, held_out, None, &mut |_, _| {}).unwrap();
    let (mut losses, mut evaluated) = (Vec::new(), f64::NAN);
    train(model, &mut offline, &config, folder, &mut |progress| {
        let metrics: &BTreeMap<String, f64> = progress.metrics;
        match progress.stage {
            Stage::Training => losses.push(metrics["loss"]),
            Stage::Evaluating => evaluated = metrics["eval_loss"],
        }
        Control::Continue
    })
    .unwrap();
    (losses, evaluated, model.parameters().iter().flat_map(|parameter| parameter.values().unwrap()).collect())
}

#[test]
fn trainings_go_as_on_the_processor() {
    let lora = LoraConfig { r: 4, alpha: 8.0, dropout: 0.1, ..LoraConfig::default() };
    for (method, rate, whole) in [(Method::Sft, 5e-3, false), (Method::Dpo, 5e-3, false), (Method::Sft, 1e-3, true)] {
        let make = |options| match whole {
            true => Model::whole(open("llama"), options).unwrap(),
            false => Model::new(open("llama"), &lora, 3, options).unwrap(),
        };
        let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let (losses, evaluated, parameters) = trained(&make(EXACT), method, rate, folders[0].path());
        assert!(losses[3] < losses[0], "{method:?} {whole} does not learn: {losses:?}");
        for ((options, tolerance), folder) in [(EXACT, 1e-3), (ROUNDED, 3e-2)].into_iter().zip(&folders[1..]) {
            let (found, found_held_out, found_parameters) =
                trained(&on_device(make(options), false), method, rate, folder.path());
            let both = found.iter().chain([&found_held_out]).zip(losses.iter().chain([&evaluated]));
            let apart = both.map(|(found, want)| (found - want).abs() / want.abs().max(1.0)).fold(0.0, f64::max);
            assert!(apart <= tolerance, "{method:?} {whole} {options:?}: {apart}: {found:?}, not {losses:?}");
            if options == EXACT {
                near(&found_parameters, &parameters, 2e-2, "parameters");
            }
        }
    }
}

#[test]
fn a_training_goes_on_only_where_it_began() {
    let lora = LoraConfig { r: 2, ..LoraConfig::default() };
    let make = || Model::new(open("llama"), &lora, 3, EXACT).unwrap();
    assert_ne!(make().frozen().unwrap(), on_device(make(), false).frozen().unwrap());
}

#[tokio::test]
async fn a_specification_names_its_device_and_a_card_that_is_not_there_is_an_error() {
    let place = tempfile::tempdir().unwrap();
    let rows = place.path().join("rows.jsonl");
    let row = json!({ "prompt": [{ "role": "user", "content": "Which?" }],
        "chosen": [{ "role": "assistant", "content": "yes" }], "rejected": [{ "role": "assistant", "content": "no" }] });
    std::fs::write(&rows, format!("{row}\n{row}\n")).unwrap();
    let base = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/qwen2");
    let told = |device: &str| {
        serde_json::from_value::<Spec>(json!({
            "base": { "name": "qwen2", "path": base }, "train_file": rows, "config": { "method": "dpo" }, "device": device,
        }))
    };
    // What is computed on the processor is written as it always was.
    assert!(!serde_json::to_string(&told("cpu").unwrap()).unwrap().contains("device\":"));
    assert_eq!(serde_json::to_value(told("cuda").unwrap()).unwrap()["device"], "cuda");
    assert!(told("gpu").unwrap_err().to_string().contains("device: `gpu`"));
    let refused = told("auto").unwrap().check().unwrap_err().to_string();
    assert!(refused.contains("device: auto") && refused.contains("cuda:N"), "{refused}");
    let refused = told("cuda:0,1").unwrap().check().unwrap_err().to_string();
    assert!(refused.contains("device: cuda:0,1") && refused.contains("several cards"), "{refused}");

    // There are not that many.
    let spec = told("cuda:4095").unwrap();
    let job = Job::open(spec.clone(), Rows::read(&spec, None).await.unwrap()).unwrap();
    let refused = job.estimate().unwrap_err().to_string();
    assert!(refused.contains("no NVIDIA driver") || refused.contains("no card 4095"), "{refused}");
    assert!(refused.contains("--device cpu"), "{refused}");
}

#[test]
fn what_a_device_cannot_do_is_refused_and_its_failures_are_errors() {
    let lora = LoraConfig { r: 2, ..LoraConfig::default() };
    let make = |options| Model::new(open("llama"), &lora, 3, options).unwrap();
    let measured = make(ModelOptions { frozen_gradients: true, ..EXACT });
    assert!(matches!(measured.computing_on(Box::new(Emulated::new(false)), None), Err(ModelError::Kind(_))));

    let model = on_device(make(EXACT), false);
    let mut wrong = batch();
    wrong.labels.push(Label { row: 1_000, token: 3 });
    assert!(model.log_probs(&wrong, Pass::TRAIN).unwrap_err().to_string().contains("row 1000"));
    // A graph that was gone back through is used up, and says so.
    let loss = model.log_probs(&batch(), Pass::TRAIN).unwrap().sum_all().unwrap();
    loss.backward().unwrap();
    assert!(loss.backward().unwrap_err().to_string().contains("backward pass"));
    // And the model is as good as before.
    gradients(&model, Pass::TRAIN);

    // Whatever call of the device fails, the pass ends with an error, and memory is given back; where it had none to spare, what nobody
    // used any more may have been enough.
    let mut failed = 0;
    for calls in (0..600).step_by(29) {
        let device = Faulty::new(Emulated::new(false));
        device.fail_after(calls);
        let outcome = make(EXACT).computing_on(Box::new(device), None).map_err(candle_core::Error::from).and_then(|model| {
            let log_probs = model.log_probs(&batch(), Pass::TRAIN)?;
            log_probs.sum_all()?.backward()
        });
        let text = outcome.err().map(|error| error.to_string());
        assert!(text.as_deref().is_none_or(|text| text.contains("as the test wants it")), "{calls}: {text:?}");
        failed += usize::from(text.is_some());
    }
    assert!(failed >= 5, "{failed}");
}
