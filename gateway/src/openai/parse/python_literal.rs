//! A Python call with literal arguments, as JSON.

use serde_json::{Map, Number, Value};

/// Deepest nesting of lists and dictionaries.
const MAX_DEPTH: usize = 64;

/// `f(a=1, b="x")` as its name and `{"a": 1, "b": "x"}`; `None` for anything else.
pub(super) fn call(text: &str) -> Option<(String, String)> {
    let mut reader = Reader { rest: text };
    let name = reader.name()?;
    reader.take('(')?;
    let mut arguments = Map::new();
    while reader.take(')').is_none() {
        let key = reader.name()?;
        reader.take('=')?;
        arguments.insert(key, reader.value(0)?);
        if reader.take(',').is_none() {
            reader.take(')')?;
            break;
        }
    }
    reader.rest.trim().is_empty().then(|| (name, Value::Object(arguments).to_string()))
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn take(&mut self, wanted: char) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(wanted)?;
        Some(())
    }

    /// Letters, digits, `_`, and dots between them.
    fn name(&mut self) -> Option<String> {
        let text = self.rest.trim_start();
        let end = text.find(|c: char| !(c.is_alphanumeric() || "_.".contains(c))).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        self.rest = rest;
        name.starts_with(|c: char| c.is_alphabetic() || c == '_').then(|| name.to_owned())
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            '[' => self.items('[', ']', depth).map(Value::Array),
            '(' => self.items('(', ')', depth).map(Value::Array),
            '{' => self.dictionary(depth),
            quote @ ('"' | '\'') => self.string(quote).map(Value::String),
            c if c.is_ascii_digit() || "+-.".contains(c) => self.number(),
            _ => match self.name()?.as_str() {
                "True" | "true" => Some(Value::Bool(true)),
                "False" | "false" => Some(Value::Bool(false)),
                "None" | "null" => Some(Value::Null),
                _ => None,
            },
        }
    }

    fn items(&mut self, open: char, close: char, depth: usize) -> Option<Vec<Value>> {
        self.take(open)?;
        let mut items = Vec::new();
        while self.take(close).is_none() {
            items.push(self.value(depth + 1)?);
            if self.take(',').is_none() {
                self.take(close)?;
                break;
            }
        }
        Some(items)
    }

    fn dictionary(&mut self, depth: usize) -> Option<Value> {
        self.take('{')?;
        let mut map = Map::new();
        while self.take('}').is_none() {
            let key = match self.value(depth + 1)? {
                Value::String(key) => key,
                Value::Number(key) => key.to_string(),
                _ => return None,
            };
            self.take(':')?;
            map.insert(key, self.value(depth + 1)?);
            if self.take(',').is_none() {
                self.take('}')?;
                break;
            }
        }
        Some(Value::Object(map))
    }

    fn number(&mut self) -> Option<Value> {
        let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-._".contains(c))).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        let text = text.replace('_', "");
        match text.parse::<i64>() {
            Ok(whole) => Some(whole.into()),
            Err(_) => Number::from_f64(text.parse().ok()?).map(Value::Number),
        }
    }

    fn string(&mut self, quote: char) -> Option<String> {
        let mut text = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                _ if c == quote => {
                    self.rest = &self.rest[at + quote.len_utf8()..];
                    return Some(text);
                }
                '\\' => match chars.next()?.1 {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    '\n' => {}
                    escape @ ('x' | 'u' | 'U') => {
                        let digits = match escape {
                            'x' => 2,
                            'u' => 4,
                            _ => 8,
                        };
                        let code: String = chars.by_ref().take(digits).map(|(_, digit)| digit).collect();
                        text.push(char::from_u32(u32::from_str_radix(&code, 16).ok()?)?);
                    }
                    other if "\\'\"".contains(other) => text.push(other),
                    // Python keeps the backslash of an escape that it does not know.
                    other => text.extend(['\\', other]),
                },
                _ => text.push(c),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_become_json() {
        for (text, name, arguments) in [
            ("f()", "f", "{}"),
            ("f( a = 1 , b=-2.5, )", "f", r#"{"a":1,"b":-2.5}"#),
            ("a.b(s='it\\'s \\u00e9\\n', t=\"x\\d\")", "a.b", r#"{"s":"it's é\n","t":"x\\d"}"#),
            ("f(l=[1, (2, 3), []], d={'k': None, 1: True})", "f", r#"{"l":[1,[2,3],[]],"d":{"k":null,"1":true}}"#),
        ] {
            assert_eq!(call(text), Some((name.to_owned(), arguments.to_owned())), "{text}");
        }
    }

    #[test]
    fn anything_else_is_no_call() {
        for text in ["f", "f(", "f(1)", "f(a=g())", "f(a=b)", "f(a=1) x", "1(a=1)", "f(a='x)", "f(a=nan)"] {
            assert_eq!(call(text), None, "{text}");
        }
        assert_eq!(call(&format!("f(a={}{})", "[".repeat(100_000), "]".repeat(100_000))), None);
    }
}
