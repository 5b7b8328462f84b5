//! The query string of OpenAI's lists: `after`, `limit`, `order`, and what else a list takes.

use crate::http::error::ApiError;
use crate::http::query::parameters;
use tidemill_store::Order;
use uuid::Uuid;

/// Most items of a page.
const MAX_LIMIT: usize = 100;

/// Most `metadata[key]` of a list: as many as an object can have.
const MAX_PAIRS: usize = 16;

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
    /// `metadata`, and no `order`: fine-tuning jobs.
    Jobs,
    /// Nothing, and no `order`: batches.
    Batches,
}

impl Listing {
    /// Checks the parameters.
    pub fn parse(query: Option<&str>, order: Order, extra: Extra) -> Result<Self, ApiError> {
        let mut listing = Self { after: None, limit: 20, order, model: None, metadata: Vec::new() };
        let names = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        let metadata: Vec<_> = names.map(|(name, _)| name).filter(|name| metadata_key(name).is_some()).collect();
        if metadata.len() > MAX_PAIRS {
            return Err(invalid("metadata", "at most 16 pairs can be asked for, as many as an object can have"));
        }
        let mut known = vec!["after", "limit"];
        let pairs = metadata.iter().map(|name| name.as_ref());
        match extra {
            Extra::Chats => known.extend(["order", "model"].into_iter().chain(pairs)),
            Extra::Messages => known.push("order"),
            // What can be included with an item is there anyway.
            Extra::Items => known.extend(["order", "include", "include[]"]),
            Extra::Jobs => known.extend(pairs),
            Extra::Batches => {}
        }
        for parameter in parameters(query, &known)? {
            match parameter.name.as_ref() {
                "after" => listing.after = Some(parameter.value.into_owned()),
                "limit" => listing.limit = parameter.number(1..=MAX_LIMIT)?,
                "order" => listing.order = parameter.one_of(&[("asc", Order::OldestFirst), ("desc", Order::NewestFirst)])?,
                "model" => listing.model = Some(parameter.value.into_owned()),
                name => {
                    if let Some(key) = metadata_key(name) {
                        listing.metadata.push((key.to_owned(), parameter.value.into_owned()));
                    }
                }
            }
        }
        Ok(listing)
    }

    /// The id behind `prefix` that the page comes after, if one is said.
    pub fn after_id(&self, prefix: &str) -> Result<Option<Uuid>, ApiError> {
        let id = |text: &String| {
            let id = text.strip_prefix(prefix).and_then(|id| Uuid::try_parse(id).ok());
            id.ok_or_else(|| invalid("after", "expected the id of an object of this list"))
        };
        self.after.as_ref().map(id).transpose()
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

/// The key in `metadata[key]`.
fn metadata_key(name: &str) -> Option<&str> {
    name.strip_prefix("metadata[")?.strip_suffix(']')
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
        let chats =
            Listing::parse(Some("after=x&limit=7&order=desc&model=m&metadata%5Ba%20b%5D=c"), Order::OldestFirst, Extra::Chats);
        let expected = Listing {
            after: Some("x".into()),
            limit: 7,
            order: Order::NewestFirst,
            model: Some("m".into()),
            metadata: vec![("a b".into(), "c".into())],
        };
        assert_eq!(chats.unwrap(), expected);
        assert!(Listing::parse(Some("include[]=reasoning.encrypted_content"), Order::NewestFirst, Extra::Items).is_ok());
        for (query, extra, param) in [
            ("limit=0", Extra::Chats, "limit"),
            ("limit=101", Extra::Items, "limit"),
            ("order=up", Extra::Messages, "order"),
            ("model=m", Extra::Messages, "model"),
            ("metadata=m", Extra::Chats, "metadata"),
            ("include=x", Extra::Chats, "include"),
            (&"metadata[a]=b&".repeat(17), Extra::Chats, "metadata"),
        ] {
            assert_eq!(
                Listing::parse(Some(query), Order::OldestFirst, extra).unwrap_err().param.as_deref(),
                Some(param),
                "{query}"
            );
        }
    }

    #[test]
    fn what_a_page_comes_after_is_an_id_of_its_list() {
        let after = |query: &str| Listing::parse(Some(query), Order::NewestFirst, Extra::Batches).unwrap().after_id("batch_");
        let id = Uuid::from_u128(7);
        assert_eq!((after("limit=3").unwrap(), after(&format!("after=batch_{id}")).unwrap()), (None, Some(id)));
        for wrong in ["after=batch_0", &format!("after={id}")] {
            assert_eq!(after(wrong).unwrap_err().param.as_deref(), Some("after"), "{wrong}");
        }
        assert!(Listing::parse(Some("order=asc"), Order::NewestFirst, Extra::Batches).is_err());
    }

    #[test]
    fn pages_follow_each_other_from_either_end() {
        let page = |query: &str| {
            let listing = Listing::parse(Some(query), Order::OldestFirst, Extra::Messages).unwrap();
            listing.page(vec![1, 2, 3, 4, 5], |n| n.to_string())
        };
        assert_eq!(page("limit=2").unwrap(), (vec![1, 2], true));
        assert_eq!(page("limit=2&after=2").unwrap(), (vec![3, 4], true));
        assert_eq!(page("limit=2&after=4").unwrap(), (vec![5], false));
        assert_eq!(page("order=desc&limit=2&after=2").unwrap(), (vec![1], false));
        assert_eq!(page("after=9").unwrap_err().param.as_deref(), Some("after"));
    }
}
