//! Servers under comparison as processes: started in their own group, weighed with all their children, and gone afterwards.

use crate::plan::{Kind, PlannedServer};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// How long a server may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(15);

/// A running server. Dropping it kills its process group; [`ServerProcess::stop`] ends it in order.
pub struct ServerProcess {
    child: Child,
    group: Option<Pid>,
    log: PathBuf,
}

impl ServerProcess {
    /// Starts `server`; its output goes to a log in `logs`, except the standard output of one that speaks lines.
    pub fn start(server: &PlannedServer, logs: &Path) -> Result<Self, String> {
        let log = logs.join(file_name(&server.name));
        let file = std::fs::File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        let copy = file.try_clone().map_err(|error| format!("{}: {error}", log.display()))?;
        let (program, arguments) = server.command.split_first().ok_or("has no command")?;
        let mut command = Command::new(program);
        command.args(arguments).envs(&server.env).stderr(copy).process_group(0).kill_on_drop(true);
        match server.kind {
            Kind::Http => command.stdin(Stdio::null()).stdout(file),
            Kind::Lines => command.stdin(Stdio::piped()).stdout(Stdio::piped()),
        };
        let child = command.spawn().map_err(|error| format!("did not start: {program}: {error}"))?;
        let group = child.id().and_then(|id| Pid::from_raw(id as i32));
        Ok(Self { child, group, log })
    }

    /// Standard input and output of a server that speaks lines.
    pub fn pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        Some((self.child.stdin.take()?, self.child.stdout.take()?))
    }

    /// How the process has ended, if it has.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        Some(self.with_log(&format!("ended early ({status})")))
    }

    /// What happened to this server, with the end of its log.
    pub fn with_log(&self, why: &str) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        let end = lines[lines.len().saturating_sub(6)..].join("\n");
        format!("{why}; {}:\n{end}", self.log.display())
    }

    /// Largest resident memory so far in bytes, summed over the process and its descendants that live.
    ///
    /// Pages that several processes share count once for each.
    pub fn peak_memory(&self) -> u64 {
        self.tree().into_iter().filter_map(high_water_mark).sum()
    }

    /// CPU time so far in seconds, over the process and its descendants that live.
    pub fn cpu_seconds(&self) -> f64 {
        // USER_HZ is 100 on every Linux port in use; it is part of the ABI of /proc.
        self.tree().into_iter().filter_map(|pid| Some(Stat::of(pid)?.ticks)).sum::<u64>() as f64 / 100.0
    }

    fn tree(&self) -> Vec<i32> {
        let Some(root) = self.group else { return Vec::new() };
        let all: Vec<Stat> = std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok().and_then(Stat::of))
            .collect();
        let mut tree = vec![root.as_raw_nonzero().get()];
        let mut at = 0;
        while let Some(&parent) = tree.get(at) {
            tree.extend(all.iter().filter(|stat| stat.parent == parent).map(|stat| stat.pid));
            at += 1;
        }
        tree
    }

    /// SIGTERM, then after a grace SIGKILL, for the process and everything that descends from it.
    pub async fn stop(mut self) {
        let tree: Vec<Pid> = self.tree().into_iter().filter_map(Pid::from_raw).collect();
        if let Some(leader) = self.group {
            kill_process(leader, Signal::TERM).ok();
        }
        let gone = async {
            self.child.wait().await.ok();
            while tree.iter().any(|pid| Stat::of(pid.as_raw_nonzero().get()).is_some()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(GRACE, gone).await.is_err() {
            for &pid in &tree {
                kill_process(pid, Signal::KILL).ok();
            }
        }
        // The drop ends what has joined the group since.
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        if let Some(group) = self.group.take() {
            kill_process_group(group, Signal::KILL).ok();
        }
    }
}

struct Stat {
    pid: i32,
    parent: i32,
    ticks: u64,
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; what follows it is fixed (proc_pid_stat(5)).
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        // A zombie holds nothing any more; it waits for its parent only.
        if fields.first() == Some(&"Z") {
            return None;
        }
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self { pid, parent: number(1)? as i32, ticks: number(11)? + number(12)? })
    }
}

fn high_water_mark(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

fn file_name(name: &str) -> String {
    let plain: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    format!("{plain}.log")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> PlannedServer {
        let command = ["sh", "-c", script].map(String::from).to_vec();
        PlannedServer {
            name: "A b".into(),
            ours: false,
            kind: Kind::Http,
            command,
            env: [("GREETING".to_owned(), "hello".to_owned())].into(),
            requires: Vec::new(),
            install_error: None,
            ready_url: String::new(),
            base_url: String::new(),
            model: String::new(),
            endpoint: Default::default(),
            body: Default::default(),
            note: String::new(),
            version_command: Vec::new(),
        }
    }

    async fn until(mut condition: impl FnMut() -> bool) {
        for _ in 0..6000 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come to pass within a minute");
    }

    #[tokio::test]
    async fn stopping_ends_children_that_ignore_the_signal_of_their_parent() {
        let logs = tempfile::tempdir().unwrap();
        let server = ServerProcess::start(&shell("sleep 300 & wait"), logs.path()).unwrap();
        until(|| server.tree().len() == 2).await;
        assert!(server.peak_memory() > 100_000);
        let tree = server.tree();
        let stop = tokio::time::timeout(GRACE + Duration::from_secs(5), server.stop());
        // The sleep lives on after its shell until the grace is over: end it as a server would end its workers.
        let child = Pid::from_raw(tree[1]).unwrap();
        let helper = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            kill_process(child, Signal::TERM).ok();
        };
        let (stopped, ()) = tokio::join!(stop, helper);
        stopped.unwrap();
        assert!(tree.iter().all(|&pid| Stat::of(pid).is_none()), "{tree:?}");
    }

    #[tokio::test]
    async fn dropping_kills_the_whole_group() {
        let logs = tempfile::tempdir().unwrap();
        let server = ServerProcess::start(&shell("sleep 300 & wait"), logs.path()).unwrap();
        until(|| server.tree().len() == 2).await;
        let tree = server.tree();
        drop(server);
        until(|| Stat::of(tree[1]).is_none()).await;
    }

    #[tokio::test]
    async fn an_early_end_is_an_error_with_the_end_of_the_log() {
        let logs = tempfile::tempdir().unwrap();
        let mut server = ServerProcess::start(&shell("echo $GREETING; echo no model >&2; exit 3"), logs.path()).unwrap();
        until(|| server.ended().is_some()).await;
        let text = server.ended().unwrap();
        assert!(text.contains("ended early (exit status: 3)") && text.contains("hello\nno model"), "{text}");
        assert!(ServerProcess::start(&PlannedServer { command: vec!["/no/such".into()], ..shell("") }, logs.path()).is_err());
    }
}
