//! The loop against a small server that speaks as scripted: known bytes at known times.

use super::*;
use crate::prompts::Prefix;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// What the server writes to each request: pieces, each after a pause.
type Script = Vec<(u64, Vec<u8>)>;

struct ScriptedServer {
    address: std::net::SocketAddr,
    in_flight_peak: Arc<AtomicUsize>,
    bodies: Arc<std::sync::Mutex<Vec<Value>>>,
    connections: Arc<AtomicUsize>,
}

/// When the server ends a connection.
#[derive(Clone, Copy, PartialEq)]
enum Close {
    Never,
    AfterAnswer,
    /// As a server does whose idle timeout and the next request cross on the wire.
    OnSecondRequest,
}

/// Serves `scripts` in turn, one per request that is answered.
async fn serve(scripts: Vec<Script>, close: Close) -> ScriptedServer {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = ScriptedServer { address, in_flight_peak: Arc::default(), bodies: Arc::default(), connections: Arc::default() };
    let (peak, bodies, connections) = (server.in_flight_peak.clone(), server.bodies.clone(), server.connections.clone());
    let (at, in_flight) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            connections.fetch_add(1, Ordering::SeqCst);
            let (scripts, at, in_flight, peak, bodies) =
                (scripts.clone(), at.clone(), in_flight.clone(), peak.clone(), bodies.clone());
            tokio::spawn(async move {
                let (mut stream, mut answered) = (stream, 0);
                while let Some(body) = read_request(&mut stream).await {
                    if close == Close::OnSecondRequest && answered == 1 {
                        return;
                    }
                    bodies.lock().unwrap().push(body);
                    peak.fetch_max(in_flight.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let script = &scripts[at.fetch_add(1, Ordering::SeqCst) % scripts.len()];
                    for (pause_ms, bytes) in script {
                        tokio::time::sleep(Duration::from_millis(*pause_ms)).await;
                        stream.write_all(bytes).await.unwrap();
                    }
                    in_flight.fetch_sub(1, Ordering::SeqCst);
                    answered += 1;
                    if close == Close::AfterAnswer {
                        return;
                    }
                }
            });
        }
    });
    server
}

async fn read_request(stream: &mut TcpStream) -> Option<Value> {
    let mut read = Vec::new();
    loop {
        if stream.read_buf(&mut read).await.ok()? == 0 {
            return None;
        }
        let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&read[..end]).to_lowercase();
        let length: usize = head.split("content-length: ").nth(1)?.lines().next()?.parse().ok()?;
        if read.len() >= end + 4 + length {
            return serde_json::from_slice(&read[end + 4..end + 4 + length]).ok();
        }
    }
}

fn head(status: &str, content_type: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n").into_bytes()
}

fn http_chunk(data: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
}

const END: &[u8] = b"0\r\n\r\n";

fn event(text: &str) -> Vec<u8> {
    format!("data: {{\"choices\":[{{\"index\":0,\"text\":\"{text}\"}}]}}\n\n").into_bytes()
}

const USAGE: &[u8] = b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":120,\"completion_tokens\":3,\"total_tokens\":123}}\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// First text after 40 ms, then two more at 20 ms each, usage, end mark.
fn good() -> Script {
    paced(1)
}

/// The same, so many times slower: where times are looked at, they must be long beside what a machine with other work adds.
fn paced(times: u64) -> Script {
    vec![
        (0, head("200 OK", "text/event-stream")),
        (40 * times, http_chunk(&event(" a"))),
        (20 * times, http_chunk(&event(" b"))),
        (20 * times, http_chunk(&event(" c"))),
        (0, http_chunk(&[USAGE, DONE].concat())),
        (0, END.to_vec()),
    ]
}

fn stream_of(pieces: &[&[u8]]) -> Script {
    let mut script = vec![(0, head("200 OK", "text/event-stream; charset=utf-8"))];
    script.extend(pieces.iter().map(|piece| (1, http_chunk(piece))));
    script.push((0, END.to_vec()));
    script
}

