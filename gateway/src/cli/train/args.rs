//! The flags of a training as its specification.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tidemill_engine::Device;
use tidemill_kernels::train::Precision;
use tidemill_rlhf::job::{Base, FinetuningType, Lora, Spec};
use tidemill_rlhf::train::{Method, TrainConfig};

use super::TrainCommandError;
use crate::cli::store_args::{DatasetStoreArgs, StoreCommandError, read_json};
use crate::config::value::size;
use crate::config::{Config, Origin, model_spec};
use crate::fine_tuning::TrainingPriority;

/// Train an adapter, or with --full all of a model, on a dataset.
#[derive(Debug, clap::Args)]
pub struct TrainArgs {
    /// sft, reward, dpo, kto, orpo or simpo; or, from answers sampled while training, rloo, grpo or ppo
    #[arg(required_unless_present = "job", value_parser = method)]
    method: Option<Method>,
    /// Snapshot to learn from: NAME (its newest) or NAME@VERSION
    #[arg(long, value_name = "DATASET", required_unless_present_any = ["file", "job"], conflicts_with = "file")]
    dataset: Option<String>,
    /// Rows to learn from, as a file: JSONL (TRL, OpenAI), Parquet, or a Delta table; for rloo, grpo and ppo JSONL of prompts
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Rows to evaluate on, as a file
    #[arg(long, value_name = "FILE")]
    held_out_file: Option<PathBuf>,
    /// Share of the rows to hold out, where they come without a part of their own [default: 0]
    #[arg(long, value_name = "0..0.5")]
    held_out: Option<f64>,
    /// Train although the dataset failed its quality report
    #[arg(long)]
    despite_report: bool,
    /// A path or the name of a pulled model [default: the pulled default model]
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Train all of the model's numbers instead of an adapter; a model folder comes out
    #[arg(long, conflicts_with_all = ["adapter", "r", "alpha", "dropout", "rslora", "target_modules", "layers"])]
    full: bool,
    /// Go on from this adapter (a folder) instead of a new one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["r", "alpha", "rslora", "target_modules", "layers"])]
    adapter: Option<PathBuf>,
    /// Rank of the new adapter [default: 16]
    #[arg(long, value_name = "N")]
    r: Option<usize>,
    /// Its scale is alpha / r [default: 32]
    #[arg(long)]
    alpha: Option<f64>,
    /// Part of its inputs that training sets to 0 [default: 0.05]
    #[arg(long)]
    dropout: Option<f64>,
    /// Its scale is alpha / √r
    #[arg(long)]
    rslora: bool,
    /// Matrices it changes, such as q_proj,v_proj [default: all-linear]
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    target_modules: Vec<String>,
    /// Layers it changes, such as 20,21,22 [default: all]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    layers: Vec<usize>,
    /// A field of the training, under TRL's name: learning_rate=1e-5, beta=0.2, loss_type=ipo, reward_funcs=[{"type":"json"}]; may be repeated
    #[arg(long = "set", value_name = "FIELD=VALUE", value_parser = field)]
    fields: Vec<(String, Value)>,
    /// Fields of the training as JSON in a file; --set comes after it
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Where the model is trained, answers are sampled and reward models judge: cpu, cuda, cuda:N with the number of a card [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
    /// Memory of the card that it may hold, such as 40GiB [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    device_memory: Option<usize>,
    /// What products round their operands to: bf16 (f32 on machines without it) or f32 [default: bf16]
    #[arg(long, value_parser = precision)]
    precision: Option<Precision>,
    /// Less memory for a third more work: compute intermediate values again in the backward pass
    #[arg(long)]
    recompute: bool,
    /// Folder of the training [default: training/NAME in the data directory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// What the registry calls the adapter, where the data directory has a store [default: the name of the training's folder]
    #[arg(long, value_name = "NAME", conflicts_with = "no_register")]
    pub name: Option<String>,
    /// Leave the adapter in the training's folder
    #[arg(long)]
    pub no_register: bool,
    /// A control: turn half of the labels around, those held out included. What comes out must fail the gates of `tidemill eval`
    #[arg(long)]
    shuffled_labels: bool,
    /// Say what it would take, measured on one step, and train nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Do what spec.json in this folder says, and tell it as lines of JSON
    #[arg(long, value_name = "DIR", conflicts_with_all = ["method", "dataset", "file", "out", "dry_run"])]
    pub job: Option<PathBuf>,
    /// Folder of a file that is locked while the card is used: a server's jobs and evaluations have it one after the other
    #[arg(long, value_name = "DIR", requires = "job", hide = true)]
    pub turn: Option<PathBuf>,
    /// How urgent it is, as a job: idle (what nobody else wants) or low
    #[arg(long, value_enum, default_value_t, requires = "job", hide_default_value = true)]
    pub priority: TrainingPriority,
    #[command(flatten)]
    pub place: DatasetStoreArgs,
}

fn method(text: &str) -> Result<Method, String> {
    serde_json::from_value(Value::String(text.to_owned())).map_err(|error| error.to_string())
}

fn precision(text: &str) -> Result<Precision, String> {
    match text {
        "bf16" => Ok(Precision::Bf16),
        "f32" => Ok(Precision::F32),
        other => Err(format!("`{other}` is neither bf16 nor f32")),
    }
}

/// A value is JSON where it reads as JSON, and a text otherwise.
fn field(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("`{text}` should be FIELD=VALUE, such as beta=0.2"))?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    Ok((name.to_owned(), value))
}

