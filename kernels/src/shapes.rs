//! Shapes of everything a backend holds, and the checks of the step operations: one place, so that backends agree on what fits.
//!
//! All checks happen when an operation is enqueued. What passes them cannot index out of bounds later, which is what lets the
//! backends' inner loops go without checks.

mod experts;

use crate::error::KernelError;
use crate::ops::*;

/// What is known of handles and of the current step.
#[derive(Debug)]
pub struct Shapes {
    limits: Limits,
    buffers: Vec<(Rows, usize)>,
    matrices: Vec<(usize, usize)>,
    vectors: Vec<usize>,
    ropes: Vec<usize>,
    caches: Vec<KvSpec>,
    /// `(n, k, experts)`
    experts: Vec<(usize, usize, usize)>,
    /// And whether the step's tokens have been routed.
    routings: Vec<(RoutingShape, bool)>,
    /// For each slot, for each site that is updated: input width, and the columns that the output must have.
    adapters: Vec<Vec<Option<(usize, usize)>>>,
    /// Slots that the step uses.
    used: Vec<u32>,
    step: Option<Extent>,
    /// Slots of a step, sorted.
    slots: Vec<i64>,
    /// Places of the swap memory.
    swap: usize,
    /// Of the step that was submitted last: for each of its samples whether it is drawn, and not scored.
    drawn: Vec<bool>,
    /// Tokens that it could draw.
    vocabulary: usize,
}

/// Largest values in the step's lists.
#[derive(Debug)]
struct Extent {
    tokens: usize,
    samples: usize,
    max_token: usize,
    max_slot: i64,
    /// Caches whose block tables were found good.
    checked: u64,
}

/// Adapters at once; a limit on what a wrong slot number may cost.
const MAX_SLOTS: u32 = 1 << 16;

fn shape<T>(op: &'static str, detail: String) -> Result<T, KernelError> {
    Err(KernelError::Shape { op, detail })
}

fn equal(op: &'static str, what: &str, got: usize, want: usize) -> Result<(), KernelError> {
    if got == want { Ok(()) } else { shape(op, format!("{what} is {got}, should be {want}")) }
}

fn find<T: Copy>(op: &'static str, what: &str, list: &[T], handle: u32) -> Result<T, KernelError> {
    match list.get(handle as usize) {
        Some(&item) => Ok(item),
        None => shape(op, format!("no {what} has the handle {handle}")),
    }
}

impl Shapes {
    /// Nothing held yet.
    pub fn new(limits: Limits) -> Self {
        Shapes {
            limits,
            buffers: Vec::new(),
            matrices: Vec::new(),
            vectors: Vec::new(),
            ropes: Vec::new(),
            caches: Vec::new(),
            experts: Vec::new(),
            routings: Vec::new(),
            adapters: Vec::new(),
            used: Vec::new(),
            step: None,
            slots: Vec::with_capacity(limits.max_tokens),
            swap: 0,
            drawn: Vec::with_capacity(limits.max_samples),
            vocabulary: 0,
        }
    }

