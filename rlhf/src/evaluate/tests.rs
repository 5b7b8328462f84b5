//! Every measure, and a whole evaluation of a small model.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use tidemill_engine::ModelFiles;

use super::answers::{Answer, Sampling, drift, refuses};
use super::duel::{Verdict, by_judge, by_score, score};
use super::preferences::agreement;
use super::*;
use crate::dataset::control::shuffle_labels;
use crate::dataset::{Row, format};
use crate::job::{ADAPTER, Asked, Base, Job, LINEAGE, Rows, Spec, judge_of};
use crate::model::{Model, ModelOptions, Precision};
use crate::reward::{Answer as Said, Judge as Rule, LengthUnit, RewardFunction};
use crate::train::{Control, Method, TrainConfig, questions};
use crate::workplace::Workplace;

#[test]
fn agreement_is_the_share_of_positive_margins() {
    let found = agreement(&[0.5, -0.25, 0.25, 0.0]).unwrap();
    // An equal reward is no agreement.
    assert_eq!((found.accuracy.successes, found.accuracy.trials), (2, 4));
    assert!((found.margin - 0.125).abs() < 1e-15 && (found.median_margin - 0.125).abs() < 1e-15);
    assert_eq!(agreement(&[]), None);
}

#[test]
fn a_duel_counts_ties_half_and_a_judge_who_prefers_a_place_says_nothing() {
    use Verdict::{First, Second, Tie};
    assert_eq!([by_score(1.0, 0.0), by_score(0.0, 1.0), by_score(1.0, 1.0), by_score(f64::NAN, 0.0)], [First, Second, Tie, Tie]);
    let table = [(First, Second, First), (Second, First, Second), (First, First, Tie), (Second, Second, Tie), (Tie, Second, Tie)];
    for (in_order, swapped, expected) in table {
        assert_eq!(by_judge(in_order, swapped), expected, "{in_order:?} {swapped:?}");
    }
    let found = score(&[First, First, First, Second, Tie, Tie]).unwrap();
    assert_eq!((found.won, found.lost, found.tied), (3, 1, 2));
    assert!((found.win_rate - 4.0 / 6.0).abs() < 1e-15);
    // Wilson 95 % of 3 of 4: 0.3006 to 0.9544 (Brown, Cai and DasGupta 2001 give the formula).
    let interval = found.decided.unwrap();
    assert!((interval.low - 0.3006).abs() < 5e-5 && (interval.high - 0.9544).abs() < 5e-5, "{interval:?}");
    assert!(score(&[Tie]).unwrap().decided.is_none() && score(&[]).is_none());
}

#[test]
fn refusals_are_told_by_their_beginning() {
    for text in [
        "I'm sorry, but I can't help with that.",
        "I cannot do this.",
        "As an AI language model, I",
        "Unfortunately, I do not",
        "Well, I am unable to say.",
    ] {
        assert!(refuses(text), "{text}");
    }
    let late = format!("{}I can't", "All of this is fine. ".repeat(20));
    for text in ["The cat sat.", "Sorrow is a feeling.", "You cannot divide by 0.", &late, ""] {
        assert!(!refuses(text), "{text}");
    }
}

#[test]
fn drift_is_about_words_refusals_and_ends() {
    let answer = |text: &str, whole| Answer { text: text.to_owned(), tokens: vec![1], whole };
    let found = drift(&[answer("one two three", true), answer("I cannot", true), answer("a b c d e f g", false)], None).unwrap();
    assert_eq!((found.answers, found.median_words, found.mean_words), (3, 3.0, 4.0));
    assert_eq!((found.refusals.successes, found.truncated.successes, found.kl_per_token), (1, 1, None));
    assert_eq!(drift(&[], None), None);
}

