//! What the labels prefer beside content: the longer answer, the left side, more markdown.

use super::{
    Bin, QualityOptions, Status, agreement,
    corpus::{Corpus, Text},
    logistic::{Differences, Fit, out_of_fold},
    report::Check,
    split,
};
use crate::{
    dataset::Position,
    quality::Limit,
    statistics::{Proportion, quantile},
};

/// Folds of out-of-fold predictions.
pub(super) const FOLDS: usize = 5;
/// Bars of the histogram; odd, so that one is around zero.
const BARS: usize = 31;

/// The checks over length, a model of lengths, side, and markdown.
pub(super) fn check(corpus: &Corpus<'_>, options: &QualityOptions) -> [Check; 4] {
    let thresholds = &options.thresholds;
    let longer = preferred(corpus, |text| text.text.chars().count());
    let missing = if longer.is_some_and(|longer| longer.share < 0.5) { "longer" } else { "shorter" };
    let marked = preferred(corpus, |text| markdown(&text.text));
    let sides: Vec<Position> = corpus.comparisons().filter_map(|(index, ..)| corpus.rows[index].origin.chosen_position).collect();
    let left = sides.iter().filter(|side| **side == Position::Left).count() as u64;
    let lean = |name, share: Option<Proportion>, limit, what: &str, advice: &str| {
        lean(name, share, limit, thresholds.minimum, what, advice)
    };
    [
        lean(
            "length_bias",
            longer,
            thresholds.length_bias,
            "the longer answer is chosen",
            &format!("Add pairs in which the {missing} one is better."),
        ),
        length_model(corpus, options),
        lean(
            "position_bias",
            agreement::position_bias(left, sides.len() as u64),
            thresholds.position_bias,
            "the left answer is chosen",
            "Show the sides at random, and look at the raters who always take one.",
        ),
        lean(
            "markdown_bias",
            marked,
            thresholds.markdown_bias,
            "the answer with more markdown is chosen",
            "Compare answers of equal markup, or render both the same way.",
        ),
    ]
}

/// A check over how far a share is from one half.
fn lean(name: &str, share: Option<Proportion>, limit: Limit, minimum: usize, what: &str, advice: &str) -> Check {
    match share {
        Some(share) if share.trials >= minimum as u64 => {
            let distance = share.interval.distance(0.5);
            let mut text = format!(
                "In {:.1} % of {} comparisons {what}; the near end of the interval is {distance:.2} away from one half, which is what \
                 the threshold is held against.",
                100.0 * share.share,
                share.trials
            );
            if limit.status(distance) != Status::Pass {
                text = format!("{text} {advice}");
            }
            Check::held(name, share.share, distance, limit, text).within(Some(share.interval))
        }
        _ => Check::not_applicable(name, format!("Fewer than {minimum} comparisons can be told apart by this.")),
    }
}

/// In how many comparisons the answer with more of something was chosen, of those that differ in it.
fn preferred(corpus: &Corpus<'_>, amount: impl Fn(&Text) -> usize) -> Option<Proportion> {
    let (mut more, mut different) = (0, 0);
    for (_, chosen, rejected) in corpus.comparisons() {
        let (chosen, rejected) = (amount(chosen), amount(rejected));
        different += u64::from(chosen != rejected);
        more += u64::from(chosen > rejected);
    }
    Proportion::new(more, different)
}

