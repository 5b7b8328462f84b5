//! What is recorded is what was answered.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support;
use crate::support::{END, MODEL, Setup, chat, completion, post, says};
use serde_json::{Value, json};
use std::time::Duration;
use tidemill::http::{App, Auth, router};
use tidemill::recording::{Level, Recording, Route};
use tidemill_store::Store;
use tidemill_store::records::{Inference, Status};
use uuid::Uuid;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// The record of the answer that the API called `id`.
async fn recorded(store: &Store, id: &Value) -> Inference {
    let id = id.as_str().unwrap().rsplit_once("cmpl-").unwrap().1;
    store.flush().await;
    store.inference(Uuid::parse_str(id).unwrap()).await.unwrap().expect("not recorded")
}

fn text(inference: &Inference, choice: usize) -> &str {
    inference.choices[choice].output_text.as_deref().unwrap()
}

#[tokio::test]
async fn a_chat_is_recorded_whole_streamed_or_not() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let asked = json!({
        "user": "u", "metadata": {"a": "b"}, "tidemill": {"conversation": "c-1"}, "seed": -7, "top_p": 0.5, "return_token_ids": true,
        "logprobs": true,
    });
    let whole = post(&router, CHAT, chat(asked.clone())).await.json();
    let mut streamed = asked;
    streamed["stream"] = true.into();
    let chunks = post(&router, CHAT, chat(streamed)).await.chunks();
    for (id, prompt_ids) in [(&whole["id"], &whole["prompt_token_ids"]), (&chunks[0]["id"], &chunks[0]["prompt_token_ids"])] {
        let record = recorded(&store, id).await;
        assert_eq!((record.endpoint.as_str(), record.model.as_str(), record.status), ("chat", MODEL, Status::Ok));
        assert_eq!((record.user_key.as_deref(), record.conversation.as_deref()), (Some("u"), Some("c-1")));
        assert_eq!(record.metadata["a"], "b");
        assert_eq!(json!(record.prompt_ids), *prompt_ids);
        assert_eq!(record.prompt_text.as_deref(), Some("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"));
        assert_eq!(record.messages, Some(json!([{"role": "user", "content": "hello"}])));
        let params = record.params.as_ref().unwrap();
        assert_eq!((&params["seed"], &params["top_p"], &params["temperature"]), (&json!(-7), &json!(0.5), &json!(1.0)));
        assert_eq!(json!(record.config_hash), whole["system_fingerprint"]);
        let choice = &record.choices[0];
        assert_eq!((choice.id, record.choices.len(), text(&record, 0)), (record.id, 1, "Hi 🌊!"));
        assert_eq!(choice.output_ids, says("Hi 🌊!"), "the end of the turn is a sampled token, too");
        let expected: Vec<f32> = (0..choice.output_ids.len()).map(|i| -(1.0 + i as f32) / 8.0).collect();
        assert_eq!((&choice.raw_logprobs, &choice.logprobs), (&expected, &expected));
        assert_eq!(choice.finish_reason.as_deref(), Some("stop"));
        assert_eq!(u64::from(record.output_tokens), whole["usage"]["completion_tokens"].as_u64().unwrap());
        assert_eq!(u64::from(record.prompt_tokens), whole["usage"]["prompt_tokens"].as_u64().unwrap());
        assert!(record.first_token_us.unwrap() <= record.duration_us);
        assert!(record.created > 1_600_000_000_000_000);
    }
}

#[tokio::test]
async fn a_seed_that_was_drawn_is_in_the_record() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let reply = post(&router, CHAT, chat(json!({}))).await.json();
    assert!(recorded(&store, &reply["id"]).await.params.unwrap()["seed"].is_i64());
}

