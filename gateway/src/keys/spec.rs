//! What an administrator says about a key, in a request or on the command line.

use crate::config::value;
use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use tidemill_store::{ApiKey, KeyTerms, Limits, MAX_WEIGHT, Money, Scope, Tier};
use uuid::Uuid;

/// Longest name of a model, in characters.
const MAX_MODEL: usize = 256;
/// Most models that a key names.
const MAX_MODELS: usize = 256;
/// The year 3000, in seconds since 1970: later is a mistake of units.
const MAX_MOMENT: i64 = 32_503_680_000;

/// What is to change of a key; what is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeySpec {
    /// What it may do.
    pub scopes: Option<Vec<Scope>>,
    /// When it ends, in microseconds since 1970; `Some(None)` is never.
    pub expires: Option<Option<i64>>,
    /// Models that it may use; `Some(None)` is all.
    pub models: Option<Option<Vec<String>>>,
    /// Over all models.
    pub limits: Option<Limits>,
    /// By model.
    pub model_limits: Option<BTreeMap<String, Limits>>,
    /// The most urgent tier.
    pub tier: Option<Tier>,
    /// Its share.
    pub weight: Option<u32>,
}

impl KeySpec {
    /// Reads the fields that a key can be made with and changed by. A field that is null goes back to what a new key has.
    pub fn parse(body: &Value, fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let is_null = |key: &str| body.get(key).is_some_and(Value::is_null);
        let usual = KeyTerms::default();
        let mut spec = Self {
            scopes: fields.get("scopes").map(|field| scopes(&field)).transpose()?,
            expires: fields.get("expires_at").map(|field| moment(&field)).transpose()?.map(Some),
            models: fields.get("models").map(|field| models(&field)).transpose()?.map(Some),
            limits: fields.get("limits").map(|field| limits(&field)).transpose()?,
            model_limits: fields.get("model_limits").map(|field| model_limits(&field)).transpose()?,
            tier: fields.get("service_tier").map(|field| tier(&field)).transpose()?,
            weight: fields.integer("weight", 1..=i64::from(MAX_WEIGHT))?.and_then(|weight| u32::try_from(weight).ok()),
        };
        for (key, reset) in [
            ("expires_at", (|spec, _| spec.expires = Some(None)) as fn(&mut Self, &KeyTerms)),
            ("models", |spec, _| spec.models = Some(None)),
            ("limits", |spec, usual| spec.limits = Some(usual.limits)),
            ("model_limits", |spec, usual| spec.model_limits = Some(usual.model_limits.clone())),
            ("service_tier", |spec, usual| spec.tier = Some(usual.tier)),
            ("weight", |spec, usual| spec.weight = Some(usual.weight)),
        ] {
            if is_null(key) {
                reset(&mut spec, &usual);
            }
        }
        Ok(spec)
    }

    /// Whether nothing is to change.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Changes the terms.
    pub fn change_terms(&self, terms: &mut KeyTerms) {
        let spec = self.clone();
        terms.models = spec.models.unwrap_or_else(|| terms.models.take());
        terms.limits = spec.limits.unwrap_or(terms.limits);
        terms.model_limits = spec.model_limits.unwrap_or_else(|| std::mem::take(&mut terms.model_limits));
        terms.tier = spec.tier.unwrap_or(terms.tier);
        terms.weight = spec.weight.unwrap_or(terms.weight);
    }

    /// Changes a key.
    pub fn change(&self, key: &mut ApiKey) {
        if let Some(scopes) = &self.scopes {
            key.scopes.clone_from(scopes);
        }
        key.expires = self.expires.unwrap_or(key.expires);
        self.change_terms(&mut key.terms);
    }
}

/// A key's name, which is also an annotator's. It is no id: whoever revokes a key by the one must not meet another by the other.
pub fn check_name(name: &str) -> Option<&str> {
    let name = name.trim();
    let fits = !name.is_empty() && name.chars().count() <= 100 && !name.chars().any(char::is_control);
    (fits && Uuid::try_parse(name).is_err()).then_some(name)
}

