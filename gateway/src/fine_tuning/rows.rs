//! A client's file as rows for the trainer.

use crate::batches::input::{Lines, RawLine};
use crate::fine_tuning::method::{Kind, Method};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use tidemill_rlhf::dataset::format::{self, Format};
use tidemill_rlhf::dataset::import::MAX_LINE;
use tidemill_rlhf::dataset::{Example, StoredRow};
use tidemill_rlhf::reward::grader::Grader;

/// Bad lines that are told in full; all are counted.
const TOLD: usize = 10;
/// Whether a turn of the assistant is learnt.
const WEIGHT: &str = "weight";

/// What a file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Rows.
    pub rows: usize,
    /// Some conversation has more than one turn that is learnt.
    pub several_turns: bool,
}

/// Writes the rows of `input` to `output`, or says what is wrong with which lines. `name` is the file's, for where a row came from.
pub fn convert(input: &Path, output: &Path, name: &str, method: &Method) -> io::Result<Result<Found, String>> {
    let mut lines = Lines::open(input, MAX_LINE)?;
    let beside = output.with_extension("partial");
    let mut out = BufWriter::new(File::create(&beside)?);
    let (mut found, mut bad) = (Found::default(), BadLines::default());
    while let Some(RawLine { number, text }) = lines.read()? {
        let row = match text {
            Some(text) => match &method.grader {
                Some(grader) => question(&text, grader).map(|line| (line, 1)),
                None => row(&text, &format!("{name}:{number}"), method.kind)
                    .map(|(stored, turns)| (format::line(&stored, Format::Tidemill).unwrap_or_default(), turns)),
            },
            None => Err(format!("it is longer than {} MiB; split it, or leave it out", MAX_LINE >> 20)),
        };
        match row {
            Ok((line, turns)) => {
                found.rows += 1;
                found.several_turns |= turns > 1;
                writeln!(out, "{}", Value::Object(line))?;
            }
            Err(why) => bad.push(number, &why),
        }
    }
    if bad.count > 0 {
        return Ok(Err(bad.message()));
    }
    if found.rows == 0 {
        return Ok(Err("it has no examples; write one JSON object on each line".to_owned()));
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    std::fs::rename(&beside, output)?;
    Ok(Ok(found))
}

fn object(text: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_slice::<Value>(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err("it is no JSON object; write one {…} per line".to_owned()),
        // Its own line number is always 1.
        Err(error) => {
            Err(format!("it is no JSON ({}); write one whole {{…}} per line", error.to_string().replace("line 1 ", "")))
        }
    }
}

/// A conversation that is to be answered, with its columns; or what is wrong and what to do about it.
fn question(text: &[u8], grader: &Grader) -> Result<Map<String, Value>, String> {
    let object = object(text)?;
    let fix = "write {\"messages\": […]} with what answers are compared with in columns beside it";
    let messages = object.get("messages").and_then(format::messages);
    let messages = messages.ok_or_else(|| format!("it has no messages; {fix}"))?;
    match messages.last().map(|last| last.role.as_str()) {
        Some("user" | "tool") => {}
        Some("assistant") => {
            return Err(
                "its last message is the assistant's, and answers are sampled; leave it out, or use the method 'supervised'"
                    .to_owned(),
            );
        }
        _ => return Err("its last message is not the user's; end with what is to be answered".to_owned()),
    }
    if object.get("tools").is_some_and(|tools| !tools.is_null()) {
        return Err("it has tools, which are not called in this training; leave them out".to_owned());
    }
    let item = Value::Object(object);
    if let Some(missing) = grader.missing(&item) {
        return Err(format!("the grader '{}' looks for {missing}, which it does not have; {fix}", grader.name()));
    }
    match item {
        Value::Object(object) => Ok(object),
        _ => Ok(Map::new()),
    }
}

/// A row, and how many turns of it are learnt; or what is wrong and what to do about it.
fn row(text: &[u8], place: &str, kind: Kind) -> Result<(StoredRow, usize), String> {
    let (object, weights) = cut(object(text)?)?;
    let mut stored = format::parse(object, place).map_err(|(what, fix)| format!("{what}; {fix}"))?;
    let turns = match (&mut stored.row.example, kind) {
        (Example::Demonstration { prompt, .. }, Kind::Supervised) => {
            let mut turns = 1;
            for (index, message) in prompt.iter_mut().enumerate().filter(|(_, message)| message.role == "assistant") {
                let learnt = weights.get(index).copied().flatten() != Some(0);
                turns += usize::from(learnt);
                // Said of the turns that are context only; the trainer learns the others.
                message.extra.shift_remove(WEIGHT);
                if !learnt {
                    message.extra.insert(WEIGHT.to_owned(), json!(0));
                }
            }
            turns
        }
        (Example::Preference { .. }, Kind::Dpo) => 1,
        (Example::Preference { .. }, Kind::Supervised) => {
            return Err("it compares two answers, which is for the method 'dpo'; write {\"messages\": […]}".to_owned());
        }
        // Its lines are prompts.
        (_, Kind::Reinforcement) => return Err("it has no grader to judge answers by".to_owned()),
        (_, Kind::Dpo) => {
            let fix = "write {\"input\": {\"messages\": […]}, \"preferred_output\": […], \"non_preferred_output\": […]}";
            return Err(format!("it has no two answers to compare; {fix}"));
        }
        (Example::Unpaired { .. }, Kind::Supervised) => {
            return Err("its answer is judged instead of learnt; write {\"messages\": […]}".to_owned());
        }
    };
    Ok((stored, turns))
}

/// Of each message: 0, 1, or not said.
type Weights = Vec<Option<i64>>;

/// A conversation without what comes after the last turn that is learnt, and the weights of its messages.
fn cut(mut object: Map<String, Value>) -> Result<(Map<String, Value>, Weights), String> {
    let Some(Value::Array(messages)) = object.get_mut("messages") else { return Ok((object, Vec::new())) };
    let mut weights = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        weights.push(match &message[WEIGHT] {
            Value::Null => None,
            weight if message["role"] != "assistant" => {
                let why = format!("messages[{index}] has weight {weight} and is not the assistant's");
                return Err(format!("{why}; only answers have a weight"));
            }
            weight => match weight.as_i64() {
                Some(weight @ (0 | 1)) => Some(weight),
                _ => return Err(format!("the weight of messages[{index}] is {weight}; use 0 or 1")),
            },
        });
    }
    let learnt = |index: &usize| messages[*index]["role"] == "assistant" && weights[*index] != Some(0);
    if messages.last().is_some_and(|last| last["role"] == "assistant") {
        if let Some(last) = (0..messages.len()).rev().find(learnt) {
            messages.truncate(last + 1);
            weights.truncate(last + 1);
        } else {
            return Err(
                "every answer has weight 0, so that nothing is learnt from it; give one weight 1, or leave it out".to_owned()
            );
        }
    }
    Ok((object, weights))
}

