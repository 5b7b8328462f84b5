//! What a request may ask for. Parameters are named as in the API.

use crate::engine::EngineLimits;
use crate::request::{Request, SamplingParams, SubmitError};

/// Most of the likeliest tokens that can be reported.
pub const MAX_TOP_LOGPROBS: u32 = 20;
const MAX_CHOICES: usize = 128;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 512;
const MAX_LISTED_TOKENS: usize = 1024;

impl SamplingParams {
    /// Checks every range that does not depend on the model.
    pub fn validate(&self) -> Result<(), SubmitError> {
        check("n", (1..=MAX_CHOICES).contains(&self.n), || format!("must be 1 to {MAX_CHOICES}, not {}", self.n))?;
        check("max_tokens", self.max_tokens != Some(0), || "must be at least 1".into())?;
        let too_many = self.max_tokens.is_some_and(|max| self.min_tokens > max);
        check("min_tokens", !too_many, || format!("must not exceed max_tokens, but is {}", self.min_tokens))?;
        range("temperature", self.temperature, 0.0, 2.0)?;
        range("top_p", self.top_p, 0.0, 1.0)?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        at_most("logit_bias", self.logit_bias.len(), MAX_LISTED_TOKENS, "tokens")?;
        for (token, bias) in &self.logit_bias {
            check("logit_bias", (-100.0..=100.0).contains(bias), || {
                format!("must be −100 to 100, but token {token} has {bias}")
            })?;
        }
        at_most("stop", self.stop.len(), MAX_STOPS, "strings")?;
        for stop in &self.stop {
            check("stop", !stop.is_empty(), || "a stop string must not be empty".into())?;
            at_most("stop", stop.len(), MAX_STOP_BYTES, "bytes in one string")?;
        }
        at_most("stop_token_ids", self.stop_token_ids.len(), MAX_LISTED_TOKENS, "tokens")?;
        for (param, top) in [("top_logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            let top = top.unwrap_or(0);
            check(param, top <= MAX_TOP_LOGPROBS, || format!("must be 0 to {MAX_TOP_LOGPROBS}, not {top}"))?;
        }
        Ok(())
    }
}

/// Checks a request against the engine: at most `max_seqs` choices, token ids in the vocabulary, room for at least one token.
pub fn validate(request: &Request, limits: &EngineLimits) -> Result<(), SubmitError> {
    let EngineLimits { max_model_len, max_seqs, vocabulary, .. } = *limits;
    let sampling = &request.sampling;
    sampling.validate()?;
    check("n", sampling.n <= max_seqs, || {
        format!("must be at most {max_seqs}, the sequences this server runs at once, not {}", sampling.n)
    })?;
    check("prompt", !request.prompt.is_empty(), || "must not be empty".into())?;
    if request.prompt.len() >= max_model_len {
        return Err(SubmitError::TooLong { prompt: request.prompt.len(), limit: max_model_len });
    }
    let room = max_model_len - request.prompt.len();
    check("min_tokens", sampling.min_tokens <= room, || {
        format!("is {}, but after the prompt the context has room for {room}", sampling.min_tokens)
    })?;
    known("prompt", request.prompt.iter().copied(), vocabulary)?;
    known("logit_bias", sampling.logit_bias.iter().map(|(token, _)| *token), vocabulary)?;
    known("stop_token_ids", sampling.stop_token_ids.iter().copied(), vocabulary)
}

fn known(param: &'static str, mut tokens: impl Iterator<Item = u32>, vocabulary: usize) -> Result<(), SubmitError> {
    match tokens.find(|token| *token as usize >= vocabulary) {
        Some(token) => check(param, false, || format!("token {token} is not in the vocabulary of {vocabulary}")),
        None => Ok(()),
    }
}

fn range(param: &'static str, value: f32, low: f32, high: f32) -> Result<(), SubmitError> {
    check(param, (low..=high).contains(&value), || format!("must be {low} to {high}, not {value}"))
}

fn at_most(param: &'static str, count: usize, limit: usize, of_what: &str) -> Result<(), SubmitError> {
    check(param, count <= limit, || format!("at most {limit} {of_what}, not {count}"))
}

fn check(param: &'static str, holds: bool, message: impl FnOnce() -> String) -> Result<(), SubmitError> {
    if holds { Ok(()) } else { Err(SubmitError::Invalid { param, message: message() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RequestId;

    const LIMITS: EngineLimits =
        EngineLimits { max_model_len: 64, max_seqs: 8, max_batch_tokens: 8, max_waiting: 1, vocabulary: 100 };

    fn request() -> Request {
        Request {
            id: RequestId(1),
            prompt: vec![1, 2, 3],
            sampling: SamplingParams::default(),
            priority: 0,
            cache_salt: None,
            adapter: None,
            tenant: crate::request::Tenant::default(),
            deadline: None,
        }
    }

    #[test]
    fn each_bad_parameter_is_refused_by_its_name() {
        type Spoil = fn(&mut Request);
        let cases: Vec<(&str, Spoil)> = vec![
            ("n", |r| r.sampling.n = 0),
            ("n", |r| r.sampling.n = 9),
            ("max_tokens", |r| r.sampling.max_tokens = Some(0)),
            ("min_tokens", |r| (r.sampling.min_tokens, r.sampling.max_tokens) = (5, Some(4))),
            ("min_tokens", |r| r.sampling.min_tokens = 62),
            ("temperature", |r| r.sampling.temperature = f32::NAN),
            ("temperature", |r| r.sampling.temperature = 2.1),
            ("top_p", |r| r.sampling.top_p = 1.5),
            ("min_p", |r| r.sampling.min_p = -0.1),
            ("repetition_penalty", |r| r.sampling.repetition_penalty = 0.0),
            ("presence_penalty", |r| r.sampling.presence_penalty = f32::INFINITY),
            ("frequency_penalty", |r| r.sampling.frequency_penalty = -3.0),
            ("logit_bias", |r| r.sampling.logit_bias = vec![(1, 101.0)]),
            ("logit_bias", |r| r.sampling.logit_bias = vec![(100, 1.0)]),
            ("stop", |r| r.sampling.stop = vec![String::new()]),
            ("stop", |r| r.sampling.stop = vec!["x".into(); 17]),
            ("stop_token_ids", |r| r.sampling.stop_token_ids = vec![100]),
            ("top_logprobs", |r| r.sampling.logprobs = Some(21)),
            ("prompt_logprobs", |r| r.sampling.prompt_logprobs = Some(21)),
            ("prompt", |r| r.prompt.clear()),
            ("prompt", |r| r.prompt[1] = 100),
        ];
        assert_eq!(validate(&request(), &LIMITS), Ok(()));
        for (name, spoil) in cases {
            let mut request = request();
            spoil(&mut request);
            match validate(&request, &LIMITS) {
                Err(SubmitError::Invalid { param, .. }) => assert_eq!(param, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_prompt_must_leave_room_for_one_token() {
        let mut request = request();
        request.prompt = vec![1; 63];
        assert_eq!(validate(&request, &LIMITS), Ok(()));
        request.prompt.push(1);
        assert_eq!(validate(&request, &LIMITS), Err(SubmitError::TooLong { prompt: 64, limit: 64 }));
    }
}
