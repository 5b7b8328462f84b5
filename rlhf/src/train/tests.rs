//! The loop over a model that fits on a page.

mod crash;
mod tiny;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use candle_core::{Device, Tensor};
use serde_json::Value;

use super::{
    objective::{Logs, Totals},
    *,
};
use crate::{batch::Packed, collate::Sample, loss::PairLoss, parameters::Parameters};
use tiny::{Tiny, pairs, thumbs};

const METHODS: [Method; 6] = [Method::Sft, Method::Reward, Method::Dpo, Method::Kto, Method::Orpo, Method::Simpo];

/// A short training that learns something.
fn config(method: Method) -> TrainConfig {
    TrainConfig {
        learning_rate: Some(0.02),
        per_device_train_batch_size: 8,
        num_train_epochs: 4.0,
        logging_steps: 1,
        tokens_per_batch: 64,
        beta: matches!(method, Method::Dpo | Method::Kto).then_some(0.5),
        ..TrainConfig::new(method)
    }
}

fn samples(method: Method, count: usize, seed: u64) -> Vec<Sample> {
    match method {
        Method::Kto => thumbs(count, seed),
        Method::Sft => thumbs(2 * count, seed).into_iter().filter(|sample| sample.good).collect(),
        _ => pairs(count, seed),
    }
}

fn offline(model: &Tiny, config: &TrainConfig) -> Offline {
    laid_out(true, model, config)
}

fn laid_out(share_prompt: bool, model: &Tiny, config: &TrainConfig) -> Offline {
    let (train, held_out) = (samples(config.method, 24, 1), samples(config.method, 8, 2));
    Offline::laid_out(share_prompt, model, config, train, held_out, None, &mut |_, _| {}).unwrap()
}

fn run(config: &TrainConfig, folder: &Path) -> (Tiny, Outcome) {
    let model = Tiny::new();
    let outcome = train(&model, &mut offline(&model, config), config, folder, &mut |_| Control::Continue).unwrap();
    (model, outcome)
}

fn log(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn column(lines: &[Value], name: &str) -> Vec<f64> {
    lines.iter().filter_map(|line| line[name].as_f64()).collect()
}

fn near(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * (1.0 + expected.abs()), "{found} instead of {expected}");
    }
}

