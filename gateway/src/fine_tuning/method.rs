//! How a job trains: the method and its hyperparameters, in the form of the API.

use crate::graders;
use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::{Value, json};
use tidemill_rlhf::reward::grader::Grader;

/// Rows of a step, at most.
const BATCH_SIZE: std::ops::RangeInclusive<i64> = 1..=256;
/// Times that each row is seen.
const EPOCHS: std::ops::RangeInclusive<i64> = 1..=50;
/// Largest factor of the learning rate.
const MAX_MULTIPLIER: f64 = 100.0;
/// Largest β of DPO.
const MAX_BETA: f64 = 2.0;
/// Answers that a prompt gets in a step of reinforcement, where the multiplier is 1.
const ANSWERS: f64 = 8.0;
/// Fewest and most of them.
const MAX_ANSWERS: std::ops::RangeInclusive<f64> = 2.0..=64.0;
/// Most answers of a step.
const STEP_ANSWERS: u32 = 1024;
/// Most steps between evaluations.
const INTERVAL: std::ops::RangeInclusive<i64> = 1..=1_000_000_000;
/// Answers to a prompt of the validation file.
const SAMPLES: std::ops::RangeInclusive<i64> = 1..=64;
/// Tokens of an answer, at most, and where nothing is said.
const COMPLETION: std::ops::RangeInclusive<i64> = 1..=16_384;
const USUAL_COMPLETION: u32 = 256;

/// What is learnt from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Answers to imitate.
    Supervised,
    /// Pairs of answers.
    Dpo,
    /// Answers of the model's own, by what a grader says of them.
    Reinforcement,
}

impl Kind {
    /// The word of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Supervised => "supervised",
            Self::Dpo => "dpo",
            Self::Reinforcement => "reinforcement",
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
    /// Of reinforcement: factor of the answers that a prompt gets.
    pub compute_multiplier: Option<f64>,
    /// Of reinforcement: steps between evaluations.
    pub eval_interval: Option<u32>,
    /// Of reinforcement: answers to each prompt of the validation file.
    pub eval_samples: Option<u32>,
    /// Of reinforcement, and this server's own: most tokens of an answer.
    pub max_completion_tokens: Option<u32>,
}

impl Hyperparameters {
    /// Answers that a prompt gets in a step of reinforcement.
    pub fn answers(&self) -> u32 {
        let answers = (ANSWERS * self.compute_multiplier.unwrap_or(1.0)).round();
        answers.clamp(*MAX_ANSWERS.start(), *MAX_ANSWERS.end()) as u32
    }
}

/// A method with its hyperparameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Method {
    /// Which.
    pub kind: Kind,
    /// Its numbers.
    pub hyperparameters: Hyperparameters,
    /// What answers are worth; reinforcement has one.
    pub grader: Option<Grader>,
}

