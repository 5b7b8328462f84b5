//! The `compare` command: rounds over all servers, so that a drift of the machine meets them all alike.

use crate::cli::CompareArgs;
use crate::client::Client;
use crate::document;
use crate::error::LoadtestError;
use crate::harness::Harness;
use crate::interrupt::Interrupt;
use crate::load::Load;
use crate::markdown::Report;
use crate::measurement::Measurement;
use crate::plan::{Kind, Plan, PlannedLoad, PlannedServer};
use crate::process::ServerProcess;
use crate::prompts::Prompts;
use crate::results::{LoadResult, Round, ServerResult};
use crate::run::{count, progress_bar};
use crate::target::Target;
use hyper::Uri;
use indicatif::ProgressBar;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Longest time for one request of a comparison.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs the plan and writes what was asked for; fails where our own server gave no numbers.
pub async fn compare(args: &CompareArgs) -> Result<ExitCode, LoadtestError> {
    let mut plan = Plan::read(&args.plan)?;
    plan.rounds = args.rounds.unwrap_or(plan.rounds);
    if !args.only.is_empty() {
        let wanted = |name: &str| args.only.iter().any(|text| name.to_lowercase().contains(&text.to_lowercase()));
        plan.servers.retain(|server| wanted(&server.name));
    }
    for load in &mut plan.loads {
        load.requests = (load.requests / args.divide_requests.max(1)).max(load.streams as u64);
    }
    if let Some(document) = &args.document {
        document::check(document)?;
    }
    if let (Some(saved), Some(document)) = (&args.from, &args.document) {
        let text = std::fs::read_to_string(saved).map_err(LoadtestError::file(saved))?;
        let results: Vec<ServerResult> = serde_json::from_str(&text)?;
        document::write(document, &Report { plan: &plan, results: &results, interrupted: false })?;
        return Ok(ExitCode::SUCCESS);
    }
    let logs = std::env::temp_dir().join(format!("tidemill-loadtest-{}", std::process::id()));
    std::fs::create_dir_all(&logs).map_err(LoadtestError::file(&logs))?;

    let mut comparison = Comparison { plan: &plan, args, logs: &logs, interrupt: Interrupt::listen()? };
    let results = comparison.run().await;
    let report = Report { plan: &plan, results: &results, interrupted: comparison.interrupt.requested() };
    writeln!(std::io::stdout(), "{}", report.markdown(None))?;
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&results)?).map_err(LoadtestError::file(path))?;
    }
    if comparison.interrupt.requested() {
        return Ok(ExitCode::FAILURE);
    }
    if let Some(path) = &args.document {
        document::write(path, &report)?;
    }
    let complete = |server: &ServerResult| server.failures.is_empty() && server.warnings().is_empty();
    Ok(if results.iter().filter(|server| server.ours).all(complete) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Comparison<'a> {
    plan: &'a Plan,
    args: &'a CompareArgs,
    logs: &'a Path,
    interrupt: Interrupt,
}

