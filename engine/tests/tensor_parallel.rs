//! Models on several ranks, against the same models on one device and against what `transformers` and PEFT made of the same files
//! (`tests/goldens`). Ranks are threads here, on the scalar reference or on emulated cards.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::emulation::Emulated;
use crate::faulty::Faulty;
use crate::stepping::Stepper;
use serde_json::Value;
use tidemill_engine::model::Model;
use tidemill_engine::{
    Adapter, Decoder, Device, Engine, EngineOptions, Event, Frontend, Health, ModelFiles, Request, RequestId, SamplingParams,
    ServedModel, Tenant, TensorParallel,
};
use tidemill_kernels::collective::Member;
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::{KvDtype, Limits, NO_ADAPTER, Ops, WeightFormat};

/// Of a log-probability, where everything is f32: the order of additions differs.
const TOLERANCE: f32 = 1e-3;
const LIMITS: Limits = Limits { max_tokens: 256, max_samples: 32, max_positions: 512 };

fn goldens(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

/// What a model should compute.
struct Expected {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    positions: Vec<u32>,
    log_probabilities: Vec<Vec<f32>>,
}

fn expected(folder: &Path) -> Expected {
    let value: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let ids = |key: &str| value[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let row = |row: &Value| {
        let logits: Vec<f64> = row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let total = logits.iter().map(|v| v.exp()).sum::<f64>().ln();
        logits.iter().map(|v| (v - total) as f32).collect()
    };
    let log_probabilities = value["logits"].as_array().unwrap().iter().map(row).collect();
    Expected { prompt: ids("prompt_ids"), greedy: ids("greedy"), positions: ids("positions"), log_probabilities }
}

type Open = dyn Fn(Member) -> Box<dyn Ops>;

fn reference(member: Member) -> Box<dyn Ops> {
    Box::new(Reference::of_group(LIMITS, member))
}

fn card(member: Member) -> Box<dyn Ops> {
    Box::new(CudaBackend::new(Emulated::of_group(member), LIMITS).capturing())
}

/// A model on ranks of a group.
fn shared_out(files: &ModelFiles, ranks: usize, format: WeightFormat, open: &Open) -> TensorParallel {
    let members = Member::group(ranks);
    let abort = members[0].abort_handle();
    let ranks = members.into_iter().enumerate().map(|(rank, member)| (format!("rank {rank}"), open(member))).collect();
    let mut heard = Vec::new();
    let model = TensorParallel::load(files, ranks, abort, format, &mut |packed, all| heard.push((packed, all))).unwrap();
    assert!(heard.is_sorted() && heard.iter().all(|(packed, all)| packed <= all), "{heard:?}");
    model
}

fn largest_difference(got: &[Vec<f32>], want: &[Vec<f32>]) -> f32 {
    assert_eq!(got.len(), want.len());
    let pairs = got.iter().zip(want).flat_map(|(got, want)| {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want)
    });
    let difference = |(got, want): (&f32, &f32)| if got.is_nan() || want.is_nan() { f32::INFINITY } else { (got - want).abs() };
    pairs.map(difference).fold(0.0, f32::max)
}

/// The directory of a family and, where there is one, the GGUF file of the same weights.
fn containers(family: &str) -> Vec<PathBuf> {
    let directory = goldens(family);
    let gguf = directory.join(format!("{family}.gguf"));
    [directory].into_iter().chain(Some(gguf).filter(|path| path.is_file())).collect()
}

fn computes_what_transformers_computes(family: &str) {
    computes_on(family, [2, 4]);
}

fn computes_on(family: &str, degrees: [usize; 2]) {
    let expected = expected(&goldens(family));
    let tokens: Vec<u32> = expected.prompt.iter().chain(&expected.greedy).copied().collect();
    for path in containers(family) {
        let files = ModelFiles::open(&path).unwrap();
        for ranks in degrees {
            let label = format!("{} on {ranks} ranks", path.display());
            let mut stepper = Stepper::new(shared_out(&files, ranks, WeightFormat::F32, &reference));
            let got = stepper.log_probabilities(&tokens, &expected.positions);
            let worst = largest_difference(&got, &expected.log_probabilities);
            println!("{label}: the largest difference of a log-probability is {worst}");
            assert!(worst <= TOLERANCE, "{label}: the largest difference of a log-probability is {worst}");
            assert_eq!(stepper.greedy(&[&expected.prompt], 64, &[])[0], expected.greedy, "{label}");
        }
    }
}

#[test]
fn llama_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("llama");
}

#[test]
fn llama3_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("llama3");
}

#[test]
fn mistral_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("mistral");
}

#[test]
fn qwen2_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("qwen2");
}

#[test]
fn qwen3_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("qwen3");
}

