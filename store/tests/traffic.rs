//! Sums of the traffic, on every database.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::{answer, each};
use tidemill_store::records::{Inference, Status};
use tidemill_store::{Latency, Retention, Store, Traffic, TrafficSum, retention};

const HOUR: i64 = 3_600_000_000;

#[test]
fn answers_are_summed_by_model_variant_and_hour() {
    each(async |place| {
        let store = place.open().await;
        let record = |created: i64, model: &str, variant: Option<&str>, status: Status, first: Option<i64>| {
            let made = Inference {
                id: store.issue_id(),
                created,
                model: model.to_owned(),
                variant: variant.map(str::to_owned),
                status,
                prompt_tokens: 10,
                cached_tokens: 4,
                output_tokens: 3,
                first_token_us: first,
                duration_us: created % HOUR,
                choices: Vec::new(),
                ..answer(&store, "u")
            };
            store.record(made).unwrap();
        };
        record(HOUR - 1, "base", None, Status::Ok, Some(7));
        record(HOUR, "base", None, Status::Ok, Some(100));
        record(HOUR + 5, "base", None, Status::Ok, Some(300));
        record(2 * HOUR - 1, "base", None, Status::Failed, None);
        record(2 * HOUR, "base", None, Status::Cancelled, Some(50));
        record(HOUR + 9, "base", Some("base:brief"), Status::Ok, None);
        record(HOUR + 9, "closed \0", Some("x"), Status::Ok, Some(1));
        record(3 * HOUR, "base", None, Status::Ok, Some(7));
        store.flush().await;

        let traffic = Traffic::new(store.database());
        let sums = traffic.sums(HOUR, 3 * HOUR, HOUR).await.unwrap();
        let of = |model: &str, variant: Option<&str>, start: i64, answers: u64| TrafficSum {
            model: model.to_owned(),
            variant: variant.map(str::to_owned),
            start,
            answers,
            prompt_tokens: 10 * answers,
            cached_tokens: 4 * answers,
            output_tokens: 3 * answers,
            ..TrafficSum::default()
        };
        let expected = [
            TrafficSum { failed: 1, begun: 2, first_token_us: 400, ..of("base", None, HOUR, 3) },
            TrafficSum { cancelled: 1, begun: 1, first_token_us: 50, ..of("base", None, 2 * HOUR, 1) },
            of("base", Some("base:brief"), HOUR, 1),
            TrafficSum { begun: 1, first_token_us: 1, ..of("closed \u{fffd}", Some("x"), HOUR, 1) },
        ];
        assert_eq!(sums, expected);
        assert_eq!(traffic.sums(9 * HOUR, 10 * HOUR, HOUR).await.unwrap(), []);

        let latencies = traffic.latencies("base", None, HOUR, 2).await.unwrap();
        let took = |first: i64, duration_us: i64| Latency { first_token_us: Some(first), duration_us };
        assert_eq!(latencies, [took(7, 0), took(300, 5)], "the newest two that ended well");
        assert_eq!(traffic.latencies("base", Some("base:brief"), 0, 9).await.unwrap().len(), 1);
        store.close().await;
    });
}

/// The sums as the answers that are there have them.
async fn counted(store: &Store, width: i64) -> Vec<(String, String, i64, i64, i64)> {
    let text = format!(
        "SELECT model, COALESCE(variant, ''), created / {width} * {width}, COUNT(*), CAST(SUM(output_tokens) AS BIGINT) FROM inferences \
         GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    );
    sqlx::query_as(sqlx::AssertSqlSafe(text)).fetch_all(store.database().read()).await.unwrap()
}

async fn summed(traffic: &Traffic, width: i64) -> Vec<(String, String, i64, i64, i64)> {
    let of = |sum: TrafficSum| {
        let variant = sum.variant.unwrap_or_default();
        (sum.model, variant, sum.start, sum.answers.cast_signed(), sum.output_tokens.cast_signed())
    };
    traffic.sums(0, i64::MAX, width).await.unwrap().into_iter().map(of).collect()
}

#[test]
fn sums_are_those_of_the_answers_whatever_comes_twice_or_is_erased_and_retention_leaves_them() {
    each(async |place| {
        let store = place.open().await;
        let traffic = Traffic::new(store.database());
        let made = |number: i64, user: &str| Inference {
            created: number * HOUR / 7,
            variant: (number % 3 > 0).then(|| format!("v{}", number % 3)),
            output_tokens: u32::try_from(number).unwrap(),
            choices: Vec::new(),
            ..answer(&store, user)
        };
        let rows: Vec<Inference> = (0..100).map(|number| made(number, if number % 4 == 0 { "ann" } else { "bob" })).collect();
        for row in rows.iter().chain(&rows[..30]) {
            store.record(row.clone()).unwrap();
        }
        // Once more by itself, as a spill log is read again.
        store.flush().await;
        rows[50..].iter().for_each(|row| store.record(row.clone()).unwrap());
        store.flush().await;
        let widths = [Traffic::FINEST, HOUR, 3 * HOUR, 12 * HOUR];
        for width in widths {
            let found = summed(&traffic, width).await;
            assert_eq!(found, counted(&store, width).await, "{width}");
            assert_eq!(found.iter().map(|sum| sum.3).sum::<i64>(), 100);
        }

        store.erase_user("ann", "operator").await.unwrap();
        // It comes late, and is left out.
        store.record(rows[0].clone()).unwrap();
        store.flush().await;
        for width in widths {
            let found = summed(&traffic, width).await;
            assert_eq!(found, counted(&store, width).await, "{width}");
            assert_eq!(found.iter().map(|sum| sum.3).sum::<i64>(), 75);
        }
        let (rows,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM traffic WHERE answers <= 0 OR output_tokens < 0")
            .fetch_one(store.database().read())
            .await
            .unwrap();
        assert_eq!(rows, 0);

        let before = summed(&traffic, HOUR).await;
        let age = Retention { max_age: Some(std::time::Duration::from_secs(3600)), max_bytes: None };
        assert_eq!(retention::apply(store.database(), age, i64::MAX).await.unwrap(), 75);
        assert_eq!(counted(&store, HOUR).await, []);
        assert_eq!(summed(&traffic, HOUR).await, before, "what was paid was paid");
        store.close().await;
    });
}

#[test]
fn a_database_from_before_the_sums_gets_them_from_its_answers() {
    each(async |place| {
        let store = place.open().await;
        for number in 0..40 {
            let first_token_us = (number % 2 == 0).then_some(number);
            let variant = (number % 3 > 0).then(|| "v".to_owned());
            let made =
                Inference { created: number * HOUR / 3, first_token_us, variant, choices: Vec::new(), ..answer(&store, "u") };
            store.record(made).unwrap();
        }
        store.flush().await;
        let traffic = Traffic::new(store.database());
        let kept = [traffic.sums(0, i64::MAX, HOUR).await.unwrap(), traffic.sums(0, i64::MAX, 3 * HOUR).await.unwrap()];
        for text in ["DROP TABLE traffic", "DROP INDEX inferences_latency", "DELETE FROM _sqlx_migrations WHERE version = 15"] {
            sqlx::query(text).execute(store.database().write()).await.unwrap();
        }
        store.close().await;
        let store = place.open().await;
        let traffic = Traffic::new(store.database());
        let made = [traffic.sums(0, i64::MAX, HOUR).await.unwrap(), traffic.sums(0, i64::MAX, 3 * HOUR).await.unwrap()];
        assert_eq!(made, kept);
        store.close().await;
    });
}
