//! The oracle: every operation as its definition says, one number after the other.
//!
//! Values are stored as f32, sums are made in f64. Nothing is packed: weights are dequantised when loaded, whatever
//! [`WeightFormat`] asks for, and the cache is dense `[layer][block][kv_head][slot][head_dim]` (rounded to bf16 or 8 bits where the cache
//! is declared so, because that is what the cache holds). Operations run when they are enqueued.

mod attention;
mod experts;
pub(crate) mod normal;
mod sampling;

use half::bf16;

use self::experts::Choices;
use crate::blocks::dequantize_row;
use crate::collective::{Member, Place};
use crate::e4m3;
use crate::error::KernelError;
use crate::ops::*;
use crate::shapes::Shapes;

/// `n` rows of `k` weights.
struct Dense {
    k: usize,
    weights: Vec<f32>,
}

impl Dense {
    fn of(sources: &[MatrixSource<'_>], n: usize, k: usize) -> Result<Self, KernelError> {
        let mut weights = zeros(n.checked_mul(k), "weights")?;
        let mut rows = weights.chunks_exact_mut(k);
        for s in sources {
            let bytes = s.data.len() / s.n;
            for (i, out) in (0..s.n).zip(&mut rows) {
                let row = s.row_order.map_or(i, |order| order[i] as usize);
                dequantize_row(s.format, &s.data[row * bytes..(row + 1) * bytes], out)?;
            }
        }
        Ok(Dense { k, weights })
    }

    /// `x wᵀ`
    fn product(&self, x: &[f32]) -> impl Iterator<Item = f64> {
        self.weights.chunks_exact(self.k).map(move |w| dot(x, w))
    }
}

struct RopeTable {
    inv_freq: Vec<f32>,
    magnitude: f32,
}

struct Buffer {
    width: usize,
    data: Vec<f32>,
}

/// A [`LowRank`] that is kept.
struct Update {
    column: usize,
    k: usize,
    rank: usize,
    scale: f32,
    a: Vec<f32>,
    b: Vec<f32>,
}

/// Keys and values of one cache, dense.
struct Cache {
    spec: KvSpec,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Cache {
    /// Where the head of a slot (`block * block_size + offset`) starts.
    fn at(&self, layer: usize, slot: usize, kv_head: usize) -> usize {
        let s = &self.spec;
        let (block, offset) = (slot / s.block_size, slot % s.block_size);
        (((layer * s.blocks + block) * s.kv_heads + kv_head) * s.block_size + offset) * s.head_dim
    }

    fn round(&self, value: f32) -> f32 {
        match self.spec.dtype {
            KvDtype::F32 => value,
            KvDtype::Bf16 => bf16::from_f32(value).to_f32(),
            KvDtype::Fp8 => e4m3::decode(e4m3::encode(value)),
        }
    }
}

/// The scalar backend. Slow; for tests.
pub struct Reference {
    shapes: Shapes,
    matrices: Vec<Dense>,
    vectors: Vec<Vec<f32>>,
    ropes: Vec<RopeTable>,
    buffers: Vec<Buffer>,
    caches: Vec<Cache>,
    experts: Vec<Vec<Dense>>,
    routings: Vec<Choices>,
    /// For each slot, for each site.
    adapters: Vec<Vec<Vec<Update>>>,
    batch: StepBatch,
    sampled: Vec<Sampled>,
    error: Option<KernelError>,
    /// Of the ranks that compute a model together.
    member: Option<Member>,
}

impl Reference {
    /// A backend for steps up to `limits`.
    pub fn new(limits: Limits) -> Self {
        Reference {
            shapes: Shapes::new(limits),
            matrices: Vec::new(),
            vectors: Vec::new(),
            ropes: Vec::new(),
            buffers: Vec::new(),
            caches: Vec::new(),
            experts: Vec::new(),
            routings: Vec::new(),
            adapters: Vec::new(),
            batch: StepBatch::default(),
            sampled: Vec::new(),
            error: None,
            member: None,
        }
    }

    /// One of several that compute a model together.
    pub fn of_group(limits: Limits, member: Member) -> Self {
        Reference { member: Some(member), ..Reference::new(limits) }
    }

