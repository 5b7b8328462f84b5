//! What the tests promise, kept by a thousand experiments each. Numbers are drawn from fixed seeds, so every run is the same run.

use crate::rollout::statistics::{
    Effect, Level, Outcome, Question, Sample, confidence_sequence, contrast, plan, relative_sequence, welch,
};
use tidemill_rlhf::random::Random;
use tidemill_rlhf::statistics::Interval;

const EXPERIMENTS: usize = 1000;

/// What is not excluded of the effect of a treatment on a control.
type Look = fn(&Sample, &Sample, Level) -> Option<Interval>;

fn difference(control: &Sample, treatment: &Sample, level: Level) -> Option<Interval> {
    Some(confidence_sequence(&contrast(control, treatment, Effect::Difference)?, level).interval)
}

fn relative(control: &Sample, treatment: &Sample, level: Level) -> Option<Interval> {
    Some(relative_sequence(control, treatment, level)?.interval)
}

fn delta_method(control: &Sample, treatment: &Sample, level: Level) -> Option<Interval> {
    Some(confidence_sequence(&contrast(control, treatment, Effect::Relative)?, level).interval)
}

/// Adds pairs of observations, one to each arm, and looks after each. The number of observations when the sequence first excludes
/// 0.
fn ends(
    random: &mut Random,
    pairs: u64,
    level: Level,
    look: Look,
    mut draw: impl FnMut(&mut Random, usize) -> f64,
) -> Option<u64> {
    let mut sums = [(0.0, 0.0); 2];
    for n in 1..=pairs {
        for (arm, (sum, squares)) in sums.iter_mut().enumerate() {
            let value = draw(random, arm);
            *sum += value;
            *squares += value * value;
        }
        // A share's sum of squares is its sum: both kinds look at what the decision would look at.
        let sample = |arm: usize| {
            let (sum, squares) = sums[arm];
            if sum == squares { Sample::proportion(sum as u64, n) } else { Sample::mean(sum, squares, n) }
        };
        let interval = sample(0).zip(sample(1)).and_then(|(control, treatment)| look(&control, &treatment, level));
        if interval.is_some_and(|interval| interval.distance(0.0) > 0.0) {
            return Some(2 * n);
        }
    }
    None
}

fn coin(shares: [f64; 2]) -> impl FnMut(&mut Random, usize) -> f64 {
    move |random, arm| f64::from(u8::from(random.unit() < shares[arm]))
}

fn winners(seed: u64, pairs: u64, tuning: f64, look: Look, mut draw: impl FnMut(&mut Random, usize) -> f64) -> usize {
    let mut random = Random::new(seed);
    let level = Level { alpha: 0.05, tuning };
    (0..EXPERIMENTS).filter(|_| ends(&mut random, pairs, level, look, &mut draw).is_some()).count()
}

#[test]
fn at_most_five_of_a_hundred_tests_of_the_same_against_itself_have_a_winner_when_peeking_at_every_step() {
    for (share, name, look) in [
        (0.5, "difference", difference as Look),
        (0.1, "relative", relative),
        (0.02, "difference", difference),
        (0.02, "relative", relative),
    ] {
        let found = winners(1, 3000, 5000.0, look, coin([share; 2]));
        println!("{share} {name}: {found}");
        assert!(found <= EXPERIMENTS / 20, "{found} of {EXPERIMENTS} at {share}, {name}");
    }
    // Numbers with a long tail: e^Z, as lengths of answers and times to the first token have.
    for (name, look) in [("difference", difference as Look), ("relative", relative)] {
        let found = winners(2, 2000, 2000.0, look, |random, _| random.normal().exp());
        println!("e^Z {name}: {found}");
        assert!(found <= EXPERIMENTS / 20, "{found} of {EXPERIMENTS} at e^Z, {name}");
    }
}

/// So decisions do not stand on it where events may be rare, though it is the published interval.
#[test]
fn the_delta_methods_relative_interval_keeps_its_word_for_common_events_only() {
    let common = winners(1, 2000, 5000.0, delta_method, coin([0.5; 2]));
    let rare = winners(1, 2000, 5000.0, delta_method, coin([0.02; 2]));
    println!("delta method: {common} at 0.5, {rare} at 0.02");
    assert!(common <= 50 && rare > 80, "{common} at 0.5, {rare} at 0.02");
}

#[test]
fn a_fixed_test_that_is_peeked_at_finds_far_more_than_five_so_the_sequence_is_needed() {
    let mut random = Random::new(3);
    let found = (0..200)
        .filter(|_| {
            let mut sums = [0u64; 2];
            (1..=1000u64).any(|n| {
                sums.iter_mut().for_each(|sum| *sum += u64::from(random.unit() < 0.5));
                // The normal distribution's quantile: with 1,000 observations Student's is the same.
                let sample = |arm: usize| Sample::proportion(sums[arm], n);
                n >= 20
                    && sample(0).zip(sample(1)).is_some_and(|(control, treatment)| {
                        contrast(&control, &treatment, Effect::Difference)
                            .is_some_and(|estimate| estimate.value.abs() > 1.96 * estimate.variance.sqrt())
                    })
            })
        })
        .count();
    println!("fixed test, peeked at: {found} of 200");
    assert!(found > 50, "{found} of 200");
}

/// A tenth against 13 %: the plan's sizes give the power that they promise, and the expected end is where tests end.
#[test]
fn an_effect_that_was_planned_for_is_found_with_the_planned_power_in_the_planned_time() {
    let question = Question { outcome: Outcome::Share { baseline: 0.1 }, effect: 0.3, power: 0.8, alpha: 0.05, share: 0.5 };
    let sizes = plan(&question).unwrap();
    let shares = [0.1, 0.13];
    let mut random = Random::new(4);

    let pairs = sizes.fixed / 2;
    let found = (0..EXPERIMENTS)
        .filter(|_| {
            let mut count = |share: f64| (0..pairs).filter(|_| random.unit() < share).count() as u64;
            let samples = shares.map(|share| Sample::proportion(count(share), pairs).unwrap());
            welch(&samples[0], &samples[1], Effect::Difference, 0.05).is_some_and(|test| test.p_value < 0.05)
        })
        .count();
    // Three standard errors of 80 % of 1,000 are 38.
    assert!((762..=838).contains(&found), "{found}");

    let level = Level { alpha: 0.05, tuning: sizes.tuning as f64 };
    let stops: Vec<u64> =
        (0..EXPERIMENTS).filter_map(|_| ends(&mut random, 4 * sizes.sequential, level, difference, coin(shares))).collect();
    assert_eq!(stops.len(), EXPERIMENTS);
    let in_time = stops.iter().filter(|stop| **stop <= sizes.sequential).count();
    let mean = stops.iter().sum::<u64>() as f64 / EXPERIMENTS as f64;
    println!("planned {sizes:?}; the fixed size found {found}, {in_time} ended in time, {mean} on average");
    assert!(in_time >= 800, "{in_time} of {EXPERIMENTS} within {}", sizes.sequential);
    assert!((0.9..1.1).contains(&(mean / sizes.expected as f64)), "{mean} for {sizes:?}");
}

#[test]
fn a_large_effect_on_a_mean_is_found_long_before_the_fixed_size() {
    let mut random = Random::new(6);
    let level = Level { alpha: 0.05, tuning: 500.0 };
    let stops: Vec<u64> = (0..200)
        .map(|_| ends(&mut random, 2000, level, difference, |random, arm| random.normal() + arm as f64).unwrap_or(u64::MAX))
        .collect();
    assert!(stops.iter().all(|stop| *stop < 300), "{:?}", stops.iter().max());
}
