//! Log-probabilities of chosen tokens, a piece of the vocabulary at a time; as [`crate::train::Compute::log_probs`].

use super::matmul::{Operand, Product};
use super::params::{TrainLogProbs, TrainLogSum, TrainSoftmaxBack};
use super::{DeviceCompute, Region, Values, fits};
use crate::cuda::device::{Address, Kernel, Launch, Source};
use crate::error::KernelError;
use crate::ops::Store;

const LOG_SUM: Kernel = Kernel::new(Source::TrainRows, "train_log_sum", 256);
const LOG_PROBS: Kernel = Kernel::new(Source::TrainRows, "train_log_probs", 256);
const SOFTMAX_BACK: Kernel = Kernel::new(Source::TrainRows, "train_softmax_back", 256);

/// A number for each warp of a block.
const WARPS: usize = 8 * 4;
/// Rows per piece.
const ROWS: usize = 2048;
/// What the tokens of a piece are a multiple of.
const TOKENS: usize = 128;

/// Which tokens' log-probabilities are wanted: of row `i` of `hidden`, that of `tokens[i]`.
#[derive(Clone, Copy)]
pub struct LogProbs<'a> {
    /// `[rows, width]`, after the final norm.
    pub hidden: Values<'a>,
    /// Elements of a row.
    pub width: usize,
    /// `[vocabulary, width]`, its rows `width` apart.
    pub head: Operand<'a>,
    /// Rows of the head that are tokens.
    pub vocabulary: usize,
    /// `[rows]`
    pub tokens: &'a [u32],
    /// Logits are multiplied by this: one over the temperature.
    pub scale: f32,
}

impl LogProbs<'_> {
    fn check(&self, out: usize, sums: usize, slopes: Option<usize>) -> Result<(), KernelError> {
        let rows = self.tokens.len();
        let head = !self.head.turned && self.head.stride == self.width && self.head.len >= self.vocabulary * self.width;
        let tokens = self.tokens.iter().all(|token| (*token as usize) < self.vocabulary);
        let sizes = self.hidden.len == rows * self.width && slopes.is_none_or(|slopes| slopes == rows * self.width);
        fits("log_probs", head && tokens && sizes && out == rows && sums == rows)
    }
}

/// Some rows of a call, with their tokens on the device and room for a piece of their logits.
struct Walk<'a> {
    call: LogProbs<'a>,
    rows: usize,
    hidden: Values<'a>,
    tokens: &'a Region,
    logits: &'a Region,
    /// Tokens of the vocabulary in a piece.
    each: usize,
}

impl Walk<'_> {
    fn pieces(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (each, vocabulary) = (self.each, self.call.vocabulary);
        (0..vocabulary).step_by(each).map(move |first| (first, (vocabulary - first).min(each)))
    }
}

impl DeviceCompute {
    /// `out[i] = log softmax(scale * hidden[i] headᵀ)[tokens[i]]`, and `sums [rows]` log Σ exp of the logits. Where they are wanted,
    /// row `i` of `slopes [rows, width]` becomes the derivative of `out[i]` along `hidden[i]`.
    pub fn log_probs(
        &mut self,
        call: LogProbs<'_>,
        out: Values<'_>,
        sums: Values<'_>,
        slopes: Option<Values<'_>>,
    ) -> Result<(), KernelError> {
        call.check(out.len, sums.len, slopes.map(Values::len))?;
        self.each_walk(call, |compute, walk, range| {
            let (width, rows) = (walk.call.width, walk.rows);
            let slopes = slopes.map(|slopes| slopes.part(range.start * width..range.end * width));
            let (out, sums) = (out.part(range.clone()), sums.part(range));
            let totals = compute.region(rows)?;
            for (first, n) in walk.pieces() {
                compute.logits(&walk, first, n)?;
                let params = TrainLogSum {
                    logits: walk.logits.all().at,
                    tokens: walk.tokens.all().at,
                    chosen: out.at,
                    largest: sums.at,
                    totals: totals.all().at,
                    slopes: slopes.map_or(Address::NONE, |slopes| slopes.at),
                    stride: walk.each as u32,
                    n: n as u32,
                    first: first as u32,
                    width: width as u32,
                };
                compute.launch(LOG_SUM, Launch::blocks(rows).with_shared(WARPS), params)?;
                if let Some(slopes) = slopes {
                    let store = if first == 0 { Store::Replace } else { Store::Add };
                    let (left, right) = (walk.logits.all().rows(walk.each), walk.call.head.without_lines(first));
                    compute.matmul(&Product { m: rows, n: width, k: n, left, right, scale: 1.0, store }, slopes, width)?;
                }
            }
            let params = TrainLogProbs {
                tokens: walk.tokens.all().at,
                out: out.at,
                largest: sums.at,
                totals: totals.all().at,
                slopes: slopes.map_or(Address::NONE, |slopes| slopes.at),
                head: walk.call.head.at,
                width: width as u32,
                half: walk.call.head.half.into(),
                scale: walk.call.scale,
                unused: 0,
            };
            compute.launch(LOG_PROBS, Launch::blocks(rows), params)
        })
    }

