//! Log-probabilities of chosen tokens, from hidden states, without a `[rows, vocabulary]` tensor.
//!
//! The vocabulary is walked in pieces: a piece of the logits is made, used and forgotten. A log-probability's derivative along its hidden
//! state is the token's row of the head minus the mean of all rows under the softmax, so it collects in the same walk, relative to the
//! largest logit so far (as attention does with its values; Milakov & Gimelshein 2018). The derivative along the head, for trainings that
//! change it, is another walk: it needs probabilities, and so the whole sum first.

use super::Compute;
use super::matmul::Product;
use super::operand::{Block, Operand, View, decode};
use super::rows::Shared;
use crate::aligned::AlignedBuf;
use crate::error::KernelError;
use crate::ops::{MatrixSource, Store};

/// Logits per piece, about: they stay in the second-level cache.
const PIECE: usize = 1 << 20;
/// Fewest tokens of the vocabulary per piece, and what their number is a multiple of: the lines that pack together.
const TOKENS: usize = 256;
/// Most tokens of a piece.
const MOST_TOKENS: usize = 2048;
/// Rows per piece.
const ROWS: usize = 2048;

/// Which tokens' log-probabilities are wanted: of row `i` of `hidden`, that of `tokens[i]`.
#[derive(Clone, Copy)]
pub struct LogProbs<'a> {
    /// `[rows, width]`, after the final norm.
    pub hidden: &'a [f32],
    /// Elements of a row.
    pub width: usize,
    /// `[vocabulary, width]`
    pub head: Block<'a>,
    /// Rows of the head that are tokens.
    pub vocabulary: usize,
    /// `[rows]`
    pub tokens: &'a [u32],
    /// Logits are multiplied by this: one over the temperature.
    pub scale: f32,
}

impl<'a> LogProbs<'a> {
    fn check(&self, out: usize, sums: Option<usize>, slopes: Option<usize>) -> Result<(), KernelError> {
        let rows = self.tokens.len();
        let head = match self.head {
            Block::Values { data, n } => n >= self.vocabulary && data.len() == n * self.width,
            Block::Weight(source) => source.n >= self.vocabulary && source.k == self.width && source.row_order.is_none(),
            Block::Corner { .. } => false,
        };
        let tokens = self.tokens.iter().all(|token| (*token as usize) < self.vocabulary);
        let sizes = self.hidden.len() == rows * self.width && slopes.is_none_or(|slopes| slopes == rows * self.width);
        if head && tokens && sizes && out == rows && sums.is_none_or(|sums| sums == rows) {
            return Ok(());
        }
        let detail = format!("{rows} rows of {} over {} tokens", self.width, self.vocabulary);
        Err(KernelError::Shape { op: "log_probs", detail })
    }

    /// Tokens `first..first + n` of the head.
    fn piece(&self, first: usize, n: usize) -> Block<'a> {
        match self.head {
            // Refused by the check.
            Block::Corner { .. } => self.head,
            Block::Values { data, .. } => Block::Values { data: &data[first * self.width..][..n * self.width], n },
            Block::Weight(source) => {
                let row = source.format.row_bytes(source.k).unwrap_or(0);
                Block::Weight(MatrixSource { n, data: &source.data[first * row..][..n * row], ..source })
            }
        }
    }

    fn rows(&self, rows: std::ops::Range<usize>) -> LogProbs<'a> {
        LogProbs { hidden: &self.hidden[rows.start * self.width..rows.end * self.width], tokens: &self.tokens[rows], ..*self }
    }
}

/// Tokens of the vocabulary per piece for so many rows, and the stride of a row of logits.
fn walk(rows: usize) -> (usize, usize) {
    let tokens = (PIECE / rows.max(1) / TOKENS * TOKENS).clamp(TOKENS, MOST_TOKENS);
    // Rows a power of two apart would share a few sets of the cache.
    (tokens, tokens + 16)
}

