//! The backend that serves on NVIDIA cards.
//!
//! Operations are launched when they are enqueued; the device does them in that order. Kernels are compiled for the card that is
//! found (see `kernels/cuda/`), so the same binary runs without one. The backend speaks to a [`Device`]: the driver, or in tests a
//! host that runs the same kernels, so that everything here but the driver's calls is tested where there is no card.
//!
//! Activations are f32. A buffer that a linear reads gets a bf16 copy beside it the first time that is needed, and from then on
//! whoever writes the buffer writes the copy, too.

mod adapters;
mod apart;
mod attention;
mod budget;
pub mod calls;
mod collectives;
pub mod compile;
pub mod device;
pub mod driver;
mod experts;
mod fp8;
mod functions;
mod graphs;
mod halves;
mod holdings;
pub mod images;
pub mod libraries;
mod lists;
pub mod nccl;
mod params;
mod patience;
mod plan;
mod product;
mod replay;
mod room;
mod rows;
mod sampling;
mod segments;
mod sought;
mod staging;
mod steps;
pub mod stopwatch;
pub mod train;
pub mod trial;
pub mod weights;

use self::adapters::Adapters;
use self::attention::{Plans, cache_form};
use self::collectives::Collected;
use self::device::{Address, Device, Kernel, Launch, Params, Source};
use self::experts::{HeldExperts, HeldRouting};
use self::fp8::Fp8Rooms;
use self::graphs::Op;
use self::holdings::{Buffer, HeldCache, HeldMatrix, HeldRope};
use self::lists::{StepLists, Swap};
use self::params as p;
use self::replay::Captures;
use self::room::Room;
use self::rows::fours;
use self::sampling::SamplingRoom;
use self::steps::Steps;
use crate::collective::Place;
use crate::error::KernelError;
use crate::ops::*;
use crate::shapes::Shapes;

const EMBEDDING: Kernel = Kernel::new(Source::Rows, "embedding", 256);
const RMS_NORM: Kernel = Kernel::new(Source::Rows, "rms_norm", 1024);
const LAYER_NORM: Kernel = Kernel::new(Source::Rows, "layer_norm", 1024);
const CLAMP: Kernel = Kernel::new(Source::Rows, "clamp", 256);
const SCALE: Kernel = Kernel::new(Source::Rows, "scale", 256);
const SOFT_CAP: Kernel = Kernel::new(Source::Rows, "soft_cap", 256);
const GELU: Kernel = Kernel::new(Source::Rows, "gelu", 256);
const SILU_AND_MUL: Kernel = Kernel::new(Source::Rows, "silu_and_mul", 256);
const GELU_TANH_AND_MUL: Kernel = Kernel::new(Source::Rows, "gelu_tanh_and_mul", 256);
const GATHER: Kernel = Kernel::new(Source::Rows, "gather", 256);
const HALVE: Kernel = Kernel::new(Source::Rows, "halve", 256);
const ADD_BIAS: Kernel = Kernel::new(Source::Rows, "add_bias", 256);
const COPY_BLOCK: Kernel = Kernel::new(Source::Rows, "copy_block", 256);
const ROPE_CACHE: Kernel = Kernel::new(Source::Rows, "rope_cache", 128);
const LINEAR_F32: Kernel = Kernel::new(Source::Linear, "linear_f32", 256);
const ATTENTION_JOIN: Kernel = Kernel::new(Source::Attention, "attention_join", 128);
const ATTENTION_PLAIN: Kernel = Kernel::new(Source::Attention, "attention_plain", 32);

/// The CUDA backend on a device.
pub struct CudaBackend<D: Device> {
    device: D,
    shapes: Shapes,
    matrices: Vec<HeldMatrix>,
    vectors: Vec<Address>,
    ropes: Vec<HeldRope>,
    buffers: Vec<Buffer>,
    caches: Vec<HeldCache>,
    experts: Vec<HeldExperts>,
    routings: Vec<HeldRouting>,
    adapters: Adapters,
    lists: StepLists,
    plans: Plans,
    partials: Room,
    /// A quantised matrix as bf16, for products of many rows.
    widened: Room,
    activations: Activations,
    fp8: Fp8Rooms,
    sampling: SamplingRoom,
    collected: Collected,
    captures: Captures,
    batch: StepBatch,
    steps: Steps,
    swap: Option<Swap>,
    error: Option<KernelError>,
    memory: MemoryUse,
    owned: Vec<Address>,
    /// Bytes of the device's memory that the cache leaves to others.
    left: usize,
}