impl Method {
    /// Reads `method`, or the older `hyperparameters` beside it.
    pub fn parse(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let older = fields.get("hyperparameters");
        let Some(field) = fields.get("method") else {
            let hyperparameters = older.map(|field| numbers(&field, Kind::Supervised)).transpose()?.unwrap_or_default();
            return Ok(Self { kind: Kind::Supervised, hyperparameters, grader: None });
        };
        let mut method = field.object()?;
        let kind = match method.require("type")?.one_of(&["supervised", "dpo", "reinforcement"])? {
            "supervised" => Kind::Supervised,
            "dpo" => Kind::Dpo,
            _ => Kind::Reinforcement,
        };
        let (mut hyperparameters, mut grader) = (None, None);
        for (key, of) in [("supervised", Kind::Supervised), ("dpo", Kind::Dpo), ("reinforcement", Kind::Reinforcement)] {
            let field = if of == Kind::Reinforcement && kind == of { Some(method.require(key)?) } else { method.get(key) };
            let Some(field) = field else { continue };
            if of != kind {
                return Err(field.invalid("invalid_value", format!("the method's type is '{}'; leave this out.", kind.as_str())));
            }
            let mut of_method = field.object()?;
            hyperparameters = of_method.get("hyperparameters").map(|field| numbers(&field, kind)).transpose()?;
            if of == Kind::Reinforcement {
                grader = Some(graders::parse(&of_method.require("grader")?)?);
                let why =
                    "is not supported: answers are sampled freely. Ask for JSON in the prompts, and grade sample.output_json.";
                of_method.refuse("response_format", why)?;
            }
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
        Ok(Self { kind, hyperparameters: hyperparameters.unwrap_or_default(), grader })
    }

    /// Reads what [`Method::to_json`] wrote.
    pub fn stored(method: &Value) -> Result<Self, ApiError> {
        let body = json!({ "method": method });
        Self::parse(&mut Fields::root(&body)?)
    }

    /// In the form of the API.
    pub fn to_json(&self) -> Value {
        let mut numbers = self.common();
        let told = &self.hyperparameters;
        let mut of_method = json!({});
        match self.kind {
            Kind::Supervised => {}
            Kind::Dpo => numbers["beta"] = shown(told.beta),
            Kind::Reinforcement => {
                numbers["compute_multiplier"] = shown(told.compute_multiplier);
                numbers["eval_interval"] = shown(told.eval_interval);
                numbers["eval_samples"] = shown(told.eval_samples);
                numbers["max_completion_tokens"] = shown(told.max_completion_tokens);
                of_method["grader"] = json!(self.grader);
            }
        }
        of_method["hyperparameters"] = numbers;
        json!({ "type": self.kind.as_str(), self.kind.as_str(): of_method })
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
    /// `context`: most tokens that the model takes.
    pub fn resolved(&self, rows: usize, context: usize) -> Self {
        let rows = u32::try_from(rows).unwrap_or(u32::MAX).max(1);
        let asked = self.hyperparameters;
        let reinforcement = self.kind == Kind::Reinforcement;
        let most = if reinforcement { (STEP_ANSWERS / asked.answers()).max(1) } else { u32::MAX };
        let batch_size = asked.batch_size.unwrap_or_else(|| (rows / 500).clamp(4, 32)).min(rows).min(most);
        let n_epochs = asked.n_epochs.unwrap_or_else(|| (batch_size.saturating_mul(100)).div_ceil(rows).clamp(3, 10));
        // Half of the model's context is the prompt's.
        let completion = || USUAL_COMPLETION.min(u32::try_from(context / 2).unwrap_or(u32::MAX)).max(1);
        let hyperparameters = Hyperparameters {
            batch_size: Some(batch_size),
            learning_rate_multiplier: Some(asked.learning_rate_multiplier.unwrap_or(1.0)),
            n_epochs: Some(n_epochs),
            beta: (self.kind == Kind::Dpo).then(|| asked.beta.unwrap_or(0.1)),
            compute_multiplier: reinforcement.then(|| asked.compute_multiplier.unwrap_or(1.0)),
            eval_interval: reinforcement.then(|| asked.eval_interval.unwrap_or(rows.div_ceil(batch_size))),
            eval_samples: reinforcement.then(|| asked.eval_samples.unwrap_or(1)),
            max_completion_tokens: reinforcement.then(|| asked.max_completion_tokens.unwrap_or_else(completion)),
        };
        Self { hyperparameters, ..self.clone() }
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
    let mut numbers = Hyperparameters {
        batch_size: get("batch_size").map(|field| count(field, BATCH_SIZE)).transpose()?,
        learning_rate_multiplier: get("learning_rate_multiplier").map(|field| positive(field, MAX_MULTIPLIER)).transpose()?,
        n_epochs: get("n_epochs").map(|field| count(field, EPOCHS)).transpose()?,
        ..Hyperparameters::default()
    };
    match kind {
        Kind::Supervised => {}
        Kind::Dpo => numbers.beta = get("beta").map(|field| positive(field, MAX_BETA)).transpose()?,
        Kind::Reinforcement => {
            let most = MAX_ANSWERS.end() / ANSWERS;
            numbers.compute_multiplier = get("compute_multiplier").map(|field| positive(field, most)).transpose()?;
            numbers.eval_interval = get("eval_interval").map(|field| count(field, INTERVAL)).transpose()?;
            numbers.eval_samples = get("eval_samples").map(|field| count(field, SAMPLES)).transpose()?;
            numbers.max_completion_tokens = get("max_completion_tokens").map(|field| count(field, COMPLETION)).transpose()?;
            if let Some(field) = get("reasoning_effort").filter(|field| field.value != "default") {
                return Err(field.unsupported("is not supported: the models served here have no such setting; leave it out."));
            }
            let answers = numbers.batch_size.unwrap_or(1).saturating_mul(numbers.answers());
            if answers > STEP_ANSWERS {
                let why = format!(
                    "a step would have {answers} answers, {} to each prompt, and may have {STEP_ANSWERS}; lower it, or 'compute_multiplier'.",
                    numbers.answers()
                );
                let field = Field { value: field.value, path: fields.path("batch_size") };
                return Err(field.invalid("integer_above_max_value", why));
            }
        }
    }
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

    fn reinforcement(numbers: Value) -> Value {
        let grader = json!({"type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"});
        json!({"method": {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": numbers}}})
    }

    #[test]
    fn a_method_comes_back_as_it_was_asked_for() {
        for body in [
            json!({}),
            json!({"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}),
            json!({"method": {"type": "supervised"}}),
            json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "learning_rate_multiplier": 2}}}}),
            reinforcement(
                json!({"compute_multiplier": 0.5, "eval_interval": 3, "eval_samples": "auto", "reasoning_effort": "default"}),
            ),
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
            (json!({"method": {"type": "reinforcement"}}), "method.reinforcement"),
            (json!({"method": {"type": "reinforcement", "reinforcement": {}}}), "method.reinforcement.grader"),
            (json!({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}), "method.reinforcement.grader.type"),
            (reinforcement(json!({"compute_multiplier": 9})), "method.reinforcement.hyperparameters.compute_multiplier"),
            (reinforcement(json!({"batch_size": 200})), "method.reinforcement.hyperparameters.batch_size"),
            (reinforcement(json!({"eval_samples": 0})), "method.reinforcement.hyperparameters.eval_samples"),
            (reinforcement(json!({"reasoning_effort": "high"})), "method.reinforcement.hyperparameters.reasoning_effort"),
            (reinforcement(json!({"beta": 0.1})), "method.reinforcement.hyperparameters.beta"),
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
            let method =
                Method { kind: Kind::Supervised, hyperparameters: Hyperparameters::default(), grader: None }.resolved(rows, 4096);
            let numbers = method.hyperparameters;
            (numbers.batch_size.unwrap(), numbers.n_epochs.unwrap(), method.steps(rows))
        };
        assert_eq!(numbers(1), (1, 10, 10));
        assert_eq!(numbers(10), (4, 10, 30));
        assert_eq!(numbers(100), (4, 4, 100));
        assert_eq!(numbers(1000), (4, 3, 750));
        assert_eq!(numbers(100_000), (32, 3, 9375));
        let set = Hyperparameters { batch_size: Some(64), n_epochs: Some(1), ..Hyperparameters::default() };
        let method = Method { kind: Kind::Dpo, hyperparameters: set, grader: None }.resolved(10, 4096);
        assert_eq!((method.hyperparameters.batch_size, method.hyperparameters.beta), (Some(10), Some(0.1)));
    }

    #[test]
    fn a_step_of_reinforcement_has_several_answers_to_each_prompt() {
        let method = parse(reinforcement(json!({"compute_multiplier": 8}))).unwrap();
        let numbers = method.resolved(100_000, 300).hyperparameters;
        assert_eq!((numbers.answers(), numbers.batch_size, numbers.max_completion_tokens), (64, Some(16), Some(150)));
        assert_eq!((numbers.eval_interval, numbers.eval_samples), (Some(6250), Some(1)));
        let few =
            parse(reinforcement(json!({"compute_multiplier": 0.01, "max_completion_tokens": 9}))).unwrap().resolved(2, 4096);
        assert_eq!(
            (few.hyperparameters.answers(), few.hyperparameters.batch_size, few.hyperparameters.max_completion_tokens),
            (2, Some(2), Some(9))
        );
    }
}
