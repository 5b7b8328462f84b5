//! Rollouts: the list, and one of them with everything that it was decided by.

use crate::console::html::{Html, all, tag};
use crate::console::part::{
    Mood, Part, block, chip, count, facts, figure, href, interval, link, moment, nothing, pictures, table,
};
use crate::console::sequence::{PLAIN, chart, possible, sign, value_writer};
use crate::rollout::decision::{Action, Decision, Judgement, PauseReason, State, Status, Verdict};
use crate::rollout::spec::{Arm, Kind, Metric, Role, Spec, Step};
use serde_json::Value;
use tidemill_rlhf::chart::{percent, significant};
use tidemill_store::{ArmCounts, Rollout, RolloutDecision};

/// Decisions of the table, the newest.
const DECISIONS: usize = 100;
/// As the decision has it.
const SAMPLE_RATIO_ANYTIME: f64 = 0.01;

/// A rollout's page.
pub struct Shown {
    /// Where it stands.
    pub rollout: Rollout,
    /// Decisions with rows, the oldest first.
    pub decisions: Vec<RolloutDecision>,
    /// What its arms have answered since it began.
    pub counts: Vec<ArmCounts>,
    /// The visitor may act.
    pub acts: bool,
}

/// What a rollout's row says, read.
struct Read {
    spec: Spec,
    state: State,
    /// The oldest first, the newest one even where it has no row.
    decisions: Vec<Decision>,
}

impl Read {
    fn of(rollout: &Rollout, rows: &[RolloutDecision]) -> Result<Self, serde_json::Error> {
        let spec = serde_json::from_value(rollout.spec.clone())?;
        let state = serde_json::from_value(rollout.state.clone())?;
        let mut decisions =
            rows.iter().map(|row| serde_json::from_value(row.body.clone())).collect::<Result<Vec<Decision>, _>>()?;
        let latest: Decision = serde_json::from_value(rollout.latest.clone())?;
        if decisions.last().is_none_or(|last| last.at < latest.at) {
            decisions.push(latest);
        }
        Ok(Self { spec, state, decisions })
    }
}

fn kind_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Ab => "A/B test",
        Kind::Canary => "canary",
        Kind::Shadow => "shadow",
        Kind::Interleaved => "interleaved",
        Kind::Bandit => "bandit",
    }
}

fn status_chip(status: Status) -> Html {
    let (mood, word) = match status {
        Status::Running => (Mood::Plain, "running"),
        Status::Paused { reason: PauseReason::Person } => (Mood::Warn, "paused by a person"),
        Status::Paused { reason: PauseReason::Inconclusive } => (Mood::Warn, "paused: data missing or unclear"),
        Status::Paused { reason: PauseReason::SampleRatio } => (Mood::Bad, "paused: sample ratio mismatch"),
        Status::Paused { reason: PauseReason::Deadline } => (Mood::Warn, "paused at its deadline"),
        Status::Promoted { .. } => (Mood::Good, "promoted"),
        Status::RolledBack => (Mood::Bad, "rolled back"),
        Status::Completed => (Mood::Good, "completed"),
    };
    chip(mood, word).into()
}

/// The list.
pub fn list(rollouts: &[Rollout], has_more: bool) -> Part {
    let row = |rollout: &Rollout| {
        let name = link(&["rollouts", &rollout.id.to_string()], &rollout.name).into();
        let read = Read::of(rollout, &[]);
        let (kind, status, traffic): (Html, Html, Html) = match &read {
            Ok(Read { spec, state, .. }) => {
                let treated: f64 = state.weights.iter().skip(1).sum();
                (kind_of(spec.kind).into(), status_chip(state.status), percent(state.coverage * treated).into())
            }
            Err(_) => (Html::default(), chip(Mood::Warn, "of another version").into(), Html::default()),
        };
        let why = rollout.latest["reason"].as_str().unwrap_or_default();
        [name, (&rollout.model).into(), kind, status, traffic, why.into(), moment(rollout.created), moment(rollout.updated)]
    };
    let head = ["Rollout", "Model", "Kind", "State", "Treated", "Newest decision", "Began (UTC)", "Changed (UTC)"];
    let lead = "Variants of a model on a part of its traffic, measured and decided.";
    let list = match rollouts {
        [] => nothing("No rollout yet: `tidemill rollout start FILE` begins one."),
        _ => tag("section").class("block card").with(table("Rollouts", head, rollouts.iter().map(row))).into(),
    };
    let more = if has_more { nothing("Older ones: GET /v1/rollouts.") } else { Html::default() };
    Part::new("Rollouts", lead, [list, more])
}

