//! A request gives the same greedy tokens whether it runs alone, in a batch, in chunks, from the prefix cache or after preemption.
//! Runs on the model that `TIDEMILL_TEST_MODEL` names; `make test` sets it.

#![cfg(test)]

use std::path::PathBuf;
use std::time::Duration;
use tidemill_engine::{Engine, EngineOptions, Event, Request, RequestId, SamplingParams, Tenant, Usage};

const TEXTS: [&str; 6] = [
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "A list of the planets of the solar system:\n1. Mercury\n2. Venus\n3.",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "Dear Sir or Madam,\n\nI am writing to",
];
const OUTPUT: usize = 40;

fn model() -> Option<PathBuf> {
    let path = std::env::var_os("TIDEMILL_TEST_MODEL").map(PathBuf::from);
    if path.is_none() {
        println!("left out: TIDEMILL_TEST_MODEL is not set; `make test` sets it");
    }
    path
}

fn start(path: &PathBuf, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options =
        EngineOptions { max_model_len: Some(512), max_seqs: 8, kv_memory: Some(64 << 20), ..EngineOptions::new(path) };
    change(&mut options);
    Engine::start(options, &mut |_, _| {}).unwrap()
}

/// Texts of different lengths behind a common preface, so that prefix caching has something to find.
fn prompts(engine: &Engine) -> Vec<Vec<u32>> {
    let preface = "This is a collection of short texts, each of which is continued by a careful writer. ".repeat(4);
    let encode = |text: &&str| engine.tokenizer().encode(&format!("{preface}{text}"), false, false).unwrap();
    TEXTS.iter().map(encode).collect()
}

fn submit(engine: &Engine, prompt: &[u32]) -> flume::Receiver<Event> {
    let sampling = SamplingParams { temperature: 0.0, max_tokens: Some(OUTPUT), ignore_eos: true, ..Default::default() };
    let adapter = None;
    let prompt = prompt.to_vec();
    let (tenant, deadline) = (Tenant::default(), None);
    let request = Request { id: RequestId(0), prompt, sampling, priority: 0, cache_salt: None, adapter, tenant, deadline };
    engine.submit(request).unwrap()
}

fn tokens(receiver: &flume::Receiver<Event>) -> (Vec<u32>, Usage) {
    let mut tokens = Vec::new();
    loop {
        match receiver.recv_timeout(Duration::from_secs(120)).unwrap() {
            Event::Token { record, .. } => tokens.push(record.token),
            Event::Done(usage) => return (tokens, usage),
            Event::Failed(error) => panic!("{error}"),
            Event::Expired => panic!("no deadline was set"),
            Event::Prompt { .. } | Event::Finished { .. } => {}
        }
    }
}

#[test]
fn alone_batched_chunked_cached_and_preempted_runs_agree() {
    let Some(path) = model() else { return };

    let engine = start(&path, |options| options.prefix_caching = false);
    let prompts = prompts(&engine);
    let alone: Vec<Vec<u32>> = prompts.iter().map(|prompt| tokens(&submit(&engine, prompt)).0).collect();
    assert!(alone.iter().all(|tokens| tokens.len() == OUTPUT));
    assert_ne!(alone[0], alone[1]);

    let receivers: Vec<_> = prompts.iter().map(|prompt| submit(&engine, prompt)).collect();
    let batched: Vec<_> = receivers.iter().map(|receiver| tokens(receiver).0).collect();
    assert_eq!(alone, batched, "batched");
    drop(engine);

    let engine = start(&path, |options| (options.max_batch_tokens, options.prefix_caching) = (23, false));
    let receivers: Vec<_> = prompts.iter().map(|prompt| submit(&engine, prompt)).collect();
    let chunked: Vec<_> = receivers.iter().map(|receiver| tokens(receiver).0).collect();
    assert_eq!(alone, chunked, "chunked");
    drop(engine);

    let engine = start(&path, |_| {});
    for (prompt, alone) in prompts.iter().zip(&alone) {
        assert_eq!(&tokens(&submit(&engine, prompt)).0, alone, "cold cache");
        let (cached, usage) = tokens(&submit(&engine, prompt));
        assert!(usage.cached_tokens >= 32, "{usage:?}");
        assert_eq!(&cached, alone, "warm cache");
    }
    let block_bytes = engine.memory().kv / engine.memory().kv_blocks;
    drop(engine);

    // Blocks for two sequences and a half.
    let each = (prompts.iter().map(Vec::len).max().unwrap() + OUTPUT).div_ceil(32);
    let engine = start(&path, |options| {
        (options.kv_memory, options.max_model_len) = (Some(each * 5 / 2 * block_bytes), None);
        options.prefix_caching = false;
    });
    let receivers: Vec<_> = prompts.iter().map(|prompt| submit(&engine, prompt)).collect();
    let preempted: Vec<_> = receivers.iter().map(|receiver| tokens(receiver).0).collect();
    assert_eq!(alone, preempted, "preempted");
    assert!(engine.stats().preemptions > 0, "{:?}", engine.stats());
}
