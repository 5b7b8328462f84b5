//! Against torch (`tests/goldens/optimizer.json`, made by `make oracle`), and the state's way to disk and back.

use candle_core::{Device, Tensor, Var};
use serde_json::Value;

use super::{AdamW, Group, Optimizer, Schedule, SchedulerType};
use crate::parameters::{Parameter, Parameters};

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/goldens/optimizer.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

/// The oracle's gradients.
fn gradient(step: usize, parameter: usize, count: usize) -> Vec<f32> {
    (0..count).map(|place| ((step * 37 + parameter * 101 + place * 53) % 129) as f32 / 64.0 - 1.0).collect()
}

fn parameters() -> Parameters {
    let mut parameters = Parameters::default();
    let var = |values: &[f32]| Var::new(values, &Device::Cpu).unwrap();
    parameters.push("first", var(&[0.5, -1.25, 2.0, 0.0, -0.125])).unwrap();
    parameters.push("second", var(&[1.0, -3.0, 0.25])).unwrap();
    parameters
}

fn group(parameter: &Parameter) -> Group {
    if parameter.name == "first" { Group { rate: 1.0, weight_decay: 0.1 } } else { Group { rate: 5.0, weight_decay: 0.0 } }
}

/// Runs backward on Σ gradient · parameter, in `parts` that add up to it.
fn accumulate(optimizer: &mut Optimizer, parameters: &Parameters, step: usize, parts: usize) {
    for _ in 0..parts {
        let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
        for (index, parameter) in parameters.iter().enumerate() {
            let gradient = gradient(step, index, parameter.var.elem_count());
            let gradient = (Tensor::new(gradient, &Device::Cpu).unwrap() / parts as f64).unwrap();
            loss = (loss + (parameter.var.as_tensor() * gradient).unwrap().sum_all().unwrap()).unwrap();
        }
        optimizer.accumulate(&loss.backward().unwrap()).unwrap();
    }
}

fn near(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() <= tolerance * (1.0 + expected.abs()), "{found} instead of {expected}");
    }
}

#[test]
fn steps_are_torchs() {
    let golden = golden();
    let (schedule, parameters) = (Schedule { shape: SchedulerType::Cosine, warmup: 3, total: 12 }, parameters());
    let mut optimizer = Optimizer::new(&parameters, AdamW::default(), group);
    for (step, expected) in golden["adamw"]["trace"].as_array().unwrap().iter().enumerate() {
        // Halves add up exactly.
        accumulate(&mut optimizer, &parameters, step, 1 + step % 2);
        let rate = 0.01 * schedule.factor(step as u64);
        assert!((rate - expected["learning_rate"].as_f64().unwrap()).abs() < 1e-15);
        let norm = optimizer.step(rate, Some(1.0)).unwrap();
        assert!((norm - expected["grad_norm"].as_f64().unwrap()).abs() < 1e-6);
        for parameter in parameters.iter() {
            near(&parameter.values().unwrap(), &numbers(&expected[&parameter.name]), 3e-7);
        }
    }
    for (index, slot) in optimizer.slots.iter().enumerate() {
        near(&slot.mean, &numbers(&golden["adamw"]["mean"][index]), 3e-7);
        near(&slot.square, &numbers(&golden["adamw"]["square"][index]), 3e-7);
    }
}

#[test]
fn schedules_are_transformers() {
    for case in golden()["schedules"].as_array().unwrap() {
        let shape = serde_json::from_value(case["name"].clone()).unwrap();
        let schedule = Schedule { shape, warmup: case["warmup"].as_u64().unwrap(), total: case["total"].as_u64().unwrap() };
        for (step, expected) in numbers(&case["rates"]).into_iter().enumerate() {
            let found = schedule.factor(step as u64);
            // Past the end transformers lets the cosine rise again; a training has no such step.
            if step as u64 <= schedule.total {
                assert!((found - expected).abs() < 1e-12, "{schedule:?} step {step}: {found} instead of {expected}");
            }
        }
    }
}