fn scopes(field: &Field<'_>) -> Result<Vec<Scope>, ApiError> {
    let words = Scope::ALL.map(Scope::as_str);
    let one = |(index, value)| {
        let word = field.item(index, value).one_of(&words)?;
        word.parse().map_err(|_| ApiError::fault("a scope has no word"))
    };
    let mut scopes = field.filled_array(words.len())?.iter().enumerate().map(one).collect::<Result<Vec<Scope>, _>>()?;
    scopes.sort();
    scopes.dedup();
    Ok(scopes)
}

fn moment(field: &Field<'_>) -> Result<i64, ApiError> {
    Ok(field.integer(0..=MAX_MOMENT)? * 1_000_000)
}

fn models(field: &Field<'_>) -> Result<Vec<String>, ApiError> {
    let items = field.filled_array(MAX_MODELS)?.iter().enumerate();
    items.map(|(index, value)| Ok(field.item(index, value).short_string(MAX_MODEL)?.to_owned())).collect()
}

fn tier(field: &Field<'_>) -> Result<Tier, ApiError> {
    let word = field.one_of(&Tier::ALL.map(Tier::as_str))?;
    Ok(Tier::ALL.into_iter().find(|tier| tier.as_str() == word).unwrap_or_default())
}

fn limits(field: &Field<'_>) -> Result<Limits, ApiError> {
    let mut fields = field.object()?;
    let mut count = |key: &'static str| -> Result<Option<u32>, ApiError> {
        Ok(fields.integer(key, 0..=i64::from(u32::MAX))?.and_then(|count| u32::try_from(count).ok()))
    };
    let mut limits = Limits {
        requests_per_minute: count("requests_per_minute")?,
        input_tokens_per_minute: count("input_tokens_per_minute")?,
        output_tokens_per_minute: count("output_tokens_per_minute")?,
        concurrent: count("concurrent")?,
        cost_per_day: None,
    };
    if let Some(cost) = fields.get("cost_per_day") {
        limits.cost_per_day = Money::of_dollars(cost.double(0.0..=1e9)?);
    }
    fields.finish()?;
    Ok(limits)
}

fn model_limits(field: &Field<'_>) -> Result<BTreeMap<String, Limits>, ApiError> {
    let map = field.map()?;
    if map.len() > MAX_MODELS {
        let why = format!("too many properties. Expected an object with at most {MAX_MODELS} properties, but got {}.", map.len());
        return Err(field.invalid("object_above_max_properties", why));
    }
    map.iter().map(|(model, value)| Ok((model.clone(), limits(&field.entry(model, value))?))).collect()
}

/// Puts `requests_per_minute=60` into the limits, as the command line and the configuration have it.
pub fn set_limit(limits: &mut Limits, name: &str, text: &str) -> Result<(), String> {
    let count = || text.replace('_', "").parse::<u32>().map_err(|_| "expected a whole number of at least 0".to_owned());
    match name {
        "requests_per_minute" => limits.requests_per_minute = Some(count()?),
        "input_tokens_per_minute" => limits.input_tokens_per_minute = Some(count()?),
        "output_tokens_per_minute" => limits.output_tokens_per_minute = Some(count()?),
        "concurrent" => limits.concurrent = Some(count()?),
        "cost_per_day" => limits.cost_per_day = Some(dollars(text)?),
        _ => return Err(format!("expected one of {}", LIMITS.join(", "))),
    }
    Ok(())
}

/// The names of all limits.
pub const LIMITS: [&str; 5] =
    ["requests_per_minute", "input_tokens_per_minute", "output_tokens_per_minute", "concurrent", "cost_per_day"];

/// An amount of money: `12.50` or `$12.50`.
pub fn dollars(text: &str) -> Result<Money, String> {
    let number = text.trim_start_matches('$').replace('_', "").parse().ok();
    number.and_then(Money::of_dollars).ok_or_else(|| "expected an amount of dollars such as 12.50".to_owned())
}

