//! A served model that says which of two answers is better.

use std::sync::atomic::AtomicBool;

use serde_json::json;
use tidemill_rlhf::dataset::Message;
use tidemill_rlhf::evaluate::EvaluateError;
use tidemill_rlhf::evaluate::duel::Verdict;

use crate::chat::client::ChatClient;

/// Its server and instructions.
pub struct Judge {
    client: ChatClient,
}

const INSTRUCTIONS: &str = "You compare two answers to the same conversation. Judge by correctness, helpfulness and clarity; length alone is no \
                            merit, and neither is the order in which they are shown. Reply with one letter: A, B, or T for a tie.";

impl Judge {
    /// A model of an OpenAI-compatible server; its key comes from OPENAI_API_KEY.
    pub fn new(url: &str, model: &str) -> Self {
        let mut client = ChatClient::new(url, std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty()));
        client.model = model.to_owned();
        client.extra.insert("temperature".to_owned(), json!(0));
        client.extra.insert("max_tokens".to_owned(), json!(8));
        Self { client }
    }

    /// The better of two answers; a reply that names none of them is a tie.
    pub fn compare(&mut self, messages: &[Message], first: &str, second: &str) -> Result<Verdict, EvaluateError> {
        let conversation: Vec<String> = messages.iter().map(|message| format!("{}: {}", message.role, message.content)).collect();
        let question = format!(
            "Conversation:\n{}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich answer is better? Reply with A, B or T.",
            conversation.join("\n")
        );
        let asked = json!([{ "role": "system", "content": INSTRUCTIONS }, { "role": "user", "content": question }]);
        let answer = self.client.stream(asked, &AtomicBool::new(false), |_| {});
        Ok(verdict(&answer.map_err(|error| EvaluateError::Judge(error.to_string()))?.text))
    }
}

/// The first letter that stands alone.
fn verdict(reply: &str) -> Verdict {
    let mut words = reply.split(|character: char| !character.is_alphanumeric()).filter(|word| !word.is_empty()).peekable();
    while let Some(word) = words.next() {
        match word {
            // A small a is an article, and so is a great one before this word.
            "A" if words.peek().is_none_or(|next| !next.eq_ignore_ascii_case("tie")) => return Verdict::First,
            "B" => return Verdict::Second,
            "T" | "tie" | "Tie" => return Verdict::Tie,
            _ => {}
        }
    }
    Verdict::Tie
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_read_by_its_letter() {
        for (reply, expected) in [
            ("A", Verdict::First),
            (" **B**.", Verdict::Second),
            ("Answer B is better", Verdict::Second),
            ("T", Verdict::Tie),
            ("It is a tie", Verdict::Tie),
            ("A tie.", Verdict::Tie),
            ("A. Tied to the facts", Verdict::First),
            ("Both are good", Verdict::Tie),
            ("", Verdict::Tie),
        ] {
            assert_eq!(verdict(reply), expected, "{reply}");
        }
    }
}
