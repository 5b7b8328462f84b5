//! The loop.

use std::{collections::BTreeMap, path::Path, time::Instant};

use candle_core::Tensor;
use serde_json::Value;

use super::{
    TrainConfig, TrainError,
    checkpoint::{Best, Checkpoint, Folder, Identity, State, hash},
    metrics::{Log, Metrics, line},
    policy::{Pass, Policy},
    report::report,
    watch::{Control, Progress, Stage, remaining},
};
use crate::{
    durable,
    optimizer::{Group, Optimizer, Schedule},
    parameters::{Parameter, Parameters},
    random::mix,
    reward::Judge,
    tensors::{self, Lists},
};

/// Backward walks the graph by recursion.
pub(crate) const STACK: usize = 256 << 20;
pub(crate) const LOG: &str = "metrics.jsonl";
const REPORT: &str = "report.html";

/// Where batches come from, and what is minimised over them. Those that learn from a dataset are [`super::Offline`]; one that samples
/// from the model is another.
pub trait Trainer: Send {
    /// What one forward pass computes.
    type Batch;

    /// Names the data by its content.
    fn identity(&self) -> String;

    /// Contents that judge its answers, by the names of the functions that need them.
    fn judges(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// What is trained beside the model's own parameters.
    fn parameters(&self) -> Vec<Parameter>;

    /// Steps of the training.
    fn steps(&self) -> u64;

    /// Steps of an epoch.
    fn steps_per_epoch(&self) -> u64;

    /// The batches of step `step`, the first being 0. Their losses add up to the step's.
    fn step(&mut self, step: u64, model: &dyn Policy) -> Result<Vec<Self::Batch>, TrainError>;

    /// The batches of an evaluation; none without held-out rows.
    fn held_out(&mut self, model: &dyn Policy) -> Result<Vec<Self::Batch>, TrainError>;

    /// Tokens that a batch computes.
    fn tokens(batch: &Self::Batch) -> u64;

    /// A batch's part of the loss, a scalar; adds what else is measured.
    fn loss(&self, batch: &Self::Batch, model: &dyn Policy, pass: Pass, metrics: &mut Metrics) -> candle_core::Result<Tensor>;

    /// What was measured since it was last asked, beside the losses.
    fn measured(&mut self) -> Metrics {
        Metrics::default()
    }

    /// What it keeps from step to step and needs after a restart.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Goes on from what [`Trainer::state`] gave.
    fn restore(&mut self, _state: &Value) -> Result<(), TrainError> {
        Ok(())
    }
}

/// Why a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps were taken.
    Finished,
    /// Nothing got better for `early_stopping_patience` evaluations.
    Early,
    /// The listener wanted it; the same training can go on.
    Stopped,
}

/// What came of a training. The model's parameters are those of the last step, or of the best one where the configuration wants it.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Why it ended.
    pub ending: Ending,
    /// Steps taken.
    pub steps: u64,
    /// Tokens computed.
    pub tokens: u64,
    /// The step of the best evaluation, and its metric.
    pub best: Option<(u64, f64)>,
}

