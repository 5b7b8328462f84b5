//! A step's attention: its tiles on the device, and the launches for a layer.

use super::device::{Address, Device, Kernel, Launch, Prefill, Source};
use super::graphs::Padded;
use super::params::{self as p, Tile, all_bytes};
use super::plan::{FEW, MANY, MANY_HOPPER, MOST_CUT, Plan, parts_of, parts_of_many};
use super::room::Room;
use super::{ATTENTION_JOIN, ATTENTION_PLAIN, CudaBackend};
use crate::error::KernelError;
use crate::ops::{AttentionSpec, Buf, HeadShape, KvCache, KvDtype, KvSpec, Limits, StepBatch};

/// Keys that the kernels with matrix units take at once.
const STRETCH: usize = 16;

/// The kernels with matrix units.
#[derive(Clone, Copy)]
pub(super) struct Fast {
    pub few: Kernel,
    pub many: Kernel,
    /// Packed rows of a tile of many.
    pub many_rows: usize,
    /// Bytes of shared memory that it takes.
    pub many_shared: usize,
}

/// Those for a head width and a cache. `prefill`: for many rows, where there are several.
pub(super) fn fast_attention(head_dim: usize, dtype: KvDtype, prefill: Prefill) -> Option<Fast> {
    let kernel = |name| Kernel::new(Source::Attention, name, 128);
    let (few, many) = match (head_dim, dtype) {
        (64, KvDtype::Bf16) => ("attention_few_64", "attention_many_64"),
        (128, KvDtype::Bf16) => ("attention_few_128", "attention_many_128"),
        (256, KvDtype::Bf16) => ("attention_few_256", "attention_many_256"),
        (64, KvDtype::Fp8) => ("attention_few_64_fp8", "attention_many_64_fp8"),
        (128, KvDtype::Fp8) => ("attention_few_128_fp8", "attention_many_128_fp8"),
        (256, KvDtype::Fp8) => ("attention_few_256_fp8", "attention_many_256_fp8"),
        _ => return None,
    };
    let fast = Fast { few: kernel(few), many: kernel(many), many_rows: MANY, many_shared: MANY * head_dim * 2 };
    let on_hopper = |name| Fast {
        many: Kernel::new(Source::AttentionHopper, name, 256),
        many_rows: MANY_HOPPER,
        // A tile of queries, two stretches of as many keys and values, and what it takes to begin at a multiple of 1024.
        many_shared: 5 * MANY_HOPPER * head_dim * 2 + 1024,
        ..fast
    };
    Some(match (prefill, dtype, head_dim) {
        (Prefill::Wgmma, KvDtype::Bf16, 64) => on_hopper("attention_hopper_64"),
        (Prefill::Wgmma, KvDtype::Bf16, 128) => on_hopper("attention_hopper_128"),
        _ => fast,
    })
}

/// Bytes of partial results of so many packed rows: each row's sums, their largest score and their weight.
pub(super) fn partial_bytes(rows: usize, shape: HeadShape) -> usize {
    rows * shape.kv_heads * (shape.head_dim + 2) * 4
}

/// Bytes that a step's attention reserves for its partial results and its tiles, in the worst case: every sequence that runs has the
/// longest context.
pub(super) fn most_bytes(limits: Limits, shape: HeadShape) -> usize {
    let Limits { max_tokens, max_samples, max_positions } = limits;
    let fast = fast_attention(shape.head_dim, KvDtype::Bf16, Prefill::Mma).is_some();
    let group = shape.heads / shape.kv_heads;
    // Sequences run that are sampled from, and are padded to a size of a ladder, as their tiles are.
    let sequences = max_samples.next_power_of_two();
    let parts = match parts_of(max_positions) {
        parts if fast && parts > 1 => (sequences * parts).next_power_of_two(),
        _ => 0,
    };
    // Of several rows of a sequence: no more than those of its cut tiles.
    let (prompts, cut) = match parts_of_many(1, max_positions) {
        parts if fast && parts > 1 => {
            ((max_tokens * group * parts).min(sequences * MOST_CUT * MANY_HOPPER), sequences * MOST_CUT)
        }
        _ => (0, 0),
    };
    // Where one row of a sequence has more than a tile of few, it is not cut.
    let decoded = if group > FEW { 0 } else { parts * group };
    // At most a tile for each part, each of those that are sampled, and every 16 packed rows; and as many that join as the latter two.
    let tiles = parts + cut + 2 * (sequences + (max_tokens * group).div_ceil(FEW));
    Room::size(partial_bytes(decoded + prompts, shape)) + Room::size(tiles * size_of::<Tile>())
}

/// The number that kernels know a cache's type by.
pub(super) const fn cache_form(dtype: KvDtype) -> u32 {
    match dtype {
        KvDtype::F32 => 0,
        KvDtype::Bf16 => 1,
        KvDtype::Fp8 => 2,
    }
}