impl TrainArgs {
    /// The specification that the flags say.
    pub fn spec(&self, config: &Config) -> Result<Spec, TrainCommandError> {
        let method = self.method.ok_or_else(|| StoreCommandError::Usage("name a method, such as dpo".to_owned()))?;
        let named: Vec<_> = self.base.iter().map(|model| (model.clone(), Origin::Flag("base"))).collect();
        let models = model_spec::resolve_all(&named, &config.data)?;
        let model = models.into_iter().next().ok_or_else(|| StoreCommandError::Usage("no model was found".to_owned()))?;
        let spec = Spec {
            base: Base { name: model.name, path: absolute(&model.path)? },
            dataset: self.dataset.clone(),
            despite_report: self.despite_report,
            train_file: self.file.as_deref().map(absolute).transpose()?,
            held_out_file: self.held_out_file.as_deref().map(absolute).transpose()?,
            held_out_share: self.held_out.unwrap_or(0.0),
            config: self.config(method)?,
            finetuning_type: if self.full { FinetuningType::Full } else { FinetuningType::Lora },
            lora: self.lora(),
            adapter: self.adapter.as_deref().map(absolute).transpose()?,
            epoch_adapters: None,
            threads: self.threads.unwrap_or(0),
            device: self.device.clone().unwrap_or_default(),
            device_memory: self.device_memory,
            precision: self.precision.unwrap_or_default(),
            recompute: self.recompute,
            shuffled_labels: self.shuffled_labels,
        };
        spec.check()?;
        Ok(spec)
    }

    fn config(&self, method: Method) -> Result<TrainConfig, TrainCommandError> {
        let mut fields: Map<String, Value> = match &self.settings {
            None => Map::new(),
            Some(path) => read_json(path)?,
        };
        fields.insert("method".to_owned(), json!(method));
        fields.extend(self.fields.iter().cloned());
        Ok(TrainConfig::from_json(Value::Object(fields))?)
    }

    fn lora(&self) -> Lora {
        let standard = Lora::default();
        Lora {
            r: self.r.unwrap_or(standard.r),
            lora_alpha: self.alpha.unwrap_or(standard.lora_alpha),
            lora_dropout: self.dropout.unwrap_or(standard.lora_dropout),
            use_rslora: self.rslora,
            target_modules: if self.target_modules.is_empty() { standard.target_modules } else { self.target_modules.clone() },
            layers_to_transform: Some(self.layers.clone()).filter(|layers| !layers.is_empty()),
        }
    }

    /// Where the training lives: a place of its own for each method and each set of rows.
    pub fn folder(&self, config: &Config, spec: &Spec) -> PathBuf {
        if let Some(folder) = &self.out {
            return folder.clone();
        }
        let rows = match (&spec.dataset, &spec.train_file) {
            (Some(name), _) => name.replace('@', "-"),
            (None, path) => path.as_deref().and_then(Path::file_stem).unwrap_or_default().to_string_lossy().into_owned(),
        };
        let method = json!(spec.config.method);
        let full = if self.full { "-full" } else { "" };
        config.data.join("training").join(format!("{}{full}-{rows}", method.as_str().unwrap_or_default()))
    }
}

/// A training is moved between folders and processes; what it names stays where it is.
fn absolute(path: &Path) -> Result<PathBuf, TrainCommandError> {
    Ok(std::path::absolute(path).map_err(StoreCommandError::file(path))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_json_where_they_can_be() {
        assert_eq!(field("beta=0.2").unwrap(), ("beta".to_owned(), json!(0.2)));
        assert_eq!(field("loss_type=ipo").unwrap(), ("loss_type".to_owned(), json!("ipo")));
        assert_eq!(field("rater_weights={\"a\":0.5}").unwrap().1, json!({ "a": 0.5 }));
        assert_eq!(field("metric_for_best_model=a=b").unwrap().1, json!("a=b"));
        assert!(field("beta").unwrap_err().contains("FIELD=VALUE"));
    }
}