#[derive(Default)]
struct BadLines {
    count: usize,
    told: Vec<String>,
}

impl BadLines {
    fn push(&mut self, line: usize, why: &str) {
        self.count += 1;
        if self.told.len() < TOLD {
            self.told.push(format!("Line {line}: {why}."));
        }
    }

    fn message(&self) -> String {
        let more = self.count - self.told.len();
        let more = if more > 0 { format!(" And {more} more lines.") } else { String::new() };
        format!("{}{more}", self.told.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fine_tuning::method::Hyperparameters;

    fn grader(kind: Kind) -> Option<Grader> {
        let grader = json!({"type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"});
        (kind == Kind::Reinforcement).then(|| serde_json::from_value(grader).unwrap())
    }

    fn converted(text: &str, kind: Kind) -> (Result<Found, String>, Vec<Value>) {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("in"), folder.path().join("out.jsonl"));
        std::fs::write(&input, text).unwrap();
        let method = Method { kind, hyperparameters: Hyperparameters::default(), grader: grader(kind) };
        let found = convert(&input, &output, "in.jsonl", &method).unwrap();
        let rows = std::fs::read_to_string(&output).unwrap_or_default();
        (found, rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    #[test]
    fn lines_of_openai_become_rows_with_their_weights() {
        let text = concat!(
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
            "\n\n",
            r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0},{"role":"user","content":"c"},{"role":"assistant","content":"d"},{"role":"user","content":"e"},{"role":"assistant","content":"f","weight":0}]}"#,
        );
        let (found, rows) = converted(text, Kind::Supervised);
        assert_eq!(found.unwrap(), Found { rows: 2, several_turns: false });
        assert_eq!((&rows[0]["kind"], &rows[0]["source"]), (&"demonstration".into(), &"in.jsonl:1".into()));
        let prompt = rows[1]["prompt"].as_array().unwrap();
        assert_eq!(
            (prompt.len(), prompt[2]["content"].as_str(), rows[1]["completion"][0]["content"].as_str()),
            (4, Some("b"), Some("d"))
        );
        let back = format::parse(rows[1].as_object().unwrap().clone(), "x").unwrap();
        assert_eq!(back.row.example.prompt()[2].extra[WEIGHT], 0);
        let two = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"},{"role":"assistant","content":"d","weight":1}]}"#;
        let (found, _) = converted(two, Kind::Supervised);
        assert!(found.unwrap().several_turns);
    }

