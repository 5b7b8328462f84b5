//! Keyword by keyword, after the vocabulary of draft 2020-12. Properties come in the order in which a schema names them.

use super::*;
use crate::grammar::tests::{accepts, compiler};
use crate::grammar::{Compiler, Constraint};

/// A schema, texts that can be generated, texts that cannot.
type Case<'a> = (Value, &'a [&'a str], &'a [&'a str]);

fn run(cases: &[Case<'_>]) {
    let compiler = compiler();
    for (schema, accepted, rejected) in cases {
        let constraint = Constraint::JsonSchema { schema: schema.clone(), strict: false };
        let grammar = compiler.compile(&constraint).unwrap_or_else(|error| panic!("{schema}: {error}"));
        for text in *accepted {
            assert!(accepts(&grammar, text), "{schema} accepts {text}");
        }
        for text in *rejected {
            assert!(!accepts(&grammar, text), "{schema} rejects {text}");
        }
    }
}

fn refusal(compiler: &Compiler, schema: Value, strict: bool) -> GrammarError {
    let constraint = Constraint::JsonSchema { schema: schema.clone(), strict };
    compiler.compile(&constraint).err().unwrap_or_else(|| panic!("{schema} is refused"))
}

#[test]
fn values_of_every_type() {
    run(&[
        (json!({"type": "null"}), &["null"], &["0", "\"null\"", "nul"]),
        (json!({"type": "boolean"}), &["true", "false"], &["1", "\"true\"", "null"]),
        (json!({"type": "integer"}), &["0", "-12", "123456789012"], &["1.5", "01", "+1", "\"1\"", "-"]),
        (json!({"type": "number"}), &["0", "-1.5", "2e10", "1.0E-3"], &[".5", "1.", "NaN", "0x1", "true"]),
        (json!({"type": "string"}), &["\"\"", "\"a \\\" \\n é 💩\""], &["a", "\"", "'a'", "\"\t\"", "\"\\x\""]),
        (json!({"type": "array"}), &["[]", "[1,\"a\",[null]]"], &["{}", "[1", "[,]"]),
        (json!({"type": "object"}), &["{}", "{\"a\":{}}"], &["[]", "{1:2}"]),
        (json!({"type": ["string", "null"]}), &["\"a\"", "null"], &["1", "[]"]),
        (json!({}), &["1", "\"a\"", "[{}]", "null"], &["", "a", "[1"]),
        (json!(true), &["1", "{}"], &["x"]),
        (json!({"enum": ["a", 1, null, [1, {"b": 2}]]}), &["\"a\"", "1", "null", "[1,{\"b\":2}]"], &["\"b\"", "2", "[1]", "\"a"]),
        (json!({"const": {"a": [true]}}), &["{\"a\":[true]}"], &["{}", "{\"a\":[false]}"]),
        (json!({"const": "a\"b\\é"}), &["\"a\\\"b\\\\é\""], &["\"ab\""]),
    ]);
}

#[test]
fn numbers_within_bounds() {
    run(&[
        (json!({"type": "integer", "minimum": -3, "maximum": 120}), &["-3", "0", "99", "120"], &["-4", "121", "1000"]),
        (json!({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}), &["1", "9"], &["0", "10", "-1"]),
        (json!({"type": "integer", "minimum": 5, "exclusiveMinimum": true}), &["6"], &["5", "4"]),
        (json!({"type": "number", "minimum": 1.1, "maximum": 2.25}), &["1.1", "2", "2.25"], &["1.05", "2.26", "3", "0"]),
        (json!({"type": "number", "exclusiveMinimum": 1.5}), &["1.51", "100"], &["1.5", "1", "-2"]),
        (json!({"type": "integer", "multipleOf": 7}), &["0", "14", "-21", "700"], &["1", "15"]),
        (json!({"type": "number", "multipleOf": 0.25}), &["0.25", "1.50", "-3.75"], &["0.3", "1.1", "0.26"]),
    ]);
}

#[test]
fn strings_by_length_pattern_and_format() {
    run(&[
        (
            json!({"type": "string", "minLength": 2, "maxLength": 3}),
            &["\"ab\"", "\"éé💩\"", "\"a\\n\""],
            &["\"a\"", "\"abcd\"", "\"é\""],
        ),
        (
            json!({"type": "string", "pattern": "^[A-Z]{2}\\d+$"}),
            &["\"AB1\"", "\"ZZ42\""],
            &["\"AB\"", "\"ab1\"", "\"xAB1\"", "\"AB1 \""],
        ),
        (json!({"type": "string", "pattern": "b+"}), &["\"b\"", "\"abba\""], &["\"a\"", "\"\""]),
        (json!({"type": "string", "pattern": "^a", "maxLength": 2}), &["\"a\"", "\"ab\""], &["\"b\"", "\"abc\""]),
        (json!({"type": "string", "pattern": "^/a/(b|c)$"}), &["\"/a/b\""], &["\"/a/\"", "\"ab\""]),
        (json!({"type": "string", "format": "date"}), &["\"2024-02-29\""], &["\"2024-13-01\"", "\"2024-04-31\"", "\"24-01-01\""]),
        (
            json!({"type": "string", "format": "date-time"}),
            &["\"2024-01-31T23:59:59Z\"", "\"2024-01-31T23:59:59.5+02:00\""],
            &["\"2024-01-31\"", "\"2024-01-31T25:00:00Z\""],
        ),
        (json!({"type": "string", "format": "time"}), &["\"08:30:06Z\""], &["\"08:30\"", "\"8:30:06Z\""]),
        (json!({"type": "string", "format": "duration"}), &["\"P4DT12H30M5S\"", "\"PT36H\""], &["\"4D\"", "\"P\""]),
        (json!({"type": "string", "format": "email"}), &["\"joe.bloggs@example.com\""], &["\"joe\"", "\"@example.com\""]),
        (json!({"type": "string", "format": "hostname"}), &["\"www.example.com\""], &["\"-a\"", "\"a_b\""]),
        (json!({"type": "string", "format": "ipv4"}), &["\"192.168.0.1\""], &["\"256.1.1.1\"", "\"1.2.3\""]),
        (json!({"type": "string", "format": "ipv6"}), &["\"::1\"", "\"fe80::a\""], &["\"12345::\"", "\"1.2.3.4\""]),
        (json!({"type": "string", "format": "uuid"}), &["\"2eb8aa08-aa98-11ea-b4aa-73b441d16380\""], &["\"2eb8aa08\""]),
        (json!({"type": "string", "format": "uri"}), &["\"https://example.com/a?b=c#d\""], &["\"//example.com\"", "\"a b\""]),
        // Not a format of the standard: an annotation.
        (json!({"type": "string", "format": "password"}), &["\"anything\""], &["1"]),
        // Keywords for strings say nothing of other values.
        (json!({"minLength": 3}), &["\"abc\"", "1", "[]"], &["\"ab\""]),
    ]);
}

#[test]
fn arrays_by_items_and_size() {
    run(&[
        (json!({"type": "array", "items": {"type": "integer"}}), &["[]", "[1,2,3]"], &["[\"a\"]", "[1,null]"]),
        (
            json!({"type": "array", "minItems": 1, "maxItems": 3, "items": {"type": "boolean"}}),
            &["[true]", "[true,false,true]"],
            &["[]", "[true,true,true,true]"],
        ),
        (
            json!({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]}),
            &["[]", "[\"a\"]", "[\"a\",1]", "[\"a\",1,null]"],
            &["[1]", "[\"a\",\"b\"]"],
        ),
        (json!({"type": "array", "prefixItems": [{"type": "string"}], "items": false}), &["[]", "[\"a\"]"], &["[\"a\",1]"]),
        (
            json!({"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "null"}, "minItems": 2}),
            &["[\"a\",null]"],
            &["[\"a\"]", "[\"a\",1]"],
        ),
        // Draft 7's spelling of a tuple.
        (
            json!({"type": "array", "items": [{"type": "string"}], "additionalItems": {"type": "integer"}}),
            &["[\"a\",1,2]"],
            &["[\"a\",\"b\"]", "[1]"],
        ),
        (json!({"type": "array", "maxItems": 1_000_000_000u64}), &["[1]"], &["{}"]),
        (json!({"type": "array", "uniqueItems": false}), &["[1,1]"], &["1"]),
    ]);
}

#[test]
fn objects_by_properties() {
    let person = json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name"],
        "additionalProperties": false
    });
    run(&[
        (
            person,
            &["{\"name\":\"a\"}", "{\"name\":\"a\",\"age\":3}", "{\"name\": \"a\", \"age\": 3}"],
            &["{}", "{\"age\":3}", "{\"name\":1}", "{\"name\":\"a\",\"x\":1}", "{\"name\":\"a\",}"],
        ),
        (
            json!({"properties": {"a": {"type": "integer"}}, "type": "object"}),
            &["{}", "{\"a\":1}", "{\"a\":1,\"b\":[]}", "{\"b\":2}"],
            &["{\"a\":\"x\"}"],
        ),
        (
            json!({"type": "object", "additionalProperties": {"type": "integer"}}),
            &["{}", "{\"x\":1,\"y\":2}"],
            &["{\"x\":\"1\"}"],
        ),
        (json!({"type": "object", "required": ["a"]}), &["{\"a\":null}"], &["{}", "{\"b\":1}"]),
        (
            json!({"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": false}),
            &["{}", "{\"n_a\":1}"],
            &["{\"n_a\":\"x\"}", "{\"b\":1}"],
        ),
        (
            json!({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": {"type": "null"}, "minProperties": 2, "maxProperties": 3}),
            &["{\"a\":1,\"b\":null}", "{\"a\":1,\"b\":null,\"c\":null}"],
            &["{\"a\":1}", "{\"a\":1,\"b\":null,\"c\":null,\"d\":null}"],
        ),
        (
            json!({"type": "object", "properties": {"a": false, "b": true}, "additionalProperties": false}),
            &["{}", "{\"b\":1}"],
            &["{\"a\":1}"],
        ),
        (
            json!({"type": "object", "properties": {"é\"": {"type": "null"}}, "additionalProperties": false}),
            &["{\"é\\\"\":null}"],
            &["{\"e\":null}"],
        ),
    ]);
}

#[test]
fn schemas_combined() {
    let circle = json!({"type": "object", "properties": {"kind": {"const": "circle"}, "r": {"type": "number"}}, "required": ["kind", "r"], "additionalProperties": false});
    let square = json!({"type": "object", "properties": {"kind": {"const": "square"}, "a": {"type": "number"}}, "required": ["kind", "a"], "additionalProperties": false});
    run(&[
        (json!({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}), &["1", "\"a\""], &["\"ab\"", "null"]),
        (json!({"anyOf": [{"type": "integer"}, {"type": "number"}]}), &["1", "1.5"], &["null"]),
        (json!({"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]}), &["1", "\"a\"", "null"], &["1.5", "[]"]),
        (
            json!({"oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/square"}], "$defs": {"circle": circle, "square": square}, "discriminator": {"propertyName": "kind"}}),
            &["{\"kind\":\"circle\",\"r\":1}", "{\"kind\":\"square\",\"a\":2}"],
            &["{\"kind\":\"circle\",\"a\":1}", "{\"kind\":\"oval\",\"a\":2}"],
        ),
        (json!({"oneOf": [{"const": 1}, {"const": 2}], "anyOf": [{"const": 2}, {"const": 3}]}), &["2"], &["1", "3"]),
        (json!({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}), &["3", "5"], &["2", "6"]),
        (
            json!({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {"type": "string"}}, "required": ["b"]}]}),
            &["{\"a\":1,\"b\":\"x\"}"],
            &["{\"a\":1}", "{\"a\":\"x\",\"b\":\"x\"}"],
        ),
        (json!({"type": "string", "enum": ["a", "bb", 3], "minLength": 2}), &["\"bb\""], &["\"a\"", "3"]),
    ]);
}