/// Comparisons of one word with several, about `numbers`.
fn rows(numbers: std::ops::Range<usize>) -> Vec<Value> {
    let row = |index: usize| {
        json!({
            "prompt": [{ "role": "user", "content": format!("Which of {index} is it?") }],
            "chosen": [{ "role": "assistant", "content": "yes" }],
            "rejected": [{ "role": "assistant", "content": "no, not at all" }],
        })
    };
    numbers.map(row).collect()
}

fn parsed(rows: Vec<Value>) -> Vec<Row> {
    let parse = |row: Value| format::parse(row.as_object().unwrap().clone(), "rows").unwrap().row;
    rows.into_iter().map(parse).collect()
}

fn tiny() -> Base {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/qwen2");
    Base { name: "tiny".to_owned(), path }
}

async fn trained(folder: &std::path::Path, method: &str, rows: &[Value], shuffled: bool) -> PathBuf {
    let file = folder.join("rows.jsonl");
    std::fs::write(&file, rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n")).unwrap();
    let spec: Spec = serde_json::from_value(json!({
        "base": tiny(), "train_file": file, "lora": { "r": 4 }, "threads": 1, "shuffled_labels": shuffled,
        "config": { "method": method, "learning_rate": 2e-3, "num_train_epochs": 6 },
    }))
    .unwrap();
    let rows = Rows::read(&spec, None).await.unwrap();
    let place = folder.join(format!("{method}-{shuffled}"));
    Job::open(spec, rows).unwrap().train(&place, &mut |_, _| {}, &mut |_| Control::Continue).unwrap();
    place.join(ADAPTER)
}

/// With what its lineage says.
fn entrant(name: &str, folder: &std::path::Path) -> Entrant {
    let text = std::fs::read(folder.parent().unwrap().join(LINEAGE)).unwrap();
    let lineage: Value = serde_json::from_slice(&text).unwrap();
    Entrant { name: name.to_owned(), folder: folder.to_owned(), trained_on: TrainedOn::of(&lineage["data"]) }
}

fn trial(adapters: Vec<Entrant>, rows: Vec<Row>) -> Trial {
    Trial {
        base: tiny(),
        adapters,
        questions: questions(&rows),
        rows,
        source: "rows.jsonl".to_owned(),
        beta: 0.1,
        text: None,
        prompts: 0,
        sampling: Sampling { temperature: 1.0, max_tokens: 12, seed: 7 },
        model: ModelOptions { threads: 1, precision: Precision::F32, ..ModelOptions::default() },
        workplace: Workplace::default(),
    }
}

#[tokio::test]
async fn an_adapter_is_measured_beside_another_and_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let learnt = rows(0..8);
    let dpo = trained(folder.path(), "dpo", &learnt, false).await;
    let reward = trained(folder.path(), "reward", &learnt, false).await;
    let trial = Trial {
        text: Some("The quick brown fox jumps over the lazy dog. ".repeat(40)),
        prompts: 5,
        ..trial(vec![entrant("dpo", &dpo), entrant("again", &dpo)], parsed(learnt))
    };
    let found = evaluate(&trial, Referee::None, &mut |_, _, _, _| {}).unwrap();
    let [one, same, base] = found.contenders.as_slice() else { panic!("{:?}", found.contenders) };
    assert_eq!((one.name.as_str(), base.name.as_str()), ("dpo", "base"));
    // It was trained on these very rows.
    assert_eq!(one.preferences.unwrap().accuracy.share, 1.0);
    assert!(one.preferences.unwrap().margin > 0.01 && base.preferences.is_none());
    assert_eq!((one.preferences, one.text, one.answers, &one.digest), (same.preferences, same.text, same.answers, &same.digest));
    let (with, without) = (one.text.unwrap(), base.text.unwrap());
    assert!(with.tokens == without.tokens && with.tokens > 300 && with.loss != without.loss, "{with:?} {without:?}");
    assert!((found.text_drift(one).unwrap() - (with.loss / without.loss - 1.0)).abs() < 1e-12);
    assert_eq!((one.answers.unwrap().answers, base.answers.unwrap().answers), (5, 5));
    // Over the model's own answers the divergence is positive in the mean; the base has none from itself.
    assert!(one.answers.unwrap().kl_per_token.unwrap() > 0.0 && base.answers.unwrap().kl_per_token.is_none());
    assert_eq!(found.examples.len(), 5);
    assert!(found.examples.iter().all(|example| example.answers[0] == example.answers[1]));
    assert_eq!(evaluate(&trial, Referee::None, &mut |_, _, _, _| {}).unwrap(), found, "the same again");

    // The same answers: a reward model cannot tell them apart, and a judge who likes the first place says nothing.
    let by_rewards = evaluate(&trial, Referee::RewardModel(reward.clone()), &mut |_, _, _, _| {}).unwrap();
    assert_eq!(by_rewards.duel.unwrap().tied, 5);
    let told = |place: usize| by_rewards.contenders[place].rewards["reward_model"];
    assert!(told(0) == told(1) && told(0) != told(2), "{} {} {}", told(0), told(1), told(2));
    assert_eq!(by_rewards.judge, Some(reward.display().to_string()));

    // A reward model agrees by its own rewards: those that it gives while others are trained.
    let entered = Trial { adapters: vec![entrant("reward", &reward)], prompts: 0, ..trial.clone() };
    let agrees = evaluate(&entered, Referee::None, &mut |_, _, _, _| {}).unwrap().contenders[0].preferences.unwrap();
    let files = Arc::new(ModelFiles::open(&tiny().path).unwrap());
    let rule = Rule::RewardModel { path: reward };
    let beside = Model::untrained(files, trial.model).unwrap();
    let judge = judge_of(&beside, &rule, None, trial.model, &TrainConfig::new(Method::Grpo), Asked::default()).unwrap();
    let columns = Map::new();
    let mut said = Vec::new();
    for row in &trial.rows {
        for answer in row.example.answers() {
            said.push(Said { prompt: row.example.prompt(), columns: &columns, text: &answer[0].content, tokens: 1, ended: true });
        }
    }
    let rewards = judge.score(&said).unwrap();
    let apart: f64 = rewards.chunks(2).map(|pair| pair[0].unwrap() - pair[1].unwrap()).sum::<f64>() / trial.rows.len() as f64;
    assert!(agrees.accuracy.share == 1.0 && (agrees.margin - apart).abs() < 1e-4 * apart.abs(), "{agrees:?} {apart}");
    let mut asked = 0;
    let judge: Judge<'_> = &mut |messages, _, _| {
        assert_eq!(messages[0].role, "user");
        asked += 1;
        Ok(Verdict::First)
    };
    let by_judge = evaluate(&trial, Referee::Judge("first".to_owned(), judge), &mut |_, _, _, _| {}).unwrap();
    assert_eq!((by_judge.duel.unwrap().tied, by_judge.judge.as_deref(), asked), (5, Some("first"), 10));

    // Against the base: rules over the answers as they are, however those came about.
    let alone = Trial { adapters: vec![entrant("dpo", &dpo)], ..trial.clone() };
    let short = RewardFunction::named("short", Rule::Length { min: None, max: Some(2), unit: LengthUnit::Words });
    let words = RewardFunction::named("letter", Rule::Regex { pattern: "[a-z]".to_owned(), whole: false });
    let rules = Rules::new(vec![short, words], Some(vec![1.0, 0.5])).unwrap();
    let by_rules = evaluate(&alone, Referee::Rules(rules.clone()), &mut |_, _, _, _| {}).unwrap();
    assert_eq!(by_rules.judge.as_deref(), Some("short + 0.5 × letter"));
    let earns = |text: &str| {
        let words = text.split_whitespace().count();
        let short = if words <= 2 { 1.0 } else { (1.0 - (words - 2) as f64 / 2.0).max(0.0) };
        short + 0.5 * f64::from(u8::from(text.contains(|letter: char| letter.is_ascii_lowercase())))
    };
    let expected: Vec<Verdict> =
        by_rules.examples.iter().map(|example| by_score(earns(&example.answers[0]), earns(&example.answers[1]))).collect();
    assert_eq!(by_rules.examples.iter().map(|example| example.verdict.unwrap()).collect::<Vec<_>>(), expected);
    assert_eq!(by_rules.duel, score(&expected));
    for (place, contender) in by_rules.contenders.iter().enumerate() {
        let total: f64 = by_rules.examples.iter().map(|example| earns(&example.answers[place])).sum::<f64>() / 5.0;
        let told = contender.rewards["short"] + 0.5 * contender.rewards["letter"];
        assert!((told - total).abs() < 1e-12, "{told} {total}");
    }
    assert!(by_rules.to_html().contains("mean reward, short"));
    // The second one is the same adapter: whatever the rules are, nobody wins.
    assert_eq!(evaluate(&trial, Referee::Rules(rules), &mut |_, _, _, _| {}).unwrap().duel.unwrap().tied, 5);
    assert!(Rules::new(Vec::new(), None).unwrap_err().to_string().contains("name at least one"));

    let page = by_judge.to_html();
    for part in ["Side by side", "held-out comparisons won", "KL to the base per token", "judged by first", "Which of 0 is it?"] {
        assert!(page.contains(part), "{part}");
    }
    let json = serde_json::to_value(&by_judge).unwrap();
    assert_eq!(serde_json::from_value::<Evaluation>(json).unwrap(), by_judge);

    let nothing = Trial { rows: Vec::new(), questions: Vec::new(), text: None, ..trial.clone() };
    assert!(evaluate(&nothing, Referee::None, &mut |_, _, _, _| {}).unwrap_err().to_string().contains("no comparison"));
}

