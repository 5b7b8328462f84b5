//! Trainings that sample, and evaluations, with model, judges and engine on one card.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value, json};
use tidemill_engine::LoraConfig;
use tidemill_rlhf::batch::{Label, Packed};
use tidemill_rlhf::dataset::format;
use tidemill_rlhf::evaluate::answers::Sampling;
use tidemill_rlhf::evaluate::{Entrant, Evaluation, Referee, Trial, evaluate};
use tidemill_rlhf::job::{ADAPTER, Base, Job, JobError, Rows, Spec};
use tidemill_rlhf::model::{Model, ModelOptions, Pass};
use tidemill_rlhf::random::Random;
use tidemill_rlhf::reward::Rewards;
use tidemill_rlhf::train::{
    Ask, Control, Draw, Drawn, EngineSampler, Method, Online, Prompt, Question, Sampler, Stage, TrainConfig, TrainError,
    questions, sampling, train,
};
use tidemill_rlhf::workplace::{Cards, DriverCards, Workplace};

use crate::cards::EmulatedCards;
use crate::{EXACT, ROUNDED, near, open};

/// More than any of these trainings wants.
const PLENTY: usize = 4 << 30;
/// Most tokens of an answer.
const ANSWER: usize = 6;

/// Keeps what another sampler draws.
struct Kept<'a>(EngineSampler<'a>, Arc<Mutex<VecDeque<Vec<Vec<Drawn>>>>>);

impl Sampler for Kept<'_> {
    fn sample(&mut self, asks: &[Ask<'_>], draw: &Draw) -> Result<Vec<Vec<Drawn>>, TrainError> {
        let drawn = self.0.sample(asks, draw)?;
        self.1.lock().unwrap().push_back(drawn.clone());
        Ok(drawn)
    }
}

/// Draws what was drawn before.
struct Again(VecDeque<Vec<Vec<Drawn>>>);

