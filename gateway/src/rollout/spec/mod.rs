//! What an operator writes to start a rollout.

mod metric;
mod parse;
#[cfg(test)]
mod tests;

pub use metric::{Condition, Metric, Of, Quantity, Role};

use crate::rollout::hash::Range;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A rollout as it was asked for, with every default filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Its name, by which people know it.
    pub name: String,
    /// The public model name whose traffic it is about.
    pub model: String,
    /// What is done with the traffic.
    pub kind: Kind,
    /// The variants; the first is the control, which is what the model serves now.
    pub arms: Vec<Arm>,
    /// Share of the units that take part, in (0, 1]; a canary's is set by its steps.
    pub traffic: f64,
    /// A canary's steps.
    pub steps: Vec<Step>,
    /// What is measured, and what of it decides.
    pub metrics: Vec<Metric>,
    /// Who keeps an arm.
    pub sticky: Sticky,
    /// Part of a layer, which rollouts in other parts of it do not meet.
    pub layer: Option<LayerPart>,
    /// Salt of the assignment.
    pub seed: String,
    /// Chance of promoting what is not better, over all looks.
    pub alpha: f64,
    /// Observations at which the confidence sequences are narrowest: N*.
    pub tuning: f64,
    /// Units that each arm must have answered before a goal decides anything.
    pub min_exposure: u64,
    /// Seconds between measurements.
    pub interval: u64,
    /// Seconds after which it ends in any case.
    pub deadline: Option<u64>,
    /// What happens then.
    pub at_deadline: AtDeadline,
    /// Whether a person must approve the promotion.
    pub approval: bool,
    /// Whether whoever approves or promotes must hold another key than the one that started it. Then a person must approve.
    #[serde(default)]
    pub four_eyes: bool,
    /// A bandit's smallest share of an arm.
    pub floor: f64,
}

/// What is done with the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Arms side by side at fixed shares.
    Ab,
    /// A treatment whose share rises step by step.
    Canary,
    /// A treatment that answers a copy of the requests and that nobody sees.
    Shadow,
    /// Both answers go to one user, who says which is better.
    Interleaved,
    /// Shares follow what is learnt.
    Bandit,
}

/// A variant and its share of the units that take part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// The variant's name.
    pub variant: String,
    /// All arms' weights sum to 1.
    pub weight: f64,
    /// Who answers: a name of the registry. The variant's own name, unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// A system prompt that is put before every conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_prefix: Option<String>,
    /// Sampling parameters of requests that are silent about them, under chat's names.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub defaults: Map<String, Value>,
}

/// A step of a canary.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The treatment's share of all traffic, in (0, 1).
    SetWeight(f64),
    /// So many seconds.
    PauseFor(u64),
    /// Until the treatment has answered so many units since the step began.
    PauseSamples(u64),
    /// Until a person approves.
    Approval,
}

/// Who keeps an arm. What is not known of a request is replaced by the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sticky {
    /// `user`, `safety_identifier` or the header; else the conversation; else nobody.
    User,
    /// The conversation; else nobody.
    Conversation,
    /// Nobody: each request is drawn anew.
    Request,
}

/// Part of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPart {
    /// The layer.
    pub name: String,
    /// The part of it, in thousandths at the finest.
    pub part: Range,
}

/// What happens to a rollout that nothing has decided in its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtDeadline {
    /// It stays as it is until a person decides.
    Pause,
    /// The control keeps the traffic.
    RollBack,
}

impl Spec {
    /// How a canary's weight is made: the share of units that take part, and the arms' shares among them. Up to the weight at
    /// which all take part, control and treatment keep their proportion, so that what was measured at different weights may be
    /// added up; beyond, the proportion follows the weight.
    pub fn at_weight(&self, weight: f64) -> (f64, Vec<f64>) {
        let treated = self.arms.get(1).map_or(0.5, |arm| arm.weight);
        if weight <= treated { (weight / treated, self.weights()) } else { (1.0, vec![1.0 - weight, weight]) }
    }

    /// The same with the approval of a second key, which a deployment may ask of every rollout.
    pub fn under_four_eyes(self) -> Self {
        Self { four_eyes: true, approval: true, ..self }
    }

    /// The arms' weights.
    pub fn weights(&self) -> Vec<f64> {
        self.arms.iter().map(|arm| arm.weight).collect()
    }

    /// In how many periods the arms' proportion differs: each is compared for itself, and has its part of α.
    pub fn periods(&self) -> u32 {
        let mut proportions: Vec<Vec<f64>> = self
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::SetWeight(weight) => Some(self.at_weight(*weight).1),
                _ => None,
            })
            .collect();
        proportions.dedup();
        u32::try_from(proportions.len().max(1)).unwrap_or(u32::MAX)
    }
}
