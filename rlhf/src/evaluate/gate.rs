//! Whether an adapter may go on, by what an evaluation found of it: a function of the report and of thresholds.
//!
//! What was not measured does not pass. Measures of preference are judged by the near end of their 95 % interval, so that luck on a few
//! comparisons opens no gate; drift is judged by its estimate.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::report::{Contender, Evaluation};
use crate::statistics::{Interval, Z95, wilson};

/// Largest number of comparisons that is worth telling somebody to collect.
const MOST_COMPARISONS: u64 = 100_000;

/// Thresholds; `null` switches one off.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gates {
    /// Fewest held-out comparisons. Of a handful, an interval says less than its 95 %.
    pub comparisons: Option<f64>,
    /// The lower end of the share of held-out comparisons won must be above it.
    pub accuracy: Option<f64>,
    /// The lower end of the share of duels won, of those decided, must be above it.
    pub win_rate: Option<f64>,
    /// The loss on ordinary text may grow by this share of the base's at the most.
    pub text_loss: Option<f64>,
    /// KL(adapter ‖ base) per token of its own answers, in nats: the budget.
    pub kl_per_token: Option<f64>,
    /// Median words of an answer, as a share of the base's: at least.
    pub shortest: Option<f64>,
    /// The same: at the most.
    pub longest: Option<f64>,
    /// The share of answers that refuse may grow by this at the most.
    pub refusals: Option<f64>,
    /// The share of answers that are cut off may grow by this at the most.
    pub truncated: Option<f64>,
    /// Fewest samples that it learnt from.
    pub preferences: Option<f64>,
    /// Fewest people who judged them.
    pub raters: Option<f64>,
    /// Largest part of the loss that is one rater's.
    pub rater_share: Option<f64>,
}

impl Default for Gates {
    fn default() -> Self {
        Self {
            comparisons: Some(30.0),
            accuracy: Some(0.5),
            win_rate: Some(0.5),
            text_loss: Some(0.03),
            kl_per_token: Some(0.5),
            shortest: Some(0.5),
            longest: Some(2.0),
            refusals: Some(0.05),
            truncated: Some(0.1),
            preferences: Some(50.0),
            raters: Some(3.0),
            rater_share: Some(0.8),
        }
    }
}

/// One gate, and what it found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateCheck {
    /// The field of [`Gates`].
    pub gate: String,
    /// Whether it is open.
    pub passed: bool,
    /// What was compared with the threshold; absent where nothing was measured.
    pub value: Option<f64>,
    /// The threshold.
    pub threshold: f64,
    /// Both in words.
    pub finding: String,
    /// What would open it; absent where it is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
}

/// What all gates said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateReport {
    /// All that were asked are open.
    pub passed: bool,
    /// Each, in the order of [`Gates`].
    pub checks: Vec<GateCheck>,
}

/// What is compared.
enum Rule {
    AtLeast,
    Above,
    AtMost,
}

/// What a gate looks at: the number, and how it came about in words; or why there is none and how to get one.
type Found = Result<(f64, String), String>;

impl Gates {
    /// Whether any is on.
    pub fn any(&self) -> bool {
        let Self { comparisons, accuracy, win_rate, text_loss, kl_per_token, shortest, longest, refusals, truncated, .. } = self;
        let measured = [comparisons, accuracy, win_rate, text_loss, kl_per_token, shortest, longest, refusals, truncated];
        let told = [&self.preferences, &self.raters, &self.rater_share];
        measured.into_iter().chain(told).any(Option::is_some)
    }

