//! What a request goes on from.

use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::responses::ResponseRequest;
use crate::responses::id::{self, ItemId};
use hyper::StatusCode;
use serde_json::Value;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use tidemill_store::{MAX_CHAIN, ResponseStatus, Store, StoredResponse};
use uuid::Uuid;

/// The items of a whole conversation.
pub struct Context {
    /// From its beginning to what is new.
    pub items: Vec<Value>,
    /// What is new, with references replaced by what they name.
    pub new: Vec<Value>,
    /// About how long all of it is.
    pub bytes: usize,
}

impl Context {
    /// Reads what came before out of the store, as far as it is the owner's.
    pub async fn of(store: &Store, owner: &str, request: &ResponseRequest) -> Result<Self, ApiError> {
        let mut items = Vec::new();
        if let Some(previous) = request.previous {
            items = items_of(&chain(store, owner, previous, request.truncate).await?);
        }
        let new = resolved(store, owner, &request.input).await?;
        items.extend(new.iter().cloned());
        if items.is_empty() {
            let why = "Invalid 'input': empty array. Expected an array with minimum length 1, but got an empty array instead.";
            return Err(ApiError::invalid("input", "empty_array", why));
        }
        let bytes = items.iter().map(size).sum();
        Ok(Self { items, new, bytes })
    }
}

/// The response of this id and all before it, the earliest first.
async fn chain(store: &Store, owner: &str, last: Uuid, truncate: bool) -> Result<Vec<StoredResponse>, ApiError> {
    let chain = store.response_chain(owner, last).await.map_err(unavailable)?;
    let not_found = |message: String| ApiError::invalid("previous_response_id", "previous_response_not_found", message);
    let (Some(first), Some(end)) = (chain.first(), chain.last()) else {
        let message = format!(
            "Previous response with id '{}' not found. Only responses that were stored can be gone on from, and only by the key that made them.",
            id::shown(last)
        );
        return Err(not_found(message));
    };
    if end.status == ResponseStatus::InProgress && !store.is_abandoned(end) {
        let message =
            format!("Invalid 'previous_response_id': '{}' is still being made; wait until it has ended.", id::shown(last));
        return Err(ApiError::invalid("previous_response_id", "response_in_progress", message));
    }
    if let Some(missing) = first.previous {
        if chain.len() < MAX_CHAIN {
            let message = format!(
                "Previous response with id '{}' not found: '{}' goes on from it, and it was deleted since.",
                id::shown(missing),
                id::shown(last)
            );
            return Err(not_found(message));
        }
        if !truncate {
            let message = format!(
                "Invalid 'previous_response_id': the conversation has more than {MAX_CHAIN} responses; set 'truncation' to 'auto' to leave out its beginning."
            );
            return Err(ApiError::invalid("previous_response_id", "invalid_value", message));
        }
    }
    Ok(chain)
}

/// The items of responses, sent and made, in order.
pub fn items_of(chain: &[StoredResponse]) -> Vec<Value> {
    let of = |response: &StoredResponse| {
        let output = response.body["output"].as_array().cloned().unwrap_or_default();
        response.input.iter().cloned().chain(output).collect::<Vec<_>>()
    };
    chain.iter().flat_map(of).collect()
}

/// The items, with those that are references replaced.
async fn resolved(store: &Store, owner: &str, items: &[Value]) -> Result<Vec<Value>, ApiError> {
    let mut known: HashMap<Uuid, Vec<Value>> = HashMap::new();
    let mut resolved = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        if item["type"] != "item_reference" {
            resolved.push(item.clone());
            continue;
        }
        let wanted = item["id"].as_str().unwrap_or_default();
        let not_found = || {
            let shown: String = wanted.chars().take(100).collect();
            let message = format!(
                "Item with id '{shown}' not found. Only items of responses that were stored can be referred to, and only by the key that made them."
            );
            let error = ApiError::client(StatusCode::NOT_FOUND, Some("item_not_found"), message);
            ApiError { param: Some(format!("input.{index}.id")), ..error }
        };
        let response = ItemId::response_of(wanted).ok_or_else(not_found)?;
        let there = match known.entry(response) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let found = store.response(owner, response).await.map_err(unavailable)?;
                unknown.insert(found.map(|found| items_of(&[found])).unwrap_or_default())
            }
        };
        let found = there.iter().find(|item| item["id"] == wanted);
        resolved.push(found.ok_or_else(not_found)?.clone());
    }
    Ok(resolved)
}

/// The texts of an item are what takes time; each is in one of these.
fn size(item: &Value) -> usize {
    match item {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(fields) => fields.values().map(size).sum(),
        _ => 0,
    }
}
