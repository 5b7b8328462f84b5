//! What single metrics say.

use super::*;
use crate::rollout::statistics::Verdicts;
use tidemill_rlhf::statistics::Interval;

#[test]
fn the_guardrail_of_a_quantile_is_exact_about_how_many_were_slower() {
    let spec = spec(json!({"metrics": [{"metric": "time_to_first_token_p99", "guardrail": {"max": 2.0}}]}));
    let slow = |value: f64, above: Option<u64>| {
        let quantile = |value, above| Some(Measure::Quantile { value, count: 1000, above, between: None });
        let metrics = [("time_to_first_token_p99".to_owned(), vec![quantile(0.5, None), quantile(value, above)])].into();
        Measured { exposures: vec![1000; 2], ended: vec![1000; 2], metrics, displaced: false }
    };
    for (value, above, expected) in [
        (1.5, Some(5), Verdict::Pass),
        (2.1, Some(12), Verdict::Inconclusive),
        (3.0, Some(40), Verdict::Fail),
        // Without the count nothing is sure.
        (2.1, None, Verdict::Inconclusive),
        (f64::NAN, Some(5), Verdict::Inconclusive),
    ] {
        let (_, decision) = measure(&spec, &begin(&spec), &slow(value, above), SECOND, &mut no_chance);
        assert_eq!(decision.judgements[0].verdict, expected, "{value} {above:?}");
    }
}

#[test]
fn a_quantile_beside_the_controls_is_judged_by_where_both_lie_at_all_times() {
    let spec = spec(json!({"metrics": [{"metric": "time_to_first_token_p99", "guardrail": {"of": "relative", "max": 0.5}}]}));
    let wait = |value: f64, low: f64, high: f64| {
        Some(Measure::Quantile { value, count: 100, above: None, between: Some(Interval { low, high }) })
    };
    let open = f64::INFINITY;
    for (control, treatment, expected) in [
        // The largest of a hundred is twice as large by chance.
        (wait(1.0, 0.5, open), wait(2.0, 0.6, open), Verdict::Inconclusive),
        (wait(1.0, 0.5, open), wait(1.2, 0.6, open), Verdict::Pass),
        (wait(1.0, 0.9, 1.5), wait(2.0, 1.9, open), Verdict::Inconclusive),
        (wait(1.0, 0.9, 1.2), wait(2.0, 1.9, open), Verdict::Fail),
        (wait(0.0, 0.0, 0.0), wait(0.0, 0.0, 0.0), Verdict::Inconclusive),
    ] {
        let metrics = [("time_to_first_token_p99".to_owned(), vec![control, treatment])].into();
        let measured = Measured { exposures: vec![100; 2], ended: vec![100; 2], metrics, displaced: false };
        let (_, decision) = measure(&spec, &begin(&spec), &measured, SECOND, &mut no_chance);
        assert_eq!(decision.judgements[0].verdict, expected, "{control:?} {treatment:?}");
        assert!(serde_json::from_str::<Decision>(&serde_json::to_string(&decision).unwrap()).is_ok());
    }
}

#[test]
fn a_guardrail_beside_the_control_is_exact_from_the_first_users_on() {
    let spec = spec(json!({"metrics": [{"metric": "error_rate", "guardrail": {"of": "difference", "max": 0.02}}]}));
    let beside = |control: Option<Measure>, treatment: Option<Measure>| {
        let metrics = [("error_rate".to_owned(), vec![control, treatment])].into();
        let measured = Measured { exposures: vec![60; 2], ended: vec![60; 2], metrics, displaced: false };
        measure(&spec, &begin(&spec), &measured, SECOND, &mut no_chance).1.judgements.remove(0).verdict
    };
    // Means of users, of whom some failed in a part of their answers.
    let mean = |sum: f64, count: u64| Some(Measure::Mean { sum, sum_squares: sum * 0.9, count });
    assert_eq!(beside(share(0, 12), share(12, 12)), Verdict::Fail);
    assert_eq!(beside(share(0, 16), mean(15.5, 16)), Verdict::Fail);
    // One of twelve users is no sign, however often that one asks.
    assert_eq!((beside(share(0, 12), share(1, 12)), beside(share(0, 200), share(40, 200))), (Verdict::Waiting, Verdict::Fail));
    assert_eq!(beside(share(2, 200), share(8, 200)), Verdict::Inconclusive);
}

#[test]
fn a_model_that_is_its_own_base_has_no_divergence_and_passes() {
    let spec = spec(json!({"metrics": [{"metric": "kl_to_base", "guardrail": {"max": 0.1}}]}));
    let same = Measure::Mean { sum: 0.0, sum_squares: 0.0, count: 500 };
    let metrics = [("kl_to_base".to_owned(), vec![Some(same), Some(same)])].into();
    let measured = Measured { exposures: vec![500; 2], ended: vec![500; 2], metrics, displaced: false };
    let (_, decision) = measure(&spec, &begin(&spec), &measured, SECOND, &mut no_chance);
    assert_eq!(decision.judgements[0].verdict, Verdict::Pass);
}

#[test]
fn interleaved_answers_are_judged_by_their_win_rate_without_the_place() {
    let spec = spec(json!({"kind": "interleaved", "steps": null, "metrics": [{"metric": "comparison", "goal": {"min": 0.5}}]}));
    let compared = |first: (u64, u64, u64), second: (u64, u64, u64)| {
        let verdicts = |(won, tied, lost)| Verdicts { won, tied, lost };
        let comparison = Measure::Comparison { first: verdicts(first), second: verdicts(second) };
        let metrics = [("goal comparison".to_owned(), vec![None, Some(comparison)])].into();
        Measured { exposures: vec![3000; 2], ended: vec![3000; 2], metrics, displaced: false }
    };
    for (first, second, expected) in [
        ((700, 100, 200), (650, 100, 250), Action::Promote { arm: 1 }),
        // Whoever is shown first wins.
        ((800, 0, 200), (200, 0, 800), Action::Hold),
        // The same, and shown first much more often: a naive share of wins would be 75 %.
        ((2400, 0, 600), (20, 0, 80), Action::Hold),
        ((200, 100, 700), (250, 100, 650), Action::RollBack),
    ] {
        let (_, decision) = measure(&spec, &begin(&spec), &compared(first, second), SECOND, &mut no_chance);
        assert_eq!(decision.action, expected, "{first:?} {second:?}: {:?}", decision.judgements);
    }
}
