//! Where answers come from: an engine in the same process, over the adapter as it is now.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tidemill_engine::{
    Adapter, AdapterLease, Engine, EngineOptions, Event, FinishReason, Request, RequestId, SamplingParams, Tenant,
};

use crate::{
    model::ModelError,
    random::mix,
    train::{TrainError, config::Draw},
};

/// Sequences that the engine runs at once at most; more are no faster.
const SEQUENCES: usize = 64;
/// Adapters in the engine: the one that samples, and the one that it replaces.
pub const ADAPTERS: usize = 2;
/// The adapter's name in the engine.
const NAME: &str = "policy";

/// A prompt that wants answers.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Its tokens, at least one.
    pub prompt: &'a [u32],
    /// How many answers.
    pub answers: usize,
    /// What the draws are a function of, with the prompt and the parameters.
    pub seed: u64,
}

/// An answer that was sampled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drawn {
    /// Its tokens; the one that ended it is the last.
    pub tokens: Vec<u32>,
    /// Log-probability of each under the distribution that it was drawn from.
    pub log_probs: Vec<f32>,
    /// Its text, without special tokens.
    pub text: String,
    /// It ended by itself, and was not cut off.
    pub ended: bool,
}

/// Samples answers from what is being trained, as it is now. The same asks and parameters give the same answers.
pub trait Sampler: Send {
    /// The answers of each ask, in order.
    fn sample(&mut self, asks: &[Ask<'_>], draw: &Draw) -> Result<Vec<Vec<Drawn>>, TrainError>;
}

/// What is being trained, as an adapter.
type Source<'a> = Box<dyn Fn() -> Result<Adapter, ModelError> + Send + 'a>;

/// An engine that samples, and the model that is trained.
pub struct EngineSampler<'a> {
    engine: Engine,
    source: Source<'a>,
}

/// What an engine for sampling is started with: the base at `model`, room for `sequences` answers at once and for `longest` tokens of
/// prompt and answer together, and for [`ADAPTERS`] of `rank`.
pub fn sampling(model: &std::path::Path, sequences: usize, longest: usize, rank: usize, threads: Option<usize>) -> EngineOptions {
    EngineOptions {
        threads,
        max_seqs: sequences.clamp(1, SEQUENCES),
        max_model_len: Some(longest.max(2)),
        max_adapters: ADAPTERS,
        max_adapter_rank: rank.max(1),
        ..EngineOptions::new(model)
    }
}

impl<'a> EngineSampler<'a> {
    /// Over an engine that takes adapters; `source` gives the adapter as it is now.
    pub fn new(engine: Engine, source: impl Fn() -> Result<Adapter, ModelError> + Send + 'a) -> Self {
        Self { engine, source: Box::new(source) }
    }
}

/// Where a part's answers go.
type Place = Mutex<Option<Result<Vec<Drawn>, TrainError>>>;

/// As many answers to one prompt as the engine makes at once.
#[derive(Clone, Copy)]
struct Part<'a> {
    ask: usize,
    prompt: &'a [u32],
    answers: usize,
    seed: u64,
}

/// Asks with more answers than the engine makes at once, cut; where an ask is cut does not depend on the others.
fn parts<'a>(asks: &[Ask<'a>], most: usize) -> Vec<Part<'a>> {
    let cut = |(index, ask): (usize, &Ask<'a>)| {
        let Ask { prompt, answers, seed } = *ask;
        let part = move |first: usize| {
            let seed = if first == 0 { seed } else { mix(seed ^ first as u64) };
            Part { ask: index, prompt, answers: most.min(answers - first), seed }
        };
        (0..answers).step_by(most).map(part)
    };
    asks.iter().enumerate().flat_map(cut).collect()
}

