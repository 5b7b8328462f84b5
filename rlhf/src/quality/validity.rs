//! Whether a row can be trained on at all: roles, order, empty and equal answers, answers that stop in the middle.

use super::{
    Thresholds, address,
    corpus::{Corpus, Findings},
    report::{Check, Keep},
};
use crate::dataset::{Example, Message};

const INVALID: &str = "validity";
const TRUNCATED: &str = "truncated";

/// The checks over broken rows and over answers that stop in the middle.
pub(super) fn check(corpus: &Corpus<'_>, thresholds: &Thresholds, findings: &mut Findings) -> [Check; 2] {
    let mut taught = 0;
    for (index, row) in corpus.rows.iter().enumerate() {
        for fault in faults(&row.example) {
            findings.add(index, INVALID, Keep::Drop, fault);
        }
        // A rejected answer may stop where it likes: that can be why it was rejected.
        if let Some(answer) = corpus.taught(index).filter(|answer| !answer.words.is_empty()) {
            taught += 1;
            if let Some(how) = truncation(&answer.text, answer.words.len()) {
                findings.add(index, TRUNCATED, Keep::Review, how);
            }
        }
    }
    let invalid = findings.share(INVALID, corpus.rows.len(), thresholds.invalid, |found| {
        format!("In {found}: wrong roles, no prompt, an empty answer, or two answers that are the same. Leave them out.")
    });
    let truncated = findings.share(TRUNCATED, taught, thresholds.truncated, |found| {
        format!(
            "In {found} the answer to learn from stops in the middle of a sentence or of a code block. Raise the limit of tokens where they \
             are sampled, and leave these out."
        )
    });
    [invalid, truncated]
}

/// What is wrong with an example.
fn faults(example: &Example) -> Vec<String> {
    let mut faults = Vec::new();
    let prompt = example.prompt();
    match prompt.last().map(|message| message.role.as_str()) {
        None => faults.push("the prompt has no message".to_owned()),
        Some("user" | "tool") => {}
        Some(role) => {
            faults.push(format!("the prompt ends with a message of role {role:?}; the last must be from the user or a tool"))
        }
    }
    if !prompt.is_empty() && prompt.iter().all(|message| message.content.trim().is_empty() && !is_more_than_text(message)) {
        faults.push("the prompt is empty".to_owned());
    }
    let mut calls = false;
    for (place, message) in prompt.iter().enumerate() {
        let role = message.role.as_str();
        match role {
            "system" | "developer" if place > 0 && !matches!(prompt[place - 1].role.as_str(), "system" | "developer") => {
                faults.push(format!("message {place} of the prompt is from the {role}; it belongs at the start"));
            }
            "tool" if !calls => faults.push(format!("message {place} of the prompt answers a tool call that nobody made")),
            "system" | "developer" | "user" | "assistant" | "tool" => {}
            _ => faults.push(format!("message {place} of the prompt has the unknown role {role:?}")),
        }
        calls = message.extra.contains_key("tool_calls") || (role == "tool" && calls);
    }
    let names: &[&str] = match example {
        Example::Preference { .. } => &["chosen", "rejected"],
        Example::Unpaired { .. } | Example::Demonstration { .. } => &["completion"],
    };
    for (name, answer) in names.iter().zip(example.answers()) {
        if answer.iter().all(|message| message.content.trim().is_empty() && !is_more_than_text(message)) {
            faults.push(format!("{name} is empty"));
        } else if let Some(message) = answer.iter().find(|message| !matches!(message.role.as_str(), "assistant" | "tool")) {
            faults.push(format!("{name} has a message of role {:?}; answers are from the assistant", message.role));
        }
    }
    if let Example::Preference { chosen, rejected, .. } = example
        && address::of_messages(chosen) == address::of_messages(rejected)
    {
        faults.push("chosen and rejected are the same".to_owned());
    }
    faults
}

/// Whether a message says something beside its text: it calls tools, refuses, or holds parts.
fn is_more_than_text(message: &Message) -> bool {
    ["tool_calls", "refusal", "audio", "parts"].iter().any(|key| message.extra.get(*key).is_some_and(|value| !value.is_null()))
}

/// Fewest words of an answer that a limit of tokens is likely to have cut.
const LONG: usize = 40;
/// Fewest words of a last line that is a sentence and not a heading, a signature, or an entry of a list.
const SENTENCE: usize = 8;