    /// Fills a buffer, valid rows and the rest, with one value; for tests that look for unwritten elements.
    pub fn fill(&mut self, buf: Buf, value: f32) {
        self.buffers[buf.0 as usize].data.fill(value);
    }

    /// Notes a check's outcome; `true` when the operation may run.
    fn admit(&mut self, check: Result<(), KernelError>) -> bool {
        if self.error.is_none() {
            self.error = check.err();
        }
        self.error.is_none()
    }

    fn row(&self, buf: Buf, row: usize) -> &[f32] {
        let b = &self.buffers[buf.0 as usize];
        &b.data[row * b.width..(row + 1) * b.width]
    }

    fn row_mut(&mut self, buf: Buf, row: usize) -> &mut [f32] {
        let b = &mut self.buffers[buf.0 as usize];
        &mut b.data[row * b.width..(row + 1) * b.width]
    }

    /// `out = activation(gate) * up`
    fn gate(&mut self, gate_up: Buf, out: Buf, activation: impl Fn(f64) -> f64) {
        for r in 0..self.rows(out) {
            let (gate, up) = self.row(gate_up, r).split_at(self.buffers[out.0 as usize].width);
            let row: Vec<f32> = gate.iter().zip(up).map(|(&g, &u)| (activation(f64::from(g)) * f64::from(u)) as f32).collect();
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn rows(&self, buf: Buf) -> usize {
        self.shapes.buffer("rows", buf).map_or(0, |(rows, _)| self.shapes.count(rows))
    }
}

/// `x / sqrt(mean(x²) + eps) * weight`
fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&v, &w)| (f64::from(v) * scale * f64::from(w)) as f32).collect()
}

/// `(x - mean(x)) / sqrt(var(x) + eps) * weight`
fn layer_normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (variance + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&v, &w)| ((f64::from(v) - mean) * scale * f64::from(w)) as f32).collect()
}

fn zeros(len: Option<usize>, what: &'static str) -> Result<Vec<f32>, KernelError> {
    let bytes = len.unwrap_or(usize::MAX).saturating_mul(4);
    let mut data = Vec::new();
    let len = len.filter(|&len| data.try_reserve_exact(len).is_ok()).ok_or(KernelError::Memory { what, bytes })?;
    data.resize(len, 0.0);
    Ok(data)
}

impl Ops for Reference {
    fn describe(&self) -> String {
        "reference, scalar f32".into()
    }

    fn limits(&self) -> Limits {
        self.shapes.limits()
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse {
            weights: 4 * self.matrices.iter().chain(self.experts.iter().flatten()).map(|m| m.weights.len()).sum::<usize>(),
            kv: 4 * self.caches.iter().map(|c| c.keys.len() + c.values.len()).sum::<usize>(),
            activations: 4 * self.buffers.iter().map(|b| b.data.len()).sum::<usize>(),
            adapters: 4 * self.adapters.iter().flatten().flatten().map(|u| u.a.len() + u.b.len()).sum::<usize>(),
        }
    }

    fn place(&self) -> Place {
        self.member.as_ref().map_or(Place::ALONE, Member::place)
    }

