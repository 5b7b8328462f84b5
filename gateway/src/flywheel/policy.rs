//! `[loop.NAME]` of `tidemill.toml` as a policy; each refusal names the field and what to do.

use crate::fine_tuning::{Kind, Method};
use crate::http::error::ApiError;
use crate::keys::span;
use crate::openai::fields::{Field, Fields};
use crate::rollout::spec::{Kind as RolloutKind, Spec};
use serde_json::{Map, Value, json};
use std::sync::LazyLock;
use tidemill_rlhf::dataset::Query;
use tidemill_rlhf::dataset::query::{RowKind, time};
use tidemill_rlhf::evaluate::{Gates, Rules};
use tidemill_rlhf::flywheel::{Measuring, Need, Policy, QualityRule, TimeOfDay, When};
use tidemill_rlhf::quality::{QualityOptions, assess};
use tidemill_rlhf::reward::RewardFunction;

/// Longest name of a loop: it stands in those of jobs, adapters and rollouts.
const MAX_NAME: usize = 40;
const MAX_DATASET: usize = 64;
const MAX_TEXT: usize = 4096;
/// Share of the rows that is held out, unless said.
const HELD_OUT: f64 = 0.2;
const PROMPTS: i64 = 50;
const MAX_TOKENS: i64 = 256;
const MOST: i64 = 1_000_000_000;
/// What the arms of a rollout are called while nobody knows which they will be.
const CONTROL: &str = "the model as it is";
const TREATMENT: &str = "the adapter";

/// The checks of a quality report.
static CHECKS: LazyLock<Vec<String>> =
    LazyLock::new(|| assess(&[], &QualityOptions::default()).checks.into_iter().map(|check| check.name).collect());

/// The policy of the loop of this name.
pub fn read(name: &str, value: &Value) -> Result<Policy, ApiError> {
    check_name(name)?;
    let mut fields = Fields::root(value)?;
    let model = text(&fields.require("model")?)?;
    let base = fields.get("base").map(|field| text(&field)).transpose()?.unwrap_or_else(|| model.clone());
    let dataset = match fields.get("dataset") {
        None => name.to_owned(),
        Some(field) => {
            let text = text(&field)?;
            let fits = is_plain(&text, MAX_DATASET) && text != "builds";
            let why = "use up to 64 lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit.";
            if fits { text } else { return Err(field.invalid("invalid_value", why)) }
        }
    };
    let when = when(&fields.require("when")?)?;
    let method = method(fields.get("train").as_ref())?;
    let (feedback, window) = feedback(fields.get("feedback").as_ref(), method.kind)?;
    let quality = quality(fields.get("quality").as_ref())?;
    let measuring = measuring(fields.get("evaluate").as_ref())?;
    let gates = gates(fields.get("gates").as_ref(), &measuring, method.kind)?;
    let rollout = fields.require("rollout")?;
    let rollout = Value::Object(rollout.map()?.clone());
    fields.finish()?;
    let policy =
        Policy { model, base, dataset, when, feedback, window, quality, recipe: method.to_json(), measuring, gates, rollout };
    if planned(&policy, name)?.kind == RolloutKind::Shadow {
        let why =
            "Invalid 'rollout.kind': nobody sees a shadow's answers, so none is ever promoted. Use 'canary', 'ab' or 'bandit'.";
        return Err(ApiError::invalid("rollout.kind", "invalid_value", why));
    }
    Ok(policy)
}

/// The rollout of any cycle, while nobody knows its arms.
pub fn planned(policy: &Policy, name: &str) -> Result<Spec, ApiError> {
    spec(policy, name, CONTROL, TREATMENT)
}

/// The rollout of a cycle: the policy's, between these variants.
pub fn spec(policy: &Policy, name: &str, control: &str, treatment: &str) -> Result<Spec, ApiError> {
    let mut rollout = policy.rollout.as_object().cloned().unwrap_or_default();
    for own in ["name", "model", "arms"] {
        if rollout.contains_key(own) {
            let param = format!("rollout.{own}");
            let message = format!(
                "Invalid '{param}': the loop says it: its cycle, its model, what that serves and the adapter. Leave it out."
            );
            return Err(ApiError::invalid(param, "invalid_value", message));
        }
    }
    rollout.insert("name".to_owned(), json!(name));
    rollout.insert("model".to_owned(), json!(policy.model));
    rollout.insert("arms".to_owned(), json!([{ "variant": control }, { "variant": treatment }]));
    Spec::parse(&Value::Object(rollout)).map_err(|error| within(error, "", "rollout."))
}

