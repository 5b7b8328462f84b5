//! What was measured of a rollout, from what the database holds: the answers' own records, and what was said of them. A source that cannot
//! be read, or that there is none of, gives nothing; it never gives a number.

use crate::feedback::Metrics;
use crate::rollout::contest::verdicts;
use crate::rollout::decision::{Measure, Measured, State};
use crate::rollout::spec::{Condition, Kind as RolloutKind, Metric, Of, Quantity, Role, Spec};
use crate::rollout::statistics::quantile_weights;
use std::collections::BTreeMap;
use tidemill_rlhf::statistics::Interval;
use tidemill_store::records::Kind;
use tidemill_store::{ArmCounts, Comparisons, Each, Exposures, StoreError, UnitSums, UnitValue};
use uuid::Uuid;

/// Waiting for a first token for longer than this is a stall, where the condition has no bound of its own. Microseconds.
const STALL: i64 = 60_000_000;
/// How long after a change of shares some server may still have assigned by the old ones. Microseconds.
const LAG: i64 = 2_000_000;
/// How long a record may take to its place in the database after its answer has ended. Microseconds.
const WRITING: i64 = 2_000_000;

/// Where it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// What the answers were like.
    pub exposures: &'a Exposures,
    /// Which of two was better.
    pub comparisons: &'a Comparisons,
}

/// Measures a rollout; answers that began at `under_way` or later may not have ended (microseconds since 1970). An error means that not even the exposures could be read: then nothing is known, and nothing is decided.
pub async fn measured(
    sources: Sources<'_>,
    id: Uuid,
    spec: &Spec,
    state: &State,
    declared: &Metrics,
    under_way: i64,
) -> Result<Measured, StoreError> {
    let since = settled(state, state.since);
    let Sources { exposures, .. } = sources;
    let counts = exposures.counts(id, since).await?;
    // A bandit's shares change all the time, so only what came since the last change can be compared with them.
    let shared = if spec.kind == RolloutKind::Bandit { settled(state, state.changed) } else { since };
    let ended = exposures.units(id, shared, under_way.saturating_sub(WRITING)).await?;
    let mut metrics = BTreeMap::new();
    for metric in &spec.metrics {
        let arms = match source(sources, id, spec, since, metric, &counts, declared).await {
            Ok(arms) => arms,
            Err(error) => {
                tracing::warn!(rollout = spec.name, metric = metric.name(), %error, "a metric cannot be read");
                vec![None; spec.arms.len()]
            }
        };
        metrics.insert(metric.name(), arms);
    }
    let exposures = by_arm(spec, &counts, |count| count.arm).map(|count| count.map_or(0, |count| count.units)).collect();
    let ended = by_arm(spec, &ended, |(arm, _)| *arm).map(|units| units.map_or(0, |(_, units)| *units)).collect();
    Ok(Measured { exposures, ended, metrics, displaced: false })
}

/// From when on all servers assign by the shares that a state has since then. Before a rollout began nobody was assigned by it, whatever the
/// clock says of a server whose answers count.
fn settled(state: &State, since: i64) -> i64 {
    if since > state.started { since.saturating_add(LAG) } else { 0 }
}

/// What there is of each arm, in the arms' order.
fn by_arm<'a, T>(spec: &'a Spec, found: &'a [T], arm: impl Fn(&T) -> u32 + 'a) -> impl Iterator<Item = Option<&'a T>> {
    (0..spec.arms.len()).map(move |index| found.iter().find(|one| usize::try_from(arm(one)) == Ok(index)))
}

