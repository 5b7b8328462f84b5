//! Each operation of the CPU backend, on every instruction path of this machine and several thread counts, against the scalar reference.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use crate::support;
use crate::support::backend::Backend;
use crate::support::low_rank::{Factors, mixed_step};
use crate::support::scenarios::{self, LIMITS, Scenario, rows_in_company};
use crate::support::steps::{Sequence, append};
use crate::support::{Noise, Weight, experts, mistakes, sampling};
use tidemill_kernels::cpu::{CpuBackend, CpuOptions};
use tidemill_kernels::isa::Isa;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

fn cpu(isa: Isa, threads: usize, limits: Limits) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, isa: Some(isa), limits }).unwrap()
}

fn agree(scenarios: Vec<Scenario>) {
    for scenario in scenarios {
        let wanted = scenario.wanted();
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let off = scenario.error(&mut cpu(isa, threads, scenario.limits), &wanted);
                let Scenario { operation, sizes, tolerance, .. } = &scenario;
                assert!(off <= *tolerance, "{operation}, {sizes}, {isa:?}, {threads} threads: {off:e}");
            }
        }
    }
}

#[test]
fn rows_by_row() {
    agree(scenarios::rows());
}

#[test]
fn linears_of_every_form_replace_add_and_bias() {
    agree(scenarios::linears());
}

#[test]
fn attention_over_ragged_steps_and_long_contexts() {
    agree(scenarios::attention());
    agree(scenarios::long_contexts());
}

#[test]
fn a_fork_copies_its_last_block_and_then_goes_its_own_way() {
    agree(scenarios::copies());
}

#[test]
fn experts_of_every_form_from_one_row_to_many() {
    agree(support::experts::scenarios());
    agree(support::experts::gates());
}

#[test]
fn low_rank_updates_of_many_adapters_in_one_step() {
    agree(support::low_rank::scenarios());
}

#[test]
fn a_row_does_not_depend_on_its_company() {
    let noise = &mut Noise::new(11);
    for isa in Isa::available() {
        for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0] {
            let weight = Weight::random(noise, 640, 128, format, 0.1);
            let alone = rows_in_company(&mut cpu(isa, 1, LIMITS), &weight, &[64], 0);
            for (threads, takes, neighbours) in [(2, &[64][..], 0), (2, &[1; 64], 0), (3, &[20, 20, 20, 4], 5), (1, &[1; 64], 2)]
            {
                let rows = rows_in_company(&mut cpu(isa, threads, LIMITS), &weight, takes, neighbours);
                assert!(rows == alone, "{isa:?} {format:?} {threads} {takes:?} {neighbours}");
            }
        }
    }
}

#[test]
fn what_experts_make_of_a_row_does_not_depend_on_its_company() {
    for isa in Isa::available() {
        for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0] {
            let alone = experts::rows_in_company(&mut cpu(isa, 1, LIMITS), format, 0);
            for (threads, neighbours) in [(2, 0), (1, 3), (3, 31)] {
                let rows = experts::rows_in_company(&mut cpu(isa, threads, LIMITS), format, neighbours);
                assert!(rows == alone, "{isa:?} {format:?} {threads} {neighbours}");
            }
        }
    }
}

#[test]
fn what_only_cards_have_is_refused_with_what_to_choose() {
    let mut ops = cpu(Isa::detect(), 1, LIMITS);
    let weight = Weight::random(&mut Noise::new(1), 8, 64, Format::Bf16, 1.0);
    let refused = ops.load_matrix(&[weight.source()], WeightFormat::Fp8).unwrap_err();
    assert!(refused.to_string().contains("choose int8"), "{refused}");
    let spec = KvSpec { layers: 1, blocks: 1, block_size: 32, kv_heads: 1, head_dim: 64, dtype: KvDtype::Fp8 };
    let refused = ops.alloc_kv(spec).unwrap_err();
    assert!(refused.to_string().contains("choose bf16"), "{refused}");
}

#[test]
fn mistakes_come_back_from_finish_and_leave_the_backend_usable() {
    mistakes::come_back(&mut cpu(Isa::detect(), 2, LIMITS));
    mistakes::come_back(&mut Reference::new(LIMITS));
}

