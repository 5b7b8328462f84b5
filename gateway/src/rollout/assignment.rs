//! Which variant answers a unit: a pure function of the table and the unit's keys.
//!
//! An experiment has two salts, `SEED:in` for whether a unit takes part and `SEED:arm` for its arm: with one for both, the units
//! that join when the traffic rises would all fall into the same end of the arms. More traffic, or a higher weight of a
//! treatment, therefore adds units to the treatment and takes none away. Experiments are independent by their salts, unless they
//! share a layer, where they never meet. A unit takes part in the first experiment of the table that includes it.

use crate::rollout::hash::{HashVersion, Range, Salt, bucket, edge};
use crate::rollout::spec::{Kind, Spec, Sticky};
use std::ops;

/// The keys of a request, as far as they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unit<'a> {
    /// `user`, `safety_identifier`, or a header's value.
    pub user: Option<&'a str>,
    /// The conversation.
    pub conversation: Option<&'a str>,
    /// The request's own id.
    pub request: &'a str,
    /// A variant that a tester asks for by header.
    pub forced: Option<&'a str>,
}

impl<'a> Unit<'a> {
    /// The key of this kind; the request's where it is not known.
    pub fn key_of(&self, by: Sticky) -> &'a str {
        match by {
            Sticky::User => self.user.unwrap_or(self.request),
            Sticky::Conversation => self.conversation.unwrap_or(self.request),
            Sticky::Request => self.request,
        }
    }

    /// The key that keeps its arm, and which it is.
    fn key(&self, sticky: Sticky) -> (&'a str, Sticky) {
        match (sticky, self.user, self.conversation) {
            (Sticky::User, Some(user), _) => (user, Sticky::User),
            (Sticky::User | Sticky::Conversation, _, Some(conversation)) => (conversation, Sticky::Conversation),
            _ => (self.request, Sticky::Request),
        }
    }
}

/// A share of the units that takes part in nothing, so that the sum of all rollouts can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdout {
    salt: Salt,
    below: u32,
}

impl Holdout {
    /// Units below `share` by the holdout's own salt, `holdout:NAME`.
    pub fn new(name: &str, share: f64) -> Self {
        Self { salt: Salt::new(&format!("holdout:{name}")), below: edge(share) }
    }
}

/// What an experiment does with a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Its arm answers.
    Serve,
    /// The stable variant answers, and a copy goes to the treatment.
    Mirror,
    /// Both arms answer; the unit's arm is shown first.
    Both,
}

/// A rollout as the assignment sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Experiment {
    /// The rollout's name.
    pub name: String,
    /// What is done with a unit.
    pub mode: Mode,
    /// Variants by arm; the first is the control.
    pub variants: Vec<String>,
    sticky: Sticky,
    inclusion: Salt,
    arm: Salt,
    /// Buckets below it take part.
    below: u32,
    /// Each arm's buckets; none for arms without weight.
    places: Vec<ops::Range<u32>>,
    layer: Option<(String, String, Range)>,
}

impl Experiment {
    /// Of a rollout whose traffic is now so.
    pub fn new(spec: &Spec, coverage: f64, weights: &[f64]) -> Self {
        // From the last arm to the control, so that a treatment's range begins at 0 and only grows with its weight.
        let mut start = 0.0;
        let mut places: Vec<ops::Range<u32>> = weights
            .iter()
            .rev()
            .map(|weight| {
                let from = start;
                start += weight;
                edge(from)..edge(start)
            })
            .collect();
        places.reverse();
        Self {
            name: spec.name.clone(),
            mode: match spec.kind {
                Kind::Ab | Kind::Canary | Kind::Bandit => Mode::Serve,
                Kind::Shadow => Mode::Mirror,
                Kind::Interleaved => Mode::Both,
            },
            variants: spec.arms.iter().map(|arm| arm.variant.clone()).collect(),
            sticky: spec.sticky,
            inclusion: Salt::new(&format!("{}:in", spec.seed)),
            arm: Salt::new(&format!("{}:arm", spec.seed)),
            below: edge(coverage),
            places,
            layer: spec.layer.as_ref().map(|layer| (layer.name.clone(), format!("__{}", layer.name), layer.part)),
        }
    }

