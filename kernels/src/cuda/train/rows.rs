//! Operations on rows; formulas stand at those of [`crate::train::Compute`] that have the same names.

use super::attention::Seen;
use super::params::{
    PiecesAt, TrainCopy, TrainDropout, TrainGate, TrainNorm, TrainNormBack, TrainRotate, TrainScale, TrainScatter, TrainSums,
};
use super::{DeviceCompute, Region, Values, fits};
use crate::cuda::device::{Address, Kernel, Launch, Source};
use crate::cuda::params::{AddBias, Gather};
use crate::cuda::rows::fours;
use crate::error::KernelError;
use crate::ops::Store;
use crate::train::{Dropout, Pieces, Rotation};

const NORM: Kernel = Kernel::new(Source::TrainRows, "train_norm", 256);
const NORM_BACK: Kernel = Kernel::new(Source::TrainRows, "train_norm_back", 256);
const SUMS: Kernel = Kernel::new(Source::TrainRows, "train_sums", 256);
const ROTATE: Kernel = Kernel::new(Source::TrainRows, "train_rotate", 256);
const GATE: Kernel = Kernel::new(Source::TrainRows, "train_gate", 256);
const GATE_BACK: Kernel = Kernel::new(Source::TrainRows, "train_gate_back", 256);
const DROPOUT: Kernel = Kernel::new(Source::TrainRows, "train_dropout", 256);
const COPY: Kernel = Kernel::new(Source::TrainRows, "train_copy", 256);
const SCATTER: Kernel = Kernel::new(Source::TrainRows, "train_scatter", 256);
const SCALE: Kernel = Kernel::new(Source::TrainRows, "train_scale", 256);
const GATHER: Kernel = Kernel::new(Source::Rows, "gather", 256);
const ADD_BIAS: Kernel = Kernel::new(Source::Rows, "add_bias", 256);

/// Threads of a block that has an element for each.
const THREADS: usize = 256;
/// Pieces of rows for each block.
const PIECES: usize = 8;

/// Blocks that share sums over pieces, where there is enough to share: what fills a card, and the same on all, as the order of additions comes of it.
const SUMMING: usize = 512;
/// Pieces that a warp of a block that sums has at the least.
const LEAST_SUMMED: usize = 8;

/// Into how many parts pieces are cut for their sums.
fn parts(pieces: usize, width: usize) -> usize {
    pieces.div_ceil(PIECES * LEAST_SUMMED).min(SUMMING.div_ceil(width.div_ceil(32).max(1)))
}

/// Cosines and sines of positions, on the device.
pub struct Turns {
    cosines: Region,
    sines: Region,
    half: usize,
}

fn pieces_at(pieces: Pieces, rows: usize) -> PiecesAt {
    let Pieces { stride, offset, count, width } = pieces;
    let [rows, stride, offset, count, width] = [rows, stride, offset, count, width].map(|number| number as u32);
    PiecesAt { rows, stride, offset, count, width }
}

impl DeviceCompute {
    /// `out = x / sqrt(mean(x²) + eps) * weight` of pieces; `inverse [rows, pieces]`.
    pub fn rms_norm(
        &mut self,
        x: Values<'_>,
        pieces: Pieces,
        weight: Values<'_>,
        eps: f32,
        out: Values<'_>,
        inverse: Values<'_>,
    ) -> Result<(), KernelError> {
        let rows = inverse.len / pieces.count.max(1);
        let sizes = pieces.fits(rows, x.len.min(out.len)) && weight.len == pieces.width && inverse.len == rows * pieces.count;
        fits("rms_norm", sizes)?;
        let at = pieces_at(pieces, rows);
        let params = TrainNorm { x: x.at, weight: weight.at, out: out.at, inverse: inverse.at, at, eps };
        self.launch(NORM, Launch::blocks(inverse.len.div_ceil(PIECES)), params)
    }

