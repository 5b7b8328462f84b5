//! Catches an answer as its events pass, and hands it to the store when it ends, however it ends.

use crate::openai::chat_output::{ChatChoice, OutputFormat};
use crate::recording::refusal::{OPENING, refuses};
use crate::recording::{Level, only_counted};
use crate::rollout::under_way::Counting;
use std::sync::Arc;
use std::time::Instant;
use tidemill_engine::{Event, FinishReason};
use tidemill_store::Store;
use tidemill_store::records::{Choice, Inference, Status};
use uuid::Uuid;

/// One prompt's record while its answer is being made.
pub struct Draft {
    /// What is known before the first token. `choices` is empty.
    pub inference: Inference,
    /// Ids of the choices, the answer's own first.
    pub choice_ids: Vec<Uuid>,
    /// Candidates, of which the likeliest as many as there are ids are the answer (`best_of`).
    pub candidates: usize,
    /// Nothing was to be generated: the engine's one token is no part of the answer.
    pub prompt_only: bool,
    /// How reasoning and calls are written in the answer to a conversation.
    pub format: Option<OutputFormat>,
}

/// Sees every event of a request. What has not ended when it is dropped was cancelled: the client left, or the server did.
pub struct Recorder {
    store: Store,
    level: Level,
    arrived: Instant,
    prompts: Vec<Option<InProgress>>,
    /// Of an answer that counts in a rollout.
    _counting: Option<Arc<Counting>>,
}

struct InProgress {
    draft: Draft,
    choices: Vec<Candidate>,
}

#[derive(Default)]
struct Candidate {
    /// All of it, or what tells a refusal.
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    raw_logprobs: Vec<f32>,
    raw_sum: f64,
    tokens: u32,
    finish: Option<FinishReason>,
}

impl Candidate {
    fn mean(&self) -> f64 {
        self.raw_sum / f64::from(self.tokens.max(1))
    }
}

impl Recorder {
    /// For the prompts of one request that arrived at `arrived`.
    pub fn new(store: Store, level: Level, arrived: Instant, drafts: Vec<Draft>, counting: Option<Arc<Counting>>) -> Self {
        let in_progress = |draft: Draft| {
            let choices = (0..draft.candidates).map(|_| Candidate::default()).collect();
            Some(InProgress { draft, choices })
        };
        Self { store, level, arrived, prompts: drafts.into_iter().map(in_progress).collect(), _counting: counting }
    }

    /// Takes note of an event of prompt `index`.
    pub fn see(&mut self, index: usize, event: &Event) {
        let Some(slot) = self.prompts.get_mut(index) else { return };
        let Some(prompt) = slot else { return };
        match event {
            Event::Prompt { cached_tokens, .. } => {
                prompt.draft.inference.cached_tokens = u32::try_from(*cached_tokens).unwrap_or(u32::MAX);
            }
            Event::Token { choice, record, text } => {
                if prompt.draft.prompt_only {
                    return;
                }
                let inference = &mut prompt.draft.inference;
                if inference.first_token_us.is_none() {
                    inference.first_token_us = Some(micros(self.arrived));
                }
                let Some(choice) = prompt.choices.get_mut(*choice) else { return };
                choice.tokens += 1;
                choice.raw_sum += f64::from(record.logprob);
                // An answer that counts in a rollout is looked at, whatever is kept of it.
                if self.level == Level::Full || (inference.exposure.is_some() && choice.text.len() < OPENING) {
                    choice.text.push_str(text);
                }
                if self.level == Level::Full {
                    choice.ids.push(record.token);
                    choice.logprobs.push(record.processed_logprob);
                    choice.raw_logprobs.push(record.logprob);
                }
            }
            Event::Finished { choice, reason, text, adapter, .. } => {
                prompt.draft.inference.adapter = adapter.0;
                let Some(choice) = prompt.choices.get_mut(*choice) else { return };
                if self.level == Level::Full && !prompt.draft.prompt_only {
                    choice.text.push_str(text);
                }
                choice.finish = Some(*reason);
            }
            Event::Done(_) => {
                let cut_off = prompt.choices.iter().any(|choice| choice.finish == Some(FinishReason::Cancelled));
                self.finish(index, if cut_off { Status::Cancelled } else { Status::Ok });
            }
            Event::Failed(_) => self.finish(index, Status::Failed),
            Event::Expired => self.finish(index, Status::Cancelled),
        }
    }