#[test]
fn every_method_learns_and_measures_under_trls_names() {
    for method in METHODS {
        let folder = tempfile::tempdir().unwrap();
        let (_, outcome) = run(&config(method), folder.path());
        assert_eq!((outcome.ending, outcome.steps), (Ending::Finished, 12));
        let lines = log(folder.path());
        let (losses, held_out) = (column(&lines, "loss"), column(&lines, "eval_loss"));
        assert_eq!((losses.len(), held_out.len()), (12, 4), "{method:?}");
        assert!(held_out[3] < held_out[0] && losses[11] < losses[0], "{method:?} {losses:?} {held_out:?}");
        let mut names = vec!["epoch", "grad_norm", "learning_rate", "num_tokens"];
        match method {
            Method::Sft => {}
            Method::Kto => {
                names.extend(["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl"])
            }
            Method::Reward => names.extend(["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]),
            _ => names.extend(["rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"]),
        }
        for name in names {
            assert_eq!(column(&lines[..1], name).len(), 1, "{method:?} {name}");
        }
        if method != Method::Sft {
            assert!(column(&lines, "eval_rewards/margins")[3] > 0.0, "{method:?}");
        }
        assert_eq!(column(&lines, "num_tokens").last(), Some(&(outcome.tokens as f64)));
        assert!(std::fs::read_to_string(folder.path().join("report.html")).unwrap().contains("<h3>Loss</h3>"));
    }
}

#[test]
fn dpo_starts_where_the_policy_is_its_reference() {
    let folder = tempfile::tempdir().unwrap();
    run(&config(Method::Dpo), folder.path());
    let lines = log(folder.path());
    near(&column(&lines[..1], "loss"), &[2f64.ln()], 1e-6);
    near(&column(&lines[..1], "rewards/margins"), &[0.0], 1e-6);
    let won = column(&lines, "eval_rewards/accuracies");
    assert!(won[3] > 0.8, "{won:?}");
}

/// How a step is cut into batches, and whether a prompt is computed once or twice, is a matter of speed.
#[test]
fn batches_and_shared_prompts_do_not_change_the_loss() {
    for method in METHODS {
        let trace = |config: &TrainConfig, share: bool| {
            let folder = tempfile::tempdir().unwrap();
            let model = Tiny::new();
            let mut offline = laid_out(share, &model, config);
            train(&model, &mut offline, config, folder.path(), &mut |_| Control::Continue).unwrap();
            let lines = log(folder.path());
            [column(&lines, "loss"), column(&lines, "eval_loss"), column(&lines, "grad_norm")].concat()
        };
        // Dropout is drawn per batch.
        let whole =
            TrainConfig { disable_dropout: Some(true), tokens_per_batch: 100_000, num_train_epochs: 2.0, ..config(method) };
        let expected = trace(&whole, true);
        near(&trace(&TrainConfig { tokens_per_batch: 20, ..whole.clone() }, true), &expected, 2e-5);
        near(&trace(&TrainConfig { tokens_per_batch: 1, ..whole.clone() }, true), &expected, 2e-5);
        near(&trace(&whole, false), &expected, 2e-5);
        let halves = TrainConfig { per_device_train_batch_size: 4, gradient_accumulation_steps: 2, ..whole.clone() };
        assert_eq!(trace(&halves, true), expected);
        assert_ne!(trace(&TrainConfig { seed: 5, ..whole.clone() }, true), expected);
    }
}

#[test]
fn a_kept_reference_is_the_live_one() {
    for method in [Method::Dpo, Method::Kto] {
        let trace = |config: &TrainConfig, cache: Option<&Path>| {
            let (folder, model) = (tempfile::tempdir().unwrap(), Tiny::new());
            let (train_rows, held_out) = (samples(method, 24, 1), samples(method, 8, 2));
            let mut heard = Vec::new();
            let mut offline =
                Offline::new(&model, config, train_rows, held_out, cache, &mut |done, all| heard.push((done, all))).unwrap();
            train(&model, &mut offline, config, folder.path(), &mut |_| Control::Continue).unwrap();
            let lines = log(folder.path());
            ([column(&lines, "loss"), column(&lines, "eval_loss")].concat(), heard)
        };
        let live = TrainConfig { precompute_ref_log_probs: Some(false), ..config(method) };
        let (expected, silent) = trace(&live, None);
        assert!(silent.is_empty());
        let cache = tempfile::tempdir().unwrap();
        let (first, heard) = trace(&config(method), Some(cache.path()));
        near(&first, &expected, 1e-5);
        let (done, all) = *heard.last().unwrap();
        assert_eq!(done, all);
        let files = || std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        assert_eq!(files().len(), 2, "one for the rows, one for the held-out ones");
        let (second, again) = trace(&config(method), Some(cache.path()));
        assert!(first == second && again.is_empty(), "read from the disk");
        // Half a file is computed again.
        files().iter().for_each(|path| std::fs::write(path, b"half").unwrap());
        assert_eq!(trace(&config(method), Some(cache.path())).0, first);
    }
}

#[test]
fn the_best_checkpoint_is_kept_and_gone_back_to() {
    let folder = tempfile::tempdir().unwrap();
    // The metric is better the smaller the margin, so the first evaluation is the best.
    let config = TrainConfig {
        metric_for_best_model: "rewards/margins".to_owned(),
        greater_is_better: Some(false),
        load_best_model_at_end: true,
        save_total_limit: Some(1),
        save_steps: 1,
        early_stopping_patience: Some(2),
        ..config(Method::Dpo)
    };
    let (model, outcome) = run(&config, folder.path());
    assert_eq!((outcome.ending, outcome.steps), (Ending::Early, 9));
    assert_eq!(outcome.best.unwrap().0, 3);
    let mut kept: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("checkpoint-"))
        .collect();
    kept.sort();
    assert_eq!(kept, ["checkpoint-3", "checkpoint-9"]);
    let short = tempfile::tempdir().unwrap();
    let three = TrainConfig { max_steps: 3, lr_scheduler_type: crate::optimizer::SchedulerType::Constant, ..config.clone() };
    let whole = TrainConfig { lr_scheduler_type: crate::optimizer::SchedulerType::Constant, ..config };
    let (expected, _) = run(&three, short.path());
    let other = tempfile::tempdir().unwrap();
    let (best, _) = run(&whole, other.path());
    assert_eq!(best.values(), expected.values());
    assert_ne!(model.values(), expected.values(), "another schedule");
}

#[test]
fn a_stopped_training_goes_on_as_if_it_had_not_been() {
    let straight = tempfile::tempdir().unwrap();
    // Lines of the log are means over three steps, stops fall between them.
    let config = TrainConfig { logging_steps: 3, ..config(Method::Sft) };
    assert!(config.dropout());
    let (expected, _) = run(&config, straight.path());
    let folder = tempfile::tempdir().unwrap();
    let mut endings = Vec::new();
    loop {
        let model = Tiny::new();
        let mut heard = 0;
        let outcome = train(&model, &mut offline(&model, &config), &config, folder.path(), &mut |_| {
            heard += 1;
            if heard == 2 { Control::Stop } else { Control::Continue }
        })
        .unwrap();
        endings.push(outcome.ending);
        if outcome.ending == Ending::Finished {
            assert_eq!(model.values(), expected.values());
            break;
        }
    }
    assert!(endings.len() > 4, "{endings:?}");
    let read = |folder: &Path| std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    assert_eq!(read(folder.path()), read(straight.path()));
    // Once more: nothing is left to do.
    let (again, outcome) = run(&config, folder.path());
    assert_eq!((outcome.ending, again.values()), (Ending::Finished, expected.values()));
}

/// A kill between the two then takes the evaluation back with the steps behind the last checkpoint, and it is made and told again.
#[test]
fn an_evaluation_is_told_before_it_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let own = TrainConfig { save_steps: 100, eval_steps: Some(4), ..config(Method::Dpo) };
    let model = Tiny::new();
    let (mut told, mut kept) = (Vec::new(), 0);
    let outcome = train(&model, &mut offline(&model, &own), &own, folder.path(), &mut |progress| {
        if progress.stage == Stage::Evaluating {
            told.push(progress.step);
            kept += usize::from(folder.path().join(format!("checkpoint-{}", progress.step)).exists());
        }
        Control::Continue
    });
    assert_eq!((told, kept), (vec![4, 8, 12], 0));
    let best = outcome.unwrap().best.unwrap().0;
    assert!(folder.path().join(format!("checkpoint-{best}")).is_dir());
}

