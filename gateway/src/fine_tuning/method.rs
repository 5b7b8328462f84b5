//! How a job trains: the method and its hyperparameters, in the form of the API.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::{Value, json};

/// Rows of a step, at most.
const BATCH_SIZE: std::ops::RangeInclusive<i64> = 1..=256;
/// Times that each row is seen.
const EPOCHS: std::ops::RangeInclusive<i64> = 1..=50;
/// Largest factor of the learning rate.
const MAX_MULTIPLIER: f64 = 100.0;
/// Largest β of DPO.
const MAX_BETA: f64 = 2.0;

/// What is learnt from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Answers to imitate.
    Supervised,
    /// Pairs of answers.
    Dpo,
}

impl Kind {
    /// The word of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Supervised => "supervised",
            Self::Dpo => "dpo",
        }
    }
}

/// Numbers that a client may set; `None` is `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Hyperparameters {
    /// Rows of a step.
    pub batch_size: Option<u32>,
    /// Factor of the method's own learning rate.
    pub learning_rate_multiplier: Option<f64>,
    /// Times that each row is seen.
    pub n_epochs: Option<u32>,
    /// How strongly DPO holds the model to its base.
    pub beta: Option<f64>,
}

/// A method with its hyperparameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Method {
    /// Which.
    pub kind: Kind,
    /// Its numbers.
    pub hyperparameters: Hyperparameters,
}

impl Method {
    /// Reads `method`, or the older `hyperparameters` beside it.
    pub fn parse(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let older = fields.get("hyperparameters");
        let Some(field) = fields.get("method") else {
            let hyperparameters = older.map(|field| numbers(&field, Kind::Supervised)).transpose()?.unwrap_or_default();
            return Ok(Self { kind: Kind::Supervised, hyperparameters });
        };
        let mut method = field.object()?;
        let name = method.require("type")?;
        let kind = match name.one_of(&["supervised", "dpo", "reinforcement"])? {
            "supervised" => Kind::Supervised,
            "dpo" => Kind::Dpo,
            _ => {
                return Err(
                    name.unsupported("is 'reinforcement', which this server cannot train yet; use 'supervised' or 'dpo'.")
                );
            }
        };
        let mut hyperparameters = None;
        for (key, of) in [("supervised", Some(Kind::Supervised)), ("dpo", Some(Kind::Dpo)), ("reinforcement", None)] {
            let Some(field) = method.get(key) else { continue };
            if of != Some(kind) {
                return Err(field.invalid("invalid_value", format!("the method's type is '{}'; leave this out.", kind.as_str())));
            }
            let mut of_method = field.object()?;
            hyperparameters = of_method.get("hyperparameters").map(|field| numbers(&field, kind)).transpose()?;
            of_method.finish()?;
        }
        method.finish()?;
        if let Some(older) = older {
            // Both at once, as some clients send them, when they can only mean one thing.
            let older_numbers = numbers(&older, kind)?;
            if hyperparameters.is_some_and(|numbers| numbers != older_numbers) {
                return Err(older.invalid("invalid_value", "'method' says something else; leave this out."));
            }
            hyperparameters = Some(older_numbers);
        }
        Ok(Self { kind, hyperparameters: hyperparameters.unwrap_or_default() })
    }

    /// Reads what [`Method::to_json`] wrote.
    pub fn stored(method: &Value) -> Result<Self, ApiError> {
        let body = json!({ "method": method });
        Self::parse(&mut Fields::root(&body)?)
    }

    /// In the form of the API.
    pub fn to_json(&self) -> Value {
        let mut numbers = self.common();
        if self.kind == Kind::Dpo {
            numbers["beta"] = shown(self.hyperparameters.beta);
        }
        json!({ "type": self.kind.as_str(), self.kind.as_str(): { "hyperparameters": numbers } })
    }

    /// The hyperparameters that every method has.
    pub fn common(&self) -> Value {
        let Hyperparameters { batch_size, learning_rate_multiplier, n_epochs, .. } = self.hyperparameters;
        json!({
            "batch_size": shown(batch_size),
            "learning_rate_multiplier": shown(learning_rate_multiplier),
            "n_epochs": shown(n_epochs),
        })
    }

    /// With numbers where it said `auto`: steps of 0.2 % of the rows, but 4 to 32; as many epochs as make a hundred steps, but 3 to 10.
    pub fn resolved(&self, rows: usize) -> Self {
        let rows = u32::try_from(rows).unwrap_or(u32::MAX).max(1);
        let asked = self.hyperparameters;
        let batch_size = asked.batch_size.unwrap_or_else(|| (rows / 500).clamp(4, 32)).min(rows);
        let n_epochs = asked.n_epochs.unwrap_or_else(|| (batch_size.saturating_mul(100)).div_ceil(rows).clamp(3, 10));
        let hyperparameters = Hyperparameters {
            batch_size: Some(batch_size),
            learning_rate_multiplier: Some(asked.learning_rate_multiplier.unwrap_or(1.0)),
            n_epochs: Some(n_epochs),
            beta: (self.kind == Kind::Dpo).then(|| asked.beta.unwrap_or(0.1)),
        };
        Self { kind: self.kind, hyperparameters }
    }

