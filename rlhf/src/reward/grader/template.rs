//! Texts with places for what is graded: `{{item.answer}}`, `{{sample.output_json.parts[0].name}}`.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest template, in bytes.
const MAX_LENGTH: usize = 256 << 10;
/// Longest text that one becomes, in bytes: a template may hold thousands of places, and an answer fill each of them.
pub(super) const MAX_RENDERED: usize = 4 << 20;

/// A text with places; written as its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Template {
    source: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Place(Variable),
}

/// What stands in a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    of: Source,
    steps: Vec<Step>,
}

/// Why a template is no text for an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unrendered {
    /// There is nothing for this place.
    Absent(Variable),
    /// The text would be longer than is looked at.
    TooLong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The row of the file.
    Item,
    /// The answer's text.
    OutputText,
    /// The answer, which is JSON.
    OutputJson,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Field(String),
    Index(usize),
}

/// What is graded, as templates see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Graded<'a> {
    /// The row.
    pub item: Cow<'a, Value>,
    /// The answer.
    pub text: &'a str,
    json: Option<Value>,
}

impl<'a> Graded<'a> {
    /// An answer to the prompt of a row.
    pub fn new(item: Cow<'a, Value>, text: &'a str) -> Self {
        Self { item, text, json: serde_json::from_str(text).ok() }
    }
}

impl Template {
    /// Takes a text apart; the error says what would be right.
    pub fn new(source: impl Into<String>) -> Result<Self, String> {
        let source = source.into();
        if source.len() > MAX_LENGTH {
            return Err(format!("it is longer than {} KiB", MAX_LENGTH >> 10));
        }
        let mut parts = Vec::new();
        let mut rest = source.as_str();
        while let Some((text, behind)) = rest.split_once("{{") {
            let (inside, after) = behind.split_once("}}").ok_or("a '{{' has no '}}' behind it")?;
            if !text.is_empty() {
                parts.push(Part::Text(text.to_owned()));
            }
            parts.push(Part::Place(Variable::new(inside.trim())?));
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self { source, parts })
    }

    /// As it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text for one answer; texts stand as they are, other values as JSON.
    pub fn render(&self, graded: &Graded<'_>) -> Result<String, Unrendered> {
        let mut text = String::with_capacity(self.source.len());
        for part in &self.parts {
            let more = match part {
                Part::Text(part) => Cow::Borrowed(part.as_str()),
                Part::Place(variable) if variable.of == Source::OutputText => Cow::Borrowed(graded.text),
                Part::Place(variable) => match variable.find(graded) {
                    Some(Value::String(value)) => Cow::Borrowed(value.as_str()),
                    Some(value) => Cow::Owned(value.to_string()),
                    None => return Err(Unrendered::Absent(variable.clone())),
                },
            };
            if text.len() + more.len() > MAX_RENDERED {
                return Err(Unrendered::TooLong);
            }
            text.push_str(&more);
        }
        Ok(text)
    }

    /// The first place that this row has nothing for.
    pub fn missing(&self, item: &Value) -> Option<&Variable> {
        self.parts.iter().find_map(|part| match part {
            Part::Place(variable) if variable.of == Source::Item && follow(item, &variable.steps).is_none() => Some(variable),
            _ => None,
        })
    }
}

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(source: String) -> Result<Self, String> {
        Self::new(source)
    }
}

impl From<Template> for String {
    fn from(template: Template) -> Self {
        template.source
    }
}

impl Variable {
    fn new(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(100).collect();
        let (namespace, path) = text.split_once('.').unwrap_or((text, ""));
        let whole = |what: &str| format!("'{{{{{shown}}}}}' names no {what}");
        match namespace.trim_end() {
            "item" => {
                let steps = steps(path).ok_or_else(|| whole("column; write {{item.COLUMN}}"))?;
                Ok(Self { of: Source::Item, steps })
            }
            "sample" => {
                let (name, path) = match path.find(['.', '[']) {
                    Some(end) => path.split_at(end),
                    None => (path, ""),
                };
                let path = path.strip_prefix('.').unwrap_or(path);
                match name {
                    "output_text" if path.is_empty() => Ok(Self { of: Source::OutputText, steps: Vec::new() }),
                    "output_json" if path.is_empty() => Ok(Self { of: Source::OutputJson, steps: Vec::new() }),
                    "output_json" => {
                        let steps = steps(path).ok_or_else(|| whole("part of the answer; write {{sample.output_json.a.b}}"))?;
                        Ok(Self { of: Source::OutputJson, steps })
                    }
                    _ => Err(whole("part of a sample that there is here; these are sample.output_text and sample.output_json")),
                }
            }
            _ => Err(whole("namespace; there are item and sample, as in {{item.answer}} and {{sample.output_text}}")),
        }
    }

    /// Whether it is looked for in the answer, not in the row.
    pub fn is_of_answer(&self) -> bool {
        self.of != Source::Item
    }

    fn find<'a>(&self, graded: &'a Graded<'_>) -> Option<&'a Value> {
        match self.of {
            Source::Item => follow(&graded.item, &self.steps),
            Source::OutputJson => follow(graded.json.as_ref()?, &self.steps),
            Source::OutputText => None,
        }
    }
}

