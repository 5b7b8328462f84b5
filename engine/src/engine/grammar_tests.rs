//! Constrained requests through the whole engine, over a model whose tokens are random.

use super::tests::{END, PATIENCE, collect, idle, prompt, start_with};
use super::*;
use crate::grammar::Constraint;
use crate::request::{FinishReason, SamplingParams, StopCause};
use crate::sequence::tests::request;

fn options(blocks: usize) -> EngineOptions {
    EngineOptions {
        kv_memory: Some(blocks * BLOCK_SIZE * 8),
        max_seqs: 8,
        max_batch_tokens: 64,
        max_model_len: Some(160),
        seed: Some(1),
        ..EngineOptions::new("recall")
    }
}

fn confined(engine: &Engine, constraint: Constraint) -> SamplingParams {
    let grammar = Some(engine.compile(&constraint).unwrap());
    SamplingParams { temperature: 1.0, grammar, ..Default::default() }
}

fn pairs() -> Constraint {
    Constraint::Regex("([a-m][n-z]){20,30}".into())
}

fn is_pairs(text: &str) -> bool {
    let good = |(at, c): (usize, char)| if at % 2 == 0 { ('a'..='m').contains(&c) } else { ('n'..='z').contains(&c) };
    text.len().is_multiple_of(2) && (40..=60).contains(&text.len()) && text.chars().enumerate().all(good)
}

#[test]
fn every_choice_keeps_to_its_grammar_through_forks_and_preemption() {
    let run = |blocks: usize| {
        let engine = start_with(vec![END], options(blocks));
        let sampling = confined(&engine, pairs());
        let receivers: Vec<_> = (0..6)
            .map(|i| {
                let sampling = SamplingParams { n: 1 + i % 3, seed: Some(i as u64), ..sampling.clone() };
                (engine.submit(request(prompt(i as u32, 33), sampling)).unwrap(), 1 + i % 3)
            })
            .collect();
        let mut texts = Vec::new();
        for (receiver, n) in receivers {
            let answer = collect(&receiver, n);
            for (text, end) in answer.texts.iter().zip(&answer.ends) {
                assert!(is_pairs(text), "{text}");
                assert_eq!(*end, Some((FinishReason::Stop, Some(StopCause::EndOfTurn(END)))));
            }
            texts.extend(answer.texts);
        }
        idle(&engine);
        (texts, engine.stats().preemptions)
    };
    let (roomy, none) = run(64);
    let (tight, some) = run(10);
    assert_eq!(none, 0);
    assert!(some > 0, "nobody was preempted");
    assert_eq!(roomy, tight);
}

#[test]
fn a_text_ends_only_where_its_grammar_lets_it() {
    let engine = start_with(vec![END], options(64));
    let text = |sampling: SamplingParams| collect(&engine.submit(request(prompt(3, 5), sampling)).unwrap(), 1);
    let any = confined(&engine, Constraint::Regex("[a-z]{2,40}".into()));
    for seed in 0..20 {
        let answer = text(SamplingParams { seed: Some(seed), ..any.clone() });
        assert!((2..=40).contains(&answer.texts[0].len()));
        let patient = text(SamplingParams { seed: Some(seed), min_tokens: 30, ..any.clone() });
        assert!((30..=40).contains(&patient.texts[0].len()));
        let endless = text(SamplingParams { seed: Some(seed), ignore_eos: true, ..any.clone() });
        assert_eq!(endless.texts[0].len(), 40);
        assert_eq!(endless.ends[0], Some((FinishReason::Stop, Some(StopCause::EndOfTurn(END)))));
        let short = text(SamplingParams { seed: Some(seed), max_tokens: Some(1), ..any.clone() });
        assert_eq!(short.ends[0], Some((FinishReason::Length, None)));
    }
    let own = text(SamplingParams { stop_token_ids: vec![50], logit_bias: vec![(50, 5.0)], ..any });
    assert!(matches!(own.ends[0], Some((FinishReason::Stop, Some(StopCause::Token(50) | StopCause::EndOfTurn(END))))));
    let stopped = confined(&engine, Constraint::Choice(vec!["abcdef".into()]));
    let cut = text(SamplingParams { stop: vec!["cd".into()], ..stopped });
    assert_eq!((cut.texts[0].as_str(), &cut.ends[0]), ("ab", &Some((FinishReason::Stop, Some(StopCause::Text("cd".into()))))));
    idle(&engine);
}

#[test]
fn a_model_without_an_end_of_turn_token_ends_with_its_grammar() {
    let engine = start_with(Vec::new(), options(64));
    let sampling = SamplingParams { n: 2, ..confined(&engine, Constraint::Choice(vec!["abc".into()])) };
    let answer = collect(&engine.submit(request(prompt(3, 5), sampling)).unwrap(), 2);
    assert_eq!(answer.texts, ["abc", "abc"]);
    assert_eq!(answer.tokens, [[0, 1, 2], [0, 1, 2]]);
    assert!(answer.ends.iter().all(|end| *end == Some((FinishReason::Stop, None))));
    idle(&engine);
}

#[test]
fn a_text_that_cannot_go_on_fails_and_disturbs_nobody() {
    let engine = start_with(vec![END], options(64));
    // No token of this vocabulary holds a digit.
    let stuck = confined(&engine, Constraint::Regex("a[0-9]".into()));
    let good = engine.submit(request(prompt(1, 20), confined(&engine, pairs()))).unwrap();
    let bad = engine.submit(request(prompt(2, 20), stuck)).unwrap();
    let last = std::iter::from_fn(|| bad.recv_timeout(PATIENCE).ok()).last();
    assert!(matches!(last, Some(Event::Failed(ref message)) if message.contains("grammar")), "{last:?}");
    let answer = collect(&good, 1);
    assert!(is_pairs(&answer.texts[0]));
    idle(&engine);
}
