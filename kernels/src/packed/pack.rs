//! Reading a file's rows into panels, on several threads.

use half::bf16;

use super::{Form, INT4_BLOCK, MAX_INT_K, MAX_REGRID_ERROR, PANEL, PackedMatrix, Panel, grid};
use crate::aligned::AlignedBuf;
use crate::blocks::{dequantize_row, four_bit_row, is_four_bit};
use crate::error::KernelError;
use crate::isa::Isa;
use crate::ops::{Format, MatrixSource, WeightFormat};

const WHAT: &str = "packed weights";

impl PackedMatrix {
    /// Packs the sources, stacked along `n`, with `threads` threads; later work is divided for as many.
    ///
    /// [`KernelError::Shape`] when sizes disagree, [`KernelError::Weight`] when the data is not what its format says (an integer
    /// form needs finite weights), [`KernelError::Memory`] when there is no room.
    pub fn pack(
        sources: &[MatrixSource<'_>],
        format: WeightFormat,
        _isa: Isa,
        threads: usize,
    ) -> Result<PackedMatrix, KernelError> {
        let rows = Stack::check(sources)?;
        let threads = threads.max(1);
        let forms = panel_forms(&rows, format)?;
        let packed = pack_as(&rows, forms, threads)?;
        if format == WeightFormat::Auto && packed.regrid_error > MAX_REGRID_ERROR {
            return pack_as(&rows, vec![Form::Bf16; rows.n.div_ceil(PANEL)], threads);
        }
        Ok(packed)
    }
}

/// Sources stacked along `n`, with sizes proven.
struct Stack<'a> {
    sources: &'a [MatrixSource<'a>],
    n: usize,
    k: usize,
}

/// One file row.
struct FileRow<'a> {
    format: Format,
    bytes: &'a [u8],
}

impl<'a> Stack<'a> {
    fn check(sources: &'a [MatrixSource<'a>]) -> Result<Self, KernelError> {
        let shape = |detail: String| KernelError::Shape { op: "load_matrix", detail };
        let k = sources.first().ok_or_else(|| shape("no sources".into()))?.k;
        let mut n = 0usize;
        for source in sources {
            if source.k != k || k == 0 || source.n == 0 {
                return Err(shape(format!("a [{}, {}] matrix stacked on k = {k}", source.n, source.k)));
            }
            let row = source.format.row_bytes(k).ok_or_else(|| {
                let block = source.format.block_len();
                KernelError::Weight(format!("{:?} rows have a multiple of {block} weights, not {k}", source.format))
            })?;
            if source.n.checked_mul(row) != Some(source.data.len()) {
                return Err(KernelError::Weight(format!(
                    "a [{}, {k}] matrix of {:?} takes {} x {row} bytes, the file has {}",
                    source.n,
                    source.format,
                    source.n,
                    source.data.len()
                )));
            }
            if let Some(order) = source.row_order
                && (order.len() != source.n || order.iter().any(|i| *i as usize >= source.n))
            {
                return Err(shape(format!("a row order of {} entries for {} rows, or one out of range", order.len(), source.n)));
            }
            n = n.checked_add(source.n).ok_or_else(|| shape("too many rows".into()))?;
        }
        Ok(Stack { sources, n, k })
    }

    /// Row `i` of the stack, or `None` past its end.
    fn row(&self, mut i: usize) -> Option<FileRow<'a>> {
        for source in self.sources {
            if i < source.n {
                let row = source.row_order.map_or(i, |order| order[i] as usize);
                let bytes = source.data.len() / source.n;
                return Some(FileRow { format: source.format, bytes: &source.data[row * bytes..][..bytes] });
            }
            i -= source.n;
        }
        None
    }
}

fn panel_forms(rows: &Stack<'_>, format: WeightFormat) -> Result<Vec<Form>, KernelError> {
    let panels = rows.n.div_ceil(PANEL);
    let fits = rows.k <= MAX_INT_K;
    match format {
        WeightFormat::F32 => Ok(vec![Form::F32; panels]),
        WeightFormat::Bf16 => Ok(vec![Form::Bf16; panels]),
        WeightFormat::Int8 if fits => Ok(vec![Form::Int8; panels]),
        WeightFormat::Int8 => Err(KernelError::Unsupported(format!(
            "8-bit weights take up to {MAX_INT_K} input features, this matrix has {}; choose bf16",
            rows.k
        ))),
        WeightFormat::Fp8 => Err(KernelError::Unsupported(
            "8-bit floats are for weights on a card; choose int8, which a processor computes with".into(),
        )),
        WeightFormat::Auto => {
            let natural = |format: Format| match format {
                Format::F32 => Form::F32,
                Format::F16 | Format::Bf16 => Form::Bf16,
                _ if !fits => Form::Bf16,
                four if is_four_bit(four) => Form::Int4,
                _ => Form::Int8,
            };
            // Int4 and Int8 panels share their activations; next to a float form everything takes the widest.
            let widest = rows.sources.iter().map(|s| natural(s.format)).max().unwrap_or(Form::F32);
            if widest > Form::Int8 {
                return Ok(vec![widest; panels]);
            }
            let mut forms = vec![Form::Int4; panels];
            let mut first = 0;
            for source in rows.sources {
                let form = natural(source.format);
                for panel in &mut forms[first / PANEL..(first + source.n).div_ceil(PANEL)] {
                    *panel = form.max(*panel);
                }
                first += source.n;
            }
            Ok(forms)
        }
    }
}

