//! Two answers to one person, as two choices of one response. Each choice has its own answer's id under `tidemill`, by which feedback
//! names the better one; the response is called as the first.

use axum::body::{Body, BodyDataStream};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;

/// Two whole answers of chat in the order in which they are shown. What the second one's prompt took is the operator's affair.
pub fn merged(first: Value, second: Value) -> Value {
    let mut choices = Vec::with_capacity(2);
    for (index, answer) in [&first, &second].into_iter().enumerate() {
        let mut choice = answer["choices"][0].clone();
        choice["index"] = index.into();
        choice["tidemill"] = json!({"id": answer["id"]});
        choices.push(choice);
    }
    let mut answer = first;
    if answer["usage"].is_object() {
        answer["usage"] = both(&answer["usage"], &second["usage"]);
    }
    answer["choices"] = choices.into();
    answer
}

/// The first one's prompt and both outputs.
fn both(first: &Value, second: &Value) -> Value {
    let count = |usage: &Value, key: &str| usage[key].as_u64().unwrap_or_default();
    let output = count(first, "completion_tokens") + count(second, "completion_tokens");
    let mut usage = first.clone();
    usage["completion_tokens"] = output.into();
    usage["total_tokens"] = (count(first, "prompt_tokens") + output).into();
    usage
}

/// Two streamed answers of chat in the order in which they are shown, as one stream. One that breaks off leaves the other alone.
pub fn streamed(first: Body, second: Body) -> Body {
    let state = Streaming {
        first: Some(events(0, first)),
        second: Some(events(1, second)),
        both: None,
        merging: Merging::default(),
        waiting: VecDeque::new(),
    };
    Body::from_stream(stream::unfold(state, |mut state| async move {
        let bytes = state.next().await?;
        Some((Ok::<_, Infallible>(bytes), state))
    }))
}

/// What one answer's stream says.
#[derive(Debug, PartialEq)]
enum Said {
    Chunk(Value),
    /// A comment, which keeps the connection open.
    Comment,
    /// `[DONE]`, or the end without it.
    End,
}

struct Streaming {
    first: Option<BoxStream<'static, (usize, Said)>>,
    second: Option<BoxStream<'static, (usize, Said)>>,
    both: Option<BoxStream<'static, (usize, Said)>>,
    merging: Merging,
    waiting: VecDeque<Bytes>,
}

impl Streaming {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.waiting.pop_front() {
                return Some(bytes);
            }
            let (place, said) = match (&mut self.first, &mut self.both) {
                // The response is called as the first answer: that one has to begin before anything can be said.
                (Some(first), _) => {
                    let said = first.next().await.unwrap_or((0, Said::End));
                    if said.1 != Said::Comment
                        && let (Some(first), Some(second)) = (self.first.take(), self.second.take())
                    {
                        self.both = Some(stream::select(first, second).boxed());
                    }
                    said
                }
                (None, Some(both)) => both.next().await?,
                (None, None) => return None,
            };
            self.waiting.extend(self.merging.take(place, said));
        }
    }
}

/// The chunks of one body with its place, and then its end, once.
fn events(place: usize, body: Body) -> BoxStream<'static, (usize, Said)> {
    let state = Some((body.into_data_stream(), BytesMut::new()));
    stream::unfold(state, move |state| async move {
        let (mut data, mut buffer): (BodyDataStream, BytesMut) = state?;
        loop {
            if let Some(end) = buffer.windows(2).position(|two| two == b"\n\n") {
                let event = buffer.split_to(end + 2);
                let said = read(&event);
                let rest = (said != Said::End).then_some((data, buffer));
                return Some(((place, said), rest));
            }
            match data.next().await {
                Some(Ok(bytes)) => buffer.extend_from_slice(&bytes),
                Some(Err(_)) | None => return Some(((place, Said::End), None)),
            }
        }
    })
    .boxed()
}

fn read(event: &[u8]) -> Said {
    let Some(data) = event.strip_prefix(b"data: ") else { return Said::Comment };
    match serde_json::from_slice(data.trim_ascii_end()) {
        Ok(chunk) => Said::Chunk(chunk),
        Err(_) => Said::End,
    }
}

/// Puts two streams' chunks together.
#[derive(Default)]
struct Merging {
    id: Value,
    begun: [bool; 2],
    ended: [bool; 2],
    usage: [Option<Value>; 2],
    error: Option<Value>,
    over: bool,
}

impl Merging {
    /// The events that follow.
    fn take(&mut self, place: usize, said: Said) -> Vec<Bytes> {
        let mut out = Vec::new();
        if self.over {
            return out;
        }
        match said {
            Said::Comment if place == 0 => out.push(Bytes::from_static(b": ping\n\n")),
            Said::Comment => {}
            Said::Chunk(chunk) if chunk.get("error").is_some_and(|error| !error.is_null()) => self.error = Some(chunk),
            Said::Chunk(chunk) => out.extend(self.chunk(place, chunk).map(|chunk| event(&chunk))),
            Said::End => {
                self.ended[place] = true;
                if self.ended == [true; 2] {
                    self.over = true;
                    out.extend(self.last());
                }
            }
        }
        out
    }

