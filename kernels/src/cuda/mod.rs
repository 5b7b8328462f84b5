//! The backend that serves on NVIDIA cards.
//!
//! Operations are launched when they are enqueued; the device does them in that order. Kernels are compiled for the card that is
//! found (see `kernels/cuda/`), so the same binary runs without one. The backend speaks to a [`Device`]: the driver, or in tests a
//! host that runs the same kernels, so that everything here but the driver's calls is tested where there is no card.
//!
//! Activations are f32. A buffer that a linear reads gets a bf16 copy beside it the first time that is needed, and from then on
//! whoever writes the buffer writes the copy, too.

mod adapters;
mod attention;
mod budget;
mod collectives;
pub mod compile;
pub mod device;
pub mod driver;
mod experts;
mod graphs;
mod holdings;
pub mod libraries;
pub mod nccl;
mod params;
mod plan;
mod product;
mod replay;
mod room;
mod sampling;
mod staging;
pub mod stopwatch;
pub mod train;
pub mod weights;

use self::adapters::Adapters;
use self::attention::{FewAndMany, Planned, Plans, Tiles, cache_form, fast_attention};
use self::collectives::Collected;
use self::device::{Address, Device, Kernel, Launch, Params, Product, Source};
use self::experts::{HeldExperts, HeldRouting};
use self::graphs::Op;
use self::holdings::{Buffer, Half, HeldCache, HeldMatrix, HeldRope, few_rows};
use self::params as p;
use self::replay::Captures;
use self::room::Room;
use self::sampling::SamplingRoom;
use self::weights::Form;
use crate::collective::Place;
use crate::error::KernelError;
use crate::ops::*;
use crate::shapes::Shapes;
use std::iter::repeat;

const EMBEDDING: Kernel = Kernel::new(Source::Rows, "embedding", 256);
const RMS_NORM: Kernel = Kernel::new(Source::Rows, "rms_norm", 256);
const SILU_AND_MUL: Kernel = Kernel::new(Source::Rows, "silu_and_mul", 256);
const GATHER: Kernel = Kernel::new(Source::Rows, "gather", 256);
const HALVE: Kernel = Kernel::new(Source::Rows, "halve", 256);
const ADD_BIAS: Kernel = Kernel::new(Source::Rows, "add_bias", 256);
const WIDEN: Kernel = Kernel::new(Source::Rows, "widen", 256);
const COPY_BLOCK: Kernel = Kernel::new(Source::Rows, "copy_block", 256);
const ROPE_CACHE: Kernel = Kernel::new(Source::Rows, "rope_cache", 128);
const LORA: Kernel = Kernel::new(Source::Rows, "lora", 256);
const LINEAR_F32: Kernel = Kernel::new(Source::Linear, "linear_f32", 256);
const ATTENTION_JOIN: Kernel = Kernel::new(Source::Attention, "attention_join", 128);
const ATTENTION_PLAIN: Kernel = Kernel::new(Source::Attention, "attention_plain", 32);

/// Floats of scratch of a block's sums: a number for each of its warps.
const BLOCK_SUM: usize = 8 * 4;

