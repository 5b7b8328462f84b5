//! What a request says about its caller and its place: without influence on the tokens.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::{Map, Value};
use tidemill_store::Tier;

/// Longest id of a conversation, in characters.
const MAX_CONVERSATION: usize = 256;

/// Checked and ready to be recorded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// The person: `safety_identifier`, else `user`.
    pub user_key: Option<String>,
    /// `metadata`.
    pub metadata: Map<String, Value>,
    /// `tidemill.conversation`, else `metadata.conversation_id`.
    pub conversation: Option<String>,
    /// `tidemill.compare`: the choices are made to be compared.
    pub compare: bool,
    /// `service_tier`; `None` is whatever the caller has.
    pub tier: Option<Tier>,
}

impl About {
    /// Reads the fields about the caller and the caller's ledger.
    pub fn parse(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let filled = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_owned);
        let user = filled(fields.string("user")?);
        let safety_identifier = filled(fields.string("safety_identifier")?);
        for key in ["prompt_cache_key", "prompt_cache_retention"] {
            fields.string(key)?;
        }
        // Hints for a cache that needs none.
        fields.ignore(&["prompt_cache_options"]);
        let tier = match fields.get("service_tier") {
            // OpenAI's scale tier is bought by contract; here it is whatever the key has.
            Some(field) => match field.one_of(&["auto", "default", "flex", "scale", "priority"])? {
                "default" => Some(Tier::Default),
                "flex" => Some(Tier::Flex),
                "priority" => Some(Tier::Priority),
                _ => None,
            },
            None => None,
        };
        let metadata = fields.get("metadata").map_or(Ok(Map::new()), |field| metadata(&field))?;
        let named = metadata.get("conversation_id").and_then(Value::as_str).filter(|id| !id.is_empty()).map(str::to_owned);
        let mut about = Self { user_key: safety_identifier.or(user), metadata, conversation: named, compare: false, tier };
        if let Some(own) = fields.get("tidemill") {
            let mut own = own.object()?;
            if let Some(conversation) = own.get("conversation") {
                let id = conversation.short_string(MAX_CONVERSATION)?;
                if id.is_empty() {
                    let why = "empty string. Expected at least 1 character.";
                    return Err(conversation.invalid("string_below_min_length", why));
                }
                about.conversation = Some(id.to_owned());
            }
            about.compare = own.bool_or("compare", false)?;
            own.finish()?;
        }
        Ok(about)
    }

    /// Fails when what is made to be compared has nothing beside it.
    pub fn check_choices(&self, n: usize) -> Result<(), ApiError> {
        if self.compare && n < 2 {
            let message = "Invalid 'tidemill.compare': there is nothing to compare with one choice; set 'n' to 2 or more.";
            return Err(ApiError::invalid("tidemill.compare", "invalid_value", message));
        }
        Ok(())
    }
}

/// A client's own pairs: at most 16, keys of at most 64 characters, values of at most 512.
pub fn metadata(metadata: &Field<'_>) -> Result<Map<String, Value>, ApiError> {
    let map = metadata.map()?;
    if map.len() > 16 {
        let why = format!("too many properties. Expected an object with at most 16 properties, but got {} instead.", map.len());
        return Err(metadata.invalid("object_above_max_properties", why));
    }
    for (key, value) in map {
        let entry = metadata.entry(key, value);
        if key.chars().count() > 64 {
            return Err(entry.invalid("string_above_max_length", "key too long. Expected at most 64 characters."));
        }
        entry.short_string(512)?;
    }
    Ok(map.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(body: Value) -> Result<About, ApiError> {
        let mut fields = Fields::root(&body)?;
        let about = About::parse(&mut fields)?;
        fields.finish()?;
        Ok(about)
    }

    #[test]
    fn the_safety_identifier_goes_before_the_user_and_our_field_before_the_metadata() {
        let about = parse(json!({
            "user": "u", "safety_identifier": "s", "metadata": {"conversation_id": "m", "k": "v"},
            "tidemill": {"conversation": "c", "compare": true},
        }))
        .unwrap();
        assert_eq!((about.user_key.as_deref(), about.conversation.as_deref(), about.compare), (Some("s"), Some("c"), true));
        assert_eq!(about.metadata["k"], "v");
        let about = parse(json!({"user": "u", "safety_identifier": "", "metadata": {"conversation_id": "m"}})).unwrap();
        assert_eq!((about.user_key.as_deref(), about.conversation.as_deref(), about.compare), (Some("u"), Some("m"), false));
        assert_eq!(parse(json!({})).unwrap(), About::default());
    }

    #[test]
    fn each_rejection_names_its_path() {
        for (body, param) in [
            (json!({"tidemill": {"conversation": ""}}), "tidemill.conversation"),
            (json!({"tidemill": {"conversation": "x".repeat(257)}}), "tidemill.conversation"),
            (json!({"tidemill": {"compare": 1}}), "tidemill.compare"),
            (json!({"tidemill": {"colour": 1}}), "tidemill.colour"),
            (json!({"tidemill": 1}), "tidemill"),
            (json!({"metadata": {"a": 1}}), "metadata.a"),
            (json!({"user": 1}), "user"),
        ] {
            assert_eq!(parse(body.clone()).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }
}
