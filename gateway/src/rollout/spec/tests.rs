use super::*;
use serde_json::{Value, json};

const CANARY: &str = r#"
name = "brief"
model = "assistant"
kind = "canary"
arms = [{ variant = "base" }, { variant = "brief@1" }]
steps = [
    { set_weight = 5 },
    { pause = { samples = 500 } },
    { set_weight = 20 },
    { pause = "2h" },
    { approval = true },
    { set_weight = 50 },
]
min_exposure = 1000
interval = "1m"
deadline = "14d"
at_deadline = "rollback"
approval = true

[[metrics]]
metric = "error_rate"
guardrail = { max = 0.02 }

[[metrics]]
metric = "time_to_first_token_p99"
guardrail = { max = 2.0 }
failure_limit = 2

[[metrics]]
metric = "output_tokens"
guardrail = { of = "relative", min = -0.4, max = 0.4 }

[[metrics]]
metric = "feedback.thumb"
goal = { min = 0 }

[[metrics]]
metric = "judge.helpful"
goal = { of = "relative", min = 0.01 }
dry_run = true
"#;

#[test]
fn a_canary_is_read_from_toml_with_every_default_filled_in() {
    let spec = Spec::read(CANARY).unwrap();
    assert_eq!((spec.kind, spec.seed.as_str(), spec.sticky), (Kind::Canary, "brief", Sticky::User));
    assert_eq!(
        spec.steps,
        [
            Step::SetWeight(0.05),
            Step::PauseSamples(500),
            Step::SetWeight(0.2),
            Step::PauseFor(7200),
            Step::Approval,
            Step::SetWeight(0.5)
        ]
    );
    assert_eq!((spec.interval, spec.deadline, spec.at_deadline), (60, Some(14 * 86_400), AtDeadline::RollBack));
    assert_eq!((spec.alpha, spec.tuning, spec.min_exposure, spec.approval), (0.05, 5000.0, 1000, true));
    assert_eq!(spec.metrics[1].quantity, Quantity::TimeToFirstToken(0.99));
    assert_eq!((spec.metrics[1].failure_limit, spec.metrics[1].inconclusive_limit), (2, 3));
    let goal = &spec.metrics[3];
    assert_eq!((goal.role, goal.condition), (Role::Goal, Condition { of: Of::Difference, min: Some(0.0), max: None }));
    assert!(spec.metrics[4].dry_run);
    assert_eq!(spec.metrics.iter().map(Metric::name).collect::<Vec<_>>()[3..], ["goal feedback.thumb", "goal judge.helpful"]);
}

#[test]
fn what_is_kept_in_a_row_reads_back_as_the_same() {
    let spec = Spec::read(CANARY).unwrap();
    let kept = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<Spec>(&kept).unwrap(), spec);
}