/// Trains `model` in `folder`, from the last checkpoint there if there is one. `watch` hears of every step and every evaluation.
///
/// Runs on a thread of its own with a large stack.
pub fn train<T: Trainer>(
    model: &dyn Policy,
    trainer: &mut T,
    config: &TrainConfig,
    folder: &Path,
    watch: &mut (dyn FnMut(&Progress<'_>) -> Control + Send),
) -> Result<Outcome, TrainError> {
    std::thread::scope(|scope| {
        let own = std::thread::Builder::new().name("train".to_owned()).stack_size(STACK);
        let thread = own.spawn_scoped(scope, move || run(model, trainer, config, folder, watch));
        thread.map_err(TrainError::io(folder))?.join().map_err(|_| TrainError::Thread)?
    })
}

fn run<T: Trainer>(
    model: &dyn Policy,
    trainer: &mut T,
    config: &TrainConfig,
    folder: &Path,
    watch: &mut (dyn FnMut(&Progress<'_>) -> Control + Send),
) -> Result<Outcome, TrainError> {
    let mut run = Run::open(model, trainer, config, folder)?;
    let mut listener = Listener { began: Instant::now(), from: run.state.step, watch };
    let mut wanted = Control::Continue;

    while run.state.step < run.steps && !run.state.ended_early && wanted == Control::Continue {
        let step = run.state.step;
        let mut metrics = Metrics::default();
        let mut loss = 0.0;
        for (index, batch) in trainer.step(step, model)?.iter().enumerate() {
            let pass = Pass { dropout: config.dropout().then(|| seed(config.seed, step, index)), ..Pass::TRAIN };
            let part = trainer.loss(batch, model, pass, &mut metrics)?;
            loss += f64::from(part.to_scalar::<f32>()?);
            run.optimizer.accumulate(&part.backward()?)?;
            run.state.tokens += T::tokens(batch);
        }
        metrics.merge(&trainer.measured());
        run.check_finite(loss)?;
        let rate = config.learning_rate() * run.schedule.factor(step);
        let norm = run.optimizer.step(rate, Some(config.max_grad_norm).filter(|max| *max > 0.0))?;
        run.state.step += 1;

        metrics.add("loss", loss, 1.0);
        run.window.merge(&metrics);
        let last = [("grad_norm", norm), ("learning_rate", rate), ("num_tokens", run.state.tokens as f64)];
        if run.due(config.logging_steps) {
            run.log(&last)?;
        }
        wanted = listener.tell(&run, Stage::Training, with(metrics.means(), &last));

        if run.due(config.eval_steps.unwrap_or(trainer.steps_per_epoch())) {
            let batches = trainer.held_out(model)?;
            let measured = trainer.measured();
            if !batches.is_empty() || measured != Metrics::default() {
                let found = evaluate(trainer, model, &batches, measured)?;
                let better = run.judge(config, &found)?;
                // Before it is kept: what a kill in between takes away is made and told again, and what is kept was told.
                if listener.tell(&run, Stage::Evaluating, found) == Control::Stop {
                    wanted = Control::Stop;
                }
                if better {
                    run.save(config, trainer)?;
                }
            }
        }
        if run.due(config.save_steps) {
            run.save(config, trainer)?;
        }
    }
    run.finish(config, trainer, wanted)
}

/// Dropout's seed for a batch: a function of where it stands.
fn seed(seed: u64, step: u64, batch: usize) -> u64 {
    mix(mix(mix(seed) ^ step) ^ batch as u64)
}

fn with(mut metrics: BTreeMap<String, f64>, more: &[(&str, f64)]) -> BTreeMap<String, f64> {
    metrics.extend(more.iter().map(|(name, value)| ((*name).to_owned(), *value)));
    metrics
}

/// Metrics over the held-out rows, their names beginning with `eval_`.
fn evaluate<T: Trainer>(
    trainer: &T,
    model: &dyn Policy,
    batches: &[T::Batch],
    mut metrics: Metrics,
) -> Result<BTreeMap<String, f64>, TrainError> {
    let mut loss = 0.0;
    for batch in batches {
        loss += f64::from(trainer.loss(batch, model, Pass::EVALUATE, &mut metrics)?.to_scalar::<f32>()?);
    }
    if !batches.is_empty() {
        metrics.add("loss", loss, 1.0);
    }
    Ok(metrics.means().into_iter().map(|(name, value)| (format!("eval_{name}"), value)).collect())
}

struct Listener<'a> {
    began: Instant,
    from: u64,
    watch: &'a mut (dyn FnMut(&Progress<'_>) -> Control + Send),
}

impl Listener<'_> {
    fn tell(&mut self, run: &Run, stage: Stage, metrics: BTreeMap<String, f64>) -> Control {
        let (step, elapsed) = (run.state.step, self.began.elapsed());
        let left = run.steps.saturating_sub(step);
        let remaining = remaining(elapsed, step - self.from, left);
        let (steps, epoch, tokens) = (run.steps, run.epoch(), run.state.tokens);
        (self.watch)(&Progress { stage, step, steps, epoch, tokens, metrics: &metrics, elapsed, remaining })
    }
}

