//! Registered adapters: the list, and one with where it comes from.

use crate::console::html::{Html, all, tag};
use crate::console::part::{Mood, Part, block, chip, facts, link, moment, nothing, table};
use serde_json::Value;
use tidemill_rlhf::chart::significant;
use tidemill_store::{AdapterState, Alias, RegisteredAdapter};

/// An adapter and the names that lead to it.
pub struct Shown {
    /// The adapter.
    pub adapter: RegisteredAdapter,
    /// Its aliases, ascending.
    pub aliases: Vec<String>,
    /// Why this server does not serve it though it should.
    pub problem: Option<String>,
}

impl Shown {
    /// With the aliases that are its own.
    pub fn new(adapter: RegisteredAdapter, aliases: &[Alias], problem: Option<String>) -> Self {
        let own = aliases.iter().filter(|alias| alias.adapter == adapter.id).map(|alias| alias.name.clone()).collect();
        Self { adapter, aliases: own, problem }
    }

    fn state(&self) -> Html {
        let state = self.adapter.state;
        let mut chips = vec![chip(Mood::of_state(state.as_str()), state.as_str())];
        if self.adapter.tainted.is_some() {
            chips.push(chip(Mood::Bad, "tainted"));
        }
        if state == AdapterState::Serving && self.problem.is_some() {
            chips.push(chip(Mood::Bad, "not served here"));
        }
        all(chips)
    }

    fn names(&self) -> Html {
        all(self.aliases.iter().map(|alias| tag("code").with(alias)))
    }

    /// The page. `ancestors` are the adapter that its training went on from, that one's, and so on.
    pub fn part(&self, ancestors: &[RegisteredAdapter]) -> Part {
        let adapter = &self.adapter;
        let lead = all([Html::from("An adapter of "), tag("strong").with(&adapter.base).into()]);
        let tainted = adapter.tainted.as_ref().map(Value::to_string);
        let about = facts([
            ("State", self.state()),
            ("Aliases", self.names()),
            ("Not served because", self.problem.clone().into()),
            ("Tainted", tainted.into()),
            ("Registered (UTC)", moment(adapter.created)),
            ("In service since (UTC)", adapter.served.map(moment).into()),
            ("Files removed (UTC)", adapter.files_removed.map(moment).into()),
            ("Contents", tag("code").with(&adapter.content_hash).into()),
            ("Base's weights", adapter.base_hash.as_ref().map(|hash| tag("code").with(hash)).into()),
        ]);
        let blocks = [
            block("What it is").with(about).into(),
            block("Where it comes from").with(self.origin(ancestors)).into(),
            block("Measured").with(measured(&adapter.metrics)).into(),
        ];
        Part::new(&adapter.reference(), lead, blocks)
    }

    fn origin(&self, ancestors: &[RegisteredAdapter]) -> Html {
        let lineage = &self.adapter.lineage;
        let dataset = lineage["dataset"].as_str().map(|reference| link(&["datasets", reference], reference));
        let job = self.adapter.job.as_ref().map(|job| link(&["trainings", job], job));
        let parents = ancestors.iter().map(|parent| link(&["adapters", &parent.id.to_string()], parent.reference()));
        let parents = tag("ol").class("line").with_all(parents.map(|parent| tag("li").with(parent)));
        let raters: Vec<&str> = lineage["raters"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let pretty = |value: &Value| {
            let text = serde_json::to_string_pretty(value).unwrap_or_default();
            (!value.is_null()).then(|| tag("pre").attr("tabindex", "0").with(text))
        };
        facts([
            ("Dataset", dataset.into()),
            ("Job", job.into()),
            ("Went on from", if ancestors.is_empty() { Html::default() } else { parents.into() }),
            ("Raters", raters.join(", ").into()),
            ("Trained on", lineage["trained_on"].as_str().into()),
            ("Code", lineage["code_version"].as_str().into()),
            ("Factors", pretty(&lineage["lora"]).into()),
            ("Configuration", pretty(&lineage["config"]).into()),
        ])
    }
}

/// Numbers and texts by name, those of objects within under both names.
fn measured(metrics: &Value) -> Html {
    let mut rows = Vec::new();
    flatten("", metrics, &mut rows);
    if rows.is_empty() {
        return nothing("Nothing was measured.");
    }
    table("Measured", ["What", "Value"], rows.into_iter().map(|(name, value)| [name.into(), value.into()]))
}

fn flatten(name: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(entries) => entries.iter().for_each(|(key, value)| {
            let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            flatten(&name, value, rows);
        }),
        Value::Null => {}
        Value::Number(number) => {
            rows.push((name.to_owned(), number.as_f64().map_or_else(|| number.to_string(), significant)));
        }
        Value::String(text) => rows.push((name.to_owned(), text.clone())),
        other => rows.push((name.to_owned(), other.to_string())),
    }
}

