//! The functions by name, as a configuration has them.

use std::path::PathBuf;

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Answer, RewardError, Score,
    grader::Grader,
    json::{Json, Schema},
    program::Program,
};

/// A function with its name in the metrics: that of its type where none is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct RewardFunction {
    name: Option<String>,
    /// What it looks at.
    pub judge: Judge,
}

/// What lengths are counted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LengthUnit {
    /// Tokens that were sampled.
    #[default]
    Tokens,
    /// Parts between spaces.
    Words,
    /// Unicode characters.
    Characters,
}

/// What a function looks at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Judge {
    /// 1 for an answer that is one JSON object or array and nothing else, 0 for any other.
    Json {
        /// A bare string, number, truth or null counts too.
        #[serde(default)]
        any: bool,
    },
    /// 1 for an answer that is JSON and valid by a schema, 0 for any other.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// JSON that is not valid gets one half.
        #[serde(default)]
        partial: bool,
    },
    /// 1 for an answer that a regular expression matches, 0 for any other.
    Regex {
        /// The expression.
        pattern: String,
        /// It must match the whole answer.
        #[serde(default)]
        whole: bool,
    },
    /// 1 for an answer of a length within bounds; outside, less by how much of the bound it is off, and not below 0.
    Length {
        /// Shortest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        min: Option<usize>,
        /// Longest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max: Option<usize>,
        /// What is counted.
        #[serde(default)]
        unit: LengthUnit,
    },
    /// 1 for an answer that is the expected one, but for spaces around it; 0 for any other, no opinion where none is expected.
    ExactMatch {
        /// Expected of every answer; without it, what the prompt's row says.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        answer: Option<String>,
        /// The row's column.
        #[serde(default = "answer")]
        column: String,
        /// Upper and lower case are one.
        #[serde(default)]
        ignore_case: bool,
        /// It is enough that the answer contains it.
        #[serde(default)]
        inside: bool,
    },
    /// What a program says: it reads one JSON object on its standard input (`prompt`, `completion`, and the columns of the prompt's
    /// row) and prints one number, or `null` for no opinion.
    Program {
        /// The program and its arguments. No shell is between.
        command: Vec<String>,
        /// Seconds after which it is ended; the answer then gets 0.
        #[serde(default = "seconds")]
        timeout_s: f64,
    },
    /// A grader of OpenAI's API. Those that ask a model are for a server's fine-tuning jobs.
    Grader {
        /// Which.
        grader: Box<Grader>,
    },
    /// What a reward model says that was trained here on the same base.
    RewardModel {
        /// Its folder.
        path: PathBuf,
    },
}

fn answer() -> String {
    "answer".to_owned()
}

fn seconds() -> f64 {
    5.0
}

impl TryFrom<Map<String, Value>> for RewardFunction {
    type Error = String;

    fn try_from(mut fields: Map<String, Value>) -> Result<Self, String> {
        let name = match fields.shift_remove("name") {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) if !name.is_empty() => Some(name),
            Some(other) => return Err(format!("reward_funcs: name is {other}, but should be a text")),
        };
        let judge = serde_json::from_value(Value::Object(fields)).map_err(|error| format!("reward_funcs: {error}"))?;
        Ok(Self { name, judge })
    }
}

impl From<RewardFunction> for Map<String, Value> {
    fn from(function: RewardFunction) -> Self {
        let mut fields = Map::new();
        fields.extend(function.name.map(|name| ("name".to_owned(), Value::String(name))));
        // Texts, numbers and lists under texts: always JSON, and an object.
        if let Ok(Value::Object(judge)) = serde_json::to_value(function.judge) {
            fields.extend(judge);
        }
        fields
    }
}

impl From<Judge> for RewardFunction {
    fn from(judge: Judge) -> Self {
        Self { name: None, judge }
    }
}

impl RewardFunction {
    /// With a name of its own.
    pub fn named(name: impl Into<String>, judge: Judge) -> Self {
        Self { name: Some(name.into()), judge }
    }

