//! Everything that was measured, as JSON holds it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answers::{Drift, Sampling};
use super::duel::{Score, Verdict};
use super::gate::GateReport;
use super::preferences::Agreement;
use super::text::TextLoss;

/// One of the models that are compared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Contender {
    /// What it is called; the base is `base`.
    pub name: String,
    /// Names the adapter by its content; absent for the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// On held-out comparisons; absent for the base, whose implicit rewards are all 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preferences: Option<Agreement>,
    /// On ordinary text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<TextLoss>,
    /// Its own answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answers: Option<Drift>,
    /// Mean reward of its answers by rule, where rules judged; an answer that a rule has no opinion about does not count.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rewards: BTreeMap<String, f64>,
    /// What it was trained on, where its lineage says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_on: Option<TrainedOn>,
}

/// What is behind an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainedOn {
    /// Comparisons, judgements, answers or prompts that it learnt from.
    pub samples: u64,
    /// People who judged them.
    pub raters: u64,
    /// The largest part of the loss that is one rater's.
    pub rater_share: f64,
    /// Its labels were shuffled: it is a control.
    #[serde(default)]
    pub shuffled_labels: bool,
}

impl TrainedOn {
    /// From the `data` of a training's lineage. None where it counts nothing.
    pub fn of(data: &Value) -> Option<Self> {
        Some(Self {
            samples: data["train"].as_u64()?,
            raters: data["raters"].as_array().map_or(0, Vec::len) as u64,
            rater_share: data["largest_rater_share"].as_f64().unwrap_or(0.0),
            shuffled_labels: data["shuffled_labels"].as_bool().unwrap_or(false),
        })
    }
}

/// A prompt and what each model said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// The last message of the prompt.
    pub prompt: String,
    /// One text per contender, in their order.
    pub answers: Vec<String>,
    /// The duel's verdict about the first and the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
}

/// An evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The base model's name.
    pub base: String,
    /// Names its weights by their content.
    pub base_digest: String,
    /// Where comparisons and prompts came from.
    pub rows: String,
    /// How answers were drawn.
    pub sampling: Sampling,
    /// The models: adapters first, the base last.
    pub contenders: Vec<Contender>,
    /// Who judged the duel of the first two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<String>,
    /// Its score, for the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duel: Option<Score>,
    /// What gates said of the first contender, where they were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gates: Option<GateReport>,
    /// All prompts that were answered.
    pub examples: Vec<Example>,
}

impl Evaluation {
    /// The contender's loss on text over the base's, less 1.
    pub fn text_drift(&self, contender: &Contender) -> Option<f64> {
        let base = self.contenders.last()?.text?;
        Some(contender.text?.loss / base.loss - 1.0)
    }
}
