//! Stored chats and responses: read by their owner alone, in pages and in conversations, and gone when they should be.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::time::Duration;

use crate::support::each;
use serde_json::{Map, Value, json};
use tidemill_store::{
    Chain, ChatFilter, MAX_CHAIN_BYTES, Order, ResponseStatus, Retention, Store, StoredChat, StoredResponse, retention,
};
use uuid::Uuid;

fn chat(store: &Store, owner: &str, user: &str, metadata: Value) -> StoredChat {
    StoredChat {
        id: store.issue_id(),
        created: 1_700_000_000_000_000,
        owner: owner.into(),
        user_key: Some(user.into()),
        model: "m".into(),
        metadata: metadata.as_object().unwrap().clone(),
        messages: json!([{"role": "user", "content": "nul: \u{0}, naïve 🦀"}]),
        body: json!({"choices": [{"message": {"content": "'; DROP TABLE stored_chats; --"}}]}),
    }
}

fn response(store: &Store, owner: &str, user: &str, previous: Option<Uuid>) -> StoredResponse {
    StoredResponse {
        id: store.issue_id(),
        created: 1_700_000_000_000_000,
        owner: owner.into(),
        user_key: Some(user.into()),
        previous,
        status: ResponseStatus::Completed,
        alive_until: None,
        input: vec![json!({"type": "message", "role": "user", "content": "🦀"})],
        body: json!({"output": []}),
    }
}

async fn count(store: &Store, text: &'static str) -> i64 {
    sqlx::query_as::<_, (i64,)>(text).fetch_one(store.database().read()).await.unwrap().0
}

#[test]
fn a_chat_is_its_owners_in_pages_by_metadata_until_it_is_deleted() {
    each(async |place| {
        let store = place.open().await;
        let one = chat(&store, "k1", "ann", json!({"topic": "a\"b", "n": "1"}));
        let two = StoredChat { model: "other".into(), ..chat(&store, "k1", "ann", json!({"topic": "c"})) };
        let three = chat(&store, "k1", "ann", json!({}));
        let foreign = chat(&store, "k2", "ann", json!({"topic": "c"}));
        for one in [&one, &two, &three, &foreign] {
            store.save_chat(one).await.unwrap();
        }
        assert_eq!(store.chat("k1", one.id).await.unwrap(), Some(one.clone()));
        assert_eq!(store.chat("k1", foreign.id).await.unwrap(), None);
        assert_eq!(store.chat("", one.id).await.unwrap(), None);

        let ids = async |filter: ChatFilter| -> (Vec<Uuid>, bool) {
            let page = store.list_chats(&ChatFilter { owner: "k1".into(), ..filter }).await.unwrap();
            (page.items.iter().map(|chat| chat.id).collect(), page.has_more)
        };
        let asked = ChatFilter { limit: Some(2), order: Order::OldestFirst, ..Default::default() };
        assert_eq!(ids(asked.clone()).await, (vec![one.id, two.id], true));
        assert_eq!(ids(ChatFilter { after: Some(two.id), ..asked }).await, (vec![three.id], false));
        assert_eq!(ids(ChatFilter::default()).await, (vec![three.id, two.id, one.id], false));
        assert_eq!(ids(ChatFilter { model: Some("other".into()), ..Default::default() }).await.0, [two.id]);
        let by = |pairs: &[(&str, &str)]| ChatFilter {
            metadata: pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            ..Default::default()
        };
        assert_eq!(ids(by(&[("topic", "a\"b"), ("n", "1")])).await.0, [one.id]);
        assert!(ids(by(&[("topic", "a\"b"), ("n", "2")])).await.0.is_empty());

        let metadata = Map::from_iter([("topic".to_owned(), json!("new"))]);
        assert_eq!(store.set_chat_metadata("k2", one.id, &metadata).await.unwrap(), None);
        let changed = store.set_chat_metadata("k1", one.id, &metadata).await.unwrap().unwrap();
        assert_eq!(changed, StoredChat { metadata, ..one.clone() });
        assert_eq!((ids(by(&[("topic", "new")])).await.0, ids(by(&[("n", "1")])).await.0), (vec![one.id], vec![]));

        assert!(!store.delete_chat("k2", one.id).await.unwrap());
        assert!(store.delete_chat("k1", one.id).await.unwrap());
        assert!(!store.delete_chat("k1", one.id).await.unwrap());
        assert_eq!(count(&store, "SELECT COUNT(*) FROM stored_chat_metadata").await, 2);
        store.close().await;
    });
}

