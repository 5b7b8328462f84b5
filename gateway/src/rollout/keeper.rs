//! Keeps a server's tables at what the rollouts' rows say, and takes the rollouts on: what people want at once, and what was measured
//! once an interval, on the one of several servers that leads.
//!
//! What is decided is decided by [`decision`]; what is written is refused where somebody else was first, so neither two leaders nor a
//! leader and a person can overwrite each other. A table is replaced as a whole: a request is on the old one or on the new one.

mod error;
mod promotion;

pub use error::KeeperError;

use crate::adapters::AdapterKeeper;
use crate::clock::now;
use crate::feedback::Metrics;
use crate::recording::Recording;
use crate::rollout::assignment::{Experiment, Holdout, Table};
use crate::rollout::decision::{self, Act, Action, Decision, Measured, State, Status};
use crate::rollout::measure::{Sources, measured, recorded_as};
use crate::rollout::mirrors::Mirrors;
use crate::rollout::spec::Spec;
use crate::rollout::table::{self, BadRow, Tables, Variant};
use crate::rollout::under_way::UnderWay;
use crate::upstream::{Registry, Upstream};
use arc_swap::ArcSwap;
use metrics::{counter, gauge};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidemill_rlhf::random::Random;
use tidemill_store::{
    Actor, Comparisons, Exposures, Leadership, Readers, Rollout, RolloutChange, RolloutDecision, RolloutReader, RolloutRefusal,
    Rollouts, Store, StoreError,
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use uuid::Uuid;

/// How often the rows are looked at.
const EVERY: Duration = Duration::from_secs(1);
/// How often a server says that it is there, though nothing changed.
const PULSE: Duration = Duration::from_secs(4);
/// How long an act waits for the other servers before it is acknowledged all the same.
const WAIT: Duration = Duration::from_secs(2);
/// Answers that take longer than this hold up no rollout. Microseconds.
const LONG_ANSWER: i64 = 600_000_000;
/// How often an act is tried again when a measurement was faster.
const TRIES: u32 = 5;

/// What a deployment asks of all rollouts.
#[derive(Clone, Debug, Default)]
pub struct KeeperRules {
    /// Who takes part in nothing.
    pub holdouts: Vec<Holdout>,
    /// Whether each is promoted only with another key than started it.
    pub four_eyes: bool,
    /// How much of the answers is recorded.
    pub recording: Recording,
}

/// What became of an act.
#[derive(Clone, Debug)]
pub struct Acted {
    /// The rollout as it is now.
    pub rollout: Rollout,
    /// The servers that assign by it; all of them, unless some did not say so in time.
    pub servers: Readers,
}

/// The rollouts of a server. Cloning is cheap.
#[derive(Clone)]
pub struct Keeper(Arc<Inner>);

struct Inner {
    store: Store,
    rollouts: Rollouts,
    exposures: Exposures,
    comparisons: Comparisons,
    mirrors: Mirrors,
    under_way: UnderWay,
    models: Arc<Registry>,
    adapters: AdapterKeeper,
    /// Metrics that feedback may name.
    declared: Arc<Metrics>,
    rules: KeeperRules,
    reader: RolloutReader,
    tables: ArcSwap<Tables>,
    /// One look at a time: what was read later must not be overtaken.
    looking: tokio::sync::Mutex<Looked>,
    leadership: tokio::sync::Mutex<Leadership>,
    /// When each rollout last had a decision kept, in microseconds since 1970.
    kept: Mutex<HashMap<Uuid, i64>>,
    /// What was seen of the aliases of promotions.
    followed: Mutex<promotion::Followed>,
    closed: AtomicBool,
}

/// What was seen at the last look.
#[derive(Default)]
struct Looked {
    clock: Option<i64>,
    /// Which promotions held.
    promoted: Option<Vec<Uuid>>,
    said: Option<Instant>,
    problems: Vec<BadRow>,
}

impl Keeper {
    /// For the rollouts of `store`, whose variants are in `models` and whose adapters `adapters` serves.
    pub fn new(store: &Store, models: Arc<Registry>, adapters: AdapterKeeper, declared: Arc<Metrics>) -> Self {
        Self::with_rules(store, models, adapters, declared, KeeperRules::default())
    }

    /// The same under a deployment's rules.
    pub fn with_rules(
        store: &Store,
        models: Arc<Registry>,
        adapters: AdapterKeeper,
        declared: Arc<Metrics>,
        rules: KeeperRules,
    ) -> Self {
        Self(Arc::new(Inner {
            store: store.clone(),
            rollouts: Rollouts::new(store),
            exposures: Exposures::new(store.database()),
            comparisons: Comparisons::new(store.database()),
            mirrors: Mirrors::default(),
            under_way: UnderWay::default(),
            models,
            adapters,
            declared,
            rules,
            reader: RolloutReader::new(store),
            tables: ArcSwap::default(),
            looking: tokio::sync::Mutex::default(),
            leadership: tokio::sync::Mutex::new(Leadership::new(store.database(), "rollouts")),
            kept: Mutex::default(),
            followed: Mutex::default(),
            closed: AtomicBool::new(false),
        }))
    }

    /// The rows.
    pub fn rollouts(&self) -> &Rollouts {
        &self.0.rollouts
    }

    /// Answers of this server that will count in a rollout, and have not ended.
    pub fn under_way(&self) -> &UnderWay {
        &self.0.under_way
    }

    /// Copies of requests for shadows.
    pub fn mirrors(&self) -> &Mirrors {
        &self.0.mirrors
    }

    /// What requests are assigned by at this moment.
    pub fn tables(&self) -> Arc<Tables> {
        self.0.tables.load_full()
    }

    /// What `model` serves whoever takes part in nothing: the control of its next rollout.
    pub fn stable(&self, model: &str) -> Arc<Variant> {
        self.tables().stable(model)
    }

    /// Starts a rollout that `by` wants; the next request is assigned by it. A control that is called as the public model is whatever that
    /// serves now.
    pub async fn start(&self, spec: Spec, by: impl Into<Actor>) -> Result<Rollout, KeeperError> {
        let by = by.into();
        let spec = if self.0.rules.four_eyes { spec.under_four_eyes() } else { spec };
        // What another server has promoted a moment ago is the control, too.
        self.follow().await?;
        let spec = self.checked(spec).await?;
        let (state, decision) = decision::start(&spec, &by, self.0.reader.now(now()).await?);
        let row = Rollout {
            id: self.0.store.issue_id(),
            created: decision.at,
            updated: decision.at,
            ended: None,
            name: spec.name.clone(),
            model: spec.model.clone(),
            spec: json(&spec),
            state: json(&state),
            version: 0,
            latest: json(&decision),
        };
        let row = self.0.rollouts.insert(&row, &kept_decision(0, &decision), &by).await?;
        tracing::info!(rollout = row.name, model = row.model, by = by.name, "a rollout begins");
        self.count(&spec, &decision);
        if let Err(error) = self.follow().await {
            tracing::warn!(%error, "a rollout that was started is not in force yet");
        }
        Ok(row)
    }

    /// The spec with its control filled in, if it can run.
    async fn checked(&self, mut spec: Spec) -> Result<Spec, KeeperError> {
        let stable = self.stable(&spec.model);
        if let Some(control) = spec.arms.first_mut() {
            let plain = control.model.is_none() && control.prompt_prefix.is_none() && control.defaults.is_empty();
            let named = control.variant == stable.name || control.variant == spec.model;
            if plain && named {
                *control = stable.to_arm(control.weight);
            } else if Variant::of(control) != *stable {
                let (model, stable, control) = (spec.model, stable.name.clone(), control.variant.clone());
                return Err(KeeperError::Control { model, stable, control });
            }
        }
        for (arm, variant) in spec.arms.iter().map(Variant::of).enumerate() {
            let refused = |reason: String| KeeperError::Variant { arm, variant: variant.name.clone(), reason };
            if arm > 0 && variant.name == stable.name {
                return Err(refused("it is the control already; name another one".to_owned()));
            }
            self.0.models.find(Some(&variant.model)).map_err(|error| refused(error.message))?;
        }
        declared(&spec, &self.0.declared)?;
        for (index, metric) in spec.metrics.iter().enumerate() {
            let refused = |fix: String| KeeperError::Metric { index, metric: metric.quantity.to_string(), fix };
            for (arm, variant) in spec.arms.iter().map(Variant::of).enumerate().filter(|(arm, _)| metric.scored(*arm) > 0.0) {
                let why = match self.0.models.find(Some(&variant.model)) {
                    Ok(Upstream::Remote(_)) => "come from another server, and no base model here scores them",
                    Ok(Upstream::Local(model)) if !self.0.rules.recording.keeps_tokens(model.base()) => {
                        "are recorded without their tokens, which the base would score; set 'record' to full for them"
                    }
                    _ => continue,
                };
                let role = if arm == 0 { ", the control," } else { "" };
                return Err(refused(format!("the answers of `{}`{role} {why}; or leave the metric out", variant.name)));
            }
        }
        let running = self.0.rollouts.running().await?;
        let experiment = |(spec, state): (Spec, State)| Experiment::new(&spec, state.coverage, &state.weights);
        let mut all: Vec<Experiment> = running.iter().filter_map(|row| table::read(row).ok()).map(experiment).collect();
        all.push(Experiment::new(&spec, 0.0, &spec.weights()));
        Table::new(String::new(), Vec::new(), all)?;
        Ok(spec)
    }

    /// Does what `by` wants with the rollout of this id or name. The next request to this server is on the new table; before the act is
    /// acknowledged, it waits for the other servers for up to two seconds.
    pub async fn act(&self, id_or_name: &str, act: Act, by: impl Into<Actor>) -> Result<Acted, KeeperError> {
        let by = by.into();
        let mut tries = 0;
        let (spec, row) = loop {
            let read = self.0.rollouts.find(id_or_name).await?;
            let (spec, state) = table::read(&read)?;
            let (mut next, decision) = decision::act(&spec, &state, act, &by, self.0.reader.now(now()).await?)?;
            let written = if matches!(state.status, Status::Promoted { .. }) {
                self.clear_way_back(&read, &state, &by).await?;
                self.0.rollouts.take_back(&read, &change(&next, &decision, true), &by).await
            } else {
                next.alias = self.alias_move(&spec, next.status).await?;
                self.0.rollouts.advance(&read, &change(&next, &decision, true), Some(&by)).await
            };
            match written {
                Ok(row) => {
                    self.done(&spec, &row, &next, &decision).await;
                    break (spec, row);
                }
                // A measurement was faster; what the person wants is still wanted.
                Err(RolloutRefusal::Changed) if tries < TRIES => tries += 1,
                Err(error) => return Err(error.into()),
            }
        };
        tracing::info!(rollout = spec.name, ?act, by = by.name, "a person has decided");
        let clock = self.follow().await?;
        Ok(Acted { rollout: row, servers: self.wait_for(clock).await? })
    }

    /// Until all servers assign by the rollouts of this clock, or for two seconds.
    async fn wait_for(&self, clock: i64) -> Result<Readers, StoreError> {
        let end = Instant::now() + WAIT;
        loop {
            let readers = self.0.reader.of(clock).await?;
            if readers.serving >= readers.all || Instant::now() >= end {
                return Ok(readers);
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Reads the rows, and puts their table in the place of the old one where anything has changed. Returns the clock that is served.
    pub async fn follow(&self) -> Result<i64, StoreError> {
        let mut looked = self.0.looking.lock().await;
        // Before the rows, so that they are at least as new.
        let clock = self.0.rollouts.clock().await?;
        let fresh = looked.clock == Some(clock);
        // Aliases are moved without a rollout's knowing. Without a promotion they mean nothing here.
        if !fresh || self.tables().models().next().is_some() {
            let (running, promoted) = (self.0.rollouts.running().await?, self.0.rollouts.promotions().await?);
            let aliases = match promoted.is_empty() {
                true => Vec::new(),
                false => self.0.adapters.registry().aliases().await?,
            };
            let held: Vec<Uuid> = promoted.iter().map(|row| row.id).collect();
            if looked.promoted.as_ref().is_some_and(|before| *before != held) {
                // Another server may have led an alias back with a promotion that it took back: by the table alone, the name would go on
                // leading to what was promoted until somebody looks at the adapters.
                self.0.adapters.follow().await?;
            }
            looked.promoted = Some(held);
            let (tables, problems) = Tables::new(&running, &promoted, &aliases, &self.0.rules.holdouts);
            if problems != looked.problems {
                problems.iter().for_each(|problem| tracing::error!(%problem, "a rollout is not served"));
                looked.problems = problems;
            }
            if tables != **self.0.tables.load() {
                self.0.tables.store(Arc::new(tables));
            }
            self.0.kept.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| running.iter().any(|row| row.id == *id));
        }
        looked.clock = Some(clock);
        if !fresh || looked.said.is_none_or(|said| said.elapsed() >= PULSE) {
            self.0.reader.serves(clock, self.0.under_way.since(now())).await?;
            looked.said = Some(Instant::now());
        }
        Ok(clock)
    }

    /// Follows the rows for as long as the server runs.
    pub async fn keep_following(self) {
        let mut every = interval(EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut away = false;
        while !self.0.closed.load(Ordering::Acquire) {
            every.tick().await;
            match self.follow().await {
                Ok(_) => away = false,
                // What is served goes on being served.
                Err(error) if !away => {
                    tracing::warn!(%error, "cannot see which rollouts there are");
                    away = true;
                }
                Err(_) => {}
            }
        }
    }

    /// Leads, or waits to, for as long as the server runs: measures what is due and decides.
    pub async fn keep_leading(self) {
        let mut every = interval(EVERY / 2);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut away, mut led) = (false, false);
        while !self.0.closed.load(Ordering::Acquire) {
            every.tick().await;
            match self.lead().await {
                Ok(leads) => {
                    if leads != led {
                        tracing::info!(leads, "who decides about rollouts has changed");
                    }
                    (away, led) = (false, leads);
                }
                Err(error) => {
                    if !away {
                        tracing::warn!(%error, "rollouts cannot be measured; they stay as they are");
                    }
                    (away, led) = (true, false);
                }
            }
            gauge!("tidemill:rollout_leader").set(if led { 1.0 } else { 0.0 });
        }
    }

    async fn lead(&self) -> Result<bool, StoreError> {
        if !self.0.leadership.lock().await.is_mine().await? {
            return Ok(false);
        }
        // What cannot be finished keeps nobody from being measured.
        // Whoever led before may have had another clock: pauses and deadlines are by one.
        let now = self.0.reader.now(now()).await?;
        let finished = self.finish_promotions(now).await;
        self.measure_due(now).await?;
        finished.map(|()| true)
    }

    /// Measures every rollout whose interval is over at this moment, in microseconds since 1970, and does what follows. For the leader: where
    /// somebody else was faster, nothing follows.
    pub async fn measure_due(&self, now: i64) -> Result<(), StoreError> {
        let mut failed = None;
        for row in self.0.rollouts.running().await? {
            let (spec, state) = match table::read(&row) {
                Ok(read) => read,
                // Said by whoever follows.
                Err(_) => continue,
            };
            let interval = i64::try_from(spec.interval).unwrap_or(i64::MAX).saturating_mul(1_000_000);
            // One that changes only later was changed by a server whose clock is ahead: guardrails do not wait for that.
            if !(0..interval).contains(&now.saturating_sub(row.updated))
                && let Err(error) = self.measure(&row, &spec, &state, now).await
            {
                // One that takes too long to be read must not stop the others.
                failed = Some(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn measure(&self, row: &Rollout, spec: &Spec, state: &State, now: i64) -> Result<(), StoreError> {
        let sources = Sources { exposures: &self.0.exposures, comparisons: &self.0.comparisons };
        let under_way = self.0.reader.under_way(self.0.under_way.since(now)).await?.max(now.saturating_sub(LONG_ANSWER));
        let measured = measured(sources, row.id, spec, state, &self.0.declared, under_way).await?;
        let measured = Measured { displaced: self.0.rollouts.is_displaced(row).await?, ..measured };
        // The same draws for whoever measures this state.
        let mut random = Random::new(row.id.as_u64_pair().1 ^ row.version.unsigned_abs());
        let (mut next, decision) = decision::measure(spec, state, &measured, now, &mut || random.unit());
        next.alias = self.alias_move(spec, next.status).await?;
        let before: Option<Decision> = serde_json::from_value(row.latest.clone()).ok();
        let keep = {
            let kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
            worth_a_row(&decision, before.as_ref(), state.started, kept.get(&row.id).copied())
        };
        match self.0.rollouts.advance(row, &change(&next, &decision, keep), None).await {
            Ok(row) => {
                if keep {
                    self.0.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(row.id, decision.at);
                }
                self.done(spec, &row, &next, &decision).await;
            }
            Err(RolloutRefusal::Store(error)) => return Err(error),
            Err(_) => {}
        }
        self.follow().await?;
        Ok(())
    }

    /// What follows from a decision that is written.
    async fn done(&self, spec: &Spec, row: &Rollout, next: &State, decision: &Decision) {
        self.count(spec, decision);
        if decision.action != Action::Hold {
            tracing::info!(
                rollout = row.name,
                action = action_word(decision.action),
                reason = decision.reason,
                "a rollout was decided on"
            );
        }
        if let (Action::Promote { .. }, Some(moved)) = (decision.action, next.alias) {
            self.lead_alias(&row.model, moved).await;
        }
    }

    /// The server leaves: another one leads at once, and nobody waits for this one.
    pub async fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
        self.0.leadership.lock().await.resign().await;
        if let Err(error) = self.0.reader.leave().await {
            tracing::debug!(%error, "the others find out by themselves that this server has left");
        }
    }

    fn count(&self, spec: &Spec, decision: &Decision) {
        let rollout = || spec.name.clone();
        counter!("tidemill:rollout_decisions_total", "rollout" => rollout(), "action" => action_word(decision.action))
            .increment(1);
        for (index, arm) in spec.arms.iter().enumerate() {
            let variant = || arm.variant.clone();
            let weight = decision.weights.get(index).copied().unwrap_or(0.0) * decision.coverage;
            gauge!("tidemill:rollout_share", "rollout" => rollout(), "variant" => variant()).set(weight);
            if let Some(units) = decision.exposures.get(index) {
                gauge!("tidemill:rollout_exposed_units", "rollout" => rollout(), "variant" => variant()).set(*units as f64);
            }
        }
        for judgement in &decision.judgements {
            let Some(variant) = spec.arms.get(judgement.arm).map(|arm| &arm.variant) else { continue };
            let values = [
                ("value", judgement.value),
                ("low", judgement.interval.map(|i| i.low)),
                ("high", judgement.interval.map(|i| i.high)),
            ];
            for (of, value) in values.into_iter().filter_map(|(of, value)| Some((of, value?))) {
                gauge!(
                    "tidemill:rollout_metric", "rollout" => rollout(), "variant" => variant.clone(),
                    "metric" => judgement.metric.clone(), "of" => of
                )
                .set(value);
            }
        }
        if let Some(test) = decision.sample_ratio {
            gauge!("tidemill:rollout_sample_ratio_p", "rollout" => rollout()).set(test.p_value);
        }
    }
}

/// Refuses a metric that is recorded as feedback under a name that nobody declared.
pub fn declared(spec: &Spec, metrics: &Metrics) -> Result<(), KeeperError> {
    for (index, metric) in spec.metrics.iter().enumerate() {
        if let Some(name) = recorded_as(&metric.quantity).filter(|name| !metrics.contains_key(name)) {
            let quoted = if name.contains('.') { format!("\"{name}\"") } else { name };
            let fix = format!("declare it as [metrics.{quoted}] in tidemill.toml, and send it as feedback");
            return Err(KeeperError::Metric { index, metric: metric.quantity.to_string(), fix });
        }
    }
    Ok(())
}

/// The word for an action, as rows and metrics have it.
pub fn action_word(action: Action) -> &'static str {
    match action {
        Action::Start => "start",
        Action::Hold => "hold",
        Action::Step => "step",
        Action::Reallocate => "reallocate",
        Action::Pause { .. } => "pause",
        Action::Resume => "resume",
        Action::AwaitApproval => "await_approval",
        Action::Approve => "approve",
        Action::Promote { .. } => "promote",
        Action::RollBack => "roll_back",
        Action::Complete => "complete",
    }
}

/// Whether a decision gets a row of its own: each that did something or judges otherwise than the one before; of the others so many that
/// the course of the numbers can be drawn, one for each fiftieth of the time since the start.
fn worth_a_row(decision: &Decision, before: Option<&Decision>, started: i64, kept: Option<i64>) -> bool {
    let Some((before, kept)) = before.zip(kept) else { return true };
    let quiet = matches!(decision.action, Action::Hold | Action::Reallocate | Action::AwaitApproval);
    let verdicts = |decision: &Decision| decision.judgements.iter().map(|judgement| judgement.verdict).collect::<Vec<_>>();
    let age = decision.at.saturating_sub(started);
    !quiet
        || decision.action != before.action
        || verdicts(decision) != verdicts(before)
        || decision.at.saturating_sub(kept) >= age / 50
}

fn change(next: &State, decision: &Decision, keep: bool) -> RolloutChange {
    let promoted = matches!(next.status, Status::Promoted { .. });
    // The version is the row's to know.
    RolloutChange { state: json(next), over: next.status.is_over(), promoted, decision: kept_decision(0, decision), keep }
}

fn kept_decision(version: i64, decision: &Decision) -> RolloutDecision {
    let action = action_word(decision.action).to_owned();
    RolloutDecision { version, at: decision.at, action, actor: decision.by.clone(), body: json(decision) }
}

/// Keys of our values are strings: the serialiser cannot fail.
fn json(value: &impl serde::Serialize) -> serde_json::Value {
    serde_json::to_value(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json as object;

    #[test]
    fn the_rows_of_a_long_wait_are_few_and_no_change_is_lost() {
        let spec = Spec::parse(&object!({
            "name": "r", "model": "m", "kind": "ab", "arms": [{"variant": "m"}, {"variant": "n"}],
            "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
        }))
        .unwrap();
        let (mut state, mut before) = decision::start(&spec, "ann", 0);
        let (mut kept, mut rows) = (Some(0), 0);
        // A week of one measurement every half minute.
        for look in 1..=20_160_i64 {
            let at = look * 30_000_000;
            let (next, decision) = decision::measure(&spec, &state, &Default::default(), at, &mut || 0.5);
            if worth_a_row(&decision, Some(&before), 0, kept) {
                (kept, rows) = (Some(at), rows + 1);
            }
            (state, before) = (next, decision);
        }
        assert!((200..600).contains(&rows), "{rows}");
        let other = Decision { action: Action::Resume, ..before.clone() };
        assert!(worth_a_row(&other, Some(&before), 0, kept) && worth_a_row(&before, Some(&before), 0, None));
    }
}
