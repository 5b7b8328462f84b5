//! What every public model name serves now: its stable variant, and the rollouts that run on it. Values, made of rows.

use crate::rollout::assignment::{Assignment, Experiment, Holdout, LayerClash, Reason, Table, Unit, assign};
use crate::rollout::decision::{State, Status};
use crate::rollout::spec::{Arm, Spec};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;
use tidemill_store::{Alias, Rollout};
use uuid::Uuid;

/// Who can answer a public model name.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// What rollouts, records and the response's header call it.
    pub name: String,
    /// The registry's name of what answers.
    pub model: String,
    /// A system prompt that is put before every conversation.
    pub prompt_prefix: Option<Arc<str>>,
    /// Sampling parameters of requests that are silent about them.
    pub defaults: Map<String, Value>,
}

impl Variant {
    /// A model as it is.
    pub fn plain(name: &str) -> Self {
        Self { name: name.to_owned(), model: name.to_owned(), prompt_prefix: None, defaults: Map::new() }
    }

    /// A rollout's arm.
    pub fn of(arm: &Arm) -> Self {
        Self {
            name: arm.variant.clone(),
            model: arm.model.clone().unwrap_or_else(|| arm.variant.clone()),
            prompt_prefix: arm.prompt_prefix.as_deref().map(Arc::from),
            defaults: arm.defaults.clone(),
        }
    }

    /// As an arm of this weight.
    pub fn to_arm(&self, weight: f64) -> Arm {
        Arm {
            variant: self.name.clone(),
            weight,
            model: (self.model != self.name).then(|| self.model.clone()),
            prompt_prefix: self.prompt_prefix.as_deref().map(str::to_owned),
            defaults: self.defaults.clone(),
        }
    }
}

/// A rollout that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Running {
    /// Its row.
    pub id: Uuid,
    /// By which people know it.
    pub name: String,
    /// By arm.
    pub arms: Vec<Arc<Variant>>,
    /// What the base model is to score, if anything is.
    pub scored: Option<Scored>,
}

/// Which answers of a rollout the base model scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Of each arm this share.
    pub shares: Vec<f64>,
    /// Answers since then, in microseconds since 1970.
    pub since: i64,
}

impl Scored {
    /// For the metrics of a rollout in this state.
    fn of(spec: &Spec, state: &State) -> Option<Self> {
        let share = |arm: usize| spec.metrics.iter().map(|metric| metric.scored(arm)).fold(0.0, f64::max);
        let shares: Vec<f64> = (0..spec.arms.len()).map(share).collect();
        shares.iter().any(|share| *share > 0.0).then_some(Self { shares, since: state.since })
    }
}

/// A public model name.
#[derive(Clone, Debug, PartialEq)]
pub struct Public {
    table: Table,
    stable: Arc<Variant>,
    /// In the order of the table's experiments.
    rollouts: Vec<Running>,
}

/// Who answers a request, and what it counts for.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen<'a> {
    /// Who.
    pub variant: &'a Arc<Variant>,
    /// As the table has it: why, and whose treatment gets a copy.
    pub assignment: Assignment<'a>,
    /// The rollout, the arm and the unit's key that it counts for.
    pub counts: Option<(&'a Running, usize, &'a str)>,
}

impl Public {
    /// What answers whoever takes part in nothing, and in the place of a variant that gives no answer.
    pub fn stable(&self) -> &Arc<Variant> {
        &self.stable
    }

    /// The rollouts that run, in the order in which they are asked.
    pub fn rollouts(&self) -> &[Running] {
        &self.rollouts
    }

    /// The rules of the assignment.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Who answers this unit.
    pub fn choose<'a>(&'a self, unit: &Unit<'a>) -> Chosen<'a> {
        let assignment = assign(&self.table, unit);
        let (variant, counts) = match assignment.reason {
            Reason::Arm { experiment, arm, by } => {
                let running = self.rollouts.get(experiment);
                let variant = running.and_then(|running| running.arms.get(arm));
                let counts = running.map(|running| (running, arm, unit.key_of(by)));
                (variant, counts)
            }
            Reason::Forced => {
                (self.rollouts.iter().flat_map(|running| &running.arms).find(|arm| arm.name == assignment.variant), None)
            }
            Reason::Stable | Reason::Holdout => (None, None),
        };
        Chosen { variant: variant.unwrap_or(&self.stable), assignment, counts: counts.filter(|_| variant.is_some()) }
    }
}