/// All answers to one ask, in the order of their choices.
fn answer(engine: &Engine, part: Part<'_>, lease: &AdapterLease, draw: &Draw) -> Result<Vec<Drawn>, TrainError> {
    let sampling = SamplingParams {
        n: part.answers,
        max_tokens: Some(draw.max_tokens),
        temperature: draw.temperature,
        top_p: draw.top_p,
        top_k: draw.top_k,
        min_p: draw.min_p,
        seed: Some(part.seed),
        ..SamplingParams::default()
    };
    let request = Request {
        id: RequestId(0),
        prompt: part.prompt.to_vec(),
        sampling,
        priority: 0,
        cache_salt: None,
        adapter: Some(lease.clone()),
        tenant: Tenant::default(),
        deadline: None,
    };
    let events = engine.submit(request)?;
    let mut drawn = vec![Drawn::default(); part.answers];
    for event in events {
        match event {
            Event::Token { choice, record, text } => {
                let answer = &mut drawn[choice];
                answer.tokens.push(record.token);
                answer.log_probs.push(record.processed_logprob);
                answer.text.push_str(&text);
            }
            Event::Finished { choice, reason: FinishReason::Cancelled, .. } => {
                return Err(TrainError::Sample(format!("answer {choice} was cancelled")));
            }
            Event::Finished { choice, reason, text, .. } => {
                drawn[choice].text.push_str(&text);
                drawn[choice].ended = reason == FinishReason::Stop;
            }
            Event::Done(_) => return Ok(drawn),
            Event::Failed(message) => return Err(TrainError::Sample(message)),
            Event::Expired | Event::Prompt { .. } => {}
        }
    }
    Err(TrainError::Sample("it stopped before the answers were done".to_owned()))
}

impl Sampler for EngineSampler<'_> {
    fn sample(&mut self, asks: &[Ask<'_>], draw: &Draw) -> Result<Vec<Vec<Drawn>>, TrainError> {
        // In seconds since 1970 it is nobody's business: the adapter lives for one batch of answers.
        let lease = self.engine.publish_adapter(NAME, (self.source)()?, false, 0)?;
        let (engine, most) = (&self.engine, self.engine.limits().max_seqs);
        let parts = parts(asks, most);
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let found: Vec<Place> = parts.iter().map(|_| Mutex::new(None)).collect();
        // A reader for each request that runs: the engine does not wait for answers that nobody reads.
        std::thread::scope(|scope| {
            for _ in 0..parts.len().min(most + 1) {
                scope.spawn(|| {
                    while !failed.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(part) = parts.get(index) else { break };
                        let answers = answer(engine, *part, &lease, draw);
                        failed.fetch_or(answers.is_err(), Ordering::Relaxed);
                        *found[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(answers);
                    }
                });
            }
        });
        let mut drawn: Vec<Vec<Drawn>> = asks.iter().map(|_| Vec::new()).collect();
        let found: Vec<_> = found.into_iter().map(|found| found.into_inner().unwrap_or_else(PoisonError::into_inner)).collect();
        // Those that were not begun come after the one that failed.
        for (part, answers) in parts.iter().zip(found) {
            if let Some(answers) = answers {
                drawn[part.ask].extend(answers?);
            }
        }
        Ok(drawn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ask_is_cut_the_same_whatever_is_beside_it() {
        let ask = |answers: usize, seed: u64| Ask { prompt: &[1], answers, seed };
        let shape = |asks: &[Ask<'_>]| -> Vec<(usize, usize, u64)> {
            parts(asks, 4).iter().map(|part| (part.ask, part.answers, part.seed)).collect()
        };
        let alone = shape(&[ask(9, 5)]);
        assert_eq!(alone.iter().map(|(_, answers, _)| *answers).collect::<Vec<_>>(), [4, 4, 1]);
        assert_eq!(alone[0].2, 5);
        let beside = shape(&[ask(2, 7), ask(9, 5)]);
        assert_eq!(
            beside[1..].iter().map(|part| part.2).collect::<Vec<_>>(),
            alone.iter().map(|part| part.2).collect::<Vec<_>>()
        );
    }
}