#[test]
fn sampling_gives_the_same_tokens_and_log_probabilities() {
    for case in 0..sampling::CASES {
        let wanted = sampling::wanted(case);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let got = sampling::drawn(&mut cpu(isa, threads, LIMITS), case);
                assert_eq!(sampling::difference(&got, &wanted, 2e-5), None, "case {case}, {isa:?}, {threads} threads");
            }
        }
    }
}

#[test]
fn a_rows_update_does_not_depend_on_its_neighbours() {
    let (k, parts) = (100, [48, 20]);
    for isa in Isa::available() {
        let noise = &mut Noise::new(3);
        let mut ops = CpuBackend::new(CpuOptions { threads: 3, isa: Some(isa), limits: LIMITS }).unwrap();
        let (inputs, starts) = (ops.load_table(noise, 50, k), ops.load_table(noise, 50, 68));
        let (x, out) = (ops.alloc_poisoned(Rows::Tokens, k), ops.alloc_poisoned(Rows::Tokens, 68));
        for slot in 0..3 {
            Factors::random(noise, 1, k, &parts).load(&mut ops, slot);
        }
        let mut run = |batch: &StepBatch| {
            ops.begin(batch).unwrap();
            ops.embedding(inputs, x);
            ops.embedding(starts, out);
            ops.lora(x, 0, out);
            ops.run();
            ops.read(out).unwrap()
        };
        let batch = mixed_step(noise, 70, &[0, 1, 2, NO_ADAPTER]);
        let together = run(&batch);
        for row in 0..70 {
            let mut alone = StepBatch::default();
            append(&mut alone, &mut Sequence { tokens: vec![batch.tokens[row]], table: vec![0], computed: 0 }, 1);
            alone.slots.fill(-1);
            alone.adapters = vec![batch.adapters[row]];
            assert_eq!(run(&alone), together[row * 68..(row + 1) * 68], "{isa:?} row {row}");
        }
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let mut ops = CpuBackend::new(CpuOptions { threads: 1, isa: None, limits: LIMITS }).unwrap();
    let noise = &mut Noise::new(5);
    let (inputs, x, out) =
        (ops.load_table(noise, 50, 8), ops.alloc_poisoned(Rows::Tokens, 8), ops.alloc_poisoned(Rows::Tokens, 12));
    let values = [0.5; 64];
    let good = LowRank { column: 4, n: 8, k: 8, rank: 2, scale: 1.0, a: &values[..16], b: &values[..16] };
    let bad = [
        LowRank { rank: 0, a: &[], b: &[], ..good },
        LowRank { rank: 3, ..good },
        LowRank { n: 9, ..good },
        LowRank { column: usize::MAX, ..good },
    ];
    for bad in bad {
        assert!(ops.load_adapter(0, &[vec![bad]]).is_err(), "{bad:?}");
    }
    assert!(ops.load_adapter(0, &[vec![good, LowRank { k: 4, rank: 4, n: 4, ..good }]]).is_err());
    assert!(ops.load_adapter(u32::MAX - 1, &[vec![good]]).is_err());
    let shared = ops.load_adapter(0, &[vec![good, LowRank { column: 11, ..good }]]).unwrap_err().to_string();
    assert!(shared.contains("two parts of site 0 update column 11"), "{shared}");
    ops.load_adapter(0, &[vec![LowRank { column: 12, ..good }, good]]).unwrap();
    ops.unload_adapter(0);
    let mut step = |slot: u32, part: Option<LowRank<'_>>| {
        if let Some(part) = part {
            ops.load_adapter(0, &[vec![part]])?;
        }
        ops.begin(&mixed_step(&mut Noise::new(1), 3, &[slot]))?;
        ops.embedding(inputs, x);
        ops.lora(x, 0, out);
        ops.finish(&mut StepOutput::default())
    };
    assert!(step(0, None).unwrap_err().to_string().contains("slot 0"));
    step(0, Some(good)).unwrap();
    // Columns beyond the output, and an input of another width.
    assert!(step(0, Some(LowRank { column: 5, ..good })).is_err());
    assert!(step(0, Some(LowRank { k: 4, rank: 4, n: 4, ..good })).is_err());
    step(0, Some(good)).unwrap();
}
