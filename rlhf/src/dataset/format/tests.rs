use super::*;
use proptest::prelude::*;

fn text() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[a-zA-Z0-9 .,\"\\\\\n\t{}é漢🌊\u{2028}\u{0}-]{1,40}"]
}

fn extra() -> impl Strategy<Value = Map<String, Value>> {
    let value =
        prop_oneof![text().prop_map(Value::from), any::<i32>().prop_map(Value::from), any::<bool>().prop_map(Value::from)];
    proptest::collection::vec(("name|tool_call_id|weight_of|x", value), 0..3).prop_map(|entries| entries.into_iter().collect())
}

fn message_of(role: &'static str) -> impl Strategy<Value = Message> {
    (text(), extra()).prop_map(move |(content, extra)| Message { role: role.to_owned(), content, extra })
}

fn prompt_of() -> impl Strategy<Value = Vec<Message>> {
    let turn = prop_oneof![message_of("user"), message_of("assistant"), message_of("system"), message_of("tool")];
    let tools = proptest::option::of(Just(json!([{"type": "function", "function": {"name": "f"}}])));
    (proptest::collection::vec(turn, 1..4), tools).prop_map(|(mut messages, tools)| {
        if let Some(tools) = tools {
            messages[0].extra.insert("tools".into(), tools);
        }
        messages
    })
}

fn answer_of() -> impl Strategy<Value = Vec<Message>> {
    message_of("assistant").prop_map(|message| vec![message])
}

fn examples() -> impl Strategy<Value = Example> {
    prop_oneof![
        (prompt_of(), answer_of(), answer_of()).prop_map(|(prompt, chosen, rejected)| Example::Preference {
            prompt,
            chosen,
            rejected
        }),
        (prompt_of(), answer_of(), any::<bool>()).prop_map(|(prompt, completion, label)| Example::Unpaired {
            prompt,
            completion,
            label
        }),
        (prompt_of(), answer_of()).prop_map(|(prompt, completion)| Example::Demonstration { prompt, completion }),
    ]
}

fn stored_rows() -> impl Strategy<Value = StoredRow> {
    let ids = || proptest::collection::btree_set("[a-z0-9-]{1,8}", 0..3).prop_map(|ids| ids.into_iter().collect::<Vec<_>>());
    let position = proptest::option::of(prop_oneof![Just(super::super::Position::Left), Just(super::super::Position::Right)]);
    let verdict = proptest::option::of(prop_oneof![Just(Keep::Keep), Just(Keep::Review), Just(Keep::Drop)]);
    let split = prop_oneof![Just(Split::Train), Just(Split::HeldOut)];
    (examples(), [ids(), ids(), ids(), ids(), ids()], text(), position, 1..2_000_000_000_000_000_i64, verdict, split).prop_map(
        |(example, [inferences, feedback, raters, users, variants], source, chosen_position, judged_at, verdict, split)| {
            let origin = Origin { inferences, feedback, raters, users, variants, source, chosen_position, judged_at };
            StoredRow { row: Row::new(example, origin), split, verdict }
        },
    )
}

fn read(bytes: &[u8]) -> Vec<StoredRow> {
    let text = std::str::from_utf8(bytes).unwrap();
    text.lines().map(|line| parse(serde_json::from_str(line).unwrap(), "f:1").unwrap()).collect()
}