impl<D: Device> CudaBackend<D> {
    /// A backend for steps up to `limits`.
    pub fn new(device: D, limits: Limits) -> Self {
        CudaBackend {
            device,
            shapes: Shapes::new(limits),
            matrices: Vec::new(),
            vectors: Vec::new(),
            ropes: Vec::new(),
            buffers: Vec::new(),
            caches: Vec::new(),
            experts: Vec::new(),
            routings: Vec::new(),
            adapters: Adapters::default(),
            lists: StepLists::default(),
            plans: Plans::default(),
            partials: Room::default(),
            widened: Room::default(),
            activations: Activations::default(),
            fp8: Fp8Rooms::default(),
            sampling: SamplingRoom::default(),
            collected: Collected::default(),
            captures: Captures::default(),
            batch: StepBatch::default(),
            steps: Steps::default(),
            swap: None,
            error: None,
            memory: MemoryUse::default(),
            owned: Vec::new(),
            left: 0,
        }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Fills a buffer, valid rows and the rest, with one value; for tests that look for unwritten elements.
    pub fn fill(&mut self, buf: Buf, value: f32) -> Result<(), KernelError> {
        let (rows, width) = self.shapes.buffer("fill", buf)?;
        self.stale(buf);
        let buffer = &self.buffers[buf.0 as usize];
        let values = vec![value; self.shapes.capacity(rows) * width];
        self.device.write(buffer.at, &float_bytes(&values))
    }

    /// All rows of a buffer, those beyond the step's included; for tests that look for elements written by mistake.
    pub fn read_all(&self, buf: Buf) -> Result<Vec<f32>, KernelError> {
        let (rows, width) = self.shapes.buffer("read", buf)?;
        self.read_floats(self.buffers[buf.0 as usize].at, self.shapes.capacity(rows) * width)
    }

    fn read_floats(&self, at: Address, count: usize) -> Result<Vec<f32>, KernelError> {
        let mut bytes = vec![0; count * 4];
        if count > 0 {
            self.device.read(at, &mut bytes)?;
        }
        Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// Does an operation's work when its check went well and nothing failed before; notes the first error.
    fn attempt(&mut self, check: Result<(), KernelError>, run: impl FnOnce(&mut Self) -> Result<(), KernelError>) {
        if self.error.is_none() {
            self.error = check.and_then(|()| run(self)).err();
        }
    }

    fn launch<P: Params>(&mut self, kernel: Kernel, launch: Launch, params: P) -> Result<(), KernelError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.device.launch(kernel, launch, params.bytes())
    }

    /// Rows that the step computes: those that were asked for, and those that pad.
    fn rows(&self, buf: Buf) -> usize {
        let rows = self.buffers[buf.0 as usize].rows;
        match (self.captures.size, rows) {
            (Some(size), Rows::Tokens) => size.rows,
            (Some(size), Rows::Samples) => size.samples,
            (Some(size), Rows::Routed { each }) => size.rows * each,
            (None, rows) => self.shapes.count(rows),
        }
    }

    fn at(&self, buf: Buf) -> Address {
        self.buffers[buf.0 as usize].at
    }

    /// Reserves memory and keeps count of it.
    fn hold(&mut self, what: &'static str, bytes: Option<usize>) -> Result<Address, KernelError> {
        let bytes = bytes.filter(|b| *b <= isize::MAX as usize).ok_or(KernelError::Memory { what, bytes: usize::MAX })?;
        // What is left to others is not taken for a while, either.
        if self.left > 0 && bytes > self.device.memory()?.0.saturating_sub(self.left) {
            return Err(KernelError::Memory { what, bytes });
        }
        let at = self.device.alloc(what, bytes)?;
        self.owned.push(at);
        Ok(at)
    }
}

impl<D: Device> Drop for CudaBackend<D> {
    fn drop(&mut self) {
        self.captures.graphs.forget();
        self.hand_back();
        let rooms =
            [self.lists.room, self.partials, self.widened].into_iter().chain(self.plans.rooms()).chain(self.sampling.rooms());
        let rooms = rooms.chain(self.collected.rooms()).chain(self.fp8.rooms());
        let halves = self.buffers.iter().filter_map(|b| b.half.map(|half| half.at));
        let all = rooms.filter(|room| room.bytes > 0).map(|room| room.at).chain(halves).chain(self.adapters.addresses());
        let all: Vec<Address> = all.chain(self.owned.iter().copied()).collect();
        all.into_iter().for_each(|at| self.device.free(at));
        if let Some(swap) = self.swap {
            self.device.free_host(swap.at);
        }
    }
}

fn float_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

impl<D: Device> Ops for CudaBackend<D> {
    fn describe(&self) -> String {
        self.device.describe()
    }

