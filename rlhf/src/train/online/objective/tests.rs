//! Losses put together from known parts, their gradients against finite differences, and weights for the sampler's difference.

use candle_core::{Device, Tensor, Var};

use super::*;
use crate::train::{TrainConfig, config::Reinforcement};

fn told(fields: serde_json::Value) -> Reinforcement {
    let mut all = serde_json::json!({"reward_funcs": [{"type": "json"}], "per_device_train_batch_size": 8});
    all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    TrainConfig::from_json(all).unwrap().reinforcement().unwrap()
}

/// Two answers of two and three tokens.
fn rollouts(per_token: bool) -> Vec<Rollout> {
    let rollout = |advantage: &[f32], old: &[f32], shift: f32| Rollout {
        tokens: vec![1; old.len()],
        sampled: old.iter().map(|value| value + shift).collect(),
        ended: true,
        advantage: if per_token { advantage.to_vec() } else { advantage[..1].to_vec() },
        old: old.to_vec(),
        reference: old.iter().map(|value| value - 0.3).collect(),
        values: old.iter().map(|value| 0.5 * value).collect(),
        returns: advantage.iter().map(|value| value + 0.4).collect(),
    };
    vec![rollout(&[1.0, 0.5], &[-1.0, -2.0], 0.02), rollout(&[-0.7, -0.2, 0.9], &[-0.5, -1.5, -0.25], -0.01)]
}

const NOW: [f64; 5] = [-1.1, -1.6, -0.55, -1.2, -0.9];
const VALUES: [f64; 5] = [-0.4, -0.6, -0.2, 0.3, 0.1];
const TOTALS: Totals = Totals { answers: 4.0, tokens: 20.0 };

fn value(told: &Reinforcement, rollouts: &[Rollout], now: &Tensor, values: &Tensor, metrics: &mut Metrics) -> Tensor {
    let answers: Vec<&Rollout> = rollouts.iter().collect();
    loss(told, &Seen { log_probs: now, values: Some(values), answers: &answers }, TOTALS, metrics).unwrap()
}

fn number(told: &Reinforcement, rollouts: &[Rollout], now: &[f64], values: &[f64]) -> f64 {
    let tensor = |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap();
    value(told, rollouts, &tensor(now), &tensor(values), &mut Metrics::default()).to_scalar().unwrap()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (fields, per_token) in [
        (serde_json::json!({"method": "grpo", "beta": 0.1}), false),
        (serde_json::json!({"method": "grpo", "loss_type": "grpo", "importance_sampling_mode": "token_truncate"}), false),
        (serde_json::json!({"method": "grpo", "loss_type": "dr_grpo", "importance_sampling_correction": false}), false),
        (serde_json::json!({"method": "rloo"}), false),
        (serde_json::json!({"method": "ppo"}), true),
    ] {
        let (told, rollouts) = (told(fields.clone()), rollouts(per_token));
        let vars = [NOW, VALUES].map(|values| Var::new(&values[..], &Device::Cpu).unwrap());
        let found = value(&told, &rollouts, vars[0].as_tensor(), vars[1].as_tensor(), &mut Metrics::default());
        let store = found.backward().unwrap();
        for (which, var) in vars.iter().enumerate() {
            let gradient = match store.get(var) {
                Some(gradient) => gradient.to_vec1::<f64>().unwrap(),
                None => vec![0.0; 5],
            };
            for place in 0..5 {
                let at = |h: f64| {
                    let mut moved = [NOW, VALUES];
                    moved[which][place] += h;
                    number(&told, &rollouts, &moved[0], &moved[1])
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (gradient[place] - slope).abs() < 1e-8,
                    "{fields} {which} {place}: {} instead of {slope}",
                    gradient[place]
                );
            }
        }
    }
}

#[test]
fn a_first_step_is_the_advantage_shared_out_as_the_loss_says() {
    // The policy is the one that sampled, so every ratio is 1 and the loss of a token is its advantage's negative.
    let rollouts: Vec<Rollout> = rollouts(false).into_iter().map(|rollout| Rollout { old: Vec::new(), ..rollout }).collect();
    let loss = |fields: serde_json::Value| {
        let told = told(fields);
        let told = Reinforcement { correction: None, ..told };
        number(&told, &rollouts, &NOW, &VALUES)
    };
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-7, "{found} instead of {expected}");
    let (first, second) = (1.0, -0.699_999_988);
    near(loss(serde_json::json!({"method": "grpo"})), -(2.0 * first + 3.0 * second) / 20.0);
    near(loss(serde_json::json!({"method": "grpo", "loss_type": "grpo"})), -(first + second) / 4.0);
    let dr = serde_json::json!({"method": "grpo", "loss_type": "dr_grpo", "max_completion_length": 50});
    near(loss(dr), -(2.0 * first + 3.0 * second) / (4.0 * 50.0));
    near(loss(serde_json::json!({"method": "rloo"})), -(first + second) / 4.0);
}

