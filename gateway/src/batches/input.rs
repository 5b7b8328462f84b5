//! The input of a batch, read line by line and never as a whole.

use crate::batches::line::{Line, Problem};
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

/// Most requests of a batch, as OpenAI has it.
pub const MAX_LINES: usize = 50_000;
/// Problems that a refused batch lists.
const MAX_PROBLEMS: usize = 100;

/// A line as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawLine {
    /// Counted from 1; empty lines count, too.
    pub number: usize,
    /// Without the end of line; `None` when it is longer than allowed.
    pub text: Option<Vec<u8>>,
}

/// The lines of an input that are not empty.
#[derive(Debug)]
pub struct Lines<R = BufReader<File>> {
    reader: R,
    number: usize,
    longest: usize,
}

impl Lines {
    /// Of a file; lines of more than `longest` bytes are passed over.
    pub fn open(path: &Path, longest: usize) -> io::Result<Self> {
        Ok(Self::new(BufReader::with_capacity(64 * 1024, File::open(path)?), longest))
    }
}

impl<R: BufRead> Lines<R> {
    fn new(reader: R, longest: usize) -> Self {
        Self { reader, number: 0, longest }
    }

    /// The next line that is not empty; `None` at the end.
    pub fn read(&mut self) -> io::Result<Option<RawLine>> {
        loop {
            let mut text = Vec::new();
            let most = self.longest as u64 + 1;
            if (&mut self.reader).take(most).read_until(b'\n', &mut text)? == 0 {
                return Ok(None);
            }
            self.number += 1;
            let number = self.number;
            if text.last() != Some(&b'\n') && text.len() > self.longest {
                self.pass_over()?;
                return Ok(Some(RawLine { number, text: None }));
            }
            if number == 1 && text.starts_with(b"\xEF\xBB\xBF") {
                // The byte order mark that some editors put before UTF-8.
                text.drain(..3);
            }
            let trimmed = text.trim_ascii();
            if !trimmed.is_empty() {
                let text = if trimmed.len() == text.len() { text } else { trimmed.to_vec() };
                return Ok(Some(RawLine { number, text: Some(text) }));
            }
        }
    }

    fn pass_over(&mut self) -> io::Result<()> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let (length, end) = match buffer.iter().position(|byte| *byte == b'\n') {
                Some(at) => (at + 1, true),
                None => (buffer.len(), buffer.is_empty()),
            };
            self.reader.consume(length);
            if end {
                return Ok(());
            }
        }
    }

    /// The next lines that `wanted` wants: at most `lines`, or what first exceeds `bytes`.
    pub fn some(&mut self, lines: usize, bytes: usize, wanted: impl Fn(usize) -> bool) -> io::Result<Vec<RawLine>> {
        let (mut found, mut size) = (Vec::new(), 0);
        while found.len() < lines && size < bytes {
            let Some(line) = self.read()? else { break };
            if wanted(line.number) {
                size += line.text.as_ref().map_or(0, Vec::len);
                found.push(line);
            }
        }
        Ok(found)
    }
}

/// What is known of a good input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Valid {
    /// Requests.
    pub total: usize,
    /// The model, where all requests name the same.
    pub model: Option<String>,
}