#[test]
fn a_restored_optimizer_takes_the_same_steps_bit_for_bit() {
    let straight = parameters();
    let mut optimizer = Optimizer::new(&straight, AdamW::default(), group);
    for step in 0..4 {
        accumulate(&mut optimizer, &straight, step, 1);
        optimizer.step(0.01, None).unwrap();
    }
    let (moments, steps) = (optimizer.moments().unwrap(), optimizer.steps());
    assert_eq!(moments, optimizer.moments().unwrap());
    let resumed = parameters();
    resumed.iter().zip(straight.iter()).for_each(|(to, from)| to.set(&from.values().unwrap()).unwrap());
    let mut again = Optimizer::new(&resumed, AdamW::default(), group);
    // A gradient that was half gathered when the process died is not part of the state.
    accumulate(&mut again, &resumed, 9, 1);
    again.restore(&moments, &steps).unwrap();
    for step in 4..8 {
        for (optimizer, parameters) in [(&mut optimizer, &straight), (&mut again, &resumed)] {
            accumulate(optimizer, parameters, step, 1);
            optimizer.step(0.01, None).unwrap();
        }
    }
    for (one, other) in straight.iter().zip(resumed.iter()) {
        assert_eq!(one.values().unwrap(), other.values().unwrap());
    }
}

#[test]
fn a_state_of_another_model_is_refused_by_name() {
    let own = parameters();
    let mut optimizer = Optimizer::new(&own, AdamW::default(), group);
    let (moments, steps) = (optimizer.moments().unwrap(), optimizer.steps());
    let mut other = Parameters::default();
    other.push("first", Var::new(&[0f32; 5], &Device::Cpu).unwrap()).unwrap();
    other.push("third", Var::new(&[0f32; 3], &Device::Cpu).unwrap()).unwrap();
    let error = Optimizer::new(&other, AdamW::default(), group).restore(&moments, &steps).unwrap_err();
    assert_eq!(error.to_string(), "optimizer state: it knows no parameter third");
    let error = optimizer.restore(&moments[..40], &steps).unwrap_err().to_string();
    assert!(error.starts_with("optimizer state: not a safetensors file"), "{error}");
    let mut longer = Parameters::default();
    longer.push("first", Var::new(&[0f32; 6], &Device::Cpu).unwrap()).unwrap();
    longer.push("second", Var::new(&[0f32; 3], &Device::Cpu).unwrap()).unwrap();
    let error = Optimizer::new(&longer, AdamW::default(), group).restore(&moments, &steps).unwrap_err().to_string();
    assert_eq!(error, "optimizer state: tensor mean.first: expected 6 numbers of f32, found [5] F32");
}

#[test]
fn a_parameter_without_gradient_is_left_alone() {
    let parameters = parameters();
    let mut optimizer = Optimizer::new(&parameters, AdamW::default(), group);
    let first = parameters.iter().next().unwrap();
    optimizer.accumulate(&first.var.as_tensor().sum_all().unwrap().backward().unwrap()).unwrap();
    optimizer.step(0.1, None).unwrap();
    assert_eq!(parameters.iter().nth(1).unwrap().values().unwrap(), [1.0, -3.0, 0.25]);
    assert_eq!(optimizer.steps()["second"], 0);
    assert_ne!(first.values().unwrap()[3], 0.0);
}

#[test]
fn threads_change_nothing() {
    let count = 3 * (1 << 16) + 77;
    let run = |threads: usize| {
        let mut parameters = Parameters::default();
        let values: Vec<f32> = (0..count).map(|i| (i % 1000) as f32 / 999.0).collect();
        parameters.push("all", Var::new(values.as_slice(), &Device::Cpu).unwrap()).unwrap();
        let mut optimizer = Optimizer::new(&parameters, AdamW::default(), |_| Group { rate: 1.0, weight_decay: 0.01 });
        optimizer.threads = threads;
        for _ in 0..2 {
            let loss = parameters.iter().next().unwrap().var.as_tensor().sqr().unwrap().sum_all().unwrap();
            optimizer.accumulate(&loss.backward().unwrap()).unwrap();
            optimizer.step(0.01, Some(1.0)).unwrap();
        }
        parameters.iter().next().unwrap().values().unwrap()
    };
    let one = run(1);
    assert_eq!(one, run(3));
    assert_eq!(one, run(16));
}
