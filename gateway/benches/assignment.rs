//! Time of one assignment: `cargo bench -p tidemill --bench assignment`.
//!
//! A table with three rollouts of which one is in a layer, and a holdout; keys are UUIDs, as users mostly are. The slowest case
//! is the unit that no rollout includes: every one of them is asked.

#![allow(clippy::print_stdout, reason = "a benchmark prints its numbers")]
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first surprise")]

use serde_json::json;
use std::hint::black_box;
use std::time::Instant;
use tidemill::rollout::assignment::{Experiment, Holdout, Table, Unit, assign};
use tidemill::rollout::spec::Spec;

/// Rounds of so many assignments: short, so that most are not interrupted on a machine with other work.
const ROUNDS: usize = 1000;
const ASSIGNMENTS: usize = 2000;

fn main() {
    let users: Vec<String> =
        (0..1024u64).map(|id| format!("{:08x}-9b3c-7d21-8f00-{:012x}", id * 2_654_435_761 % (1 << 32), id * 97)).collect();
    println!("{:>28} {:>10} {:>10}", "ns", "median", "best");
    for (what, coverage) in [("first rollout takes all", 1.0), ("none takes any", 0.0)] {
        let table = table(coverage);
        let mut times: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                for index in 0..ASSIGNMENTS {
                    let unit = Unit { user: Some(&users[index % users.len()]), request: "", ..Unit::default() };
                    black_box(assign(black_box(&table), &unit));
                }
                start.elapsed().as_secs_f64() * 1e9 / ASSIGNMENTS as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{what:>28} {:>10.0} {:>10.0}", times[ROUNDS / 2], times[0]);
    }
}

fn table(coverage: f64) -> Table {
    let experiments = ["tone", "length", "price"].map(|name| {
        let spec = Spec::parse(&json!({
            "name": name, "model": "assistant", "kind": "ab", "arms": [{"variant": "old"}, {"variant": "new"}],
            "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
            "layer": if name == "price" { json!({"name": "money", "from": 0, "to": 1}) } else { json!(null) },
        }));
        Experiment::new(&spec.unwrap(), coverage, &[0.5, 0.5])
    });
    Table::new("old".to_owned(), vec![Holdout::new("year", 0.05)], experiments.into()).unwrap()
}
