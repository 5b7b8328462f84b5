//! Steps that are recorded, and captured or replayed where they can be; see [`super::graphs`].

use super::CudaBackend;
use super::device::{Device, Graph};
use super::graphs::{Graphs, Op, Padded, Way};
use crate::error::KernelError;
use crate::ops::*;

/// What a backend knows of captures.
#[derive(Default)]
pub(super) struct Captures {
    /// Whether steps are captured at all.
    pub on: bool,
    pub graphs: Graphs,
    /// What the current step is padded to, where it may be captured.
    pub size: Option<Padded>,
    /// Operations are written down, and not done yet.
    pub recording: bool,
    pub program: Vec<Op>,
    /// Steps that were replayed.
    pub replayed: usize,
    /// Why the device did not take the last that it did not take.
    pub refused: Option<KernelError>,
    /// The same, until somebody was told.
    pub untold: Option<String>,
}

impl<D: Device> CudaBackend<D> {
    /// Steps that compute one token of each sequence are captured and replayed from now on.
    pub fn capturing(mut self) -> Self {
        self.captures.on = true;
        self
    }

    /// How many steps were replayed, and why the device did not take one, if it did not; for whoever wants to know whether captures work.
    pub fn captures(&self) -> (usize, Option<&KernelError>) {
        (self.captures.replayed, self.captures.refused.as_ref())
    }

    /// A new step: decides whether it is recorded.
    pub(super) fn begin_recording(&mut self) {
        let captures = &mut self.captures;
        captures.size = if captures.on { Padded::of(&self.batch, self.shapes.limits()) } else { None };
        captures.recording = captures.size.is_some();
        captures.program.clear();
    }

    /// Writes an operation down, or does it when the step is not recorded.
    pub(super) fn enqueue(
        &mut self,
        check: Result<(), KernelError>,
        op: Op,
        run: impl FnOnce(&mut Self) -> Result<(), KernelError>,
    ) {
        if !self.captures.recording || check.is_err() {
            return self.attempt(check, run);
        }
        self.captures.program.push(op);
    }

    /// Does what was written down.
    pub(super) fn run_recorded(&mut self) {
        if !std::mem::take(&mut self.captures.recording) || self.error.is_some() {
            return;
        }
        let program = std::mem::take(&mut self.captures.program);
        let done = self.run_program(&program);
        self.captures.program = program;
        if self.error.is_none() {
            self.error = done.err();
        }
    }

    fn run_program(&mut self, program: &[Op]) -> Result<(), KernelError> {
        let Some(size) = self.captures.size else { return Ok(()) };
        // Nothing may be reserved or written during a capture, and what differs from step to step must be there for a replay.
        for op in program {
            match *op {
                Op::PagedAttention { shape, kv, .. } => {
                    self.plan(shape, kv)?;
                }
                Op::Lora { x, site, .. } => self.prepare_update(x, site)?,
                Op::AllGather { x, .. } => self.plan_gather(x)?,
                _ => {}
            }
        }
        let way = self.captures.graphs.way(size, program, self.moves());
        self.hand_back();
        match way {
            Way::Replay(graph) => self.replay(graph, program),
            Way::Plain => {
                self.repeat(program);
                Ok(())
            }
            Way::First => {
                self.repeat(program);
                if self.error.is_some() {
                    self.captures.graphs.undo_first();
                }
                Ok(())
            }
            Way::Capture(index) => {
                let captured = self.capture(program);
                let by_all = self.captured_by_all(captured.as_ref().ok().copied())?;
                let given_up = self.captures.graphs.keep(index, by_all);
                if let Some(graph) = by_all {
                    return self.replay(graph, program);
                }
                let by_another = || KernelError::Device("another card did not capture its part".into());
                self.do_without(captured.err().unwrap_or_else(by_another), given_up, program);
                Ok(())
            }
        }
    }