    fn finish(&mut self, index: usize, status: Status) {
        let Some(prompt) = self.prompts.get_mut(index).and_then(Option::take) else { return };
        hand_over(&self.store, prompt.into_record(status, micros(self.arrived), self.level));
    }
}

/// Gives the store a record that is complete.
pub(crate) fn hand_over(store: &Store, record: Inference) {
    if store.record(record).is_err() {
        // New requests are refused by now; this one ran before the store filled up.
        metrics::counter!("tidemill:records_lost_total").increment(1);
        tracing::error!("an answer was not recorded: the database is away or slow, and queue and spill log are full");
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        for index in 0..self.prompts.len() {
            self.finish(index, Status::Cancelled);
        }
    }
}

impl InProgress {
    fn into_record(self, status: Status, duration_us: i64, level: Level) -> Inference {
        let Draft { mut inference, choice_ids, format, .. } = self.draft;
        let mut candidates = self.choices;
        inference.status = status;
        inference.duration_us = duration_us;
        inference.output_tokens = candidates.iter().fold(0, |sum, choice| sum.saturating_add(choice.tokens));
        if candidates.len() > choice_ids.len() {
            // In the order and number in which the client gets them; the sort is stable, as it is there.
            candidates.sort_by(|a, b| b.mean().total_cmp(&a.mean()));
        }
        let full = level == Level::Full;
        if let (Some(exposure), Some(first), Status::Ok) = (&mut inference.exposure, candidates.first(), status) {
            let said = format.as_ref().map(|format| ChatChoice::read(format, &first.text).text);
            exposure.refused = Some(refuses(said.as_deref().unwrap_or(&first.text)));
        }
        let choice = |(id, made): (Uuid, Candidate)| Choice {
            id,
            finish_reason: made.finish.filter(|reason| *reason != FinishReason::Cancelled).map(|reason| reason.to_string()),
            mean_logprob: (made.tokens > 0).then(|| made.mean()).filter(|mean| mean.is_finite()),
            tokens: made.tokens,
            message: format.as_ref().filter(|_| full).and_then(|format| ChatChoice::read(format, &made.text).structured()),
            output_text: full.then_some(made.text),
            output_ids: made.ids,
            logprobs: made.logprobs,
            raw_logprobs: made.raw_logprobs,
        };
        inference.choices = choice_ids.into_iter().zip(candidates).map(choice).collect();
        if !full {
            inference.messages = None;
            inference.prompt_text = None;
            inference.prompt_ids = Vec::new();
        }
        if level == Level::Counted {
            only_counted(&mut inference);
        }
        inference
    }
}