impl Comparison<'_> {
    async fn run(&mut self) -> Vec<ServerResult> {
        let mut results = Vec::new();
        for server in &self.plan.servers {
            results.push(ServerResult {
                name: server.name.clone(),
                ours: server.ours,
                note: describe(server).await,
                failures: missing(server).into_iter().collect(),
                rounds: Vec::new(),
            });
        }
        for round in 0..self.plan.rounds {
            // Each round begins with another server, so that no one always runs on the coolest machine.
            for turn in 0..self.plan.servers.len() {
                let at = (turn + round) % self.plan.servers.len();
                // One that failed once is not tried again: its failure is the result.
                if results[at].failures.is_empty() && !self.interrupt.requested() {
                    let (measured, failure) = self.round(&self.plan.servers[at], round).await;
                    results[at].rounds.push(measured);
                    results[at].failures.extend(failure);
                }
            }
        }
        results
    }

    async fn round(&mut self, server: &PlannedServer, round: usize) -> (Round, Option<String>) {
        let mut measured = Round::default();
        let mut interrupt = self.interrupt.clone();
        let started = Instant::now();
        let mut process = match ServerProcess::start(server, self.logs) {
            Ok(process) => process,
            Err(why) => return (measured, Some(why)),
        };
        let failure = tokio::select! {
            result = self.measure(server, round, started, &mut process, &mut measured) => result.err(),
            () = interrupt.wait() => None,
        };
        // A process that has ended tells more than a connection that was refused.
        let failure = failure.map(|why| match process.ended() {
            Some(end) => format!("{why}: {end}"),
            None => process.with_log(&why),
        });
        process.stop().await;
        (measured, failure)
    }

    async fn measure(
        &self,
        server: &PlannedServer,
        round: usize,
        started: Instant,
        process: &mut ServerProcess,
        measured: &mut Round,
    ) -> Result<(), String> {
        let mut engine = self.connect(server, process).await?;
        measured.ready_s = Some(started.elapsed().as_secs_f64());
        let first = PlannedLoad { prefix: crate::prompts::Prefix::Cold, streams: 1, requests: 1, warmup: 0 };
        let hello = Prompts::new(0, first.prefix, 4, 0);
        let answer = self.load(&mut engine, server, &first, hello, 1, &ProgressBar::hidden()).await?;
        if answer.completed == 0 {
            return Err(format!("answers nothing ({})", answer.warnings().join("; ")));
        }
        measured.first_answer_s = Some(started.elapsed().as_secs_f64());
        for (at, load) in self.plan.loads.iter().enumerate() {
            if self.interrupt.requested() {
                return Ok(());
            }
            let seed = self.plan.seed + (round * self.plan.loads.len() + at) as u64 + 1;
            let prompts = Prompts::new(seed, load.prefix, self.plan.prompt_tokens, self.plan.shared_tokens);
            let bar = progress_bar(load.requests);
            let label = format!("round {} · {} · {} · {} streams ", round + 1, server.name, load.prefix.name(), load.streams);
            bar.set_prefix(label.clone());
            let (cpu, began) = (process.cpu_seconds(), Instant::now());
            let sum = self.load(&mut engine, server, load, prompts, self.plan.max_tokens, &bar).await?;
            // Now, not at the end: a harness ends as soon as nobody holds its input.
            measured.peak_memory = measured.peak_memory.max(process.peak_memory());
            let cpu_per_s = (process.cpu_seconds() - cpu) / began.elapsed().as_secs_f64().max(1e-6);
            bar.finish_and_clear();
            let warnings = sum.warnings().iter().map(|warning| format!(" ! {warning}")).collect::<String>();
            // Progress is a courtesy: a closed standard error must not end the comparison.
            writeln!(std::io::stderr(), "{label}· {:.0} tok/s{warnings}", sum.output_tok_s).ok();
            let failed = sum.completed == 0;
            let why = sum.warnings().join("; ");
            measured.loads.push(LoadResult { prefix: load.prefix, cpu_per_s, measurement: sum });
            if failed {
                return Err(format!("completed nothing at {} streams ({why})", load.streams));
            }
        }
        Ok(())
    }

    async fn connect(&self, server: &PlannedServer, process: &mut ServerProcess) -> Result<Engine, String> {
        let limit = Duration::from_secs(self.plan.ready_timeout_s);
        let late = format!("was not ready after {} s", limit.as_secs());
        match server.kind {
            Kind::Lines => {
                let mut harness = Harness::new(process.pipes().ok_or("has no pipes")?);
                tokio::time::timeout(limit, harness.ready()).await.map_err(|_| late)??;
                Ok(Engine::Lines(harness))
            }
            Kind::Http => {
                let resolve =
                    async |url: &str| Target::resolve(url, self.args.allow_remote).await.map_err(|error| error.to_string());
                let base = resolve(&server.base_url).await?;
                let path = server.ready_url.parse::<Uri>().map_err(|error| error.to_string())?;
                let ready = Target { path: String::new(), ..resolve(&server.ready_url).await? };
                let mut client = Client::new(ready, path.path());
                let started = Instant::now();
                while !client.is_ready(Duration::from_secs(2)).await {
                    if process.ended().is_some() {
                        return Err("did not become ready".into());
                    }
                    if started.elapsed() > limit {
                        return Err(late);
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Ok(Engine::Http(base))
            }
        }
    }

    async fn load(
        &self,
        engine: &mut Engine,
        server: &PlannedServer,
        load: &PlannedLoad,
        prompts: Prompts,
        max_tokens: u64,
        bar: &ProgressBar,
    ) -> Result<Measurement, String> {
        match engine {
            Engine::Http(target) => {
                let load = Load {
                    target: target.clone(),
                    endpoint: server.endpoint,
                    model: server.model.clone(),
                    body: server.body.clone(),
                    prompts,
                    streams: load.streams,
                    requests: load.requests,
                    warmup: load.warmup,
                    max_tokens,
                    duration: Some(Duration::from_secs(self.plan.load_timeout_s)),
                    request_timeout: REQUEST_TIMEOUT,
                };
                Ok(load.run(&self.interrupt, |exchange| count(bar, exchange)).await)
            }
            Engine::Lines(harness) => {
                let limit = Duration::from_secs(self.plan.load_timeout_s) + REQUEST_TIMEOUT;
                let answer = harness.load(&prompts, load.streams, load.requests, load.warmup, max_tokens);
                tokio::time::timeout(limit, answer).await.map_err(|_| format!("took longer than {} s", limit.as_secs()))?
            }
        }
    }
}

/// What is ready to take loads.
enum Engine {
    Http(Target),
    Lines(Harness),
}

/// Why a server cannot even be tried.
fn missing(server: &PlannedServer) -> Option<String> {
    let path = server.requires.iter().find(|path| !path.exists())?;
    let why = server.install_error.as_ref().and_then(|path| std::fs::read_to_string(path).ok());
    Some(match why {
        Some(why) => format!("not installed: {}", why.trim()),
        None => format!("not installed: {} is missing", path.display()),
    })
}

/// The plan's note, and the version that the server tells of itself.
async fn describe(server: &PlannedServer) -> String {
    let Some((program, arguments)) = server.version_command.split_first() else { return server.note.clone() };
    let output = tokio::process::Command::new(program)
        .args(arguments)
        .envs(&server.env)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let Ok(Ok(output)) = tokio::time::timeout(Duration::from_secs(60), output).await else { return server.note.clone() };
    // llama-server writes its version to standard error.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let version = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("").trim();
    [version, server.note.as_str()].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    /// Answers every task with one request of three tokens in half a second.
    const HARNESS: &str = r#"echo '{"ready": true}'; while read task; do
        echo '{"wall_s": 0.5, "requests": [{"prompt_tokens": 9, "completion_tokens": 3, "ttft_ms": 5, "gaps_ms": [1, 2]}]}'; done"#;

    fn plan() -> Plan {
        toml::from_str(&format!(
            r#"
            rounds = 2
            max_tokens = 3
            [[load]]
            prefix = "cold"
            streams = 1
            requests = 1
            [[server]]
            name = "works"
            ours = true
            kind = "lines"
            command = ["sh", "-c", {HARNESS:?}]
            version_command = ["sh", "-c", "echo >&2; echo 1.2 >&2"]
            note = "a note"
            [[server]]
            name = "absent"
            command = ["/no/such"]
            requires = ["/no/such"]
            [[server]]
            name = "breaks"
            command = ["sh", "-c", "echo bad model >&2; exit 7"]
            ready_url = "http://127.0.0.1:1/health"
            base_url = "http://127.0.0.1:1/v1"
            [[server]]
            name = "elsewhere"
            command = ["sleep", "300"]
            ready_url = "http://192.0.2.1/health"
            base_url = "http://192.0.2.1/v1"
            "#
        ))
        .unwrap()
    }

    async fn run(interrupt: Interrupt) -> Vec<ServerResult> {
        let Command::Compare(args) = Cli::parse_from(["tidemill-loadtest", "compare", "plan.toml"]).command else { panic!() };
        let logs = tempfile::tempdir().unwrap();
        Comparison { plan: &plan(), args: &args, logs: logs.path(), interrupt }.run().await
    }

    #[tokio::test]
    async fn each_server_is_measured_every_round_or_says_why_not() {
        let (_keep, interrupt) = Interrupt::manual();
        let results = run(interrupt).await;
        let works = &results[0];
        assert_eq!((works.note.as_str(), works.failures.len(), works.rounds.len()), ("1.2; a note", 0, 2));
        for round in &works.rounds {
            assert_eq!(round.loads[0].measurement.output_tok_s, 6.0);
            assert!(round.ready_s <= round.first_answer_s && round.peak_memory > 0);
        }
        let failures: Vec<String> = results[1..].iter().map(|server| server.failures.join(" ")).collect();
        assert_eq!(failures[0], "not installed: /no/such is missing");
        assert!(failures[1].contains("exit status: 7") && failures[1].contains("bad model"), "{}", failures[1]);
        assert!(failures[2].contains("--allow-remote"), "{}", failures[2]);
    }

    #[tokio::test]
    async fn an_interrupt_ends_the_rounds_and_keeps_what_there_is() {
        let (sender, interrupt) = Interrupt::manual();
        sender.send(true).unwrap();
        let results = run(interrupt).await;
        assert!(results.iter().all(|server| server.rounds.is_empty()));
        assert_eq!(results[1].failures.len(), 1);
    }
}
