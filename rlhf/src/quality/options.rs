//! What a quality report is held against.

use serde::{Deserialize, Serialize};

use super::{agreement::Judgement, report::Status};
use crate::dataset::Message;

/// What the checks need beside the rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct QualityOptions {
    /// Prompts that evaluations use: rows that repeat them would be trained on the test.
    pub evaluation_prompts: Vec<Vec<Message>>,
    /// Texts of recent live prompts, to see how far the dataset is from them; may be empty.
    pub live_sample: Vec<String>,
    /// All raw judgements, with several raters per item where there are.
    pub judgements: Vec<Judgement>,
    /// Languages that are wanted (ISO 639-3, such as `eng`); empty: those that at least 5 % of the rows have.
    pub languages: Vec<String>,
    /// When checks warn and fail.
    pub thresholds: Thresholds,
    /// For samples, folds and permutations; the same seed gives the same report.
    pub seed: u64,
}

/// Past `warn` a check warns, past `fail` it fails.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// The first threshold.
    pub warn: f64,
    /// The second.
    pub fail: f64,
}

impl Limit {
    /// Two thresholds. When `fail` is the smaller, small values are the bad ones.
    pub const fn new(warn: f64, fail: f64) -> Self {
        Self { warn, fail }
    }

    /// What evidence means.
    pub fn status(self, evidence: f64) -> Status {
        let past = |threshold| if self.fail < self.warn { evidence < threshold } else { evidence > threshold };
        if past(self.fail) {
            Status::Fail
        } else if past(self.warn) {
            Status::Warn
        } else {
            Status::Pass
        }
    }
}

/// Rows that each use needs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sizes {
    /// Comparisons, for DPO or a reward model. Of 500 a fifth held out tells the accuracy to ten points up or down, of 50 to thirty:
    /// there every model may be no better than a coin.
    pub preferences: Limit,
    /// Judged answers, for KTO; a comparison is two of them, so twice as many.
    pub unpaired: Limit,
    /// Answers to imitate, for fine-tuning. Ten are the fewest that OpenAI's fine-tuning takes, and its guide sees gains from 50 to 100.
    pub demonstrations: Limit,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            preferences: Limit::new(500.0, 50.0),
            unpaired: Limit::new(1000.0, 100.0),
            demonstrations: Limit::new(100.0, 10.0),
        }
    }
}

/// When checks warn and fail. Shares are of the rows that a check looks at.
///
/// A share of rows warns by itself and fails by the lower end of its 95 % interval; biases and noise are judged by the near end of
/// theirs. So a handful of rows does not fail a dataset by chance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Thresholds {
    /// Rows to train on, by use, small numbers bad.
    pub size: Sizes,
    /// Rows with broken roles, empty or equal answers. Any row is worth a look; one in fifty says that the source is broken.
    pub invalid: Limit,
    /// Rows whose chosen answer stops in the middle.
    pub truncated: Limit,
    /// Rows that repeat an earlier row.
    pub exact_duplicates: Limit,
    /// Rows that nearly repeat an earlier row.
    pub near_duplicates: Limit,
    /// Jaccard similarity of word pairs from which two texts are nearly the same.
    pub near_similarity: f64,
    /// Jaccard similarity of word pairs from which two prompts belong to one cluster.
    pub cluster_similarity: f64,
    /// Rows that another row contradicts.
    pub contradictions: Limit,
    /// |P(longer is chosen) − ½|. People like somewhat longer answers; past 0.75 length is what the labels teach.
    pub length_bias: Limit,
    /// Accuracy of a model that sees lengths only.
    pub length_model: Limit,
    /// |P(left is chosen) − ½|; sides are random, so any certain difference comes from the raters.
    pub position_bias: Limit,
    /// |P(more markdown is chosen) − ½|.
    pub markdown_bias: Limit,
    /// Confident predictions of the out-of-fold preference model that the label contradicts. A quarter: labels are close to useless.
    pub label_noise: Limit,
    /// A prediction is confident when the model gives the chosen answer less than this, or more than one less this.
    pub confident: f64,
    /// Comparisons that lie on a cycle (a over b, b over c, c over a), of those that could.
    pub cycles: Limit,
    /// Krippendorff's α, nominal, small values bad; judged by the upper end. Preferences are less agreed on than codings of facts,
    /// for which 0.667 is customary.
    pub agreement: Limit,
    /// Skill of the worst rater, small values bad: 1 is always right, 0 is chance; judged by the upper end.
    pub reliability: Limit,
    /// Largest share of the rows from one user's requests.
    pub user_share: Limit,
    /// Largest share of the rows that one rater judged.
    pub rater_share: Limit,
    /// Rows that hold an evaluation prompt.
    pub overlap: Limit,
    /// Share of an evaluation prompt's n-grams in a row from which the row holds it.
    pub overlap_containment: f64,
    /// Rows with e-mail addresses, telephone numbers, or IP addresses.
    pub personal: Limit,
    /// Rows with IBANs, card numbers, keys, or other secrets.
    pub secrets: Limit,
    /// Rows in a language that is not expected.
    pub language: Limit,
    /// Rows that try to steer a model or a rater, or hold a chat template's control tokens.
    pub injection: Limit,
    /// Effective number of prompt clusters (e to their entropy) per row, small values bad.
    pub diversity: Limit,
    /// Different word pairs per word pair in a sample of chosen answers of fixed size, small values bad.
    pub distinct: Limit,
    /// Largest share of rows whose chosen answer is the same text.
    pub repeated_answer: Limit,
    /// Jensen-Shannon divergence from live traffic in bits, beyond what chance gives.
    pub drift: Limit,
    /// Fewest pairs, judgements or rows from which a rate is worth a verdict.
    pub minimum: usize,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            size: Sizes::default(),
            invalid: Limit::new(0.0, 0.02),
            truncated: Limit::new(0.01, 0.10),
            exact_duplicates: Limit::new(0.0, 0.10),
            near_duplicates: Limit::new(0.02, 0.20),
            near_similarity: 0.8,
            cluster_similarity: 0.6,
            contradictions: Limit::new(0.0, 0.05),
            length_bias: Limit::new(0.10, 0.25),
            length_model: Limit::new(0.60, 0.75),
            position_bias: Limit::new(0.02, 0.10),
            markdown_bias: Limit::new(0.10, 0.25),
            label_noise: Limit::new(0.05, 0.25),
            confident: 0.1,
            cycles: Limit::new(0.05, 0.25),
            agreement: Limit::new(0.4, 0.1),
            reliability: Limit::new(0.4, 0.0),
            user_share: Limit::new(0.25, 0.5),
            rater_share: Limit::new(0.5, 0.8),
            overlap: Limit::new(0.0, 0.01),
            overlap_containment: 0.65,
            personal: Limit::new(0.0, 0.05),
            secrets: Limit::new(0.0, 0.01),
            language: Limit::new(0.02, 0.20),
            injection: Limit::new(0.0, 0.02),
            diversity: Limit::new(0.2, 0.02),
            distinct: Limit::new(0.1, 0.03),
            repeated_answer: Limit::new(0.05, 0.25),
            drift: Limit::new(0.05, 0.3),
            minimum: 30,
        }
    }
}