proptest! {
    #[test]
    fn what_is_exported_comes_back(rows in proptest::collection::vec(stored_rows(), 0..6)) {
        let all = Selection { dropped: true, ..Selection::default() };
        prop_assert_eq!(&read(&lines(&rows, all, Format::Tidemill).bytes), &rows);
        let examples = |rows: &[StoredRow]| rows.iter().map(|row| row.row.example.clone()).collect::<Vec<_>>();
        prop_assert_eq!(examples(&read(&lines(&rows, all, Format::Trl).bytes)), examples(&rows));
        let openai = lines(&rows, all, Format::Openai);
        let mut with_a_form: Vec<StoredRow> = rows.iter().filter(|row| row.kind() != RowKind::Unpaired).cloned().collect();
        // It has no place for keys of others.
        for row in &mut with_a_form {
            let (Example::Preference { prompt, chosen: answer, .. } | Example::Demonstration { prompt, completion: answer } | Example::Unpaired { prompt, completion: answer, .. }) =
                &mut row.row.example;
            for message in prompt.iter_mut().chain(answer) {
                message.extra.retain(|key, _| ["name", "tool_call_id", "tools"].contains(&key.as_str()));
            }
            if let Example::Preference { rejected, .. } = &mut row.row.example {
                keep_known(rejected);
            }
        }
        prop_assert_eq!(examples(&read(&openai.bytes)), examples(&with_a_form));
        prop_assert_eq!(openai.no_form as usize, rows.len() - with_a_form.len());
    }

    #[test]
    fn a_table_gives_back_what_was_put_in(rows in proptest::collection::vec(stored_rows(), 1..6)) {
        let kernel = deltalake::kernel::StructType::new_unchecked(stored::columns());
        let schema: deltalake::arrow::datatypes::Schema =
            deltalake::kernel::engine::arrow_conversion::TryIntoArrow::try_into_arrow(&kernel).unwrap();
        let batch = stored::to_batch(&rows, std::sync::Arc::new(schema)).unwrap();
        prop_assert_eq!(batch.num_rows(), rows.len());
        prop_assert_eq!(stored::from_batch(&batch).unwrap(), rows);
    }

    #[test]
    fn no_line_panics(text in "\\PC{0,80}", key in "prompt|chosen|rejected|messages|completion|label|input|kind|split") {
        for value in [Value::from(text.clone()), json!([text.clone()]), json!([{"role": text.clone()}]), json!({"messages": text})] {
            let _ = parse(Map::from_iter([(key.clone(), value.clone()), ("prompt".to_owned(), value)]), "f:1");
        }
    }
}

fn from(value: Value) -> Result<Example, (String, String)> {
    let Value::Object(object) = value else { panic!("no object") };
    parse(object, "f:1").map(|stored| stored.row.example)
}

fn says(role: &str, text: &str) -> Message {
    message(role, text)
}

#[test]
fn all_published_forms_are_read() {
    let (user, good, bad) = (says("user", "Hi"), says("assistant", "Hello."), says("assistant", "No."));
    let pair = Example::Preference { prompt: vec![user.clone()], chosen: vec![good.clone()], rejected: vec![bad.clone()] };
    let (u, g, b) = (json!(user), json!(good), json!(bad));
    for line in [
        // TRL: strings, conversations, and conversations with an implicit prompt.
        json!({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}),
        json!({"prompt": [u], "chosen": [g], "rejected": [b]}),
        json!({"chosen": [u, g], "rejected": [u, b]}),
        // OpenAI, both names.
        json!({"input": {"messages": [u]}, "preferred_output": [g], "non_preferred_output": [b]}),
        json!({"input": {"messages": [u]}, "preferred_completion": [g], "non_preferred_completion": [b]}),
        // UltraFeedback: whole conversations, and the prompt once more.
        json!({"prompt": "Hi", "chosen": [u, g], "rejected": [u, b]}),
        // Content in parts.
        json!({"prompt": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}], "chosen": "Hello.", "rejected": "No."}),
    ] {
        assert_eq!(from(line.clone()), Ok(pair.clone()), "{line}");
    }
    let demonstration = Example::Demonstration { prompt: vec![user.clone()], completion: vec![good.clone()] };
    for line in
        [json!({"prompt": "Hi", "completion": "Hello."}), json!({"messages": [u, g]}), json!({"prompt": [u], "completion": [g]})]
    {
        assert_eq!(from(line.clone()), Ok(demonstration.clone()), "{line}");
    }
    let thumb = Example::Unpaired { prompt: vec![user], completion: vec![bad], label: false };
    assert_eq!(from(json!({"prompt": "Hi", "completion": "No.", "label": false})), Ok(thumb));
}

