//! The OpenAPI 3.1 document of every route. It is written by hand, as the requests are read by hand: a test compares its paths with the
//! router's, and the suite fires requests at a server by it.

mod adapters;
mod datasets;
mod feedback;
mod files;
mod fine_tuning;
mod generation;
mod keys;
mod labeling;
mod loops;
mod messages;
mod operation;
mod responses;
mod rollouts;
mod schema;
mod service;

use operation::Operation;
use schema::{Object, nullable, text};
use serde_json::{Map, Value, json};

/// What a topic brings: its operations, and the schemas that they name.
#[derive(Default)]
struct Topic {
    operations: Vec<Operation>,
    schemas: Vec<(&'static str, Value)>,
}

/// The whole document.
pub fn document() -> Value {
    let topics = [
        service::topic(),
        generation::topic(),
        messages::topic(),
        responses::topic(),
        files::topic(),
        fine_tuning::topic(),
        loops::topic(),
        feedback::topic(),
        labeling::topic(),
        datasets::topic(),
        keys::topic(),
        adapters::topic(),
        rollouts::topic(),
    ];
    let mut paths = Map::new();
    let mut schemas = Map::from_iter([("Error".to_owned(), error())]);
    for topic in topics {
        for operation in topic.operations {
            paths.entry(operation.path).or_insert_with(|| json!({}))[operation.method] = operation.to_json();
        }
        schemas.extend(topic.schemas.into_iter().map(|(name, schema)| (name.to_owned(), schema)));
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tidemill",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "OpenAI's API over models of one's own, and what people think of the answers. In a request, null is the same \
                as leaving a field out, and an unknown field is refused.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "`tidemill key create` makes keys."}},
        },
        "security": [{"key": []}],
    })
}

fn error() -> Value {
    let body = Object::answer()
        .with("message", text())
        .with("type", text())
        .with("param", nullable(text()))
        .with("code", nullable(text()));
    Object::answer().with("error", body.schema()).schema()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| match value {
                Value::String(text) if key == "$ref" => drop(found.insert(text.clone())),
                other => references(other, found),
            }),
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }

    #[test]
    fn every_schema_is_defined_once_and_used() {
        let document = document();
        let mut used = BTreeSet::new();
        references(&document, &mut used);
        let schemas = document["components"]["schemas"].as_object().unwrap();
        let defined: BTreeSet<String> = schemas.keys().map(|name| format!("#/components/schemas/{name}")).collect();
        assert_eq!(used, defined);
    }

    #[test]
    fn operations_have_names_of_their_own_and_answers() {
        let document = document();
        let mut names = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let name = operation["operationId"].as_str().unwrap();
                assert!(names.insert(name.to_owned()), "{name} is there twice");
                let answers = operation["responses"].as_object().unwrap();
                let fine = answers.keys().any(|status| status.starts_with(['2', '3']));
                assert!(fine || path == "/v1/moderations", "{method} {path}");
            }
        }
    }
}