impl Compute {
    /// `out[i] = log softmax(scale * hidden[i] headᵀ)[tokens[i]]`. Where they are wanted, `sums [rows]` gets log Σ exp of the logits, and
    /// row `i` of `slopes [rows, width]` the derivative of `out[i]` along `hidden[i]`.
    pub fn log_probs(
        &mut self,
        call: LogProbs<'_>,
        out: &mut [f32],
        mut sums: Option<&mut [f32]>,
        mut slopes: Option<&mut [f32]>,
    ) -> Result<(), KernelError> {
        let lengths = [&sums, &slopes].map(|values| values.as_ref().map(|values| values.len()));
        call.check(out.len(), lengths[0], lengths[1])?;
        for (index, out) in out.chunks_mut(ROWS).enumerate() {
            let rows = index * ROWS..index * ROWS + out.len();
            let slopes = slopes.as_mut().map(|slopes| &mut slopes[rows.start * call.width..rows.end * call.width]);
            let sums = sums.as_mut().map(|sums| &mut sums[rows.clone()]);
            let mut logits = std::mem::replace(&mut self.logits, AlignedBuf::zeroed(0, "logits")?);
            let done = self.log_probs_of(call.rows(rows), out, sums, slopes, &mut logits);
            self.logits = logits;
            done?;
        }
        Ok(())
    }

    /// The derivative of `Σ dout[i] · out[i]` of [`Self::log_probs`] along the head, stored to `dhead [vocabulary, width]`; `sums` is what
    /// that call gave. With p the softmax of row i, row t of it is `scale · Σ dout[i] (1{t = tokens[i]} − p[t]) hidden[i]`.
    pub fn log_probs_back_head(
        &mut self,
        call: LogProbs<'_>,
        sums: &[f32],
        dout: &[f32],
        dhead: &mut [f32],
    ) -> Result<(), KernelError> {
        call.check(dout.len(), Some(sums.len()), None)?;
        if dhead.len() != call.vocabulary * call.width {
            let detail = format!("{} values for [{}, {}]", dhead.len(), call.vocabulary, call.width);
            return Err(KernelError::Shape { op: "log_probs_back_head", detail });
        }
        if dout.is_empty() {
            dhead.fill(0.0);
        }
        for (index, dout) in dout.chunks(ROWS).enumerate() {
            let rows = index * ROWS..index * ROWS + dout.len();
            let store = if index == 0 { Store::Replace } else { Store::Add };
            let mut logits = std::mem::replace(&mut self.logits, AlignedBuf::zeroed(0, "logits")?);
            let done = self.back_head_of(call.rows(rows.clone()), &sums[rows], dout, dhead, store, &mut logits);
            self.logits = logits;
            done?;
        }
        Ok(())
    }

    fn back_head_of(
        &mut self,
        call: LogProbs<'_>,
        sums: &[f32],
        dout: &[f32],
        dhead: &mut [f32],
        store: Store,
        logits: &mut AlignedBuf<f32>,
    ) -> Result<(), KernelError> {
        let (rows, width, ops) = (call.tokens.len(), call.width, self.rows);
        let (tokens, stride) = walk(rows);
        if logits.len() < rows * stride {
            *logits = AlignedBuf::zeroed(rows * stride, "logits")?;
        }
        for first in (0..call.vocabulary).step_by(tokens) {
            let n = (call.vocabulary - first).min(tokens);
            self.logits_of(call, first, n, logits, stride)?;
            let shared = Shared::new(logits);
            self.each_row(rows, |row| {
                // SAFETY: rows are disjoint.
                let logits = unsafe { shared.range(row * stride..row * stride + n) };
                let factor = call.scale * dout[row];
                ops.exp_scale(logits, sums[row], -factor);
                if let Some(own) = (call.tokens[row] as usize).checked_sub(first).and_then(|at| logits.get_mut(at)) {
                    *own += factor;
                }
            })?;
            let product = Product {
                m: n,
                n: width,
                k: rows,
                left: View::Columns { data: logits, stride },
                right: Operand::View(View::Rows { data: call.hidden, stride: width }),
                scale: 1.0,
                store,
            };
            self.matmul(&product, &mut dhead[first * width..(first + n) * width], width)?;
        }
        Ok(())
    }