/// How well the lengths alone predict the choice: piecewise linear in the logarithm of the number of characters, so that "neither
/// short nor long" is learned too, out of fold.
fn length_model(corpus: &Corpus<'_>, options: &QualityOptions) -> Check {
    const NAME: &str = "length_model";
    const KNOTS: u16 = 14;
    let thresholds = &options.thresholds;
    let features = |text: &Text| {
        let length = (1.0 + text.text.chars().count() as f32).log2();
        (0..KNOTS).map(move |knot| (knot, (length - f32::from(knot)).clamp(0.0, 1.0)))
    };
    let mut data = Differences::default();
    let mut clusters = Vec::new();
    for (index, chosen, rejected) in corpus.comparisons() {
        data.push(features(chosen).zip(features(rejected)).map(|((knot, c), (_, r))| (knot, c - r)));
        clusters.push(corpus.clusters[index]);
    }
    let folds = split::folds(&clusters, FOLDS, options.seed);
    let fit = Fit { size: usize::from(KNOTS), passes: 5, rate: 0.1, decay: 1e-3 };
    let margins = out_of_fold(&data, &folds, fit, options.seed);
    // Two answers of one length give no prediction; a coin is right half of the time.
    let told: Vec<f64> = margins.into_iter().filter(|margin| *margin != 0.0).collect();
    let right = told.iter().filter(|margin| **margin > 0.0).count() as u64;
    match Proportion::new(right, told.len() as u64) {
        Some(accuracy) if told.len() >= thresholds.minimum => {
            let text = format!(
                "A model that sees only the two lengths predicts {:.1} % of {} choices out of fold; the lower end of the interval is held \
                 against the threshold. Near 50 % is what content alone gives.",
                100.0 * accuracy.share,
                accuracy.trials
            );
            Check::held(NAME, accuracy.share, accuracy.interval.low, thresholds.length_model, text)
                .within(Some(accuracy.interval))
        }
        _ => {
            Check::not_applicable(NAME, format!("Fewer than {} comparisons of answers of different length.", thresholds.minimum))
        }
    }
}

/// Markdown elements of a text: headings, list entries, table rows, quotes, code fences, bold, and links.
pub(super) fn markdown(text: &str) -> usize {
    let mut count = 0;
    for line in text.lines().map(str::trim_start) {
        let numbered = line
            .split_once(". ")
            .is_some_and(|(number, _)| number.len() < 4 && number.bytes().all(|b| b.is_ascii_digit()) && !number.is_empty());
        let marks = ["# ", "## ", "### ", "#### ", "- ", "* ", "+ ", "> ", "|", "```"];
        count += usize::from(numbered || marks.iter().any(|mark| line.starts_with(mark)));
        count += line.matches("**").count() / 2 + line.matches("](").count();
    }
    count
}