/// The step's lists on the device.
#[derive(Default)]
struct StepLists {
    room: Room,
    staging: Vec<u8>,
    tokens: Address,
    positions: Address,
    slots: Address,
    adapters: Address,
    gathered: Address,
    /// How many tokens there are, without those that pad.
    count: Address,
    blocks: Address,
}

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
    sampling: SamplingRoom,
    collected: Collected,
    captures: Captures,
    batch: StepBatch,
    sampled: bool,
    error: Option<KernelError>,
    memory: MemoryUse,
    owned: Vec<Address>,
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
            sampling: SamplingRoom::default(),
            collected: Collected::default(),
            captures: Captures::default(),
            batch: StepBatch::default(),
            sampled: false,
            error: None,
            memory: MemoryUse::default(),
            owned: Vec::new(),
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

    /// Where a producer of a whole buffer is to leave a bf16 copy, if anywhere, and its stride. From here on the copy counts as fresh.
    fn produce(&mut self, buf: Buf) -> (Address, u32) {
        match &mut self.buffers[buf.0 as usize].half {
            Some(half) => {
                half.fresh = true;
                (half.at, half.stride as u32)
            }
            None => (Address::NONE, 0),
        }
    }

    /// The buffer was changed without its copy.
    fn stale(&mut self, buf: Buf) {
        if let Some(half) = &mut self.buffers[buf.0 as usize].half {
            half.fresh = false;
        }
    }

    /// The bf16 copy of a buffer, made if need be.
    fn halved(&mut self, buf: Buf) -> Result<Address, KernelError> {
        let buffer = &mut self.buffers[buf.0 as usize];
        let half = match buffer.half {
            Some(half) => half,
            None => {
                let stride = buffer.width.next_multiple_of(weights::PADDING);
                let bytes = self.shapes.capacity(buffer.rows) * stride * 2;
                let half = Half { at: self.device.alloc("activations", bytes)?, stride, fresh: false };
                self.memory.activations += bytes;
                buffer.half = Some(half);
                half
            }
        };
        if !half.fresh {
            let (x, width) = (buffer.at, buffer.width as u32);
            let rows = self.rows(buf);
            self.launch(HALVE, Launch::blocks(rows), p::Halve { x, half: half.at, width, half_stride: half.stride as u32 })?;
            self.produce(buf);
        }
        Ok(half.at)
    }

    fn multiply(&mut self, x: Buf, w: Matrix, bias: Option<Vector>, out: Buf, store: Store) -> Result<(), KernelError> {
        let HeldMatrix { form, weights } = self.matrices[w.0 as usize];
        let (rows, n) = (self.rows(x), weights.n as usize);
        let bias = bias.map_or(Address::NONE, |bias| self.vectors[bias.0 as usize]);
        let add = u32::from(store == Store::Add);
        self.stale(out);
        if form == Form::F32 {
            let params = p::Linear { x: self.at(x), w: weights, bias, out: self.at(out), rows: rows as u32, add };
            return self.launch(LINEAR_F32, Launch::grid(n.div_ceil(8), rows), params);
        }
        if rows == 0 {
            return Ok(());
        }
        let half = self.halved(x)?;
        let out = self.at(out);
        if let Some((most, kernel)) = few_rows(form).iter().find(|(most, _)| rows <= *most) {
            let params = p::Linear { x: half, w: weights, bias, out, rows: rows as u32, add };
            return self.launch(*kernel, Launch::blocks(n.div_ceil(16)).with_shared(8 * 16 * most * 4), params);
        }
        let stride = weights.stride as usize;
        let wide = match form {
            Form::Bf16 => weights.data,
            _ => {
                let to = self.widened.reserve(&mut self.device, "widened weights", n * stride * 2)?;
                self.launch(WIDEN, Launch::blocks(n), p::Widen { from: weights, to })?;
                to
            }
        };
        self.device.product(Product { x: half, w: wide, out, rows, n, stride, add: store == Store::Add })?;
        if bias != Address::NONE {
            self.launch(ADD_BIAS, Launch::blocks(rows), p::AddBias { bias, out, width: n as u32, unused: 0 })?;
        }
        Ok(())
    }

    /// The kernels with matrix units for a shape, the step's tiles, and memory for its partial results; once per step.
    fn plan(&mut self, shape: HeadShape, kv: KvCache) -> Result<(Option<FewAndMany>, Planned, Address), KernelError> {
        let dtype = self.caches[kv.0 as usize].spec.dtype;
        let kernels = fast_attention(shape.head_dim, dtype);
        let planned = self.plans.get(&mut self.device, &self.batch, self.captures.size, shape, kernels.is_some())?;
        let bytes = planned.partials * shape.kv_heads * 16 * (shape.head_dim + 2) * 4;
        Ok((kernels, planned, self.partials.reserve(&mut self.device, "attention", bytes)?))
    }

    fn attend(
        &mut self,
        qkv: Buf,
        shape: HeadShape,
        spec: AttentionSpec,
        kv: KvCache,
        layer: usize,
        out: Buf,
    ) -> Result<(), KernelError> {
        let HeadShape { heads, kv_heads, head_dim } = shape;
        let (kernels, planned, partials) = self.plan(shape, kv)?;
        let cache = &self.caches[kv.0 as usize];
        let (dtype, block_size, (keys, values)) = (cache.spec.dtype, cache.spec.block_size, cache.layer(layer));
        let (half, half_stride) = self.produce(out);
        let width = head_dim + 2;
        let with = |tiles: Tiles| p::Attention {
            qkv: self.buffers[qkv.0 as usize].at,
            keys,
            values,
            blocks: self.lists.blocks,
            tiles: tiles.at,
            out: self.buffers[out.0 as usize].at,
            half,
            partials,
            half_stride,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            block_size: block_size as u32,
            cache_form: cache_form(dtype),
            window: spec.sliding_window.map_or(0, |window| window.min(u32::MAX as usize) as u32),
            scale: spec.scale,
            soft_cap: spec.soft_cap.unwrap_or(0.0),
            unused: 0,
        };
        let Planned { few, many, plain, joins, .. } = planned;
        let [for_few, for_many, for_plain, for_joins] = [few, many, plain, joins].map(with);
        if let Some((few_kernel, many_kernel)) = kernels {
            let shared = 16 * head_dim * 2 + 4 * 16 * width * 4;
            self.launch(few_kernel, Launch::grid(few.count, kv_heads).with_shared(shared), for_few)?;
            self.launch(many_kernel, Launch::grid(many.count, kv_heads).with_shared(64 * head_dim * 2), for_many)?;
            self.launch(ATTENTION_JOIN, Launch::grid(joins.count, kv_heads), for_joins)?;
        }
        self.launch(ATTENTION_PLAIN, Launch::grid(plain.count, heads).with_shared(head_dim * 4), for_plain)
    }

    /// Puts the step's lists on the device in one copy.
    fn write_lists(&mut self) -> Result<(), KernelError> {
        let StepBatch { tokens, positions, slots, samples, blocks, adapters, .. } = &self.batch;
        // Lists of a step that may be captured have the lengths that it is padded to, so they always begin at the same places. A row
        // that pads is a token 0 at position 0, writes nothing to the cache and has no adapter.
        let size = self.captures.size;
        let rows = size.map_or(tokens.len(), |size| size.rows);
        let sampled = size.map_or(samples.len(), |size| size.samples);
        let adapted = size.map_or(adapters.len(), |size| size.rows);
        let staging = &mut self.lists.staging;
        staging.clear();
        // The widest first, so that all lie on multiples of their size.
        staging.extend(slots.iter().copied().chain(repeat(-1)).take(rows).flat_map(|v| v.to_le_bytes()));
        let mut starts = [0; 6];
        let lists: [&mut dyn Iterator<Item = u32>; 6] = [
            &mut tokens.iter().copied().chain(repeat(0)).take(rows),
            &mut positions.iter().copied().chain(repeat(0)).take(rows),
            &mut adapters.iter().copied().chain(repeat(NO_ADAPTER)).take(adapted),
            &mut samples.iter().map(|s| s.row).chain(repeat(0)).take(sampled),
            &mut std::iter::once(tokens.len() as u32),
            &mut blocks.iter().copied(),
        ];
        for (start, list) in starts.iter_mut().zip(lists) {
            *start = staging.len();
            staging.extend(list.flat_map(u32::to_le_bytes));
        }
        let at = self.lists.room.write(&mut self.device, "step", &self.lists.staging)?;
        let [tokens, positions, adapters, gathered, count, blocks] = starts.map(|start| at.plus(start));
        let lists = std::mem::take(&mut self.lists);
        self.lists = StepLists { tokens, positions, slots: at, adapters, gathered, count, blocks, ..lists };
        Ok(())
    }

    fn copy_blocks(&mut self) -> Result<(), KernelError> {
        for index in 0..self.caches.len() {
            let cache = &self.caches[index];
            let (bytes, layers, blocks) = (cache.block_bytes(), cache.spec.layers, cache.spec.blocks);
            let sides = [cache.keys, cache.values];
            for i in 0..self.batch.copies.len() {
                let (from, to) = self.batch.copies[i];
                for cache in sides {
                    let params = p::CopyBlock {
                        cache,
                        from: from.into(),
                        to: to.into(),
                        layer_bytes: (blocks * bytes) as u64,
                        block_bytes: bytes as u32,
                        unused: 0,
                    };
                    self.launch(COPY_BLOCK, Launch::grid(bytes.div_ceil(16 * 256), layers), params)?;
                }
            }
        }
        Ok(())
    }

    /// Reserves memory and keeps count of it.
    fn hold(&mut self, what: &'static str, bytes: Option<usize>) -> Result<Address, KernelError> {
        let bytes = bytes.filter(|b| *b <= isize::MAX as usize).ok_or(KernelError::Memory { what, bytes: usize::MAX })?;
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
        let rooms = rooms.chain(self.collected.rooms());
        let halves = self.buffers.iter().filter_map(|b| b.half.map(|half| half.at));
        let all = rooms.filter(|room| room.bytes > 0).map(|room| room.at).chain(halves).chain(self.adapters.addresses());
        let all: Vec<Address> = all.chain(self.owned.iter().copied()).collect();
        all.into_iter().for_each(|at| self.device.free(at));
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
        let rooms = rooms.chain(self.collected.rooms());
        let activations = self.memory.activations + rooms.map(|room| room.bytes).sum::<usize>();
        MemoryUse { activations, adapters: self.adapters.bytes(), ..self.memory }
    }

    fn spare_memory(&self) -> Result<Option<usize>, KernelError> {
        CudaBackend::spare_memory(self).map(Some)
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
        self.error = None;
        self.sampled = false;
        self.plans.forget();
        self.all_stale();
        self.captures.recording = false;
        self.captures.size = None;
        self.shapes.begin(batch)?;
        self.batch.copy_from(batch);
        self.begin_recording();
        self.write_lists()?;
        self.copy_blocks()
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
        self.enqueue(self.shapes.rms_norm(x, weight, out), Op::RmsNorm { x, weight, eps, out }, |b| {
            let (half, half_stride) = b.produce(out);
            let (width, weight) = (b.buffers[x.0 as usize].width as u32, b.vectors[weight.0 as usize]);
            let params = p::RmsNorm { x: b.at(x), weight, out: b.at(out), half, width, half_stride, eps, unused: 0 };
            b.launch(RMS_NORM, Launch::blocks(b.rows(x)).with_shared(BLOCK_SUM), params)
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
        self.enqueue(used.map(|_| ()), Op::Lora { x, site, out }, |b| {
            let tables = b.adapters.tables(&mut b.device)?;
            b.stale(out);
            let params = p::Lora {
                x: b.at(x),
                out: b.at(out),
                adapters: b.lists.adapters,
                sites: tables.sites,
                parts: tables.parts,
                sites_per_slot: tables.sites_per_slot as u32,
                site: site as u32,
                x_width: b.buffers[x.0 as usize].width as u32,
                out_width: b.buffers[out.0 as usize].width as u32,
            };
            b.launch(LORA, Launch::blocks(b.rows(out)).with_shared(tables.most_rank * 4), params)
        });
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
            b.launch(ROPE_CACHE, Launch::grid(heads.div_ceil(4), b.rows(qkv)), params)
        });
    }

    fn paged_attention(&mut self, qkv: Buf, shape: HeadShape, spec: AttentionSpec, kv: KvCache, layer: usize, out: Buf) {
        let check = self.shapes.paged_attention(qkv, shape, kv, layer, out, &self.batch);
        self.enqueue(check, Op::PagedAttention { qkv, shape, spec, kv, layer, out }, |b| {
            b.attend(qkv, shape, spec, kv, layer, out)
        });
    }

    fn silu_and_mul(&mut self, gate_up: Buf, out: Buf) {
        self.enqueue(self.shapes.silu_and_mul(gate_up, out), Op::SiluAndMul { gate_up, out }, |b| {
            let (half, half_stride) = b.produce(out);
            let width = b.buffers[out.0 as usize].width;
            let params = p::SiluAndMul { gate_up: b.at(gate_up), out: b.at(out), half, width: width as u32, half_stride };
            b.launch(SILU_AND_MUL, Launch::grid(width.div_ceil(256), b.rows(out)), params)
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
            let (width, rows) = (b.buffers[out.0 as usize].width as u32, b.lists.gathered);
            let params = p::Gather { x: b.at(x), rows, out: b.at(out), half, width, half_stride };
            b.launch(GATHER, Launch::blocks(b.rows(out)), params)
        });
    }

    fn sample(&mut self, logits: Buf, vocabulary: usize) {
        // Behind what was captured and not in it: how much is listed of a row differs from step to step, and masks may still be made
        // while the rest of the step runs.
        self.run_recorded();
        self.attempt(self.shapes.sample(logits, vocabulary, &self.batch), |b| {
            let buffer = &b.buffers[logits.0 as usize];
            b.sampled = true;
            b.sampling.run(&mut b.device, &b.batch, buffer.at, buffer.width, vocabulary)
        });
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        out.samples.clear();
        self.run_recorded();
        let sampled = std::mem::take(&mut self.sampled);
        if let Some(error) = self.error.take() {
            // What was asked for before is done before anybody goes on; the first error is the cause.
            let _ = self.device.wait();
            return Err(error);
        }
        // The one copy back waits for all that was before it.
        match sampled && self.sampling.has_rows() {
            true => self.sampling.read(&self.device, &mut out.samples),
            false => self.device.wait(),
        }
    }

    fn read(&self, buf: Buf) -> Result<Vec<f32>, KernelError> {
        let (rows, width) = self.shapes.buffer("read", buf)?;
        self.read_floats(self.buffers[buf.0 as usize].at, self.shapes.count(rows) * width)
    }
}