fn load(server: &ScriptedServer, streams: usize, requests: u64) -> Load {
    Load {
        target: Target { address: server.address, host: "localhost".into(), path: "/v1".into() },
        endpoint: Endpoint::Completions,
        model: "m".into(),
        body: Map::new(),
        prompts: Prompts::new(1, Prefix::Cold, 16, 0),
        streams,
        requests,
        warmup: 0,
        max_tokens: 3,
        duration: None,
        request_timeout: Duration::from_secs(60),
    }
}

async fn run(load: Load) -> Measurement {
    let (_keep, interrupt) = Interrupt::manual();
    load.run(&interrupt, |_| {}).await
}

#[tokio::test]
async fn timings_and_usage_are_those_of_the_server() {
    let server = serve(vec![paced(20)], Close::Never).await;
    let sum = run(load(&server, 2, 6)).await;
    assert_eq!((sum.completed, sum.failed, sum.short_outputs, sum.cut_short), (6, 0, 0, false), "{sum:?}");
    assert_eq!((sum.prompt_tokens, sum.completion_tokens, sum.counted_by_server), (720, 18, true));
    assert!(sum.warnings().is_empty());
    let (ttft, gap) = (sum.ttft_ms.unwrap(), sum.inter_token_ms.unwrap());
    assert!((799.0..1600.0).contains(&ttft.p50), "{ttft:?}");
    assert!((399.0..800.0).contains(&gap.p50) && gap.p50 < ttft.p50, "{gap:?}");
    assert!(sum.wall_s >= 4.8, "three in a row at 1.6 s: {}", sum.wall_s);
}

#[tokio::test]
async fn streams_are_kept_full_on_one_connection_each_and_prompts_differ() {
    let server = serve(vec![paced(10)], Close::Never).await;
    let sum = run(Load { warmup: 2, ..load(&server, 4, 12) }).await;
    assert_eq!(sum.completed, 12);
    assert_eq!(server.in_flight_peak.load(Ordering::SeqCst), 4);
    // Four for the measurement, two for the warm-up.
    assert_eq!(server.connections.load(Ordering::SeqCst), 6);
    let bodies = server.bodies.lock().unwrap();
    let prompts: std::collections::HashSet<_> = bodies.iter().map(|body| body["prompt"].to_string()).collect();
    assert_eq!(prompts.len(), 14);
    assert!(bodies.iter().all(|body| body["max_tokens"] == 3 && body["stream_options"]["include_usage"] == true));
}

#[tokio::test]
async fn a_server_that_gives_up_an_idle_connection_is_reconnected() {
    for close in [Close::AfterAnswer, Close::OnSecondRequest] {
        let server = serve(vec![good()], close).await;
        let sum = run(load(&server, 1, 3)).await;
        assert_eq!((sum.completed, sum.failed), (3, 0), "{:?}", sum.errors);
        assert_eq!(server.connections.load(Ordering::SeqCst), 3);
    }
}

#[tokio::test]
async fn events_split_anywhere_count_once() {
    let bytes = [event(" \u{e9}t\u{e9}"), event(" b"), event(" c"), USAGE.to_vec(), DONE.to_vec()].concat();
    let pieces: Vec<&[u8]> = bytes.chunks(7).collect();
    let server = serve(vec![stream_of(&pieces)], Close::Never).await;
    let sum = run(load(&server, 1, 1)).await;
    assert_eq!((sum.completed, sum.completion_tokens), (1, 3), "{:?}", sum.errors);
}

#[tokio::test]
async fn without_usage_events_are_counted_and_it_says_so() {
    let server = serve(vec![stream_of(&[&event(" a"), &event(" b"), DONE])], Close::Never).await;
    let sum = run(load(&server, 1, 2)).await;
    assert_eq!((sum.completed, sum.completion_tokens, sum.counted_by_server, sum.short_outputs), (2, 4, false, 2));
    assert_eq!(sum.warnings().len(), 2);
}

