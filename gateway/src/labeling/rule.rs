//! Which traffic enters a queue. Every condition must hold.

use serde::{Deserialize, Serialize};
use tidemill_store::label::{NewDraft, NewTask};
use tidemill_store::records::{Choice, Inference, Status};
use uuid::Uuid;

/// A queue's rule, as the API takes it and the store keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Where pairs come from.
    pub from: From,
    /// Share of the matching traffic, 0 to 1, drawn by the answer's id.
    #[serde(default = "all")]
    pub share: f64,
    /// Only answers that got a thumb down.
    #[serde(default)]
    pub low_thumb: bool,
    /// Only answers whose mean log-probability per token is below this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_logprob_below: Option<f64>,
    /// Only these served models; empty is any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Only these variants; empty is any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub variants: Vec<String>,
    /// Only pairs that were asked for with `compare`.
    #[serde(default)]
    pub compare: bool,
    /// Filling rests while this many pairs are open.
    #[serde(default = "many")]
    pub max_open: u64,
}

/// Where pairs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// Recorded answers.
    Traffic,
    /// What is uploaded: prompts, which get two fresh answers each, or whole pairs.
    Upload,
}

/// What an answer becomes.
#[derive(Clone, Debug, PartialEq)]
pub enum Admitted {
    /// It brought both answers.
    Pair(Box<NewTask>),
    /// A second answer must be generated.
    Draft(Box<NewDraft>),
}

fn all() -> f64 {
    1.0
}

fn many() -> u64 {
    1000
}

impl Default for Rule {
    fn default() -> Self {
        Self {
            from: From::Upload,
            share: all(),
            low_thumb: false,
            mean_logprob_below: None,
            models: Vec::new(),
            variants: Vec::new(),
            compare: false,
            max_open: many(),
        }
    }
}

impl Rule {
    /// What is wrong with it: the field, and why.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        if !(self.share > 0.0 && self.share <= 1.0) {
            return Err(("rule.share", "expected a number above 0 and at most 1"));
        }
        if self.mean_logprob_below.is_some_and(|threshold| !threshold.is_finite() || threshold > 0.0) {
            return Err(("rule.mean_logprob_below", "expected a negative number: log-probabilities are at most 0"));
        }
        if self.max_open == 0 || self.max_open > 1_000_000 {
            return Err(("rule.max_open", "expected an integer from 1 to 1000000"));
        }
        let conditions = self.low_thumb
            || self.mean_logprob_below.is_some()
            || self.compare
            || !self.models.is_empty()
            || !self.variants.is_empty();
        if self.from == From::Upload && (conditions || self.share < 1.0) {
            return Err(("rule.from", "conditions are for `traffic`; what is uploaded enters whole"));
        }
        Ok(())
    }

    /// What becomes of an answer in queue `queue`. Whether it got a thumb down is the caller's to know: with `low_thumb` only such
    /// answers are shown to the rule.
    pub fn admit(&self, queue: Uuid, answer: &Inference) -> Option<Admitted> {
        let messages = answer.messages.as_ref()?;
        let listed =
            |list: &[String], name: Option<&str>| list.is_empty() || name.is_some_and(|name| list.iter().any(|n| n == name));
        let matches = answer.status == Status::Ok
            && listed(&self.models, Some(&answer.model))
            && listed(&self.variants, answer.variant.as_deref())
            && (!self.compare || answer.compare)
            && lot(queue, answer.id) < self.share;
        if !matches || !self.uncertain(&answer.choices) {
            return None;
        }
        let source = answer.id.to_string();
        let mut texts = answer.choices.iter().filter_map(|choice| Some((choice.id, text_of(choice)?)));
        let (first, text) = texts.next()?;
        match texts.find(|(_, other)| *other != text) {
            Some((second, other)) => Some(Admitted::Pair(Box::new(NewTask {
                source,
                prompt: messages.clone(),
                answer_a: text.to_owned(),
                answer_b: other.to_owned(),
                candidate_a: Some(first),
                candidate_b: Some(second),
                gold: None,
            }))),
            // Asked for twice and the same both times: there is nothing to compare.
            None if answer.choices.len() > 1 => None,
            None => Some(Admitted::Draft(Box::new(NewDraft {
                source,
                prompt: messages.clone(),
                answer: Some((text.to_owned(), first)),
                model: Some(answer.model.clone()),
            }))),
        }
    }

    fn uncertain(&self, choices: &[Choice]) -> bool {
        match self.mean_logprob_below {
            None => true,
            Some(threshold) => choices.iter().filter_map(|choice| choice.mean_logprob).any(|mean| mean < threshold),
        }
    }
}

/// A whole answer: one that was cut off is no fair candidate.
fn text_of(choice: &Choice) -> Option<&str> {
    let whole = choice.finish_reason.as_deref() == Some("stop");
    choice.output_text.as_deref().filter(|text| whole && !text.trim().is_empty())
}