impl Shown {
    /// The page.
    pub fn part(&self) -> Part {
        let rollout = &self.rollout;
        let lead = all([Html::from("On the traffic of "), tag("strong").with(&rollout.model).into(), ".".into()]);
        match Read::of(rollout, &self.decisions) {
            Ok(read) => Part::new(&rollout.name, lead, self.blocks(&read)),
            Err(error) => Part::new(&rollout.name, lead, [self.unread(&error)]),
        }
    }

    /// Another version wrote it: better as it is than not at all.
    fn unread(&self, error: &serde_json::Error) -> Html {
        let text = |value: &Value| tag("pre").with(serde_json::to_string_pretty(value).unwrap_or_default());
        let words = format!("This version of the server does not understand this rollout ({error}). As it is stored:");
        block("Not understood").with(tag("p").with(words)).with_all([&self.rollout.state, &self.rollout.spec].map(text)).into()
    }

    fn blocks(&self, read: &Read) -> Vec<Html> {
        vec![self.standing(read), self.arms(read), sequences(read), judgements(read), decisions(read), asked(read)]
    }

    fn standing(&self, Read { spec, state, decisions }: &Read) -> Html {
        let latest = decisions.last();
        let step = match (spec.steps.get(state.step), spec.steps.len()) {
            (_, 0) => Html::default(),
            (None, all) => format!("all {all} done").into(),
            (Some(step), all) => format!("{} of {all}: {}", state.step + 1, step_words(*step)).into(),
        };
        let ratio = latest.and_then(|latest| latest.sample_ratio).map(|test| {
            let (mood, word) =
                if test.anytime_p < SAMPLE_RATIO_ANYTIME { (Mood::Bad, "mismatch") } else { (Mood::Good, "as it should be") };
            let numbers = format!(" χ² {}, p {}", significant(test.chi_square), significant(test.p_value));
            all([chip(mood, word).into(), Html::from(numbers)])
        });
        let about = facts([
            ("State", status_chip(state.status)),
            ("Kind", kind_of(spec.kind).into()),
            ("Step", step),
            ("Newest decision", latest.map(|latest| latest.reason.clone()).into()),
            ("Sample ratio", ratio.unwrap_or_else(|| "too few units to tell".into())),
            ("Began (UTC)", moment(state.started)),
            ("Changed (UTC)", moment(self.rollout.updated)),
            ("Over since (UTC)", self.rollout.ended.map(moment).into()),
        ]);
        block("Where it stands").attr("id", "standing").with(about).with(self.buttons(spec, state)).into()
    }

    /// What a person may want now.
    fn buttons(&self, spec: &Spec, state: &State) -> Html {
        let promoted = matches!(state.status, Status::Promoted { .. });
        if !self.acts || (state.status.is_over() && !promoted) {
            return Html::default();
        }
        let id = self.rollout.id.to_string();
        let button = |act: &str, words: &str, body: &str, sure: Option<String>| {
            let place = href("/v1/rollouts", &[&id, act]);
            let plain = tag("button").class("plain").attr("type", "button").attr("id", format!("act-{act}-{words}"));
            let button = plain.attr("data-post", place).attr("data-body", body).with(words);
            Html::from(match sure {
                Some(sure) => button.attr("data-sure", sure),
                None => button,
            })
        };
        let row = |buttons: Vec<Html>| {
            tag("div").class("row").attr("role", "group").attr("aria-label", "Acts").with_all(buttons).into()
        };
        if promoted {
            let sure = format!("All traffic of {} goes to what it served before, with the next request.", spec.model);
            return row(vec![button("rollback", "Take the promotion back", "{}", Some(sure))]);
        }
        let mut buttons = Vec::new();
        if state.awaiting {
            buttons.push(button("approve", "Approve", "{}", None));
        }
        let person = state.status == (Status::Paused { reason: PauseReason::Person });
        if matches!(state.status, Status::Paused { .. }) {
            buttons.push(button("resume", "Resume", "{}", None));
        }
        if !person {
            buttons.push(button("pause", "Pause", "{}", None));
        }
        if spec.kind != Kind::Shadow {
            for treatment in spec.arms.iter().skip(1) {
                let variant = &treatment.variant;
                let sure = format!("All traffic of {} goes to {variant}, whatever the numbers say.", spec.model);
                let body = serde_json::json!({ "variant": variant }).to_string();
                let promote = button("promote", &format!("Promote {variant}"), &body, Some(sure));
                buttons.push(promote);
            }
        }
        let sure = format!("All traffic of {} goes to {} with the next request. This is final.", spec.model, control(spec));
        buttons.push(button("rollback", "Roll back", "{}", Some(sure)));
        row(buttons)
    }