    /// The derivative of `Σ dout[i] · out[i]` along the head, stored to `dhead [vocabulary, width]`; `sums` is what
    /// [`Self::log_probs`] gave.
    pub fn log_probs_back_head(
        &mut self,
        call: LogProbs<'_>,
        sums: Values<'_>,
        dout: Values<'_>,
        dhead: Values<'_>,
    ) -> Result<(), KernelError> {
        call.check(dout.len, sums.len, None)?;
        fits("log_probs_back_head", dhead.len == call.vocabulary * call.width && !call.tokens.is_empty())?;
        self.each_walk(call, |compute, walk, range| {
            let store = if range.start == 0 { Store::Replace } else { Store::Add };
            let (width, rows) = (walk.call.width, walk.rows);
            let (sums, dout) = (sums.part(range.clone()), dout.part(range));
            for (first, n) in walk.pieces() {
                compute.logits(&walk, first, n)?;
                let params = TrainSoftmaxBack {
                    logits: walk.logits.all().at,
                    tokens: walk.tokens.all().at,
                    sums: sums.at,
                    dout: dout.at,
                    stride: walk.each as u32,
                    n: n as u32,
                    first: first as u32,
                    scale: walk.call.scale,
                };
                compute.launch(SOFTMAX_BACK, Launch::blocks(rows), params)?;
                let (left, right) = (walk.logits.all().columns(walk.each), walk.hidden.rows(width));
                let product = Product { m: n, n: width, k: rows, left, right, scale: 1.0, store };
                compute.matmul(&product, dhead.part(first * width..(first + n) * width), width)?;
            }
            Ok(())
        })
    }

    fn each_walk(
        &mut self,
        call: LogProbs<'_>,
        mut work: impl FnMut(&mut Self, Walk<'_>, std::ops::Range<usize>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let count = call.tokens.len();
        for first in (0..count).step_by(ROWS) {
            let range = first..(first + ROWS).min(count);
            let rows = range.len();
            let most = call.vocabulary.next_multiple_of(TOKENS);
            let each = (self.most_logits / rows / TOKENS * TOKENS).clamp(TOKENS, most.max(TOKENS));
            let tokens = self.upload_words(&call.tokens[range.clone()])?;
            // Never less for more rows, as `rows * each` would be at times.
            let logits = self.region((rows * most).min(self.most_logits.max(rows * TOKENS)))?;
            let hidden = call.hidden.part(range.start * call.width..range.end * call.width);
            work(self, Walk { call, rows, hidden, tokens: &tokens, logits: &logits, each }, range)?;
        }
        Ok(())
    }

    /// Logits of tokens `first..first + n`.
    fn logits(&mut self, walk: &Walk<'_>, first: usize, n: usize) -> Result<(), KernelError> {
        let head = walk.call.head.without_lines(first);
        let product = Product {
            m: walk.rows,
            n,
            k: walk.call.width,
            left: walk.hidden.rows(walk.call.width),
            right: Operand { turned: true, ..head },
            scale: walk.call.scale,
            store: Store::Replace,
        };
        self.matmul(&product, walk.logits.all(), walk.each)
    }
}
