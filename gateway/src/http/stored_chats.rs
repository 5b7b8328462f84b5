//! Chat answers that were asked to be kept: `store: true`, and reading, changing and deleting them afterwards.

use crate::clock::now;
use crate::http::answer::{answer, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::chat::ChatRun;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::generate::{Asked, enter, head};
use crate::openai::about::About;
use crate::openai::chat_answer;
use crate::openai::chat_output::ChatCollected;
use crate::openai::chat_stream::ChatReport;
use crate::openai::fields::Fields;
use crate::openai::listing::{Extra, Listing, invalid};
use crate::openai::wire::AnswerHead;
use crate::recording;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde_json::{Map, Value, json};
use tidemill_engine::Tokenizer;
use tidemill_store::{ChatFilter, Order, Store, StoreError, StoredChat};
use uuid::Uuid;

const PREFIX: &str = "chatcmpl-";

/// What is the caller's own: everything stored has an owner, and nobody else reads it.
pub fn owner(caller: &Caller) -> String {
    caller.key_id().unwrap_or_default()
}

/// Refuses to begin an answer that could not be kept.
pub fn can_store(store: &Store) -> Result<(), ApiError> {
    if store.is_away() { Err(unavailable(StoreError::Away)) } else { Ok(()) }
}

/// An answer that will be kept when it is whole.
pub struct KeptChat {
    store: Store,
    chat: StoredChat,
    head: AnswerHead,
    report: ChatReport,
    tokenizer: Tokenizer,
    /// What is shown of the request.
    request: Map<String, Value>,
}

impl KeptChat {
    /// Of a request `body` that is ready to run.
    pub fn new(asked: &Asked, body: &Value, about: &About, run: &ChatRun, report: &ChatReport) -> Result<Self, ApiError> {
        can_store(&asked.app.store)?;
        let sent = |key: &str| body.get(key).cloned().unwrap_or_default();
        let params = recording::to_json(run.sampling());
        let mut request = Map::new();
        for (key, default) in [
            ("seed", Value::Null),
            ("temperature", json!(1.0)),
            ("top_p", json!(1.0)),
            ("presence_penalty", json!(0.0)),
            ("frequency_penalty", json!(0.0)),
        ] {
            request.insert(key.into(), params.get(key).cloned().unwrap_or(default));
        }
        for key in ["tools", "tool_choice", "response_format"] {
            request.insert(key.into(), sent(key));
        }
        request.insert("input_user".into(), sent("user"));
        Ok(Self {
            store: asked.app.store.clone(),
            chat: StoredChat {
                id: run.id,
                created: now(),
                owner: owner(&asked.caller),
                user_key: about.user_key.clone(),
                model: run.model.name().to_owned(),
                metadata: about.metadata.clone(),
                messages: sent("messages"),
                body: Value::Null,
            },
            head: AnswerHead { service_tier: run.tier, ..head(&run.model, run.id, "chatcmpl", "chat.completion") },
            report: report.clone(),
            tokenizer: run.model.tokenizer().clone(),
            request,
        })
    }

    /// Keeps the answer, as a request that does not stream gets it.
    pub async fn save(self, collected: ChatCollected) -> Result<(), ApiError> {
        let body = chat_answer::to_json(&self.head, &self.report, &self.tokenizer, &collected);
        self.save_body(&body).await
    }

    /// Keeps the answer that has this body.
    pub async fn save_body(mut self, body: &[u8]) -> Result<(), ApiError> {
        let broken = |_| ApiError::fault("The answer could not be stored because of an internal error.");
        let mut body: Map<String, Value> = serde_json::from_slice(body).map_err(broken)?;
        body.extend(self.request);
        self.chat.body = Value::Object(body);
        self.store.save_chat(&self.chat).await.map_err(unavailable)
    }
}

/// `GET /v1/chat/completions`
pub async fn list(State(app): State<App>, RawQuery(query): RawQuery, request: Request) -> Result<Response, ApiError> {
    let listing = Listing::parse(query.as_deref(), Order::OldestFirst, Extra::Chats)?;
    let after = match &listing.after {
        None => None,
        Some(id) => Some(bare(id).ok_or_else(|| invalid("after", "expected the id of a chat completion"))?),
    };
    let filter = ChatFilter {
        owner: owner(&Caller::of(&request)),
        model: listing.model,
        metadata: listing.metadata,
        after,
        limit: Some(listing.limit),
        order: listing.order,
    };
    let page = app.store.list_chats(&filter).await.map_err(unavailable)?;
    Ok(list_page(page.items.into_iter().map(shown).collect(), page.has_more))
}

/// `GET /v1/chat/completions/{id}`
pub async fn get(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let owner = owner(&Caller::of(&request));
    Ok(answer(StatusCode::OK, &shown(find(&app, &owner, &id).await?)))
}

/// `GET /v1/chat/completions/{id}/messages`: what was asked, without the answer.
pub async fn messages(
    State(app): State<App>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, ApiError> {
    let listing = Listing::parse(query.as_deref(), Order::OldestFirst, Extra::Messages)?;
    let owner = owner(&Caller::of(&request));
    let chat = find(&app, &owner, &id).await?;
    let sent = chat.messages.as_array().cloned().unwrap_or_default();
    let all = sent.iter().enumerate().map(|(index, message)| shown_message(&format!("{PREFIX}{}-{index}", chat.id), message));
    let (page, has_more) = listing.page(all.collect(), id_of)?;
    Ok(list_page(page, has_more))
}

/// `POST /v1/chat/completions/{id}`: the metadata, the only thing that can be changed.
pub async fn update(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let owner = owner(&Caller::of(&request));
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    if body.get("metadata").is_none() {
        fields.require("metadata")?;
    }
    let metadata = fields.get("metadata").map_or(Ok(Map::new()), |field| crate::openai::about::metadata(&field))?;
    fields.finish()?;
    let Some(bare) = bare(&id) else { return Err(unknown(&id)) };
    let changed = app.store.set_chat_metadata(&owner, bare, &metadata).await.map_err(unavailable)?;
    Ok(answer(StatusCode::OK, &shown(changed.ok_or_else(|| unknown(&id))?)))
}

/// `DELETE /v1/chat/completions/{id}`
pub async fn delete(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let owner = owner(&Caller::of(&request));
    let Some(bare) = bare(&id) else { return Err(unknown(&id)) };
    if !app.store.delete_chat(&owner, bare).await.map_err(unavailable)? {
        return Err(unknown(&id));
    }
    Ok(answer(StatusCode::OK, &json!({"object": "chat.completion.deleted", "id": id, "deleted": true})))
}

async fn find(app: &App, owner: &str, id: &str) -> Result<StoredChat, ApiError> {
    let Some(bare) = bare(id) else { return Err(unknown(id)) };
    let found = app.store.chat(owner, bare).await.map_err(unavailable)?;
    found.ok_or_else(|| unknown(id))
}

fn bare(id: &str) -> Option<Uuid> {
    Uuid::try_parse(id.strip_prefix(PREFIX)?).ok()
}

fn unknown(id: &str) -> ApiError {
    let shown: String = id.chars().take(100).collect();
    let message = format!(
        "No stored chat completion `{shown}` is known to this key. GET /v1/chat/completions lists what is; only answers with 'store' are kept."
    );
    ApiError { param: Some("completion_id".into()), ..ApiError::client(StatusCode::NOT_FOUND, Some("not_found"), message) }
}

/// The chat as the API shows it.
fn shown(chat: StoredChat) -> Value {
    let mut body = chat.body;
    if let Some(body) = body.as_object_mut() {
        body.insert("metadata".into(), Value::Object(chat.metadata));
    }
    body
}

/// A message as the API shows it: text as a string, and the parts that it was sent in.
fn shown_message(id: &str, message: &Value) -> Value {
    let mut shown = Map::from_iter([("id".to_owned(), id.into())]);
    let sent = message.as_object().cloned().unwrap_or_default();
    let parts = sent.get("content").filter(|content| content.is_array()).cloned();
    shown.extend(sent);
    if let Some(parts) = &parts {
        let texts = parts.as_array().into_iter().flatten().filter_map(|part| part.get("text").or(part.get("refusal"))?.as_str());
        shown.insert("content".into(), texts.collect::<Vec<_>>().join("\n").into());
    }
    for key in ["content", "name"] {
        shown.entry(key).or_insert(Value::Null);
    }
    shown.insert("content_parts".into(), parts.unwrap_or_default());
    Value::Object(shown)
}

fn id_of(item: &Value) -> String {
    item["id"].as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_shows_its_text_and_its_parts() {
        assert_eq!(
            shown_message("c-0", &json!({"role": "user", "content": "hi"})),
            json!({"id": "c-0", "role": "user", "content": "hi", "name": null, "content_parts": null})
        );
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let shown = shown_message("c-1", &json!({"role": "user", "name": "n", "content": parts}));
        assert_eq!((&shown["content"], &shown["content_parts"], &shown["name"]), (&json!("a\nb"), &parts, &json!("n")));
        let shown = shown_message("c-2", &json!({"role": "assistant", "tool_calls": []}));
        assert_eq!((&shown["content"], &shown["tool_calls"]), (&Value::Null, &json!([])));
    }
}
