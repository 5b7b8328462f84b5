//! What a training is made of, as `spec.json` holds it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemill_engine::{Device, LoraConfig, Projection};
use tidemill_kernels::train::Precision;

use super::JobError;
use crate::train::TrainConfig;
use crate::workplace::{DriverCards, Workplace};

/// The largest share of rows that is held out.
const MOST_HELD_OUT: f64 = 0.5;

/// Everything that a training is a function of, beside the contents of the files it names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The model that learns.
    pub base: Base,
    /// `NAME` or `NAME@VERSION` of a snapshot; this or `train_file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// Train on a snapshot that failed its quality report.
    #[serde(default)]
    pub despite_report: bool,
    /// Rows as JSONL, Parquet or a Delta table. Methods that sample take a JSONL file of prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_file: Option<PathBuf>,
    /// Rows that are evaluated on and never learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_file: Option<PathBuf>,
    /// Share of the rows to hold out, by clusters of alike prompts, where they come without a part of their own.
    #[serde(default)]
    pub held_out_share: f64,
    /// How it learns.
    pub config: TrainConfig,
    /// What is trained: an adapter, or all of the model's numbers.
    #[serde(default)]
    pub finetuning_type: FinetuningType,
    /// The new adapter.
    #[serde(default)]
    pub lora: Lora,
    /// Go on from this adapter instead of a new one; `lora` is then only its dropout, and the reference is this adapter as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Also keep the adapters at the ends of so many epochs before the last, and of the one that was evaluated best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch_adapters: Option<usize>,
    /// Threads; 0 is all that the process may use.
    #[serde(default)]
    pub threads: usize,
    /// Where the model is trained, answers are sampled and reward models judge: `cpu`, `cuda` or `cuda:N`. Parameters and the optimizer
    /// stay on the processor.
    #[serde(default, with = "device", skip_serializing_if = "is_cpu")]
    pub device: Device,
    /// Bytes of the card's memory that it may hold; without it, what is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<usize>,
    /// `bf16` (where the machine multiplies it; f32 elsewhere) or `f32`.
    #[serde(default, with = "precision")]
    pub precision: Precision,
    /// Compute intermediate values again in the backward pass: less memory, a third more work.
    #[serde(default)]
    pub recompute: bool,
    /// Turn half of the labels around, those held out included: a control, whose adapter no gate may let pass.
    #[serde(default)]
    pub shuffled_labels: bool,
}

/// A base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// What the server calls it; stands in the adapter's configuration.
    pub name: String,
    /// A GGUF file or a folder.
    pub path: PathBuf,
}

/// What is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinetuningType {
    /// A LoRA adapter beside the frozen base.
    #[default]
    Lora,
    /// Every number of the model; a model folder comes out.
    Full,
}

/// A LoRA adapter, under PEFT's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// Rank.
    pub r: usize,
    /// The scale is `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
    pub lora_alpha: f64,
    /// Part of the inputs that training sets to 0.
    pub lora_dropout: f64,
    /// Rank-stabilised scale.
    pub use_rslora: bool,
    /// `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`; or `all-linear` alone.
    pub target_modules: Vec<String>,
    /// Layers, from 0; all without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
}

impl Default for Lora {
    fn default() -> Self {
        let LoraConfig { r, alpha, dropout, rslora, .. } = LoraConfig::default();
        let target_modules = vec!["all-linear".to_owned()];
        Self { r, lora_alpha: alpha, lora_dropout: dropout, use_rslora: rslora, target_modules, layers_to_transform: None }
    }
}