#[test]
fn a_folder_belongs_to_one_training() {
    let folder = tempfile::tempdir().unwrap();
    let own = config(Method::Dpo);
    run(&own, folder.path());
    let attempt = |config: &TrainConfig, rows: Vec<Sample>| {
        let model = Tiny::new();
        let mut offline = Offline::new(&model, config, rows, Vec::new(), None, &mut |_, _| {}).unwrap();
        train(&model, &mut offline, config, folder.path(), &mut |_| Control::Continue).unwrap_err().to_string()
    };
    let error = attempt(&TrainConfig { seed: 1, ..own.clone() }, pairs(24, 1));
    assert!(error.contains("a training with another configuration; choose another folder"), "{error}");
    let error = attempt(&own, pairs(24, 9));
    assert!(error.contains("another dataset"), "{error}");
    let model = Tiny::new();
    model.parameters().iter().next().unwrap().change(|values| values[0] += 1.0).unwrap();
    let error = train(&model, &mut offline(&model, &own), &own, folder.path(), &mut |_| Control::Continue).unwrap_err();
    assert!(error.to_string().contains("another model"), "{error}");

    let busy = tempfile::tempdir().unwrap();
    let model = Tiny::new();
    let mut second = None;
    train(&model, &mut offline(&model, &own), &own, busy.path(), &mut |_| {
        let model = Tiny::new();
        let attempt = train(&model, &mut offline(&model, &own), &own, busy.path(), &mut |_| Control::Continue);
        second.get_or_insert_with(|| attempt.unwrap_err().to_string());
        Control::Continue
    })
    .unwrap();
    assert!(second.unwrap().contains("in use by another training"));
}

