//! Running one entry's tasks on one thread.

use std::ops::Range;

use super::attention::{AttentionCall, AttentionPath, AttentionPlan, AttentionScratch, BLOCK, KvStorage};
use super::elementwise::{Elementwise, Level};
use super::experts::{ExpertSet, RoutingTables};
use super::holdings::{Buffer, FORMS, RopeTable, Slots};
use super::lora::{LoraCall, LoraPlan, PackedAdapter};
use super::math::sigmoid;
use super::program::{Entry, Planned};
use super::sampling::{SamplingScratch, sample_row};
use crate::aligned::AlignedBuf;
use crate::isa::Isa;
use crate::linear::TileScratch;
use crate::ops::{AttentionSpec, HeadShape, QkNorm, Rows, Sampled, StepBatch, Store, Vector};
use crate::packed::PackedMatrix;

/// Everything a step reads, and the buffers it writes through shared pointers. Threads are kept apart by what an entry's tasks
/// are: whole rows, tiles of a linear's output, heads of a sequence. Entries are kept apart by the stages of the pool.
pub(super) struct Holdings {
    pub isa: Isa,
    pub level: Level,
    pub rows: Elementwise,
    pub matrices: Vec<PackedMatrix>,
    pub vectors: Vec<AlignedBuf<f32>>,
    pub ropes: Vec<RopeTable>,
    pub buffers: Vec<Buffer>,
    /// With the instruction path of their attention.
    pub caches: Vec<(KvStorage, AttentionPath)>,
    pub experts: Vec<ExpertSet>,
    pub routings: Vec<RoutingTables>,
    /// One for each head shape that was used; `bool` tells whether it is built for this step.
    pub plans: Vec<(HeadShape, AttentionPlan, bool)>,
    /// By slot.
    pub adapters: Vec<Option<PackedAdapter>>,
    /// Which rows of the step have adapters.
    pub lora: LoraPlan,
    pub batch: StepBatch,
    /// One for each sampled row.
    pub sampled: Slots<Sampled>,
    /// One for each thread, each.
    pub tile_scratch: Slots<TileScratch>,
    pub sampling_scratch: Slots<SamplingScratch>,
    pub attention_scratch: Slots<AttentionScratch>,
    pub lora_scratch: Slots<AlignedBuf<f32>>,
}