impl Lora {
    /// Checked, as the model takes it.
    pub fn config(&self) -> Result<LoraConfig, JobError> {
        let wrong = |field: &'static str, fix: String| Err(JobError::Spec { field, fix });
        if self.r == 0 {
            return wrong("lora.r", "must be at least 1".to_owned());
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return wrong("lora.lora_alpha", format!("must be above 0, it is {}", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora.lora_dropout", format!("must be from 0 to below 1, it is {}", self.lora_dropout));
        }
        let mut targets = Vec::new();
        match self.target_modules.as_slice() {
            [] => return wrong("lora.target_modules", "must name a module, or all-linear".to_owned()),
            [all] if all == "all-linear" => targets.extend(Projection::ALL),
            names => {
                for name in names {
                    match Projection::named(name) {
                        Some(projection) => targets.push(projection),
                        None => {
                            let known = Projection::ALL.map(Projection::name).join(", ");
                            return wrong("lora.target_modules", format!("`{name}` is none of {known}, all-linear"));
                        }
                    }
                }
            }
        }
        targets.sort_unstable();
        targets.dedup();
        let layers = self.layers_to_transform.clone().map(|mut layers| {
            layers.sort_unstable();
            layers.dedup();
            layers
        });
        if layers.as_ref().is_some_and(Vec::is_empty) {
            return wrong("lora.layers_to_transform", "names no layer; leave it out for all".to_owned());
        }
        Ok(LoraConfig { r: self.r, alpha: self.lora_alpha, dropout: self.lora_dropout, rslora: self.use_rslora, targets, layers })
    }
}

impl Spec {
    /// Reads `spec.json`; the error names the field.
    pub fn read(path: &Path) -> Result<Self, JobError> {
        let bytes = std::fs::read(path).map_err(JobError::io(path))?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| JobError::File { path: path.to_owned(), error })?;
        let spec: Self = serde_json::from_value(value).map_err(|error| JobError::File { path: path.to_owned(), error })?;
        spec.check()?;
        Ok(spec)
    }

    /// Checks what can be known without opening anything.
    pub fn check(&self) -> Result<(), JobError> {
        self.config.check()?;
        self.lora.config()?;
        Workplace::new(&self.device, self.device_memory, Arc::new(DriverCards::default()))?;
        if self.finetuning_type == FinetuningType::Full {
            self.check_full()?;
        }
        if self.dataset.is_some() == self.train_file.is_some() {
            return Err(JobError::Spec { field: "dataset", fix: "name a dataset or a train_file, one of them".to_owned() });
        }
        if !(0.0..=MOST_HELD_OUT).contains(&self.held_out_share) {
            let fix = format!("must be from 0 to {MOST_HELD_OUT}, it is {}", self.held_out_share);
            return Err(JobError::Spec { field: "held_out_share", fix });
        }
        if self.held_out_share > 0.0 && self.held_out_file.is_some() {
            let fix = "does not go with a held_out_file; leave one of them out".to_owned();
            return Err(JobError::Spec { field: "held_out_share", fix });
        }
        Ok(())
    }

    /// Whether all of the model's numbers can be trained this way.
    fn check_full(&self) -> Result<(), JobError> {
        let wrong = |field: &'static str, fix: String| Err(JobError::Spec { field, fix });
        let method = json!(self.config.method);
        let method = method.as_str().unwrap_or_default();
        if self.config.method.samples() {
            let fix = "needs an engine that is given all weights between turns, which is not built; train an adapter instead";
            return wrong("finetuning_type", format!("full with {method} {fix}"));
        }
        if self.adapter.is_some() {
            let fix = "does not go with finetuning_type full; merge it into its base (tidemill adapter merge) and train that";
            return wrong("adapter", fix.to_owned());
        }
        if self.epoch_adapters.is_some() {
            return wrong(
                "epoch_adapters",
                "does not go with finetuning_type full, which has no adapter; leave it out".to_owned(),
            );
        }
        if self.lora != Lora::default() {
            return wrong("lora", "does not go with finetuning_type full; leave it out".to_owned());
        }
        Ok(())
    }
}

fn is_cpu(device: &Device) -> bool {
    *device == Device::Cpu
}

/// As `--device` has it.
mod device {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};
    use tidemill_engine::Device;

    pub fn serialize<S: Serializer>(device: &Device, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(device)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Device, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error| D::Error::custom(format!("device: `{text}`: {error}")))
    }
}

/// `"bf16"` and `"f32"`.
mod precision {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};
    use tidemill_kernels::train::Precision;

    pub fn serialize<S: Serializer>(precision: &Precision, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        })
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Precision, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            other => Err(D::Error::custom(format!("precision: `{other}` is neither bf16 nor f32"))),
        }
    }
}
