//! Rewards of texts, and of programs that misbehave.

use serde_json::{Map, Value, json};

use super::*;

fn answer<'a>(text: &'a str, columns: &'a Map<String, Value>) -> Answer<'a> {
    Answer { prompt: &[], columns, text, tokens: text.len(), ended: true }
}

fn function(value: Value) -> RewardFunction {
    serde_json::from_value(value).unwrap()
}

fn rewards(functions: &[Value], weights: Option<&[f64]>) -> Result<Rewards, RewardError> {
    let functions: Vec<RewardFunction> = functions.iter().cloned().map(function).collect();
    Rewards::new(&functions, weights, &mut |judge: &Judge| match judge {
        Judge::Grader { grader } => Ok(Box::new(grader::Grading { grader: (**grader).clone(), oracle: None })),
        _ => Err(RewardError::Model { path: "nowhere".into(), detail: "there is none in this test".to_owned() }),
    })
}

fn score(value: Value, texts: &[&str], columns: Value) -> Vec<Option<f64>> {
    let Value::Object(columns) = columns else { panic!("columns are an object") };
    let answers: Vec<Answer<'_>> = texts.iter().map(|text| answer(text, &columns)).collect();
    rewards(&[value], None).unwrap().score(&answers).unwrap().each.remove(0).1
}

const YES: Option<f64> = Some(1.0);
const NO: Option<f64> = Some(0.0);

#[test]
fn json_is_one_value_and_nothing_else() {
    let texts = [" {\"a\": [1]}\n", "[]", "{\"a\": 1} and so on", "```json\n{}\n```", "12", "", "{'a': 1}"];
    assert_eq!(score(json!({"type": "json"}), &texts, json!({})), [YES, YES, NO, NO, NO, NO, NO]);
    assert_eq!(score(json!({"type": "json", "any": true}), &["12", "null", "x"], json!({})), [YES, YES, NO]);
}

#[test]
fn a_schema_is_kept_or_not() {
    let schema = json!({
        "type": "object", "required": ["name", "age"], "additionalProperties": false,
        "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer", "minimum": 0}}
    });
    let texts = [
        r#"{"name": "Ann", "age": 3}"#,
        r#"{"name": "Ann"}"#,
        r#"{"name": "ann", "age": 3}"#,
        r#"{"name": "Ann", "age": -1}"#,
        "Ann",
    ];
    assert_eq!(score(json!({"type": "json_schema", "schema": schema}), &texts, json!({})), [YES, NO, NO, NO, NO]);
    let half = Some(0.5);
    let partial = score(json!({"type": "json_schema", "schema": schema, "partial": true}), &texts, json!({}));
    assert_eq!(partial, [YES, half, half, half, NO]);
    let bad = function(json!({"type": "json_schema", "schema": {"type": "objekt"}})).check().unwrap_err().to_string();
    assert!(bad.starts_with("reward_funcs: json_schema: schema: "), "{bad}");
}

#[test]
fn expressions_lengths_and_expected_answers() {
    assert_eq!(score(json!({"type": "regex", "pattern": "\\d+"}), &["a 12", "a"], json!({})), [YES, NO]);
    let whole = json!({"type": "regex", "pattern": "a|b", "whole": true});
    assert_eq!(score(whole, &["a", "b", "ab", "a\n"], json!({})), [YES, YES, NO, NO]);

    let words = json!({"type": "length", "min": 2, "max": 4, "unit": "words"});
    assert_eq!(
        score(words, &["a b", "a b c d", "a", "a b c d e", "", "a b c d e f g h i"], json!({})),
        [YES, YES, Some(0.5), Some(0.75), NO, NO]
    );
    assert_eq!(score(json!({"type": "length", "max": 2, "unit": "characters"}), &["äö", "äöü"], json!({})), [YES, Some(0.5)]);

    let exact = json!({"type": "exact_match"});
    assert_eq!(score(exact.clone(), &[" 42\n", "43"], json!({"answer": "42"})), [YES, NO]);
    assert_eq!(score(exact.clone(), &["42"], json!({"answer": 42})), [YES]);
    let inside = json!({"type": "exact_match", "column": "city", "inside": true, "ignore_case": true});
    assert_eq!(score(inside, &["It is PARIS.", "Rome"], json!({"city": "Paris"})), [YES, NO]);
    // Nobody said what to expect.
    let error = rewards(&[exact], None).unwrap().score(&[answer("42", &Map::new())]).unwrap_err().to_string();
    assert!(error.contains("none of the reward functions had an opinion"), "{error}");
}

#[test]
fn the_sum_is_weighted_and_no_opinion_counts_for_nothing() {
    let functions =
        [json!({"type": "json"}), json!({"type": "length", "max": 4, "unit": "characters"}), json!({"type": "exact_match"})];
    let rewards = rewards(&functions, Some(&[2.0, -0.5, 1.0])).unwrap();
    let columns = Map::new();
    let scores = rewards.score(&[answer("{}", &columns), answer("longer text", &columns)]).unwrap();
    assert_eq!(scores.total, [1.5, 0.0]);
    assert_eq!(scores.each.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["json", "length", "exact_match"]);
    assert_eq!(scores.each[2].1, [None, None]);
}

