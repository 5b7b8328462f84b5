//! How often a model agrees with people on comparisons it has not learnt.

use candle_core::Result;
use serde::{Deserialize, Serialize};

use crate::collate::{Item, Layout, Sample, batches, pack};
use crate::parameters::read;
use crate::statistics::Proportion;
use crate::train::{Head, Pass, Policy, sums};

/// Rows computed at once.
pub const BUDGET: usize = 4096;

/// Agreement with held-out comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Comparisons in which the chosen answer has the higher reward; those with equal ones count as lost.
    pub accuracy: Proportion,
    /// Mean difference of the rewards.
    pub margin: f64,
    /// Middle difference.
    pub median_margin: f64,
}

/// Rewards of chosen minus rejected, per comparison: DPO's implicit ones, β (Δ log π − Δ log π_ref) (Rafailov et al. 2023, eq. 5).
pub fn implicit_margins(model: &dyn Policy, samples: &[Sample], beta: f64, mut watch: impl FnMut(usize)) -> Result<Vec<f64>> {
    let layout = Layout { share_prompt: true, last_row: false };
    let items: Vec<Item<'_>> = samples.iter().enumerate().map(|(index, sample)| Item::of(index, sample)).collect();
    let policy = sums(model, &items, layout, BUDGET, Pass::EVALUATE, &mut watch)?;
    let reference = sums(model, &items, layout, BUDGET, Pass::REFERENCE, |done| watch(items.len() + done))?;
    let pairs = policy.chunks_exact(2).zip(reference.chunks_exact(2));
    Ok(pairs.map(|(now, before)| beta * (f64::from(now[0] - now[1]) - f64::from(before[0] - before[1]))).collect())
}

/// The same by a reward model.
pub fn margins(model: &dyn Policy, head: &Head, samples: &[Sample], mut watch: impl FnMut(usize)) -> Result<Vec<f64>> {
    let layout = Layout { share_prompt: true, last_row: true };
    let items: Vec<Item<'_>> = samples.iter().enumerate().map(|(index, sample)| Item::of(index, sample)).collect();
    let sizes: Vec<usize> = items.iter().map(|item| item.rows(layout)).collect();
    let (mut found, mut done) = (vec![0.0; samples.len()], 0);
    for batch in batches(&sizes, BUDGET) {
        let micro = pack(batch.iter().map(|place| items[*place]), layout);
        let rows: Vec<u32> = micro.spans.iter().map(|span| span.last_row).collect();
        let rewards = head.rewards(&model.hidden(&micro.batch, &rows, Pass::EVALUATE)?)?;
        read(&rewards, |rewards| {
            for (span, reward) in micro.spans.iter().zip(rewards) {
                found[span.sample] += if span.completion == 0 { f64::from(*reward) } else { -f64::from(*reward) };
            }
        })?;
        done += 2 * batch.len();
        watch(done);
    }
    Ok(found)
}

/// Sums up margins. None without any.
pub fn agreement(margins: &[f64]) -> Option<Agreement> {
    let won = margins.iter().filter(|margin| **margin > 0.0).count() as u64;
    let accuracy = Proportion::new(won, margins.len() as u64)?;
    let mut sorted = margins.to_vec();
    sorted.sort_by(f64::total_cmp);
    let margin = margins.iter().sum::<f64>() / margins.len() as f64;
    Some(Agreement { accuracy, margin, median_margin: crate::statistics::quantile(&sorted, 0.5)? })
}
