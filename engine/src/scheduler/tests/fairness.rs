//! Tenants beside each other.

use super::*;
use crate::fairness::{GENERATED_TOKEN, PROMPT_TOKEN};
use crate::request::Tenant;

fn of(tenant: u64, tokens: Vec<u32>, sampling: SamplingParams) -> Request {
    Request { tenant: Tenant { id: tenant, weight: 1 }, ..request(tokens, sampling) }
}

/// Service by tenant, counted from what came out: a prompt when it is computed, a token when it is drawn.
fn service(rig: &Rig, tenants: u64) -> Vec<i64> {
    let mut served = vec![0; tenants as usize];
    for (key, (request, _)) in &rig.asked {
        let prompt = rig.prompts.get(key).map_or(0, |(cached, _)| request.prompt.len() - cached);
        let id = SequenceId { priority: request.priority, request: *key, choice: 0 };
        let generated = rig.made.get(&id).map_or(0, Vec::len);
        served[request.tenant.id as usize] += (prompt as u64 * PROMPT_TOKEN + generated as u64 * GENERATED_TOKEN) as i64;
    }
    served
}

/// Whether a tenant still has requests that wait.
fn is_backlogged(rig: &Rig, tenant: u64) -> bool {
    rig.scheduler.waiting.values().any(|sequence| sequence.tenant().id == tenant)
}

const PROMPT: usize = 60;
const OUTPUT: usize = 30;

/// Theorem 4.4's U, with M the tokens of a batch in which every sequence is as long as can be.
fn bound(slots: usize) -> i64 {
    (PROMPT_TOKEN * PROMPT as u64).max(GENERATED_TOKEN * (slots * (PROMPT + OUTPUT)) as u64) as i64
}

#[derive(Clone, Debug)]
struct Habit {
    prompt: usize,
    output: usize,
}

fn habit() -> impl Strategy<Value = Habit> {
    (1..=PROMPT, 1..=OUTPUT).prop_map(|(prompt, output)| Habit { prompt, output })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn tenants_that_always_wait_are_served_alike_whatever_they_send(
        habits in prop::collection::vec(habit(), 2..4), slots in 2usize..5, budget in 5usize..80, blocks in 6usize..40,
    ) {
        let mut rig = Rig::new(blocks, slots, budget, false);
        let tenants = habits.len() as u64;
        // All of the first tenant's requests come before all of the second's, and so on: as many as make up five times the bound.
        for (tenant, Habit { prompt: length, output }) in habits.iter().enumerate() {
            let each = *length as i64 + 2 * *output as i64;
            for index in 0..(5 * bound(slots) / each + 1) as u32 {
                rig.submit(of(tenant as u64, prompt(index, *length), greedy(*output)));
            }
        }
        let (mut lowest, mut highest) = (vec![vec![0; 4]; 4], vec![vec![0; 4]; 4]);
        while (0..tenants).all(|tenant| is_backlogged(&rig, tenant)) {
            rig.step();
            let served = service(&rig, tenants);
            for a in 0..served.len() {
                for b in 0..a {
                    let difference = served[a] - served[b];
                    lowest[a][b] = difference.min(lowest[a][b]);
                    highest[a][b] = difference.max(highest[a][b]);
                    // Over every interval, not only from the start. What is computed of a prompt counts here when all of it is.
                    let most = 2 * bound(slots) + 2 * PROMPT as i64;
                    prop_assert!(highest[a][b] - lowest[a][b] <= most, "{a} and {b} differ by {difference}: {served:?}");
                }
            }
        }
        let served = service(&rig, tenants);
        prop_assert!(served.iter().max().unwrap() > &(2 * bound(slots)), "too short a run to show anything: {served:?}");
    }

    #[test]
    fn nobody_waits_longer_than_the_others_may_be_ahead(
        floods in prop::collection::vec((habit(), 5usize..40), 1..4), visitor in habit(), begin in 0usize..60,
        slots in 1usize..5, budget in 5usize..80, blocks in 6usize..40,
    ) {
        let mut rig = Rig::new(blocks, slots, budget, false);
        for (tenant, (Habit { prompt: length, output }, count)) in floods.iter().enumerate() {
            for index in 0..*count {
                rig.submit(of(tenant as u64, prompt(index as u32, *length), greedy(*output)));
            }
        }
        for _ in 0..begin {
            rig.step();
        }
        let (others, id) = (floods.len() as u64, floods.len() as u64);
        let before = service(&rig, others + 1);
        let key = rig.submit(of(id, prompt(3, visitor.prompt), greedy(visitor.output)));
        while !rig.prompts.contains_key(&key) {
            rig.step();
            let after = service(&rig, others + 1);
            let meanwhile: i64 = after.iter().zip(&before).map(|(after, before)| after - before).sum();
            // Theorem 4.11: 2 (n − 1) U; the prompts that were under way when the visitor came count here when they are complete.
            let most = 2 * others as i64 * bound(slots) + (others as i64 + 1) * PROMPT as i64;
            prop_assert!(meanwhile <= most, "{meanwhile} tokens of service went to others, {most} may");
        }
        rig.finish(20_000);
        rig.check_results(&[]);
    }
}

