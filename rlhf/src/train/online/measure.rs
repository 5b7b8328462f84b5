//! What is measured of answers as they are sampled, under TRL's names.

use super::sampler::Drawn;
use crate::{loss::advantage::deviation, reward::Scores, train::metrics::Metrics};

/// Below this a group's rewards are all the same.
const SAME: f64 = 1e-8;

/// Lengths, and how many ended by themselves.
pub(super) fn completions<'a>(answers: impl Iterator<Item = &'a Drawn>, metrics: &mut Metrics) {
    let (mut all, mut ended) = (Vec::new(), Vec::new());
    for answer in answers {
        let length = answer.tokens.len() as f64;
        all.push(length);
        if answer.ended {
            ended.push(length);
        }
    }
    lengths("", &all, metrics);
    lengths("terminated_", &ended, metrics);
    metrics.add("completions/clipped_ratio", (all.len() - ended.len()) as f64, all.len() as f64);
}

fn lengths(which: &str, lengths: &[f64], metrics: &mut Metrics) {
    if lengths.is_empty() {
        return;
    }
    metrics.extend(&format!("completions/mean_{which}length"), lengths);
    metrics.add(&format!("completions/min_{which}length"), lengths.iter().copied().fold(f64::INFINITY, f64::min), 1.0);
    metrics.add(&format!("completions/max_{which}length"), lengths.iter().copied().fold(0.0, f64::max), 1.0);
}

/// Rewards by function, and of the groups their means and deviations; `groups` has one list per group.
pub(super) fn rewards(scores: &Scores, groups: &[Vec<f64>], metrics: &mut Metrics) {
    for (name, rewards) in &scores.each {
        let known: Vec<f64> = rewards.iter().flatten().copied().collect();
        metrics.extend(&format!("rewards/{name}/mean"), &known);
        if known.len() > 1 {
            metrics.add(&format!("rewards/{name}/std"), deviation(&known), 1.0);
        }
    }
    metrics.extend("reward", &scores.total);
    for group in groups.iter().filter(|group| group.len() > 1) {
        let deviation = deviation(group);
        metrics.add("reward_std", deviation, 1.0);
        metrics.add("frac_reward_zero_std", f64::from(u8::from(deviation < SAME)), 1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_rewards_have_trls_names() {
        let drawn = |tokens: usize, ended: bool| Drawn { tokens: vec![0; tokens], ended, ..Drawn::default() };
        let mut metrics = Metrics::default();
        completions([drawn(2, true), drawn(8, false), drawn(5, true), drawn(9, false)].iter(), &mut metrics);
        let scores = Scores {
            each: vec![("json".to_owned(), vec![Some(1.0), Some(0.0), None, Some(1.0)])],
            total: vec![1.0, 0.0, 0.0, 1.0],
        };
        rewards(&scores, &[vec![1.0, 0.0], vec![0.5, 0.5]], &mut metrics);
        let means = metrics.means();
        for (name, expected) in [
            ("completions/mean_length", 6.0),
            ("completions/min_length", 2.0),
            ("completions/max_length", 9.0),
            ("completions/mean_terminated_length", 3.5),
            ("completions/max_terminated_length", 5.0),
            ("completions/clipped_ratio", 0.5),
            ("rewards/json/mean", 2.0 / 3.0),
            ("rewards/json/std", 3f64.sqrt().recip()),
            ("reward", 0.5),
            ("reward_std", 0.5 * 0.5f64.sqrt()),
            ("frac_reward_zero_std", 0.5),
        ] {
            assert!((means[name] - expected).abs() < 1e-12, "{name}: {} instead of {expected}", means[name]);
        }
    }
}
