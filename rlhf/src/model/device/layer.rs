//! The chain rule of one decoder layer in a device's memory; the same as [`super::super::layer`] has it for the processor.

use tidemill_engine::{ModelConfig, Part};
use tidemill_kernels::cuda::train::{DeviceCompute, Operand, Product, Region, Values};
use tidemill_kernels::train::{Attention, Dropout, Pieces};
use tidemill_kernels::{AttentionSpec, HeadShape, Store};

use super::super::ModelError;
use super::super::layout::{Group, GroupLayout};
use super::super::whole::Whole;
use super::graph::DeviceLayerOp;
use super::{DevicePass, Frozen};
use crate::random::mix;

/// Queries and keys before their norms, and the inverse roots.
type RawHeads = (Region, [Region; 2]);

/// What a part of a layer gives before the norm behind it, and the inverse roots.
type Branch = [Region; 2];

/// What the forward pass leaves for the backward one: as the processor's.
pub(super) struct Saved {
    inverse: [Region; 2],
    qkv: Region,
    raw: Option<RawHeads>,
    attended: Region,
    lse: Region,
    middle: Region,
    gate_up: Region,
    shrunk: [Region; 4],
    branches: Option<[Branch; 2]>,
}

/// A layer's numbers in this pass.
#[derive(Clone, Copy)]
pub(super) struct Numbers<'a> {
    /// The files'; `None` where all of the layer is trained.
    pub frozen: Option<&'a Frozen>,
    /// An adapter's, or the layer's matrices.
    pub params: Values<'a>,
    /// Norms and biases of a layer that is trained whole.
    pub vectors: Values<'a>,
}

/// Derivatives along a layer's parameters.
#[derive(Clone, Copy)]
pub(super) struct Slopes<'a> {
    pub params: Values<'a>,
    pub vectors: Values<'a>,
}

/// A pass through one layer with everything at hand.
pub(super) struct LayerPass<'a> {
    pub op: &'a DeviceLayerOp,
    pub config: &'a ModelConfig,
    pub compute: &'a mut DeviceCompute,
    pub numbers: Numbers<'a>,
    pub rows: usize,
}

