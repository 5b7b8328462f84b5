//! The backend that serves on processors.
//!
//! Operations only append to a [`program::Program`]; [`Ops::finish`] runs it in one parallel region ([`pool::Pool`]) in which
//! all threads walk the entries together. Buffers, converted rows and scratch are reserved for the largest step when a model is
//! loaded, or when the first step shows that they are needed; later steps allocate nothing.

pub mod attention;
pub mod elementwise;
mod execute;
mod experts;
mod holdings;
mod lora;
pub mod math;
pub mod pool;
mod program;
pub mod sampling;
mod step;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use self::attention::{AttentionPath, AttentionScratch, KvStorage};
use self::elementwise::{Elementwise, Level};
use self::execute::Holdings;
use self::experts::{ExpertSet, RoutingTables};
use self::holdings::{Buffer, FORMS, RopeTable, Slots};
use self::lora::{LoraPlan, PackedAdapter};
use self::pool::{Pool, Stage, available_threads};
use self::program::{Entry, KINDS, Program};
use self::sampling::SamplingScratch;
use self::step::tile_scratch;
use crate::aligned::{AlignedBuf, Arena};
use crate::error::KernelError;
use crate::isa::Isa;
use crate::ops::*;
use crate::packed::PackedMatrix;
use crate::shapes::Shapes;

/// Neighbouring slots whose keys share cache lines.
const LINE_SLOTS: usize = 16;

/// How to set a [`CpuBackend`] up.
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    /// Threads that compute, the caller of [`Ops::finish`] included; 0 takes all cores.
    pub threads: usize,
    /// Instruction path; `None` takes the best of this machine.
    pub isa: Option<Isa>,
    /// The largest step.
    pub limits: Limits,
}

/// Time spent in one kind of operation, as seen by the calling thread: its own work and its waiting for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindTime {
    /// Name of the operation.
    pub kind: &'static str,
    /// Entries run.
    pub entries: u64,
    /// Time in total.
    pub time: Duration,
}