impl Sampler for Again {
    fn sample(&mut self, _: &[Ask<'_>], _: &Draw) -> Result<Vec<Vec<Drawn>>, TrainError> {
        Ok(self.0.pop_front().unwrap())
    }
}

fn golden(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

fn prompts() -> Vec<Prompt> {
    let prompt = |index: u32| Prompt {
        question: Question { id: format!("q{index}"), messages: Vec::new(), columns: Map::new(), now: 0 },
        tokens: (0..5 + index % 3).map(|place| 20 + (index * 31 + place * 17) % 200).collect(),
    };
    (0..4).map(prompt).collect()
}

fn model(options: ModelOptions) -> Model {
    let lora = LoraConfig { r: 4, alpha: 8.0, dropout: 0.1, ..LoraConfig::default() };
    Model::new(open("llama"), &lora, 3, options).unwrap()
}

/// What a training measured, step by step, and its parameters.
struct Trained {
    steps: Vec<BTreeMap<String, f64>>,
    parameters: Vec<f32>,
}

impl Trained {
    /// In the steps that measured it.
    fn column(&self, name: &str) -> Vec<f64> {
        self.steps.iter().filter_map(|step| step.get(name).copied()).collect()
    }
}

fn trained(model: &Model, config: &TrainConfig, sampler: impl Sampler) -> Trained {
    let folder = tempfile::tempdir().unwrap();
    let rewards = Rewards::new(&config.reward_funcs, None, &mut |_| unreachable!("rules alone")).unwrap();
    let mut online = Online::new(model, config, prompts(), Vec::new(), rewards, sampler).unwrap();
    let mut steps = Vec::new();
    train(model, &mut online, config, folder.path(), &mut |progress| {
        assert_eq!(progress.stage, Stage::Training);
        steps.push(progress.metrics.clone());
        Control::Continue
    })
    .unwrap();
    Trained { steps, parameters: model.parameters().iter().flat_map(|parameter| parameter.values().unwrap()).collect() }
}

#[test]
fn trainings_that_sample_go_as_on_the_processor_and_sample_from_what_was_learnt() {
    for (method, fields, kl) in [
        (Method::Rloo, json!({"num_generations": 4, "beta": 0.05}), "kl"),
        (Method::Ppo, json!({"num_ppo_epochs": 2}), "objective/kl"),
        (Method::Grpo, json!({"num_iterations": 2, "beta": 0.05, "num_generations": 4}), "kl"),
    ] {
        let mut all = json!({
            "method": method, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8,
            "max_completion_length": ANSWER, "max_steps": 4, "logging_steps": 1, "seed": 7, "tokens_per_batch": 60,
            "reward_funcs": [{"type": "length", "unit": "characters", "max": 4}],
        });
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        // Fast enough to be far from the beginning in two turns; and slow enough that roundings do not grow.
        // Where products round, GRPO's weights for the sampler's difference have both roundings in them, and so have its losses.
        for (options, tolerance, rate) in [(EXACT, 1e-3, 0.02), (ROUNDED, 0.1, 1e-3)] {
            if options == ROUNDED && method != Method::Grpo {
                continue;
            }
            all["learning_rate"] = rate.into();
            let config = TrainConfig::from_json(all.clone()).unwrap();
            let cards = EmulatedCards::new(PLENTY);
            let place = Workplace::new(&"cuda:1".parse().unwrap(), None, Arc::clone(&cards) as Arc<dyn Cards>).unwrap();
            let on_card = place.take(model(options)).unwrap();
            let engine = place.start(sampling(&golden("llama"), 8, 7 + ANSWER, 4, Some(1)), &on_card, 1 << 20).unwrap();
            let heard = Arc::default();
            let sampler = Kept(EngineSampler::new(engine, || on_card.adapter("tiny")), Arc::clone(&heard));
            let found = trained(&on_card, &config, sampler);
            // The engine samples from the adapter as it is, which by then is elsewhere.
            let last = |name: &str| *found.column(name).last().unwrap();
            let (difference, moved) = (last("sampling/sampling_logp_difference/mean"), last(kl).abs());
            assert!(
                difference < 0.1 && (options == ROUNDED || moved > 4.0 * difference),
                "{method:?} {options:?}: {difference} {moved}"
            );

            let drawn: VecDeque<_> = std::mem::take(&mut *heard.lock().unwrap());
            let want = trained(&model(EXACT), &config, Again(drawn));
            for name in ["loss", "reward"] {
                let (found, want) = (found.column(name), want.column(name));
                assert!(
                    found.len() == want.len() && want.iter().any(|value| *value != 0.0),
                    "{method:?} {name}: {found:?} {want:?}"
                );
                let off =
                    found.iter().zip(&want).map(|(found, want)| (found - want).abs() / want.abs().max(1.0)).fold(0.0, f64::max);
                assert!(off <= tolerance, "{method:?} {options:?} {name}: {off}: {found:?}, not {want:?}");
            }
            if options == EXACT {
                near(&found.parameters, &want.parameters, 2e-2, "parameters");
            }
        }
    }
}

fn written(path: &Path, lines: impl IntoIterator<Item = Value>) -> PathBuf {
    let lines: Vec<String> = lines.into_iter().map(|line| line.to_string()).collect();
    std::fs::write(path, lines.join("\n")).unwrap();
    path.to_owned()
}

fn pair(index: usize) -> Value {
    json!({
        "prompt": [{ "role": "user", "content": format!("Which of {index} is it?") }],
        "chosen": [{ "role": "assistant", "content": "yes" }],
        "rejected": [{ "role": "assistant", "content": "no, not at all" }],
    })
}

fn spec(file: &Path, config: Value, device: &str) -> Spec {
    let told = json!({
        "base": { "name": "tiny", "path": golden("qwen2") }, "train_file": file, "config": config, "lora": { "r": 4 }, "threads": 1,
        "precision": "f32", "device": device,
    });
    serde_json::from_value(told).unwrap()
}

/// An adapter of this method, trained on the processor.
async fn adapter(place: &Path, method: &str) -> PathBuf {
    let file = written(&place.join("pairs.jsonl"), (0..8).map(pair));
    let spec = spec(&file, json!({ "method": method, "learning_rate": 2e-3, "max_steps": 12 }), "cpu");
    let rows = Rows::read(&spec, None).await.unwrap();
    let folder = place.join(method);
    Job::open(spec, rows).unwrap().train(&folder, &mut |_, _| {}, &mut |_| Control::Continue).unwrap();
    folder.join(ADAPTER)
}

async fn job(spec: &Spec, cards: &Arc<EmulatedCards>) -> Job {
    let rows = Rows::read(spec, None).await.unwrap();
    Job::open(spec.clone(), rows).unwrap().with_cards(Arc::clone(cards) as Arc<dyn Cards>).unwrap()
}

#[tokio::test]
async fn model_judge_and_engine_share_one_card_and_its_memory() {
    let place = tempfile::tempdir().unwrap();
    let judge = adapter(place.path(), "reward").await;
    let prompts = (0..2).map(|index| json!({ "prompt": format!("Question {index}?") }));
    let file = written(&place.path().join("prompts.jsonl"), prompts);
    let with = |rewards: Value| {
        let config = json!({
            "method": "grpo", "learning_rate": 1e-3, "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 2,
            "logging_steps": 1, "max_completion_length": 4, "reward_funcs": rewards, "tokens_per_batch": 80,
        });
        spec(&file, config, "cuda:1")
    };
    let judged = with(json!([{ "type": "reward_model", "path": judge }]));
    let run = async |spec: &Spec, cards: &Arc<EmulatedCards>, name: &str| -> Result<(), JobError> {
        let folder = place.path().join(name);
        job(spec, cards).await.train(&folder, &mut |_, _| {}, &mut |_| Control::Continue)?;
        Ok(())
    };
    let plenty = EmulatedCards::new(PLENTY);
    run(&judged, &plenty, "plenty").await.unwrap();
    let log = std::fs::read_to_string(place.path().join("plenty/metrics.jsonl")).unwrap();
    assert!(log.contains("rewards/reward_model/mean"), "{log}");
    plenty.emptied();

    // The judge reads the weights that the model has on the card.
    let alone = EmulatedCards::new(PLENTY);
    run(&with(json!([{ "type": "length", "max": 3 }])), &alone, "alone").await.unwrap();
    let weights = open("qwen2").parameters() as usize * 4;
    let more = plenty.memory.most().saturating_sub(alone.memory.most());
    assert!(more < weights, "{more} bytes more for the judge, whose weights alone are {weights}");

    // Keys and values get what is left, and all the rest still fits.
    let started = plenty.engine();
    let kv = started.report.as_ref().unwrap().kv;
    let blocks = started.report.as_ref().unwrap().kv_blocks;
    assert_eq!(started.options.swap_memory, Some(0));
    let enough = PLENTY - started.spare + kv / 2;
    let tight = EmulatedCards::new(enough);
    run(&judged, &tight, "tight").await.unwrap();
    let fewer = tight.engine().report.unwrap().kv_blocks;
    assert!((1..=blocks / 2).contains(&fewer), "{fewer} blocks, of {blocks}");

    // Less than that, and it is said before a step is taken.
    let small = EmulatedCards::new(PLENTY - started.spare);
    let refused = run(&judged, &small, "small").await.unwrap_err().to_string();
    assert!(refused.contains("does not fit on the card") && refused.contains("tokens_per_batch"), "{refused}");
    assert!(!place.path().join("small").exists());

    // A share of a card is held to: the cache is as small as on the tight one, and less is refused.
    let estimate = |spec: Spec, cards: Arc<EmulatedCards>| async move { job(&spec, &cards).await.estimate() };
    let whole = estimate(judged.clone(), EmulatedCards::new(PLENTY)).await.unwrap().device_memory;
    assert!(whole > 2 * weights as u64, "{whole}");
    let share = |bytes| Spec { device_memory: Some(bytes), ..judged.clone() };
    let refused = estimate(share(weights / 2), EmulatedCards::new(PLENTY)).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("of {} that it may", weights / 2)), "{refused}");
    let bounded = EmulatedCards::new(PLENTY);
    estimate(share(enough), Arc::clone(&bounded)).await.unwrap();
    assert_eq!(bounded.engine().report.unwrap().kv_blocks, fewer);
    run(&share(enough), &bounded, "bounded").await.unwrap();
    assert!(bounded.memory.most() <= enough, "{} bytes, of {enough}", bounded.memory.most());
}

