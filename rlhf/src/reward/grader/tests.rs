//! Graders over answers, rows and models that say what the test wants.

use std::sync::Mutex;

use serde_json::{Map, json};

use super::*;

/// Replies in turn, and keeps what it was asked.
struct Says(Mutex<Vec<Result<&'static str, &'static str>>>, Mutex<Vec<Question>>);

impl Says {
    fn new(replies: &[Result<&'static str, &'static str>]) -> Self {
        Self(Mutex::new(replies.iter().rev().copied().collect()), Mutex::default())
    }
}

impl Oracle for Says {
    fn ask(&self, question: &Question) -> Result<Reply, String> {
        self.1.lock().unwrap().push(question.clone());
        let reply = self.0.lock().unwrap().pop().unwrap();
        reply.map(|text| Reply { text: text.to_owned(), tokens: 10 }).map_err(str::to_owned)
    }
}

fn grader(value: Value) -> Grader {
    let grader: Grader = serde_json::from_value(value.clone()).unwrap();
    assert_eq!(serde_json::from_value::<Grader>(json!(grader)).unwrap(), grader, "{value}");
    grader
}

fn graded(item: Value, text: &str) -> Graded<'_> {
    Graded::new(Cow::Owned(item), text)
}

fn check(operation: &str) -> Value {
    json!({"type": "string_check", "name": "check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": operation})
}

fn judge() -> Value {
    json!({"type": "score_model", "name": "judge", "model": "m", "range": [0, 10],
        "input": [{"role": "user", "content": "Grade {{sample.output_text}}."}]})
}

#[test]
fn texts_are_compared_as_the_operation_says() {
    for (operation, text, expected) in [
        ("eq", "Paris", 1.0),
        ("eq", "paris", 0.0),
        ("eq", "Paris.", 0.0),
        ("ne", "Rome", 1.0),
        ("ne", "Paris", 0.0),
        ("like", "It is Paris.", 1.0),
        ("like", "It is paris.", 0.0),
        ("ilike", "IT IS PARIS.", 1.0),
        ("ilike", "Rome", 0.0),
    ] {
        let grade = grader(check(operation)).grade(&graded(json!({"answer": "Paris"}), text), None);
        assert_eq!((grade.reward, grade.faults.len()), (expected, 0), "{operation} {text}");
    }
}

#[test]
fn a_formula_weighs_graders_and_what_cannot_judge_gives_nothing() {
    let multi = grader(json!({
        "type": "multi", "name": "all", "calculate_output": "0.5 * exact + 0.25 * alike + field / 4",
        "graders": {
            "exact": check("eq"),
            "alike": {"type": "text_similarity", "name": "alike", "input": "{{sample.output_text}}", "reference": "Paris", "evaluation_metric": "fuzzy_match"},
            "field": {"type": "string_check", "name": "field", "input": "{{sample.output_json.city}}", "reference": "Paris", "operation": "eq"},
        },
    }));
    multi.check().unwrap();
    let grade = multi.grade(&graded(json!({"answer": "Paris"}), "Paris"), None);
    assert_eq!((grade.reward, grade.parts["alike"], grade.parts["field"]), (0.75, 1.0, 0.0));
    assert_eq!((grade.faults[0].kind, grade.faults[0].grader.as_str()), (FaultKind::Sample, "field"));
    let grade = multi.grade(&graded(json!({"answer": "x"}), "{\"city\": \"Paris\"}"), None);
    assert_eq!((grade.parts["field"], grade.faults.len()), (1.0, 0));
    assert_eq!(multi.missing(&json!({"other": 1})).unwrap().to_string(), "item.answer");
    let zero = grader(json!({"type": "multi", "name": "z", "calculate_output": "1 / a", "graders": {"a": check("eq")}}));
    let grade = zero.grade(&graded(json!({"answer": "Paris"}), "Rome"), None);
    assert_eq!((grade.reward, grade.faults[0].kind), (0.0, FaultKind::Formula));
}

#[test]
fn models_score_and_label() {
    let oracle = Says::new(&[
        Ok("{\"result\": 7.5}"),
        Ok("{\"result\": 11}"),
        Err("away"),
        Ok("{\"label\": \"fine\"}"),
        Ok("{\"label\": \"bad\"}"),
    ]);
    let score = grader(judge());
    score.check().unwrap();
    let answer = graded(json!({}), "Paris");
    let grade = score.grade(&answer, Some(&oracle));
    assert_eq!((grade.reward, grade.tokens["m"]), (7.5, 10));
    assert_eq!(score.grade(&answer, Some(&oracle)).faults[0].kind, FaultKind::Reply);
    let fault = score.grade(&answer, Some(&oracle)).faults.remove(0);
    assert_eq!((fault.kind, fault.detail.as_str()), (FaultKind::Model, "away"));
    assert_eq!(score.grade(&answer, None).faults[0].kind, FaultKind::Model);
    let label = grader(
        json!({"type": "label_model", "name": "l", "model": "m", "labels": ["good", "fine", "bad"], "passing_labels": ["good", "fine"],
        "input": [{"role": "system", "content": "Label."}, {"role": "user", "content": "{{sample.output_text}}"}]}),
    );
    label.check().unwrap();
    assert_eq!(label.grade(&answer, Some(&oracle)).reward, 1.0);
    assert_eq!(label.grade(&answer, Some(&oracle)).reward, 0.0);
    let asked = oracle.1.lock().unwrap();
    assert!(asked[0].messages[0].1.starts_with("Grade Paris.") && asked[4].schema["properties"]["label"]["enum"][2] == "bad");
}

#[test]
fn what_makes_no_sense_is_named_by_its_path() {
    let changed = |mut value: Value, path: &str, new: Value| {
        *value.pointer_mut(path).unwrap() = new;
        grader(value).check().unwrap_err().path
    };
    let multi = json!({"type": "multi", "name": "m", "calculate_output": "a", "graders": {"a": judge()}});
    assert_eq!(changed(judge(), "/range", json!([1, 1])), "range");
    assert_eq!(changed(judge(), "/input", json!([])), "input");
    assert_eq!(changed(multi.clone(), "/calculate_output", json!("a + b")), "calculate_output");
    assert_eq!(changed(multi.clone(), "/graders", json!({})), "graders");
    assert_eq!(changed(multi.clone(), "/graders", json!({"a b": check("eq")})), "graders");
    assert_eq!(changed(multi.clone(), "/graders/a", multi.clone()), "graders.a.type");
    assert_eq!(changed(multi.clone(), "/graders/a/range", json!([2, 1])), "graders.a.range");
    assert_eq!(grader(multi).models(), [("graders.a.model".to_owned(), "m")]);
}

#[test]
fn a_training_goes_on_where_some_answers_cannot_be_judged_and_ends_where_none_can() {
    let columns = Map::new();
    let answer = |text| Answer { prompt: &[], columns: &columns, text, tokens: 1, ended: true };
    let grading = |replies: &[Result<&'static str, &'static str>]| Grading {
        grader: grader(judge()),
        oracle: Some(Arc::new(Says::new(replies)) as Arc<dyn Oracle>),
    };
    let both = [answer("a"), answer("b")];
    let mut found = grading(&[Ok("{\"result\": 4}"), Err("away")]).score(&both).unwrap();
    found.sort_by(|one, other| one.partial_cmp(other).unwrap());
    assert_eq!(found, [Some(0.0), Some(4.0)]);
    let error = grading(&[Err("away"), Err("away")]).score(&both).unwrap_err().to_string();
    assert_eq!(error, "the grader judge could ask no model: away");
}
