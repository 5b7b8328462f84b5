//! Random mixtures of experts.

use tidemill_kernels::*;

use super::backend::Backend;
use super::scenarios::{Scenario, plain_step};
use super::{Noise, Weight};

/// Sizes of a feed-forward part with experts.
#[derive(Clone, Copy, Debug)]
pub struct Mixture {
    pub hidden: usize,
    pub ffn: usize,
    pub routing: RoutingShape,
}

/// The part's weights in a file's format.
pub struct MixtureWeights {
    pub gate_up: Vec<[Weight; 2]>,
    pub down: Vec<Weight>,
}

impl MixtureWeights {
    pub fn random(noise: &mut Noise, mixture: Mixture, format: Format) -> Self {
        let Mixture { hidden, ffn, routing } = mixture;
        let weight = |noise: &mut Noise, n: usize, k: usize| Weight::random(noise, n, k, format, 1.0 / (k as f64).sqrt());
        MixtureWeights {
            gate_up: (0..routing.experts).map(|_| [0, 1].map(|_| weight(noise, ffn, hidden))).collect(),
            down: (0..routing.experts).map(|_| weight(noise, hidden, ffn)).collect(),
        }
    }

    pub fn load<O: Ops + ?Sized>(&self, ops: &mut O, packed: WeightFormat) -> [Experts; 2] {
        let gate_up: Vec<_> = self.gate_up.iter().map(|both| both.each_ref().map(Weight::source).to_vec()).collect();
        let down: Vec<_> = self.down.iter().map(|one| vec![one.source()]).collect();
        [gate_up, down].map(|experts| ops.load_experts(&experts, packed).unwrap())
    }
}

/// From one row on the way of all experts to more than a block of rows for each; tiles of every height.
const SIZES: [(usize, Mixture); 7] = [
    (1, Mixture { hidden: 64, ffn: 32, routing: RoutingShape { experts: 8, each: 2 } }),
    (3, Mixture { hidden: 32, ffn: 96, routing: RoutingShape { experts: 1, each: 1 } }),
    (9, Mixture { hidden: 160, ffn: 64, routing: RoutingShape { experts: 40, each: 8 } }),
    (33, Mixture { hidden: 96, ffn: 160, routing: RoutingShape { experts: 4, each: 4 } }),
    (70, Mixture { hidden: 64, ffn: 128, routing: RoutingShape { experts: 5, each: 1 } }),
    (70, Mixture { hidden: 288, ffn: 64, routing: RoutingShape { experts: 3, each: 2 } }),
    (9, Mixture { hidden: 96, ffn: 32, routing: RoutingShape { experts: 3, each: 1 } }),
];

/// Every form of weights in every size.
pub fn scenarios() -> Vec<Scenario> {
    let forms = [
        (Format::F32, WeightFormat::F32, 6e-6),
        (Format::Bf16, WeightFormat::Auto, 2e-2),
        (Format::Bf16, WeightFormat::Int8, 4e-2),
        (Format::Q4_0, WeightFormat::Auto, 4e-2),
        (Format::Q8_0, WeightFormat::Auto, 4e-2),
    ];
    forms.into_iter().flat_map(|(format, packed, tolerance)| in_form(format, packed, tolerance)).collect()
}

/// A form of weights in every size.
pub fn in_form(format: Format, packed: WeightFormat, tolerance: f64) -> Vec<Scenario> {
    let one = |(case, (rows, mixture))| of_size(case, rows, mixture, (format, packed, tolerance));
    SIZES.into_iter().enumerate().map(one).collect()
}

/// More choices than a block's threads look at at once, some so many that they turn twice or just not.
pub fn many_choices() -> Vec<Scenario> {
    let one = |(case, (rows, experts, each))| {
        let mixture = Mixture { hidden: 8, ffn: 4, routing: RoutingShape { experts, each } };
        let scenario = of_size(case, rows, mixture, (Format::F32, WeightFormat::F32, 6e-6));
        scenario.within(Limits { max_tokens: rows, max_samples: 9, max_positions: rows })
    };
    [(300, 5, 1), (700, 4, 3), (512, 5, 4), (33, 40, 32)].into_iter().enumerate().map(one).collect()
}

