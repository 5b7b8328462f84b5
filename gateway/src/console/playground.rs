//! The playground: two variants answer one prompt, the visitor says which is better, and only then learns which was which.
//!
//! Here are the fields; the page's script draws lots, streams both answers and sends the judgement.

use crate::console::html::{Element, Html, tag};
use crate::console::part::{Part, nothing};
use tidemill_store::Rollout;

/// Characters of a prompt, at most: a page is no place for books.
const MAX_PROMPT: &str = "20000";

/// Somebody who may be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What the visitor reads.
    pub name: String,
    /// What a request calls the model.
    pub model: String,
    /// Which of the model's variants, where a rollout decides that; as a tester asks for it, the answer counts in no comparison of the
    /// rollout.
    pub variant: Option<String>,
}

impl Candidate {
    /// All that can be asked: the variants of the rollouts, and `names` that no rollout has a say about.
    pub fn all(rollouts: &[Rollout], names: &[String]) -> Vec<Self> {
        let mut found: Vec<Self> = Vec::new();
        for rollout in rollouts {
            let arms = rollout.spec["arms"].as_array().into_iter().flatten();
            for variant in arms.filter_map(|arm| arm["variant"].as_str()) {
                let model = &rollout.model;
                let same = |known: &Self| known.variant.as_deref() == Some(variant);
                if found.iter().any(|known| same(known) && known.model == *model) {
                    continue;
                }
                // Of two models the same word may mean two things.
                let name = if found.iter().any(same) { format!("{variant} of {model}") } else { variant.to_owned() };
                found.push(Self { name, model: model.clone(), variant: Some(variant.to_owned()) });
            }
        }
        for name in names {
            let decided = rollouts.iter().any(|rollout| rollout.model == *name) || found.iter().any(|known| known.name == *name);
            if !decided {
                found.push(Self { name: name.clone(), model: name.clone(), variant: None });
            }
        }
        found
    }
}

/// The page.
pub fn part(candidates: &[Candidate], acts: bool) -> Part {
    let lead = "Two variants answer side by side, in an order that is drawn and not shown. Your preference becomes a comparison, \
                as those from the labeling page.";
    let blocks = match candidates {
        _ if !acts => vec![nothing("Asking and judging takes a key of scope admin; this one may look.")],
        [] => vec![nothing("No model is served.")],
        _ => vec![question(candidates), answers(), verdict(), outcome()],
    };
    Part::new("Playground", lead, blocks)
}

fn field(id: &str, words: &str, input: Element) -> Element {
    tag("div").class("field").with(tag("label").attr("for", id).with(words)).with(input.attr("id", id))
}

fn question(candidates: &[Candidate]) -> Html {
    let choice = |chosen: usize| {
        let option = |(place, candidate): (usize, &Candidate)| {
            let option = tag("option").attr("value", &candidate.model).flag("selected", place == chosen).with(&candidate.name);
            match &candidate.variant {
                Some(variant) => option.attr("data-variant", variant),
                None => option,
            }
        };
        tag("select").with_all(candidates.iter().enumerate().map(option))
    };
    let tokens = tag("input").attr("type", "number").attr("min", "1").attr("max", "4096").attr("value", "256");
    let fields = [
        field("one", "One variant", choice(0)),
        field("other", "Another", choice(1.min(candidates.len() - 1))),
        field("most", "Tokens, at most", tokens),
    ];
    let text = |rows: &str| tag("textarea").attr("rows", rows).attr("maxlength", MAX_PROMPT);
    let system = tag("details").attr("id", "with-system").with(tag("summary").with("System prompt"));
    let system = system.with(field("system", "Before the conversation", text("2")));
    let key = |name: &str| tag("kbd").with(name);
    let send =
        tag("button").class("primary").attr("type", "submit").attr("id", "send").attr("aria-keyshortcuts", "Control+Enter");
    let stop = tag("button").class("plain").attr("type", "button").attr("id", "stop").flag("hidden", true);
    let buttons =
        tag("div").class("row").with(send.with("Ask both")).with(stop.attr("aria-keyshortcuts", "Escape").with("Stop ")).with(
            tag("span")
                .class("caption")
                .with(key("Ctrl"))
                .with(" ")
                .with(key("Enter"))
                .with(" asks, ")
                .with(key("Esc"))
                .with(" stops"),
        );
    let form = tag("form").class("block card ask").attr("id", "ask").with(tag("div").class("fields").with_all(fields));
    form.with(field("prompt", "Prompt", text("4").flag("required", true))).with(system).with(buttons).into()
}

