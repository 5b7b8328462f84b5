//! From rewards to advantages: how much better an answer was than expected.

use super::answers::{Group, Rollout};
use crate::{
    loss::advantage::{AdaptiveKl, centred, deviation, generalised, group_relative, leave_one_out, whiten},
    train::{
        config::{Advantages, RewardScale},
        metrics::Metrics,
    },
};

/// Gives every answer its advantage, and for PPO what its values should have been. `rewards` has one list per group. The answers
/// have what the method wants of old, reference and values already.
pub(super) fn estimate(
    groups: &mut [Group],
    rewards: &[Vec<f64>],
    how: &Advantages,
    price: &mut AdaptiveKl,
    metrics: &mut Metrics,
) {
    match *how {
        Advantages::Group { scale } => relative(groups, rewards, scale),
        Advantages::LeaveOneOut { beta, normalize } => left_out(groups, rewards, beta, normalize, metrics),
        Advantages::Estimated { adaptive, gamma, lambda, whiten, missing_eos, .. } => {
            let told = Told { gamma, lambda, whiten, missing_eos };
            estimated(groups, rewards, &told, price.coefficient, metrics);
            if adaptive {
                let divergences: Vec<f64> = answers(groups).map(divergence).collect();
                price.update(mean(&divergences), divergences.len());
            }
        }
    }
}

