use super::*;
use crate::backend::Device;
use crate::recall_model::{LARGE, LOST, POISON, REFUSED, RecallModel, expected};
use crate::request::{FinishReason, SamplingParams, StopCause, TokenRecord, Usage};
use crate::sequence::tests::request;
use crate::tokenizer::letters::letters;

const VOCABULARY: usize = 92;
pub(super) const END: u32 = 40;
/// A machine with other work may take long for what takes no time.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

fn options() -> EngineOptions {
    EngineOptions {
        kv_memory: Some(64 * BLOCK_SIZE * 8),
        max_seqs: 8,
        max_batch_tokens: 64,
        max_waiting: 16,
        seed: Some(1),
        ..EngineOptions::new("recall")
    }
}

fn start_at(pace: Duration, options: EngineOptions) -> Engine {
    launch(pace, vec![END], options)
}

pub(super) fn start_with(end_of_turn: Vec<u32>, options: EngineOptions) -> Engine {
    launch(Duration::ZERO, end_of_turn, options)
}

/// On a model that is told of a step before the one before it is computed, and that swaps.
fn start_ahead(pace: Duration, options: EngineOptions) -> Engine {
    let options = EngineOptions { device: Device::Auto, swap_memory: Some(16 * BLOCK_SIZE * 8), ..options };
    launch_model(pace, true, vec![END], options)
}

fn launch(pace: Duration, end_of_turn: Vec<u32>, options: EngineOptions) -> Engine {
    launch_model(pace, false, end_of_turn, options)
}

fn launch_model(pace: Duration, ahead: bool, end_of_turn: Vec<u32>, options: EngineOptions) -> Engine {
    let mut model = RecallModel::new(VOCABULARY, options.max_batch_tokens, options.max_seqs);
    (model.pace, model.ahead) = (pace, ahead);
    let frontend = Frontend {
        tokenizer: letters(),
        chat_template: None,
        generation_defaults: GenerationDefaults::default(),
        end_of_turn,
        pooling: Ok(crate::Pooling::default()),
    };
    let description = "recall".into();
    Engine::with_model(ServedModel { model: Box::new(model), frontend, context: 1024, description }, options).unwrap()
}

fn start() -> Engine {
    start_at(Duration::ZERO, options())
}

pub(super) fn prompt(start: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (start + i * 7) % 89).collect()
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens: Some(max_tokens), ignore_eos: true, ..Default::default() }
}

fn within(receiver: &Receiver<Event>) -> Event {
    receiver.recv_timeout(PATIENCE).expect("the engine says something")
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) tokens: Vec<Vec<u32>>,
    pub(super) texts: Vec<String>,
    pub(super) ends: Vec<Option<(FinishReason, Option<StopCause>)>>,
    usage: Option<Usage>,
    records: Vec<TokenRecord>,
}

