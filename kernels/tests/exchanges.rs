//! What ranks exchange in a step, on the scalar reference and on emulated devices, each rank on a thread of its own: that all have the
//! same, captured or not, and that one that fails or refuses leaves the others neither waiting nor with other numbers.

#![allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]

use crate::support::Noise;
use crate::support::backend::Backend;
use crate::support::emulation::Emulated;
use crate::support::exchange::{LIMITS, Table, ahead, sequence, step, steps_and_logits, worst_of};
use crate::support::faulty::Faulty;
use tidemill_kernels::collective::Member;
use tidemill_kernels::cuda::CudaBackend;
use tidemill_kernels::reference::Reference;
use tidemill_kernels::*;

/// Backends that agree with a whole table, after the steps.
fn agree<O: Backend>(ranks: usize, open: impl Fn(Member) -> O) -> Vec<O> {
    let (worst, backends) = worst_of(Member::group(ranks).into_iter().map(open).collect());
    assert!(worst < 1e-6, "{ranks} ranks: {worst:e}");
    backends
}

#[test]
fn parts_of_a_table_are_a_whole_one() {
    for ranks in [1, 2, 3, 4] {
        agree(ranks, |member| Reference::of_group(LIMITS, member));
        agree(ranks, |member| CudaBackend::new(Emulated::of_group(member), LIMITS));
    }
}

#[test]
fn captured_exchanges_are_replayed_on_every_rank() {
    for ranks in [2, 4] {
        let backends = agree(ranks, |member| CudaBackend::new(Emulated::of_group(member), LIMITS).capturing());
        let replays: Vec<usize> = backends.iter().map(|backend| backend.device().replays).collect();
        assert!(replays.iter().all(|count| *count >= 4 && *count == replays[0]), "{replays:?}");
    }
}

#[test]
fn ranks_that_run_ahead_compute_the_tokens_that_the_first_draws() {
    for ranks in [2, 3] {
        let open = |member| CudaBackend::new(Emulated::of_group(member), LIMITS).capturing();
        let (drawn, wanted) = ahead(Member::group(ranks).into_iter().map(open).collect());
        assert_eq!(drawn, wanted, "{ranks} ranks");
    }
}

/// A rank whose captures are refused.
fn refusing(member: Member) -> Faulty<Emulated> {
    let refuses = member.place().rank == 1;
    let mut device = Faulty::new(Emulated::of_group(member));
    device.refuses = refuses;
    device
}

#[test]
fn where_one_rank_refuses_a_capture_none_replays() {
    let backends = agree(2, |member| CudaBackend::new(refusing(member), LIMITS).capturing());
    assert!(backends.iter().all(|backend| backend.device().inner().replays == 0));
}

#[test]
fn a_rank_that_fails_ends_the_step_of_all() {
    let (weight, steps, _) = steps_and_logits(3);
    let mut failed = 0;
    for after in 0..40 {
        let run = |member: Member| {
            let (rank, abort) = (member.place().rank, member.abort_handle());
            let device = Faulty::new(Emulated::of_group(member));
            let mut table = Table::new(CudaBackend::new(device, LIMITS).capturing(), &weight);
            if rank == 1 {
                table.ops.device().fail_after(after);
            }
            let outcome = steps.iter().try_for_each(|step| table.forward(step).map(|_| ()));
            if outcome.is_err() {
                abort.abort("a rank failed");
            }
            outcome.map_err(|error| error.to_string())
        };
        let outcomes: Vec<Result<(), String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = Member::group(3).into_iter().map(|member| scope.spawn(|| run(member))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        match &outcomes[1] {
            Err(first) => {
                assert!(!first.contains("broken off"), "failure after {after}: {first}");
                assert!(outcomes.iter().all(Result::is_err), "failure after {after}: {outcomes:?}");
                failed += 1;
            }
            // What failed was a capture, without which all went on.
            Ok(()) => assert!(outcomes.iter().all(Result::is_ok), "failure after {after}: {outcomes:?}"),
        }
    }
    assert!(failed > 30, "{failed}");
}

#[test]
fn an_exchange_that_does_not_fit_is_named() {
    let mut ops = CudaBackend::new(Emulated::default(), LIMITS);
    let (x, out) = (ops.alloc_poisoned(Rows::Samples, 3), ops.alloc_poisoned(Rows::Samples, 4));
    let batch = step(&mut [sequence(&mut Noise::new(1), 0, 5, 4)], 2);
    ops.begin(&batch).unwrap();
    ops.all_gather(x, out);
    let error = ops.finish(&mut StepOutput::default()).unwrap_err().to_string();
    assert!(error.contains("all_gather") && error.contains("should be 3"), "{error}");
}
