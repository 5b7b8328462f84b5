//! The trainers that learn from answers which the model samples while it is trained: RLOO, GRPO and PPO.
//!
//! A turn asks prompts, judges the answers and makes advantages of the rewards; one or more steps learn from it. Prompts, draws and
//! the order of mini-batches are functions of the seed, the turn's number and the parameters, and the engine gives the same tokens
//! whatever else it computes. So a training that is killed between two turns samples the same answers again; within a turn, whose
//! first steps have changed the parameters, the answers are part of the checkpoint.

mod answers;
mod estimate;
mod measure;
mod objective;
mod prompt;
mod sampler;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::{
    answers::{Group, Rollout, Turn},
    objective::{Seen, Totals},
};
use super::{
    TrainConfig, TrainError, Trainer,
    checkpoint::hash,
    config::{Advantages, Algorithm, Reinforcement},
    metrics::Metrics,
    policy::{Head, Pass, Policy},
};
use crate::{
    batch::Packed,
    collate::{Item, Layout, Micro, Plan, batches, pack},
    loss::advantage::AdaptiveKl,
    parameters::{Parameter, read},
    random::{Random, mix},
    reward::{Answer, Rewards},
};

pub use prompt::{Prompt, Question, encode, questions, read_questions};
pub use sampler::{ADAPTERS, Ask, Drawn, EngineSampler, Sampler, sampling};

/// Streams of the seed: draws while training, draws of evaluations, the order of mini-batches.
const TRAINING: u64 = 0x7261_6977;
const EVALUATION: u64 = 0x6c61_7665;
const ORDER: u64 = 0x7264_726f;
/// All of a token's labels matter, and none behind the last.
const LAYOUT: Layout = Layout { share_prompt: true, last_row: false };

/// What one forward pass computes, and what it counts for in its step.
pub struct OnlineBatch {
    micro: Micro,
    /// The answer of each span: its group, and its place there.
    places: Vec<(usize, usize)>,
    totals: Totals,
}

/// Prompts, rewards, and what is minimised over the answers.
pub struct Online<'a> {
    told: Reinforcement,
    prompts: Vec<Prompt>,
    held_out: Vec<Prompt>,
    rewards: Rewards,
    sampler: Box<dyn Sampler + 'a>,
    plan: Plan,
    max_steps: Option<u64>,
    seed: u64,
    budget: usize,
    head: Option<Head>,
    price: AdaptiveKl,
    turn: Option<Turn>,
    /// The step after the last that was asked for.
    next: u64,
    measured: Metrics,
}

/// What a checkpoint holds of it.
#[derive(Serialize, Deserialize)]
struct State {
    /// Price of divergence, as bits.
    price: u64,
    next: u64,
    /// Answers that there is more to learn from.
    turn: Option<Turn>,
}

impl<'a> Online<'a> {
    /// Over prompts; `rewards` are those of the configuration, and `sampler` samples from `model`.
    pub fn new(
        model: &dyn Policy,
        config: &TrainConfig,
        prompts: Vec<Prompt>,
        held_out: Vec<Prompt>,
        rewards: Rewards,
        sampler: impl Sampler + 'a,
    ) -> Result<Self, TrainError> {
        let told = config.reinforcement()?;
        if prompts.is_empty() {
            return Err(TrainError::Data(
                "there is no prompt to ask; the reasons are listed with those that were left out".to_owned(),
            ));
        }
        let (head, price) = match told.advantages {
            Advantages::Estimated { kl, .. } => (Some(Head::zero("value.weight", model.width())?), kl),
            _ => (None, AdaptiveKl { coefficient: 0.0, target: f64::INFINITY, horizon: f64::INFINITY }),
        };
        let plan = Plan { batch: told.prompts(), max_steps: None, ..config.plan(prompts.len()) };
        Ok(Self {
            told,
            prompts,
            held_out,
            rewards,
            sampler: Box::new(sampler),
            plan,
            max_steps: u64::try_from(config.max_steps).ok(),
            seed: config.seed,
            budget: config.tokens_per_batch,
            head,
            price,
            turn: None,
            next: 0,
            measured: Metrics::default(),
        })
    }

