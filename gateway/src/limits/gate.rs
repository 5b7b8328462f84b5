//! Whether one more request is within the limits of one subject: a key, a model, a key's use of a model. Pure: time is an argument.

use crate::limits::bucket::Bucket;
use std::time::Duration;
use tidemill_store::{Limits, Money};

/// The state of one subject's limits.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    limits: Limits,
    requests: Option<Bucket>,
    input: Option<Bucket>,
    output: Option<Bucket>,
    running: u32,
}

/// Why a request is not let in.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    /// Too many of something in this minute.
    Rate {
        /// Of what.
        of: Rate,
        /// Per minute.
        limit: u32,
        /// After which it fits.
        wait: Duration,
    },
    /// The prompt alone is more than a minute allows.
    TooLarge {
        /// Tokens per minute.
        limit: u32,
        /// Tokens of the prompt.
        asked: u32,
    },
    /// As many are running as may.
    Concurrent {
        /// At once.
        limit: u32,
    },
    /// The day's money is spent.
    Cost {
        /// Per day.
        limit: Money,
    },
}

/// What is counted per minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// Requests.
    Requests,
    /// Tokens of prompts.
    Input,
    /// Generated tokens.
    Output,
}

/// How far a limit is used, for the headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Per minute.
    pub limit: u32,
    /// Left.
    pub remaining: u32,
    /// Until all of it is left again.
    pub reset: Duration,
}

impl Gate {
    /// Nothing is used yet.
    pub fn new(limits: Limits, now: Duration) -> Self {
        let bucket = |limit: Option<u32>| limit.map(|limit| Bucket::new(limit, now));
        Self {
            requests: bucket(limits.requests_per_minute),
            input: bucket(limits.input_tokens_per_minute),
            output: bucket(limits.output_tokens_per_minute),
            limits,
            running: 0,
        }
    }

    /// The limits may have been changed; what is used stays used.
    pub fn set_limits(&mut self, limits: &Limits, now: Duration) {
        if self.limits == *limits {
            return;
        }
        let set = |bucket: &mut Option<Bucket>, limit: Option<u32>| match (bucket.as_mut(), limit) {
            (Some(bucket), Some(limit)) => bucket.set_limit(limit, now),
            (_, limit) => *bucket = limit.map(|limit| Bucket::new(limit, now)),
        };
        set(&mut self.requests, limits.requests_per_minute);
        set(&mut self.input, limits.input_tokens_per_minute);
        set(&mut self.output, limits.output_tokens_per_minute);
        self.limits = *limits;
    }

    /// Whether a request with a prompt of `input` tokens may begin, when `spent` has been spent today. Takes nothing.
    ///
    /// Nobody knows how long an answer will be: output is counted as it comes, and a request is let in while the minute's tokens are
    /// not used up. What runs then may overdraw; nothing new is let in until that is worked off.
    pub fn check(&mut self, input: u32, spent: Money, now: Duration) -> Result<(), Refusal> {
        if let Some(limit) = self.limits.cost_per_day.filter(|limit| spent >= *limit) {
            return Err(Refusal::Cost { limit });
        }
        if let Some(limit) = self.limits.concurrent.filter(|limit| self.running >= *limit) {
            return Err(Refusal::Concurrent { limit });
        }
        let asks =
            [(Rate::Requests, &mut self.requests, 1), (Rate::Input, &mut self.input, input), (Rate::Output, &mut self.output, 1)];
        for (of, bucket, amount) in asks {
            let Some(bucket) = bucket else { continue };
            let limit = bucket.limit();
            match bucket.check(amount, now) {
                Ok(()) => {}
                Err(Some(wait)) => return Err(Refusal::Rate { of, limit, wait }),
                // A limit of nothing is closed to everyone, however small.
                Err(None) if of == Rate::Input && limit > 0 => return Err(Refusal::TooLarge { limit, asked: input }),
                Err(None) => return Err(Refusal::Rate { of, limit, wait: Duration::from_secs(60) }),
            }
        }
        Ok(())
    }

    /// The request begins.
    pub fn enter(&mut self, input: u32, now: Duration) {
        self.running += 1;
        if let Some(bucket) = &mut self.requests {
            bucket.spend(1, now);
        }
        if let Some(bucket) = &mut self.input {
            bucket.spend(input, now);
        }
    }

    /// Its answer has `tokens` more.
    pub fn generated(&mut self, tokens: u32, now: Duration) {
        if let Some(bucket) = &mut self.output {
            bucket.spend(tokens, now);
        }
    }

    /// It is over.
    pub fn leave(&mut self) {
        self.running = self.running.saturating_sub(1);
    }

    /// Requests that are being answered.
    pub fn running(&self) -> u32 {
        self.running
    }

