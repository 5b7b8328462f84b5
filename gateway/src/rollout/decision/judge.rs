//! What one metric says of one arm.

use crate::rollout::spec::{Condition, Metric, Of, Quantity, Role};
use crate::rollout::statistics::{
    Effect, Level, Sample, Verdicts, bounded_sequence, confidence_sequence, contrast, exact_sequence, pairwise, relative_sequence,
};
use serde::{Deserialize, Serialize};
use tidemill_rlhf::statistics::Interval;

/// What was measured of an arm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measure {
    /// A share of trials.
    Share {
        /// Trials with the outcome.
        successes: u64,
        /// All trials.
        trials: u64,
    },
    /// A mean.
    Mean {
        /// Σ x
        sum: f64,
        /// Σ x²
        sum_squares: f64,
        /// Observations.
        count: u64,
    },
    /// A quantile.
    Quantile {
        /// Its value.
        value: f64,
        /// Observations.
        count: u64,
        /// Observations above the condition's `max`, which turn a quantile's bound into a share's.
        above: Option<u64>,
        /// Where it lies at all times, for conditions that this does not turn into a share's; open ends are 0 and infinite.
        between: Option<Interval>,
    },
    /// Comparisons with the control, by the place where this arm was shown.
    Comparison {
        /// Shown first.
        first: Verdicts,
        /// Shown second.
        second: Verdicts,
    },
}

impl Measure {
    /// Observations behind it.
    pub fn count(&self) -> u64 {
        match self {
            Self::Share { trials, .. } => *trials,
            Self::Mean { count, .. } | Self::Quantile { count, .. } => *count,
            Self::Comparison { first, second } => first.total() + second.total(),
        }
    }

    /// The number itself, where it is one.
    fn centre(&self) -> Option<f64> {
        let value = match self {
            Self::Quantile { value, count, .. } => (*count > 0).then_some(*value),
            Self::Comparison { first, second } => pairwise(*first, *second).map(|result| result.win_rate),
            _ => self.sample().map(|sample| sample.mean),
        };
        value.filter(|value| value.is_finite())
    }

    /// As a sample, which two arms are compared by; None for what is none, or makes no sense.
    pub fn sample(&self) -> Option<Sample> {
        match self {
            Self::Share { successes, trials } => Sample::proportion(*successes, *trials),
            Self::Mean { sum, sum_squares, count } => Sample::mean(*sum, *sum_squares, *count),
            Self::Quantile { .. } | Self::Comparison { .. } => None,
        }
    }
}

/// What a metric says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A guardrail holds, as far as can be seen.
    Pass,
    /// A guardrail is surely broken.
    Fail,
    /// A goal is surely met.
    Met,
    /// A goal is surely missed.
    Missed,
    /// A goal may be met or missed; more data will tell.
    Open,
    /// Too few observations to say anything.
    Waiting,
    /// The data are missing, are no numbers, or point to a broken guardrail without being sure.
    Inconclusive,
}

/// What one metric says of one arm, and the numbers it stands on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The metric's name.
    pub metric: String,
    /// What it decides.
    pub role: Role,
    /// The arm.
    pub arm: usize,
    /// What must hold.
    pub condition: Condition,
    /// What it says.
    pub verdict: Verdict,
    /// The control's own number.
    pub control: Option<f64>,
    /// The arm's own number.
    pub treatment: Option<f64>,
    /// What the condition is about: the arm's number, or its difference from the control's.
    pub value: Option<f64>,
    /// Everything that is not excluded, however often one looked; of a quantile, the share of observations above the bound.
    pub interval: Option<Interval>,
    /// Chance that the interval ever misses.
    pub alpha: f64,
    /// Observations of the smaller arm.
    pub samples: u64,
    /// Nothing follows from it.
    pub dry_run: bool,
    /// What there is to know, for people.
    pub note: String,
}

