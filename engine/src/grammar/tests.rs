//! Grammars against texts: each token of an accepted text is in the mask that comes before it, and so is the end.

use super::*;
use crate::tokenizer::letters::bytes;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

pub(super) const END: u32 = 256;

/// Patient: on a machine with other work what takes a second of a processor may take many by the clock.
pub(super) fn compiler() -> Compiler {
    Compiler::waiting(Duration::from_secs(120), bytes(), vec![END], 271)
}

fn allows(words: &[u32], token: u32) -> bool {
    words.get(token as usize / 32).is_some_and(|word| (word >> (token % 32)) & 1 == 1)
}

/// Whether the tokens, and then the end, can be drawn one after the other.
fn draws(grammar: &Grammar, tokens: &[u32]) -> bool {
    let mut matcher = grammar.matcher();
    for token in tokens {
        if matcher.is_stopped() {
            return false;
        }
        let mask: Vec<u32> = matcher.compute_mask().unwrap().into();
        // A control token is never text.
        assert!(!allows(&mask, END) || matcher.is_accepting().unwrap());
        if !allows(&mask, *token) {
            return false;
        }
        matcher.consume_token(*token).unwrap();
    }
    matcher.is_stopped() || allows(matcher.compute_mask().unwrap().as_slice(), END)
}

/// Whether a text can be generated, byte by byte or in larger tokens, which must come to the same.
pub(super) fn accepts(grammar: &Grammar, text: &str) -> bool {
    let one_by_one: Vec<u32> = text.bytes().map(u32::from).collect();
    let greedy = grammar.matcher().tok_env().unwrap().tokenize_bytes(text.as_bytes());
    let accepted = draws(grammar, &one_by_one);
    assert_eq!(draws(grammar, &greedy), accepted, "{text}");
    accepted
}

fn schema(schema: Value) -> Constraint {
    Constraint::JsonSchema { schema, strict: false }
}

fn refusal(constraint: &Constraint) -> GrammarError {
    compiler().compile(constraint).expect_err("it cannot be honoured")
}

#[test]
fn any_object_is_an_object() {
    let grammar = compiler().compile(&Constraint::JsonObject).unwrap();
    for text in ["{}", r#"{"a":[1,{"b":null}],"c":"\n é"}"#, "{\"a\": 1,\n  \"b\": 2}"] {
        assert!(accepts(&grammar, text), "{text}");
    }
    for text in ["[]", "1", "{", "{\"a\"}", "{'a':1}", "{} {}", "", "{\"a\":01}", "{\"a\":\"\n\"}"] {
        assert!(!accepts(&grammar, text), "{text}");
    }
}

#[test]
fn blanks_between_values_are_bounded() {
    let grammar = compiler().compile(&schema(json!({"type": "array", "items": {"type": "integer"}}))).unwrap();
    for text in ["[1,2]", "[1, 2]", "[\n  1,\n  2\n]", "[\n                1]"] {
        assert!(accepts(&grammar, text), "{text}");
    }
    for text in ["[1,  2]", "[1,\n\n2]", "[1,\t2]", "[\n                 1]", "[1] ", "[1]\n", "  [1]"] {
        assert!(!accepts(&grammar, text), "{text:?}");
    }
}

#[test]
fn a_regular_expression_matches_the_whole_text() {
    let grammar = compiler().compile(&Constraint::Regex(r"^(\d{3}-){2}[a-f]+/?$".into())).unwrap();
    assert!(accepts(&grammar, "123-456-abc") && accepts(&grammar, "123-456-f/"));
    for text in ["123-456-", "123-456-abcg", "x123-456-a", "🯸23-456-a", "123-456-a\n"] {
        assert!(!accepts(&grammar, text), "{text}");
    }
    assert!(refusal(&Constraint::Regex("(?<=a)b".into())).message.contains("look-around"));
    assert!(refusal(&Constraint::Regex(r"\bword".into())).message.contains("supported"));
}

#[test]
fn one_of_the_choices_and_nothing_else() {
    let choices = ["positive", "posit", "a/b (c)", "\"é\"\n", "+1"].map(String::from);
    let grammar = compiler().compile(&Constraint::Choice(choices.to_vec())).unwrap();
    assert!(choices.iter().all(|choice| accepts(&grammar, choice)));
    for text in ["pos", "positives", "+", "a/b c", ""] {
        assert!(!accepts(&grammar, text), "{text}");
    }
}