    fn arms(&self, Read { spec, state, decisions }: &Read) -> Html {
        let exposures = decisions.iter().rev().map(|decision| &decision.exposures).find(|exposures| !exposures.is_empty());
        let row = |(index, arm): (usize, &Arm)| {
            let found = self.counts.iter().find(|counts| counts.arm as usize == index).copied().unwrap_or_default();
            let part = |part: u64, whole: u64| (whole > 0).then(|| percent(part as f64 / whole as f64));
            let weight = state.weights.get(index).copied().unwrap_or_default();
            let role = if index == 0 { "control" } else { "treatment" };
            let counted = exposures.and_then(|exposures| exposures.get(index)).copied().map(count);
            let mean = (found.complete > 0).then(|| significant(found.tokens as f64 / found.complete as f64));
            [
                all([Html::from(&arm.variant), tag("small").with(format!(" {role}")).into()]),
                percent(state.coverage * weight).into(),
                count(found.units).into(),
                counted.into(),
                count(found.answers).into(),
                part(found.failed, found.answers).into(),
                part(found.truncated, found.complete).into(),
                part(found.refused, found.read).into(),
                mean.into(),
            ]
        };
        let head = [
            "Variant",
            "Of all traffic",
            "Users exposed",
            "of these counted now",
            "Answers",
            "Failed",
            "Cut off",
            "Refused",
            "Tokens",
        ];
        let words = "A user is whoever keeps an arm: a person, a conversation or a single request. Counted now: since the arms' \
                     proportion last changed.";
        block("Arms").with(table("Arms", head, spec.arms.iter().enumerate().map(row))).with(tag("p").with(words)).into()
    }
}

fn control(spec: &Spec) -> &str {
    spec.arms.first().map_or("the control", |arm| arm.variant.as_str())
}

fn step_words(step: Step) -> String {
    match step {
        Step::SetWeight(weight) => format!("{} of the traffic", percent(weight)),
        Step::PauseFor(seconds) => format!("wait {seconds} s"),
        Step::PauseSamples(samples) => format!("wait for {} units", count(samples)),
        Step::Approval => "wait for approval".to_owned(),
    }
}

fn sequences(Read { spec, decisions, .. }: &Read) -> Html {
    let picture = |(place, metric): (usize, &Metric)| {
        let chart = chart(spec, metric, decisions);
        let role = match metric.role {
            Role::Guardrail => "Guardrail: rolls back when the band is outside its bound.",
            Role::Goal => "Goal: promotes when the band is beyond its bound, however often one looked.",
        };
        let dry = if metric.dry_run { " Dry run: nothing follows from it." } else { "" };
        figure(&format!("metric-{place}"), &chart, format!("{role}{dry}"))
    };
    let figures = pictures(spec.metrics.iter().enumerate().filter_map(picture));
    if figures.is_empty() {
        return block("Metrics over time").with(nothing("Nothing was measured yet.")).into();
    }
    let mut signs: Vec<(&str, &str)> = decisions.iter().filter_map(|decision| sign(decision.action)).collect();
    signs.sort_unstable();
    signs.dedup();
    let legend = signs.into_iter().map(|(sign, words)| tag("li").with(tag("b").with(sign)).with(format!(" {words}")));
    let legend = tag("ul").class("legend").with(tag("li").with("Marks on the pictures:")).with_all(legend);
    all([figures, legend.into()])
}

fn verdict_chip(verdict: Verdict) -> Html {
    let (mood, word) = match verdict {
        Verdict::Pass => (Mood::Good, "holds"),
        Verdict::Fail => (Mood::Bad, "broken"),
        Verdict::Met => (Mood::Good, "met"),
        Verdict::Missed => (Mood::Bad, "missed"),
        Verdict::Open => (Mood::Plain, "open"),
        Verdict::Waiting => (Mood::Plain, "waiting"),
        Verdict::Inconclusive => (Mood::Warn, "inconclusive"),
    };
    chip(mood, word).into()
}

