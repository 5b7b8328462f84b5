//! What the base model says of answers: the tokens that a rollout's arms gave are put through the base once more, when nobody else wants
//! an engine.
//!
//! Of an answer y to the prompt x, token by token,
//!
//! - `kl_to_base` = 1/T Σ (log π(y_t | x, y_<t) − log π₀(y_t | x, y_<t)), Schulman's estimator k1 of KL(π ‖ π₀): without a bias where y was
//!   drawn from π as it is (temperature 1, nothing cut off), and of single answers also below 0;
//! - `logprob_to_base` = 1/T Σ log π₀(y_t | x, y_<t).
//!
//! π is the model that answered with its adapter, by the raw log-probabilities of the record (before temperature, penalties and
//! truncation); π₀ is the same model without an adapter.
//!
//! The answers' rows are the queue ([`BaseScores`]); a server scores one at a time, behind everybody, and gives it back as soon as anybody
//! else asks an engine for anything.

use crate::clock::now;
use crate::http::drain::Drain;
use crate::http::generate::SHADOW_TENANT;
use crate::http::tier::SHADOW_PRIORITY;
use crate::recording::lot;
use crate::rollout::keeper::Keeper;
use crate::rollout::table::Scored;
use crate::upstream::Registry;
use flume::Receiver;
use metrics::{counter, gauge};
use std::sync::Arc;
use std::time::Duration;
use tidemill_engine::{Event, Request, RequestId, SamplingParams, SubmitError, TokenRecord};
use tidemill_store::records::Inference;
use tidemill_store::{BaseScore, BaseScores, Store, StoreError, Unscored};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

/// How often it is looked for answers.
const EVERY: Duration = Duration::from_secs(1);
/// Answers of a rollout that are scored before the rollouts are looked at again.
const PART: usize = 16;
/// How long the engines may have something else to do before it is looked again.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether they do.
const LOOK: Duration = Duration::from_millis(10);
/// How long the base may take for an answer.
const LONGEST: Duration = Duration::from_secs(60);
/// How long nobody else takes an answer on. Microseconds; longer than it may take.
const LEASE: i64 = 120_000_000;

/// Scores the answers of a server's rollouts. Cloning is cheap.
#[derive(Clone)]
pub struct Scorer {
    store: Store,
    scores: BaseScores,
    models: Arc<Registry>,
    rollouts: Keeper,
    drain: Drain,
}

/// What became of an answer.
enum Outcome {
    Scored(BaseScore),
    /// Somebody else wanted an engine, or the server leaves: it waits again.
    CalledOff,
    /// Nothing can be said of it.
    Unfit,
}

impl Scorer {
    /// For the rollouts of `store`, on the engines of `models`, until `drain` begins.
    pub fn new(store: &Store, models: Arc<Registry>, rollouts: Keeper, drain: Drain) -> Self {
        Self { store: store.clone(), scores: BaseScores::new(store.database()), models, rollouts, drain }
    }

    /// Scores for as long as the server runs.
    pub async fn keep_scoring(self) {
        let mut away = false;
        while !self.drain.is_draining() {
            let scored = match self.score_waiting().await {
                Ok(scored) => {
                    away = false;
                    scored
                }
                Err(error) => {
                    if !away {
                        tracing::warn!(%error, "answers cannot be scored by the base; they wait");
                    }
                    away = true;
                    0
                }
            };
            if scored == 0 {
                sleep(EVERY).await;
            }
        }
    }

    /// Scores some of the answers that wait, until somebody else wants an engine. Returns how many.
    pub async fn score_waiting(&self) -> Result<usize, StoreError> {
        let tables = self.rollouts.tables();
        let mut done = 0;
        for running in tables.models().flat_map(|(_, public)| public.rollouts()) {
            let Some(scored) = &running.scored else { continue };
            let waiting = self.scores.waiting(running.id, scored.since, now()).await?;
            let mine: Vec<Uuid> = waiting.iter().filter(|answer| self.takes(answer, scored)).map(|answer| answer.id).collect();
            gauge!("tidemill:base_scores_waiting", "rollout" => running.name.clone()).set(mine.len() as f64);
            for answer in mine.into_iter().take(PART) {
                if !self.are_idle().await {
                    return Ok(done);
                }
                let at = now();
                if !self.scores.claim(answer, at, at.saturating_add(LEASE)).await? {
                    continue;
                }
                match self.take(answer).await? {
                    Outcome::Scored(_) => done += 1,
                    Outcome::CalledOff => return Ok(done),
                    Outcome::Unfit => {}
                }
            }
        }
        Ok(done)
    }

    /// Whether the lot falls on an answer, and its base is here. The lot is another one than that of what is recorded.
    fn takes(&self, answer: &Unscored, scored: &Scored) -> bool {
        let share = usize::try_from(answer.arm).ok().and_then(|arm| scored.shares.get(arm)).copied().unwrap_or(0.0);
        lot(b"base score", answer.id) < share && self.models.find_local_base(Some(&answer.model)).is_ok()
    }