/// A model whose arithmetic breaks after a number of batches.
struct Breaking(Tiny, AtomicUsize);

impl Policy for Breaking {
    fn frozen(&self) -> candle_core::Result<String> {
        self.0.frozen()
    }

    fn parameters(&self) -> &Parameters {
        self.0.parameters()
    }

    fn log_probs(&self, batch: &Packed, pass: Pass) -> candle_core::Result<Tensor> {
        let broken = self.1.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err();
        let found = self.0.log_probs(batch, pass)?;
        if broken { found * f64::NAN } else { Ok(found) }
    }

    fn hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> candle_core::Result<Tensor> {
        self.0.hidden(batch, rows, pass)
    }

    fn width(&self) -> usize {
        self.0.width()
    }
}

#[test]
fn a_loss_that_is_no_number_ends_the_training_and_spoils_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let config = TrainConfig { tokens_per_batch: 100_000, save_steps: 1, ..config(Method::Sft) };
    let model = Breaking(Tiny::new(), AtomicUsize::new(2));
    let mut offline = offline(&model.0, &config);
    let error = train(&model, &mut offline, &config, folder.path(), &mut |_| Control::Continue).unwrap_err();
    assert_eq!(error.to_string(), "the loss is not finite at step 3; lower learning_rate, or look at the rows of that step");
    assert!(model.0.values().concat().iter().all(|value| value.is_finite()));
    // The same training goes on from the step before, with arithmetic that works.
    let (expected, straight) = (tempfile::tempdir().unwrap(), run);
    let (healed, _) = straight(&config, folder.path());
    assert_eq!(healed.values(), straight(&config, expected.path()).0.values());
}

#[test]
fn what_cannot_be_trained_on_is_refused() {
    let (model, config) = (Tiny::new(), config(Method::Dpo));
    let attempt =
        |rows: Vec<Sample>| Offline::new(&model, &config, rows, Vec::new(), None, &mut |_, _| {}).err().unwrap().to_string();
    assert!(attempt(Vec::new()).contains("no row of the dataset can be trained on"));
    assert!(attempt(thumbs(2, 1)).contains("row row0 has 1 answers, this method takes 2"));
    let folder = tempfile::tempdir().unwrap();
    let strange = TrainConfig { metric_for_best_model: "eval_accuracy".to_owned(), ..config.clone() };
    let error = train(&model, &mut offline(&model, &strange), &strange, folder.path(), &mut |_| Control::Continue).unwrap_err();
    assert!(
        error.to_string().contains("metric_for_best_model eval_accuracy is not measured; it may be one of eval_logps/chosen, "),
        "{error}"
    );
}

#[test]
fn a_raters_share_of_the_loss_is_bounded() {
    let model = Tiny::new();
    let mut rows = pairs(40, 1);
    rows.iter_mut().skip(8).for_each(|row| row.raters = vec!["busy".to_owned()]);
    let config = TrainConfig { max_rater_share: Some(0.4), ..config(Method::Dpo) };
    let offline = Offline::new(&model, &config, rows.clone(), Vec::new(), None, &mut |_, _| {}).unwrap();
    assert!((offline.largest_shares().0 - 0.4).abs() < 1e-6, "{:?}", offline.largest_shares());
    let nobody = TrainConfig { rater_weights: [("busy".to_owned(), 0.0)].into(), ..config.clone() };
    let judged = rows[8..].to_vec();
    let error = Offline::new(&model, &nobody, judged, Vec::new(), None, &mut |_, _| {}).err().unwrap().to_string();
    assert!(error.contains("leave no row anything to count"), "{error}");
    let open = TrainConfig { max_rater_share: None, ..config };
    let offline = Offline::new(&model, &open, rows, Vec::new(), None, &mut |_, _| {}).unwrap();
    assert!((offline.largest_shares().0 - 0.8).abs() < 1e-9);
}

