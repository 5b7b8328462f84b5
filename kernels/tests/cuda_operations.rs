//! Each operation of the CUDA backend, with its kernels emulated on the host, against the scalar reference.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use crate::support;
use crate::support::backend::Backend;
use crate::support::emulation::Emulated;
use crate::support::low_rank::{Factors, mixed_step};
use crate::support::scenarios::{self, LIMITS, Scenario, rows_in_company};
use crate::support::{Noise, Weight, error, mistakes, sampling};
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

/// All operations that go row by row, one after the other, each on what the one before left.
fn row_by_row(case: u64, rows: usize, width: usize) -> Scenario {
    Scenario::new("row by row", format!("{rows} × {width}"), 1e-5, move |ops| {
        let noise = &mut Noise::new(case);
        let [table, other] = [0; 2].map(|_| ops.load_table(noise, 50, width));
        let wide = ops.load_table(noise, 50, 2 * width);
        let weight = ops.load_vector(&noise.values(width, 1.0)).unwrap();
        let [x, normed, centred, sum, curved, capped, gated, swished] = [0; 8].map(|_| ops.alloc_poisoned(Rows::Tokens, width));
        let gate_up = ops.alloc_poisoned(Rows::Tokens, 2 * width);
        let sampled = ops.alloc_poisoned(Rows::Samples, width);
        ops.begin(&scenarios::plain_step(noise, rows, 50)).unwrap();
        ops.embedding(table, x);
        ops.scale(x, 3.5);
        ops.clamp(x, 2.0);
        ops.rms_norm(x, weight, 1e-5, normed);
        ops.layer_norm(x, weight, 1e-5, centred);
        ops.embedding(other, sum);
        ops.rms_norm_add(x, weight, 1e-5, sum);
        ops.gelu(x, curved);
        ops.embedding(other, capped);
        ops.soft_cap(capped, 0.7);
        ops.embedding(wide, gate_up);
        ops.silu_and_mul(gate_up, swished);
        ops.gelu_tanh_and_mul(gate_up, gated);
        ops.gather(sum, sampled);
        ops.run();
        vec![x, normed, centred, sum, curved, capped, gated, swished, gate_up, sampled]
    })
}

/// Rows of any width, which begin at any address and end in the middle of what a thread takes; each operation as it leaves a bf16 copy.
#[test]
fn rows_of_widths_that_are_drawn() {
    let noise = &mut Noise::new(77);
    for case in 0..40 {
        // Many narrow ones, some up to 5,000.
        let most = [9, 70, 300, 1100, 5000][case % 5];
        let (rows, width) = (1 + noise.below(3), 1 + noise.below(most));
        agree(vec![row_by_row(case as u64, rows, width)]);
    }
}

fn rounded_half(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
}

