//! The transitions.

use crate::rollout::decision::judge::{Judgement, Measure, Verdict, judge};
use crate::rollout::decision::state::{Act, ActError, Action, Decision, Measured, PauseReason, State, Status};
use crate::rollout::spec::{AtDeadline, Kind, Metric, Role, Spec, Step};
use crate::rollout::statistics::{
    Belief, Level, Sample, SampleRatio, confidence_sequence, exact_sequence, floored, sample_ratio, thompson,
};
use std::collections::BTreeMap;
use tidemill_rlhf::statistics::Interval;
use tidemill_store::Actor;

/// Below this, however often it is looked at, the arms did not get their shares by chance; see [`sample_ratio_limit`].
const SAMPLE_RATIO_ANYTIME: f64 = 0.01;
/// Below this, at one look, nothing that compares the arms is believed; whether they got their shares is told by further units.
const SAMPLE_RATIO_ALPHA: f64 = 0.001;
/// Expected units in the smallest arm below which χ² says little.
const SAMPLE_RATIO_LEAST: f64 = 5.0;
/// Joint draws of a bandit's shares.
const ROUNDS: usize = 2000;
/// A bandit's shares stay while none of them would move as far: draws alone move them by about half of it, each move sends units to other
/// arms, and whether the arms got their shares is told of what came since the last.
const LEAST_MOVE: f64 = 0.02;

/// A rollout that begins now, in microseconds since 1970.
pub fn start(spec: &Spec, by: impl Into<Actor>, now: i64) -> (State, Decision) {
    let by = by.into();
    let (coverage, weights) = match spec.steps.first() {
        Some(Step::SetWeight(weight)) => spec.at_weight(*weight),
        _ => (spec.traffic, spec.weights()),
    };
    let state = State {
        status: Status::Running,
        started: now,
        started_by: by.name.clone(),
        started_key: by.key.clone(),
        coverage,
        weights,
        since: now,
        changed: now,
        recounts: 0,
        step: usize::from(!spec.steps.is_empty()),
        step_since: now,
        step_exposures: 0,
        failures: BTreeMap::new(),
        inconclusive: BTreeMap::new(),
        awaiting: false,
        approved: false,
        alias: None,
    };
    let decision = row(&state, &Facts::default(), Action::Start, "it begins".to_owned(), Some(by.name.as_str()), now);
    (state, decision)
}

/// What a person wants. A rollback and a promotion end it at once; a promotion can be taken back once more.
pub fn act(spec: &Spec, state: &State, act: Act, by: impl Into<Actor>, now: i64) -> Result<(State, Decision), ActError> {
    let by = by.into();
    match (state.status, act) {
        (Status::Promoted { .. }, Act::RollBack) => return take_back(spec, state, &by, now),
        (status, _) if status.is_over() => return Err(ActError::Over),
        _ => {}
    }
    if spec.four_eyes && matches!(act, Act::Approve | Act::Promote { .. }) {
        second_key(state, &by)?;
    }
    let mut next = state.clone();
    let paused = matches!(state.status, Status::Paused { .. });
    let (action, reason) = match act {
        Act::Pause if state.status == (Status::Paused { reason: PauseReason::Person }) => return Err(ActError::Paused),
        Act::Pause => {
            next.status = Status::Paused { reason: PauseReason::Person };
            (Action::Pause { reason: PauseReason::Person }, "a person paused it")
        }
        Act::Resume if !paused => return Err(ActError::NotPaused),
        Act::Resume => {
            if state.status == (Status::Paused { reason: PauseReason::SampleRatio }) {
                // Units that were lost stay lost, and what was measured without them is not believed.
                recount(&mut next, now);
            }
            next.status = Status::Running;
            next.inconclusive.clear();
            (Action::Resume, "a person resumed it")
        }
        Act::Approve if !state.awaiting => return Err(ActError::NothingToApprove),
        Act::Approve => {
            (next.awaiting, next.approved) = (false, true);
            (Action::Approve, "a person approved")
        }
        Act::Promote { .. } if spec.kind == Kind::Shadow => return Err(ActError::Shadow),
        Act::Promote { arm } if arm == 0 || arm >= spec.arms.len() => return Err(ActError::NoSuchArm(arm)),
        Act::Promote { arm } => {
            end(&mut next, Status::Promoted { arm }, arm, now);
            (Action::Promote { arm }, "a person promoted it")
        }
        Act::RollBack => {
            end(&mut next, Status::RolledBack, 0, now);
            (Action::RollBack, "a person rolled it back")
        }
    };
    let decision = row(&next, &Facts::default(), action, reason.to_owned(), Some(by.name.as_str()), now);
    Ok((next, decision))
}

