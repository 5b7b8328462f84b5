//! Low-rank adapters (Hu et al. 2021) as PEFT keeps them on disk, read and written.
//!
//! An adapted matrix computes `W x + scale · B (A x)` with `A [rank, in]` and `B [out, rank]`. Everything is in the order of the
//! publisher's files (rotated halves), which is the order of the packed base too, whatever container the base came from.

mod config;
mod error;
mod gguf;
mod modules;
mod projection;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::collections::HashSet;

use serde_json::{Map, Value};

use self::modules::Modules;
use crate::adapters::generation;
use crate::model_config::{Family, ModelConfig};
use crate::request::AdapterGeneration;

pub use config::LoraConfig;
pub use error::AdapterError;
pub use projection::Projection;

/// The file with the configuration.
const CONFIG: &str = "adapter_config.json";
/// The file with the tensors.
const TENSORS: &str = "adapter_model.safetensors";

/// An adapter in memory.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// What it was made with.
    pub config: LoraConfig,
    /// `base_model_name_or_path`: what its maker called the base; empty when nobody said.
    pub base: String,
    /// One per adapted matrix, ordered by layer and projection.
    pub pairs: Vec<Pair>,
    /// What else its file says.
    pub extra: Extra,
}

/// The two factors of one adapted matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// Which layer.
    pub layer: usize,
    /// Which matrix of it.
    pub projection: Projection,
    /// Rows of `a`, columns of `b`.
    pub rank: usize,
    /// Multiplies `B A`.
    pub scale: f32,
    /// `[rank, in]`, row-major.
    pub a: Vec<f32>,
    /// `[out, rank]`, row-major.
    pub b: Vec<f32>,
}

/// Parts of an adapter's configuration that do not change what it computes.
#[derive(Clone, Debug, Default)]
pub struct Extra {
    /// Fields that are written back as they came (`task_type`, a revision, whatever tools add).
    pub fields: Map<String, Value>,
    /// Which matrices the file claims to adapt; absent for an adapter that was not read from a file.
    modules: Option<Modules>,
}

impl Adapter {
    /// An adapter that was made here.
    pub fn new(config: LoraConfig, base: impl Into<String>, pairs: Vec<Pair>) -> Self {
        let mut adapter = Self { config, base: base.into(), pairs, extra: Extra::default() };
        adapter.pairs.sort_by_key(|pair| (pair.layer, pair.projection));
        adapter
    }

    /// The largest rank.
    pub fn max_rank(&self) -> usize {
        self.pairs.iter().map(|pair| pair.rank).max().unwrap_or(0)
    }

    /// Bytes of all factors as f32.
    pub fn bytes(&self) -> usize {
        self.pairs.iter().map(|pair| (pair.a.len() + pair.b.len()) * 4).sum()
    }