/// The CPU backend.
pub struct CpuBackend {
    pool: Pool,
    shapes: Shapes,
    program: Program,
    stages: Vec<Stage>,
    held: Holdings,
    arena: Arena,
    max_k: usize,
    max_head_dim: usize,
    max_vocabulary: usize,
    /// Floats of scratch that the widest adapter so far needs.
    lora_scratch: usize,
    error: Option<KernelError>,
    sampled: bool,
    /// Entries that callers' outputs had too many.
    spare: Vec<Sampled>,
    profile: Option<Vec<(AtomicU64, AtomicU64)>>,
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// Errors: an instruction path that this machine lacks, threads that the system refuses.
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        let best = Isa::detect();
        let isa = options.isa.unwrap_or(best);
        if isa > best {
            let text = format!("this machine cannot run the instruction path {}; its best is {}", isa.name(), best.name());
            return Err(KernelError::Unsupported(text));
        }
        let threads = if options.threads == 0 { available_threads() } else { options.threads };
        let pool = Pool::new(threads)?;
        let level = match isa {
            Isa::Portable => Level::Portable,
            Isa::Avx2 => Level::Avx2,
            Isa::Avx512 | Isa::Amx => Level::Avx512,
        };
        let mut program = Program::default();
        program.clear(0);
        Ok(CpuBackend {
            pool,
            shapes: Shapes::new(options.limits),
            program,
            stages: Vec::new(),
            held: Holdings {
                isa,
                level,
                rows: Elementwise::new(level),
                matrices: Vec::new(),
                vectors: Vec::new(),
                ropes: Vec::new(),
                buffers: Vec::new(),
                caches: Vec::new(),
                experts: Vec::new(),
                routings: Vec::new(),
                plans: Vec::new(),
                adapters: Vec::new(),
                lora: LoraPlan::default(),
                batch: StepBatch::default(),
                sampled: Slots::new((0..options.limits.max_samples).map(|_| Sampled::default())),
                tile_scratch: tile_scratch(threads, 0)?,
                sampling_scratch: Slots::new([]),
                attention_scratch: Slots::new((0..threads).map(|_| AttentionScratch::new(0))),
                lora_scratch: Slots::new([]),
            },
            arena: Arena::default(),
            max_k: 0,
            max_head_dim: 0,
            max_vocabulary: 0,
            lora_scratch: 0,
            error: None,
            sampled: false,
            spare: Vec::with_capacity(options.limits.max_samples),
            profile: None,
        })
    }

    /// Turns the measuring of operations on or off; it costs two clock readings per operation.
    pub fn set_profile(&mut self, on: bool) {
        self.profile = on.then(|| KINDS.iter().map(|_| Default::default()).collect());
    }

    /// What was measured since [`CpuBackend::set_profile`].
    pub fn profile(&self) -> Vec<KindTime> {
        let read = |(kind, (entries, nanos)): (&&'static str, &(AtomicU64, AtomicU64))| KindTime {
            kind,
            entries: entries.load(Ordering::Relaxed),
            time: Duration::from_nanos(nanos.load(Ordering::Relaxed)),
        };
        self.profile.iter().flat_map(|times| KINDS.iter().zip(times).map(read)).collect()
    }

    /// Fills a buffer, valid rows and the rest, with one value; for tests that look for unwritten elements.
    pub fn fill(&mut self, buf: Buf, value: f32) {
        if let Some(buffer) = self.held.buffers.get_mut(buf.0 as usize) {
            buffer.all_mut().fill(value);
        }
    }

    /// All rows of a buffer, those beyond the step's included; for tests that look for elements written by mistake.
    pub fn read_all(&self, buf: Buf) -> Result<Vec<f32>, KernelError> {
        let (rows, _) = self.shapes.buffer("read", buf)?;
        Ok(self.copy_rows(buf, self.shapes.capacity(rows)))
    }

    fn copy_rows(&self, buf: Buf, rows: usize) -> Vec<f32> {
        let buffer = &self.held.buffers[buf.0 as usize];
        // SAFETY: rows within the capacity; no step is running while the backend is borrowed.
        (0..rows).flat_map(|r| unsafe { buffer.row(r) }).copied().collect()
    }
}

/// One processor computes a whole model: its cores share the memory that the parts would be cut to fit.
fn alone(op: &str) -> KernelError {
    KernelError::Unsupported(format!("{op}: the processor's backend computes alone"))
}

impl Ops for CpuBackend {
    fn describe(&self) -> String {
        let isa = match self.held.isa {
            Isa::Portable => "baseline instructions",
            Isa::Avx2 => "AVX2",
            Isa::Avx512 => "AVX-512 VNNI",
            Isa::Amx => "AMX int8/bf16",
        };
        let threads = self.pool.threads();
        let experts = self.held.experts.iter().flat_map(ExpertSet::matrices);
        let forms: BTreeSet<&str> = self.held.matrices.iter().chain(experts).flat_map(PackedMatrix::forms).collect();
        let weights = forms.iter().enumerate().map(|(i, form)| format!("{}{form}", if i == 0 { ", weights " } else { "+" }));
        format!("cpu, {isa}, {threads} thread{}{}", if threads == 1 { "" } else { "s" }, weights.collect::<String>())
    }

    fn limits(&self) -> Limits {
        self.shapes.limits()
    }

    fn memory(&self) -> MemoryUse {
        let h = &self.held;
        MemoryUse {
            weights: h
                .matrices
                .iter()
                .chain(h.experts.iter().flat_map(ExpertSet::matrices))
                .map(PackedMatrix::bytes)
                .sum::<usize>()
                + h.vectors.iter().map(AlignedBuf::bytes).sum::<usize>()
                + h.ropes.iter().map(RopeTable::bytes).sum::<usize>(),
            kv: h.caches.iter().map(|(storage, _)| storage.bytes()).sum(),
            activations: h.buffers.iter().map(Buffer::bytes).sum::<usize>()
                + h.routings.iter().map(RoutingTables::bytes).sum::<usize>(),
            adapters: h.adapters.iter().flatten().map(PackedAdapter::bytes).sum(),
        }
    }