/// The public name serves again what it served before the promotion. Everybody is moved by it, as by the promotion, so it takes as many
/// people; whether something newer stands on the promotion is the rows' to know.
fn take_back(spec: &Spec, state: &State, by: &Actor, now: i64) -> Result<(State, Decision), ActError> {
    if spec.four_eyes {
        second_key(state, by)?;
    }
    let mut next = state.clone();
    end(&mut next, Status::RolledBack, 0, now);
    let reason = "a person took the promotion back".to_owned();
    let decision = row(&next, &Facts::default(), Action::RollBack, reason, Some(by.name.as_str()), now);
    Ok((next, decision))
}

/// Fails unless this is a key, and not the one that started it. To stop what one began needs nobody else.
fn second_key(state: &State, by: &Actor) -> Result<(), ActError> {
    let first = Actor { name: state.started_by.clone(), key: state.started_key.clone() };
    match &by.key {
        None => Err(ActError::NoKey),
        Some(_) if by.is(&first) => Err(ActError::SameKey),
        Some(_) => Ok(()),
    }
}

/// The numbers of a measurement.
#[derive(Default)]
struct Facts {
    exposures: Vec<u64>,
    sample_ratio: Option<SampleRatio>,
    /// There would be a sample ratio if the answers under way had ended.
    unended: bool,
    judgements: Vec<Judgement>,
}

impl Facts {
    /// Judgements from which something follows.
    fn live(&self, role: Role) -> impl Iterator<Item = &Judgement> {
        self.judgements.iter().filter(move |judgement| !judgement.dry_run && judgement.role == role)
    }

    fn exposed(&self, arm: usize) -> u64 {
        self.exposures.get(arm).copied().unwrap_or(0)
    }
}

/// Takes a rollout on by what was measured. `uniform` gives random numbers in [0, 1), for a bandit's shares only.
pub fn measure(spec: &Spec, state: &State, measured: &Measured, now: i64, uniform: &mut dyn FnMut() -> f64) -> (State, Decision) {
    let mut next = state.clone();
    let facts = facts(spec, state, measured);
    if state.status.is_over() {
        let decision = row(&next, &facts, Action::Hold, "it is over".to_owned(), None, now);
        return (next, decision);
    }
    next.awaiting = false;
    count(&mut next, spec, &facts);
    let (action, reason) = follow(spec, &mut next, &facts, measured, now, uniform);
    let decision = row(&next, &facts, action, reason, None, now);
    (next, decision)
}