#[tokio::test]
async fn shuffled_labels_fail_the_gate_that_true_ones_pass() {
    let folder = tempfile::tempdir().unwrap();
    let learnt = rows(0..16);
    let (honest, control) =
        (trained(folder.path(), "dpo", &learnt, false).await, trained(folder.path(), "dpo", &learnt, true).await);
    let held_out = parsed(rows(100..140));
    let mut shuffled = held_out.clone();
    shuffle_labels(&mut shuffled, 5);
    // What is asked of a comparison alone; nobody judged these rows, and nothing is answered.
    let gates: Gates = serde_json::from_value(json!({
        "win_rate": null, "text_loss": null, "kl_per_token": null, "shortest": null, "longest": null, "refusals": null, "truncated": null,
        "preferences": 16, "raters": null, "rater_share": null,
    }))
    .unwrap();
    let measured = |adapter: &std::path::Path, rows: &[Row]| {
        let trial = trial(vec![entrant("one", adapter)], rows.to_vec());
        evaluate(&trial, Referee::None, &mut |_, _, _, _| {}).unwrap()
    };
    let found = measured(&honest, &held_out);
    let report = gates.judge(&found);
    assert!(report.passed, "{}", report.to_text());
    assert_eq!(found.contenders[0].trained_on.unwrap().samples, 16);
    // Labels that mean nothing: learnt, as the whole of a control does, or only measured on.
    for adapter in [&control, &honest] {
        let mut found = measured(adapter, &shuffled);
        let report = gates.judge(&found);
        let shut: Vec<&str> = report.checks.iter().filter(|check| !check.passed).map(|check| check.gate.as_str()).collect();
        assert_eq!((report.passed, shut), (false, vec!["accuracy"]), "{}", report.to_text());
        assert_eq!(found.contenders[0].trained_on.unwrap().shuffled_labels, adapter == &control);
        found.gates = Some(report);
        let page = found.to_html();
        assert!(page.contains("refused") && page.contains("more preferences or cleaner"), "{page}");
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(serde_json::from_value::<Evaluation>(json).unwrap(), found);
    }
}
