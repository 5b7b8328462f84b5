//! One decoder layer as a single operation of the graph, forward and backward.
//!
//! The arguments are the residual stream `[rows, hidden]` and two flat parameters: an adapter's one and an empty one, those of a layer that
//! is trained whole, or two empty ones. What is not trained is read from the model's files. Formulas of the parts stand in
//! [`tidemill_kernels::train`]; here is the chain rule between them.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Device, Layout as Strides, Shape, Tensor};
use tidemill_engine::{ModelConfig, ModelFiles, Part, Projection, Weight};
use tidemill_kernels::train::{Attention, Block, Compute, Dropout, LowRank, Operand, Pieces, Product, Rotation, Span, View};
use tidemill_kernels::{AttentionSpec, HeadShape, Store};

use super::layer_weights::{LayerWeights, Norms, Trained};
use super::layout::{Group, GroupLayout, Slot};
use super::whole::Whole;
use super::workshop::{Buffer, Workshop};
use super::{ModelError, along, slice};
use crate::parameters::read;
use crate::random::mix;

/// Derivatives along a layer's parameters.
struct Slopes {
    params: Vec<f32>,
    vectors: Vec<f32>,
}

/// Rows of a pass and how they see each other.
pub(super) struct Rows {
    pub positions: Vec<u32>,
    pub spans: Vec<Span>,
    pub rotation: Arc<Rotation>,
    /// Of layers with a window, where they rotate otherwise.
    pub local_rotation: Option<Arc<Rotation>>,
}

/// A layer in one pass.
pub(super) struct LayerOp {
    pub files: Arc<ModelFiles>,
    pub weights: Arc<LayerWeights>,
    /// Whose numbers the parameters are; `None` computes the base model's layer.
    pub trained: Option<Arc<Trained>>,
    pub rows: Arc<Rows>,
    pub workshop: Arc<Workshop>,
    /// Probability and key of the pass.
    pub dropout: Option<(f64, u64)>,
    /// Whether a backward pass may come, and what it needs should be kept rather than computed again.
    pub keep: bool,
    /// Whether gradients of frozen weights are computed, and forgotten.
    pub frozen_gradients: bool,
    pub saved: Mutex<Option<Saved>>,
}

/// Queries and keys before their norms (a `qkv` of its own), and the inverse roots, `[rows, heads]` and `[rows, kv_heads]`.
type RawHeads = (Buffer, [Buffer; 2]);

/// What a part of a layer gives before the norm behind it `[rows, hidden]`, and the inverse root `[rows]`.
type Branch = [Buffer; 2];

/// What the forward pass leaves for the backward one.
pub(super) struct Saved {
    /// Inverse roots of the two norms, `[rows]`.
    inverse: [Buffer; 2],
    /// `[rows, (heads + 2 kv_heads) * head_dim]`, rotated.
    qkv: Buffer,
    raw: Option<RawHeads>,
    /// `[rows, heads * head_dim]`
    attended: Buffer,
    /// `[rows, heads]`
    lse: Buffer,
    /// The residual stream between the halves, `[rows, hidden]`.
    middle: Buffer,
    /// `[rows, 2 * intermediate]`
    gate_up: Buffer,
    /// `A x` of each group, `[rows, ranks]`.
    shrunk: [Buffer; 4],
    /// Of attention and of the feed-forward part, where there are norms behind them.
    branches: Option<[Branch; 2]>,
}

impl Saved {
    fn buffers(self) -> impl Iterator<Item = Buffer> {
        let Self { inverse, qkv, raw, attended, lse, middle, gate_up, shrunk, branches } = self;
        let branches = branches.into_iter().flatten().flatten();
        let raw = raw.into_iter().flat_map(|(raw, inverse)| std::iter::once(raw).chain(inverse));
        inverse.into_iter().chain([qkv, attended, lse, middle, gate_up]).chain(shrunk).chain(raw).chain(branches)
    }
}

