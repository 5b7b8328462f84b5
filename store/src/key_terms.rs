//! What a key is granted beside its scopes: which models, how much of them, how urgently.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;

/// Billionths of a dollar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(pub i64);

impl Money {
    /// Of an amount in dollars, to the nearest billionth; `None` when it is negative, no number, or beyond nine billion.
    pub fn of_dollars(dollars: f64) -> Option<Self> {
        let nano = (dollars * 1e9).round();
        (0.0..9.0e18).contains(&nano).then_some(Self(nano as i64))
    }

    /// In dollars.
    pub fn dollars(self) -> f64 {
        self.0 as f64 / 1e9
    }
}

impl std::fmt::Display for Money {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "${}", self.dollars())
    }
}

impl Serialize for Money {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.dollars())
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let dollars = f64::deserialize(deserializer)?;
        Self::of_dollars(dollars).ok_or_else(|| serde::de::Error::custom("an amount is a positive number of dollars"))
    }
}

/// Bounds on use. `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Requests that begin.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_tokens_per_minute: Option<u32>,
    /// Generated tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_tokens_per_minute: Option<u32>,
    /// Requests that are being answered at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent: Option<u32>,
    /// By the price table, each day of universal time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_per_day: Option<Money>,
}

/// How urgent a request is. The order is that of urgency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Before all others.
    Priority,
    /// As everybody.
    #[default]
    Default,
    /// When nobody else wants to run.
    Flex,
}

impl Tier {
    /// All of them, the most urgent first.
    pub const ALL: [Self; 3] = [Self::Priority, Self::Default, Self::Flex];

    /// As `service_tier` has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Priority => "priority",
            Self::Default => "default",
            Self::Flex => "flex",
        }
    }
}

/// The largest share.
pub const MAX_WEIGHT: u32 = 100;

/// What a key is granted beside its scopes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyTerms {
    /// Models that it may use; `None` is all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// Over all models together.
    pub limits: Limits,
    /// Beside that, by model.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub model_limits: BTreeMap<String, Limits>,
    /// The most urgent tier that it may have, and has when its requests name none.
    pub tier: Tier,
    /// Its share of a full engine beside other keys, 1 to [`MAX_WEIGHT`].
    pub weight: u32,
}

impl Default for KeyTerms {
    fn default() -> Self {
        Self { models: None, limits: Limits::default(), model_limits: BTreeMap::new(), tier: Tier::Default, weight: 1 }
    }
}

impl KeyTerms {
    /// Whether it may use this model.
    pub fn allows_model(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.iter().any(|allowed| allowed == model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_exact_to_a_billionth_and_never_negative() {
        assert_eq!(Money::of_dollars(0.15), Some(Money(150_000_000)));
        assert_eq!(serde_json::to_string(&Money(1)).unwrap(), "1e-9");
        assert_eq!(serde_json::from_str::<Money>("12.5").unwrap(), Money(12_500_000_000));
        for bad in [-0.5, f64::NAN, f64::INFINITY, 1e10] {
            assert_eq!(Money::of_dollars(bad), None, "{bad}");
        }
    }

    #[test]
    fn terms_from_before_a_field_was_there_are_read() {
        let terms: KeyTerms = serde_json::from_str(r#"{"limits":{"concurrent":3}}"#).unwrap();
        assert_eq!((terms.limits.concurrent, terms.weight, terms.tier), (Some(3), 1, Tier::Default));
        assert!(terms.allows_model("any"));
        let some = KeyTerms { models: Some(vec!["a".into()]), ..terms };
        assert!(some.allows_model("a") && !some.allows_model("ab"));
        assert_eq!(serde_json::from_str::<KeyTerms>(&serde_json::to_string(&some).unwrap()).unwrap(), some);
    }
}