fn judge(
    objective: Objective,
    policy: &[f64],
    reference: &[f64],
    labels: &[usize],
    samples: &[Sample],
    z: f64,
) -> (f64, BTreeMap<String, f64>) {
    let tensor = |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap();
    let (policy, reference) = (tensor(policy), tensor(reference));
    let samples: Vec<&Sample> = samples.iter().collect();
    let logs = Logs { policy: &policy, reference: Some(&reference), labels, samples: &samples, z };
    let mut metrics = Metrics::default();
    let loss = objective.loss(&logs, Totals { rows: 2.0, tokens: 10.0 }, &mut metrics).unwrap();
    (loss.to_scalar().unwrap(), metrics.means())
}

/// One pair of a step of two, with the log-ratios of the golden values.
#[test]
fn objectives_put_the_golden_values_together() {
    let sample = |weight: f64, good: bool| Sample { weight, good, ..Sample::default() };
    let (pair, labels) = ([sample(1.0, true), sample(1.0, true)], [4, 5]);
    let (policy, reference) = ([-3.2, -6.0], [-3.7, -5.7]);
    let dpo = |loss: PairLoss| Objective::Dpo { loss, beta: 0.1, imitate: 0.0 };
    for (loss, expected) in [(PairLoss::Sigmoid, 0.653947), (PairLoss::Ipo, 23.184225), (PairLoss::SigmoidNorm, 0.683940)] {
        near(&[judge(dpo(loss), &policy, &reference, &labels, &pair, 0.0).0], &[expected / 2.0], 3e-7);
    }
    let (value, metrics) = judge(dpo(PairLoss::Sigmoid), &policy, &reference, &labels, &pair, 0.0);
    let expected = [0.05, -0.03, 0.08, 1.0, -3.2, -6.0];
    let names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"];
    near(&names.map(|name| metrics[name]), &expected, 1e-12);
    // Imitating the chosen answer: 3.2 nats over the step's 10 labels, half of it.
    let both = Objective::Dpo { loss: PairLoss::Sigmoid, beta: 0.1, imitate: 0.5 };
    near(&[judge(both, &policy, &reference, &labels, &pair, 0.0).0], &[value + 0.16], 1e-12);
    let heavy = [sample(3.0, true), sample(3.0, true)];
    near(&[judge(dpo(PairLoss::Sigmoid), &policy, &reference, &labels, &heavy, 0.0).0], &[3.0 * value], 1e-12);

    // Averages of −0.8 and −1.2 per token.
    let (orpo, metrics) = judge(Objective::Orpo { beta: 0.1 }, &policy, &reference, &labels, &pair, 0.0);
    near(&[orpo, metrics["log_odds_chosen"]], &[0.32 + 0.042411 / 2.0, 0.638235], 3e-7);
    near(
        &[judge(Objective::Simpo { beta: 2.0, gamma: 0.5 }, &policy, &reference, &labels, &pair, 0.0).0],
        &[0.554355 / 2.0],
        3e-7,
    );
    near(&[judge(Objective::Reward { centring: 0.01 }, &[1.2, 0.4], &reference, &labels, &pair, 0.0).0], &[0.396701 / 2.0], 3e-7);
    near(&[judge(Objective::Sft, &policy, &reference, &labels, &pair, 0.0).0], &[0.92], 1e-12);

    let kto = Objective::Kto { beta: 0.1, desirable: 1.0, undesirable: 2.0 };
    let judged = [sample(1.0, true), sample(1.0, false)];
    let (value, metrics) = judge(kto, &policy, &reference, &labels, &judged, 0.2);
    near(&[value], &[(0.492501 + 2.0 * 0.487503) / 2.0], 1e-6);
    near(
        &["kl", "rewards/chosen", "rewards/rejected", "rewards/margins"].map(|name| metrics[name]),
        &[0.2, 0.05, -0.03, 0.08],
        1e-12,
    );
}
