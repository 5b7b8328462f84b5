//! A metric of a rollout and the condition that it must meet.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use crate::rollout::spec::Kind;
use serde::{Deserialize, Serialize};

/// Longest name of a judge, a reward model or a declared metric.
const MAX_NAME: usize = 100;
/// Observations that a metric must have in an arm before it says something, unless said.
const MIN_SAMPLES: u64 = 50;
/// Most measurements in a row that may be inconclusive, unless said.
const INCONCLUSIVE_LIMIT: u32 = 3;
/// Share of an arm's answers that the base scores, unless said.
const SCORED: f64 = 0.25;
const QUANTITIES: [&str; 7] =
    ["error_rate", "refusal_rate", "truncation_rate", "output_tokens", "kl_to_base", "logprob_to_base", "comparison"];
const QUANTILES: [(&str, f64); 3] =
    [("time_to_first_token_p50", 0.5), ("time_to_first_token_p95", 0.95), ("time_to_first_token_p99", 0.99)];

/// What is measured, and what of it decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// What is measured.
    pub quantity: Quantity,
    /// What its condition decides.
    pub role: Role,
    /// What must hold.
    pub condition: Condition,
    /// Measured and judged, and nothing follows.
    pub dry_run: bool,
    /// Observations in each arm before it says something.
    pub min_samples: u64,
    /// Measurements that may fail before the rollout is rolled back.
    pub failure_limit: u32,
    /// Measurements in a row that may be inconclusive before the rollout pauses.
    pub inconclusive_limit: u32,
    /// Share of the answers that are scored, where the base does.
    #[serde(default)]
    pub share: Option<f64>,
}

/// What is measured of an arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Quantity {
    /// Share of requests that ended in an error.
    ErrorRate,
    /// A quantile of the seconds from a request to its first token.
    TimeToFirstToken(f64),
    /// Share of answers that refuse.
    RefusalRate,
    /// Share of answers that were cut off at their limit.
    TruncationRate,
    /// Tokens of an answer.
    OutputTokens,
    /// Kullback-Leibler divergence from the base model, nats per token.
    KlToBase,
    /// The base model's mean log-probability of an answer's tokens.
    LogprobToBase,
    /// Share of thumbs that are up.
    Thumb,
    /// Ratings from 0 to 1.
    Rating,
    /// A declared feedback metric.
    Feedback(String),
    /// A judge's score.
    Judge(String),
    /// A reward model's score.
    Reward(String),
    /// Which of two answers people preferred.
    Comparison,
}

impl std::fmt::Display for Quantity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ErrorRate => f.write_str("error_rate"),
            Self::TimeToFirstToken(at) => {
                f.write_str(QUANTILES.iter().find(|(_, quantile)| quantile == at).map_or(QUANTILES[2].0, |(name, _)| name))
            }
            Self::RefusalRate => f.write_str("refusal_rate"),
            Self::TruncationRate => f.write_str("truncation_rate"),
            Self::OutputTokens => f.write_str("output_tokens"),
            Self::KlToBase => f.write_str("kl_to_base"),
            Self::LogprobToBase => f.write_str("logprob_to_base"),
            Self::Thumb => f.write_str("feedback.thumb"),
            Self::Rating => f.write_str("feedback.rating"),
            Self::Feedback(name) => write!(f, "feedback.metric.{name}"),
            Self::Judge(name) => write!(f, "judge.{name}"),
            Self::Reward(name) => write!(f, "reward.{name}"),
            Self::Comparison => f.write_str("comparison"),
        }
    }
}

impl From<Quantity> for String {
    fn from(quantity: Quantity) -> Self {
        quantity.to_string()
    }
}

impl TryFrom<String> for Quantity {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::read(&text).ok_or_else(|| format!("`{text}` is no metric"))
    }
}

