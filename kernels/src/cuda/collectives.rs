//! What devices that compute a model together exchange in a step.

use super::device::{Address, Device, Graph};
use super::params as p;
use super::room::Room;
use super::rows::fours;
use super::{CudaBackend, EMBEDDING, GATHER};
use crate::error::KernelError;
use crate::ops::{Buf, Matrix};

/// Where the parts of all ranks are put together.
#[derive(Default)]
pub(super) struct Collected {
    /// `[ranks, rows, width]`, as they come.
    parts: Room,
    /// `[rows, ranks]`: which of those rows comes where.
    order: Room,
    /// Rows that the order is for.
    rows: usize,
    /// A number that ranks agree by.
    vote: Room,
}

impl Collected {
    /// How often what captured steps read has moved.
    pub(super) fn moves(&self) -> usize {
        self.parts.moves + self.order.moves
    }

    pub(super) fn rooms(&self) -> impl Iterator<Item = Room> + use<> {
        [self.parts, self.order, self.vote].into_iter()
    }
}

impl<D: Device> CudaBackend<D> {
    /// Rows of a table, or of a part of one that begins at `first`.
    pub(super) fn embed(&mut self, table: Matrix, first: u32, out: Buf) -> Result<(), KernelError> {
        let (half, half_stride) = self.produce(out);
        let (table, tokens) = (self.matrices[table.0 as usize].weights, self.lists.tokens);
        let width = self.buffers[out.0 as usize].width;
        let params = p::Embedding { table, tokens, out: self.at(out), half, half_stride, first, width: width as u32, unused: 0 };
        self.launch(EMBEDDING, fours(self.rows(out), width), params)
    }

    /// Rows that pad are summed up with the others: a captured exchange has a fixed size.
    pub(super) fn sum_over_ranks(&mut self, x: Buf) -> Result<(), KernelError> {
        self.stale(x);
        let count = self.rows(x) * self.buffers[x.0 as usize].width;
        if count == 0 || self.device.place().is_alone() {
            return Ok(());
        }
        self.device.all_reduce(self.at(x), count)
    }

    /// Reserves and writes what [`CudaBackend::collect`] needs; nothing when it is there.
    pub(super) fn plan_gather(&mut self, x: Buf) -> Result<(), KernelError> {
        let (rows, width, ranks) = (self.rows(x), self.buffers[x.0 as usize].width, self.device.place().ranks);
        self.collected.parts.reserve(&mut self.device, "collected parts", ranks * rows * width * 4)?;
        if self.collected.rows != rows {
            // Not what was asked for until it is written.
            self.collected.rows = 0;
            let order = (0..rows).flat_map(|row| (0..ranks).map(move |rank| (rank * rows + row) as u32));
            let bytes: Vec<u8> = order.flat_map(u32::to_le_bytes).collect();
            self.collected.order.write(&mut self.device, "collected parts", &bytes)?;
            self.collected.rows = rows;
        }
        Ok(())
    }

    /// Ranks give their parts of all rows one after the other; here each row gets its parts together.
    pub(super) fn collect(&mut self, x: Buf, out: Buf) -> Result<(), KernelError> {
        self.plan_gather(x)?;
        let (rows, width, ranks) = (self.rows(x), self.buffers[x.0 as usize].width, self.device.place().ranks);
        self.stale(out);
        let (mine, parts, order) = (self.at(x), self.collected.parts.at, self.collected.order.at);
        if rows == 0 {
            return Ok(());
        }
        let from = match ranks {
            1 => mine,
            _ => {
                self.device.all_gather(mine, parts, rows * width)?;
                parts
            }
        };
        let params =
            p::Gather { x: from, rows: order, out: self.at(out), half: Address::NONE, width: width as u32, half_stride: 0 };
        self.launch(GATHER, fours(rows * ranks, width), params)
    }

    /// A captured step is of use only where every rank has captured it: an exchange is in a captured step on all or on none.
    pub(super) fn captured_by_all(&mut self, captured: Option<Graph>) -> Result<Option<Graph>, KernelError> {
        let ranks = self.device.place().ranks;
        if ranks == 1 {
            return Ok(captured);
        }
        let vote = f32::from(captured.is_some());
        let agreed = self.vote(vote).map(|votes| votes == ranks as f32);
        if let (Some(graph), Ok(false) | Err(_)) = (captured, &agreed) {
            self.device.forget(graph);
        }
        agreed.map(|agreed| captured.filter(|_| agreed))
    }

    /// The sum of what the ranks say. Waits for all of them.
    fn vote(&mut self, vote: f32) -> Result<f32, KernelError> {
        let at = self.collected.vote.write(&mut self.device, "a vote", &vote.to_le_bytes())?;
        self.device.all_reduce(at, 1)?;
        let mut sum = [0; 4];
        self.device.read(at, &mut sum)?;
        Ok(f32::from_le_bytes(sum))
    }
}