#[test]
fn references_of_every_spelling() {
    let tree = json!({"$ref": "#/$defs/node", "$defs": {"node": {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["value"], "additionalProperties": false
    }}});
    run(&[
        (tree, &["{\"value\":1,\"children\":[{\"value\":2,\"children\":[]}]}"], &["{\"value\":1,\"children\":[{}]}"]),
        (
            json!({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": false}),
            &["{}", "{\"next\":{\"next\":{}}}"],
            &["{\"next\":1}"],
        ),
        (json!({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"const": 7}}}), &["7"], &["8"]),
        (
            json!({"$ref": "#/definitions/x", "definitions": {"x": {"$ref": "#/definitions/y"}, "y": {"type": "null"}}}),
            &["null"],
            &["1"],
        ),
        (json!({"$ref": "#there", "$defs": {"a": {"$anchor": "there", "type": "boolean"}}}), &["true"], &["1"]),
        (
            json!({"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}, "type": "object", "required": ["b"]}),
            &["{\"b\":1}"],
            &["{\"b\":\"x\"}"],
        ),
        (json!({"$ref": "#/$defs/n", "maximum": 3, "$defs": {"n": {"type": "integer", "minimum": 1}}}), &["1", "3"], &["0", "4"]),
    ]);
}

#[test]
fn what_cannot_be_honoured_is_refused_by_its_path() {
    let compiler = compiler();
    let inside = |schema: Value| json!({"type": "object", "properties": {"a": {"type": "array", "items": schema}}});
    for (schema, path) in [
        (json!({"not": {"type": "null"}}), "not"),
        (json!({"if": {}, "then": {}}), "if"),
        (json!({"type": "array", "contains": {"const": 1}}), "contains"),
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"propertyNames": {"pattern": "a"}}), "propertyNames"),
        (json!({"dependentRequired": {"a": ["b"]}}), "dependentRequired"),
        (json!({"unevaluatedProperties": false}), "unevaluatedProperties"),
        (json!({"format": "idn-email"}), "format"),
        (json!({"type": "strnig"}), "type"),
        (json!({"enum": []}), "enum"),
        (json!({"minLength": -1}), "minLength"),
        (json!({"minimum": "1"}), "minimum"),
        (json!({"multipleOf": 0}), "multipleOf"),
        (json!({"pattern": 3}), "pattern"),
        (json!({"required": "a"}), "required"),
        (json!({"properties": []}), "properties"),
        (json!({"anyOf": []}), "anyOf"),
        (json!({"$ref": "https://example.com/x.json"}), "$ref"),
        (json!({"$ref": "#/$defs/missing"}), "$ref"),
        (json!({"oneOf": [{"type": "integer"}, {"minimum": 3}]}), "oneOf"),
        // Found by llguidance, and traced to the keyword.
        (json!({"type": "string", "pattern": "(?=a)b"}), "pattern"),
        (json!({"type": "string", "pattern": "("}), "pattern"),
        (json!({"type": "object", "properties": {"x": {}, "y": {}}, "minProperties": 2}), "minProperties"),
    ] {
        let error = refusal(&compiler, inside(schema.clone()), false);
        let expected = format!("properties.a.items.{path}");
        assert_eq!((error.path.as_str(), error.keyword.as_deref()), (expected.as_str(), Some(path)), "{schema}: {error}");
    }
    let in_definition = json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "object", "properties": {"b": {"not": {}}}}}});
    assert_eq!(refusal(&compiler, in_definition, false).path, "$defs.A.properties.b.not");
    let circle = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}});
    assert!(refusal(&compiler, circle, false).message.contains("without end"));
    // In an array it may be left out; alone it has no value.
    assert_eq!(refusal(&compiler, json!({"type": "integer", "minimum": 3, "maximum": 2}), false).path, "maximum");
    assert!(refusal(&compiler, json!(false), false).message.contains("false"));
    assert!(refusal(&compiler, json!([1]), false).message.contains("object or a boolean"));
}