/// The same refusal where a field lies elsewhere in the table than in the request that it is read as.
fn within(mut error: ApiError, from: &str, to: &str) -> ApiError {
    if let Some(param) = &error.param {
        let moved = format!("{to}{}", param.strip_prefix(from).unwrap_or(param));
        error.message = error.message.replace(&format!("'{param}'"), &format!("'{moved}'"));
        error.param = Some(moved);
    }
    error
}

/// Whether it can be a folder's name everywhere.
fn is_plain(name: &str, longest: usize) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= longest && name.starts_with(plain) && name.chars().all(|c| plain(c) || "._-".contains(c))
}

fn check_name(name: &str) -> Result<(), ApiError> {
    if is_plain(name, MAX_NAME) {
        return Ok(());
    }
    let message = format!(
        "a loop's name is up to {MAX_NAME} lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit. Rename it."
    );
    Err(ApiError::bad_request(message))
}

fn text(field: &Field<'_>) -> Result<String, ApiError> {
    let text = field.short_string(MAX_TEXT)?;
    if text.trim().is_empty() {
        return Err(field.invalid("invalid_value", "it is empty. Give a name."));
    }
    Ok(text.to_owned())
}

fn when(field: &Field<'_>) -> Result<When, ApiError> {
    let mut fields = field.object()?;
    let at = match fields.get("at") {
        Some(at) => Some(TimeOfDay::parse(at.string()?).map_err(|why| at.invalid("invalid_value", format!("{why}.")))?),
        None => None,
    };
    let preferences = match (at, fields.integer("preferences", 1..=MOST)?) {
        (None, None) => {
            return Err(
                field.invalid("missing_required_parameter", "nothing would begin a cycle. Give 'preferences', 'at' or both.")
            );
        }
        (_, preferences) => preferences.map_or(1, i64::unsigned_abs),
    };
    let raters = fields.integer("raters", 1..=MOST)?.map_or(1, i64::unsigned_abs);
    let need = match (fields.get("need"), at) {
        (None, _) => Need::All,
        (Some(need), None) => {
            return Err(need.invalid("invalid_value", "there is no 'at' for it. Leave it out, or give a time of day."));
        }
        (Some(need), Some(_)) => match need.one_of(&["all", "any"])? {
            "any" => Need::Any,
            _ => Need::All,
        },
    };
    fields.finish()?;
    Ok(When { preferences, raters, at, need })
}

/// A method of the fine-tuning API, with its hyperparameters beside its name.
fn method(field: Option<&Field<'_>>) -> Result<Method, ApiError> {
    let mut numbers = match field {
        Some(field) => field.map()?.clone(),
        None => Map::new(),
    };
    let name = match numbers.remove("method") {
        None => "dpo",
        Some(name) => {
            let field = Field { value: &name, path: "train.method".into() };
            // Reinforcement learns from a grader and not from people.
            field.one_of(&["dpo", "supervised"])?
        }
    };
    let body = json!({ "method": { "type": name, name: { "hyperparameters": numbers } } });
    let read = || Method::parse(&mut Fields::root(&body)?);
    read().map_err(|error| within(error, &format!("method.{name}.hyperparameters."), "train."))
}

/// A dataset's query, and the span before a cycle that it is about.
fn feedback(field: Option<&Field<'_>>, kind: Kind) -> Result<(Query, Option<u64>), ApiError> {
    let mut map = match field {
        Some(field) => field.map()?.clone(),
        None => Map::new(),
    };
    let invalid = |key: &str, why: String| {
        let param = if key.is_empty() { "feedback".to_owned() } else { format!("feedback.{key}") };
        ApiError::invalid(param.clone(), "invalid_value", format!("Invalid '{param}': {why}"))
    };
    if map.contains_key("until") {
        return Err(invalid("until", "a cycle takes what there is when it begins. Leave it out.".to_owned()));
    }
    let mut window = None;
    if let Some(since) = map.remove("since") {
        let since = since.as_str().ok_or_else(|| invalid("since", "expected a date, or a span such as \"90d\".".to_owned()))?;
        match span(since) {
            Ok(span) => window = Some(span.as_secs()),
            Err(_) => {
                let at = time(since, 0).map_err(|why| invalid("since", format!("{why}.")))?;
                map.insert("since".to_owned(), json!(at));
            }
        }
    }
    let rows = if kind == Kind::Supervised { RowKind::Demonstration } else { RowKind::Preference };
    map.entry("rows").or_insert_with(|| json!([rows]));
    map.entry("held_out").or_insert_with(|| json!(HELD_OUT));
    let query: Query = serde_json::from_value(Value::Object(map)).map_err(|error| invalid("", format!("{error}.")))?;
    query.check().map_err(|error| invalid(error.field, format!("{}.", error.reason)))?;
    if query.held_out <= 0.0 {
        return Err(invalid(
            "held_out",
            "the adapter is measured on rows that it did not learn. Give a share, such as 0.2.".to_owned(),
        ));
    }
    if query.rows != [rows] {
        return Err(invalid(
            "rows",
            format!("this method learns from rows of the kind '{}' alone. Leave it out.", rows.as_str()),
        ));
    }
    Ok((query, window))
}

