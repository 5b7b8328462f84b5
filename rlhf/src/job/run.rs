//! From a specification to an adapter or a model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tidemill_engine::{Adapter, ModelFiles};
use tidemill_kernels::Format;
use tidemill_kernels::train::Precision;

use super::estimate::{self, Estimate};
use super::{FinetuningType, JobError, Rows, Spec, epochs, head, online};
use crate::collate::{Encoded, Encoder};
use crate::dataset::Row;
use crate::durable;
use crate::model::{Model, ModelOptions};
use crate::reward::grader::Oracle;
use crate::train::{self, Control, Ending, Head, LOG, Offline, Outcome, Progress, Prompt, Stage, Trainer, train};
use crate::workplace::{Cards, DriverCards, Workplace};

/// The folder of the finished adapter.
pub const ADAPTER: &str = "adapter";
/// The folder of the finished model, where all of it was trained.
pub const MODEL: &str = "model";
/// What it was made of.
pub const LINEAGE: &str = "lineage.json";

/// A model and rows as tokens: everything that is needed to train.
pub struct Job {
    pub(super) spec: Spec,
    pub(super) files: Arc<ModelFiles>,
    rows: Rows,
    train: Encoded,
    held_out: Encoded,
    /// Of methods that sample.
    pub(super) prompts: Vec<Prompt>,
    pub(super) held_out_prompts: Vec<Prompt>,
    /// Asked by graders.
    pub(super) oracle: Option<Arc<dyn Oracle>>,
    pub(super) workplace: Workplace,
}

/// What a training will compute.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// Samples to learn; of methods that sample, prompts.
    pub train: usize,
    /// Samples or prompts to evaluate on.
    pub held_out: usize,
    /// Samples that were cut to the greatest length.
    pub truncated: usize,
    /// Rows left out because the quality report drops them.
    pub dropped_by_report: usize,
    /// Why others are left out, and how many.
    pub left_out: Vec<(String, usize)>,
    /// Steps in all.
    pub steps: u64,
    /// Tokens of the samples to learn, prompts counted once.
    pub tokens: u64,
}

/// What came of a training that ended by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// What was trained.
    pub kind: FinetuningType,
    /// The folder of the adapter or of the model.
    pub folder: PathBuf,
    /// Names it by its content, in hexadecimal digits.
    pub digest: String,
}

/// What a trainer leaves beside the model.
#[derive(Default)]
struct Told<'a> {
    /// Of a reward model.
    head: Option<&'a Head>,
    /// The largest share of the loss that one rater had, and one user.
    shares: (f64, f64),
    /// Reward models by their contents.
    judges: BTreeMap<String, String>,
}

impl Job {
    /// Opens the model and turns the rows into tokens.
    pub fn open(spec: Spec, rows: Rows) -> Result<Self, JobError> {
        spec.check()?;
        let workplace = Workplace::new(&spec.device, spec.device_memory, Arc::new(DriverCards::default()))?;
        let files = Arc::new(ModelFiles::open(&spec.base.path)?);
        let template = files.chat_template().ok_or_else(|| JobError::Template(spec.base.name.clone()))?;
        let encoder = Encoder::new(template, files.tokenizer(), spec.config.encoding());
        if spec.config.method.samples() {
            let longest = online::longest_prompt(&spec.config, files.config().max_positions)?;
            let (prompts, mut dropped) = train::encode(&encoder, rows.questions.clone(), Some(longest));
            let (held_out_prompts, others) = train::encode(&encoder, rows.held_out_questions.clone(), Some(longest));
            dropped.extend(others);
            let (train, held_out) = (Encoded { dropped, ..Encoded::default() }, Encoded::default());
            return Ok(Self { spec, files, rows, train, held_out, prompts, held_out_prompts, oracle: None, workplace });
        }
        let encode = |rows: &[Row]| encoder.rows(rows, spec.config.teaches());
        let (train, held_out) = (encode(&rows.train), encode(&rows.held_out));
        let (prompts, held_out_prompts) = (Vec::new(), Vec::new());
        Ok(Self { spec, files, rows, train, held_out, prompts, held_out_prompts, oracle: None, workplace })
    }

    /// With somebody whom graders ask that want a served model's opinion.
    pub fn asking(self, oracle: Arc<dyn Oracle>) -> Self {
        Self { oracle: Some(oracle), ..self }
    }

    /// With the cards that its device is one of.
    pub fn with_cards(self, cards: Arc<dyn Cards>) -> Result<Self, JobError> {
        let workplace = Workplace::new(&self.spec.device, self.spec.device_memory, cards)?;
        Ok(Self { workplace, ..self })
    }

