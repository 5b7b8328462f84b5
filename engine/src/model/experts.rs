//! A feed-forward part of experts: a router sends each token to a few of them, and what they make is added up by its weights. Qwen2-MoE
//! has one more, which every token goes to, behind a gate of its own.

use tidemill_kernels::{Buf, Experts, Format, KernelError, Matrix, Ops, Routing, RoutingShape, Rows, Store, WeightFormat};

use super::decoder::Loader;
use crate::load_error::LoadError;
use crate::model_config::{ExpertConfig, ModelConfig};
use crate::model_files::{ExpertPart, Mixture, MixtureMatrix};

/// The weights of a layer's experts.
pub(super) struct ExpertLayer {
    router: Matrix,
    gate_up: Experts,
    down: Experts,
    shared: Option<SharedExpert>,
}

/// Whose activations every token has.
struct SharedExpert {
    gate_up: Matrix,
    down: Matrix,
    gate: Matrix,
}

/// Activations of experts, reused by every layer.
#[derive(Clone, Copy)]
pub(super) struct ExpertBuffers {
    routing: Routing,
    normalised: bool,
    /// `[tokens, experts]`
    logits: Buf,
    /// `[routed, 2 * intermediate]`
    gate_up: Buf,
    /// `[routed, intermediate]`
    gated: Buf,
    /// `[routed, hidden]`
    down: Buf,
    shared: Option<SharedBuffers>,
}

#[derive(Clone, Copy)]
struct SharedBuffers {
    /// `[tokens, 2 * shared]`
    gate_up: Buf,
    /// `[tokens, shared]`
    gated: Buf,
    /// `[tokens, 1]`
    gate: Buf,
}

impl ExpertBuffers {
    pub fn reserve(ops: &mut dyn Ops, config: &ModelConfig, experts: ExpertConfig) -> Result<Self, KernelError> {
        let ExpertConfig { count, each, normalised, shared } = experts;
        let &ModelConfig { hidden, intermediate, .. } = config;
        let shared = match shared {
            None => None,
            Some(width) => Some(SharedBuffers {
                gate_up: ops.alloc(Rows::Tokens, 2 * width)?,
                gated: ops.alloc(Rows::Tokens, width)?,
                gate: ops.alloc(Rows::Tokens, 1)?,
            }),
        };
        Ok(Self {
            routing: ops.alloc_routing(RoutingShape { experts: count, each })?,
            normalised,
            logits: ops.alloc(Rows::Tokens, count)?,
            gate_up: ops.alloc(Rows::Routed { each }, 2 * intermediate)?,
            gated: ops.alloc(Rows::Routed { each }, intermediate)?,
            down: ops.alloc(Rows::Routed { each }, hidden)?,
            shared,
        })
    }
}

impl ExpertLayer {
    /// Adds to `hidden` what the experts make of `normed`.
    pub fn forward(&self, ops: &mut dyn Ops, b: &ExpertBuffers, normed: Buf, hidden: Buf) {
        ops.linear(normed, self.router, None, b.logits, Store::Replace);
        ops.route(b.logits, b.normalised, b.routing);
        ops.expert_linear(normed, self.gate_up, b.routing, b.gate_up);
        ops.silu_and_mul(b.gate_up, b.gated);
        ops.expert_linear(b.gated, self.down, b.routing, b.down);
        ops.combine(b.down, b.routing, hidden, Store::Add);
        if let (Some(shared), Some(b)) = (&self.shared, &b.shared) {
            ops.linear(normed, shared.gate_up, None, b.gate_up, Store::Replace);
            ops.silu_and_mul(b.gate_up, b.gated);
            ops.linear(normed, shared.gate, None, b.gate, Store::Replace);
            // The gate's share of what comes out is what comes out of its share.
            ops.gate_rows(b.gate, b.gated);
            ops.linear(b.gated, shared.down, None, hidden, Store::Add);
        }
    }

    pub fn load(loader: &mut Loader<'_>, layer: usize, experts: ExpertConfig) -> Result<Self, LoadError> {
        let both = [ExpertPart::Gate, ExpertPart::Up];
        let shared = |loader: &mut Loader<'_>| {
            let matrix = |part| loader.files().mixture(layer, Mixture::Shared(part));
            let (gate_up, down) = (both.into_iter().map(matrix).collect::<Result<Vec<_>, _>>()?, vec![matrix(ExpertPart::Down)?]);
            let (gate, format) = (loader.files().mixture(layer, Mixture::SharedGate)?, loader.format());
            Ok(SharedExpert {
                gate_up: pack(loader, &gate_up, format, "shared expert")?,
                down: pack(loader, &down, format, "shared expert")?,
                gate: small(loader, gate, "gate of the shared expert")?,
            })
        };
        let router = loader.files().mixture(layer, Mixture::Router)?;
        Ok(Self {
            router: small(loader, router, "router")?,
            gate_up: load_experts(loader, layer, experts.count, &both)?,
            down: load_experts(loader, layer, experts.count, &[ExpertPart::Down])?,
            shared: experts.shared.map(|_| shared(loader)).transpose()?,
        })
    }
}

/// Packs matrices stacked along their output features.
fn pack(loader: &mut Loader<'_>, matrices: &[MixtureMatrix<'_>], format: WeightFormat, what: &str) -> Result<Matrix, LoadError> {
    let rows: Vec<_> = matrices.iter().map(MixtureMatrix::rows).collect();
    let views: Vec<_> = matrices.iter().zip(&rows).map(|(matrix, rows)| matrix.with_rows(rows)).collect();
    loader.pack(&views, format, what)
}

/// A matrix of few rows that decides where tokens go: it is not rounded further than its file has it, but to f32 where all is.
fn small(loader: &mut Loader<'_>, matrix: MixtureMatrix<'_>, what: &str) -> Result<Matrix, LoadError> {
    let plain = matches!(matrix.format, Format::F32 | Format::F16 | Format::Bf16);
    let format = match loader.format() {
        WeightFormat::F32 => WeightFormat::F32,
        _ if plain => WeightFormat::Auto,
        _ => WeightFormat::Bf16,
    };
    pack(loader, &[matrix], format, what)
}

fn load_experts(loader: &mut Loader<'_>, layer: usize, count: usize, parts: &[ExpertPart]) -> Result<Experts, LoadError> {
    let matrix = |expert, part: &ExpertPart| loader.files().mixture(layer, Mixture::Expert(expert, *part));
    let all = (0..count).map(|expert| parts.iter().map(|part| matrix(expert, part)).collect());
    let all: Vec<Vec<MixtureMatrix<'_>>> = all.collect::<Result<_, LoadError>>()?;
    let rows: Vec<Vec<_>> = all.iter().map(|parts| parts.iter().map(MixtureMatrix::rows).collect()).collect();
    let views = all.iter().zip(&rows).map(|(parts, rows)| parts.iter().zip(rows).map(|(m, rows)| m.with_rows(rows)).collect());
    let views: Vec<Vec<_>> = views.collect();
    loader.pack_experts(&views)
}