#[test]
fn a_variant_may_be_a_model_with_other_words_before_it() {
    let arms = json!([{"variant": "old"}, {"variant": "pirate", "model": "old", "prompt_prefix": "Arr.", "defaults": {"temperature": 0.5, "max_tokens": 9}}]);
    let spec = Spec::parse(&with(&[("arms", arms)])).unwrap();
    assert_eq!((&spec.arms[0].model, &spec.arms[0].prompt_prefix, spec.arms[0].defaults.len()), (&None, &None, 0));
    assert_eq!((spec.arms[1].model.as_deref(), spec.arms[1].prompt_prefix.as_deref()), (Some("old"), Some("Arr.")));
    assert_eq!(Value::Object(spec.arms[1].defaults.clone()), json!({"temperature": 0.5, "max_tokens": 9}));
    assert_eq!(serde_json::from_str::<Spec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
}

fn body() -> Value {
    json!({
        "name": "a", "model": "assistant", "kind": "ab", "arms": [{"variant": "old"}, {"variant": "new"}],
        "metrics": [{"metric": "feedback.rating", "goal": {"min": 0}}],
    })
}

fn with(pairs: &[(&str, Value)]) -> Value {
    let mut body = body();
    for (key, value) in pairs {
        body[*key] = value.clone();
    }
    body
}

/// Each refusal names the field, and says what to do.
#[test]
fn refusals_name_the_field_and_the_fix() {
    let metric = |metric: Value| with(&[("metrics", json!([{"metric": "feedback.thumb", "goal": {"min": 0}}, metric]))]);
    let canary = |steps: Value| with(&[("kind", json!("canary")), ("steps", steps)]);
    let arms = |arms: Value| with(&[("arms", arms)]);
    for (bad, param, fix) in [
        (metric(json!({"metric": "error_rate"})), "metrics.1", "has no condition"),
        (metric(json!({"metric": "error_rate", "guardrail": {}})), "metrics.1.guardrail", "Give 'min' or 'max'"),
        (metric(json!({"metric": "error_rate", "guardrail": {"min": 0.5, "max": 0.1}})), "metrics.1.guardrail", "above max"),
        (metric(json!({"metric": "error_rate", "guardrail": {"max": 2}})), "metrics.1.guardrail.max", "<= 1"),
        (metric(json!({"metric": "error_rate", "guardrail": {"max": 0.1, "unit": "%"}})), "metrics.1.guardrail.unit", "Unknown"),
        (metric(json!({"metric": "errors", "guardrail": {"max": 1}})), "metrics.1.metric", "'error_rate'"),
        (metric(json!({"metric": "judge.", "guardrail": {"max": 1}})), "metrics.1.metric", "'judge.NAME'"),
        (metric(json!({"metric": "kl_to_base", "guardrail": {"max": 1}, "goal": {"max": 1}})), "metrics.1.goal", "Give it twice"),
        (metric(json!({"metric": "kl_to_base", "goal": {"min": 1, "max": 2}})), "metrics.1.goal", "one direction"),
        (metric(json!({"metric": "kl_to_base", "guardrail": {"max": 1}, "share": 0})), "metrics.1.share", ">= 0.001"),
        (metric(json!({"metric": "error_rate", "guardrail": {"max": 1}, "share": 0.5})), "metrics.1.share", "Leave it out"),
        (metric(json!({"metric": "time_to_first_token_p99", "goal": {"max": 0}})), "metrics.1.goal", "Make it a guardrail"),
        (metric(json!({"metric": "comparison", "goal": {"min": 0.5}})), "metrics.1.metric", "interleaved"),
        (metric(json!({"metric": "feedback.thumb", "goal": {"min": 0.1}})), "metrics.1", "there already"),
        (with(&[("metrics", json!([{"metric": "error_rate", "guardrail": {"max": 0.1}}]))]), "metrics", "Give a metric a goal"),
        (with(&[("metrics", json!([]))]), "metrics", "empty array"),
        (arms(json!([{"variant": "old"}])), "arms", "at least two arms"),
        (arms(json!([{"variant": "old"}, {"variant": "old"}])), "arms.1.variant", "Name each variant once"),
        (arms(json!([{"variant": "old", "weight": 1}, {"variant": "new"}])), "arms", "all of them one"),
        (arms(json!([{"variant": " "}, {"variant": "new"}])), "arms.0.variant", "Give a name"),
        (
            arms(json!([{"variant": "old"}, {"variant": "new", "defaults": {"temperature": 3}}])),
            "arms.1.defaults.temperature",
            "<= 2",
        ),
        (arms(json!([{"variant": "old"}, {"variant": "new", "defaults": {"seed": 3}}])), "arms.1.defaults.seed", "Unknown"),
        (with(&[("name", json!("a b"))]), "name", "letters, digits"),
        (with(&[("kind", json!("abc"))]), "kind", "'canary'"),
        (with(&[("traffic", json!(0))]), "traffic", "at least 0.0001"),
        (with(&[("steps", json!([]))]), "steps", "set kind to 'canary'"),
        (with(&[("floor", json!(0.1))]), "floor", "bandit"),
        (with(&[("interval", json!("soon"))]), "interval", "such as"),
        (with(&[("interval", json!(0))]), "interval", ">= 1"),
        (with(&[("layer", json!({"name": "l", "from": 0.5, "to": 0.5}))]), "layer.to", "has not begun"),
        (with(&[("colour", json!(1))]), "colour", "Unknown parameter"),
        (canary(json!(null)), "steps", "Missing"),
        (canary(json!([{"pause": "1h"}])), "steps.0", "Begin with set_weight"),
        (canary(json!([{"set_weight": 20}, {"set_weight": 5}])), "steps.1", "weights only rise"),
        (canary(json!([{"set_weight": 100}])), "steps.0.set_weight", "End below 100"),
        (canary(json!([{"set_weight": 5, "pause": "1h"}])), "steps.0", "a step is one of"),
        (canary(json!([{"set_weight": 5}, {"pause": {"samples": 0}}])), "steps.1.pause.samples", ">= 1"),
        (canary(json!([{"set_weight": 5}, {"approval": false}])), "steps.1.approval", "Leave it out"),
        (
            with(&[("kind", json!("canary")), ("steps", json!([{"set_weight": 5}])), ("traffic", json!(0.5))]),
            "traffic",
            "use set_weight",
        ),
        (with(&[("four_eyes", json!(true)), ("approval", json!(false))]), "approval", "a second key approves"),
        (with(&[("kind", json!("shadow"))]), "metrics.0.metric", "nobody sees"),
        (with(&[("kind", json!("interleaved"))]), "metrics", "which answer is better"),
        (
            with(&[("kind", json!("bandit")), ("metrics", json!([{"metric": "kl_to_base", "guardrail": {"max": 1}}]))]),
            "metrics",
            "exactly one metric",
        ),
        (with(&[("kind", json!("bandit")), ("floor", json!(0.6))]), "floor", "<= 0.5"),
    ] {
        let error = Spec::parse(&bad).expect_err(&bad.to_string());
        assert_eq!(error.param.as_deref(), Some(param), "{bad}: {}", error.message);
        assert!(error.message.contains(fix), "{bad}: {}", error.message);
    }
    assert!(Spec::read("{").unwrap_err().message.contains("JSON"));
    assert!(Spec::read("kind =").unwrap_err().message.contains("TOML"));
}

#[test]
fn up_to_the_treatments_own_weight_the_arms_keep_their_proportion() {
    let spec = Spec::read(CANARY).unwrap();
    assert_eq!(spec.at_weight(0.05), (0.1, vec![0.5, 0.5]));
    assert_eq!(spec.at_weight(0.5), (1.0, vec![0.5, 0.5]));
    assert_eq!(spec.at_weight(0.75), (1.0, vec![0.25, 0.75]));
    assert_eq!(spec.periods(), 1);
    let periods = |steps: Value| {
        let steps = with(&[("kind", json!("canary")), ("steps", steps)]);
        Spec::parse(&steps).unwrap().periods()
    };
    assert_eq!(periods(json!([{"set_weight": 10}, {"set_weight": 60}, {"pause": 9}, {"set_weight": 90}])), 3);
    assert_eq!(periods(json!([{"set_weight": 60}])), 1);
}

#[test]
fn weights_of_arms_are_shares_whatever_was_written() {
    let spec = Spec::parse(&with(&[("arms", json!([{"variant": "a", "weight": 3}, {"variant": "b", "weight": 1}]))])).unwrap();
    assert_eq!(spec.weights(), [0.75, 0.25]);
}

#[test]
fn every_metric_is_known_by_the_word_that_it_is_written_with() {
    for word in [
        "error_rate",
        "refusal_rate",
        "truncation_rate",
        "output_tokens",
        "kl_to_base",
        "logprob_to_base",
        "time_to_first_token_p50",
        "time_to_first_token_p99",
        "feedback.thumb",
        "feedback.rating",
        "feedback.metric.tone",
        "judge.helpful",
        "reward.rm@2",
        "comparison",
    ] {
        assert_eq!(Quantity::try_from(word.to_owned()).unwrap().to_string(), word);
    }
    assert!(Quantity::try_from("feedback.metric.".to_owned()).is_err());
}
