//! Reading, cancelling and deleting responses that were stored.

use crate::clock::seconds;
use crate::http::answer::{answer, list};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::generate::enter;
use crate::http::query::parameters;
use crate::http::responses::context::items_of;
use crate::http::stored_chats::owner;
use crate::openai::listing::{Extra, Listing};
use crate::responses::{Ending, id, object};
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde_json::json;
use std::collections::HashSet;
use tidemill_store::{Order, ResponseStatus, StoredResponse};

/// `GET /v1/responses/{id}`
pub async fn get(
    State(app): State<App>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, ApiError> {
    // What can be included is there when it was asked for at first.
    let known = ["stream", "starting_after", "include", "include[]", "include_obfuscation"];
    for parameter in parameters(query.as_deref(), &known)? {
        let wanted = match parameter.name.as_ref() {
            "stream" => parameter.one_of(&[("true", true), ("false", false)])?,
            name => name == "starting_after",
        };
        if wanted {
            let name = parameter.name.into_owned();
            let message = format!("Unsupported parameter: '{name}' is not supported: fetch the response until it has ended.");
            return Err(ApiError::unsupported(name, message));
        }
    }
    Ok(answer(StatusCode::OK, &find(&app, &owner(&Caller::of(&request)), &id).await?.body))
}

/// `DELETE /v1/responses/{id}`: what is still being made is called off.
pub async fn delete(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let owner = owner(&Caller::of(&request));
    let Some(bare) = id::parse(&id) else { return Err(unknown(&id)) };
    if !app.store.delete_response(&owner, bare).await.map_err(unavailable)? {
        return Err(unknown(&id));
    }
    app.background.stop(bare);
    Ok(answer(StatusCode::OK, &json!({"id": id, "object": "response", "deleted": true})))
}

/// `POST /v1/responses/{id}/cancel`: for a response in the background; one that has ended stays as it is.
pub async fn cancel(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let owner = owner(&Caller::of(&request));
    let mut found = find(&app, &owner, &id).await?;
    if found.body["background"] != true {
        let message = "Only a response that was made with 'background' can be cancelled; close the connection of any other.";
        return Err(ApiError::invalid("response_id", "invalid_value", message));
    }
    if found.status == ResponseStatus::InProgress {
        object::end(&mut found.body, &Ending::Cancelled, seconds());
        let cancelled = app.store.end_response(found.id, ResponseStatus::Cancelled, &found.body).await.map_err(unavailable)?;
        app.background.stop(found.id);
        if !cancelled {
            // It ended in the meantime.
            found = find(&app, &owner, &id).await?;
        }
    }
    Ok(answer(StatusCode::OK, &found.body))
}

/// `GET /v1/responses/{id}/input_items`: everything that the response was made from, earlier responses included.
pub async fn input_items(
    State(app): State<App>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, ApiError> {
    let listing = Listing::parse(query.as_deref(), Order::NewestFirst, Extra::Items)?;
    let owner = owner(&Caller::of(&request));
    let Some(bare) = id::parse(&id) else { return Err(unknown(&id)) };
    let mut chain = app.store.response_chain(&owner, bare).await.map_err(unavailable)?.responses;
    let Some(last) = chain.pop() else { return Err(unknown(&id)) };
    let mut items = items_of(&chain);
    items.extend(last.input);
    // An item that was sent or referred to again has the same id: it is shown once, or its second place would lead back to the first.
    let mut seen = HashSet::new();
    items.retain(|item| seen.insert(item["id"].as_str().unwrap_or_default().to_owned()));
    let (page, has_more) = listing.page(items, |item| item["id"].as_str().unwrap_or_default().to_owned())?;
    Ok(list(page, has_more))
}

/// The owner's response; one whose server has gone while it was being made has failed.
async fn find(app: &App, owner: &str, id: &str) -> Result<StoredResponse, ApiError> {
    let Some(bare) = id::parse(id) else { return Err(unknown(id)) };
    let mut found = app.store.response(owner, bare).await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
    if app.store.is_abandoned(&found) {
        let ending =
            Ending::Failed("The server that made this response ended before it was complete; send the request again.".into());
        object::end(&mut found.body, &ending, seconds());
        found.status = ending.status();
        if !app.store.end_response(bare, ending.status(), &found.body).await.map_err(unavailable)? {
            // It ended in the meantime.
            found = app.store.response(owner, bare).await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
        }
    }
    Ok(found)
}

fn unknown(id: &str) -> ApiError {
    let shown: String = id.chars().take(100).collect();
    let message = format!(
        "Response with id '{shown}' not found. Only responses that were stored can be read, and only by the key that made them."
    );
    ApiError { param: Some("response_id".into()), ..ApiError::client(StatusCode::NOT_FOUND, Some("not_found"), message) }
}