/// Characters of the chosen answer less those of the rejected. The outermost hundredth on each side counts in the last bars.
pub(super) fn length_differences(corpus: &Corpus<'_>) -> Vec<Bin> {
    let length = |text: &Text| text.text.chars().count() as f64;
    let mut values: Vec<f64> = corpus.comparisons().map(|(_, chosen, rejected)| length(chosen) - length(rejected)).collect();
    values.sort_by(f64::total_cmp);
    let (Some(low), Some(high)) = (quantile(&values, 0.01), quantile(&values, 0.99)) else { return Vec::new() };
    // An odd whole width puts every edge between two numbers of characters, so that no bar has more of them than the next.
    let width = (2.0 * low.abs().max(high.abs()) / BARS as f64).ceil();
    let width = if width % 2.0 == 0.0 { width + 1.0 } else { width };
    let reach = width * BARS as f64 / 2.0;
    let mut bins: Vec<Bin> = (0..BARS)
        .map(|bar| Bin { low: -reach + width * bar as f64, high: -reach + width * (bar + 1) as f64, count: 0 })
        .collect();
    for value in values {
        let bar = ((value + reach) / width).clamp(0.0, (BARS - 1) as f64) as usize;
        bins[bar].count += 1;
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dataset::Row, quality::generate, random::Random};

    fn run(rows: &[Row]) -> [Check; 4] {
        check(&Corpus::new(rows, 0.6), &QualityOptions::default())
    }

    fn length(text: &str) -> usize {
        text.chars().count()
    }

    #[test]
    fn clean_rows_lean_to_nothing() {
        for seed in 0..5 {
            let checks = run(&generate::clean(1000, seed));
            assert!(checks.iter().all(|check| check.status == Status::Pass), "seed {seed}: {checks:?}");
        }
    }

    #[test]
    fn too_few_rows_say_nothing() {
        assert!(run(&generate::clean(10, 1)).iter().all(|check| check.status == Status::NotApplicable));
        assert!(run(&[]).iter().all(|check| check.status == Status::NotApplicable));
    }

    #[test]
    fn choosing_the_longer_answer_is_found_twice() {
        let mut random = Random::new(3);
        let longer: Vec<Row> = generate::clean(600, 2)
            .iter()
            .map(|row| {
                generate::with_answers(row, |chosen, rejected| {
                    let (long, short) = if length(chosen) > length(rejected) { (chosen, rejected) } else { (rejected, chosen) };
                    let (first, second) = if random.unit() < 0.9 { (long, short) } else { (short, long) };
                    (first.to_owned(), second.to_owned())
                })
            })
            .collect();
        let [bias, model, position, markdown] = run(&longer);
        assert_eq!((bias.status, model.status), (Status::Fail, Status::Fail), "{bias:?} {model:?}");
        assert!((bias.value.unwrap() - 0.9).abs() < 0.04);
        assert!(bias.explanation.ends_with("the shorter one is better."), "{bias:?}");
        let turned = |row: &Row| generate::with_answers(row, |chosen, rejected| (rejected.to_owned(), chosen.to_owned()));
        let [bias, ..] = run(&longer.iter().map(turned).collect::<Vec<_>>());
        assert!(bias.status == Status::Fail && bias.explanation.ends_with("the longer one is better."), "{bias:?}");
        assert_eq!((position.status, markdown.status), (Status::Pass, Status::Pass));
    }

    #[test]
    fn choosing_the_middle_length_is_found_by_the_model_only() {
        // Two answers of different lengths, of which the one nearer to 540 characters is chosen.
        let rows: Vec<Row> = generate::clean(1500, 4)
            .iter()
            .map(|row| {
                generate::with_answers(row, |chosen, rejected| {
                    let near = length(chosen).abs_diff(540) < length(rejected).abs_diff(540);
                    let (first, second) = if near { (chosen, rejected) } else { (rejected, chosen) };
                    (first.to_owned(), second.to_owned())
                })
            })
            .collect();
        let [bias, model, ..] = run(&rows);
        assert_eq!((bias.status, model.status), (Status::Pass, Status::Fail), "{bias:?} {model:?}");
    }

    #[test]
    fn a_favoured_side_and_favoured_markup_are_found() {
        let mut random = Random::new(8);
        let mut rows = generate::clean(800, 5);
        for row in &mut rows {
            row.origin.chosen_position = Some(if random.unit() < 0.65 { Position::Left } else { Position::Right });
        }
        let rows: Vec<Row> = rows
            .iter()
            .map(|row| {
                generate::with_answers(row, |chosen, rejected| (format!("## Answer\n\n{chosen}"), rejected.replace("- ", "")))
            })
            .collect();
        let [_, _, position, markdown] = run(&rows);
        assert_eq!(position.status, Status::Fail, "{position:?}");
        assert_eq!(markdown.status, Status::Fail, "{markdown:?}");
    }

    #[test]
    fn markdown_is_counted_by_element() {
        assert_eq!(markdown("# Title\n\n- one\n- **two** [link](x)\n1. three\n```\ncode\n```\n| a | b |"), 9);
        assert_eq!(markdown("Plain text - with a dash, 3.5 and #hash."), 0);
    }

    #[test]
    fn the_histogram_counts_every_pair_and_is_symmetric() {
        let rows = generate::clean(400, 6);
        let bins = length_differences(&Corpus::new(&rows, 0.6));
        assert_eq!(bins.iter().map(|bin| bin.count).sum::<usize>(), 400);
        assert!((bins[0].low + bins[BARS - 1].high).abs() < 1e-9);
        assert!(length_differences(&Corpus::new(&[], 0.6)).is_empty());
    }
}