#[tokio::test]
async fn each_prompt_of_a_completion_has_a_record_and_best_of_keeps_what_was_returned() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let reply = post(&router, COMPLETIONS, completion(json!({"prompt": ["ab", [99, 100]], "user": "two"}))).await.json();
    let first = recorded(&store, &reply["id"]).await;
    assert_eq!((first.prompt_ids.as_slice(), first.prompt_text.as_deref()), ([97, 98].as_slice(), Some("ab")));
    let filter = tidemill_store::InferenceFilter { user_key: Some("two".into()), ..Default::default() };
    let both = store.list_inferences(&filter).await.unwrap().items;
    assert_eq!(both.len(), 2);
    let second = both.iter().find(|record| record.id != first.id).unwrap();
    assert_eq!((second.prompt_ids.as_slice(), second.prompt_text.as_deref()), ([99, 100].as_slice(), Some("cd")));
    assert!(store.issued(second.id));
    let reply = post(&router, COMPLETIONS, completion(json!({"best_of": 3}))).await.json();
    let best = recorded(&store, &reply["id"]).await;
    assert_eq!((best.choices.len(), text(&best, 0)), (1, reply["choices"][0]["text"].as_str().unwrap()));
    assert_eq!(u64::from(best.output_tokens), reply["usage"]["completion_tokens"].as_u64().unwrap());
    let reply = post(&router, COMPLETIONS, completion(json!({"max_tokens": 0, "echo": true}))).await.json();
    let scored = recorded(&store, &reply["id"]).await;
    assert_eq!((scored.output_tokens, text(&scored, 0)), (0, ""), "nothing was to be generated");
}

#[tokio::test]
async fn choices_made_to_be_compared_have_ids_of_their_own() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let asked = json!({"n": 2, "tidemill": {"compare": true}});
    let whole = post(&router, CHAT, chat(asked.clone())).await.json();
    let mut streamed = asked;
    streamed["stream"] = true.into();
    let chunks = post(&router, CHAT, chat(streamed)).await.chunks();
    let roles: Vec<&Value> =
        chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|c| c["delta"].get("role").is_some()).collect();
    assert!(chunks.iter().all(|c| c["choices"][0]["delta"].get("role").is_some() == c["choices"][0].get("tidemill").is_some()));
    let ids = |choices: [&Value; 2]| choices.map(|choice| choice["tidemill"]["id"].as_str().unwrap().to_owned());
    for (answer, shown) in
        [(&whole["id"], ids([&whole["choices"][0], &whole["choices"][1]])), (&chunks[0]["id"], ids([roles[0], roles[1]]))]
    {
        let record = recorded(&store, answer).await;
        assert!(record.compare);
        let kept: Vec<String> = record.choices.iter().map(|choice| format!("chatcmpl-{}", choice.id)).collect();
        assert_eq!(kept, shown);
        assert_eq!((kept[0].as_str(), kept.len()), (answer.as_str().unwrap(), 2));
        assert!(record.choices.iter().all(|choice| store.issued(choice.id)));
    }
    for (extra, param) in [
        (json!({"tidemill": {"compare": true}}), "tidemill.compare"),
        (json!({"n": 2, "temperature": 0, "tidemill": {"compare": true}}), "tidemill.compare"),
    ] {
        let (status, named, _) = post(&router, CHAT, chat(extra)).await.error();
        assert_eq!((status, named.as_deref()), (400, Some(param)));
    }
    let (status, named, _) = post(&router, COMPLETIONS, completion(json!({"n": 2, "tidemill": {"compare": true}}))).await.error();
    assert_eq!((status, named.as_deref()), (400, Some("tidemill.compare")));
}

#[tokio::test]
async fn a_failure_is_recorded_with_what_came_before() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let reply = post(&router, COMPLETIONS, completion(json!({"prompt": [0], "user": "choked"}))).await;
    assert_eq!(reply.status, 500);
    store.flush().await;
    let filter = tidemill_store::InferenceFilter { user_key: Some("choked".into()), ..Default::default() };
    let failed = store.list_inferences(&filter).await.unwrap().items;
    assert_eq!((failed.len(), failed[0].status, failed[0].output_tokens), (1, Status::Failed, 0));
    // What was refused is no answer.
    post(&router, CHAT, chat(json!({"user": "refused", "temperature": 9}))).await;
    store.flush().await;
    let filter = tidemill_store::InferenceFilter { user_key: Some("refused".into()), ..Default::default() };
    assert_eq!(store.list_inferences(&filter).await.unwrap().items, []);
}