#[test]
fn a_lark_grammar_with_json_inside() {
    let rule = for_lark(
        &json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}),
        true,
    )
    .unwrap();
    let lark = format!("start: \"call \" name \" \" args\nname: \"add\" | \"mul\"\nargs: %json {rule}\n");
    let grammar = compiler().compile(&Constraint::Lark(lark)).unwrap();
    assert!(accepts(&grammar, r#"call add {"n": 12}"#));
    assert!(!accepts(&grammar, r#"call sub {"n": 12}"#));
    assert!(!accepts(&grammar, r#"call add {"n":  12}"#));
    let special = compiler().compile(&Constraint::Lark("start: \"a\" <|end|> \"b\"".into()));
    assert!(special.is_ok(), "{special:?}");
    assert!(refusal(&Constraint::Lark("start: \"a".into())).path.is_empty());
    assert!(refusal(&Constraint::Lark(format!("start: {}", "(".repeat(5000)))).message.contains("nest"));
}

#[test]
fn bombs_are_refused_in_bounded_time() {
    let doubling = |keyword: &str| {
        let mut definitions = serde_json::Map::new();
        for level in 0..40 {
            let next = json!({"$ref": format!("#/$defs/{}", level + 1)});
            let both =
                json!({"type": "object", "properties": {format!("p{level}"): {"type": "string"}}, keyword: [next.clone(), next]});
            definitions.insert(level.to_string(), both);
        }
        definitions.insert("40".into(), json!({"type": "object", "properties": {"end": {"type": "string"}}}));
        schema(json!({"$ref": "#/$defs/0", "$defs": definitions}))
    };
    let deep = |depth: usize| (0..depth).fold(json!({"type": "string"}), |inner, _| json!({"items": inner, "type": "array"}));
    let chain = |length: usize| {
        let links =
            (0..length).map(|at| (at.to_string(), json!({"type": "array", "items": {"$ref": format!("#/$defs/{}", at + 1)}})));
        let mut definitions: serde_json::Map<String, Value> = links.collect();
        definitions.insert(length.to_string(), json!({"type": "string"}));
        schema(json!({"$ref": "#/$defs/0", "$defs": definitions}))
    };
    let wide = |count: usize| {
        let properties: serde_json::Map<String, Value> =
            (0..count).map(|at| (format!("p{at}"), json!({"type": "string"}))).collect();
        schema(json!({"type": "object", "properties": properties}))
    };
    let refused = [
        schema(deep(300)),
        chain(3000),
        wide(5001),
        schema(json!({"type": "string", "minLength": 2_000_000_000u64})),
        Constraint::Lark(format!("start: {}\n", (0..60_000).map(|at| format!("\"{at}\"")).collect::<Vec<_>>().join(" | "))),
        Constraint::Choice(vec!["x".repeat(MAX_CONSTRAINT_BYTES + 1)]),
    ];
    for constraint in refused {
        let error = compiler().compile(&constraint).map(|_| format!("{constraint:.80?}")).expect_err("too much");
        assert!(!error.message.is_empty());
    }
    for constraint in [wide(2000), chain(90), schema(deep(100))] {
        compiler().compile(&constraint).unwrap();
    }
    // Whether these fit is llguidance's affair: what counts is that it says so soon.
    let pattern = schema(json!({"type": "string", "pattern": "(((a{1,99}){1,99}){1,99}){1,99}"}));
    let regex = Constraint::Regex("((((a{1,999}){1,999}b?){1,999}c){1,999}d?){1,999}".into());
    let started = Instant::now();
    for constraint in [doubling("allOf"), doubling("anyOf"), pattern, regex] {
        Compiler::new(bytes(), vec![END], 271).compile(&constraint).ok();
    }
    assert!(started.elapsed() < Duration::from_secs(120), "{:?}", started.elapsed());
}

#[test]
fn requests_of_one_grammar_share_what_they_learn_and_do_not_disturb_each_other() {
    let grammar = compiler().compile(&schema(json!({"enum": ["red", "green"]}))).unwrap();
    let (mut a, mut b) = (grammar.matcher(), grammar.matcher());
    a.consume_tokens(&[b'"'.into(), b'r'.into()]).unwrap();
    b.consume_tokens(&[b'"'.into(), b'g'.into()]).unwrap();
    assert!(allows(a.compute_mask().unwrap().as_slice(), b'e'.into()));
    assert!(allows(b.compute_mask().unwrap().as_slice(), b'r'.into()));
    // A sequence whose automaton broke leaves a fresh one behind.
    assert!(a.test_trigger_lexer_error().is_err());
    assert!(b.compute_mask().is_err());
    assert!(accepts(&grammar, "\"red\""));
}

#[test]
fn a_server_without_room_says_so_and_blames_no_constraint() {
    let compiler = compiler();
    compiler.0.under_way.store(compiler::MOST_COMPILATIONS, std::sync::atomic::Ordering::Release);
    assert!(compiler.compile(&Constraint::JsonObject).expect_err("no room").busy);
    compiler.0.under_way.store(0, std::sync::atomic::Ordering::Release);
    assert!(compiler.compile(&Constraint::JsonObject).is_ok());
    assert!(!compiler.compile(&Constraint::Regex("a(".into())).expect_err("no expression").busy);
}