/// A batch of at most so many rows, in segments of 1 to `longest` rows of which some share a prompt, with labels for some rows.
fn drawn(random: &mut Random, rows: usize, longest: usize) -> Packed {
    let mut batch = Packed::default();
    let mut prompt = None;
    while batch.rows() < rows {
        let len = (1 + random.below(longest)).min(rows - batch.rows());
        let tokens: Vec<u32> = (0..len).map(|_| random.below(200) as u32).collect();
        let alone = prompt.is_none() || random.below(3) == 0;
        let index = batch.push(&tokens, prompt.filter(|_| !alone));
        prompt = if alone { Some(index) } else { prompt };
    }
    let labels = 1 + random.below(rows);
    batch.labels = (0..labels).map(|row| Label { row: row as u32, token: 3 }).collect();
    batch
}

#[test]
fn batches_of_all_lengths_fit_in_what_the_largest_needed() {
    const ROWS: usize = 16;
    let cards = EmulatedCards::new(PLENTY);
    let place = Workplace::new(&"cuda:1".parse().unwrap(), None, Arc::clone(&cards) as Arc<dyn Cards>).unwrap();
    let policy = place.take(model(ModelOptions { recompute: true, ..EXACT })).unwrap();
    // A judge of other files, which reads more tokens than the model.
    let judge = Model::untrained(open("qwen2"), EXACT).unwrap().computing_beside(&policy).unwrap();
    let all: Vec<u32> = (0..2 * ROWS as u32).collect();
    judge.rehearse(&Packed::of_size(2 * ROWS, 16, 0), &all, Pass::EVALUATE).unwrap();
    policy.rehearse(&Packed::of_size(ROWS, 8, ROWS), &[], Pass { dropout: Some(0), ..Pass::TRAIN }).unwrap();
    policy.settle();
    let needed = policy.device_memory().unwrap().unwrap();
    assert_eq!((needed.most, needed.left), (needed.held, PLENTY - needed.held));
    let mut random = Random::new(5);
    for (rows, longest) in [(ROWS, 1), (ROWS, 8), (5, 3), (11, 8)] {
        let batch = drawn(&mut random, rows, longest);
        policy.log_probs(&batch, Pass::REFERENCE).unwrap();
        let loss = policy.log_probs(&batch, Pass { dropout: Some(7), ..Pass::TRAIN }).unwrap().sum_all().unwrap();
        loss.backward().unwrap();
        let judged = drawn(&mut random, 2 * rows, 2 * longest);
        judge.hidden(&judged, &[0, 0], Pass::EVALUATE).unwrap();
        let now = policy.device_memory().unwrap().unwrap();
        assert_eq!((now.held, now.most, now.left), (needed.held, needed.most, needed.left), "{rows} rows, {longest} each");
    }
    assert_eq!(cards.memory.most(), needed.held);
    // More than that is refused, whatever there is.
    let refused = policy.log_probs(&drawn(&mut random, 12 * ROWS, 8), Pass::TRAIN).unwrap_err().to_string();
    assert!(refused.contains(&format!("of {} that it may", needed.held)), "{refused}");
}

