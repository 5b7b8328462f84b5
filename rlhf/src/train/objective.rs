//! From a batch's log-probabilities to its part of the step's loss, and what is measured on the way.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{config::Objective, metrics::Metrics};
use crate::{
    collate::Sample,
    loss::{LogRatios, nll, reference_free, reward::bradley_terry, thumbs::kto},
};

/// What a batch gave. Entries stand for completions, in the order of the batch.
pub(super) struct Logs<'a> {
    /// Log-probability of each completion under the policy, `[completions]`; for a reward model its reward.
    pub(super) policy: &'a Tensor,
    /// The same under the reference.
    pub(super) reference: Option<&'a Tensor>,
    /// Labels of each completion.
    pub(super) labels: &'a [usize],
    /// The sample of each completion.
    pub(super) samples: &'a [&'a Sample],
    /// KTO's reference point.
    pub(super) z: f64,
}

/// What the whole step holds, over which its loss is a mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Totals {
    /// Rows.
    pub(super) rows: f64,
    /// Labels that are imitated.
    pub(super) tokens: f64,
}

impl Objective {
    /// Whether a sample has a chosen and a rejected completion.
    pub(super) fn compares(&self) -> bool {
        !matches!(self, Self::Sft | Self::Kto { .. })
    }

    pub(super) fn needs_reference(&self) -> bool {
        matches!(self, Self::Dpo { .. } | Self::Kto { .. })
    }

    /// Labels of a sample that are imitated: all of one completion, the chosen one's of two.
    pub(super) fn imitated(&self, sample: &Sample) -> usize {
        if sample.completions.is_empty() { 0 } else { sample.labels(0) }
    }

    /// What a sample counts in the loss: its labels where that is a mean over labels.
    pub(super) fn mass(&self, sample: &Sample) -> f64 {
        if *self == Self::Sft { self.imitated(sample) as f64 } else { 1.0 }
    }

    /// The batch's part of the step's loss, a scalar. Sums over batches of a step give the step's loss, however it is cut.
    pub(super) fn loss(&self, logs: &Logs<'_>, totals: Totals, metrics: &mut Metrics) -> Result<Tensor> {
        match *self {
            Self::Sft => imitation(logs.policy, logs.samples, totals.tokens),
            Self::Kto { beta, desirable, undesirable } => thumbs(logs, beta, desirable, undesirable, totals, metrics),
            Self::Reward { centring } => {
                let pairs = Pairs::new(logs)?;
                pairs.measure(&pairs.chosen, &pairs.rejected, metrics)?;
                pairs.mean(&bradley_terry(&pairs.chosen, &pairs.rejected, None, centring)?, totals)
            }
            Self::Dpo { loss, beta, imitate } => {
                let pairs = Pairs::new(logs)?;
                let ratios = pairs.ratios(logs)?;
                pairs.measure(&(&ratios.chosen * beta)?, &(&ratios.rejected * beta)?, metrics)?;
                pairs.measure_logs(&pairs.chosen, &pairs.rejected, metrics)?;
                let value = pairs.mean(&loss.evaluate(beta, &ratios)?, totals)?;
                if imitate == 0.0 {
                    return Ok(value);
                }
                let imitation = imitation(&pairs.chosen, &pairs.samples, totals.tokens)?;
                metrics.add("nll_loss", scalar(&imitation)?, pairs.part(totals));
                value + (imitation * imitate)?
            }
            Self::Orpo { beta } => {
                let pairs = Pairs::new(logs)?;
                let (chosen, rejected) = pairs.averages()?;
                let odds = reference_free::log_odds_ratio(&chosen, &rejected)?;
                pairs.measure(&(&chosen * beta)?, &(&rejected * beta)?, metrics)?;
                pairs.measure_logs(&chosen, &rejected, metrics)?;
                metrics.extend("log_odds_chosen", &numbers(&odds)?);
                let imitation = imitation(&pairs.chosen, &pairs.samples, totals.tokens)?;
                metrics.add("nll_loss", scalar(&imitation)?, pairs.part(totals));
                imitation + pairs.mean(&reference_free::orpo(beta, &odds)?, totals)?
            }
            Self::Simpo { beta, gamma } => {
                let pairs = Pairs::new(logs)?;
                let (chosen, rejected) = pairs.averages()?;
                pairs.measure(&(&chosen * beta)?, &(&rejected * beta)?, metrics)?;
                pairs.measure_logs(&chosen, &rejected, metrics)?;
                pairs.mean(&reference_free::simpo(beta, gamma, &chosen, &rejected)?, totals)
            }
        }
    }
}

/// Chosen and rejected of each pair, `[pairs]`.
struct Pairs<'a> {
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    samples: Vec<&'a Sample>,
}