fn quality(field: Option<&Field<'_>>) -> Result<QualityRule, ApiError> {
    let Some(field) = field else { return Ok(QualityRule::default()) };
    let mut fields = field.object()?;
    let mut allow = Vec::new();
    if let Some(field) = fields.get("allow") {
        for (index, item) in field.array(CHECKS.len())?.iter().enumerate() {
            let item = field.item(index, item);
            let name = item.string()?;
            if !CHECKS.iter().any(|known| known == name) {
                return Err(item.unknown_value(name, &CHECKS.iter().map(String::as_str).collect::<Vec<_>>()));
            }
            allow.push(name.to_owned());
        }
    }
    let strict = fields.bool_or("strict", false)?;
    let thresholds = match fields.get("thresholds") {
        None => Default::default(),
        Some(field) => {
            let read = serde_json::from_value(Value::Object(field.map()?.clone()));
            read.map_err(|error| field.invalid("invalid_value", format!("{error}.")))?
        }
    };
    fields.finish()?;
    Ok(QualityRule { allow, strict, thresholds })
}

fn measuring(field: Option<&Field<'_>>) -> Result<Measuring, ApiError> {
    let empty = json!({});
    let usual = Field { value: &empty, path: "evaluate".into() };
    let field = field.unwrap_or(&usual);
    let mut fields = field.object()?;
    let place = fields.get("text").map(|field| text(&field)).transpose()?;
    let prompts = fields.integer("prompts", 0..=10_000)?.unwrap_or(PROMPTS);
    let max_tokens = fields.integer("max_tokens", 1..=16_384)?.unwrap_or(MAX_TOKENS);
    let temperature = fields.decimal("temperature", 0.0..=2.0)?.unwrap_or(1.0);
    let seed = fields.integer("seed", 0..=MOST)?.unwrap_or(0);
    let keep = fields.integer("keep", 1..=1_000_000)?.map_or(Measuring::KEEP, i64::unsigned_abs);
    let rules_field = fields.get("rules");
    let mut rules: Vec<RewardFunction> = Vec::new();
    if let Some(field) = &rules_field {
        for (index, item) in field.filled_array(64)?.iter().enumerate() {
            let read = serde_json::from_value(item.clone());
            rules.push(read.map_err(|error| field.item(index, item).invalid("invalid_value", format!("{error}.")))?);
        }
    }
    let mut weights = None;
    if let Some(field) = fields.get("weights") {
        let each = field.array(64)?.iter().enumerate().map(|(index, item)| field.item(index, item).double(-1e6..=1e6));
        weights = Some(each.collect::<Result<Vec<f64>, _>>()?);
    }
    fields.finish()?;
    if let Some(field) = &rules_field {
        Rules::new(rules.clone(), weights.clone()).map_err(|error| field.invalid("invalid_value", format!("{error}.")))?;
    } else if weights.is_some() {
        let message = "Invalid 'evaluate.weights': there are no 'rules' to weigh. Leave it out.";
        return Err(ApiError::invalid("evaluate.weights", "invalid_value", message));
    }
    let count = |number: i64| usize::try_from(number).unwrap_or(0);
    let (prompts, max_tokens, seed) = (count(prompts), count(max_tokens), seed.unsigned_abs());
    Ok(Measuring { text: place, prompts, max_tokens, temperature, seed, rules, weights, keep })
}