impl Quantity {
    fn read(text: &str) -> Option<Self> {
        if let Some((_, at)) = QUANTILES.iter().find(|(name, _)| *name == text) {
            return Some(Self::TimeToFirstToken(*at));
        }
        let named = |prefix: &str| {
            text.strip_prefix(prefix).filter(|name| !name.is_empty() && name.chars().count() <= MAX_NAME).map(str::to_owned)
        };
        Some(match text {
            "error_rate" => Self::ErrorRate,
            "refusal_rate" => Self::RefusalRate,
            "truncation_rate" => Self::TruncationRate,
            "output_tokens" => Self::OutputTokens,
            "kl_to_base" => Self::KlToBase,
            "logprob_to_base" => Self::LogprobToBase,
            "feedback.thumb" => Self::Thumb,
            "feedback.rating" => Self::Rating,
            "comparison" => Self::Comparison,
            _ => named("feedback.metric.")
                .map(Self::Feedback)
                .or_else(|| named("judge.").map(Self::Judge))
                .or_else(|| named("reward.").map(Self::Reward))?,
        })
    }

    fn parse(field: &Field<'_>) -> Result<Self, ApiError> {
        let text = field.string()?;
        Self::read(text).ok_or_else(|| {
            let mut known = QUANTITIES.to_vec();
            known.extend(QUANTILES.map(|(name, _)| name));
            known.extend(["feedback.thumb", "feedback.rating", "feedback.metric.NAME", "judge.NAME", "reward.NAME"]);
            field.unknown_value(text, &known)
        })
    }

    /// Whether it is a share, from 0 to 1.
    pub fn is_share(&self) -> bool {
        matches!(self, Self::ErrorRate | Self::RefusalRate | Self::TruncationRate | Self::Thumb | Self::Rating | Self::Comparison)
    }

    /// Whether the base model must have scored the answers.
    pub fn needs_base(&self) -> bool {
        matches!(self, Self::KlToBase | Self::LogprobToBase)
    }

    /// Whether people must have seen the answers.
    pub fn needs_people(&self) -> bool {
        matches!(self, Self::Thumb | Self::Rating | Self::Feedback(_))
    }
}

/// What a metric's condition decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Rolls back when it is surely broken.
    Guardrail,
    /// Promotes when it is surely met, rolls back when it is surely not.
    Goal,
}

/// Bounds that must hold; at least one is there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    /// Of what.
    pub of: Of,
    /// At least.
    pub min: Option<f64>,
    /// At most.
    pub max: Option<f64>,
}

/// What a condition is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Of {
    /// The arm's own value.
    Value,
    /// The arm's value less the control's.
    Difference,
    /// The difference as a share of the control's value.
    Relative,
}

impl Condition {
    /// Whether a value meets it.
    pub fn holds(&self, value: f64) -> bool {
        self.min.is_none_or(|min| value >= min) && self.max.is_none_or(|max| value <= max)
    }
}

impl Metric {
    /// What it is called in a rollout: guardrails and goals of the same quantity are two metrics.
    pub fn name(&self) -> String {
        match self.role {
            Role::Guardrail => self.quantity.to_string(),
            Role::Goal => format!("goal {}", self.quantity),
        }
    }

    /// Share of an arm's answers that the base scores for it; 0 for a metric or an arm that it is not needed for. The control is scored
    /// where it is compared with.
    pub fn scored(&self, arm: usize) -> f64 {
        let needed = self.quantity.needs_base() && (arm > 0 || self.condition.of != Of::Value);
        if needed { self.share.unwrap_or(SCORED) } else { 0.0 }
    }