#[test]
fn a_visitor_takes_the_place_of_a_flood_at_once_and_loses_nothing_to_it() {
    let mut rig = Rig::new(256, 8, 64, true);
    let flood: Vec<_> = (0..64).map(|index| rig.submit(of(1, prompt(index, 20), greedy(100)))).collect();
    for _ in 0..20 {
        rig.step();
    }
    assert_eq!(rig.scheduler.running(), 8);
    let visitor = rig.submit(of(2, prompt(5, 30), greedy(10)));
    rig.step();
    assert!(rig.last_in_step.contains(&visitor));
    // One step for the prompt, which gives the first token, and one for each further token.
    for _ in 0..9 {
        rig.step();
    }
    assert_eq!(rig.ended.iter().map(|id| id.request).collect::<Vec<_>>(), [visitor]);
    assert_eq!(rig.scheduler.counts().preemptions, 1);
    assert!(flood.iter().take(7).all(|key| rig.last_in_step.contains(key)));
    rig.finish(2000);
    rig.check_results(&[]);
    assert_eq!(rig.scheduler.counts().preemptions, 1, "places are exchanged once, not back and forth");
}

#[test]
fn two_floods_share_the_places_without_taking_turns() {
    let mut rig = Rig::new(256, 8, 64, true);
    for index in 0..24 {
        rig.submit(of(1, prompt(index, 20), greedy(60)));
    }
    for _ in 0..10 {
        rig.step();
    }
    for index in 0..24 {
        rig.submit(of(2, prompt(index + 30, 20), greedy(60)));
    }
    for _ in 0..20 {
        rig.step();
    }
    let held = |tenant| rig.scheduler.running.values().filter(|sequence| sequence.tenant().id == tenant).count();
    assert_eq!((held(1), held(2)), (4, 4));
    assert_eq!(rig.scheduler.counts().preemptions, 4);
    rig.finish(2000);
    rig.check_results(&[]);
}

#[test]
fn a_long_prompt_does_not_hold_up_another_tenants_short_one() {
    let mut rig = Rig::new(128, 8, 64, true);
    for index in 0..3 {
        rig.submit(of(1, prompt(index, 1000), greedy(4)));
    }
    rig.step();
    let short = rig.submit(of(2, prompt(7, 40), greedy(4)));
    rig.step();
    rig.step();
    assert!(rig.prompts.contains_key(&short), "it waits for 3000 tokens of others");
    rig.finish(200);
    rig.check_results(&[]);
}

#[test]
fn a_weight_of_three_gets_three_times_the_service() {
    let mut rig = Rig::new(256, 4, 64, false);
    for index in 0..200 {
        rig.submit(of(0, prompt(index, 20), greedy(10)));
        let tenant = Tenant { id: 1, weight: 3 };
        rig.submit(Request { tenant, ..request(prompt(index + 7, 20), greedy(10)) });
    }
    while is_backlogged(&rig, 1) {
        rig.step();
    }
    let served = service(&rig, 2);
    assert!((served[1] - 3 * served[0]).abs() <= 2 * 3 * bound(4), "{served:?}");
    assert!(served[1] > 2 * served[0], "{served:?}");
}

#[test]
fn a_tenants_own_requests_stay_in_order_and_priority_goes_before_fairness() {
    let mut rig = Rig::new(32, 1, 256, true);
    let first = rig.submit(of(1, prompt(1, 10), greedy(4)));
    let second = rig.submit(of(1, prompt(2, 10), greedy(4)));
    let urgent = rig.submit(Request { priority: -1, ..of(1, prompt(3, 10), greedy(4)) });
    let other = rig.submit(of(2, prompt(4, 10), greedy(4)));
    rig.finish(50);
    let order: Vec<_> = rig.ended.iter().map(|id| id.request).collect();
    assert_eq!(order, [urgent, other, first, second]);
}
