//! One choice on its way through its grammar.

use super::Grammar;
use crate::request::Request;
use llguidance::Matcher;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tidemill_kernels::{MaskPromise, TokenMask};

/// A mask that takes longer to work out makes its choice a slow one: a step would wait for it, and all who are in the step.
const SLOW: Duration = Duration::from_millis(2);
/// So many masks in a row must be quick before a slow choice counts as quick again.
const PROBATION: u32 = 32;

/// Takes the tokens of a choice, in order, and promises a mask for each next one. Tokens of a sequence never change, so nothing is
/// ever taken back: a sequence that is preempted and computed again waits for the same mask.
pub(crate) struct Follower {
    request: Arc<Request>,
    grammar: Arc<Grammar>,
    progress: Arc<Progress>,
    next: TokenMask,
}

/// What a choice shares with the thread that works out its masks.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    /// Quick masks that are still to come before the choice is no slow one.
    probation: AtomicU32,
}

/// What there is to say when a token was drawn for a choice that has none to draw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The text is whole, and the model has no token that says so.
    Complete,
    /// The grammar cannot go on; the text is fit for the client.
    Failed(String),
}

#[derive(Default)]
enum State {
    /// No token yet: the grammar's own beginning.
    #[default]
    Start,
    Under(Box<Matcher>),
    /// Nothing can follow.
    Ended,
    Failed(String),
}

impl Follower {
    /// For the first token.
    pub fn start(grammar: &Arc<Grammar>, request: &Arc<Request>) -> Self {
        let mut words = grammar.first.clone();
        settle(&mut words, &grammar.ends, request, 0);
        Self {
            request: Arc::clone(request),
            grammar: Arc::clone(grammar),
            progress: Arc::default(),
            next: TokenMask::known(words),
        }
    }

    /// Another choice of the same request, which also begins with this mask.
    pub fn fork_at_start(&self) -> Self {
        Self {
            request: Arc::clone(&self.request),
            grammar: Arc::clone(&self.grammar),
            progress: Arc::default(),
            next: self.next.clone(),
        }
    }

    /// What the next token may be.
    pub fn mask(&self) -> TokenMask {
        self.next.clone()
    }

    /// Whether the next mask may take long: the choice is a slow one, and the mask is not there.
    pub fn is_late(&self) -> bool {
        self.progress.probation.load(Ordering::Relaxed) > 0 && !self.next.is_known()
    }

    /// Set when the mask that was drawn with last was no mask. Waits for it.
    pub fn verdict(&self) -> Option<Verdict> {
        let words = self.next.wait();
        match &*lock(&self.progress.state) {
            State::Ended if self.grammar.ends.is_empty() => Some(Verdict::Complete),
            State::Failed(message) => Some(Verdict::Failed(message.clone())),
            // The promise was broken: whatever was drawn, the grammar did not allow it.
            _ if words.is_empty() => Some(Verdict::Failed("the grammar failed".into())),
            _ => None,
        }
    }

    /// Goes on with a drawn token, `generated` with it, and has the next mask worked out.
    pub fn advance(&mut self, token: u32, generated: usize) {
        let sampling = &self.request.sampling;
        if self.grammar.ends.contains(&token) || sampling.max_tokens.is_some_and(|most| generated >= most) {
            // The last token: nobody asks for a mask.
            return;
        }
        let (promise, next) = TokenMask::promise();
        self.next = next;
        self.grammar.crew.hand(Job {
            request: Arc::clone(&self.request),
            grammar: Arc::clone(&self.grammar),
            progress: Arc::clone(&self.progress),
            token,
            generated,
            promise,
        });
    }

    /// Makes it a slow one whose next mask comes when the test says.
    #[cfg(test)]
    pub fn stall(&mut self) -> MaskPromise {
        self.progress.probation.store(PROBATION, Ordering::Relaxed);
        let (promise, next) = TokenMask::promise();
        self.next = next;
        promise
    }
}

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follower").field("mask_known", &self.next.is_known()).finish_non_exhaustive()
    }
}

/// One token to follow and the mask that comes after it.
pub(super) struct Job {
    request: Arc<Request>,
    grammar: Arc<Grammar>,
    progress: Arc<Progress>,
    token: u32,
    generated: usize,
    promise: MaskPromise,
}

impl Job {
    /// Whether it may take long.
    pub fn is_slow(&self) -> bool {
        self.progress.probation.load(Ordering::Relaxed) > 0
    }

