//! The query string of a list.

use super::submission::bare;
use crate::http::error::ApiError;
use crate::http::query::parameters;
use tidemill_store::records::Kind;
use tidemill_store::{FeedbackFilter, MAX_PAGE, Order};

const KNOWN: [&str; 13] =
    ["target", "kind", "metric", "author", "source", "tag", "task_id", "since", "until", "withdrawn", "after", "limit", "order"];

/// Checks the parameters.
pub fn parse(query: Option<&str>) -> Result<FeedbackFilter, ApiError> {
    let mut filter = FeedbackFilter::default();
    for parameter in parameters(query, &KNOWN)? {
        let text = || Some(parameter.value.clone().into_owned());
        match parameter.name.as_ref() {
            // Records hold bare ids.
            "target" => filter.target = bare(&parameter.value).map(|id| id.to_string()).or_else(text),
            "kind" => filter.kind = Some(parameter.one_of(&Kind::ALL.map(|kind| (kind.as_str(), kind)))?),
            "metric" => filter.metric = text(),
            "author" => filter.author = text(),
            "source" => filter.source = text(),
            "tag" => filter.tag = text(),
            "task_id" => filter.task_id = Some(parameter.parse("an id")?),
            "since" => filter.since = Some(parameter.time()?),
            "until" => filter.until = Some(parameter.time()?),
            "withdrawn" => filter.withdrawn = Some(parameter.one_of(&[("true", true), ("false", false)])?),
            "after" => filter.after = Some(parameter.parse("an id")?),
            "limit" => filter.limit = Some(parameter.number(1..=MAX_PAGE)?),
            _ => filter.order = parameter.one_of(&[("asc", Order::OldestFirst), ("desc", Order::NewestFirst)])?,
        }
    }
    Ok(filter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn filters_are_read() {
        let id = Uuid::now_v7();
        let filter = parse(Some(&format!(
            "target=chatcmpl-{id}&kind=thumb&author=a%20b&tag=x&since=1.5&until=2&withdrawn=false&after={id}&limit=7&order=asc"
        )))
        .unwrap();
        assert_eq!(filter.target, Some(id.to_string()));
        assert_eq!((filter.kind, filter.author.as_deref(), filter.limit), (Some(Kind::Thumb), Some("a b"), Some(7)));
        assert_eq!((filter.since, filter.until, filter.withdrawn), (Some(1_500_000), Some(2_000_000), Some(false)));
        assert_eq!((filter.after, filter.order), (Some(id), Order::OldestFirst));
    }

    #[test]
    fn a_target_is_looked_for_as_records_hold_it() {
        let id = Uuid::now_v7();
        let target = |text: &str| parse(Some(&format!("target={text}"))).unwrap().target.unwrap();
        assert_eq!(target(&id.to_string().to_uppercase()), id.to_string());
        assert_eq!(target("cmpl-of-monday"), "cmpl-of-monday", "a conversation may be called so");
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
            assert_eq!(parse(Some(query)).unwrap_err().param.as_deref(), Some(param), "{query}");
        }
    }
}