#[tokio::test]
async fn a_client_that_leaves_is_recorded_with_what_it_got() {
    // Eight seconds: longer than it is listened to.
    let app = Setup::slow(400, 20).app();
    let model = app.registry.find_local(Some(MODEL)).unwrap();
    let (store, router) = (app.store.clone(), router(app));
    for stream in [true, false] {
        let user = format!("left-{stream}");
        let body = chat(json!({"user": user, "stream": stream, "ignore_eos": true}));
        let before = model.engine().stats().generation_tokens;
        let some_tokens = async {
            while model.engine().stats().generation_tokens < before + 5 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // The answer is looked at once more before this is over: what was made by now has come.
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        tokio::select! {
            biased;
            _ = post(&router, CHAT, body) => panic!("it ended"),
            () = some_tokens => {}
        }
        let filter = tidemill_store::InferenceFilter { user_key: Some(user), ..Default::default() };
        store.flush().await;
        let left = store.list_inferences(&filter).await.unwrap().items;
        assert_eq!((left.len(), left[0].status), (1, Status::Cancelled));
        let record = store.inference(left[0].id).await.unwrap().unwrap();
        let tokens = record.choices[0].output_ids.len();
        assert!((1..400).contains(&tokens), "{tokens}");
        assert_eq!((text(&record, 0), &record.choices[0].finish_reason), ("x".repeat(tokens).as_str(), &None));
    }
}

#[tokio::test]
async fn level_and_share_are_kept_to() {
    let metadata = Recording { level: Level::Metadata, ..Recording::default() };
    let app = Setup { recording: metadata, ..Setup::default() }.app();
    let (store, routes) = (app.store.clone(), router(app));
    let reply = post(&routes, CHAT, chat(json!({"user": "u"}))).await.json();
    let record = recorded(&store, &reply["id"]).await;
    assert_eq!((record.messages, record.prompt_text, record.prompt_ids.len()), (None, None, 0));
    let choice = &record.choices[0];
    assert_eq!((&choice.output_text, choice.output_ids.len(), choice.tokens), (&None, 0, says("Hi 🌊!").len() as u32));
    assert_eq!((record.user_key.as_deref(), choice.mean_logprob.is_some()), (Some("u"), true));

    let off = Route { level: Some(Level::Off), share: None };
    let recording = Recording { routes: [("chat".to_owned(), off)].into(), ..Recording::default() };
    let app = Setup { recording, ..Setup::default() }.app();
    let (store, routes) = (app.store.clone(), router(app));
    post(&routes, CHAT, chat(json!({}))).await.json();
    let kept = post(&routes, COMPLETIONS, completion(json!({}))).await.json();
    store.flush().await;
    let all = store.list_inferences(&tidemill_store::InferenceFilter::default()).await.unwrap().items;
    assert_eq!(all.len(), 1);
    assert_eq!(format!("cmpl-{}", all[0].id), kept["id"].as_str().unwrap());
    assert_eq!(recorded(&store, &kept["id"]).await.choices[0].output_ids.last(), Some(&END));
}

#[tokio::test]
async fn without_room_for_the_record_a_request_is_refused_before_it_runs() {
    let store = support::store_with(|options| (options.queue, options.spill_bytes) = (2, 0));
    let app = App { store: store.clone(), auth: Auth::new(store.clone(), false), ..Setup::default().app() };
    let routes = router(app.clone());
    // Nobody else can write while this connection is out.
    let held = store.database().write().acquire().await.unwrap();
    let mut refused = None;
    for _ in 0..10 {
        let reply = post(&routes, CHAT, chat(json!({}))).await;
        if reply.status != 200 {
            refused = Some(reply);
            break;
        }
        // The writer takes what is in the queue at that moment, and waits with it.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused = refused.expect("the queue is full and nothing may be spilled");
    assert_eq!(refused.error(), (503, None, Some("records_full".into())));
    assert!(refused.headers.contains_key("retry-after"));
    let off = Recording { level: Level::Off, ..Recording::default() };
    let unrecorded = router(App { recording: std::sync::Arc::new(off), ..app });
    assert_eq!(post(&unrecorded, CHAT, chat(json!({}))).await.status, 200, "nothing is recorded, so nothing is in the way");
    drop(held);
    store.flush().await;
    assert_eq!(post(&routes, CHAT, chat(json!({}))).await.status, 200, "there is room again");
}