/// What a decision stood on.
fn judged(spec: &Spec, judgements: &[Judgement]) -> Html {
    let row = |judgement: &Judgement| {
        let metric = spec.metrics.iter().find(|metric| metric.name() == judgement.metric);
        let (own, value, range) = metric.map_or(PLAIN, value_writer);
        let variant = spec.arms.get(judgement.arm).map_or("?", |arm| arm.variant.as_str());
        [
            (&judgement.metric).into(),
            variant.into(),
            judgement.control.map(own).into(),
            judgement.treatment.map(own).into(),
            judgement.value.map(value).into(),
            judgement.interval.map(|found| interval(range, metric.map_or(found, |metric| possible(metric, found)))).into(),
            count(judgement.samples).into(),
            verdict_chip(judgement.verdict),
            (&judgement.note).into(),
        ]
    };
    let head = ["Metric", "Variant", "Control", "Variant's", "Judged", "Interval", "Observations", "Verdict", "Note"];
    table("Metrics", head, judgements.iter().map(row))
}

fn judgements(Read { spec, decisions, .. }: &Read) -> Html {
    let block = block("What the metrics say now");
    match decisions.iter().rev().find(|decision| !decision.judgements.is_empty()) {
        None => block.with(nothing("Nothing was measured yet.")).into(),
        Some(decision) => block.with(judged(spec, &decision.judgements)).into(),
    }
}

fn decisions(Read { spec, decisions, .. }: &Read) -> Html {
    let told = decisions.iter().filter(|decision| decision.action != Action::Hold);
    let told: Vec<&Decision> = told.collect();
    let row = |decision: &&Decision| {
        let shares: Vec<String> = decision.weights.iter().map(|weight| percent(decision.coverage * weight)).collect();
        let exposures: Vec<String> = decision.exposures.iter().map(|exposed| count(*exposed)).collect();
        let numbers = (!decision.judgements.is_empty()).then(|| {
            let details = tag("details").attr("id", format!("stood-on-{}", decision.at)).with(tag("summary").with("Numbers"));
            details.with(judged(spec, &decision.judgements))
        });
        let by = decision.by.as_deref().unwrap_or("the rollout");
        [
            moment(decision.at),
            action_words(spec, decision.action).into(),
            (&decision.reason).into(),
            by.into(),
            shares.join(" · ").into(),
            exposures.join(" · ").into(),
            decision.sample_ratio.map(|test| significant(test.p_value)).into(),
            numbers.into(),
        ]
    };
    let head = ["When (UTC)", "Decision", "Why", "By", "Traffic of the arms", "Units", "Sample ratio p", "Stood on"];
    let rows: Vec<_> = told.iter().rev().take(DECISIONS).map(row).collect();
    let older = told.len().saturating_sub(DECISIONS);
    let more = (older > 0).then(|| tag("p").with(format!("{older} older ones: GET /v1/rollouts/ID.")));
    block("Decisions").with(table("Decisions", head, rows)).with(more).into()
}

fn action_words(spec: &Spec, action: Action) -> String {
    match action {
        Action::Promote { arm } => {
            format!("promoted {}", spec.arms.get(arm).map_or("an unknown arm", |arm| arm.variant.as_str()))
        }
        other => sign(other).map_or("waits", |(_, words)| words).to_owned(),
    }
}