/// A training that is open: its folder, and everything that a checkpoint holds.
struct Run {
    folder: Folder,
    log: Log,
    parameters: Parameters,
    optimizer: Optimizer,
    schedule: Schedule,
    steps: u64,
    steps_per_epoch: u64,
    state: State,
    /// What was measured since the last line of the log.
    window: Metrics,
    /// The step of the last checkpoint.
    saved: Option<u64>,
}

impl Run {
    fn open<T: Trainer>(model: &dyn Policy, trainer: &mut T, config: &TrainConfig, path: &Path) -> Result<Self, TrainError> {
        config.check()?;
        let folder = Folder::open(path)?;
        let mut parameters = model.parameters().clone();
        for parameter in trainer.parameters() {
            parameters.push(parameter.name, parameter.var)?;
        }
        if parameters.elements() == 0 {
            return Err(TrainError::Config("the model has no parameters to train; give it an adapter".to_owned()));
        }
        let identity = identity(model, trainer, config, &parameters)?;
        let mut optimizer = Optimizer::new(&parameters, config.rule(), |parameter| group(parameter, config.weight_decay));
        let mut state = State {
            identity,
            step: 0,
            tokens: 0,
            log_bytes: 0,
            window: Metrics::default().bits(),
            optimizer_steps: BTreeMap::new(),
            best: None,
            waited: 0,
            ended_early: false,
            trainer: Value::Null,
            files: BTreeMap::new(),
        };
        let mut saved = None;
        if let Some(Checkpoint { state: found, parameters: values, moments }) = folder.latest(&state.identity)? {
            restore(&parameters, &values)?;
            optimizer.restore(&moments, &found.optimizer_steps)?;
            trainer.restore(&found.trainer)?;
            saved = Some(found.step);
            state = found;
            tracing::info!(step = state.step, folder = %path.display(), "training goes on");
        }
        let log = Log::open(&path.join(LOG), state.log_bytes).map_err(TrainError::io(path))?;
        let (steps, steps_per_epoch) = (trainer.steps(), trainer.steps_per_epoch());
        let (schedule, window) = (config.schedule(steps), Metrics::from(&state.window));
        Ok(Self { folder, log, parameters, optimizer, schedule, steps, steps_per_epoch, state, window, saved })
    }

    fn epoch(&self) -> f64 {
        self.state.step as f64 / self.steps_per_epoch as f64
    }

    /// Every so many steps, and at the last.
    fn due(&self, every: u64) -> bool {
        self.state.step.is_multiple_of(every) || self.state.step == self.steps
    }

    /// Before the parameters are moved, so that what is kept stays usable.
    fn check_finite(&self, loss: f64) -> Result<(), TrainError> {
        let step = self.state.step + 1;
        if !loss.is_finite() {
            return Err(TrainError::Diverged { what: "the loss", step });
        }
        if !self.optimizer.gradient_norm().is_finite() {
            return Err(TrainError::Diverged { what: "the gradient", step });
        }
        Ok(())
    }

    /// Writes a line of means since the last one.
    fn log(&mut self, last: &[(&str, f64)]) -> Result<(), TrainError> {
        let metrics = with(std::mem::take(&mut self.window).means(), last);
        self.append(&metrics)
    }

    fn append(&mut self, metrics: &BTreeMap<String, f64>) -> Result<(), TrainError> {
        let line = line(self.state.step, self.epoch(), metrics);
        self.log.append(&line).map_err(TrainError::io(&self.folder.path().join(LOG)))
    }

    /// Logs an evaluation; says whether it is the best so far, and ends the training when there was none for too long.
    fn judge(&mut self, config: &TrainConfig, found: &BTreeMap<String, f64>) -> Result<bool, TrainError> {
        self.append(found)?;
        let name = config.best_metric();
        let prefixed = format!("eval_{name}");
        let Some(value) = found.get(name).or_else(|| found.get(&prefixed)) else {
            let known: Vec<&str> = found.keys().map(String::as_str).collect();
            let known = known.join(", ");
            return Err(TrainError::Config(format!("metric_for_best_model {name} is not measured; it may be one of {known}")));
        };
        let gain = |best: Best| {
            let gain = value - f64::from_bits(best.bits);
            if config.greater_is_better() { gain } else { -gain }
        };
        let step = self.state.step;
        let better = value.is_finite() && self.state.best.is_none_or(|best| gain(best) > config.early_stopping_threshold);
        if better {
            self.state.best = Some(Best { step, bits: value.to_bits() });
            self.state.waited = 0;
        } else {
            self.state.waited += 1;
            self.state.ended_early = config.early_stopping_patience.is_some_and(|patience| self.state.waited >= patience);
        }
        Ok(better)
    }

