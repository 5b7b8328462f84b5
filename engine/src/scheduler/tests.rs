use super::*;

mod ahead;
mod fairness;

use crate::grammar::{Compiler, Constraint};
use crate::model::Model;
use crate::recall_model::{RecallModel, expected, expected_scores};
use crate::request::{SamplingParams, Tenant};
use crate::sequence::tests::request;
use crate::tokenizer::letters::letters;
use proptest::prelude::*;

const VOCABULARY: usize = 60;
const END: [u32; 1] = [7];

type Scores = Vec<Option<f32>>;

/// A scheduler over a model that notices every mistake, and what came out so far.
struct Rig {
    scheduler: Scheduler,
    model: RecallModel,
    batch: StepBatch,
    out: StepOutput,
    made: BTreeMap<SequenceId, Vec<u32>>,
    /// Cached tokens and log-probabilities.
    prompts: BTreeMap<RequestKey, (usize, Option<Scores>)>,
    asked: BTreeMap<RequestKey, (Arc<Request>, u64)>,
    ended: Vec<SequenceId>,
    steps: usize,
    last_in_step: Vec<RequestKey>,
    /// Steps that were submitted.
    under_way: usize,
    places: usize,
}

impl Rig {
    fn new(blocks: usize, max_seqs: usize, max_batch_tokens: usize, prefix_caching: bool) -> Self {
        let limits = SchedulerLimits {
            max_seqs,
            max_batch_tokens,
            max_samples: max_seqs,
            prefix_caching,
            end_of_turn: END.to_vec(),
            max_model_len: blocks * BLOCK_SIZE,
        };
        let mut model = RecallModel::new(VOCABULARY, max_batch_tokens, max_seqs);
        model.reserve(blocks);
        Self {
            scheduler: Scheduler::new(limits, SharedPool::new(blocks)),
            model,
            batch: StepBatch::default(),
            out: StepOutput::default(),
            made: BTreeMap::new(),
            prompts: BTreeMap::new(),
            asked: BTreeMap::new(),
            ended: Vec::new(),
            steps: 0,
            last_in_step: Vec::new(),
            under_way: 0,
            places: 0,
        }
    }

    /// The same on a model that is told of a step before the one before it is computed.
    fn running_ahead(mut self) -> Self {
        self.model.ahead = true;
        self
    }

    /// The same with so many places for the blocks of preempted sequences.
    fn swapping(mut self, places: usize) -> Self {
        self.model.reserve_swap(places);
        Self { scheduler: self.scheduler.swapping(SwapSpace::new(places)), places, ..self }
    }

    fn submit(&mut self, request: Request) -> RequestKey {
        let key = RequestKey(self.asked.len() as u64);
        let request = Arc::new(request);
        self.asked.insert(key, (Arc::clone(&request), 1000 + key.0));
        self.scheduler.add(key, request, 1000 + key.0);
        key
    }

    fn cancel(&mut self, key: RequestKey) {
        self.scheduler.cancel(key, self.asked[&key].0.priority);
        self.check_pool();
    }

    fn pause(&mut self, key: RequestKey, paused: bool) {
        self.scheduler.set_paused(key, self.asked[&key].0.priority, paused);
    }

    fn check_pool(&self) {
        let pool = self.scheduler.pool().borrow();
        assert_eq!(pool.check(), Ok(()));
        assert_eq!(pool.free() + pool.used(), pool.total());
    }

    /// Plans a step and, where none is to be planned before it is applied, computes the oldest; returns the tokens planned.
    fn step(&mut self) -> usize {
        self.steps += 1;
        let ahead = self.under_way > 0;
        if ahead && !self.scheduler.may_plan_ahead() {
            self.collect();
            return self.step();
        }
        let preemptions = self.scheduler.counts().preemptions;
        let tokens = self.scheduler.schedule(&mut self.batch);
        self.check_pool();
        assert!(!ahead || self.scheduler.counts().preemptions == preemptions, "nobody is preempted while a step is under way");
        let slots: usize = self.scheduler.running.values().map(|sequence| sequence.slots).sum();
        assert!(slots <= self.scheduler.limits.max_seqs);
        let idle = self.scheduler.waiting.values().chain(self.scheduler.running.values()).all(|sequence| sequence.paused);
        if !ahead {
            assert_eq!(tokens == 0, idle, "a step computes something exactly when somebody can run");
        }
        if tokens > 0 {
            self.last_in_step = self.scheduler.in_step().collect();
            if self.model.ahead {
                self.model.submit(&self.batch).unwrap();
            }
            self.under_way += 1;
        }
        if !self.model.ahead || self.under_way > 1 || (tokens == 0 && ahead) {
            self.collect();
        }
        tokens
    }