impl fmt::Display for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.of {
            Source::Item => "item",
            Source::OutputText => "sample.output_text",
            Source::OutputJson => "sample.output_json",
        })?;
        self.steps.iter().try_for_each(|step| match step {
            Step::Field(name) => write!(f, ".{name}"),
            Step::Index(index) => write!(f, "[{index}]"),
        })
    }
}

fn follow<'a>(value: &'a Value, steps: &[Step]) -> Option<&'a Value> {
    let found = steps.iter().try_fold(value, |value, step| match step {
        Step::Field(name) => value.get(name),
        Step::Index(index) => value.get(index),
    });
    found.filter(|value| !value.is_null())
}

/// `a.b[0].c`; none of nothing.
fn steps(path: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    for field in path.split('.') {
        let (name, mut indexes) = field.split_at(field.find('[').unwrap_or(field.len()));
        let fits = |c: char| !(c.is_whitespace() || c.is_control() || "{}[]\"'".contains(c));
        // Only an index may stand without a name, behind `output_json`.
        if name.is_empty() && (indexes.is_empty() || !steps.is_empty()) || !name.chars().all(fits) {
            return None;
        }
        if !name.is_empty() {
            steps.push(Step::Field(name.to_owned()));
        }
        while !indexes.is_empty() {
            let (index, rest) = indexes.strip_prefix('[')?.split_once(']')?;
            steps.push(Step::Index(index.parse().ok()?));
            indexes = rest;
        }
    }
    Some(steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rendered(template: &str, item: Value, text: &str) -> Result<String, String> {
        let graded = Graded::new(Cow::Owned(item), text);
        Template::new(template).unwrap().render(&graded).map_err(|why| match why {
            Unrendered::Absent(variable) => variable.to_string(),
            Unrendered::TooLong => "too long".to_owned(),
        })
    }

    #[test]
    fn places_are_filled_from_the_row_and_the_answer() {
        let item = json!({"answer": "Paris", "n": 3, "deep": {"list": [{"x": "y"}]}, "nothing": null});
        for (template, expected) in [
            ("plain", Ok("plain")),
            ("{{item.answer}}", Ok("Paris")),
            ("a {{ item.n }} b{{item.deep.list[0].x}}", Ok("a 3 by")),
            ("{{item.deep}}", Ok(r#"{"list":[{"x":"y"}]}"#)),
            ("{{sample.output_text}}!", Ok(r#"{"a":{"b":[1,2]}}!"#)),
            ("{{sample.output_json.a.b[1]}}", Ok("2")),
            ("{{sample.output_json}}", Ok(r#"{"a":{"b":[1,2]}}"#)),
            ("{{item.nothing}}", Err("item.nothing")),
            ("{{item.other.x}}", Err("item.other.x")),
            ("{{sample.output_json.a.c}}", Err("sample.output_json.a.c")),
        ] {
            let got = rendered(template, item.clone(), r#"{"a":{"b":[1,2]}}"#);
            assert_eq!(got.as_deref().map_err(String::as_str), expected, "{template}");
        }
        assert_eq!(rendered("{{sample.output_json.a}}", json!({}), "no JSON"), Err("sample.output_json.a".into()));
        assert_eq!(rendered("{{sample.output_json[1]}}", json!({}), "[1, 2]").unwrap(), "2");
        // What an answer says is never taken for a template.
        assert_eq!(rendered("{{sample.output_text}}", json!({"a": 1}), "{{item.a}}").unwrap(), "{{item.a}}");
    }

    #[test]
    fn an_answer_that_many_places_repeat_becomes_no_text_without_end() {
        let answer = "x".repeat(MAX_RENDERED / 4);
        assert_eq!(rendered(&"{{sample.output_text}}".repeat(4), json!({}), &answer).map(|text| text.len()), Ok(MAX_RENDERED));
        for place in ["{{sample.output_text}}", "{{item.a}}"] {
            let many = place.repeat(400);
            assert_eq!(rendered(&many, json!({"a": answer}), &answer), Err("too long".into()), "{place}");
        }
    }

    #[test]
    fn what_is_no_template_is_refused_with_the_place() {
        for (template, part) in [
            ("{{item.a", "has no '}}'"),
            ("{{}}", "names no namespace"),
            ("{{items.a}}", "'{{items.a}}' names no namespace"),
            ("{{item}}", "names no column"),
            ("{{item.}}", "names no column"),
            ("{{item.a b}}", "names no column"),
            ("{{item.a[x]}}", "names no column"),
            ("{{sample.output_tools}}", "sample.output_text and sample.output_json"),
            ("{{sample.output_text.a}}", "sample.output_text and sample.output_json"),
            ("{{sample}}", "sample.output_text and sample.output_json"),
        ] {
            let error = Template::new(template).unwrap_err();
            assert!(error.contains(part), "{template}: {error}");
        }
    }

    #[test]
    fn a_row_without_a_column_is_known_before_anything_is_sampled() {
        let template = Template::new("{{item.a}} {{sample.output_json.b}} {{item.c.d}}").unwrap();
        assert_eq!(template.missing(&json!({"a": 1, "c": {"d": 2}})), None);
        assert_eq!(template.missing(&json!({"a": 1})).unwrap().to_string(), "item.c.d");
        let back: Template = serde_json::from_value(json!(template)).unwrap();
        assert_eq!((back.source(), &back), (template.source(), &template));
    }
}
