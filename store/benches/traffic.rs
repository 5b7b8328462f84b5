//! What the console's overview asks of a full database: `cargo bench -p tidemill-store --bench traffic [-- ANSWERS]`.
//!
//! A million answers of six variants over 30 days, on SQLite in a temporary folder, and on Postgres when `TIDEMILL_TEST_POSTGRES` says
//! where (`tests/postgres.sh cargo bench …`). Per window: the sums from the answers themselves and from the sums that are kept beside them,
//! and how long the newest 1,000 answers of each variant took, without and with the index for it. Medians in milliseconds.

#![allow(clippy::print_stdout, reason = "a benchmark prints its numbers")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark stops at the first surprise")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Instant;

use sqlx::AssertSqlSafe;
use support::{Place, on_postgres, on_sqlite};
use tidemill_store::{Dialect, Store, Traffic};

const HOUR: i64 = 3_600_000_000;
const MINUTE: i64 = HOUR / 60;
const END: i64 = 1_700_000_000_000_000 / (12 * HOUR) * (12 * HOUR);
/// Hours back, and the length of a stretch.
const WINDOWS: [(i64, i64); 4] = [(1, 5 * MINUTE), (24, 30 * MINUTE), (168, 3 * HOUR), (720, 12 * HOUR)];
const MIGRATION: &str = include_str!("../migrations/0015_traffic.sql");

fn main() {
    let answers = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    let all = async |place: &Place| {
        let store = place.open().await;
        println!("{:?}, {answers} answers", place.dialect);
        fill(&store, answers).await;
        measure(&store).await;
        store.close().await;
    };
    on_sqlite(&all);
    match std::env::var("TIDEMILL_TEST_POSTGRES") {
        Ok(server) if server != "skip" => on_postgres(&server, &all),
        _ => println!("Postgres: set TIDEMILL_TEST_POSTGRES"),
    }
}

async fn run(store: &Store, text: String) {
    sqlx::query(AssertSqlSafe(text)).execute(store.database().write()).await.unwrap();
}

fn statement(begin: &str) -> String {
    let found = MIGRATION.split(';').find_map(|part| part.find(begin).map(|at| part[at..].to_owned()));
    found.unwrap_or_else(|| panic!("the migration has no {begin}"))
}

/// Answers evenly over 30 days, with 1,200 bytes of text each, and then what the migration makes of them.
async fn fill(store: &Store, answers: i64) {
    let text = "INSERT INTO inferences (id, created, endpoint, model, adapter, variant, status, compare, prompt_tokens, cached_tokens, \
                output_tokens, first_token_us, duration_us, config_hash, metadata, prompt_text, bytes) \
                WITH RECURSIVE numbers(n) AS (SELECT CAST(0 AS BIGINT) UNION ALL SELECT n + 1 FROM numbers WHERE n < $1 - 1) \
                SELECT '00000000-0000-7000-8000-00' || CAST(1000000000 + n AS TEXT), $2 + n * $3, 'chat', \
                'model-' || CAST(n % 2 AS TEXT), 0, CASE WHEN n % 3 = 0 THEN NULL ELSE 'variant-' || CAST(n % 3 AS TEXT) END, \
                CASE WHEN n % 97 = 0 THEN 'failed' ELSE 'ok' END, 0, 500 + n % 100, n % 50, 200 + n % 30, \
                30000 + n * 7919 % 400000, 900000 + n * 104729 % 4000000, 'c0ffee', '{}', $4, 1700 FROM numbers";
    let start = Instant::now();
    let (begin, step) = (END - 720 * HOUR, 720 * HOUR / answers);
    let query = sqlx::query(text).bind(answers).bind(begin).bind(step).bind("word ".repeat(240));
    query.execute(store.database().write()).await.unwrap();
    println!("filled in {:.0} s", start.elapsed().as_secs_f64());
    let start = Instant::now();
    run(store, statement("INSERT INTO traffic")).await;
    println!("summed up, once, in {:.1} s", start.elapsed().as_secs_f64());
    if store.database().dialect() == Dialect::Postgres {
        // As its own autovacuum would have done meanwhile.
        run(store, "VACUUM ANALYZE inferences".to_owned()).await;
    }
}

async fn measure(store: &Store) {
    let traffic = Traffic::new(store.database());
    let index = statement("CREATE INDEX inferences_latency");
    println!(
        "{:>6} {:>14} {:>10} {:>18} {:>15} {:>8}",
        "hours", "from answers", "from sums", "times, no index", "times, indexed", "page"
    );
    run(store, "DROP INDEX inferences_latency".to_owned()).await;
    let mut before = Vec::new();
    for (hours, width) in WINDOWS {
        let scanned = median(3, async || scan(store, END - hours * HOUR, width).await).await;
        before.push((scanned, median(3, async || times(&traffic, END - hours * HOUR).await).await));
    }
    run(store, index).await;
    for ((hours, width), (scanned, unindexed)) in WINDOWS.into_iter().zip(before) {
        let since = END - hours * HOUR;
        let summed = median(9, async || traffic.sums(since, END, width).await.unwrap().len()).await;
        let indexed = median(9, async || times(&traffic, since).await).await;
        println!("{hours:>6} {scanned:>14.1} {summed:>10.1} {unindexed:>18.1} {indexed:>15.1} {:>8.1}", summed + indexed);
    }
}

/// The sums, from the answers.
async fn scan(store: &Store, since: i64, width: i64) -> usize {
    let text = format!(
        "SELECT model, COALESCE(variant, ''), created / {width} * {width}, COUNT(*), \
         CAST(SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS BIGINT), \
         CAST(SUM(CASE WHEN status = 'cancelled' THEN 1 ELSE 0 END) AS BIGINT), CAST(SUM(prompt_tokens) AS BIGINT), \
         CAST(SUM(cached_tokens) AS BIGINT), CAST(SUM(output_tokens) AS BIGINT), COUNT(first_token_us), \
         CAST(SUM(first_token_us) AS BIGINT) FROM inferences WHERE created >= $1 AND created < $2 GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    );
    sqlx::query(AssertSqlSafe(text)).bind(since).bind(END).fetch_all(store.database().read()).await.unwrap().len()
}

/// How long the newest answers of each variant took.
async fn times(traffic: &Traffic, since: i64) -> usize {
    let mut found = 0;
    for model in ["model-0", "model-1"] {
        for variant in [None, Some("variant-1"), Some("variant-2")] {
            found += traffic.latencies(model, variant, since, 1000).await.unwrap().len();
        }
    }
    found
}

/// Milliseconds, after once for nothing.
async fn median(rounds: usize, work: impl AsyncFn() -> usize) -> f64 {
    assert!(work().await > 0, "nothing was found");
    let mut times = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        work().await;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
