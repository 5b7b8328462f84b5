//! Content addresses that white space does not change: what says the same has the same.

use crate::dataset::{
    Example, Message,
    row::{CUT_OFF, PARSED},
};

/// Of what a row teaches.
pub(super) fn of(example: &Example) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut part = |name: &[u8], messages: &[Message]| {
        hasher.update(name).update(of_messages(messages).as_bytes());
    };
    part(b"prompt", example.prompt());
    match example {
        Example::Preference { chosen, rejected, .. } => {
            part(b"chosen", chosen);
            part(b"rejected", rejected);
        }
        Example::Unpaired { completion, label, .. } => part(if *label { b"good" } else { b"bad" }, completion),
        Example::Demonstration { completion, .. } => part(b"answer", completion),
    }
    hasher.finalize()
}

/// Of messages.
pub(super) fn of_messages(messages: &[Message]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for message in messages {
        hasher.update(b"\x01").update(message.role.as_bytes());
        message.content.split_whitespace().for_each(|word| {
            hasher.update(b"\x02").update(word.as_bytes());
        });
        // What a text means follows from the text, and who ended it changes nothing of it.
        for (key, value) in message.extra.iter().filter(|(key, _)| *key != PARSED && *key != CUT_OFF) {
            hasher.update(b"\x03").update(key.as_bytes()).update(value.to_string().as_bytes());
        }
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn white_space_and_what_a_text_means_change_nothing_and_calls_do() {
        let says = |text: &str, key: &str| {
            let mut message = Message::assistant(text);
            message.extra.insert(key.into(), json!([text.len()]));
            of_messages(&[message])
        };
        assert_eq!(says("a b", PARSED), says(" a\n b", PARSED));
        assert_eq!(says("a b", PARSED), of_messages(&[Message::assistant("a b")]));
        assert_eq!(of_messages(&[Message::assistant("a b").cut_off()]), of_messages(&[Message::assistant("a b")]));
        assert_ne!(says("a b", "tool_calls"), says("a  b", "tool_calls"));
        assert_ne!(says("a b", PARSED), says("ab", PARSED));
    }
}
