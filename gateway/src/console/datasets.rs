//! Datasets: the list of snapshots, and one with what its quality report found.

use crate::console::html::{Html, tag};
use crate::console::part::{Mood, Part, block, chip, count, facts, link, moment, nothing, pictures, scrolled, table, tiles};
use serde_json::{Value, json};
use tidemill_rlhf::quality::{Plots, QualityReport};
use tidemill_store::Snapshot;

fn reference(snapshot: &Snapshot) -> String {
    format!("{}@{}", snapshot.name, snapshot.version)
}

/// The verdict, and whether it may be trained on at all.
fn verdict(snapshot: &Snapshot) -> Html {
    let word = if snapshot.tainted.is_some() { "tainted" } else { &snapshot.verdict };
    let mood = if snapshot.tainted.is_some() { Mood::Bad } else { Mood::of_state(&snapshot.verdict) };
    chip(mood, word).into()
}

/// `preference 3 · demonstration 4`
fn kinds(snapshot: &Snapshot) -> String {
    let kinds = snapshot.row_counts["kinds"].as_object().into_iter().flatten();
    let words = kinds.map(|(kind, rows)| format!("{kind} {}", count(rows.as_u64().unwrap_or_default())));
    words.collect::<Vec<_>>().join(" · ")
}

/// The list.
pub fn list(snapshots: &[Snapshot], has_more: bool) -> Part {
    let row = |snapshot: &Snapshot| {
        let reference = reference(snapshot);
        let rows = snapshot.row_counts["rows"].as_u64().unwrap_or_default();
        [
            link(&["datasets", &reference], &reference).into(),
            verdict(snapshot),
            count(rows).into(),
            kinds(snapshot).into(),
            moment(snapshot.created),
        ]
    };
    let list = match snapshots {
        [] => nothing("No dataset yet: `tidemill dataset build NAME`, or POST /v1/datasets, makes one."),
        _ => {
            let head = ["Dataset", "Quality", "Rows", "Of these", "Made (UTC)"];
            tag("section").class("block card").with(table(head, snapshots.iter().map(row))).into()
        }
    };
    let more = if has_more { nothing("Older ones: GET /v1/datasets.") } else { Html::default() };
    Part::new("Datasets", "What people said, as rows to train on. A snapshot never changes.", [list, more])
}

/// The report as the row has it: without its rows and its plots, and empty after an erasure.
fn report(snapshot: &Snapshot) -> Option<QualityReport> {
    let mut report = snapshot.report.clone();
    let fields = report.as_object_mut()?;
    fields.entry("rows").or_insert_with(|| json!([]));
    fields.entry("plots").or_insert_with(|| json!(Plots::default()));
    serde_json::from_value(report).ok()
}

/// One of them.
pub fn page(snapshot: &Snapshot) -> Part {
    let pretty = |value: &Value| tag("pre").attr("tabindex", "0").with(serde_json::to_string_pretty(value).unwrap_or_default());
    let details = |id: &str, name: &str, value: &Value| {
        Html::from(tag("details").attr("id", id).with(tag("summary").with(name)).with(pretty(value)))
    };
    let about = facts([
        ("Quality", verdict(snapshot)),
        ("Made (UTC)", moment(snapshot.created)),
        ("Contents", tag("code").with(&snapshot.content_hash).into()),
        ("Table", tag("code").with(format!("{} version {}", snapshot.location, snapshot.table_version)).into()),
        ("Tainted", snapshot.tainted.as_ref().map(Value::to_string).into()),
    ]);
    let about = block("What it is").with(about).with(details("query", "What was asked for", &snapshot.query));
    let mut blocks: Vec<Html> = vec![about.with(details("counts", "What became of the judgements", &snapshot.row_counts)).into()];
    match report(snapshot) {
        None => blocks.push(nothing("Its quality report is gone: a person behind it was erased.")),
        Some(report) => {
            let summary = &report.summary;
            let rows = |count: usize| tidemill_rlhf::chart::thousands(count);
            let parts = format!("{} keep, {} review, {} drop", rows(summary.keep), rows(summary.review), rows(summary.drop));
            let people = format!("{} raters, {} users", rows(summary.raters), rows(summary.users));
            let pairs = format!("{} thumbs, {} demonstrations", rows(summary.unpaired), rows(summary.demonstrations));
            blocks.push(tiles([
                ("Rows", rows(summary.rows), parts),
                ("Preferences", rows(summary.preferences), pairs),
                ("Prompts that differ", rows(summary.prompt_clusters), format!("{} words in all", rows(summary.words))),
                ("People", rows(summary.raters + summary.users), people),
            ]));
            let checks = scrolled("Checks", &report.checks_table());
            blocks.push(block("Checks").with(tag("div").class("checks").with(checks)).into());
            let figure = |(title, drawing): &(&str, tidemill_rlhf::chart::Fragment)| {
                Html::from(tag("figure").class("block card").with(tag("h3").with(*title)).with(scrolled(title, drawing)))
            };
            blocks.push(pictures(report.drawings().iter().map(figure)));
        }
    }
    Part::new(&reference(snapshot), "What people said, as rows to train on.", blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_rlhf::quality::{QualityOptions, assess};
    use uuid::Uuid;

    const EVIL: &str = "<script>alert(1)</script>";

    fn snapshot(report: Value) -> Snapshot {
        Snapshot {
            id: Uuid::nil(),
            name: EVIL.into(),
            version: 3,
            created: 0,
            query: json!({"tag": EVIL}),
            content_hash: "c0ffee".into(),
            location: EVIL.into(),
            table_version: 3,
            row_counts: json!({"rows": 1234, "kinds": {"preference": 1234}}),
            verdict: "warn".into(),
            report,
            tainted: None,
        }
    }

    #[test]
    fn a_snapshot_shows_the_checks_of_its_report_and_one_after_an_erasure_none() {
        let mut report = serde_json::to_value(assess(&[], &QualityOptions::default())).unwrap();
        report.as_object_mut().unwrap().remove("rows");
        let text = page(&snapshot(report)).document();
        assert!(text.contains("Near duplicates") && text.contains(">warn</span>"), "{text}");
        assert!(!text.contains("<script") && text.contains("preference"));
        let tainted = Snapshot { tainted: Some(json!({"reason": EVIL})), ..snapshot(json!({})) };
        let text = page(&tainted).document();
        assert!(text.contains("is gone") && text.contains(">tainted</span>") && !text.contains("<script"));
    }

    #[test]
    fn the_list_links_to_each() {
        let text = list(&[snapshot(json!({}))], true).document();
        assert!(text.contains("/console/datasets/%3Cscript%3Ealert%281%29%3C%2Fscript%3E%403") && !text.contains("<script"));
        assert!(text.contains("preference 1\u{202f}234") && text.contains("Older ones"));
        assert!(list(&[], false).document().contains("No dataset yet"));
    }
}