impl<'a> Pairs<'a> {
    fn new(logs: &Logs<'a>) -> Result<Self> {
        let (chosen, rejected) = sides(logs.policy)?;
        let tokens: Vec<f64> = logs.labels.iter().map(|labels| *labels as f64).collect();
        let (chosen_tokens, rejected_tokens) = sides(&like(&tokens, logs.policy)?)?;
        Ok(Self { chosen, rejected, chosen_tokens, rejected_tokens, samples: logs.samples.iter().step_by(2).copied().collect() })
    }

    fn ratios(&self, logs: &Logs<'_>) -> Result<LogRatios> {
        let Some(reference) = logs.reference else { bail!("this loss needs reference log-probabilities") };
        let (chosen, rejected) = sides(reference)?;
        Ok(LogRatios {
            chosen: (&self.chosen - chosen)?,
            rejected: (&self.rejected - rejected)?,
            chosen_tokens: self.chosen_tokens.clone(),
            rejected_tokens: self.rejected_tokens.clone(),
        })
    }

    /// Mean log-probability per token.
    fn averages(&self) -> Result<(Tensor, Tensor)> {
        Ok(((&self.chosen / &self.chosen_tokens)?, (&self.rejected / &self.rejected_tokens)?))
    }

    /// Σ weight · loss over the pairs, divided by the rows of the step.
    fn mean(&self, losses: &Tensor, totals: Totals) -> Result<Tensor> {
        weighted(losses, &self.samples, |_| 1.0)? / totals.rows
    }

    /// The batch's share of its step, so that parts of a mean over the step average to the mean over steps.
    fn part(&self, totals: Totals) -> f64 {
        self.samples.len() as f64 / totals.rows
    }

    fn measure(&self, chosen: &Tensor, rejected: &Tensor, metrics: &mut Metrics) -> Result<()> {
        let (chosen, rejected) = (numbers(chosen)?, numbers(rejected)?);
        let pairs = || chosen.iter().zip(&rejected);
        metrics.extend("rewards/accuracies", &pairs().map(|(c, r)| f64::from(u8::from(c > r))).collect::<Vec<_>>());
        metrics.extend("rewards/margins", &pairs().map(|(c, r)| c - r).collect::<Vec<_>>());
        metrics.extend("rewards/chosen", &chosen);
        metrics.extend("rewards/rejected", &rejected);
        Ok(())
    }

    fn measure_logs(&self, chosen: &Tensor, rejected: &Tensor, metrics: &mut Metrics) -> Result<()> {
        metrics.extend("logps/chosen", &numbers(chosen)?);
        metrics.extend("logps/rejected", &numbers(rejected)?);
        Ok(())
    }
}

/// Σ weight · nll of completions, divided by the labels of the step.
fn imitation(log_probs: &Tensor, samples: &[&Sample], tokens: f64) -> Result<Tensor> {
    weighted(&nll(log_probs)?, samples, |_| 1.0)? / tokens.max(1.0)
}

fn thumbs(logs: &Logs<'_>, beta: f64, desirable: f64, undesirable: f64, totals: Totals, metrics: &mut Metrics) -> Result<Tensor> {
    let Some(reference) = logs.reference else { bail!("this loss needs reference log-probabilities") };
    let ratios = (logs.policy - reference)?;
    let signs: Vec<f64> = logs.samples.iter().map(|sample| if sample.good { 1.0 } else { -1.0 }).collect();
    let losses = kto(beta, &ratios, logs.z, &like(&signs, &ratios)?)?;
    for ((sample, ratio), log_prob) in logs.samples.iter().zip(numbers(&ratios)?).zip(numbers(logs.policy)?) {
        let side = if sample.good { ["rewards/chosen", "logps/chosen"] } else { ["rewards/rejected", "logps/rejected"] };
        metrics.add(side[0], beta * ratio, 1.0);
        metrics.add(side[1], log_prob, 1.0);
    }
    metrics.add("kl", logs.z * logs.samples.len() as f64, logs.samples.len() as f64);
    weighted(&losses, logs.samples, |sample| if sample.good { desirable } else { undesirable })? / totals.rows
}

/// Σ factor · weight · value.
fn weighted(values: &Tensor, samples: &[&Sample], factor: impl Fn(&Sample) -> f64) -> Result<Tensor> {
    let weights: Vec<f64> = samples.iter().map(|sample| sample.weight * factor(sample)).collect();
    (values * like(&weights, values)?)?.sum_all()
}

/// Every second entry from the first, and from the second.
fn sides(values: &Tensor) -> Result<(Tensor, Tensor)> {
    let pairs = values.reshape(((), 2))?;
    let side = |index: usize| pairs.narrow(1, index, 1)?.squeeze(1)?.contiguous();
    Ok((side(0)?, side(1)?))
}

fn like(values: &[f64], other: &Tensor) -> Result<Tensor> {
    Tensor::new(values, &Device::Cpu)?.to_dtype(other.dtype())
}

fn numbers(values: &Tensor) -> Result<Vec<f64>> {
    values.to_dtype(DType::F64)?.to_vec1()
}

fn scalar(value: &Tensor) -> Result<f64> {
    value.to_dtype(DType::F64)?.to_scalar()
}
