//! The process that measures an adapter: `tidemill eval`, in a folder of its cycle, as urgent as a training.
//!
//! What it found is a file in that folder, so a server that comes later finds it, or the process at work, or neither, and begins again: the
//! same command gives the same numbers.

use crate::fine_tuning::process::{LOG, Process};
use crate::flywheel::{FlywheelOptions, actor, lock};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tidemill_rlhf::evaluate::{Evaluation, GateReport};
use tidemill_rlhf::flywheel::{Cycle, Seen};
use tidemill_store::write_atomically;

/// What `tidemill eval` writes.
const FOUND: &str = "evaluation.json";
const GATES: &str = "gates.json";
/// The adapter that the folder is about: cycles are numbered from 1 again where a database was made anew beside an old data directory.
const ADAPTER: &str = "adapter.txt";
/// How long an evaluation that was told to stop may take before it is killed.
const LEAVING: Duration = Duration::from_secs(5);

/// The evaluations of this server.
pub(super) struct Evaluations {
    options: FlywheelOptions,
    /// Those that were begun here or found at work, by loop, with their cycle.
    running: Mutex<HashMap<String, (u64, Process)>>,
}

impl Evaluations {
    pub(super) fn new(options: &FlywheelOptions) -> Self {
        Self { options: options.clone(), running: Mutex::default() }
    }

    fn folder(&self, name: &str, cycle: u64) -> PathBuf {
        self.options.root.join(name).join(cycle.to_string())
    }

    /// How far the evaluation of a cycle's adapter is.
    pub(super) fn see(&self, name: &str, cycle: u64, adapter: &str) -> io::Result<Seen> {
        let folder = self.folder(name, cycle);
        let mut running = lock(&self.running);
        if running.get(name).is_none_or(|(of, _)| *of != cycle) {
            let of_this = std::fs::read_to_string(folder.join(ADAPTER)).is_ok_and(|known| known == adapter);
            // An earlier server's, if it is still at work.
            match Process::left(&folder)? {
                Some(left) if of_this => drop(running.insert(name.to_owned(), (cycle, left))),
                Some(other) => {
                    other.kill();
                    return Ok(Seen::Underway);
                }
                None => return Ok(found(&folder).filter(|_| of_this).map_or(Seen::Nothing, Seen::Gates)),
            }
        }
        let Some((_, process)) = running.get_mut(name) else { return Ok(Seen::Nothing) };
        let Some(status) = process.ended()? else { return Ok(Seen::Underway) };
        running.remove(name);
        Ok(found(&folder).map_or_else(
            || {
                let how = status.map_or_else(|| "in an unknown way".to_owned(), |status| status.to_string());
                let why = match last_line(&folder.join(LOG)) {
                    Some(line) => format!("the evaluation ended ({how}): {line}"),
                    None => format!("the evaluation ended ({how})"),
                };
                Seen::Failed { why, change: "mend what it says, and run the loop again".to_owned(), lasting: false }
            },
            Seen::Gates,
        ))
    }