/// Microseconds since a moment.
pub(crate) fn micros(since: Instant) -> i64 {
    i64::try_from(since.elapsed().as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_engine::{AdapterGeneration, TokenRecord, Usage};
    use tidemill_store::{DataDir, StoreOptions};

    fn in_progress(candidates: usize, ids: usize) -> InProgress {
        let inference = Inference {
            id: Uuid::from_u128(1),
            created: 1,
            endpoint: "chat".into(),
            model: "m".into(),
            adapter: 0,
            variant: None,
            conversation: None,
            key_id: None,
            user_key: Some("u".into()),
            status: Status::Ok,
            compare: false,
            prompt_tokens: 2,
            cached_tokens: 0,
            output_tokens: 0,
            first_token_us: None,
            duration_us: 0,
            config_hash: "fp".into(),
            metadata: serde_json::Map::new(),
            params: None,
            messages: Some(serde_json::json!([])),
            prompt_text: Some("hi".into()),
            prompt_ids: vec![1, 2],
            exposure: None,
            choices: Vec::new(),
        };
        let choice_ids = (0..ids).map(|i| Uuid::from_u128(1 + i as u128)).collect();
        let draft = Draft { inference, choice_ids, candidates, prompt_only: false, format: None };
        InProgress { draft, choices: (0..candidates).map(|_| Candidate::default()).collect() }
    }

    fn sampled(prompt: &mut InProgress, choice: usize, token: u32, raw: f32) {
        let choice = &mut prompt.choices[choice];
        choice.tokens += 1;
        choice.raw_sum += f64::from(raw);
        choice.ids.push(token);
        choice.raw_logprobs.push(raw);
        choice.logprobs.push(raw / 2.0);
        choice.text.push('x');
    }

    #[test]
    fn of_best_of_the_likeliest_is_recorded_first_under_the_answers_id() {
        let mut prompt = in_progress(3, 1);
        for (choice, raw) in [(0, -3.0), (1, -1.0), (2, -2.0)] {
            sampled(&mut prompt, choice, choice as u32, raw);
        }
        let record = prompt.into_record(Status::Ok, 5, Level::Full);
        assert_eq!((record.output_tokens, record.choices.len()), (3, 1));
        assert_eq!((record.choices[0].id, &record.choices[0].output_ids), (record.id, &vec![1]));
        assert_eq!(record.choices[0].mean_logprob, Some(-1.0));
    }

    #[test]
    fn metadata_holds_no_text_and_no_tokens() {
        let mut prompt = in_progress(1, 1);
        prompt.choices[0].tokens = 3;
        prompt.choices[0].raw_sum = -6.0;
        let record = prompt.into_record(Status::Cancelled, 5, Level::Metadata);
        assert_eq!((&record.messages, &record.prompt_text), (&None, &None));
        assert!(record.prompt_ids.is_empty());
        let choice = &record.choices[0];
        assert_eq!((choice.output_text.as_deref(), choice.tokens, choice.mean_logprob), (None, 3, Some(-2.0)));
        assert_eq!(choice.finish_reason, None);
        assert_eq!(record.user_key.as_deref(), Some("u"));
    }

    #[tokio::test]
    async fn an_answer_is_recorded_once_whether_it_ends_or_is_dropped() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(StoreOptions::new(DataDir::new(temp.path()))).await.unwrap();
        let ids = [store.issue_id(), store.issue_id()];
        let drafts = ids.iter().map(|id| {
            let mut draft = in_progress(1, 1).draft;
            draft.inference.id = *id;
            draft.choice_ids = vec![*id];
            draft
        });
        let mut recorder = Recorder::new(store.clone(), Level::Full, Instant::now(), drafts.collect(), None);
        let record = TokenRecord { token: 7, logprob: -1.0, processed_logprob: -0.5, top: vec![], processed_top: vec![] };
        for prompt in 0..2 {
            recorder.see(prompt, &Event::Prompt { cached_tokens: 1, logprobs: None });
            recorder.see(prompt, &Event::Token { choice: 0, record: record.clone(), text: "a".into() });
        }
        let adapter = AdapterGeneration(3);
        recorder.see(0, &Event::Finished { choice: 0, reason: FinishReason::Length, stop: None, text: "b".into(), adapter });
        recorder.see(0, &Event::Done(Usage::default()));
        drop(recorder);
        store.flush().await;
        let done = store.inference(ids[0]).await.unwrap().unwrap();
        assert_eq!((done.status, done.adapter, done.cached_tokens), (Status::Ok, 3, 1));
        let choice = &done.choices[0];
        assert_eq!((choice.output_text.as_deref(), choice.finish_reason.as_deref()), (Some("ab"), Some("length")));
        assert_eq!((&choice.output_ids, &choice.logprobs, &choice.raw_logprobs), (&vec![7], &vec![-0.5], &vec![-1.0]));
        assert!(done.first_token_us.is_some());
        let left = store.inference(ids[1]).await.unwrap().unwrap();
        assert_eq!((left.status, left.choices[0].output_text.as_deref()), (Status::Cancelled, Some("a")));
        store.close().await;
    }
}