    /// Waits for the oldest step that is under way.
    fn collect(&mut self) {
        if self.under_way == 0 {
            return;
        }
        self.under_way -= 1;
        if self.model.ahead {
            self.model.collect(&mut self.out).unwrap();
        } else {
            self.model.forward(&self.batch, &mut self.out).unwrap();
        }
        let mut outcomes = Vec::new();
        self.scheduler.apply(&mut self.out, &mut outcomes).unwrap();
        self.check_pool();
        for outcome in outcomes {
            match outcome {
                other @ (Outcome::Complete { .. } | Outcome::Stuck { .. }) => panic!("no grammar here, but {other:?}"),
                Outcome::Prompt { request, cached_tokens, logprobs } => {
                    let logprobs = logprobs.map(|all| all.into_iter().map(|one| one.map(|record| record.logprob)).collect());
                    assert!(self.prompts.insert(request, (cached_tokens, logprobs)).is_none(), "one prompt event each");
                }
                Outcome::Token { id, sampled } => {
                    let made = self.made.entry(id).or_default();
                    made.push(sampled.token);
                    let sampling = &self.asked[&id.request].0.sampling;
                    if END.contains(&sampled.token) || Some(made.len()) == sampling.max_tokens {
                        self.ended.push(id);
                        self.scheduler.finish(id);
                    }
                }
            }
        }
        self.check_pool();
    }

    fn finish(&mut self, most_steps: usize) {
        let start = self.steps;
        while self.scheduler.requests() > 0 {
            self.step();
            assert!(self.steps - start <= most_steps, "{} requests are starving", self.scheduler.requests());
        }
        while self.under_way > 0 {
            self.collect();
        }
        assert_eq!(self.scheduler.swap.free(), self.places, "places leaked");
        assert_eq!(self.scheduler.pool().borrow().used(), 0, "blocks leaked");
        assert!(self.scheduler.running.is_empty() && self.scheduler.waiting.is_empty());
    }

    fn expected(&self, id: SequenceId) -> Vec<u32> {
        let (request, seed) = &self.asked[&id.request];
        expected(&request.prompt, &request.sampling, *seed, u64::from(id.choice), &END, VOCABULARY, usize::MAX)
    }

    /// All that ended is what each request gives alone; what was cancelled is the beginning of it.
    fn check_results(&self, cancelled: &[RequestKey]) {
        for (id, made) in &self.made {
            let expected = self.expected(*id);
            if cancelled.contains(&id.request) {
                assert!(expected.starts_with(made), "{id:?}");
            } else {
                assert_eq!(&expected, made, "{id:?}");
            }
        }
        for (key, (request, _)) in &self.asked {
            if !cancelled.contains(key) {
                let choices = self.ended.iter().filter(|id| id.request == *key).count();
                assert_eq!(choices, request.sampling.n, "{key:?}");
            }
            if let Some((_, scores)) = self.prompts.get(key) {
                let wanted = request.sampling.prompt_logprobs.map(|_| expected_scores(&request.prompt, VOCABULARY));
                assert_eq!(&wanted, scores, "{key:?}");
            }
        }
    }
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens: Some(max_tokens), min_tokens: max_tokens, ..Default::default() }
}

fn prompt(start: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (start + i * 7) % 59).collect()
}

#[derive(Clone, Debug)]
enum Action {
    Submit {
        family: u32,
        shared: usize,
        own: usize,
        max: usize,
        n: usize,
        priority: i32,
        sampled: bool,
        scored: bool,
        salted: bool,
        tenant: u64,
    },
    Cancel(usize),
    Pause(usize, bool),
    Steps(usize),
}

