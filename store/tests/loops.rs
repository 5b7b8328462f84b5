//! Loops, what happened to them, and the feedback that they count, on every database.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::{answer, each, thumb};
use serde_json::json;
use tidemill_store::records::{Feedback, Kind};
use tidemill_store::{LoopChange, LoopRefusal, Loops, Tally, TallyFilter};

fn change(at: i64, cycle: u64, state: &str, actor: &str) -> LoopChange {
    LoopChange {
        at,
        cycle,
        state: state.into(),
        body: json!({"kind": state, "odd": "nul \u{fffd}"}),
        action: state.into(),
        actor: actor.into(),
        step: json!({"why": format!("because of {at}")}),
    }
}

#[test]
fn of_two_who_saw_the_same_state_one_wins_and_all_of_it_is_written_or_nothing() {
    each(async |place| {
        let store = place.open().await;
        let loops = Loops::new(&store);
        assert_eq!(loops.find("shorter").await.unwrap(), None);
        let new = loops.open("shorter", "waiting", &json!({"kind": "waiting"}), 5).await.unwrap();
        assert_eq!((new.version, new.cycle, new.state.as_str(), new.created), (0, 0, "waiting", 5));
        assert_eq!(loops.open("shorter", "other", &json!({}), 9).await.unwrap(), new, "it is there already");

        let (one, two) = (change(20, 1, "snapshot", "loop:shorter"), change(21, 0, "paused", "key ann"));
        let (first, second) = tokio::join!(loops.advance(&new, &one), loops.advance(&new, &two));
        let (won, lost) = if first.is_ok() { (first, second) } else { (second, first) };
        let won = won.unwrap();
        assert!(matches!(lost, Err(LoopRefusal::Changed)), "{lost:?}");
        assert_eq!(loops.find("shorter").await.unwrap(), Some(won.clone()));
        let mut now = won;
        for cycle in 1..=3 {
            now = loops.advance(&now, &change(100 * cycle as i64, cycle, "training", "loop:shorter")).await.unwrap();
        }
        assert_eq!((now.version, now.cycle, now.updated), (4, 3, 300));
        assert_eq!(loops.all().await.unwrap(), [now.clone()]);

        let steps = loops.steps("shorter", 2).await.unwrap();
        assert_eq!(steps.iter().map(|step| (step.version, step.cycle)).collect::<Vec<_>>(), [(3, 2), (4, 3)]);
        assert_eq!((steps[1].actor.as_str(), &steps[1].body["why"]), ("loop:shorter", &json!("because of 300")));
        assert_eq!(loops.steps("shorter", 100).await.unwrap().len(), 4);
        assert!(loops.steps("none", 100).await.unwrap().is_empty());
        let audit: Vec<(String, String, String)> =
            sqlx::query_as("SELECT actor, subject, detail FROM audit WHERE action = 'loop.training' ORDER BY at")
                .fetch_all(store.database().read())
                .await
                .unwrap();
        assert_eq!(audit.len(), 3);
        assert_eq!((audit[2].0.as_str(), audit[2].1.as_str()), ("loop:shorter", "shorter"));
        assert!(audit[2].2.contains("because of 300"), "{}", audit[2].2);
    });
}

#[test]
fn feedback_is_counted_as_a_query_would_take_it() {
    each(async |place| {
        let store = place.open().await;
        let recorded = answer(&store, "cy");
        store.record(recorded.clone()).unwrap();
        store.flush().await;
        let of =
            |author: &str, at: i64| Feedback { created: at, tags: Vec::new(), ..thumb(&store, recorded.choices[0].id, author) };
        let comparison = |author: &str, at: i64| Feedback { kind: Kind::Comparison, ..of(author, at) };
        store
            .add_feedback(vec![
                comparison("ann", 10),
                comparison("ann", 20),
                comparison("bob", 30),
                Feedback { author: None, source: Some("console".into()), ..comparison("x", 30) },
                Feedback { tags: vec!["gold".into(), "b\"c".into()], ..comparison("cy", 40) },
                Feedback { withdrawn: true, ..comparison("dan", 40) },
                Feedback { target: store.issue_id().to_string(), ..comparison("eve", 50) },
                of("fay", 60),
            ])
            .await
            .unwrap();
        let count = async |filter: TallyFilter| {
            let Tally { judgements, people } = store.tally(&filter).await.unwrap();
            (judgements, people)
        };
        let all = TallyFilter { kinds: vec![Kind::Comparison], ..TallyFilter::default() };
        assert_eq!(count(TallyFilter::default()).await, (0, 0), "nothing is asked for");
        assert_eq!(count(all.clone()).await, (6, 4));
        assert_eq!(count(TallyFilter { kinds: vec![Kind::Thumb, Kind::Comparison], ..all.clone() }).await, (7, 5));
        assert_eq!(count(TallyFilter { since: Some(20), until: Some(40), ..all.clone() }).await, (3, 2));
        let tag = |tag: &str| vec![tag.to_owned()];
        assert_eq!(count(TallyFilter { exclude_tags: tag("gold"), ..all.clone() }).await, (5, 3));
        assert_eq!(count(TallyFilter { tags: tag("b\"c"), ..all.clone() }).await, (1, 1));
        assert_eq!(count(TallyFilter { tags: tag("gol"), ..all.clone() }).await, (0, 0));
        assert_eq!(count(TallyFilter { sources: vec!["console".into(), "none".into()], ..all.clone() }).await, (1, 0));
        assert_eq!(count(TallyFilter { exclude_authors: vec!["ann".into(), "bob".into()], ..all.clone() }).await, (3, 2));
        assert_eq!(count(TallyFilter { models: vec![recorded.model.clone(), "other".into()], ..all.clone() }).await, (5, 3));
        assert_eq!(count(TallyFilter { models: vec!["other".into()], ..all }).await, (0, 0));
    });
}