#[test]
fn mixtral_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("mixtral");
}

#[test]
fn qwen2_moe_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("qwen2_moe");
}

#[test]
fn dbrx_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("dbrx");
}

/// Of six heads with slopes of their own.
#[test]
fn mpt_on_several_ranks_computes_what_transformers_computes() {
    computes_on("mpt", [2, 3]);
}

#[test]
fn gemma2_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("gemma2");
}

#[test]
fn gemma3_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("gemma3");
}

#[test]
fn qwen3_moe_on_several_ranks_computes_what_transformers_computes() {
    computes_what_transformers_computes("qwen3_moe");
}

#[test]
fn adapters_on_several_ranks_compute_what_peft_computes() {
    let of_families = [
        ("llama", &["all", "some", "patterns"][..]),
        ("qwen3", &["all"]),
        ("mixtral", &["attention"]),
        ("dbrx", &["attention"]),
        ("gemma2", &["all"]),
        ("gemma3", &["all"]),
    ];
    for (family, names) in of_families {
        for path in containers(family) {
            let files = ModelFiles::open(&path).unwrap();
            for ranks in [2, 4] {
                let mut stepper = Stepper::new(shared_out(&files, ranks, WeightFormat::F32, &reference));
                let mut answers = vec![expected(&goldens(family))];
                for (slot, name) in names.iter().enumerate() {
                    let folder = goldens(family).join("adapters").join(name);
                    let adapter = Adapter::read(&folder).unwrap();
                    adapter.check(stepper.decoder().adaptable().unwrap()).unwrap();
                    stepper.decoder().load_adapter(slot as u32, &adapter).unwrap();
                    let expected = expected(&folder);
                    stepper.use_adapters(&[slot as u32]);
                    let tokens: Vec<u32> = expected.prompt.iter().chain(&expected.greedy).copied().collect();
                    let got = stepper.log_probabilities(&tokens, &expected.positions);
                    let worst = largest_difference(&got, &expected.log_probabilities);
                    assert!(worst <= TOLERANCE, "{} {name} on {ranks} ranks: {worst}", path.display());
                    answers.push(expected);
                }
                // The base and all of them in one batch.
                let slots: Vec<u32> = std::iter::once(NO_ADAPTER).chain(0..names.len() as u32).collect();
                stepper.use_adapters(&slots);
                let prompts: Vec<&[u32]> = answers.iter().map(|_| &answers[0].prompt[..]).collect();
                for (got, want) in stepper.greedy(&prompts, 32, &[]).iter().zip(&answers) {
                    assert_eq!(got[..], want.greedy[..32], "{} on {ranks} ranks", path.display());
                }
                stepper.decoder().unload_adapter(0);
            }
        }
    }
}

/// On emulated cards, with captured steps: what several compute is what one computes. Where weights are rounded when they are loaded, a part
/// that was cut by input features has scales of its own, so it is as far from the exact result as one card is, and not the same. Of models with
/// experts nothing is rounded here: where two experts are almost as likely, rounding sends a token to the other one.
#[test]
fn several_emulated_cards_compute_what_one_does() {
    for (family, format, ranks) in [
        ("llama", WeightFormat::Bf16, 2),
        ("llama", WeightFormat::Bf16, 4),
        ("qwen3", WeightFormat::Bf16, 2),
        ("qwen2", WeightFormat::Int8, 2),
        ("llama3", WeightFormat::Fp8, 2),
        ("mixtral", WeightFormat::F32, 4),
        ("qwen2_moe", WeightFormat::F32, 2),
        ("qwen3_moe", WeightFormat::F32, 2),
        ("dbrx", WeightFormat::F32, 2),
        ("gemma2", WeightFormat::F32, 4),
        ("gemma3", WeightFormat::F32, 2),
        ("mpt", WeightFormat::Bf16, 3),
    ] {
        let label = format!("{family} as {format:?} on {ranks} ranks");
        let files = ModelFiles::open(&goldens(family)).unwrap();
        let golden = expected(&goldens(family));
        let prompt = &golden.prompt[..golden.prompt.len().min(10)];
        let positions: Vec<u32> = (0..prompt.len() as u32).collect();
        let whole = |ops: Box<dyn Ops>, format| Stepper::new(Decoder::load(&files, ops, format, &mut |_, _| {}).unwrap());
        let mut one = whole(Box::new(CudaBackend::new(Emulated::default(), LIMITS)), format);
        let mut several = Stepper::new(shared_out(&files, ranks, format, &card));
        let [want, got] = [one.log_probabilities(prompt, &positions), several.log_probabilities(prompt, &positions)];
        if let WeightFormat::Bf16 | WeightFormat::F32 = format {
            let worst = largest_difference(&got, &want);
            let tolerance = if format == WeightFormat::F32 { TOLERANCE } else { 2e-2 };
            assert!(worst <= tolerance, "{label}: the largest difference of a log-probability is {worst}");
            // Of three rows a captured step makes four.
            let prompts = [prompt, &prompt[..5], &prompt[..7]];
            assert_eq!(several.greedy(&prompts, 8, &[]), one.greedy(&prompts, 8, &[]), "{label}");
        } else {
            let exact = whole(Box::new(Reference::new(LIMITS)), WeightFormat::F32).log_probabilities(prompt, &positions);
            let [off, off_alone] = [got, want].map(|values| largest_difference(&values, &exact));
            println!("{label}: {off} from the exact log-probabilities, one card {off_alone}");
            assert!(off <= 1.5 * off_alone, "{label}: {off}, one card {off_alone}");
        }
    }
}

