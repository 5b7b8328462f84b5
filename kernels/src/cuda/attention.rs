//! The tiles of a step's attention on the device.

use super::device::{Address, Device, Kernel, Source};
use super::graphs::Padded;
use super::params::{Tile, all_bytes};
use super::plan::Plan;
use super::room::Room;
use crate::error::KernelError;
use crate::ops::{HeadShape, KvDtype, StepBatch};

/// The kernels with matrix units: of few rows, of many.
pub(super) type FewAndMany = (Kernel, Kernel);

/// Those for a head width and a cache.
pub(super) fn fast_attention(head_dim: usize, dtype: KvDtype) -> Option<FewAndMany> {
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
    Some((kernel(few), kernel(many)))
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
    fast: bool,
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
    /// Partial results of each key-value head.
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

    /// The plan for a head shape; `fast`: on matrix units.
    pub(super) fn get<D: Device>(
        &mut self,
        device: &mut D,
        batch: &StepBatch,
        padded: Option<Padded>,
        shape: HeadShape,
        fast: bool,
    ) -> Result<Planned, KernelError> {
        let index = self.0.iter().position(|p| p.shape == shape && p.fast == fast).unwrap_or_else(|| {
            let (plan, room, planned) = (Plan::default(), Room::default(), Planned::default());
            self.0.push(ShapePlan { shape, fast, plan, built: false, room, planned });
            self.0.len() - 1
        });
        let entry = &mut self.0[index];
        if !entry.built {
            let first_block = batch.sequences.first().map_or(0, |s| s.first_block);
            let padding = batch.tokens.len()..padded.map_or(0, |size| size.rows);
            let sequences = batch.sequences.iter().copied().chain(padding.map(|row| Padded::span(row, first_block)));
            entry.plan.build(sequences, shape, fast);
            if let Some(size) = padded {
                entry.plan.pad(size.tiles, if size.split { size.rows } else { 0 });
            }
            let Plan { few, many, plain, joins, partials } = &entry.plan;
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
