//! Answers that will count in a rollout, and have not ended.
//!
//! Arms whose answers take longer are always behind: an exposure is part of an answer's record, which is written at its end. So the arms'
//! units are compared with their shares only up to the moment when the oldest of these began.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// Those of a server. Cloning is cheap.
#[derive(Clone, Debug, Default)]
pub struct UnderWay(Arc<Mutex<Begun>>);

#[derive(Debug, Default)]
struct Begun {
    next: u64,
    /// When each began, and its number.
    all: BTreeSet<(i64, u64)>,
}

impl UnderWay {
    /// One begins at this moment, in microseconds since 1970, and ends when nobody holds this any more.
    pub fn begin(&self, at: i64) -> Arc<Counting> {
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = begun.next;
        begun.next += 1;
        begun.all.insert((at, number));
        Arc::new(Counting { of: self.clone(), key: (at, number) })
    }

    /// When the oldest began; `now` where there is none.
    pub fn since(&self, now: i64) -> i64 {
        let begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        begun.all.first().map_or(now, |(at, _)| *at)
    }
}

/// One of them.
#[derive(Debug)]
pub struct Counting {
    of: UnderWay,
    key: (i64, u64),
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.of.0.lock().unwrap_or_else(PoisonError::into_inner).all.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_that_has_not_ended_counts() {
        let under_way = UnderWay::default();
        assert_eq!(under_way.since(9), 9);
        let (second, first) = (under_way.begin(5), under_way.begin(3));
        let twin = under_way.begin(3);
        let held = Arc::clone(&first);
        drop(first);
        assert_eq!(under_way.since(9), 3);
        drop((held, twin));
        assert_eq!(under_way.since(9), 5);
        drop(second);
        assert_eq!(under_way.since(9), 9);
    }
}