/// The numbers of a judgement.
struct Reading {
    value: f64,
    interval: Option<Interval>,
    /// What the interval says of the condition.
    relation: Relation,
    samples: u64,
    /// Holds from the first observation on, and not only when there are many.
    exact: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Relation {
    Within,
    Outside,
    Across,
}

/// Judges a treatment. `exposures` is how many units the arm has answered, which tells an arm without traffic from a source
/// without data.
pub fn judge(
    metric: &Metric,
    arm: usize,
    control: Option<&Measure>,
    treatment: Option<&Measure>,
    exposures: u64,
    level: Level,
) -> Judgement {
    let mut judgement = Judgement {
        metric: metric.name(),
        role: metric.role,
        arm,
        condition: metric.condition,
        verdict: Verdict::Inconclusive,
        control: control.and_then(Measure::centre),
        treatment: treatment.and_then(Measure::centre),
        value: None,
        interval: None,
        alpha: level.alpha,
        samples: 0,
        dry_run: metric.dry_run,
        note: String::new(),
    };
    match read(metric, control, treatment, level) {
        Ok(reading) => {
            judgement.verdict = verdict(metric, &reading);
            judgement.value = Some(reading.value);
            judgement.interval = reading.interval;
            judgement.samples = reading.samples;
            judgement.note = note(metric, &reading, judgement.verdict);
        }
        Err(Unread::Early(samples)) if metric.role == Role::Goal || exposures < metric.min_samples => {
            judgement.verdict = Verdict::Waiting;
            judgement.samples = samples;
            judgement.note = format!("{samples} of {} observations", metric.min_samples);
        }
        Err(Unread::Early(samples)) => {
            judgement.samples = samples;
            judgement.note = format!("{exposures} units were answered, and {samples} observations came");
        }
        Err(Unread::Missing(why)) => judgement.note = why.to_owned(),
    }
    judgement
}

/// Why there is no reading.
enum Unread {
    /// Too few observations for any number.
    Early(u64),
    /// What came cannot be read.
    Missing(&'static str),
}

fn verdict(metric: &Metric, reading: &Reading) -> Verdict {
    let enough = reading.samples >= metric.min_samples;
    match (metric.role, reading.relation) {
        (Role::Guardrail, Relation::Outside) if enough || reading.exact => Verdict::Fail,
        _ if !enough => Verdict::Waiting,
        (Role::Guardrail, _) if metric.condition.holds(reading.value) => Verdict::Pass,
        (Role::Guardrail, _) => Verdict::Inconclusive,
        (Role::Goal, Relation::Within) => Verdict::Met,
        (Role::Goal, Relation::Outside) => Verdict::Missed,
        (Role::Goal, Relation::Across) => Verdict::Open,
    }
}

fn note(metric: &Metric, reading: &Reading, verdict: Verdict) -> String {
    match verdict {
        Verdict::Waiting => format!("{} of {} observations", reading.samples, metric.min_samples),
        Verdict::Inconclusive => "outside its bounds, but it may be chance".to_owned(),
        _ => String::new(),
    }
}

fn read(metric: &Metric, control: Option<&Measure>, treatment: Option<&Measure>, level: Level) -> Result<Reading, Unread> {
    const NOTHING: Unread = Unread::Missing("its source gave nothing");
    let condition = &metric.condition;
    let treatment = treatment.ok_or(NOTHING)?;
    let own = readable(treatment)?;
    if condition.of == Of::Value {
        return value(metric, treatment, level);
    }
    let control = control.ok_or(NOTHING)?;
    let samples = own.min(readable(control)?);
    let relative = condition.of == Of::Relative;
    if let (Measure::Quantile { value: base, between: theirs, .. }, Measure::Quantile { value, between: own, .. }) =
        (control, treatment)
    {
        let change = if relative { (value - base) / base } else { value - base };
        let between = theirs.zip(*own).map(|(theirs, own)| match relative {
            true => Interval { low: own.low / theirs.high - 1.0, high: own.high / theirs.low - 1.0 },
            false => Interval { low: own.low - theirs.high, high: own.high - theirs.low },
        });
        return quantile(condition, change, between, samples);
    }
    let mut level = level;
    if metric.role == Role::Guardrail && metric.quantity.is_share() && !relative {
        level.alpha *= 0.5;
        if let (Some(interval), Some(own), Some(base)) =
            (apart(control, treatment, level.alpha), treatment.centre(), control.centre())
            && relation(condition, interval) == Relation::Outside
        {
            return finite(condition, own - base, interval, samples, true);
        }
    }
    let (Some(base), Some(sample)) = (control.sample(), treatment.sample()) else {
        // One observation has no variance yet; anything else is wrong.
        return Err(if samples < 2 { Unread::Early(samples) } else { Unread::Missing("the arms' measures cannot be compared") });
    };
    if relative && base.mean == 0.0 {
        return Err(Unread::Missing("the control's value is 0, so nothing is relative to it; compare the difference"));
    }
    let change = (sample.mean - base.mean) / if relative { base.mean.abs() } else { 1.0 };
    let Some(estimate) = contrast(&base, &sample, Effect::Difference) else { return alike(metric, change, samples) };
    if !relative {
        return finite(condition, change, confidence_sequence(&estimate, level).interval, samples, false);
    }
    match relative_sequence(&base, &sample, level) {
        Some(sequence) => finite(condition, change, sequence.interval, samples, false),
        None if change.is_finite() => {
            Ok(Reading { value: change, interval: None, relation: Relation::Across, samples, exact: false })
        }
        None => Err(Unread::Missing("its numbers are too large to compare")),
    }
}

/// The difference of two means of numbers between 0 and 1, by a sequence of each that holds from the first observation on: a variant that is
/// broken for its first few users is gone before there are many.
fn apart(control: &Measure, treatment: &Measure, alpha: f64) -> Option<Interval> {
    let of = |measure: &Measure| match measure {
        Measure::Share { successes, trials } => exact_sequence(*successes, *trials, 0.5 * alpha),
        Measure::Mean { sum, count, .. } => bounded_sequence(*sum, *count, 0.5 * alpha),
        Measure::Quantile { .. } | Measure::Comparison { .. } => None,
    };
    let (control, treatment) = (of(control)?, of(treatment)?);
    Some(Interval { low: treatment.low - control.high, high: treatment.high - control.low })
}

/// A condition on a quantile, or on how it differs from the control's.
fn quantile(condition: &Condition, value: f64, between: Option<Interval>, samples: u64) -> Result<Reading, Unread> {
    if !value.is_finite() {
        return Err(Unread::Missing("the control's value is 0, so nothing is relative to it; compare the difference"));
    }
    let relation = between.map_or(Relation::Across, |interval| relation(condition, interval));
    let interval = between.filter(|interval| interval.low.is_finite() && interval.high.is_finite());
    Ok(Reading { value, interval, relation, samples, exact: true })
}

/// The number of observations of a measure that makes sense.
fn readable(measure: &Measure) -> Result<u64, Unread> {
    let sound = match measure {
        Measure::Share { successes, trials } => successes <= trials,
        Measure::Mean { sum, sum_squares, .. } => sum.is_finite() && sum_squares.is_finite(),
        Measure::Quantile { value, count, above, .. } => {
            (*count == 0 || value.is_finite()) && above.is_none_or(|above| above <= *count)
        }
        Measure::Comparison { .. } => true,
    };
    match measure.count() {
        _ if !sound => Err(Unread::Missing("its numbers make no sense: one is infinite, none, or larger than its whole")),
        0 => Err(Unread::Early(0)),
        count => Ok(count),
    }
}

/// A condition on the arm's own value.
fn value(metric: &Metric, measure: &Measure, level: Level) -> Result<Reading, Unread> {
    let condition = &metric.condition;
    let samples = measure.count();
    match measure {
        Measure::Share { successes, trials } => {
            let interval = exact_sequence(*successes, *trials, level.alpha).ok_or(Unread::Early(samples))?;
            finite(condition, *successes as f64 / *trials as f64, interval, samples, true)
        }
        Measure::Quantile { value, count, above, between } => {
            // "The 99th percentile is at most 2 s" says that at most one in a hundred takes longer.
            let (Quantity::TimeToFirstToken(at), Some(above), Some(_), None) =
                (&metric.quantity, above, condition.max, condition.min)
            else {
                return quantile(condition, *value, *between, samples);
            };
            let share = exact_sequence(*above, *count, level.alpha).ok_or(Unread::Early(samples))?;
            let slow = Condition { of: Of::Value, min: None, max: Some(1.0 - at) };
            let relation = relation(&slow, share);
            Ok(Reading { value: *value, interval: Some(share), relation, samples, exact: true })
        }
        Measure::Comparison { first, second } => {
            let result = pairwise(*first, *second).ok_or(Unread::Early(samples))?;
            let advantage = result.advantage.ok_or(Unread::Early(samples))?;
            let about = confidence_sequence(&advantage, level).interval;
            let interval = Interval { low: about.low + 0.5, high: about.high + 0.5 };
            finite(condition, result.win_rate, interval, samples, false)
        }
        Measure::Mean { .. } => {
            let sample = measure.sample().ok_or(Unread::Early(samples))?;
            let Some(estimate) = sample.estimate() else { return alike(metric, sample.mean, samples) };
            let sequence = confidence_sequence(&estimate, level);
            finite(condition, sequence.value, sequence.interval, samples, false)
        }
    }
}

/// Observations that are all the same, as the divergence of a model from itself: enough to hold a guardrail, not to prove a goal.
fn alike(metric: &Metric, value: f64, samples: u64) -> Result<Reading, Unread> {
    if metric.role == Role::Goal {
        return Err(Unread::Missing("its observations are all alike, so nothing is known of their spread"));
    }
    if !value.is_finite() {
        return Err(Unread::Missing("its numbers are too large to compare"));
    }
    let relation = if metric.condition.holds(value) { Relation::Within } else { Relation::Outside };
    Ok(Reading { value, interval: None, relation, samples, exact: false })
}

fn finite(condition: &Condition, value: f64, interval: Interval, samples: u64, exact: bool) -> Result<Reading, Unread> {
    if !(value.is_finite() && interval.low.is_finite() && interval.high.is_finite()) {
        return Err(Unread::Missing("its numbers are too large to compare"));
    }
    Ok(Reading { value, interval: Some(interval), relation: relation(condition, interval), samples, exact })
}

fn relation(condition: &Condition, interval: Interval) -> Relation {
    let (min, max) = (condition.min.unwrap_or(f64::NEG_INFINITY), condition.max.unwrap_or(f64::INFINITY));
    if interval.low >= min && interval.high <= max {
        Relation::Within
    } else if interval.high < min || interval.low > max {
        Relation::Outside
    } else {
        Relation::Across
    }
}
