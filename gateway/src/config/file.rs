//! `tidemill.toml`.

use crate::config::layer::{LISTS, Layer, NamedTable, Origin, Setting};
use crate::config::tables::TABLES;
use crate::config::upstreams::TABLE_LISTS;
use crate::config::{ConfigError, KEYS, loops};
use std::ops::Range;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The table whose tables have tables in them.
const LOOP: &str = "loop";

/// Reads the file.
pub fn read(path: &Path) -> Result<Layer, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Layer, ConfigError> {
    let line_of = |span: Range<usize>| 1 + text.bytes().take(span.start).filter(|byte| *byte == b'\n').count();
    let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: error.span().map_or(1, line_of),
        message: error.message().to_owned(),
    })?;
    let mut layer = Layer::default();
    for (name, value) in table.get_ref() {
        let line = line_of(name.span());
        if name.get_ref() == LOOP {
            layer.loops.extend(loops::tables(path, value, &line_of)?);
            continue;
        }
        if let Some(table) = TABLES.iter().find(|table| **table == name.get_ref().as_ref()) {
            named_tables(path, table, value, &line_of, &mut layer)?;
            continue;
        }
        let Some(key) = KEYS.iter().find(|key| **key == name.get_ref().as_ref()) else {
            let written = name.get_ref().to_string();
            let place = format!("{}:{line}", path.display());
            return Err(ConfigError::UnknownKey { place, hint: hint(&written), key: written });
        };
        let origin = |span: Range<usize>| Origin::File { path: path.to_owned(), line: line_of(span), key };
        match value.get_ref() {
            DeValue::Array(items) if LISTS.contains(key) => {
                for item in items.iter() {
                    let origin = origin(item.span());
                    layer.push(key, scalar(item.get_ref(), &origin)?, origin);
                }
            }
            DeValue::Float(number) if *key == "record_share" => {
                layer.push(key, number.as_str().to_owned(), origin(value.span()));
            }
            other => {
                let origin = origin(value.span());
                layer.push(key, scalar(other, &origin)?, origin);
            }
        }
    }
    Ok(layer)
}

/// `[table.name]` with its keys, for each name.
fn named_tables(
    path: &Path,
    table: &'static str,
    value: &Spanned<DeValue<'_>>,
    line_of: &dyn Fn(Range<usize>) -> usize,
    layer: &mut Layer,
) -> Result<(), ConfigError> {
    let origin = |span: Range<usize>, key: String| Origin::Table { path: path.to_owned(), line: line_of(span), key };
    let inside = |value: &Spanned<DeValue<'_>>, key: &str| match value.get_ref() {
        DeValue::Table(_) => Ok(()),
        _ => Err(ConfigError::Value {
            place: origin(value.span(), key.to_owned()).to_string(),
            message: format!("expected a table such as [{table}.NAME]"),
        }),
    };
    inside(value, table)?;
    for (name, entry) in value.get_ref().as_table().into_iter().flatten() {
        let key = format!("{table}.{}", name.get_ref());
        inside(entry, &key)?;
        let mut settings = Vec::new();
        for (field, value) in entry.get_ref().as_table().into_iter().flatten() {
            let origin = origin(value.span(), format!("{key}.{}", field.get_ref()));
            let text = match value.get_ref() {
                DeValue::Array(items) if TABLE_LISTS.contains(&(table, field.get_ref().as_ref())) => {
                    for item in items.iter() {
                        let setting = Setting { text: scalar(item.get_ref(), &origin)?, origin: origin.clone() };
                        settings.push((field.get_ref().to_string(), setting));
                    }
                    continue;
                }
                DeValue::Float(number) => number.as_str().to_owned(),
                other => scalar(other, &origin)?,
            };
            settings.push((field.get_ref().to_string(), Setting { text, origin }));
        }
        let origin = origin(name.span(), key);
        layer.tables.push(NamedTable { table, name: name.get_ref().to_string(), origin, settings });
    }
    Ok(())
}

fn scalar(value: &DeValue<'_>, origin: &Origin) -> Result<String, ConfigError> {
    let kind = match value {
        DeValue::String(text) => return Ok(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => return Ok(number.as_str().replace('_', "")),
        DeValue::Boolean(on) => return Ok(on.to_string()),
        DeValue::Integer(_) => "a number that is not decimal",
        DeValue::Float(_) => "a decimal",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    Err(ConfigError::Value {
        place: origin.to_string(),
        message: format!("expected a string, an integer or a boolean, but found {kind}"),
    })
}

/// The key that was probably meant, or all of them.
fn hint(written: &str) -> String {
    let normal = written.to_lowercase().replace('-', "_");
    let near = KEYS.iter().map(|key| (distance(key, &normal), key)).min();
    match near {
        Some((distance, key)) if distance <= 2 => format!("; did you mean `{key}`?"),
        _ => format!("; the keys are {}, and the tables {}, {LOOP}", KEYS.join(", "), TABLES.join(", ")),
    }
}

/// Levenshtein's distance: insertions, deletions and replacements that turn one word into the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(b.chars()) {
            let above = *cell;
            let best = (diagonal + usize::from(x != y)).min(above + 1).min(left + 1);
            (diagonal, left) = (above, best);
            *cell = best;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse(Path::new("tidemill.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_likely_one() {
        let message = error("port = 80\n\n# memory\nkv-memori = \"2GiB\"\n");
        assert!(message.starts_with("tidemill.toml:4: unknown key `kv-memori`"), "{message}");
        assert!(message.contains("`kv_memory`"), "{message}");
        assert!(error("x = 1").contains("the keys are model, host"), "{}", error("x = 1"));
    }

    #[test]
    fn broken_toml_names_its_line() {
        assert!(error("port = 80\nhost = \n").starts_with("tidemill.toml:2: "), "{}", error("port = 80\nhost = \n"));
    }

    #[test]
    fn a_value_of_the_wrong_kind_names_line_and_key() {
        assert!(error("\nport = 80.5").starts_with("tidemill.toml:2: `port`: "), "{}", error("\nport = 80.5"));
        assert!(error("[port]\na = 1").starts_with("tidemill.toml:1: `port`: "));
    }

    #[test]
    fn several_models_keep_their_order() {
        let layer = parse(Path::new("t"), "model = [\n  \"a=x\",\n  \"b\"]").unwrap();
        let models: Vec<_> = layer.list("model").into_iter().map(|(text, _)| text).collect();
        assert_eq!(models, ["a=x", "b"]);
    }

    #[test]
    fn distances() {
        for (a, b, expected) in
            [("", "abc", 3), ("port", "port", 0), ("port", "prot", 2), ("host", "hosts", 1), ("data", "date", 1)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
