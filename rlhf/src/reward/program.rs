//! Rewards from a program: one process per answer, which reads it on its standard input and prints a number.
//!
//! A process for each, so that one answer that hangs the program or breaks it costs itself and no other. The program gets `PATH`, `HOME`,
//! `LANG` and nothing else of the environment; what it starts is ended with it. What leaves the program's process group lives on, and
//! nobody waits for it.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Map, Value, json};

use super::{Answer, RewardError, Score, in_parallel};

/// Most bytes that are read of what a program prints.
const MAX_OUTPUT: usize = 64 << 10;
/// Bytes that are read at once.
const PORTION: usize = 4096;
/// How often to look whether it has ended.
const POLL: Duration = Duration::from_millis(2);
/// What it gets of the environment.
const KEPT: [&str; 3] = ["PATH", "HOME", "LANG"];

/// A program that judges.
pub struct Program {
    command: Vec<String>,
    limit: Duration,
    parallel: usize,
}

impl Program {
    /// With the seconds that it may take for one answer.
    pub fn new(command: &[String], timeout_s: f64) -> Result<Self, String> {
        if command.first().is_none_or(String::is_empty) {
            return Err("command names no program; write [\"python3\", \"judge.py\"]".to_owned());
        }
        let limit = Duration::try_from_secs_f64(timeout_s).ok().filter(|limit| !limit.is_zero() && timeout_s <= 3600.0);
        let limit = limit.ok_or_else(|| format!("timeout_s must be above 0 and at most 3600, it is {timeout_s}"))?;
        let parallel = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { command: command.to_vec(), limit, parallel })
    }

    fn start(&self) -> std::io::Result<Child> {
        let kept = KEPT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
        Command::new(&self.command[0])
            .args(&self.command[1..])
            .env_clear()
            .envs(kept)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
    }

    /// What it says about one answer, or how it failed.
    fn ask(&self, question: &[u8]) -> Result<Option<f64>, String> {
        let not_started = |error: io::Error| format!("it could not be started: {error}");
        let mut child = self.start().map_err(not_started)?;
        let began = Instant::now();
        let mut pipes = match Pipes::of(&mut child, question) {
            Ok(pipes) => pipes,
            Err(error) => {
                end(&mut child);
                return Err(not_started(error));
            }
        };
        let status = loop {
            let moved = pipes.pass_on();
            match child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if began.elapsed() >= self.limit => break None,
                Err(_) => break None,
                Ok(None) if moved => {}
                Ok(None) => std::thread::sleep(POLL),
            }
        };
        end(&mut child);
        let Some(status) = status else { return Err(format!("it took longer than {} s", self.limit.as_secs_f64())) };
        // What it said is in the pipes by now. Their ends are not waited for: who left its group may hold them open for ever.
        while pipes.pass_on() && began.elapsed() < self.limit {}
        if status.success() {
            number(&pipes.said.text())
        } else {
            Err(format!("{status}: {}", last_line(&pipes.complained.text())))
        }
    }
}

/// A running program's pipes, served by one thread that waits for none of them: a pipe that nobody empties stops who fills it.
struct Pipes<'a> {
    stdin: Option<ChildStdin>,
    unsent: &'a [u8],
    said: Ear<ChildStdout>,
    complained: Ear<ChildStderr>,
}

/// The reading end of a pipe, until the other end is closed.
struct Ear<R> {
    pipe: Option<R>,
    heard: Vec<u8>,
}

impl<'a> Pipes<'a> {
    fn of(child: &mut Child, unsent: &'a [u8]) -> io::Result<Self> {
        let stdin = child.stdin.take();
        stdin.as_ref().map_or(Ok(()), never_wait)?;
        Ok(Self { stdin, unsent, said: Ear::of(child.stdout.take())?, complained: Ear::of(child.stderr.take())? })
    }

    /// Writes and reads what can be at this moment; `false` when that was nothing.
    fn pass_on(&mut self) -> bool {
        self.write() | self.said.hear() | self.complained.hear()
    }

    fn write(&mut self) -> bool {
        let Some(pipe) = &mut self.stdin else { return false };
        match pipe.write(self.unsent) {
            Ok(written) if written < self.unsent.len() => self.unsent = &self.unsent[written..],
            Err(error) if is_passing(&error) => return false,
            // All is sent; or the program does not read to the end, and has its reasons.
            Ok(_) | Err(_) => self.stdin = None,
        }
        true
    }
}

impl<R: Read + AsFd> Ear<R> {
    fn of(pipe: Option<R>) -> io::Result<Self> {
        pipe.as_ref().map_or(Ok(()), never_wait)?;
        Ok(Self { pipe, heard: Vec::new() })
    }

    fn hear(&mut self) -> bool {
        let Some(pipe) = &mut self.pipe else { return false };
        let mut portion = [0; PORTION];
        match pipe.read(&mut portion) {
            Err(error) if is_passing(&error) => return false,
            Ok(0) | Err(_) => self.pipe = None,
            Ok(read) => {
                // What is beyond is thrown away, so that the program does not wait for a reader.
                let room = MAX_OUTPUT - self.heard.len();
                self.heard.extend_from_slice(&portion[..read.min(room)]);
            }
        }
        true
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.heard).into_owned()
    }
}

/// Reads and writes of this end do what they can at once.
fn never_wait(pipe: &impl AsFd) -> io::Result<()> {
    Ok(fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?)
}

/// There is nothing to read, or no room, at this moment.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Ends the program's whole group and waits for the program.
fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        kill_process_group(group, Signal::KILL).ok();
    }
    child.wait().ok();
}

fn last_line(text: &str) -> &str {
    text.trim_end().lines().next_back().unwrap_or("it said nothing on its standard error")
}

fn number(said: &str) -> Result<Option<f64>, String> {
    match serde_json::from_str::<Value>(said.trim()) {
        Ok(Value::Null) => Ok(None),
        Ok(Value::Number(number)) => Ok(number.as_f64()),
        _ => Err(format!("it printed {:?}, not one number or null", said.chars().take(80).collect::<String>())),
    }
}

fn question(answer: &Answer<'_>) -> Vec<u8> {
    let mut fields: Map<String, Value> = answer.columns.clone();
    fields.insert("prompt".to_owned(), json!(answer.prompt));
    fields.insert("completion".to_owned(), json!(answer.text));
    let mut line = Value::Object(fields).to_string().into_bytes();
    line.push(b'\n');
    line
}

impl Score for Program {
    /// An answer on which the program fails or hangs gets 0; when it fails on all, something is wrong with the program.
    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<f64>>, RewardError> {
        let found: Vec<Result<Option<f64>, String>> = in_parallel(answers, self.parallel, |answer| self.ask(&question(answer)));
        let command = || self.command.join(" ");
        if let Some(Err(detail)) = found.first().filter(|_| found.iter().all(Result::is_err)) {
            return Err(RewardError::Program { command: command(), detail: detail.clone() });
        }
        let failed = found.iter().filter(|said| said.is_err()).count();
        if let Some(Err(detail)) = found.iter().find(|said| said.is_err()) {
            tracing::warn!(command = command(), failed, of = found.len(), detail, "a reward program failed; those answers get 0");
        }
        Ok(found.into_iter().map(|said| said.unwrap_or(Some(0.0))).collect())
    }
}