fn answers() -> Html {
    let answer = |id: &str, key: &str, words: &str| {
        let title = tag("h2").class("caption").attr("id", format!("{id}-title")).with(tag("kbd").with(key)).with(words);
        let section = tag("section").class("answer card").attr("id", id).attr("tabindex", "0");
        let text = tag("div").class("text").attr("id", format!("{id}-text"));
        section.attr("aria-labelledby", format!("{id}-title")).with(title).with(text)
    };
    let pair = [answer("left", "1", " Left answer"), answer("right", "2", " Right answer")];
    tag("div").class("pair").attr("id", "answers").flag("hidden", true).with_all(pair).into()
}

fn verdict() -> Html {
    let choice = |(choice, key, words): (&str, &str, &str)| {
        let button = tag("button").class("choice").attr("type", "button").attr("data-choice", choice);
        button.attr("aria-keyshortcuts", key).flag("disabled", true).with(tag("kbd").with(key)).with(words)
    };
    let choices = [("left", "1", " Left is better"), ("right", "2", " Right is better"), ("tie", "3", " Tie")].map(choice);
    let group = tag("div").class("choices").attr("role", "group").attr("aria-label", "Preference").attr("id", "choices");
    group.flag("hidden", true).with_all(choices).into()
}

fn outcome() -> Html {
    let words = tag("p").attr("id", "outcome-text");
    let tally = tag("div").attr("id", "tally");
    let section = tag("section").class("block card").attr("id", "outcome").attr("aria-live", "polite").flag("hidden", true);
    section.with(tag("h2").with("Which was which")).with(words).with(tally).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use uuid::Uuid;

    const EVIL: &str = "\"><script>alert(1)</script>";

    fn rollout() -> Rollout {
        Rollout {
            id: Uuid::nil(),
            created: 0,
            updated: 0,
            ended: None,
            name: "r".into(),
            model: "assistant".into(),
            spec: json!({"arms": [{"variant": "base"}, {"variant": EVIL}]}),
            state: json!({}),
            version: 0,
            latest: json!({}),
        }
    }

    #[test]
    fn variants_of_a_rollout_are_asked_for_by_name_and_its_model_is_not() {
        let names = ["assistant".to_owned(), "base".to_owned(), "closed".to_owned()];
        let found = Candidate::all(&[rollout(), rollout()], &names);
        let shown: Vec<_> = found.iter().map(|one| (one.name.as_str(), one.model.as_str(), one.variant.is_some())).collect();
        assert_eq!(shown, [("base", "assistant", true), (EVIL, "assistant", true), ("closed", "closed", false)]);
        let other = Rollout { model: "other".into(), spec: json!({"arms": [{"variant": "base"}]}), ..rollout() };
        let found = Candidate::all(&[rollout(), other], &[]);
        assert_eq!((found[2].name.as_str(), found[2].model.as_str()), ("base of other", "other"));
    }

    #[test]
    fn candidates_are_offered_as_text_and_two_different_ones_are_chosen() {
        let text = part(&Candidate::all(&[rollout()], &[]), true).document();
        assert!(!text.contains("<script") && text.contains("&lt;script&gt;"));
        assert_eq!(text.matches(" selected").count(), 2);
        assert!(text.contains("<option value=\"assistant\" selected data-variant=\"base\">base</option>"), "{text}");
        let one = part(&Candidate::all(&[], &["base".to_owned()]), true).document();
        assert!(one.matches(" selected").count() == 2, "one may be compared with itself");
    }

    #[test]
    fn who_may_only_look_and_who_has_no_model_is_told_so() {
        assert!(part(&Candidate::all(&[rollout()], &[]), false).document().contains("scope admin"));
        let text = part(&[], true).document();
        assert!(text.contains("No model is served") && !text.contains("<form"));
    }
}
