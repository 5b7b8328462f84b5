//! A metric's confidence sequence over time, as it stands in the decisions.

use crate::console::part::{in_seconds, thinned, time_writer};
use crate::rollout::decision::{Action, Decision, Judgement};
use crate::rollout::spec::{Arm, Condition, Metric, Of, Quantity, Spec};
use tidemill_rlhf::chart::{Chart, Line, Mark, Point, Rule, percent, significant};
use tidemill_rlhf::statistics::Interval;

/// How numbers of one sort are written.
type Writer = fn(f64) -> String;

/// How numbers are written whose metric is not known.
pub const PLAIN: (Writer, Writer, Writer) = (significant, significant, significant);

/// How a metric's numbers are written: an arm's own, what is judged, and the ends of the interval.
pub fn value_writer(metric: &Metric) -> (Writer, Writer, Writer) {
    let own: Writer = match metric.quantity {
        Quantity::TimeToFirstToken(_) => in_seconds,
        _ if metric.quantity.is_share() => percent,
        _ => significant,
    };
    let judged = if metric.condition.of == Of::Relative { percent } else { own };
    (own, judged, if is_quantile(metric) { percent } else { judged })
}

/// The interval as far as the number can go: of few observations it reaches beyond, which says nothing.
pub fn possible(metric: &Metric, found: Interval) -> Interval {
    let (least, most) = match metric.condition.of {
        _ if is_quantile(metric) => (0.0, 1.0),
        Of::Value if metric.quantity.is_share() => (0.0, 1.0),
        Of::Difference if metric.quantity.is_share() => (-1.0, 1.0),
        _ => return found,
    };
    Interval { low: found.low.clamp(least, most), high: found.high.clamp(least, most) }
}

/// A quantile's interval is one of the share above the bound, which another scale belongs to.
fn is_quantile(metric: &Metric) -> bool {
    matches!(metric.quantity, Quantity::TimeToFirstToken(_))
}

/// The mark of what was done, and what it means. None for waiting, and for the steady changes of a bandit.
pub fn sign(action: Action) -> Option<(&'static str, &'static str)> {
    Some(match action {
        Action::Hold | Action::Reallocate => return None,
        Action::Start => ("▷", "began"),
        Action::Step => ("↑", "step done"),
        Action::Pause { .. } => ("‖", "paused"),
        Action::Resume => ("▶", "resumed"),
        Action::AwaitApproval => ("?", "waits for approval"),
        Action::Approve => ("✓", "approved"),
        Action::Promote { .. } => ("★", "promoted"),
        Action::RollBack => ("✕", "rolled back"),
        Action::Complete => ("■", "completed"),
    })
}

/// The metric in all treatments, its bounds, and marks where something was decided.
pub fn chart(spec: &Spec, metric: &Metric, decisions: &[Decision]) -> Chart {
    let name = metric.name();
    let (_, value, _) = value_writer(metric);
    let point = |decision: &Decision, judgement: &Judgement| {
        let interval = judgement.interval.filter(|_| !is_quantile(metric)).map(|found| possible(metric, found));
        Some(Point { at: decision.at as f64, value: judgement.value?, interval })
    };
    let line = |(arm, treatment): (usize, &Arm)| {
        let of_arm = |decision: &Decision| {
            let found = decision.judgements.iter().find(|judgement| judgement.arm == arm && judgement.metric == name);
            found.and_then(|judgement| point(decision, judgement))
        };
        Line { name: treatment.variant.clone(), points: thinned(decisions.iter().filter_map(of_arm).collect()) }
    };
    let lines: Vec<Line> = spec.arms.iter().enumerate().skip(1).map(line).collect();
    let mark = |decision: &Decision| {
        let (sign, words) = sign(decision.action)?;
        let name = format!("{} UTC: {words}. {}", crate::clock::when(decision.at), decision.reason);
        Some(Mark { at: decision.at as f64, sign: sign.to_owned(), name })
    };
    let ends = (decisions.first(), decisions.last());
    let (first, last) = (ends.0.map_or(0, |first| first.at), ends.1.map_or(0, |last| last.at));
    Chart {
        title: format!("{name}: {}", about(metric.condition.of)),
        place: time_writer(first, last),
        value,
        lines,
        span: Some((first as f64, last as f64)),
        reach: None,
        rules: rules(&metric.condition, value),
        marks: decisions.iter().filter_map(mark).collect(),
    }
}

fn about(of: Of) -> &'static str {
    match of {
        Of::Value => "the variant's own",
        Of::Difference => "difference from the control",
        Of::Relative => "change relative to the control",
    }
}