    /// Replays a captured step; operation by operation where the card has no memory to bring it there. One of several cards cannot choose.
    fn replay(&mut self, graph: Graph, program: &[Op]) -> Result<(), KernelError> {
        match self.device.replay(graph) {
            Err(short @ KernelError::Memory { .. }) if self.device.place().is_alone() => {
                let given_up = self.captures.graphs.give_back(graph);
                self.hand_back();
                self.do_without(short, given_up, program);
            }
            replayed => {
                replayed?;
                self.captures.replayed += 1;
            }
        }
        Ok(())
    }

    /// A step that is not replayed is done plainly; if the device is lost, that shows now.
    fn do_without(&mut self, why: KernelError, given_up: bool, program: &[Op]) {
        if given_up {
            self.captures.untold = Some(why.to_string());
        }
        self.captures.refused = Some(why);
        self.all_stale();
        self.repeat(program);
    }

    fn capture(&mut self, program: &[Op]) -> Result<Graph, KernelError> {
        self.device.capture()?;
        self.repeat(program);
        let broken = self.error.take();
        let captured = self.device.captured();
        match (broken, captured) {
            (None, captured) => captured,
            // What happened first is the reason.
            (Some(broken), captured) => {
                if let Ok(captured) = captured {
                    self.device.forget(captured);
                }
                Err(broken)
            }
        }
    }

    /// Asks for each operation again, which is done at once now.
    fn repeat(&mut self, program: &[Op]) {
        for op in program {
            match *op {
                Op::Embedding { table, out } => self.embedding(table, out),
                Op::RmsNorm { x, weight, eps, out } => self.rms_norm(x, weight, eps, out),
                Op::LayerNorm { x, weight, eps, out } => self.layer_norm(x, weight, eps, out),
                Op::RmsNormAdd { x, weight, eps, out } => self.rms_norm_add(x, weight, eps, out),
                Op::Clamp { x, limit } => self.clamp(x, limit),
                Op::Scale { x, factor } => self.scale(x, factor),
                Op::SoftCap { x, cap } => self.soft_cap(x, cap),
                Op::Linear { x, w, bias, out, store } => self.linear(x, w, bias, out, store),
                Op::Lora { x, site, out } => self.lora(x, site, out),
                Op::RopeCache { qkv, shape, norm, rope, kv, layer } => self.rope_cache(qkv, shape, norm, rope, kv, layer),
                Op::PagedAttention { qkv, shape, spec, kv, layer, out } => {
                    self.paged_attention(qkv, shape, spec, kv, layer, out);
                }
                Op::SiluAndMul { gate_up, out } => self.silu_and_mul(gate_up, out),
                Op::GeluTanhAndMul { gate_up, out } => self.gelu_tanh_and_mul(gate_up, out),
                Op::Gelu { x, out } => self.gelu(x, out),
                Op::Route { logits, normalised, routing } => self.route(logits, normalised, routing),
                Op::ExpertLinear { x, experts, routing, out } => self.expert_linear(x, experts, routing, out),
                Op::Combine { x, routing, out, store } => self.combine(x, routing, out, store),
                Op::GateRows { gate, x } => self.gate_rows(gate, x),
                Op::Gather { x, out } => self.gather(x, out),
                Op::EmbeddingShard { table, first, out } => self.embedding_shard(table, first, out),
                Op::AllReduce { x } => self.all_reduce(x),
                Op::AllGather { x, out } => self.all_gather(x, out),
            }
        }
    }

    /// How often memory that captured steps read has moved.
    fn moves(&self) -> usize {
        let rooms = [self.lists.room, self.partials, self.widened].into_iter().chain(self.plans.rooms());
        rooms.chain(self.fp8.rooms()).map(|room| room.moves).sum::<usize>() + self.adapters.moves() + self.collected.moves()
    }

    /// Gives captured steps that are not used any more back to the device.
    pub(super) fn hand_back(&mut self) {
        for graph in self.captures.graphs.dropped() {
            self.device.forget(graph);
        }
    }
}
