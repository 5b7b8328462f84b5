//! A process is killed while it writes.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::support::proxy::{Proxy, Wire, eventually};
use crate::support::{Place, answer, each, on_postgres, postgres, runtime, thumb};
use tidemill_store::{DataDir, Store, StoreOptions};
use uuid::Uuid;

/// Not a test by itself: what the killed process runs. Prints the id of each feedback after it was acknowledged.
#[test]
#[ignore = "run by the other tests of this file, as a process of its own"]
fn writer() {
    let folder = std::env::var("TIDEMILL_TEST_FOLDER").unwrap();
    let url = std::env::var("TIDEMILL_TEST_URL").ok();
    runtime().block_on(async {
        let store = Store::open(StoreOptions { url, ..StoreOptions::new(DataDir::new(folder)) }).await.unwrap();
        for _ in 0..16 {
            let store = store.clone();
            tokio::spawn(async move {
                loop {
                    let one = thumb(&store, store.issue_id(), "rater");
                    let line = format!("\nacknowledged {}\n", one.id);
                    store.add_feedback(vec![one]).await.unwrap();
                    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                    store.record(answer(&store, "ann")).unwrap();
                }
            });
        }
        std::future::pending::<()>().await;
    });
}

/// The writer as a process, and what it has acknowledged.
struct Writer {
    process: Child,
    output: Lines<BufReader<ChildStdout>>,
    acknowledged: HashSet<Uuid>,
}

impl Writer {
    fn start(place: &Place, url: Option<&str>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "kill::writer", "--ignored", "--nocapture"]).env("TIDEMILL_TEST_FOLDER", place.folder.path());
        if let Some(url) = url {
            command.env("TIDEMILL_TEST_URL", url);
        }
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, output, acknowledged: HashSet::new() }
    }

    /// Waits until so many more are acknowledged; fewer only when the process ends.
    fn acknowledges(&mut self, more: usize) {
        let enough = self.acknowledged.len().saturating_add(more);
        while self.acknowledged.len() < enough
            && let Some(line) = self.output.next()
        {
            self.acknowledged.extend(line.unwrap().strip_prefix("acknowledged ").and_then(|id| id.parse::<Uuid>().ok()));
        }
    }

    /// Kills it at a random moment within the next few transactions and returns all that it had acknowledged.
    fn kill(mut self) -> HashSet<Uuid> {
        let random = (Uuid::now_v7().as_u128() % 10_000) as u64;
        std::thread::sleep(Duration::from_micros(random));
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.acknowledges(usize::MAX);
        self.acknowledged
    }
}

async fn rows(store: &Store) -> Vec<Uuid> {
    let rows: Vec<(String,)> = sqlx::query_as("SELECT id FROM feedback").fetch_all(store.database().read()).await.unwrap();
    rows.iter().map(|(id,)| id.parse().unwrap()).collect()
}

async fn all_are_there_once(place: &Place, acknowledged: &HashSet<Uuid>) {
    let store = place.open().await;
    let spill = place.folder.path().join("spill");
    eventually("the spill log is empty", async || std::fs::read_dir(&spill).unwrap().count() == 0).await;
    let rows = rows(&store).await;
    let found: HashSet<Uuid> = rows.iter().copied().collect();
    assert_eq!(rows.len(), found.len());
    let missing: Vec<_> = acknowledged.difference(&found).collect();
    assert!(missing.is_empty(), "{} of {} acknowledged are missing", missing.len(), acknowledged.len());
    store.close().await;
}

#[test]
fn a_killed_process_loses_no_acknowledged_feedback() {
    each(async |place| {
        let mut acknowledged = HashSet::new();
        for round in 0..8 {
            let mut writer = Writer::start(place, place.url.as_deref());
            writer.acknowledges(1 + 40 * round);
            acknowledged.extend(writer.kill());
            all_are_there_once(place, &acknowledged).await;
        }
        assert!(acknowledged.len() > 1000, "{}", acknowledged.len());
    });
}

#[test]
fn a_process_killed_while_its_database_is_away_loses_none_either() {
    let Some(server) = postgres() else { return };
    on_postgres(&server, &async |place: &Place| {
        let mut acknowledged = HashSet::new();
        for round in 0..4 {
            let proxy = Proxy::to(place.url.as_deref().unwrap()).await;
            // Up, away, back: killed somewhere in the replay.
            let killed = tokio::task::block_in_place(|| {
                let mut writer = Writer::start(place, Some(&proxy.address));
                writer.acknowledges(100);
                proxy.set(Wire::Cut);
                writer.acknowledges(500);
                proxy.set(Wire::Up);
                writer.acknowledges(100 * round);
                writer.kill()
            });
            acknowledged.extend(killed);
            all_are_there_once(place, &acknowledged).await;
        }
        assert!(acknowledged.len() > 2400, "{}", acknowledged.len());
    });
}
