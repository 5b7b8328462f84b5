//! Loops from feedback to adapters: the list, and one with what it waits for and what became of its cycles.
//!
//! They are read as the API shows them, so that the page, the command line and programs see the same.

use crate::console::html::{Html, all, tag};
use crate::console::part::{Mood, Part, block, chip, facts, href, link, moment, nothing, said, table};
use serde_json::Value;

/// What a cycle goes through.
const STATES: [&str; 5] = ["snapshot", "quality", "training", "evaluation", "canary"];

fn text<'a>(of: &'a Value, key: &str) -> &'a str {
    of[key].as_str().unwrap_or_default()
}

/// A time that the API tells in seconds.
fn time(of: &Value, key: &str) -> Html {
    of[key].as_i64().map(|seconds| moment(seconds.saturating_mul(1_000_000))).into()
}

fn state_chip(word: &str) -> Html {
    let mood = if word == "rolled_back" { Mood::Bad } else { Mood::of_state(word) };
    if word.is_empty() { Html::default() } else { chip(mood, &word.replace('_', " ")).into() }
}

fn standing(found: &Value) -> Html {
    let paused = found["paused"] == true;
    all([state_chip(text(found, "state")), if paused { chip(Mood::Warn, "paused").into() } else { Html::default() }])
}

fn waits_for(found: &Value) -> &str {
    text(&found["waits_for"], "text")
}

/// The list.
pub fn list(loops: &[Value]) -> Part {
    let row = |found: &Value| {
        let name = text(found, "id");
        [
            link(&["loops", name], name).into(),
            text(found, "model").into(),
            standing(found),
            waits_for(found).into(),
            found["cycle"].to_string().into(),
            found["cycles"].as_array().and_then(|cycles| cycles.first()).map(|cycle| state_chip(text(cycle, "outcome"))).into(),
            time(found, "updated_at"),
        ]
    };
    let head = ["Loop", "Model", "State", "Waits for", "Cycle", "Newest outcome", "Changed (UTC)"];
    let list = match loops {
        [] => nothing(
            "No loop yet: `[loop.NAME]` in tidemill.toml makes one, and its policy says when it learns from the feedback.",
        ),
        _ => tag("section").class("block card").with(table("Loops", head, loops.iter().map(row))).into(),
    };
    Part::new("Loops", "Feedback becomes a dataset, the dataset an adapter, the adapter a rollout; then it begins again.", [list])
}

/// One of them.
pub fn page(found: &Value, acts: bool) -> Part {
    let name = text(found, "id");
    let lead = all([Html::from("From feedback to an adapter for "), tag("strong").with(text(found, "model")).into(), ".".into()]);
    let cycles = found["cycles"].as_array().into_iter().flatten();
    let mut blocks = vec![now(found, acts)];
    blocks.extend(cycles.map(cycle));
    blocks.push(policy(found));
    Part::new(name, lead, blocks)
}

/// Where it stands, and how far it is from going on.
fn now(found: &Value, acts: bool) -> Html {
    let waits = &found["waits_for"];
    let job = waits["job"].as_str().map(|job| link(&["trainings", job], job));
    let rollout = waits["rollout"].as_str().map(|rollout| link(&["rollouts", rollout], rollout));
    let far = [("step", "steps", "steps"), ("preferences", "preferences", "new judgements"), ("raters", "raters", "people")];
    let bars = far.into_iter().filter_map(|(have, need, words)| match have {
        "step" => bar(&waits["step"], &waits[need], words),
        _ => bar(&waits["have"][have], &waits["need"][need], words),
    });
    let about = facts([
        ("State", standing(found)),
        ("Waits for", waits_for(found).into()),
        ("How far", all(bars)),
        ("Training", job.into()),
        ("Rollout", rollout.into()),
        ("In its way", found["problem"].as_str().into()),
        ("Asked for by", found["asked"].as_str().into()),
        ("Cycle", found["cycle"].to_string().into()),
        ("Base", text(found, "base").into()),
        ("Dataset", text(found, "dataset").into()),
        ("Changed (UTC)", time(found, "updated_at")),
    ]);
    block("Where it stands")
        .attr("id", "standing")
        .with(track(text(found, "state")))
        .with(about)
        .with(buttons(found, acts))
        .into()
}

/// So many of so many.
fn bar(have: &Value, need: &Value, words: &str) -> Option<Html> {
    let (have, need) = (have.as_u64()?, need.as_u64().filter(|need| *need > 0)?);
    let words = format!("{have} of {need} {words}");
    let bar = tag("progress").attr("max", need.to_string()).attr("value", have.min(need).to_string()).attr("aria-label", &words);
    Some(tag("div").with(bar).with(tag("small").with(words)).into())
}

/// The way of a cycle, and where on it the loop is.
fn track(state: &str) -> Html {
    let step = |word: &&str| {
        let step = tag("li").with(*word);
        if *word == state { step.attr("aria-current", "step") } else { step }
    };
    tag("ol").class("steps").attr("aria-label", "A cycle").with_all(STATES.iter().map(step)).into()
}

