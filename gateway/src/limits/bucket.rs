//! A token bucket over a minute. Time is an argument: how long ago the bucket was made.

use std::time::Duration;

const MINUTE: f64 = 60.0;

/// Holds at most `limit` and gains `limit` per minute, evenly. What is spent after the fact may leave it in debt.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    limit: f64,
    level: f64,
    at: Duration,
}

impl Bucket {
    /// A full one.
    pub fn new(limit: u32, now: Duration) -> Self {
        Self { limit: f64::from(limit), level: f64::from(limit), at: now }
    }

    /// Most that it holds, and what it gains per minute.
    pub fn limit(&self) -> u32 {
        self.limit as u32
    }

    /// Brings the level up to `now`. A clock that stands still or goes back gives nothing.
    fn advance(&mut self, now: Duration) {
        let gained = now.saturating_sub(self.at).as_secs_f64() * self.limit / MINUTE;
        self.level = (self.level + gained).min(self.limit);
        self.at = self.at.max(now);
    }

    /// Whether `amount` could be taken now; else how long to wait, or `None` when it never can.
    pub fn check(&mut self, amount: u32, now: Duration) -> Result<(), Option<Duration>> {
        self.advance(now);
        let missing = f64::from(amount) - self.level;
        // The level is a sum of fractions: what rounding took away must not cost a wait.
        if missing <= 1e-6 {
            return Ok(());
        }
        Err((f64::from(amount) <= self.limit).then(|| self.time_for(missing)))
    }

    /// Takes `amount`, whether it is there or not.
    pub fn spend(&mut self, amount: u32, now: Duration) {
        self.advance(now);
        self.level -= f64::from(amount);
    }

    /// Whole units that are left.
    pub fn remaining(&mut self, now: Duration) -> u32 {
        self.advance(now);
        (self.level + 1e-6).max(0.0) as u32
    }

    /// How long until it is full.
    pub fn full_in(&mut self, now: Duration) -> Duration {
        self.advance(now);
        self.time_for(self.limit - self.level)
    }

    /// The same use under another limit: what was spent stays spent.
    pub fn set_limit(&mut self, limit: u32, now: Duration) {
        self.advance(now);
        let spent = self.limit - self.level;
        self.limit = f64::from(limit);
        self.level = self.limit - spent;
    }

    fn time_for(&self, amount: f64) -> Duration {
        if self.limit <= 0.0 {
            return Duration::from_secs(60);
        }
        Duration::try_from_secs_f64((amount * MINUTE / self.limit).max(0.0)).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn s(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_full_minute_may_be_spent_at_once_and_comes_back_evenly() {
        let mut bucket = Bucket::new(60, s(0.0));
        for _ in 0..60 {
            bucket.check(1, s(0.0)).unwrap();
            bucket.spend(1, s(0.0));
        }
        assert_eq!(bucket.check(1, s(0.0)), Err(Some(s(1.0))));
        assert_eq!((bucket.remaining(s(0.0)), bucket.full_in(s(0.0))), (0, s(60.0)));
        bucket.check(1, s(1.0)).unwrap();
        assert_eq!(bucket.check(2, s(1.0)), Err(Some(s(1.0))));
        assert_eq!(bucket.remaining(s(31.0)), 31);
        assert_eq!(bucket.remaining(s(1000.0)), 60);
    }

    #[test]
    fn what_is_more_than_the_limit_never_fits_and_debt_is_worked_off() {
        let mut bucket = Bucket::new(600, s(0.0));
        assert_eq!(bucket.check(601, s(0.0)), Err(None));
        bucket.spend(1200, s(0.0));
        assert_eq!((bucket.remaining(s(0.0)), bucket.check(1, s(0.0)).unwrap_err().unwrap().as_secs()), (0, 60));
        bucket.check(1, s(60.2)).unwrap();
        assert_eq!(Bucket::new(0, s(0.0)).check(1, s(500.0)), Err(None));
    }

    #[test]
    fn another_limit_keeps_what_was_spent() {
        let mut bucket = Bucket::new(10, s(0.0));
        bucket.spend(8, s(0.0));
        bucket.set_limit(20, s(0.0));
        assert_eq!(bucket.remaining(s(0.0)), 12);
        bucket.set_limit(5, s(0.0));
        assert_eq!(bucket.remaining(s(0.0)), 0);
    }

    proptest! {
        #[test]
        fn over_any_time_at_most_the_limit_and_what_it_gained_is_let_through(
            limit in 1u32..1000, asks in prop::collection::vec((0u64..3000, 1u32..50), 1..200),
        ) {
            let mut bucket = Bucket::new(limit, Duration::ZERO);
            let (mut now, mut passed) = (Duration::ZERO, 0u64);
            for (step, amount) in asks {
                now += Duration::from_millis(step);
                match bucket.check(amount, now) {
                    Ok(()) => {
                        bucket.spend(amount, now);
                        passed += u64::from(amount);
                    }
                    // Who waits as long as told gets through.
                    Err(Some(wait)) => prop_assert!(bucket.clone().check(amount, now + wait + Duration::from_micros(1)).is_ok()),
                    Err(None) => prop_assert!(amount > limit),
                }
                let most = f64::from(limit) * (1.0 + now.as_secs_f64() / 60.0);
                prop_assert!(passed as f64 <= most + 1e-3, "{passed} in {now:?}");
            }
        }
    }
}