    #[test]
    fn pairs_are_for_dpo() {
        let pair = r#"{"input":{"messages":[{"role":"user","content":"a"}]},"preferred_output":[{"role":"assistant","content":"b"}],"non_preferred_completion":[{"role":"assistant","content":"c"}]}"#;
        let (found, rows) = converted(pair, Kind::Dpo);
        assert_eq!((found.unwrap().rows, rows[0]["rejected"][0]["content"].as_str()), (1, Some("c")));
        assert!(converted(pair, Kind::Supervised).0.unwrap_err().contains("'dpo'"));
        let chat = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
        assert!(converted(chat, Kind::Dpo).0.unwrap_err().starts_with("Line 1: it has no two answers"));
    }

    #[test]
    fn prompts_keep_their_columns_and_must_have_those_that_the_grader_looks_for() {
        let line = r#"{"messages":[{"role":"user","content":"a"}],"answer":"b","level":3}"#;
        let (found, rows) = converted(line, Kind::Reinforcement);
        assert_eq!((found.unwrap().rows, &rows[0]["answer"], &rows[0]["level"]), (1, &"b".into(), &3.into()));
        for (line, part) in [
            (r#"{"messages":[{"role":"user","content":"a"}]}"#, "the grader 'exact' looks for item.answer"),
            (
                r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"answer":"b"}"#,
                "the assistant's",
            ),
            (r#"{"messages":[{"role":"system","content":"a"}],"answer":"b"}"#, "not the user's"),
            (r#"{"messages":[],"answer":"b"}"#, "no messages"),
            (r#"{"messages":[{"role":"user","content":"a"}],"answer":"b","tools":[]}"#, "tools"),
        ] {
            let error = converted(line, Kind::Reinforcement).0.unwrap_err();
            assert!(error.starts_with("Line 1: ") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn bad_lines_are_named() {
        let text = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}\nnonsense\n[]\n".to_owned()
            + r#"{"messages":[{"role":"user","content":"a","weight":1},{"role":"assistant","content":"b"}]}"#
            + "\n"
            + r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":2}]}"#
            + "\n"
            + r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]}"#;
        let message = converted(&text, Kind::Supervised).0.unwrap_err();
        for (line, what) in [
            (1, "does not end with an assistant"),
            (2, "no JSON"),
            (3, "no JSON object"),
            (4, "not the assistant's"),
            (5, "use 0 or 1"),
            (6, "every answer has weight 0"),
        ] {
            assert!(message.contains(&format!("Line {line}: ")) && message.contains(what), "{what}: {message}");
        }
        let many = "x\n".repeat(25);
        assert!(converted(&many, Kind::Supervised).0.unwrap_err().ends_with("And 15 more lines."));
        assert!(converted("\n", Kind::Supervised).0.unwrap_err().contains("no examples"));
    }
}