/// Numbers of a matrix from column `column` on.
fn from_column(values: Values<'_>, column: usize) -> Values<'_> {
    values.part(column.min(values.len())..values.len())
}

impl<'a> LayerPass<'a> {
    fn pass(&self) -> &'a DevicePass {
        let op = self.op;
        &op.pass
    }

    fn layout(&self, group: Group) -> Option<&'a GroupLayout> {
        let op = self.op;
        op.trained.as_deref()?.group(group)
    }

    fn whole(&self) -> Option<&'a Whole> {
        let op = self.op;
        op.trained.as_deref()?.whole()
    }

    /// A norm's weight; nothing for one that the family does not have.
    fn norm(&self, part: Part) -> Values<'a> {
        if let Some(whole) = self.whole() {
            return self.numbers.vectors.part(whole.vector(part));
        }
        let frozen = self.numbers.frozen;
        let heads = |index: usize| frozen.and_then(|frozen| frozen.head_norms.as_ref()).map(|norms| &norms[index]);
        let behind = |index: usize| frozen.and_then(|frozen| frozen.norms_behind.as_ref()).map(|norms| &norms[index]);
        let found = match part {
            Part::AttentionNorm => frozen.map(|frozen| &frozen.attention_norm),
            Part::FeedForwardNorm => frozen.map(|frozen| &frozen.feed_forward_norm),
            Part::QueryNorm => heads(0),
            Part::KeyNorm => heads(1),
            Part::PostAttentionNorm => behind(0),
            Part::PostFeedForwardNorm => behind(1),
            _ => None,
        };
        found.map_or(Values::NONE, Region::all)
    }

    fn bias(&self, group: Group) -> Values<'a> {
        let numbers = self.numbers;
        match self.whole() {
            Some(whole) => numbers.vectors.part(whole.bias(group)),
            None => numbers.frozen.map_or(Values::NONE, |frozen| frozen.biases[group as usize].all()),
        }
    }

    /// A group's stacked matrices `[out, in]`, as they lie or transposed.
    fn weight(&self, group: Group, turned: bool) -> Result<Operand<'a>, ModelError> {
        let (numbers, (_, k)) = (self.numbers, self.sizes(group));
        if let Some(whole) = self.whole() {
            let own = numbers.params.part(whole.matrices[group as usize].clone());
            return Ok(if turned { own.columns(k) } else { own.rows(k) });
        }
        let frozen = numbers.frozen.ok_or(ModelError::Kind("a frozen layer without its weights"))?;
        let matrix = &frozen.matrices[group as usize];
        Ok(if turned { matrix.columns() } else { matrix.rows() })
    }

    fn region(&mut self, width: usize) -> Result<Region, ModelError> {
        Ok(self.compute.region(self.rows * width)?)
    }

    /// Output and input features of a group's stacked matrices.
    fn sizes(&self, group: Group) -> (usize, usize) {
        let shapes = group.projections().iter().map(|projection| projection.shape(self.config));
        shapes.fold((0, 0), |(out, _), (n, k)| (out + n, k))
    }

    /// The processor's masks.
    fn dropout(&self, group: Group) -> Option<Dropout> {
        let (probability, key) = self.op.dropout?;
        let place = self.op.weights.index * Group::ALL.len() + group as usize;
        Dropout::new(probability, mix(key ^ mix(place as u64 + 1)))
    }

    /// The input of a group's `A`, where it is not the group's own input.
    fn dropped(&mut self, group: Group, x: Values<'_>) -> Result<Option<Region>, ModelError> {
        let Some(dropout) = self.dropout(group) else { return Ok(None) };
        let dropped = self.compute.region(x.len())?;
        self.compute.dropout(dropout, x, dropped.all(), Store::Replace)?;
        Ok(Some(dropped))
    }

    /// `out (+)= W x + b + scale · B A x` of a group; returns `A x`.
    fn linear(&mut self, group: Group, x: Values<'_>, out: Values<'_>, store: Store) -> Result<Region, ModelError> {
        let ((n, k), m, params) = (self.sizes(group), self.rows, self.numbers.params);
        let (left, right) = (x.rows(k), self.weight(group, true)?);
        self.compute.matmul(&Product { m, n, k, left, right, scale: 1.0, store }, out, n)?;
        let layout = self.layout(group);
        let ranks = layout.map_or(0, |layout| layout.ranks);
        let shrunk = self.region(ranks)?;
        if let Some(layout) = layout {
            let dropped = self.dropped(group, x)?;
            let left = dropped.as_ref().map_or(x, Region::all).rows(k);
            let right = params.part(layout.a.clone()).columns(k);
            let down = Product { m, n: ranks, k, left, right, scale: 1.0, store: Store::Replace };
            self.compute.matmul(&down, shrunk.all(), ranks)?;
            for slot in &layout.slots {
                let up = Product {
                    m,
                    n: slot.shape.0,
                    k: slot.rank,
                    left: from_column(shrunk.all(), slot.first_rank).rows(ranks),
                    right: params.part(slot.b.clone()).columns(slot.rank),
                    scale: slot.scale,
                    store: Store::Add,
                };
                self.compute.matmul(&up, from_column(out, slot.column), n)?;
            }
        }
        let bias = self.bias(group);
        if !bias.is_empty() {
            self.compute.add_bias(bias, out)?;
        }
        Ok(shrunk)
    }

    /// The derivatives of [`Self::linear`] for those along its result: along `x`, stored to `dx`, and along the parameters.
    fn linear_back(
        &mut self,
        group: Group,
        [x, shrunk, dy]: [Values<'_>; 3],
        dx: Values<'_>,
        slopes: Slopes<'_>,
    ) -> Result<(), ModelError> {
        let ((n, k), m, params) = (self.sizes(group), self.rows, self.numbers.params);
        let (left, right) = (dy.rows(n), self.weight(group, false)?);
        self.compute.matmul(&Product { m, n: k, k: n, left, right, scale: 1.0, store: Store::Replace }, dx, k)?;
        if let Some(whole) = self.whole() {
            let product = Product { m: n, n: k, k: m, left: dy.columns(n), right: x.rows(k), scale: 1.0, store: Store::Replace };
            self.compute.matmul(&product, slopes.params.part(whole.matrices[group as usize].clone()), k)?;
            let bias = slopes.vectors.part(whole.bias(group));
            if !bias.is_empty() {
                self.compute.bias_back(dy, bias)?;
            }
        }
        let Some(layout) = self.layout(group) else { return Ok(()) };
        let ranks = layout.ranks;
        let dshrunk = self.region(ranks)?;
        for slot in &layout.slots {
            let own = from_column(dy, slot.column);
            let along_low = Product {
                m,
                n: slot.rank,
                k: slot.shape.0,
                left: own.rows(n),
                right: params.part(slot.b.clone()).rows(slot.rank),
                scale: slot.scale,
                store: Store::Replace,
            };
            self.compute.matmul(&along_low, from_column(dshrunk.all(), slot.first_rank), ranks)?;
            let along_b = Product {
                m: slot.shape.0,
                k: m,
                left: own.columns(n),
                right: from_column(shrunk, slot.first_rank).rows(ranks),
                ..along_low
            };
            self.compute.matmul(&along_b, slopes.params.part(slot.b.clone()), slot.rank)?;
        }
        let dropped = self.dropped(group, x)?;
        let input = dropped.as_ref().map_or(x, Region::all);
        let along_a = Product {
            m: ranks,
            n: k,
            k: m,
            left: dshrunk.all().columns(ranks),
            right: input.rows(k),
            scale: 1.0,
            store: Store::Replace,
        };
        self.compute.matmul(&along_a, slopes.params.part(layout.a.clone()), k)?;
        let right = params.part(layout.a.clone()).rows(k);
        let along_x = Product { m, n: k, k: ranks, left: dshrunk.all().rows(ranks), right, scale: 1.0, store: Store::Add };
        match (self.dropout(group), &dropped) {
            // A mask stands between the input and what comes back through `A`; what it let through is not needed any more.
            (Some(dropout), Some(along)) => {
                self.compute.matmul(&Product { store: Store::Replace, ..along_x }, along.all(), k)?;
                self.compute.dropout(dropout, along.all(), dx, Store::Add)?;
            }
            _ => self.compute.matmul(&along_x, dx, k)?,
        }
        Ok(())
    }

    /// Queries and keys of a `qkv` row, with their norms.
    fn pieces(&self) -> [(Pieces, Part); 2] {
        let &ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        let stride = (heads + 2 * kv_heads) * head_dim;
        [
            (Pieces { stride, offset: 0, count: heads, width: head_dim }, Part::QueryNorm),
            (Pieces { stride, offset: heads * head_dim, count: kv_heads, width: head_dim }, Part::KeyNorm),
        ]
    }

    /// Norms of heads and rotation, in place; returns what the norms' derivative needs.
    fn rotate(&mut self, qkv: &Region) -> Result<Option<RawHeads>, ModelError> {
        let mut raw = None;
        if self.config.qk_norm {
            let before = self.compute.region(qkv.len())?;
            self.compute.copy(qkv.all(), before.all())?;
            let inverses = [self.region(self.config.heads)?, self.region(self.config.kv_heads)?];
            for ((pieces, part), inverse) in self.pieces().into_iter().zip(&inverses) {
                let (weight, eps) = (self.norm(part), self.config.rms_eps);
                self.compute.rms_norm(before.all(), pieces, weight, eps, qkv.all(), inverse.all())?;
            }
            raw = Some((before, inverses));
        }
        self.turn(qkv.all(), false)?;
        Ok(raw)
    }

    fn turn(&mut self, qkv: Values<'_>, back: bool) -> Result<(), ModelError> {
        let pass = self.pass();
        let local = pass.local_turns.as_ref().filter(|_| self.config.is_local(self.op.weights.index));
        let turns = local.unwrap_or(&pass.turns);
        for (pieces, _) in self.pieces() {
            self.compute.rotate(qkv, pieces, turns, &pass.seen, back)?;
        }
        Ok(())
    }

    fn rotate_back(&mut self, raw: Option<&RawHeads>, dqkv: &Region, slopes: Slopes<'_>) -> Result<(), ModelError> {
        self.turn(dqkv.all(), true)?;
        if let Some((before, inverses)) = raw {
            let along = self.compute.region(dqkv.len())?;
            self.compute.copy(dqkv.all(), along.all())?;
            for ((pieces, part), inverse) in self.pieces().into_iter().zip(inverses) {
                let given = [before.all(), self.norm(part), inverse.all(), along.all()];
                self.compute.rms_norm_back(given, pieces, dqkv.all(), Store::Replace)?;
                self.norm_slope(part, given, pieces, slopes)?;
            }
        }
        Ok(())
    }

    /// The derivative along a norm's weight, where that is trained.
    fn norm_slope(
        &mut self,
        part: Part,
        [x, _, inverse, dy]: [Values<'_>; 4],
        pieces: Pieces,
        slopes: Slopes<'_>,
    ) -> Result<(), ModelError> {
        if let Some(whole) = self.whole() {
            self.compute.rms_norm_back_weight([x, inverse, dy], pieces, slopes.vectors.part(whole.vector(part)))?;
        }
        Ok(())
    }

    fn attention(&self) -> Attention<'a> {
        let &ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        let sliding_window = self.config.window(self.op.weights.index);
        let rows = &self.pass().rows;
        Attention {
            spans: &rows.spans,
            positions: &rows.positions,
            shape: HeadShape { heads, kv_heads, head_dim },
            spec: AttentionSpec { scale: self.config.attention_scale(), sliding_window, soft_cap: None, alibi: None },
        }
    }

    /// The gated activation.
    fn gate(&mut self, gate_up: Values<'_>, gated: Values<'_>) -> Result<(), ModelError> {
        let width = self.config.intermediate;
        match self.config.gemma {
            Some(_) => self.compute.gelu_mul(gate_up, width, gated)?,
            None => self.compute.silu_mul(gate_up, width, gated)?,
        }
        Ok(())
    }

    fn gate_back(&mut self, gate_up: Values<'_>, dgated: Values<'_>, dgate_up: Values<'_>) -> Result<(), ModelError> {
        let width = self.config.intermediate;
        match self.config.gemma {
            Some(_) => self.compute.gelu_mul_back(gate_up, width, dgated, dgate_up)?,
            None => self.compute.silu_mul_back(gate_up, width, dgated, dgate_up)?,
        }
        Ok(())
    }

    /// Adds what a part of the layer gives to the residual stream, through the norm behind it where there is one; returns `A x`, and what
    /// that norm's derivative needs.
    fn add(
        &mut self,
        group: Group,
        x: Values<'_>,
        norm: Part,
        stream: Values<'_>,
    ) -> Result<(Region, Option<Branch>), ModelError> {
        let (weight, hidden) = (self.norm(norm), self.config.hidden);
        if weight.is_empty() {
            return Ok((self.linear(group, x, stream, Store::Add)?, None));
        }
        let (branch, normed, inverse) = (self.region(hidden)?, self.region(hidden)?, self.region(1)?);
        let shrunk = self.linear(group, x, branch.all(), Store::Replace)?;
        let eps = self.config.rms_eps;
        self.compute.rms_norm(branch.all(), Pieces::rows(hidden), weight, eps, normed.all(), inverse.all())?;
        self.compute.add(normed.all(), stream)?;
        Ok((shrunk, Some([branch, inverse])))
    }

    /// The derivative along what a part of the layer gives, from that along the residual stream; none where they are the same.
    fn add_back(&mut self, norm: Part, branch: Option<&Branch>, dy: Values<'_>) -> Result<Option<Region>, ModelError> {
        let Some([branch, inverse]) = branch else { return Ok(None) };
        let along = self.region(self.config.hidden)?;
        let given = [branch.all(), self.norm(norm), inverse.all(), dy];
        self.compute.rms_norm_back(given, Pieces::rows(self.config.hidden), along.all(), Store::Replace)?;
        Ok(Some(along))
    }

    pub(super) fn forward(&mut self, x: Values<'_>, out: Values<'_>) -> Result<Saved, ModelError> {
        let &ModelConfig { hidden, intermediate, heads, head_dim, rms_eps: eps, .. } = self.config;
        let whole = Pieces::rows(hidden);
        let inverse = [self.region(1)?, self.region(1)?];
        let normed = self.region(hidden)?;
        let weight = self.norm(Part::AttentionNorm);
        self.compute.rms_norm(x, whole, weight, eps, normed.all(), inverse[0].all())?;
        let qkv = self.region(self.sizes(Group::Qkv).0)?;
        let qkv_shrunk = self.linear(Group::Qkv, normed.all(), qkv.all(), Store::Replace)?;
        let raw = self.rotate(&qkv)?;
        let (attended, lse) = (self.region(heads * head_dim)?, self.region(heads)?);
        let seen = &self.pass().seen;
        self.compute.attention(&self.attention(), seen, qkv.all(), attended.all(), lse.all())?;
        let middle = self.region(hidden)?;
        self.compute.copy(x, middle.all())?;
        let (output_shrunk, first) = self.add(Group::AttentionOutput, attended.all(), Part::PostAttentionNorm, middle.all())?;

        let weight = self.norm(Part::FeedForwardNorm);
        self.compute.rms_norm(middle.all(), whole, weight, eps, normed.all(), inverse[1].all())?;
        let gate_up = self.region(2 * intermediate)?;
        let gate_up_shrunk = self.linear(Group::GateUp, normed.all(), gate_up.all(), Store::Replace)?;
        let gated = self.region(intermediate)?;
        self.gate(gate_up.all(), gated.all())?;
        self.compute.copy(middle.all(), out)?;
        let (down_shrunk, second) = self.add(Group::Down, gated.all(), Part::PostFeedForwardNorm, out)?;
        let shrunk = [qkv_shrunk, output_shrunk, gate_up_shrunk, down_shrunk];
        let branches = first.zip(second).map(<[Branch; 2]>::from);
        Ok(Saved { inverse, qkv, raw, attended, lse, middle, gate_up, shrunk, branches })
    }

    /// The derivative along `x` for that along the layer's result; those along the parameters to `slopes`, which hold zeros.
    pub(super) fn backward(
        &mut self,
        x: Values<'_>,
        saved: &Saved,
        dout: Values<'_>,
        slopes: Slopes<'_>,
    ) -> Result<Region, ModelError> {
        let &ModelConfig { hidden, intermediate, heads, head_dim, rms_eps: eps, .. } = self.config;
        let whole = Pieces::rows(hidden);
        let Saved { inverse: [first, second], qkv, raw, attended, lse, middle, gate_up, shrunk, branches } = saved;
        let [qkv_shrunk, output_shrunk, gate_up_shrunk, down_shrunk] = shrunk.each_ref().map(Region::all);

        let (gated, dgated) = (self.region(intermediate)?, self.region(intermediate)?);
        self.gate(gate_up.all(), gated.all())?;
        let dbranch = self.add_back(Part::PostFeedForwardNorm, branches.as_ref().map(|b| &b[1]), dout)?;
        let dy = dbranch.as_ref().map_or(dout, Region::all);
        self.linear_back(Group::Down, [gated.all(), down_shrunk, dy], dgated.all(), slopes)?;
        drop(dbranch);
        let dgate_up = self.region(2 * intermediate)?;
        self.gate_back(gate_up.all(), dgated.all(), dgate_up.all())?;
        let (normed, dnormed, scratch) = (self.region(hidden)?, self.region(hidden)?, self.region(1)?);
        let weight = self.norm(Part::FeedForwardNorm);
        self.compute.rms_norm(middle.all(), whole, weight, eps, normed.all(), scratch.all())?;
        self.linear_back(Group::GateUp, [normed.all(), gate_up_shrunk, dgate_up.all()], dnormed.all(), slopes)?;
        // Along the middle: directly, and through the feed-forward part.
        let dmiddle = self.region(hidden)?;
        self.compute.copy(dout, dmiddle.all())?;
        let given = [middle.all(), weight, second.all(), dnormed.all()];
        self.compute.rms_norm_back(given, whole, dmiddle.all(), Store::Add)?;
        self.norm_slope(Part::FeedForwardNorm, given, whole, slopes)?;

        let dattended = self.region(heads * head_dim)?;
        let dbranch = self.add_back(Part::PostAttentionNorm, branches.as_ref().map(|b| &b[0]), dmiddle.all())?;
        let dy = dbranch.as_ref().map_or(dmiddle.all(), Region::all);
        self.linear_back(Group::AttentionOutput, [attended.all(), output_shrunk, dy], dattended.all(), slopes)?;
        drop(dbranch);
        let dqkv = self.compute.region(qkv.len())?;
        let given = [qkv.all(), attended.all(), lse.all(), dattended.all()];
        let seen = &self.pass().seen;
        self.compute.attention_back(&self.attention(), seen, given, dqkv.all())?;
        self.rotate_back(raw.as_ref(), &dqkv, slopes)?;
        let weight = self.norm(Part::AttentionNorm);
        self.compute.rms_norm(x, whole, weight, eps, normed.all(), scratch.all())?;
        self.linear_back(Group::Qkv, [normed.all(), qkv_shrunk, dqkv.all()], dnormed.all(), slopes)?;
        let given = [x, weight, first.all(), dnormed.all()];
        self.compute.rms_norm_back(given, whole, dmiddle.all(), Store::Add)?;
        self.norm_slope(Part::AttentionNorm, given, whole, slopes)?;
        Ok(dmiddle)
    }
}
