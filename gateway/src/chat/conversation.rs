//! What was said so far, and the commands that change it.

use serde_json::{Value, json};

/// The messages of a chat.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    system: Option<String>,
    turns: Vec<(Role, String)>,
}

/// Who spoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Conversation {
    /// An empty chat, perhaps with a system message.
    pub fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    /// Adds a turn.
    pub fn push(&mut self, role: Role, text: impl Into<String>) {
        self.turns.push((role, text.into()));
    }

    /// Forgets the turns, keeps the system message.
    pub fn clear(&mut self) {
        self.turns.clear();
    }

    /// Replaces the system message; an empty one removes it.
    pub fn set_system(&mut self, text: &str) {
        self.system = (!text.trim().is_empty()).then(|| text.trim().to_owned());
    }

    /// Drops the last answer, so that the last question can be asked again; false when there is nothing to ask.
    pub fn retry(&mut self) -> bool {
        if matches!(self.turns.last(), Some((Role::Assistant, _))) {
            self.turns.pop();
        }
        matches!(self.turns.last(), Some((Role::User, _)))
    }

    /// Drops the last question (its answer failed or was refused).
    pub fn drop_question(&mut self) {
        if matches!(self.turns.last(), Some((Role::User, _))) {
            self.turns.pop();
        }
    }

    /// The `messages` of a chat completion.
    pub fn messages(&self) -> Value {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let turns = self.turns.iter().map(|(role, text)| {
            let role = match role {
                Role::User => "user",
                Role::Assistant => "assistant",
            };
            json!({"role": role, "content": text})
        });
        Value::Array(system.chain(turns).collect())
    }
}

/// A line that the person typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Send it.
    Message(String),
    /// `/clear`
    Clear,
    /// `/retry`
    Retry,
    /// `/system TEXT`
    System(String),
    /// `/save FILE`
    Save(String),
    /// `/help`
    Help,
    /// `/quit`
    Quit,
    /// Nothing was typed.
    Empty,
    /// A command that does not exist.
    Unknown(String),
}

impl Line {
    /// Reads a line; what starts with one slash is a command, two slashes send one.
    pub fn parse(line: &str) -> Self {
        let line = line.trim();
        if line.is_empty() {
            return Line::Empty;
        }
        let Some(command) = line.strip_prefix('/') else { return Line::Message(line.to_owned()) };
        if command.starts_with('/') {
            return Line::Message(command.to_owned());
        }
        let (name, rest) = command.split_once(' ').unwrap_or((command, ""));
        match name {
            "clear" => Line::Clear,
            "retry" => Line::Retry,
            "system" => Line::System(rest.to_owned()),
            "save" if !rest.trim().is_empty() => Line::Save(rest.trim().to_owned()),
            "help" | "?" => Line::Help,
            "quit" | "exit" | "q" => Line::Quit,
            _ => Line::Unknown(name.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        assert_eq!(Line::parse("  hello "), Line::Message("hello".into()));
        assert_eq!(Line::parse("//etc"), Line::Message("/etc".into()));
        assert_eq!(Line::parse("/system be brief"), Line::System("be brief".into()));
        assert_eq!(Line::parse("/save a b.json"), Line::Save("a b.json".into()));
        assert_eq!(Line::parse("/save"), Line::Unknown("save".into()));
        assert_eq!(Line::parse("/frobnicate"), Line::Unknown("frobnicate".into()));
        assert_eq!(Line::parse(""), Line::Empty);
    }

    #[test]
    fn retry_asks_the_last_question_again() {
        let mut chat = Conversation::new(Some("s".into()));
        assert!(!chat.retry());
        chat.push(Role::User, "q");
        chat.push(Role::Assistant, "a");
        assert!(chat.retry());
        assert_eq!(chat.messages(), json!([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]));
        chat.drop_question();
        assert!(!chat.retry());
    }
}
