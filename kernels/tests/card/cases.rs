//! What a part says of its cases, and what is made of it. A part is a process that may end at any case, so it tells each before it does it and
//! what came of it after it; whoever started it counts.

use std::collections::BTreeMap;
use std::io::Write;

/// Begins the line of a case that is about to be done: its number and what it is.
const CASE: &str = "case: ";
/// Begins the line of what came of it: operation, against what, the error, and what is allowed.
const SEEN: &str = "seen: ";
const BETWEEN: char = '\t';

/// The cases of a part, in the process that does them.
pub struct Cases {
    next: usize,
    /// Those before it are behind.
    from: usize,
    /// Only that one.
    only: bool,
}

impl Cases {
    /// As the words of the command line have it: `from=N`, `only`.
    pub fn of(words: &[&str]) -> Self {
        let from = words.iter().find_map(|word| word.strip_prefix("from=")?.parse().ok());
        Cases { next: 0, from: from.unwrap_or(0), only: words.contains(&"only") }
    }

    /// Whether the next case is to be done; says so.
    pub fn take(&mut self, what: &str) -> bool {
        let number = self.next;
        self.next += 1;
        let taken = if self.only { number == self.from } else { number >= self.from };
        if taken {
            say(&format!("{CASE}{number}{BETWEEN}{what}"));
        }
        taken
    }

    /// What came of it.
    pub fn seen(&self, operation: &str, against: &str, error: f64, allowed: f64) {
        say(&format!("{SEEN}{operation}{BETWEEN}{against}{BETWEEN}{error:e}{BETWEEN}{allowed:e}"));
    }
}

/// A line that whoever started this process hears at once.
pub fn say(line: &str) {
    println!("{line}");
    std::io::stdout().flush().unwrap();
}

/// A case that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begun {
    pub number: usize,
    pub what: String,
}

/// The cases of one operation.
#[derive(Default)]
struct Seen {
    cases: usize,
    worst: f64,
    allowed: f64,
    wrong: usize,
    /// The first that was wrong.
    first: String,
}

/// What came of a part's cases, by operation, in the order in which they were first seen.
#[derive(Default)]
pub struct Tally {
    order: Vec<(String, String)>,
    seen: BTreeMap<(String, String), Seen>,
    pub begun: Option<Begun>,
}

impl Tally {
    /// Takes a line of a part; false when it is a row of the table.
    pub fn hear(&mut self, line: &str) -> bool {
        if let Some((number, what)) = line.strip_prefix(CASE).and_then(|rest| rest.split_once(BETWEEN)) {
            self.begun = number.parse().ok().map(|number| Begun { number, what: what.to_owned() });
            return true;
        }
        let Some(rest) = line.strip_prefix(SEEN) else { return false };
        if let [operation, against, error, allowed] = rest.split(BETWEEN).collect::<Vec<_>>().as_slice() {
            // What is not a number is wrong.
            let [error, allowed] = [error, allowed].map(|text| text.parse().unwrap_or(f64::INFINITY));
            let key = ((*operation).to_owned(), (*against).to_owned());
            if !self.seen.contains_key(&key) {
                self.order.push(key.clone());
            }
            let seen = self.seen.entry(key).or_default();
            seen.cases += 1;
            seen.worst = seen.worst.max(error);
            seen.allowed = seen.allowed.max(allowed);
            if error > allowed || error.is_infinite() {
                if seen.wrong == 0 {
                    seen.first = self.begun.as_ref().map_or(String::new(), |begun| begun.what.clone());
                }
                seen.wrong += 1;
            }
        }
        true
    }

    /// Rows of the table, and whether one of them is wrong.
    pub fn rows(&self) -> (Vec<String>, bool) {
        let row = |key: &(String, String)| {
            let Seen { cases, worst, allowed, wrong, first } = &self.seen[key];
            let verdict = if *wrong == 0 { "ok".to_owned() } else { format!("**wrong** in {wrong}, first {first}") };
            format!("| {} | {} | {cases} | {worst:.1e} | {allowed:.1e} | {verdict} |", key.0, key.1)
        };
        (self.order.iter().map(row).collect(), self.seen.values().any(|seen| seen.wrong > 0))
    }
}
