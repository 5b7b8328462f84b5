//! Steps planned while one is under way, and blocks of preempted sequences that are kept.

use super::*;

#[test]
fn a_step_is_planned_while_the_one_before_it_runs_and_one_step_too_many_is_dropped() {
    let mut rig = Rig::new(16, 4, 256, true).running_ahead();
    let first = rig.submit(request(prompt(1, 10), greedy(3)));
    let second = rig.submit(request(prompt(2, 40), greedy(100)));
    rig.step();
    assert!(rig.made.is_empty() && rig.under_way == 1);
    rig.step();
    // Both go on from tokens that were not known when their rows were written.
    assert_eq!((rig.batch.tokens.clone(), rig.batch.carried.clone()), (vec![0, 0], vec![(0, 0), (1, 1)]));
    assert_eq!(rig.made.values().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
    rig.step();
    assert_eq!(rig.last_in_step, [first, second]);
    // The third token is the last of the first, whatever it is: that is no step too many.
    rig.step();
    assert_eq!(rig.last_in_step, [second]);
    let used = rig.scheduler.pool().borrow().used();
    rig.cancel(second);
    assert!(rig.scheduler.pool().borrow().used() < used);
    // A newcomer may have its blocks, although the step that writes to them is under way.
    rig.submit(request(prompt(3, 400), greedy(2)));
    rig.finish(20);
    rig.check_results(&[second]);
}

#[test]
fn a_step_whose_tokens_somebody_needs_is_waited_for() {
    let compiler = Compiler::new(letters(), END.to_vec(), VOCABULARY);
    let grammar = compiler.compile(&Constraint::Regex("[a-z]*".into())).unwrap();
    let wants = [
        SamplingParams { grammar: Some(grammar), ..greedy(4) },
        SamplingParams { presence_penalty: 0.5, ..greedy(4) },
        SamplingParams { n: 2, temperature: 1.0, ..greedy(4) },
    ];
    for sampling in wants {
        let mut rig = Rig::new(16, 4, 64, false);
        rig.submit(request(prompt(1, 5), greedy(9)));
        let forks = sampling.n > 1;
        rig.submit(request(prompt(2, 5), sampling));
        rig.scheduler.schedule(&mut rig.batch);
        assert!(!rig.scheduler.may_plan_ahead());
        rig.under_way = 1;
        rig.collect();
        rig.scheduler.schedule(&mut rig.batch);
        // Choices that have forked need nothing more of each other.
        assert_eq!(rig.scheduler.may_plan_ahead(), forks);
    }
}

#[test]
fn who_needs_a_preemption_waits_until_no_step_is_under_way() {
    let mut rig = Rig::new(5, 2, 256, false).running_ahead();
    rig.submit(request(prompt(1, 60), greedy(30)));
    rig.submit(request(prompt(2, 60), greedy(30)));
    let mut waited = 0;
    while rig.scheduler.counts().preemptions == 0 {
        rig.step();
        waited += usize::from(rig.scheduler.blocked_ahead);
    }
    assert!(waited > 0);
    rig.finish(200);
    rig.check_results(&[]);
}

#[test]
fn preempted_sequences_come_back_with_what_they_had_computed() {
    for ahead in [false, true] {
        let mut rig = Rig::new(5, 2, 256, false).swapping(8);
        rig.model.ahead = ahead;
        rig.submit(request(prompt(1, 60), greedy(30)));
        rig.submit(request(prompt(2, 60), greedy(30)));
        let (mut saved, mut restored, mut rows) = (0, 0, 0);
        while rig.scheduler.requests() > 0 {
            rows += rig.step();
            saved += rig.batch.saved.len();
            restored += rig.batch.restored.len();
            (rig.batch.saved, rig.batch.restored) = Default::default();
        }
        rig.finish(1);
        rig.check_results(&[]);
        let counts = rig.scheduler.counts();
        assert!(counts.preemptions >= 1 && counts.restored == counts.preemptions, "{counts:?}");
        assert!(saved >= 2 && restored == saved, "{saved} {restored}");
        // Every token but the last of each is computed once; run ahead, nobody ends unforeseen.
        assert_eq!(rows, 2 * (60 + 29));
    }
}

#[test]
fn without_room_for_its_blocks_a_sequence_is_computed_again() {
    let mut rig = Rig::new(5, 2, 256, false).swapping(1);
    rig.submit(request(prompt(1, 60), greedy(30)));
    rig.submit(request(prompt(2, 60), greedy(30)));
    rig.finish(200);
    let counts = rig.scheduler.counts();
    assert!(counts.preemptions >= 1 && counts.restored == 0, "{counts:?}");
    rig.check_results(&[]);
}

#[test]
fn what_a_failed_step_was_to_save_is_computed_again_and_what_it_was_to_restore_is_lost() {
    let mut rig = Rig::new(5, 2, 256, false).swapping(8);
    let first = rig.submit(request(prompt(1, 60), greedy(30)));
    let second = rig.submit(request(prompt(2, 60), greedy(30)));
    while rig.scheduler.counts().preemptions == 0 {
        rig.scheduler.schedule(&mut rig.batch);
        rig.under_way = 1;
        if rig.scheduler.counts().preemptions == 0 {
            rig.collect();
        }
    }
    assert_eq!((rig.batch.saved.len(), rig.scheduler.swap.free()), (2, 6));
    assert_eq!(rig.scheduler.fail(), [first]);
    rig.under_way = 0;
    assert_eq!(rig.scheduler.swap.free(), 8, "what nobody knows anything of is not kept");
    rig.cancel(first);
    rig.scheduler.schedule(&mut rig.batch);
    assert_eq!((rig.batch.restored.len(), rig.batch.tokens.len() > 60), (0, true));
    rig.under_way = 1;
    rig.collect();
    rig.finish(100);
    rig.check_results(&[first]);
    // The same, but the step that fails is the one that brings it back.
    let mut rig = Rig::new(5, 2, 256, false).swapping(8);
    let first = rig.submit(request(prompt(1, 60), greedy(30)));
    let second_here = rig.submit(request(prompt(2, 60), greedy(30)));
    assert_eq!(second, second_here);
    while rig.scheduler.counts().preemptions == 0 {
        rig.step();
    }
    rig.cancel(first);
    rig.scheduler.schedule(&mut rig.batch);
    assert_eq!(rig.batch.restored.len(), 2);
    assert_eq!(rig.scheduler.fail(), [second]);
    rig.cancel(second);
    assert_eq!((rig.scheduler.swap.free(), rig.scheduler.pool().borrow().used()), (8, 0));
}
