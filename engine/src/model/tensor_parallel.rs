//! One model on several devices: each has a part of it and a thread of its own, and all compute the same step.
//!
//! The first rank samples, and tells the others what it drew where the next step carries on from it. A rank that fails ends the step for all: what
//! the others wait for is broken off, and waiting is bounded. A step is under way on all ranks or on none.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flume::{Receiver, Sender};
use tidemill_kernels::{Abort, KernelError, KvDtype, MemoryUse, Ops, StepBatch, StepOutput, WeightFormat};

use super::{Decoder, Model};
use crate::adapter::Adapter;
use crate::load_error::LoadError;
use crate::model_config::ModelConfig;
use crate::model_files::ModelFiles;

/// How long the ranks may take for one order. Longer than any step; a bound and no timing.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long the others may take to fail by themselves when one has: what is wrong with a batch, every rank finds at once.
const GRACE: Duration = Duration::from_secs(2);
/// How long they may take to come back when what they wait for was broken off. Who does not is given up.
const LAST: Duration = Duration::from_secs(10);

/// A device that takes part: what it is called, and what computes on it.
pub type RankOps = (String, Box<dyn Ops>);

/// A part of a model, under the name of the device that has it.
pub type NamedPart = (String, Box<dyn Model>);

/// What a rank's thread is to do with its part of the model.
type Order = Box<dyn FnOnce(&mut dyn Model) + Send>;

/// What becomes of the others where some ranks fail and all come back.
#[derive(Clone, Copy, PartialEq)]
enum Terms {
    /// They have nothing left to wait for, and all go on.
    EachAlone,
    /// What they have under way lacks the ranks that failed: that is the end.
    AllOrNone,
}

struct Rank {
    name: String,
    /// One order at a time; `None` when there will be no more.
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

/// A model on several devices.
pub struct TensorParallel {
    ranks: Vec<Rank>,
    abort: Arc<dyn Abort>,
    /// Why the ranks cannot compute together any more.
    broken: OnceLock<String>,
    /// The step's, which all ranks read.
    batch: Arc<StepBatch>,
    vocabulary: usize,
    width: usize,
    config: Option<ModelConfig>,
    /// Steps of all parts do.
    runs_ahead: bool,
}

impl TensorParallel {
    /// Packs each rank's part of the weights, all ranks at once. `progress` hears of the first.
    pub fn load(
        files: &ModelFiles,
        ranks: Vec<RankOps>,
        abort: Arc<dyn Abort>,
        format: WeightFormat,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let failed = |source| LoadError::Kernel { path: files.path().to_owned(), what: "a rank".to_owned(), source };
        let parts: Result<Vec<NamedPart>, LoadError> = std::thread::scope(|scope| {
            let mut ranks = ranks.into_iter();
            let first = ranks.next();
            let others: Vec<_> = ranks
                .map(|(name, ops)| scope.spawn(move || Ok((name, Decoder::load(files, ops, format, &mut |_, _| {})?))))
                .collect();
            let first = first.map(|(name, ops)| Ok((name, Decoder::load(files, ops, format, progress)?)));
            let panicked = |_| Err(failed(KernelError::Device("a loading thread panicked".to_owned())));
            let others = others.into_iter().map(|thread| thread.join().unwrap_or_else(panicked));
            let boxed = |(name, part)| (name, Box::new(part) as Box<dyn Model>);
            // All are waited for before the first error counts.
            let all: Vec<Result<(String, Decoder), LoadError>> = first.into_iter().chain(others).collect();
            all.into_iter().map(|part| part.map(boxed)).collect()
        });
        Self::new(parts?, abort).map_err(|error| failed(error.into()))
    }

