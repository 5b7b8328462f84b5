//! Labels that are probably wrong: the preference model of the other rows speaks against them.

use super::{
    QualityOptions, Status,
    bias::FOLDS,
    corpus::{Corpus, Findings, Text},
    logistic::{Differences, Fit, out_of_fold},
    report::{Check, Keep},
    split,
    words::pairs,
};
use crate::{
    random::Random,
    statistics::{Proportion, bootstrap, sigmoid},
};

const NAME: &str = "label_noise";
/// Hashed features, the last of which is the difference of the lengths.
const FEATURES: usize = 1 << 16;
/// Words of an answer that the model reads.
const READ: usize = 300;
/// Comparisons without which a model of words learns nothing.
const FEWEST: usize = 200;
/// Accuracy that a model of words reaches on labels that say anything, given enough of them.
const RANDOM: f64 = 0.55;
/// Margins and rounds of the bootstrap.
const RESAMPLED: usize = 4000;
const ROUNDS: usize = 100;

/// The check over the rate of flipped labels, and the rows that are probably among them.
///
/// A Bradley-Terry model on hashed words, word pairs and length predicts each row from other prompts. The margins m then give the
/// rate ε of labels flipped at random, by maximum likelihood of P(label) = ε + (1 − 2ε)σ(a·m) (Chowdhury et al. 2024): a model that
/// is merely unsure has a small a, flipped labels show as a second peak on the far side.
pub(super) fn check(corpus: &Corpus<'_>, options: &QualityOptions, findings: &mut Findings) -> Check {
    let thresholds = &options.thresholds;
    let mut data = Differences::default();
    let (mut rows, mut clusters) = (Vec::new(), Vec::new());
    for (index, chosen, rejected) in corpus.comparisons() {
        data.push(difference(chosen, rejected));
        rows.push(index);
        clusters.push(corpus.clusters[index]);
    }
    let fewest = FEWEST.max(thresholds.minimum);
    if rows.len() < fewest {
        return Check::not_applicable(
            NAME,
            format!("Fewer than {fewest} comparisons; a model of words learns nothing from them."),
        );
    }
    let folds = split::folds(&clusters, FOLDS, options.seed);
    let fit = Fit { size: FEATURES, passes: 3, rate: 0.2, decay: 1e-4 };
    let margins = out_of_fold(&data, &folds, fit, options.seed);
    // A cluster that fills most of the dataset leaves nothing to learn from; its rows have no prediction, and a margin of zero.
    let told: Vec<f64> = margins.iter().copied().filter(|margin| *margin != 0.0).collect();
    let right = told.iter().filter(|margin| **margin > 0.0).count() as u64;
    let Some(accuracy) = Proportion::new(right, told.len() as u64).filter(|accuracy| accuracy.trials >= fewest as u64) else {
        return Check::not_applicable(NAME, "Too few comparisons of other prompts to learn from.");
    };
    if accuracy.interval.low <= 0.5 {
        let mut check = Check::not_applicable(
            NAME,
            format!(
                "A model of words predicts {:.1} % of {} choices out of fold, which chance may give too: it cannot tell wrong labels from \
                 right ones.",
                100.0 * accuracy.share,
                accuracy.trials
            ),
        );
        if accuracy.interval.high < RANDOM {
            check.status = Status::Warn;
            check.explanation +=
                " So many labels, and nothing to learn from them: they may have been given, or joined, at random.";
        }
        return check;
    }
    let flips = Flips::fit(told.iter().copied());
    for (row, margin) in rows.iter().zip(&margins) {
        let wrong = flips.wrong(*margin);
        if wrong > 1.0 - thresholds.confident {
            findings.add(
                *row,
                NAME,
                Keep::Review,
                format!("the other rows speak against this label with probability {wrong:.2}"),
            );
        }
    }
    let mut random = Random::new(options.seed);
    let sample: Vec<f64> = random.sample(told.len(), RESAMPLED).into_iter().map(|row| told[row]).collect();
    let interval =
        bootstrap(sample.len(), ROUNDS, &mut random, |rows| Some(Flips::fit(rows.iter().map(|row| sample[*row])).rate));
    let found = findings.of(NAME);
    let text = format!(
        "Estimated share of flipped labels, by a preference model that never saw the prompt it predicts (out of fold it is right on \
         {:.1} %); {} rows are probably among them. The lower end of the interval is held against the threshold.",
        100.0 * accuracy.share,
        found.len()
    );
    let evidence = interval.map_or(flips.rate, |interval| interval.low);
    let mut check = Check::held(NAME, flips.rate, evidence, thresholds.label_noise, text).within(interval);
    check.examples = findings.ids(&found);
    check
}

/// φ(chosen) − φ(rejected): words and word pairs that only one of them has, scaled to length 1, and the logarithm of the lengths.
fn difference(chosen: &Text, rejected: &Text) -> Vec<(u16, f32)> {
    let features = |text: &Text| {
        let words = &text.words[..text.words.len().min(READ)];
        let mut features = pairs(words);
        features.extend(words.iter().map(|word| word.rotate_left(13)));
        features.sort_unstable();
        features.dedup();
        features
    };
    let (chosen_features, rejected_features) = (features(chosen), features(rejected));
    let only = |mine: &[u32], other: &[u32], value: f32| -> Vec<(u16, f32)> {
        let missing = mine.iter().filter(|feature| other.binary_search(feature).is_err());
        missing.map(|feature| ((feature % (FEATURES as u32 - 1)) as u16, value)).collect()
    };
    let mut row = only(&chosen_features, &rejected_features, 1.0);
    row.extend(only(&rejected_features, &chosen_features, -1.0));
    let scale = 1.0 / (row.len().max(1) as f32).sqrt();
    row.iter_mut().for_each(|(_, value)| *value *= scale);
    let length = |text: &Text| (1.0 + text.words.len() as f32).ln();
    row.push(((FEATURES - 1) as u16, 0.1 * (length(chosen) - length(rejected))));
    row
}