#[test]
fn functions_are_read_and_written_and_what_is_wrong_is_named() {
    let named = json!({"name": "short", "type": "length", "max": 5, "unit": "words"});
    let read = function(named.clone());
    assert_eq!((read.name(), serde_json::to_value(&read).unwrap()), ("short", named));
    assert_eq!(function(json!({"type": "json"})).name(), "json");
    for (value, expected) in [
        (json!({"type": "jsno"}), "unknown variant `jsno`"),
        (json!({"type": "json", "strict": true}), "unknown field `strict`"),
        (json!({"pattern": "a"}), "missing field `type`"),
        (json!({"type": "regex"}), "missing field `pattern`"),
        (json!({"type": "json", "name": 3}), "name is 3, but should be a text"),
    ] {
        let error = serde_json::from_value::<RewardFunction>(value).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    for (value, expected) in [
        (json!({"type": "regex", "pattern": "("}), "reward_funcs: regex: pattern: "),
        (json!({"type": "length"}), "reward_funcs: length: give min, max or both"),
        (json!({"type": "length", "min": 3, "max": 2}), "min is 3, above max, which is 2"),
        (json!({"type": "program", "command": []}), "command names no program"),
        (json!({"type": "program", "command": ["cat"], "timeout_s": 0}), "timeout_s must be above 0"),
        (json!({"name": "mine", "type": "program", "command": [""]}), "reward_funcs: mine: command"),
    ] {
        let error = function(value).check().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

fn shell(script: &str, timeout_s: f64) -> Value {
    json!({"type": "program", "command": ["sh", "-c", script], "timeout_s": timeout_s})
}

#[test]
fn a_program_reads_the_answer_and_prints_its_reward() {
    // Longer than a pipe holds, so that reading and writing must go on at once.
    let long = "x".repeat(200_000);
    let script = "read line; case $line in *yes*) echo 0.75;; *none*) echo null;; *) echo 0.0;; esac";
    let found = score(shell(script, 30.0), &["yes", "no", "none", &long], json!({"answer": "a\nb"}));
    assert_eq!(found, [Some(0.75), Some(0.0), None, Some(0.0)]);
    // It is told what the row says, and sees no more of the environment than it needs.
    let found = score(
        shell("grep -q '\"answer\":\"42\"' && [ -z \"$CARGO_PKG_NAME\" ] && echo 1", 30.0),
        &["?"],
        json!({"answer": "42"}),
    );
    assert_eq!(found, [YES]);
    // One that does not read at all.
    assert_eq!(score(shell("echo 1", 30.0), &[&long], json!({})), [YES]);
}

#[test]
fn a_program_that_fails_costs_one_answer_and_one_that_always_fails_stops_everything() {
    let script = "read line; case $line in *bad*) echo no >&2; exit 3;; *odd*) echo maybe;; *) echo 1;; esac";
    assert_eq!(score(shell(script, 30.0), &["good", "bad", "odd"], json!({})), [YES, NO, NO]);
    let columns = Map::new();
    let error = |value: Value| rewards(&[value], None).unwrap().score(&[answer("bad", &columns)]).unwrap_err().to_string();
    let told = error(shell(script, 30.0));
    assert!(told.contains("failed for every answer: exit status: 3: no"), "{told}");
    let told = error(json!({"type": "program", "command": ["/there/is/no/such/program"]}));
    assert!(told.contains("it could not be started"), "{told}");
    let told = error(shell("yes | head -c 300000", 30.0));
    assert!(told.contains("failed for every answer"), "{told}");
}

#[test]
fn a_program_that_takes_too_long_is_ended_with_all_that_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("alive");
    // A child of the program holds its output open and would leave a file behind.
    let script = format!("read line; case $line in *slow*) (sleep 8; touch {}) & sleep 600;; *) echo 1;; esac", file.display());
    let began = std::time::Instant::now();
    assert_eq!(score(shell(&script, 3.0), &["slow", "quick"], json!({})), [NO, YES]);
    assert!(began.elapsed() < std::time::Duration::from_secs(60));
    std::thread::sleep(std::time::Duration::from_secs(8));
    assert!(!file.exists());
}

#[test]
fn a_child_that_leaves_the_group_and_holds_the_output_open_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let escapes = format!("setsid sh -c 'echo $$ >> {}; exec sleep 300' &", folder.path().join("escaped").display());
    let script = format!(
        "read line; {escapes} case $line in *slow*) sleep 600;; *loud*) yes | head -c 200000 >&2; echo 0.5;; *) echo 1;; esac"
    );
    let began = std::time::Instant::now();
    assert_eq!(score(shell(&script, 15.0), &["slow", "quick", "loud"], json!({})), [NO, YES, Some(0.5)]);
    assert!(began.elapsed() < std::time::Duration::from_secs(120));
    let escaped = std::fs::read_to_string(folder.path().join("escaped")).unwrap();
    assert!(std::process::Command::new("kill").args(escaped.split_whitespace()).status().unwrap().success(), "they live on");
}

#[test]
fn graders_of_the_api_are_rewards_too() {
    let grader = json!({"type": "grader", "grader": {"type": "string_check", "name": "exact", "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}", "operation": "eq"}});
    assert_eq!(score(grader.clone(), &["4", "5"], json!({"answer": "4"})), [YES, NO]);
    assert_eq!(function(grader.clone()).name(), "exact");
    assert_eq!(function(json!(function(grader.clone()))), function(grader));
    let bad =
        function(json!({"type": "grader", "grader": {"type": "multi", "name": "m", "calculate_output": "x", "graders": {}}}));
    assert_eq!(bad.check().unwrap_err().to_string(), "reward_funcs: m: grader.graders: it has no grader; name at least one");
}