fn pack_as(rows: &Stack<'_>, forms: Vec<Form>, threads: usize) -> Result<PackedMatrix, KernelError> {
    let k = rows.k;
    let too_big = || KernelError::Memory { what: WHAT, bytes: usize::MAX };
    let kind = forms.iter().copied().max().unwrap_or(Form::F32).kind();
    let mut panels = Vec::with_capacity(forms.len());
    let mut total = 0usize;
    for form in forms {
        panels.push(Panel { offset: total, form });
        total = form.panel_bytes(k).and_then(|b| total.checked_add(b)).ok_or_else(too_big)?;
    }
    let scale_count = if kind == crate::activations::ActivationKind::Int { panels.len() * PANEL } else { 0 };
    let mut data = AlignedBuf::<u8>::zeroed(total, WHAT)?;
    let mut scales = AlignedBuf::<f32>::zeroed(scale_count, WHAT)?;

    let share = panels.len().div_ceil(threads);
    let mut jobs = Vec::with_capacity(threads);
    let mut data_left = &mut data[..];
    let mut scales_left = &mut scales[..];
    for (worker, panels) in panels.chunks(share).enumerate() {
        let bytes = panels.iter().map(|p| p.form.panel_bytes(k).unwrap_or(0)).sum();
        let (data, rest) = std::mem::take(&mut data_left).split_at_mut(bytes);
        data_left = rest;
        let (scales, rest) = std::mem::take(&mut scales_left).split_at_mut((panels.len() * PANEL).min(scale_count));
        scales_left = rest;
        jobs.push(move || PanelPacker::new(k).run(rows, worker * share, panels, data, scales));
    }
    let results: Vec<Result<Distance, KernelError>> = std::thread::scope(|scope| {
        // The calling thread does the last share itself.
        let last = jobs.pop();
        let workers: Vec<_> = jobs.into_iter().map(|job| scope.spawn(job)).collect();
        let mut results: Vec<_> = last.into_iter().map(|mut job| job()).collect();
        let failed = |_| Err(KernelError::Weight("a packing thread failed".into()));
        results.extend(workers.into_iter().map(|worker| worker.join().unwrap_or_else(failed)));
        results
    });
    let mut distance = Distance::default();
    for result in results {
        let part = result?;
        distance.error += part.error;
        distance.norm += part.norm;
    }
    let regrid_error = if distance.norm > 0.0 { (distance.error / distance.norm).sqrt() } else { 0.0 };
    Ok(PackedMatrix { n: rows.n, k, panels, data, scales, kind, threads, regrid_error })
}

/// Squared 2-norms of the packing error and of the weights.
#[derive(Clone, Copy, Default)]
struct Distance {
    error: f64,
    norm: f64,
}

impl Distance {
    fn add(&mut self, want: &[f32], got: impl Iterator<Item = f32>) {
        let (mut error, mut norm) = (0.0f32, 0.0f32);
        for (w, g) in want.iter().zip(got) {
            error += (w - g) * (w - g);
            norm += w * w;
        }
        self.error += f64::from(error);
        self.norm += f64::from(norm);
    }
}

/// Scratch of one packing thread.
struct PanelPacker {
    k: usize,
    row: Vec<f32>,
    points: Vec<u8>,
    quants: Vec<u8>,
    steps: Vec<(f32, f32)>,
    distance: Distance,
}

impl PanelPacker {
    fn new(k: usize) -> Self {
        let padded = k.next_multiple_of(64);
        PanelPacker {
            k,
            row: vec![0.0; padded],
            points: vec![grid::ZERO; padded],
            quants: vec![0; k],
            steps: vec![(0.0, 0.0); k / 32],
            distance: Distance::default(),
        }
    }

