//! A server elsewhere, on a real socket, that does what a test says, byte by byte.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tidemill::upstream::remote::ServerSpec;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What a request was.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: Value,
}

/// The server; it ends when it is dropped.
pub struct Far {
    pub url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

/// One request's connection, its request read.
pub struct Conn {
    stream: TcpStream,
    pub seen: Seen,
}

impl Far {
    /// Gives each request, numbered from 0, to `script`.
    pub async fn new<F, W>(script: F) -> Self
    where
        F: Fn(usize, Conn) -> W + Send + Sync + 'static,
        W: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            let script = Arc::new(script);
            while let Ok((stream, _)) = listener.accept().await {
                let (all, script) = (Arc::clone(&all), Arc::clone(&script));
                tokio::spawn(async move {
                    let Some(conn) = Conn::read(stream).await else { return };
                    let number = {
                        let mut all = all.lock().unwrap();
                        all.push(conn.seen.clone());
                        all.len() - 1
                    };
                    script(number, conn).await;
                });
            }
        });
        Self { url, seen, task }
    }

    /// One that answers every chat with this text, streamed or not.
    pub async fn saying(text: &'static str) -> Self {
        Self::new(move |_, conn| conn.say(text)).await
    }

    /// One that answers every request with this status and error.
    pub async fn failing(status: u16, headers: &'static str, error: Value) -> Self {
        Self::new(move |_, conn| conn.reply(status, headers, json!({"error": error}))).await
    }

    pub fn spec(&self, name: &str) -> ServerSpec {
        ServerSpec::new(name, self.url.clone())
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Conn {
    async fn read(mut stream: TcpStream) -> Option<Self> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 8192];
        let end = loop {
            if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            match stream.read(&mut buffer).await.ok()? {
                0 => return None,
                count => bytes.extend_from_slice(&buffer[..count]),
            }
        };
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.lines();
        let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
        let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()));
        let headers: HashMap<String, String> = lines.filter_map(header).collect();
        let length: usize = headers["content-length"].parse().unwrap();
        while bytes.len() < end + length {
            match stream.read(&mut buffer).await.ok()? {
                0 => return None,
                count => bytes.extend_from_slice(&buffer[..count]),
            }
        }
        let body = serde_json::from_slice(&bytes[end..]).unwrap();
        Some(Self { stream, seen: Seen { path, headers, body } })
    }

    async fn write(&mut self, text: &str) {
        // A client that has left is what some tests are about.
        let _ = self.stream.write_all(text.as_bytes()).await;
    }

    /// A whole answer. `headers` end their lines with `\r\n`.
    pub async fn reply(mut self, status: u16, headers: &str, body: Value) {
        let body = body.to_string();
        let length = body.len();
        self.write(&format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
        .await;
        let _ = self.stream.shutdown().await;
    }

    pub async fn begin(&mut self) {
        self.write(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .await;
    }

    /// Bytes of a stream that was begun.
    pub async fn bytes(&mut self, text: &str) {
        self.write(&format!("{:x}\r\n{text}\r\n", text.len())).await;
    }

    pub async fn event(&mut self, data: &Value) {
        self.bytes(&format!("data: {data}\n\n")).await;
    }

    /// The stream's end as HTTP has it.
    pub async fn end(mut self) {
        self.write("0\r\n\r\n").await;
        let _ = self.stream.shutdown().await;
    }

    /// Waits until the other side has closed the connection.
    pub async fn closed(mut self) {
        let mut buffer = [0; 64];
        while !matches!(self.stream.read(&mut buffer).await, Ok(0) | Err(_)) {}
    }

    /// Whatever was asked for: the text as an answer of two words' tokens, with usage.
    pub async fn say(mut self, text: &str) {
        if self.seen.body["stream"] != true {
            let body = whole(json!({"role": "assistant", "content": text}), "stop");
            return self.reply(200, "", body).await;
        }
        self.begin().await;
        self.event(&delta(json!({"role": "assistant", "content": ""}))).await;
        self.event(&delta(json!({"content": text}))).await;
        self.event(&finish("stop")).await;
        if self.seen.body["stream_options"]["include_usage"] == true {
            self.event(&json!({"id": "theirs", "object": "chat.completion.chunk", "model": "big-1-0613", "choices": [], "usage": usage()})).await;
        }
        self.bytes("data: [DONE]\n\n").await;
        self.end().await;
    }
}

pub fn usage() -> Value {
    json!({"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200, "prompt_tokens_details": {"cached_tokens": 400}})
}

pub fn delta(delta: Value) -> Value {
    let choices = json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]);
    json!({"id": "theirs", "object": "chat.completion.chunk", "created": 3, "model": "big-1-0613", "choices": choices, "usage": null})
}

pub fn finish(reason: &str) -> Value {
    let mut chunk = delta(json!({}));
    chunk["choices"][0]["finish_reason"] = reason.into();
    chunk
}

pub fn whole(message: Value, reason: &str) -> Value {
    let choices = json!([{"index": 0, "message": message, "logprobs": null, "finish_reason": reason}]);
    json!({"id": "theirs", "object": "chat.completion", "created": 3, "model": "big-1-0613", "choices": choices, "usage": usage(), "odd": true})
}
