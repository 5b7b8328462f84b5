//! The query string of OpenAI's lists: `after`, `limit`, `order`, and what else a list takes.

use crate::http::error::ApiError;
use tidemill_store::Order;

/// Most items of a page.
const MAX_LIMIT: usize = 100;

/// Which part of a list is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The last id of the page before, as it was shown.
    pub after: Option<String>,
    /// Most items.
    pub limit: usize,
    /// Which end first.
    pub order: Order,
    /// `model`, where the list takes it.
    pub model: Option<String>,
    /// `metadata[key]=value`, where the list takes it.
    pub metadata: Vec<(String, String)>,
}

/// What one list takes beyond `after`, `limit` and `order`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// `model` and `metadata`: stored chats.
    Chats,
    /// Nothing: the messages of a chat.
    Messages,
    /// `include`: the input items of a response.
    Items,
}

impl Listing {
    /// Checks the parameters; an unknown one is refused, so that a mistyped filter does not list everything.
    pub fn parse(query: &str, order: Order, extra: Extra) -> Result<Self, ApiError> {
        let mut listing = Self { after: None, limit: 20, order, model: None, metadata: Vec::new() };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let name = key.strip_prefix("metadata[").and_then(|rest| rest.strip_suffix(']'));
            match (key.as_ref(), extra, name) {
                ("after", ..) => listing.after = Some(value.into_owned()),
                ("limit", ..) => {
                    let limit = value.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
                    let expected = || invalid("limit", &format!("expected a whole number from 1 to {MAX_LIMIT}"));
                    listing.limit = limit.ok_or_else(expected)?;
                }
                ("order", ..) => {
                    listing.order = match value.as_ref() {
                        "asc" => Order::OldestFirst,
                        "desc" => Order::NewestFirst,
                        _ => return Err(invalid("order", "expected asc or desc")),
                    };
                }
                ("model", Extra::Chats, _) => listing.model = Some(value.into_owned()),
                (_, Extra::Chats, Some(name)) => listing.metadata.push((name.to_owned(), value.into_owned())),
                // What can be included with an item is there anyway.
                ("include" | "include[]", Extra::Items, _) => {}
                _ => {
                    let shown: String = key.chars().take(100).collect();
                    let message = format!("Unknown parameter: '{shown}'.");
                    return Err(ApiError::invalid(shown, "unknown_parameter", message));
                }
            }
        }
        Ok(listing)
    }

    /// The page of `items`, which are all there are, the oldest first; and whether there are more. `id` is an item's, as it is shown.
    pub fn page<T>(&self, mut items: Vec<T>, id: impl Fn(&T) -> String) -> Result<(Vec<T>, bool), ApiError> {
        if self.order == Order::NewestFirst {
            items.reverse();
        }
        if let Some(after) = &self.after {
            let at = items.iter().position(|item| id(item) == *after);
            let at = at.ok_or_else(|| invalid("after", "expected the id of an item of this list"))?;
            items.drain(..=at);
        }
        let has_more = items.len() > self.limit;
        items.truncate(self.limit);
        Ok((items, has_more))
    }
}

/// A 400 about a parameter of the query.
pub fn invalid(param: &'static str, why: &str) -> ApiError {
    ApiError::invalid(param, "invalid_value", format!("Invalid '{param}': {why}."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_list_takes_its_own_parameters() {
        let chats = Listing::parse("after=x&limit=7&order=desc&model=m&metadata%5Ba%20b%5D=c", Order::OldestFirst, Extra::Chats);
        let expected = Listing {
            after: Some("x".into()),
            limit: 7,
            order: Order::NewestFirst,
            model: Some("m".into()),
            metadata: vec![("a b".into(), "c".into())],
        };
        assert_eq!(chats.unwrap(), expected);
        assert!(Listing::parse("include[]=reasoning.encrypted_content", Order::NewestFirst, Extra::Items).is_ok());
        for (query, extra, param) in [
            ("limit=0", Extra::Chats, "limit"),
            ("limit=101", Extra::Items, "limit"),
            ("order=up", Extra::Messages, "order"),
            ("model=m", Extra::Messages, "model"),
            ("metadata=m", Extra::Chats, "metadata"),
            ("include=x", Extra::Chats, "include"),
        ] {
            assert_eq!(Listing::parse(query, Order::OldestFirst, extra).unwrap_err().param.as_deref(), Some(param), "{query}");
        }
    }

    #[test]
    fn pages_follow_each_other_from_either_end() {
        let page = |query: &str| {
            let listing = Listing::parse(query, Order::OldestFirst, Extra::Messages).unwrap();
            listing.page(vec![1, 2, 3, 4, 5], |n| n.to_string())
        };
        assert_eq!(page("limit=2").unwrap(), (vec![1, 2], true));
        assert_eq!(page("limit=2&after=2").unwrap(), (vec![3, 4], true));
        assert_eq!(page("limit=2&after=4").unwrap(), (vec![5], false));
        assert_eq!(page("order=desc&limit=2&after=2").unwrap(), (vec![1], false));
        assert_eq!(page("after=9").unwrap_err().param.as_deref(), Some("after"));
    }
}
