//! Golden values, and every gradient against finite differences.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::{
    LogRatios, PairLoss,
    advantage::{self, AdaptiveKl},
    log_sigmoid, nll, policy,
    reference_free::{log_odds_ratio, orpo, simpo},
    reward::bradley_terry,
    sigmoid, sum_by,
    thumbs::{kto, reference_point},
};

const PAIR_LOSSES: [PairLoss; 7] = [
    PairLoss::Sigmoid,
    PairLoss::Hinge,
    PairLoss::Ipo,
    PairLoss::Robust { epsilon: 0.1 },
    PairLoss::Conservative { epsilon: 0.1 },
    PairLoss::SigmoidNorm,
    PairLoss::ApoZero,
];

fn tensor(values: &[f64]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn one(found: Result<Tensor>) -> f64 {
    let values = found.unwrap().to_vec1::<f64>().unwrap();
    assert_eq!(values.len(), 1);
    values[0]
}

fn close(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance, "{found} instead of {expected}");
}

/// To the sixth digit, as the values are published.
fn golden(found: Result<Tensor>, expected: f64) {
    close(one(found), expected, 5.1e-7);
}

fn ratios(x: &[Tensor]) -> LogRatios {
    let tokens = |values: [f64; 2]| tensor(&values[..x[0].dims()[0]]).to_dtype(x[0].dtype()).unwrap();
    LogRatios {
        chosen: x[0].clone(),
        rejected: x[1].clone(),
        chosen_tokens: tokens([4.0, 7.0]),
        rejected_tokens: tokens([5.0, 2.0]),
    }
}

