//! Steps that run ahead on a card, and preempted sequences whose blocks are kept: the same tokens, bit for bit, as one step after the other
//! with room for all. The card's kernels are emulated on the processor, under a Llama with random weights.

#![cfg(test)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::emulation::Emulated;
use crate::faulty::Faulty;
use crate::llama::Llama;
use tidemill_engine::model::Model;
use tidemill_engine::{
    Constraint, Decoder, Device, Engine, EngineOptions, Event, Frontend, ModelFiles, Request, RequestId, SamplingParams,
    ServedModel, Tenant, TensorParallel, TokenRecord,
};
use tidemill_kernels::collective::Member;
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::{KernelError, KvDtype, Limits, MemoryUse, Ops, StepBatch, StepOutput, WeightFormat};

const SEQUENCES: usize = 4;
/// So few rows that each is computed alike in any company.
const STEP: usize = 16;

/// A model that runs ahead only where the test wants it, and that counts what it is asked for.
struct Watched {
    model: Box<dyn Model>,
    ahead: bool,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    /// Rows that carried on from a step under way, and blocks that came back.
    carried: AtomicUsize,
    restored: AtomicUsize,
}

impl Watched {
    fn count(&self, batch: &StepBatch) {
        self.counts.carried.fetch_add(batch.carried.len(), Ordering::Relaxed);
        self.counts.restored.fetch_add(batch.restored.len(), Ordering::Relaxed);
    }
}

impl Model for Watched {
    fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }
    fn kv_block_bytes(&self, block_size: usize, dtype: KvDtype) -> usize {
        self.model.kv_block_bytes(block_size, dtype)
    }
    fn alloc_kv(&mut self, blocks: usize, block_size: usize, dtype: KvDtype) -> Result<(), KernelError> {
        self.model.alloc_kv(blocks, block_size, dtype)
    }
    fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
        self.count(batch);
        self.model.forward(batch, out)
    }
    fn runs_ahead(&self) -> bool {
        assert!(self.model.runs_ahead());
        self.ahead
    }
    fn submit(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.count(batch);
        self.model.submit(batch)
    }
    fn collect(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        self.model.collect(out)
    }
    fn alloc_swap(&mut self, places: usize) -> Result<(), KernelError> {
        self.model.alloc_swap(places)
    }
    fn spare_memory(&self) -> Result<Option<usize>, KernelError> {
        self.model.spare_memory()
    }
    fn memory(&self) -> MemoryUse {
        self.model.memory()
    }
    fn describe(&self) -> String {
        self.model.describe()
    }
}

/// The model on a card that takes no step as a whole.
fn load_refusing(files: &ModelFiles) -> Box<dyn Model> {
    let limits = Limits { max_tokens: STEP, max_samples: SEQUENCES, max_positions: Llama::tiny().positions };
    let mut device = Faulty::new(Emulated::new(false));
    device.refuses = true;
    let ops = Box::new(CudaBackend::new(device, limits).capturing());
    Box::new(Decoder::load(files, ops, WeightFormat::Auto, &mut |_, _| {}).unwrap())
}

/// The model, on so many ranks.
fn load(files: &ModelFiles, ranks: usize) -> Box<dyn Model> {
    let limits = Limits { max_tokens: STEP, max_samples: SEQUENCES, max_positions: Llama::tiny().positions };
    let on = |device| Box::new(CudaBackend::new(device, limits).capturing());
    if ranks == 1 {
        return Box::new(Decoder::load(files, on(Emulated::new(false)), WeightFormat::Auto, &mut |_, _| {}).unwrap());
    }
    let members = Member::group(ranks);
    let abort = members[0].abort_handle();
    let rank = |member| ("a rank".to_owned(), on(Emulated::of_group(member)) as Box<dyn Ops>);
    let ranks = members.into_iter().map(rank).collect();
    Box::new(TensorParallel::load(files, ranks, abort, WeightFormat::Auto, &mut |_, _| {}).unwrap())
}

/// An engine on so many ranks, with so many blocks of keys and values, and of swap memory.
fn start(folder: &Path, ranks: usize, ahead: bool, blocks: usize, swap: usize, caching: bool) -> (Engine, Arc<Counts>) {
    let files = ModelFiles::open(folder).unwrap();
    let model = load(&files, ranks);
    over(&files, model, ahead, blocks, swap, caching)
}

/// The same over a model that is loaded.
fn over(
    files: &ModelFiles,
    model: Box<dyn Model>,
    ahead: bool,
    blocks: usize,
    swap: usize,
    caching: bool,
) -> (Engine, Arc<Counts>) {
    let block = 32 * Llama::tiny().kv_bytes();
    let frontend = Frontend {
        tokenizer: files.tokenizer().clone(),
        chat_template: None,
        generation_defaults: files.generation_defaults().clone(),
        end_of_turn: vec![7],
        pooling: Err("no vectors here".into()),
    };
    let counts = Arc::new(Counts::default());
    let model = Box::new(Watched { model, ahead, counts: Arc::clone(&counts) });
    let options = EngineOptions {
        device: Device::Auto,
        max_seqs: SEQUENCES,
        max_batch_tokens: STEP,
        kv_memory: Some(blocks * block),
        swap_memory: Some(swap * block),
        prefix_caching: caching,
        ..EngineOptions::new("tiny")
    };
    let served = ServedModel { model, frontend, context: Llama::tiny().positions, description: "tiny".into() };
    (Engine::with_model(served, options).unwrap(), counts)
}