    /// Holds an evaluation's first contender against the thresholds.
    pub fn judge(&self, found: &Evaluation) -> GateReport {
        let nobody = Contender::default();
        let one = found.contenders.first().unwrap_or(&nobody);
        let base = found.contenders.last().unwrap_or(&nobody);
        let preferences = one.preferences.ok_or_else(|| "name held-out comparisons with --dataset or --file".to_owned());
        let duel = found.duel.ok_or_else(|| "say who judges: --reward-funcs, --reward-model or --judge".to_owned());
        let answers = one.answers.zip(base.answers);
        let answers =
            answers.ok_or_else(|| "let it answer: rows with prompts, or --prompt-file, and --prompts above 0".to_owned());
        let told = || {
            let field =
                "evaluate a registered adapter or the folder that `tidemill train` wrote; no other says what it was trained on";
            one.trained_on.ok_or_else(|| field.to_owned())
        };
        let rise = |name: &str, before: f64, now: f64| {
            (now - before, format!("{} of the answers {name}, {} of the base's", percent(now), percent(before)))
        };
        let ratio = || {
            let (one, base) = answers.clone()?;
            let (now, before) = (one.median_words, base.median_words);
            if before > 0.0 {
                return Ok((now / before, format!("{now:.0} words in the middle, {before:.0} of the base's")));
            }
            Err("ask other prompts: the base answers these with nothing".to_owned())
        };

        let comparisons = preferences.clone().map(|known| {
            let count = known.accuracy.trials;
            (count as f64, format!("{count} held-out comparisons"))
        });
        let accuracy = preferences.clone().map(|known| (known.accuracy.interval.low, known.accuracy));
        let accuracy =
            accuracy.map(|(low, known)| (low, won("held-out comparisons", known.successes, known.trials, known.interval)));
        let win_rate = duel.clone().map(|score| {
            let decided = score.won + score.lost;
            // Nothing decided is no win.
            let interval = score.decided.unwrap_or(Interval { low: 0.0, high: 1.0 });
            let what = format!("duels that were decided ({} tied)", score.tied);
            (interval.low, won(&what, score.won, decided, interval))
        });
        let text = one.text.zip(base.text).zip(found.text_drift(one));
        let text = text.map(|((now, before), drift)| {
            (drift, format!("loss {:.3} on ordinary text, {:.3} of the base", now.loss, before.loss))
        });
        let text = text.ok_or_else(|| "name ordinary text with --text FILE".to_owned());
        let kl = answers.clone().and_then(|(one, _)| {
            let kl = one.kl_per_token.ok_or_else(|| "let it answer with at least one token".to_owned())?;
            Ok((kl, format!("{kl:.3} nats per token of its own answers")))
        });
        let refusals = answers.clone().map(|(one, base)| rise("refuse", base.refusals.share, one.refusals.share));
        let truncated = answers.clone().map(|(one, base)| rise("are cut off", base.truncated.share, one.truncated.share));

        let softer = "train with a lower learning_rate, fewer steps or a higher beta";
        let known_preferences = preferences.ok().map(|known| (known.accuracy.successes, known.accuracy.trials));
        let known_duels = duel.ok().map(|score| (score.won, score.won + score.lost));
        let mut checks = Checks(Vec::new());
        checks.add("comparisons", self.comparisons, Rule::AtLeast, comparisons, |limit, _| {
            format!("hold out {limit:.0} comparisons or more: --held-out of `tidemill dataset build` says how large a part")
        });
        checks.add("accuracy", self.accuracy, Rule::Above, accuracy, |limit, _| {
            surer(known_preferences, limit, "held-out comparisons")
                .unwrap_or_else(|| "train on more preferences or cleaner ones (`tidemill dataset report` shows what is wrong with them), or with another learning_rate or beta".to_owned())
        });
        checks.add("win_rate", self.win_rate, Rule::Above, win_rate, |limit, _| {
            surer(known_duels, limit, "decided duels (--prompts)").unwrap_or_else(|| {
                "its answers are not judged better: train on more preferences or cleaner ones, or let another judge decide"
                    .to_owned()
            })
        });
        checks.add("text_loss", self.text_loss, Rule::AtMost, text, |_, _| {
            format!("it forgets what the base knew: {softer}, or with imitation beside it (rpo_alpha)")
        });
        checks.add("kl_per_token", self.kl_per_token, Rule::AtMost, kl, |_, _| format!("it is far from the base: {softer}"));
        checks.add("shortest", self.shortest, Rule::AtLeast, ratio(), |_, _| {
            "its answers became short: look for a length bias in `tidemill dataset report`; where short answers are wanted, lower \"shortest\"".to_owned()
        });
        checks.add("longest", self.longest, Rule::AtMost, ratio(), |_, _| {
            "its answers became long: look for a length bias in `tidemill dataset report`; where long answers are wanted, raise \"longest\"".to_owned()
        });
        checks.add("refusals", self.refusals, Rule::AtMost, refusals, |_, _| {
            "it refuses more than the base: look at the refusals among the chosen answers, and leave those out that should be none".to_owned()
        });
        checks.add("truncated", self.truncated, Rule::AtMost, truncated, |_, _| {
            format!("its answers do not end: leave out answers that were cut off, {softer}, or raise --max-tokens if they are only longer")
        });
        let samples = told().map(|known| (known.samples as f64, format!("it learnt from {} samples", known.samples)));
        checks.add("preferences", self.preferences, Rule::AtLeast, samples, |limit, value| {
            format!("collect {:.0} more", limit - value)
        });
        let raters = told().map(|known| (known.raters as f64, format!("{} people judged them", known.raters)));
        checks.add("raters", self.raters, Rule::AtLeast, raters, |limit, value| {
            format!("let {:.0} more people judge; where there are no more, lower \"raters\"", limit - value)
        });
        let share = told().map(|known| (known.rater_share, format!("{} of the loss is one rater's", percent(known.rater_share))));
        checks.add("rater_share", self.rater_share, Rule::AtMost, share, |limit, _| {
            format!("bound it with max_rater_share={limit}, or collect judgements of others")
        });
        let passed = !checks.0.is_empty() && checks.0.iter().all(|check| check.passed);
        GateReport { passed, checks: checks.0 }
    }
}