    /// Steps over `rows` rows, once resolved.
    pub fn steps(&self, rows: usize) -> u64 {
        let Hyperparameters { batch_size, n_epochs, .. } = self.hyperparameters;
        (rows as u64).div_ceil(u64::from(batch_size.unwrap_or(1))) * u64::from(n_epochs.unwrap_or(1))
    }
}

fn shown(number: Option<impl Into<Value>>) -> Value {
    number.map_or_else(|| "auto".into(), Into::into)
}

fn numbers(field: &Field<'_>, kind: Kind) -> Result<Hyperparameters, ApiError> {
    let mut fields = field.object()?;
    let mut get = |key| fields.get(key).filter(|field| field.value != "auto");
    let count = |field: Field<'_>, range| field.integer(range).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
    let positive = |field: Field<'_>, max| {
        let number = field.double(0.0..=max)?;
        if number > 0.0 { Ok(number) } else { Err(field.invalid("decimal_below_min_value", "expected a number above 0.")) }
    };
    let numbers = Hyperparameters {
        batch_size: get("batch_size").map(|field| count(field, BATCH_SIZE)).transpose()?,
        learning_rate_multiplier: get("learning_rate_multiplier").map(|field| positive(field, MAX_MULTIPLIER)).transpose()?,
        n_epochs: get("n_epochs").map(|field| count(field, EPOCHS)).transpose()?,
        beta: match kind {
            Kind::Supervised => None,
            Kind::Dpo => get("beta").map(|field| positive(field, MAX_BETA)).transpose()?,
        },
    };
    fields.finish()?;
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<Method, ApiError> {
        let mut fields = Fields::root(&body)?;
        let method = Method::parse(&mut fields)?;
        fields.finish()?;
        Ok(method)
    }

    #[test]
    fn a_method_comes_back_as_it_was_asked_for() {
        for body in [
            json!({}),
            json!({"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}),
            json!({"method": {"type": "supervised"}}),
            json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "learning_rate_multiplier": 2}}}}),
        ] {
            let method = parse(body).unwrap();
            assert_eq!(Method::stored(&method.to_json()).unwrap(), method);
        }
        let method = parse(json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}}})).unwrap();
        assert_eq!(
            method.to_json(),
            json!({"type": "dpo", "dpo": {"hyperparameters":
                {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto", "beta": 0.3}}})
        );
    }

    #[test]
    fn each_rejection_names_its_path() {
        let dpo = |numbers: Value| json!({"method": {"type": "dpo", "dpo": {"hyperparameters": numbers}}});
        for (body, param) in [
            (json!({"method": {}}), "method.type"),
            (json!({"method": {"type": "ppo"}}), "method.type"),
            (json!({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}), "method.type"),
            (json!({"method": {"type": "supervised", "dpo": {}}}), "method.dpo"),
            (dpo(json!({"beta": 0})), "method.dpo.hyperparameters.beta"),
            (dpo(json!({"beta": 2.1})), "method.dpo.hyperparameters.beta"),
            (dpo(json!({"batch_size": 257})), "method.dpo.hyperparameters.batch_size"),
            (dpo(json!({"batch_size": "many"})), "method.dpo.hyperparameters.batch_size"),
            (dpo(json!({"n_epochs": 51})), "method.dpo.hyperparameters.n_epochs"),
            (dpo(json!({"learning_rate_multiplier": -1})), "method.dpo.hyperparameters.learning_rate_multiplier"),
            (dpo(json!({"speed": 1})), "method.dpo.hyperparameters.speed"),
            (json!({"hyperparameters": {"beta": 0.1}}), "hyperparameters.beta"),
            (
                json!({"hyperparameters": {"n_epochs": 1}, "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}}),
                "hyperparameters",
            ),
        ] {
            assert_eq!(parse(body.clone()).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn auto_follows_the_number_of_rows() {
        let numbers = |rows| {
            let method = Method { kind: Kind::Supervised, hyperparameters: Hyperparameters::default() }.resolved(rows);
            let numbers = method.hyperparameters;
            (numbers.batch_size.unwrap(), numbers.n_epochs.unwrap(), method.steps(rows))
        };
        assert_eq!(numbers(1), (1, 10, 10));
        assert_eq!(numbers(10), (4, 10, 30));
        assert_eq!(numbers(100), (4, 4, 100));
        assert_eq!(numbers(1000), (4, 3, 750));
        assert_eq!(numbers(100_000), (32, 3, 9375));
        let set = Hyperparameters { batch_size: Some(64), n_epochs: Some(1), ..Hyperparameters::default() };
        let method = Method { kind: Kind::Dpo, hyperparameters: set }.resolved(10);
        assert_eq!((method.hyperparameters.batch_size, method.hyperparameters.beta), (Some(10), Some(0.1)));
    }
}