#[tokio::test]
async fn every_kind_of_failure_is_an_error_with_its_reason() {
    let json_error = b"{\"error\":{\"message\":\"queue full\"}}";
    let scripts = vec![
        vec![(0, head("503 Service Unavailable", "application/json")), (0, http_chunk(json_error)), (0, END.to_vec())],
        vec![(0, head("200 OK", "application/json")), (0, http_chunk(b"{\"choices\":[]}")), (0, END.to_vec())],
        stream_of(&[&event(" a"), b"data: {\"error\":{\"message\":\"out of memory\"}}\n\n", DONE]),
        stream_of(&[&event(" a")]),
        stream_of(&[DONE]),
        stream_of(&[&event(" a"), b"data: {\"choi"]),
        vec![(0, head("200 OK", "text/event-stream")), (0, http_chunk(&event(" a"))), (0, b"not a chunk".to_vec())],
        good(),
    ];
    let server = serve(scripts, Close::AfterAnswer).await;
    let sum = run(load(&server, 1, 8)).await;
    assert_eq!((sum.completed, sum.failed), (1, 7), "{:?}", sum.errors);
    let reasons: Vec<&str> = sum.errors.keys().map(String::as_str).collect();
    for part in [
        "503 Service Unavailable: {\"error\"",
        "not an event stream",
        "out of memory",
        "without [DONE]",
        "empty",
        "inside an event",
        "broke off",
    ] {
        assert!(reasons.iter().any(|reason| reason.contains(part)), "{part} is not in {reasons:?}");
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_or_does_not_end_fails_in_time() {
    let mut nowhere = serve(vec![good()], Close::Never).await;
    // Bound and not listening: nobody else can take the port meanwhile.
    let unused = TcpSocket::new_v4().unwrap();
    unused.bind(([127, 0, 0, 1], 0).into()).unwrap();
    nowhere.address = unused.local_addr().unwrap();
    let sum = run(load(&nowhere, 1, 1)).await;
    let refused = sum.errors.keys().all(|error| error.starts_with("connecting to 127.0.0.1"));
    assert!(refused && sum.failed == 1, "{:?}", sum.errors);

    let endless = serve(vec![vec![(0, head("200 OK", "text/event-stream")), (60_000, Vec::new())]], Close::Never).await;
    let sum = run(Load { request_timeout: Duration::from_millis(50), ..load(&endless, 1, 1) }).await;
    assert!(sum.errors.keys().all(|error| error.contains("within 0.05 s")) && sum.failed == 1, "{:?}", sum.errors);
}

#[tokio::test]
async fn duration_and_interrupt_end_the_load_early_with_what_there_is() {
    let server = serve(vec![paced(20)], Close::Never).await;
    let sum = run(Load { duration: Some(Duration::from_secs(2)), ..load(&server, 1, 1000) }).await;
    // Each takes 1.6 s, and the first starts at once.
    assert!((1..=2).contains(&sum.completed) && sum.cut_short, "{sum:?}");

    let (sender, interrupt) = Interrupt::manual();
    let sum = load(&server, 1, 1000).run(&interrupt, |_| sender.send(true).unwrap()).await;
    assert_eq!((sum.completed, sum.failed, sum.cut_short), (1, 0, true), "{sum:?}");
}

#[tokio::test]
async fn chat_requests_carry_one_user_message_and_extra_fields_win() {
    let server = serve(vec![good()], Close::Never).await;
    let body = json!({"ignore_eos": true, "temperature": 0.5}).as_object().unwrap().clone();
    run(Load { endpoint: Endpoint::Chat, body, ..load(&server, 1, 1) }).await;
    let bodies = server.bodies.lock().unwrap();
    assert_eq!(bodies[0]["messages"][0]["role"], "user");
    assert_eq!((&bodies[0]["ignore_eos"], &bodies[0]["temperature"]), (&json!(true), &json!(0.5)));
}