/// Requests of all kinds: greedy and drawn, with ends that nobody foresees, with what the host must know between two tokens, and one that is
/// given up on the way.
fn requests(engine: &Engine) -> Vec<Request> {
    let plain = |max: usize| SamplingParams { temperature: 0.0, max_tokens: Some(max), ..SamplingParams::default() };
    let drawn = |max: usize, seed: u64| SamplingParams { temperature: 1.2, seed: Some(seed), logprobs: Some(2), ..plain(max) };
    let grammar = engine.compile(&Constraint::Regex("[a-z]{3,9}".into())).unwrap();
    let kinds = [
        SamplingParams { ignore_eos: true, ..plain(24) },
        drawn(22, 1),
        SamplingParams { stop: vec!["e".into(), "A".into()], ..drawn(24, 2) },
        SamplingParams { presence_penalty: 0.8, ..drawn(12, 3) },
        SamplingParams { grammar: Some(grammar), ..drawn(10, 4) },
        SamplingParams { n: 2, ..drawn(9, 5) },
        SamplingParams { prompt_logprobs: Some(1), ..drawn(8, 6) },
        SamplingParams { ignore_eos: true, ..drawn(24, 7) },
    ];
    let request = |(i, sampling): (usize, SamplingParams)| Request {
        id: RequestId(i as u128),
        // Two that begin alike with a whole block, so that there is something to find in the cache; the others grow into their second.
        prompt: (0..if [5, 7].contains(&i) { 33 } else { 20 + i as u32 % 3 * 5 })
            .map(|at| (at * 37 + i as u32 % 2 * 11) % 250)
            .chain([i as u32])
            .collect(),
        sampling,
        priority: 0,
        cache_salt: None,
        adapter: None,
        tenant: Tenant::default(),
        deadline: None,
    };
    kinds.into_iter().enumerate().map(request).collect()
}

/// The tokens of each choice of each request with all that is told of them; those of the one that is given up are left out.
fn serve(engine: &Engine) -> Vec<Vec<(usize, TokenRecord)>> {
    let receivers: Vec<_> = requests(engine).into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let given_up = engine.submit(Request { id: RequestId(99), ..requests(engine).remove(0) }).unwrap();
    let answer = |receiver: &flume::Receiver<Event>| {
        let mut tokens = Vec::new();
        loop {
            match receiver.recv_timeout(Duration::from_secs(300)).unwrap() {
                Event::Token { choice, record, .. } => tokens.push((choice, record)),
                Event::Done(_) => break,
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
        tokens.sort_by_key(|(choice, _)| *choice);
        tokens
    };
    let first = answer(&receivers[0]);
    drop(given_up);
    std::iter::once(first).chain(receivers[1..].iter().map(answer)).collect()
}

#[test]
fn steps_that_a_card_does_not_take_as_a_whole_are_counted_and_change_no_token() {
    let folder = tempfile::tempdir().unwrap();
    Llama::tiny().write(folder.path()).unwrap();
    let (engine, _) = start(folder.path(), 1, true, 16, 0, false);
    let want = serve(&engine);
    assert_eq!(engine.stats().refused_captures, 0);
    let files = ModelFiles::open(folder.path()).unwrap();
    let (engine, _) = over(&files, load_refusing(&files), true, 16, 0, false);
    assert!(serve(&engine) == want);
    let stats = engine.stats();
    // Each kind once, of many steps.
    assert!((1..10).contains(&stats.refused_captures) && stats.steps > 30, "{stats:?}");
}

#[test]
fn running_ahead_and_swapping_change_no_token() {
    change_no_token(1);
}

#[test]
fn running_ahead_and_swapping_change_no_token_on_several_cards() {
    change_no_token(2);
}

fn change_no_token(ranks: usize) {
    let folder = tempfile::tempdir().unwrap();
    Llama::tiny().write(folder.path()).unwrap();
    // Room for all, one step after the other.
    let (engine, counts) = start(folder.path(), ranks, false, 16, 0, false);
    let want = serve(&engine);
    assert!(want.iter().all(|tokens| !tokens.is_empty()) && want[0].len() == 24);
    assert_eq!((counts.carried.load(Ordering::Relaxed), engine.stats().preemptions), (0, 0));
    drop(engine);

    let (engine, counts) = start(folder.path(), ranks, true, 16, 0, false);
    assert!(serve(&engine) == want, "ahead");
    let carried = counts.carried.load(Ordering::Relaxed);
    assert!(carried > 40, "{carried}");
    drop(engine);

    // Blocks for two sequences and a half: those that are set back are kept, or computed again.
    for (ahead, swap, caching) in [(false, 8, false), (true, 8, false), (true, 1, true)] {
        let (engine, counts) = start(folder.path(), ranks, ahead, 5, swap, caching);
        assert!(serve(&engine) == want, "ahead {ahead}, swap {swap}, caching {caching}");
        let (stats, restored) = (engine.stats(), counts.restored.load(Ordering::Relaxed));
        assert!(stats.preemptions > 0, "{stats:?}");
        if swap > 1 {
            assert!(stats.restored > 0 && restored > 0, "{restored} {stats:?}");
            // There are never more places than blocks.
            assert_eq!(engine.memory().swap, engine.memory().kv);
        }
        assert!(!caching || stats.prefix_hits > 0, "{stats:?}");
    }
}