/// Looks through the whole input.
pub fn validate<R: BufRead>(lines: &mut Lines<R>, endpoint: &str) -> io::Result<Result<Valid, Vec<Problem>>> {
    let mut problems = Vec::new();
    // Half of a BLAKE3 hash each, so that ids of any length take little room; a chance of 10⁻²⁹ is no duplicate.
    let mut seen: HashSet<[u8; 16]> = HashSet::new();
    let mut models: Option<Option<String>> = None;
    let mut total = 0;
    while let Some(RawLine { number, text }) = lines.read()? {
        total += 1;
        if total > MAX_LINES {
            let message = format!("The input has more than {MAX_LINES} requests, the most that a batch takes; split it.");
            return Ok(Err(vec![Problem::new("too_many_requests", message)]));
        }
        let line = match text {
            Some(text) => Line::parse(&text, endpoint),
            None => {
                let message = format!("This line is longer than {} bytes, the most that a request takes.", lines.longest);
                Err(Problem::new("line_too_long", message))
            }
        };
        let checked = line.and_then(|line| {
            let hash = blake3::hash(line.custom_id.as_bytes());
            let mut half = [0; 16];
            half.copy_from_slice(&hash.as_bytes()[..16]);
            if seen.insert(half) {
                return Ok(line);
            }
            let shown: String = line.custom_id.chars().take(100).collect();
            let message = format!("The custom_id '{shown}' was used on an earlier line; each must be unique.");
            Err(Problem { param: Some("custom_id"), ..Problem::new("duplicate_custom_id", message) })
        });
        match checked {
            Ok(line) => {
                let model = line.model().map(str::to_owned);
                models = Some(models.map_or(model.clone(), |common| common.filter(|common| Some(common) == model.as_ref())));
            }
            Err(problem) => {
                problems.push(Problem { line: Some(number), ..problem });
                if problems.len() == MAX_PROBLEMS {
                    break;
                }
            }
        }
    }
    if total == 0 {
        problems.push(Problem::new("empty_file", "The input has no requests: write one JSON object on each line."));
    }
    Ok(if problems.is_empty() { Ok(Valid { total, model: models.flatten() }) } else { Err(problems) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const URL: &str = "/v1/completions";

    fn line(id: &str, model: &str) -> String {
        json!({"custom_id": id, "method": "POST", "url": URL, "body": {"model": model}}).to_string()
    }

    fn check(text: &str, longest: usize) -> Result<Valid, Vec<Problem>> {
        validate(&mut Lines::new(text.as_bytes(), longest), URL).unwrap()
    }

    #[test]
    fn empty_lines_a_byte_order_mark_and_windows_ends_of_line_are_fine() {
        let text = format!("\u{feff}{}\r\n\n  \n{}", line("a", "m"), line("b", "m"));
        assert_eq!(check(&text, 1000), Ok(Valid { total: 2, model: Some("m".into()) }));
        let mut lines = Lines::new(text.as_bytes(), 1000);
        let numbers: Vec<usize> = std::iter::from_fn(|| lines.read().unwrap()).map(|line| line.number).collect();
        assert_eq!(numbers, [1, 4]);
        let two = format!("{}\n{}\n{}", line("a", "m"), line("b", "n"), line("c", "n"));
        assert_eq!(check(&two, 1000), Ok(Valid { total: 3, model: None }));
    }

    #[test]
    fn problems_name_their_lines() {
        let text = format!("{}\nnonsense\n{}\n{}\n", line("a", "m"), line("a", "m"), line(&"x".repeat(200), "m"));
        let problems = check(&text, 150).unwrap_err();
        let found: Vec<_> = problems.iter().map(|problem| (problem.line, problem.code)).collect();
        assert_eq!(found, [(Some(2), "invalid_json_line"), (Some(3), "duplicate_custom_id"), (Some(4), "line_too_long")]);
        assert_eq!(check("\n\n", 10).unwrap_err()[0].code, "empty_file");
        let many = "x\n".repeat(200);
        assert_eq!(check(&many, 10).unwrap_err().len(), MAX_PROBLEMS);
    }

    #[test]
    fn fifty_thousand_lines_are_the_most() {
        let lines = |count: usize| (0..count).map(|n| line(&n.to_string(), "m") + "\n").collect::<String>();
        assert_eq!(check(&lines(MAX_LINES), 200).unwrap().total, MAX_LINES);
        assert_eq!(check(&lines(MAX_LINES + 1), 200).unwrap_err()[0].code, "too_many_requests");
    }

    #[test]
    fn lines_come_in_portions_without_those_that_are_done() {
        let text = "a\nbb\nccc\ndddd\n";
        let mut lines = Lines::new(text.as_bytes(), 10);
        let numbers = |lines: Vec<RawLine>| lines.iter().map(|line| line.number).collect::<Vec<_>>();
        assert_eq!(numbers(lines.some(10, 3, |number| number != 2).unwrap()), [1, 3]);
        assert_eq!(numbers(lines.some(10, 3, |_| true).unwrap()), [4]);
        assert!(lines.some(10, 3, |_| true).unwrap().is_empty());
    }
}
