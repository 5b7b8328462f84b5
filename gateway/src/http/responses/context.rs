//! What a request goes on from.

use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::responses::ResponseRequest;
use crate::responses::id::{self, ItemId};
use hyper::StatusCode;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use tidemill_store::{Chain, MAX_CHAIN, MAX_CHAIN_BYTES, ResponseStatus, Store, StoredResponse};
use uuid::Uuid;

/// Responses whose items are looked up at once; of each, only the items that are wanted are kept.
const LOOKUP: usize = 16;

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
    let Chain { responses: chain, cut } = store.response_chain(owner, last).await.map_err(unavailable)?;
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
        if !cut {
            let message = format!(
                "Previous response with id '{}' not found: '{}' goes on from it, and it was deleted since.",
                id::shown(missing),
                id::shown(last)
            );
            return Err(not_found(message));
        }
        if !truncate {
            let message = format!(
                "Invalid 'previous_response_id': the conversation has more than {MAX_CHAIN} responses or {MAX_CHAIN_BYTES} bytes; set 'truncation' to 'auto' to leave out its beginning."
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

/// The items, with those that are references replaced. A reference is short and what it names may be long: together they name no more
/// than a conversation that is gone on from may hold.
async fn resolved(store: &Store, owner: &str, items: &[Value]) -> Result<Vec<Value>, ApiError> {
    let wanted = |item: &Value| (item["type"] == "item_reference").then(|| item["id"].as_str().unwrap_or_default().to_owned());
    let ids: BTreeSet<String> = items.iter().filter_map(wanted).collect();
    let responses: BTreeSet<Uuid> = ids.iter().filter_map(|id| ItemId::response_of(id)).collect();
    if responses.len() > MAX_CHAIN {
        let message =
            format!("Invalid 'input': it refers to items of more than {MAX_CHAIN} responses; send the items themselves.");
        return Err(ApiError::invalid("input", "invalid_value", message));
    }
    let responses: Vec<Uuid> = responses.into_iter().collect();
    let mut known: BTreeMap<String, Value> = BTreeMap::new();
    let (mut kept, mut bytes) = (0, 0);
    let within = |bytes: usize| {
        if bytes <= MAX_CHAIN_BYTES {
            return Ok(());
        }
        let message = format!("Invalid 'input': the items that it refers to have more than {MAX_CHAIN_BYTES} bytes together.");
        Err(ApiError::invalid("input", "invalid_value", message))
    };
    for part in responses.chunks(LOOKUP) {
        for item in items_of(&store.responses(owner, part).await.map_err(unavailable)?) {
            if let Some(id) = item["id"].as_str().filter(|id| ids.contains(*id) && !known.contains_key(*id)) {
                kept += size(&item);
                within(kept)?;
                known.insert(id.to_owned(), item);
            }
        }
    }
    let mut resolved = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let Some(id) = wanted(item) else {
            resolved.push(item.clone());
            continue;
        };
        let found = known.get(&id).ok_or_else(|| {
            let shown: String = id.chars().take(100).collect();
            let message = format!(
                "Item with id '{shown}' not found. Only items of responses that were stored can be referred to, and only by the key that made them."
            );
            let error = ApiError::client(StatusCode::NOT_FOUND, Some("item_not_found"), message);
            ApiError { param: Some(format!("input.{index}.id")), ..error }
        })?;
        bytes += size(found);
        within(bytes)?;
        resolved.push(found.clone());
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
