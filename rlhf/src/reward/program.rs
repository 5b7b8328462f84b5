//! Rewards from a program: one process per answer, which reads it on its standard input and prints a number.
//!
//! A process for each, so that one answer that hangs the program or breaks it costs itself and no other. The program gets `PATH`, `HOME`,
//! `LANG` and nothing else of the environment; what it starts is ended with it.

use std::{
    io::{Read, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Map, Value, json};

use super::{Answer, RewardError, Score, in_parallel};

/// Most bytes that are read of what a program prints.
const MAX_OUTPUT: u64 = 64 << 10;
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
        let mut child = self.start().map_err(|error| format!("it could not be started: {error}"))?;
        let began = Instant::now();
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        // All three at once: a pipe that nobody empties stops who fills it.
        std::thread::scope(|scope| {
            let said = scope.spawn(move || text(stdout));
            let complained = scope.spawn(move || text(stderr));
            scope.spawn(move || {
                // A program that does not read to the end has its reasons.
                stdin.map(|mut stdin| stdin.write_all(question).ok())
            });
            let status = loop {
                match child.try_wait() {
                    Ok(Some(status)) => break Some(status),
                    Ok(None) if began.elapsed() < self.limit => std::thread::sleep(POLL),
                    Ok(None) | Err(_) => break None,
                }
            };
            // What it started may still hold the pipes.
            end(&mut child);
            let (said, complained) = (said.join().unwrap_or_default(), complained.join().unwrap_or_default());
            match status {
                None => Err(format!("it took longer than {} s", self.limit.as_secs_f64())),
                Some(status) if !status.success() => Err(format!("{status}: {}", last_line(&complained))),
                Some(_) => number(&said),
            }
        })
    }
}

/// Ends the program's whole group and waits for the program.
fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        kill_process_group(group, Signal::KILL).ok();
    }
    child.wait().ok();
}

fn text(from: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut from) = from {
        from.by_ref().take(MAX_OUTPUT).read_to_end(&mut bytes).ok();
        // What is beyond is thrown away, so that the program does not wait for a reader.
        std::io::copy(&mut from, &mut std::io::sink()).ok();
    }
    String::from_utf8_lossy(&bytes).into_owned()
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