async fn source(
    Sources { exposures, comparisons }: Sources<'_>,
    id: Uuid,
    spec: &Spec,
    since: i64,
    metric: &Metric,
    counts: &[ArmCounts],
    declared: &Metrics,
) -> Result<Vec<Option<Measure>>, StoreError> {
    let none = vec![None; spec.arms.len()];
    let shares = |share: fn(&ArmCounts) -> (u64, u64)| {
        let measure = |count: Option<&ArmCounts>| {
            let (successes, trials) = count.map_or((0, 0), share);
            Some(Measure::Share { successes, trials })
        };
        by_arm(spec, counts, |count| count.arm).map(measure).collect::<Vec<_>>()
    };
    let of_units = |sums: &[UnitSums]| -> Vec<Option<Measure>> {
        by_arm(spec, sums, |sums| sums.arm).map(|sums| Some(of_unit_sums(sums))).collect()
    };
    // Never a share, whatever the numbers are: those of a model that is the base itself are all 0.
    let means = |sums: &[UnitSums]| -> Vec<Option<Measure>> {
        by_arm(spec, sums, |sums| sums.arm)
            .map(|sums| {
                let UnitSums { units, sum, squares, .. } = sums.copied().unwrap_or_default();
                Some(Measure::Mean { sum, sum_squares: squares, count: units })
            })
            .collect()
    };
    // A guardrail of the variant's own value counts answers, and is exact from the first one on. What compares arms compares people, of
    // whom each counts once: the answers of one are not independent, and somebody who asks more than all others is in one arm only.
    let share = async |value: UnitValue, of: fn(&ArmCounts) -> (u64, u64)| -> Result<Vec<Option<Measure>>, StoreError> {
        match (metric.role, metric.condition.of) {
            (Role::Guardrail, Of::Value) => Ok(shares(of)),
            _ => Ok(of_units(&exposures.unit_means(id, since, value).await?)),
        }
    };
    let said = async |kind: Kind, name: Option<&str>| -> Result<Vec<Option<Measure>>, StoreError> {
        Ok(of_units(&exposures.judgements(id, since, kind, name).await?))
    };
    match &metric.quantity {
        Quantity::ErrorRate => share(UnitValue::Failed, |count| (count.failed, count.answers)).await,
        Quantity::TruncationRate => share(UnitValue::Truncated, |count| (count.truncated, count.complete)).await,
        Quantity::RefusalRate => {
            let mut arms = share(UnitValue::Refused, |count| (count.refused, count.read)).await?;
            for (arm, count) in arms.iter_mut().zip(by_arm(spec, counts, |count| count.arm)) {
                // Answers came, and nobody has looked whether they refuse.
                if count.is_some_and(|count| count.complete > 0 && count.read == 0) {
                    *arm = None;
                }
            }
            Ok(arms)
        }
        Quantity::OutputTokens => Ok(of_units(&exposures.unit_means(id, since, UnitValue::Tokens).await?)),
        Quantity::TimeToFirstToken(quantile) => {
            let Condition { of, min, max } = metric.condition;
            // How many took longer says all that such a bound asks for.
            let bound = max.filter(|_| of == Of::Value && min.is_none());
            let bound_us = bound.map_or(STALL, |seconds| (seconds * 1e6) as i64);
            let seconds = |us: i64| us as f64 / 1e6;
            let each = if of == Of::Value { Each::Answer } else { Each::Unit };
            let mut arms = Vec::with_capacity(spec.arms.len());
            for arm in 0..spec.arms.len() {
                let arm = u32::try_from(arm).unwrap_or(u32::MAX);
                let times = exposures.first_tokens(id, arm, since, *quantile, bound_us, each).await?;
                let mut between = None;
                if bound.is_none() {
                    // Two arms share the chance of a wrong alarm.
                    let (low, high) = quantile_weights(*quantile, times.count, 0.5 * spec.alpha);
                    let at = async |weight: Option<f64>| match weight {
                        Some(weight) => exposures.first_token_above(id, arm, since, weight, bound_us, each).await,
                        None => Ok(None),
                    };
                    let (low, high) = (at(low).await?.map_or(0.0, seconds), at(high).await?.map_or(f64::INFINITY, seconds));
                    between = Some(Interval { low, high });
                }
                let (value, above) = (times.value_us.map_or(0.0, seconds), bound.map(|_| times.above));
                arms.push(Some(Measure::Quantile { value, count: times.count, above, between }));
            }
            Ok(arms)
        }
        Quantity::Thumb => said(Kind::Thumb, None).await,
        Quantity::Rating => said(Kind::Rating, None).await,
        named @ (Quantity::Feedback(_) | Quantity::Judge(_) | Quantity::Reward(_)) => match recorded_as(named) {
            Some(name) if declared.contains_key(&name) => said(Kind::Metric, Some(&name)).await,
            _ => Ok(none),
        },
        Quantity::Comparison => {
            let (first, second) = verdicts(&comparisons.of(id, since).await?);
            let mut arms = none;
            if let Some(treatment) = arms.get_mut(1) {
                *treatment = Some(Measure::Comparison { first, second });
            }
            Ok(arms)
        }
        Quantity::KlToBase => Ok(means(&exposures.unit_means(id, since, UnitValue::KlToBase).await?)),
        Quantity::LogprobToBase => Ok(means(&exposures.unit_means(id, since, UnitValue::LogprobToBase).await?)),
    }
}