fn of_size(case: usize, rows: usize, mixture: Mixture, (format, packed, tolerance): (Format, WeightFormat, f64)) -> Scenario {
    let operation = format!("route, expert_linear, combine, {format:?} as {packed:?}");
    Scenario::new(operation, format!("{rows} rows, {mixture:?}"), tolerance, move |ops| {
        let noise = &mut Noise::new(60 + case as u64);
        let Mixture { hidden, ffn, routing: shape } = mixture;
        let each = shape.each;
        let (inputs, starts) = (ops.load_table(noise, 50, hidden), ops.load_table(noise, 50, hidden));
        // Some tokens have the same logits for several experts.
        let logits_table = Weight::from_f32(shape.experts, &coarse(noise, 50 * shape.experts));
        let logits_table = ops.load_matrix(&[logits_table.source()], WeightFormat::F32).unwrap();
        let [gate_up, down] = MixtureWeights::random(noise, mixture, format).load(ops, packed);
        let routing = ops.alloc_routing(shape).unwrap();
        let x = ops.alloc_poisoned(Rows::Tokens, hidden);
        let logits = ops.alloc_poisoned(Rows::Tokens, shape.experts);
        let wide = ops.alloc_poisoned(Rows::Routed { each }, 2 * ffn);
        let gated = ops.alloc_poisoned(Rows::Routed { each }, ffn);
        let narrow = ops.alloc_poisoned(Rows::Routed { each }, hidden);
        let [replaced, added] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, hidden));
        ops.begin(&plain_step(noise, rows, 50)).unwrap();
        ops.embedding(inputs, x);
        ops.embedding(logits_table, logits);
        ops.embedding(starts, added);
        // Another layer's routing came before.
        for normalised in [false, true] {
            ops.route(logits, normalised, routing);
            ops.expert_linear(x, gate_up, routing, wide);
            ops.silu_and_mul(wide, gated);
            ops.expert_linear(gated, down, routing, narrow);
            ops.combine(narrow, routing, if normalised { added } else { replaced }, Store::Add);
            if !normalised {
                ops.combine(narrow, routing, replaced, Store::Replace);
            }
        }
        ops.run();
        vec![wide, gated, narrow, replaced, added]
    })
}

/// Halves, so that some are equal.
fn coarse(noise: &mut Noise, n: usize) -> Vec<f32> {
    noise.values(n, 2.0).into_iter().map(|v| (v * 2.0).round() / 2.0).collect()
}

/// Rows that a sigmoid scales.
pub fn gates() -> Vec<Scenario> {
    let one = |(rows, width): (usize, usize)| {
        Scenario::new("gate_rows", format!("{rows} × {width}"), 2e-6, move |ops| {
            let noise = &mut Noise::new(70);
            let (inputs, gates) = (ops.load_table(noise, 50, width), ops.load_table(noise, 50, 1));
            let [x, gate] = [width, 1].map(|width| ops.alloc_poisoned(Rows::Tokens, width));
            ops.begin(&plain_step(noise, rows, 50)).unwrap();
            ops.embedding(inputs, x);
            ops.embedding(gates, gate);
            ops.gate_rows(gate, x);
            ops.run();
            vec![x]
        })
    };
    [(1, 300), (70, 33)].into_iter().map(one).collect()
}

/// Rows of what the experts make of some tokens, with others in front of them and behind.
pub fn rows_in_company(ops: &mut dyn Backend, format: Format, neighbours: usize) -> Vec<f32> {
    let noise = &mut Noise::new(80);
    let mixture = Mixture { hidden: 128, ffn: 64, routing: RoutingShape { experts: 6, each: 2 } };
    let (inputs, logits_table) = (ops.load_table(noise, 50, 128), ops.load_table(noise, 50, 6));
    let [gate_up, down] = MixtureWeights::random(noise, mixture, format).load(ops, WeightFormat::Auto);
    let routing = ops.alloc_routing(mixture.routing).unwrap();
    let [x, out] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, 128));
    let logits = ops.alloc_poisoned(Rows::Tokens, 6);
    let [wide, gated, narrow] = [128, 64, 128].map(|width| ops.alloc_poisoned(Rows::Routed { each: 2 }, width));
    let mine = 7;
    let mut step = plain_step(noise, 2 * neighbours + mine, 50);
    (0..mine).for_each(|i| step.tokens[neighbours + i] = i as u32);
    step.samples.truncate(1);
    ops.begin(&step).unwrap();
    ops.embedding(inputs, x);
    ops.embedding(logits_table, logits);
    ops.route(logits, true, routing);
    ops.expert_linear(x, gate_up, routing, wide);
    ops.silu_and_mul(wide, gated);
    ops.expert_linear(gated, down, routing, narrow);
    ops.combine(narrow, routing, out, Store::Replace);
    ops.run();
    ops.read(out).unwrap()[neighbours * 128..(neighbours + mine) * 128].to_vec()
}