    fn load_matrix(&mut self, sources: &[MatrixSource<'_>], format: WeightFormat) -> Result<Matrix, KernelError> {
        let packed = self.pack(sources, format)?;
        let (n, k) = (packed.n(), packed.k());
        self.held.matrices.push(packed);
        Ok(self.shapes.add_matrix(n, k))
    }

    fn load_experts(&mut self, experts: &[Vec<MatrixSource<'_>>], format: WeightFormat) -> Result<Experts, KernelError> {
        let (n, k) = Shapes::stacked_experts(experts)?;
        let packed = experts.iter().map(|sources| self.pack(sources, format)).collect::<Result<Vec<_>, _>>()?;
        self.held.experts.push(ExpertSet::new(packed));
        Ok(self.shapes.add_experts(n, k, experts.len()))
    }

    fn alloc_routing(&mut self, shape: RoutingShape) -> Result<Routing, KernelError> {
        let tables = RoutingTables::new(shape, self.shapes.limits().max_tokens)?;
        let routing = self.shapes.add_routing(shape)?;
        self.held.routings.push(tables);
        Ok(routing)
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, KernelError> {
        let mut data = AlignedBuf::zeroed(values.len(), "a vector")?;
        data.copy_from_slice(values);
        self.held.vectors.push(data);
        Ok(self.shapes.add_vector(values.len()))
    }

    fn load_rope(&mut self, inv_freq: &[f32], magnitude: f32) -> Result<Rope, KernelError> {
        let table = RopeTable::new(inv_freq, magnitude, self.shapes.limits().max_positions)?;
        self.held.ropes.push(table);
        Ok(self.shapes.add_rope(inv_freq.len()))
    }

    fn alloc(&mut self, rows: Rows, width: usize) -> Result<Buf, KernelError> {
        let buffer = Buffer::new(rows, self.shapes.capacity(rows), width)?;
        let handle = self.shapes.add_buffer(rows, width)?;
        self.held.buffers.push(buffer);
        Ok(handle)
    }

    fn alloc_kv(&mut self, spec: KvSpec) -> Result<KvCache, KernelError> {
        let storage = KvStorage::new(spec)?;
        let handle = self.shapes.add_cache(spec)?;
        self.held.caches.push((storage, AttentionPath::choose(self.held.isa, spec.dtype, spec.head_dim)));
        if spec.head_dim > self.max_head_dim {
            self.max_head_dim = spec.head_dim;
            let threads = self.pool.threads();
            self.held.attention_scratch = Slots::new((0..threads).map(|_| AttentionScratch::new(spec.head_dim)));
        }
        Ok(handle)
    }

    fn load_adapter(&mut self, slot: u32, sites: &[Vec<LowRank<'_>>]) -> Result<(), KernelError> {
        self.shapes.add_adapter(slot, sites)?;
        let packed = match PackedAdapter::pack(sites) {
            Ok(packed) => packed,
            Err(error) => {
                self.unload_adapter(slot);
                return Err(error);
            }
        };
        let scratch = lora::scratch_len(packed.width());
        if scratch > self.lora_scratch {
            let each: Result<Vec<_>, _> =
                (0..self.pool.threads()).map(|_| AlignedBuf::zeroed(scratch, "adapter scratch")).collect();
            self.held.lora_scratch = Slots::new(each?);
            self.lora_scratch = scratch;
        }
        let slot = slot as usize;
        if self.held.adapters.len() <= slot {
            self.held.adapters.resize_with(slot + 1, || None);
        }
        self.held.adapters[slot] = Some(packed);
        Ok(())
    }

    fn unload_adapter(&mut self, slot: u32) {
        self.shapes.remove_adapter(slot);
        if let Some(held) = self.held.adapters.get_mut(slot as usize) {
            *held = None;
        }
    }

    fn begin(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.error = None;
        self.sampled = false;
        self.program.clear(self.held.buffers.len());
        self.held.plans.iter_mut().for_each(|p| p.2 = false);
        self.held.batch.clear();
        self.shapes.begin(batch)?;
        self.held.batch.copy_from(batch);
        self.held.lora.build(&batch.adapters, self.pool.threads());
        let positions = batch.positions.iter().max().map_or(0, |&last| last as usize + 1);
        self.held.ropes.iter_mut().for_each(|rope| rope.fill(positions));
        for (cache, _) in &self.held.caches {
            for &(from, to) in &batch.copies {
                // SAFETY: `Shapes` found both blocks within every cache, and no step is running.
                unsafe { cache.copy_block(from as usize, to as usize) };
            }
        }
        Ok(())
    }

    fn embedding(&mut self, table: Matrix, out: Buf) {
        if self.admit(self.shapes.embedding(table, out)) {
            let width = self.held.buffers[out.0 as usize].width;
            // A row of a packed table is spread over as many cache lines as it has groups of features.
            self.push_rows(Entry::Embedding { table: table.0, out: out.0 }, out, width * 8);
        }
    }

    fn embedding_shard(&mut self, _: Matrix, _: u32, _: Buf) {
        self.admit(Err(alone("embedding_shard")));
    }

    fn all_reduce(&mut self, _: Buf) {
        self.admit(Err(alone("all_reduce")));
    }

    fn all_gather(&mut self, _: Buf, _: Buf) {
        self.admit(Err(alone("all_gather")));
    }

    fn rms_norm(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        if self.admit(self.shapes.norm("rms_norm", x, weight, out)) {
            let width = self.held.buffers[out.0 as usize].width;
            self.push_rows(Entry::RmsNorm { x: x.0, weight: weight.0, eps, out: out.0 }, out, width);
        }
    }

    fn rms_norm_add(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        if self.admit(self.shapes.norm("rms_norm_add", x, weight, out)) {
            let width = self.held.buffers[out.0 as usize].width;
            self.push_rows(Entry::RmsNormAdd { x: x.0, weight: weight.0, eps, out: out.0 }, out, width);
        }
    }

    fn layer_norm(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        if self.admit(self.shapes.norm("layer_norm", x, weight, out)) {
            let width = self.held.buffers[out.0 as usize].width;
            self.push_rows(Entry::LayerNorm { x: x.0, weight: weight.0, eps, out: out.0 }, out, width);
        }
    }

    fn clamp(&mut self, x: Buf, limit: f32) {
        if self.admit(self.shapes.clamp(x, limit)) {
            let width = self.held.buffers[x.0 as usize].width;
            self.push_rows(Entry::Clamp { x: x.0, limit }, x, width);
        }
    }

    fn scale(&mut self, x: Buf, factor: f32) {
        if self.admit(self.shapes.scale(x)) {
            let width = self.held.buffers[x.0 as usize].width;
            self.push_rows(Entry::Scale { x: x.0, factor }, x, width);
        }
    }

    fn soft_cap(&mut self, x: Buf, cap: f32) {
        if self.admit(self.shapes.soft_cap(x, cap)) {
            let width = self.held.buffers[x.0 as usize].width;
            self.push_rows(Entry::SoftCap { x: x.0, cap }, x, width);
        }
    }

    fn linear(&mut self, x: Buf, w: Matrix, bias: Option<Vector>, out: Buf, store: Store) {
        if !self.admit(self.shapes.linear(x, w, bias, out)) {
            return;
        }
        let form = match self.convert_for(x, w) {
            Ok(form) => form,
            Err(error) => {
                self.error = Some(error);
                return;
            }
        };
        let items = self.held.matrices[w.0 as usize].items(self.rows(out));
        let bias = bias.map(|b| b.0);
        self.program.push(Entry::Linear { x: x.0, form, w: w.0, bias, out: out.0, store }, Some(out.0), items, 1);
    }

    fn lora(&mut self, x: Buf, site: usize, out: Buf) {
        let check = self.shapes.lora(x, site, out);
        let any = *check.as_ref().unwrap_or(&false);
        if self.admit(check.map(|_| ())) && any {
            let tasks = self.held.lora.tasks();
            self.program.push(Entry::Lora { x: x.0, site: site as u32, out: out.0 }, Some(out.0), tasks, 1);
        }
    }

    fn rope_cache(&mut self, qkv: Buf, shape: HeadShape, norm: Option<QkNorm>, rope: Rope, kv: KvCache, layer: usize) {
        let check = self.shapes.rope_cache(qkv, shape, norm.as_ref(), rope, kv, layer);
        if self.admit(check) {
            let (rows, width) = (self.rows(qkv), self.held.buffers[qkv.0 as usize].width);
            let mut grain = self.grain(rows, width * 2);
            if rows >= LINE_SLOTS * self.held.batch.sequences.len() {
                // Mostly prefill: two threads should not write to the same lines of keys.
                grain = grain.max(LINE_SLOTS.min(rows.div_ceil(self.pool.threads())));
            }
            let entry = Entry::RopeCache { qkv: qkv.0, shape, norm, rope: rope.0, kv: kv.0, layer: layer as u32 };
            self.program.push(entry, Some(qkv.0), rows, grain);
        }
    }

    fn paged_attention(&mut self, qkv: Buf, shape: HeadShape, spec: AttentionSpec, kv: KvCache, layer: usize, out: Buf) {
        let check = self.shapes.paged_attention(qkv, shape, spec, kv, layer, out, &self.held.batch);
        if !self.admit(check) {
            return;
        }
        let plan = self.plan(shape);
        let (items, merges) = (self.held.plans[plan].1.items(), self.held.plans[plan].1.merges());
        let (qkv, kv, layer, plan, out) = (qkv.0, kv.0, layer as u32, plan as u32, out.0);
        self.program.push(Entry::Attention { qkv, shape, spec, kv, layer, plan, out }, Some(out), items, 1);
        if merges > 0 {
            self.program.push(Entry::AttentionMerge { qkv, shape, spec, kv, layer, plan, out }, Some(out), merges, 1);
        }
    }

    fn silu_and_mul(&mut self, gate_up: Buf, out: Buf) {
        if self.admit(self.shapes.gated("silu_and_mul", gate_up, out)) {
            let width = self.held.buffers[gate_up.0 as usize].width;
            self.push_rows(Entry::SiluAndMul { gate_up: gate_up.0, out: out.0 }, out, width);
        }
    }

    fn gelu_tanh_and_mul(&mut self, gate_up: Buf, out: Buf) {
        if self.admit(self.shapes.gated("gelu_tanh_and_mul", gate_up, out)) {
            let width = self.held.buffers[gate_up.0 as usize].width;
            self.push_rows(Entry::GeluTanhAndMul { gate_up: gate_up.0, out: out.0 }, out, width);
        }
    }

    fn gelu(&mut self, x: Buf, out: Buf) {
        if self.admit(self.shapes.gelu(x, out)) {
            let width = self.held.buffers[x.0 as usize].width;
            self.push_rows(Entry::Gelu { x: x.0, out: out.0 }, out, width);
        }
    }

    fn route(&mut self, logits: Buf, normalised: bool, routing: Routing) {
        let check = self.shapes.route(logits, routing);
        if self.admit(check) {
            let (rows, width) = (self.rows(logits), self.held.buffers[logits.0 as usize].width);
            let each = self.held.routings[routing.0 as usize].shape().each;
            let grain = self.grain(rows, width * each);
            self.program.push(Entry::Route { logits: logits.0, normalised, routing: routing.0 }, None, rows, grain);
            self.program.push(Entry::Align { routing: routing.0 }, None, 1, 1);
        }
    }

    fn expert_linear(&mut self, x: Buf, experts: Experts, routing: Routing, out: Buf) {
        if !self.admit(self.shapes.expert_linear(x, experts, routing, out)) {
            return;
        }
        let (rows, width) = (self.rows(out), self.held.buffers[x.0 as usize].width);
        let set = &self.held.experts[experts.0 as usize];
        let tables = &mut self.held.routings[routing.0 as usize];
        let tasks = tables.most_active(rows) * set.parts();
        if let Err(error) = tables.prepare(x.0, width, set.kinds()) {
            self.error = Some(error);
            return;
        }
        let (x, routing, experts) = (x.0, routing.0, experts.0);
        self.program.push(Entry::ConvertRouted { x, routing, experts }, None, rows, self.grain(rows, width));
        self.program.push(Entry::ExpertLinear { x, routing, experts, out: out.0 }, Some(out.0), tasks, 1);
    }

    fn combine(&mut self, x: Buf, routing: Routing, out: Buf, store: Store) {
        if self.admit(self.shapes.combine(x, routing, out)) {
            let width = self.held.buffers[out.0 as usize].width;
            let each = self.held.routings[routing.0 as usize].shape().each;
            self.push_rows(Entry::Combine { x: x.0, routing: routing.0, out: out.0, store }, out, width * each);
        }
    }

    fn gate_rows(&mut self, gate: Buf, x: Buf) {
        if self.admit(self.shapes.gate_rows(gate, x)) {
            let width = self.held.buffers[x.0 as usize].width;
            self.push_rows(Entry::GateRows { gate: gate.0, x: x.0 }, x, width);
        }
    }

    fn gather(&mut self, x: Buf, out: Buf) {
        if self.admit(self.shapes.gather(x, out)) {
            let width = self.held.buffers[out.0 as usize].width;
            self.push_rows(Entry::Gather { x: x.0, out: out.0 }, out, width);
        }
    }

    fn sample(&mut self, logits: Buf, vocabulary: usize) {
        if self.admit(self.shapes.sample(logits, vocabulary, &self.held.batch)) {
            if vocabulary > self.max_vocabulary {
                self.max_vocabulary = vocabulary;
                let threads = self.pool.threads();
                self.held.sampling_scratch = Slots::new((0..threads).map(|_| SamplingScratch::new(vocabulary)));
            }
            let rows = self.rows(logits);
            self.program.push(Entry::Sample { logits: logits.0, vocabulary: vocabulary as u32 }, None, rows, 1);
            self.sampled = true;
        }
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        let outcome = match self.error.take() {
            Some(error) => Err(error),
            None => self.execute(),
        };
        self.program.retire();
        let sampled = std::mem::take(&mut self.sampled);
        if let Err(error) = outcome {
            out.samples.clear();
            // What was converted before the failure is not to be relied on.
            self.program.clear(self.held.buffers.len());
            return Err(error);
        }
        let count = if sampled { self.held.batch.samples.len() } else { 0 };
        // Entries are kept when a step has fewer, and swapped, not cloned: the lists inside keep their memory.
        while out.samples.len() > count {
            let entry = out.samples.pop().filter(|_| self.spare.len() < self.spare.capacity());
            self.spare.extend(entry);
        }
        out.samples.resize_with(count, || self.spare.pop().unwrap_or_default());
        out.samples.iter_mut().zip(self.held.sampled.iter_mut()).for_each(|(out, made)| std::mem::swap(out, made));
        Ok(())
    }

    fn read(&self, buf: Buf) -> Result<Vec<f32>, KernelError> {
        let (rows, _) = self.shapes.buffer("read", buf)?;
        Ok(self.copy_rows(buf, self.shapes.count(rows)))
    }
}

const _: () = assert!(FORMS.len() <= 32);

#[cfg(test)]
mod tests;
