//! A step's program, as it is put together and run.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::CpuBackend;
use super::attention::AttentionPlan;
use super::holdings::{Slots, form_index};
use super::pool::Stage;
use super::program::Entry;
use crate::activations::Activations;
use crate::error::KernelError;
use crate::linear::TileScratch;
use crate::ops::{Buf, HeadShape, Matrix, MatrixSource, WeightFormat};
use crate::packed::PackedMatrix;

/// Floats that a claim of row tasks should cover: about a microsecond of work, so that claiming stays cheap beside it.
const CLAIM_FLOATS: usize = 8192;

impl CpuBackend {
    /// Notes the outcome of a check; `true` when the operation may be appended.
    pub(super) fn admit(&mut self, check: Result<(), KernelError>) -> bool {
        if self.error.is_none() {
            self.error = check.err();
        }
        self.error.is_none()
    }

    pub(super) fn rows(&self, buf: Buf) -> usize {
        self.held.count(self.held.buffers[buf.0 as usize].rows)
    }

    /// How many rows of this width to claim at once.
    pub(super) fn grain(&self, rows: usize, width: usize) -> usize {
        (CLAIM_FLOATS / width.max(1)).clamp(1, rows.div_ceil(self.pool.threads()).max(1))
    }

    /// Appends an entry that makes whole rows of `out` from rows `width` floats wide.
    pub(super) fn push_rows(&mut self, entry: Entry, out: Buf, width: usize) {
        let rows = self.rows(out);
        let grain = self.grain(rows, width);
        self.program.push(entry, Some(out.0), rows, grain);
    }

    /// A matrix in the form that is served, in the arena, with scratch for its products.
    pub(super) fn pack(&mut self, sources: &[MatrixSource<'_>], format: WeightFormat) -> Result<PackedMatrix, KernelError> {
        let packed = PackedMatrix::pack(sources, format, self.held.isa, self.pool.threads())?.moved_to(&mut self.arena)?;
        if packed.k() > self.max_k {
            self.held.tile_scratch = tile_scratch(self.pool.threads(), packed.k())?;
            self.max_k = packed.k();
        }
        Ok(packed)
    }

    /// Sees to it that `x` is converted to the form that `w` multiplies with. Returns the form's number.
    pub(super) fn convert_for(&mut self, x: Buf, w: Matrix) -> Result<u32, KernelError> {
        let form = form_index(self.held.matrices[w.0 as usize].activation_kind());
        let rows = self.rows(x);
        let buffer = &mut self.held.buffers[x.0 as usize];
        let width = buffer.width;
        if buffer.converted[form].is_none() {
            let capacity = self.shapes.capacity(buffer.rows);
            buffer.converted[form] = Some(Activations::new(capacity, width)?);
        }
        let grain = self.grain(rows, width);
        self.program.need(x.0, form as u32, rows, grain);
        Ok(form as u32)
    }

    /// The plan of this step's attention for a head shape.
    pub(super) fn plan(&mut self, shape: HeadShape) -> usize {
        let plans = &mut self.held.plans;
        let index = plans.iter().position(|p| p.0 == shape).unwrap_or_else(|| {
            plans.push((shape, AttentionPlan::new(), false));
            plans.len() - 1
        });
        let (_, plan, built) = &mut plans[index];
        if !*built {
            plan.build(&self.held.batch.sequences, &self.held.batch.blocks, shape, self.pool.threads());
            *built = true;
        }
        index
    }

    /// Runs the program.
    pub(super) fn execute(&mut self) -> Result<(), KernelError> {
        let entries = self.program.entries();
        if entries.is_empty() {
            return Ok(());
        }
        if self.stages.len() < entries.len() {
            self.stages.resize_with(entries.len().next_power_of_two(), Stage::default);
        }
        self.stages[..entries.len()].iter_mut().for_each(Stage::reset);
        let (stages, held, profile) = (&self.stages, &self.held, self.profile.as_deref());
        let outcome = self.pool.run(&|member| {
            let mut clock = (member.index == 0).then_some(()).and(profile).map(|p| (p, Instant::now()));
            for (planned, stage) in entries.iter().zip(stages) {
                // SAFETY: entries were checked when they were appended; the stage hands each task out once and lets nobody go on
                // before all are done; a member's index is its own.
                let goes_on = member.share(stage, planned.tasks, planned.grain, |tasks| unsafe {
                    held.run(planned, tasks, member.index);
                });
                if !goes_on {
                    return;
                }
                if let Some((profile, start)) = &mut clock {
                    let now = Instant::now();
                    let (count, nanos) = &profile[planned.entry.kind()];
                    count.fetch_add(1, Ordering::Relaxed);
                    nanos.fetch_add((now - *start).as_nanos() as u64, Ordering::Relaxed);
                    *start = now;
                }
            }
        });
        let internal = |text| KernelError::Unsupported(format!("a kernel failed: {text}; please report this as a bug"));
        outcome.map_err(|panicked| internal(panicked.0))
    }
}

pub(super) fn tile_scratch(threads: usize, max_k: usize) -> Result<Slots<TileScratch>, KernelError> {
    let each: Result<Vec<_>, _> = (0..threads).map(|_| TileScratch::new(max_k)).collect();
    Ok(Slots::new(each?))
}
