//! Runs a test's body on SQLite and on Postgres.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

pub mod proxy;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Map, json};
use sqlx::any::AnyPoolOptions;
use sqlx::{AnyPool, AssertSqlSafe};
use tempfile::TempDir;
use tidemill_store::records::{Choice, Exposure, Feedback, Inference, Kind, Status, TargetKind};
use tidemill_store::{DataDir, Dialect, RegisteredAdapter, Snapshot, Store, StoreOptions};
use uuid::Uuid;

/// A database of one's own and a data directory.
pub struct Place {
    pub dialect: Dialect,
    pub url: Option<String>,
    pub folder: TempDir,
}

impl Place {
    pub fn data(&self) -> DataDir {
        DataDir::new(self.folder.path())
    }

    pub fn options(&self) -> StoreOptions {
        StoreOptions { url: self.url.clone(), ..StoreOptions::new(self.data()) }
    }

    pub async fn open(&self) -> Store {
        Store::open(self.options()).await.unwrap()
    }
}

/// The address of a Postgres where databases may be made; `None` when the half of the tests that needs it is skipped on purpose.
pub fn postgres() -> Option<String> {
    match std::env::var("TIDEMILL_TEST_POSTGRES") {
        Ok(url) if url == "skip" => None,
        Ok(url) => Some(url),
        Err(_) => panic!(
            "set TIDEMILL_TEST_POSTGRES to the URL of a Postgres where databases may be made (`tests/postgres.sh cargo test -p tidemill-store` \
             starts one), or to `skip` to test SQLite alone"
        ),
    }
}

/// Runs `body` on each database and removes what it made.
pub fn each(body: impl AsyncFn(&Place)) {
    on_sqlite(&body);
    if let Some(server) = postgres() {
        on_postgres(&server, &body);
    }
}

pub fn on_sqlite(body: &impl AsyncFn(&Place)) {
    let place = Place { dialect: Dialect::Sqlite, url: None, folder: tempfile::tempdir().unwrap() };
    runtime().block_on(body(&place));
}

pub fn on_postgres(server: &str, body: &impl AsyncFn(&Place)) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("tidemill_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    runtime().block_on(async {
        let admin = administrator(server).await;
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&admin).await.unwrap();
        let place =
            Place { dialect: Dialect::Postgres, url: Some(in_database(server, &name)), folder: tempfile::tempdir().unwrap() };
        body(&place).await;
        sqlx::query(AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"))).execute(&admin).await.unwrap();
    });
}

pub async fn administrator(server: &str) -> AnyPool {
    sqlx::any::install_default_drivers();
    AnyPoolOptions::new().max_connections(1).acquire_timeout(Duration::from_secs(10)).connect(server).await.unwrap()
}

/// The server's address with another database.
fn in_database(server: &str, name: &str) -> String {
    let (before, query) = server.split_once('?').map_or((server, String::new()), |(before, query)| (before, format!("?{query}")));
    let (base, _) = before.rsplit_once('/').unwrap();
    format!("{base}/{name}{query}")
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// An answer with everything in it, also what databases trip over.
pub fn answer(store: &Store, user: &str) -> Inference {
    let id = store.issue_id();
    let choice = |id, text: &str| Choice {
        id,
        finish_reason: Some("stop".into()),
        output_text: Some(text.into()),
        message: None,
        output_ids: vec![1, 2, u32::MAX],
        logprobs: vec![-0.5, -1e-30, f32::NEG_INFINITY],
        raw_logprobs: vec![-0.25, -2.0, -3.5],
        mean_logprob: Some(-1.916_666_666_666_666_7),
        tokens: 3,
    };
    Inference {
        id,
        created: 1_700_000_000_000_000,
        endpoint: "chat".into(),
        model: "m".into(),
        adapter: 3,
        variant: Some("b".into()),
        conversation: Some(format!("talk-{user}")),
        key_id: None,
        user_key: Some(user.into()),
        status: Status::Ok,
        compare: true,
        prompt_tokens: 2,
        cached_tokens: 1,
        output_tokens: 6,
        first_token_us: Some(1200),
        duration_us: 5000,
        config_hash: "c0ffee".into(),
        metadata: Map::from_iter([("a".to_owned(), json!("'; DROP TABLE feedback; --"))]),
        params: Some(json!({"temperature": 0.1})),
        messages: Some(json!([{"role": "user", "content": "nul: \u{0}, naïve 🦀"}])),
        prompt_text: Some("<|user|> 🦀".into()),
        prompt_ids: vec![7, 8],
        exposure: Some(Exposure { rollout: Uuid::from_u128(5), arm: 1, unit: i64::MIN, refused: None, place: Some(1) }),
        choices: vec![
            choice(id, "first"),
            Choice { mean_logprob: None, finish_reason: None, ..choice(store.issue_id(), "second") },
        ],
    }
}

/// A thumb up.
pub fn thumb(store: &Store, target: Uuid, author: &str) -> Feedback {
    let now = 1_700_000_000_000_000;
    Feedback {
        id: store.issue_id(),
        created: now,
        updated: now,
        revision: 1,
        withdrawn: false,
        target: target.to_string(),
        targets: vec![target.to_string()],
        target_kind: TargetKind::Completion,
        kind: Kind::Thumb,
        metric: None,
        value: json!(true),
        number: Some(1.0),
        author: Some(author.into()),
        source: Some("api".into()),
        latency_ms: Some(900),
        tags: vec!["a \"b\"".into(), "c".into()],
        key_id: None,
        idempotency_key: None,
        task_id: None,
    }
}

/// A snapshot of two rows.
pub fn snapshot(store: &Store, name: &str) -> Snapshot {
    Snapshot {
        id: store.issue_id(),
        name: name.into(),
        version: 1,
        created: 5,
        query: json!({}),
        content_hash: "abc".into(),
        location: "/data/x".into(),
        table_version: 1,
        row_counts: json!({"rows": 2}),
        verdict: "pass".into(),
        report: json!({}),
        tainted: None,
    }
}

/// A candidate of the base model `base`.
pub fn adapter(store: &Store, name: &str, generation: u64) -> RegisteredAdapter {
    RegisteredAdapter {
        id: store.issue_id(),
        created: 5,
        updated: 5,
        name: name.into(),
        generation,
        base: "base".into(),
        content_hash: format!("{generation:016x}"),
        location: format!("adapters/{generation:016x}"),
        ..RegisteredAdapter::default()
    }
}