/// Everything that a server assigns by.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    /// Names on which a rollout runs or was promoted.
    models: BTreeMap<String, Public>,
}

/// A rollout's row that cannot be served.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BadRow {
    /// It cannot be read.
    #[error("rollout `{name}` cannot be read: {reason}; roll it back, or restore its row from a backup")]
    Json {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Another one has its part of a layer.
    #[error(transparent)]
    Clash(#[from] LayerClash),
}

/// A row's spec and state.
pub fn read(row: &Rollout) -> Result<(Spec, State), BadRow> {
    let bad = |error: serde_json::Error| BadRow::Json { name: row.name.clone(), reason: error.to_string() };
    let spec = serde_json::from_value(row.spec.clone()).map_err(bad)?;
    Ok((spec, serde_json::from_value(row.state.clone()).map_err(bad)?))
}

impl Tables {
    /// Of the rollouts that run, in the order in which they began, the newest promotion of each model, the registry's aliases, and who
    /// is held out. Rows that cannot be served are left out and told.
    pub fn new(running: &[Rollout], promoted: &[Rollout], aliases: &[Alias], holdouts: &[Holdout]) -> (Self, Vec<BadRow>) {
        let mut problems = Vec::new();
        let mut stable: BTreeMap<&str, Arc<Variant>> = BTreeMap::new();
        for row in promoted {
            match read(row) {
                Ok((spec, State { status: Status::Promoted { arm }, .. })) => {
                    // Who moved the alias afterwards has spoken last; the promotion of an adapter moves it itself.
                    let moved =
                        aliases.iter().any(|alias| alias.name == row.model && row.ended.is_none_or(|end| alias.updated >= end));
                    let variant = spec.arms.get(arm).filter(|_| !moved).map(Variant::of);
                    stable.extend(variant.map(|variant| (row.model.as_str(), Arc::new(variant))));
                }
                Ok(_) => {}
                Err(problem) => problems.push(problem),
            }
        }
        let mut taken: Vec<Experiment> = Vec::new();
        let mut parts: BTreeMap<&str, (Vec<Experiment>, Vec<Running>)> = BTreeMap::new();
        for row in running {
            let (spec, state) = match read(row) {
                Ok(read) => read,
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            let experiment = Experiment::new(&spec, state.coverage, &state.weights);
            taken.push(experiment.clone());
            if let Err(clash) = Table::new(String::new(), Vec::new(), taken.clone()) {
                taken.pop();
                problems.push(clash.into());
                continue;
            }
            let arms = spec.arms.iter().map(|arm| Arc::new(Variant::of(arm))).collect();
            let (experiments, rollouts) = parts.entry(&row.model).or_default();
            experiments.push(experiment);
            rollouts.push(Running { id: row.id, name: row.name.clone(), arms, scored: Scored::of(&spec, &state) });
        }
        let names: std::collections::BTreeSet<&str> = stable.keys().chain(parts.keys()).copied().collect();
        let mut models = BTreeMap::new();
        for name in names {
            let stable = stable.remove(name).unwrap_or_else(|| Arc::new(Variant::plain(name)));
            let (experiments, rollouts) = parts.remove(name).unwrap_or_default();
            match Table::new(stable.name.clone(), holdouts.to_vec(), experiments) {
                Ok(table) => drop(models.insert(name.to_owned(), Public { table, stable, rollouts })),
                Err(clash) => problems.push(clash.into()),
            }
        }
        (Self { models }, problems)
    }

    /// The public name, if anything is to be decided about it.
    pub fn of(&self, model: &str) -> Option<&Public> {
        self.models.get(model)
    }

    /// All public names about which something is to be decided.
    pub fn models(&self) -> impl Iterator<Item = (&str, &Public)> {
        self.models.iter().map(|(name, public)| (name.as_str(), public))
    }

    /// What answers whoever takes part in nothing.
    pub fn stable(&self, model: &str) -> Arc<Variant> {
        self.of(model).map_or_else(|| Arc::new(Variant::plain(model)), |public| Arc::clone(&public.stable))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::decision::{Act, act, start};
    use crate::rollout::spec::Sticky;
    use serde_json::json;

    fn spec(name: &str, more: Value) -> Spec {
        let mut body = json!({
            "name": name, "model": "assistant", "kind": "ab",
            "arms": [{"variant": "assistant"}, {"variant": "new", "model": "base:new", "prompt_prefix": "Be brief."}],
            "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Spec::parse(&body).unwrap()
    }

    /// A row of this number, after these acts of a person.
    fn row(number: u128, spec: &Spec, acts: &[Act]) -> Rollout {
        let mut state = start(spec, "ann", 0).0;
        for (index, step) in acts.iter().enumerate() {
            state = act(spec, &state, *step, "ann", 10 + index as i64).unwrap().0;
        }
        Rollout {
            id: Uuid::from_u128(number),
            created: 0,
            updated: 0,
            ended: state.status.is_over().then_some(10),
            name: spec.name.clone(),
            model: spec.model.clone(),
            spec: serde_json::to_value(spec).unwrap(),
            state: serde_json::to_value(&state).unwrap(),
            version: 0,
            latest: Value::Null,
        }
    }

    fn unit(user: &str) -> Unit<'_> {
        Unit { user: Some(user), request: "r", ..Unit::default() }
    }

    #[test]
    fn a_unit_of_an_arm_is_answered_by_it_and_counts_for_it() {
        let (tables, problems) = Tables::new(&[row(7, &spec("a", json!({})), &[])], &[], &[], &[]);
        assert!(problems.is_empty() && tables.of("else").is_none());
        let public = tables.of("assistant").unwrap();
        let mut seen = [0; 2];
        for id in 0..200 {
            let user = format!("user-{id}");
            let chosen = public.choose(&unit(&user));
            let (running, arm, key) = chosen.counts.unwrap();
            seen[arm] += 1;
            assert_eq!(
                (running.id, key, chosen.variant.name.as_str()),
                (Uuid::from_u128(7), user.as_str(), ["assistant", "new"][arm])
            );
            assert!(matches!(chosen.assignment.reason, Reason::Arm { by: Sticky::User, .. }));
        }
        assert!(seen[0] > 50 && seen[1] > 50, "{seen:?}");
        // A tester counts for nothing, and gets all of the variant.
        let forced = public.choose(&Unit { forced: Some("new"), ..unit("u") });
        assert_eq!((forced.variant.model.as_str(), forced.variant.prompt_prefix.as_deref()), ("base:new", Some("Be brief.")));
        assert_eq!((forced.counts, public.stable().name.as_str()), (None, "assistant"));
    }

    #[test]
    fn a_promotion_stays_what_the_name_serves_until_somebody_moves_the_alias() {
        let promoted = row(1, &spec("a", json!({})), &[Act::Promote { arm: 1 }]);
        let (tables, _) = Tables::new(&[], std::slice::from_ref(&promoted), &[], &[]);
        let stable = tables.stable("assistant");
        assert_eq!((stable.name.as_str(), stable.model.as_str()), ("new", "base:new"));
        assert_eq!(Variant::of(&stable.to_arm(0.5)), *stable);
        let chosen = tables.of("assistant").unwrap().choose(&unit("u"));
        assert_eq!((chosen.variant, chosen.counts), (&stable, None));
        for (updated, name) in [(9, "new"), (10, "assistant")] {
            let alias = Alias { base: "base".into(), name: "assistant".into(), adapter: Uuid::nil(), updated };
            let (tables, _) = Tables::new(&[], std::slice::from_ref(&promoted), &[alias], &[]);
            assert_eq!(tables.stable("assistant").name, name, "{updated}");
        }
        assert_eq!(*tables.stable("never heard of"), Variant::plain("never heard of"));
    }

    #[test]
    fn a_row_that_cannot_be_served_is_told_and_leaves_the_others_alone() {
        let layer = json!({"layer": {"name": "l", "from": 0, "to": 0.5}});
        let [one, two] = ["a", "b"].map(|name| spec(name, layer.clone()));
        let broken = Rollout { spec: json!({"name": 1}), ..row(9, &one, &[]) };
        let (tables, problems) = Tables::new(&[broken, row(1, &one, &[]), row(2, &two, &[])], &[], &[], &[]);
        let public = tables.of("assistant").unwrap();
        assert_eq!(public.rollouts().iter().map(|running| running.name.as_str()).collect::<Vec<_>>(), ["a"]);
        assert!(matches!(&problems[..], [BadRow::Json { .. }, BadRow::Clash(clash)] if clash.second == "b"), "{problems:?}");
    }
}