    pub fn run(self) {
        let Job { request, grammar, progress, token, generated, promise } = self;
        if Arc::strong_count(&progress) == 1 {
            // The sequence is gone.
            return;
        }
        let begun = Instant::now();
        let mut state = lock(&progress.state);
        let stepped = catch_unwind(AssertUnwindSafe(|| state.step(&grammar, token)));
        let mut words = stepped.unwrap_or_else(|_| {
            *state = State::Failed("the grammar failed".into());
            Vec::new()
        });
        if matches!(*state, State::Failed(_)) {
            grammar.renew();
        }
        drop(state);
        settle(&mut words, &grammar.ends, &request, generated);
        let probation = match begun.elapsed() > SLOW {
            true => PROBATION,
            false => progress.probation.load(Ordering::Relaxed).saturating_sub(1),
        };
        progress.probation.store(probation, Ordering::Relaxed);
        promise.keep(words);
    }
}

impl State {
    /// Follows a token; returns what may come next.
    fn step(&mut self, grammar: &Grammar, token: u32) -> Vec<u32> {
        if let State::Start = self {
            *self = State::Under(Box::new(grammar.matcher()));
        }
        let State::Under(matcher) = self else { return Vec::new() };
        let mask = matcher.consume_token(token).and_then(|()| match matcher.is_stopped() {
            true => Ok(None),
            false => matcher.compute_mask().map(Some),
        });
        match mask {
            Ok(Some(mask)) => mask.into(),
            // A mask that allows nothing is how llguidance says that it noticed the end late.
            _ if matcher.stop_reason().is_ok() => {
                *self = State::Ended;
                let mut words = vec![0; grammar.first.len()];
                grammar.ends.iter().for_each(|end| allow(&mut words, *end));
                words
            }
            other => {
                let cause = other.err().map(|error| error.to_string()).unwrap_or_default();
                tracing::warn!(cause, "a grammar failed");
                *self = State::Failed(
                    "the text cannot go on within its grammar, which became too complex here; make the grammar simpler".into(),
                );
                Vec::new()
            }
        }
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    // A panic under the lock is caught and written into the state.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Applies what a request says of ending. Where the grammar lets the text end, the client's own stop tokens end it too; before
/// `min_tokens`, or with `ignore_eos`, it does not end as long as it can go on.
fn settle(words: &mut Vec<u32>, ends: &[u32], request: &Request, generated: usize) {
    let sampling = &request.sampling;
    let early = generated < sampling.min_tokens;
    let can_end = ends.iter().any(|end| allows(words, *end));
    if can_end {
        sampling.stop_token_ids.iter().for_each(|stop| allow(words, *stop));
    }
    if !early && !sampling.ignore_eos {
        return;
    }
    let mut open = words.clone();
    ends.iter().for_each(|end| forbid(&mut open, *end));
    if early || can_end {
        sampling.stop_token_ids.iter().for_each(|stop| forbid(&mut open, *stop));
    }
    if open.iter().any(|word| *word != 0) {
        *words = open;
    }
}

fn allows(words: &[u32], token: u32) -> bool {
    words.get(token as usize / 32).is_some_and(|word| (word >> (token % 32)) & 1 == 1)
}

fn allow(words: &mut [u32], token: u32) {
    if let Some(word) = words.get_mut(token as usize / 32) {
        *word |= 1 << (token % 32);
    }
}

fn forbid(words: &mut [u32], token: u32) {
    if let Some(word) = words.get_mut(token as usize / 32) {
        *word &= !(1 << (token % 32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::SamplingParams;
    use crate::sequence::tests::request;

    /// Allowed tokens after `settle`; 3 ends, 7 is the client's stop token.
    fn settled(allowed: &[u32], generated: usize, sampling: SamplingParams) -> Vec<u32> {
        let mut words = vec![0; 2];
        allowed.iter().for_each(|token| allow(&mut words, *token));
        let sampling = SamplingParams { stop_token_ids: vec![7], ..sampling };
        settle(&mut words, &[3], &request(vec![1], sampling), generated);
        (0..64).filter(|token| allows(&words, *token)).collect()
    }

    #[test]
    fn a_text_ends_where_its_grammar_lets_it() {
        let free = SamplingParams::default;
        assert_eq!(settled(&[1, 40], 0, free()), [1, 40]);
        assert_eq!(settled(&[1, 3], 0, free()), [1, 3, 7]);
    }

    #[test]
    fn min_tokens_and_ignore_eos_hold_only_while_the_text_can_go_on() {
        let patient = || SamplingParams { min_tokens: 5, ..Default::default() };
        assert_eq!(settled(&[1, 3], 4, patient()), [1]);
        assert_eq!(settled(&[1, 7], 4, patient()), [1]);
        assert_eq!(settled(&[1, 3], 5, patient()), [1, 3, 7]);
        assert_eq!(settled(&[3], 4, patient()), [3, 7]);
        let endless = || SamplingParams { ignore_eos: true, ..Default::default() };
        assert_eq!(settled(&[1, 3], 9, endless()), [1]);
        assert_eq!(settled(&[3], 9, endless()), [3, 7]);
        assert_eq!(settled(&[1, 7], 9, endless()), [1, 7]);
    }
}