/// A pass through one layer with everything at hand.
struct Pass<'a> {
    op: &'a LayerOp,
    config: &'a ModelConfig,
    compute: &'a mut Compute,
    /// An adapter's numbers, or the layer's matrices.
    params: &'a [f32],
    /// Norms and biases of a layer that is trained whole.
    vectors: &'a [f32],
    rows: usize,
}

impl LayerOp {
    fn pass<'a>(&'a self, compute: &'a mut Compute, [params, vectors]: [&'a [f32]; 2]) -> Pass<'a> {
        Pass { op: self, config: self.files.config(), compute, params, vectors, rows: self.rows.positions.len() }
    }

    /// The layer's.
    fn rotation(&self) -> &Rotation {
        let local = self.rows.local_rotation.as_ref().filter(|_| self.files.config().is_local(self.weights.index));
        local.unwrap_or(&self.rows.rotation)
    }

    fn attention(&self) -> Attention<'_> {
        let config = self.files.config();
        let &ModelConfig { heads, kv_heads, head_dim, .. } = config;
        let sliding_window = config.window(self.weights.index);
        Attention {
            spans: &self.rows.spans,
            positions: &self.rows.positions,
            shape: HeadShape { heads, kv_heads, head_dim },
            spec: AttentionSpec { scale: config.attention_scale(), sliding_window, soft_cap: None, alibi: None },
        }
    }

    fn forward(&self, x: &[f32], params: [&[f32]; 2]) -> candle_core::Result<(CpuStorage, Shape)> {
        let hidden = self.files.config().hidden;
        let rows = self.rows.positions.len();
        let sizes = (params[0].len(), params[1].len());
        if x.len() != rows * hidden || sizes != self.trained.as_ref().map_or((0, 0), |trained| trained.sizes()) {
            candle_core::bail!("a layer got {} values and {sizes:?} parameters for {rows} rows", x.len());
        }
        let mut out = vec![0.0; x.len()];
        let saved = self.pass(&mut self.workshop.compute(), params).forward(x, &mut out)?;
        if self.keep {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        } else {
            saved.buffers().for_each(|buffer| self.workshop.give_back(buffer));
        }
        Ok((CpuStorage::F32(out), Shape::from((rows, hidden))))
    }

    /// Derivatives along the input and the parameters.
    fn backward(&self, x: &Tensor, params: [&[f32]; 2], dout: &Tensor) -> candle_core::Result<(Tensor, Slopes)> {
        let kept = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut dx = vec![0.0; x.elem_count()];
        let mut slopes = Slopes { params: vec![0.0; params[0].len()], vectors: vec![0.0; params[1].len()] };
        let done = read(x, |x| {
            read(dout, |dout| {
                let mut compute = self.workshop.compute();
                let mut pass = self.pass(&mut compute, params);
                let saved = match kept {
                    Some(saved) => saved,
                    None => {
                        let mut out = self.workshop.buffer(x.len());
                        let saved = pass.forward(x, &mut out)?;
                        self.workshop.give_back(out);
                        saved
                    }
                };
                pass.backward(x, &saved, dout, &mut dx, &mut slopes)?;
                saved.buffers().for_each(|buffer| self.workshop.give_back(buffer));
                Ok::<_, ModelError>(())
            })
        })??;
        done?;
        Ok((Tensor::from_vec(dx, x.shape(), &Device::Cpu)?, slopes))
    }
}

impl CustomOp3 for LayerOp {
    fn name(&self) -> &'static str {
        "decoder layer"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Strides,
        params: &CpuStorage,
        params_layout: &Strides,
        vectors: &CpuStorage,
        vectors_layout: &Strides,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward(slice(x, x_layout)?, [slice(params, params_layout)?, slice(vectors, vectors_layout)?])
    }

    fn bwd(
        &self,
        x: &Tensor,
        params: &Tensor,
        vectors: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, slopes) = read(params, |params| read(vectors, |vectors| self.backward(x, [params, vectors], dout)))???;
        Ok((Some(dx), along(slopes.params, params)?, along(slopes.vectors, vectors)?))
    }
}

