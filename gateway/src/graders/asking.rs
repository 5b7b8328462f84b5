//! A grader's question as a chat completion of this server.

use crate::http::Caller;
use crate::http::inside::Inside;
use bytes::Bytes;
use serde_json::{Value, json};
use std::time::Duration;
use tidemill_rlhf::reward::grader::{Oracle, Question, Reply};
use tokio::runtime::Handle;

const ENDPOINT: &str = "/v1/chat/completions";
/// Tells records of grading from those of applications.
const MARK: &str = "tidemill_grader";
/// How long whoever waits for one grading waits for a model.
const PATIENCE: Duration = Duration::from_secs(120);

/// The body of the chat completion. `asked_by` stands in its record.
fn body(question: &Question, asked_by: &str) -> Value {
    let messages: Vec<Value> =
        question.messages.iter().map(|(role, content)| json!({ "role": role.as_str(), "content": content })).collect();
    json!({
        "model": question.model,
        "messages": messages,
        "temperature": question.temperature,
        "top_p": question.top_p,
        "seed": question.seed,
        "max_tokens": question.max_tokens,
        "response_format": { "type": "json_schema", "json_schema": { "name": "grade", "schema": question.schema, "strict": true } },
        "metadata": { MARK: asked_by },
    })
}

/// What a model says to a question; `None` when the server left before it did.
pub(super) async fn ask(inside: &Inside, caller: &Caller, question: &Question, asked_by: &str) -> Option<Result<Reply, String>> {
    let id = format!("grade_{}", inside.issue_id().simple());
    let sent = inside.send(caller, ENDPOINT, &id, Bytes::from(body(question, asked_by).to_string())).await?;
    let answer: Value = serde_json::from_slice(&sent.body).unwrap_or_default();
    if !sent.status.is_success() {
        let why = answer["error"]["message"].as_str().unwrap_or("it gave no reason");
        return Some(Err(format!("the model `{}` could not be asked ({}): {why}", question.model, sent.status.as_u16())));
    }
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned();
    let tokens = answer["usage"]["total_tokens"].as_u64().unwrap_or_default();
    Some(Ok(Reply { text, tokens }))
}

/// Asks from a thread that may wait, on behalf of a request's caller.
pub struct InsideOracle {
    /// The router.
    pub inside: Inside,
    /// Who asks.
    pub caller: Caller,
    /// Where the asking runs.
    pub runtime: Handle,
}

impl Oracle for InsideOracle {
    fn ask(&self, question: &Question) -> Result<Reply, String> {
        let work = tokio::time::timeout(PATIENCE, ask(&self.inside, &self.caller, question, "run"));
        match self.runtime.block_on(work) {
            Ok(Some(reply)) => reply,
            Ok(None) => Err("the server is leaving".to_owned()),
            Err(_) => Err(format!("the model `{}` did not answer within {} s", question.model, PATIENCE.as_secs())),
        }
    }
}