    fn chunk(&mut self, place: usize, mut chunk: Value) -> Option<Value> {
        let own = chunk["id"].clone();
        if self.id.is_null() {
            self.id = own.clone();
        }
        chunk["id"] = self.id.clone();
        let Some(choice) = chunk["choices"].as_array_mut().and_then(|choices| choices.first_mut()) else {
            // Told when both have ended.
            self.usage[place] = Some(chunk);
            return None;
        };
        choice["index"] = place.into();
        if !std::mem::replace(&mut self.begun[place], true) {
            choice["tidemill"] = json!({"id": own});
        }
        Some(chunk)
    }

    /// The sum of the usage, and the end; where neither answer came to anything, why.
    fn last(&mut self) -> Vec<Bytes> {
        let mut out = Vec::new();
        if self.begun == [false; 2]
            && let Some(error) = &self.error
        {
            return vec![event(error)];
        }
        match (self.usage[0].take(), self.usage[1].take()) {
            (Some(mut first), Some(second)) => {
                first["usage"] = both(&first["usage"], &second["usage"]);
                out.push(event(&first));
            }
            (Some(only), None) | (None, Some(only)) => out.push(event(&only)),
            (None, None) => {}
        }
        out.push(Bytes::from_static(b"data: [DONE]\n\n"));
        out
    }
}

fn event(chunk: &Value) -> Bytes {
    Bytes::from(format!("data: {chunk}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    fn whole(id: &str, text: &str, tokens: u64) -> Value {
        json!({
            "id": id, "model": "assistant",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens},
        })
    }

    #[test]
    fn two_answers_become_choices_with_their_own_ids() {
        let answer = merged(whole("a", "one", 2), whole("b", "two", 3));
        assert_eq!((&answer["id"], answer["choices"].as_array().unwrap().len()), (&json!("a"), 2));
        let second = &answer["choices"][1];
        assert_eq!((&second["index"], &second["tidemill"]["id"]), (&json!(1), &json!("b")));
        assert_eq!((&second["message"]["content"], &answer["choices"][0]["tidemill"]["id"]), (&json!("two"), &json!("a")));
        assert_eq!(answer["usage"], json!({"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}));
    }

    /// An event in the middle of which the body is cut, as sockets do.
    fn body(parts: &[&str]) -> Body {
        let parts: Vec<_> = parts.iter().map(|part| Ok::<_, Infallible>(Bytes::from((*part).to_owned()))).collect();
        Body::from_stream(stream::iter(parts))
    }

    fn delta(id: &str, text: &str) -> String {
        let choices = json!([{"index": 0, "delta": {"content": text}}]);
        format!("data: {}\n\n", json!({"id": id, "choices": choices}))
    }

    fn usage(id: &str, tokens: u64) -> String {
        let usage = json!({"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens});
        format!("data: {}\n\ndata: [DONE]\n\n", json!({"id": id, "choices": [], "usage": usage}))
    }

    async fn told(first: Body, second: Body) -> Vec<String> {
        let bytes = streamed(first, second).collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        text.split_terminator("\n\n").map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn two_streams_become_one_with_one_id_one_usage_and_one_end() {
        let (a, b) = (delta("a", "one"), delta("b", "two"));
        let (cut, rest) = a.split_at(9);
        let told = told(body(&[": ping\n\n", cut, rest, &usage("a", 2)]), body(&[&(b + &delta("b", "!")), &usage("b", 3)])).await;
        assert_eq!((told[0].as_str(), told.last().unwrap().as_str(), told.len()), (": ping", "data: [DONE]", 6));
        let chunks: Vec<Value> =
            told[1..5].iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect();
        assert!(chunks.iter().all(|chunk| chunk["id"] == "a"), "{told:?}");
        let of = |place: u64| -> Vec<&Value> {
            chunks[..3].iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == place).collect()
        };
        assert_eq!((of(0).len(), of(1).len()), (1, 2));
        assert_eq!((&of(0)[0]["tidemill"]["id"], &of(1)[0]["tidemill"]["id"]), (&json!("a"), &json!("b")));
        assert!(of(1)[1].get("tidemill").is_none());
        assert_eq!(chunks[3]["usage"]["completion_tokens"], 5);
    }

    #[tokio::test]
    async fn one_that_breaks_off_leaves_the_other_alone_and_two_say_why() {
        let error = "data: {\"error\":{\"message\":\"broken\"}}\n\n";
        let one = told(body(&[error]), body(&[&delta("b", "two"), "data: [DONE]\n\n"])).await;
        assert_eq!(one.len(), 2, "{one:?}");
        assert!(one[0].contains("\"two\"") && one[1] == "data: [DONE]");
        let none = told(body(&[error]), body(&[error])).await;
        assert!(none.len() == 1 && none[0].contains("broken"), "{none:?}");
    }
}
