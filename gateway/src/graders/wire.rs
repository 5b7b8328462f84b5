//! Graders in requests, read field by field.

use crate::http::auth::forbidden;
use crate::http::error::ApiError;
use crate::http::{App, Caller};
use crate::openai::fields::Field;
use serde_json::Value;
use std::collections::BTreeMap;
use tidemill_rlhf::reward::grader::{Formula, Grader, Operation, Role, SamplingParams, Similarity, Template, Turn};
use tidemill_store::Scope;

/// Longest grader, as JSON in bytes: a job's row holds it, and rows are read often.
const MAX_LENGTH: usize = 256 << 10;
/// Longest name, in characters.
const MAX_NAME: usize = 64;
/// Most messages to a model, labels, and graders of a `multi`.
const MAX_ITEMS: usize = 64;
/// Longest label and formula, in characters.
const MAX_TEXT: usize = 4096;
/// Most tokens of a model's reply.
const MAX_REPLY: i64 = 4096;

const TYPES: [&str; 6] = ["string_check", "text_similarity", "score_model", "label_model", "python", "multi"];
const OPERATIONS: [(&str, Operation); 4] =
    [("eq", Operation::Eq), ("ne", Operation::Ne), ("like", Operation::Like), ("ilike", Operation::Ilike)];
const ROLES: [Role; 4] = [Role::User, Role::Assistant, Role::System, Role::Developer];
/// Of embeddings, which are not compared here.
const COSINE: &str = "cosine";

/// The grader in this field.
pub fn parse(field: &Field<'_>) -> Result<Grader, ApiError> {
    let length = field.value.to_string().len();
    if length > MAX_LENGTH {
        let why = format!("a grader may have {} KiB of JSON, and this one has {}.", MAX_LENGTH >> 10, length.div_ceil(1 << 10));
        return Err(field.invalid("string_above_max_length", why));
    }
    let grader = read(field)?;
    grader.check().map_err(|wrong| {
        let path = format!("{}.{}", field.path, wrong.path);
        let message = format!("Invalid '{path}': {}.", wrong.detail);
        ApiError::invalid(path, "invalid_value", message)
    })?;
    Ok(grader)
}

/// Whether the caller may ask the grader's models, and they are served; `path` is where the grader lies.
pub fn check_models(app: &App, caller: &Caller, grader: &Grader, path: &str) -> Result<(), ApiError> {
    let models = grader.models();
    if !models.is_empty() && !caller.allows(Scope::Chat) {
        return Err(forbidden(Scope::Chat));
    }
    for (place, model) in models {
        let known = caller.check_model(model).and_then(|()| app.registry.find(Some(model)).map(drop));
        known.map_err(|error| ApiError { param: Some(format!("{path}.{place}")), ..error })?;
    }
    Ok(())
}

fn read(field: &Field<'_>) -> Result<Grader, ApiError> {
    let mut fields = field.object()?;
    let kind = fields.require("type")?;
    let word = kind.one_of(&TYPES)?;
    if word == "python" {
        let why = "is 'python': this server runs no code of its clients. Use another grader, or train with `tidemill train` and a reward program.";
        return Err(kind.unsupported(why));
    }
    let name = filled(&fields.require("name")?, MAX_NAME)?;
    let grader = match word {
        "string_check" => Grader::StringCheck {
            name,
            input: template(&fields.require("input")?)?,
            reference: template(&fields.require("reference")?)?,
            operation: operation(&fields.require("operation")?)?,
        },
        "text_similarity" => Grader::TextSimilarity {
            name,
            input: template(&fields.require("input")?)?,
            reference: template(&fields.require("reference")?)?,
            evaluation_metric: metric(&fields.require("evaluation_metric")?)?,
        },
        "score_model" => Grader::ScoreModel {
            name,
            model: fields.require("model")?.string()?.to_owned(),
            input: turns(&fields.require("input")?)?,
            range: fields.get("range").map(|field| range(&field)).transpose()?.unwrap_or([0.0, 1.0]),
            sampling_params: fields.get("sampling_params").map(|field| sampling(&field)).transpose()?.unwrap_or_default(),
        },
        "label_model" => Grader::LabelModel {
            name,
            model: fields.require("model")?.string()?.to_owned(),
            input: turns(&fields.require("input")?)?,
            labels: labels(&fields.require("labels")?)?,
            passing_labels: labels(&fields.require("passing_labels")?)?,
        },
        _ => Grader::Multi {
            name,
            graders: parts(&fields.require("graders")?)?,
            calculate_output: formula(&fields.require("calculate_output")?)?,
        },
    };
    fields.finish()?;
    Ok(grader)
}

fn filled(field: &Field<'_>, longest: usize) -> Result<String, ApiError> {
    match field.short_string(longest)? {
        "" => Err(field.invalid("invalid_value", "expected a text that is not empty.")),
        text => Ok(text.to_owned()),
    }
}