    /// Whether log-probabilities before the first step are looked at by themselves: where later steps compare with them, and where
    /// the reward pays for divergence.
    fn wants_old(&self) -> bool {
        self.told.uses() > 1 || matches!(self.told.advantages, Advantages::LeaveOneOut { .. } | Advantages::Estimated { .. })
    }

    fn wants_reference(&self) -> bool {
        match (self.told.algorithm, self.told.advantages) {
            (Algorithm::Grpo { beta, .. }, _) | (_, Advantages::LeaveOneOut { beta, .. }) => beta > 0.0,
            _ => true,
        }
    }

    /// Samples answers to these prompts and judges them. Returns, by prompt, the answers and their rewards.
    fn ask(&mut self, held_out: bool, members: &[usize], answers: usize, seed: u64) -> Result<Judged, TrainError> {
        let prompts: Vec<&Prompt> =
            members.iter().map(|member| if held_out { &self.held_out[*member] } else { &self.prompts[*member] }).collect();
        // By place in the turn: a prompt that comes twice gets other answers.
        let asks: Vec<Ask<'_>> = prompts
            .iter()
            .enumerate()
            .map(|(place, prompt)| Ask { prompt: &prompt.tokens, answers, seed: mix(seed ^ place as u64) })
            .collect();
        let drawn = self.sampler.sample(&asks, &self.told.draw)?;
        let judged: Vec<Answer<'_>> = prompts
            .iter()
            .zip(&drawn)
            .flat_map(|(prompt, drawn)| drawn.iter().map(move |drawn| (prompt, drawn)))
            .map(|(prompt, drawn)| Answer {
                prompt: &prompt.question.messages,
                columns: &prompt.question.columns,
                text: &drawn.text,
                tokens: drawn.tokens.len(),
                ended: drawn.ended,
            })
            .collect();
        let scores = self.rewards.score(&judged)?;
        let mut totals = scores.total.iter().copied();
        let rewards: Vec<Vec<f64>> = drawn.iter().map(|drawn| totals.by_ref().take(drawn.len()).collect()).collect();
        measure::completions(drawn.iter().flatten(), &mut self.measured);
        measure::rewards(&scores, &rewards, &mut self.measured);
        Ok(Judged { drawn, rewards })
    }

    /// Asks the prompts of a turn, and works out what its steps need.
    fn take_turn(&mut self, number: u64, model: &dyn Policy) -> Result<Turn, TrainError> {
        let members = self.plan.step(number);
        let seed = mix(mix(self.seed ^ TRAINING) ^ number);
        let Judged { drawn, rewards } = self.ask(false, &members, self.told.group, seed)?;
        let rollout =
            |drawn: Drawn| Rollout { tokens: drawn.tokens, sampled: drawn.log_probs, ended: drawn.ended, ..Rollout::default() };
        let group = |(prompt, drawn): (usize, Vec<Drawn>)| Group { prompt, answers: drawn.into_iter().map(rollout).collect() };
        let groups = members.into_iter().zip(drawn).map(group).collect();
        let mut turn = Turn { number, groups };
        if self.wants_old() {
            self.look(model, &mut turn, Pass::EVALUATE, |answer, list| answer.old = list)?;
        }
        if self.wants_reference() {
            self.look(model, &mut turn, Pass::REFERENCE, |answer, list| answer.reference = list)?;
        }
        estimate::estimate(&mut turn.groups, &rewards, &self.told.advantages, &mut self.price, &mut self.measured);
        Ok(turn)
    }