    fn limits(&self) -> Limits {
        self.shapes.limits()
    }

    fn memory(&self) -> MemoryUse {
        let rooms = [self.lists.room, self.partials, self.widened].into_iter().chain(self.sampling.rooms());
        let rooms = rooms.chain(self.collected.rooms()).chain(self.fp8.rooms());
        let activations = self.memory.activations + rooms.map(|room| room.bytes).sum::<usize>();
        MemoryUse { activations, adapters: self.adapters.bytes(), ..self.memory }
    }

    fn spare_memory(&self, heads: HeadShape) -> Result<Option<usize>, KernelError> {
        CudaBackend::spare_memory(self, heads).map(Some)
    }

    fn place(&self) -> Place {
        self.device.place()
    }

    fn load_matrix(&mut self, sources: &[MatrixSource<'_>], format: WeightFormat) -> Result<Matrix, KernelError> {
        let packed = weights::pack(sources, format)?;
        let data = self.hold("weights", Some(packed.data.len()))?;
        self.device.write(data, &packed.data)?;
        let scales = match packed.scales.is_empty() {
            true => Address::NONE,
            false => {
                let at = self.hold("weights", Some(packed.scales.len()))?;
                self.device.write(at, &packed.scales)?;
                at
            }
        };
        self.memory.weights += packed.data.len() + packed.scales.len();
        let [n, k, stride] = [packed.n, packed.k, packed.stride].map(|v| v as u32);
        let weights = p::Weights { data, scales, form: packed.form as u32, n, k, stride };
        self.matrices.push(HeldMatrix { form: packed.form, weights });
        Ok(self.shapes.add_matrix(packed.n, packed.k))
    }

    fn load_experts(&mut self, experts: &[Vec<MatrixSource<'_>>], format: WeightFormat) -> Result<Experts, KernelError> {
        let (n, k) = Shapes::stacked_experts(experts)?;
        let held = self.hold_experts(experts, format)?;
        self.experts.push(held);
        Ok(self.shapes.add_experts(n, k, experts.len()))
    }

    fn alloc_routing(&mut self, shape: RoutingShape) -> Result<Routing, KernelError> {
        let routing = self.shapes.add_routing(shape)?;
        let held = self.hold_routing(shape)?;
        self.routings.push(held);
        Ok(routing)
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, KernelError> {
        let at = self.hold("weights", values.len().checked_mul(4))?;
        self.device.write(at, &float_bytes(values))?;
        self.memory.weights += values.len() * 4;
        self.vectors.push(at);
        Ok(self.shapes.add_vector(values.len()))
    }

    fn load_rope(&mut self, inv_freq: &[f32], magnitude: f32) -> Result<Rope, KernelError> {
        let positions = self.shapes.limits().max_positions;
        let table = |turn: fn(f64) -> f64| {
            let angles = (0..positions).flat_map(|position| inv_freq.iter().map(move |f| f64::from(position as f32 * f)));
            float_bytes(&angles.map(|angle| (turn(angle) * f64::from(magnitude)) as f32).collect::<Vec<_>>())
        };
        let [cosines, sines] = [table(f64::cos), table(f64::sin)];
        let mut places = [Address::NONE; 2];
        for (place, bytes) in places.iter_mut().zip([cosines, sines]) {
            *place = self.hold("rotations", Some(bytes.len()))?;
            self.device.write(*place, &bytes)?;
            self.memory.weights += bytes.len();
        }
        self.ropes.push(HeldRope { cosines: places[0], sines: places[1], half: inv_freq.len() });
        Ok(self.shapes.add_rope(inv_freq.len()))
    }

    fn alloc(&mut self, rows: Rows, width: usize) -> Result<Buf, KernelError> {
        let bytes = self.shapes.capacity(rows).checked_mul(width).and_then(|n| n.checked_mul(4));
        let at = self.hold("activations", bytes)?;
        let buf = self.shapes.add_buffer(rows, width)?;
        self.memory.activations += bytes.unwrap_or(0);
        self.buffers.push(Buffer { rows, width, at, half: None });
        Ok(buf)
    }

    fn alloc_kv(&mut self, spec: KvSpec) -> Result<KvCache, KernelError> {
        let sizes = [spec.layers, spec.blocks, spec.kv_heads, spec.block_size, spec.head_dim, spec.dtype.bytes()];
        let bytes = sizes.into_iter().try_fold(1usize, usize::checked_mul);
        let (keys, values) = (self.hold("keys", bytes)?, self.hold("values", bytes)?);
        let handle = self.shapes.add_cache(spec)?;
        self.memory.kv += 2 * bytes.unwrap_or(0);
        self.caches.push(HeldCache { spec, keys, values });
        Ok(handle)
    }

    fn alloc_swap(&mut self, kv: KvCache, places: usize) -> Result<(), KernelError> {
        let spec = self.shapes.add_swap(kv, places)?;
        let bytes = places.checked_mul(spec.block_bytes()).filter(|bytes| *bytes <= isize::MAX as usize);
        let reserved = match bytes {
            Some(bytes) => self.device.alloc_host("swapped blocks", bytes),
            None => Err(KernelError::Memory { what: "swapped blocks", bytes: usize::MAX }),
        };
        let at = reserved.inspect_err(|_| self.shapes.remove_swap())?;
        self.swap = Some(Swap { kv, at });
        Ok(())
    }

    fn load_adapter(&mut self, slot: u32, sites: &[Vec<LowRank<'_>>]) -> Result<(), KernelError> {
        self.shapes.add_adapter(slot, sites)?;
        self.captures.graphs.forget_adapters();
        self.hand_back();
        let loaded = self.adapters.load(&mut self.device, slot as usize, sites);
        if loaded.is_err() {
            self.unload_adapter(slot);
        }
        loaded
    }

    fn unload_adapter(&mut self, slot: u32) {
        self.shapes.remove_adapter(slot);
        self.captures.graphs.forget_adapters();
        self.hand_back();
        self.adapters.unload(&mut self.device, slot as usize);
    }

    fn begin(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.check_room()?;
        self.error = None;
        self.steps.vocabulary = 0;
        self.plans.forget();
        self.all_stale();
        self.captures.recording = false;
        self.captures.size = None;
        self.shapes.begin(batch)?;
        self.batch.copy_from(batch);
        self.begin_recording();
        self.save_blocks()?;
        self.write_lists()?;
        self.copy_blocks()?;
        self.restore_blocks()?;
        self.carry()
    }

    fn embedding(&mut self, table: Matrix, out: Buf) {
        self.enqueue(self.shapes.embedding(table, out), Op::Embedding { table, out }, |b| b.embed(table, 0, out));
    }

    fn embedding_shard(&mut self, table: Matrix, first: u32, out: Buf) {
        let check = self.shapes.embedding_shard(table, out);
        self.enqueue(check, Op::EmbeddingShard { table, first, out }, |b| b.embed(table, first, out));
    }

    fn all_reduce(&mut self, x: Buf) {
        self.enqueue(self.shapes.all_reduce(x), Op::AllReduce { x }, |b| b.sum_over_ranks(x));
    }

    fn all_gather(&mut self, x: Buf, out: Buf) {
        let check = self.shapes.all_gather(x, out, self.place().ranks);
        self.enqueue(check, Op::AllGather { x, out }, |b| b.collect(x, out));
    }

    fn rms_norm(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        let check = self.shapes.norm("rms_norm", x, weight, out);
        self.enqueue(check, Op::RmsNorm { x, weight, eps, out }, |b| b.norm(RMS_NORM, x, weight, eps, out, false));
    }

    fn rms_norm_add(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        let check = self.shapes.norm("rms_norm_add", x, weight, out);
        self.enqueue(check, Op::RmsNormAdd { x, weight, eps, out }, |b| b.norm(RMS_NORM, x, weight, eps, out, true));
    }

    fn layer_norm(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        let check = self.shapes.norm("layer_norm", x, weight, out);
        self.enqueue(check, Op::LayerNorm { x, weight, eps, out }, |b| b.norm(LAYER_NORM, x, weight, eps, out, false));
    }

    fn clamp(&mut self, x: Buf, limit: f32) {
        self.enqueue(self.shapes.clamp(x, limit), Op::Clamp { x, limit }, |b| {
            b.stale(x);
            let width = b.buffers[x.0 as usize].width;
            let params = p::Clamp { x: b.at(x), width: width as u32, limit };
            b.launch(CLAMP, fours(b.rows(x), width), params)
        });
    }

    fn scale(&mut self, x: Buf, factor: f32) {
        self.enqueue(self.shapes.scale(x), Op::Scale { x, factor }, |b| {
            b.stale(x);
            let width = b.buffers[x.0 as usize].width;
            let params = p::Scale { x: b.at(x), width: width as u32, factor };
            b.launch(SCALE, fours(b.rows(x), width), params)
        });
    }

    fn soft_cap(&mut self, x: Buf, cap: f32) {
        self.enqueue(self.shapes.soft_cap(x, cap), Op::SoftCap { x, cap }, |b| {
            b.stale(x);
            let width = b.buffers[x.0 as usize].width;
            let params = p::SoftCap { x: b.at(x), width: width as u32, cap };
            b.launch(SOFT_CAP, fours(b.rows(x), width), params)
        });
    }

    fn linear(&mut self, x: Buf, w: Matrix, bias: Option<Vector>, out: Buf, store: Store) {
        self.enqueue(self.shapes.linear(x, w, bias, out), Op::Linear { x, w, bias, out, store }, |b| {
            b.multiply(x, w, bias, out, store)
        });
    }

    fn lora(&mut self, x: Buf, site: usize, out: Buf) {
        let used = self.shapes.lora(x, site, out);
        if matches!(used, Ok(false)) {
            return;
        }
        self.enqueue(used.map(|_| ()), Op::Lora { x, site, out }, |b| b.update(x, site, out));
    }

    fn rope_cache(&mut self, qkv: Buf, shape: HeadShape, norm: Option<QkNorm>, rope: Rope, kv: KvCache, layer: usize) {
        let check = self.shapes.rope_cache(qkv, shape, norm.as_ref(), rope, kv, layer);
        self.enqueue(check, Op::RopeCache { qkv, shape, norm, rope, kv, layer }, |b| {
            b.stale(qkv);
            let (rope, cache) = (&b.ropes[rope.0 as usize], &b.caches[kv.0 as usize]);
            let (keys, values) = cache.layer(layer);
            let vector = |v: Option<Vector>| v.map_or(Address::NONE, |v| b.vectors[v.0 as usize]);
            let params = p::RopeCache {
                qkv: b.at(qkv),
                q_norm: vector(norm.map(|n| n.q)),
                k_norm: vector(norm.map(|n| n.k)),
                cosines: rope.cosines,
                sines: rope.sines,
                positions: b.lists.positions,
                slots: b.lists.slots,
                keys,
                values,
                heads: shape.heads as u32,
                kv_heads: shape.kv_heads as u32,
                head_dim: shape.head_dim as u32,
                half: rope.half as u32,
                block_size: cache.spec.block_size as u32,
                cache_form: cache_form(cache.spec.dtype),
                eps: norm.map_or(0.0, |n| n.eps),
                unused: 0,
            };
            let heads = shape.heads + 2 * shape.kv_heads;
            b.launch(ROPE_CACHE, Launch::grid(b.rows(qkv), heads.div_ceil(4)), params)
        });
    }

    fn paged_attention(&mut self, qkv: Buf, shape: HeadShape, spec: AttentionSpec, kv: KvCache, layer: usize, out: Buf) {
        let check = self.shapes.paged_attention(qkv, shape, spec, kv, layer, out, &self.batch);
        self.enqueue(check, Op::PagedAttention { qkv, shape, spec, kv, layer, out }, |b| {
            b.attend(qkv, shape, spec, kv, layer, out)
        });
    }

    fn silu_and_mul(&mut self, gate_up: Buf, out: Buf) {
        let check = self.shapes.gated("silu_and_mul", gate_up, out);
        self.enqueue(check, Op::SiluAndMul { gate_up, out }, |b| b.gate(SILU_AND_MUL, gate_up, out));
    }

    fn gelu_tanh_and_mul(&mut self, gate_up: Buf, out: Buf) {
        let check = self.shapes.gated("gelu_tanh_and_mul", gate_up, out);
        self.enqueue(check, Op::GeluTanhAndMul { gate_up, out }, |b| b.gate(GELU_TANH_AND_MUL, gate_up, out));
    }

    fn gelu(&mut self, x: Buf, out: Buf) {
        self.enqueue(self.shapes.gelu(x, out), Op::Gelu { x, out }, |b| {
            let (half, half_stride) = b.produce(out);
            let width = b.buffers[out.0 as usize].width;
            let params = p::Gelu { x: b.at(x), out: b.at(out), half, width: width as u32, half_stride };
            b.launch(GELU, fours(b.rows(out), width), params)
        });
    }

    fn route(&mut self, logits: Buf, normalised: bool, routing: Routing) {
        let check = self.shapes.route(logits, routing);
        self.enqueue(check, Op::Route { logits, normalised, routing }, |b| b.send(logits, normalised, routing));
    }

    fn expert_linear(&mut self, x: Buf, experts: Experts, routing: Routing, out: Buf) {
        let check = self.shapes.expert_linear(x, experts, routing, out);
        self.enqueue(check, Op::ExpertLinear { x, experts, routing, out }, |b| b.multiply_experts(x, experts, routing, out));
    }

    fn combine(&mut self, x: Buf, routing: Routing, out: Buf, store: Store) {
        let check = self.shapes.combine(x, routing, out);
        self.enqueue(check, Op::Combine { x, routing, out, store }, |b| b.add_up(x, routing, out, store));
    }

    fn gate_rows(&mut self, gate: Buf, x: Buf) {
        self.enqueue(self.shapes.gate_rows(gate, x), Op::GateRows { gate, x }, |b| b.scale_rows(gate, x));
    }

    fn gather(&mut self, x: Buf, out: Buf) {
        self.enqueue(self.shapes.gather(x, out), Op::Gather { x, out }, |b| {
            let (half, half_stride) = b.produce(out);
            let (width, rows) = (b.buffers[out.0 as usize].width, b.lists.gathered);
            let params = p::Gather { x: b.at(x), rows, out: b.at(out), half, width: width as u32, half_stride };
            b.launch(GATHER, fours(b.rows(out), width), params)
        });
    }

    fn sample(&mut self, logits: Buf, vocabulary: usize) {
        // Behind what was captured and not in it: how much is listed of a row differs from step to step, and masks may still be made
        // while the rest of the step runs.
        self.run_recorded();
        self.attempt(self.shapes.sample(logits, vocabulary, &self.batch), |b| {
            let buffer = &b.buffers[logits.0 as usize];
            b.steps.vocabulary = vocabulary;
            if b.device.place().rank > 0 {
                return Ok(());
            }
            b.sampling.run(&mut b.device, &b.batch, buffer.at, buffer.width, vocabulary)
        });
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        self.finish_step(out)
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn submit(&mut self) -> Result<(), KernelError> {
        self.submit_step()
    }

    fn collect(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        self.collect_step(out)
    }

    fn read(&self, buf: Buf) -> Result<Vec<f32>, KernelError> {
        let (rows, width) = self.shapes.buffer("read", buf)?;
        self.read_floats(self.buffers[buf.0 as usize].at, self.shapes.count(rows) * width)
    }
}