fn template(field: &Field<'_>) -> Result<Template, ApiError> {
    Template::new(field.string()?).map_err(|why| field.invalid("invalid_template", format!("{why}.")))
}

fn formula(field: &Field<'_>) -> Result<Formula, ApiError> {
    Formula::new(field.string()?).map_err(|why| field.invalid("invalid_formula", format!("{why}.")))
}

fn operation(field: &Field<'_>) -> Result<Operation, ApiError> {
    let word = field.one_of(&OPERATIONS.map(|(word, _)| word))?;
    let found = OPERATIONS.into_iter().find(|(known, _)| *known == word);
    found.map(|(_, operation)| operation).ok_or_else(|| field.unknown_value(word, &[]))
}

fn metric(field: &Field<'_>) -> Result<Similarity, ApiError> {
    let known = Similarity::ALL.map(Similarity::as_str);
    let text = field.string()?;
    if text == COSINE {
        return Err(field.unsupported("is 'cosine', which compares embeddings by a model of OpenAI's; use another metric."));
    }
    Similarity::ALL.into_iter().find(|metric| metric.as_str() == text).ok_or_else(|| field.unknown_value(text, &known))
}

fn range(field: &Field<'_>) -> Result<[f64; 2], ApiError> {
    let numbers = field.array(2)?;
    let number = |index: usize, value: &Value| {
        let number = value.as_f64();
        number.ok_or_else(|| field.invalid("invalid_type", format!("expected two numbers, but number {} is none.", index + 1)))
    };
    match numbers {
        [low, high] => Ok([number(0, low)?, number(1, high)?]),
        _ => Err(field.invalid("invalid_value", "expected two numbers, the least and the greatest score.")),
    }
}

fn sampling(field: &Field<'_>) -> Result<SamplingParams, ApiError> {
    let mut fields = field.object()?;
    let mut double = |key, most: f64| fields.get(key).map(|field| field.double(0.0..=most)).transpose();
    let (temperature, top_p) = (double("temperature", 2.0)?, double("top_p", 1.0)?);
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    let most = fields.integer("max_completions_tokens", 1..=MAX_REPLY)?;
    fields.refuse("reasoning_effort", "is not supported: graders ask for the score alone.")?;
    fields.finish()?;
    let max_completions_tokens = most.and_then(|most| u32::try_from(most).ok());
    Ok(SamplingParams { temperature, top_p, seed, max_completions_tokens })
}

fn labels(field: &Field<'_>) -> Result<Vec<String>, ApiError> {
    let items = field.array(MAX_ITEMS)?;
    items.iter().enumerate().map(|(index, value)| filled(&field.item(index, value), MAX_TEXT)).collect()
}

fn turns(field: &Field<'_>) -> Result<Vec<Turn>, ApiError> {
    let turn = |(index, value)| {
        let field = field.item(index, value);
        let mut fields = field.object()?;
        if let Some(kind) = fields.get("type") {
            kind.one_of(&["message"])?;
        }
        let word = fields.require("role")?.one_of(&ROLES.map(Role::as_str))?;
        let role = ROLES.into_iter().find(|role| role.as_str() == word).unwrap_or(Role::User);
        let content = content(&fields.require("content")?)?;
        fields.finish()?;
        Ok(Turn { role, content })
    };
    field.filled_array(MAX_ITEMS)?.iter().enumerate().map(turn).collect()
}

/// A text, a block of text, or several of these, which become lines.
fn content(field: &Field<'_>) -> Result<Template, ApiError> {
    let texts = match field.value {
        Value::Array(_) => {
            let items = field.filled_array(MAX_ITEMS)?;
            items.iter().enumerate().map(|(index, value)| block(&field.item(index, value))).collect::<Result<Vec<_>, _>>()?
        }
        _ => vec![block(field)?],
    };
    Template::new(texts.join("\n")).map_err(|why| field.invalid("invalid_template", format!("{why}.")))
}

fn block(field: &Field<'_>) -> Result<String, ApiError> {
    if field.value.is_string() {
        return Ok(template(field)?.source().to_owned());
    }
    let mut fields = field.object()?;
    let kind = fields.require("type")?;
    if !matches!(kind.one_of(&["input_text", "output_text", "input_image", "input_audio"])?, "input_text" | "output_text") {
        return Err(kind.unsupported("is no text, and this server takes text only."));
    }
    let text = template(&fields.require("text")?)?.source().to_owned();
    fields.finish()?;
    Ok(text)
}