fn facts(spec: &Spec, state: &State, measured: &Measured) -> Facts {
    let treatments = spec.arms.len().saturating_sub(1).max(1) as f64;
    // Any treatment may win in any period: each has its part of the chance of a wrong winner. A guardrail's is its own.
    let parts = treatments * f64::from(spec.periods());
    let mut judgements = Vec::new();
    for metric in &spec.metrics {
        let alpha = if metric.role == Role::Goal { spec.alpha / parts } else { spec.alpha };
        let level = Level { alpha, tuning: spec.tuning };
        let measures = measured.metrics.get(&metric.name());
        let of = |arm: usize| measures.and_then(|arms| arms.get(arm)).and_then(Option::as_ref);
        for arm in 1..spec.arms.len() {
            let exposures = measured.exposures.get(arm).copied().unwrap_or(0);
            judgements.push(judge(metric, arm, of(0), of(arm), exposures, level));
        }
    }
    let shares = match spec.kind {
        // Both arms answer each unit: a difference means that answers of one were lost.
        Kind::Shadow | Kind::Interleaved => vec![1.0; spec.arms.len()],
        _ => state.weights.clone(),
    };
    let observed = &measured.ended;
    let least = shares.iter().copied().filter(|share| *share > 0.0).fold(f64::INFINITY, f64::min) / shares.iter().sum::<f64>();
    let enough = |units: &[u64]| units.iter().sum::<u64>() as f64 * least >= SAMPLE_RATIO_LEAST;
    let sample_ratio = if enough(observed) { sample_ratio(observed, &shares) } else { None };
    // After each change of a bandit's shares there are few for a while.
    let unended = spec.kind != Kind::Bandit && !enough(observed) && enough(&measured.exposures);
    Facts { exposures: measured.exposures.clone(), sample_ratio, unended, judgements }
}

/// Failures add up; inconclusive measurements count while they follow each other. A metric with several arms counts once.
fn count(state: &mut State, spec: &Spec, facts: &Facts) {
    for metric in spec.metrics.iter().filter(|metric| !metric.dry_run) {
        let name = metric.name();
        let any = |wanted| facts.judgements.iter().any(|judgement| judgement.metric == name && judgement.verdict == wanted);
        if any(Verdict::Fail) {
            *state.failures.entry(name.clone()).or_default() += 1;
        }
        if any(Verdict::Inconclusive) {
            *state.inconclusive.entry(name).or_default() += 1;
        } else {
            state.inconclusive.remove(&name);
        }
    }
}

fn follow(
    spec: &Spec,
    next: &mut State,
    facts: &Facts,
    measured: &Measured,
    now: i64,
    uniform: &mut dyn FnMut() -> f64,
) -> (Action, String) {
    if let Some(metric) = over(spec, &next.failures, |metric| metric.failure_limit) {
        end(next, Status::RolledBack, 0, now);
        return (Action::RollBack, format!("the guardrail {metric} is broken"));
    }
    let status = next.status;
    if status == (Status::Paused { reason: PauseReason::Person }) {
        return (Action::Hold, "a person paused it; `resume` lets it go on".to_owned());
    }
    if status == (Status::Paused { reason: PauseReason::SampleRatio }) {
        return (Action::Hold, "the arms did not get their shares; find the cause, then `resume`".to_owned());
    }
    if let Some(test) = facts.sample_ratio.filter(|test| test.anytime_p < sample_ratio_limit(next.recounts)) {
        let why = format!("the arms did not get their shares: chance would ever do this with probability {:.2e}", test.anytime_p);
        return pause(next, PauseReason::SampleRatio, why);
    }
    if let Some(test) = facts.sample_ratio.filter(|test| test.p_value < SAMPLE_RATIO_ALPHA) {
        return (
            Action::Hold,
            format!("the arms may not have got their shares (p = {:.2e} at this look); more units will tell", test.p_value),
        );
    }
    if let Some((action, reason)) = missed(spec, next, facts, now) {
        return (action, reason);
    }
    if spec.deadline.is_some_and(|seconds| elapsed(next.started, now) >= seconds) {
        if spec.at_deadline == AtDeadline::RollBack {
            end(next, Status::RolledBack, 0, now);
            return (Action::RollBack, "nothing was decided before the deadline".to_owned());
        }
        if status == (Status::Paused { reason: PauseReason::Deadline }) {
            return (Action::Hold, "nothing was decided before the deadline; `promote` or `rollback`".to_owned());
        }
        return pause(next, PauseReason::Deadline, "nothing was decided before the deadline".to_owned());
    }
    if measured.displaced {
        let why = "what the name serves is not the control any more; roll it back, and start it anew beside what is served";
        return (Action::Hold, why.to_owned());
    }
    let unclear = next.inconclusive.keys().next().cloned();
    if status == (Status::Paused { reason: PauseReason::Inconclusive }) {
        return match unclear {
            Some(metric) => (Action::Hold, format!("{metric} is missing or unclear")),
            None => {
                next.status = Status::Running;
                (Action::Resume, "the data are clear again".to_owned())
            }
        };
    }
    if let Some(metric) = over(spec, &next.inconclusive, |metric| metric.inconclusive_limit) {
        return pause(next, PauseReason::Inconclusive, format!("{metric} is missing or unclear for too long"));
    }
    if let Some(judgement) = blocking(facts) {
        return (Action::Hold, format!("{} of arm {}: {}", judgement.metric, judgement.arm, judgement.note));
    }
    advance(spec, next, facts, measured, now, uniform)
}

