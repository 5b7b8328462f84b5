//! The operations of training on a device, with their kernels emulated on the host, against those of the processor.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use crate::support::emulation::Emulated;
use crate::support::training;
use tidemill_kernels::cuda::train::{DeviceCompute, Product};
use tidemill_kernels::train::Precision;
use tidemill_kernels::*;

fn device(precision: Precision, reversed: bool) -> DeviceCompute {
    DeviceCompute::new(Box::new(Emulated::new(reversed)), precision)
}

#[test]
fn products_of_all_orientations_and_ragged_shapes() {
    training::products_of_all_orientations_and_ragged_shapes(&device);
}

#[test]
fn frozen_weights_of_files_both_ways() {
    training::frozen_weights_of_files_both_ways(&device);
}

#[test]
fn norms_of_rows_and_heads_with_their_derivatives() {
    training::norms_of_rows_and_heads_with_their_derivatives(&device);
}

#[test]
fn rotation_gate_dropout_and_rows_that_are_moved() {
    training::rotation_gate_dropout_and_rows_that_are_moved(&device);
}

#[test]
fn attention_over_packed_segments_with_its_derivative() {
    training::attention_over_packed_segments_with_its_derivative(&device);
}

#[test]
fn attentions_derivative_is_that_of_differences() {
    training::attentions_derivative_is_that_of_differences(&device);
}

#[test]
fn log_probabilities_over_a_vocabulary_in_pieces() {
    training::log_probabilities_over_a_vocabulary_in_pieces(&device);
}

#[test]
fn memory_is_used_again_and_sizes_are_checked() {
    let compute = &mut device(Precision::F32, false);
    let first = compute.upload(&[1.0; 1000]).unwrap();
    let held = compute.bytes();
    drop(first);
    // About as large: the same memory.
    let again = compute.region(1010).unwrap();
    assert_eq!((compute.bytes(), again.len()), (held, 1010));
    let more = compute.region(1000).unwrap();
    assert!(compute.bytes() > held);
    let product = Product {
        m: 10,
        n: 10,
        k: 10,
        left: again.all().rows(10),
        right: more.part(0..99).rows(10),
        scale: 1.0,
        store: Store::Replace,
    };
    assert!(matches!(compute.matmul(&product, again.all(), 10), Err(KernelError::Shape { .. })));
    let product = Product { right: more.all().rows(10), ..product };
    assert!(compute.matmul(&product, again.part(0..100), 9).is_err());
    assert!(compute.copy(again.all(), more.all()).is_err());
    // What no device has is refused in words that help; what nobody used was given back first.
    drop(more);
    let refused = compute.region(1 << 31).err().unwrap().to_string();
    assert!(refused.contains("--device-memory") && refused.contains("--recompute"), "{refused}");
    assert_eq!(compute.bytes(), held);
    assert!(compute.most_bytes() > held);
}

#[test]
fn zeros_are_made_on_the_device_of_memory_that_held_something_else() {
    let mut compute = device(Precision::F32, false);
    let before = compute.upload(&[7.0; 300]).unwrap();
    drop(before);
    let held = compute.bytes();
    let zeros = compute.zeros(300).unwrap();
    assert_eq!(compute.bytes(), held, "the memory was used again");
    assert_eq!(compute.download(zeros.all()).unwrap(), [0.0; 300]);
    assert!(compute.zeros(0).unwrap().is_empty());
}

#[test]
fn a_bound_on_memory_is_held_to_and_named() {
    let mut compute = device(Precision::F32, false).within(10_000);
    let first = compute.region(1500).unwrap();
    assert!(compute.bytes() >= 6000 && compute.left().unwrap() == 10_000 - compute.bytes());
    let refused = compute.region(1500).err().unwrap().to_string();
    assert!(refused.contains("of 10000 that it may") && refused.contains("tokens_per_batch"), "{refused}");
    // What is not used any more is given back for what is.
    drop(first);
    compute.region(2000).unwrap();
}

#[test]
fn what_was_enough_once_is_kept_to_and_the_rest_is_for_others() {
    let mut compute = device(Precision::F32, false).within(100_000);
    // As many bytes in one piece or in several, which none of the others fits.
    let largest = [4000, 2000, 1000].map(|len| compute.region(len).unwrap());
    compute.settle();
    let needed = compute.bytes();
    assert_eq!(compute.left().unwrap(), 100_000 - needed);
    drop(largest);
    for len in (300..=1000).step_by(10) {
        let smaller = [4 * len, 2 * len, len].map(|len| compute.region(len).unwrap());
        assert_eq!((compute.most_bytes(), compute.left().unwrap()), (needed, 100_000 - needed), "{len}");
        drop(smaller);
    }
    let refused = compute.region(needed / 4 + 1).err().unwrap().to_string();
    assert!(refused.contains(&format!("of {needed} that it may")), "{refused}");
    // What was given back stays its own.
    assert_eq!((compute.bytes(), compute.left().unwrap()), (needed, 100_000 - needed));
}
