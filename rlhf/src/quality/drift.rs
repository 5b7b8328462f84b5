//! How far the dataset's prompts are from what people ask now.

use super::{QualityOptions, corpus::Corpus, report::Check, words::words};
use crate::{random::Random, statistics::jensen_shannon};

const NAME: &str = "drift";
/// Bins into which words are hashed.
const BINS: usize = 4096;
/// Texts of each side, and words of each text.
const TEXTS: usize = 1000;
const WORDS: usize = 200;
/// Permutations; with 199 the smallest p is 0.005.
const PERMUTATIONS: usize = 199;
/// Chance below which a difference is taken for one.
const SIGNIFICANT: f64 = 0.01;

/// The check over the divergence of word frequencies, prompts against live traffic.
///
/// Two samples of one source diverge too, the more the smaller they are. So texts are dealt anew between the two sides, again and
/// again: the share of deals that diverge as much is p, and what counts is the divergence beyond their mean.
pub(super) fn check(corpus: &Corpus<'_>, options: &QualityOptions) -> Check {
    let minimum = options.thresholds.minimum;
    if options.live_sample.len() < minimum || corpus.rows.len() < minimum {
        return Check::not_applicable(
            NAME,
            format!("Fewer than {minimum} live prompts were given, or the dataset has fewer rows."),
        );
    }
    let mut random = Random::new(options.seed);
    let bins = |words: &[u32]| -> Vec<u16> { words.iter().take(WORDS).map(|word| (*word as usize % BINS) as u16).collect() };
    let rows = random.sample(corpus.rows.len(), TEXTS);
    let mut texts: Vec<Vec<u16>> = rows.iter().map(|row| bins(&corpus.prompts[*row].words)).collect();
    let own = texts.len();
    texts
        .extend(random.sample(options.live_sample.len(), TEXTS).into_iter().map(|text| bins(&words(&options.live_sample[text]))));

    let mut all = vec![0.0; BINS];
    texts.iter().flatten().for_each(|bin| all[usize::from(*bin)] += 1.0);
    let mut order: Vec<usize> = (0..texts.len()).collect();
    let divergence = |order: &[usize]| {
        let mut left = vec![0.0; BINS];
        order[..own].iter().flat_map(|text| &texts[*text]).for_each(|bin| left[usize::from(*bin)] += 1.0);
        let right: Vec<f64> = all.iter().zip(&left).map(|(all, left)| all - left).collect();
        jensen_shannon(&left, &right)
    };
    let Some(observed) = divergence(&order) else {
        return Check::not_applicable(NAME, "The prompts or the live sample have no words.");
    };
    let (mut sum, mut as_far) = (0.0, 1);
    for _ in 0..PERMUTATIONS {
        random.shuffle(&mut order);
        let dealt = divergence(&order).unwrap_or(0.0);
        sum += dealt;
        as_far += usize::from(dealt >= observed);
    }
    let chance = sum / PERMUTATIONS as f64;
    let p = as_far as f64 / (PERMUTATIONS + 1) as f64;
    let beyond = if p < SIGNIFICANT { (observed - chance).max(0.0) } else { 0.0 };
    let text = format!(
        "Jensen-Shannon divergence in bits between the words of the prompts and of {} live ones; chance alone gives {chance:.3} (p = \
         {p:.3}), and what is beyond it is held against the threshold. A dataset far from the traffic teaches what nobody asks.",
        texts.len() - own
    );
    Check::held(NAME, observed, beyond, options.thresholds.drift, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quality::{generate, report::Status, words::spoken};

    fn run(live_sample: Vec<String>) -> Check {
        let rows = generate::clean(400, 1);
        check(&Corpus::new(&rows, 0.6), &QualityOptions { live_sample, seed: 3, ..QualityOptions::default() })
    }

    fn live(count: usize) -> Vec<String> {
        generate::prompts(count, 2).iter().map(|prompt| spoken(prompt)).collect()
    }

    #[test]
    fn traffic_of_the_same_kind_does_not_drift() {
        for count in [40, 400, 3000] {
            let check = run(live(count));
            assert_eq!(check.status, Status::Pass, "{check:?}");
        }
        assert_eq!(run(Vec::new()).status, Status::NotApplicable);
    }

    #[test]
    fn traffic_about_something_else_is_found() {
        let poems: Vec<String> = (0..300)
            .map(|n| format!("Write poem number {n} of love, rain and longing, in rhyming couplets, sad but not too sad"))
            .collect();
        assert_eq!(run(poems.clone()).status, Status::Fail);
        let mixed: Vec<String> = live(300).into_iter().chain(poems.into_iter().take(150)).collect();
        assert_eq!(run(mixed).status, Status::Warn);
    }
}