/// Compares the gradient of Σ wᵢ·f(inputs)ᵢ along every number of every input with central differences in f64, and the values in f32
/// with those in f64. Weights are uneven, so that a gradient that lands in the wrong row shows.
fn gradients(inputs: &[&[f64]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let total = |inputs: &[Tensor]| -> Tensor {
        let values = f(inputs).unwrap().flatten_all().unwrap();
        let weights: Vec<f64> = (0..values.dims()[0]).map(|i| 1.0 + 0.37 * i as f64).collect();
        let weights = tensor(&weights).to_dtype(values.dtype()).unwrap();
        (values * weights).unwrap().sum_all().unwrap()
    };
    let value = |inputs: &[Vec<f64>]| -> f64 {
        let tensors: Vec<Tensor> = inputs.iter().map(|values| tensor(values)).collect();
        total(&tensors).to_scalar().unwrap()
    };
    let plain: Vec<Vec<f64>> = inputs.iter().map(|values| values.to_vec()).collect();
    let vars: Vec<Var> = plain.iter().map(|values| Var::from_tensor(&tensor(values)).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let store = total(&tensors).backward().unwrap();
    for (input, var) in vars.iter().enumerate() {
        let found = store.get(var).unwrap_or_else(|| panic!("no gradient for input {input}")).to_vec1::<f64>().unwrap();
        for (place, found) in found.into_iter().enumerate() {
            let at = |h: f64| {
                let mut moved = plain.clone();
                moved[input][place] += h;
                value(&moved)
            };
            let h = 1e-5;
            // Fourth order, so that rounding and curvature both stay below the tolerance.
            let slope = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
            close(found, slope, 1e-8 * (1.0 + slope.abs()) + 1e-9);
        }
    }
    let single: Vec<Tensor> = plain.iter().map(|values| tensor(values).to_dtype(DType::F32).unwrap()).collect();
    let (single, double) = (total(&single), value(&plain));
    assert_eq!(single.dtype(), DType::F32);
    close(f64::from(single.to_scalar::<f32>().unwrap()), double, 2e-5 * (1.0 + double.abs()));
}

#[test]
fn preference_losses_have_their_published_values() {
    let inputs = [tensor(&[0.5]), tensor(&[-0.3])];
    let expected = [0.653947, 0.92, 23.184225, 0.643947, 0.661947, 0.683940, 0.980003];
    for (loss, expected) in PAIR_LOSSES.into_iter().zip(expected) {
        golden(loss.evaluate(0.1, &ratios(&inputs)), expected);
    }
}

#[test]
fn the_other_losses_have_their_published_values() {
    let at = |x: f64| tensor(&[x]);
    golden(kto(0.1, &at(0.5), 0.2, &at(1.0)), 0.492501);
    golden(kto(0.1, &at(-0.3), 0.2, &at(-1.0)), 0.487503);
    golden(log_odds_ratio(&at(-0.8), &at(-1.2)), 0.638235);
    golden(orpo(0.1, &log_odds_ratio(&at(-0.8), &at(-1.2)).unwrap()), 0.042411);
    golden(simpo(2.0, 0.5, &at(-0.8), &at(-1.2)), 0.554355);
    golden(bradley_terry(&at(1.2), &at(0.4), None, 0.0), 0.371101);
    golden(bradley_terry(&at(1.2), &at(0.4), None, 0.01), 0.396701);
    golden(policy::k3(&at(-1.0), &at(-1.2)), 0.018731);
    // A margin moves the logit: −log σ(0.8 − 0.3).
    golden(bradley_terry(&at(1.2), &at(0.4), Some(&at(0.3)), 0.0), 0.474077);
    golden(nll(&at(-1.25)), 1.25);
}

#[test]
fn advantages_have_their_published_values() {
    let rewards = [1.0, 0.0, 0.0, 1.0];
    let signs = [1.0, -1.0, -1.0, 1.0];
    for (sign, (group, left_out)) in
        signs.iter().zip(advantage::group_relative(&rewards).into_iter().zip(advantage::leave_one_out(&rewards)))
    {
        close(group, sign * 0.865875, 5.1e-7);
        close(left_out, sign * 0.666667, 5.1e-7);
    }
    assert_eq!(advantage::group_relative(&[0.3, 0.3]), [0.0, 0.0]);
    assert_eq!((advantage::group_relative(&[0.3]), advantage::leave_one_out(&[0.3])), (vec![0.0], vec![0.0]));

    let (rewards, values, mask) = ([0.3, 0.0, -0.2, 1.0], [0.2, 999.0, 0.5, 0.8], [true, false, true, true]);
    for (gamma, expected) in [(1.0, [0.9, 0.3, 0.3, 0.2]), (0.99, [0.8821, 0.29, 0.29, 0.2])] {
        for (found, expected) in advantage::generalised(&rewards, &values, &mask, gamma, 1.0).into_iter().zip(expected) {
            close(found, expected, 1e-12);
        }
    }
}

#[test]
fn a_sequence_far_off_policy_counts_for_nothing() {
    close(advantage::off_policy_weight(-10.0, -10.5, 3.0), 0.5f64.exp(), 1e-12);
    close(advantage::off_policy_weight(-12.0, -10.0, 3.0), (-2f64).exp(), 1e-12);
    assert_eq!(advantage::off_policy_weight(-10.0, -11.2, 3.0), 0.0);
    assert_eq!(advantage::off_policy_weight(0.0, -1e6, 3.0), 0.0);
}

#[test]
fn whitened_values_have_deviation_1_and_keep_their_mean_when_told_so() {
    let values = [1.0, 2.0, 4.0, 5.0];
    assert!((advantage::deviation(&values) - (10.0f64 / 3.0).sqrt()).abs() < 1e-12);
    for (shift, expected) in [(true, 0.0), (false, 3.0)] {
        let white = advantage::whiten(&values, shift);
        close(white.iter().sum::<f64>() / 4.0, expected, 1e-9);
        close(advantage::deviation(&white), 1.0, 1e-8);
    }
    // Of equal values nothing is made.
    assert_eq!(advantage::whiten(&[2.0, 2.0], true), [0.0, 0.0]);
    assert_eq!(advantage::deviation(&[3.0]), 0.0);
}

#[test]
fn a_truncated_ratio_stays_at_its_cap() {
    close(advantage::truncated_weight(-10.0, -10.5, 3.0), 0.5f64.exp(), 1e-12);
    assert_eq!(advantage::truncated_weight(-10.0, -20.0, 3.0), 3.0);
}

#[test]
fn the_price_of_divergence_follows_its_target() {
    let mut price = AdaptiveKl { coefficient: 0.05, target: 6.0, horizon: 10_000.0 };
    // Twice the target, clipped at +0.2: ·(1 + 0.2·64/10000).
    price.update(12.0, 64);
    close(price.coefficient, 0.05 * 1.00128, 1e-12);
    price.update(5.4, 64);
    close(price.coefficient, 0.05 * 1.00128 * (1.0 - 0.1 * 0.0064), 1e-12);
}

#[test]
fn the_reference_point_is_a_mean_that_is_not_negative() {
    assert_eq!(reference_point(&[0.5, -0.1]), 0.2);
    assert_eq!(reference_point(&[-3.0, 1.0]), 0.0);
    assert_eq!(reference_point(&[]), 0.0);
}

#[test]
fn gradients_of_preference_losses_agree_with_finite_differences() {
    for beta in [0.1, 1.0, 7.0] {
        for (chosen, rejected) in [([0.5, -2.0], [-0.3, 1.5]), ([3.0, -0.4], [3.0, -6.0]), ([0.0, 0.0], [0.0, 0.0])] {
            for loss in PAIR_LOSSES {
                gradients(&[&chosen, &rejected], |x| loss.evaluate(beta, &ratios(x)));
            }
        }
    }
}

#[test]
fn gradients_of_the_other_losses_agree_with_finite_differences() {
    gradients(&[&[-0.3, 0.0, 4.0]], |x| sigmoid(&x[0]));
    gradients(&[&[-0.3, 0.0, 4.0]], |x| log_sigmoid(&x[0]));
    gradients(&[&[-0.3, -2.0]], |x| nll(&x[0]));
    gradients(&[&[1.2, -0.4], &[0.4, 0.7], &[0.3, 0.0]], |x| bradley_terry(&x[0], &x[1], Some(&x[2]), 0.02));
    gradients(&[&[0.5, -0.3, 0.1]], |x| kto(0.7, &x[0], 0.2, &tensor(&[1.0, -1.0, -1.0]).to_dtype(x[0].dtype())?));
    gradients(&[&[-0.8, -0.02], &[-1.2, -3.0]], |x| log_odds_ratio(&x[0], &x[1]));
    gradients(&[&[-0.8, -0.02], &[-1.2, -3.0]], |x| orpo(0.1, &log_odds_ratio(&x[0], &x[1])?));
    gradients(&[&[-0.8, -0.1], &[-1.2, -0.3]], |x| simpo(2.0, 0.5, &x[0], &x[1]));
    gradients(&[&[-1.0, -0.2], &[-1.2, -0.1]], |x| policy::k3(&x[0], &x[1]));
    // Inside, past the upper and past the lower bound, for both signs of the advantage.
    let old = [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0];
    let new = [-1.05, -0.5, -1.6, -0.95, -0.5, -1.6];
    let advantages = [1.0, 0.7, 2.0, -1.0, -0.7, -2.0];
    gradients(&[&new], |x| {
        let like = |values: &[f64]| tensor(values).to_dtype(x[0].dtype());
        policy::clipped(&x[0], &like(&old)?, &like(&advantages)?, 0.2, 0.28)
    });
    let (before, returns) = ([0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.65]);
    gradients(&[&[0.6, 0.9, 0.9, 0.1]], |x| {
        let like = |values: &[f64]| tensor(values).to_dtype(x[0].dtype());
        policy::value(&x[0], &like(&before)?, &like(&returns)?, 0.2)
    });
    gradients(&[&[0.1, -0.2, 0.3, 0.4, -0.5]], |x| sum_by(&x[0], &Tensor::new(&[0u32, 2, 2, 0, 2], &Device::Cpu)?, 3)?.sqr());
}

/// At ratio 1, where training starts, both sides of the minimum are equal and the gradient is the whole advantage.
#[test]
fn the_first_update_is_not_clipped() {
    let new = Var::from_tensor(&tensor(&[-1.0, -2.0])).unwrap();
    let loss = policy::clipped(&new, &tensor(&[-1.0, -2.0]), &tensor(&[0.5, -0.25]), 0.2, 0.2).unwrap();
    assert_eq!(loss.to_vec1::<f64>().unwrap(), [-0.5, 0.25]);
    let store = loss.sum_all().unwrap().backward().unwrap();
    assert_eq!(store.get(&new).unwrap().to_vec1::<f64>().unwrap(), [-0.5, 0.25]);
}

#[test]
fn clipping_takes_the_gradient_away_only_where_it_would_go_further() {
    // Ratio e^0.5 with advantage 1: past the bound, no gradient; with advantage −1 it is still pushed back.
    for (advantage, expected) in [(1.0, 0.0), (-1.0, 0.5f64.exp())] {
        let new = Var::from_tensor(&tensor(&[-0.5])).unwrap();
        let loss = policy::clipped(&new, &tensor(&[-1.0]), &tensor(&[advantage]), 0.2, 0.2).unwrap();
        let store = loss.sum_all().unwrap().backward().unwrap();
        close(store.get(&new).unwrap().to_vec1::<f64>().unwrap()[0], expected, 1e-12);
    }
}

#[test]
fn extreme_values_stay_finite() {
    for (chosen, rejected) in [(1e6, -1e6), (-1e6, 1e6)] {
        for loss in PAIR_LOSSES {
            let vars = [tensor(&[chosen]), tensor(&[rejected])]
                .map(|values| Var::from_tensor(&values.to_dtype(DType::F32).unwrap()).unwrap());
            let found = loss.evaluate(0.5, &ratios(&vars.clone().map(|var| var.as_tensor().clone()))).unwrap();
            assert!(found.to_vec1::<f32>().unwrap()[0].is_finite(), "{loss:?}");
            let store = found.backward().unwrap();
            for var in &vars {
                assert!(store.get(var).unwrap().to_vec1::<f32>().unwrap()[0].is_finite(), "{loss:?}");
            }
        }
    }
    // An answer that the model is certain of has no infinite odds.
    let certain = Var::from_tensor(&tensor(&[0.0])).unwrap();
    let loss = orpo(0.1, &log_odds_ratio(&certain, &tensor(&[-1.0])).unwrap()).unwrap();
    let store = loss.backward().unwrap();
    assert!(one(Ok(loss)).is_finite() && store.get(&certain).unwrap().to_vec1::<f64>().unwrap()[0].is_finite());
}