fn rules(condition: &Condition, value: Writer) -> Vec<Rule> {
    let bound = |words: &str, bound: f64| Rule { value: bound, name: format!("{words} {}", value(bound)) };
    let mut rules: Vec<Rule> = condition.min.map(|min| bound("at least", min)).into_iter().collect();
    rules.extend(condition.max.map(|max| bound("at most", max)));
    if condition.of != Of::Value && rules.iter().all(|rule| rule.value != 0.0) {
        rules.push(Rule { value: 0.0, name: "no difference".to_owned() });
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::decision::{Measure, Measured, State, measure, start};
    use crate::rollout::spec::Role;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn spec() -> Spec {
        let body = json!({
            "name": "n", "model": "m", "kind": "ab", "arms": [{"variant": "a"}, {"variant": "b"}, {"variant": "c"}],
            "metrics": [
                {"metric": "error_rate", "guardrail": {"max": 0.5}},
                {"metric": "time_to_first_token_p99", "guardrail": {"max": 2.0}},
                {"metric": "feedback.thumb", "goal": {"of": "relative", "min": 0.05}},
            ],
        });
        Spec::parse(&body).unwrap()
    }

    fn measured(trials: u64) -> Measured {
        let share = |part: u64| Some(Measure::Share { successes: trials / part, trials });
        let wait = Some(Measure::Quantile { value: 1.25, count: trials, above: Some(0), between: None });
        let metrics = BTreeMap::from([
            ("error_rate".to_owned(), vec![share(50), share(40), share(30)]),
            ("time_to_first_token_p99".to_owned(), vec![wait, wait, None]),
            ("goal feedback.thumb".to_owned(), vec![share(2), share(2), share(3)]),
        ]);
        Measured { exposures: vec![trials; 3], ended: vec![trials; 3], metrics, displaced: false }
    }

    fn run(spec: &Spec, looks: u64) -> Vec<Decision> {
        let (mut state, first): (State, Decision) = start(spec, "ann", 0);
        let mut decisions = vec![first];
        for look in 1..=looks {
            let at = i64::try_from(look).unwrap() * 30_000_000;
            let (next, decision) = measure(spec, &state, &measured(60 * look), at, &mut || 0.5);
            state = next;
            decisions.push(decision);
        }
        decisions
    }

    #[test]
    fn every_treatment_is_a_line_whose_band_narrows() {
        let spec = spec();
        let decisions = run(&spec, 20);
        let drawn = chart(&spec, &spec.metrics[0], &decisions);
        assert_eq!(drawn.lines.iter().map(|line| line.name.as_str()).collect::<Vec<_>>(), ["b", "c"]);
        let width = |at: usize| drawn.lines[0].points[at].interval.map(|range| range.high - range.low).unwrap();
        assert_eq!(drawn.lines[0].points.len(), 20);
        assert!(width(19) < width(0) / 2.0);
        let last = decisions.last().unwrap().judgements.iter().find(|found| found.arm == 1 && found.metric == "error_rate");
        assert_eq!(drawn.lines[0].points[19].interval, last.unwrap().interval, "the decision's own numbers");
        assert_eq!(drawn.rules, [Rule { value: 0.5, name: "at most 50 %".to_owned() }]);
        assert_eq!(drawn.marks[0].sign, "▷");
        // It began before anything was measured.
        assert!(drawn.draw().unwrap().as_str().contains(">▷</text>"));
    }

    #[test]
    fn a_quantile_has_no_band_on_its_own_scale_and_a_missing_source_no_point() {
        let spec = spec();
        let drawn = chart(&spec, &spec.metrics[1], &run(&spec, 3));
        assert!(drawn.lines[0].points.iter().all(|point| point.interval.is_none() && point.value == 1.25));
        assert_eq!((drawn.lines[0].points.len(), drawn.lines[1].points.len()), (3, 0));
        assert_eq!(drawn.rules[0].name, "at most 2 s");
        let (own, judged, range) = value_writer(&spec.metrics[1]);
        assert_eq!((own(1.5), judged(1.5), range(0.01)), ("1.5 s".into(), "1.5 s".into(), "1 %".into()));
    }

    #[test]
    fn an_interval_goes_as_far_as_the_number_can() {
        let spec = spec();
        let wide = Interval { low: -2.86, high: 2.53 };
        assert_eq!(possible(&spec.metrics[0], wide), Interval { low: 0.0, high: 1.0 });
        assert_eq!(possible(&spec.metrics[2], wide), wide, "relative to the control there is no end");
        let thumb = Metric { condition: Condition { of: Of::Difference, min: Some(0.0), max: None }, ..spec.metrics[2].clone() };
        assert_eq!(possible(&thumb, wide), Interval { low: -1.0, high: 1.0 });
    }

    #[test]
    fn a_goal_has_its_bound_and_the_line_of_no_difference() {
        let spec = spec();
        assert_eq!(spec.metrics[2].role, Role::Goal);
        let drawn = chart(&spec, &spec.metrics[2], &run(&spec, 5));
        let names: Vec<&str> = drawn.rules.iter().map(|rule| rule.name.as_str()).collect();
        assert_eq!(names, ["at least 5 %", "no difference"]);
        assert!(drawn.title.starts_with("goal feedback.thumb: change relative"));
        let zero = Condition { of: Of::Difference, min: Some(0.0), max: None };
        assert_eq!(rules(&zero, percent).len(), 1);
    }
}