    /// Starts a thread for each part. The parts exchange in each step what `abort` breaks off.
    pub fn new(parts: Vec<NamedPart>, abort: Arc<dyn Abort>) -> std::io::Result<Self> {
        let sizes = parts.first().map(|(_, part)| (part.vocabulary(), part.width(), part.adaptable().cloned()));
        let (vocabulary, width, config) = sizes.unwrap_or_default();
        let runs_ahead = parts.iter().all(|(_, part)| part.runs_ahead());
        let rank = |(number, (name, mut part)): (usize, NamedPart)| {
            let (orders, inbox) = flume::bounded::<Order>(1);
            // The part ends on the thread that it worked on.
            let work = move || inbox.iter().for_each(|order| order(part.as_mut()));
            let thread = std::thread::Builder::new().name(format!("tidemill-rank-{number}")).spawn(work)?;
            Ok(Rank { name, orders: Some(orders), thread: Some(thread) })
        };
        let ranks = parts.into_iter().enumerate().map(rank).collect::<std::io::Result<_>>()?;
        Ok(Self { ranks, abort, broken: OnceLock::new(), batch: Arc::default(), vocabulary, width, config, runs_ahead })
    }

    /// Has every rank do something, and waits for all. Returns what each found, in the order of the ranks.
    fn ask<T: Send + 'static>(
        &self,
        task: impl Fn(&mut dyn Model) -> Result<T, KernelError> + Clone + Send + 'static,
    ) -> Result<Vec<T>, KernelError> {
        self.ask_on(Terms::EachAlone, task)
    }

    fn ask_on<T: Send + 'static>(
        &self,
        terms: Terms,
        task: impl Fn(&mut dyn Model) -> Result<T, KernelError> + Clone + Send + 'static,
    ) -> Result<Vec<T>, KernelError> {
        if let Some(why) = self.broken.get() {
            return Err(KernelError::Device(why.clone()));
        }
        let (done, outcomes) = flume::bounded(self.ranks.len());
        for (number, rank) in self.ranks.iter().enumerate() {
            let (task, done) = (task.clone(), done.clone());
            let order: Order = Box::new(move |part| {
                let panicked = |_| Err(KernelError::Device("its thread panicked; please report this as a bug".to_owned()));
                let outcome = catch_unwind(AssertUnwindSafe(|| task(part))).unwrap_or_else(panicked);
                // What it holds is given back before anybody hears.
                drop(task);
                // Who gave this rank up does not hear it.
                done.try_send((number, outcome)).ok();
            });
            // A rank that takes no order gives no outcome, which shows below.
            rank.orders.as_ref().map(|orders| orders.try_send(order));
        }
        drop(done);
        self.outcomes(&outcomes, terms)
    }

    /// The outcomes of all ranks. When one fails and the others do not come back by themselves, they are waiting for it.
    fn outcomes<T>(&self, outcomes: &Receiver<(usize, Result<T, KernelError>)>, terms: Terms) -> Result<Vec<T>, KernelError> {
        let mut found: Vec<Option<T>> = self.ranks.iter().map(|_| None).collect();
        let mut back = vec![false; self.ranks.len()];
        let mut first: Option<(usize, KernelError)> = None;
        let mut aborted = false;
        let mut deadline = Instant::now() + PATIENCE;
        while back.contains(&false) {
            match outcomes.recv_deadline(deadline) {
                Ok((rank, outcome)) => {
                    back[rank] = true;
                    match outcome {
                        Ok(value) => found[rank] = Some(value),
                        Err(error) if first.is_none() => {
                            let lost = matches!(error, KernelError::Device(_));
                            deadline = Instant::now() + if lost { Duration::ZERO } else { GRACE };
                            first = Some((rank, error));
                        }
                        Err(_) => {}
                    }
                }
                Err(_) if !aborted => {
                    aborted = true;
                    self.abort.abort(&self.reason(first.as_ref(), &back));
                    deadline = Instant::now() + LAST;
                }
                Err(_) => break,
            }
        }
        let apart = terms == Terms::AllOrNone && found.iter().any(Option::is_some);
        match first {
            None if !aborted => Ok(found.into_iter().flatten().collect()),
            // All came back by themselves, so nothing is left of the exchange and the ranks can go on.
            Some((_, error)) if !aborted && !apart && !matches!(error, KernelError::Device(_)) => Err(error),
            first => {
                let why = self.broken.get_or_init(|| self.reason(first.as_ref(), &back)).clone();
                self.abort.abort(&why);
                Err(KernelError::Device(why))
            }
        }
    }

    fn reason(&self, first: Option<&(usize, KernelError)>, back: &[bool]) -> String {
        match first {
            Some((rank, KernelError::Device(why))) => format!("{}: {why}", self.ranks[*rank].name),
            Some((rank, error)) => format!("{}: {error}; the other cards could not go on without it", self.ranks[*rank].name),
            None => {
                let names = self.ranks.iter().zip(back).filter(|(_, back)| !**back).map(|(rank, _)| rank.name.as_str());
                let names: Vec<&str> = names.collect();
                format!("{} did not come back from a step", names.join(" and "))
            }
        }
    }

    /// The batch where all ranks can read it, in the memory of the last one.
    fn shared(&mut self, batch: &StepBatch) -> Arc<StepBatch> {
        match Arc::get_mut(&mut self.batch) {
            Some(own) => own.copy_from(batch),
            None => self.batch = Arc::new(batch.clone()),
        }
        Arc::clone(&self.batch)
    }
}

