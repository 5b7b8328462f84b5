//! Graders that ask a served model: what they ask, and what they make of its reply.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::template::{Graded, MAX_RENDERED, Template, Unrendered};

/// Tokens of a reply, where the grader says nothing: room for one number or label as JSON.
const REPLY_TOKENS: u32 = 64;

/// Who says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Instructions.
    System,
    /// The same, under their newer name.
    Developer,
    /// A question.
    User,
    /// An answer.
    Assistant,
}

impl Role {
    /// The word of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// A message to the model that grades.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turn {
    /// Who says it.
    pub role: Role,
    /// What.
    pub content: Template,
}

/// How the model samples its reply; without a temperature it takes the likeliest tokens, so that equal answers get equal grades.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplingParams {
    /// From 0 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// From 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Of the draws.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Most tokens of the reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_completions_tokens: Option<u32>,
}

/// What a model is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// Its name.
    pub model: String,
    /// The conversation.
    pub messages: Vec<(Role, String)>,
    /// Schema of the reply, which is JSON.
    pub schema: Value,
    /// From 0 to 2.
    pub temperature: f64,
    /// From 0 to 1.
    pub top_p: Option<f64>,
    /// Of the draws.
    pub seed: i64,
    /// Most tokens of the reply.
    pub max_tokens: u32,
}

/// What it replied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The text.
    pub text: String,
    /// Tokens of question and reply.
    pub tokens: u64,
}

/// Asks served models. Whoever calls waits; several may ask at once.
pub trait Oracle: Send + Sync {
    /// The reply, or why there is none.
    fn ask(&self, question: &Question) -> Result<Reply, String>;
}

/// The one field of a reply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Wanted<'a> {
    /// A number in the range.
    Score([f64; 2]),
    /// One of the labels.
    Label(&'a [String]),
}

impl Wanted<'_> {
    fn schema(&self) -> Value {
        let (name, field) = match self {
            Self::Score(_) => ("result", json!({ "type": "number" })),
            Self::Label(labels) => ("label", json!({ "type": "string", "enum": labels })),
        };
        let properties = Map::from_iter([(name.to_owned(), field)]);
        json!({ "type": "object", "properties": properties, "required": [name], "additionalProperties": false })
    }

    /// Said behind the last message: what the schema allows says nothing of what is meant.
    fn instruction(&self) -> String {
        match self {
            Self::Score([low, high]) => {
                format!("Reply with JSON only: {{\"result\": N}}, where N is a number from {low} to {high}.")
            }
            Self::Label(labels) => {
                let labels: Vec<String> = labels.iter().map(|label| json!(label).to_string()).collect();
                format!("Reply with JSON only: {{\"label\": L}}, where L is one of {}.", labels.join(", "))
            }
        }
    }
}

/// The question about one answer.
pub(super) fn question(
    model: &str,
    input: &[Turn],
    sampling: SamplingParams,
    wanted: &Wanted<'_>,
    graded: &Graded<'_>,
) -> Result<Question, Unrendered> {
    let mut messages = Vec::with_capacity(input.len() + 1);
    let mut length = 0;
    for turn in input {
        let text = turn.content.render(graded)?;
        length += text.len();
        if length > MAX_RENDERED {
            return Err(Unrendered::TooLong);
        }
        messages.push((turn.role, text));
    }
    match messages.last_mut() {
        Some((Role::User, text)) => {
            text.push_str("\n\n");
            text.push_str(&wanted.instruction());
        }
        _ => messages.push((Role::User, wanted.instruction())),
    }
    Ok(Question {
        model: model.to_owned(),
        messages,
        schema: wanted.schema(),
        temperature: sampling.temperature.unwrap_or(0.0),
        top_p: sampling.top_p,
        seed: sampling.seed.unwrap_or(0),
        max_tokens: sampling.max_completions_tokens.unwrap_or(REPLY_TOKENS),
    })
}