/// Producers of rows that a linear has read before leave the bf16 copy that a pass of its own would make of them, bit by bit, and each
/// element of it.
#[test]
fn copies_that_producers_leave_are_those_of_a_pass_of_their_own() {
    type Produce = fn(&mut CudaBackend<Emulated>, [Buf; 4], Vector);
    let producers: [(&str, Produce); 8] = [
        ("rms_norm", |ops, [x, _, out, _], weight| ops.rms_norm(x, weight, 1e-5, out)),
        ("rms_norm_add", |ops, [x, _, out, _], weight| {
            ops.rms_norm(x, weight, 1e-3, out);
            ops.rms_norm_add(x, weight, 1e-5, out);
        }),
        ("layer_norm", |ops, [x, _, out, _], weight| ops.layer_norm(x, weight, 1e-5, out)),
        ("gelu", |ops, [x, _, out, _], _| ops.gelu(x, out)),
        ("silu_and_mul", |ops, [_, gate_up, out, _], _| ops.silu_and_mul(gate_up, out)),
        ("gelu_tanh_and_mul", |ops, [_, gate_up, out, _], _| ops.gelu_tanh_and_mul(gate_up, out)),
        ("gather", |ops, [x, _, _, sampled], _| ops.gather(x, sampled)),
        ("embedding", |_, _, _| {}),
    ];
    for (case, width) in [1, 6, 127, 130, 576, 1030, 2051].into_iter().enumerate() {
        for (name, produce) in producers {
            // The copy is made by a step before, of other tokens, or now.
            let bits = |before: bool| {
                let noise = &mut Noise::new(case as u64);
                let mut ops = cuda(case % 2 == 1, LIMITS);
                let [table, wide] = [1, 2].map(|times| ops.load_table(noise, 50, times * width));
                let weight = ops.load_vector(&noise.values(width, 1.0)).unwrap();
                let weights: Vec<f32> = noise.values(20 * width, 1.0).iter().map(|v| rounded_half(*v)).collect();
                let matrix = ops.load_matrix(&[Weight::from_f32(width, &weights).source()], WeightFormat::Bf16).unwrap();
                let [x, gate_up, out] = [width, 2 * width, width].map(|width| ops.alloc_poisoned(Rows::Tokens, width));
                let sampled = ops.alloc_poisoned(Rows::Samples, width);
                let [read, last] = match name {
                    "gather" => [sampled, ops.alloc_poisoned(Rows::Samples, 20)],
                    "embedding" => [x, ops.alloc_poisoned(Rows::Tokens, 20)],
                    _ => [out, ops.alloc_poisoned(Rows::Tokens, 20)],
                };
                let steps = [0; 2].map(|_| scenarios::plain_step(noise, 5, 50));
                let run = |ops: &mut CudaBackend<Emulated>, step: &StepBatch| {
                    ops.begin(step).unwrap();
                    ops.embedding(table, x);
                    ops.embedding(wide, gate_up);
                    produce(ops, [x, gate_up, out, sampled], weight);
                    ops.linear(read, matrix, None, last, Store::Replace);
                    ops.run();
                };
                if before {
                    run(&mut ops, &steps[0]);
                }
                run(&mut ops, &steps[1]);
                assert_eq!(ops.device().launches("halve"), 1, "{name}");
                // A step of so few rows sums up products of bf16, in f32.
                let (x, products) = (ops.read(read).unwrap(), ops.read(last).unwrap());
                let inner = |(x, w): (&[f32], &[f32])| x.iter().zip(w).map(|(x, w)| rounded_half(*x) * w).sum::<f32>();
                let pairs = x.chunks(width).flat_map(|x| weights.chunks(width).map(move |w| (x, w)));
                let off = error(&products, &pairs.map(inner).collect::<Vec<f32>>());
                assert!(off < 1e-5, "{name}, {width}: {off:e}");
                products.iter().map(|v| v.to_bits()).collect::<Vec<u32>>()
            };
            assert!(bits(true) == bits(false), "{name}, {width}");
        }
    }
}

/// Tables of every form at widths that are no whole rows of theirs.
#[test]
fn tables_of_every_form_are_looked_up() {
    let forms = [
        (Format::F32, WeightFormat::F32, 0.0),
        (Format::F32, WeightFormat::Bf16, 4e-3),
        (Format::F32, WeightFormat::Int8, 4e-3),
        (Format::F32, WeightFormat::Fp8, 4e-2),
        (Format::Q8_0, WeightFormat::Auto, 4e-3),
        (Format::Q4_0, WeightFormat::Auto, 1e-3),
        (Format::Q4_1, WeightFormat::Auto, 1e-3),
    ];
    for (case, (format, packed, tolerance)) in forms.into_iter().enumerate() {
        for width in [1, 3, 30, 31, 130, 1025, 1999].map(|width: usize| match format {
            Format::F32 => width,
            // Of whole blocks.
            _ => width.next_multiple_of(32),
        }) {
            let scenario =
                Scenario::new(format!("embedding, {format:?} as {packed:?}"), width.to_string(), tolerance, move |ops| {
                    let noise = &mut Noise::new(case as u64);
                    let table = Weight::random(noise, 50, width, format, 1.0);
                    let table = ops.load_matrix(&[table.source()], packed).unwrap();
                    let x = ops.alloc_poisoned(Rows::Tokens, width);
                    ops.begin(&scenarios::plain_step(noise, 5, 50)).unwrap();
                    ops.embedding(table, x);
                    ops.run();
                    vec![x]
                });
            agree(vec![scenario]);
        }
    }
}

