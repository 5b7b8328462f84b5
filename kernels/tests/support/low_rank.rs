//! Random low-rank adapters.

use tidemill_kernels::*;

use super::Noise;
use super::scenarios::Scenario;
use super::steps::{Sequence, append};

/// An adapter with random factors for linears that are stacked of the same parts, some parts left out.
pub struct Factors {
    k: usize,
    sites: Vec<Vec<Factor>>,
}

struct Factor {
    column: usize,
    n: usize,
    rank: usize,
    scale: f32,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Factors {
    pub fn random(noise: &mut Noise, sites: usize, k: usize, parts: &[usize]) -> Self {
        let mut site = || {
            let (mut column, mut list) = (0, Vec::new());
            for &n in parts {
                if noise.unit() < 0.8 {
                    let rank = noise.pick(&[1, 2, 4, 7, 16, 33]);
                    let (a, b) = (noise.values(rank * k, 0.5), noise.values(n * rank, 0.5));
                    list.push(Factor { column, n, rank, scale: noise.pick(&[0.25, 2.0]), a, b });
                }
                column += n;
            }
            list
        };
        Factors { k, sites: (0..sites).map(|_| site()).collect() }
    }

    pub fn load<B: Ops + ?Sized>(&self, ops: &mut B, slot: u32) {
        fn low_rank(f: &Factor, k: usize) -> LowRank<'_> {
            LowRank { column: f.column, n: f.n, k, rank: f.rank, scale: f.scale, a: &f.a, b: &f.b }
        }
        let sites: Vec<Vec<LowRank<'_>>> =
            self.sites.iter().map(|parts| parts.iter().map(|f| low_rank(f, self.k)).collect()).collect();
        ops.load_adapter(slot, &sites).unwrap();
    }
}

/// A step of single rows; each row's adapter is drawn from `slots`.
pub fn mixed_step(noise: &mut Noise, rows: usize, slots: &[u32]) -> StepBatch {
    let mut batch = StepBatch::default();
    for row in 0..rows {
        let tokens = vec![noise.below(50) as u32];
        append(&mut batch, &mut Sequence { tokens, table: vec![row as u32], computed: 0 }, 1);
    }
    batch.slots.fill(-1);
    batch.adapters = (0..rows).map(|_| noise.pick(slots)).collect();
    batch
}

/// Updates of many adapters in one step.
pub fn scenarios() -> Vec<Scenario> {
    let cases: [(usize, usize, &'static [usize]); 5] =
        [(1, 64, &[32, 16, 16]), (7, 30, &[17, 5]), (70, 576, &[40]), (23, 129, &[64, 3, 61]), (5, 1, &[1])];
    let one = |(case, (rows, k, parts)): (usize, (usize, usize, &'static [usize]))| {
        Scenario::new("lora", format!("{rows} × {k} → {parts:?}"), 3e-6, move |ops| {
            let noise = &mut Noise::new(40 + case as u64);
            let n: usize = parts.iter().sum();
            let (inputs, starts) = (ops.load_table(noise, 50, k), ops.load_table(noise, 50, n));
            let x = ops.alloc_poisoned(Rows::Tokens, k);
            let [first, second, untouched] = [0; 3].map(|_| ops.alloc_poisoned(Rows::Tokens, n));
            for slot in [0, 1, 4, 5] {
                Factors::random(noise, 2, k, parts).load(ops, slot);
            }
            // A slot that is used again, and one that is empty again.
            Factors::random(noise, 2, k, parts).load(ops, 1);
            ops.unload_adapter(5);
            ops.begin(&mixed_step(noise, rows, &[0, 1, 4, NO_ADAPTER])).unwrap();
            ops.embedding(inputs, x);
            for (site, out) in [first, second, untouched].into_iter().enumerate() {
                ops.embedding(starts, out);
                ops.lora(x, site, out);
            }
            ops.run();
            vec![first, second, untouched]
        })
    };
    cases.into_iter().enumerate().map(one).chain([many_adapters()]).collect()
}

/// More tiles of rows than are computed at once: each row has an adapter of its own.
fn many_adapters() -> Scenario {
    const ROWS: usize = 70;
    Scenario::new("lora", format!("{ROWS} rows, as many adapters"), 3e-6, |ops| {
        let noise = &mut Noise::new(47);
        let (inputs, starts) = (ops.load_table(noise, 50, 24), ops.load_table(noise, 50, 12));
        let x = ops.alloc_poisoned(Rows::Tokens, 24);
        let out = ops.alloc_poisoned(Rows::Tokens, 12);
        for slot in 0..ROWS as u32 {
            Factors::random(noise, 1, 24, &[8, 4]).load(ops, slot);
        }
        let mut step = mixed_step(noise, ROWS, &[0]);
        step.adapters = (0..ROWS as u32).rev().collect();
        ops.begin(&step).unwrap();
        ops.embedding(inputs, x);
        ops.embedding(starts, out);
        ops.lora(x, 0, out);
        ops.run();
        vec![out]
    })
}
