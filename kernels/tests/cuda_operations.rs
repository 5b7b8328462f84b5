//! Each operation of the CUDA backend, with its kernels emulated on the host, against the scalar reference.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

mod support;

use support::backend::Backend;
use support::emulation::Emulated;
use support::low_rank::{Factors, mixed_step};
use support::scenarios::{self, LIMITS, Scenario, rows_in_company};
use support::{Noise, Weight, mistakes, sampling};
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::cuda::device::Prefill;
use tidemill_kernels::*;

fn cuda(reversed: bool, limits: Limits) -> CudaBackend<Emulated> {
    CudaBackend::new(Emulated::new(reversed), limits)
}

fn agree(scenarios: Vec<Scenario>) {
    for (i, scenario) in scenarios.into_iter().enumerate() {
        // The threads of a block run in one order or the other; over all scenarios, both.
        let reversed = i % 2 == 1;
        let off = scenario.error(&mut cuda(reversed, scenario.limits), &scenario.wanted());
        let Scenario { operation, sizes, tolerance, .. } = &scenario;
        assert!(off <= *tolerance, "{operation}, {sizes}, reversed {reversed}: {off:e}");
    }
}

#[test]
fn rows_by_row() {
    agree(scenarios::rows());
}

#[test]
fn more_rows_than_a_grid_is_high() {
    agree(vec![scenarios::many_routed_rows()]);
}

#[test]
fn linears_of_every_form_replace_add_and_bias() {
    agree(scenarios::linears());
}

#[test]
fn attention_over_ragged_steps() {
    agree(scenarios::attention());
}

#[test]
fn attention_of_prompts_behind_what_was_computed_before() {
    agree(scenarios::prompts());
}

#[test]
fn warpgroups_give_the_same_attention() {
    let mut all = scenarios::attention_in(KvDtype::Bf16, 2e-2);
    all.retain(|scenario| ["head_dim: 64", "head_dim: 128"].iter().any(|width| scenario.sizes.contains(width)));
    for (i, scenario) in all.into_iter().chain(scenarios::prompts()).enumerate() {
        let mut device = Emulated::new(i % 2 == 1);
        device.prefill = Prefill::Wgmma;
        let mut ops = CudaBackend::new(device, scenario.limits);
        let off = scenario.error(&mut ops, &scenario.wanted());
        let Scenario { operation, sizes, tolerance, .. } = &scenario;
        assert!(off <= *tolerance, "{operation}, {sizes}: {off:e}");
        let by_warpgroups = ops.device().launches("attention_hopper_64") + ops.device().launches("attention_hopper_128");
        assert!(by_warpgroups > 0, "{operation}, {sizes}");
    }
}

#[test]
fn weights_and_caches_of_8_bit_floats() {
    agree(scenarios::only_on_cards());
}

#[test]
fn a_long_context_is_cut_into_parts_that_join() {
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

/// Prefill and decode run on different kernels and need not agree to the last bit; each with itself must, up to the number of rows at
/// which products go to the library.
#[test]
fn a_row_does_not_depend_on_its_company() {
    let noise = &mut Noise::new(11);
    for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0] {
        let weight = Weight::random(noise, 640, 128, format, 0.1);
        let run = |neighbours: usize| rows_in_company(&mut cuda(neighbours % 2 == 1, LIMITS), &weight, &[8, 1, 1], neighbours);
        let alone = run(0);
        for neighbours in [1, 5] {
            assert!(run(neighbours) == alone, "{format:?} {neighbours}");
        }
    }
}

#[test]
fn a_backend_gives_all_its_memory_back() {
    let mut ops = cuda(false, LIMITS);
    let noise = &mut Noise::new(5);
    let (inputs, starts) = (ops.load_table(noise, 50, 40), ops.load_table(noise, 50, 20));
    let (x, out) = (ops.alloc_poisoned(Rows::Tokens, 40), ops.alloc_poisoned(Rows::Tokens, 20));
    let before = ops.device().held();
    for _ in 0..3 {
        Factors::random(noise, 2, 40, &[20]).load(&mut ops, 2);
        ops.unload_adapter(2);
    }
    assert_eq!(ops.device().held(), before);
    Factors::random(noise, 1, 40, &[20]).load(&mut ops, 0);
    ops.begin(&mixed_step(noise, 30, &[0, NO_ADAPTER])).unwrap();
    ops.embedding(inputs, x);
    ops.embedding(starts, out);
    ops.lora(x, 0, out);
    ops.run();
    // Dropping it frees what it reserved; the device is asked to free nothing twice.
    drop(ops);
}

#[test]
fn mistakes_come_back_from_finish_and_leave_the_backend_usable() {
    mistakes::come_back(&mut cuda(false, LIMITS));
}

#[test]
fn sampling_gives_the_same_tokens_and_log_probabilities() {
    for case in 0..sampling::CASES {
        let got = sampling::drawn(&mut cuda(case % 2 == 1, LIMITS), case);
        assert_eq!(sampling::difference(&got, &sampling::wanted(case), 2e-5), None, "case {case}");
    }
}