/// By the names of the formula; or one grader, which the formula calls by its own.
fn parts(field: &Field<'_>) -> Result<BTreeMap<String, Grader>, ApiError> {
    let map = field.map()?;
    if map.get("type").is_some_and(|kind| kind.is_string() && kind != "multi") {
        let grader = read(field)?;
        return Ok(BTreeMap::from([(grader.name().to_owned(), grader)]));
    }
    if map.len() > MAX_ITEMS {
        return Err(field.invalid("invalid_value", format!("expected at most {MAX_ITEMS} graders, but got {}.", map.len())));
    }
    let part = |key: &String, value| {
        let field = field.entry(key, value);
        // Before it is read, so that no request can go deep.
        if value["type"] == "multi" {
            let path = format!("{}.type", field.path);
            let message = format!("Unsupported parameter: '{path}' is 'multi', which holds no other 'multi'.");
            return Err(ApiError::unsupported(path, message));
        }
        Ok((key.clone(), read(&field)?))
    };
    map.iter().map(|(key, value)| part(key, value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(grader: &Value) -> Result<Grader, ApiError> {
        parse(&Field { value: grader, path: "grader".into() })
    }

    fn check() -> Value {
        json!({"type": "string_check", "name": "a", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"})
    }

    fn judge() -> Value {
        json!({"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "{{sample.output_text}}"}]})
    }

    #[test]
    fn a_grader_comes_back_as_it_was_sent() {
        let label = json!({"type": "label_model", "name": "l", "model": "m", "labels": ["x", "y"], "passing_labels": ["x"],
            "input": [{"role": "developer", "content": "z"}]});
        let alike = json!({"type": "text_similarity", "name": "s", "input": "{{sample.output_text}}", "reference": "r", "evaluation_metric": "rouge_l"});
        let multi = json!({"type": "multi", "name": "m", "graders": {"a": check(), "s": alike}, "calculate_output": "a + s / 2"});
        for grader in [check(), alike, label, multi] {
            assert_eq!(json!(parsed(&grader).unwrap()), grader);
        }
        let mut blocks = judge();
        blocks["input"][0]["content"] = json!([{"type": "input_text", "text": "a"}, "{{item.b}}"]);
        assert_eq!(json!(parsed(&blocks).unwrap())["input"][0]["content"], "a\n{{item.b}}");
        let one = json!({"type": "multi", "name": "m", "graders": check(), "calculate_output": "2 * a"});
        assert_eq!(json!(parsed(&one).unwrap())["graders"]["a"], check());
    }

    #[test]
    fn each_rejection_names_its_path() {
        let changed = |mut grader: Value, path: &str, value: Value| {
            let (parent, key) = path.rsplit_once('/').unwrap();
            grader.pointer_mut(parent).unwrap()[key] = value;
            parsed(&grader).unwrap_err()
        };
        let multi =
            || json!({"type": "multi", "name": "m", "graders": {"a": check(), "j": judge()}, "calculate_output": "a + j"});
        for (grader, path, value, param) in [
            (check(), "/type", json!("python"), "grader.type"),
            (check(), "/type", json!("other"), "grader.type"),
            (check(), "/name", json!(""), "grader.name"),
            (check(), "/operation", json!("in"), "grader.operation"),
            (check(), "/input", json!("{{sample.x}}"), "grader.input"),
            (check(), "/reference", json!("{{answer}}"), "grader.reference"),
            (check(), "/extra", json!(1), "grader.extra"),
            (judge(), "/range", json!([1]), "grader.range"),
            (judge(), "/range", json!([1, 0]), "grader.range"),
            (judge(), "/input", json!([]), "grader.input"),
            (judge(), "/input/0/role", json!("robot"), "grader.input.0.role"),
            (judge(), "/input/0/content", json!("{{item"), "grader.input.0.content"),
            (judge(), "/input/0/content", json!([{"type": "input_image", "image_url": "x"}]), "grader.input.0.content.0.type"),
            (judge(), "/sampling_params", json!({"temperature": 3}), "grader.sampling_params.temperature"),
            (judge(), "/sampling_params", json!({"reasoning_effort": "low"}), "grader.sampling_params.reasoning_effort"),
            (multi(), "/calculate_output", json!("a +"), "grader.calculate_output"),
            (multi(), "/calculate_output", json!("a + b"), "grader.calculate_output"),
            (multi(), "/graders/a/input", json!("{{}}"), "grader.graders.a.input"),
            (multi(), "/graders/a", multi(), "grader.graders.a.type"),
        ] {
            assert_eq!(changed(grader, path, value).param.as_deref(), Some(param), "{path}");
        }
        let long = parsed(
            &json!({"type": "multi", "name": "m", "graders": {"a": check()}, "calculate_output": "a", "x": "y".repeat(MAX_LENGTH)}),
        );
        assert!(long.unwrap_err().message.contains("may have 256 KiB"));
        let cosine =
            json!({"type": "text_similarity", "name": "s", "input": "a", "reference": "b", "evaluation_metric": "cosine"});
        let error = parsed(&cosine).unwrap_err();
        assert_eq!((error.param.as_deref(), error.message.contains("embeddings")), (Some("grader.evaluation_metric"), true));
    }
}