/// Below which the anytime test says that the arms did not get their shares. Counting that begins anew is another test: all but the first
/// have 1/2 + 1/6 + 1/12 + … = 1 of the first one's limit together, however often shares change.
fn sample_ratio_limit(recounts: u32) -> f64 {
    let tests = f64::from(recounts);
    SAMPLE_RATIO_ANYTIME / (tests * (tests + 1.0)).max(1.0)
}

/// What was measured before is not added to what comes.
fn recount(next: &mut State, now: i64) {
    (next.since, next.changed, next.step_exposures) = (now, now, 0);
    next.recounts = next.recounts.saturating_add(1);
}

/// The first metric whose count is above its limit.
fn over(spec: &Spec, counts: &BTreeMap<String, u32>, limit: impl Fn(&Metric) -> u32) -> Option<String> {
    let above = |metric: &&Metric| counts.get(&metric.name()).is_some_and(|count| *count > limit(metric));
    spec.metrics.iter().filter(|metric| !metric.dry_run).find(above).map(Metric::name)
}

fn pause(next: &mut State, reason: PauseReason, why: String) -> (Action, String) {
    next.status = Status::Paused { reason };
    (Action::Pause { reason }, why)
}

/// Guardrails that do not pass yet and goals whose data are missing stand in the way.
fn blocking(facts: &Facts) -> Option<&Judgement> {
    let guardrail = facts.live(Role::Guardrail).find(|judgement| judgement.verdict != Verdict::Pass);
    guardrail.or_else(|| facts.live(Role::Goal).find(|judgement| judgement.verdict == Verdict::Inconclusive))
}

/// Rolls back when no treatment can reach its goals any more.
fn missed(spec: &Spec, next: &mut State, facts: &Facts, now: i64) -> Option<(Action, String)> {
    // A bandit that starves a bad arm needs no rollback; its best arm may still be the control, which `separated` finds.
    if spec.kind == Kind::Bandit || !exposed(spec, facts) {
        return None;
    }
    let lost = |arm: usize| facts.live(Role::Goal).find(|judgement| judgement.arm == arm && judgement.verdict == Verdict::Missed);
    let first = lost(1)?.metric.clone();
    if !(1..spec.arms.len()).all(|arm| lost(arm).is_some()) {
        return None;
    }
    end(next, Status::RolledBack, 0, now);
    Some((Action::RollBack, format!("{first} is surely not met")))
}

/// Whether every arm has answered enough.
fn exposed(spec: &Spec, facts: &Facts) -> bool {
    (0..spec.arms.len()).all(|arm| facts.exposed(arm) >= spec.min_exposure)
}

