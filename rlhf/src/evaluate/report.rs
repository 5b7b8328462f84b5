//! Everything that was measured, as JSON holds it.

use serde::{Deserialize, Serialize};

use super::answers::{Drift, Sampling};
use super::duel::{Score, Verdict};
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