#[test]
fn an_answer_that_the_trainer_finds_far_likelier_counts_for_nothing_or_for_the_cap() {
    let weights =
        |mode: CorrectionMode, trainer: &[f64], sampler: &[f64]| corrected(trainer, sampler, Some(Correction { mode, cap: 3.0 }));
    let near = |found: Vec<f64>, expected: [f64; 2]| {
        assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-12), "{found:?} {expected:?}");
    };
    // Ratios of e^0.5 and e^1 by token, e^1.5 = 4.48 of the whole.
    let (trainer, sampler) = ([-1.0, -1.0], [-1.5, -2.0]);
    near(weights(CorrectionMode::SequenceMask, &trainer, &sampler), [0.0, 0.0]);
    near(weights(CorrectionMode::SequenceTruncate, &trainer, &sampler), [3.0, 3.0]);
    near(weights(CorrectionMode::TokenMask, &trainer, &sampler), [0.5f64.exp(), 1f64.exp()]);
    near(weights(CorrectionMode::TokenTruncate, &trainer, &sampler), [0.5f64.exp(), 1f64.exp()]);
    near(weights(CorrectionMode::TokenTruncate, &[-1.0, -1.0], &[-1.0, -3.0]), [1.0, 3.0]);
    near(weights(CorrectionMode::TokenMask, &[-1.0, -1.0], &[-1.0, -3.0]), [1.0, 0.0]);
    // Far less likely: nearly nothing, in every mode.
    near(weights(CorrectionMode::SequenceMask, &[-9.0, -9.0], &[-1.0, -1.0]), [(-16f64).exp(); 2]);

    let mut metrics = Metrics::default();
    let correction = Some(Correction { mode: CorrectionMode::SequenceMask, cap: 3.0 });
    let mut difference = Difference::default();
    difference.add(&trainer, &sampler, correction);
    difference.add(&[-1.0], &[-1.0], correction);
    difference.measure(correction, &mut metrics);
    let means = metrics.means();
    for (name, expected) in [
        ("sampling/sampling_logp_difference/mean", 0.5),
        ("sampling/sampling_logp_difference/max", 1.0),
        ("sampling/importance_sampling_ratio/mean", (1.5f64.exp() + 1.0) / 2.0),
        ("sampling/importance_sampling_ratio/min", 1.0),
        ("sampling/importance_sampling_ratio/max", 1.5f64.exp()),
        ("sampling/importance_sampling_ratio/capped", 0.5),
    ] {
        assert!((means[name] - expected).abs() < 1e-12, "{name} {}", means[name]);
    }
}

#[test]
fn what_was_clipped_is_counted_by_its_side() {
    let told = told(serde_json::json!({"method": "grpo", "epsilon": 0.2, "epsilon_high": 0.3}));
    let mut metrics = Metrics::default();
    let (rollouts, tensor) = (rollouts(false), |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap());
    // Ratios: e^-0.1 and e^0.4 with advantage 1; e^-0.05, e^0.3 and e^-0.65 with −0.7.
    value(&told, &rollouts, &tensor(&NOW), &tensor(&VALUES), &mut metrics);
    let means = metrics.means();
    for (name, expected) in [("clip_ratio/high_mean", 0.2), ("clip_ratio/low_mean", 0.2), ("clip_ratio/region_mean", 0.4)] {
        assert!((means[name] - expected).abs() < 1e-12, "{name} {}", means[name]);
    }
    assert_eq!(told.range, (0.2, 0.3));
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/online.json");
    let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let lists = |value: &serde_json::Value| -> Vec<Vec<f64>> { serde_json::from_value(value.clone()).unwrap() };
    let single = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<f32>>();
    let (old, reference) = (lists(&golden["old"]), lists(&golden["reference"]));
    let advantages: Vec<f32> = serde_json::from_value(golden["advantages"].clone()).unwrap();
    let rollouts: Vec<Rollout> = old
        .iter()
        .zip(&reference)
        .zip(&advantages)
        .map(|((old, reference), advantage)| Rollout {
            tokens: vec![1; old.len()],
            sampled: single(old),
            ended: true,
            advantage: vec![*advantage],
            old: single(old),
            reference: single(reference),
            ..Rollout::default()
        })
        .collect();
    let now = lists(&golden["now"]).concat();
    let answers: Vec<&Rollout> = rollouts.iter().collect();
    let totals = Totals { answers: rollouts.len() as f64, tokens: now.len() as f64 };
    for case in golden["cases"].as_array().unwrap() {
        let fields = &case["fields"];
        let told = Reinforcement { correction: None, ..told(fields.clone()) };
        let var = Var::from_vec(now.clone(), now.len(), &Device::Cpu).unwrap();
        let seen = Seen { log_probs: var.as_tensor(), values: None, answers: &answers };
        let found = loss(&told, &seen, totals, &mut Metrics::default()).unwrap();
        let (value, expected) = (found.to_scalar::<f64>().unwrap(), case["loss"].as_f64().unwrap());
        assert!((value - expected).abs() < 1e-9, "{fields}: {value}, not {expected}");
        let gradient = found.backward().unwrap().get(&var).unwrap().to_vec1::<f64>().unwrap();
        for (found, expected) in gradient.iter().zip(lists(&case["gradient"]).concat()) {
            assert!((found - expected).abs() < 1e-9, "{fields}: {gradient:?}, not {}", case["gradient"]);
        }
    }
}
