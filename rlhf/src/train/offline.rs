//! The trainers that learn from a dataset, as a source of batches and losses for the loop.

use std::path::Path;

use candle_core::Tensor;

use super::{
    TrainError, Trainer,
    checkpoint::hash,
    config::{Objective, TrainConfig},
    metrics::Metrics,
    objective::{Logs, Totals},
    policy::{Head, Pass, Policy},
    reference,
};
use crate::{
    collate::{Completion, Item, Layout, Micro, Plan, Sample, batches, pack, weights},
    loss::thumbs::reference_point,
    parameters::Parameter,
    random::Random,
};

/// Samples, with what was computed about them beforehand.
struct Part {
    samples: Vec<Sample>,
    /// Reference log-probability of each completion, in order; empty when none is needed or kept.
    reference: Vec<f32>,
    /// For KTO: each sample's prompt with another prompt's completion.
    mismatched: Vec<Mismatched>,
}

/// A prompt with an answer to something else: how far the policy has moved where nobody judged.
struct Mismatched {
    prompt: Vec<u32>,
    completion: Vec<Completion>,
    reference: f32,
}

/// What one forward pass computes, and what it counts for in its step.
pub struct OfflineBatch {
    micro: Micro,
    held_out: bool,
    totals: Totals,
    /// KTO's reference point.
    z: f64,
}

/// A dataset and what is minimised over it.
pub struct Offline {
    objective: Objective,
    train: Part,
    held_out: Part,
    plan: Plan,
    layout: Layout,
    budget: usize,
    head: Option<Head>,
    live_reference: bool,
    rater_share: f64,
    user_share: f64,
}

/// How far the work before the first step is: items done, of all.
pub type Prepare<'a> = &'a mut (dyn FnMut(usize, usize) + Send);

impl Offline {
    /// Weighs the samples, and computes reference log-probabilities where the method needs them or reads them from the folder `cache`.
    pub fn new(
        model: &dyn Policy,
        config: &TrainConfig,
        train: Vec<Sample>,
        held_out: Vec<Sample>,
        cache: Option<&Path>,
        watch: Prepare<'_>,
    ) -> Result<Self, TrainError> {
        Self::laid_out(true, model, config, train, held_out, cache, watch)
    }

    /// [`Offline::new`]; unless `share_prompt`, each prompt is computed once per completion, to measure what sharing is worth.
    pub fn laid_out(
        share_prompt: bool,
        model: &dyn Policy,
        config: &TrainConfig,
        mut train: Vec<Sample>,
        held_out: Vec<Sample>,
        cache: Option<&Path>,
        watch: Prepare<'_>,
    ) -> Result<Self, TrainError> {
        let objective = config.objective()?;
        if train.is_empty() {
            return Err(TrainError::Data(
                "no row of the dataset can be trained on; the reasons are listed with the rows that were left out".to_owned(),
            ));
        }
        let expected = if objective.compares() { 2 } else { 1 };
        if let Some(sample) = train.iter().chain(&held_out).find(|sample| sample.completions.len() != expected) {
            let found = sample.completions.len();
            return Err(TrainError::Data(format!("row {} has {found} answers, this method takes {expected}", sample.id)));
        }
        let mass: Vec<f64> = train.iter().map(|sample| objective.mass(sample)).collect();
        let weighed = weights(&train, &mass, &config.caps());
        if weighed.weights.iter().all(|weight| *weight == 0.0) {
            let text = "rater_weights and user_weights leave no row anything to count; give somebody's rows a weight above 0";
            return Err(TrainError::Data(text.to_owned()));
        }
        train.iter_mut().zip(&weighed.weights).for_each(|(sample, weight)| sample.weight = *weight);
        let head = match objective {
            Objective::Reward { .. } => Some(Head::new(model.width(), config.seed)?),
            _ => None,
        };
        let mut offline = Self {
            objective,
            plan: config.plan(train.len()),
            train: Part::new(train, objective, config),
            held_out: Part::new(held_out, objective, config),
            layout: Layout { share_prompt, last_row: matches!(objective, Objective::Reward { .. }) },
            budget: config.tokens_per_batch,
            head,
            live_reference: objective.needs_reference() && !config.precompute_ref_log_probs.unwrap_or(true),
            rater_share: weighed.rater_share,
            user_share: weighed.user_share,
        };
        if objective.needs_reference() && !offline.live_reference {
            let (layout, budget) = (offline.layout, offline.budget);
            let total = offline.train.items() + offline.held_out.items();
            let mut before = 0;
            for part in [&mut offline.train, &mut offline.held_out] {
                part.refer(model, layout, budget, cache, |done| watch(before + done, total))?;
                before += part.items();
            }
        }
        Ok(offline)
    }

