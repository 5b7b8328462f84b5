//! Where the trained numbers of a layer lie in its one flat parameter.

use std::ops::Range;

use tidemill_engine::{Adapter, LoraConfig, ModelConfig, Pair, Projection};

use super::ModelError;
use crate::random::{Random, mix};

/// The matrices of a layer that read the same input; their products are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Qkv,
    AttentionOutput,
    GateUp,
    Down,
}

impl Group {
    pub const ALL: [Group; 4] = [Group::Qkv, Group::AttentionOutput, Group::GateUp, Group::Down];

    pub const fn projections(self) -> &'static [Projection] {
        match self {
            Group::Qkv => &[Projection::Query, Projection::Key, Projection::Value],
            Group::AttentionOutput => &[Projection::AttentionOutput],
            Group::GateUp => &[Projection::Gate, Projection::Up],
            Group::Down => &[Projection::Down],
        }
    }
}

/// The two factors of one matrix: `out += scale · B (A x)`.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub projection: Projection,
    pub rank: usize,
    pub scale: f32,
    /// First column of its result among those of the group.
    pub column: usize,
    /// `(output features, input features)`
    pub shape: (usize, usize),
    /// Where among the ranks of its group it starts.
    pub first_rank: usize,
    /// `[rank, in]`
    pub a: Range<usize>,
    /// `[out, rank]`
    pub b: Range<usize>,
}

/// The adapted matrices of one group; all their `A` lie one after the other, so that they are one matrix `[ranks, in]`.
#[derive(Clone, Debug, Default)]
pub(super) struct GroupLayout {
    pub slots: Vec<Slot>,
    /// `[ranks, in]`
    pub a: Range<usize>,
    pub ranks: usize,
}

/// A layer's parameter: its adapted matrices, group by group.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub groups: [GroupLayout; 4],
    pub len: usize,
}

impl Layout {
    /// The layout of a layer of `model` that has adapted matrices `pairs`: (projection, rank, scale).
    pub fn new(model: &ModelConfig, pairs: &[(Projection, usize, f32)]) -> Self {
        let mut len = 0;
        let mut take = |n: usize| {
            len += n;
            len - n..len
        };
        let groups = Group::ALL.map(|group| {
            let mut slots: Vec<Slot> = Vec::new();
            let (mut column, mut ranks) = (0, 0);
            for &projection in group.projections() {
                let shape = projection.shape(model);
                if let Some(&(_, rank, scale)) = pairs.iter().find(|pair| pair.0 == projection) {
                    slots.push(Slot { projection, rank, scale, column, shape, first_rank: ranks, a: 0..0, b: 0..0 });
                    ranks += rank;
                }
                column += shape.0;
            }
            for slot in &mut slots {
                slot.a = take(slot.rank * slot.shape.1);
            }
            let a = slots.first().map_or(0, |slot| slot.a.start)..slots.last().map_or(0, |slot| slot.a.end);
            for slot in &mut slots {
                slot.b = take(slot.shape.0 * slot.rank);
            }
            GroupLayout { slots, a, ranks }
        });
        Self { groups, len }
    }

    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.groups.iter().flat_map(|group| &group.slots)
    }

    /// The numbers of a new adapter as PEFT starts one: `A` uniform within ±1/√in (Kaiming with a = √5), `B` zero. A matrix's
    /// numbers depend on the seed, the layer and the projection alone.
    pub fn initial(&self, seed: u64, layer: usize) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        for slot in self.slots() {
            let bound = 1.0 / (slot.shape.1 as f64).sqrt();
            let mut random = Random::new(mix(seed ^ mix((layer * Projection::ALL.len()) as u64 + slot.projection as u64 + 1)));
            for value in &mut values[slot.a.clone()] {
                *value = ((random.unit() * 2.0 - 1.0) * bound) as f32;
            }
        }
        values
    }

    /// The layer's adapted matrices with their numbers.
    pub fn pairs(&self, layer: usize, values: &[f32]) -> Vec<Pair> {
        let pair = |slot: &Slot| Pair {
            layer,
            projection: slot.projection,
            rank: slot.rank,
            scale: slot.scale,
            a: values[slot.a.clone()].to_vec(),
            b: values[slot.b.clone()].to_vec(),
        };
        self.slots().map(pair).collect()
    }
}

/// By layer: the layout of its parameter and the first numbers; none for a layer without adapted matrices.
pub(super) type Adapted = Vec<Option<(Layout, Vec<f32>)>>;

/// A new adapter.
pub(super) fn fresh(model: &ModelConfig, config: &LoraConfig, seed: u64) -> Result<Adapted, ModelError> {
    if let Some(layer) = config.layers.iter().flatten().find(|layer| **layer >= model.layers) {
        return Err(ModelError::Layers { layer: *layer, layers: model.layers });
    }
    let pairs: Vec<_> = config.targets.iter().map(|projection| (*projection, config.r, config.scale())).collect();
    let adapted = |layer: usize| !pairs.is_empty() && config.layers.as_ref().is_none_or(|layers| layers.contains(&layer));
    let layer = |index: usize| {
        adapted(index).then(|| {
            let layout = Layout::new(model, &pairs);
            let values = layout.initial(seed, index);
            (layout, values)
        })
    };
    Ok((0..model.layers).map(layer).collect())
}

/// An adapter that exists.
pub(super) fn existing(model: &ModelConfig, adapter: &Adapter) -> Result<Adapted, ModelError> {
    adapter.check(model)?;
    let layer = |index: usize| {
        let own: Vec<&Pair> = adapter.pairs.iter().filter(|pair| pair.layer == index).collect();
        (!own.is_empty()).then(|| {
            let layout = Layout::new(model, &own.iter().map(|pair| (pair.projection, pair.rank, pair.scale)).collect::<Vec<_>>());
            let mut values = vec![0.0; layout.len];
            for (slot, pair) in
                layout.slots().flat_map(|slot| Some((slot, own.iter().find(|p| p.projection == slot.projection)?)))
            {
                values[slot.a.clone()].copy_from_slice(&pair.a);
                values[slot.b.clone()].copy_from_slice(&pair.b);
            }
            (layout, values)
        })
    };
    Ok((0..model.layers).map(layer).collect())
}