/// `90d`, `12h`, `30m`, `45s` from `now` (microseconds since 1970) as a moment; `never` is none.
pub fn parse_moment(text: &str, now: i64) -> Result<Option<i64>, String> {
    if text == "never" {
        return Ok(None);
    }
    let span = span(text).map_err(|_| "expected a time such as 90d, 12h or 30m, or `never`".to_owned())?;
    Ok(Some(now.saturating_add(i64::try_from(span.as_micros()).unwrap_or(i64::MAX))))
}

/// A time that may be short or long.
pub fn span(text: &str) -> Result<Duration, String> {
    value::duration(text).or_else(|_| value::age(text)).map_err(|_| "expected a time such as 24h, 7d or 30m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(body: &Value) -> Result<KeySpec, ApiError> {
        let mut fields = Fields::root(body)?;
        let spec = KeySpec::parse(body, &mut fields)?;
        fields.finish()?;
        Ok(spec)
    }

    #[test]
    fn what_is_not_said_stays_and_null_goes_back_to_the_usual() {
        let mut terms = KeyTerms {
            models: Some(vec!["a".into()]),
            limits: Limits { concurrent: Some(1), ..Limits::default() },
            weight: 7,
            ..KeyTerms::default()
        };
        parse(&json!({"weight": 9})).unwrap().change_terms(&mut terms);
        assert_eq!(
            (terms.weight, terms.limits.concurrent, terms.models.as_deref()),
            (9, Some(1), Some(["a".to_owned()].as_slice()))
        );
        parse(&json!({"models": null, "weight": null, "limits": {"cost_per_day": 1.5}})).unwrap().change_terms(&mut terms);
        assert_eq!((terms.weight, &terms.models), (1, &None));
        assert_eq!(terms.limits, Limits { cost_per_day: Some(Money(1_500_000_000)), ..Limits::default() });
        assert!(parse(&json!({})).unwrap().is_empty());
        assert_eq!(parse(&json!({"expires_at": null})).unwrap().expires, Some(None));
        assert_eq!(parse(&json!({"expires_at": 2_000_000_000})).unwrap().expires, Some(Some(2_000_000_000_000_000)));
    }

    #[test]
    fn each_rejection_names_its_path() {
        for (body, param) in [
            (json!({"scopes": ["chat", "root"]}), "scopes.1"),
            (json!({"scopes": []}), "scopes"),
            (json!({"expires_at": 1_700_000_000_000_i64}), "expires_at"),
            (json!({"models": [1]}), "models.0"),
            (json!({"limits": {"concurrent": -1}}), "limits.concurrent"),
            (json!({"limits": {"cost_per_day": -1}}), "limits.cost_per_day"),
            (json!({"limits": {"per_minute": 1}}), "limits.per_minute"),
            (json!({"model_limits": {"m": {"concurrent": "x"}}}), "model_limits.m.concurrent"),
            (json!({"service_tier": "auto"}), "service_tier"),
            (json!({"weight": 0}), "weight"),
        ] {
            assert_eq!(parse(&body).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn a_name_is_short_visible_and_no_id() {
        assert_eq!(check_name(" ann "), Some("ann"));
        for bad in ["", "a\u{7}b", "0198c0de-0000-7000-8000-000000000000"] {
            assert_eq!(check_name(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn limits_and_times_are_read_from_words() {
        let mut limits = Limits::default();
        for (name, text) in [("requests_per_minute", "1_000"), ("cost_per_day", "$0.50"), ("concurrent", "0")] {
            set_limit(&mut limits, name, text).unwrap();
        }
        let expected = Limits {
            requests_per_minute: Some(1000),
            cost_per_day: Some(Money(500_000_000)),
            concurrent: Some(0),
            ..Limits::default()
        };
        assert_eq!(limits, expected);
        assert!(set_limit(&mut limits, "requests", "1").unwrap_err().contains("requests_per_minute"));
        assert!(set_limit(&mut limits, "concurrent", "-1").is_err());
        assert_eq!(parse_moment("never", 5), Ok(None));
        assert_eq!(parse_moment("2s", 5), Ok(Some(2_000_005)));
        assert_eq!(parse_moment("90d", 0), Ok(Some(90 * 86_400_000_000)));
        assert!(parse_moment("soon", 0).is_err());
    }
}
