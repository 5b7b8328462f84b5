//! `GET /v1/audit`: who did what to what. Nothing here changes a row.

use crate::http::answer::list as list_page;
use crate::http::app::App;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::query::parameters;
use axum::Router;
use axum::extract::{RawQuery, State};
use axum::response::Response;
use axum::routing::get;
use serde_json::{Value, json};
use tidemill_store::{Audit, AuditEntry, AuditFilter, MAX_PAGE, Order};

const KNOWN: [&str; 8] = ["since", "until", "by", "what", "on", "after", "limit", "order"];

/// The route.
pub fn routes() -> Router<App> {
    Router::new().route("/v1/audit", get(list))
}

async fn list(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let filter = filter(query.as_deref())?;
    let page = Audit::new(app.store.database()).list(&filter).await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(shown).collect(), page.has_more))
}

fn filter(query: Option<&str>) -> Result<AuditFilter, ApiError> {
    let mut filter = AuditFilter::default();
    for parameter in parameters(query, &KNOWN)? {
        let text = || Some(parameter.value.clone().into_owned());
        match parameter.name.as_ref() {
            "since" => filter.since = Some(parameter.time()?),
            "until" => filter.until = Some(parameter.time()?),
            "by" => filter.by = text(),
            "what" => filter.what = text(),
            "on" => filter.on = text(),
            "after" => filter.after = Some(parameter.parse("an id")?),
            "limit" => filter.limit = Some(parameter.number(1..=MAX_PAGE)?),
            _ => filter.order = parameter.one_of(&[("asc", Order::OldestFirst), ("desc", Order::NewestFirst)])?,
        }
    }
    Ok(filter)
}

/// An act as the API shows it.
pub fn shown(entry: &AuditEntry) -> Value {
    json!({
        "id": entry.id,
        "object": "audit.entry",
        "created_at": entry.at.div_euclid(1_000_000),
        "actor": entry.actor.name,
        "key_id": entry.actor.key,
        "action": entry.action,
        "subject": entry.subject,
        "detail": entry.detail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_and_a_wrong_one_is_named() {
        let found = filter(Some("since=1.5&by=key%20ann&what=key&on=x&limit=7&order=asc")).unwrap();
        assert_eq!((found.since, found.by.as_deref(), found.what.as_deref()), (Some(1_500_000), Some("key ann"), Some("key")));
        assert_eq!((found.on.as_deref(), found.limit, found.order), (Some("x"), Some(7), Order::OldestFirst));
        for (query, param) in [("since=yesterday", "since"), ("after=x", "after"), ("limit=0", "limit"), ("who=ann", "who")] {
            assert_eq!(filter(Some(query)).unwrap_err().param.as_deref(), Some(param), "{query}");
        }
    }
}