    fn load_matrix(&mut self, sources: &[MatrixSource<'_>], _: WeightFormat) -> Result<Matrix, KernelError> {
        let (n, k) = Shapes::stacked(sources)?;
        self.matrices.push(Dense::of(sources, n, k)?);
        Ok(self.shapes.add_matrix(n, k))
    }

    fn load_experts(&mut self, experts: &[Vec<MatrixSource<'_>>], _: WeightFormat) -> Result<Experts, KernelError> {
        let (n, k) = Shapes::stacked_experts(experts)?;
        self.experts.push(experts.iter().map(|sources| Dense::of(sources, n, k)).collect::<Result<_, _>>()?);
        Ok(self.shapes.add_experts(n, k, experts.len()))
    }

    fn alloc_routing(&mut self, shape: RoutingShape) -> Result<Routing, KernelError> {
        let routing = self.shapes.add_routing(shape)?;
        self.routings.push(Choices::new(shape));
        Ok(routing)
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, KernelError> {
        self.vectors.push(values.to_vec());
        Ok(self.shapes.add_vector(values.len()))
    }

    fn load_rope(&mut self, inv_freq: &[f32], magnitude: f32) -> Result<Rope, KernelError> {
        self.ropes.push(RopeTable { inv_freq: inv_freq.to_vec(), magnitude });
        Ok(self.shapes.add_rope(inv_freq.len()))
    }

    fn alloc(&mut self, rows: Rows, width: usize) -> Result<Buf, KernelError> {
        let data = zeros(self.shapes.capacity(rows).checked_mul(width), "activations")?;
        let buf = self.shapes.add_buffer(rows, width)?;
        self.buffers.push(Buffer { width, data });
        Ok(buf)
    }

    fn alloc_kv(&mut self, spec: KvSpec) -> Result<KvCache, KernelError> {
        let sizes = [spec.layers, spec.blocks, spec.kv_heads, spec.block_size, spec.head_dim];
        let len = sizes.into_iter().try_fold(1usize, usize::checked_mul);
        let (keys, values) = (zeros(len, "keys")?, zeros(len, "values")?);
        let handle = self.shapes.add_cache(spec)?;
        self.caches.push(Cache { spec, keys, values });
        Ok(handle)
    }

    fn load_adapter(&mut self, slot: u32, sites: &[Vec<LowRank<'_>>]) -> Result<(), KernelError> {
        self.shapes.add_adapter(slot, sites)?;
        let kept =
            |p: &LowRank<'_>| Update { column: p.column, k: p.k, rank: p.rank, scale: p.scale, a: p.a.to_vec(), b: p.b.to_vec() };
        let slot = slot as usize;
        if self.adapters.len() <= slot {
            self.adapters.resize_with(slot + 1, Vec::new);
        }
        self.adapters[slot] = sites.iter().map(|parts| parts.iter().map(kept).collect()).collect();
        Ok(())
    }

    fn unload_adapter(&mut self, slot: u32) {
        self.shapes.remove_adapter(slot);
        if let Some(sites) = self.adapters.get_mut(slot as usize) {
            sites.clear();
        }
    }

    fn begin(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.error = None;
        self.sampled.clear();
        self.shapes.begin(batch)?;
        self.batch.copy_from(batch);
        for cache in &mut self.caches {
            let block = cache.spec.kv_heads * cache.spec.block_size * cache.spec.head_dim;
            for &(from, to) in &batch.copies {
                for layer in 0..cache.spec.layers {
                    let at = |b: u32| (layer * cache.spec.blocks + b as usize) * block;
                    cache.keys.copy_within(at(from)..at(from) + block, at(to));
                    cache.values.copy_within(at(from)..at(from) + block, at(to));
                }
            }
        }
        Ok(())
    }

    fn embedding(&mut self, table: Matrix, out: Buf) {
        if !self.admit(self.shapes.embedding(table, out)) {
            return;
        }
        for r in 0..self.rows(out) {
            let table = &self.matrices[table.0 as usize];
            let token = self.batch.tokens[r] as usize;
            let row = table.weights[token * table.k..(token + 1) * table.k].to_vec();
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn embedding_shard(&mut self, table: Matrix, first: u32, out: Buf) {
        if !self.admit(self.shapes.embedding_shard(table, out)) {
            return;
        }
        for r in 0..self.rows(out) {
            let table = &self.matrices[table.0 as usize];
            let row =
                self.batch.tokens[r].checked_sub(first).and_then(|row| table.weights.chunks_exact(table.k).nth(row as usize));
            let row = row.map_or_else(|| vec![0.0; table.k], <[f32]>::to_vec);
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn all_reduce(&mut self, x: Buf) {
        if !self.admit(self.shapes.all_reduce(x)) {
            return;
        }
        let rows = self.rows(x);
        let (Some(member), buffer) = (&self.member, &mut self.buffers[x.0 as usize]) else { return };
        self.error = member.all_reduce(&mut buffer.data[..rows * buffer.width]).err();
    }

    fn all_gather(&mut self, x: Buf, out: Buf) {
        let ranks = self.place().ranks;
        if !self.admit(self.shapes.all_gather(x, out, ranks)) {
            return;
        }
        let (rows, width) = (self.rows(x), self.buffers[x.0 as usize].width);
        let mine = &self.buffers[x.0 as usize].data[..rows * width];
        let all = match &self.member {
            Some(member) => member.all_gather(mine),
            None => Ok(mine.to_vec()),
        };
        match all {
            Ok(all) => {
                for (r, rank) in (0..rows).flat_map(|r| (0..ranks).map(move |rank| (r, rank))) {
                    let part = all[(rank * rows + r) * width..][..width].to_vec();
                    self.row_mut(out, r)[rank * width..][..width].copy_from_slice(&part);
                }
            }
            Err(error) => self.error = Some(error),
        }
    }

    fn rms_norm(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        if !self.admit(self.shapes.norm("rms_norm", x, weight, out)) {
            return;
        }
        for r in 0..self.rows(x) {
            let row = normed(self.row(x, r), &self.vectors[weight.0 as usize], eps);
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn rms_norm_add(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        if !self.admit(self.shapes.norm("rms_norm_add", x, weight, out)) {
            return;
        }
        for r in 0..self.rows(x) {
            let row = normed(self.row(x, r), &self.vectors[weight.0 as usize], eps);
            self.row_mut(out, r).iter_mut().zip(row).for_each(|(o, v)| *o += v);
        }
    }

    fn layer_norm(&mut self, x: Buf, weight: Vector, eps: f32, out: Buf) {
        if !self.admit(self.shapes.norm("layer_norm", x, weight, out)) {
            return;
        }
        for r in 0..self.rows(x) {
            let row = layer_normed(self.row(x, r), &self.vectors[weight.0 as usize], eps);
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn clamp(&mut self, x: Buf, limit: f32) {
        if !self.admit(self.shapes.clamp(x, limit)) {
            return;
        }
        for r in 0..self.rows(x) {
            self.row_mut(x, r).iter_mut().for_each(|v| *v = v.clamp(-limit, limit));
        }
    }

    fn scale(&mut self, x: Buf, factor: f32) {
        if !self.admit(self.shapes.scale(x)) {
            return;
        }
        for r in 0..self.rows(x) {
            self.row_mut(x, r).iter_mut().for_each(|v| *v *= factor);
        }
    }

    fn soft_cap(&mut self, x: Buf, cap: f32) {
        if !self.admit(self.shapes.soft_cap(x, cap)) {
            return;
        }
        let capped = |v: f32| (f64::from(cap) * (f64::from(v) / f64::from(cap)).tanh()) as f32;
        for r in 0..self.rows(x) {
            self.row_mut(x, r).iter_mut().for_each(|v| *v = capped(*v));
        }
    }

    fn linear(&mut self, x: Buf, w: Matrix, bias: Option<Vector>, out: Buf, store: Store) {
        if !self.admit(self.shapes.linear(x, w, bias, out)) {
            return;
        }
        for r in 0..self.rows(x) {
            let m = &self.matrices[w.0 as usize];
            let x = self.row(x, r);
            let mut product: Vec<f64> = m.product(x).collect();
            if let Some(bias) = bias {
                product.iter_mut().zip(&self.vectors[bias.0 as usize]).for_each(|(p, &b)| *p += f64::from(b));
            }
            for (o, p) in self.row_mut(out, r).iter_mut().zip(product) {
                *o = match store {
                    Store::Replace => p as f32,
                    Store::Add => (f64::from(*o) + p) as f32,
                };
            }
        }
    }

    fn lora(&mut self, x: Buf, site: usize, out: Buf) {
        let check = self.shapes.lora(x, site, out);
        if !self.admit(check.map(|_| ())) {
            return;
        }
        for r in 0..self.batch.adapters.len() {
            let sites = self.adapters.get(self.batch.adapters[r] as usize);
            let mut row = self.row(out, r).to_vec();
            for update in sites.and_then(|sites| sites.get(site)).into_iter().flatten() {
                let inner: Vec<f64> = update.a.chunks_exact(update.k).map(|a| dot(self.row(x, r), a)).collect();
                for (o, b) in row[update.column..].iter_mut().zip(update.b.chunks_exact(update.rank)) {
                    let outer: f64 = b.iter().zip(&inner).map(|(&b, t)| f64::from(b) * t).sum();
                    *o = (f64::from(*o) + f64::from(update.scale) * outer) as f32;
                }
            }
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn rope_cache(&mut self, qkv: Buf, shape: HeadShape, norm: Option<QkNorm>, rope: Rope, kv: KvCache, layer: usize) {
        let check = self.shapes.rope_cache(qkv, shape, norm.as_ref(), rope, kv, layer);
        if !self.admit(check) {
            return;
        }
        let HeadShape { heads, kv_heads, head_dim } = shape;
        for r in 0..self.rows(qkv) {
            let mut row = self.row(qkv, r).to_vec();
            for (h, head) in row.chunks_exact_mut(head_dim).take(heads + kv_heads).enumerate() {
                if let Some(norm) = norm {
                    let weight = if h < heads { norm.q } else { norm.k };
                    head.copy_from_slice(&normed(head, &self.vectors[weight.0 as usize], norm.eps));
                }
                rotate(head, &self.ropes[rope.0 as usize], self.batch.positions[r]);
            }
            if self.batch.slots[r] >= 0 {
                let slot = self.batch.slots[r] as usize;
                let cache = &mut self.caches[kv.0 as usize];
                for h in 0..kv_heads {
                    let at = cache.at(layer, slot, h);
                    for i in 0..head_dim {
                        cache.keys[at + i] = cache.round(row[(heads + h) * head_dim + i]);
                        cache.values[at + i] = cache.round(row[(heads + kv_heads + h) * head_dim + i]);
                    }
                }
            }
            self.row_mut(qkv, r).copy_from_slice(&row);
        }
    }

    fn paged_attention(&mut self, qkv: Buf, shape: HeadShape, spec: AttentionSpec, kv: KvCache, layer: usize, out: Buf) {
        let check = self.shapes.paged_attention(qkv, shape, spec, kv, layer, out, &self.batch);
        if !self.admit(check) {
            return;
        }
        for i in 0..self.batch.sequences.len() {
            let sequence = self.batch.sequences[i];
            for r in 0..sequence.rows {
                let row = (sequence.first_row + r) as usize;
                let position = (sequence.context_len - sequence.rows + r) as usize;
                let table = &self.batch.blocks[sequence.first_block as usize..];
                let cache = &self.caches[kv.0 as usize];
                let slopes = spec.alibi.map(|slopes| &self.vectors[slopes.0 as usize][..]);
                let result = attention::attend(self.row(qkv, row), shape, spec, slopes, cache, layer, table, position);
                self.row_mut(out, row).copy_from_slice(&result);
            }
        }
    }

    fn silu_and_mul(&mut self, gate_up: Buf, out: Buf) {
        if self.admit(self.shapes.gated("silu_and_mul", gate_up, out)) {
            self.gate(gate_up, out, |g| g / (1.0 + (-g).exp()));
        }
    }

    fn gelu_tanh_and_mul(&mut self, gate_up: Buf, out: Buf) {
        if self.admit(self.shapes.gated("gelu_tanh_and_mul", gate_up, out)) {
            let slope = (2.0 / std::f64::consts::PI).sqrt();
            self.gate(gate_up, out, |g| 0.5 * g * (1.0 + (slope * (g + 0.044715 * g.powi(3))).tanh()));
        }
    }

    fn gelu(&mut self, x: Buf, out: Buf) {
        if !self.admit(self.shapes.gelu(x, out)) {
            return;
        }
        for r in 0..self.rows(out) {
            let row: Vec<f32> =
                self.row(x, r).iter().map(|&v| (f64::from(v) * normal::cumulative(f64::from(v))) as f32).collect();
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn route(&mut self, logits: Buf, normalised: bool, routing: Routing) {
        let check = self.shapes.route(logits, routing);
        if !self.admit(check) {
            return;
        }
        let (rows, buffer) = (self.rows(logits), &self.buffers[logits.0 as usize]);
        self.routings[routing.0 as usize].fill(buffer.data.chunks_exact(buffer.width).take(rows), normalised);
    }

    fn expert_linear(&mut self, x: Buf, experts: Experts, routing: Routing, out: Buf) {
        if !self.admit(self.shapes.expert_linear(x, experts, routing, out)) {
            return;
        }
        let per_token = matches!(self.shapes.buffer("expert_linear", x), Ok((Rows::Tokens, _)));
        for r in 0..self.rows(out) {
            let (expert, token) = self.routings[routing.0 as usize].of(r);
            let x = self.row(x, if per_token { token } else { r });
            let row: Vec<f32> = self.experts[experts.0 as usize][expert].product(x).map(|sum| sum as f32).collect();
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn combine(&mut self, x: Buf, routing: Routing, out: Buf, store: Store) {
        if !self.admit(self.shapes.combine(x, routing, out)) {
            return;
        }
        for r in 0..self.rows(out) {
            let mut row: Vec<f64> = match store {
                Store::Replace => vec![0.0; self.buffers[out.0 as usize].width],
                Store::Add => self.row(out, r).iter().map(|&v| f64::from(v)).collect(),
            };
            let choices = &self.routings[routing.0 as usize];
            for (place, &entry) in choices.rows.iter().enumerate().filter(|(_, entry)| **entry / choices.shape.each == r) {
                let weight = f64::from(choices.chosen[entry].1);
                row.iter_mut().zip(self.row(x, place)).for_each(|(sum, &v)| *sum += weight * f64::from(v));
            }
            self.row_mut(out, r).iter_mut().zip(row).for_each(|(o, v)| *o = v as f32);
        }
    }

    fn gate_rows(&mut self, gate: Buf, x: Buf) {
        if !self.admit(self.shapes.gate_rows(gate, x)) {
            return;
        }
        for r in 0..self.rows(x) {
            let factor = 1.0 / (1.0 + (-f64::from(self.row(gate, r)[0])).exp());
            self.row_mut(x, r).iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
        }
    }

    fn gather(&mut self, x: Buf, out: Buf) {
        if !self.admit(self.shapes.gather(x, out)) {
            return;
        }
        for r in 0..self.rows(out) {
            let row = self.row(x, self.batch.samples[r].row as usize).to_vec();
            self.row_mut(out, r).copy_from_slice(&row);
        }
    }

    fn sample(&mut self, logits: Buf, vocabulary: usize) {
        if !self.admit(self.shapes.sample(logits, vocabulary, &self.batch)) {
            return;
        }
        self.sampled.clear();
        if self.place().rank > 0 {
            return;
        }
        for (i, wanted) in self.batch.samples.iter().enumerate() {
            let row = &self.row(logits, i)[..vocabulary];
            let sampled = sampling::sample(row, wanted, &self.batch);
            self.sampled.push(sampled);
        }
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), KernelError> {
        out.samples.clear();
        out.samples.append(&mut self.sampled);
        match self.error.take() {
            Some(error) => {
                out.samples.clear();
                Err(error)
            }
            None => Ok(()),
        }
    }

    fn read(&self, buf: Buf) -> Result<Vec<f32>, KernelError> {
        let (rows, width) = self.shapes.buffer("read", buf)?;
        Ok(self.buffers[buf.0 as usize].data[..self.shapes.count(rows) * width].to_vec())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// GPT-NeoX rotation: element `i` pairs with `i + half`. The angle is an f32 product, as in the implementations that the
/// checkpoints come from; its cosine and sine are exact.
fn rotate(head: &mut [f32], rope: &RopeTable, position: u32) {
    let half = rope.inv_freq.len();
    for i in 0..half {
        let angle = f64::from(position as f32 * rope.inv_freq[i]);
        let (c, s) = ((angle.cos() * f64::from(rope.magnitude)), angle.sin() * f64::from(rope.magnitude));
        let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
        head[i] = (a * c - b * s) as f32;
        head[i + half] = (b * c + a * s) as f32;
    }
}