/// The score in a reply. One that was cut off within its digits counts as far as it goes.
pub(super) fn score(reply: &str, [low, high]: [f64; 2]) -> Result<f64, String> {
    let shown = || reply.chars().take(80).collect::<String>();
    let found = match serde_json::from_str::<Value>(reply) {
        Ok(Value::Number(number)) => number.as_f64(),
        Ok(value) => value["result"].as_f64(),
        Err(_) => {
            let digits = reply.trim_start().strip_prefix('{').and_then(|rest| rest.trim_start().strip_prefix("\"result\""));
            let digits = digits.and_then(|rest| rest.trim_start().strip_prefix(':')).unwrap_or(reply).trim_start();
            let end = digits.find(|c: char| !(c.is_ascii_digit() || "+-.eE".contains(c))).unwrap_or(digits.len());
            digits[..end].parse().ok()
        }
    };
    let number =
        found.filter(|number: &f64| number.is_finite()).ok_or_else(|| format!("the model replied {:?}, no number", shown()))?;
    if (low..=high).contains(&number) {
        return Ok(number);
    }
    Err(format!("the model replied {number}, which is not from {low} to {high}"))
}

/// The label in a reply.
pub(super) fn label<'a>(reply: &str, labels: &'a [String]) -> Result<&'a str, String> {
    let value = serde_json::from_str::<Value>(reply).ok();
    let text = value.as_ref().and_then(|value| value["label"].as_str().or(value.as_str())).unwrap_or(reply).trim();
    let found = labels.iter().find(|label| *label == text);
    found
        .map(String::as_str)
        .ok_or_else(|| format!("the model replied {:?}, none of the labels", text.chars().take(80).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::borrow::Cow;

    #[test]
    fn scores_are_read_and_kept_within_their_range() {
        for (reply, expected) in [
            ("{\"result\": 0.75}", Some(0.75)),
            (" {\"result\":1}\n", Some(1.0)),
            ("0.5", Some(0.5)),
            ("{\"result\": 0.33333", Some(0.33333)),
            ("{\"result\": 2}", None),
            ("{\"result\": \"high\"}", None),
            ("{\"score\": 1}", None),
            ("good", None),
            ("", None),
        ] {
            assert_eq!(score(reply, [0.0, 1.0]).ok(), expected, "{reply}");
        }
        let labels = ["good".to_owned(), "bad".to_owned()];
        assert_eq!(label("{\"label\": \"bad\"}", &labels), Ok("bad"));
        assert_eq!(label("good\n", &labels), Ok("good"));
        assert!(label("{\"label\": \"fine\"}", &labels).unwrap_err().contains("none of the labels"));
    }

    #[test]
    fn the_last_question_says_what_the_reply_must_be() {
        let turn = |role, text: &str| Turn { role, content: Template::new(text).unwrap() };
        let graded = Graded::new(Cow::Owned(json!({"answer": "Paris"})), "Rome");
        let input = [turn(Role::System, "Grade."), turn(Role::User, "{{sample.output_text}} or {{item.answer}}?")];
        let wanted = Wanted::Score([0.0, 10.0]);
        let asked = question("m", &input, SamplingParams::default(), &wanted, &graded).unwrap();
        assert_eq!(asked.messages.len(), 2);
        assert!(
            asked.messages[1].1.starts_with("Rome or Paris?\n\nReply with JSON only")
                && asked.messages[1].1.contains("from 0 to 10")
        );
        assert_eq!((asked.temperature, asked.max_tokens), (0.0, 64));
        assert_eq!(asked.schema["required"], json!(["result"]));
        let only_system = question("m", &input[..1], SamplingParams::default(), &wanted, &graded).unwrap();
        assert_eq!(only_system.messages[1].0, Role::User);
        let missing = [turn(Role::User, "{{item.other}}")];
        let absent = question("m", &missing, SamplingParams::default(), &wanted, &graded).unwrap_err();
        assert!(matches!(absent, Unrendered::Absent(variable) if variable.to_string() == "item.other"));
        let long = "x".repeat(MAX_RENDERED / 2);
        let long = Graded::new(Cow::Owned(json!({})), &long);
        let turns = ["{{sample.output_text}}"; 3].map(|text| turn(Role::User, text));
        assert_eq!(question("m", &turns, SamplingParams::default(), &wanted, &long), Err(Unrendered::TooLong));
    }
}