/// What the first rank found.
fn leading<T>(found: Vec<T>) -> Result<T, KernelError> {
    found.into_iter().next().ok_or_else(|| KernelError::Device("a model has no rank".to_owned()))
}

impl Model for TensorParallel {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Of all ranks together.
    fn kv_block_bytes(&self, block_size: usize, dtype: KvDtype) -> usize {
        self.ask(move |part| Ok(part.kv_block_bytes(block_size, dtype))).unwrap_or_default().iter().sum()
    }

    fn alloc_kv(&mut self, blocks: usize, block_size: usize, dtype: KvDtype) -> Result<(), KernelError> {
        self.ask(move |part| part.alloc_kv(blocks, block_size, dtype)).map(|_| ())
    }

    fn alloc_swap(&mut self, places: usize) -> Result<(), KernelError> {
        self.ask(move |part| part.alloc_swap(places)).map(|_| ())
    }

    fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
        out.samples.clear();
        let batch = self.shared(batch);
        let found = self.ask(move |part| {
            let mut out = StepOutput::default();
            part.forward(&batch, &mut out).map(|()| out)
        });
        *out = leading(found?)?;
        Ok(())
    }

    fn forward_hidden(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<Vec<f32>, KernelError> {
        out.samples.clear();
        let batch = self.shared(batch);
        let found = self.ask(move |part| {
            let mut out = StepOutput::default();
            let hidden = part.forward_hidden(&batch, &mut out)?;
            Ok((out, hidden))
        });
        let (sampled, hidden) = leading(found?)?;
        *out = sampled;
        Ok(hidden)
    }

    fn runs_ahead(&self) -> bool {
        self.runs_ahead
    }

    /// Returns when every rank has asked its device for the step.
    fn submit(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        let batch = self.shared(batch);
        self.ask_on(Terms::AllOrNone, move |part| part.submit(&batch)).map(|_| ())
    }

    fn collect(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        out.samples.clear();
        let found = self.ask_on(Terms::AllOrNone, |part| {
            let mut out = StepOutput::default();
            part.collect(&mut out).map(|()| out)
        });
        *out = leading(found?)?;
        Ok(())
    }

    fn width(&self) -> usize {
        self.width
    }

    fn adaptable(&self) -> Option<&ModelConfig> {
        self.config.as_ref()
    }

    fn load_adapter(&mut self, slot: u32, adapter: &Adapter) -> Result<(), KernelError> {
        let adapter = Arc::new(adapter.clone());
        let loaded = self.ask(move |part| part.load_adapter(slot, &adapter));
        if loaded.is_err() {
            // Some of them may have it.
            self.unload_adapter(slot);
        }
        loaded.map(|_| ())
    }

    fn unload_adapter(&mut self, slot: u32) {
        let unload = move |part: &mut dyn Model| {
            part.unload_adapter(slot);
            Ok(())
        };
        // Ranks that are lost hold nothing that anybody could use.
        self.ask(unload).ok();
    }

    /// Of all ranks together: as often what the one with the least can spare.
    fn spare_memory(&self) -> Result<Option<usize>, KernelError> {
        let spare = self.ask(|part| part.spare_memory())?;
        let ranks = spare.len();
        let least = spare.into_iter().reduce(|a, b| Some(a?.min(b?))).flatten();
        Ok(least.map(|least| least * ranks))
    }

    fn memory(&self) -> MemoryUse {
        let held = self.ask(|part| Ok(part.memory())).unwrap_or_default();
        held.into_iter().fold(MemoryUse::default(), |all, one| MemoryUse {
            weights: all.weights + one.weights,
            kv: all.kv + one.kv,
            activations: all.activations + one.activations,
            adapters: all.adapters + one.adapters,
        })
    }

    fn describe(&self) -> String {
        let found = self.ask(|part| Ok(part.describe())).unwrap_or_default();
        let parts = self.ranks.iter().zip(found).map(|(rank, words)| format!("{} {words}", rank.name));
        format!("{} ranks: {}", self.ranks.len(), parts.collect::<Vec<_>>().join("; "))
    }
}

