//! What is asked while training: prompts from a dataset's rows, or from a file with one per line.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::{
    collate::{Dropped, Encoder},
    dataset::{
        DatasetError, Example, Message, Row,
        format::{BadLine, prompt_of},
        import::BadLines,
    },
};

/// Columns that are the prompt itself.
const OWN: [&str; 2] = ["prompt", "messages"];

/// A conversation that wants an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// For messages to people: the row's id, or its line.
    pub id: String,
    /// The conversation so far.
    pub messages: Vec<Message>,
    /// What else is known, as the expected answer.
    pub columns: Map<String, Value>,
    /// The chat template's clock, in seconds since 1970.
    pub now: u64,
}

/// The same as tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// What it is.
    pub question: Question,
    /// Up to where an answer begins; at least one.
    pub tokens: Vec<u32>,
}

/// The prompts of a dataset's rows, each once. An answer that the row calls good is its column `answer`.
pub fn questions(rows: &[Row]) -> Vec<Question> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for row in rows {
        let (prompt, good) = match &row.example {
            Example::Preference { prompt, chosen, .. } => (prompt, Some(chosen)),
            Example::Demonstration { prompt, completion } | Example::Unpaired { prompt, completion, label: true } => {
                (prompt, Some(completion))
            }
            Example::Unpaired { prompt, .. } => (prompt, None),
        };
        if !seen.insert(json!(prompt).to_string()) {
            continue;
        }
        let mut columns = Map::new();
        if let Some(text) = good.and_then(|messages| messages.last()).map(|message| message.content.clone()) {
            columns.insert("answer".to_owned(), Value::String(text));
        }
        let now = u64::try_from(row.origin.judged_at / 1_000_000).unwrap_or(0);
        found.push(Question { id: row.id.clone(), messages: prompt.clone(), columns, now });
    }
    found
}

/// The prompts of a file: of each line its `prompt`, a text or messages, or its `messages` up to the last that is not the
/// assistant's. Its other columns stay with it.
pub fn read_questions(path: &Path) -> Result<Vec<Question>, DatasetError> {
    let text = std::fs::read_to_string(path).map_err(|source| DatasetError::File { path: PathBuf::from(path), source })?;
    let (mut found, mut bad) = (Vec::new(), BadLines::default());
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value = serde_json::from_str::<Value>(line).ok();
        let messages = value.as_ref().and_then(prompt_of);
        let (Some(Value::Object(mut columns)), Some(messages)) = (value, messages) else {
            bad.push(BadLine {
                line: index as u64 + 1,
                what: "it has no prompt".to_owned(),
                fix: "write {\"prompt\": …} with a string or messages, or {\"messages\": […]}".to_owned(),
            });
            continue;
        };
        OWN.iter().for_each(|own| drop(columns.shift_remove(*own)));
        found.push(Question { id: format!("line {}", index + 1), messages, columns, now: 0 });
    }
    if bad.count > 0 { Err(DatasetError::Lines(bad)) } else { Ok(found) }
}

/// Prompts as tokens; those that the template refuses or that have more than `longest` tokens are listed with the reason.
pub fn encode(encoder: &Encoder<'_>, questions: Vec<Question>, longest: Option<usize>) -> (Vec<Prompt>, Vec<(String, Dropped)>) {
    let (mut prompts, mut dropped) = (Vec::new(), Vec::new());
    for question in questions {
        match encoder.opening(&question.messages, question.now) {
            Ok(tokens) if tokens.is_empty() => dropped.push((question.id, Dropped::NothingToLearn)),
            Ok(tokens) => match longest.filter(|longest| tokens.len() > *longest) {
                Some(longest) => dropped.push((question.id, Dropped::TooLong(tokens.len(), longest))),
                None => prompts.push(Prompt { question, tokens }),
            },
            Err(why) => dropped.push((question.id, why)),
        }
    }
    (prompts, dropped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Origin;

    #[test]
    fn rows_give_each_prompt_once_with_its_good_answer() {
        let user = |text: &str| Message { role: "user".to_owned(), content: text.to_owned(), extra: Map::new() };
        let row = |example: Example| Row::new(example, Origin { judged_at: 3_500_000, ..Origin::default() });
        let pair = |text: &str| Example::Preference {
            prompt: vec![user(text)],
            chosen: vec![Message::assistant("good")],
            rejected: vec![Message::assistant("bad")],
        };
        let thumb = Example::Unpaired { prompt: vec![user("c")], completion: vec![Message::assistant("x")], label: false };
        let found = questions(&[row(pair("a")), row(pair("a")), row(pair("b")), row(thumb)]);
        assert_eq!(found.iter().map(|one| one.messages[0].content.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!((found[0].columns["answer"].as_str(), found[0].now), (Some("good"), 3));
        assert!(found[2].columns.is_empty());
    }

    #[test]
    fn a_file_has_a_prompt_per_line_and_bad_lines_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(
            &path,
            "{\"prompt\": \"a\", \"answer\": \"1\"}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"b\"}]}\n",
        )
        .unwrap();
        let found = read_questions(&path).unwrap();
        assert_eq!((found[0].id.as_str(), found[1].id.as_str()), ("line 1", "line 3"));
        assert_eq!(found[0].columns, *json!({"answer": "1"}).as_object().unwrap());
        assert_eq!((found[1].messages[0].content.as_str(), found[1].columns.len()), ("b", 0));
        std::fs::write(&path, "{\"prompt\": \"a\"}\n{\"answer\": 1}\nno\n").unwrap();
        let error = read_questions(&path).unwrap_err().to_string();
        assert!(error.contains("line 2: it has no prompt") && error.contains("line 3"), "{error}");
    }
}