    /// An entry of `metrics`.
    pub(super) fn parse(field: &Field<'_>, kind: Kind) -> Result<Self, ApiError> {
        let mut fields = field.object()?;
        let named = fields.require("metric")?;
        let quantity = Quantity::parse(&named)?;
        let (role, condition) = match (fields.get("guardrail"), fields.get("goal")) {
            (Some(guardrail), None) => (Role::Guardrail, guardrail),
            (None, Some(goal)) => (Role::Goal, goal),
            (Some(_), Some(goal)) => {
                return Err(goal.invalid("invalid_value", "a metric is a guardrail or a goal. Give it twice to have both."));
            }
            (None, None) => return Err(without_condition(field, "guardrail", &quantity)),
        };
        let condition = Condition::parse(&condition, role, &quantity, kind)?;
        let dry_run = fields.bool_or("dry_run", false)?;
        let min_samples = fields.integer("min_samples", 1..=1_000_000_000)?.map_or(MIN_SAMPLES, i64::unsigned_abs);
        let failure_limit = limit(&mut fields, "failure_limit", 0)?;
        let inconclusive_limit = limit(&mut fields, "inconclusive_limit", INCONCLUSIVE_LIMIT)?;
        let share = match fields.get("share") {
            Some(field) if !quantity.needs_base() => {
                let why = "only what the base model scores has a share: 'kl_to_base' and 'logprob_to_base'. Leave it out.";
                return Err(field.invalid("invalid_value", why));
            }
            Some(field) => Some(field.double(0.001..=1.0)?),
            None => None,
        };
        fields.finish()?;
        if kind == Kind::Shadow && quantity.needs_people() {
            return Err(named.invalid("invalid_value", "nobody sees the answers of a shadow, so there is no feedback on them."));
        }
        if kind != Kind::Interleaved && quantity == Quantity::Comparison {
            let why = "only an interleaved rollout shows two answers to one user. Set kind to 'interleaved'.";
            return Err(named.invalid("invalid_value", why));
        }
        Ok(Self { quantity, role, condition, dry_run, min_samples, failure_limit, inconclusive_limit, share })
    }
}

fn limit(fields: &mut Fields<'_>, key: &'static str, default: u32) -> Result<u32, ApiError> {
    Ok(fields.integer(key, 0..=10_000)?.and_then(|limit| u32::try_from(limit).ok()).unwrap_or(default))
}

fn without_condition(field: &Field<'_>, role: &str, quantity: &Quantity) -> ApiError {
    let example = if role == "guardrail" { "{\"max\": 0.02}" } else { "{\"of\": \"difference\", \"min\": 0}" };
    let why = format!(
        "the metric '{quantity}' has no condition, so nothing could follow from it. Give 'min' or 'max' in '{role}', such as {example}."
    );
    field.invalid("missing_required_parameter", why)
}

impl Condition {
    fn parse(field: &Field<'_>, role: Role, quantity: &Quantity, kind: Kind) -> Result<Self, ApiError> {
        let mut fields = field.object()?;
        let of = match fields.get("of") {
            None if role == Role::Guardrail || *quantity == Quantity::Comparison => Of::Value,
            None => Of::Difference,
            Some(of) => {
                let chosen = match of.one_of(&["value", "difference", "relative"])? {
                    "difference" => Of::Difference,
                    "relative" => Of::Relative,
                    _ => Of::Value,
                };
                if *quantity == Quantity::Comparison && chosen != Of::Value {
                    return Err(of.invalid("invalid_value", "a comparison is with the control already. Leave 'of' out."));
                }
                if kind == Kind::Bandit && role == Role::Goal && chosen != Of::Difference {
                    return Err(of.invalid("invalid_value", "a bandit's arms are compared by their difference. Leave 'of' out."));
                }
                chosen
            }
        };
        let range = match of {
            Of::Value if quantity.is_share() => 0.0..=1.0,
            Of::Difference if quantity.is_share() => -1.0..=1.0,
            Of::Relative => -1.0..=1e6,
            _ => -1e12..=1e12,
        };
        let (low, high) = (fields.get("min"), fields.get("max"));
        let min = low.as_ref().map(|bound| bound.double(range.clone())).transpose()?;
        let max = high.as_ref().map(|bound| bound.double(range)).transpose()?;
        fields.finish()?;
        let name = if role == Role::Guardrail { "guardrail" } else { "goal" };
        match (min, max) {
            (None, None) => return Err(without_condition(field, name, quantity)),
            (Some(min), Some(max)) if min > max => {
                return Err(field.invalid("invalid_value", format!("min {min} is above max {max}, so nothing could meet it.")));
            }
            (Some(_), Some(_)) if role == Role::Goal => {
                return Err(field.invalid("invalid_value", "a goal has one direction. Give 'min' or 'max', not both."));
            }
            _ => {}
        }
        if role == Role::Goal && matches!(quantity, Quantity::TimeToFirstToken(_)) {
            let why = "a quantile has no test that holds at all times. Make it a guardrail.";
            return Err(field.invalid("invalid_value", why));
        }
        Ok(Self { of, min, max })
    }
}
