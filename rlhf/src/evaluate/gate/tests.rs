//! Evaluations as values, and what the gates say of them.

use super::*;
use crate::evaluate::TrainedOn;
use crate::evaluate::answers::{Drift, Sampling};
use crate::evaluate::duel::{Verdict, score};
use crate::evaluate::preferences::Agreement;
use crate::evaluate::text::TextLoss;
use crate::statistics::Proportion;

fn drift(words: f64, refusals: u64, truncated: u64, kl: Option<f64>) -> Drift {
    Drift {
        answers: 50,
        median_words: words,
        mean_words: words,
        refusals: Proportion::new(refusals, 50).unwrap(),
        truncated: Proportion::new(truncated, 50).unwrap(),
        kl_per_token: kl,
        kl_per_answer: kl.map(|kl| 40.0 * kl),
    }
}

fn accuracy(won: u64, of: u64) -> Option<Agreement> {
    Some(Agreement { accuracy: Proportion::new(won, of).unwrap(), margin: 0.1, median_margin: 0.1 })
}

fn duel(won: usize, lost: usize, tied: usize) -> Option<crate::evaluate::duel::Score> {
    score(&[vec![Verdict::First; won], vec![Verdict::Second; lost], vec![Verdict::Tie; tied]].concat())
}

/// An adapter that is better in every way.
fn good() -> Evaluation {
    let one = Contender {
        name: "one".to_owned(),
        preferences: accuracy(70, 100),
        text: Some(TextLoss { loss: 3.03, tokens: 1000 }),
        answers: Some(drift(40.0, 2, 4, Some(0.1))),
        trained_on: Some(TrainedOn { samples: 400, raters: 5, rater_share: 0.4, shuffled_labels: false }),
        ..Contender::default()
    };
    let base = Contender {
        name: "base".to_owned(),
        text: Some(TextLoss { loss: 3.0, tokens: 1000 }),
        answers: Some(drift(50.0, 1, 5, None)),
        ..Contender::default()
    };
    Evaluation {
        base: "tiny".to_owned(),
        base_digest: String::new(),
        rows: "pairs@1".to_owned(),
        sampling: Sampling { temperature: 1.0, max_tokens: 64, seed: 0 },
        contenders: vec![one, base],
        judge: Some("rules".to_owned()),
        duel: duel(35, 10, 5),
        gates: None,
        examples: Vec::new(),
    }
}

fn shut(report: &GateReport) -> Vec<&str> {
    report.checks.iter().filter(|check| !check.passed).map(|check| check.gate.as_str()).collect()
}

#[test]
fn an_adapter_that_is_better_passes_all_gates() {
    let report = Gates::default().judge(&good());
    assert!(report.passed && shut(&report).is_empty(), "{}", report.to_text());
    assert_eq!(report.checks.len(), 12);
    assert!(report.checks.iter().all(|check| check.change.is_none() && check.value.is_some()));
    assert!(report.to_text().ends_with("pass: all 12 gates are open"));
    // Wilson 95 % of 70 of 100: 0.6042 to 0.7811.
    let accuracy = &report.checks[1];
    assert!((accuracy.value.unwrap() - 0.6042).abs() < 5e-5, "{accuracy:?}");
    assert!(accuracy.finding.contains("won 70 of 100") && accuracy.finding.contains("60.4 % to 78.1 %"), "{accuracy:?}");
}