    /// The key of a unit that keeps its arm.
    pub fn key_of<'u>(&self, unit: &Unit<'u>) -> &'u str {
        unit.key(self.sticky).0
    }

    /// The arm of a unit that takes part.
    fn arm_of(&self, unit: &Unit<'_>) -> Option<(usize, Sticky)> {
        let (key, by) = unit.key(self.sticky);
        let admitted = self.layer.as_ref().is_none_or(|(_, seed, part)| part.holds(bucket(seed, key, HashVersion::V1)));
        if !admitted || self.inclusion.place(key) >= self.below {
            return None;
        }
        let place = self.arm.place(key);
        self.places.iter().position(|buckets| buckets.contains(&place)).map(|arm| (arm, by))
    }
}

/// Everything that decides who answers a public model name. Replaced as a whole when anything changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    stable: String,
    holdouts: Vec<Holdout>,
    experiments: Vec<Experiment>,
}

/// Two rollouts ask for the same part of a layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "rollout `{second}` asks for a part of the layer `{layer}` that `{first}` has; choose another part, or end `{first}` first"
)]
pub struct LayerClash {
    /// The layer.
    pub layer: String,
    /// Who has it.
    pub first: String,
    /// Who asks.
    pub second: String,
}

impl Table {
    /// A model whose stable variant answers whoever takes part in nothing.
    pub fn new(stable: String, holdouts: Vec<Holdout>, experiments: Vec<Experiment>) -> Result<Self, LayerClash> {
        for (index, second) in experiments.iter().enumerate() {
            for first in &experiments[..index] {
                if let (Some((layer, _, one)), Some((other, _, two))) = (&first.layer, &second.layer)
                    && layer == other
                    && one.meets(*two)
                {
                    return Err(LayerClash { layer: layer.clone(), first: first.name.clone(), second: second.name.clone() });
                }
            }
        }
        Ok(Self { stable, holdouts, experiments })
    }

    /// The experiments, in the order in which they are asked.
    pub fn experiments(&self) -> &[Experiment] {
        &self.experiments
    }

    /// Whether a tester may ask for this variant.
    pub fn knows(&self, variant: &str) -> bool {
        self.variant(variant).is_some()
    }

    fn variant(&self, name: &str) -> Option<&str> {
        let all = std::iter::once(&self.stable).chain(self.experiments.iter().flat_map(|experiment| &experiment.variants));
        all.map(String::as_str).find(|known| *known == name)
    }
}

/// Why a variant was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It takes part in nothing.
    Stable,
    /// It is held out of everything.
    Holdout,
    /// A tester asked for it; such answers count in no comparison.
    Forced,
    /// An experiment's arm, by this key.
    Arm {
        /// Which of the table's experiments.
        experiment: usize,
        /// Which of its arms.
        arm: usize,
        /// What keeps the arm.
        by: Sticky,
    },
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment<'t> {
    /// The variant that answers; of an interleaved experiment the one shown first.
    pub variant: &'t str,
    /// Why.
    pub reason: Reason,
    /// The experiment whose treatment gets a copy.
    pub mirror: Option<usize>,
}

/// Who answers this unit. The same table and unit give the same answer on every machine.
pub fn assign<'t>(table: &'t Table, unit: &Unit<'_>) -> Assignment<'t> {
    if let Some(variant) = unit.forced.and_then(|name| table.variant(name)) {
        return Assignment { variant, reason: Reason::Forced, mirror: None };
    }
    let (key, _) = unit.key(Sticky::User);
    if table.holdouts.iter().any(|holdout| holdout.salt.place(key) < holdout.below) {
        return Assignment { variant: &table.stable, reason: Reason::Holdout, mirror: None };
    }
    let mut answer = Assignment { variant: &table.stable, reason: Reason::Stable, mirror: None };
    for (index, experiment) in table.experiments.iter().enumerate() {
        let mirrors = experiment.mode == Mode::Mirror;
        let taken = if mirrors { answer.mirror.is_some() } else { answer.reason != Reason::Stable };
        if taken {
            continue;
        }
        let Some((arm, by)) = experiment.arm_of(unit) else { continue };
        if mirrors {
            answer.mirror = Some(index);
        } else if let Some(variant) = experiment.variants.get(arm) {
            (answer.variant, answer.reason) = (variant, Reason::Arm { experiment: index, arm, by });
        }
    }
    answer
}

#[cfg(test)]
mod tests;
