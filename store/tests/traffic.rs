//! Sums of the traffic, on every database.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod support;

use support::{answer, each};
use tidemill_store::records::{Inference, Status};
use tidemill_store::{Latency, Traffic, TrafficSum};

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