fn advance(
    spec: &Spec,
    next: &mut State,
    facts: &Facts,
    measured: &Measured,
    now: i64,
    uniform: &mut dyn FnMut() -> f64,
) -> (Action, String) {
    if let Some(step) = spec.steps.get(next.step) {
        return climb(spec, next, facts, *step, now);
    }
    if !exposed(spec, facts) {
        let fewest = (0..spec.arms.len()).map(|arm| facts.exposed(arm)).min().unwrap_or(0);
        let why = format!("{fewest} of {} units in the smallest arm", spec.min_exposure);
        return reallocate(spec, next, measured, now, uniform).unwrap_or((Action::Hold, why));
    }
    let winner = match spec.kind {
        Kind::Bandit => separated(spec, measured),
        _ => winner(spec, facts),
    };
    match winner {
        None => {
            reallocate(spec, next, measured, now, uniform).unwrap_or((Action::Hold, "the goals are not decided yet".to_owned()))
        }
        Some(0) => {
            end(next, Status::RolledBack, 0, now);
            (Action::RollBack, "the control is surely the best".to_owned())
        }
        Some(_) if facts.unended => {
            (Action::Hold, "whether the arms got their shares is known once the answers under way have ended".to_owned())
        }
        Some(_) if spec.approval && !next.approved => {
            next.awaiting = true;
            (Action::AwaitApproval, "everything is met; promotion waits for approval".to_owned())
        }
        Some(arm) if spec.kind == Kind::Shadow => {
            end(next, Status::Completed, 0, now);
            (Action::Complete, format!("arm {arm} meets everything"))
        }
        Some(arm) => {
            end(next, Status::Promoted { arm }, arm, now);
            (Action::Promote { arm }, format!("arm {arm} meets everything"))
        }
    }
}

/// A canary's step that is waited for.
fn climb(spec: &Spec, next: &mut State, facts: &Facts, step: Step, now: i64) -> (Action, String) {
    let waited = elapsed(next.step_since, now);
    let answered = facts.exposed(1).saturating_sub(next.step_exposures);
    let wait = match step {
        Step::PauseFor(seconds) if waited < seconds => Some(format!("{waited} of {seconds} s")),
        Step::PauseSamples(samples) if answered < samples => Some(format!("{answered} of {samples} units")),
        Step::Approval if !next.approved => {
            next.awaiting = true;
            return (Action::AwaitApproval, format!("step {} waits for approval", next.step + 1));
        }
        _ => None,
    };
    if let Some(wait) = wait {
        return (Action::Hold, format!("step {}: {wait}", next.step + 1));
    }
    let done = next.step + 1;
    next.step = done;
    next.step_since = now;
    next.step_exposures = facts.exposed(1);
    next.approved = false;
    if let Step::SetWeight(weight) = step {
        let (coverage, weights) = spec.at_weight(weight);
        // A database may have lost a weight's last digit, which is no other proportion.
        if next.weights.iter().zip(&weights).any(|(old, new)| (old - new).abs() > 1e-9) {
            // The arms' proportion is another one.
            recount(next, now);
        }
        (next.coverage, next.weights, next.changed) = (coverage, weights, now);
        return (Action::Step, format!("step {done}: {:.4} % of the traffic", 100.0 * weight));
    }
    (Action::Step, format!("step {done} is done"))
}

/// The treatment whose goals are all met; of several the one whose first goal has the largest effect.
fn winner(spec: &Spec, facts: &Facts) -> Option<usize> {
    let goals = |arm: usize| facts.live(Role::Goal).filter(move |judgement| judgement.arm == arm);
    let gain = |arm: usize| {
        goals(arm).next().map_or(0.0, |goal| goal.value.unwrap_or(0.0) * if goal.condition.min.is_some() { 1.0 } else { -1.0 })
    };
    (1..spec.arms.len())
        .filter(|arm| goals(*arm).all(|goal| goal.verdict == Verdict::Met))
        .max_by(|one, two| gain(*one).total_cmp(&gain(*two)))
}

/// The bandit's goal, and whether less is better.
fn reward(spec: &Spec) -> Option<(&Metric, bool)> {
    let goal = spec.metrics.iter().find(|metric| metric.role == Role::Goal && !metric.dry_run)?;
    Some((goal, goal.condition.min.is_none()))
}

fn rewards(spec: &Spec, measured: &Measured) -> Option<Vec<Measure>> {
    let (goal, _) = reward(spec)?;
    let arms = measured.metrics.get(&goal.name())?;
    (arms.len() == spec.arms.len()).then(|| arms.iter().copied().collect())?
}

