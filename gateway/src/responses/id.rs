//! Ids of responses and of the items in them.
//!
//! A response is `resp_` and its UUID. An item's id holds the UUID of the response that it came with, so that a reference to an item
//! finds it without an index.

use std::fmt;
use uuid::Uuid;

/// Before a response's UUID.
pub const PREFIX: &str = "resp_";

/// The id of a response as the API shows it.
pub fn shown(id: Uuid) -> String {
    format!("{PREFIX}{}", id.simple())
}

/// The UUID of a response.
pub fn parse(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text.strip_prefix(PREFIX)?).ok()
}

/// On which side of a response an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It was sent.
    Input,
    /// The model made it.
    Output,
}

/// Where an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ItemId {
    /// The response that it came with.
    pub response: Uuid,
    /// Sent or made.
    pub side: Side,
    /// Its place there.
    pub index: usize,
}

impl ItemId {
    /// With the prefix of its type, such as `msg`.
    pub fn shown(self, item_type: &str) -> String {
        let prefix = match item_type {
            "function_call" => "fc",
            "function_call_output" => "fco",
            "reasoning" => "rs",
            _ => "msg",
        };
        format!("{prefix}_{self}")
    }

    /// The response of an item whose id is one of ours.
    pub fn response_of(text: &str) -> Option<Uuid> {
        let (_, rest) = text.split_once('_')?;
        let (id, place) = rest.split_at_checked(32)?;
        if !place.starts_with(['i', 'o']) {
            return None;
        }
        Uuid::try_parse(id).ok()
    }
}

impl fmt::Display for ItemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Input => 'i',
            Side::Output => 'o',
        };
        write!(f, "{}{side}{:04x}", self.response.simple(), self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_items_id_names_its_response() {
        let response = Uuid::now_v7();
        assert_eq!(parse(&shown(response)), Some(response));
        assert_eq!(parse(&response.to_string()), None);
        let id = ItemId { response, side: Side::Output, index: 70_000 }.shown("function_call");
        assert!(id.starts_with("fc_"), "{id}");
        assert_eq!(ItemId::response_of(&id), Some(response));
        for foreign in ["msg_1", "", "msg_é", "msg_67ccd2bf17f0819081ff3bb2cf6508e60bb6a6b452d3795b", "rs_"] {
            assert_eq!(ItemId::response_of(foreign), None, "{foreign}");
        }
    }
}
