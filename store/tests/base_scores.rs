//! Answers that wait for the base model's word, on every database.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::{answer, each};
use tidemill_store::records::{Exposure, Inference, Status};
use tidemill_store::{BaseScore, BaseScores, Exposures, Store, UnitSums, UnitValue};
use uuid::Uuid;

const ROLLOUT: Uuid = Uuid::from_u128(5);

fn counted(store: &Store, arm: u32, unit: i64, created: i64) -> Inference {
    let exposure = Exposure { rollout: ROLLOUT, arm, unit, refused: None, place: None };
    Inference { created, exposure: Some(exposure), ..answer(store, "ann") }
}

#[test]
fn an_answer_is_scored_by_one_and_once() {
    each(async |place| {
        let store = place.open().await;
        let scores = BaseScores::new(store.database());
        let (old, new) = (counted(&store, 1, 7, 10), counted(&store, 0, 8, 20));
        let failed = Inference { status: Status::Failed, ..counted(&store, 1, 9, 30) };
        let bare = Inference { prompt_ids: Vec::new(), ..counted(&store, 1, 9, 30) };
        let mut blind = counted(&store, 1, 9, 30);
        blind.choices[0].raw_logprobs = Vec::new();
        for answer in [&old, &new, &failed, &bare, &blind] {
            store.record(answer.clone()).unwrap();
        }
        store.flush().await;
        let waiting = async |since: i64, now: i64| -> Vec<Uuid> {
            scores.waiting(ROLLOUT, since, now).await.unwrap().into_iter().map(|answer| answer.id).collect()
        };
        assert_eq!(waiting(0, 100).await, [new.id, old.id], "the newest first, and only what has its tokens");
        assert_eq!(waiting(15, 100).await, [new.id]);
        let first = scores.waiting(ROLLOUT, 0, 100).await.unwrap().remove(0);
        assert_eq!((first.arm, first.model.as_str()), (0, "m"));

        // Of two who want it one gets it; when a server dies, the promise ends.
        let (one, two) = tokio::join!(scores.claim(old.id, 100, 200), scores.claim(old.id, 100, 200));
        assert!(one.unwrap() ^ two.unwrap());
        assert_eq!((waiting(0, 150).await, waiting(0, 201).await), (vec![new.id], vec![new.id, old.id]));
        assert!(!scores.claim(bare.id, 100, 200).await.unwrap());
        scores.release(old.id).await.unwrap();
        assert_eq!(waiting(0, 150).await.len(), 2);
        assert!(scores.claim(old.id, 150, 300).await.unwrap());
        assert!(scores.write(old.id, BaseScore { kl: 0.25, logprob: -2.0 }).await.unwrap());
        assert!(!scores.write(old.id, BaseScore { kl: 9.0, logprob: -9.0 }).await.unwrap(), "once");
        scores.claim_for_good(new.id).await.unwrap();
        scores.claim_for_good(old.id).await.unwrap();
        assert_eq!(waiting(0, i64::MAX).await, [] as [Uuid; 0]);
        let means = async |value| Exposures::new(store.database()).unit_means(ROLLOUT, 0, value).await.unwrap();
        assert_eq!(means(UnitValue::KlToBase).await, [UnitSums { arm: 1, units: 1, sum: 0.25, squares: 0.0625 }]);
        assert_eq!(means(UnitValue::LogprobToBase).await, [UnitSums { arm: 1, units: 1, sum: -2.0, squares: 4.0 }]);
    });
}

#[test]
fn the_line_has_an_end() {
    each(async |place| {
        let store = place.open().await;
        for number in 0..600 {
            store.record(counted(&store, 1, number, number)).unwrap();
            if number % 200 == 0 {
                store.flush().await;
            }
        }
        store.flush().await;
        let waiting = BaseScores::new(store.database()).waiting(ROLLOUT, 0, 1).await.unwrap();
        assert_eq!(waiting.len(), 512, "what is older is not scored any more");
    });
}