    /// Logits of tokens `first..first + n`, `[rows, n]` at `stride`.
    fn logits_of(
        &mut self,
        call: LogProbs<'_>,
        first: usize,
        n: usize,
        logits: &mut AlignedBuf<f32>,
        stride: usize,
    ) -> Result<(), KernelError> {
        let piece = [call.piece(first, n)];
        let product = Product {
            m: call.tokens.len(),
            n,
            k: call.width,
            left: View::Rows { data: call.hidden, stride: call.width },
            right: Operand::StackT(&piece),
            scale: call.scale,
            store: Store::Replace,
        };
        self.matmul(&product, logits, stride)
    }

    fn log_probs_of(
        &mut self,
        call: LogProbs<'_>,
        out: &mut [f32],
        sums: Option<&mut [f32]>,
        mut slopes: Option<&mut [f32]>,
        logits: &mut AlignedBuf<f32>,
    ) -> Result<(), KernelError> {
        let (rows, width, ops, level) = (call.tokens.len(), call.width, self.rows, self.kernel.level());
        let (tokens, stride) = walk(rows);
        if logits.len() < rows * stride {
            *logits = AlignedBuf::zeroed(rows * stride, "logits")?;
        }
        // Largest logit so far and the sum of exponentials relative to it.
        let (mut largest, mut totals) = (vec![f32::NEG_INFINITY; rows], vec![0.0; rows]);
        for first in (0..call.vocabulary).step_by(tokens) {
            let n = (call.vocabulary - first).min(tokens);
            self.logits_of(call, first, n, logits, stride)?;
            let shared = [Shared::new(out), Shared::new(&mut largest), Shared::new(&mut totals), Shared::new(logits)];
            let collected = slopes.as_mut().map(|slopes| Shared::new(slopes));
            self.each_row(rows, |row| {
                // SAFETY: one element of each per row, and rows are disjoint.
                let [out, max, total] = [0, 1, 2].map(|i| unsafe { shared[i].range(row..row + 1) });
                // SAFETY: as above.
                let logits = unsafe { shared[3].range(row * stride..row * stride + n) };
                if let Some(logit) = (call.tokens[row] as usize).checked_sub(first).and_then(|at| logits.get(at)) {
                    out[0] = *logit;
                }
                let before = max[0];
                match &collected {
                    None => (max[0], total[0]) = ops.log_sum(logits, (before, total[0])),
                    Some(collected) => {
                        (max[0], total[0]) = ops.exp_sum(logits, (before, total[0]));
                        if max[0] > before && first > 0 {
                            // SAFETY: as above.
                            ops.scale(unsafe { collected.range(row * width..(row + 1) * width) }, (before - max[0]).exp());
                        }
                    }
                }
            })?;
            if let Some(slopes) = slopes.as_deref_mut() {
                let store = if first == 0 { Store::Replace } else { Store::Add };
                let piece = [call.piece(first, n)];
                let (left, right) = (View::Rows { data: logits, stride }, Operand::Stack(&piece));
                self.matmul(&Product { m: rows, n: width, k: n, left, right, scale: 1.0, store }, slopes, width)?;
            }
        }
        for (largest, total) in largest.iter_mut().zip(&totals) {
            *largest += total.ln();
        }
        out.iter_mut().zip(&largest).for_each(|(out, sum)| *out -= sum);
        if let Some(sums) = sums {
            sums.copy_from_slice(&largest);
        }
        if let Some(slopes) = slopes {
            let slopes = Shared::new(slopes);
            let head = [call.head];
            self.threads.run(&[rows], |_, row, scratch| {
                // SAFETY: rows are disjoint.
                let slope = unsafe { slopes.range(row * width..(row + 1) * width) };
                let own = scratch.scores.row(width);
                let token = call.tokens[row] as usize;
                // SAFETY: the level is the processor's; the token was checked.
                unsafe { decode(level, &head, width, token..token + 1, 0..width, own, width) };
                let total = totals[row];
                slope.iter_mut().zip(own).for_each(|(slope, own)| *slope = call.scale * (*own - *slope / total));
            })?;
        }
        Ok(())
    }
}
