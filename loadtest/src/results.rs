//! What a comparison found: every round as measured, and medians with their spread.

use crate::measurement::Measurement;
use crate::prompts::Prefix;
use serde::{Deserialize, Serialize};

/// One server's results.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerResult {
    /// Its name.
    pub name: String,
    /// Whether the others are compared with it.
    pub ours: bool,
    /// Version, build, weights and flags.
    pub note: String,
    /// Why it gave no or not all numbers.
    pub failures: Vec<String>,
    /// What was measured, a round each.
    pub rounds: Vec<Round>,
}

/// One start of one server.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Round {
    /// From starting the process to its being ready, in seconds.
    pub ready_s: Option<f64>,
    /// From starting the process to the end of its first one-token answer, in seconds.
    pub first_answer_s: Option<f64>,
    /// Largest resident memory, in bytes, over the process and its children.
    pub peak_memory: u64,
    /// One per load of the plan, as far as it came.
    pub loads: Vec<LoadResult>,
}

/// One load in one round.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadResult {
    /// Which prompts.
    pub prefix: Prefix,
    /// CPU seconds that the server spent per second of the load.
    pub cpu_per_s: f64,
    /// The numbers.
    #[serde(flatten)]
    pub measurement: Measurement,
}

/// Median, smallest and largest of a value over the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Middle value; the mean of the two middle ones for an even count.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// The spread of `values`; none of nothing.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let median = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
        Some(Self { median, min, max })
    }
}

impl ServerResult {
    /// The spread of a value of one load over the rounds.
    pub fn spread(&self, prefix: Prefix, streams: usize, value: impl Fn(&LoadResult) -> Option<f64>) -> Option<Spread> {
        let loads = self.rounds.iter().flat_map(|round| &round.loads);
        Spread::of(loads.filter(|load| load.prefix == prefix && load.measurement.streams == streams).filter_map(value))
    }

    /// Output tokens per second of one load; none where nothing completed.
    pub fn output(&self, prefix: Prefix, streams: usize) -> Option<Spread> {
        self.spread(prefix, streams, |load| (load.measurement.completed > 0).then_some(load.measurement.output_tok_s))
    }

    /// What the measurements of all rounds warn of, once each, with the load it happened in.
    pub fn warnings(&self) -> Vec<String> {
        let mut out: Vec<String> = Vec::new();
        for load in self.rounds.iter().flat_map(|round| &round.loads) {
            for warning in load.measurement.warnings() {
                let text = format!("{} prefix, {} streams: {warning}", load.prefix.name(), load.measurement.streams);
                if !out.contains(&text) {
                    out.push(text);
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_is_between_the_middle_two() {
        assert_eq!(Spread::of([4.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn saved_results_are_read_back_as_they_were() {
        let (_, results) = crate::markdown::tests::sample();
        let saved = serde_json::to_value(&results).unwrap();
        let back: Vec<ServerResult> = serde_json::from_value(saved.clone()).unwrap();
        assert_eq!(serde_json::to_value(&back).unwrap(), saved);
    }
}