    /// Names what the adapter computes: equal factors and scales give equal digests, whatever the files say beside them.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("tidemill 2026 adapter");
        let mut bytes = Vec::new();
        for Pair { layer, projection, rank, scale, a, b } in &self.pairs {
            let sizes = [*layer, *projection as usize, *rank, a.len(), b.len()];
            for size in sizes {
                hasher.update(&(size as u64).to_le_bytes());
            }
            hasher.update(&scale.to_bits().to_le_bytes());
            for values in [a, b] {
                bytes.clear();
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                hasher.update(&bytes);
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// What an engine calls these contents.
    pub fn generation(&self) -> AdapterGeneration {
        generation(&self.digest())
    }

    /// Whether the adapter fits a base model: layers and shapes are its own, nothing is missing, every number is finite. The error
    /// names the tensor.
    pub fn check(&self, model: &ModelConfig) -> Result<(), AdapterError> {
        if self.pairs.is_empty() {
            return Err(AdapterError::tensor(TENSORS, "the adapter has no tensors, so it changes nothing; save it again"));
        }
        let mut seen = HashSet::new();
        for pair in &self.pairs {
            let Pair { layer, projection, rank, scale, a, b } = pair;
            let name = tensor_name(*layer, *projection, Factor::A);
            if *layer >= model.layers {
                let detail = format!("the model has {} layers; the adapter was made for another base model", model.layers);
                return Err(AdapterError::tensor(name, detail));
            }
            if !seen.insert((*layer, *projection)) {
                return Err(AdapterError::tensor(name, "occurs twice"));
            }
            if *rank == 0 {
                return Err(AdapterError::tensor(name, "the rank is 0"));
            }
            if !model.adapts(*projection) {
                let detail = match (model.family, projection) {
                    (Family::Dbrx, _) => "the model has no such matrix; adapt Wqkv and out_proj",
                    (Family::Mpt, _) => "the model has no such matrix; adapt Wqkv, out_proj, up_proj and down_proj",
                    (_, projection) if projection.is_of_mpt() => "the adapter was made for MPT, which the model is not",
                    (_, Projection::DbrxQkv | Projection::DbrxOutput) => "the adapter was made for DBRX, which the model is not",
                    _ => {
                        "the model has experts in its place, which no adapter changes here; adapt q_proj, k_proj, v_proj and o_proj"
                    }
                };
                return Err(AdapterError::tensor(name, detail));
            }
            let (out, input) = projection.shape(model);
            for (factor, values, rows, columns) in [(Factor::A, a, *rank, input), (Factor::B, b, out, *rank)] {
                let name = tensor_name(*layer, *projection, factor);
                if values.len() != rows * columns {
                    let have = match factor {
                        Factor::A if values.len().is_multiple_of(*rank) => format!("[{rank}, {}]", values.len() / rank),
                        Factor::B if values.len().is_multiple_of(*rank) => format!("[{}, {rank}]", values.len() / rank),
                        _ => format!("{} numbers", values.len()),
                    };
                    let detail = format!(
                        "has the shape {have} where the model needs [{rows}, {columns}]; the adapter was made for another base model"
                    );
                    return Err(AdapterError::tensor(name, detail));
                }
                if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                    let detail = format!("number {at} is {}; the training went wrong, take an earlier checkpoint", values[at]);
                    return Err(AdapterError::tensor(name, detail));
                }
            }
            let largest = b.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            if !(scale * largest).is_finite() {
                let name = tensor_name(*layer, *projection, Factor::B);
                let detail =
                    format!("its largest number {largest} times the scale {scale} is beyond what f32 holds; see its lora_alpha");
                return Err(AdapterError::tensor(name, detail));
            }
        }
        let Some(modules) = &self.extra.modules else { return Ok(()) };
        for (layer, projection) in (0..model.layers).flat_map(|layer| Projection::every().map(move |p| (layer, p))) {
            if model.adapts(projection) && modules.include(layer, projection) && !seen.contains(&(layer, projection)) {
                let detail = format!(
                    "is missing although {CONFIG} names it among the adapted; the file is incomplete or was made for another base model"
                );
                return Err(AdapterError::tensor(tensor_name(layer, projection, Factor::A), detail));
            }
        }
        Ok(())
    }
}

impl Pair {
    /// The matrices that a layer is loaded as, of which this pair adapts one or all, each with its rows of `b`.
    pub(crate) fn parts(&self, model: &ModelConfig) -> Vec<(Projection, &[f32])> {
        if !self.projection.joins_qkv() {
            return vec![(self.projection, &self.b)];
        }
        let mut rest = self.b.as_slice();
        let parts = [Projection::Query, Projection::Key, Projection::Value].map(|projection| {
            let (rows, _) = projection.shape(model);
            let (own, behind) = rest.split_at((rows * self.rank).min(rest.len()));
            rest = behind;
            (projection, own)
        });
        parts.to_vec()
    }
}

impl ModelConfig {
    /// Whether layers of the model have a matrix that adapters call so.
    pub(crate) fn adapts(&self, projection: Projection) -> bool {
        match (self.family, projection) {
            (Family::Dbrx, _) => Projection::DBRX.contains(&projection),
            (Family::Mpt, _) => projection.is_of_mpt(),
            _ => Projection::ALL.contains(&projection) && self.has(projection.part()),
        }
    }
}

/// Which of the two factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Factor {
    A,
    B,
}

/// What PEFT puts before a module's name.
const PREFIX: &str = "base_model.model.";

fn tensor_name(layer: usize, projection: Projection, factor: Factor) -> String {
    let letter = match factor {
        Factor::A => 'A',
        Factor::B => 'B',
    };
    format!("{PREFIX}{}.lora_{letter}.weight", projection.module(layer))
}
