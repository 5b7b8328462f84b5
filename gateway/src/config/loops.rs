//! `[loop.NAME]`: tables with tables in them, read as JSON is.

use crate::config::ConfigError;
use crate::config::layer::{Layer, Origin};
use crate::flywheel;
use serde_json::{Map, Number, Value};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tidemill_rlhf::flywheel::Policy;
use toml::Spanned;
use toml::de::DeValue;

/// A table, with the line of each of its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopTable {
    name: String,
    path: PathBuf,
    value: Value,
    /// By the field's path; that of the table itself is empty.
    lines: BTreeMap<String, usize>,
}

/// The tables of `loop` in a file.
pub fn tables(
    path: &Path,
    value: &Spanned<DeValue<'_>>,
    line_of: &dyn Fn(Range<usize>) -> usize,
) -> Result<Vec<LoopTable>, ConfigError> {
    let wrong = |span: Range<usize>, key: &str, message: String| {
        let place = Origin::Table { path: path.to_owned(), line: line_of(span), key: key.to_owned() }.to_string();
        ConfigError::Value { place, message }
    };
    let expected = || "expected a table such as [loop.NAME]".to_owned();
    let Some(table) = value.get_ref().as_table() else { return Err(wrong(value.span(), "loop", expected())) };
    let mut tables = Vec::new();
    for (name, entry) in table {
        let key = format!("loop.{}", name.get_ref());
        if entry.get_ref().as_table().is_none() {
            return Err(wrong(entry.span(), &key, expected()));
        }
        let mut lines = BTreeMap::from([(String::new(), line_of(name.span()))]);
        let value = json(entry, "", line_of, &mut lines).map_err(|(span, field, found)| {
            wrong(span, &format!("{key}.{field}"), format!("expected JSON's kinds of values, but found {found}; put it into quotes"))
        })?;
        tables.push(LoopTable { name: name.get_ref().to_string(), path: path.to_owned(), value, lines });
    }
    Ok(tables)
}

/// A value, with the lines of the fields in it; or where something lies that JSON does not have.
fn json(
    value: &Spanned<DeValue<'_>>,
    place: &str,
    line_of: &dyn Fn(Range<usize>) -> usize,
    lines: &mut BTreeMap<String, usize>,
) -> Result<Value, (Range<usize>, String, &'static str)> {
    let other = |what: &'static str| (value.span(), place.to_owned(), what);
    let inside = |key: &str| if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") };
    if !place.is_empty() {
        lines.insert(place.to_owned(), line_of(value.span()));
    }
    let number = |text: &str| text.replace('_', "").parse::<f64>().ok().and_then(Number::from_f64).map(Value::Number);
    Ok(match value.get_ref() {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(integer) if integer.radix() == 10 => match integer.as_str().replace('_', "").parse::<i64>() {
            Ok(integer) => integer.into(),
            Err(_) => number(integer.as_str()).ok_or_else(|| other("a number that is too large"))?,
        },
        DeValue::Integer(_) => return Err(other("a number that is not decimal")),
        DeValue::Float(float) => number(float.as_str()).ok_or_else(|| other("no finite number"))?,
        DeValue::Boolean(on) => Value::Bool(*on),
        DeValue::Datetime(_) => return Err(other("a date or a time")),
        DeValue::Array(items) => {
            let mut list = Vec::with_capacity(items.len());
            for (index, item) in items.iter().enumerate() {
                list.push(json(item, &inside(&index.to_string()), line_of, lines)?);
            }
            Value::Array(list)
        }
        DeValue::Table(table) => {
            let mut map = Map::new();
            for (key, value) in table {
                map.insert(key.get_ref().to_string(), json(value, &inside(key.get_ref()), line_of, lines)?);
            }
            Value::Object(map)
        }
    })
}

/// All policies, by the loop's name.
pub fn policies(layers: &[Layer]) -> Result<BTreeMap<String, Policy>, ConfigError> {
    let mut policies = BTreeMap::new();
    for table in layers.iter().flat_map(|layer| &layer.loops) {
        let policy = flywheel::read_policy(&table.name, &table.value).map_err(|error| {
            let param = error.param.unwrap_or_default();
            let unknown = error.code.as_deref() == Some("unknown_parameter");
            let hint = if unknown { " docs/loop.md lists what there is." } else { "" };
            let (key, line) = (format!("loop.{}", table.name), table.line(&param));
            let key = if param.is_empty() { key } else { format!("{key}.{param}") };
            let place = Origin::Table { path: table.path.clone(), line, key }.to_string();
            ConfigError::Value { place, message: format!("{}{hint}", error.message) }
        })?;
        policies.insert(table.name.clone(), policy);
    }
    Ok(policies)
}

impl LoopTable {
    /// Where a field stands, or what it is missing from.
    fn line(&self, field: &str) -> usize {
        let mut field = field;
        loop {
            if let Some(line) = self.lines.get(field) {
                return *line;
            }
            field = field.rsplit_once('.').map_or("", |(outer, _)| outer);
            if field.is_empty() {
                return self.lines.get("").copied().unwrap_or(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<BTreeMap<String, Policy>, String> {
        let layer = crate::config::file::parse(Path::new("t"), text).map_err(|error| error.to_string())?;
        policies(&[layer]).map_err(|error| error.to_string())
    }

    const WHOLE: &str = r#"
[loop.shorter]
model = "assistant"
base = "smollm2"

[loop.shorter.when]
preferences = 1_000
raters = 3

[loop.shorter.evaluate]
text = "ordinary.txt"
temperature = 0.5

[loop.shorter.rollout]
kind = "canary"
steps = [{set_weight = 20}, {pause = "10m"}]
metrics = [{metric = "error_rate", guardrail = {max = 0.05}}]
"#;

    #[test]
    fn tables_within_tables_are_read() {
        let policies = read(WHOLE).unwrap();
        let policy = &policies["shorter"];
        assert_eq!((policy.when.preferences, policy.measuring.temperature), (1000, 0.5));
        assert_eq!(policy.rollout["steps"][0]["set_weight"], 20);
        assert!(read("port = 80").unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_names_its_line_and_field() {
        let refused = |from: &str, to: &str| read(&WHOLE.replace(from, to)).unwrap_err();
        for (from, to, begin) in [
            ("preferences = 1_000", "preferences = 0", "t:7: `loop.shorter.when.preferences`: Invalid 'when.preferences'"),
            ("set_weight = 20", "set_weight = 200", "t:16: `loop.shorter.rollout.steps.0.set_weight`: "),
            ("raters = 3", "readers = 3", "t:8: `loop.shorter.when.readers`: Unknown parameter: 'when.readers'. docs/loop.md"),
            ("kind = \"canary\"", "", "t:14: `loop.shorter.rollout.kind`: Missing required parameter: 'rollout.kind'"),
            ("raters = 3", "at = 03:00:00", "t:8: `loop.shorter.when.at`: expected JSON's kinds of values, but found a date or a time"),
            ("[loop.shorter]", "[loop.Shorter]", "t:2: `loop.Shorter`: a loop's name is"),
        ] {
            let error = refused(from, to);
            assert!(error.starts_with(begin), "{error}");
        }
        assert!(read("loop = 1").unwrap_err().starts_with("t:1: `loop`: expected a table"));
        assert!(read("[loop]\na = 1").unwrap_err().starts_with("t:2: `loop.a`: expected a table"));
    }
}