fn answers(groups: &[Group]) -> impl Iterator<Item = &Rollout> {
    groups.iter().flat_map(|group| &group.answers)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// log π − log π_ref of each token, before the first step.
fn ratios(answer: &Rollout) -> impl Iterator<Item = f64> {
    answer.old.iter().zip(&answer.reference).map(|(old, reference)| f64::from(*old) - f64::from(*reference))
}

/// Of the whole answer.
fn divergence(answer: &Rollout) -> f64 {
    ratios(answer).sum()
}

fn relative(groups: &mut [Group], rewards: &[Vec<f64>], scale: RewardScale) {
    let overall = deviation(&rewards.concat()) + 1e-4;
    for (group, rewards) in groups.iter_mut().zip(rewards) {
        let advantages = match scale {
            RewardScale::Group => group_relative(rewards),
            RewardScale::Batch => centred(rewards).iter().map(|reward| reward / overall).collect(),
            RewardScale::None => centred(rewards),
        };
        group.answers.iter_mut().zip(advantages).for_each(|(answer, advantage)| answer.advantage = vec![advantage as f32]);
    }
}

fn left_out(groups: &mut [Group], rewards: &[Vec<f64>], beta: f64, normalize: bool, metrics: &mut Metrics) {
    let mut found: Vec<Vec<f64>> = Vec::with_capacity(groups.len());
    for (group, rewards) in groups.iter().zip(rewards) {
        let divergences: Vec<f64> = group.answers.iter().map(divergence).collect();
        if beta > 0.0 {
            metrics.extend("kl", &divergences);
        }
        let paid: Vec<f64> = rewards.iter().zip(&divergences).map(|(reward, divergence)| reward - beta * divergence).collect();
        found.push(leave_one_out(&paid));
    }
    let all = found.concat();
    let (shift, scale) = if normalize { (mean(&all), deviation(&all) + 1e-4) } else { (0.0, 1.0) };
    for (group, advantages) in groups.iter_mut().zip(found) {
        for (answer, advantage) in group.answers.iter_mut().zip(advantages) {
            answer.advantage = vec![((advantage - shift) / scale) as f32];
        }
    }
}

struct Told {
    gamma: f64,
    lambda: f64,
    whiten: bool,
    missing_eos: f64,
}

fn estimated(groups: &mut [Group], rewards: &[Vec<f64>], told: &Told, price: f64, metrics: &mut Metrics) {
    let scores = groups.iter().zip(rewards).flat_map(|(group, rewards)| group.answers.iter().zip(rewards));
    let scores: Vec<f64> =
        scores.map(|(answer, reward)| if answer.ended { *reward } else { reward - told.missing_eos }).collect();
    // Divergence is paid token by token, the answer's reward comes with its last.
    let mut per_token: Vec<Vec<f64>> = Vec::with_capacity(scores.len());
    for (answer, score) in answers(groups).zip(&scores) {
        let mut own: Vec<f64> = ratios(answer).map(|ratio| -price * ratio).collect();
        metrics.add("objective/non_score_reward", own.iter().sum(), 1.0);
        metrics.add("objective/rlhf_reward", own.iter().sum::<f64>() + score, 1.0);
        if let Some(last) = own.last_mut() {
            *last += score;
        }
        per_token.push(own);
    }
    let divergences: Vec<f64> = answers(groups).map(divergence).collect();
    metrics.extend("objective/kl", &divergences);
    metrics.extend("kl", &divergences);
    metrics.extend("objective/scores", &scores);
    metrics.add("kl_coef", price, 1.0);
    if told.whiten {
        let mut all = whiten(&per_token.concat(), false).into_iter();
        per_token.iter_mut().flatten().zip(&mut all).for_each(|(reward, white)| *reward = white);
    }
    let mut found: Vec<Vec<f64>> = Vec::with_capacity(per_token.len());
    for (answer, rewards) in groups.iter_mut().flat_map(|group| &mut group.answers).zip(&per_token) {
        let values: Vec<f64> = answer.values.iter().map(|value| f64::from(*value)).collect();
        let advantages = generalised(rewards, &values, &vec![true; rewards.len()], told.gamma, told.lambda);
        answer.returns = advantages.iter().zip(&values).map(|(advantage, value)| (advantage + value) as f32).collect();
        found.push(advantages);
    }
    let mut white = whiten(&found.concat(), true).into_iter().map(|advantage| advantage as f32);
    for answer in groups.iter_mut().flat_map(|group| &mut group.answers) {
        answer.advantage = white.by_ref().take(answer.tokens.len()).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(lengths: &[usize]) -> Group {
        let answer = |length: &usize| Rollout {
            tokens: vec![1; *length],
            old: vec![-1.0; *length],
            reference: vec![-1.5; *length],
            values: vec![0.25; *length],
            ended: true,
            ..Rollout::default()
        };
        Group { prompt: 0, answers: lengths.iter().map(answer).collect() }
    }

    fn advantages(group: &Group) -> Vec<f32> {
        group.answers.iter().map(|answer| answer.advantage[0]).collect()
    }

    fn near(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 2e-6, "{found} instead of {expected}");
        }
    }

    fn run(groups: &mut [Group], rewards: &[Vec<f64>], how: &Advantages) -> (AdaptiveKl, Metrics) {
        let mut price = match how {
            Advantages::Estimated { kl, .. } => *kl,
            _ => AdaptiveKl { coefficient: 0.0, target: 1.0, horizon: 1.0 },
        };
        let mut metrics = Metrics::default();
        estimate(groups, rewards, how, &mut price, &mut metrics);
        (price, metrics)
    }

    #[test]
    fn groups_are_compared_within_themselves_and_scaled_as_told() {
        let rewards = [vec![1.0, 0.0, 0.0, 1.0], vec![3.0; 4]];
        let mut groups = [group(&[2; 4]), group(&[2; 4])];
        run(&mut groups, &rewards, &Advantages::Group { scale: RewardScale::Group });
        near(&advantages(&groups[0]), &[0.865875, -0.865875, -0.865875, 0.865875]);
        assert!(groups[1].answers.iter().all(Rollout::is_indifferent));
        run(&mut groups, &rewards, &Advantages::Group { scale: RewardScale::None });
        near(&advantages(&groups[0]), &[0.5, -0.5, -0.5, 0.5]);
        run(&mut groups, &rewards, &Advantages::Group { scale: RewardScale::Batch });
        let scale = deviation(&rewards.concat()) + 1e-4;
        near(&advantages(&groups[0]), &[0.5 / scale, -0.5 / scale, -0.5 / scale, 0.5 / scale]);
    }

    #[test]
    fn divergence_is_paid_for_before_answers_are_compared() {
        let mut groups = [group(&[2, 4])];
        let how = Advantages::LeaveOneOut { beta: 0.1, normalize: false };
        let (_, metrics) = run(&mut groups, &[vec![1.0, 1.0]], &how);
        // Half a nat per token: 1 and 2 nats, so 0.9 and 0.8.
        near(&advantages(&groups[0]), &[0.1, -0.1]);
        assert!((metrics.means()["kl"] - 1.5).abs() < 1e-12);
        let mut groups = [group(&[2; 4])];
        run(&mut groups, &[vec![1.0, 0.0, 0.0, 1.0]], &Advantages::LeaveOneOut { beta: 0.0, normalize: false });
        near(&advantages(&groups[0]), &[0.666667, -0.666667, -0.666667, 0.666667]);
        run(&mut groups, &[vec![1.0, 0.0, 0.0, 1.0]], &Advantages::LeaveOneOut { beta: 0.0, normalize: true });
        let scale = deviation(&[2.0 / 3.0, -2.0 / 3.0, -2.0 / 3.0, 2.0 / 3.0]) + 1e-4;
        near(&advantages(&groups[0])[..1], &[2.0 / 3.0 / scale]);
    }

    #[test]
    fn values_spread_a_reward_over_the_tokens_before_it() {
        let kl = AdaptiveKl { coefficient: 0.1, target: 0.5, horizon: 100.0 };
        let how = Advantages::Estimated { kl, adaptive: true, gamma: 1.0, lambda: 1.0, whiten: false, missing_eos: 1.0 };
        let mut groups = [group(&[3]), group(&[1])];
        groups[1].answers[0].ended = false;
        let (price, metrics) = run(&mut groups, &[vec![2.0], vec![0.5]], &how);
        // With γ = λ = 1 a return is the sum of what is still to come: −0.05 a token, and 2 at the end; half a point, less one.
        near(&groups[0].answers[0].returns, &[1.85, 1.9, 1.95]);
        near(&groups[1].answers[0].returns, &[-0.55]);
        let raw = [1.6, 1.65, 1.7, -0.8];
        let found = [groups[0].answers[0].advantage.clone(), groups[1].answers[0].advantage.clone()].concat();
        near(&found, &whiten(&raw, true));
        let means = metrics.means();
        for (name, expected) in
            [("objective/kl", 1.0), ("objective/scores", 0.75), ("objective/non_score_reward", -0.1), ("kl_coef", 0.1)]
        {
            assert!((means[name] - expected).abs() < 1e-6, "{name} {}", means[name]);
        }
        // A nat per answer is twice the target: the price rises by 0.2 · 2 / 100.
        assert!((price.coefficient - 0.1 * 1.004).abs() < 1e-12);
    }
}