fn frontend(files: &ModelFiles) -> Frontend {
    Frontend {
        tokenizer: files.tokenizer().clone(),
        chat_template: None,
        generation_defaults: files.generation_defaults().clone(),
        end_of_turn: Vec::new(),
        pooling: Err("not asked for".into()),
    }
}

fn engine(model: Box<dyn Model>, files: &ModelFiles, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options = EngineOptions {
        max_seqs: 8,
        max_batch_tokens: 64,
        max_model_len: Some(256),
        kv_memory: Some(1 << 20),
        kv_dtype: KvDtype::F32,
        ..EngineOptions::new(files.path())
    };
    change(&mut options);
    let served = ServedModel { model, frontend: frontend(files), context: 512, description: files.describe() };
    Engine::with_model(served, options).unwrap()
}

fn submit(engine: &Engine, prompt: &[u32], max_tokens: usize) -> flume::Receiver<Event> {
    let sampling =
        SamplingParams { temperature: 0.0, max_tokens: Some(max_tokens), ignore_eos: true, ..SamplingParams::default() };
    let (tenant, deadline) = (Tenant::default(), None);
    let request = Request {
        id: RequestId(0),
        prompt: prompt.to_vec(),
        sampling,
        priority: 0,
        cache_salt: None,
        adapter: None,
        tenant,
        deadline,
    };
    engine.submit(request).unwrap()
}

/// The tokens of an answer, and how many of the prompt's came from the prefix cache; or why it failed.
fn answer(receiver: &flume::Receiver<Event>) -> Result<(Vec<u32>, usize), String> {
    let mut tokens = Vec::new();
    loop {
        match receiver.recv_timeout(Duration::from_secs(60)).unwrap() {
            Event::Token { record, .. } => tokens.push(record.token),
            Event::Done(usage) => return Ok((tokens, usage.cached_tokens)),
            Event::Failed(error) => return Err(error),
            Event::Expired => panic!("no deadline was set"),
            Event::Prompt { .. } | Event::Finished { .. } => {}
        }
    }
}

#[test]
fn an_engine_on_several_ranks_gives_the_tokens_of_one_batched_cached_and_preempted() {
    let files = ModelFiles::open(&goldens("llama")).unwrap();
    let golden = expected(&goldens("llama"));
    let text: Vec<u32> = golden.prompt.iter().chain(&golden.greedy).copied().cycle().take(200).collect();
    let prompts: Vec<&[u32]> = [(0, 90), (0, 75), (40, 100), (7, 20), (0, 33)].map(|(from, to)| &text[from..to]).to_vec();
    let alone = Decoder::load(&files, Box::new(Reference::new(LIMITS)), WeightFormat::F32, &mut |_, _| {}).unwrap();
    let alone = engine(Box::new(alone), &files, |options| options.prefix_caching = false);
    let wanted: Vec<Vec<u32>> = prompts.iter().map(|prompt| answer(&submit(&alone, prompt, 20)).unwrap().0).collect();
    for ranks in [2, 4] {
        let engine_of = |change: &dyn Fn(&mut EngineOptions)| {
            engine(Box::new(shared_out(&files, ranks, WeightFormat::F32, &reference)), &files, change)
        };
        let shared = engine_of(&|_| {});
        let memory = shared.memory();
        assert!(memory.backend.starts_with(&format!("{ranks} ranks: rank 0 ")), "{}", memory.backend);
        let receivers: Vec<_> = prompts.iter().map(|prompt| submit(&shared, prompt, 20)).collect();
        let batched: Vec<_> = receivers.iter().map(|receiver| answer(receiver).unwrap().0).collect();
        assert_eq!(batched, wanted, "batched on {ranks} ranks");
        let (again, cached) = answer(&submit(&shared, prompts[0], 20)).unwrap();
        assert_eq!((&again, cached), (&wanted[0], 64), "from the prefix cache on {ranks} ranks");
        let block_bytes = memory.kv / memory.kv_blocks;
        drop(shared);
        // Blocks for two sequences and a half.
        let tight = engine_of(&|options| {
            (options.kv_memory, options.max_model_len, options.prefix_caching) = (Some(10 * block_bytes), None, false);
        });
        let receivers: Vec<_> = prompts.iter().map(|prompt| submit(&tight, prompt, 20)).collect();
        let preempted: Vec<_> = receivers.iter().map(|receiver| answer(receiver).unwrap().0).collect();
        assert_eq!(preempted, wanted, "preempted on {ranks} ranks");
        assert!(tight.stats().preemptions > 0);
    }
}