    /// Scores an answer that was claimed, and writes what came of it.
    async fn take(&self, answer: Uuid) -> Result<Outcome, StoreError> {
        let outcome = match self.store.inference(answer).await? {
            Some(inference) => self.score(&inference).await,
            None => Outcome::Unfit,
        };
        let word = match outcome {
            Outcome::Scored(score) => {
                self.scores.write(answer, score).await?;
                "scored"
            }
            Outcome::CalledOff => {
                self.scores.release(answer).await?;
                "called_off"
            }
            Outcome::Unfit => {
                // For good: it would come out the same again.
                self.scores.claim_for_good(answer).await?;
                "unfit"
            }
        };
        counter!("tidemill:base_scores_total", "outcome" => word).increment(1);
        Ok(outcome)
    }

    async fn score(&self, inference: &Inference) -> Outcome {
        let Ok(model) = self.models.find_local_base(Some(&inference.model)) else { return Outcome::CalledOff };
        let Some(answer) = inference.choices.first() else { return Outcome::Unfit };
        let prompt = inference.prompt_ids.len();
        let tokens: Vec<u32> = inference.prompt_ids.iter().chain(&answer.output_ids).copied().collect();
        // The engine draws one more token, for which there must be room: of an answer that fills the context, the last one is left out.
        let fits = tokens.len().min(model.engine().limits().max_model_len.saturating_sub(1));
        if prompt == 0 || fits <= prompt || answer.output_ids.len() != answer.raw_logprobs.len() {
            return Outcome::Unfit;
        }
        let request = Request {
            id: RequestId(self.store.issue_id().as_u128()),
            prompt: tokens[..fits].to_vec(),
            sampling: SamplingParams {
                max_tokens: Some(1),
                temperature: 0.0,
                prompt_logprobs: Some(0),
                ..SamplingParams::default()
            },
            priority: SHADOW_PRIORITY,
            // Its own: nobody's cache says by its speed what was scored.
            cache_salt: Some(inference.id.to_string()),
            adapter: None,
            tenant: SHADOW_TENANT,
            deadline: None,
        };
        let _running = self.rollouts.mirrors().begin();
        let events = match model.engine().submit(request) {
            Ok(events) => events,
            Err(SubmitError::Invalid { .. }) => return Outcome::Unfit,
            Err(_) => return Outcome::CalledOff,
        };
        // Dropping the receiver takes the request back.
        let records = tokio::select! {
            records = timeout(LONGEST, prompt_records(&events)) => records,
            () = self.disturbed() => return Outcome::CalledOff,
        };
        // With the engine to itself: it would take as long again, and those that wait behind it would wait for ever.
        let Ok(records) = records else { return Outcome::Unfit };
        let base: Option<Vec<f32>> =
            records.unwrap_or_default().iter().skip(prompt).map(|record| Some(record.as_ref()?.logprob)).collect();
        let score = base.and_then(|base| base_score(answer.raw_logprobs.get(..fits - prompt)?, &base));
        score.map_or(Outcome::Unfit, Outcome::Scored)
    }

    fn is_disturbed(&self) -> bool {
        self.drain.is_draining() || self.rollouts.mirrors().are_in_the_way(&self.models)
    }

    /// Waits until the engines have nothing else to do; `false` when that does not come soon.
    async fn are_idle(&self) -> bool {
        let end = Instant::now() + PATIENCE;
        while self.is_disturbed() {
            if Instant::now() >= end || self.drain.is_draining() {
                return false;
            }
            sleep(LOOK).await;
        }
        true
    }

    async fn disturbed(&self) {
        while !self.is_disturbed() {
            sleep(LOOK).await;
        }
    }
}

/// The records of a prompt's tokens; `None` where the engine gives none.
async fn prompt_records(events: &Receiver<Event>) -> Option<Vec<Option<TokenRecord>>> {
    match events.recv_async().await {
        Ok(Event::Prompt { logprobs, .. }) => logprobs,
        _ => None,
    }
}

/// k1 and the base's mean, of log-probabilities token by token, in nats. `None` without tokens, where there are not as many of the one as
/// of the other, and where one is infinite or no number.
fn base_score(sampled: &[f32], base: &[f32]) -> Option<BaseScore> {
    let mean = |sum: f64| sum / base.len() as f64;
    let kl = mean(sampled.iter().zip(base).map(|(own, base)| f64::from(*own) - f64::from(*base)).sum());
    let logprob = mean(base.iter().copied().map(f64::from).sum());
    (sampled.len() == base.len() && kl.is_finite() && logprob.is_finite()).then_some(BaseScore { kl, logprob })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_is_the_mean_of_the_differences() {
        let score = base_score(&[-0.5, -1.0], &[-1.0, -2.0]).unwrap();
        assert_eq!((score.kl, score.logprob), (0.75, -1.5));
        // One answer may lie below 0: only their mean is a divergence.
        assert_eq!(base_score(&[-2.0], &[-1.0]).unwrap().kl, -1.0);
        assert_eq!(base_score(&[-1.0, -2.0], &[-1.0, -2.0]).unwrap().kl, 0.0);
        assert!(base_score(&[], &[]).is_none() && base_score(&[-1.0], &[-1.0, -1.0]).is_none());
        assert!(base_score(&[-1.0], &[f32::NEG_INFINITY]).is_none() && base_score(&[f32::NAN], &[-1.0]).is_none());
    }
}