#[test]
fn a_bad_line_says_what_and_how_to_mend_it() {
    let u = json!({"role": "user", "content": "Hi"});
    let g = json!({"role": "assistant", "content": "Hello."});
    for (line, what) in [
        (json!({"prompt": "Hi"}), "its keys are: prompt"),
        (json!({"chosen": "a", "rejected": "b"}), "there is no 'prompt'"),
        (json!({"prompt": "Hi", "chosen": "a"}), "there is no 'rejected'"),
        (json!({"prompt": "Ho", "chosen": [u, g], "rejected": [u, g]}), "does not begin with an assistant"),
        (
            json!({"prompt": [u, {"role": "function", "content": "4"}], "completion": "x"}),
            "the role of 'prompt[1]' is 'function'",
        ),
        (json!({"prompt": [], "chosen": "a", "rejected": "b"}), "'prompt' is empty"),
        (json!({"messages": [u]}), "does not end with an assistant"),
        (json!({"messages": [g]}), "the prompt is empty"),
        (json!({"messages": [u, {"role": "assistant", "content": "x", "weight": 0}]}), "weight 0"),
        (json!({"prompt": [u], "completion": [u]}), "does not begin with an assistant"),
        (json!({"prompt": "Hi", "completion": "x", "label": 1}), "'label' is the number 1"),
        (json!({"prompt": "Hi", "completion": 5}), "'completion' is the number 5"),
        (
            json!({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "completion": "x"}),
            "content that is not text",
        ),
        (json!({"input": {"messages": [u]}, "preferred_output": [g]}), "there is no 'non_preferred_output'"),
        (json!({"kind": "preference", "split": "train", "id": "1", "prompt": [u]}), "has no 'chosen'"),
    ] {
        let (found, fix) = from(line.clone()).unwrap_err();
        assert!(found.contains(what) && !fix.is_empty(), "{line}: {found}");
    }
}

#[test]
fn lines_look_as_the_trainers_expect() {
    let example = Example::Preference {
        prompt: vec![says("user", "Hi")],
        chosen: vec![says("assistant", "Hello.")],
        rejected: vec![says("assistant", "No.")],
    };
    let pair = StoredRow { row: Row::new(example, Origin::default()), split: Split::Train, verdict: None };
    let written = |row: &StoredRow, format| String::from_utf8(lines([row], Selection::default(), format).bytes).unwrap();
    assert_eq!(
        written(&pair, Format::Trl),
        "{\"prompt\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"chosen\":[{\"role\":\"assistant\",\"content\":\"Hello.\"}],\"rejected\":[{\"role\":\"assistant\",\"content\":\"No.\"}]}\n"
    );
    assert_eq!(
        written(&pair, Format::Openai),
        "{\"input\":{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]},\"preferred_output\":[{\"role\":\"assistant\",\"content\":\"Hello.\"}],\"non_preferred_output\":[{\"role\":\"assistant\",\"content\":\"No.\"}]}\n"
    );
    let example = Example::Demonstration { prompt: vec![says("user", "Hi")], completion: vec![says("assistant", "Hello.")] };
    let demonstration = StoredRow { row: Row::new(example, Origin::default()), ..pair.clone() };
    assert_eq!(
        written(&demonstration, Format::Openai),
        "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"},{\"role\":\"assistant\",\"content\":\"Hello.\"}]}\n"
    );
    let dropped = StoredRow { verdict: Some(Keep::Drop), ..pair.clone() };
    assert_eq!(lines([&dropped], Selection::default(), Format::Trl), Lines { dropped: 1, ..Lines::default() });
    let held_out = Selection { split: Some(Split::HeldOut), ..Selection::default() };
    assert_eq!(lines([&pair], held_out, Format::Trl), Lines::default());
}