/// `scale · B` of a group's matrices, each beside those of the others.
fn second_factors<'a>(config: &ModelConfig, group: Group, layout: &GroupLayout, params: &'a [f32]) -> Vec<Block<'a>> {
    let factor = |projection: &Projection| match layout.slots.iter().find(|slot| slot.projection == *projection) {
        Some(Slot { b, shape, rank, first_rank, scale, .. }) => {
            Block::Corner { data: &params[b.clone()], n: shape.0, rank: *rank, first: *first_rank, scale: *scale }
        }
        None => Block::Corner { data: &[], n: projection.shape(config).0, rank: 0, first: 0, scale: 0.0 },
    };
    group.projections().iter().map(factor).collect()
}

impl<'a> Pass<'a> {
    fn layout(&self, group: Group) -> Option<&'a GroupLayout> {
        let op = self.op;
        op.trained.as_deref()?.group(group)
    }

    fn whole(&self) -> Option<&'a Whole> {
        let op = self.op;
        op.trained.as_deref()?.whole()
    }

    fn norms(&self) -> Norms<'a> {
        let op = self.op;
        op.weights.norms(self.whole(), self.vectors)
    }

    fn bias(&self, group: Group) -> &'a [f32] {
        let (op, vectors) = (self.op, self.vectors);
        self.whole().map_or(op.weights.biases[group as usize].as_slice(), |whole| &vectors[whole.bias(group)])
    }

    fn buffer(&self, width: usize) -> Buffer {
        self.op.workshop.buffer(self.rows * width)
    }

    fn give_back(&self, buffers: impl IntoIterator<Item = Buffer>) {
        buffers.into_iter().for_each(|buffer| self.op.workshop.give_back(buffer));
    }

    /// Output and input features of a group's stacked matrices.
    fn sizes(&self, group: Group) -> (usize, usize) {
        let shapes = group.projections().iter().map(|projection| projection.shape(self.config));
        shapes.fold((0, 0), |(out, _), (n, k)| (out + n, k))
    }

    /// A mask for the input of a group's `A`. The matrices of a group share their input, and so its mask.
    fn dropout(&self, group: Group) -> Option<Dropout> {
        let (probability, key) = self.op.dropout?;
        let place = self.op.weights.index * Group::ALL.len() + group as usize;
        Dropout::new(probability, mix(key ^ mix(place as u64 + 1)))
    }

    /// Calls `with` with the group's matrices: the parameter's, or as they lie in the files.
    fn with_weights<T>(
        &mut self,
        group: Group,
        with: impl FnOnce(&mut Self, &[Block<'_>]) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        if let Some(whole) = self.whole() {
            let data = &self.params[whole.matrices[group as usize].clone()];
            let block = Block::Values { data, n: self.sizes(group).0 };
            return with(self, &[block]);
        }
        let (files, index) = (&self.op.files, self.op.weights.index);
        let matrices = group.projections().iter().map(|projection| files.matrix(Weight::Layer(index, projection.part())));
        let matrices = matrices.collect::<Result<Vec<_>, _>>()?;
        let blocks: Vec<Block<'_>> = matrices.iter().map(|matrix| Block::Weight(matrix.source())).collect();
        with(self, &blocks)
    }

    /// `out (+)= W x + b + scale · B A x` of a group; returns `A x`.
    fn linear(&mut self, group: Group, x: &[f32], out: &mut [f32], store: Store) -> Result<Buffer, ModelError> {
        let ((n, k), m) = (self.sizes(group), self.rows);
        let layout = self.layout(group).cloned().unwrap_or_default();
        let (params, rank) = (self.params, layout.ranks);
        let a = [Block::Values { data: &params[layout.a.clone()], n: rank }];
        let b = second_factors(self.config, group, &layout, params);
        let mut shrunk = self.buffer(rank);
        let dropped = if rank > 0 { self.dropped(group, x)? } else { None };
        if let Some(dropped) = &dropped {
            let left = View::Rows { data: dropped, stride: k };
            let right = Operand::StackT(&a);
            let product = Product { m, n: rank, k, left, right, scale: 1.0, store: Store::Replace };
            self.compute.matmul(&product, &mut shrunk, rank)?;
        }
        let down = dropped.is_none().then_some(Operand::StackT(&a));
        let along = LowRank { rank, down, up: Some(Operand::StackT(&b)) };
        let left = View::Rows { data: x, stride: k };
        self.with_weights(group, |pass, blocks| {
            let product = Product { m, n, k, left, right: Operand::StackT(blocks), scale: 1.0, store };
            Ok(pass.compute.matmul_with(&product, Some(along), &mut shrunk, out, n)?)
        })?;
        let bias = self.bias(group);
        if !bias.is_empty() {
            for row in out.chunks_mut(n) {
                row.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
        }
        self.give_back(dropped);
        Ok(shrunk)
    }

    /// The input of a group's `A`, where it is not the group's own input.
    fn dropped(&mut self, group: Group, x: &[f32]) -> Result<Option<Buffer>, ModelError> {
        let Some(dropout) = self.dropout(group) else { return Ok(None) };
        let mut dropped = self.op.workshop.buffer(x.len());
        self.compute.dropout(dropout, x, &mut dropped, Store::Replace)?;
        Ok(Some(dropped))
    }

    /// The derivatives of [`Self::linear`] for those along its result: along `x`, stored to `dx`, and along the parameters.
    fn linear_back(
        &mut self,
        group: Group,
        x: &[f32],
        shrunk: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        slopes: &mut Slopes,
    ) -> Result<(), ModelError> {
        let ((n, k), m) = (self.sizes(group), self.rows);
        let left = View::Rows { data: dy, stride: n };
        let layout = self.layout(group).cloned().unwrap_or_default();
        let (params, ranks) = (self.params, layout.ranks);
        let a = [Block::Values { data: &params[layout.a.clone()], n: ranks }];
        let b = second_factors(self.config, group, &layout, params);
        let mut dshrunk = self.buffer(ranks);
        // A mask stands between the input and what comes back through `A`.
        let up = self.dropout(group).is_none().then_some(Operand::Stack(&a));
        let along = LowRank { rank: ranks, down: Some(Operand::Stack(&b)), up };
        self.with_weights(group, |pass, blocks| {
            let right = Operand::Stack(blocks);
            let product = Product { m, n: k, k: n, left, right, scale: 1.0, store: Store::Replace };
            Ok(pass.compute.matmul_with(&product, Some(along), &mut dshrunk, dx, k)?)
        })?;
        if self.op.frozen_gradients {
            let mut forgotten = self.op.workshop.buffer(n * k);
            let (left, right) = (View::Columns { data: dy, stride: n }, Operand::View(View::Rows { data: x, stride: k }));
            let product = Product { m: n, n: k, k: m, left, right, scale: 1.0, store: Store::Replace };
            self.compute.matmul(&product, &mut forgotten, k)?;
            self.give_back([forgotten]);
        }
        if let Some(whole) = self.whole() {
            let (left, right) = (View::Columns { data: dy, stride: n }, Operand::View(View::Rows { data: x, stride: k }));
            let product = Product { m: n, n: k, k: m, left, right, scale: 1.0, store: Store::Replace };
            self.compute.matmul(&product, &mut slopes.params[whole.matrices[group as usize].clone()], k)?;
            let bias = &mut slopes.vectors[whole.bias(group)];
            if !bias.is_empty() {
                dy.chunks(n).for_each(|dy| bias.iter_mut().zip(dy).for_each(|(bias, dy)| *bias += dy));
            }
            return Ok(());
        }
        let dparams = &mut slopes.params;
        if ranks == 0 {
            return Ok(());
        }
        for slot in &layout.slots {
            let product = Product {
                m: slot.shape.0,
                n: slot.rank,
                k: m,
                left: View::Columns { data: &dy[slot.column..], stride: n },
                right: Operand::View(View::Rows { data: &shrunk[slot.first_rank..], stride: ranks }),
                scale: slot.scale,
                store: Store::Replace,
            };
            self.compute.matmul(&product, &mut dparams[slot.b.clone()], slot.rank)?;
        }
        let dropped = self.dropped(group, x)?;
        let input = dropped.as_deref().unwrap_or(x);
        let along_a = Product {
            m: ranks,
            n: k,
            k: m,
            left: View::Columns { data: &dshrunk, stride: ranks },
            right: Operand::View(View::Rows { data: input, stride: k }),
            scale: 1.0,
            store: Store::Replace,
        };
        self.compute.matmul(&along_a, &mut dparams[layout.a.clone()], k)?;
        if let (Some(dropout), Some(mut along)) = (self.dropout(group), dropped) {
            let left = View::Rows { data: &dshrunk, stride: ranks };
            let right = Operand::Stack(&a);
            let product = Product { m, n: k, k: ranks, left, right, scale: 1.0, store: Store::Replace };
            self.compute.matmul(&product, &mut along, k)?;
            self.compute.dropout(dropout, &along, dx, Store::Add)?;
            self.give_back([along]);
        }
        self.give_back([dshrunk]);
        Ok(())
    }

    /// Queries and keys of a `qkv` row.
    fn pieces(&self) -> [Pieces; 2] {
        let &ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        let stride = (heads + 2 * kv_heads) * head_dim;
        [
            Pieces { stride, offset: 0, count: heads, width: head_dim },
            Pieces { stride, offset: heads * head_dim, count: kv_heads, width: head_dim },
        ]
    }

    /// Norms of heads and rotation, in place; returns what the norms' derivative needs.
    fn rotate(&mut self, qkv: &mut [f32]) -> Result<Option<RawHeads>, ModelError> {
        let mut raw = None;
        if let Some(norms) = self.norms().heads {
            let mut before = self.op.workshop.buffer(qkv.len());
            before.copy_from_slice(qkv);
            let mut inverses = [Buffer::default(), Buffer::default()];
            for ((pieces, weight), inverse) in self.pieces().into_iter().zip(norms).zip(&mut inverses) {
                *inverse = self.buffer(pieces.count);
                self.compute.rms_norm(&before, pieces, weight, self.config.rms_eps, qkv, inverse)?;
            }
            raw = Some((before, inverses));
        }
        let (rows, rotation) = (&self.op.rows, self.op.rotation());
        for pieces in self.pieces() {
            self.compute.rotate(qkv, pieces, rotation, &rows.positions, false)?;
        }
        Ok(raw)
    }

    fn rotate_back(&mut self, raw: Option<&RawHeads>, dqkv: &mut [f32], slopes: &mut Slopes) -> Result<(), ModelError> {
        let (rows, rotation) = (&self.op.rows, self.op.rotation());
        for pieces in self.pieces() {
            self.compute.rotate(dqkv, pieces, rotation, &rows.positions, true)?;
        }
        if let (Some((before, inverses)), Some(norms)) = (raw, self.norms().heads) {
            let mut along = self.op.workshop.buffer(dqkv.len());
            along.copy_from_slice(dqkv);
            let parts = [Part::QueryNorm, Part::KeyNorm];
            for (((pieces, weight), inverse), part) in self.pieces().into_iter().zip(norms).zip(inverses).zip(parts) {
                self.compute.rms_norm_back(before, pieces, weight, inverse, &along, dqkv, Store::Replace)?;
                self.norm_slope(part, before, pieces, inverse, &along, slopes)?;
            }
            self.give_back([along]);
        }
        Ok(())
    }

    /// The derivative along a norm's weight, where that is trained.
    fn norm_slope(
        &mut self,
        part: Part,
        x: &[f32],
        pieces: Pieces,
        inverse: &[f32],
        dy: &[f32],
        slopes: &mut Slopes,
    ) -> Result<(), ModelError> {
        if let Some(whole) = self.whole() {
            self.compute.rms_norm_back_weight(x, pieces, inverse, dy, &mut slopes.vectors[whole.vector(part)])?;
        }
        Ok(())
    }

    /// The gated activation.
    fn gate(&mut self, gate_up: &[f32], gated: &mut [f32]) -> Result<(), ModelError> {
        let width = self.config.intermediate;
        match self.config.gemma {
            Some(_) => self.compute.gelu_mul(gate_up, width, gated)?,
            None => self.compute.silu_mul(gate_up, width, gated)?,
        }
        Ok(())
    }

    /// Adds what a part of the layer gives to the residual stream, through the norm behind it where there is one; returns `A x`, and what
    /// that norm's derivative needs.
    fn add(
        &mut self,
        group: Group,
        x: &[f32],
        norm: Option<&[f32]>,
        stream: &mut [f32],
    ) -> Result<(Buffer, Option<Branch>), ModelError> {
        let Some(norm) = norm else { return Ok((self.linear(group, x, stream, Store::Add)?, None)) };
        let (hidden, eps) = (self.config.hidden, self.config.rms_eps);
        let (mut branch, mut normed, mut inverse) = (self.buffer(hidden), self.buffer(hidden), self.buffer(1));
        let shrunk = self.linear(group, x, &mut branch, Store::Replace)?;
        self.compute.rms_norm(&branch, Pieces::rows(hidden), norm, eps, &mut normed, &mut inverse)?;
        stream.iter_mut().zip(&normed[..]).for_each(|(sum, value)| *sum += value);
        self.give_back([normed]);
        Ok((shrunk, Some([branch, inverse])))
    }

    /// The derivative along what a part of the layer gives, from that along the residual stream; none where they are the same.
    fn add_back(&mut self, norm: Option<&[f32]>, branch: Option<&Branch>, dy: &[f32]) -> Result<Option<Buffer>, ModelError> {
        let (Some(norm), Some([branch, inverse])) = (norm, branch) else { return Ok(None) };
        let mut along = self.buffer(self.config.hidden);
        self.compute.rms_norm_back(branch, Pieces::rows(self.config.hidden), norm, inverse, dy, &mut along, Store::Replace)?;
        Ok(Some(along))
    }

    fn forward(&mut self, x: &[f32], out: &mut [f32]) -> Result<Saved, ModelError> {
        let &ModelConfig { hidden, intermediate, heads, head_dim, rms_eps: eps, .. } = self.config;
        let norms = self.norms();
        let whole = Pieces::rows(hidden);
        let mut inverse = [self.buffer(1), self.buffer(1)];
        let mut normed = self.buffer(hidden);
        self.compute.rms_norm(x, whole, norms.attention, eps, &mut normed, &mut inverse[0])?;
        let mut qkv = self.buffer(self.sizes(Group::Qkv).0);
        let qkv_shrunk = self.linear(Group::Qkv, &normed, &mut qkv, Store::Replace)?;
        let raw = self.rotate(&mut qkv)?;
        let (mut attended, mut lse) = (self.buffer(heads * head_dim), self.buffer(heads));
        let op = self.op;
        self.compute.attention(op.attention(), &qkv, &mut attended, &mut lse)?;
        let mut middle = self.buffer(hidden);
        middle.copy_from_slice(x);
        let (output_shrunk, first) = self.add(Group::AttentionOutput, &attended, norms.behind.map(|n| n[0]), &mut middle)?;

        self.compute.rms_norm(&middle, whole, norms.feed_forward, eps, &mut normed, &mut inverse[1])?;
        let mut gate_up = self.buffer(2 * intermediate);
        let gate_up_shrunk = self.linear(Group::GateUp, &normed, &mut gate_up, Store::Replace)?;
        let mut gated = self.buffer(intermediate);
        self.gate(&gate_up, &mut gated)?;
        out.copy_from_slice(&middle);
        let (down_shrunk, second) = self.add(Group::Down, &gated, norms.behind.map(|n| n[1]), out)?;
        self.give_back([normed, gated]);
        let shrunk = [qkv_shrunk, output_shrunk, gate_up_shrunk, down_shrunk];
        let branches = first.zip(second).map(<[Branch; 2]>::from);
        Ok(Saved { inverse, qkv, raw, attended, lse, middle, gate_up, shrunk, branches })
    }

    fn backward(
        &mut self,
        x: &[f32],
        saved: &Saved,
        dout: &[f32],
        dx: &mut [f32],
        slopes: &mut Slopes,
    ) -> Result<(), ModelError> {
        let &ModelConfig { hidden, intermediate, heads, head_dim, rms_eps: eps, .. } = self.config;
        let norms = self.norms();
        let whole = Pieces::rows(hidden);
        let [qkv_shrunk, output_shrunk, gate_up_shrunk, down_shrunk] = &saved.shrunk;

        let (mut gated, mut dgated) = (self.buffer(intermediate), self.buffer(intermediate));
        self.gate(&saved.gate_up, &mut gated)?;
        let dbranch = self.add_back(norms.behind.map(|n| n[1]), saved.branches.as_ref().map(|b| &b[1]), dout)?;
        self.linear_back(Group::Down, &gated, down_shrunk, dbranch.as_deref().unwrap_or(dout), &mut dgated, slopes)?;
        self.give_back(dbranch);
        let mut dgate_up = self.buffer(2 * intermediate);
        match self.config.gemma {
            Some(_) => self.compute.gelu_mul_back(&saved.gate_up, intermediate, &dgated, &mut dgate_up)?,
            None => self.compute.silu_mul_back(&saved.gate_up, intermediate, &dgated, &mut dgate_up)?,
        }
        let (mut normed, mut dnormed, mut scratch) = (self.buffer(hidden), self.buffer(hidden), self.buffer(1));
        self.compute.rms_norm(&saved.middle, whole, norms.feed_forward, eps, &mut normed, &mut scratch)?;
        self.linear_back(Group::GateUp, &normed, gate_up_shrunk, &dgate_up, &mut dnormed, slopes)?;
        // Along the middle: directly, and through the feed-forward part.
        let mut dmiddle = self.buffer(hidden);
        dmiddle.copy_from_slice(dout);
        let [first, second] = &saved.inverse;
        self.compute.rms_norm_back(&saved.middle, whole, norms.feed_forward, second, &dnormed, &mut dmiddle, Store::Add)?;
        self.norm_slope(Part::FeedForwardNorm, &saved.middle, whole, second, &dnormed, slopes)?;

        let mut dattended = self.buffer(heads * head_dim);
        let dbranch = self.add_back(norms.behind.map(|n| n[0]), saved.branches.as_ref().map(|b| &b[0]), &dmiddle)?;
        let dy = dbranch.as_deref().unwrap_or(&dmiddle);
        self.linear_back(Group::AttentionOutput, &saved.attended, output_shrunk, dy, &mut dattended, slopes)?;
        self.give_back(dbranch);
        let mut dqkv = self.buffer(self.sizes(Group::Qkv).0);
        let op = self.op;
        self.compute.attention_back(op.attention(), &saved.qkv, &saved.attended, &saved.lse, &dattended, &mut dqkv)?;
        self.rotate_back(saved.raw.as_ref(), &mut dqkv, slopes)?;
        self.compute.rms_norm(x, whole, norms.attention, eps, &mut normed, &mut scratch)?;
        self.linear_back(Group::Qkv, &normed, qkv_shrunk, &dqkv, &mut dnormed, slopes)?;
        dx.copy_from_slice(&dmiddle);
        self.compute.rms_norm_back(x, whole, norms.attention, first, &dnormed, dx, Store::Add)?;
        self.norm_slope(Part::AttentionNorm, x, whole, first, &dnormed, slopes)?;
        self.give_back([gated, dgated, dgate_up, normed, dnormed, scratch, dmiddle, dattended, dqkv]);
        Ok(())
    }
}
