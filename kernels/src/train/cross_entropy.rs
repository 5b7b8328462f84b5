//! Log-probabilities of chosen tokens, from hidden states, without a `[rows, vocabulary]` tensor.
//!
//! The vocabulary is walked in pieces: a piece of the logits is made, used and forgotten. The derivative makes it again.

use super::Compute;
use super::matmul::Product;
use super::operand::{Block, Operand, View};
use super::rows::Shared;
use crate::error::KernelError;
use crate::ops::{MatrixSource, Store};

/// Tokens of the vocabulary per piece: a multiple of the lines that pack together.
const PIECE: usize = 2048;
/// Rows per piece.
const ROWS: usize = 4096;

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
    fn check(&self, per_row: &[usize]) -> Result<(), KernelError> {
        let rows = self.tokens.len();
        let head = match self.head {
            Block::Values { data, n } => n >= self.vocabulary && data.len() == n * self.width,
            Block::Weight(source) => source.n >= self.vocabulary && source.k == self.width && source.row_order.is_none(),
        };
        let tokens = self.tokens.iter().all(|token| (*token as usize) < self.vocabulary);
        if head && tokens && self.hidden.len() == rows * self.width && per_row.iter().all(|len| *len == rows) {
            return Ok(());
        }
        let detail = format!("{rows} rows of {} over {} tokens", self.width, self.vocabulary);
        Err(KernelError::Shape { op: "log_probs", detail })
    }

    /// Tokens `first..first + n` of the head.
    fn piece(&self, first: usize, n: usize) -> Block<'a> {
        match self.head {
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

impl Compute {
    /// `out[i] = log softmax(scale * hidden[i] headᵀ)[tokens[i]]`; `lse[i]` gets the logarithm of the denominator.
    pub fn log_probs(&mut self, call: LogProbs<'_>, out: &mut [f32], lse: &mut [f32]) -> Result<(), KernelError> {
        call.check(&[out.len(), lse.len()])?;
        for (index, (out, lse)) in out.chunks_mut(ROWS).zip(lse.chunks_mut(ROWS)).enumerate() {
            self.log_probs_of(call.rows(index * ROWS..index * ROWS + out.len()), out, lse)?;
        }
        Ok(())
    }

    fn log_probs_of(&mut self, call: LogProbs<'_>, out: &mut [f32], lse: &mut [f32]) -> Result<(), KernelError> {
        let rows = call.tokens.len();
        let mut logits = vec![0.0; rows * PIECE.min(call.vocabulary)];
        // Largest logit so far and the sum of exponentials relative to it.
        lse.fill(f32::NEG_INFINITY);
        let mut totals = vec![0.0; rows];
        for first in (0..call.vocabulary).step_by(PIECE) {
            let n = self.logits(&call, first, &mut logits)?;
            let ops = self.rows;
            let (out, lse, totals, logits) = (Shared::new(out), Shared::new(lse), Shared::new(&mut totals), &logits);
            self.each_row(rows, |row| {
                // SAFETY: one element of each per row.
                let (out, max, total) = unsafe { (out.range(row..row + 1), lse.range(row..row + 1), totals.range(row..row + 1)) };
                let logits = &logits[row * n..][..n];
                (max[0], total[0]) = ops.log_sum(logits, (max[0], total[0]));
                if let Some(logit) = (call.tokens[row] as usize).checked_sub(first).and_then(|at| logits.get(at)) {
                    out[0] = *logit;
                }
            })?;
        }
        for ((out, lse), total) in out.iter_mut().zip(lse).zip(&totals) {
            *lse += total.ln();
            *out -= *lse;
        }
        Ok(())
    }

    /// The derivatives of [`Self::log_probs`] for the derivatives `dout [rows]` of its results: along `hidden`, stored to `dhidden`, and
    /// along the head, added to `dhead [vocabulary, width]` when that is wanted. `lse` is what the call gave.
    pub fn log_probs_back(
        &mut self,
        call: LogProbs<'_>,
        lse: &[f32],
        dout: &[f32],
        dhidden: &mut [f32],
        mut dhead: Option<&mut [f32]>,
    ) -> Result<(), KernelError> {
        call.check(&[lse.len(), dout.len()])?;
        let head_fits = dhead.as_ref().is_none_or(|dhead| dhead.len() >= call.vocabulary * call.width);
        if dhidden.len() != call.hidden.len() || !head_fits {
            return Err(KernelError::Shape { op: "log_probs_back", detail: "derivatives of another size".to_owned() });
        }
        for (index, dhidden) in dhidden.chunks_mut(ROWS * call.width.max(1)).enumerate() {
            let rows = index * ROWS..index * ROWS + dhidden.len() / call.width;
            let (lse, dout) = (&lse[rows.clone()], &dout[rows.clone()]);
            self.log_probs_back_of(call.rows(rows), lse, dout, dhidden, dhead.as_deref_mut())?;
        }
        Ok(())
    }

    fn log_probs_back_of(
        &mut self,
        call: LogProbs<'_>,
        lse: &[f32],
        dout: &[f32],
        dhidden: &mut [f32],
        mut dhead: Option<&mut [f32]>,
    ) -> Result<(), KernelError> {
        let (rows, width, ops) = (call.tokens.len(), call.width, self.rows);
        let mut logits = vec![0.0; rows * PIECE.min(call.vocabulary)];
        for first in (0..call.vocabulary).step_by(PIECE) {
            let n = self.logits(&call, first, &mut logits)?;
            let shared = Shared::new(&mut logits);
            self.each_row(rows, |row| {
                // SAFETY: rows are disjoint.
                let logits = unsafe { shared.range(row * n..(row + 1) * n) };
                ops.log_prob_back(logits, lse[row], dout[row]);
                if let Some(logit) = (call.tokens[row] as usize).checked_sub(first).and_then(|at| logits.get_mut(at)) {
                    *logit += dout[row];
                }
            })?;
            let along_logits = View::Rows { data: &logits, stride: n };
            let store = if first == 0 { Store::Replace } else { Store::Add };
            let piece = [call.piece(first, n)];
            let right = Operand::Stack(&piece);
            let back = Product { m: rows, n: width, k: n, left: along_logits, right, scale: call.scale, store };
            self.matmul(&back, dhidden, width)?;
            if let Some(dhead) = dhead.as_deref_mut() {
                let left = View::Columns { data: &logits, stride: n };
                let right = Operand::View(View::Rows { data: call.hidden, stride: width });
                let weight = Product { m: n, n: width, k: rows, left, right, scale: call.scale, store: Store::Add };
                self.matmul(&weight, &mut dhead[first * width..(first + n) * width], width)?;
            }
        }
        Ok(())
    }

    /// Logits of a piece of the vocabulary, `[rows, n]`; returns `n`.
    fn logits(&mut self, call: &LogProbs<'_>, first: usize, out: &mut [f32]) -> Result<usize, KernelError> {
        let n = (call.vocabulary - first).min(PIECE);
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
        self.matmul(&product, out, n)?;
        Ok(n)
    }
}