#[test]
fn tools_stand_beside_the_conversation_as_trl_and_openai_read_them() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let (u, g, b) = (json!({"role": "user", "content": "Hi"}), json!(says("assistant", "f()")), json!(says("assistant", "No.")));
    for line in [
        json!({"prompt": [u], "chosen": [g], "rejected": [b], "tools": tools}),
        json!({"prompt": [u], "completion": [g], "label": true, "tools": tools}),
        json!({"prompt": [u], "completion": [g], "tools": tools}),
    ] {
        let Value::Object(object) = line.clone() else { panic!("no object") };
        let row = parse(object, "f:1").unwrap();
        assert_eq!(row.row.example.prompt()[0].extra["tools"], tools);
        assert_eq!(Value::Object(super::line(&row, Format::Trl).unwrap()), line);
        if let Some(openai) = super::line(&row, Format::Openai) {
            assert!(openai.get("tools").or(openai.get("input").and_then(|input| input.get("tools"))) == Some(&tools));
        }
    }
    let implicit = json!({"chosen": [u, g], "rejected": [u, b], "tools": tools});
    assert_eq!(from(implicit).unwrap().prompt()[0].extra["tools"], tools);
}

#[test]
fn openai_learns_the_last_answer_only_and_meets_no_key_that_it_refuses() {
    let mut odd = says("user", "Hi");
    odd.extra.insert("cache_control".into(), json!({"type": "ephemeral"}));
    odd.extra.insert("name".into(), json!("ann"));
    let prompt = vec![odd, says("assistant", "Go away."), says("user", "Sorry?")];
    let example = Example::Demonstration { prompt, completion: vec![says("assistant", "Hello.")] };
    let row = StoredRow { row: Row::new(example, Origin::default()), split: Split::Train, verdict: None };
    let line = Value::Object(super::line(&row, Format::Openai).unwrap());
    assert_eq!(
        line,
        json!({"messages": [
            {"role": "user", "content": "Hi", "name": "ann"},
            {"role": "assistant", "content": "Go away.", "weight": 0},
            {"role": "user", "content": "Sorry?"},
            {"role": "assistant", "content": "Hello."},
        ]})
    );
    // And back, with the weights that say what a row here means anyway.
    let mut said = line.clone();
    said["messages"][3]["weight"] = json!(1);
    for line in [line, said] {
        let back = from(line).unwrap();
        assert!(back.prompt()[1].extra.is_empty() && back.answers()[0][0].extra.is_empty(), "{back:?}");
    }
}

#[test]
fn an_answer_with_calls_is_its_text_here_and_a_message_with_calls_elsewhere() {
    let call =
        |arguments: Value| json!([{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
    let parsed = json!({"content": "Look:", "reasoning_content": "Hm.", "tool_calls": call(json!({"a": 1}))});
    let mut answer = says("assistant", "<think>Hm.</think>Look:<tool_call>…");
    answer.extra.insert("parsed".into(), parsed);
    let mut user = says("user", "Hi");
    user.extra.insert("tools".into(), json!([{"type": "function", "function": {"name": "f"}}]));
    let row = Row::new(Example::Demonstration { prompt: vec![user.clone()], completion: vec![answer] }, Origin::default());
    let stored = StoredRow { row, split: Split::Train, verdict: None };
    let trl = line(&stored, Format::Trl).unwrap();
    assert_eq!(trl["tools"][0]["function"]["name"], "f");
    assert_eq!(
        trl["completion"],
        json!([{"role": "assistant", "content": "Look:", "reasoning_content": "Hm.", "tool_calls": call(json!({"a": 1}))}])
    );
    let openai = line(&stored, Format::Openai).unwrap();
    assert_eq!(openai["messages"][1], json!({"role": "assistant", "content": "Look:", "tool_calls": call(json!("{\"a\":1}"))}));
    let own = line(&stored, Format::Tidemill).unwrap();
    assert_eq!(own["completion"][0]["content"], "<think>Hm.</think>Look:<tool_call>…");
    assert_eq!(parse(own, "f:1").unwrap(), stored);
}