fn trial(adapters: &[PathBuf], workplace: Workplace) -> Trial {
    let parse = |index| format::parse(pair(index).as_object().unwrap().clone(), "rows").unwrap().row;
    let rows: Vec<_> = (0..5).map(parse).collect();
    let entrant = |(index, folder): (usize, &PathBuf)| Entrant {
        name: format!("adapter{index}"),
        folder: folder.clone(),
        trained_on: None,
    };
    Trial {
        base: Base { name: "tiny".to_owned(), path: golden("qwen2") },
        adapters: adapters.iter().enumerate().map(entrant).collect(),
        questions: questions(&rows),
        rows,
        source: "rows.jsonl".to_owned(),
        beta: 0.1,
        text: Some("The quick brown fox jumps over the lazy dog. ".repeat(3)),
        prompts: 3,
        sampling: Sampling { temperature: 0.0, max_tokens: 5, seed: 7 },
        model: EXACT,
        workplace,
    }
}

fn evaluated(adapters: &[PathBuf], referee: Referee<'_>, workplace: Workplace) -> Evaluation {
    evaluate(&trial(adapters, workplace), referee, &mut |_, _, _, _| {}).unwrap()
}

#[tokio::test]
async fn an_evaluation_gives_the_processors_numbers() {
    let place = tempfile::tempdir().unwrap();
    let (dpo, reward) = (adapter(place.path(), "dpo").await, adapter(place.path(), "reward").await);
    let entered = [dpo, reward.clone()];
    let want = evaluated(&entered, Referee::RewardModel(reward.clone()), Workplace::default());
    let cards = EmulatedCards::new(PLENTY);
    let on_card = Workplace::new(&"cuda:1".parse().unwrap(), None, Arc::clone(&cards) as Arc<dyn Cards>).unwrap();
    let found = evaluated(&entered, Referee::RewardModel(reward), on_card);
    cards.emptied();

    let alike = |found: f64, want: f64, what: &str| {
        assert!((found - want).abs() <= 2e-3 * want.abs().max(1.0), "{what}: {found}, not {want}")
    };
    assert_eq!(found.contenders.len(), 3);
    for (found, want) in found.contenders.iter().zip(&want.contenders) {
        assert_eq!(found.preferences.is_some(), want.preferences.is_some());
        if let (Some(found), Some(want)) = (found.preferences, want.preferences) {
            assert_eq!(found.accuracy, want.accuracy);
            alike(found.margin, want.margin, "margin");
        }
        alike(found.text.unwrap().loss, want.text.unwrap().loss, "loss");
        let (answers, expected) = (found.answers.unwrap(), want.answers.unwrap());
        assert_eq!((answers.answers, answers.median_words), (expected.answers, expected.median_words));
        assert_eq!(answers.kl_per_token.is_some(), expected.kl_per_token.is_some());
        if let (Some(found), Some(want)) = (answers.kl_per_token, expected.kl_per_token) {
            alike(found, want, "divergence");
        }
        alike(found.rewards["reward_model"], want.rewards["reward_model"], "reward");
    }
    let answers = |evaluation: &Evaluation| evaluation.examples.iter().map(|example| example.answers.clone()).collect::<Vec<_>>();
    assert_eq!(answers(&found), answers(&want));
    assert_eq!(found.duel, want.duel);
    // The engine has room for those that are asked at once, and no more.
    let started = cards.engine();
    assert!(started.report.unwrap().kv < started.spare, "{:?}", started.options);
}