    /// Keeps everything as it is after this step.
    fn save<T: Trainer>(&mut self, config: &TrainConfig, trainer: &T) -> Result<(), TrainError> {
        if self.saved == Some(self.state.step) {
            return Ok(());
        }
        self.state.log_bytes = self.log.sync().map_err(TrainError::io(self.folder.path()))?;
        self.state.window = self.window.bits();
        self.state.optimizer_steps = self.optimizer.steps();
        self.state.trainer = trainer.state();
        let (parameters, moments) = (content(&self.parameters)?, self.optimizer.moments()?);
        self.folder.save(self.state.clone(), &parameters, &moments, config.save_total_limit)?;
        self.saved = Some(self.state.step);
        Ok(())
    }

    fn finish<T: Trainer>(mut self, config: &TrainConfig, trainer: &T, wanted: Control) -> Result<Outcome, TrainError> {
        self.save(config, trainer)?;
        let ending = if self.state.ended_early {
            Ending::Early
        } else if self.state.step < self.steps && wanted == Control::Stop {
            Ending::Stopped
        } else {
            Ending::Finished
        };
        let best = self.state.best;
        if let Some(best) = best.filter(|best| config.load_best_model_at_end && best.step != self.state.step)
            && ending != Ending::Stopped
        {
            restore(&self.parameters, &self.folder.read(best.step)?.parameters)?;
        }
        let (log, page) = (self.folder.path().join(LOG), self.folder.path().join(REPORT));
        let lines = std::fs::read_to_string(&log).map_err(TrainError::io(&log))?;
        durable::replace(&page, report(config, &lines).as_bytes()).map_err(TrainError::io(&page))?;
        let best = best.map(|best| (best.step, f64::from_bits(best.bits)));
        Ok(Outcome { ending, steps: self.state.step, tokens: self.state.tokens, best })
    }
}

/// Biases and norms do not decay, as in transformers.
fn group(parameter: &Parameter, weight_decay: f64) -> Group {
    let plain = parameter.name.ends_with("bias") || parameter.name.contains("norm");
    Group { rate: 1.0, weight_decay: if plain { 0.0 } else { weight_decay } }
}

fn content(parameters: &Parameters) -> Result<Vec<u8>, TrainError> {
    let values: Vec<(String, Vec<f32>)> = parameters
        .iter()
        .map(|parameter| Ok((parameter.name.clone(), parameter.values()?)))
        .collect::<Result<_, TrainError>>()?;
    Ok(tensors::write(values.iter().map(|(name, values)| (name.clone(), values.as_slice())))?)
}

fn restore(parameters: &Parameters, bytes: &[u8]) -> Result<(), TrainError> {
    let lists = Lists::read(bytes)?;
    for parameter in parameters.iter() {
        parameter.set(&lists.get(&parameter.name, parameter.var.elem_count())?)?;
    }
    Ok(())
}

/// What must be the same for a training to go on: everything that its numbers depend on.
fn identity<T: Trainer>(
    model: &dyn Policy,
    trainer: &T,
    config: &TrainConfig,
    parameters: &Parameters,
) -> Result<Identity, TrainError> {
    // How often and how much is kept may change.
    let mut config = TrainConfig { save_steps: 1, save_total_limit: None, ..config.clone() };
    // A reward model is what it holds, wherever it lies.
    for function in &mut config.reward_funcs {
        if let Judge::RewardModel { path } = &mut function.judge {
            path.clear();
        }
    }
    let configuration = serde_json::to_string(&config).map_err(|error| TrainError::Config(error.to_string()))?;
    let model = [model.frozen()?.as_bytes(), hash(&content(parameters)?).as_bytes()].concat();
    let (data, judges) = (trainer.identity(), trainer.judges());
    Ok(Identity { configuration: hash(configuration.as_bytes()), data, model: hash(&model), judges })
}
