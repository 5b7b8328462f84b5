//! The check: parts one after the other, each a process of its own, and what is made of those that fail.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::cases::{Begun, Tally};
use super::rates::Ceilings;
use super::{CANNOT_OPEN, NO_CARD, PARTS, Place, UNFINISHED};

/// How long a case may be silent on a card: one that hangs must not cost those behind it.
pub const SILENCE: Duration = Duration::from_secs(20);
/// What each part has in any case, however slow those before it are.
const LEAST: Duration = Duration::from_secs(4);
/// Cases that may fail before the rest of a part is given up.
const MOST_FAILURES: usize = 6;
/// Of them, those that are done once more, each launch waited for, so that the error names the kernel.
const DONE_AGAIN: usize = 2;
/// Lines of what a process complained that are kept.
const KEPT: usize = 60;
/// Characters of a reason in the table.
const MOST_WORDS: usize = 400;

/// All parts, within a limit.
pub fn check(place: &Place<'_>, report: Option<&Path>, limit: Duration) -> ExitCode {
    let start = Instant::now();
    let mut check = Check { place, table: Table::to(report), ceilings: Ceilings::default() };
    if let Place::Emulated = place {
        check.table.line("Emulated, in tiny sizes: the numbers say nothing.");
    }
    let mut section = None;
    for (index, (name, own, seconds)) in PARTS.into_iter().enumerate() {
        if section.replace(own) != Some(own) {
            check.table.line(own.heading());
        }
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            check.table.unfinished(&format!("| {name} | not run: the limit of {} s was reached |", limit.as_secs()));
            continue;
        }
        // An emulated thread is slow, and tests share their processors: only the whole is limited.
        let most = match place {
            Place::Emulated => left,
            Place::Card(_) => time_of_part(left, Duration::from_secs(seconds), PARTS.len() - 1 - index),
        };
        // There the processor has far more to do than the card.
        let silence = place.silence().filter(|_| name != "parity large");
        let status = check.run(name, &[], most, silence);
        // What follows would say the same again.
        if name == "open" && matches!(place, Place::Card(_)) {
            match status.and_then(|status| status.code()) {
                Some(0) => {}
                Some(code) if code == i32::from(NO_CARD) => return ExitCode::from(NO_CARD),
                _ => return ExitCode::from(CANNOT_OPEN),
            }
        }
    }
    check.table.line(&format!("\n{:.0} s in all.", start.elapsed().as_secs_f64()));
    check.table.verdict()
}

/// How long a part may take, of what is left for it and those behind it.
fn time_of_part(left: Duration, most: Duration, behind: usize) -> Duration {
    left.saturating_sub(LEAST * behind as u32).max(LEAST).min(left).min(most)
}

/// What was printed so far, also written to a file line by line: a run that is killed leaves what it had.
struct Table {
    lines: Vec<String>,
    report: Option<File>,
    failed: bool,
    cut_off: bool,
}

impl Table {
    fn to(report: Option<&Path>) -> Self {
        // What is printed is worth having all the same.
        let open = |path: &Path| File::create(path).inspect_err(|error| eprintln!("{}: {error}", path.display())).ok();
        Table { lines: Vec::new(), report: report.and_then(open), failed: false, cut_off: false }
    }

    fn line(&mut self, line: &str) {
        println!("{line}");
        self.lines.push(line.to_owned());
        if let Some(report) = &mut self.report
            && let Err(error) = writeln!(report, "{line}")
        {
            eprintln!("no more is written to the report: {error}");
            self.report = None;
        }
    }

    fn failure(&mut self, what: &str, why: &str) {
        self.line(&format!("| {what} | | | | | **failed**: {why} |"));
        self.failed = true;
    }

    /// A line about what there was no time for.
    fn unfinished(&mut self, line: &str) {
        self.line(line);
        self.cut_off = true;
    }

    fn verdict(&self) -> ExitCode {
        match (self.failed, self.cut_off) {
            (true, _) => ExitCode::FAILURE,
            (false, true) => ExitCode::from(UNFINISHED),
            (false, false) => ExitCode::SUCCESS,
        }
    }
}

/// A check under way.
struct Check<'a> {
    place: &'a Place<'a>,
    table: Table,
    ceilings: Ceilings,
}

/// How a process ended that did not do all it was asked for.
enum Trouble {
    /// By itself.
    Ended,
    /// It was silent for too long.
    Silent(Duration),
    /// The time of its part was over.
    Over,
}