    /// Log-probabilities of all answers, without gradient; with a head and the adapter, values beside them.
    fn look(&self, model: &dyn Policy, turn: &mut Turn, pass: Pass, put: fn(&mut Rollout, Vec<f32>)) -> Result<(), TrainError> {
        let pass = Pass { temperature: self.told.draw.temperature, ..pass };
        for batch in self.batches(turn, &turn.places(), Totals::default()) {
            let (log_probs, values) = self.forward(model, &batch.micro.batch, pass, pass.adapter)?;
            let mut lists = vec![(log_probs.detach(), put)];
            if let Some(values) = values {
                lists.push((values.detach(), |answer: &mut Rollout, list| answer.values = list));
            }
            for (tensor, put) in lists {
                read(&tensor, |numbers| {
                    for (span, (group, answer)) in batch.micro.spans.iter().zip(&batch.places) {
                        put(&mut turn.groups[*group].answers[*answer], numbers[span.labels.clone()].to_vec());
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Log-probabilities of the labels, and estimates of value at the rows that predict them.
    fn forward(
        &self,
        model: &dyn Policy,
        batch: &Packed,
        pass: Pass,
        values: bool,
    ) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        let Some(head) = self.head.as_ref().filter(|_| values) else { return Ok((model.log_probs(batch, pass)?, None)) };
        let rows: Vec<u32> = batch.labels.iter().map(|label| label.row).collect();
        let (log_probs, hidden) = model.log_probs_and_hidden(batch, &rows, pass)?;
        Ok((log_probs, Some(head.rewards(&hidden)?)))
    }

    /// Batches of these answers; those to one prompt share it, as far as a batch has room.
    fn batches(&self, turn: &Turn, places: &[(usize, usize)], totals: Totals) -> Vec<OnlineBatch> {
        // Answers to one prompt, as many as fit a batch.
        let mut bundles: Vec<(usize, Vec<usize>, usize)> = Vec::new();
        for (group, answer) in places {
            let prompt = self.prompts[turn.groups[*group].prompt].tokens.len();
            let rows = turn.groups[*group].answers[*answer].tokens.len();
            match bundles.last_mut() {
                Some((last, members, used)) if last == group && *used + rows <= self.budget => {
                    members.push(*answer);
                    *used += rows;
                }
                _ => bundles.push((*group, vec![*answer], prompt + rows)),
            }
        }
        let sizes: Vec<usize> = bundles.iter().map(|(_, _, rows)| *rows).collect();
        let batch = |members: Vec<usize>| {
            let completions: Vec<_> =
                members.iter().map(|bundle| turn.groups[bundles[*bundle].0].completions(&bundles[*bundle].1)).collect();
            let items = members.iter().zip(&completions).map(|(bundle, completions)| {
                let prompt = &self.prompts[turn.groups[bundles[*bundle].0].prompt].tokens;
                Item { sample: *bundle, prompt, completions }
            });
            let micro = pack(items, LAYOUT);
            let place = |span: &crate::collate::Span| (bundles[span.sample].0, bundles[span.sample].1[span.completion]);
            let places = micro.spans.iter().map(place).collect();
            OnlineBatch { micro, places, totals }
        };
        batches(&sizes, self.budget).into_iter().map(batch).collect()
    }

    /// The answers of one step of a turn.
    fn part(&self, turn: &Turn, within: u64) -> Vec<(usize, usize)> {
        let mut places = turn.places();
        let parts = self.told.mini_batches;
        if parts == 1 {
            return places;
        }
        let (iteration, part) = (within / parts as u64, within as usize % parts);
        Random::new(mix(mix(mix(self.seed ^ ORDER) ^ turn.number) ^ iteration)).shuffle(&mut places);
        let (from, to) = (places.len() * part / parts, places.len() * (part + 1) / parts);
        let mut places = places[from..to].to_vec();
        // Answers to one prompt side by side.
        places.sort_unstable();
        places
    }
}

/// Answers by prompt, and what they are worth.
struct Judged {
    drawn: Vec<Vec<Drawn>>,
    rewards: Vec<Vec<f64>>,
}

impl Trainer for Online<'_> {
    type Batch = OnlineBatch;

    fn identity(&self) -> String {
        let mut bytes = Vec::new();
        for prompts in [&self.prompts, &self.held_out] {
            bytes.extend_from_slice(&(prompts.len() as u64).to_le_bytes());
            for Prompt { question, tokens } in prompts {
                bytes.extend_from_slice(&(tokens.len() as u64).to_le_bytes());
                tokens.iter().for_each(|token| bytes.extend_from_slice(&token.to_le_bytes()));
                // What rewards may look at.
                let columns = Value::Object(question.columns.clone()).to_string();
                bytes.extend_from_slice(&(columns.len() as u64).to_le_bytes());
                bytes.extend_from_slice(columns.as_bytes());
            }
        }
        hash(&bytes)
    }

    fn judges(&self) -> BTreeMap<String, String> {
        self.rewards.digests()
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.head.iter().map(|head| head.weight.clone()).collect()
    }

    fn steps(&self) -> u64 {
        self.max_steps.unwrap_or(self.plan.steps().saturating_mul(self.told.uses()))
    }

    fn steps_per_epoch(&self) -> u64 {
        self.plan.steps_per_epoch().saturating_mul(self.told.uses())
    }

    fn step(&mut self, step: u64, model: &dyn Policy) -> Result<Vec<OnlineBatch>, TrainError> {
        let (number, within) = (step / self.told.uses(), step % self.told.uses());
        let turn = match self.turn.take().filter(|turn| turn.number == number) {
            Some(turn) => turn,
            None => self.take_turn(number, model)?,
        };
        let mut places = self.part(&turn, within);
        let answers = places.len().max(1) as f64;
        places.retain(|(group, answer)| !self.told.skip_truncated || turn.groups[*group].answers[*answer].ended);
        let tokens = places.iter().map(|(group, answer)| turn.groups[*group].answers[*answer].tokens.len()).sum::<usize>();
        // An answer that is skipped counts among the answers, with nothing to learn, and not among the tokens: as in TRL.
        let totals = Totals { answers, tokens: tokens.max(1) as f64 };
        // Where all answers to a prompt are worth the same, nothing pulls at them but divergence.
        if matches!(self.told.algorithm, Algorithm::Grpo { beta, .. } if beta == 0.0) {
            places.retain(|(group, answer)| !turn.groups[*group].answers[*answer].is_indifferent());
        }
        let batches = self.batches(&turn, &places, totals);
        self.turn = Some(turn);
        self.next = step + 1;
        Ok(batches)
    }

    fn held_out(&mut self, _model: &dyn Policy) -> Result<Vec<OnlineBatch>, TrainError> {
        let members: Vec<usize> = (0..self.held_out.len()).collect();
        if !members.is_empty() {
            // What the step measured was asked for before; the draws are the same in every evaluation.
            self.ask(true, &members, self.told.evaluated, mix(self.seed ^ EVALUATION))?;
        }
        Ok(Vec::new())
    }

    fn tokens(batch: &OnlineBatch) -> u64 {
        batch.micro.batch.rows() as u64
    }

    fn loss(&self, batch: &OnlineBatch, model: &dyn Policy, pass: Pass, metrics: &mut Metrics) -> candle_core::Result<Tensor> {
        let Some(turn) = &self.turn else { candle_core::bail!("no answers were sampled") };
        let pass = Pass { temperature: self.told.draw.temperature, ..pass };
        let (log_probs, values) = self.forward(model, &batch.micro.batch, pass, true)?;
        let answers: Vec<&Rollout> = batch.places.iter().map(|(group, answer)| &turn.groups[*group].answers[*answer]).collect();
        let seen = Seen { log_probs: &log_probs, values: values.as_ref(), answers: &answers };
        objective::loss(&self.told, &seen, batch.totals, metrics)
    }

    fn measured(&mut self) -> Metrics {
        std::mem::take(&mut self.measured)
    }

    fn state(&self) -> Value {
        let goes_on = !self.next.is_multiple_of(self.told.uses());
        let turn = self.turn.as_ref().filter(|_| goes_on).cloned();
        // Texts and numbers: always JSON.
        serde_json::to_value(State { price: self.price.coefficient.to_bits(), next: self.next, turn }).unwrap_or_default()
    }

    fn restore(&mut self, state: &Value) -> Result<(), TrainError> {
        let state = State::deserialize(state).map_err(|error| TrainError::Checkpoint(format!("the trainer's state: {error}")))?;
        let known = |turn: &Turn| turn.groups.iter().all(|group| group.prompt < self.prompts.len());
        if !state.turn.as_ref().is_none_or(known) {
            return Err(TrainError::Checkpoint("the trainer's state: it knows other prompts".to_owned()));
        }
        self.price.coefficient = f64::from_bits(state.price);
        (self.turn, self.next) = (state.turn, state.next);
        Ok(())
    }
}