    /// The largest share of the loss that one rater has, and one user.
    pub fn largest_shares(&self) -> (f64, f64) {
        (self.rater_share, self.user_share)
    }

    /// The head of a reward model.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// How many samples are trained on.
    pub fn samples(&self) -> usize {
        self.train.samples.len()
    }

    fn part(&self, held_out: bool) -> &Part {
        if held_out { &self.held_out } else { &self.train }
    }

    /// Batches of these samples, whose losses add up to the loss over all of them.
    fn batches(&self, model: &dyn Policy, held_out: bool, members: &[usize]) -> Result<Vec<OfflineBatch>, TrainError> {
        let part = self.part(held_out);
        let z = match self.objective {
            Objective::Kto { .. } => part.reference_point(model, members, self.layout, self.budget, self.live_reference)?,
            _ => 0.0,
        };
        let items: Vec<Item<'_>> = members.iter().map(|index| Item::of(*index, &part.samples[*index])).collect();
        let sizes: Vec<usize> = items.iter().map(|item| item.rows(self.layout)).collect();
        let tokens = members.iter().map(|index| self.objective.imitated(&part.samples[*index])).sum::<usize>();
        let totals = Totals { rows: members.len() as f64, tokens: tokens as f64 };
        let batch = |batch: Vec<usize>| {
            let micro = pack(batch.iter().map(|place| items[*place]), self.layout);
            OfflineBatch { micro, held_out, totals, z }
        };
        Ok(batches(&sizes, self.budget).into_iter().map(batch).collect())
    }
}

impl Part {
    fn new(samples: Vec<Sample>, objective: Objective, config: &TrainConfig) -> Self {
        let mismatched = match objective {
            Objective::Kto { .. } => mismatch(&samples, config),
            _ => Vec::new(),
        };
        Self { samples, reference: Vec::new(), mismatched }
    }

    fn items(&self) -> usize {
        self.samples.len() + self.mismatched.len()
    }

    fn refer(
        &mut self,
        model: &dyn Policy,
        layout: Layout,
        budget: usize,
        cache: Option<&Path>,
        mut watch: impl FnMut(usize),
    ) -> Result<(), TrainError> {
        let samples = self.samples.iter().enumerate().map(|(index, sample)| Item::of(index, sample));
        let others = self.mismatched.iter().map(Mismatched::item);
        let items: Vec<Item<'_>> = samples.chain(others).collect();
        if items.is_empty() {
            return Ok(());
        }
        let mut found = reference::kept(model, &items, layout, budget, cache, &mut watch)?;
        let others = found.split_off(found.len() - self.mismatched.len());
        self.mismatched.iter_mut().zip(others).for_each(|(mismatched, sum)| mismatched.reference = sum);
        self.reference = found;
        Ok(())
    }

    /// KTO's z over these samples: the policy's log-ratio of mismatched completions, without gradient.
    fn reference_point(
        &self,
        model: &dyn Policy,
        members: &[usize],
        layout: Layout,
        budget: usize,
        live: bool,
    ) -> Result<f64, TrainError> {
        if self.mismatched.is_empty() {
            return Ok(0.0);
        }
        let items: Vec<Item<'_>> = members.iter().map(|index| self.mismatched[*index].item()).collect();
        let policy = reference::sums(model, &items, layout, budget, Pass::EVALUATE, |_| {})?;
        let before = if live {
            reference::sums(model, &items, layout, budget, Pass::REFERENCE, |_| {})?
        } else {
            members.iter().map(|index| self.mismatched[*index].reference).collect()
        };
        let ratios: Vec<f64> = policy.iter().zip(before).map(|(now, before)| f64::from(*now) - f64::from(before)).collect();
        Ok(reference_point(&ratios))
    }