/// The list.
pub fn list(adapters: &[Shown], has_more: bool) -> Part {
    let row = |shown: &Shown| {
        let adapter = &shown.adapter;
        let dataset = adapter.lineage["dataset"].as_str().map(|reference| link(&["datasets", reference], reference));
        [
            link(&["adapters", &adapter.id.to_string()], adapter.reference()).into(),
            (&adapter.base).into(),
            shown.state(),
            shown.names(),
            dataset.into(),
            moment(adapter.created),
        ]
    };
    let list = match adapters {
        [] => nothing("No adapter yet: `tidemill adapter register`, or a fine-tuning job, makes one."),
        _ => {
            let head = ["Adapter", "Base", "State", "Aliases", "Dataset", "Registered (UTC)"];
            tag("section").class("block card").with(table("Adapters", head, adapters.iter().map(row))).into()
        }
    };
    let more = if has_more { nothing("Older ones: GET /v1/adapters.") } else { Html::default() };
    Part::new("Adapters", "What was trained or imported, and what is done with it.", [list, more])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use uuid::Uuid;

    const EVIL: &str = "<script>alert(1)</script>";

    fn shown() -> Shown {
        let adapter = RegisteredAdapter {
            id: Uuid::from_u128(3),
            name: "brief".into(),
            generation: 0x2f,
            base: EVIL.into(),
            state: AdapterState::Serving,
            job: Some("ftjob-1".into()),
            lineage: json!({"dataset": "short@2", "raters": ["ann", EVIL], "config": {"method": EVIL}, "lora": {"r": 8}}),
            metrics: json!({"held_out": {"win_rate": 0.75}, "note": EVIL, "kl": null}),
            ..RegisteredAdapter::default()
        };
        let alias = |name: &str, adapter: u128| Alias {
            base: EVIL.into(),
            name: name.into(),
            adapter: Uuid::from_u128(adapter),
            updated: 0,
        };
        Shown::new(adapter, &[alias(EVIL, 3), alias("other", 4)], Some(EVIL.into()))
    }

    #[test]
    fn an_adapter_leads_to_its_dataset_its_job_and_those_before_it() {
        let parent = RegisteredAdapter { id: Uuid::from_u128(2), name: "older".into(), ..RegisteredAdapter::default() };
        let text = shown().part(&[parent]).document();
        for expected in [
            "href=\"/console/datasets/short%402\"",
            "href=\"/console/trainings/ftjob-1\"",
            "href=\"/console/adapters/00000000-0000-0000-0000-000000000002\">older@0000000000000000</a>",
            "<td>held_out.win_rate</td><td>0.75</td>",
            ">not served here</span>",
            "brief@000000000000002f",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(!text.contains("<script") && !text.contains("<td>kl</td>") && !text.contains("<code>other"));
    }

    #[test]
    fn the_list_links_to_each() {
        let text = list(&[shown()], false).document();
        assert!(text.contains("/console/adapters/00000000-0000-0000-0000-000000000003\"") && !text.contains("<script"));
        assert!(list(&[], false).document().contains("No adapter yet"));
    }
}