#[test]
fn each_gate_shuts_on_its_own_and_says_what_would_open_it() {
    let with = |change: &dyn Fn(&mut Evaluation)| {
        let mut found = good();
        change(&mut found);
        Gates::default().judge(&found)
    };
    let answers = |found: &mut Evaluation, drift| found.contenders[0].answers = Some(drift);
    type Change<'a> = &'a dyn Fn(&mut Evaluation);
    let cases: [(&str, Change<'_>, &str); 12] = [
        // Nineteen of twenty are sure; but twenty are few.
        ("comparisons", &|found| found.contenders[0].preferences = accuracy(19, 20), "hold out 30"),
        ("accuracy", &|found| found.contenders[0].preferences = accuracy(48, 100), "more preferences or cleaner"),
        ("win_rate", &|found| found.duel = duel(10, 35, 5), "not judged better"),
        ("text_loss", &|found| found.contenders[0].text = Some(TextLoss { loss: 3.1, tokens: 1000 }), "forgets"),
        ("kl_per_token", &|found| answers(found, drift(40.0, 2, 4, Some(0.6))), "far from the base"),
        ("shortest", &|found| answers(found, drift(20.0, 2, 4, Some(0.1))), "lower \"shortest\""),
        ("longest", &|found| answers(found, drift(120.0, 2, 4, Some(0.1))), "raise \"longest\""),
        ("refusals", &|found| answers(found, drift(40.0, 4, 4, Some(0.1))), "refuses more"),
        ("truncated", &|found| answers(found, drift(40.0, 2, 11, Some(0.1))), "do not end"),
        ("preferences", &|found| found.contenders[0].trained_on.as_mut().unwrap().samples = 20, "collect 30 more"),
        ("raters", &|found| found.contenders[0].trained_on.as_mut().unwrap().raters = 1, "let 2 more people judge"),
        ("rater_share", &|found| found.contenders[0].trained_on.as_mut().unwrap().rater_share = 0.9, "max_rater_share=0.8"),
    ];
    for (gate, change, wanted) in cases {
        let report = with(change);
        assert_eq!((report.passed, shut(&report)), (false, vec![gate]), "{}", report.to_text());
        let check = report.checks.iter().find(|check| check.gate == gate).unwrap();
        assert!(check.change.as_ref().unwrap().contains(wanted), "{check:?}");
        assert!(report.to_text().contains("refused: 1 of 12 gates are shut"), "{}", report.to_text());
    }
}

#[test]
fn what_was_not_measured_does_not_pass_and_what_is_off_is_not_asked() {
    let mut bare = good();
    (bare.duel, bare.judge) = (None, None);
    for contender in &mut bare.contenders {
        *contender = Contender { name: contender.name.clone(), ..Contender::default() };
    }
    let report = Gates::default().judge(&bare);
    assert_eq!(shut(&report).len(), 12);
    for check in &report.checks {
        assert!(check.value.is_none() && check.finding == "not measured" && check.change.is_some(), "{check:?}");
    }
    let text = report.to_text();
    for option in ["--dataset", "--reward-funcs", "--text", "--prompts", "tidemill train"] {
        assert!(text.contains(option), "{option}: {text}");
    }
    let only: Gates = serde_json::from_str(
        r#"{"comparisons": null, "win_rate": null, "text_loss": null, "kl_per_token": null, "shortest": null, "longest": null,
            "refusals": null, "truncated": null, "preferences": null, "raters": null, "rater_share": null, "accuracy": 0.55}"#,
    )
    .unwrap();
    let report = only.judge(&good());
    assert_eq!((report.passed, report.checks.len(), report.checks[0].threshold), (true, 1, 0.55));
    let off = Gates { accuracy: None, ..only };
    assert!(only.any() && !off.any() && !off.judge(&good()).passed, "no gate is no pass");
    assert!(serde_json::from_str::<Gates>(r#"{"acuracy": 0.5}"#).is_err());
    assert_eq!(serde_json::from_str::<Gates>("{}").unwrap(), Gates::default());
}

#[test]
fn luck_on_a_few_comparisons_opens_nothing_and_the_number_that_would_is_told() {
    let mut found = good();
    // 60 % of 50: the interval reaches from 46 % to 72 %.
    found.contenders[0].preferences = accuracy(30, 50);
    let report = Gates::default().judge(&found);
    assert_eq!(shut(&report), ["accuracy"]);
    let change = report.checks[1].change.as_ref().unwrap();
    let number: u64 = change.split_once("about ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    // The score test of ½ wants z² / 4 / (0.6 − 0.5)² = 96 of them; wins are whole numbers, so a few more.
    assert!((97..=110).contains(&number), "{change}");
    let low = |trials: u64| wilson((0.6 * trials as f64).floor() as u64, trials, Z95).unwrap().low;
    assert!(low(number) > 0.5 && low(number - 1) <= 0.5);
    // All duels tied: nothing was decided, so nothing was won.
    found.duel = duel(0, 0, 50);
    assert_eq!(shut(&Gates::default().judge(&found)), ["accuracy", "win_rate"]);
}