impl Holdings {
    /// Rows of this kind in the step.
    pub fn count(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.batch.tokens.len(),
            Rows::Samples => self.batch.samples.len(),
            Rows::Routed { each } => self.batch.tokens.len() * each,
        }
    }

    /// # Safety
    /// `planned` was checked against the shapes held here, all entries before it are complete, each of its tasks is run once,
    /// and `thread` is this thread's alone.
    #[inline]
    pub unsafe fn run(&self, planned: &Planned, tasks: Range<usize>, thread: usize) {
        // SAFETY: passed on. Tasks of the entries by row write (and convert) the rows of their range; `Shapes` has checked that
        // input and output are different buffers.
        unsafe {
            match planned.entry {
                Entry::Embedding { table, out } => {
                    let (table, out) = (&self.matrices[table as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        // Shapes are checked: the token is a row of the table and the buffer has its width.
                        let _ = table.dequantize_row(self.batch.tokens[r] as usize, out.row_mut(r));
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::RmsNorm { x, weight, eps, out } => {
                    let (x, out) = (&self.buffers[x as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        self.rows.rms_norm(x.row(r), &self.vectors[weight as usize], eps, out.row_mut(r));
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::RmsNormAdd { x, weight, eps, out } => {
                    let (x, out) = (&self.buffers[x as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        self.rows.rms_norm_add(x.row(r), &self.vectors[weight as usize], eps, out.row_mut(r));
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::LayerNorm { x, weight, eps, out } => {
                    let (x, out) = (&self.buffers[x as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        self.rows.layer_norm(x.row(r), &self.vectors[weight as usize], eps, out.row_mut(r));
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::Clamp { x, limit } => {
                    let x = &self.buffers[x as usize];
                    for r in tasks {
                        x.row_mut(r).iter_mut().for_each(|v| *v = v.clamp(-limit, limit));
                        self.convert(planned.forms, x, r);
                    }
                }
                Entry::Scale { x, factor } => {
                    let x = &self.buffers[x as usize];
                    for r in tasks {
                        x.row_mut(r).iter_mut().for_each(|v| *v *= factor);
                        self.convert(planned.forms, x, r);
                    }
                }
                Entry::SoftCap { x, cap } => {
                    let x = &self.buffers[x as usize];
                    for r in tasks {
                        self.rows.soft_cap(x.row_mut(r), cap);
                        self.convert(planned.forms, x, r);
                    }
                }
                Entry::GeluTanhAndMul { gate_up, out } => {
                    let (x, out) = (&self.buffers[gate_up as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        let (gate, up) = x.row(r).split_at(out.width);
                        self.rows.gelu_tanh_and_mul(gate, up, out.row_mut(r));
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::SiluAndMul { gate_up, out } => {
                    let (x, out) = (&self.buffers[gate_up as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        let (gate, up) = x.row(r).split_at(out.width);
                        self.rows.silu_and_mul(gate, up, out.row_mut(r));
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::Gelu { x, out } => {
                    let (x, out) = (&self.buffers[x as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        self.rows.gelu(x.row(r), out.row_mut(r));
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::GateRows { gate, x } => {
                    let (gate, x) = (&self.buffers[gate as usize], &self.buffers[x as usize]);
                    for r in tasks {
                        let factor = sigmoid(gate.row(r)[0]);
                        x.row_mut(r).iter_mut().for_each(|v| *v *= factor);
                        self.convert(planned.forms, x, r);
                    }
                }
                Entry::Route { logits, normalised, routing } => {
                    let logits = &self.buffers[logits as usize];
                    tasks.for_each(|r| self.routings[routing as usize].choose(r, logits.row(r), normalised));
                }
                Entry::Align { routing } => self.routings[routing as usize].align(self.batch.tokens.len()),
                Entry::ConvertRouted { x, routing, experts } => self.convert_routed(tasks, x, routing, experts),
                Entry::ExpertLinear { x, routing, experts, out } => {
                    self.expert_linear(tasks, x, routing, experts, out, thread);
                }
                Entry::Combine { x, routing, out, store } => {
                    let (x, out) = (&self.buffers[x as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        let sums = out.row_mut(r);
                        if store == Store::Replace {
                            sums.fill(0.0);
                        }
                        for (row, weight) in self.routings[routing as usize].rows_of(r) {
                            self.rows.add_scaled(x.row(row), weight, sums);
                        }
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::Gather { x, out } => {
                    let (x, out) = (&self.buffers[x as usize], &self.buffers[out as usize]);
                    for r in tasks {
                        out.row_mut(r).copy_from_slice(x.row(self.batch.samples[r].row as usize));
                        self.convert(planned.forms, out, r);
                    }
                }
                Entry::Convert { x } => {
                    let x = &self.buffers[x as usize];
                    tasks.for_each(|r| self.convert(planned.forms, x, r));
                }
                Entry::Linear { x, form, w, bias, out, store } => {
                    let (x, out) = (&self.buffers[x as usize], &self.buffers[out as usize]);
                    let Some(input) = &x.converted[form as usize] else { return };
                    let bias = bias.map(|b| &self.vectors[b as usize][..]);
                    let w = &self.matrices[w as usize];
                    let rows = self.count(out.rows);
                    let scratch = self.tile_scratch.get_mut(thread);
                    for item in tasks {
                        let add = store == Store::Add;
                        w.run_item(self.isa, item, input, rows, out.start(), out.stride, bias, add, scratch);
                    }
                }
                Entry::Lora { x, site, out } => {
                    let (x, out) = (&self.buffers[x as usize], &self.buffers[out as usize]);
                    let (level, adapters, plan) = (self.level, &self.adapters, &self.lora);
                    let call = LoraCall { level, adapters, plan, site: site as usize, x, out };
                    let scratch = self.lora_scratch.get_mut(thread);
                    tasks.for_each(|task| call.run_task(task, scratch));
                }
                Entry::RopeCache { qkv, shape, norm, rope, kv, layer } => {
                    self.rope_cache(tasks, &self.buffers[qkv as usize], shape, norm, rope, kv, layer as usize);
                }
                Entry::Attention { qkv, shape, spec, kv, layer, plan, out } => {
                    let call = self.attention(qkv, shape, spec, kv, layer, plan, out);
                    let scratch = self.attention_scratch.get_mut(thread);
                    tasks.for_each(|item| call.run_item(item, scratch));
                }
                Entry::AttentionMerge { qkv, shape, spec, kv, layer, plan, out } => {
                    let call = self.attention(qkv, shape, spec, kv, layer, plan, out);
                    let scratch = self.attention_scratch.get_mut(thread);
                    tasks.for_each(|merge| call.run_merge(merge, scratch));
                }
                Entry::Sample { logits, vocabulary } => {
                    let logits = &self.buffers[logits as usize];
                    let (batch, scratch) = (&self.batch, self.sampling_scratch.get_mut(thread));
                    for r in tasks {
                        let row = &mut logits.row_mut(r)[..vocabulary as usize];
                        let out = self.sampled.get_mut(r);
                        sample_row(self.isa, row, &batch.samples[r], &batch.history, &batch.bias, out, scratch);
                    }
                }
            }
        }
    }

    fn attention(
        &self,
        qkv: u32,
        shape: HeadShape,
        spec: AttentionSpec,
        kv: u32,
        layer: u32,
        plan: u32,
        out: u32,
    ) -> AttentionCall<'_> {
        let (storage, path) = &self.caches[kv as usize];
        let (qkv, out) = (&self.buffers[qkv as usize], &self.buffers[out as usize]);
        AttentionCall {
            path: *path,
            plan: &self.plans[plan as usize].1,
            sequences: &self.batch.sequences,
            blocks: &self.batch.blocks,
            storage,
            layer: layer as usize,
            shape,
            spec,
            slopes: spec.alibi.map(|slopes| &self.vectors[slopes.0 as usize][..]),
            qkv: qkv.start(),
            qkv_stride: qkv.stride,
            out: out.start(),
            out_stride: out.stride,
        }
    }

    /// # Safety
    /// The row was written by this thread, or by an earlier entry, and this thread alone converts it.
    #[inline]
    unsafe fn convert(&self, forms: u32, buffer: &Buffer, row: usize) {
        for (form, (kind, target)) in FORMS.iter().zip(&buffer.converted).enumerate() {
            if forms & 1 << form != 0
                && let Some(target) = target
            {
                // SAFETY: passed on; the target has the buffer's capacity and width, and `isa` is one this machine has.
                unsafe { target.set_row(self.isa, *kind, row, buffer.row(row)) };
            }
        }
    }

    /// # Safety
    /// As [`Holdings::run`], for the tasks of some rows.
    unsafe fn rope_cache(
        &self,
        rows: Range<usize>,
        qkv: &Buffer,
        shape: HeadShape,
        norm: Option<QkNorm>,
        rope: u32,
        kv: u32,
        layer: usize,
    ) {
        let HeadShape { heads, kv_heads, head_dim } = shape;
        let of = |v: Vector, eps: f32| (&self.vectors[v.0 as usize][..], eps);
        for r in rows.clone() {
            // SAFETY: the row is one of these tasks'.
            let row = unsafe { qkv.row_mut(r) };
            let (cos, sin) = self.ropes[rope as usize].at(self.batch.positions[r] as usize);
            let (q, kv_part) = row.split_at_mut(heads * head_dim);
            self.rows.rope(q, head_dim, norm.map(|n| of(n.q, n.eps)), cos, sin);
            self.rows.rope(&mut kv_part[..kv_heads * head_dim], head_dim, norm.map(|n| of(n.k, n.eps)), cos, sin);
        }
        let mut first = rows.start;
        while first < rows.end {
            let Ok(slot) = usize::try_from(self.batch.slots[first]) else {
                first += 1;
                continue;
            };
            let follows = |(i, s): &(usize, &i64)| *i + slot % BLOCK < BLOCK && usize::try_from(**s) == Ok(slot + i);
            let count = self.batch.slots[first..rows.end].iter().enumerate().take_while(follows).count();
            for h in 0..kv_heads {
                // SAFETY: layer, slots and head were checked; no two rows of a step share a slot; keys, then values follow the
                // queries in each row.
                unsafe {
                    let k = qkv.start().add(first * qkv.stride + (heads + h) * head_dim);
                    let v = k.add(kv_heads * head_dim);
                    self.caches[kv as usize].0.write_rows(&self.rows, layer, slot, count, h, k, v, qkv.stride);
                }
            }
            first += count;
        }
    }
}
