//! What fits together in a mixture of experts.

use super::{Shapes, equal, find, shape};
use crate::error::KernelError;
use crate::ops::*;

impl Shapes {
    /// Checks the sources of all experts. Returns the `(n, k)` that each has.
    pub fn stacked_experts(experts: &[Vec<MatrixSource<'_>>]) -> Result<(usize, usize), KernelError> {
        const OP: &str = "load_experts";
        if experts.is_empty() || experts.len() > MAX_EXPERTS {
            return shape(OP, format!("{} experts; there may be 1 to {MAX_EXPERTS}", experts.len()));
        }
        let mut sizes = None;
        for sources in experts {
            let (n, k) = Shapes::stacked(sources)?;
            let (first_n, first_k) = *sizes.get_or_insert((n, k));
            equal(OP, "output width of an expert", n, first_n)?;
            equal(OP, "input width of an expert", k, first_k)?;
        }
        Ok(sizes.unwrap_or_default())
    }

    /// Registers a matrix `[n, k]` for each of `count` experts.
    pub fn add_experts(&mut self, n: usize, k: usize, count: usize) -> Experts {
        self.experts.push((n, k, count));
        Experts(self.experts.len() as u32 - 1)
    }

    /// Registers a routing.
    pub fn add_routing(&mut self, routing: RoutingShape) -> Result<Routing, KernelError> {
        let RoutingShape { experts, each } = routing;
        if experts == 0 || experts > MAX_EXPERTS || each == 0 || each > experts {
            return shape("alloc_routing", format!("each token goes to {each} of {experts} experts; there may be {MAX_EXPERTS}"));
        }
        // Routed rows are counted in 32 bits.
        if self.capacity(Rows::Routed { each }) > i32::MAX as usize {
            return Err(KernelError::Limit(format!("{each} rows for each of {} tokens", self.limits.max_tokens)));
        }
        self.routings.push((routing, false));
        Ok(Routing(self.routings.len() as u32 - 1))
    }

    /// A routing of this step.
    fn routed(&self, op: &'static str, routing: Routing) -> Result<RoutingShape, KernelError> {
        self.step(op)?;
        match find(op, "routing", &self.routings, routing.0)? {
            (found, true) => Ok(found),
            (_, false) => shape(op, "the step's tokens have not been routed".into()),
        }
    }

    fn rows_are(&self, op: &'static str, what: &str, buf: Buf, wanted: Rows) -> Result<usize, KernelError> {
        let (rows, width) = self.buffer(op, buf)?;
        if rows == wanted { Ok(width) } else { shape(op, format!("{what} has a row per {rows:?}, should be {wanted:?}")) }
    }

    /// See [`Ops::route`].
    pub fn route(&mut self, logits: Buf, routing: Routing) -> Result<(), KernelError> {
        const OP: &str = "route";
        self.step(OP)?;
        let (found, _) = find(OP, "routing", &self.routings, routing.0)?;
        equal(OP, "width of the logits", self.rows_are(OP, "logits", logits, Rows::Tokens)?, found.experts)?;
        self.routings[routing.0 as usize].1 = true;
        Ok(())
    }

    /// See [`Ops::expert_linear`].
    pub fn expert_linear(&self, x: Buf, experts: Experts, routing: Routing, out: Buf) -> Result<(), KernelError> {
        const OP: &str = "expert_linear";
        let routed = self.routed(OP, routing)?;
        let (n, k, count) = find(OP, "experts", &self.experts, experts.0)?;
        equal(OP, "number of experts", count, routed.experts)?;
        let each = routed.each;
        let (x_rows, x_width) = self.buffer(OP, x)?;
        if x == out || ![Rows::Tokens, Rows::Routed { each }].contains(&x_rows) {
            return shape(OP, format!("input has a row per {x_rows:?}, or is the output"));
        }
        equal(OP, "input width", x_width, k)?;
        equal(OP, "output width", self.rows_are(OP, "output", out, Rows::Routed { each })?, n)
    }

    /// See [`Ops::combine`].
    pub fn combine(&self, x: Buf, routing: Routing, out: Buf) -> Result<(), KernelError> {
        const OP: &str = "combine";
        let each = self.routed(OP, routing)?.each;
        let width = self.rows_are(OP, "input", x, Rows::Routed { each })?;
        equal(OP, "output width", self.rows_are(OP, "output", out, Rows::Tokens)?, width)
    }

    /// See [`Ops::gate_rows`].
    pub fn gate_rows(&self, gate: Buf, x: Buf) -> Result<(), KernelError> {
        const OP: &str = "gate_rows";
        self.step(OP)?;
        let (gate_width, _) = self.pair(OP, gate, x)?;
        equal(OP, "gate width", gate_width, 1)
    }
}