impl Check<'_> {
    /// Runs a part, and goes on behind a case that ends it. The status is that of its last process, where that ended by itself.
    fn run(&mut self, name: &str, words: &[&str], limit: Duration, silence: Option<Duration>) -> Option<ExitStatus> {
        let (started, mut tally, mut from, mut failures) = (Instant::now(), Tally::default(), 0, 0);
        let ended = loop {
            let left = limit.saturating_sub(started.elapsed());
            let first = format!("from={from}");
            let all: Vec<&str> = [first.as_str()].into_iter().chain(words.iter().copied()).collect();
            tally.begun = None;
            let mut process = self.start(name, &all, &[]);
            let trouble = self.listen(&mut process, &mut tally, left, silence);
            let Err(trouble) = trouble else { break process.status };
            let words = said(&process.complaints, process.status);
            match (trouble, tally.begun.clone()) {
                (Trouble::Over, begun) => {
                    let at = begun.map_or(String::new(), |begun| format!(", in {}", begun.what));
                    self.table.unfinished(&format!("| {name} | stopped after {} s{at} |", limit.as_secs()));
                    break None;
                }
                (Trouble::Silent(_) | Trouble::Ended, None) => {
                    self.table.failure(name, &words);
                    break process.status;
                }
                (trouble, Some(Begun { number, what })) => {
                    let mut why = match trouble {
                        Trouble::Silent(time) => format!("nothing for {} s; {words}", time.as_secs()),
                        _ => words.clone(),
                    };
                    if failures < DONE_AGAIN && matches!(self.place, Place::Card(_)) {
                        let left = limit.saturating_sub(started.elapsed()).min(SILENCE);
                        let again = self.again(name, number, left, silence);
                        if let Some(again) = again.filter(|again| *again != words) {
                            why = format!("{why} — when each launch is waited for: {again}");
                        }
                    }
                    self.table.failure(&what, &why);
                    failures += 1;
                    from = number + 1;
                    if failures == MOST_FAILURES {
                        self.table.failure(name, &format!("given up after {failures} failures"));
                        break None;
                    }
                }
            }
        };
        let (rows, wrong) = tally.rows();
        rows.iter().for_each(|row| self.table.line(row));
        self.table.failed |= wrong;
        ended
    }

    /// What a case says when each launch is waited for; `None` when it goes well.
    fn again(&mut self, name: &str, number: usize, limit: Duration, silence: Option<Duration>) -> Option<String> {
        let mut process = self.start(name, &[&format!("from={number}"), "only"], &[("CUDA_LAUNCH_BLOCKING", "1")]);
        match self.listen(&mut process, &mut Tally::default(), limit, silence) {
            Ok(()) => Some("it goes well".to_owned()),
            Err(Trouble::Ended) => Some(said(&process.complaints, process.status)),
            Err(_) => None,
        }
    }

    fn start(&self, name: &str, words: &[&str], environment: &[(&str, &str)]) -> Process {
        let folder = match self.place {
            Place::Card(folder) => folder.as_os_str(),
            Place::Emulated => OsStr::new("-"),
        };
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("part").arg(folder).arg(name).args([self.ceilings.copy, self.ceilings.product].map(|v| v.to_string()));
        command.args(words).envs(environment.iter().copied()).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let (rows, complaints) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (row, complaint) = (sender.clone(), sender);
        std::thread::spawn(move || forward(rows, &row, Line::Said));
        std::thread::spawn(move || forward(complaints, &complaint, Line::Complained));
        Process { child, lines, complaints: VecDeque::new(), status: None }
    }

    /// Takes over a process's rows as they come, until it ends or is ended.
    fn listen(
        &mut self,
        process: &mut Process,
        tally: &mut Tally,
        limit: Duration,
        silence: Option<Duration>,
    ) -> Result<(), Trouble> {
        let (started, mut heard) = (Instant::now(), Instant::now());
        let trouble = loop {
            // What does not tell its cases is not expected to speak.
            let silence = silence.filter(|_| tally.begun.is_some());
            let left = limit.saturating_sub(started.elapsed());
            let patience = silence.map_or(left, |silence| silence.saturating_sub(heard.elapsed()).min(left));
            match process.lines.recv_timeout(patience) {
                Ok(Line::Said(line)) => {
                    heard = Instant::now();
                    self.ceilings.hear(&line);
                    if !tally.hear(&line) {
                        self.table.line(&line);
                    }
                }
                Ok(Line::Complained(line)) => {
                    eprintln!("{line}");
                    process.complaints.push_back(line);
                    if process.complaints.len() > KEPT {
                        process.complaints.pop_front();
                    }
                }
                // Both ends are closed: it ended, or is about to.
                Err(RecvTimeoutError::Disconnected) => break None,
                Err(RecvTimeoutError::Timeout) if left.is_zero() || started.elapsed() >= limit => break Some(Trouble::Over),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(silence) = silence.filter(|silence| heard.elapsed() >= *silence) {
                        break Some(Trouble::Silent(silence));
                    }
                }
            }
        };
        process.end(trouble.is_some());
        match (trouble, process.status) {
            (Some(trouble), _) => Err(trouble),
            (None, Some(status)) if status.success() => Ok(()),
            (None, Some(_)) => Err(Trouble::Ended),
            (None, None) => Err(Trouble::Over),
        }
    }
}

