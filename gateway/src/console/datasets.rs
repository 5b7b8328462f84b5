//! Datasets: the list of snapshots, and one with what its quality report found.

use crate::console::html::{Html, tag};
use crate::console::part::{
    Mood, Part, block, chip, count, facts, link, moment, nothing, pictures, plot, said, scrolled, table, tiles,
};
use serde_json::{Value, json};
use tidemill_rlhf::chart::thousands;
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
            tag("section").class("block card").with(table("Datasets", head, snapshots.iter().map(row))).into()
        }
    };
    let more = if has_more { nothing("Older ones: GET /v1/datasets.") } else { Html::default() };
    Part::new("Datasets", "What people said, as rows to train on. A snapshot never changes.", [list, more])
}

/// The report as the row has it, with the plots that its file has; none after an erasure.
fn report(snapshot: &Snapshot, plots: Option<Plots>) -> Option<QualityReport> {
    let mut report = snapshot.report.clone();
    let fields = report.as_object_mut().filter(|fields| !fields.is_empty())?;
    fields.entry("rows").or_insert_with(|| json!([]));
    fields.insert("plots".to_owned(), json!(plots.unwrap_or_default()));
    serde_json::from_value(report).ok()
}

/// Whether there is a report to show. After an erasure there is none, and its file, which names people, is not for showing.
pub fn has_report(snapshot: &Snapshot) -> bool {
    snapshot.report.as_object().is_some_and(|fields| !fields.is_empty())
}

/// One of them. `plots` are those of its report; none: they cannot be read.
pub fn page(snapshot: &Snapshot, plots: Option<Plots>) -> Part {
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
    let about = about.with(details("counts", "What became of the judgements", &snapshot.row_counts));
    let mut blocks: Vec<Html> = vec![about.into()];
    let read = plots.is_some();
    match report(snapshot, plots) {
        None => {
            blocks.push(nothing("Its quality report is gone: a person behind it was erased. Build the dataset anew to get one."))
        }
        Some(report) => blocks.extend(quality(&reference(snapshot), &report, read)),
    }
    Part::new(&reference(snapshot), "What people said, as rows to train on.", blocks)
}

/// What the report says.
fn quality(reference: &str, report: &QualityReport, read: bool) -> Vec<Html> {
    let summary = &report.summary;
    let parts =
        format!("{} keep, {} review, {} drop", thousands(summary.keep), thousands(summary.review), thousands(summary.drop));
    let people = format!("{} raters, {} users", thousands(summary.raters), thousands(summary.users));
    let pairs = format!("{} thumbs, {} demonstrations", thousands(summary.unpaired), thousands(summary.demonstrations));
    let tiles = tiles([
        ("Rows", thousands(summary.rows), parts),
        ("Preferences", thousands(summary.preferences), pairs),
        ("Prompts that differ", thousands(summary.prompt_clusters), format!("{} words in all", thousands(summary.words))),
        ("People", thousands(summary.raters + summary.users), people),
    ]);
    let drawings = report.drawings();
    let drawings = pictures(drawings.iter().enumerate().map(|(place, drawing)| plot(&format!("plot-{place}"), drawing)));
    let drawings = match drawings.is_empty() {
        false => drawings,
        true if read => nothing("No plots: there are no pairs whose lengths could be compared, and no two people."),
        true => nothing("Its plots could not be read; the server's log says why."),
    };
    let checks = tag("div").class("checks").with(scrolled("Checks", &report.checks_table()));
    let rows =
        format!("The rows behind the findings are on a page of their own: `tidemill dataset report {reference} --html FILE`.");
    let checks = block("Checks").with(checks).with(tag("p").with(said(&rows)));
    vec![tiles, drawings, checks.into()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_rlhf::quality::{Bin, QualityOptions, Share, assess};
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
    fn a_snapshot_shows_the_checks_and_plots_of_its_report_and_one_after_an_erasure_none() {
        let mut report = serde_json::to_value(assess(&[], &QualityOptions::default())).unwrap();
        let fields = report.as_object_mut().unwrap();
        fields.remove("rows");
        fields.remove("plots");
        let agreement = fields["checks"].as_array_mut().unwrap().iter_mut().find(|check| check["name"] == "agreement").unwrap();
        (agreement["value"], agreement["interval"]) = (json!(0.5), json!({"low": 0.25, "high": 0.75}));
        let bin = |low: f64, count: usize| Bin { low, high: low + 10.0, count };
        let share = |person: &str| Share { person: person.into(), share: 0.5, rows: 617.0 };
        let plots = Plots {
            length_differences: vec![bin(-10.0, 3), bin(0.0, 9)],
            raters: vec![share(EVIL), share("bob")],
            ..Plots::default()
        };
        let text = page(&snapshot(report.clone()), Some(plots)).document();
        assert!(text.contains("Near duplicates") && text.contains(">warn</span>"), "{text}");
        assert!(!text.contains("<script") && text.contains("preference"));
        for title in ["Length: chosen less rejected", "Agreement: Krippendorff", "Share of the rows per rater"] {
            assert!(text.contains(&format!("<h3>{title}")), "{title}: {text}");
        }
        assert_eq!(text.matches("<svg").count(), 3);
        for numbers in
            ["<td>−10 to 0</td><td>3</td>", "<td>All judgements</td><td>0.50</td><td>0.25 to 0.75</td>", "<td>bob</td>"]
        {
            assert!(text.contains(numbers), "{numbers}: {text}");
        }
        assert!(text.contains("aria-label=\"Numbers of Share of the rows per rater\""), "{text}");
        assert!(page(&snapshot(report.clone()), None).document().contains("<svg"), "agreement is in the row");
        report["checks"] = json!([]);
        assert!(page(&snapshot(report.clone()), None).document().contains("could not be read"));
        assert!(page(&snapshot(report), Some(Plots::default())).document().contains("No plots"));

        let tainted = Snapshot { tainted: Some(json!({"reason": EVIL})), ..snapshot(json!({})) };
        assert!(!has_report(&tainted));
        let text = page(&tainted, None).document();
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
