//! Rows that hold a prompt of an evaluation: trained on them, a model is tested on what it has seen.

use std::collections::{HashMap, HashSet};

use super::{
    QualityOptions,
    corpus::{Corpus, Findings},
    report::{Check, Keep},
    words::{sequence, spoken, words},
};

const NAME: &str = "overlap";
/// Longest n-grams, as GPT-3's authors used (Brown et al. 2020, appendix C).
const LONGEST: usize = 13;
/// Shortest: three or four words in a row are said by chance.
const SHORTEST: usize = 5;
/// Evaluation prompts that may share an n-gram before it counts as a phrase of the evaluation's template and is passed over.
const COMMON: usize = 50;

/// The check over rows whose prompt or answers hold an evaluation prompt.
///
/// A prompt of w words is cut into n-grams of n = w/4, at least 5 and at most 13, so that one changed word in a short prompt leaves
/// most of them whole. A row holds the prompt when it has the share of its n-grams that the options name. Prompts shorter than five
/// words count when the row's prompt is the same.
pub(super) fn check(corpus: &Corpus<'_>, options: &QualityOptions, findings: &mut Findings) -> Check {
    if options.evaluation_prompts.is_empty() {
        return Check::not_applicable(NAME, "No evaluation prompts were given.");
    }
    let index = Index::new(options.evaluation_prompts.iter().map(|prompt| words(&spoken(prompt))));
    for row in 0..corpus.rows.len() {
        let texts = std::iter::once(&corpus.prompts[row]).chain(&corpus.answers[row]);
        let held = index.held(
            &corpus.prompts[row].words,
            texts.map(|text| text.words.as_slice()),
            options.thresholds.overlap_containment,
        );
        if let Some((prompt, share)) = held {
            findings.add(row, NAME, Keep::Drop, format!("holds {:.0} % of evaluation prompt {prompt}", 100.0 * share));
        }
    }
    findings.share(NAME, corpus.rows.len(), options.thresholds.overlap, |found| {
        format!(
            "One of {} evaluation prompts is in {found}. Leave them out, or the evaluation measures memory.",
            options.evaluation_prompts.len()
        )
    })
}

/// N-grams of the evaluation prompts.
struct Index {
    /// By n: which prompts have an n-gram.
    grams: Vec<(usize, HashMap<u64, Vec<u32>>)>,
    /// Different n-grams of each prompt that are not common.
    counts: Vec<usize>,
    /// Whole prompts too short for n-grams.
    whole: HashMap<u64, usize>,
}

impl Index {
    fn new(prompts: impl Iterator<Item = Vec<u32>>) -> Self {
        let mut by_size: Vec<HashMap<u64, Vec<u32>>> = vec![HashMap::new(); LONGEST + 1];
        let mut whole = HashMap::new();
        let mut size = 0;
        for (prompt, words) in prompts.enumerate() {
            size = prompt + 1;
            if words.len() < SHORTEST {
                if !words.is_empty() {
                    whole.entry(sequence(&words)).or_insert(prompt);
                }
                continue;
            }
            let n = (words.len() / 4).clamp(SHORTEST, LONGEST);
            let grams: HashSet<u64> = words.windows(n).map(sequence).collect();
            grams.into_iter().for_each(|gram| by_size[n].entry(gram).or_default().push(prompt as u32));
        }
        let mut counts = vec![0; size];
        for grams in &mut by_size {
            grams.retain(|_, prompts| prompts.len() <= COMMON);
            grams.values().flatten().for_each(|prompt| counts[*prompt as usize] += 1);
        }
        Self { grams: by_size.into_iter().enumerate().filter(|(_, grams)| !grams.is_empty()).collect(), counts, whole }
    }

    /// The evaluation prompt of which a row holds most, when that is at least the given share.
    fn held<'a>(&self, prompt: &[u32], texts: impl Iterator<Item = &'a [u32]>, least: f64) -> Option<(usize, f64)> {
        if let Some(prompt) = self.whole.get(&sequence(prompt)) {
            return Some((*prompt, 1.0));
        }
        let mut seen: HashMap<u32, HashSet<u64>> = HashMap::new();
        for text in texts {
            for (n, grams) in &self.grams {
                for gram in text.windows(*n).map(sequence) {
                    for prompt in grams.get(&gram).into_iter().flatten() {
                        seen.entry(*prompt).or_default().insert(gram);
                    }
                }
            }
        }
        let shares =
            seen.into_iter().map(|(prompt, grams)| (prompt as usize, grams.len() as f64 / self.counts[prompt as usize] as f64));
        let most = shares.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)))?;
        (most.1 >= least).then_some(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataset::{Message, Row},
        quality::{
            generate::{self, message},
            report::Status,
        },
    };

    fn run(rows: &[Row], evaluation_prompts: Vec<Vec<Message>>) -> (Check, Vec<usize>) {
        let mut findings = Findings::new(rows);
        let options = QualityOptions { evaluation_prompts, ..QualityOptions::default() };
        let check = check(&Corpus::new(rows, 0.6), &options, &mut findings);
        let found = findings.of(NAME);
        (check, found)
    }

    #[test]
    fn other_prompts_of_the_same_kind_do_not_overlap() {
        let (check, found) = run(&generate::clean(2000, 1), generate::prompts(300, 2));
        assert_eq!((check.status, found.len()), (Status::Pass, 0));
        assert_eq!(run(&generate::clean(10, 1), Vec::new()).0.status, Status::NotApplicable);
    }

    #[test]
    fn repeated_quoted_and_reworded_prompts_are_found() {
        let mut rows = generate::clean(500, 3);
        let evaluation = generate::prompts(40, 4);
        let said = |prompt: usize| spoken(&evaluation[prompt]);
        rows[10] = generate::with_prompt(&rows[10], |_| said(1));
        rows[20] = generate::with_prompt(&rows[20], |own| format!("{own}\n\nAlso: {}", said(2).to_uppercase()));
        rows[30] = generate::with_answers(&rows[30], |chosen, rejected| (format!("{chosen} {}", said(3)), rejected.to_owned()));
        rows[40] = generate::reword_prompt(&generate::with_prompt(&rows[40], |_| said(5)));
        let (check, found) = run(&rows, evaluation);
        assert_eq!((check.status, found), (Status::Warn, vec![10, 20, 30, 40]));
    }

    #[test]
    fn short_prompts_count_only_when_they_are_the_whole_prompt() {
        let mut rows = generate::clean(50, 5);
        rows[3] = generate::with_prompt(&rows[3], |_| "who are you".to_owned());
        rows[4] = generate::with_prompt(&rows[4], |own| format!("{own} Who are you?"));
        assert_eq!(run(&rows, vec![vec![message("user", "Who are you?")]]).1, [3]);
        rows[5] = generate::with_prompt(&rows[5], |_| "What is the capital of Spain?".to_owned());
        rows[6] = generate::with_prompt(&rows[6], |_| "Tell me: what is the capital of France?".to_owned());
        assert_eq!(run(&rows, vec![vec![message("user", "What is the capital of France?")]]).1, [6]);
    }
}