#[test]
fn an_evaluation_keeps_from_the_engine_what_its_largest_adapter_needs() {
    let place = tempfile::tempdir().unwrap();
    let adapter = |rank: usize| {
        let lora = LoraConfig { r: rank, alpha: 8.0, ..LoraConfig::default() };
        let folder = place.path().join(rank.to_string());
        Model::new(open("qwen2"), &lora, 1, EXACT).unwrap().adapter("tiny").unwrap().write(&folder).unwrap();
        folder
    };
    let cards = EmulatedCards::new(PLENTY);
    let on_card = Workplace::new(&"cuda:1".parse().unwrap(), None, Arc::clone(&cards) as Arc<dyn Cards>).unwrap();
    // The second of a rank that an engine takes only where it is told of it.
    let whole = trial(&[adapter(1), adapter(100)], on_card);
    let sampling = Sampling { max_tokens: 2, ..whole.sampling };
    let trial = Trial { rows: Vec::new(), text: None, prompts: 1, sampling, ..whole };
    evaluate(&trial, Referee::None, &mut |_, _, _, _| {}).unwrap();
    let started = cards.engine();
    // What came after it fits in what it was to leave, and needs nothing of the margin that cards have.
    let (left, more) = (started.options.left.unwrap().bytes, cards.memory.most().saturating_sub(started.used));
    assert!(more <= left, "{more} bytes, of {left}");
}

#[test]
fn a_card_that_is_not_there_is_named_before_anything_is_measured() {
    let workplace = Workplace::new(&"cuda:4095".parse().unwrap(), None, Arc::new(DriverCards::default())).unwrap();
    let refused = workplace.take(Model::untrained(open("qwen2"), EXACT).unwrap()).err().unwrap().to_string();
    assert!(refused.contains("no NVIDIA driver") || refused.contains("no card 4095"), "{refused}");
    assert!(refused.contains("--device cpu"), "{refused}");
}

#[test]
fn two_models_of_the_same_files_hold_their_weights_once() {
    let cards = EmulatedCards::new(PLENTY);
    let first = model(EXACT).computing_on(cards.open(1).unwrap(), None).unwrap();
    let held = first.device_memory().unwrap().unwrap().held;
    let same = Model::untrained(Arc::clone(first.files()), EXACT).unwrap().computing_beside(&first).unwrap();
    assert_eq!(first.device_memory().unwrap().unwrap().held, held);
    let batch = crate::batch();
    let reference = |model: &Model| model.log_probs(&batch, Pass::REFERENCE).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(reference(&same), reference(&first));
    // Of other files, on the same device.
    let other = Model::untrained(open("qwen2"), EXACT).unwrap().computing_beside(&first).unwrap();
    assert!(first.device_memory().unwrap().unwrap().held > held);
    let exact = Model::untrained(open("qwen2"), EXACT).unwrap();
    near(&reference(&other), &reference(&exact), 1e-5, "another model");
    drop((first, same));
    near(&reference(&other), &reference(&exact), 1e-5, "another model, alone");
    drop(other);
    assert_eq!(cards.memory.used(), 0);
    let apart = Model::untrained(open("llama"), ROUNDED).unwrap().computing_beside(&model(EXACT)).unwrap();
    assert_eq!(apart.device(), None);
}