#[test]
fn strict_schemas_keep_to_the_rules_of_openai() {
    let compiler = compiler();
    let good = json!({"type": "object", "properties": {"a": {"type": ["string", "null"]}}, "required": ["a"], "additionalProperties": false});
    assert!(compiler.compile(&Constraint::JsonSchema { schema: good.clone(), strict: true }).is_ok());
    let nested =
        |inner: Value| json!({"type": "object", "properties": {"in": inner}, "required": ["in"], "additionalProperties": false});
    for (schema, path, words) in [
        (json!({"type": "array", "items": good}), "type", "got 'type: \"array\"'"),
        (json!({"anyOf": [good]}), "type", "got 'type: None'"),
        (
            nested(json!({"type": "object", "properties": {}, "required": []})),
            "properties.in.additionalProperties",
            "to be false",
        ),
        (
            nested(json!({"type": "object", "properties": {"x": {}}, "additionalProperties": false})),
            "properties.in.required",
            "Missing 'x'",
        ),
        (
            nested(json!({"type": "object", "properties": {}, "required": ["y"], "additionalProperties": false})),
            "properties.in.required",
            "Extra required key 'y'",
        ),
        (
            json!({"type": "object", "properties": {"b": {"$ref": "#/$defs/B"}}, "required": ["b"], "additionalProperties": false, "$defs": {"B": {"type": "object", "properties": {}, "additionalProperties": true}}}),
            "$defs.B.additionalProperties",
            "to be false",
        ),
    ] {
        let error = refusal(&compiler, schema.clone(), true);
        assert_eq!(error.path, path, "{schema}");
        assert!(error.message.contains(words), "{error}");
    }
}

#[test]
fn schemas_of_one_of_are_compared_in_bounded_time() {
    // Each definition names the next one fifty times: fifty to the fourth ways to the end.
    let mut definitions = serde_json::Map::new();
    for level in 0..3 {
        definitions.insert(level.to_string(), json!({"anyOf": vec![json!({"$ref": format!("#/$defs/{}", level + 1)}); 50]}));
    }
    definitions.insert("3".into(), json!({"anyOf": vec![json!({"type": "string"}); 50]}));
    let schema = json!({"oneOf": [{"$ref": "#/$defs/0"}, {"type": "integer"}], "$defs": definitions});
    // They do exclude each other; with fewer ways to the end it is found out.
    assert_eq!(check(&schema, false).expect_err("it takes too long to know").keyword.as_deref(), Some("oneOf"));
}