impl Drop for TensorParallel {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            rank.orders = None;
        }
        // Only together do ranks leave what they exchange by. One that is stuck is not waited for.
        if self.broken.get().is_none() {
            for thread in self.ranks.iter_mut().filter_map(|rank| rank.thread.take()) {
                thread.join().ok();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tidemill_kernels::collective::Member;

    /// What a part does in its next step.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fate {
        Well,
        /// Fails before the exchange, as every rank does.
        Refused,
        Lost,
        Short,
        Panics,
        /// Is lost when it should hand over what was set going.
        LostUnderWay,
        PanicsUnderWay,
    }

    /// Exchanges one number in each step; of a step that is submitted, when it is waited for, as a card does behind the host's back.
    struct Part {
        member: Member,
        fate: Fate,
        dropped: Arc<AtomicBool>,
        under_way: VecDeque<usize>,
    }

    impl Part {
        fn begin(&self) -> Result<(), KernelError> {
            match self.fate {
                Fate::Well | Fate::LostUnderWay | Fate::PanicsUnderWay => Ok(()),
                Fate::Refused => Err(KernelError::Limit("too many tokens".to_owned())),
                Fate::Lost => Err(KernelError::Device("it fell off the bus".to_owned())),
                Fate::Short => Err(KernelError::Memory { what: "a step", bytes: 9 }),
                Fate::Panics => panic!("as the test wants it"),
            }
        }

        fn exchange(&self, tokens: usize, out: &mut StepOutput) -> Result<(), KernelError> {
            match self.fate {
                Fate::LostUnderWay => return Err(KernelError::Device("it fell off the bus".to_owned())),
                Fate::PanicsUnderWay => panic!("as the test wants it"),
                _ => {}
            }
            let mut sum = [tokens as f32];
            self.member.all_reduce(&mut sum)?;
            out.samples.push(tidemill_kernels::Sampled { token: sum[0] as u32, ..Default::default() });
            Ok(())
        }
    }

    impl Model for Part {
        fn vocabulary(&self) -> usize {
            7
        }
        fn kv_block_bytes(&self, _: usize, _: KvDtype) -> usize {
            10
        }
        fn alloc_kv(&mut self, _: usize, _: usize, _: KvDtype) -> Result<(), KernelError> {
            Ok(())
        }
        fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
            self.begin()?;
            self.exchange(batch.tokens.len(), out)
        }
        fn runs_ahead(&self) -> bool {
            true
        }
        fn submit(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
            self.begin()?;
            self.under_way.push_back(batch.tokens.len());
            Ok(())
        }
        fn collect(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
            let tokens = self.under_way.pop_front().ok_or_else(|| KernelError::Limit("no step is under way".to_owned()))?;
            self.exchange(tokens, out)
        }
        fn spare_memory(&self) -> Result<Option<usize>, KernelError> {
            Ok(Some(100 - self.member.place().rank))
        }
        fn memory(&self) -> MemoryUse {
            MemoryUse { weights: 5, ..MemoryUse::default() }
        }
        fn describe(&self) -> String {
            "a part".to_owned()
        }
    }

    impl Drop for Part {
        fn drop(&mut self) {
            self.dropped.store(true, Ordering::Release);
        }
    }

    fn model(fates: &[Fate]) -> (TensorParallel, Vec<Arc<AtomicBool>>) {
        let members = Member::group(fates.len());
        let abort = members[0].abort_handle();
        let dropped: Vec<Arc<AtomicBool>> = fates.iter().map(|_| Arc::default()).collect();
        let parts = members.into_iter().zip(fates).zip(&dropped).map(|((member, fate), dropped)| {
            let name = format!("cuda:{}", member.place().rank);
            (
                name,
                Box::new(Part { member, fate: *fate, dropped: Arc::clone(dropped), under_way: VecDeque::new() })
                    as Box<dyn Model>,
            )
        });
        (TensorParallel::new(parts.collect(), abort).unwrap(), dropped)
    }

    fn batch(tokens: usize) -> StepBatch {
        StepBatch { tokens: vec![0; tokens], ..StepBatch::default() }
    }

    fn step(model: &mut TensorParallel) -> Result<u32, KernelError> {
        let mut out = StepOutput::default();
        model.forward(&batch(4), &mut out)?;
        Ok(out.samples[0].token)
    }

    fn collected(model: &mut TensorParallel) -> Result<u32, KernelError> {
        let mut out = StepOutput::default();
        model.collect(&mut out)?;
        Ok(out.samples[0].token)
    }

    /// The parts that came back end with their model.
    fn assert_given_up(model: TensorParallel, dropped: &[Arc<AtomicBool>]) {
        drop(model);
        let ended = || dropped.iter().all(|dropped| dropped.load(Ordering::Acquire));
        let deadline = Instant::now() + LAST;
        while !ended() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(ended(), "parts that came back are given up with the model");
    }

    #[test]
    fn all_ranks_take_part_in_each_step_and_end_with_the_model() {
        let (mut model, dropped) = model(&[Fate::Well; 3]);
        for _ in 0..100 {
            assert_eq!(step(&mut model).unwrap(), 12);
        }
        assert_eq!((model.kv_block_bytes(32, KvDtype::Bf16), model.spare_memory().unwrap()), (30, Some(3 * 98)));
        assert_eq!(model.memory().weights, 15);
        assert!(model.describe().starts_with("3 ranks: cuda:0 a part; cuda:1 a part"));
        drop(model);
        assert!(dropped.iter().all(|dropped| dropped.load(Ordering::Acquire)));
    }

    #[test]
    fn a_batch_that_every_rank_refuses_ends_that_step_only() {
        let (mut model, _) = model(&[Fate::Refused; 2]);
        for _ in 0..3 {
            assert!(matches!(step(&mut model), Err(KernelError::Limit(_))));
        }
    }

    #[test]
    fn a_rank_that_fails_is_a_lost_device_to_all_and_nobody_waits_for_ever() {
        for fate in [Fate::Lost, Fate::Short, Fate::Panics] {
            for failing in 0..3 {
                let mut fates = [Fate::Well; 3];
                fates[failing] = fate;
                let (mut model, dropped) = model(&fates);
                let begun = Instant::now();
                let Err(KernelError::Device(why)) = step(&mut model) else { panic!("{fate:?} was no loss") };
                assert!(why.starts_with(&format!("cuda:{failing}: ")), "{why}");
                assert!(begun.elapsed() < GRACE + LAST, "{fate:?} took {:?}", begun.elapsed());
                // Every later call says the same at once.
                assert_eq!(step(&mut model).unwrap_err().to_string(), KernelError::Device(why).to_string());
                assert_given_up(model, &dropped);
            }
        }
    }

    #[test]
    fn a_step_is_submitted_before_the_one_before_it_is_collected() {
        let (mut model, dropped) = model(&[Fate::Well; 3]);
        assert!(model.runs_ahead());
        model.submit(&batch(1)).unwrap();
        for tokens in 2..100 {
            model.submit(&batch(tokens)).unwrap();
            assert_eq!(collected(&mut model).unwrap(), 3 * (tokens as u32 - 1));
        }
        assert_eq!(collected(&mut model).unwrap(), 3 * 99);
        // Nothing is under way on any rank: nothing is broken by that, and who leaves a step under way leaves nothing behind.
        assert!(matches!(collected(&mut model), Err(KernelError::Limit(_))));
        model.submit(&batch(1)).unwrap();
        drop(model);
        assert!(dropped.iter().all(|dropped| dropped.load(Ordering::Acquire)));
    }

    #[test]
    fn a_submitted_batch_that_every_rank_refuses_ends_that_step_only() {
        let (mut model, _) = model(&[Fate::Refused; 2]);
        for _ in 0..3 {
            assert!(matches!(model.submit(&batch(1)), Err(KernelError::Limit(_))));
        }
    }

    #[test]
    fn a_rank_that_does_not_take_a_step_is_lost_to_those_that_do() {
        // Even one that only refuses: the others have asked their devices for exchanges that it will not join.
        for fate in [Fate::Refused, Fate::Lost, Fate::Short, Fate::Panics] {
            for failing in 0..3 {
                let mut fates = [Fate::Well; 3];
                fates[failing] = fate;
                let (mut model, dropped) = model(&fates);
                let begun = Instant::now();
                let Err(KernelError::Device(why)) = model.submit(&batch(4)) else { panic!("{fate:?} was no loss") };
                assert!(why.starts_with(&format!("cuda:{failing}: ")), "{why}");
                assert_eq!(collected(&mut model).unwrap_err().to_string(), KernelError::Device(why).to_string());
                assert!(begun.elapsed() < GRACE, "{fate:?} took {:?}", begun.elapsed());
                assert_given_up(model, &dropped);
            }
        }
    }

    #[test]
    fn a_rank_that_is_lost_under_way_ends_the_waiting_of_all() {
        for fate in [Fate::LostUnderWay, Fate::PanicsUnderWay] {
            for failing in 0..3 {
                let mut fates = [Fate::Well; 3];
                fates[failing] = fate;
                let (mut model, dropped) = model(&fates);
                model.submit(&batch(4)).unwrap();
                model.submit(&batch(5)).unwrap();
                let begun = Instant::now();
                let Err(KernelError::Device(why)) = collected(&mut model) else { panic!("{fate:?} was no loss") };
                assert!(why.starts_with(&format!("cuda:{failing}: ")), "{why}");
                // Neither the step behind it nor another one is there any more.
                let all = [collected(&mut model).unwrap_err(), model.submit(&batch(1)).unwrap_err()];
                assert!(all.iter().all(|error| error.to_string() == KernelError::Device(why.clone()).to_string()));
                assert!(begun.elapsed() < GRACE + LAST, "{fate:?} took {:?}", begun.elapsed());
                assert_given_up(model, &dropped);
            }
        }
    }
}
