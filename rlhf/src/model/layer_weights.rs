//! What a layer's numbers are: those of the model's files, and whose numbers the trained parameters hold.

use tidemill_engine::{ModelFiles, Part, Projection, Weight};

use super::ModelError;
use super::layout::{Group, GroupLayout, Layout};
use super::whole::Whole;

/// What a layer's file weights are, beside its matrices.
pub(super) struct LayerWeights {
    pub index: usize,
    attention_norm: Vec<f32>,
    feed_forward_norm: Vec<f32>,
    /// Per-head norms of queries and keys.
    head_norms: Option<[Vec<f32>; 2]>,
    /// Norms behind attention and feed-forward part.
    norms_behind: Option<[Vec<f32>; 2]>,
    /// By group; empty without.
    pub biases: [Vec<f32>; 4],
}

impl LayerWeights {
    pub fn load(files: &ModelFiles, index: usize) -> Result<Self, ModelError> {
        let config = files.config();
        let vector = |part: Part| files.vector(Weight::Layer(index, part));
        let bias = |wanted: bool, parts: &[Part]| -> Result<Vec<f32>, ModelError> {
            if !wanted {
                return Ok(Vec::new());
            }
            Ok(parts.iter().map(|part| vector(*part)).collect::<Result<Vec<_>, _>>()?.concat())
        };
        // Every matrix is looked up once here, so that a file that lacks one is refused before training starts.
        for projection in Projection::ALL {
            files.matrix(Weight::Layer(index, projection.part()))?;
        }
        Ok(Self {
            index,
            attention_norm: vector(Part::AttentionNorm)?,
            feed_forward_norm: vector(Part::FeedForwardNorm)?,
            head_norms: if config.qk_norm { Some([vector(Part::QueryNorm)?, vector(Part::KeyNorm)?]) } else { None },
            norms_behind: match config.gemma {
                Some(_) => Some([vector(Part::PostAttentionNorm)?, vector(Part::PostFeedForwardNorm)?]),
                None => None,
            },
            biases: [
                bias(config.qkv_bias, &[Part::QueryBias, Part::KeyBias, Part::ValueBias])?,
                bias(config.output_bias, &[Part::AttentionOutputBias])?,
                bias(config.mlp_bias, &[Part::GateBias, Part::UpBias])?,
                bias(config.mlp_bias, &[Part::DownBias])?,
            ],
        })
    }

    /// The norms of the files, or those among the numbers of a layer that is trained whole.
    pub fn norms<'a>(&'a self, whole: Option<&Whole>, vectors: &'a [f32]) -> Norms<'a> {
        let heads = self.head_norms.as_ref();
        let behind = self.norms_behind.as_ref().map(|[attention, feed_forward]| [attention.as_slice(), feed_forward.as_slice()]);
        match whole {
            None => Norms {
                attention: &self.attention_norm,
                feed_forward: &self.feed_forward_norm,
                heads: heads.map(|[queries, keys]| [queries.as_slice(), keys.as_slice()]),
                behind,
            },
            Some(whole) => {
                let of = |part: Part| &vectors[whole.vector(part)];
                Norms {
                    attention: of(Part::AttentionNorm),
                    feed_forward: of(Part::FeedForwardNorm),
                    heads: heads.map(|_| [of(Part::QueryNorm), of(Part::KeyNorm)]),
                    // No model that has them is trained whole.
                    behind,
                }
            }
        }
    }
}

/// What of a layer is trained.
pub(super) enum Trained {
    /// What an adapter adds: one parameter.
    Adapter(Layout),
    /// Everything: two parameters.
    Whole(Whole),
}

impl Trained {
    /// Where an adapter's numbers of a group lie, if it has any there.
    pub fn group(&self, group: Group) -> Option<&GroupLayout> {
        let Trained::Adapter(layout) = self else { return None };
        Some(&layout.groups[group as usize]).filter(|group| !group.slots.is_empty())
    }

    /// Where the numbers of a layer that is trained whole lie.
    pub fn whole(&self) -> Option<&Whole> {
        match self {
            Trained::Whole(whole) => Some(whole),
            Trained::Adapter(_) => None,
        }
    }

    /// Numbers of the first and of the second parameter.
    pub fn sizes(&self) -> (usize, usize) {
        match self {
            Trained::Adapter(layout) => (layout.len, 0),
            Trained::Whole(whole) => (whole.matrices_len(), whole.vectors_len()),
        }
    }
}

/// Norms' weights of a layer.
pub(super) struct Norms<'a> {
    pub attention: &'a [f32],
    pub feed_forward: &'a [f32],
    /// Of queries and keys.
    pub heads: Option<[&'a [f32]; 2]>,
    /// Behind attention and feed-forward part.
    pub behind: Option<[&'a [f32]; 2]>,
}