/// One row alone or one of many, at whatever address: sums are made in an order that the width alone decides.
#[test]
fn a_norm_does_not_depend_on_its_company() {
    for width in [1, 63, 130, 1029, 4999, 8195, 9216] {
        let bits = |rows: usize, centred: bool| -> Vec<u32> {
            let noise = &mut Noise::new(width as u64);
            let mut ops = cuda(rows.is_multiple_of(2), LIMITS);
            let (table, weight) = (ops.load_table(noise, 50, width), noise.values(width, 1.0));
            let weight = ops.load_vector(&weight).unwrap();
            let [x, out] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, width));
            let mut step = scenarios::plain_step(noise, rows, 50);
            step.tokens[rows - 1] = 7;
            ops.begin(&step).unwrap();
            ops.embedding(table, x);
            match centred {
                true => ops.layer_norm(x, weight, 1e-5, out),
                false => ops.rms_norm(x, weight, 1e-5, out),
            }
            ops.run();
            ops.read(out).unwrap()[(rows - 1) * width..].iter().map(|v| v.to_bits()).collect()
        };
        for centred in [false, true] {
            for rows in [2, 3, 4, 9] {
                assert!(bits(rows, centred) == bits(1, centred), "{width}, {rows} rows, centred {centred}");
            }
        }
    }
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
fn attention_of_few_new_tokens_behind_long_contexts_is_cut_along_keys() {
    for scenario in [KvDtype::Bf16, KvDtype::Fp8].into_iter().flat_map(scenarios::prompts_behind_long_contexts) {
        let mut ops = CudaBackend::new(Emulated::new(true), scenario.limits);
        let off = scenario.error(&mut ops, &scenario.wanted());
        let Scenario { operation, sizes, tolerance, .. } = &scenario;
        assert!(off <= *tolerance, "{operation}, {sizes}: {off:e}");
        assert!(ops.device().launches("attention_join") > 0, "{operation}, {sizes}");
    }
}

