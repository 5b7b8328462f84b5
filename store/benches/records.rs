//! Feedback and answers per second and their latencies: `cargo bench -p tidemill-store --bench records [-- SECONDS]`.
//!
//! On SQLite in a temporary folder, and on Postgres when `TIDEMILL_TEST_POSTGRES` says where (`tests/postgres.sh cargo bench …`). Every
//! commit is flushed to the disk. Per row: senders at once, rows per request, acknowledged feedback per second, percentiles of the time
//! from sending to the acknowledgement. The last rows add a stream of answers beside the feedback.

#![allow(clippy::print_stdout, reason = "a benchmark prints its numbers")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark stops at the first surprise")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{Place, answer, on_postgres, on_sqlite, thumb};
use tidemill_store::Store;

fn main() {
    let seconds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(3.0);
    let time = Duration::from_secs_f64(seconds);
    let all = async |place: &Place| {
        println!("{:?}", place.dialect);
        println!(
            "{:>9} {:>6} {:>12} {:>9} {:>9} {:>9} {:>11}",
            "senders", "rows", "feedback/s", "p50 ms", "p95 ms", "p99 ms", "answers/s"
        );
        for (senders, rows, answers) in
            [(1, 1, false), (16, 1, false), (64, 1, false), (256, 1, false), (8, 100, false), (16, 1, true), (64, 1, true)]
        {
            let store = place.open().await;
            measure(&store, senders, rows, answers, time).await;
            store.close().await;
        }
        let store = place.open().await;
        recording(&store, time).await;
        store.close().await;
    };
    on_sqlite(&all);
    match std::env::var("TIDEMILL_TEST_POSTGRES") {
        Ok(server) if server != "skip" => on_postgres(&server, &all),
        _ => println!("Postgres: set TIDEMILL_TEST_POSTGRES"),
    }
}

async fn measure(store: &Store, senders: usize, rows: usize, answers: bool, time: Duration) {
    let start = Instant::now();
    let tasks: Vec<_> = (0..senders)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut times = Vec::new();
                while start.elapsed() < time {
                    let batch = (0..rows).map(|_| thumb(&store, store.issue_id(), "rater")).collect();
                    let sent = Instant::now();
                    store.add_feedback(batch).await.unwrap();
                    times.push(sent.elapsed());
                }
                times
            })
        })
        .collect();
    let (stop, recorded) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    // 200 answers a second: what one machine's engine gives at its best.
    let stream = answers.then(|| {
        let (store, stop, recorded) = (store.clone(), stop.clone(), recorded.clone());
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(5));
            while !stop.load(Ordering::Relaxed) {
                tick.tick().await;
                store.record(long_answer(&store)).unwrap();
                recorded.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await.unwrap());
    }
    let took = start.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    if let Some(stream) = stream {
        stream.await.unwrap();
    }
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{senders:>9} {rows:>6} {:>12.0} {:>9.2} {:>9.2} {:>9.2} {:>11.0}",
        (times.len() * rows) as f64 / took,
        at(0.5),
        at(0.95),
        at(0.99),
        recorded.load(Ordering::Relaxed) as f64 / took
    );
}

/// An answer of 500 prompt tokens and 200 sampled ones.
fn long_answer(store: &Store) -> tidemill_store::records::Inference {
    let mut one = answer(store, "ann");
    one.prompt_ids = (0..500).collect();
    one.prompt_text = Some("word ".repeat(500));
    one.choices.truncate(1);
    let choice = &mut one.choices[0];
    choice.output_text = Some("word ".repeat(200));
    choice.output_ids = (0..200).collect();
    choice.logprobs = vec![-0.5; 200];
    choice.raw_logprobs = vec![-0.5; 200];
    one
}

/// Answers as fast as the database takes them: the next is recorded when there is room in the queue.
async fn recording(store: &Store, time: Duration) {
    let (start, mut recorded, mut inside) = (Instant::now(), 0u32, Duration::ZERO);
    while start.elapsed() < time {
        for _ in 0..256 {
            let one = long_answer(store);
            let before = Instant::now();
            store.record(one).unwrap();
            inside += before.elapsed();
            recorded += 1;
        }
        store.flush().await;
    }
    let took = start.elapsed().as_secs_f64();
    let rate = f64::from(recorded) / took;
    println!(
        "answers alone: {rate:.0}/s in batches of 256; record() takes {:.1} µs",
        inside.as_secs_f64() * 1e6 / f64::from(recorded)
    );
}