#[test]
fn a_conversation_is_read_from_its_beginning_by_its_owner() {
    each(async |place| {
        let store = place.open().await;
        let first = response(&store, "k1", "ann", None);
        let second = response(&store, "k1", "ann", Some(first.id));
        let branch = response(&store, "k1", "ann", Some(first.id));
        let third = response(&store, "k1", "ann", Some(second.id));
        let foreign = response(&store, "k2", "ann", Some(third.id));
        for one in [&first, &second, &branch, &third, &foreign] {
            store.save_response(one).await.unwrap();
        }
        assert_eq!(store.response("k1", third.id).await.unwrap(), Some(third.clone()));
        assert_eq!(store.response("k2", third.id).await.unwrap(), None);
        let chain = async |owner, id| store.response_chain(owner, id).await.unwrap();
        let whole = |responses: &[&StoredResponse]| Chain { responses: responses.iter().copied().cloned().collect(), cut: false };
        assert_eq!(chain("k1", third.id).await, whole(&[&first, &second, &third]));
        assert_eq!(chain("k1", branch.id).await, whole(&[&first, &branch]));
        assert_eq!(chain("k1", foreign.id).await, Chain::default());
        assert_eq!(chain("k2", foreign.id).await, whole(&[&foreign]), "it does not reach into another's");
        let mut by_id = store.responses("k1", &[third.id, foreign.id, first.id]).await.unwrap();
        by_id.sort_by_key(|response| response.id);
        assert_eq!(by_id, [first.clone(), third.clone()]);
        assert!(!store.delete_response("k2", second.id).await.unwrap());
        assert!(store.delete_response("k1", second.id).await.unwrap());
        assert_eq!(chain("k1", third.id).await, whole(&[&third]));
        store.close().await;
    });
}

#[test]
fn of_a_conversation_that_is_too_large_to_be_read_back_the_latest_part_is() {
    each(async |place| {
        let store = place.open().await;
        let large = |previous| StoredResponse {
            input: vec![json!({"text": "x".repeat(MAX_CHAIN_BYTES / 2 - 1000)})],
            ..response(&store, "k", "ann", previous)
        };
        let mut previous = None;
        let mut ids = Vec::new();
        for _ in 0..4 {
            let one = large(previous);
            previous = Some(one.id);
            ids.push(one.id);
            store.save_response(&one).await.unwrap();
        }
        let chain = store.response_chain("k", ids[3]).await.unwrap();
        let found: Vec<Uuid> = chain.responses.iter().map(|response| response.id).collect();
        assert_eq!((found.as_slice(), chain.cut), (&ids[1..], true), "the last one and as much again as there is room for");
        assert!(!store.response_chain("k", ids[2]).await.unwrap().cut);
        store.delete_response("k", ids[0]).await.unwrap();
        assert!(!store.response_chain("k", ids[3]).await.unwrap().cut, "what was deleted is not left out");
        store.close().await;
    });
}

#[test]
fn a_list_of_chats_leaves_out_their_messages() {
    each(async |place| {
        let store = place.open().await;
        let one = chat(&store, "k", "ann", json!({"a": "b"}));
        store.save_chat(&one).await.unwrap();
        let page = store.list_chats(&ChatFilter { owner: "k".into(), ..Default::default() }).await.unwrap();
        assert_eq!(page.items, [StoredChat { messages: Value::Null, ..one }]);
        store.close().await;
    });
}

#[test]
fn a_response_in_the_background_ends_once_and_is_abandoned_with_its_server() {
    each(async |place| {
        let store = place.open().await;
        let made = |until| StoredResponse {
            status: ResponseStatus::InProgress,
            alive_until: Some(until),
            ..response(&store, "k1", "ann", None)
        };
        let (running, dead) = (made(i64::MAX), made(1));
        for one in [&running, &dead] {
            store.save_response(one).await.unwrap();
        }
        assert!(!store.is_abandoned(&running) && store.is_abandoned(&dead));
        assert_eq!(store.keep_alive(&[running.id, dead.id], i64::MAX).await.unwrap(), [] as [Uuid; 0]);
        assert!(!store.is_abandoned(&store.response("k1", dead.id).await.unwrap().unwrap()));

        let body = json!({"output": ["much longer than before"]});
        assert!(store.end_response(running.id, ResponseStatus::Cancelled, &body).await.unwrap());
        assert!(!store.end_response(running.id, ResponseStatus::Completed, &json!({})).await.unwrap(), "it has ended");
        let ended = store.response("k1", running.id).await.unwrap().unwrap();
        assert_eq!((ended.status, ended.alive_until, ended.body), (ResponseStatus::Cancelled, None, body));
        assert_eq!(store.keep_alive(&[running.id, dead.id], i64::MAX).await.unwrap(), [running.id]);
        store.close().await;
    });
}

