//! `oneOf`, where no value can satisfy two of its schemas: then it says the same as `anyOf`, which an automaton can follow.

use super::references::number;
use super::{Checked, children, joined, refused, rewritten};
use crate::grammar::GrammarError;
use serde_json::{Map, Value, json};
use std::cell::Cell;

/// Levels that are looked into.
const DEEPEST: usize = 8;
/// Schemas in one `oneOf`: each is compared with each.
const MOST_OPTIONS: usize = 500;
/// Comparisons for one schema: references let a short one ask for more than anybody can wait for.
const MOST_COMPARISONS: usize = 1_000_000;
/// What a property is that nothing is said of.
const ANYTHING: &Value = &Value::Bool(true);

/// Rewrites every `oneOf` whose schemas exclude each other, and refuses the others.
pub(super) fn rewrite(checked: &mut Checked) -> Result<(), GrammarError> {
    let comparer = Comparer { checked, left: Cell::new(MOST_COMPARISONS) };
    comparer.check(&checked.root, "")?;
    for (schema, path) in &checked.definitions {
        comparer.check(schema, path)?;
    }
    checked.root = rewritten(std::mem::take(&mut checked.root), &mut as_any_of);
    for (schema, _) in &mut checked.definitions {
        *schema = rewritten(std::mem::take(schema), &mut as_any_of);
    }
    Ok(())
}

/// `oneOf` as `anyOf`, beside another of which it becomes a part of `allOf`.
fn as_any_of(map: Map<String, Value>) -> Value {
    if !map.contains_key("oneOf") {
        return Value::Object(map);
    }
    let mut out = Map::new();
    for (keyword, value) in map {
        match keyword.as_str() {
            "oneOf" => both(&mut out, json!({"anyOf": value})),
            "allOf" => both(&mut out, json!({"allOf": value})),
            _ => drop(out.insert(keyword, value)),
        }
    }
    Value::Object(out)
}

/// Adds a schema that must hold too.
fn both(map: &mut Map<String, Value>, schema: Value) {
    match map.get_mut("allOf") {
        Some(Value::Array(list)) => list.push(schema),
        _ => drop(map.insert("allOf".into(), json!([schema]))),
    }
}

/// What a schema says of the values it accepts, as far as it is needed here.
struct Says<'a> {
    types: Vec<&'a str>,
    values: Option<Vec<&'a Value>>,
}

/// Compares schemas of one whole.
struct Comparer<'a> {
    checked: &'a Checked,
    /// Comparisons that may still be made; with none left nothing is known to exclude anything.
    left: Cell<usize>,
}

impl Comparer<'_> {
    /// Refuses a `oneOf` in or below `schema` of which two may hold.
    fn check(&self, schema: &Value, path: &str) -> Result<(), GrammarError> {
        if let Some(Value::Array(options)) = schema.get("oneOf") {
            let mut pairs = options.iter().enumerate().flat_map(|(at, a)| options[at + 1..].iter().map(move |b| (a, b)));
            if options.len() > MOST_OPTIONS || !pairs.all(|(a, b)| self.disjoint(a, b, 0)) {
                let message = "its schemas must exclude each other, by type or by different constants of a required property; \
                               use anyOf where several may hold";
                return Err(refused(path, "oneOf", message));
            }
        }
        let mut inside = Vec::new();
        children(schema, &mut |steps, schema| inside.push((joined(path, &steps), schema)));
        inside.into_iter().try_for_each(|(path, schema)| self.check(schema, &path))
    }

    /// Whether surely no value satisfies both.
    fn disjoint(&self, a: &Value, b: &Value, depth: usize) -> bool {
        let Some(left) = self.left.get().checked_sub(1).filter(|_| depth <= DEEPEST) else { return false };
        self.left.set(left);
        if a == &Value::Bool(false) || b == &Value::Bool(false) {
            return true;
        }
        let (Some(a_map), Some(b_map)) = (a.as_object(), b.as_object()) else { return false };
        for (map, other) in [(a_map, b), (b_map, a)] {
            let target = map.get("$ref").and_then(number).and_then(|number| self.checked.definitions.get(number));
            if target.is_some_and(|(target, _)| self.disjoint(target, other, depth + 1)) {
                return true;
            }
            let list = |keyword: &str| map.get(keyword).and_then(Value::as_array);
            if list("allOf").is_some_and(|all| all.iter().any(|one| self.disjoint(one, other, depth + 1))) {
                return true;
            }
            let every = |list: &Vec<Value>| list.iter().all(|one| self.disjoint(one, other, depth + 1));
            if list("anyOf").is_some_and(every) || list("oneOf").is_some_and(every) {
                return true;
            }
        }
        let (a_says, b_says) = (says(a_map), says(b_map));
        if !a_says.types.iter().any(|a| b_says.types.iter().any(|b| same_type(a, b))) {
            return true;
        }
        if let (Some(a), Some(b)) = (&a_says.values, &b_says.values)
            && !a.iter().any(|value| b.contains(value))
        {
            return true;
        }
        let only_objects = |says: &Says<'_>| says.types == ["object"];
        only_objects(&a_says) && only_objects(&b_says) && self.told_apart(a_map, b_map, depth)
    }

    /// Whether some property that one of them requires excludes one by its value.
    fn told_apart(&self, a: &Map<String, Value>, b: &Map<String, Value>, depth: usize) -> bool {
        let lists = [a, b].into_iter().filter_map(|map| map.get("required").and_then(Value::as_array));
        let mut required = lists.flatten().filter_map(Value::as_str);
        required.any(|name| self.disjoint(property(a, name), property(b, name), depth + 1))
    }
}

/// What an object's schema says of a property.
fn property<'v>(map: &'v Map<String, Value>, name: &str) -> &'v Value {
    match map.get("properties").and_then(|properties| properties.get(name)) {
        Some(schema) => schema,
        // A pattern may give it another schema.
        None if map.contains_key("patternProperties") => ANYTHING,
        None => map.get("additionalProperties").unwrap_or(ANYTHING),
    }
}

fn says(map: &Map<String, Value>) -> Says<'_> {
    let values: Option<Vec<&Value>> = match (map.get("const"), map.get("enum")) {
        (Some(value), _) => Some(vec![value]),
        (None, Some(Value::Array(values))) => Some(values.iter().collect()),
        _ => None,
    };
    let types = match map.get("type") {
        Some(Value::String(one)) => vec![one.as_str()],
        Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).collect(),
        _ => match &values {
            Some(values) => values.iter().map(|value| type_of(value)).collect(),
            None => vec!["null", "boolean", "number", "string", "array", "object"],
        },
    };
    Says { types, values }
}

fn same_type(a: &str, b: &str) -> bool {
    let wide = |name| if name == "integer" { "number" } else { name };
    wide(a) == wide(b)
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}
