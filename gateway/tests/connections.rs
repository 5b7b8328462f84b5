//! Over real sockets: clients that leave, a full queue, loading and leaving.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{MODEL, Setup, chat};
use axum::body::Body;
use http_body_util::BodyExt;
use hyper::{Request, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tidemill::http::server::{Bounds, Server};
use tidemill::http::{App, limits::BodyLimits};
use tidemill::upstream::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

struct Running {
    address: std::net::SocketAddr,
    leave: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

async fn start(app: App) -> Running {
    start_with(app, Bounds::default()).await
}

async fn start_with(app: App, bounds: Bounds) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (leave, left) = oneshot::channel();
    let server = tokio::spawn(Server::new(listener, app, bounds, None).run(async move { drop(left.await) }));
    Running { address, leave, server }
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn post(&self, body: &Value) -> TcpStream {
        let mut stream = self.connect().await;
        let body = body.to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body.as_bytes()).await.unwrap();
        stream
    }

    async fn get(&self, path: &str) -> String {
        let mut stream = self.connect().await;
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        rest(stream).await
    }
}

async fn rest(mut stream: TcpStream) -> String {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    String::from_utf8(all).unwrap()
}

/// Reads until the text appears.
async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut all = String::new();
    let mut buffer = [0; 4096];
    while !all.contains(text) {
        let count = stream.read(&mut buffer).await.unwrap();
        assert!(count > 0, "the server closed after: {all}");
        all.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    all
}

/// A machine with other work may take long for what takes no time; what never happens fails all the same.
async fn within<T>(seconds: u64, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), future).await.expect("in time")
}

fn running(app: &App) -> (usize, usize) {
    let model = app.registry.find_local(Some(MODEL)).unwrap();
    let stats = model.engine().stats();
    (stats.running, stats.blocks_used)
}