enum Line {
    Said(String),
    Complained(String),
}

fn forward(from: impl Read, to: &Sender<Line>, line: fn(String) -> Line) {
    // Not every line of a library is UTF-8.
    for bytes in BufReader::new(from).split(b'\n').map_while(Result::ok) {
        if to.send(line(String::from_utf8_lossy(&bytes).into_owned())).is_err() {
            break;
        }
    }
}

/// A part that runs.
struct Process {
    child: Child,
    lines: std::sync::mpsc::Receiver<Line>,
    /// The last lines of what it complained.
    complaints: VecDeque<String>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Waits for its end, but not for ever: a process that is inside a driver may outlive its own killing.
    fn end(&mut self, kill: bool) {
        if kill {
            // It may have ended meanwhile.
            self.child.kill().ok();
        }
        let until = Instant::now() + Duration::from_secs(10);
        while self.status.is_none() && Instant::now() < until {
            self.status = self.child.try_wait().ok().flatten();
            std::thread::sleep(Duration::from_millis(5));
        }
        while let Ok(line) = self.lines.try_recv() {
            if let Line::Complained(line) = line {
                eprintln!("{line}");
                self.complaints.push_back(line);
            }
        }
    }
}

/// A reason for the table: what a panic said, else the last lines.
fn said(complaints: &VecDeque<String>, status: Option<ExitStatus>) -> String {
    let lines: Vec<&str> = complaints.iter().map(String::as_str).collect();
    let lines: Vec<&str> = lines.into_iter().filter(|line| !line.starts_with("note: ") && !line.trim().is_empty()).collect();
    // The first is the cause.
    let panicked = lines.iter().position(|line| line.starts_with("thread '") && line.contains("panicked at"));
    let from = panicked.map_or(lines.len().saturating_sub(3), |at| at + 1);
    let words: Vec<&str> = lines[from..].iter().copied().take_while(|line| *line != "stack backtrace:").collect();
    let words = words.join(" ").replace('|', "/");
    let words: String = words.chars().take(MOST_WORDS).collect();
    let ended = status.map_or("did not end when it was killed".to_owned(), |status| status.to_string());
    if words.is_empty() { ended } else { format!("{words} ({ended})") }
}

/// A part whose cases fail in every way that a card may fail in is told as it should be; for tests of this program.
pub fn rehearse() -> ExitCode {
    // However long each takes, all have their turn.
    let (mut left, mut turns) = (Duration::from_secs(240), 0);
    for (index, (_, _, seconds)) in PARTS.into_iter().enumerate() {
        let time = time_of_part(left, Duration::from_secs(seconds), PARTS.len() - 1 - index);
        left -= time;
        turns += usize::from(time >= LEAST);
    }
    if turns < PARTS.len() {
        eprintln!("only {turns} parts have their turn");
        return ExitCode::FAILURE;
    }
    let mut check = Check { place: &Place::Emulated, table: Table::to(None), ceilings: Ceilings::default() };
    let status = check.run("rehearsal", &[], Duration::from_secs(60), Some(Duration::from_secs(3)));
    let lines = check.table.lines.join("\n");
    let told = [
        "| a call that fails | | | | | **failed**: no_such_kernel: CUDA_ERROR_NOT_FOUND (exit status: 101) |",
        "| a process that is killed | | | | | **failed**: signal: 6",
        "| a card that hangs | | | | | **failed**: nothing for 3 s; signal: 9",
        "| an operation | reference | 3 | 5.0e-1 | 1.0e-1 | **wrong** in 1, first an error that is too large |",
        "| another | reference | 1 | 0.0e0 | 0.0e0 | ok |",
    ];
    let missing: Vec<_> = told.iter().filter(|line| !lines.contains(**line)).collect();
    if missing.is_empty() && check.table.failed && status.is_some_and(|status| status.success()) {
        return ExitCode::SUCCESS;
    }
    eprintln!("not told: {missing:#?}");
    ExitCode::FAILURE
}