/// Under which declared metric the scores of a judge, of a reward model or of an application are recorded.
pub fn recorded_as(quantity: &Quantity) -> Option<String> {
    match quantity {
        Quantity::Feedback(name) => Some(name.clone()),
        Quantity::Judge(_) | Quantity::Reward(_) => Some(quantity.to_string()),
        _ => None,
    }
}

/// One number of each unit. Where all of them are 0 or 1 they are a share, whose spread is known even when all are the same.
fn of_unit_sums(sums: Option<&UnitSums>) -> Measure {
    let UnitSums { units, sum, squares, .. } = sums.copied().unwrap_or_default();
    if sum == squares && sum >= 0.0 && sum.fract() == 0.0 && sum <= units as f64 {
        // A whole number that is not above `units`.
        return Measure::Share { successes: sum as u64, trials: units };
    }
    Measure::Mean { sum, sum_squares: squares, count: units }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yes_and_no_are_a_share_and_other_numbers_a_mean() {
        let sums = |units, sum, squares| of_unit_sums(Some(&UnitSums { arm: 0, units, sum, squares }));
        assert_eq!(sums(4, 3.0, 3.0), Measure::Share { successes: 3, trials: 4 });
        assert_eq!(sums(4, 0.0, 0.0), Measure::Share { successes: 0, trials: 4 });
        assert_eq!(of_unit_sums(None), Measure::Share { successes: 0, trials: 0 });
        assert_eq!(sums(2, 1.5, 1.25), Measure::Mean { sum: 1.5, sum_squares: 1.25, count: 2 });
        // −1 and 2: by their sums alone they could not be told from one unit's 1, but for the squares.
        assert_eq!(sums(2, 1.0, 5.0), Measure::Mean { sum: 1.0, sum_squares: 5.0, count: 2 });
        assert_eq!(sums(1, 4.0, 4.0), Measure::Mean { sum: 4.0, sum_squares: 4.0, count: 1 });
    }

    #[test]
    fn the_first_moments_of_new_shares_are_left_out_and_those_of_the_rollout_are_not() {
        let spec = Spec::parse(&serde_json::json!({
            "name": "r", "model": "m", "kind": "ab", "arms": [{"variant": "m"}, {"variant": "n"}],
            "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
        }));
        let (state, _) = crate::rollout::decision::start(&spec.unwrap(), "ann", 7);
        assert_eq!((settled(&state, 7), settled(&state, 8)), (0, 8 + LAG));
    }

    #[test]
    fn scores_are_recorded_under_their_metrics_name() {
        let name = |text: &str| recorded_as(&Quantity::try_from(text.to_owned()).unwrap());
        assert_eq!(name("judge.helpful").as_deref(), Some("judge.helpful"));
        assert_eq!(name("reward.rm").as_deref(), Some("reward.rm"));
        assert_eq!(name("feedback.metric.solved").as_deref(), Some("solved"));
        assert_eq!(name("error_rate"), None);
    }
}
