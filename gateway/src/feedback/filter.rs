//! The query string of a list.

use crate::feedback::submission::bare;
use crate::http::error::ApiError;
use tidemill_store::records::Kind;
use tidemill_store::{FeedbackFilter, MAX_PAGE, Order};
use uuid::Uuid;

const KNOWN: &str = "target, kind, metric, author, source, tag, task_id, since, until, withdrawn, after, limit, order";

/// Checks the parameters; an unknown one is refused, so that a mistyped filter does not list everything.
pub fn parse(query: &str) -> Result<FeedbackFilter, ApiError> {
    let mut filter = FeedbackFilter::default();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        let text = || Some(value.clone().into_owned());
        match key.as_ref() {
            // Records hold bare ids.
            "target" => {
                filter.target = Some(bare(&value).map_or_else(|| value.clone().into_owned(), |id| id.to_string()));
            }
            "kind" => {
                let kinds = Kind::ALL.map(Kind::as_str).join(", ");
                filter.kind = Some(Kind::parse(&value).ok_or_else(|| invalid("kind", &format!("expected one of {kinds}")))?);
            }
            "metric" => filter.metric = text(),
            "author" => filter.author = text(),
            "source" => filter.source = text(),
            "tag" => filter.tag = text(),
            "task_id" => filter.task_id = Some(uuid("task_id", &value)?),
            "since" => filter.since = Some(time("since", &value)?),
            "until" => filter.until = Some(time("until", &value)?),
            "withdrawn" => {
                let withdrawn = value.parse().map_err(|_| invalid("withdrawn", "expected true or false"))?;
                filter.withdrawn = Some(withdrawn);
            }
            "after" => filter.after = Some(uuid("after", &value)?),
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=MAX_PAGE).contains(limit));
                let expected = || invalid("limit", &format!("expected a whole number from 1 to {MAX_PAGE}"));
                filter.limit = Some(limit.ok_or_else(expected)?);
            }
            "order" => {
                filter.order = match value.as_ref() {
                    "asc" => Order::OldestFirst,
                    "desc" => Order::NewestFirst,
                    _ => return Err(invalid("order", "expected asc or desc")),
                };
            }
            other => {
                let shown: String = other.chars().take(100).collect();
                let message = format!("Unknown parameter: '{shown}'. The filters are {KNOWN}.");
                return Err(ApiError::invalid(shown, "unknown_parameter", message));
            }
        }
    }
    Ok(filter)
}

fn invalid(param: &'static str, why: &str) -> ApiError {
    ApiError::invalid(param, "invalid_value", format!("Invalid '{param}': {why}."))
}

fn uuid(param: &'static str, text: &str) -> Result<Uuid, ApiError> {
    Uuid::try_parse(text).map_err(|_| invalid(param, "expected an id"))
}

/// Seconds since 1970, to microseconds.
fn time(param: &'static str, text: &str) -> Result<i64, ApiError> {
    let seconds: Option<f64> = text.parse().ok().filter(|seconds| (0.0..=1e11).contains(seconds));
    // Whole microseconds far below 2⁶³.
    seconds.map(|seconds| (seconds * 1e6).round() as i64).ok_or_else(|| invalid(param, "expected a time in seconds since 1970"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read() {
        let id = Uuid::now_v7();
        let filter = parse(&format!(
            "target=chatcmpl-{id}&kind=thumb&author=a%20b&tag=x&since=1.5&until=2&withdrawn=false&after={id}&limit=7&order=asc"
        ))
        .unwrap();
        assert_eq!(filter.target, Some(id.to_string()));
        assert_eq!((filter.kind, filter.author.as_deref(), filter.limit), (Some(Kind::Thumb), Some("a b"), Some(7)));
        assert_eq!((filter.since, filter.until, filter.withdrawn), (Some(1_500_000), Some(2_000_000), Some(false)));
        assert_eq!((filter.after, filter.order), (Some(id), Order::OldestFirst));
    }

    #[test]
    fn a_wrong_filter_is_named() {
        for (query, param) in [
            ("kind=smile", "kind"),
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("after=x", "after"),
            ("since=yesterday", "since"),
            ("withdrawn=maybe", "withdrawn"),
            ("order=up", "order"),
            ("colour=red", "colour"),
        ] {
            assert_eq!(parse(query).unwrap_err().param.as_deref(), Some(param), "{query}");
        }
    }
}