/// A number from 0 to below 1, fixed by queue and answer: two queues draw different answers.
fn lot(queue: Uuid, answer: Uuid) -> f64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(queue.as_bytes()).update(answer.as_bytes());
    let mut first = [0; 4];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..4]);
    f64::from(u32::from_le_bytes(first)) / 4_294_967_296.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    fn answer(texts: &[&str]) -> Inference {
        let choice = |(at, text): (usize, &&str)| Choice {
            id: Uuid::from_u128(10 + at as u128),
            finish_reason: Some("stop".into()),
            output_text: Some((*text).to_owned()),
            message: None,
            output_ids: vec![1],
            logprobs: vec![-1.0],
            raw_logprobs: vec![-1.0],
            mean_logprob: Some(-1.0),
            tokens: 1,
        };
        Inference {
            id: Uuid::from_u128(10),
            created: 1,
            endpoint: "chat".into(),
            model: "m".into(),
            adapter: 0,
            variant: Some("blue".into()),
            conversation: None,
            key_id: None,
            user_key: None,
            status: Status::Ok,
            compare: texts.len() > 1,
            prompt_tokens: 1,
            cached_tokens: 0,
            output_tokens: 1,
            first_token_us: None,
            duration_us: 1,
            config_hash: String::new(),
            metadata: Map::new(),
            params: None,
            messages: Some(json!([{"role": "user", "content": "hi"}])),
            prompt_text: None,
            prompt_ids: vec![1],
            exposure: None,
            choices: texts.iter().enumerate().map(choice).collect(),
        }
    }

    fn traffic() -> Rule {
        Rule { from: From::Traffic, ..Rule::default() }
    }

    const QUEUE: Uuid = Uuid::from_u128(3);

    #[test]
    fn two_different_answers_are_a_pair_and_one_is_a_draft() {
        let Some(Admitted::Pair(pair)) = traffic().admit(QUEUE, &answer(&["x", "y"])) else { panic!("a pair") };
        assert_eq!((pair.candidate_a, pair.candidate_b), (Some(Uuid::from_u128(10)), Some(Uuid::from_u128(11))));
        let Some(Admitted::Draft(draft)) = traffic().admit(QUEUE, &answer(&["x"])) else { panic!("a draft") };
        assert_eq!(draft.answer, Some(("x".to_owned(), Uuid::from_u128(10))));
        assert_eq!(traffic().admit(QUEUE, &answer(&["x", "x"])), None);
    }

    #[test]
    fn every_condition_must_hold() {
        let with = |change: fn(&mut Rule)| {
            let mut rule = traffic();
            change(&mut rule);
            rule.admit(QUEUE, &answer(&["x"])).is_some()
        };
        assert!(with(|_| {}));
        assert!(with(|rule| rule.models = vec!["m".into()]) && !with(|rule| rule.models = vec!["n".into()]));
        assert!(with(|rule| rule.variants = vec!["blue".into()]) && !with(|rule| rule.variants = vec!["red".into()]));
        assert!(with(|rule| rule.mean_logprob_below = Some(-0.5)) && !with(|rule| rule.mean_logprob_below = Some(-1.0)));
        assert!(!with(|rule| rule.compare = true));
        assert!(!with(|rule| (rule.models, rule.variants) = (vec!["m".into()], vec!["red".into()])));
    }

    #[test]
    fn what_was_cut_off_or_not_recorded_is_no_candidate() {
        let mut cut = answer(&["x"]);
        cut.choices[0].finish_reason = Some("length".into());
        assert_eq!(traffic().admit(QUEUE, &cut), None);
        let silent = Inference { messages: None, ..answer(&["x"]) };
        assert_eq!(traffic().admit(QUEUE, &silent), None);
        let failed = Inference { status: Status::Failed, ..answer(&["x"]) };
        assert_eq!(traffic().admit(QUEUE, &failed), None);
    }

    #[test]
    fn a_share_is_drawn_by_id_and_differently_per_queue() {
        let rule = Rule { share: 0.2, ..traffic() };
        let drawn = |queue: u128| -> Vec<u128> {
            let admitted = |n: &u128| {
                let answer = Inference { id: Uuid::from_u128(*n), ..answer(&["x"]) };
                rule.admit(Uuid::from_u128(queue), &answer).is_some()
            };
            (0..5000).filter(admitted).collect()
        };
        let first = drawn(1);
        // Six standard deviations (28.3 each) around 1000.
        assert!((830..=1170).contains(&first.len()), "{}", first.len());
        assert_eq!(first, drawn(1));
        assert_ne!(first, drawn(2));
    }

    #[test]
    fn a_rule_that_cannot_be_meant_is_refused() {
        assert_eq!(Rule::default().check(), Ok(()));
        for (rule, field) in [
            (Rule { share: 0.0, ..traffic() }, "rule.share"),
            (Rule { share: f64::NAN, ..traffic() }, "rule.share"),
            (Rule { mean_logprob_below: Some(0.5), ..traffic() }, "rule.mean_logprob_below"),
            (Rule { max_open: 0, ..traffic() }, "rule.max_open"),
            (Rule { compare: true, ..Rule::default() }, "rule.from"),
        ] {
            assert_eq!(rule.check().unwrap_err().0, field);
        }
        assert!(serde_json::from_value::<Rule>(json!({"from": "traffic", "shar": 1})).is_err());
    }
}