#[test]
fn warpgroups_give_the_same_attention() {
    let mut all = scenarios::attention_in(KvDtype::Bf16, 2e-2);
    all.retain(|scenario| ["head_dim: 64", "head_dim: 128"].iter().any(|width| scenario.sizes.contains(width)));
    let mut long = scenarios::prompts_behind_long_contexts(KvDtype::Bf16);
    long.retain(|scenario| !scenario.sizes.contains("head_dim: 256"));
    for (i, scenario) in all.into_iter().chain(scenarios::prompts()).chain(long).enumerate() {
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

/// Rows of 8-bit floats with a scale of each, and their numbers.
fn rounded(values: &[f32], width: usize) -> Vec<f64> {
    let row = |row: &[f32]| {
        let scale = row.iter().fold(0.0f32, |most, v| most.max(v.abs())) / e4m3::LARGEST;
        let number = move |v: &f32| f64::from(e4m3::decode(e4m3::encode(v * (1.0 / scale)))) * f64::from(scale);
        row.iter().map(number).collect::<Vec<f64>>()
    };
    values.chunks(width).flat_map(row).collect()
}

/// More rows than our kernels multiply: both sides are rounded as the scalar code rounds them; with fewer, or where the library could not,
/// activations stay as they are.
#[test]
fn rows_of_8_bit_floats_are_multiplied_with_weights_of_8_bit_floats() {
    for (rows, n, rounds) in [(65, 48, true), (70, 160, true), (64, 48, false), (70, 50, false)] {
        let (k, noise) = (200, &mut Noise::new(21));
        let table: Vec<f32> =
            noise.values(50 * k, 1.0).iter().enumerate().map(|(i, v)| v * 10f32.powi((i / k % 7) as i32 - 3)).collect();
        let (weights, bias, start) = (noise.values(n * k, 0.3), noise.values(n, 1.0), noise.values(50 * n, 1.0));
        let mut ops = cuda(rows % 2 == 1, LIMITS).with_activations(Activations::Fp8).unwrap();
        let source = |width, values: &[f32]| Weight::from_f32(width, values);
        let inputs = ops.load_matrix(&[source(k, &table).source()], WeightFormat::F32).unwrap();
        let starts = ops.load_matrix(&[source(n, &start).source()], WeightFormat::F32).unwrap();
        let w = ops.load_matrix(&[source(k, &weights).source()], WeightFormat::Fp8).unwrap();
        let held = ops.load_vector(&bias).unwrap();
        let x = ops.alloc_poisoned(Rows::Tokens, k);
        let [replaced, added] = [0; 2].map(|_| ops.alloc_poisoned(Rows::Tokens, n));
        let step = scenarios::plain_step(noise, rows, 50);
        ops.begin(&step).unwrap();
        ops.embedding(inputs, x);
        ops.embedding(starts, added);
        ops.linear(x, w, Some(held), replaced, Store::Replace);
        ops.linear(x, w, None, added, Store::Add);
        ops.run();
        let (from, by) = (rounded(&table, k), rounded(&weights, k));
        let exact: Vec<f64> = table.iter().map(|v| f64::from(*v)).collect();
        let products = |from: &[f64], token: usize, feature: usize| -> f64 {
            from[token * k..][..k].iter().zip(&by[feature * k..][..k]).map(|(a, b)| a * b).sum()
        };
        for (buf, adds) in [(replaced, false), (added, true)] {
            // Each row against its own magnitude: they differ by powers of ten.
            for (row, got) in ops.read(buf).unwrap().chunks(n).enumerate() {
                let token = step.tokens[row] as usize;
                let want = |from: &[f64]| -> Vec<f32> {
                    let rest = |feature: usize| f64::from(if adds { start[token * n + feature] } else { bias[feature] });
                    (0..n).map(|feature| (products(from, token, feature) + rest(feature)) as f32).collect()
                };
                let (alike, whole) = (error(got, &want(&from)), error(got, &want(&exact)));
                match rounds {
                    true => assert!(alike < 2e-6 && whole < 6e-2, "{rows} × {n}, row {row}: {alike:e} {whole:e}"),
                    false => assert!(whole < 1e-2, "{rows} × {n}, row {row}: {whole:e}"),
                }
            }
        }
    }
}

#[test]
fn a_row_of_zeros_and_one_of_next_to_nothing_round_to_numbers() {
    let mut ops = cuda(false, LIMITS).with_activations(Activations::Fp8).unwrap();
    let noise = &mut Noise::new(2);
    let values: Vec<f32> =
        (0..64).map(|_| 0.0).chain((0..64).map(|i| 1e-42 * i as f32)).chain((0..64).map(|i| i as f32)).collect();
    let inputs = ops.load_matrix(&[Weight::from_f32(64, &values).source()], WeightFormat::F32).unwrap();
    let w = ops.load_matrix(&[Weight::from_f32(64, &[0.5; 64 * 16]).source()], WeightFormat::Fp8).unwrap();
    let (x, out) = (ops.alloc_poisoned(Rows::Tokens, 64), ops.alloc_poisoned(Rows::Tokens, 16));
    let step = scenarios::plain_step(noise, 70, 3);
    ops.begin(&step).unwrap();
    ops.embedding(inputs, x);
    ops.linear(x, w, None, out, Store::Replace);
    ops.run();
    for (row, token) in ops.read(out).unwrap().chunks(16).zip(&step.tokens) {
        let want = if *token == 2 { 0.5 * (0..64).sum::<i32>() as f32 } else { 0.0 };
        assert!(row.iter().all(|v| (v - want).abs() <= want * 0.02 + 1e-30), "{token}: {row:?}");
    }
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
    agree(support::experts::many_choices());
    agree(support::experts::gates());
}

#[test]
fn low_rank_updates_of_many_adapters_in_one_step() {
    agree(support::low_rank::scenarios());
}

/// Rows of an adapter share what is read of it, and those of others are computed beside them.
#[test]
fn what_an_adapter_adds_to_a_row_does_not_depend_on_its_company() {
    let bits = |rows: usize, others: &[u32]| -> Vec<u32> {
        let noise = &mut Noise::new(31);
        let (k, n) = (1100, 300);
        let mut ops = cuda(rows % 2 == 1, LIMITS);
        let (inputs, starts) = (ops.load_table(noise, 50, k), ops.load_table(noise, 50, n));
        let (x, out) = (ops.alloc_poisoned(Rows::Tokens, k), ops.alloc_poisoned(Rows::Tokens, n));
        for slot in 0..3 {
            Factors::random(noise, 1, k, &[200, 100]).load(&mut ops, slot);
        }
        let mut step = mixed_step(noise, rows, others);
        // The row that is looked at is the last.
        (step.tokens[rows - 1], step.adapters[rows - 1]) = (7, 1);
        ops.begin(&step).unwrap();
        ops.embedding(inputs, x);
        ops.embedding(starts, out);
        ops.lora(x, 0, out);
        ops.run();
        ops.read(out).unwrap()[(rows - 1) * n..].iter().map(|v| v.to_bits()).collect()
    };
    let alone = bits(1, &[1]);
    for (rows, others) in [(2, &[1][..]), (17, &[1]), (40, &[0, 1, 2, NO_ADAPTER])] {
        assert!(bits(rows, others) == alone, "{rows} rows of {others:?}");
    }
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

/// Stretches of 16 keys would go over the ends of such blocks.
#[test]
fn blocks_that_are_no_multiple_of_16_keys_are_attended_to() {
    const BLOCK: usize = 24;
    let heads = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
    let scenario = Scenario::new("attention over blocks of 24", format!("{heads:?}"), 2e-2, move |ops| {
        let noise = &mut Noise::new(6);
        let HeadShape { kv_heads, head_dim, .. } = heads;
        let width = (heads.heads + 2 * kv_heads) * head_dim;
        let table = ops.load_table(noise, 64, width);
        let rope = ops.load_rope(&[1.0, 0.5, 0.1], 1.0).unwrap();
        let spec = AttentionSpec { scale: 0.125, sliding_window: None, soft_cap: None, alibi: None };
        let (qkv, out) = (ops.alloc_poisoned(Rows::Tokens, width), ops.alloc_poisoned(Rows::Tokens, heads.heads * head_dim));
        let spec_kv = KvSpec { layers: 1, blocks: 5, block_size: BLOCK, kv_heads, head_dim, dtype: KvDtype::Bf16 };
        let kv = ops.alloc_kv(spec_kv).unwrap();
        let blocks = vec![3u32, 0, 4];
        for (first, rows) in [(0usize, 50usize), (50, 1)] {
            let mut step = scenarios::plain_step(noise, rows, 64);
            let context_len = (first + rows) as u32;
            step.sequences = vec![SequenceSpan { first_row: 0, rows: rows as u32, context_len, first_block: 0 }];
            step.positions = (first as u32..context_len).collect();
            step.slots = (first..first + rows).map(|p| (blocks[p / BLOCK] as usize * BLOCK + p % BLOCK) as i64).collect();
            step.blocks = blocks.clone();
            [qkv, out].into_iter().for_each(|buf| ops.poison(buf));
            ops.begin(&step).unwrap();
            ops.embedding(table, qkv);
            ops.rope_cache(qkv, heads, None, rope, kv, 0);
            ops.paged_attention(qkv, heads, spec, kv, 0, out);
            ops.run();
        }
        vec![out]
    });
    agree(vec![scenario]);
}