/// A bandit's arm that lies above all others by the goal's margin, or the control when it does. Each arm has a sequence of its
/// own, which holds at every number of its observations, so also at those that the bandit chose.
fn separated(spec: &Spec, measured: &Measured) -> Option<usize> {
    let (goal, less) = reward(spec)?;
    let level = Level { alpha: spec.alpha / spec.arms.len() as f64, tuning: spec.tuning };
    let intervals: Option<Vec<Interval>> = rewards(spec, measured)?
        .iter()
        .map(|measure| {
            if measure.count() < goal.min_samples {
                return None;
            }
            let interval = match measure {
                Measure::Share { successes, trials } => exact_sequence(*successes, *trials, level.alpha)?,
                _ => confidence_sequence(&measure.sample()?.estimate()?, level).interval,
            };
            // The larger is the better from here on.
            Some(if less { Interval { low: -interval.high, high: -interval.low } } else { interval })
        })
        .collect();
    let intervals = intervals?;
    let margin = if less { goal.condition.max.map(|max| -max) } else { goal.condition.min }.unwrap_or(0.0);
    (0..intervals.len()).find(|arm| {
        let by = if *arm == 0 { 0.0 } else { margin };
        intervals.iter().enumerate().all(|(other, interval)| other == *arm || intervals[*arm].low > interval.high + by)
    })
}

/// A bandit's shares by what was learnt. None for the others, where an arm's rewards cannot be read, and where they stay as they are.
fn reallocate(
    spec: &Spec,
    next: &mut State,
    measured: &Measured,
    now: i64,
    uniform: &mut dyn FnMut() -> f64,
) -> Option<(Action, String)> {
    if spec.kind != Kind::Bandit {
        return None;
    }
    let (_, less) = reward(spec)?;
    let beliefs: Option<Vec<Belief>> = rewards(spec, measured)?
        .iter()
        .map(|measure| match measure {
            Measure::Share { successes, trials } if successes <= trials => {
                let successes = if less { trials - successes } else { *successes };
                Some(Belief::Share { successes, trials: *trials })
            }
            _ => measure.sample().map(|sample| {
                let mean = if less { -sample.mean } else { sample.mean };
                Belief::Mean(Sample { mean, ..sample })
            }),
        })
        .collect();
    let shares = floored(&thompson(&beliefs?, ROUNDS, uniform), spec.floor);
    let moves = shares.iter().zip(&next.weights).any(|(new, old)| (new - old).abs() >= LEAST_MOVE);
    if !moves {
        return None;
    }
    next.weights = shares;
    next.changed = now;
    next.recounts = next.recounts.saturating_add(1);
    Some((Action::Reallocate, "shares follow the chance of being the best".to_owned()))
}

/// Gives an arm all the traffic, for good.
fn end(next: &mut State, status: Status, arm: usize, now: i64) {
    next.status = status;
    // After a rollback no unit takes part; after a promotion all do, in the one arm.
    next.coverage = if arm == 0 { 0.0 } else { 1.0 };
    next.weights.iter_mut().enumerate().for_each(|(index, weight)| *weight = f64::from(u8::from(index == arm)));
    next.changed = now;
    (next.awaiting, next.approved) = (false, false);
}

/// Whole seconds; none when the clock went back.
fn elapsed(from: i64, to: i64) -> u64 {
    u64::try_from(to.saturating_sub(from) / 1_000_000).unwrap_or(0)
}

fn row(state: &State, facts: &Facts, action: Action, reason: String, by: Option<&str>, now: i64) -> Decision {
    Decision {
        at: now,
        action,
        reason,
        by: by.map(str::to_owned),
        step: state.step,
        coverage: state.coverage,
        weights: state.weights.clone(),
        exposures: facts.exposures.clone(),
        sample_ratio: facts.sample_ratio,
        judgements: facts.judgements.clone(),
    }
}
