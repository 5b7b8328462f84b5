//! One keyword at a time: its value's type, its bounds, its place in the rewritten schema.

use super::{MOST_PROPERTIES, Walk};
use crate::grammar::GrammarError;
use serde_json::{Map, Value, json};

const TYPES: [&str; 7] = ["null", "boolean", "number", "integer", "string", "array", "object"];

/// Formats of the standard that become patterns.
const FORMATS: [&str; 10] = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];
/// Formats of the standard for which there is no pattern here. A format that the standard does not define says nothing of a value.
const NO_FORMATS: [&str; 9] = [
    "idn-email",
    "idn-hostname",
    "iri",
    "iri-reference",
    "uri-reference",
    "uri-template",
    "json-pointer",
    "relative-json-pointer",
    "regex",
];

/// Keywords that say something of a value which an automaton over its text cannot follow.
const NEVER: [&str; 17] = [
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
    "extends",
    "disallow",
];

/// Longest strings and arrays that a schema may ask for.
const MOST_COUNTED: u64 = 100_000;

impl<'a> Walk<'a> {
    pub(super) fn keyword(
        &mut self,
        source: &'a Map<String, Value>,
        keyword: &'a str,
        value: &'a Value,
        map: &mut Map<String, Value>,
    ) -> Result<(), GrammarError> {
        let made = match keyword {
            "$ref" => self.reference(keyword, value)?,
            "type" => self.types(value)?,
            "const" => value.clone(),
            "enum" => match value.as_array() {
                Some(values) if !values.is_empty() => value.clone(),
                _ => return self.refuse(keyword, "must be an array with at least one value"),
            },
            "properties" | "patternProperties" => self.named(keyword, value)?,
            // Tuples as the drafts before 2020-12 wrote them.
            "items" if value.is_array() => {
                map.insert("prefixItems".into(), self.list(keyword, value)?);
                return Ok(());
            }
            "additionalItems" => {
                if source.get("items").is_some_and(Value::is_array) {
                    map.insert("items".into(), self.below(&[keyword], value)?);
                }
                return Ok(());
            }
            "additionalProperties" | "items" => self.below(&[keyword], value)?,
            "prefixItems" => self.list(keyword, value)?,
            "allOf" | "anyOf" | "oneOf" => match self.list(keyword, value)? {
                Value::Array(list) if list.is_empty() => return self.refuse(keyword, "must hold at least one schema"),
                list => list,
            },
            "required" => self.names(keyword, value)?,
            "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties" => {
                match self.count(keyword, value)? {
                    Some(count) => json!(count),
                    None => return Ok(()),
                }
            }
            "minimum" | "maximum" => self.number(keyword, value)?,
            // Draft 4 wrote a boolean.
            "exclusiveMinimum" | "exclusiveMaximum" if value.is_boolean() => value.clone(),
            "exclusiveMinimum" | "exclusiveMaximum" => self.number(keyword, value)?,
            "multipleOf" if value.as_f64().is_some_and(|number| number > 0.0) => value.clone(),
            "multipleOf" => return self.refuse(keyword, "must be a number above 0"),
            "pattern" if value.is_string() => value.clone(),
            "pattern" => return self.refuse(keyword, "must be a string"),
            "format" => match value.as_str() {
                Some(format) if FORMATS.contains(&format) => value.clone(),
                Some(format) if NO_FORMATS.contains(&format) => {
                    let known = FORMATS.join(", ");
                    return self.refuse(keyword, format!("the format '{format}' cannot be enforced; supported are {known}"));
                }
                Some(_) => return Ok(()),
                None => return self.refuse(keyword, "must be a string"),
            },
            "uniqueItems" => match value {
                Value::Bool(false) => return Ok(()),
                _ => return self.refuse(keyword, "cannot be enforced while a text is generated; leave it out"),
            },
            _ if NEVER.contains(&keyword) => {
                return self.refuse(keyword, "cannot be enforced while a text is generated; leave it out");
            }
            // Annotations, definitions (read where they are referred to), and what the standard does not know.
            _ => return Ok(()),
        };
        map.insert(keyword.to_owned(), made);
        Ok(())
    }

    fn types(&self, value: &Value) -> Result<Value, GrammarError> {
        let known = |value: &Value| value.as_str().is_some_and(|name| TYPES.contains(&name));
        let good = match value {
            Value::Array(types) => !types.is_empty() && types.iter().all(known),
            one => known(one),
        };
        match good {
            true => Ok(value.clone()),
            false => self.refuse("type", format!("must be one of {}, or an array of them", TYPES.join(", "))),
        }
    }

    fn named(&mut self, keyword: &str, value: &'a Value) -> Result<Value, GrammarError> {
        let Some(schemas) = value.as_object() else { return self.refuse(keyword, "must be an object of schemas") };
        if schemas.len() > MOST_PROPERTIES {
            return self.refuse(keyword, format!("at most {MOST_PROPERTIES} properties, not {}", schemas.len()));
        }
        let checked: Result<Map<_, _>, _> =
            schemas.iter().map(|(name, schema)| Ok((name.clone(), self.below(&[keyword, name], schema)?))).collect();
        checked.map(Value::Object)
    }

    fn list(&mut self, keyword: &str, value: &'a Value) -> Result<Value, GrammarError> {
        let Some(schemas) = value.as_array() else { return self.refuse(keyword, "must be an array of schemas") };
        let checked: Result<Vec<_>, _> =
            schemas.iter().enumerate().map(|(index, schema)| self.below(&[keyword, &index.to_string()], schema)).collect();
        checked.map(Value::Array)
    }

    fn names(&self, keyword: &str, value: &Value) -> Result<Value, GrammarError> {
        match value.as_array() {
            Some(names) if names.iter().all(Value::is_string) => Ok(value.clone()),
            // Draft 3 had a boolean in the property itself; draft 4 forbade it.
            _ => self.refuse(keyword, "must be an array of strings"),
        }
    }

    /// `None` is no bound at all.
    fn count(&self, keyword: &str, value: &Value) -> Result<Option<u64>, GrammarError> {
        let whole = |number: f64| (number >= 0.0 && number.fract() == 0.0 && number < 9e15).then_some(number as u64);
        let Some(count) = value.as_u64().or_else(|| value.as_f64().and_then(whole)) else {
            return self.refuse(keyword, "must be a whole number, at least 0");
        };
        if count <= MOST_COUNTED {
            return Ok(Some(count));
        }
        match keyword.starts_with("max") {
            // No text here becomes that long.
            true => Ok(None),
            false => self.refuse(keyword, format!("must be at most {MOST_COUNTED}")),
        }
    }

    fn number(&self, keyword: &str, value: &Value) -> Result<Value, GrammarError> {
        match value.is_number() {
            true => Ok(value.clone()),
            false => self.refuse(keyword, "must be a number"),
        }
    }
}