/// P(label | margin m) = ε + (1 − 2ε)σ(a·m).
#[derive(Clone, Copy, Debug)]
struct Flips {
    rate: f64,
    slope: f64,
}

impl Flips {
    /// Expectation maximisation over histogram bins: at most 60 rounds, each with one Newton step for the slope.
    fn fit(margins: impl Iterator<Item = f64>) -> Self {
        const BINS: usize = 400;
        let margins: Vec<f64> = margins.collect();
        let spread = (margins.iter().map(|m| m * m).sum::<f64>() / margins.len().max(1) as f64).sqrt().max(1e-9);
        let mut counts = [0.0; BINS];
        for margin in &margins {
            let bin = (margin / spread / 8.0 + 0.5) * BINS as f64;
            counts[bin.clamp(0.0, (BINS - 1) as f64) as usize] += 1.0;
        }
        let centre = |bin: usize| ((bin as f64 + 0.5) / BINS as f64 - 0.5) * 8.0;
        let total = margins.len().max(1) as f64;
        let mut flips = Self { rate: 0.05, slope: 2.0 };
        for _ in 0..60 {
            let (mut wrong_sum, mut gradient, mut curvature) = (0.0, 0.0, 1e-3);
            for (bin, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0.0) {
                let m = centre(bin);
                let wrong = flips.wrong(m);
                wrong_sum += count * wrong;
                let p = sigmoid(flips.slope * m);
                // The label that was meant is right with weight 1 − wrong and the opposite with weight wrong.
                gradient += count * m * ((1.0 - wrong) * (1.0 - p) - wrong * p);
                curvature += count * m * m * p * (1.0 - p);
            }
            // A little weight on a small slope keeps it finite when every margin has the right sign.
            let step = (gradient - 0.01 * flips.slope) / (curvature + 0.01);
            flips.slope = (flips.slope + step.clamp(-1.0, 1.0)).clamp(0.0, 30.0);
            flips.rate = (wrong_sum / total).clamp(1e-6, 0.5);
        }
        Self { rate: flips.rate, slope: flips.slope / spread }
    }

    /// The probability that the label of a row with this margin was flipped.
    fn wrong(self, margin: f64) -> f64 {
        let right = sigmoid(self.slope * margin);
        let flipped = self.rate * (1.0 - right);
        flipped / (flipped + (1.0 - self.rate) * right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dataset::Row, quality::generate};

    fn run(rows: &[Row]) -> (Check, Findings) {
        let mut findings = Findings::new(rows);
        let check = check(&Corpus::new(rows, 0.6), &QualityOptions::default(), &mut findings);
        (check, findings)
    }

    #[test]
    fn clean_labels_are_not_suspected() {
        for seed in [1, 2, 3] {
            let (check, findings) = run(&generate::clean(1500, seed));
            assert_eq!(check.status, Status::Pass, "{check:?}");
            assert!(check.value.unwrap() < 0.01 && findings.of(NAME).is_empty(), "{check:?}");
        }
    }

    #[test]
    fn flipped_labels_are_counted_and_found() {
        let flip = |row: usize| row % 7 == 3;
        let rows: Vec<Row> = generate::clean(1500, 4)
            .iter()
            .enumerate()
            .map(|(index, row)| if flip(index) { generate::flipped(row) } else { row.clone() })
            .collect();
        let (check, findings) = run(&rows);
        assert_eq!(check.status, Status::Warn, "{check:?}");
        assert!((check.value.unwrap() - 1.0 / 7.0).abs() < 0.03, "{check:?}");
        let found = findings.of(NAME);
        let right = found.iter().filter(|row| flip(**row)).count();
        assert!(right * 100 >= found.len() * 98 && right * 10 >= 1500 / 7 * 8, "{right} of {} found", found.len());
    }

    #[test]
    fn labels_by_coin_are_found_and_few_rows_are_not_judged() {
        for seed in 0..4 {
            let mut random = Random::new(seed);
            let coin = |row: &Row| if random.unit() < 0.5 { generate::flipped(row) } else { row.clone() };
            let rows: Vec<Row> = generate::clean(2000, 5).iter().map(coin).collect();
            let status = run(&rows).0.status;
            assert!(matches!(status, Status::Warn | Status::Fail), "seed {seed}: {status:?}");
        }
        assert_eq!(run(&generate::clean(50, 1)).0.status, Status::NotApplicable);
    }

    #[test]
    fn one_prompt_for_all_is_not_judged() {
        let prompt = |_: &str| "Which of the two things should I repair first?".to_owned();
        let rows: Vec<Row> = generate::clean(1000, 6).iter().map(|row| generate::with_prompt(row, prompt)).collect();
        assert_eq!(run(&rows).0.status, Status::NotApplicable);
    }

    #[test]
    fn doubt_is_not_taken_for_flips() {
        // Margins from a normal distribution whose labels follow σ(m): a third are against the model and none is flipped.
        let mut random = Random::new(2);
        let margins: Vec<f64> = (0..5000)
            .map(|_| {
                let m = 2.0 * (0..12).map(|_| random.unit()).sum::<f64>() - 12.0;
                if random.unit() < sigmoid(m) { m } else { -m }
            })
            .collect();
        let flips = Flips::fit(margins.iter().copied());
        assert!(flips.rate < 0.03 && (flips.slope - 1.0).abs() < 0.15, "{flips:?}");
    }
}