    /// What it will compute.
    pub fn prepared(&self) -> Prepared {
        let whole =
            Encoded { dropped: [self.train.dropped.clone(), self.held_out.dropped.clone()].concat(), ..Encoded::default() };
        let tokens = |encoded: &Encoded| -> u64 { encoded.samples.iter().map(|sample| sample.tokens() as u64).sum() };
        let steps = match (self.spec.config.reinforcement(), self.train.samples.len()) {
            (Ok(told), _) => online::steps(&self.spec.config, &told, self.prompts.len()),
            (Err(_), 0) => 0,
            (Err(_), samples) => self.spec.config.plan(samples).steps(),
        };
        let asked: u64 = self.prompts.iter().map(|prompt| prompt.tokens.len() as u64).sum();
        Prepared {
            train: self.train.samples.len() + self.prompts.len(),
            held_out: self.held_out.samples.len() + self.held_out_prompts.len(),
            truncated: self.train.truncated + self.held_out.truncated,
            dropped_by_report: self.rows.dropped,
            left_out: whole.reasons(),
            steps,
            tokens: tokens(&self.train) + asked,
        }
    }

    pub(super) fn model(&self) -> Result<Model, JobError> {
        Ok(self.workplace.take(self.model_here()?)?)
    }

    fn model_here(&self) -> Result<Model, JobError> {
        let Spec { finetuning_type, lora, adapter, threads, precision, recompute, config, .. } = &self.spec;
        let options = ModelOptions { threads: *threads, precision: *precision, recompute: *recompute, ..ModelOptions::default() };
        if *finetuning_type == FinetuningType::Full {
            return Ok(Model::whole(Arc::clone(&self.files), options)?);
        }
        let lora = lora.config()?;
        Ok(match adapter {
            None => Model::new(Arc::clone(&self.files), &lora, config.seed, options)?,
            Some(folder) => {
                let mut adapter = Adapter::read(folder)?;
                adapter.check(self.files.config())?;
                adapter.config.dropout = lora.dropout;
                Model::with_adapter(Arc::clone(&self.files), &adapter, options)?.held_to_itself()?
            }
        })
    }

    /// Measures one step, and says what the whole will take. Trains nothing.
    pub fn estimate(&self) -> Result<Estimate, JobError> {
        let model = self.model()?;
        if self.spec.config.method.samples() {
            let (mut trainer, engine) = self.online(&model)?;
            return estimate::sampled(&model, &mut trainer, &engine);
        }
        estimate::measure(&model, &self.spec.config, self.train.samples.clone())
    }

    /// Trains in `folder`, from its last checkpoint where there is one. `prepare` hears how many reference log-probabilities are
    /// done, `watch` of every step. Without an adapter when `watch` stopped it: the same call goes on.
    pub fn train(
        &self,
        folder: &Path,
        prepare: &mut (dyn FnMut(usize, usize) + Send),
        watch: &mut (dyn FnMut(&Progress<'_>) -> Control + Send),
    ) -> Result<(Outcome, Option<Finished>), JobError> {
        let model = self.model()?;
        let config = &self.spec.config;
        let mut unkept = None;
        let mut watch = |progress: &Progress<'_>| {
            let wanted = watch(progress);
            match self.keep_epoch(folder, &model, progress) {
                Ok(()) => wanted,
                Err(error) => {
                    unkept = Some(error);
                    Control::Stop
                }
            }
        };
        if config.method.samples() {
            let (mut trainer, _) = self.online(&model)?;
            let outcome = train(&model, &mut trainer, config, folder, &mut watch)?;
            unkept.map_or(Ok(()), Err)?;
            let told = Told { judges: trainer.judges(), ..Told::default() };
            return self.finish(folder, &model, outcome, &told);
        }
        let (train_samples, held_out) = (self.train.samples.clone(), self.held_out.samples.clone());
        let cache = folder.join("reference");
        let mut trainer = Offline::new(&model, config, train_samples, held_out, Some(&cache), prepare)?;
        let outcome = train(&model, &mut trainer, config, folder, &mut watch)?;
        unkept.map_or(Ok(()), Err)?;
        let told = Told { head: trainer.head(), shares: trainer.largest_shares(), ..Told::default() };
        self.finish(folder, &model, outcome, &told)
    }

    /// Writes the adapter as it is at the end of an epoch that is not the last, where the specification wants it. After a restart the
    /// same adapter is written again, which changes nothing.
    fn keep_epoch(&self, folder: &Path, model: &Model, progress: &Progress<'_>) -> Result<(), JobError> {
        let Some(keep) = self.spec.epoch_adapters.filter(|_| progress.step < progress.steps && progress.epoch.fract() == 0.0)
        else {
            return Ok(());
        };
        if progress.stage == Stage::Training {
            model.adapter(&self.spec.base.name)?.write(&epochs::place(folder, progress.step))?;
        }
        epochs::prune(folder, keep, &self.spec.config)
    }

    /// Writes the adapter or the model and what it was made of, unless the training can go on.
    fn finish(
        &self,
        folder: &Path,
        model: &Model,
        outcome: Outcome,
        told: &Told<'_>,
    ) -> Result<(Outcome, Option<Finished>), JobError> {
        if outcome.ending == Ending::Stopped {
            return Ok((outcome, None));
        }
        let finished = match self.spec.finetuning_type {
            FinetuningType::Lora => self.write_adapter(model, folder, told.head)?,
            FinetuningType::Full => self.write_model(model, folder, told.head)?,
        };
        // Of what is kept.
        let kept = outcome.best.filter(|_| self.spec.config.load_best_model_at_end).map(|(step, _)| step);
        let evaluated = last_evaluation(&folder.join(LOG), kept)?;
        let lineage = self.lineage(model, &outcome, &evaluated, told);
        let path = folder.join(LINEAGE);
        durable::replace(&path, format!("{lineage:#}\n").as_bytes()).map_err(JobError::io(&path))?;
        tracing::info!(digest = finished.digest, "the training is finished");
        Ok((outcome, Some(finished)))
    }

    fn write_adapter(&self, model: &Model, folder: &Path, trained: Option<&Head>) -> Result<Finished, JobError> {
        let adapter = model.adapter(&self.spec.base.name)?;
        let place = folder.join(ADAPTER);
        adapter.write(&place)?;
        if let Some(trained) = trained {
            head::write(trained, &place)?;
        }
        let digest = adapter.digest().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Finished { kind: FinetuningType::Lora, folder: place, digest })
    }