    /// The largest step.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Checks sources to be stacked: one `k`, whole blocks, data and row order of the right length. Returns `(n, k)`.
    pub fn stacked(sources: &[MatrixSource<'_>]) -> Result<(usize, usize), KernelError> {
        let Some(first) = sources.first() else {
            return Err(KernelError::Weight("no sources".into()));
        };
        let mut n = 0usize;
        for s in sources {
            equal("load_matrix", "input width of a stacked source", s.k, first.k)?;
            let Some(row) = s.format.row_bytes(s.k) else {
                return Err(KernelError::Weight(format!("{} input features are not whole blocks of {:?}", s.k, s.format)));
            };
            if s.n == 0 || s.k == 0 || s.n.checked_mul(row) != Some(s.data.len()) {
                let detail = format!("{} × {} in {:?} do not take {} bytes", s.n, s.k, s.format, s.data.len());
                return Err(KernelError::Weight(detail));
            }
            if let Some(order) = s.row_order
                && (order.len() != s.n || order.iter().any(|&r| r as usize >= s.n))
            {
                return Err(KernelError::Weight(format!("the row order does not fit {} rows", s.n)));
            }
            n = n.checked_add(s.n).ok_or_else(|| KernelError::Weight("too many rows".into()))?;
        }
        Ok((n, first.k))
    }

    /// Registers a matrix `[n, k]`.
    pub fn add_matrix(&mut self, n: usize, k: usize) -> Matrix {
        self.matrices.push((n, k));
        Matrix(self.matrices.len() as u32 - 1)
    }

    /// Registers a vector.
    pub fn add_vector(&mut self, len: usize) -> Vector {
        self.vectors.push(len);
        Vector(self.vectors.len() as u32 - 1)
    }

    /// Registers a rope of `half` pairs.
    pub fn add_rope(&mut self, half: usize) -> Rope {
        self.ropes.push(half);
        Rope(self.ropes.len() as u32 - 1)
    }

    /// Registers a buffer.
    pub fn add_buffer(&mut self, rows: Rows, width: usize) -> Result<Buf, KernelError> {
        if width == 0 {
            return shape("alloc", "the width is 0".into());
        }
        self.buffers.push((rows, width));
        Ok(Buf(self.buffers.len() as u32 - 1))
    }

    /// Registers a cache.
    pub fn add_cache(&mut self, spec: KvSpec) -> Result<KvCache, KernelError> {
        let sizes = [spec.layers, spec.blocks, spec.block_size, spec.kv_heads, spec.head_dim];
        if sizes.contains(&0) || !spec.head_dim.is_multiple_of(2) || spec.blocks > u32::MAX as usize || self.caches.len() == 64 {
            return shape("alloc_kv", format!("{spec:?} is not a cache"));
        }
        self.caches.push(spec);
        Ok(KvCache(self.caches.len() as u32 - 1))
    }

    /// Registers places of the swap memory for a cache; returns its shape.
    pub fn add_swap(&mut self, kv: KvCache, places: usize) -> Result<KvSpec, KernelError> {
        const OP: &str = "alloc_swap";
        let cache = find(OP, "cache", &self.caches, kv.0)?;
        if self.swap > 0 || places > u32::MAX as usize {
            return shape(OP, format!("{places} places beside {}", self.swap));
        }
        self.swap = places;
        Ok(cache)
    }

    /// The swap memory could not be reserved.
    pub fn remove_swap(&mut self) {
        self.swap = 0;
    }

    /// The step was submitted: the next one may carry on from what it draws of `vocabulary` tokens.
    pub fn submitted(&mut self, batch: &StepBatch, vocabulary: usize) {
        self.vocabulary = vocabulary;
        self.drawn.clear();
        if vocabulary > 0 {
            self.drawn.extend(batch.samples.iter().map(|sample| sample.score.is_none()));
        }
    }

    /// Checks an adapter's updates and registers it.
    pub fn add_adapter(&mut self, slot: u32, sites: &[Vec<LowRank<'_>>]) -> Result<(), KernelError> {
        const OP: &str = "load_adapter";
        if slot >= MAX_SLOTS {
            return Err(KernelError::Limit(format!("adapter slot {slot}; there are {MAX_SLOTS}")));
        }
        let mut registered = Vec::with_capacity(sites.len());
        for (i, parts) in sites.iter().enumerate() {
            let mut site: Option<(usize, usize)> = None;
            for part in parts {
                let &LowRank { column, n, k, rank, a, b, .. } = part;
                let sizes = [Some(a.len()), Some(b.len())];
                if n == 0 || k == 0 || rank == 0 || [rank.checked_mul(k), n.checked_mul(rank)] != sizes {
                    return shape(
                        OP,
                        format!("factors of {} and {} numbers at site {i}: {rank} × {k}, {n} × {rank}", a.len(), b.len()),
                    );
                }
                let columns = column.checked_add(n).ok_or_else(|| KernelError::Weight("too many columns".into()))?;
                let (known, most) = site.unwrap_or((k, 0));
                equal(OP, "input width of a site's part", k, known)?;
                site = Some((k, most.max(columns)));
            }
            // Several parts of a site may be added at once.
            let mut columns: Vec<_> = parts.iter().map(|part| (part.column, part.column + part.n)).collect();
            columns.sort_unstable();
            if let Some(two) = columns.windows(2).find(|two| two[1].0 < two[0].1) {
                return shape(OP, format!("two parts of site {i} update column {}", two[1].0));
            }
            registered.push(site);
        }
        let slot = slot as usize;
        if self.adapters.len() <= slot {
            self.adapters.resize_with(slot + 1, Vec::new);
        }
        self.adapters[slot] = registered;
        Ok(())
    }

    /// Forgets an adapter.
    pub fn remove_adapter(&mut self, slot: u32) {
        if let Some(sites) = self.adapters.get_mut(slot as usize) {
            sites.clear();
        }
    }

    /// Rows that a buffer of this kind has at most.
    pub fn capacity(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.limits.max_tokens,
            Rows::Samples => self.limits.max_samples,
            Rows::Routed { each } => self.limits.max_tokens.saturating_mul(each),
        }
    }

    /// Rows of this kind in the current step.
    pub fn count(&self, rows: Rows) -> usize {
        match (&self.step, rows) {
            (Some(step), Rows::Tokens) => step.tokens,
            (Some(step), Rows::Samples) => step.samples,
            (Some(step), Rows::Routed { each }) => step.tokens * each,
            (None, _) => 0,
        }
    }

    /// Valid rows and width of a buffer, or an error for a handle from elsewhere.
    pub fn buffer(&self, op: &'static str, buf: Buf) -> Result<(Rows, usize), KernelError> {
        find(op, "buffer", &self.buffers, buf.0)
    }

    /// Takes a step's metadata in.
    pub fn begin(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        self.step = None;
        self.routings.iter_mut().for_each(|(_, routed)| *routed = false);
        let extent = self.extent(batch);
        self.drawn.clear();
        let extent = extent?;
        // Two rows that write one slot would race.
        self.slots.clear();
        self.slots.extend(batch.slots.iter().copied().filter(|&slot| slot >= 0));
        self.slots.sort_unstable();
        if let Some(pair) = self.slots.windows(2).find(|pair| pair[0] == pair[1]) {
            return shape("begin", format!("two rows write slot {}", pair[0]));
        }
        self.used.clear();
        self.used.extend(batch.adapters.iter().copied().filter(|&slot| slot != NO_ADAPTER));
        self.used.sort_unstable();
        self.used.dedup();
        let empty = |slot: &&u32| self.adapters.get(**slot as usize).is_none_or(Vec::is_empty);
        if let Some(slot) = self.used.iter().find(empty) {
            return shape("begin", format!("a row uses adapter slot {slot}, which is empty"));
        }
        self.step = Some(extent);
        Ok(())
    }

    fn extent(&self, batch: &StepBatch) -> Result<Extent, KernelError> {
        const OP: &str = "begin";
        let tokens = batch.tokens.len();
        let Limits { max_tokens, max_samples, max_positions } = self.limits;
        if tokens > max_tokens || batch.samples.len() > max_samples {
            let have = format!("{tokens} tokens and {} samples", batch.samples.len());
            return Err(KernelError::Limit(format!("{have}; planned for {max_tokens} and {max_samples}")));
        }
        equal(OP, "positions", batch.positions.len(), tokens)?;
        equal(OP, "slots", batch.slots.len(), tokens)?;
        if !batch.adapters.is_empty() {
            equal(OP, "adapters", batch.adapters.len(), tokens)?;
        }
        let mut row = 0usize;
        for (i, s) in batch.sequences.iter().enumerate() {
            let last = row + s.rows as usize;
            if s.first_row as usize != row || s.rows == 0 || last > tokens || s.context_len < s.rows {
                return shape(OP, format!("sequence {i} is {s:?}; it should start at row {row} of {tokens}"));
            }
            let first_position = s.context_len - s.rows;
            let consecutive = batch.positions[row..last].iter().zip(first_position..).all(|(&p, want)| p == want);
            if !consecutive {
                return shape(OP, format!("positions of sequence {i} do not run from {first_position}"));
            }
            if s.context_len as usize > max_positions {
                return Err(KernelError::Limit(format!("position {}; planned for {max_positions}", s.context_len - 1)));
            }
            row = last;
        }
        equal(OP, "rows of all sequences", row, tokens)?;
        for (i, s) in batch.samples.iter().enumerate() {
            let fits = |range: &std::ops::Range<u32>, len: usize| range.start <= range.end && range.end as usize <= len;
            if s.row as usize >= tokens || !fits(&s.history, batch.history.len()) || !fits(&s.bias, batch.bias.len()) {
                return shape(OP, format!("sample {i} names rows, history or bias outside the step"));
            }
        }
        for &(from, to) in &batch.copies {
            if self.caches.iter().any(|c| from.max(to) as usize >= c.blocks) {
                return shape(OP, format!("copy of block {from} to {to} is outside the cache"));
            }
        }
        let swaps = batch.saved.iter().copied().chain(batch.restored.iter().map(|&(place, block)| (block, place)));
        for (block, place) in swaps {
            if place as usize >= self.swap || self.caches.iter().any(|c| block as usize >= c.blocks) {
                return shape(OP, format!("block {block} and place {place} of {} are not both there", self.swap));
            }
        }
        for &(row, sample) in &batch.carried {
            if row as usize >= tokens || self.drawn.get(sample as usize) != Some(&true) {
                let detail =
                    format!("row {row} of {tokens} is to have the token of sample {sample}, which the step before does not draw");
                return shape(OP, detail);
            }
        }
        let most_carried = if batch.carried.is_empty() { 0 } else { self.vocabulary - 1 };
        let most_named = batch.tokens.iter().copied().max().unwrap_or(0) as usize;
        Ok(Extent {
            tokens,
            samples: batch.samples.len(),
            max_token: most_named.max(most_carried),
            max_slot: batch.slots.iter().copied().max().unwrap_or(-1),
            checked: 0,
        })
    }

    fn step(&self, op: &'static str) -> Result<&Extent, KernelError> {
        self.step.as_ref().map_or_else(|| shape(op, "no step was begun".into()), Ok)
    }

    /// Both buffers exist, are different, and have rows of one kind. Returns their widths.
    fn pair(&self, op: &'static str, x: Buf, out: Buf) -> Result<(usize, usize), KernelError> {
        let ((x_rows, x_width), (out_rows, out_width)) = (self.buffer(op, x)?, self.buffer(op, out)?);
        if x == out {
            return shape(op, "input and output are one buffer".into());
        }
        if x_rows != out_rows {
            return shape(op, format!("input has a row per {x_rows:?}, output per {out_rows:?}"));
        }
        Ok((x_width, out_width))
    }

    /// See [`Ops::embedding`].
    pub fn embedding(&self, table: Matrix, out: Buf) -> Result<(), KernelError> {
        const OP: &str = "embedding";
        let step = self.step(OP)?;
        let (n, k) = find(OP, "matrix", &self.matrices, table.0)?;
        let (rows, width) = self.buffer(OP, out)?;
        equal(OP, "output width", width, k)?;
        if rows != Rows::Tokens {
            return shape(OP, "output has a row per sample".into());
        }
        if step.max_token >= n {
            return shape(OP, format!("token {} in a table of {n}", step.max_token));
        }
        Ok(())
    }

    /// See [`Ops::embedding_shard`].
    pub fn embedding_shard(&self, table: Matrix, out: Buf) -> Result<(), KernelError> {
        const OP: &str = "embedding_shard";
        self.step(OP)?;
        let (_, k) = find(OP, "matrix", &self.matrices, table.0)?;
        let (rows, width) = self.buffer(OP, out)?;
        equal(OP, "output width", width, k)?;
        if rows != Rows::Tokens {
            return shape(OP, "output has a row per sample".into());
        }
        Ok(())
    }

    /// See [`Ops::all_reduce`].
    pub fn all_reduce(&self, x: Buf) -> Result<(), KernelError> {
        const OP: &str = "all_reduce";
        self.step(OP)?;
        self.buffer(OP, x).map(|_| ())
    }

    /// See [`Ops::all_gather`].
    pub fn all_gather(&self, x: Buf, out: Buf, ranks: usize) -> Result<(), KernelError> {
        const OP: &str = "all_gather";
        self.step(OP)?;
        let (x_width, out_width) = self.pair(OP, x, out)?;
        equal(OP, "output width", out_width, ranks * x_width)
    }

    /// See [`Ops::rms_norm`], [`Ops::rms_norm_add`] and [`Ops::layer_norm`]; `op` is which of them.
    pub fn norm(&self, op: &'static str, x: Buf, weight: Vector, out: Buf) -> Result<(), KernelError> {
        self.step(op)?;
        let (x_width, out_width) = self.pair(op, x, out)?;
        equal(op, "output width", out_width, x_width)?;
        equal(op, "weight", find(op, "vector", &self.vectors, weight.0)?, x_width)
    }

    /// See [`Ops::clamp`].
    pub fn clamp(&self, x: Buf, limit: f32) -> Result<(), KernelError> {
        const OP: &str = "clamp";
        self.step(OP)?;
        self.buffer(OP, x)?;
        // A limit that is no number, too.
        if limit >= 0.0 { Ok(()) } else { shape(OP, format!("the limit is {limit}, should not be below 0")) }
    }

    /// See [`Ops::scale`].
    pub fn scale(&self, x: Buf) -> Result<(), KernelError> {
        const OP: &str = "scale";
        self.step(OP)?;
        self.buffer(OP, x).map(|_| ())
    }

    /// See [`Ops::soft_cap`].
    pub fn soft_cap(&self, x: Buf, cap: f32) -> Result<(), KernelError> {
        const OP: &str = "soft_cap";
        self.step(OP)?;
        self.buffer(OP, x)?;
        if cap > 0.0 { Ok(()) } else { shape(OP, format!("the cap is {cap}, should be above 0")) }
    }

    /// See [`Ops::linear`].
    pub fn linear(&self, x: Buf, w: Matrix, bias: Option<Vector>, out: Buf) -> Result<(), KernelError> {
        const OP: &str = "linear";
        self.step(OP)?;
        let (n, k) = find(OP, "matrix", &self.matrices, w.0)?;
        let (x_width, out_width) = self.pair(OP, x, out)?;
        equal(OP, "input width", x_width, k)?;
        equal(OP, "output width", out_width, n)?;
        match bias {
            Some(bias) => equal(OP, "bias", find(OP, "vector", &self.vectors, bias.0)?, n),
            None => Ok(()),
        }
    }

    /// See [`Ops::lora`]. `false` when no adapter of the step updates the site.
    pub fn lora(&self, x: Buf, site: usize, out: Buf) -> Result<bool, KernelError> {
        const OP: &str = "lora";
        self.step(OP)?;
        let (x_width, out_width) = self.pair(OP, x, out)?;
        if self.buffer(OP, x)?.0 != Rows::Tokens {
            return shape(OP, "input has a row per sample".into());
        }
        let mut any = false;
        for &slot in &self.used {
            let Some(&Some((k, columns))) = self.adapters.get(slot as usize).and_then(|sites| sites.get(site)) else { continue };
            equal(OP, "input width", x_width, k)?;
            if columns > out_width {
                return shape(OP, format!("updates column {} of {out_width}", columns - 1));
            }
            any = true;
        }
        Ok(any)
    }

    /// The checks of both operations on a layer of the cache.
    fn heads(&mut self, op: &'static str, qkv: Buf, s: HeadShape, kv: KvCache, layer: usize) -> Result<(), KernelError> {
        let cache = find(op, "cache", &self.caches, kv.0)?;
        self.step(op)?;
        if s.kv_heads == 0 || s.heads == 0 || !s.heads.is_multiple_of(s.kv_heads) {
            return shape(op, format!("{} query heads on {} key-value heads", s.heads, s.kv_heads));
        }
        equal(op, "key-value heads", s.kv_heads, cache.kv_heads)?;
        equal(op, "head width", s.head_dim, cache.head_dim)?;
        let (rows, width) = self.buffer(op, qkv)?;
        equal(op, "width of qkv", width, (s.heads + 2 * s.kv_heads) * s.head_dim)?;
        if rows != Rows::Tokens {
            return shape(op, "qkv has a row per sample".into());
        }
        if layer >= cache.layers {
            return shape(op, format!("layer {layer} of {}", cache.layers));
        }
        Ok(())
    }

    /// See [`Ops::rope_cache`].
    pub fn rope_cache(
        &mut self,
        qkv: Buf,
        shape_: HeadShape,
        norm: Option<&QkNorm>,
        rope: Rope,
        kv: KvCache,
        layer: usize,
    ) -> Result<(), KernelError> {
        const OP: &str = "rope_cache";
        self.heads(OP, qkv, shape_, kv, layer)?;
        let half = find(OP, "rope", &self.ropes, rope.0)?;
        if 2 * half > shape_.head_dim {
            return shape(OP, format!("{half} rotated pairs in heads of {}", shape_.head_dim));
        }
        if let Some(norm) = norm {
            for v in [norm.q, norm.k] {
                equal(OP, "head norm", find(OP, "vector", &self.vectors, v.0)?, shape_.head_dim)?;
            }
        }
        let cache = find(OP, "cache", &self.caches, kv.0)?;
        let slots = cache.blocks as i64 * cache.block_size as i64;
        let max_slot = self.step(OP)?.max_slot;
        if max_slot >= slots {
            return shape(OP, format!("slot {max_slot} in a cache of {slots}"));
        }
        Ok(())
    }

    /// See [`Ops::paged_attention`].
    pub fn paged_attention(
        &mut self,
        qkv: Buf,
        shape_: HeadShape,
        spec: AttentionSpec,
        kv: KvCache,
        layer: usize,
        out: Buf,
        batch: &StepBatch,
    ) -> Result<(), KernelError> {
        const OP: &str = "paged_attention";
        self.heads(OP, qkv, shape_, kv, layer)?;
        let (_, width) = self.pair(OP, qkv, out)?;
        equal(OP, "output width", width, shape_.heads * shape_.head_dim)?;
        if let Some(slopes) = spec.alibi {
            equal(OP, "slopes", find(OP, "vector", &self.vectors, slopes.0)?, shape_.heads)?;
        }
        let cache = find(OP, "cache", &self.caches, kv.0)?;
        let Some(step) = &mut self.step else { return Ok(()) };
        if step.checked & 1 << kv.0 != 0 {
            return Ok(());
        }
        for (i, s) in batch.sequences.iter().enumerate() {
            let first = s.first_block as usize;
            let used = (s.context_len as usize).div_ceil(cache.block_size);
            let Some(table) = batch.blocks.get(first..).and_then(|list| list.get(..used)) else {
                return shape(OP, format!("sequence {i} needs {used} blocks from entry {first} of {}", batch.blocks.len()));
            };
            if let Some(block) = table.iter().find(|&&b| b as usize >= cache.blocks) {
                return shape(OP, format!("block {block} of sequence {i} in a cache of {}", cache.blocks));
            }
        }
        step.checked |= 1 << kv.0;
        Ok(())
    }

    /// See [`Ops::silu_and_mul`] and [`Ops::gelu_tanh_and_mul`]; `op` is which of them.
    pub fn gated(&self, op: &'static str, gate_up: Buf, out: Buf) -> Result<(), KernelError> {
        self.step(op)?;
        let (x_width, out_width) = self.pair(op, gate_up, out)?;
        equal(op, "input width", x_width, 2 * out_width)
    }

    /// See [`Ops::gelu`].
    pub fn gelu(&self, x: Buf, out: Buf) -> Result<(), KernelError> {
        const OP: &str = "gelu";
        self.step(OP)?;
        let (x_width, out_width) = self.pair(OP, x, out)?;
        equal(OP, "output width", out_width, x_width)
    }

    /// See [`Ops::gather`].
    pub fn gather(&self, x: Buf, out: Buf) -> Result<(), KernelError> {
        const OP: &str = "gather";
        self.step(OP)?;
        let ((x_rows, x_width), (out_rows, out_width)) = (self.buffer(OP, x)?, self.buffer(OP, out)?);
        if x_rows != Rows::Tokens || out_rows != Rows::Samples {
            return shape(OP, format!("takes token rows to sample rows, not {x_rows:?} to {out_rows:?}"));
        }
        equal(OP, "output width", out_width, x_width)
    }

    /// See [`Ops::sample`].
    pub fn sample(&self, logits: Buf, vocabulary: usize, batch: &StepBatch) -> Result<(), KernelError> {
        const OP: &str = "sample";
        self.step(OP)?;
        let (rows, width) = self.buffer(OP, logits)?;
        if rows != Rows::Samples || vocabulary == 0 || vocabulary > width {
            return shape(OP, format!("{vocabulary} tokens in {width} columns with a row per {rows:?}"));
        }
        if let Some(token) = batch.samples.iter().filter_map(|s| s.score).find(|&t| t as usize >= vocabulary) {
            return shape(OP, format!("token {token} to score in a vocabulary of {vocabulary}"));
        }
        Ok(())
    }
}