fn action() -> impl Strategy<Value = Action> {
    let submit = (0u32..3, 0usize..120, 1usize..60, 1usize..60, 1usize..5, -1i32..2, any::<[bool; 3]>(), 0u8..8, 0u64..3)
        .prop_map(|(family, shared, own, max, n, priority, [sampled, salted, many], scored, tenant)| Action::Submit {
            family,
            shared,
            own,
            max,
            n: if many { n } else { 1 },
            priority,
            sampled,
            scored: scored == 0,
            salted,
            tenant,
        });
    prop_oneof![
        4 => submit,
        1 => (0usize..50).prop_map(Action::Cancel),
        1 => (0usize..50, any::<bool>()).prop_map(|(which, paused)| Action::Pause(which, paused)),
        4 => (1usize..12).prop_map(Action::Steps),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn whatever_arrives_leaves_or_stalls_each_request_gets_what_it_gets_alone(
        actions in prop::collection::vec(action(), 1..60),
        blocks in 8usize..40, max_seqs in 4usize..10, budget in 10usize..200, [caching, ahead]: [bool; 2],
        places in prop_oneof![Just(0), 1usize..30],
    ) {
        let mut rig = Rig::new(blocks, max_seqs, budget, caching).swapping(places);
        rig.model.ahead = ahead;
        let mut cancelled = Vec::new();
        for action in actions {
            match action {
                Action::Submit { family, shared, own, max, n, priority, sampled, scored, salted, tenant } => {
                    let mut tokens = prompt(family, shared);
                    tokens.extend(prompt(rig.asked.len() as u32 * 3 + 1, own));
                    let sampling = SamplingParams {
                        temperature: if sampled { 1.0 } else { 0.0 },
                        max_tokens: Some(max),
                        n,
                        prompt_logprobs: scored.then_some(0),
                        ..Default::default()
                    };
                    let cache_salt = salted.then(|| "salt".to_string());
                    let tenant = Tenant { id: tenant, weight: 1 + tenant as u32 };
                    rig.submit(Request { priority, cache_salt, tenant, ..request(tokens, sampling) });
                }
                Action::Cancel(which) if which < rig.asked.len() => {
                    let key = RequestKey(which as u64);
                    rig.cancel(key);
                    if !cancelled.contains(&key) && rig.ended.iter().filter(|id| id.request == key).count() < rig.asked[&key].0.sampling.n {
                        cancelled.push(key);
                    }
                }
                Action::Pause(which, paused) if which < rig.asked.len() => rig.pause(RequestKey(which as u64), paused),
                Action::Steps(steps) => for _ in 0..steps { rig.step(); },
                _ => {}
            }
        }
        for key in rig.asked.keys().copied().collect::<Vec<_>>() {
            rig.pause(key, false);
        }
        rig.finish(20_000);
        rig.check_results(&cancelled);
    }
}

#[test]
fn a_long_prompt_is_computed_in_chunks_beside_decoding_sequences() {
    let mut rig = Rig::new(64, 4, 40, true);
    let first = rig.submit(request(prompt(1, 10), greedy(30)));
    rig.step();
    let second = rig.submit(request(prompt(2, 200), greedy(4)));
    rig.step();
    assert_eq!(rig.batch.tokens.len(), 40);
    assert_eq!(rig.batch.sequences.iter().map(|span| span.rows).collect::<Vec<_>>(), [1, 39]);
    assert_eq!(rig.last_in_step, [first, second]);
    assert_eq!(rig.batch.samples.len(), 1);
    rig.finish(100);
    rig.check_results(&[]);
}

#[test]
fn a_shared_prefix_is_computed_once_and_reported() {
    let mut rig = Rig::new(64, 4, 256, true);
    let first = rig.submit(request(prompt(1, 100), greedy(2)));
    rig.finish(10);
    let second = rig.submit(request(prompt(1, 100), greedy(2)));
    let salted = rig.submit(Request { cache_salt: Some("other".into()), ..request(prompt(1, 100), greedy(2)) });
    rig.finish(10);
    assert_eq!(rig.prompts[&first].0, 0);
    assert_eq!(rig.prompts[&second].0, 96);
    assert_eq!(rig.prompts[&salted].0, 0);
    let counts = rig.scheduler.counts();
    assert_eq!((counts.prefix_queries, counts.prefix_hits), (300, 96));
    rig.check_results(&[]);
}

#[test]
fn a_prefix_that_is_being_computed_is_shared_as_it_grows() {
    let mut rig = Rig::new(64, 4, 64, true);
    rig.submit(request(prompt(1, 200), greedy(2)));
    let second = rig.submit(request(prompt(1, 200), greedy(2)));
    rig.finish(20);
    assert_eq!(rig.prompts[&second].0, 192);
    rig.check_results(&[]);
}

#[test]
fn choices_share_the_prompt_and_copy_its_last_block_when_they_write() {
    let mut rig = Rig::new(64, 4, 256, true);
    let sampling = SamplingParams { n: 3, temperature: 1.0, ..greedy(6) };
    rig.submit(request(prompt(1, 70), sampling));
    rig.step();
    assert_eq!(rig.batch.samples.iter().map(|sample| sample.row).collect::<Vec<_>>(), [69, 69, 69]);
    assert_eq!(rig.scheduler.pool().borrow().used(), 3);
    rig.step();
    assert_eq!(rig.batch.copies.len(), 2);
    assert_eq!(rig.scheduler.pool().borrow().used(), 5);
    rig.finish(10);
    rig.check_results(&[]);
    let outputs: std::collections::HashSet<_> = rig.made.values().collect();
    assert_eq!(outputs.len(), 3);
}

#[test]
fn the_youngest_of_the_lowest_priority_is_preempted_and_its_tokens_stay() {
    // 8 blocks: two sequences that grow to 5 blocks each do not fit.
    let mut rig = Rig::new(8, 4, 256, true);
    let urgent = rig.submit(Request { priority: -1, ..request(prompt(3, 60), greedy(90)) });
    let old = rig.submit(request(prompt(1, 60), greedy(90)));
    let young = rig.submit(request(prompt(2, 30), greedy(90)));
    let mut lost: Vec<(RequestKey, Vec<u32>)> = Vec::new();
    while rig.scheduler.requests() > 0 {
        rig.step();
        for sequence in rig.scheduler.waiting.values().filter(|sequence| sequence.preempted) {
            assert_ne!(sequence.id.request, urgent);
            lost.push((sequence.id.request, rig.made.get(&sequence.id).cloned().unwrap_or_default()));
        }
    }
    assert_eq!(lost.first().map(|(key, _)| *key), Some(young));
    assert!(rig.scheduler.counts().preemptions >= 1);
    for (key, made) in lost {
        let id = SequenceId { priority: 0, request: key, choice: 0 };
        assert!(rig.made[&id].starts_with(&made));
    }
    let position = |key| rig.ended.iter().position(|id| id.request == key).unwrap();
    assert!(position(urgent) < position(old) || position(old) < position(young));
    rig.check_results(&[]);
}

#[test]
fn a_more_urgent_request_takes_the_place_of_a_less_urgent_one() {
    let mut rig = Rig::new(32, 1, 256, true);
    let slow = rig.submit(request(prompt(1, 10), greedy(50)));
    rig.step();
    let same = rig.submit(request(prompt(2, 10), greedy(3)));
    let urgent = rig.submit(Request { priority: -5, ..request(prompt(3, 10), greedy(3)) });
    rig.step();
    assert_eq!(rig.last_in_step, [urgent]);
    rig.finish(100);
    let order: Vec<_> = rig.ended.iter().map(|id| id.request).collect();
    assert_eq!(order, [urgent, slow, same]);
    rig.check_results(&[]);
}

#[test]
fn equal_priorities_run_in_order_of_arrival() {
    let mut rig = Rig::new(32, 1, 256, true);
    let keys: Vec<_> = (0..4).map(|i| rig.submit(request(prompt(i, 10), greedy(2)))).collect();
    rig.finish(20);
    assert_eq!(rig.ended.iter().map(|id| id.request).collect::<Vec<_>>(), keys);
}

#[test]
fn a_paused_request_is_not_scheduled_and_gives_its_place_to_others() {
    let mut rig = Rig::new(8, 1, 256, true);
    let slow = rig.submit(request(prompt(1, 40), greedy(20)));
    for _ in 0..3 {
        rig.step();
    }
    rig.pause(slow, true);
    assert_eq!(rig.step(), 0);
    let other = rig.submit(request(prompt(2, 100), greedy(80)));
    rig.step();
    assert_eq!(rig.last_in_step, [other]);
    while rig.ended.is_empty() {
        rig.step();
    }
    assert_eq!(rig.step(), 0);
    rig.pause(slow, false);
    rig.finish(40);
    rig.check_results(&[]);
}

#[test]
fn a_cancelled_request_frees_its_blocks_at_once_also_while_it_waits() {
    let mut rig = Rig::new(8, 1, 256, true);
    let running = rig.submit(request(prompt(1, 100), greedy(20)));
    let waiting = rig.submit(request(prompt(2, 100), greedy(20)));
    rig.step();
    assert_eq!(rig.scheduler.pool().borrow().used(), 4);
    rig.cancel(running);
    rig.cancel(waiting);
    assert_eq!(rig.scheduler.pool().borrow().used(), 0);
    assert_eq!(rig.scheduler.requests(), 0);
    assert_eq!(rig.step(), 0);
}

#[test]
fn a_prompt_is_scored_in_chunks_that_fit_the_sample_rows() {
    let mut rig = Rig::new(32, 4, 256, true);
    rig.submit(request(prompt(1, 64), greedy(40)));
    rig.step();
    // Cached blocks would leave prompt tokens without a score, so they are not used.
    let scored = rig.submit(request(prompt(1, 64), SamplingParams { prompt_logprobs: Some(1), n: 2, ..greedy(3) }));
    rig.step();
    assert_eq!(rig.batch.sequences.iter().map(|span| span.rows).collect::<Vec<_>>(), [1, 3]);
    rig.finish(100);
    assert_eq!(rig.prompts[&scored].0, 0);
    rig.check_results(&[]);
}

#[test]
fn a_wrong_number_of_samples_is_an_error() {
    let mut rig = Rig::new(8, 2, 64, true);
    rig.submit(request(prompt(1, 10), greedy(5)));
    rig.scheduler.schedule(&mut rig.batch);
    let error = rig.scheduler.apply(&mut StepOutput::default(), &mut Vec::new()).unwrap_err();
    assert_eq!(error, WrongSampleCount { got: 0, wanted: 1 });
}

#[test]
fn an_urgent_request_does_not_wait_for_a_long_prompt() {
    let mut rig = Rig::new(64, 4, 32, true);
    let long = rig.submit(request(prompt(1, 1000), greedy(2)));
    rig.step();
    let urgent = rig.submit(Request { priority: -1, ..request(prompt(2, 20), greedy(2)) });
    rig.step();
    rig.step();
    assert_eq!(rig.last_in_step, [urgent, long]);
    rig.finish(100);
    assert_eq!(rig.ended[0].request, urgent);
    rig.check_results(&[]);
}

#[test]
fn a_sequence_whose_mask_is_late_sits_out_while_others_can_go_on() {
    let compiler = Compiler::new(letters(), END.to_vec(), VOCABULARY);
    let grammar = compiler.compile(&Constraint::Regex("[a-z]*".into())).unwrap();
    let mut rig = Rig::new(16, 4, 64, false);
    let confined = SamplingParams { grammar: Some(grammar), min_tokens: 20, ..Default::default() };
    let slow = rig.submit(request(vec![1, 2, 3], confined));
    let quick = rig.submit(request(vec![4, 5, 6], SamplingParams { min_tokens: 20, ..Default::default() }));
    rig.step();
    assert_eq!(rig.last_in_step, [slow, quick]);
    let stall = |rig: &mut Rig| {
        let sequence = rig.scheduler.running.values_mut().find(|sequence| sequence.id.request == slow).unwrap();
        sequence.follower.as_mut().unwrap().stall()
    };
    let promise = stall(&mut rig);
    rig.step();
    assert_eq!(rig.last_in_step, [quick]);
    promise.keep(vec![1 << 5]);
    rig.step();
    assert_eq!(rig.last_in_step.len(), 2);
    assert!(rig.made.iter().any(|(id, made)| id.request == slow && made.len() == 2 && made[1] == 5));
    // With nothing else to do the step waits.
    let promise = stall(&mut rig);
    rig.cancel(quick);
    assert_eq!(rig.scheduler.schedule(&mut rig.batch), 1);
    assert_eq!(rig.scheduler.in_step().collect::<Vec<_>>(), [slow]);
    // A promise that is broken is no mask that allows what was drawn.
    drop(promise);
    let follower = rig.scheduler.running.values().find_map(|sequence| sequence.follower.as_ref()).unwrap();
    assert!(matches!(follower.verdict(), Some(Verdict::Failed(_))));
}