    /// Reference log-probabilities of the batch's completions.
    fn reference_of(&self, micro: &Micro) -> Vec<f32> {
        let each = self.samples.first().map_or(1, |sample| sample.completions.len());
        micro.spans.iter().map(|span| self.reference[span.sample * each + span.completion]).collect()
    }
}

impl Mismatched {
    fn item(&self) -> Item<'_> {
        Item { sample: 0, prompt: &self.prompt, completions: &self.completion }
    }
}

/// Gives each sample the completion of another prompt, always the same one, so that its reference can be kept: along a circle drawn
/// from the seed, the next with another prompt. Nothing where all prompts are one.
fn mismatch(samples: &[Sample], config: &TrainConfig) -> Vec<Mismatched> {
    let mut circle: Vec<usize> = (0..samples.len()).collect();
    Random::new(config.seed).shuffle(&mut circle);
    let mut places = vec![0; circle.len()];
    circle.iter().enumerate().for_each(|(place, sample)| places[*sample] = place);
    let found: Option<Vec<Mismatched>> = samples
        .iter()
        .enumerate()
        .map(|(index, sample)| {
            let others = (1..circle.len()).map(|step| &samples[circle[(places[index] + step) % circle.len()]]);
            let other = others.into_iter().find(|other| other.prompt != sample.prompt)?;
            let mut pair = Sample { prompt: sample.prompt.clone(), completions: other.completions.clone(), ..Sample::default() };
            if let Some(max_length) = config.max_length {
                pair.cut(max_length, config.truncation_mode);
            }
            Some(Mismatched { prompt: pair.prompt, completion: pair.completions, reference: 0.0 })
        })
        .collect();
    found.unwrap_or_default()
}

impl Trainer for Offline {
    type Batch = OfflineBatch;

    fn identity(&self) -> String {
        let mut bytes = Vec::new();
        for part in [&self.train, &self.held_out] {
            bytes.extend_from_slice(&(part.samples.len() as u64).to_le_bytes());
            for (index, sample) in part.samples.iter().enumerate() {
                reference::describe(&Item::of(index, sample), &mut bytes);
                bytes.extend_from_slice(&sample.weight.to_bits().to_le_bytes());
                bytes.push(u8::from(sample.good));
            }
        }
        hash(&bytes)
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.head.iter().map(|head| head.weight.clone()).collect()
    }

    fn steps(&self) -> u64 {
        self.plan.steps()
    }

    fn steps_per_epoch(&self) -> u64 {
        self.plan.steps_per_epoch()
    }

    fn step(&mut self, step: u64, model: &dyn Policy) -> Result<Vec<OfflineBatch>, TrainError> {
        let members = self.plan.step(step);
        self.batches(model, false, &members)
    }

    fn held_out(&mut self, model: &dyn Policy) -> Result<Vec<OfflineBatch>, TrainError> {
        let members: Vec<usize> = (0..self.held_out.samples.len()).collect();
        if members.is_empty() { Ok(Vec::new()) } else { self.batches(model, true, &members) }
    }

    fn tokens(batch: &OfflineBatch) -> u64 {
        batch.micro.batch.rows() as u64
    }

    fn loss(&self, batch: &OfflineBatch, model: &dyn Policy, pass: Pass, metrics: &mut Metrics) -> candle_core::Result<Tensor> {
        let part = self.part(batch.held_out);
        let samples: Vec<&Sample> = batch.micro.spans.iter().map(|span| &part.samples[span.sample]).collect();
        let labels: Vec<usize> = batch.micro.spans.iter().map(|span| span.labels.len()).collect();
        let (policy, reference) = if let Some(head) = &self.head {
            let rows: Vec<u32> = batch.micro.spans.iter().map(|span| span.last_row).collect();
            (head.rewards(&model.hidden(&batch.micro.batch, &rows, pass)?)?, None)
        } else {
            let policy = reference::completion_sums(model, &batch.micro, pass)?;
            let reference = if self.live_reference {
                Some(reference::completion_sums(model, &batch.micro, Pass::REFERENCE)?.detach())
            } else if self.objective.needs_reference() {
                Some(Tensor::new(part.reference_of(&batch.micro), policy.device())?)
            } else {
                None
            };
            (policy, reference)
        };
        let logs = Logs { policy: &policy, reference: reference.as_ref(), labels: &labels, samples: &samples, z: batch.z };
        self.objective.loss(&logs, batch.totals, metrics)
    }
}
