//! Adapters, from PEFT's files to tokens, against what PEFT computed from the same files (`tests/goldens/*/adapters`), and what
//! holds for them while they are served.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::stepping::Stepper;
use serde_json::Value;
use tidemill_engine::model::Model;
use tidemill_engine::{
    Adapter, AdapterLease, AdapterRefused, Decoder, Engine, EngineOptions, Event, FinishReason, LoraConfig, ModelFiles, Pair,
    Projection, Request, RequestId, SamplingParams, Tenant,
};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::reference::Reference;
use tidemill_kernels::{KvDtype, Limits, NO_ADAPTER, Ops, WeightFormat};

const TOLERANCE: f32 = 1e-3;
const LIMITS: Limits = Limits { max_tokens: 256, max_samples: 32, max_positions: 512 };
const LLAMAS: [&str; 3] = ["all", "some", "patterns"];

fn goldens(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

/// What PEFT computed with an adapter.
struct Expected {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    positions: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn expected(folder: &Path) -> Expected {
    let value: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let ids = |key: &str| value[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let row = |row: &Value| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    let logits = value["logits"].as_array().unwrap().iter().map(row).collect();
    Expected { prompt: ids("prompt_ids"), greedy: ids("greedy"), positions: ids("positions"), logits }
}

fn stepper(model: &Path, ops: Box<dyn Ops>) -> Stepper {
    let files = ModelFiles::open(model).unwrap();
    Stepper::new(Decoder::load(&files, ops, WeightFormat::F32, &mut |_, _| {}).unwrap())
}

fn cpu() -> Box<dyn Ops> {
    Box::new(CpuBackend::new(CpuOptions { threads: 2, isa: None, limits: LIMITS }).unwrap())
}

fn load(stepper: &mut Stepper, slot: u32, folder: &Path) {
    let adapter = Adapter::read(folder).unwrap();
    adapter.check(stepper.decoder().config()).unwrap();
    stepper.decoder().load_adapter(slot, &adapter).unwrap();
}

#[test]
fn adapters_compute_what_peft_computes_on_models_of_both_containers() {
    for (family, names, containers) in [
        ("llama", &LLAMAS[..], ["", "llama.gguf"]),
        ("qwen3", &["all"], ["", "qwen3.gguf"]),
        ("mixtral", &["attention"], ["", "mixtral.gguf"]),
        ("dbrx", &["attention"], ["", "dbrx.gguf"]),
        ("gemma2", &["all"], ["", "gemma2.gguf"]),
        ("gemma3", &["all"], ["", "gemma3.gguf"]),
        ("mpt", &["all"], ["", "mpt.gguf"]),
    ] {
        for container in containers {
            for (backend, ops) in [("reference", Box::new(Reference::new(LIMITS)) as Box<dyn Ops>), ("cpu", cpu())] {
                let mut stepper = stepper(&goldens(family).join(container), ops);
                for name in names {
                    let folder = goldens(family).join("adapters").join(name);
                    let expected = expected(&folder);
                    load(&mut stepper, 2, &folder);
                    stepper.use_adapters(&[2]);
                    let tokens: Vec<u32> = expected.prompt.iter().chain(&expected.greedy).copied().collect();
                    let logits = stepper.logits(&tokens, &expected.positions);
                    let pairs = logits.iter().flatten().zip(expected.logits.iter().flatten());
                    let worst = pairs.map(|(got, want)| (got - want).abs()).fold(0f32, f32::max);
                    let label = format!("{family} {container} {name} on {backend}");
                    println!("{label}: the largest difference of a logit is {worst}");
                    assert!(worst <= TOLERANCE, "{label}: the largest difference of a logit is {worst}");
                    assert_eq!(stepper.greedy(&[&expected.prompt], 32, &[])[0], expected.greedy, "{label}");
                }
            }
        }
    }
}

#[test]
fn the_base_and_three_adapters_in_one_batch_answer_as_each_does_alone() {
    let mut stepper = stepper(&goldens("llama"), cpu());
    let all: Vec<Expected> = LLAMAS.iter().map(|name| expected(&goldens("llama/adapters").join(name))).collect();
    for (slot, name) in LLAMAS.iter().enumerate() {
        load(&mut stepper, slot as u32, &goldens("llama/adapters").join(name));
    }
    let base = expected(&goldens("llama"));
    let prompt: &[u32] = &base.prompt;
    let slots = [0, NO_ADAPTER, 1, 2, 0, NO_ADAPTER];
    stepper.use_adapters(&slots);
    let answers = stepper.greedy(&[prompt; 6], 32, &[]);
    for (answer, slot) in answers.iter().zip(slots) {
        let alone = all.get(slot as usize).unwrap_or(&base);
        assert_eq!(answer[..], alone.greedy[..32], "slot {slot}");
    }
    // A slot that was emptied does nothing to those beside it.
    stepper.decoder().unload_adapter(1);
    stepper.use_adapters(&[2, NO_ADAPTER]);
    let answers = stepper.greedy(&[prompt; 2], 32, &[]);
    assert_eq!(answers[0], all[2].greedy);
    assert_eq!(answers[1], base.greedy[..32]);
}

fn engine(max_adapters: usize) -> Engine {
    let options = EngineOptions {
        threads: Some(2),
        kv_memory: Some(64 << 20),
        weight_format: WeightFormat::F32,
        kv_dtype: KvDtype::F32,
        max_adapters,
        ..EngineOptions::new(goldens("llama"))
    };
    Engine::start(options, &mut |_, _| {}).unwrap()
}

fn load_named(engine: &Engine, name: &str, golden: &str) -> Result<AdapterLease, AdapterRefused> {
    engine.load_adapter(name, &goldens("llama/adapters").join(golden), false, 7)
}

fn request(prompt: &[u32], adapter: Option<AdapterLease>) -> Request {
    let sampling = SamplingParams { temperature: 0.0, max_tokens: Some(32), ignore_eos: true, ..SamplingParams::default() };
    Request {
        id: RequestId(0),
        prompt: prompt.to_vec(),
        sampling,
        priority: 0,
        cache_salt: None,
        adapter,
        tenant: Tenant::default(),
        deadline: None,
    }
}

/// Tokens of the one choice, and the generation that made them.
fn answer(engine: &Engine, request: Request) -> (Vec<u32>, u64) {
    let events = engine.submit(request).unwrap();
    let (mut tokens, mut made_by) = (Vec::new(), None);
    for event in events {
        match event {
            Event::Token { record, .. } => tokens.push(record.token),
            Event::Finished { reason, adapter, .. } => {
                assert_eq!(reason, FinishReason::Length);
                made_by = Some(adapter.0);
            }
            Event::Failed(message) => panic!("{message}"),
            Event::Expired => panic!("expired"),
            Event::Prompt { .. } | Event::Done(_) => {}
        }
    }
    (tokens, made_by.unwrap())
}

#[test]
fn publishing_under_load_loses_no_request_and_no_token() {
    let engine = engine(2);
    let goldens = ["all", "some"].map(|name| expected(&goldens("llama/adapters").join(name)));
    let prompt = goldens[0].prompt.clone();
    let base = expected(&self::goldens("llama"));
    let generations = ["all", "some"].map(|name| {
        let lease = load_named(&engine, "live", name).unwrap();
        lease.generation().0
    });
    assert_ne!(generations[0], generations[1]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6)
            .map(|client| {
                let (engine, prompt, goldens, base) = (&engine, &prompt, &goldens, &base);
                scope.spawn(move || {
                    let mut seen = [0; 3];
                    for _ in 0..25 {
                        let lease = (client != 0).then(|| engine.adapter("live").unwrap());
                        let wanted = lease.as_ref().map_or(0, |lease| lease.generation().0);
                        let (tokens, made_by) = answer(engine, request(prompt, lease));
                        assert_eq!(made_by, wanted);
                        match generations.iter().position(|generation| *generation == made_by) {
                            Some(index) => {
                                assert_eq!(tokens, goldens[index].greedy);
                                seen[index] += 1;
                            }
                            None => {
                                assert_eq!(tokens, base.greedy[..32]);
                                seen[2] += 1;
                            }
                        }
                    }
                    seen
                })
            })
            .collect();
        let publisher = scope.spawn(|| {
            let mut published = 0;
            while !stop.load(Ordering::Acquire) {
                match load_named(&engine, "live", ["all", "some"][published % 2]) {
                    Ok(_) => published += 1,
                    // Two generations still answer.
                    Err(AdapterRefused::Draining(_)) => std::thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            }
            published
        });
        let seen: Vec<[usize; 3]> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        stop.store(true, Ordering::Release);
        let published = publisher.join().unwrap();
        let total = |index: usize| seen.iter().map(|seen| seen[index]).sum::<usize>();
        println!("{published} generations; answers by them and the base: {} {} {}", total(0), total(1), total(2));
        assert_eq!(total(0) + total(1) + total(2), 150);
        assert!(published >= 2);
    });
}

#[test]
fn what_was_computed_with_one_generation_is_never_used_for_another() {
    let engine = engine(4);
    let names = ["all", "some", "patterns"];
    let prompt = expected(&goldens("llama")).prompt;
    // The same prompt through each, twice: the second time its blocks are found again, and only its own.
    for _ in 0..2 {
        for name in names {
            let lease = load_named(&engine, name, name).unwrap();
            let wanted = expected(&goldens("llama/adapters").join(name));
            assert_eq!(answer(&engine, request(&prompt, Some(lease))).0, wanted.greedy, "{name}");
        }
        assert_eq!(answer(&engine, request(&prompt, None)).0, expected(&goldens("llama")).greedy[..32]);
    }
    let stats = engine.stats();
    assert!(stats.prefix_hits > 0, "{stats:?}");
    // The same contents under another name, or loaded again, are the same generation.
    let again = load_named(&engine, "alias", "all").unwrap();
    assert_eq!(again.generation(), engine.adapter("all").unwrap().generation());
}

#[test]
fn an_unloaded_adapter_finishes_what_it_began_and_is_gone() {
    let engine = engine(1);
    let wanted = expected(&goldens("llama/adapters/all"));
    let lease = load_named(&engine, "a", "all").unwrap();
    let running = engine.submit(request(&wanted.prompt, Some(lease))).unwrap();
    engine.unload_adapter("a").unwrap();
    assert!(engine.adapter("a").is_none() && engine.adapters().is_empty());
    let tokens: Vec<u32> = running
        .into_iter()
        .filter_map(|event| match event {
            Event::Token { record, .. } => Some(record.token),
            _ => None,
        })
        .collect();
    assert_eq!(tokens, wanted.greedy);
    assert!(matches!(engine.unload_adapter("a"), Err(AdapterRefused::Unknown(_))));
    // With one place, the next takes it; a pinned one keeps it.
    load_named(&engine, "b", "some").unwrap();
    load_named(&engine, "c", "all").unwrap();
    assert!(engine.adapter("b").is_none());
    engine.pin_adapter("c", true).unwrap();
    assert!(matches!(load_named(&engine, "d", "some"), Err(AdapterRefused::Full(1))));
    assert!(engine.adapter("c").is_some());
}

#[test]
fn the_place_of_what_was_replaced_is_free_when_the_last_one_lets_go_of_it() {
    let engine = engine(1);
    for golden in ["all", "some", "patterns", "all"] {
        let before = engine.adapter("a");
        load_named(&engine, "a", golden).unwrap();
        // Time to fall asleep: nothing wakes an engine without requests when this is dropped.
        std::thread::sleep(std::time::Duration::from_millis(50));
        drop(before);
    }
    let wanted = expected(&goldens("llama/adapters/all"));
    assert_eq!(answer(&engine, request(&wanted.prompt, engine.adapter("a"))).0, wanted.greedy);
}

#[test]
fn a_wrong_adapter_is_refused_with_the_reason_and_nothing_changes() {
    let engine = engine(4);
    load_named(&engine, "good", "all").unwrap();
    let before = engine.adapter("good").unwrap().generation();
    let folder = tempfile::tempdir().unwrap();
    let config = LoraConfig { r: 2, targets: vec![Projection::Query], layers: Some(vec![0]), ..LoraConfig::default() };
    let make = |name: &str, rank: usize, width: usize, value: f32| {
        let pair = Pair {
            layer: 0,
            projection: Projection::Query,
            rank,
            scale: 1.0,
            a: vec![value; rank * width],
            b: vec![0.1; 64 * rank],
        };
        let path = folder.path().join(name);
        Adapter::new(LoraConfig { r: rank, ..config.clone() }, "x", vec![pair]).write(&path).unwrap();
        path
    };
    let cases = [
        (make("shape", 2, 72, 0.1), "layers.0.self_attn.q_proj.lora_A"),
        (make("rank", 65, 64, 0.1), "rank 65"),
        (make("nan", 2, 64, f32::NAN), "NaN"),
        (goldens("qwen3/adapters/all"), "another base model"),
        (folder.path().join("none"), "no such folder"),
    ];
    for (path, reason) in cases {
        let error = engine.load_adapter("good", &path, false, 0).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(engine.adapter("good").unwrap().generation(), before);
    }
    assert!(matches!(load_named(&engine, "a:b", "all"), Err(AdapterRefused::Name(_))));
    assert!(matches!(load_named(&self::engine(0), "a", "all"), Err(AdapterRefused::Off)));
    let wanted = expected(&goldens("llama/adapters/all"));
    assert_eq!(answer(&engine, request(&wanted.prompt, engine.adapter("good"))).0, wanted.greedy);
}