/// What was asked for.
fn asked(Read { spec, .. }: &Read) -> Html {
    let text = serde_json::to_string_pretty(spec).unwrap_or_default();
    let details = tag("details").attr("id", "asked").with(tag("summary").with("As it was asked for"));
    tag("section").class("block card").with(details.with(tag("pre").attr("tabindex", "0").with(text))).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::decision::{Act, Measure, Measured, act, measure, start};
    use serde_json::json;
    use std::collections::BTreeMap;
    use uuid::Uuid;

    const EVIL: &str = "<img src=x onerror=alert(1)>";

    fn spec() -> Spec {
        let body = json!({
            "name": "brief", "model": EVIL, "kind": "canary", "arms": [{"variant": "old"}, {"variant": EVIL}],
            "steps": [{"set_weight": 10}, {"pause": {"samples": 500}}], "min_exposure": 10,
            "metrics": [{"metric": "error_rate", "guardrail": {"max": 0.2}}, {"metric": "feedback.thumb", "goal": {"min": 0}}],
        });
        Spec::parse(&body).unwrap()
    }

    fn row(decision: &Decision, version: i64) -> RolloutDecision {
        RolloutDecision { version, at: decision.at, action: "x".into(), actor: None, body: json!(decision) }
    }

    /// A canary after a measurement with so many errors among a thousand answers of the treatment.
    fn shown(errors: u64, acts: bool) -> Shown {
        let spec = spec();
        let (state, first) = start(&spec, EVIL, 1_000_000);
        let share = |successes: u64| Some(Measure::Share { successes, trials: 1000 });
        let metrics = BTreeMap::from([
            ("error_rate".to_owned(), vec![share(10), share(errors)]),
            ("goal feedback.thumb".to_owned(), vec![share(500), share(520)]),
        ]);
        let measured = Measured { exposures: vec![1000, 1010], ended: vec![1000, 1010], metrics, displaced: false };
        let (state, second) = measure(&spec, &state, &measured, 9_000_000, &mut || 0.5);
        let rollout = Rollout {
            id: Uuid::from_u128(7),
            created: 1_000_000,
            updated: 9_000_000,
            ended: state.status.is_over().then_some(9_000_000),
            name: EVIL.into(),
            model: EVIL.into(),
            spec: json!(spec),
            state: json!(state),
            version: 1,
            latest: json!(second),
        };
        let counts = vec![ArmCounts { arm: 1, units: 4321, answers: 10, failed: 1, ..ArmCounts::default() }];
        Shown { rollout, decisions: vec![row(&first, 0)], counts, acts }
    }

    #[test]
    fn a_rollout_that_runs_shows_its_numbers_and_what_may_be_done() {
        let text = shown(12, true).part().document();
        for expected in
            [">running</span>", "4\u{202f}321", ">as it should be</span>", "holds", "sticky", "error_rate: the variant&#39;s own"]
        {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let acts: Vec<&str> = text.split("data-post=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        let of = |act: &str| format!("/v1/rollouts/{}/{act}", "00000000-0000-0000-0000-000000000007");
        assert_eq!(acts, [of("pause"), of("promote"), of("rollback")]);
        assert!(text.contains("data-body=\"{&quot;variant&quot;:&quot;&lt;img") && !text.contains("<img"));
        assert_eq!(text.matches("<svg").count(), 2);
        assert!(!shown(12, false).part().document().contains("data-post"), "looking is not acting");
        // Of one that is over, only a promotion can still be taken back.
        let over = |wanted: Act| {
            let mut shown = shown(12, true);
            let state = serde_json::from_value(shown.rollout.state.clone()).unwrap();
            shown.rollout.state = json!(act(&spec(), &state, wanted, "ann", 9_500_000).unwrap().0);
            shown.part().document()
        };
        let promoted = over(Act::Promote { arm: 1 });
        assert!(promoted.contains("Take the promotion back") && promoted.matches("data-post").count() == 1, "{promoted}");
        assert!(!over(Act::RollBack).contains("data-post"));
    }

    #[test]
    fn one_that_was_rolled_back_says_why_and_offers_nothing() {
        let text = shown(700, true).part().document();
        assert!(text.contains(">rolled back</span>") && text.contains("the guardrail error_rate is broken"), "{text}");
        assert!(text.contains(">broken</span>") && !text.contains("data-post"));
    }

    #[test]
    fn a_paused_one_can_be_resumed_and_not_paused_again() {
        let mut page = shown(12, true);
        let state: State = serde_json::from_value(page.rollout.state.clone()).unwrap();
        let (state, decision) = act(&spec(), &state, Act::Pause, "ann", 10_000_000).unwrap();
        (page.rollout.state, page.rollout.latest) = (json!(state), json!(decision));
        let text = page.part().document();
        assert!(text.contains("act-resume-") && !text.contains("act-pause-") && text.contains("paused by a person"));
        assert!(text.contains("a person paused it") && text.contains("<td>ann</td>"));
    }

    #[test]
    fn the_list_links_to_each_and_what_is_not_understood_is_shown_as_it_is() {
        let mut page = shown(12, true);
        let text = list(&[page.rollout.clone()], true).document();
        assert!(text.contains("/console/rollouts/00000000-0000") && !text.contains("<img") && text.contains("Older ones"));
        assert!(text.contains("<td>10 %</td>"), "{text}");
        page.rollout.state = json!({"status": "<new>"});
        let text = page.part().document();
        assert!(text.contains("does not understand") && text.contains("&lt;new&gt;"));
        assert!(list(&[page.rollout], false).document().contains("of another version"));
        assert!(list(&[], false).document().contains("No rollout yet"));
    }
}