/// Reads a whole answer and checks the order of its events.
pub(super) fn collect(receiver: &Receiver<Event>, n: usize) -> Answer {
    let mut answer = Answer { tokens: vec![vec![]; n], texts: vec![String::new(); n], ends: vec![None; n], ..Answer::default() };
    assert!(matches!(within(receiver), Event::Prompt { .. }));
    loop {
        match within(receiver) {
            Event::Token { choice, record, text } => {
                assert!(answer.ends[choice].is_none());
                answer.tokens[choice].push(record.token);
                answer.texts[choice].push_str(&text);
                answer.records.push(record);
            }
            Event::Finished { choice, reason, stop, text, adapter } => {
                assert_eq!(adapter.0, 0);
                answer.texts[choice].push_str(&text);
                assert!(answer.ends[choice].replace((reason, stop)).is_none());
            }
            Event::Done(usage) => {
                answer.usage = Some(usage);
                assert!(answer.ends.iter().all(Option::is_some));
                assert!(receiver.recv_timeout(PATIENCE).is_err(), "nothing comes after Done");
                return answer;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

pub(super) fn idle(engine: &Engine) {
    eventually("all blocks are free, nothing runs, nothing waits", || {
        let stats = engine.stats();
        let waiting = engine.inner.status.waiting.load(Ordering::SeqCst);
        stats.blocks_used == 0 && stats.running == 0 && stats.waiting == 0 && waiting == 0
    });
}

#[test]
fn an_answer_is_its_events_in_order_with_usage_and_log_probabilities() {
    let engine = start();
    let sampling = SamplingParams { n: 3, temperature: 1.0, seed: Some(5), logprobs: Some(2), ..greedy(9) };
    let receiver = engine.submit(request(prompt(1, 70), sampling.clone())).unwrap();
    let answer = collect(&receiver, 3);
    for (choice, tokens) in answer.tokens.iter().enumerate() {
        assert_eq!(tokens, &expected(&prompt(1, 70), &sampling, 5, choice as u64, &[], VOCABULARY, 1024));
        assert_eq!(answer.texts[choice], engine.tokenizer().decode(tokens, true));
    }
    assert_eq!(answer.usage, Some(Usage { prompt_tokens: 70, cached_tokens: 0, completion_tokens: 27 }));
    assert!(answer.ends.iter().all(|end| *end == Some((FinishReason::Length, None))));
    assert!(answer.records.iter().all(|record| record.top.len() == 2));
    idle(&engine);
}

#[test]
fn an_end_of_turn_token_stops_but_not_before_min_tokens() {
    let engine = start();
    // A prompt whose greedy continuation holds the end token.
    let unlimited = SamplingParams { ignore_eos: false, ..greedy(400) };
    let found = (0..500).map(|start| prompt(start, 5)).find(|prompt| {
        let tokens = expected(prompt, &unlimited, 0, 0, &[END], VOCABULARY, 1024);
        tokens.len() < 20 && tokens.last() == Some(&END)
    });
    let prompt = found.unwrap();
    let early = collect(&engine.submit(request(prompt.clone(), unlimited.clone())).unwrap(), 1);
    assert_eq!(early.ends[0], Some((FinishReason::Stop, Some(StopCause::EndOfTurn(END)))));
    assert_eq!(early.tokens[0].last(), Some(&END));
    let patient = SamplingParams { min_tokens: 30, ..unlimited };
    let late = collect(&engine.submit(request(prompt, patient)).unwrap(), 1);
    assert!(late.tokens[0].len() >= 30 && !late.tokens[0][..30].contains(&END));
}

#[test]
fn a_stop_string_ends_the_text_and_does_not_leak() {
    let engine = start();
    let plain = collect(&engine.submit(request(prompt(3, 20), greedy(60))).unwrap(), 1);
    let text = plain.texts[0].clone();
    // A piece of text that straddles tokens.
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(3).collect();
    let first = text.find(&stop).unwrap();
    let cut = SamplingParams { stop: vec![stop.clone()], ..greedy(60) };
    let answer = collect(&engine.submit(request(prompt(3, 20), cut.clone())).unwrap(), 1);
    assert_eq!(answer.texts[0], text[..first]);
    assert_eq!(answer.ends[0], Some((FinishReason::Stop, Some(StopCause::Text(stop.clone())))));
    let kept = SamplingParams { include_stop_str_in_output: true, ..cut };
    let answer = collect(&engine.submit(request(prompt(3, 20), kept)).unwrap(), 1);
    assert_eq!(answer.texts[0], text[..first + stop.len()]);
    idle(&engine);
}

#[test]
fn a_dropped_receiver_frees_its_blocks_also_while_waiting() {
    let engine = start_at(Duration::from_millis(1), EngineOptions { max_seqs: 1, ..options() });
    let running = engine.submit(request(prompt(1, 60), greedy(900))).unwrap();
    let waiting = engine.submit(request(prompt(2, 60), greedy(900))).unwrap();
    assert!(matches!(within(&running), Event::Prompt { .. }));
    eventually("it holds blocks", || engine.stats().blocks_used > 0);
    drop(waiting);
    eventually("the waiting one is forgotten", || engine.stats().waiting == 0);
    eventually("the other one runs", || engine.stats().running == 1);
    drop(running);
    idle(&engine);
}

#[test]
fn a_slow_client_stalls_nobody_and_gets_everything() {
    let engine = start_at(Duration::ZERO, EngineOptions { max_seqs: 1, ..options() });
    let slow = engine.submit(request(prompt(1, 30), greedy(900))).unwrap();
    eventually("the slow one is stopped by its full channel", || {
        slow.len() > 256 && engine.stats().steps < 900 && {
            let before = engine.stats().steps;
            std::thread::sleep(Duration::from_millis(20));
            engine.stats().steps == before
        }
    });
    // With one place only, it must also give that up.
    let other = collect(&engine.submit(request(prompt(2, 30), greedy(50))).unwrap(), 1);
    assert_eq!(other.tokens[0].len(), 50);
    let answer = collect(&slow, 1);
    assert_eq!(answer.tokens[0], expected(&prompt(1, 30), &greedy(900), 0, 0, &[], VOCABULARY, 1024));
    idle(&engine);
}

#[test]
fn a_full_queue_refuses_with_a_guess_when_to_come_back() {
    // The first has its place for five seconds, until its channel is full.
    let engine = start_at(Duration::from_millis(20), EngineOptions { max_seqs: 1, max_waiting: 2, ..options() });
    let first = engine.submit(request(prompt(1, 10), greedy(900))).unwrap();
    assert!(matches!(within(&first), Event::Prompt { .. }));
    let others: Vec<_> = (0..2).map(|_| engine.submit(request(prompt(2, 10), greedy(2))).unwrap()).collect();
    match engine.submit(request(prompt(2, 10), greedy(2))) {
        Err(SubmitError::QueueFull { waiting: 2, limit: 2, retry_after_s }) => assert!((1..=60).contains(&retry_after_s)),
        other => panic!("{other:?}"),
    }
    drop((first, others));
    idle(&engine);
    collect(&engine.submit(request(prompt(2, 10), greedy(2))).unwrap(), 1);
}

#[test]
fn a_step_that_the_model_refuses_fails_its_requests_only() {
    let engine = start();
    let mut bad = prompt(1, 10);
    bad[0] = REFUSED;
    let receiver = engine.submit(request(bad, greedy(5))).unwrap();
    match within(&receiver) {
        Event::Failed(text) => assert!(text.contains("refused"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert!(engine.is_ready());
    assert_eq!(collect(&engine.submit(request(prompt(1, 10), greedy(5))).unwrap(), 1).tokens[0].len(), 5);
    idle(&engine);
}

#[test]
fn a_lost_device_ends_the_engine_with_its_words_to_everyone() {
    let engine = start();
    // More tokens than its channel holds: it cannot end before it is read.
    let running = engine.submit(request(prompt(1, 10), greedy(900))).unwrap();
    assert!(matches!(within(&running), Event::Prompt { .. }));
    let mut bad = prompt(1, 10);
    (bad[0], bad[1]) = (REFUSED, LOST);
    let receiver = engine.submit(request(bad, greedy(5))).unwrap();
    assert!(matches!(within(&receiver), Event::Failed(text) if text.contains("the GPU failed: lost")));
    assert!(matches!(engine.health(), Health::Stopped(reason) if reason.contains("the GPU failed: lost")));
    assert!(!engine.is_ready());
    assert!(matches!(running.iter().last(), Some(Event::Failed(text)) if text.contains("the GPU failed: lost")));
    assert!(matches!(engine.submit(request(prompt(1, 10), greedy(5))), Err(SubmitError::Stopped(_))));
    assert!(engine.drain(PATIENCE));
}

#[test]
fn a_step_without_memory_fails_its_requests_and_the_next_one_makes_the_engine_ready_again() {
    let engine = start();
    let mut bad = prompt(1, 10);
    (bad[0], bad[1]) = (REFUSED, LARGE);
    let receiver = engine.submit(request(bad, greedy(5))).unwrap();
    assert!(matches!(within(&receiver), Event::Failed(text) if text.contains("cannot reserve 1 bytes for a test")));
    let status = &engine.inner.status;
    let told = Instant::now();
    // As of a moment before it was told: a slow machine changes nothing.
    let before = told.checked_sub(Duration::from_secs(20)).unwrap_or(told);
    assert!(matches!(status.health(before), Health::Short(why) if why.contains("cannot reserve")));
    assert_eq!(status.health(told + Duration::from_secs(20)), Health::Ready);
    assert_eq!(collect(&engine.submit(request(prompt(1, 10), greedy(5))).unwrap(), 1).tokens[0].len(), 5);
    assert_eq!(status.health(before), Health::Ready);
    idle(&engine);
}

#[test]
fn a_panic_ends_the_engine_with_a_word_to_everyone() {
    let engine = start();
    let mut bad = prompt(1, 10);
    bad[0] = POISON;
    let receiver = engine.submit(request(bad, greedy(5))).unwrap();
    assert!(matches!(within(&receiver), Event::Failed(text) if text.contains("internal error") && !text.contains("poisoned")));
    assert!(matches!(engine.health(), Health::Stopped(reason) if !reason.contains("poisoned")));
    assert!(matches!(engine.submit(request(prompt(1, 10), greedy(5))), Err(SubmitError::Stopped(_))));
    assert!(engine.drain(PATIENCE));
}

#[test]
fn draining_finishes_what_runs_and_refuses_what_comes() {
    let engine = start();
    // More tokens than its channel holds: it cannot end before it is read.
    let receiver = engine.submit(request(prompt(1, 10), greedy(900))).unwrap();
    assert!(matches!(within(&receiver), Event::Prompt { .. }));
    let drainer = engine.clone();
    let drain = std::thread::spawn(move || drainer.drain(PATIENCE));
    eventually("it drains", || engine.health() == Health::Draining);
    assert_eq!(engine.submit(request(prompt(2, 10), greedy(2))).unwrap_err(), SubmitError::Draining);
    let done = receiver.iter().last().unwrap();
    assert_eq!(done, Event::Done(Usage { prompt_tokens: 10, cached_tokens: 0, completion_tokens: 900 }));
    assert!(drain.join().unwrap());
    assert!(matches!(engine.health(), Health::Stopped(_)));
}

#[test]
fn draining_cancels_what_does_not_finish_in_time() {
    let engine = start_at(Duration::from_millis(20), EngineOptions { max_seqs: 1, ..options() });
    let running = engine.submit(request(prompt(1, 10), greedy(900))).unwrap();
    let waiting = engine.submit(request(prompt(2, 10), greedy(900))).unwrap();
    assert!(matches!(within(&running), Event::Prompt { .. }));
    assert!(!engine.drain(Duration::from_millis(50)));
    assert!(matches!(engine.health(), Health::Stopped(_)));
    for receiver in [&running, &waiting] {
        let events: Vec<_> = receiver.iter().collect();
        let end = &events[events.len() - 2..];
        assert!(matches!(end, [Event::Finished { reason: FinishReason::Cancelled, .. }, Event::Done(_)]), "{end:?}");
    }
}

#[test]
fn what_was_submitted_before_draining_is_finished() {
    for _ in 0..50 {
        let engine = start();
        let receivers: Vec<_> = (0..4).map(|i| engine.submit(request(prompt(i, 10), greedy(3))).unwrap()).collect();
        assert!(engine.drain(PATIENCE));
        for receiver in receivers {
            assert_eq!(collect(&receiver, 1).tokens[0].len(), 3);
        }
    }
}

#[test]
fn the_last_handle_takes_the_engine_with_it() {
    let engine = start_at(Duration::from_millis(1), options());
    let receiver = engine.submit(request(prompt(1, 10), greedy(900))).unwrap();
    assert!(matches!(within(&receiver), Event::Prompt { .. }));
    drop(engine);
    assert!(matches!(receiver.iter().last(), Some(Event::Done(_))));
}

#[test]
fn many_clients_at_once_get_what_they_get_alone() {
    // 24 blocks for 8 sequences of up to 8 blocks: preemption is the rule.
    let options = EngineOptions { kv_memory: Some(24 * BLOCK_SIZE * 8), max_waiting: 200, ..options() };
    // Slow enough for the clients to be there at once, whichever thread has the processor.
    many_clients(start_at(Duration::from_millis(1), options.clone()));
    let engine = start_ahead(Duration::from_millis(1), options);
    many_clients(engine.clone());
    let stats = engine.stats();
    assert!(stats.restored > 0 && stats.restored <= stats.preemptions, "{stats:?}");
}

fn many_clients(engine: Engine) {
    let clients: Vec<_> = (0..60u32)
        .map(|i| {
            let engine = engine.clone();
            std::thread::spawn(move || {
                let prompt = prompt(i % 7, 20 + 3 * i as usize);
                let sampling = SamplingParams { n: 1 + i as usize % 3, temperature: 1.0, seed: Some(i.into()), ..greedy(40) };
                let receiver = engine.submit(request(prompt.clone(), sampling.clone())).unwrap();
                if i % 5 == 4 {
                    within(&receiver);
                    return;
                }
                let answer = collect(&receiver, sampling.n);
                for (choice, tokens) in answer.tokens.iter().enumerate() {
                    assert_eq!(tokens, &expected(&prompt, &sampling, i.into(), choice as u64, &[], VOCABULARY, 768));
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    idle(&engine);
    assert!(engine.stats().preemptions > 0);
}

#[test]
fn steps_that_run_ahead_end_like_others() {
    let engine = start_ahead(Duration::ZERO, options());
    // Ends that nobody foresees: a token, a stop string, a client that leaves, a step that fails.
    let plain = collect(&engine.submit(request(prompt(3, 20), greedy(60))).unwrap(), 1);
    assert_eq!(plain.tokens[0], expected(&prompt(3, 20), &greedy(60), 0, 0, &[], VOCABULARY, 1024));
    let middle = plain.texts[0].char_indices().nth(plain.texts[0].chars().count() / 2).unwrap().0;
    let stop: String = plain.texts[0][middle..].chars().take(3).collect();
    let cut = SamplingParams { stop: vec![stop.clone()], ..greedy(60) };
    let other = engine.submit(request(prompt(4, 20), greedy(80))).unwrap();
    let answer = collect(&engine.submit(request(prompt(3, 20), cut)).unwrap(), 1);
    assert_eq!(answer.texts[0], plain.texts[0][..plain.texts[0].find(&stop).unwrap()]);
    drop(engine.submit(request(prompt(5, 20), greedy(900))).unwrap());
    let ended = SamplingParams { ignore_eos: false, ..greedy(400) };
    let begins = |start: u32| {
        let tokens = expected(&prompt(start, 5), &ended, 0, 0, &[END], VOCABULARY, 1024);
        (tokens.len() < 20 && tokens.last() == Some(&END)).then_some((start, tokens))
    };
    let (start, tokens) = (0..500).find_map(begins).unwrap();
    let answer = collect(&engine.submit(request(prompt(start, 5), ended)).unwrap(), 1);
    assert_eq!(answer.tokens[0], tokens);
    assert_eq!(collect(&other, 1).tokens[0], expected(&prompt(4, 20), &greedy(80), 0, 0, &[], VOCABULARY, 1024));
    // A failed step ends who is in it, and nobody else: the other one may have been.
    let mut bad = prompt(1, 10);
    bad[0] = REFUSED;
    let receiver = engine.submit(request(bad, greedy(5))).unwrap();
    assert!(matches!(within(&receiver), Event::Failed(text) if text.contains("refused")));
    idle(&engine);
    let sampling = SamplingParams { n: 3, temperature: 1.0, seed: Some(5), presence_penalty: 0.0, ..greedy(9) };
    let answer = collect(&engine.submit(request(prompt(1, 70), sampling.clone())).unwrap(), 3);
    for (choice, tokens) in answer.tokens.iter().enumerate() {
        assert_eq!(tokens, &expected(&prompt(1, 70), &sampling, 5, choice as u64, &[], VOCABULARY, 1024));
    }
    idle(&engine);
    assert!(engine.drain(PATIENCE));
}

#[test]
fn a_slow_client_of_steps_that_run_ahead_gets_everything() {
    let engine = start_ahead(Duration::ZERO, options());
    let sampling = SamplingParams { n: 4, temperature: 1.0, seed: Some(5), ..greedy(400) };
    let slow = engine.submit(request(prompt(1, 30), sampling.clone())).unwrap();
    eventually("its channel is full", || slow.len() > 256 && engine.stats().running == 4);
    std::thread::sleep(Duration::from_millis(20));
    let answer = collect(&slow, 4);
    for (choice, tokens) in answer.tokens.iter().enumerate() {
        assert_eq!(tokens, &expected(&prompt(1, 30), &sampling, 5, choice as u64, &[], VOCABULARY, 1024));
    }
}

#[test]
fn a_device_that_is_lost_with_steps_under_way_ends_the_engine_with_its_words() {
    let engine = start_ahead(Duration::from_millis(1), options());
    let running = engine.submit(request(prompt(1, 10), greedy(900))).unwrap();
    assert!(matches!(within(&running), Event::Prompt { .. }));
    let mut bad = prompt(1, 10);
    (bad[0], bad[1]) = (REFUSED, LOST);
    let receiver = engine.submit(request(bad, greedy(5))).unwrap();
    assert!(matches!(within(&receiver), Event::Failed(text) if text.contains("the GPU failed: lost")));
    assert!(matches!(running.iter().last(), Some(Event::Failed(text)) if text.contains("the GPU failed: lost")));
    assert!(engine.drain(PATIENCE));
}

#[test]
fn the_context_is_a_limit_of_its_own() {
    let engine = start_at(Duration::ZERO, EngineOptions { max_model_len: Some(50), ..options() });
    assert_eq!(engine.limits().max_model_len, 50);
    let answer = collect(&engine.submit(request(prompt(1, 45), SamplingParams { max_tokens: None, ..greedy(1) })).unwrap(), 1);
    assert_eq!((answer.tokens[0].len(), &answer.ends[0]), (5, &Some((FinishReason::Length, None))));
}
