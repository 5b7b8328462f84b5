//! How much better a sampled completion or token was than expected.

/// Group-relative advantages (Shao et al. 2024): (R − mean) / (s + 1e-4), with the n − 1 standard deviation. A group of one has none.
pub fn group_relative(rewards: &[f64]) -> Vec<f64> {
    let scale = deviation(rewards) + 1e-4;
    centred(rewards).iter().map(|reward| reward / scale).collect()
}

/// Each value less the mean of all.
pub fn centred(values: &[f64]) -> Vec<f64> {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    values.iter().map(|value| value - mean).collect()
}

/// The n − 1 standard deviation; 0 of fewer than two.
pub fn deviation(values: &[f64]) -> f64 {
    let squares: f64 = centred(values).iter().map(|value| value * value).sum();
    if values.len() < 2 { 0.0 } else { (squares / (values.len() - 1) as f64).sqrt() }
}

/// Values scaled to deviation 1 (the n − 1 one, with 1e-8 added to its square), and with `shift` moved to mean 0.
pub fn whiten(values: &[f64], shift: bool) -> Vec<f64> {
    let scale = 1.0 / (deviation(values).powi(2) + 1e-8).sqrt();
    let moved = if shift { centred(values) } else { values.to_vec() };
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    // Without the shift the mean stays where it was.
    let back = if shift { 0.0 } else { mean - mean * scale };
    moved.iter().map(|value| value * scale + back).collect()
}

/// Each reward less the mean of the group's others (Ahmadian et al. 2024, eq. 8). A group of one has nothing to compare with: 0.
pub fn leave_one_out(rewards: &[f64]) -> Vec<f64> {
    let others = rewards.len() as f64 - 1.0;
    let sum: f64 = rewards.iter().sum();
    rewards.iter().map(|reward| if others > 0.0 { reward - (sum - reward) / others } else { 0.0 }).collect()
}

/// Generalised advantage estimation (Schulman et al. 2016, eq. 16) along one sequence. Places outside the mask are stepped over as if
/// they were not there, and repeat the advantage that follows. The lists are of one length.
pub fn generalised(rewards: &[f64], values: &[f64], mask: &[bool], gamma: f64, lambda: f64) -> Vec<f64> {
    let (mut next_value, mut advantage) = (0.0, 0.0);
    let mut advantages = vec![0.0; rewards.len()];
    for place in (0..rewards.len()).rev() {
        if mask[place] {
            advantage = rewards[place] + gamma * next_value - values[place] + gamma * lambda * advantage;
            next_value = values[place];
        }
        advantages[place] = advantage;
    }
    advantages
}

/// What a completion counts for when the sampler's arithmetic differs from the trainer's: π_trainer / π_sampler of the whole sequence
/// (summed log-probabilities) or of one token, and 0 above `cap`, where one sequence would outweigh the batch (Yao et al. 2025).
pub fn off_policy_weight(trainer: f64, sampler: f64, cap: f64) -> f64 {
    let ratio = (trainer - sampler).exp();
    if ratio <= cap { ratio } else { 0.0 }
}

/// The same ratio, `cap` above it (truncated importance sampling: Ionides 2008; Yao et al. 2025).
pub fn truncated_weight(trainer: f64, sampler: f64, cap: f64) -> f64 {
    (trainer - sampler).exp().min(cap)
}

/// Holds the divergence from the reference near a target by its price (Ziegler et al. 2019, section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdaptiveKl {
    /// Price of a nat of divergence.
    pub coefficient: f64,
    /// Nats per completion that are aimed at.
    pub target: f64,
    /// Completions over which the price follows.
    pub horizon: f64,
}

impl AdaptiveKl {
    /// Follows the divergence that `completions` samples had: coefficient *= 1 + clip(kl / target − 1, ±0.2) · completions / horizon.
    pub fn update(&mut self, kl: f64, completions: usize) {
        let error = (kl / self.target - 1.0).clamp(-0.2, 0.2);
        self.coefficient *= 1.0 + error * completions as f64 / self.horizon;
    }
}