    /// Begins a cycle's evaluation; what is seen at once where it cannot be.
    pub(super) fn begin(&self, name: &str, number: u64, cycle: &Cycle, dataset: &str, adapter: &str) -> io::Result<Option<Seen>> {
        let Some(base) = self.options.models.get(&cycle.policy.base) else {
            let why = format!("the model `{}` is not served here any more", cycle.policy.base);
            let change = "serve it, and run the loop again".to_owned();
            return Ok(Some(Seen::Failed { why, change, lasting: true }));
        };
        let folder = std::path::absolute(self.folder(name, number))?;
        std::fs::create_dir_all(&folder)?;
        // Half of a file, if anything.
        match std::fs::remove_file(folder.join(FOUND)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        write_atomically(&folder.join(ADAPTER), adapter.as_bytes()).map_err(io::Error::other)?;
        let gates = serde_json::to_vec_pretty(&cycle.policy.gates).map_err(io::Error::other)?;
        write_atomically(&folder.join(GATES), &gates).map_err(io::Error::other)?;
        let command = self.command(name, &folder, base, cycle, dataset, adapter)?;
        // Somebody who is at work there is found at the next look.
        if let Some(process) = Process::run(command, &folder)? {
            lock(&self.running).insert(name.to_owned(), (number, process));
        }
        Ok(None)
    }

    fn command(
        &self,
        name: &str,
        folder: &Path,
        base: &Path,
        cycle: &Cycle,
        dataset: &str,
        adapter: &str,
    ) -> io::Result<Command> {
        let (options, measuring) = (&self.options, &cycle.policy.measuring);
        let mut named = std::ffi::OsString::from(format!("{}=", cycle.policy.base));
        named.push(std::path::absolute(base)?);
        let mut command = Process::command(&options.program);
        command.args(["eval", "--adapter", adapter, "--dataset", dataset, "--base"]).arg(named);
        command.arg("--gates").arg(folder.join(GATES)).arg("--out").arg(folder).arg("--data").arg(&options.data);
        command.args(["--datasets", &options.datasets, "--by", &actor(name)]);
        // Everything is said here. A file that somebody is editing has no say in a cycle that is under way.
        command.args(["--config", "/dev/null"]);
        for (flag, value) in [
            ("--prompts", measuring.prompts.to_string()),
            ("--max-tokens", measuring.max_tokens.to_string()),
            ("--temperature", measuring.temperature.to_string()),
            ("--seed", measuring.seed.to_string()),
            ("--threads", options.threads.to_string()),
            ("--priority", options.priority.as_str().to_owned()),
        ] {
            command.args([flag, &value]);
        }
        command.args(options.device.arguments(&std::path::absolute(&options.data)?));
        if let Some(text) = &measuring.text {
            command.arg("--text").arg(std::path::absolute(text)?);
        }
        if !measuring.rules.is_empty() {
            command.args(["--reward-funcs", &serde_json::to_string(&measuring.rules).map_err(io::Error::other)?]);
        }
        if let Some(weights) = &measuring.weights {
            command.args(["--reward-weights", &serde_json::to_string(weights).map_err(io::Error::other)?]);
        }
        // An address with a password is nobody's business who lists processes.
        if let Some(url) = &options.database {
            command.env("TIDEMILL_DATABASE", url);
        }
        Ok(command)
    }

    /// Removes the folders of a loop's cycles but the last `keep` up to this one.
    pub(super) fn forget(&self, name: &str, cycle: u64, keep: u64) -> io::Result<()> {
        let entries = match std::fs::read_dir(self.options.root.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok());
            if number.is_some_and(|number| number.saturating_add(keep) <= cycle) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    /// Ends those at work: nobody would hear of them.
    pub(super) async fn end(&self) {
        let mut running: Vec<Process> = lock(&self.running).drain().map(|(_, (_, process))| process).collect();
        running.iter().for_each(Process::ask);
        let deadline = Instant::now() + LEAVING;
        while !running.is_empty() {
            if Instant::now() >= deadline {
                running.iter().for_each(Process::kill);
            }
            running.retain_mut(|process| matches!(process.ended(), Ok(None)));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What the gates said, where an evaluation came to its end.
fn found(folder: &Path) -> Option<GateReport> {
    let text = std::fs::read(folder.join(FOUND)).ok()?;
    serde_json::from_slice::<Evaluation>(&text).ok()?.gates
}

/// The last line that says something.
fn last_line(log: &Path) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(|line| line.chars().take(500).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fine_tuning::{TrainingDevice, TrainingPriority};
    use serde_json::json;
    use std::collections::BTreeMap;

    fn evaluations(root: &Path) -> Evaluations {
        Evaluations::new(&FlywheelOptions {
            policies: BTreeMap::new(),
            root: root.to_owned(),
            program: "false".into(),
            threads: 1,
            device: TrainingDevice::default(),
            priority: TrainingPriority::Low,
            models: BTreeMap::from([("smollm2".to_owned(), root.to_owned())]),
            data: root.to_owned(),
            database: None,
            datasets: String::new(),
        })
    }

    #[test]
    fn what_was_found_of_another_adapter_opens_no_gate() {
        let root = tempfile::tempdir().unwrap();
        let policy = crate::flywheel::read_policy("a", &crate::flywheel::tests::table()).unwrap();
        let cycle = Cycle { started: 1, policy, attempts: 0 };
        let open = json!({
            "base": "m", "base_digest": "d", "rows": "d@1", "sampling": {"temperature": 1.0, "max_tokens": 8, "seed": 0},
            "contenders": [], "examples": [],
            "gates": {"passed": true, "checks": [{"gate": "accuracy", "passed": true, "value": 0.9, "threshold": 0.5, "finding": "won"}]},
        });
        let place = root.path().join("a/1");
        std::fs::create_dir_all(&place).unwrap();
        let is_found = |evaluations: &Evaluations, adapter| matches!(evaluations.see("a", 1, adapter), Ok(Seen::Gates(_)));
        // Of the cycle of this number in a database that is gone.
        std::fs::write(place.join(FOUND), open.to_string()).unwrap();
        assert_eq!(evaluations(root.path()).see("a", 1, "ft-a-1@01").unwrap(), Seen::Nothing);
        assert_eq!(evaluations(root.path()).begin("a", 1, &cycle, "d@1", "ft-a-1@01").unwrap(), None);
        assert!(!place.join(FOUND).exists());
        std::fs::write(place.join(FOUND), open.to_string()).unwrap();
        let begin = Instant::now();
        while !is_found(&evaluations(root.path()), "ft-a-1@01") {
            assert!(begin.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!is_found(&evaluations(root.path()), "ft-a-2@02"));
    }

    #[test]
    fn the_last_cycles_stay_and_nothing_else_is_touched() {
        let root = tempfile::tempdir().unwrap();
        let evaluations = evaluations(root.path());
        for place in ["a/1", "a/2", "a/7", "a/8", "a/9", "a/notes", "b/1"] {
            std::fs::create_dir_all(root.path().join(place)).unwrap();
            std::fs::write(root.path().join(place).join(FOUND), "{}").unwrap();
        }
        evaluations.forget("a", 8, 2).unwrap();
        evaluations.forget("none", 8, 2).unwrap();
        let left = |name: &str| {
            let entries = std::fs::read_dir(root.path().join(name)).unwrap();
            let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!((left("a"), left("b")), (vec!["7".to_owned(), "8".into(), "9".into(), "notes".into()], vec!["1".to_owned()]));
    }
}
