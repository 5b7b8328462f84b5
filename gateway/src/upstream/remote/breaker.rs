//! When a server that fails is left alone for a while. Pure: time is an argument, counted from any fixed moment.

use std::time::Duration;

/// Longest time for which a server's own `Retry-After` is believed.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// How patient a breaker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerRule {
    /// Failures in a row that open it.
    pub failures: u32,
    /// How long it stays open before one request tries again.
    pub rest: Duration,
}

impl Default for BreakerRule {
    fn default() -> Self {
        Self { failures: 5, rest: Duration::from_secs(30) }
    }
}

/// What a breaker does with the next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Lets everything through.
    Closed,
    /// One request tries; the others go elsewhere.
    HalfOpen,
    /// Nothing goes through.
    Open,
}

/// One server's breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breaker {
    rule: BreakerRule,
    state: State,
    /// Requests that went through; each is known by its number.
    entered: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Duration,
    },
    HalfOpen {
        /// The request that tries. News of others is news of before.
        probe: u64,
    },
}

impl Breaker {
    /// Closed.
    pub fn new(rule: BreakerRule) -> Self {
        Self { rule, state: State::Closed { failures: 0 }, entered: 0 }
    }

    /// Whether a request may go through at `now`. Takes nothing.
    pub fn admits(&self, now: Duration) -> bool {
        match self.state {
            State::Closed { .. } => true,
            State::Open { until } => now >= until,
            State::HalfOpen { .. } => false,
        }
    }

    /// A request goes through, and gets a number; `None` when it may not. The first after the rest is the one that tries.
    pub fn enter(&mut self, now: Duration) -> Option<u64> {
        if !self.admits(now) {
            return None;
        }
        self.entered += 1;
        if matches!(self.state, State::Open { .. }) {
            self.state = State::HalfOpen { probe: self.entered };
        }
        Some(self.entered)
    }

    fn is_probe(&self, request: u64) -> bool {
        self.state == State::HalfOpen { probe: request }
    }

    /// The answer to a request has begun.
    pub fn succeeded(&mut self, request: u64) {
        if matches!(self.state, State::Closed { .. }) || self.is_probe(request) {
            self.state = State::Closed { failures: 0 };
        }
    }

    /// There was no answer to a request, or it broke off.
    pub fn failed(&mut self, request: u64, now: Duration) {
        self.state = match self.state {
            State::Closed { failures } if failures + 1 < self.rule.failures => State::Closed { failures: failures + 1 },
            State::Closed { .. } => State::Open { until: now + self.rule.rest },
            State::HalfOpen { probe } if probe == request => State::Open { until: now + self.rule.rest },
            other => other,
        };
    }

    /// The server asked to be left alone for so long.
    pub fn told_to_wait(&mut self, time: Duration, now: Duration) {
        let wanted = now + time.min(LONGEST_REST);
        let until = match self.state {
            State::Open { until } => until.max(wanted),
            _ => wanted,
        };
        self.state = State::Open { until };
    }

    /// A request ended without telling anything, because its client left. If it was the one that tried, the next one does.
    pub fn abandoned(&mut self, request: u64, now: Duration) {
        if self.is_probe(request) {
            self.state = State::Open { until: now };
        }
    }

    /// For those who watch.
    pub fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// After which a request has a chance again.
    pub fn wait(&self, now: Duration) -> Duration {
        match self.state {
            State::Closed { .. } => Duration::ZERO,
            State::Open { until } => until.saturating_sub(now),
            State::HalfOpen { .. } => Duration::from_secs(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn open() -> Breaker {
        let mut breaker = Breaker::new(BreakerRule { failures: 3, rest: at(10) });
        for _ in 0..3 {
            let request = breaker.enter(at(0)).unwrap();
            breaker.failed(request, at(0));
        }
        breaker
    }

    #[test]
    fn so_many_failures_in_a_row_open_it_and_a_success_between_forgives() {
        let mut breaker = Breaker::new(BreakerRule { failures: 3, rest: at(10) });
        for _ in 0..5 {
            let [one, two, three] = [(); 3].map(|()| breaker.enter(at(0)).unwrap());
            breaker.failed(one, at(0));
            breaker.failed(two, at(0));
            assert_eq!(breaker.state(), BreakerState::Closed);
            breaker.succeeded(three);
        }
        let breaker = open();
        assert_eq!((breaker.state(), breaker.wait(at(4))), (BreakerState::Open, at(6)));
        assert!(!breaker.admits(at(9)) && breaker.admits(at(10)));
    }

    #[test]
    fn after_the_rest_one_request_tries_and_decides() {
        let mut breaker = open();
        let probe = breaker.enter(at(10)).unwrap();
        assert_eq!(breaker.enter(at(10)), None, "the others wait for it");
        breaker.failed(probe, at(11));
        assert!(!breaker.admits(at(20)));
        let probe = breaker.enter(at(21)).unwrap();
        breaker.succeeded(probe);
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert!(breaker.enter(at(21)).is_some() && breaker.enter(at(21)).is_some());
    }

    #[test]
    fn a_probe_whose_client_leaves_hands_its_turn_on() {
        let mut breaker = open();
        let probe = breaker.enter(at(10)).unwrap();
        breaker.abandoned(probe, at(12));
        assert!(breaker.enter(at(12)).is_some() && breaker.enter(at(12)).is_none());
        let mut closed = Breaker::new(BreakerRule::default());
        closed.abandoned(1, at(0));
        assert_eq!(closed.state(), BreakerState::Closed);
    }

    #[test]
    fn late_news_of_before_neither_closes_it_nor_keeps_it_open() {
        let mut breaker = open();
        breaker.succeeded(1);
        assert_eq!(breaker.state(), BreakerState::Open);
        breaker.failed(1, at(9));
        assert!(breaker.admits(at(10)));
    }

    /// Answers that began before it opened may take minutes.
    #[test]
    fn while_one_tries_only_its_own_news_decides() {
        let mut breaker = open();
        let probe = breaker.enter(at(10)).unwrap();
        breaker.succeeded(1);
        breaker.failed(2, at(10));
        breaker.abandoned(3, at(10));
        assert_eq!((breaker.state(), breaker.enter(at(10))), (BreakerState::HalfOpen, None));
        breaker.succeeded(probe);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn a_server_that_asks_for_a_pause_gets_it_but_not_for_ever() {
        let mut breaker = Breaker::new(BreakerRule::default());
        breaker.told_to_wait(at(7), at(1));
        breaker.told_to_wait(at(2), at(1));
        assert!(!breaker.admits(at(7)) && breaker.admits(at(8)));
        breaker.told_to_wait(at(86_400), at(8));
        assert!(breaker.admits(at(8) + LONGEST_REST));
    }
}