/// A list of tiles on the device.
#[derive(Clone, Copy, Default)]
pub(super) struct Tiles {
    pub at: Address,
    pub count: usize,
}

/// The plan of a head shape.
struct ShapePlan {
    shape: HeadShape,
    many_rows: Option<usize>,
    plan: Plan,
    built: bool,
    room: Room,
    planned: Planned,
}

/// What is to be launched for a layer.
#[derive(Clone, Copy, Default)]
pub(super) struct Planned {
    pub few: Tiles,
    pub many: Tiles,
    pub plain: Tiles,
    pub joins: Tiles,
    /// Packed rows that have partial results.
    pub partials: usize,
}

/// The plans of all head shapes, made once per step.
#[derive(Default)]
pub(super) struct Plans(Vec<ShapePlan>);

impl Plans {
    /// A new step.
    pub(super) fn forget(&mut self) {
        self.0.iter_mut().for_each(|plan| plan.built = false);
    }

    /// The plan for a head shape; `many_rows`: packed rows of a tile of many, where there are matrix units.
    pub(super) fn get<D: Device>(
        &mut self,
        device: &mut D,
        batch: &StepBatch,
        padded: Option<Padded>,
        shape: HeadShape,
        many_rows: Option<usize>,
    ) -> Result<Planned, KernelError> {
        let index = self.0.iter().position(|p| p.shape == shape && p.many_rows == many_rows).unwrap_or_else(|| {
            let (plan, room, planned) = (Plan::default(), Room::default(), Planned::default());
            self.0.push(ShapePlan { shape, many_rows, plan, built: false, room, planned });
            self.0.len() - 1
        });
        let entry = &mut self.0[index];
        if !entry.built {
            let first_block = batch.sequences.first().map_or(0, |s| s.first_block);
            let padding = batch.tokens.len()..padded.map_or(0, |size| size.rows);
            let sequences = batch.sequences.iter().copied().chain(padding.map(|row| Padded::span(row, first_block)));
            entry.plan.build(sequences, shape, many_rows);
            if let Some(size) = padded {
                entry.plan.pad(size.tiles, if size.split { size.rows } else { 0 });
            }
            let Plan { few, many, plain, joins, partials, .. } = &entry.plan;
            let bytes = [few, many, plain, joins].map(|list| all_bytes(list)).concat();
            let mut at = entry.room.write(device, "attention tiles", &bytes)?;
            let [few, many, plain, joins] = [few, many, plain, joins].map(|list| {
                let tiles = Tiles { at, count: list.len() };
                at = at.plus(list.len() * size_of::<Tile>());
                tiles
            });
            entry.planned = Planned { few, many, plain, joins, partials: *partials };
            entry.built = true;
        }
        Ok(entry.planned)
    }

    pub(super) fn rooms(&self) -> impl Iterator<Item = Room> {
        self.0.iter().map(|plan| plan.room)
    }
}

impl<D: Device> CudaBackend<D> {
    /// The kernels with matrix units for a shape, the step's tiles, and memory for its partial results; once per step.
    pub(super) fn plan(&mut self, shape: HeadShape, kv: KvCache) -> Result<(Option<Fast>, Planned, Address), KernelError> {
        let KvSpec { dtype, block_size, .. } = self.caches[kv.0 as usize].spec;
        // Matrix units take stretches of keys, each of one block.
        let whole = block_size.is_multiple_of(STRETCH);
        let kernels = fast_attention(shape.head_dim, dtype, self.device.prefill(shape.head_dim)).filter(|_| whole);
        let many_rows = kernels.map(|fast| fast.many_rows);
        let planned = self.plans.get(&mut self.device, &self.batch, self.captures.size, shape, many_rows)?;
        let bytes = partial_bytes(planned.partials, shape);
        Ok((kernels, planned, self.partials.reserve(&mut self.device, "attention", bytes)?))
    }

    pub(super) fn attend(
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
            slopes: spec.alibi.map_or(Address::NONE, |slopes| self.vectors[slopes.0 as usize]),
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
        if let Some(fast) = kernels {
            let shared = 16 * head_dim * 2 + 4 * 16 * width * 4;
            self.launch(fast.few, Launch::grid(few.count, kv_heads).with_shared(shared), for_few)?;
            self.launch(fast.many, Launch::grid(many.count, kv_heads).with_shared(fast.many_shared), for_many)?;
            self.launch(ATTENTION_JOIN, Launch::grid(joins.count, kv_heads), for_joins)?;
        }
        self.launch(ATTENTION_PLAIN, Launch::grid(plain.count, heads).with_shared(head_dim * 4), for_plain)
    }
}