#[test]
fn erasure_takes_what_a_person_stored_and_all_that_goes_on_from_it() {
    each(async |place| {
        let store = place.open().await;
        let (hers, his) = (chat(&store, "k", "ann", json!({"a": "b"})), chat(&store, "k", "bob", json!({"a": "b"})));
        let before = response(&store, "k", "bob", None);
        let of_her = response(&store, "k", "ann", Some(before.id));
        let after = response(&store, "k", "bob", Some(of_her.id));
        let after_that = response(&store, "k", "bob", Some(after.id));
        for one in [&before, &of_her, &after, &after_that] {
            store.save_response(one).await.unwrap();
        }
        for one in [&hers, &his] {
            store.save_chat(one).await.unwrap();
        }
        assert_eq!(store.erase_user("ann", "operator").await.unwrap().stored, 4);
        assert_eq!((store.chat("k", hers.id).await.unwrap(), store.chat("k", his.id).await.unwrap()), (None, Some(his)));
        assert_eq!(store.response_chain("k", before.id).await.unwrap().responses, [before]);
        assert_eq!(count(&store, "SELECT COUNT(*) FROM responses").await, 1);
        assert_eq!(count(&store, "SELECT COUNT(*) FROM stored_chat_metadata").await, 1);

        // What was under way during the erasure is left out; what comes anew is kept.
        let late = response(&store, "k", "ann", None);
        store.save_response(&late).await.unwrap();
        store.save_chat(&hers).await.unwrap();
        let anew = StoredResponse { created: i64::MAX, ..response(&store, "k", "ann", None) };
        for erased in [of_her.id, after.id] {
            let going_on = StoredResponse { created: i64::MAX, ..response(&store, "k", "bob", Some(erased)) };
            store.save_response(&going_on).await.unwrap();
            assert_eq!(store.response("k", going_on.id).await.unwrap(), None, "it was made with her texts");
        }
        store.save_response(&anew).await.unwrap();
        assert_eq!((store.response("k", late.id).await.unwrap(), store.chat("k", hers.id).await.unwrap()), (None, None));
        assert_eq!(store.response("k", anew.id).await.unwrap(), Some(anew));
        store.close().await;
    });
}

#[test]
fn retention_takes_old_chats_and_responses() {
    each(async |place| {
        let store = place.open().await;
        for hour in 1..=4 {
            let created = hour * 3_600_000_000;
            store.save_chat(&StoredChat { created, ..chat(&store, "k", "ann", json!({"a": "b"})) }).await.unwrap();
            store.save_response(&StoredResponse { created, ..response(&store, "k", "ann", None) }).await.unwrap();
        }
        let left = async || {
            let chats = count(&store, "SELECT COUNT(*) FROM stored_chats").await;
            assert_eq!(count(&store, "SELECT COUNT(*) FROM stored_chat_metadata").await, chats);
            (chats, count(&store, "SELECT COUNT(*) FROM responses").await)
        };
        let age = Retention { max_age: Some(Duration::from_secs(2 * 3600)), max_bytes: None };
        assert_eq!(retention::apply(store.database(), age, 4 * 3_600_000_000).await.unwrap(), 2);
        assert_eq!(left().await, (3, 3));
        let sums =
            "SELECT CAST(SUM(bytes) AS BIGINT) FROM (SELECT bytes FROM stored_chats UNION ALL SELECT bytes FROM responses) AS t";
        let total = u64::try_from(count(&store, sums).await).unwrap();
        let size = |bytes| Retention { max_age: None, max_bytes: Some(bytes) };
        assert_eq!(retention::apply(store.database(), size(total), 0).await.unwrap(), 0);
        assert_eq!(retention::apply(store.database(), size(total * 2 / 3), 0).await.unwrap(), 2);
        assert_eq!(left().await, (2, 2), "the oldest of both go first");
        assert_eq!(retention::apply(store.database(), size(0), 0).await.unwrap(), 4);
        store.close().await;
    });
}