#[test]
fn what_several_cards_set_back_comes_back_from_the_machines_memory() {
    let files = ModelFiles::open(&goldens("llama")).unwrap();
    let golden = expected(&goldens("llama"));
    let text: Vec<u32> = golden.prompt.iter().chain(&golden.greedy).copied().cycle().take(100).collect();
    let prompts: Vec<&[u32]> = [(0, 60), (20, 85), (40, 100), (7, 50)].map(|(from, to)| &text[from..to]).to_vec();
    let serve = |change: &dyn Fn(&mut EngineOptions)| {
        let cards = shared_out(&files, 2, WeightFormat::Bf16, &card);
        let engine = engine(Box::new(cards), &files, |options| {
            (options.device, options.kv_dtype, options.prefix_caching) = (Device::Auto, KvDtype::Bf16, false);
            change(options);
        });
        let receivers: Vec<_> = prompts.iter().map(|prompt| submit(&engine, prompt, 40)).collect();
        let answers: Vec<_> = receivers.iter().map(|receiver| answer(receiver).unwrap().0).collect();
        (answers, engine.stats(), engine.memory().clone())
    };
    let (wanted, stats, memory) = serve(&|_| {});
    assert_eq!((stats.preemptions, memory.swap > 0), (0, true));
    let block_bytes = memory.kv / memory.kv_blocks;
    let (swapped, stats, _) = serve(&|options| (options.kv_memory, options.max_model_len) = (Some(8 * block_bytes), None));
    assert_eq!(swapped, wanted);
    assert!(stats.preemptions > 0 && stats.restored > 0, "{stats:?}");
}

/// A rank that fails in the middle of a step is to everybody what one lost device is: requests end, the engine says why, nobody waits.
#[test]
fn a_card_that_is_lost_ends_the_engine_and_not_the_process() {
    let files = ModelFiles::open(&goldens("llama")).unwrap();
    let members = Member::group(2);
    let abort = members[0].abort_handle();
    let mut fuses = Vec::new();
    let ranks = members.into_iter().enumerate().map(|(rank, member)| {
        let device = Faulty::new(Emulated::of_group(member));
        fuses.push(device.fuse());
        let ops: Box<dyn Ops> = Box::new(CudaBackend::new(device, LIMITS).capturing());
        (format!("cuda:{rank}"), ops)
    });
    let ranks = ranks.collect();
    let model = TensorParallel::load(&files, ranks, abort, WeightFormat::Bf16, &mut |_, _| {}).unwrap();
    let engine = engine(Box::new(model), &files, |options| options.kv_dtype = KvDtype::Bf16);
    let prompt = &expected(&goldens("llama")).prompt[..4];
    assert_eq!(answer(&submit(&engine, prompt, 4)).unwrap().0.len(), 4);
    assert_eq!(engine.health(), Health::Ready);
    let (first, second) = (submit(&engine, prompt, 250), submit(&engine, prompt, 250));
    // Long after the steps that are captured: what fails during a capture fails no step.
    *fuses[1].lock().unwrap() = Some(500);
    let begun = Instant::now();
    for receiver in [first, second] {
        let why = answer(&receiver).unwrap_err();
        assert!(why.contains("cuda:1: as the test wants it"), "{why}");
    }
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
    assert!(matches!(engine.health(), Health::Stopped(why) if why.contains("cuda:1")), "{:?}", engine.health());
}

#[test]
fn what_does_not_divide_is_refused_by_name() {
    let files = ModelFiles::open(&goldens("llama")).unwrap();
    let members = Member::group(3);
    let abort = members[0].abort_handle();
    let ranks = members.into_iter().map(|member| ("rank".to_owned(), reference(member))).collect();
    let refused = TensorParallel::load(&files, ranks, abort, WeightFormat::F32, &mut |_, _| {}).err().unwrap().to_string();
    assert!(
        refused.contains("4 attention heads") && refused.contains("3 devices") && refused.contains("one of 1, 2, 4"),
        "{refused}"
    );
}
