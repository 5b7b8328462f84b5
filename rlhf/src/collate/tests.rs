//! With the tiny models' real tokenizers and templates.

use std::path::Path;

use serde_json::{Map, Value, json};
use tidemill_engine::ModelFiles;

use super::*;
use crate::{
    dataset::{Example, Message, Origin, Row},
    random::Random,
};

fn model(family: &str) -> ModelFiles {
    ModelFiles::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)).unwrap()
}

fn options() -> EncodeOptions {
    EncodeOptions {
        max_length: None,
        truncation_mode: Truncation::KeepCompletion,
        assistant_only_loss: false,
        chat_template_kwargs: Map::new(),
    }
}

fn encode(files: &ModelFiles, options: EncodeOptions, examples: Vec<Example>, teaches: Teaches) -> Encoded {
    let rows: Vec<Row> = examples.into_iter().map(|example| Row::new(example, Origin::default())).collect();
    Encoder::new(files.chat_template().unwrap(), files.tokenizer(), options).rows(&rows, teaches)
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned(), extra: Map::new() }
}

fn demonstration(prompt: &[(&str, &str)], answer: &str) -> Example {
    let prompt = prompt.iter().map(|(role, content)| message(role, content)).collect();
    Example::Demonstration { prompt, completion: vec![message("assistant", answer)] }
}

fn pair(question: &str, chosen: &str, rejected: &str) -> Example {
    let answer = |text: &str| vec![message("assistant", text)];
    Example::Preference { prompt: vec![message("user", question)], chosen: answer(chosen), rejected: answer(rejected) }
}