    /// Its name in the metrics.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(match &self.judge {
            Judge::Json { .. } => "json",
            Judge::JsonSchema { .. } => "json_schema",
            Judge::Regex { .. } => "regex",
            Judge::Length { .. } => "length",
            Judge::ExactMatch { .. } => "exact_match",
            Judge::Program { .. } => "program",
            Judge::Grader { grader } => grader.name(),
            Judge::RewardModel { .. } => "reward_model",
        })
    }

    /// Whether its fields make sense; a reward model is looked for when it is opened.
    pub fn check(&self) -> Result<(), RewardError> {
        match &self.judge {
            Judge::RewardModel { .. } => Ok(()),
            Judge::Grader { grader } => grader.check().map_err(|wrong| RewardError::Field {
                name: self.name().to_owned(),
                detail: format!("grader.{}: {}", wrong.path, wrong.detail),
            }),
            judge => judge.ready().map(drop).map_err(|error| match error {
                RewardError::Field { detail, .. } => RewardError::Field { name: self.name().to_owned(), detail },
                other => other,
            }),
        }
    }
}

impl Judge {
    /// The function itself; not for reward models and graders, which need a base or somebody to ask.
    pub(crate) fn ready(&self) -> Result<Box<dyn Score>, RewardError> {
        let name = || RewardFunction::from(self.clone()).name().to_owned();
        let wrong = |detail: String| RewardError::Field { name: name(), detail };
        Ok(match self {
            Self::Json { any } => Box::new(Json { any: *any }),
            Self::JsonSchema { schema, partial } => Box::new(Schema::new(schema, *partial).map_err(wrong)?),
            Self::Regex { pattern, whole } => {
                let pattern = if *whole { format!(r"\A(?:{pattern})\z") } else { pattern.clone() };
                let regex = Regex::new(&pattern).map_err(|error| wrong(format!("pattern: {error}")))?;
                Box::new(move |answer: &Answer<'_>| Some(f64::from(u8::from(regex.is_match(answer.text)))))
            }
            Self::Length { min: None, max: None, .. } => return Err(wrong("give min, max or both".to_owned())),
            Self::Length { min: Some(min), max: Some(max), .. } if min > max => {
                return Err(wrong(format!("min is {min}, above max, which is {max}")));
            }
            Self::Length { min, max, unit } => {
                let (min, max, unit) = (min.unwrap_or(0), max.unwrap_or(usize::MAX), *unit);
                Box::new(move |answer: &Answer<'_>| Some(within(unit.count(answer), min, max)))
            }
            Self::ExactMatch { answer: expected, column, ignore_case, inside } => {
                let (expected, column, inside) = (expected.clone(), column.clone(), *inside);
                let fold =
                    if *ignore_case { |text: &str| text.trim().to_lowercase() } else { |text: &str| text.trim().to_owned() };
                Box::new(move |answer: &Answer<'_>| {
                    let expected = match (&expected, answer.columns.get(&column)) {
                        (Some(text), _) => fold(text),
                        (None, Some(Value::String(text))) => fold(text),
                        (None, Some(Value::Null) | None) => return None,
                        (None, Some(other)) => fold(&other.to_string()),
                    };
                    let text = fold(answer.text);
                    Some(f64::from(u8::from(if inside { text.contains(&expected) } else { text == expected })))
                })
            }
            Self::Program { command, timeout_s } => Box::new(Program::new(command, *timeout_s).map_err(wrong)?),
            Self::Grader { .. } => return Err(wrong("it needs whoever opens it".to_owned())),
            Self::RewardModel { path } => {
                return Err(RewardError::Model { path: path.clone(), detail: "it needs the base it was trained on".to_owned() });
            }
        })
    }
}

/// A function of one answer.
impl<F: Fn(&Answer<'_>) -> Option<f64> + Send + Sync> Score for F {
    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<f64>>, RewardError> {
        Ok(answers.iter().map(self).collect())
    }
}

impl LengthUnit {
    fn count(self, answer: &Answer<'_>) -> usize {
        match self {
            Self::Tokens => answer.tokens,
            Self::Words => answer.text.split_whitespace().count(),
            Self::Characters => answer.text.chars().count(),
        }
    }
}

fn within(length: usize, min: usize, max: usize) -> f64 {
    let short = min.saturating_sub(length) as f64 / min.max(1) as f64;
    let long = length.saturating_sub(max) as f64 / max.max(1) as f64;
    (1.0 - short.max(long)).max(0.0)
}