/// Gates by name: a threshold, or `"off"`. Gates that nothing could open are refused now and not after every training.
fn gates(field: Option<&Field<'_>>, measuring: &Measuring, kind: Kind) -> Result<Gates, ApiError> {
    let mut map = match field {
        Some(field) => field.map()?.clone(),
        None => Map::new(),
    };
    let invalid = |key: &str, why: &str| {
        let param = if key.is_empty() { "gates".to_owned() } else { format!("gates.{key}") };
        ApiError::invalid(param.clone(), "invalid_value", format!("Invalid '{param}': {why}"))
    };
    // Without a judge there is no duel, and without comparisons there are none to win.
    let mut off = Vec::new();
    if measuring.rules.is_empty() {
        off.push("win_rate");
    }
    if kind == Kind::Supervised {
        off.extend(["comparisons", "accuracy"]);
    }
    for key in off {
        let asked = map.get(key).is_some_and(|value| *value != json!("off"));
        if asked && key == "win_rate" {
            return Err(invalid(key, "nobody judges a duel. Give 'evaluate.rules', or switch it \"off\"."));
        }
        if asked {
            return Err(invalid(key, "demonstrations are no comparisons. Switch it \"off\", and let 'evaluate.rules' judge."));
        }
        map.insert(key.to_owned(), json!("off"));
    }
    for (key, value) in &mut map {
        match value {
            Value::String(word) if word == "off" => *value = Value::Null,
            Value::Number(_) => {}
            _ => return Err(invalid(key, "expected a number, or \"off\".")),
        }
    }
    let gates: Gates = serde_json::from_value(Value::Object(map)).map_err(|error| invalid("", &format!("{error}.")))?;
    if gates.text_loss.is_some() && measuring.text.is_none() {
        return Err(invalid(
            "text_loss",
            "there is no ordinary text to measure it on. Name a file in 'evaluate.text', or switch it \"off\".",
        ));
    }
    let answers = [gates.win_rate, gates.kl_per_token, gates.shortest, gates.longest, gates.refusals, gates.truncated];
    if measuring.prompts == 0 && answers.iter().any(Option::is_some) {
        return Err(invalid(
            "",
            "gates that look at answers are on, and 'evaluate.prompts' is 0. Raise it, or switch them \"off\".",
        ));
    }
    if gates.accuracy.is_none() && gates.win_rate.is_none() {
        let why = "nothing would say that the adapter is better. Leave 'accuracy' on, or give 'evaluate.rules' for 'win_rate'.";
        return Err(invalid("", why));
    }
    Ok(gates)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn table() -> Value {
        json!({
            "model": "assistant", "base": "smollm2",
            "when": {"preferences": 20, "raters": 3},
            "evaluate": {"text": "ordinary.txt", "rules": [{"type": "length", "max": 40, "unit": "words"}]},
            "rollout": {
                "kind": "canary", "steps": [{"set_weight": 20}, {"pause": {"samples": 20}}],
                "metrics": [{"metric": "error_rate", "guardrail": {"max": 0.05}}],
            },
        })
    }

    fn with(path: &str, value: Value) -> Value {
        let mut table = table();
        let mut place = &mut table;
        for key in path.split('.') {
            place = &mut place[key];
        }
        *place = value;
        table
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let policy = read("shorter", &table()).unwrap();
        assert_eq!((policy.model.as_str(), policy.base.as_str(), policy.dataset.as_str()), ("assistant", "smollm2", "shorter"));
        assert_eq!(policy.when, When { preferences: 20, raters: 3, at: None, need: Need::All });
        assert_eq!(
            (policy.feedback.held_out, policy.feedback.rows.as_slice(), policy.window),
            (0.2, [RowKind::Preference].as_slice(), None)
        );
        assert_eq!(policy.recipe["type"], "dpo");
        assert_eq!(policy.gates, Gates::default());
        assert_eq!((policy.measuring.prompts, policy.measuring.max_tokens), (50, 256));
        let kept: Policy = serde_json::from_value(json!(policy)).unwrap();
        assert_eq!(kept, policy);
        let spec = spec(&policy, "loop-shorter-1", "assistant", "loop-shorter-1").unwrap();
        assert_eq!((spec.model.as_str(), spec.arms[1].variant.as_str()), ("assistant", "loop-shorter-1"));
    }

    #[test]
    fn what_is_said_is_taken() {
        let mut table = with("when", json!({"at": "03:00", "need": "any", "preferences": 5}));
        table["train"] = json!({"method": "dpo", "beta": 0.2, "n_epochs": 2, "learning_rate_multiplier": 20});
        table["feedback"] = json!({"since": "90d", "sources": ["app"], "from": ["comparison"], "held_out": 0.25});
        table["quality"] =
            json!({"allow": ["length_bias"], "strict": true, "thresholds": {"size": {"preferences": {"warn": 20, "fail": 10}}}});
        table["gates"] = json!({"shortest": 0.1, "kl_per_token": "off"});
        let policy = read("shorter", &table).unwrap();
        assert_eq!((policy.when.need, policy.when.at.unwrap().to_string()), (Need::Any, "03:00".into()));
        assert_eq!(policy.recipe["dpo"]["hyperparameters"]["learning_rate_multiplier"], 20.0);
        assert_eq!(
            (policy.window, policy.feedback.since, policy.feedback.sources.as_slice()),
            (Some(90 * 86_400), None, ["app".to_owned()].as_slice())
        );
        assert_eq!((policy.quality.allow.len(), policy.quality.thresholds.size.preferences.fail), (1, 10.0));
        assert_eq!((policy.gates.shortest, policy.gates.kl_per_token, policy.gates.longest), (Some(0.1), None, Some(2.0)));
        let dated = read("shorter", &with("feedback", json!({"since": "2026-01-01"}))).unwrap();
        assert_eq!((dated.window, dated.feedback.since), (None, Some(1_767_225_600_000_000)));
        // Without a judge there is no duel.
        let plain = read("shorter", &with("evaluate", json!({"text": "t"}))).unwrap();
        assert_eq!((plain.gates.win_rate, plain.gates.accuracy), (None, Some(0.5)));
        let taught = read("shorter", &with("train", json!({"method": "supervised"}))).unwrap();
        assert_eq!((taught.gates.accuracy, taught.gates.win_rate), (None, Some(0.5)));
        assert_eq!(taught.feedback.rows, [RowKind::Demonstration]);
    }

    #[test]
    fn each_refusal_names_its_field() {
        for (path, value, param) in [
            ("model", json!(""), "model"),
            ("dataset", json!("../x"), "dataset"),
            ("when", json!(null), "when"),
            ("when", json!({}), "when"),
            ("when.preferences", json!(0), "when.preferences"),
            ("when.at", json!("3 am"), "when.at"),
            ("when.need", json!("any"), "when.need"),
            ("when.often", json!(1), "when.often"),
            ("train", json!({"method": "reinforcement"}), "train.method"),
            ("train", json!({"beta": 9}), "train.beta"),
            ("train", json!({"speed": 9}), "train.speed"),
            ("feedback", json!({"until": "2026-01-01"}), "feedback.until"),
            ("feedback", json!({"since": "yesterday"}), "feedback.since"),
            ("feedback", json!({"held_out": 0}), "feedback.held_out"),
            ("feedback", json!({"held_out": 0.9}), "feedback.held_out"),
            ("feedback", json!({"modles": []}), "feedback"),
            ("feedback", json!({"rows": ["unpaired"]}), "feedback.rows"),
            ("quality", json!({"allow": ["lenght_bias"]}), "quality.allow.0"),
            ("quality", json!({"thresholds": {"sise": 1}}), "quality.thresholds"),
            ("evaluate.rules", json!([{"type": "lenght"}]), "evaluate.rules.0"),
            ("evaluate.weights", json!([1, 2]), "evaluate.rules"),
            ("evaluate", json!({"text": "t", "weights": [1]}), "evaluate.weights"),
            ("evaluate.prompts", json!(0), "gates"),
            ("evaluate.text", json!(null), "gates.text_loss"),
            ("gates", json!({"acuracy": 1}), "gates"),
            ("gates", json!({"accuracy": "no"}), "gates.accuracy"),
            ("gates", json!({"accuracy": "off", "win_rate": "off"}), "gates"),
            ("rollout", json!(null), "rollout"),
            ("rollout.arms", json!([]), "rollout.arms"),
            ("rollout.steps", json!([{"set_weight": 200}]), "rollout.steps.0.set_weight"),
            ("rollout.metrics", json!([{"metric": "error_rate"}]), "rollout.metrics.0"),
        ] {
            let error = read("shorter", &with(path, value.clone())).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{path} {value}: {}", error.message);
            // What names the values that there are leaves the field to its place in the file.
            let named = error.message.contains(&format!("'{param}'")) || error.message.starts_with("Invalid value: ");
            assert!(named, "{path} {value}: {}", error.message);
        }
        let judged = with("evaluate", json!({"text": "t"}));
        let judged = json!({"gates": {"win_rate": 0.5}, "model": "m", "when": judged["when"], "evaluate": judged["evaluate"], "rollout": judged["rollout"]});
        assert_eq!(read("a", &judged).unwrap_err().param.as_deref(), Some("gates.win_rate"));
        let mut taught = with("train", json!({"method": "supervised"}));
        taught["gates"] = json!({"accuracy": 0.5});
        assert_eq!(read("a", &taught).unwrap_err().param.as_deref(), Some("gates.accuracy"));
        let shadow = json!({"kind": "shadow", "metrics": [{"metric": "error_rate", "guardrail": {"max": 0.05}}]});
        assert_eq!(read("a", &with("rollout", shadow)).unwrap_err().param.as_deref(), Some("rollout.kind"));
        for name in ["", "A", "..", "a b", "a/b", &"a".repeat(41)] {
            assert!(read(name, &table()).is_err(), "{name}");
        }
    }
}
