//! Whether a dataset may be trained on: [`assess`] reads its rows and answers with a [`QualityReport`] — one [`Check`] per
//! question, one verdict per row, one over all, on which a pipeline gates.
//!
//! Checks are functions of the rows and [`QualityOptions`]; chance comes from the seed, so the same input gives the same report.
//! None compares all rows with all rows. [`agreement`] and [`split`] stand alone: labeling and training use them too.

mod address;
pub mod agreement;
mod bias;
mod corpus;
mod diversity;
mod drift;
mod duplicate;
#[cfg(test)]
mod generate;
pub(crate) mod html;
pub mod injection;
mod language;
mod logistic;
pub mod minhash;
mod noise;
mod options;
mod overlap;
pub mod pii;
mod plot;
pub mod reliability;
mod report;
pub mod share;
mod size;
pub mod split;
#[cfg(test)]
mod tests;
mod tournament;
mod validity;
pub mod words;

use std::collections::BTreeSet;

pub use agreement::{Judgement, Level};
pub use options::{Limit, QualityOptions, Sizes, Thresholds};
pub use plot::Drawing;
pub use report::{Bin, Check, Keep, Plots, QualityReport, Reason, RowVerdict, Status, Summary, Verdict};
pub use share::Share;
pub use split::{Split, by_prompt_cluster};

use crate::dataset::{Example, Row};
use corpus::{Corpus, Findings};

/// Runs every check over the rows.
pub fn assess(rows: &[Row], options: &QualityOptions) -> QualityReport {
    let thresholds = &options.thresholds;
    let corpus = Corpus::new(rows, thresholds.cluster_similarity);
    let mut findings = Findings::new(rows);
    let users = share::users(rows);
    let raters = share::raters(rows);
    let reliability = reliability::raters(&options.judgements);

    let mut checks = Vec::new();
    checks.extend(validity::check(&corpus, thresholds, &mut findings));
    checks.extend(duplicate::check(&corpus, thresholds, options.seed, &mut findings));
    checks.extend(bias::check(&corpus, options));
    checks.push(noise::check(&corpus, options, &mut findings));
    checks.push(tournament::check(&corpus, thresholds, &mut findings));
    checks.push(agreement::check(options));
    checks.push(reliability::check(&reliability, rows, thresholds, &mut findings));
    checks.push(share::check("user_share", "user", &users, thresholds.user_share, thresholds));
    checks.push(share::check("rater_share", "rater", &raters, thresholds.rater_share, thresholds));
    share::mark_surplus(rows, &users, options, &mut findings);
    checks.push(overlap::check(&corpus, options, &mut findings));
    checks.extend(pii::check(&corpus, thresholds, &mut findings));
    let (language, languages) = language::check(&corpus, options, &mut findings);
    checks.push(language);
    checks.push(injection::check(&corpus, thresholds, &mut findings));
    checks.extend(diversity::check(&corpus, options));
    checks.push(drift::check(&corpus, options));
    // Of what the others leave, and first to be read.
    checks.insert(0, size::check(rows, thresholds, &findings));

    let verdicts = findings.into_rows();
    let verdict = verdict(&checks);
    let summary = Summary { users: users.len(), raters: raters.len(), languages, ..summary(&corpus, &verdicts) };
    let first = |shares: Vec<Share>| shares.into_iter().take(SHOWN).collect();
    let plots =
        Plots { length_differences: bias::length_differences(&corpus), users: first(users), raters: first(raters), reliability };
    QualityReport { verdict, summary, checks, rows: verdicts, plots }
}

/// People that the plots show.
const SHOWN: usize = 20;

/// The worst of the checks.
fn verdict(checks: &[Check]) -> Verdict {
    let of = |check: &Check| match check.status {
        Status::Fail => Verdict::Fail,
        Status::Warn => Verdict::Warn,
        Status::Pass | Status::NotApplicable => Verdict::Pass,
    };
    checks.iter().map(of).max().unwrap_or(Verdict::Pass)
}

fn summary(corpus: &Corpus<'_>, verdicts: &[RowVerdict]) -> Summary {
    let mut summary = Summary { rows: corpus.rows.len(), ..Summary::default() };
    for row in corpus.rows {
        match row.example {
            Example::Preference { .. } => summary.preferences += 1,
            Example::Unpaired { .. } => summary.unpaired += 1,
            Example::Demonstration { .. } => summary.demonstrations += 1,
        }
    }
    for row in verdicts {
        match row.verdict {
            Keep::Keep => summary.keep += 1,
            Keep::Review => summary.review += 1,
            Keep::Drop => summary.drop += 1,
        }
    }
    summary.prompt_clusters = corpus.clusters.iter().collect::<BTreeSet<_>>().len();
    let texts = corpus.prompts.iter().chain(corpus.answers.iter().flatten());
    summary.words = texts.map(|text| text.words.len()).sum();
    summary
}
