//! Which keyword of a schema llguidance could not take.

use super::references::number;
use super::{Checked, children, joined, refused};
use crate::grammar::GrammarError;
use serde_json::Value;

/// Looks for the innermost schema that fails by itself, and for the keyword without which it does not. `fails` compiles a schema
/// and gives its error; `None` also when it has had enough.
pub(in crate::grammar) fn blame(checked: &Checked, mut fails: impl FnMut(Value) -> Option<GrammarError>) -> Option<GrammarError> {
    let mut path = String::new();
    let mut at = &checked.root;
    let mut error = None;
    let mut followed = vec![false; checked.definitions.len()];
    loop {
        let mut inside: Vec<(String, &Value)> = Vec::new();
        children(at, &mut |steps, schema| inside.push((joined(&path, &steps), schema)));
        if let Some(number) = at.get("$ref").and_then(number)
            && let (Some(followed), Some((schema, path))) = (followed.get_mut(number), checked.definitions.get(number))
            && !std::mem::replace(followed, true)
        {
            inside.push((path.clone(), schema));
        }
        let fails = |(_, schema): &(String, &Value)| {
            // A part that nothing satisfies may be left out, and is rarely why the whole fails.
            let found = if schema.is_object() { fails(checked.with_root(schema)) } else { None };
            found.map(|found| error = Some(found)).is_some()
        };
        match inside.into_iter().find(fails) {
            Some((steps, schema)) => (path, at) = (steps, schema),
            None => break,
        }
    }
    let map = at.as_object()?;
    let error = error.or_else(|| fails(checked.with_root(at)))?;
    let without = |keyword: &String| {
        let mut rest = map.clone();
        rest.shift_remove(keyword);
        fails(checked.with_root(&Value::Object(rest))).is_none()
    };
    // Of several, the last was the one too many.
    let keyword = map.keys().rev().filter(|keyword| *keyword != "type").cloned().collect::<Vec<_>>().into_iter().find(without);
    Some(match keyword {
        Some(keyword) => refused(&path, &keyword, error.message),
        None => GrammarError { path, ..error },
    })
}