async fn until_idle(app: &App) {
    within(60, async {
        while running(app) != (0, 0) || app.drain.in_flight() != 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_sequences_streaming_or_not() {
    // Eighty seconds: longer than `until_idle` waits, so it did not just end.
    let app = Setup::slow(400, 200).app();
    let server = start(app.clone()).await;
    for stream in [true, false] {
        let mut client = server.post(&chat(json!({"stream": stream, "n": 2}))).await;
        if stream {
            read_until(&mut client, "\"content\":\"x\"").await;
        }
        within(60, async {
            while running(&app).0 != 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        drop(client);
        until_idle(&app).await;
    }
}

#[tokio::test]
async fn events_arrive_while_the_answer_is_being_made() {
    // Ten seconds of events: the first is there while the others are not made yet.
    let app = Setup::slow(400, 25).app();
    let server = start(app.clone()).await;
    let mut client = server.post(&chat(json!({"stream": true}))).await;
    let text = read_until(&mut client, "\"content\":\"x\"").await;
    assert!(!text.contains("[DONE]"));
    // A step is counted when it is over, which may be after its events. An answer that is made already is never seen to run.
    within(60, async {
        while running(&app).0 != 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_full_queue_is_a_503_with_retry_after() {
    // The first takes twenty seconds, unless it is left.
    let app = Setup { max_waiting: 1, max_seqs: 1, ..Setup::slow(400, 50) }.app();
    let server = start(app.clone()).await;
    let mut first = server.post(&chat(json!({"stream": true}))).await;
    read_until(&mut first, "\"content\":\"x\"").await;
    let second = server.post(&chat(json!({"stream": true}))).await;
    let model = app.registry.find_local(Some(MODEL)).unwrap();
    within(60, async {
        while model.engine().stats().waiting != 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let refused = within(60, rest(server.post(&chat(json!({}))).await)).await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert!(refused.contains("retry-after: ") && refused.contains("\"type\":\"server_error\""), "{refused}");
    drop((first, second));
    until_idle(&app).await;
}

#[tokio::test]
async fn while_weights_load_the_socket_answers_and_says_so() {
    let app = App { registry: Arc::new(Registry::new([MODEL.to_owned()])), ..Setup::default().app() };
    let server = start(app.clone()).await;
    assert!(server.get("/health").await.starts_with("HTTP/1.1 200"));
    let ready = server.get("/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("\"loading\""), "{ready}");
    assert!(server.get("/v1/models").await.contains(MODEL));
    let early = rest(server.post(&chat(json!({}))).await).await;
    assert!(early.starts_with("HTTP/1.1 503") && early.contains("retry-after: 1"), "{early}");
}

#[tokio::test]
async fn leaving_refuses_new_requests_and_finishes_running_ones() {
    let app = Setup::slow(60, 10).app();
    let server = start(app.clone()).await;
    let mut client = server.post(&chat(json!({"stream": true}))).await;
    let mut text = read_until(&mut client, "\"content\":\"x\"").await;
    app.drain.start();
    let ready = server.get("/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("\"draining\""), "{ready}");
    let refused = rest(server.post(&chat(json!({}))).await).await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("retry-after"), "{refused}");
    text.push_str(&rest(client).await);
    assert!(text.contains("[DONE]"), "{text}");
    assert!(app.drain.wait(Duration::from_secs(60)).await);
    server.leave.send(()).unwrap();
    within(60, server.server).await.unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn an_answer_cut_off_by_the_deadline_ends_with_an_error_event() {
    let app = Setup::slow(400, 10).app();
    let server = start(app.clone()).await;
    let mut client = server.post(&chat(json!({"stream": true}))).await;
    let mut text = read_until(&mut client, "\"content\":\"x\"").await;
    let model = app.registry.find_local(Some(MODEL)).unwrap();
    let engine = model.engine().clone();
    assert!(!tokio::task::spawn_blocking(move || engine.drain(Duration::from_millis(50))).await.unwrap());
    text.push_str(&within(60, rest(client)).await);
    assert!(text.contains("\"code\":\"cancelled\"") && !text.contains("[DONE]"), "{text}");
}

#[tokio::test]
async fn a_body_too_large_is_answered_even_while_it_is_being_sent() {
    let app = App { body: BodyLimits { bytes: 1000, ..BodyLimits::default() }, ..Setup::default().app() };
    let server = start(app).await;
    let reply = rest(server.post(&chat(json!({"user": "x".repeat(3_000_000)}))).await).await;
    assert!(reply.starts_with("HTTP/1.1 413") && reply.contains("\"error\""), "{reply}");
}

#[tokio::test]
async fn a_body_that_never_comes_is_a_408() {
    let app = App { body: BodyLimits { time: Duration::from_millis(100), ..BodyLimits::default() }, ..Setup::default().app() };
    let server = start(app).await;
    let mut stream = server.connect().await;
    stream.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{").await.unwrap();
    let reply = within(60, read_until(&mut stream, "\"error\"")).await;
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply}");
}

/// Bounds under which a test need not wait long, and a machine with other work is not taken for silence.
fn impatient() -> Bounds {
    Bounds { idle: Duration::from_secs(1), handshake: Duration::from_secs(1), ..Bounds::default() }
}

/// Reads until the server closes.
async fn closed(mut stream: TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    // A reset is an end, too.
    let _ = within(60, stream.read_to_end(&mut all)).await;
    all
}

#[tokio::test]
async fn a_connection_that_says_nothing_or_half_a_head_is_closed() {
    let server = start_with(Setup::default().app(), impatient()).await;
    // Nothing; the beginning of what could be either protocol; HTTP/2's first words; half a head; a head byte by byte.
    for said in ["", "PRI", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET /health HTTP/1.1\r\nhost: x\r\n"] {
        let mut stream = server.connect().await;
        stream.write_all(said.as_bytes()).await.unwrap();
        let answer = closed(stream).await;
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{said:?}: {answer:?}");
    }
    let (mut reading, mut writing) = server.connect().await.into_split();
    let slowly = async {
        for byte in b"GET /health HTTP/1.1\r\nhost: x\r\nx: ".iter().chain(std::iter::repeat(&b'a')) {
            if writing.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut answer = Vec::new();
    within(60, async { tokio::join!(slowly, async { drop(reading.read_to_end(&mut answer).await) }) }).await;
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
}

#[tokio::test]
async fn a_connection_that_waits_for_the_next_request_is_closed_and_one_with_a_request_is_not() {
    let server = start_with(Setup::slow(300, 10).app(), impatient()).await;
    let mut stream = server.connect().await;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(closed(stream).await.starts_with(b"HTTP/1.1 200"));
    // 3 s of silence, three times the bound.
    let answer = within(60, rest(server.post(&chat(json!({}))).await)).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("xxxx"), "{answer}");
}

#[tokio::test]
async fn http_2_without_tls_answers_several_streams_at_once() {
    let app = Setup::slow(100, 30).app();
    let server = start(app.clone()).await;
    let io = TokioIo::new(server.connect().await);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let connection = tokio::spawn(connection);
    let ask = |stream: bool| {
        let mut sender = sender.clone();
        async move {
            let body = Body::from(chat(json!({"stream": stream})).to_string());
            let request = Request::post("http://x/v1/chat/completions").body(body).unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!((response.status(), response.version()), (StatusCode::OK, Version::HTTP_2));
            String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
        }
    };
    let answers = within(60, futures_util::future::join_all((0..8).map(|index| ask(index % 2 == 0)))).await;
    for (index, answer) in answers.iter().enumerate() {
        assert_eq!(answer.contains("[DONE]"), index % 2 == 0, "{answer}");
    }
    // One that is left cancels its sequences, while the connection stays.
    let mut left = sender.clone();
    let body = Body::from(chat(json!({"stream": true})).to_string());
    let response = left.send_request(Request::post("http://x/v1/chat/completions").body(body).unwrap()).await.unwrap();
    within(60, async {
        while running(&app).0 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    drop(response);
    until_idle(&app).await;
    assert!(ask(false).await.contains("xxxx"));
    connection.abort();
}

#[tokio::test]
async fn a_stream_that_is_not_read_frees_its_sequence_and_the_others_of_its_connection_go_on() {
    let app = Setup::slow(400, 5).app();
    let server = start_with(app.clone(), Bounds { write: Duration::from_millis(300), ..Bounds::default() }).await;
    let io = TokioIo::new(server.connect().await);
    let mut client = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    // Less than the answer has; nothing more is asked for until somebody reads.
    let (mut sender, connection) = client.initial_stream_window_size(2000).handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let ask = |body: Value| Request::post("http://x/v1/chat/completions").body(Body::from(body.to_string())).unwrap();
    let stuck = sender.send_request(ask(chat(json!({"stream": true})))).await.unwrap();
    assert_eq!(stuck.status(), StatusCode::OK);
    until_idle(&app).await;
    let other = within(20, sender.send_request(ask(chat(json!({"max_tokens": 5}))))).await.unwrap();
    let whole = within(20, other.into_body().collect()).await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&whole).contains("xxxxx"));
    drop(stuck);
    connection.abort();
}

#[tokio::test]
async fn silent_connections_do_not_keep_others_out() {
    let bounds = Bounds { connections: 2, crowded: Duration::from_millis(300), ..Bounds::default() };
    let server = start_with(Setup::slow(200, 10).app(), bounds).await;
    let _silent = server.connect().await;
    let busy = server.post(&chat(json!({}))).await;
    let third = within(20, server.get("/health")).await;
    assert!(third.starts_with("HTTP/1.1 200"), "{third}");
    let answer = within(20, rest(busy)).await;
    assert!(answer.contains("xxxx"), "a request under way is never in the way: {answer}");
}

#[tokio::test]
async fn a_head_too_large_is_a_431() {
    let server = start(Setup::default().app()).await;
    let mut stream = server.connect().await;
    let head = format!("GET /health HTTP/1.1\r\nhost: x\r\nx-long: {}\r\n\r\n", "a".repeat(100_000));
    // The server may close before it has read all.
    let _ = stream.write_all(head.as_bytes()).await;
    let answer = closed(stream).await;
    assert!(answer.starts_with(b"HTTP/1.1 431"), "{:?}", String::from_utf8_lossy(&answer));
}
