//! Pairs of answers of a rollout and what was said of them, on every database.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::{answer, each, thumb};
use serde_json::json;
use tidemill_store::records::{Exposure, Feedback, Inference, Kind};
use tidemill_store::{Candidate, Comparison, Comparisons, Store};
use uuid::Uuid;

const ROLLOUT: Uuid = Uuid::from_u128(77);

fn served(store: &Store, created: i64, arm: u32, place: Option<u32>) -> Inference {
    let exposure = Some(Exposure { rollout: ROLLOUT, arm, unit: -4, refused: None, place });
    let mut row = Inference { created, exposure, ..answer(store, "ann") };
    row.choices.truncate(1);
    row
}

#[test]
fn a_judgement_comes_with_the_arms_and_places_of_its_candidates() {
    each(async |place| {
        let store = place.open().await;
        let rows = [served(&store, 10, 1, Some(0)), served(&store, 10, 0, Some(1)), served(&store, 5, 0, None)];
        for row in &rows {
            store.record(row.clone()).unwrap();
        }
        store.flush().await;
        assert_eq!(store.inference(rows[0].id).await.unwrap().unwrap().exposure, rows[0].exposure);
        let ids: Vec<String> = rows.iter().map(|row| row.id.to_string()).collect();
        let value = json!({"candidates": [ids[0], ids[1]], "ranking": [[ids[1]], [ids[0]]]});
        let said = Feedback {
            kind: Kind::Comparison,
            target: ids[0].clone(),
            targets: ids[..2].to_vec(),
            value: value.clone(),
            number: None,
            ..thumb(&store, rows[0].id, "ann")
        };
        // Taken back; of another kind; and of an answer from before.
        let withdrawn = Feedback { id: store.issue_id(), withdrawn: true, idempotency_key: None, ..said.clone() };
        let before = Feedback {
            id: store.issue_id(),
            target: ids[2].clone(),
            targets: vec![ids[2].clone()],
            idempotency_key: None,
            ..said.clone()
        };
        store.add_feedback(vec![said, withdrawn, before, thumb(&store, rows[1].id, "ann")]).await.unwrap();
        let candidate = |index: usize, arm, place| Candidate { id: ids[index].clone(), arm, place };
        let pair =
            Comparison { unit: -4, value: value.clone(), candidates: vec![candidate(1, 0, Some(1)), candidate(0, 1, Some(0))] };
        let comparisons = Comparisons::new(store.database());
        assert_eq!(comparisons.of(ROLLOUT, 10).await.unwrap(), std::slice::from_ref(&pair));
        let all = comparisons.of(ROLLOUT, 0).await.unwrap();
        assert_eq!((&all[0], &all[1].candidates), (&pair, &vec![candidate(2, 0, None)]));
        assert!(comparisons.of(Uuid::from_u128(78), 0).await.unwrap().is_empty());
        store.close().await;
    });
}