fn buttons(found: &Value, acts: bool) -> Html {
    if !acts || found["configured"] != true {
        return Html::default();
    }
    let button = |(act, words): (&str, &str)| {
        let place = href("/v1/loops", &[text(found, "id"), act]);
        let button = tag("button").class("plain").attr("type", "button").attr("id", format!("act-{act}"));
        button.attr("data-post", place).attr("data-body", "").with(words)
    };
    let acts = match (found["paused"] == true, text(found, "state")) {
        (true, _) => vec![("resume", "Resume")],
        (false, "waiting") => vec![("run", "Begin a cycle now"), ("pause", "Pause")],
        (false, _) => vec![("pause", "Pause")],
    };
    let group = tag("div").class("row").attr("role", "group").attr("aria-label", "Acts");
    group.with_all(acts.into_iter().map(button)).into()
}

fn cycle(cycle: &Value) -> Html {
    let number = cycle["cycle"].to_string();
    let outcome = text(cycle, "outcome");
    let state = if outcome.is_empty() { chip(Mood::Plain, "under way").into() } else { state_chip(outcome) };
    let about = facts([
        ("Outcome", state),
        ("Why", text(cycle, "why").into()),
        ("Began (UTC)", time(cycle, "began_at")),
        ("Ended (UTC)", time(cycle, "ended_at")),
    ]);
    let finding = |finding: &Value| ["of", "found", "change"].map(|key| said(text(finding, key)));
    let findings: Vec<_> = cycle["findings"].as_array().into_iter().flatten().map(finding).collect();
    let shut = (!findings.is_empty()).then(|| table("Gates that were shut", ["Gate", "Found", "What would change it"], findings));
    let row = |(place, step): (usize, &Value)| {
        let numbers = (!step["numbers"].is_null()).then(|| {
            let text = serde_json::to_string_pretty(&step["numbers"]).unwrap_or_default();
            let details = tag("details").attr("id", format!("cycle-{number}-{place}")).with(tag("summary").with("Numbers"));
            details.with(tag("pre").attr("tabindex", "0").with(text))
        });
        let what = text(step, "action").replace('_', " ");
        [time(step, "at"), what.into(), text(step, "why").into(), text(step, "by").into(), numbers.into()]
    };
    let steps = cycle["steps"].as_array().into_iter().flatten().enumerate().map(row);
    let steps = table("Steps of the cycle", ["When (UTC)", "What", "Why", "By", "Stood on"], steps);
    block(&format!("Cycle {number}")).with(about).with(shut).with(steps).into()
}

/// What it is told.
fn policy(found: &Value) -> Html {
    let words = serde_json::to_string_pretty(&found["policy"]).unwrap_or_default();
    let details = tag("details").attr("id", "policy").with(tag("summary").with("Policy"));
    tag("section").class("block card").with(details.with(tag("pre").attr("tabindex", "0").with(words))).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const EVIL: &str = "<script>alert(1)</script>";

    fn found(state: &str, paused: bool) -> Value {
        json!({
            "id": EVIL, "configured": true, "model": EVIL, "base": EVIL, "dataset": "short", "state": state, "paused": paused,
            "asked": null, "cycle": 2, "created_at": 1, "updated_at": 2, "problem": EVIL, "policy": {"model": EVIL},
            "waits_for": {
                "text": EVIL, "job": "ftjob-1", "rollout": EVIL, "step": 3, "steps": 8,
                "have": {"preferences": 7, "raters": 2}, "need": {"preferences": 40, "raters": 0},
            },
            "cycles": [
                {"cycle": 2, "began_at": 5, "ended_at": null, "outcome": null, "why": null, "findings": null, "steps": []},
                {
                    "cycle": 1, "began_at": 1, "ended_at": 4, "outcome": "refused", "why": EVIL,
                    "findings": [{"of": "accuracy", "found": "9 of 20", "change": EVIL}],
                    "steps": [{"at": 1, "state": "snapshot", "action": "rolled_back", "by": EVIL, "why": EVIL, "numbers": {"n": EVIL}}],
                },
            ],
        })
    }

    #[test]
    fn a_loop_shows_how_far_it_is_and_why_a_cycle_was_refused() {
        let text = page(&found("training", false), true).document();
        assert!(!text.contains("<script"), "{text}");
        for expected in [
            "<li aria-current=\"step\">training</li>",
            "3 of 8 steps",
            "7 of 40 new judgements",
            "href=\"/console/trainings/ftjob-1\"",
            ">under way</span>",
            ">refused</span>",
            "<td>accuracy</td><td>9 of 20</td>",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(!text.contains("of 0 people"));
    }

    #[test]
    fn what_may_be_done_depends_on_where_it_stands_and_on_who_looks() {
        for (found, acts, expected) in [
            (found("waiting", false), true, &["act-run", "act-pause"][..]),
            (found("training", false), true, &["act-pause"]),
            (found("waiting", true), true, &["act-resume"]),
            (found("waiting", false), false, &[]),
        ] {
            let text = page(&found, acts).document();
            let parts = text.split("id=\"").filter(|rest| rest.starts_with("act-"));
            let ids: Vec<&str> = parts.map(|rest| rest.split('"').next().unwrap()).collect();
            assert_eq!(ids, expected);
        }
        let gone = json!({"id": "x", "configured": false, "cycles": []});
        assert!(!page(&gone, true).document().contains("data-post"));
    }

    #[test]
    fn the_list_links_to_each() {
        let text = list(&[found("canary", true)]).document();
        assert!(text.contains("/console/loops/%3Cscript%3Ealert%281%29%3C%2Fscript%3E") && !text.contains("<script"));
        assert!(text.contains(">paused</span>") && text.contains(">canary</span>"));
        assert!(list(&[]).document().contains("[loop.NAME]"));
    }
}