    /// Matrices are stored as products round them.
    fn write_model(&self, model: &Model, folder: &Path, trained: Option<&Head>) -> Result<Finished, JobError> {
        let place = folder.join(MODEL);
        let storage = match self.spec.precision {
            Precision::F32 => Format::F32,
            Precision::Bf16 => Format::Bf16,
        };
        // Of the same training done before, or of a process that was killed while it wrote: the bytes are the same.
        for entry in std::fs::read_dir(folder).map_err(JobError::io(folder))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == MODEL || (name.starts_with(&format!(".{MODEL}.")) && name.ends_with(".part")) {
                std::fs::remove_dir_all(entry.path()).map_err(JobError::io(&entry.path()))?;
            }
        }
        model.write(&place, storage)?;
        if let Some(trained) = trained {
            head::write(trained, &place)?;
        }
        Ok(Finished { kind: FinetuningType::Full, digest: ModelFiles::open(&place)?.digest(), folder: place })
    }

    /// What the adapter was made of. The same training gives the same text, however often it was interrupted.
    fn lineage(&self, model: &Model, outcome: &Outcome, evaluated: &Value, told: &Told<'_>) -> Value {
        let learnt = self.train.samples.iter().flat_map(|sample| &sample.raters).map(String::as_str);
        // Of methods that sample, everyone behind the prompts.
        let raters = if self.prompts.is_empty() { learnt.collect() } else { self.rows.raters() };
        let mut lineage = json!({
            "base": { "name": self.spec.base.name, "digest": model.base() },
            "parent": self.spec.adapter,
            "data": {
                "source": self.rows.source,
                "content_hash": self.rows.content_hash,
                "train": self.train.samples.len() + self.prompts.len(),
                "held_out": self.held_out.samples.len() + self.held_out_prompts.len(),
                "raters": raters,
                "shuffled_labels": self.spec.shuffled_labels,
                "largest_rater_share": told.shares.0,
                "largest_user_share": told.shares.1,
            },
            "config": self.spec.config,
            "finetuning_type": self.spec.finetuning_type,
            "lora": (self.spec.finetuning_type == FinetuningType::Lora).then_some(&self.spec.lora),
            "code_version": env!("CARGO_PKG_VERSION"),
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "best": outcome.best.map(|(step, metric)| json!({ "step": step, "metric": metric })),
            "metrics": evaluated,
        });
        if !told.judges.is_empty() {
            lineage["reward_models"] = json!(told.judges);
        }
        lineage
    }
}

/// The metrics of the last evaluation, or of that at `step`, from the log: they are the same after a restart.
fn last_evaluation(path: &Path, step: Option<u64>) -> Result<Value, JobError> {
    let text = std::fs::read_to_string(path).map_err(JobError::io(path))?;
    let lines = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let wanted = |line: &Value| {
        let evaluated = line.get("eval_loss").or(line.get("eval_reward")).is_some();
        evaluated && step.is_none_or(|step| line["step"].as_u64() == Some(step))
    };
    Ok(lines.into_iter().find(wanted).unwrap_or_default())
}
