//! Where the loops stand, as gauges for Prometheus.

use crate::fine_tuning::escaped;
use crate::flywheel::lock;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use tidemill_rlhf::flywheel::{Counts, Flywheel, Word};

/// What was last seen of each.
#[derive(Default)]
pub(super) struct Gauges(Mutex<BTreeMap<String, Shown>>);

/// What a gauge says of a loop.
type Number = fn(&Shown) -> u64;

struct Shown {
    state: Word,
    cycle: u64,
    paused: bool,
    counts: Counts,
}

impl Gauges {
    pub(super) fn stands(&self, name: &str, wheel: &Flywheel) {
        let (state, cycle, paused) = (wheel.state.word(), wheel.cycle, wheel.paused);
        let mut all = lock(&self.0);
        let counts = all.get(name).map(|shown| shown.counts).unwrap_or_default();
        all.insert(name.to_owned(), Shown { state, cycle, paused, counts });
    }

    pub(super) fn counts(&self, name: &str, counts: Counts) {
        if let Some(shown) = lock(&self.0).get_mut(name) {
            shown.counts = counts;
        }
    }

    /// Another server runs them.
    pub(super) fn clear(&self) {
        lock(&self.0).clear();
    }

    /// All of them, in Prometheus' text format; empty where no loop runs.
    pub(super) fn render(&self) -> String {
        let all = lock(&self.0);
        let mut text = String::new();
        if all.is_empty() {
            return text;
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# TYPE tidemill:loop_state gauge");
        for (name, shown) in all.iter() {
            for word in Word::ALL {
                let (name, state, here) = (escaped(name), word.as_str(), u8::from(word == shown.state));
                let _ = writeln!(text, "tidemill:loop_state{{loop=\"{name}\",state=\"{state}\"}} {here}");
            }
        }
        let numbers: [(&str, Number); 4] = [
            ("cycle", |shown| shown.cycle),
            ("paused", |shown| u64::from(shown.paused)),
            ("new_preferences", |shown| shown.counts.preferences),
            ("new_raters", |shown| shown.counts.raters),
        ];
        for (what, of) in numbers {
            let _ = writeln!(text, "# TYPE tidemill:loop_{what} gauge");
            for (name, shown) in all.iter() {
                let _ = writeln!(text, "tidemill:loop_{what}{{loop=\"{}\"}} {}", escaped(name), of(shown));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_in_one_state_and_keeps_its_counts() {
        let gauges = Gauges::default();
        assert_eq!(gauges.render(), "");
        gauges.counts("none", Counts { preferences: 1, raters: 1 });
        gauges.stands("a\"b", &Flywheel { cycle: 3, paused: true, ..Flywheel::new(0) });
        gauges.counts("a\"b", Counts { preferences: 7, raters: 2 });
        gauges.stands("a\"b", &Flywheel { cycle: 4, ..Flywheel::new(0) });
        let text = gauges.render();
        assert!(text.contains("tidemill:loop_state{loop=\"a\\\"b\",state=\"waiting\"} 1\n"), "{text}");
        assert!(text.contains("state=\"training\"} 0\n") && !text.contains("none"), "{text}");
        for (what, value) in [("cycle", 4), ("paused", 0), ("new_preferences", 7), ("new_raters", 2)] {
            assert!(
                text.contains(&format!("# TYPE tidemill:loop_{what} gauge\ntidemill:loop_{what}{{loop=\"a\\\"b\"}} {value}\n")),
                "{text}"
            );
        }
        gauges.clear();
        assert_eq!(gauges.render(), "");
    }
}
