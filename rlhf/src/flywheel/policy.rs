//! What an operator decided beforehand: when a cycle begins, on what, how it learns, what it must pass, and how it is rolled out.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dataset::Query;
use crate::evaluate::Gates;
use crate::quality::Thresholds;
use crate::reward::RewardFunction;

/// A day, in microseconds.
const DAY: i64 = 86_400_000_000;
/// How long after its time of day a cycle may still begin, in microseconds: at night means at night, also when the last judgement that was
/// missing comes at noon.
const LATE: i64 = 3_600_000_000;

/// Everything that a loop is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// The public model name whose traffic the adapter is to win.
    pub model: String,
    /// The base model that learns.
    pub base: String,
    /// What its snapshots are called.
    pub dataset: String,
    /// When a cycle begins.
    pub when: When,
    /// Which feedback becomes rows. Its end is the cycle's beginning.
    pub feedback: Query,
    /// Only feedback of so many seconds before the cycle, where that is wanted.
    pub window: Option<u64>,
    /// What the snapshot's report must say.
    pub quality: QualityRule,
    /// How it learns: a method in the form of the fine-tuning API.
    pub recipe: Value,
    /// How the adapter is measured.
    pub measuring: Measuring,
    /// What it must pass.
    pub gates: Gates,
    /// How it is rolled out: a rollout's specification without name, model and arms, which are the cycle's.
    pub rollout: Value,
}

/// When a cycle begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct When {
    /// At so many new judgements of the kinds that the query takes.
    pub preferences: u64,
    /// From so many people.
    pub raters: u64,
    /// At this time of day.
    pub at: Option<TimeOfDay>,
    /// Whether the numbers and the time must both be there.
    pub need: Need,
}

/// How conditions go together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Need {
    /// At the time of day, if the numbers are there.
    #[default]
    All,
    /// When the numbers are there, or at the time of day if there is anything new.
    Any,
}

/// Minutes since midnight, universal time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct TimeOfDay(u32);

/// What the quality report of a snapshot must say. A tainted snapshot passes nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QualityRule {
    /// Checks that may fail: where short answers are what people want, length predicts the labels, and rightly.
    pub allow: Vec<String>,
    /// A check that only warns stops the cycle, too.
    pub strict: bool,
    /// When checks warn and fail.
    pub thresholds: Thresholds,
}

/// How an adapter is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measuring {
    /// A file of ordinary text.
    pub text: Option<String>,
    /// Prompts that are answered.
    pub prompts: usize,
    /// Longest answer, in tokens.
    pub max_tokens: usize,
    /// Temperature of answers.
    pub temperature: f32,
    /// Of the draws.
    pub seed: u64,
    /// Who decides the duel with the base.
    pub rules: Vec<RewardFunction>,
    /// A factor for each rule.
    pub weights: Option<Vec<f64>>,
    /// Cycles whose reports stay.
    #[serde(default = "kept")]
    pub keep: u64,
}

/// Unless it is said.
fn kept() -> u64 {
    Measuring::KEEP
}

impl Measuring {
    /// Cycles whose reports stay, unless it is said.
    pub const KEEP: u64 = 20;
}

/// New judgements, and how many people gave them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Judgements.
    pub preferences: u64,
    /// People.
    pub raters: u64,
}

/// How far a loop is from its next cycle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is there.
    pub have: Counts,
    /// What is wanted.
    pub need: Counts,
    /// The time of day that is waited for.
    pub at: Option<TimeOfDay>,
}

impl TimeOfDay {
    /// `03:00`, in universal time.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no time of day; write hours and minutes in universal time, such as \"03:00\"");
        let (hours, minutes) = text.split_once(':').ok_or_else(wrong)?;
        let part = |part: &str, below: u32| {
            let number: u32 = part.parse().ok().filter(|_| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_digit()))?;
            (number < below).then_some(number)
        };
        Ok(Self(part(hours, 24).zip(part(minutes, 60)).map(|(hours, minutes)| 60 * hours + minutes).ok_or_else(wrong)?))
    }

    /// The last time that it was so late, in microseconds since 1970.
    fn last(self, now: i64) -> i64 {
        let at = i64::from(self.0) * 60_000_000;
        (now - at).div_euclid(DAY) * DAY + at
    }
}

impl std::fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

impl From<TimeOfDay> for String {
    fn from(time: TimeOfDay) -> Self {
        time.to_string()
    }
}