impl GateReport {
    /// One line for each gate, and one for each that is shut with what would open it.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{:5} {:13} {}", if check.passed { "open" } else { "shut" }, check.gate, check.finding);
            if let Some(change) = &check.change {
                let _ = writeln!(text, "{:19} {change}", "");
            }
        }
        let shut = self.checks.iter().filter(|check| !check.passed).count();
        let _ = match self.passed {
            true => write!(text, "pass: all {} gates are open", self.checks.len()),
            false => write!(text, "refused: {shut} of {} gates are shut", self.checks.len()),
        };
        text
    }
}

struct Checks(Vec<GateCheck>);

impl Checks {
    /// Nothing where the gate is off. `change` is told the threshold and the value.
    fn add(&mut self, gate: &str, limit: Option<f64>, rule: Rule, found: Found, change: impl FnOnce(f64, f64) -> String) {
        let Some(threshold) = limit else { return };
        let (gate, number) = (gate.to_owned(), Number(threshold));
        self.0.push(match found {
            Err(missing) => GateCheck {
                gate,
                passed: false,
                value: None,
                threshold,
                finding: "not measured".to_owned(),
                change: Some(missing),
            },
            Ok((value, words)) => {
                let (passed, wanted) = match rule {
                    Rule::AtLeast => (value >= threshold, format!("at least {number}")),
                    Rule::Above => (value > threshold, format!("above {number}")),
                    Rule::AtMost => (value <= threshold, format!("at most {number}")),
                };
                let finding = format!("{words}: {} where {wanted} is wanted", Number(value));
                let change = (!passed).then(|| change(threshold, value));
                GateCheck { gate, passed, value: Some(value), threshold, finding, change }
            }
        });
    }
}

/// A number without decimals that say nothing.
struct Number(f64);

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.fract() == 0.0 && self.0.abs() < 1e15 { write!(f, "{:.0}", self.0) } else { write!(f, "{:.3}", self.0) }
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// The share won with its interval, of which the lower end is compared.
fn won(what: &str, successes: u64, trials: u64, interval: Interval) -> String {
    format!(
        "won {successes} of {trials} {what}, with 95 % certainty {} to {}; the lower end",
        percent(interval.low),
        percent(interval.high)
    )
}

/// How many trials would make the lower end of the interval reach the threshold, if as large a share goes on being won. None where the
/// share itself is not above it.
fn surer(known: Option<(u64, u64)>, threshold: f64, what: &str) -> Option<String> {
    let (successes, trials) = known.filter(|(_, trials)| *trials > 0)?;
    let share = successes as f64 / trials as f64;
    let low = |trials: u64| wilson((share * trials as f64).floor() as u64, trials, Z95).map_or(0.0, |interval| interval.low);
    if share <= threshold || low(MOST_COMPARISONS) <= threshold {
        return None;
    }
    // The lower end grows with the number, up to the rounding of wins.
    let (mut few, mut enough) = (trials.min(MOST_COMPARISONS), MOST_COMPARISONS);
    while enough - few > 1 {
        let middle = few + (enough - few) / 2;
        if low(middle) > threshold { enough = middle } else { few = middle }
    }
    Some(format!("the share is above {}, and too few say so: about {enough} {what} would do if it stays", percent(threshold)))
}

#[cfg(test)]
mod tests;