#[test]
fn a_pair_is_a_prompt_and_two_answers_that_go_on_from_it() {
    let files = model("qwen3");
    let encoded = encode(&files, options(), vec![pair("How deep?", "Two feet.", "Deep.")], Teaches::Comparison);
    let [sample] = encoded.samples.as_slice() else { panic!("{encoded:?}") };
    let text = |tokens: &[u32]| files.tokenizer().decode(tokens, false);
    assert_eq!(text(&sample.prompt), "<|im_start|>user\nHow deep?<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(text(&sample.completions[0].tokens), "Two feet.<|im_end|>\n");
    assert_eq!(text(&sample.completions[1].tokens), "Deep.<|im_end|>\n");
    assert_eq!((sample.labels(1), sample.weight), (sample.completions[1].tokens.len(), 1.0));
}

/// What is trained on begins with exactly the tokens that serving gives the model.
#[test]
fn prompts_have_the_tokens_that_serving_gives_them() {
    let mut compared = 0;
    for family in ["llama", "llama3", "mistral", "qwen2", "qwen3"] {
        let files = model(family);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family).join("expected.json");
        let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for chat in expected["chats"].as_array().unwrap() {
            let plain = ["tools", "kwargs", "raises"].iter().all(|key| chat[key].is_null());
            let prompt: Result<Vec<Message>, _> = serde_json::from_value(chat["messages"].clone());
            let (true, Ok(prompt)) = (plain, prompt) else { continue };
            // A conversation that ends with an answer has no turn to begin.
            if prompt.last().is_none_or(|last| last.role == "assistant") || chat["text"].as_str().unwrap().contains("2026") {
                continue;
            }
            for answer in ["It is deep.", "\n\nIt is", " yes", "7", "<|im_end|>"] {
                let example = Example::Demonstration { prompt: prompt.clone(), completion: vec![message("assistant", answer)] };
                let encoded = encode(&files, options(), vec![example], Teaches::Imitation);
                // A tokenizer that begins each text with a space may have to give a row up, but never shifts the boundary.
                let Some(sample) = encoded.samples.first() else {
                    assert_eq!(encoded.dropped[0].1, Dropped::Boundary, "{family} {answer:?}");
                    continue;
                };
                let ids: Vec<u32> = serde_json::from_value(chat["ids"].clone()).unwrap();
                assert_eq!(sample.prompt, ids, "{family} {answer:?}");
                let whole: Vec<u8> = sample
                    .prompt
                    .iter()
                    .chain(&sample.completions[0].tokens)
                    .flat_map(|t| files.tokenizer().token_bytes(*t))
                    .copied()
                    .collect();
                let whole = String::from_utf8(whole).unwrap();
                assert!(whole.contains(answer.trim()), "{family} {whole:?}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 25, "{compared}");
}

#[test]
fn a_template_that_rewrites_the_prompt_costs_rows_and_says_so() {
    let files = model("qwen3");
    // Without thinking this template opens the answer with an empty thought that it leaves out of the finished conversation.
    let kwargs = json!({"enable_thinking": false}).as_object().unwrap().clone();
    let examples = vec![pair("How deep?", "Two feet.", "Deep."), demonstration(&[("user", "Hi")], "Ho")];
    let encoded =
        encode(&files, EncodeOptions { chat_template_kwargs: kwargs, ..options() }, examples.clone(), Teaches::Comparison);
    assert!(encoded.samples.is_empty());
    assert_eq!(encoded.dropped.iter().map(|(_, why)| why.clone()).collect::<Vec<_>>(), [Dropped::Prefix, Dropped::Unsuitable]);
    assert_eq!(encoded.reasons().len(), 2);
    assert!(encoded.reasons().iter().any(|(why, count)| *count == 1 && why.contains("chat template changes")));
    assert_eq!(encode(&files, options(), examples, Teaches::Imitation).samples.len(), 2);
}

#[test]
fn thumbs_come_from_thumbs_and_from_pairs() {
    let files = model("llama");
    let thumb =
        Example::Unpaired { prompt: vec![message("user", "Hi")], completion: vec![message("assistant", "No")], label: false };
    let encoded = encode(&files, options(), vec![thumb, pair("How deep?", "Two feet.", "Deep.")], Teaches::Judgement);
    assert_eq!(encoded.samples.iter().map(|sample| sample.good).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(encoded.samples[1].prompt, encoded.samples[2].prompt);
}

/// A model that is shown an end which it did not write learns, of a rejected answer, not to end.
#[test]
fn an_answer_that_was_cut_off_has_no_end() {
    // Ends that could be taken for the template's, and a space that it may take away.
    for text in ["It is as deep", "im_end", "deep, and ", "<|im_end|>"] {
        for family in ["qwen3", "llama", "llama3", "mistral", "qwen2"] {
            let files = model(family);
            let whole = pair("How deep?", "Two feet.", text);
            let Example::Preference { prompt, chosen, rejected } = whole.clone() else { panic!("it is a pair") };
            let rejected = rejected.into_iter().map(Message::cut_off).collect();
            let cut = Example::Preference { prompt, chosen, rejected };
            let encoded = encode(&files, options(), vec![whole, cut], Teaches::Comparison);
            let [ended, open] = encoded.samples.as_slice() else {
                assert!(encoded.dropped.iter().all(|(_, why)| *why == Dropped::Boundary), "{family}: {encoded:?}");
                continue;
            };
            assert_eq!((&open.prompt, &open.completions[0]), (&ended.prompt, &ended.completions[0]), "{family}");
            let said = |sample: &Sample| files.tokenizer().decode(&sample.completions[1].tokens, false);
            assert!(said(ended).len() > said(open).len(), "{family}: {:?}", said(open));
            assert_eq!(said(open).trim(), text.trim(), "{family}");
        }
    }
    let files = model("qwen3");
    let turns = [("user", "One?"), ("assistant", "First."), ("user", "Two?")];
    let Example::Demonstration { prompt, completion } = demonstration(&turns, "Second") else { panic!("it is one answer") };
    let completion = completion.into_iter().map(Message::cut_off).collect();
    let only = EncodeOptions { assistant_only_loss: true, ..options() };
    let encoded = encode(&files, only, vec![Example::Demonstration { prompt, completion }], Teaches::Imitation);
    let text = files.tokenizer().decode(&encoded.samples[0].completions[0].tokens, false);
    assert!(text.starts_with("First.<|im_end|>\n") && text.ends_with("assistant\nSecond"), "{text:?}");
}

#[test]
fn only_the_assistants_turns_are_learnt_when_asked() {
    let files = model("qwen3");
    let turns = [("user", "One?"), ("assistant", "First."), ("user", "Two?")];
    let only = EncodeOptions { assistant_only_loss: true, ..options() };
    let encoded = encode(&files, only.clone(), vec![demonstration(&turns, "Second.")], Teaches::Imitation);
    let sample = &encoded.samples[0];
    let completion = &sample.completions[0];
    let part = |learnt: bool| {
        let tokens: Vec<u32> = (0..completion.tokens.len())
            .filter(|place| completion.learns(*place) == learnt)
            .map(|place| completion.tokens[place])
            .collect();
        files.tokenizer().decode(&tokens, false)
    };
    assert_eq!(files.tokenizer().decode(&sample.prompt, false), "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(part(true), "First.<|im_end|>\nSecond.<|im_end|>\n");
    assert_eq!(part(false), "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n");
    let plain = encode(&files, options(), vec![demonstration(&turns, "Second.")], Teaches::Imitation);
    let joined = |sample: &Sample| [sample.prompt.as_slice(), &sample.completions[0].tokens].concat();
    assert_eq!(joined(sample), joined(&plain.samples[0]));
    assert_eq!(plain.samples[0].completions[0].learnt, None);
    let none = Example::Demonstration { prompt: vec![message("user", "One?")], completion: vec![message("user", "Two?")] };
    assert_eq!(encode(&files, only, vec![none], Teaches::Imitation).dropped[0].1, Dropped::NothingToLearn);
}

fn sample(prompt: &[u32], completions: &[&[u32]]) -> Sample {
    let completions = completions.iter().map(|tokens| Completion { tokens: tokens.to_vec(), learnt: None }).collect();
    Sample { prompt: prompt.to_vec(), completions, weight: 1.0, ..Sample::default() }
}

#[test]
fn what_is_too_long_loses_its_beginning_first() {
    let cut = |max: usize, mode: Truncation| {
        let mut sample = sample(&[1, 2, 3, 4], &[&[5, 6, 7], &[8]]);
        let cut = sample.cut(max, mode);
        let completions: Vec<Vec<u32>> = sample.completions.iter().map(|completion| completion.tokens.clone()).collect();
        (cut, sample.prompt.clone(), completions, sample.teaches())
    };
    let keep = Truncation::KeepCompletion;
    assert_eq!(cut(7, keep), (false, vec![1, 2, 3, 4], vec![vec![5, 6, 7], vec![8]], true));
    assert_eq!(cut(5, keep), (true, vec![3, 4], vec![vec![5, 6, 7], vec![8]], true));
    assert_eq!(cut(3, keep), (true, vec![4], vec![vec![5, 6], vec![8]], true));
    let start = Truncation::KeepStart;
    assert_eq!(cut(5, start), (true, vec![1, 2, 3, 4], vec![vec![5], vec![8]], true));
    assert!(!cut(4, start).3, "nothing is left to learn");
}

/// Everything that the row of a label sees, and the label, is a beginning of prompt and completion.
fn check(micro: &Micro, samples: &[Sample]) {
    let batch = &micro.batch;
    let mut next = 0;
    for segment in &batch.segments {
        assert_eq!(segment.first, next);
        assert!(segment.len > 0);
        next += segment.len;
    }
    assert_eq!((next, batch.positions.len()), (batch.rows(), batch.rows()));
    let sees = |row: usize| -> Vec<u32> {
        let segment = batch.segments.iter().find(|segment| (segment.first..segment.first + segment.len).contains(&row)).unwrap();
        let prefix = segment.prefix.map_or(&[][..], |prefix| {
            let prefix = batch.segments[prefix];
            &batch.tokens[prefix.first..prefix.first + prefix.len]
        });
        [prefix, &batch.tokens[segment.first..=row]].concat()
    };
    let mut end = 0;
    for span in &micro.spans {
        assert_eq!(span.labels.start, end);
        end = span.labels.end;
        let sample = &samples[span.sample];
        let whole = [sample.prompt.as_slice(), &sample.completions[span.completion].tokens].concat();
        let mut learnt = Vec::new();
        for label in &batch.labels[span.labels.clone()] {
            let seen = sees(label.row as usize);
            assert_eq!(seen, whole[..seen.len()]);
            assert_eq!(batch.positions[label.row as usize] as usize, seen.len() - 1);
            assert_eq!(label.token, whole[seen.len()]);
            learnt.push(seen.len());
        }
        let completion = &sample.completions[span.completion];
        assert_eq!(learnt.len(), sample.labels(span.completion));
        let expected: Vec<usize> = (0..completion.tokens.len())
            .filter(|place| completion.learns(*place) && sample.prompt.len() + place > 0)
            .map(|place| sample.prompt.len() + place)
            .collect();
        assert_eq!(learnt, expected);
    }
    assert_eq!(end, batch.labels.len());
    assert_eq!(micro.owners().len(), end);
}

#[test]
fn every_label_is_predicted_by_all_that_stands_before_it() {
    let mut samples = vec![
        sample(&[1, 2, 3], &[&[4, 5, 6], &[7]]),
        sample(&[8], &[&[9, 10]]),
        sample(&[], &[&[11, 12, 13]]),
        sample(&[14, 15], &[&[16], &[17, 18]]),
    ];
    samples[1].completions[0].learnt = Some(vec![false, true]);
    for share_prompt in [true, false] {
        for last_row in [true, false] {
            let layout = Layout { share_prompt, last_row };
            let micro = pack(samples.iter().enumerate().map(|(index, sample)| Item::of(index, sample)), layout);
            check(&micro, &samples);
            if last_row {
                for span in &micro.spans {
                    let last = samples[span.sample].completions[span.completion].tokens.last();
                    assert_eq!(micro.batch.tokens.get(span.last_row as usize), last);
                }
                let rows: usize = samples.iter().enumerate().map(|(index, sample)| Item::of(index, sample).rows(layout)).sum();
                assert_eq!(micro.batch.rows(), rows);
            }
        }
    }
    let shared = Layout { share_prompt: true, last_row: false };
    let micro = pack([Item::of(0, &samples[0])], shared);
    // The prompt once, two rows of the first answer; the second answer is predicted by the prompt alone.
    assert_eq!(micro.batch.tokens, [1, 2, 3, 4, 5]);
}

#[test]
fn batches_hold_everything_once_and_no_more_than_fits() {
    let mut random = Random::new(4);
    let sizes: Vec<usize> = (0..200).map(|_| 1 + random.below(90)).chain([500]).collect();
    let found = batches(&sizes, 128);
    let mut all: Vec<usize> = found.iter().flatten().copied().collect();
    all.sort_unstable();
    assert_eq!(all, (0..sizes.len()).collect::<Vec<_>>());
    for batch in &found {
        let rows: usize = batch.iter().map(|index| sizes[*index]).sum();
        assert!(rows <= 128 || batch.len() == 1);
    }
    let total: usize = sizes.iter().sum();
    assert!(found.len() <= total / 128 + 8, "{} batches for {total} rows", found.len());
    assert_eq!(found, batches(&sizes, 128));
}

#[test]
fn every_epoch_sees_every_row_once_in_an_order_of_its_own() {
    let plan = Plan { rows: 10, batch: 4, epochs: 2.5, max_steps: None, shuffle: true, seed: 3 };
    assert_eq!((plan.steps_per_epoch(), plan.steps()), (3, 8));
    let epoch = |epoch: u64| -> Vec<usize> { (epoch * 3..epoch * 3 + 3).flat_map(|step| plan.step(step)).collect() };
    for number in 0..3 {
        let mut rows = epoch(number);
        assert_ne!(rows, (0..10).collect::<Vec<_>>());
        rows.sort_unstable();
        assert_eq!(rows, (0..10).collect::<Vec<_>>());
    }
    assert_ne!(epoch(0), epoch(1));
    assert_ne!(Plan { seed: 4, ..plan }.step(0), plan.step(0));
    assert_eq!(Plan { shuffle: false, ..plan }.step(2), [8, 9]);
    assert_eq!(Plan { max_steps: Some(5), ..plan }.steps(), 5);
    assert_eq!(Plan { rows: 0, ..plan }.steps(), 0);
    assert!((plan.epoch(6) - 2.0).abs() < 1e-12);
}

fn people(raters: &[&[&str]]) -> Vec<Sample> {
    let own = |names: &&[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    raters.iter().map(|names| Sample { raters: own(names), weight: 1.0, ..Sample::default() }).collect()
}

fn share(samples: &[Sample], weights: &[f64], mass: &[f64], rater: &str) -> f64 {
    let part = |sample: &Sample| {
        let own = sample.raters.iter().filter(|name| *name == rater).count() as f64;
        own / sample.raters.len().max(1) as f64
    };
    let total: f64 = weights.iter().zip(mass).map(|(weight, mass)| weight * mass).sum();
    samples.iter().zip(weights.iter().zip(mass)).map(|(sample, (weight, mass))| part(sample) * weight * mass).sum::<f64>() / total
}

#[test]
fn nobody_has_more_of_the_loss_than_the_cap() {
    let names: Vec<&[&str]> = std::iter::repeat_n(&["big"][..], 80)
        .chain(std::iter::repeat_n(&["mid"][..], 30))
        .chain([&["a"][..], &["b"], &["c"], &["d"], &["e"], &[]].into_iter().cycle().take(60))
        .collect();
    let samples = people(&names);
    let mass: Vec<f64> = (0..samples.len()).map(|index| 1.0 + (index % 7) as f64).collect();
    let found = weights(&samples, &mass, &Caps { max_rater_share: Some(0.2), ..Caps::default() });
    for rater in ["big", "mid", "a", "b", "c", "d", "e"] {
        assert!(share(&samples, &found.weights, &mass, rater) <= 0.2 + 1e-6, "{rater}");
    }
    assert!((found.rater_share - 0.2).abs() < 1e-6, "as much as is allowed: {}", found.rater_share);
    let (before, after): (f64, f64) = (mass.iter().sum(), found.weights.iter().zip(&mass).map(|(w, m)| w * m).sum());
    assert!((before - after).abs() < 1e-9 * before);
    // Those below the cap keep their proportions.
    assert!((found.weights[110] - found.weights[115]).abs() < 1e-12 && found.weights[0] < found.weights[110]);
}

#[test]
fn rows_of_several_raters_and_too_few_raters_are_bounded_too() {
    let several: Vec<&[&str]> = std::iter::repeat_n(&["x", "y"][..], 50)
        .chain(std::iter::repeat_n(&["x"][..], 50))
        .chain([&["a"][..], &["b"], &["c"], &["d"]].into_iter().cycle().take(40))
        .collect();
    let samples = people(&several);
    let mass = vec![1.0; samples.len()];
    let found = weights(&samples, &mass, &Caps { max_rater_share: Some(0.25), ..Caps::default() });
    for rater in ["x", "y", "a"] {
        assert!(share(&samples, &found.weights, &mass, rater) <= 0.25 + 1e-6, "{rater}");
    }
    let two = people(&[&["x"], &["x"], &["x"], &["y"]]);
    let found = weights(&two, &[1.0; 4], &Caps { max_rater_share: Some(0.1), ..Caps::default() });
    assert!((share(&two, &found.weights, &[1.0; 4], "x") - 0.5).abs() < 1e-9);
    let one = people(&[&["x"], &["x"]]);
    assert_eq!(weights(&one, &[1.0; 2], &Caps { max_rater_share: Some(0.1), ..Caps::default() }).weights, [1.0, 1.0]);
    let nobody = people(&[&[], &[]]);
    assert_eq!(weights(&nobody, &[1.0; 2], &Caps { max_rater_share: Some(0.1), ..Caps::default() }).weights, [1.0, 1.0]);
    assert!(weights(&[], &[], &Caps::default()).weights.is_empty());
}

#[test]
fn a_rater_may_be_given_less_weight() {
    let samples = people(&[&["good"], &["doubtful"], &["good", "doubtful"]]);
    let caps = Caps { rater_weights: [("doubtful".to_owned(), 0.0)].into(), ..Caps::default() };
    assert_eq!(weights(&samples, &[1.0; 3], &caps).weights, [2.0, 0.0, 1.0]);
}

/// Runs on the model that `TIDEMILL_TEST_MODEL` names; `make test` sets it.
#[test]
fn the_default_models_answers_go_on_from_the_tokens_it_was_given() {
    let Some(path) = std::env::var_os("TIDEMILL_TEST_MODEL") else {
        println!("left out: TIDEMILL_TEST_MODEL is not set; `make test` sets it");
        return;
    };
    let files = ModelFiles::open(Path::new(&path)).unwrap();
    let expected: Value = serde_json::from_str(include_str!("../../../tests/goldens/smollm2/chats.json")).unwrap();
    let chats = expected["chats"].as_array().unwrap();
    let mut same_tokens = 0;
    for chat in chats {
        let prompt: Vec<Message> = serde_json::from_value(chat["messages"].clone()).unwrap();
        let answer = chat["greedy_text"].as_str().unwrap();
        let example = Example::Preference {
            prompt,
            chosen: vec![message("assistant", answer)],
            rejected: vec![message("assistant", "\n\nNo.")],
        };
        let encoded = encode(&files, options(), vec![example], Teaches::Comparison);
        let [sample] = encoded.samples.as_slice() else { panic!("{:?}", encoded.dropped) };
        let ids: Vec<u32> = serde_json::from_value(chat["ids"].clone()).unwrap();
        let greedy: Vec<u32> = serde_json::from_value(chat["greedy"].clone()).unwrap();
        assert_eq!(sample.prompt, ids);
        let text = |index: usize| files.tokenizer().decode(&sample.completions[index].tokens, false);
        assert_eq!(text(0), format!("{answer}<|im_end|>\n"));
        assert_eq!(text(1), "\n\nNo.<|im_end|>\n");
        // What the model wrote is what it will be taught, token by token, but for words that it spelt in other pieces than the tokenizer
        // would, and a character that was cut off in the middle.
        same_tokens += usize::from(sample.completions[0].tokens.starts_with(&greedy));
    }
    assert!(same_tokens * 4 >= chats.len() * 3, "{same_tokens} of {}", chats.len());
}
