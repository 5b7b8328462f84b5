//! Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), in torch's order of operations, so that curves can be
//! laid over torch's.

use candle_core::{Result, backprop::GradStore};
use serde::{Deserialize, Serialize};

use crate::parameters::{Parameter, Parameters, read};

/// Numbers that one thread updates at a time; fewer are not worth a thread.
const CHUNK: usize = 1 << 16;

/// The rule's constants, under transformers' names and with its defaults.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub adam_beta1: f64,
    /// Decay of the mean of squared gradients.
    pub adam_beta2: f64,
    /// Added to the denominator.
    pub adam_epsilon: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { adam_beta1: 0.9, adam_beta2: 0.999, adam_epsilon: 1e-8 }
    }
}

/// What parameters of one kind have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Factor of the learning rate.
    pub rate: f64,
    /// Share of a parameter that a step at learning rate 1 takes away.
    pub weight_decay: f64,
}

/// A parameter with its moments and the gradient gathered for the next step.
pub(super) struct Slot {
    pub(super) parameter: Parameter,
    group: Group,
    pub(super) steps: u64,
    pub(super) mean: Vec<f32>,
    pub(super) square: Vec<f32>,
    gradient: Vec<f32>,
    /// Whether anything was added to the gradient; a parameter that took no part in a step is left alone, as torch does.
    touched: bool,
}

/// AdamW over parameters, with moments in f32.
pub struct Optimizer {
    rule: AdamW,
    pub(super) slots: Vec<Slot>,
    pub(super) threads: usize,
}

impl Optimizer {
    /// For `parameters`, each in the group that `group` says.
    pub fn new(parameters: &Parameters, rule: AdamW, group: impl Fn(&Parameter) -> Group) -> Self {
        let slot = |parameter: &Parameter| {
            let zeros = || vec![0.0; parameter.var.elem_count()];
            let (mean, square, gradient) = (zeros(), zeros(), zeros());
            Slot { parameter: parameter.clone(), group: group(parameter), steps: 0, mean, square, gradient, touched: false }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { rule, slots: parameters.iter().map(slot).collect(), threads }
    }

    /// Adds the gradients of a batch to those gathered for the next step.
    pub fn accumulate(&mut self, gradients: &GradStore) -> Result<()> {
        for slot in &mut self.slots {
            if let Some(gradient) = gradients.get(slot.parameter.var.as_tensor()) {
                read(gradient, |values| slot.gradient.iter_mut().zip(values).for_each(|(sum, value)| *sum += value))?;
                slot.touched = true;
            }
        }
        Ok(())
    }

    /// Length of the gathered gradient over all parameters, in f64, summed in a fixed order.
    pub fn gradient_norm(&self) -> f64 {
        let squares = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        self.slots.iter().map(|slot| slot.gradient.chunks(4096).map(squares).sum::<f64>()).sum::<f64>().sqrt()
    }

    /// Shortens the gathered gradient to `max_norm` where it is longer (`torch.nn.utils.clip_grad_norm_`), moves the parameters, and
    /// begins a new gradient. Returns the length before.
    pub fn step(&mut self, learning_rate: f64, max_norm: Option<f64>) -> Result<f64> {
        let norm = self.gradient_norm();
        let clip = max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0)) as f32;
        for slot in self.slots.iter_mut().filter(|slot| slot.touched) {
            slot.steps += 1;
            let Slot { parameter, group, steps, mean, square, gradient, .. } = slot;
            let update = Update::new(&self.rule, *group, learning_rate, *steps, clip);
            parameter.change(|values| in_parallel(self.threads, update, values, mean, square, gradient))?;
        }
        self.discard();
        Ok(norm)
    }

    /// Forgets the gathered gradient.
    pub fn discard(&mut self) {
        for slot in self.slots.iter_mut().filter(|slot| slot.touched) {
            slot.gradient.fill(0.0);
            slot.touched = false;
        }
    }
}

/// One step's constants, rounded to f32 where torch rounds them.
#[derive(Clone, Copy)]
struct Update {
    clip: f32,
    shrink: f32,
    mean_weight: f32,
    square_decay: f32,
    square_weight: f32,
    root: f32,
    epsilon: f32,
    rate: f32,
}

impl Update {
    fn new(rule: &AdamW, group: Group, learning_rate: f64, steps: u64, clip: f32) -> Self {
        let rate = learning_rate * group.rate;
        let correction = |beta: f64| 1.0 - beta.powf(steps as f64);
        Self {
            clip,
            shrink: (1.0 - rate * group.weight_decay) as f32,
            mean_weight: (1.0 - rule.adam_beta1) as f32,
            square_decay: rule.adam_beta2 as f32,
            square_weight: (1.0 - rule.adam_beta2) as f32,
            root: correction(rule.adam_beta2).sqrt() as f32,
            epsilon: rule.adam_epsilon as f32,
            rate: (rate / correction(rule.adam_beta1)) as f32,
        }
    }

    /// One pass over numbers that lie side by side.
    fn apply(self, values: &mut [f32], mean: &mut [f32], square: &mut [f32], gradient: &[f32]) {
        for (((value, mean), square), gradient) in values.iter_mut().zip(mean).zip(square).zip(gradient) {
            let gradient = gradient * self.clip;
            *mean += self.mean_weight * (gradient - *mean);
            *square = *square * self.square_decay + self.square_weight * gradient * gradient;
            *value = *value * self.shrink - self.rate * (*mean / (square.sqrt() / self.root + self.epsilon));
        }
    }
}

/// Every number is updated by itself, so the result does not depend on the threads.
fn in_parallel(threads: usize, update: Update, values: &mut [f32], mean: &mut [f32], square: &mut [f32], gradient: &[f32]) {
    let chunk = values.len().div_ceil(threads.max(1)).max(CHUNK);
    if values.len() <= chunk {
        return update.apply(values, mean, square, gradient);
    }
    std::thread::scope(|scope| {
        let parts =
            values.chunks_mut(chunk).zip(mean.chunks_mut(chunk)).zip(square.chunks_mut(chunk)).zip(gradient.chunks(chunk));
        for (((values, mean), square), gradient) in parts {
            scope.spawn(move || update.apply(values, mean, square, gradient));
        }
    });
}