    fn run(
        mut self,
        rows: &Stack<'_>,
        first_panel: usize,
        panels: &[Panel],
        mut data: &mut [u8],
        mut scales: &mut [f32],
    ) -> Result<Distance, KernelError> {
        for (i, panel) in panels.iter().enumerate() {
            let (out, rest) = std::mem::take(&mut data).split_at_mut(panel.form.panel_bytes(self.k).unwrap_or(0));
            data = rest;
            let width = PANEL.min(scales.len());
            let (panel_scales, rest) = std::mem::take(&mut scales).split_at_mut(width);
            scales = rest;
            for lane in 0..PANEL {
                let index = (first_panel + i) * PANEL + lane;
                match (rows.row(index), panel.form) {
                    (Some(row), Form::F32) => self.f32_lane(&row, lane, out)?,
                    (Some(row), Form::Bf16) => self.bf16_lane(&row, lane, out)?,
                    (Some(row), Form::Int8) => panel_scales[lane] = self.int8_lane(&row, index, lane, out)?,
                    (Some(row), Form::Int4) => panel_scales[lane] = self.int4_lane(&row, index, lane, out)?,
                    (None, Form::F32 | Form::Bf16) => {}
                    (None, Form::Int8) => {
                        for column in out.as_chunks_mut::<64>().0 {
                            column[lane * 4..][..4].fill(grid::ZERO);
                        }
                    }
                    (None, Form::Int4) => {
                        for block in out.as_chunks_mut::<INT4_BLOCK>().0 {
                            grid::put_lane(block, lane, &[0; 32], grid::step(0.0, 0.0, 0.0));
                        }
                    }
                }
            }
        }
        Ok(self.distance)
    }

    fn decode(&mut self, row: &FileRow<'_>) -> Result<(), KernelError> {
        dequantize_row(row.format, row.bytes, &mut self.row[..self.k])
    }

    fn f32_lane(&mut self, row: &FileRow<'_>, lane: usize, out: &mut [u8]) -> Result<(), KernelError> {
        self.decode(row)?;
        for (v, column) in self.row[..self.k].iter().zip(out.as_chunks_mut::<64>().0) {
            column[lane * 4..][..4].copy_from_slice(&v.to_le_bytes());
        }
        Ok(())
    }

    fn bf16_lane(&mut self, row: &FileRow<'_>, lane: usize, out: &mut [u8]) -> Result<(), KernelError> {
        self.decode(row)?;
        for (pair, column) in self.row.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<64>().0) {
            let word = pair.map(|v| u32::from(bf16::from_f32(v).to_bits()));
            column[lane * 4..][..4].copy_from_slice(&(word[0] | word[1] << 16).to_le_bytes());
        }
        Ok(())
    }

    fn int8_lane(&mut self, row: &FileRow<'_>, index: usize, lane: usize, out: &mut [u8]) -> Result<f32, KernelError> {
        self.decode(row)?;
        let weights = &self.row[..self.k];
        let unit = grid::unit(largest(weights, index)?);
        let inverse = if unit == 0.0 { 0.0 } else { 1.0 / unit };
        for (point, w) in self.points.iter_mut().zip(weights) {
            *point = grid::point(*w, inverse);
        }
        self.distance.add(weights, self.points.iter().map(|p| grid::value(*p, unit)));
        for (quad, column) in self.points.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<64>().0) {
            column[lane * 4..][..4].copy_from_slice(quad);
        }
        Ok(unit)
    }

    fn int4_lane(&mut self, row: &FileRow<'_>, index: usize, lane: usize, out: &mut [u8]) -> Result<f32, KernelError> {
        four_bit_row(row.format, row.bytes, &mut self.quants, &mut self.steps)?;
        let quants = self.quants.as_chunks::<32>().0;
        for ((weights, quants), (d, m)) in self.row.as_chunks_mut::<32>().0.iter_mut().zip(quants).zip(&self.steps) {
            for (w, q) in weights.iter_mut().zip(quants) {
                *w = f32::from(*q) * d + m;
            }
        }
        let unit = grid::unit(largest(&self.row[..self.k], index)?);
        let (blocks, _) = out.as_chunks_mut::<INT4_BLOCK>();
        let (used, padding) = blocks.split_at_mut(quants.len());
        for (((block, quants), (d, m)), weights) in used.iter_mut().zip(quants).zip(&self.steps).zip(self.row.as_chunks::<32>().0)
        {
            let (d, m) = grid::step(*d, *m, unit);
            grid::put_lane(block, lane, quants, (d, m));
            self.distance.add(weights, quants.iter().map(|q| grid::value(grid::expand(*q, d, m), unit)));
        }
        for block in padding {
            grid::put_lane(block, lane, &[0; 32], grid::step(0.0, 0.0, 0.0));
        }
        Ok(unit)
    }
}

/// Largest magnitude of a row. Compared as integers, in which infinities and NaNs come above every number.
fn largest(weights: &[f32], row: usize) -> Result<f32, KernelError> {
    let bits = weights.iter().fold(0u32, |a, w| a.max(w.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(bits);
    if largest.is_finite() { Ok(largest) } else { Err(KernelError::Weight(format!("row {row} has a weight that is not finite"))) }
}