impl TryFrom<String> for TimeOfDay {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl When {
    /// Why a cycle begins now, if one does. `since` is when the loop began to wait, in microseconds since 1970.
    pub fn due(&self, have: Counts, since: i64, now: i64) -> Option<String> {
        let numbers = have.preferences >= self.preferences && have.raters >= self.raters;
        let counted = || format!("{} new judgements of {} people", have.preferences, have.raters);
        let Some(at) = self.at else { return numbers.then(counted) };
        let last = at.last(now);
        let time = last > since && now - last < LATE;
        match self.need {
            Need::All => (numbers && time).then(|| format!("{} at {at}", counted())),
            Need::Any if numbers => Some(counted()),
            Need::Any => (time && have.preferences > 0).then(|| format!("it is {at}, and there are {}", counted())),
        }
    }

    /// How far it is.
    pub fn progress(&self, have: Counts) -> Progress {
        Progress { have, need: Counts { preferences: self.preferences, raters: self.raters }, at: self.at }
    }
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { have, need, at } = self;
        write!(f, "{} of {} new judgements, of {} of {} people", have.preferences, need.preferences, have.raters, need.raters)?;
        at.map_or(Ok(()), |at| write!(f, "; at {at} universal time"))
    }
}

impl Policy {
    /// The query of a cycle that began at `started`, microseconds since 1970: over all feedback before, so that whoever asks again later gets
    /// the same.
    pub fn query(&self, started: i64) -> Query {
        let until = self.feedback.until.map_or(started, |until| until.min(started));
        let back = self.window.map(|seconds| started - i64::try_from(seconds).unwrap_or(0) * 1_000_000);
        Query { since: back.or(self.feedback.since), until: Some(until), ..self.feedback.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Midnight of a day.
    const MIDNIGHT: i64 = 20_000 * DAY;
    const HOUR: i64 = 3_600_000_000;

    fn counts(preferences: u64, raters: u64) -> Counts {
        Counts { preferences, raters }
    }

    #[test]
    fn times_of_day_are_hours_and_minutes() {
        assert_eq!(TimeOfDay::parse("03:05").unwrap().to_string(), "03:05");
        assert_eq!(TimeOfDay::parse("23:59"), Ok(TimeOfDay(1439)));
        for wrong in ["", "3:00", "24:00", "12:60", "+1:00", "03:00:00", "noon", "03-00", "0é:00"] {
            assert!(TimeOfDay::parse(wrong).unwrap_err().contains("03:00"), "{wrong}");
        }
    }

    #[test]
    fn enough_judgements_of_enough_people_begin_a_cycle() {
        let when = When { preferences: 10, raters: 3, at: None, need: Need::All };
        assert_eq!(when.due(counts(9, 5), 0, 1), None);
        assert_eq!(when.due(counts(50, 2), 0, 1), None, "one person must not begin it alone");
        assert_eq!(when.due(counts(10, 3), 0, 1).unwrap(), "10 new judgements of 3 people");
        assert_eq!(when.progress(counts(4, 1)).to_string(), "4 of 10 new judgements, of 1 of 3 people");
    }

    #[test]
    fn at_night_means_at_night_and_once() {
        let at = Some(TimeOfDay(180));
        let when = When { preferences: 10, raters: 1, at, need: Need::All };
        let (evening, night) = (MIDNIGHT - 2 * HOUR, MIDNIGHT + 3 * HOUR);
        let due = |have, since, now| when.due(have, since, now).is_some();
        assert!(!due(counts(10, 1), evening, night - 1));
        assert!(due(counts(10, 1), evening, night) && due(counts(10, 1), evening, night + HOUR - 1));
        assert!(!due(counts(9, 1), evening, night));
        assert!(!due(counts(10, 1), evening, night + HOUR), "what comes in the morning waits for the next night");
        assert!(!due(counts(10, 1), night + 1, night + HOUR / 2), "a cycle that ended after it waits for the next night");
        assert!(due(counts(10, 1), night + 1, night + DAY));
    }

    #[test]
    fn any_takes_what_comes_first_and_never_begins_with_nothing() {
        let when = When { preferences: 10, raters: 1, at: Some(TimeOfDay(180)), need: Need::Any };
        let (evening, night) = (MIDNIGHT - 2 * HOUR, MIDNIGHT + 3 * HOUR);
        assert!(when.due(counts(10, 1), evening, evening + 1).is_some());
        assert!(when.due(counts(1, 1), evening, night).unwrap().starts_with("it is 03:00"));
        assert_eq!(when.due(counts(0, 0), evening, night), None);
        assert_eq!(when.due(counts(1, 1), evening, night - 1), None);
    }
}