    /// The derivative along `x`, stored to or added to `dx`.
    pub fn rms_norm_back(
        &mut self,
        [x, weight, inverse, dy]: [Values<'_>; 4],
        pieces: Pieces,
        dx: Values<'_>,
        store: Store,
    ) -> Result<(), KernelError> {
        let rows = inverse.len / pieces.count.max(1);
        let sizes = pieces.fits(rows, x.len.min(dy.len).min(dx.len)) && weight.len == pieces.width;
        fits("rms_norm_back", sizes && inverse.len == rows * pieces.count)?;
        let (at, add) = (pieces_at(pieces, rows), (store == Store::Add).into());
        let params = TrainNormBack { x: x.at, weight: weight.at, inverse: inverse.at, dy: dy.at, dx: dx.at, at, add };
        self.launch(NORM_BACK, Launch::blocks(inverse.len.div_ceil(PIECES)), params)
    }

    /// The derivative along the weight, added to `dweight [width]`.
    pub fn rms_norm_back_weight(
        &mut self,
        [x, inverse, dy]: [Values<'_>; 3],
        pieces: Pieces,
        dweight: Values<'_>,
    ) -> Result<(), KernelError> {
        let rows = inverse.len / pieces.count.max(1);
        fits("rms_norm_back_weight", pieces.fits(rows, x.len.min(dy.len)) && dweight.len == pieces.width)?;
        self.sums([dy.at, x.at, inverse.at, dweight.at], pieces, rows)
    }

    /// Sums of columns of `dy [rows, width]`, added to `dbias [width]`.
    pub fn bias_back(&mut self, dy: Values<'_>, dbias: Values<'_>) -> Result<(), KernelError> {
        let rows = dy.len / dbias.len.max(1);
        fits("bias_back", dy.len == rows * dbias.len)?;
        self.sums([dy.at, Address::NONE, Address::NONE, dbias.at], Pieces::rows(dbias.len), rows)
    }

    /// In one go, or in parts that are added up in a second.
    fn sums(&mut self, [dy, x, inverse, out]: [Address; 4], pieces: Pieces, rows: usize) -> Result<(), KernelError> {
        let (blocks, parts) = (pieces.width.div_ceil(32), parts(rows * pieces.count, pieces.width));
        let launch = |parts: usize| Launch::grid(blocks, parts).with_shared(8 * 32 * 4);
        let at = pieces_at(pieces, rows);
        if parts <= 1 {
            return self.launch(SUMS, launch(parts), TrainSums { dy, x, inverse, out, at, add: 1 });
        }
        let partial = self.region(parts * pieces.width)?;
        let from = partial.all().at;
        self.launch(SUMS, launch(parts), TrainSums { dy, x, inverse, out: from, at, add: 0 })?;
        let at = pieces_at(Pieces::rows(pieces.width), parts);
        let none = Address::NONE;
        self.launch(SUMS, launch(1), TrainSums { dy: from, x: none, inverse: none, out, at, add: 1 })
    }

    /// `out += bias` for each row of `out`.
    pub fn add_bias(&mut self, bias: Values<'_>, out: Values<'_>) -> Result<(), KernelError> {
        let rows = out.len / bias.len.max(1);
        fits("add_bias", out.len == rows * bias.len)?;
        let params = AddBias { bias: bias.at, out: out.at, width: bias.len as u32, unused: 0 };
        self.launch(ADD_BIAS, fours(rows, bias.len), params)
    }

    /// The cosines and sines of `rotation`.
    pub fn turns(&mut self, rotation: &Rotation) -> Result<Turns, KernelError> {
        let (half, cosines, sines) = rotation.tables();
        Ok(Turns { half, cosines: self.upload(cosines)?, sines: self.upload(sines)? })
    }

    /// Rotates pieces in place by their rows' positions; with `back` by the opposite angle.
    pub fn rotate(&mut self, x: Values<'_>, pieces: Pieces, turns: &Turns, seen: &Seen, back: bool) -> Result<(), KernelError> {
        let rows = seen.rows();
        let known = turns.cosines.len() / turns.half.max(1);
        fits("rotate", pieces.fits(rows, x.len) && 2 * turns.half <= pieces.width && seen.last_position() < known)?;
        let params = TrainRotate {
            x: x.at,
            cosines: turns.cosines.all().at,
            sines: turns.sines.all().at,
            positions: seen.positions(),
            at: pieces_at(pieces, rows),
            half: turns.half as u32,
            back: back.into(),
            unused: 0,
        };
        self.launch(ROTATE, Launch::blocks((rows * pieces.count).div_ceil(PIECES)), params)
    }

    /// `out [rows, w] = silu(gate) * up` of `gate_up [rows, 2w]`.
    pub fn silu_mul(&mut self, gate_up: Values<'_>, width: usize, out: Values<'_>) -> Result<(), KernelError> {
        self.gate("silu_mul", false, gate_up, width, out)
    }

    /// The derivative: `dgate_up [rows, 2w]` from `dy [rows, w]`.
    pub fn silu_mul_back(
        &mut self,
        gate_up: Values<'_>,
        width: usize,
        dy: Values<'_>,
        dgate_up: Values<'_>,
    ) -> Result<(), KernelError> {
        self.gate_back("silu_mul_back", false, gate_up, width, dy, dgate_up)
    }

    /// `out [rows, w] = gelu(gate) * up` of `gate_up [rows, 2w]`, by the formula with tanh.
    pub fn gelu_mul(&mut self, gate_up: Values<'_>, width: usize, out: Values<'_>) -> Result<(), KernelError> {
        self.gate("gelu_mul", true, gate_up, width, out)
    }

    /// The derivative: `dgate_up [rows, 2w]` from `dy [rows, w]`.
    pub fn gelu_mul_back(
        &mut self,
        gate_up: Values<'_>,
        width: usize,
        dy: Values<'_>,
        dgate_up: Values<'_>,
    ) -> Result<(), KernelError> {
        self.gate_back("gelu_mul_back", true, gate_up, width, dy, dgate_up)
    }

    fn gate(
        &mut self,
        op: &'static str,
        gelu: bool,
        gate_up: Values<'_>,
        width: usize,
        out: Values<'_>,
    ) -> Result<(), KernelError> {
        let rows = out.len / width.max(1);
        fits(op, out.len == rows * width && gate_up.len == 2 * out.len)?;
        let params = TrainGate { gate_up: gate_up.at, dy: Address::NONE, out: out.at, width: width as u32, gelu: gelu.into() };
        self.launch(GATE, Launch::blocks(rows), params)
    }

    fn gate_back(
        &mut self,
        op: &'static str,
        gelu: bool,
        gate_up: Values<'_>,
        width: usize,
        dy: Values<'_>,
        dgate_up: Values<'_>,
    ) -> Result<(), KernelError> {
        let rows = dy.len / width.max(1);
        fits(op, dy.len == rows * width && gate_up.len == 2 * dy.len && dgate_up.len == 2 * dy.len)?;
        let params = TrainGate { gate_up: gate_up.at, dy: dy.at, out: dgate_up.at, width: width as u32, gelu: gelu.into() };
        self.launch(GATE_BACK, Launch::blocks(rows), params)
    }

    /// `out = factors ∘ x`, or added to `out`.
    pub fn dropout(&mut self, dropout: Dropout, x: Values<'_>, out: Values<'_>, store: Store) -> Result<(), KernelError> {
        fits("dropout", x.len == out.len)?;
        let (key, dropped, scale) = dropout.parts();
        let add = (store == Store::Add).into();
        let params =
            TrainDropout { x: x.at, out: out.at, count: x.len as u64, key, dropped: dropped.into(), scale, add, unused: 0 };
        self.launch(DROPOUT, Launch::blocks(x.len.div_ceil(8 * THREADS)), params)
    }

    /// `to = from`
    pub fn copy(&mut self, from: Values<'_>, to: Values<'_>) -> Result<(), KernelError> {
        self.put("copy", from, to, false)
    }

    /// `to += from`
    pub fn add(&mut self, from: Values<'_>, to: Values<'_>) -> Result<(), KernelError> {
        self.put("add", from, to, true)
    }

    fn put(&mut self, op: &'static str, from: Values<'_>, to: Values<'_>, add: bool) -> Result<(), KernelError> {
        fits(op, from.len == to.len)?;
        let params = TrainCopy { from: from.at, to: to.at, count: from.len as u64, add: add.into(), unused: 0 };
        self.launch(COPY, Launch::blocks(from.len.div_ceil(THREADS)), params)
    }

    /// `out[i] = x[picked[i]]`, rows of `width`.
    pub fn gather(&mut self, x: Values<'_>, picked: &[u32], width: usize, out: Values<'_>) -> Result<(), KernelError> {
        let sizes = out.len == picked.len() * width && picked.iter().all(|row| (*row as usize + 1) * width <= x.len);
        fits("gather", sizes)?;
        let rows = self.upload_words(picked)?;
        let (half, half_stride) = (Address::NONE, 0);
        let params = Gather { x: x.at, rows: rows.all().at, out: out.at, half, width: width as u32, half_stride };
        self.launch(GATHER, fours(picked.len(), width), params)
    }

    /// The derivative of [`Self::gather`], stored to `dx`: rows that were not picked get zeros.
    pub fn gather_back(&mut self, dout: Values<'_>, picked: &[u32], width: usize, dx: Values<'_>) -> Result<(), KernelError> {
        let rows = dx.len / width.max(1);
        let sizes = dout.len == picked.len() * width && dx.len == rows * width;
        fits("gather_back", sizes && picked.iter().all(|row| (*row as usize) < rows))?;
        let mut starts = vec![0u32; rows + 1];
        picked.iter().for_each(|row| starts[*row as usize + 1] += 1);
        (0..rows).for_each(|row| starts[row + 1] += starts[row]);
        let mut picks: Vec<u32> = (0..picked.len() as u32).collect();
        picks.sort_by_key(|pick| picked[*pick as usize]);
        let (starts, picks) = (self.upload_words(&starts)?, self.upload_words(&picks)?);
        let [starts, picks] = [&starts, &picks].map(|list| list.all().at);
        let params = TrainScatter { x: dout.at, starts, picks, out: dx.at, width: width as u32, unused: 0 };
        self.launch(SCATTER, Launch::blocks(rows), params)
    }

    /// Row `i` of `x` times `factors[i]`.
    pub fn scale_rows(&mut self, x: Values<'_>, factors: Values<'_>) -> Result<(), KernelError> {
        let width = x.len / factors.len.max(1);
        fits("scale_rows", x.len == width * factors.len)?;
        let params = TrainScale { x: x.at, factors: factors.at, width: width as u32, unused: 0 };
        self.launch(SCALE, Launch::blocks(factors.len), params)
    }
}