    /// Whether forgetting it would change nothing.
    pub fn is_idle(&mut self, now: Duration) -> bool {
        let full = |bucket: &mut Option<Bucket>| bucket.as_mut().is_none_or(|bucket| bucket.full_in(now).is_zero());
        self.running == 0 && full(&mut self.requests) && full(&mut self.input) && full(&mut self.output)
    }

    /// How far requests are used.
    pub fn requests(&mut self, now: Duration) -> Option<Level> {
        self.requests.as_mut().map(|bucket| level(bucket, now))
    }

    /// How far tokens are used: those of prompts or the generated ones, whichever have the smaller part left.
    pub fn tokens(&mut self, now: Duration) -> Option<Level> {
        let levels = [&mut self.input, &mut self.output].map(|bucket| bucket.as_mut().map(|bucket| level(bucket, now)));
        levels.into_iter().flatten().min_by(|a, b| a.part().total_cmp(&b.part()))
    }
}

impl Level {
    /// The part of the limit that is left.
    pub fn part(&self) -> f64 {
        f64::from(self.remaining) / f64::from(self.limit.max(1))
    }
}

fn level(bucket: &mut Bucket, now: Duration) -> Level {
    Level { limit: bucket.limit(), remaining: bucket.remaining(now), reset: bucket.full_in(now) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: Duration = Duration::ZERO;

    fn limits() -> Limits {
        Limits {
            requests_per_minute: Some(2),
            input_tokens_per_minute: Some(100),
            output_tokens_per_minute: Some(60),
            concurrent: Some(2),
            cost_per_day: Some(Money(1000)),
        }
    }

    #[test]
    fn each_limit_refuses_by_itself() {
        let mut gate = Gate::new(limits(), T0);
        gate.check(100, Money(999), T0).unwrap();
        assert_eq!(gate.check(1, Money(1000), T0), Err(Refusal::Cost { limit: Money(1000) }));
        assert_eq!(gate.check(101, Money(0), T0), Err(Refusal::TooLarge { limit: 100, asked: 101 }));
        gate.enter(60, T0);
        let wait = Duration::from_secs(12);
        assert_eq!(gate.check(60, Money(0), T0), Err(Refusal::Rate { of: Rate::Input, limit: 100, wait }));
        gate.enter(10, T0);
        assert_eq!(gate.check(1, Money(0), T0), Err(Refusal::Concurrent { limit: 2 }));
        gate.leave();
        let wait = Duration::from_secs(30);
        assert_eq!(gate.check(1, Money(0), T0), Err(Refusal::Rate { of: Rate::Requests, limit: 2, wait }));
        gate.generated(70, T0);
        let later = Duration::from_secs(35);
        gate.check(1, Money(0), later).unwrap();
        gate.generated(30, later);
        // 60 − 70 − 30 + 35 gained: 6 s until one is there.
        assert_eq!(
            gate.check(1, Money(0), later),
            Err(Refusal::Rate { of: Rate::Output, limit: 60, wait: Duration::from_secs(6) })
        );
    }

    #[test]
    fn headers_tell_of_the_scarcer_tokens() {
        let mut gate = Gate::new(limits(), T0);
        gate.enter(10, T0);
        assert_eq!(gate.requests(T0), Some(Level { limit: 2, remaining: 1, reset: Duration::from_secs(30) }));
        assert_eq!(gate.tokens(T0).unwrap().limit, 100);
        gate.generated(30, T0);
        assert_eq!(gate.tokens(T0), Some(Level { limit: 60, remaining: 30, reset: Duration::from_secs(30) }));
        assert!(!gate.is_idle(T0));
        gate.leave();
        assert!(gate.is_idle(Duration::from_secs(60)));
    }

    #[test]
    fn new_limits_take_hold_at_once_and_forget_no_use() {
        let mut gate = Gate::new(limits(), T0);
        gate.enter(50, T0);
        gate.set_limits(&Limits { requests_per_minute: Some(1), cost_per_day: None, ..limits() }, T0);
        assert!(matches!(gate.check(1, Money(5000), T0), Err(Refusal::Rate { of: Rate::Requests, limit: 1, .. })));
        gate.set_limits(&Limits::default(), T0);
        gate.check(u32::MAX, Money(i64::MAX), T0).unwrap();
        assert_eq!(gate.running(), 1);
    }

    #[test]
    fn a_limit_of_nothing_lets_nothing_in() {
        let mut gate = Gate::new(Limits { requests_per_minute: Some(0), ..Limits::default() }, T0);
        assert!(matches!(gate.check(1, Money(0), Duration::from_secs(600)), Err(Refusal::Rate { limit: 0, .. })));
    }
}