/// How an answer of so many words stops in the middle, if it does.
fn truncation(answer: &str, words: usize) -> Option<&'static str> {
    let fences = answer.lines().filter(|line| line.trim_start().starts_with("```")).count();
    if fences % 2 == 1 {
        return Some("the answer ends inside a code block");
    }
    let end = answer.trim_end();
    let line = end.lines().next_back()?.trim();
    let last = line.chars().next_back()?;
    let is_markup = line.starts_with(['#', '|', '>', '-', '*', '+', '`']) || line.starts_with(|c: char| c.is_ascii_digit());
    let is_link = line.rsplit(' ').next().is_some_and(|word| word.contains(['/', '@', '=', '_']));
    // Thai and its neighbours end sentences with nothing.
    let is_open = (last.is_alphanumeric()
        && !matches!(last, '\u{0e00}'..='\u{0eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}'))
        || matches!(last, ',' | '(' | '[' | '{' | '–' | '—' | '、' | '，');
    let sentence =
        line.split_whitespace().count() >= SENTENCE || line.chars().filter(|c| *c >= '\u{3000}').count() >= 2 * SENTENCE;
    (words >= LONG && is_open && sentence && !is_markup && !is_link).then_some("the answer ends in the middle of a sentence")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataset::{Origin, Row},
        quality::{
            generate::{self, message},
            report::Status,
        },
    };

    fn run(rows: &[Row]) -> ([Check; 2], Findings) {
        let thresholds = Thresholds::default();
        let mut findings = Findings::new(rows);
        let checks = check(&Corpus::new(rows, 0.6), &thresholds, &mut findings);
        (checks, findings)
    }

    #[test]
    fn clean_rows_are_valid_and_whole() {
        let (checks, _) = run(&generate::clean(500, 1));
        assert!(checks.iter().all(|check| check.status == Status::Pass && check.value == Some(0.0)), "{checks:?}");
    }

    #[test]
    fn every_broken_row_is_found_and_named() {
        let mut rows = generate::clean(100, 2);
        let user = |text: &str| vec![message("user", text)];
        let says = |text: &str| vec![message("assistant", text)];
        let preference = |prompt, chosen, rejected| Example::Preference { prompt, chosen, rejected };
        let broken = [
            (preference(vec![], says("a"), says("b")), "no message"),
            (preference(says("hello"), says("a"), says("b")), "ends with"),
            (preference(user("  "), says("a"), says("b")), "prompt is empty"),
            (preference(user("q"), says(" \n"), says("b")), "chosen is empty"),
            (preference(user("q"), says("a"), vec![]), "rejected is empty"),
            (preference(user("q"), says("same  text"), says("same text ")), "are the same"),
            (preference(user("q"), user("a"), says("b")), "chosen has a message of role"),
            (
                preference(vec![message("user", "q"), message("robot", "x"), message("user", "q")], says("a"), says("b")),
                "unknown role",
            ),
            (
                preference(vec![message("user", "q"), message("system", "s"), message("user", "q")], says("a"), says("b")),
                "at the start",
            ),
            (preference(vec![message("user", "q"), message("tool", "42")], says("a"), says("b")), "tool call"),
            (Example::Unpaired { prompt: user("q"), completion: says(""), label: true }, "completion is empty"),
        ];
        for (example, _) in &broken {
            rows.push(Row::new(example.clone(), Origin::default()));
        }
        let (checks, findings) = run(&rows);
        assert_eq!(checks[0].status, Status::Fail);
        assert_eq!(findings.of(INVALID), (100..100 + broken.len()).collect::<Vec<_>>());
        for ((_, says), row) in broken.iter().zip(&findings.into_rows()[100..]) {
            assert!(row.verdict == Keep::Drop && row.reasons[0].detail.contains(says), "{says}: {row:?}");
        }
    }

    #[test]
    fn a_conversation_with_tools_is_valid() {
        let mut call = message("assistant", "");
        call.extra.insert("tool_calls".into(), serde_json::json!([{"id": "1"}]));
        let prompt =
            vec![message("system", "s"), message("user", "q"), call.clone(), message("tool", "42"), message("tool", "43")];
        assert!(faults(&Example::Demonstration { prompt: prompt.clone(), completion: vec![call] }).is_empty());
        assert!(faults(&Example::Demonstration { prompt, completion: vec![message("assistant", "done")] }).is_empty());
    }

    #[test]
    fn cut_answers_are_found() {
        let rows: Vec<Row> = generate::clean(100, 3)
            .iter()
            .enumerate()
            .map(|(index, row)| match index {
                10 => generate::with_answers(row, |chosen, rejected| {
                    (format!("{chosen} {chosen}\n\nSo the best thing that you can do in this case is to"), rejected.to_owned())
                }),
                20 => {
                    generate::with_answers(row, |chosen, rejected| (format!("{chosen}\n```rust\nfn main("), rejected.to_owned()))
                }
                30 => {
                    generate::with_answers(row, |chosen, rejected| (chosen.to_owned(), format!("{rejected}\n```rust\nfn main(")))
                }
                _ => row.clone(),
            })
            .collect();
        let (checks, findings) = run(&rows);
        assert_eq!(findings.of(TRUNCATED), [10, 20]);
        assert_eq!(checks[1].status, Status::Warn);
        assert_eq!(checks[0].status, Status::Pass);
    }

    #[test]
    fn answers_that_end_without_a_full_stop_are_not_all_cut() {
        let long = "This is a sentence that says something of no importance at all. ".repeat(6);
        for end in [
            "- the last entry of a list that has quite a few words in it",
            "Kind regards",
            "## A heading",
            "See the whole story with all of its details at https://example.org/story",
            "```",
            "สวัสดี",
            "That is all 🙂",
        ] {
            assert_eq!(truncation(&format!("{long}\n{}{end}", if end == "```" { "```\ncode\n" } else { "" }), 72), None, "{end}");
        }
        assert_eq!(truncation("a short answer without a full stop at its very end", 10), None);
    }
}
