use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::super::Position;
use super::super::answer::Prompt;
use super::super::query::{Material, MetricLabel, MetricRange};
use super::*;

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn answer(number: u128, user: &str, prompt: &str, text: &str) -> (String, Target) {
    let message = Message { role: "user".into(), content: prompt.into(), extra: Map::new() };
    let answer = Answer {
        id: id(number).to_string(),
        prompt: Arc::new(Prompt::new(vec![message])),
        text: text.into(),
        parsed: None,
        model: Some("small".into()),
        variant: Some(format!("v{}", number % 2)),
        user: Some(user.into()),
        whole: true,
        cut_off: false,
    };
    (id(number).to_string(), Target::Answer(answer))
}

fn feedback(number: u128, kind: Kind, author: &str, targets: &[u128], value: Value) -> Feedback {
    Feedback {
        id: id(1000 + number),
        created: 1000 + number as i64,
        updated: 1000 + number as i64,
        revision: 1,
        withdrawn: false,
        target: id(targets[0]).to_string(),
        targets: targets.iter().map(|target| id(*target).to_string()).collect(),
        target_kind: TargetKind::Completion,
        kind,
        metric: None,
        number: value.as_f64().or_else(|| value.as_bool().map(f64::from)),
        value,
        author: (!author.is_empty()).then(|| author.into()),
        source: Some("api".into()),
        latency_ms: None,
        tags: vec![],
        key_id: None,
        idempotency_key: None,
        task_id: None,
    }
}

/// `tiers`: the best first, ties together.
fn comparison(number: u128, author: &str, tiers: &[&[u128]]) -> Feedback {
    let candidates: Vec<u128> = tiers.concat();
    let ids = |numbers: &[u128]| numbers.iter().map(|number| id(*number)).collect::<Vec<_>>();
    let ranking: Vec<_> = tiers.iter().map(|tier| ids(tier)).collect();
    let value = json!({"candidates": ids(&candidates), "ranking": ranking, "shown": ids(&candidates)});
    feedback(number, Kind::Comparison, author, &candidates, value)
}

/// Answers 1 to 3 to one prompt, 4 to another, of four people.
fn gathered(feedback: Vec<Feedback>) -> Gathered {
    let targets = [
        answer(1, "ann", "p", "one"),
        answer(2, "bob", "p", "two"),
        answer(3, "cid", "p", "three"),
        answer(4, "dan", "q", "four"),
    ];
    Gathered { feedback, targets: targets.into_iter().collect() }
}

fn texts(row: &Row) -> Vec<String> {
    row.example.answers().into_iter().map(super::super::row::text).collect()
}

fn left_out(built: &Built) -> Vec<(LeftOut, usize)> {
    built.counts.left_out.iter().map(|(reason, count)| (*reason, *count)).collect()
}

#[test]
fn a_ranking_of_three_with_a_tie_is_two_pairs() {
    let built = build(&gathered(vec![comparison(1, "r", &[&[2], &[1, 3]])]), &Query::default());
    let mut pairs: Vec<_> = built.rows.iter().map(texts).collect();
    pairs.sort();
    assert_eq!(pairs, [["two", "one"], ["two", "three"]]);
    assert_eq!(left_out(&built), [(LeftOut::Tie, 1)]);
    assert_eq!(built.counts.judgements, 3);
    assert!(built.rows.iter().all(|row| row.origin.chosen_position == Some(Position::Left)));
}

#[test]
fn the_majority_decides_and_the_row_names_those_outvoted() {
    let votes = vec![comparison(1, "r1", &[&[1], &[2]]), comparison(2, "r2", &[&[2], &[1]]), comparison(3, "r3", &[&[2], &[1]])];
    let built = build(&gathered(votes.clone()), &Query::default());
    assert_eq!(built.rows.len(), 1);
    let row = &built.rows[0];
    assert_eq!(texts(row), ["two", "one"]);
    assert_eq!(row.origin.raters, ["r1", "r2", "r3"]);
    assert_eq!(row.origin.users, ["ann", "bob"]);
    assert_eq!(row.origin.feedback.len(), 3);
    assert_eq!((built.counts.used, built.judgements.len()), (3, 3));

    let split = build(&gathered(votes[..2].to_vec()), &Query::default());
    assert_eq!((split.rows.len(), left_out(&split)), (0, vec![(LeftOut::Undecided, 2)]));
    let each = build(&gathered(votes.clone()), &Query { raters: Raters::Each, ..Query::default() });
    assert_eq!(each.rows.len(), 3);
    let many = build(&gathered(votes), &Query { min_raters: 4, ..Query::default() });
    assert_eq!(left_out(&many), [(LeftOut::TooFewRaters, 3)]);
}

#[test]
fn ties_and_both_bad_are_counted_and_make_no_row() {
    let mut bad = comparison(2, "r2", &[&[1], &[3]]);
    bad.value["both_bad"] = json!(true);
    let built = build(&gathered(vec![comparison(1, "r1", &[&[1, 2]]), bad]), &Query::default());
    assert_eq!((built.rows.len(), left_out(&built)), (0, vec![(LeftOut::Tie, 1), (LeftOut::BothBad, 1)]));
    assert_eq!(built.judgements.len(), 2);
}

#[test]
fn the_last_word_of_a_person_counts_and_what_is_withdrawn_does_not() {
    let mut withdrawn = comparison(3, "r2", &[&[1], &[2]]);
    withdrawn.withdrawn = true;
    let words = vec![comparison(2, "r", &[&[2], &[1]]), comparison(1, "r", &[&[1], &[2]]), withdrawn];
    let built = build(&gathered(words), &Query::default());
    assert_eq!(texts(&built.rows[0]), ["two", "one"]);
    assert_eq!(built.rows[0].origin.raters, ["r"]);
    assert_eq!(left_out(&built), [(LeftOut::Withdrawn, 1), (LeftOut::Superseded, 1)]);
}

#[test]
fn one_person_has_one_word_on_a_text_under_however_many_ids() {
    // Answers 11 to 13 say again what 1 and 2 say: one rater met them three times, two others once.
    let mut given = gathered(vec![
        comparison(1, "r1", &[&[1], &[2]]),
        comparison(2, "r1", &[&[11], &[12]]),
        comparison(3, "r1", &[&[13], &[2]]),
        comparison(4, "r2", &[&[2], &[1]]),
        comparison(5, "r3", &[&[2], &[1]]),
        feedback(6, Kind::Thumb, "r1", &[1], json!(true)),
        feedback(7, Kind::Thumb, "r1", &[11], json!(true)),
        feedback(8, Kind::Thumb, "r1", &[13], json!(true)),
        feedback(9, Kind::Thumb, "r2", &[1], json!(false)),
        feedback(10, Kind::Thumb, "r3", &[11], json!(false)),
        feedback(11, Kind::Rating, "r1", &[1], json!(1.0)),
        feedback(12, Kind::Rating, "r1", &[11], json!(0.5)),
        feedback(13, Kind::Rating, "r2", &[2], json!(0.0)),
    ]);
    given.targets.extend([answer(11, "ann", "p", "one"), answer(12, "bob", "p", "two"), answer(13, "ann", "p", "one")]);
    let built = build(&given, &Query { margin: 0.5, ..Query::default() });
    let found: Vec<_> = built.rows.iter().map(|row| (texts(row), row.origin.source.as_str())).collect();
    let expected = [
        (vec!["two".to_owned(), "one".to_owned()], "comparison"),
        (vec!["one".to_owned()], "thumb"),
        (vec!["one".to_owned(), "two".to_owned()], "rating"),
    ];
    assert_eq!(found, expected);
    assert!(matches!(built.rows[1].example, Example::Unpaired { label: false, .. }));
    assert_eq!(left_out(&built), [(LeftOut::Superseded, 5)]);
    assert_eq!((built.judgements.len(), built.counts.used), (3, 8));
    // The mean of one person's ratings would be 0.75.
    let wide = build(&given, &Query { margin: 0.6, ..Query::default() });
    assert_eq!(wide.rows.len(), 2);
}

#[test]
fn an_edit_is_a_later_word_than_what_came_between() {
    let mut edited = comparison(1, "r", &[&[1], &[2]]);
    edited.updated = 5000;
    let built = build(&gathered(vec![edited, comparison(2, "r", &[&[2], &[1]])]), &Query::default());
    assert_eq!(built.rows.iter().map(texts).collect::<Vec<_>>(), [["one", "two"]]);
}

#[test]
fn a_correction_is_a_pair_and_a_demonstration() {
    let same = feedback(2, Kind::Correction, "r", &[2], json!("two"));
    let empty = feedback(3, Kind::Correction, "r", &[3], json!(" "));
    let given = gathered(vec![feedback(1, Kind::Correction, "r", &[1], json!("better")), same, empty]);
    let built = build(&given, &Query::default());
    let mut found: Vec<_> = built.rows.iter().map(texts).collect();
    found.sort();
    assert_eq!(found, [vec!["better"], vec!["better", "one"]]);
    assert_eq!(left_out(&built), [(LeftOut::Malformed, 1), (LeftOut::SameText, 1)]);
    let only = build(&given, &Query { rows: vec![RowKind::Demonstration], ..Query::default() });
    assert_eq!(only.rows.len(), 1);
}

#[test]
fn ratings_of_one_prompt_make_pairs_where_they_differ_enough() {
    let rate = |number, author, target, value: f64| feedback(number, Kind::Rating, author, &[target], json!(value));
    // Means: one 0.75, two 0.5, three 0.25; four is alone with its prompt.
    let given = gathered(vec![
        rate(1, "r1", 1, 1.0),
        rate(2, "r2", 1, 0.5),
        rate(3, "r1", 2, 0.5),
        rate(4, "r1", 3, 0.25),
        rate(5, "r1", 4, 0.0),
    ]);
    let built = build(&given, &Query { margin: 0.5, ..Query::default() });
    assert_eq!(built.rows.iter().map(texts).collect::<Vec<_>>(), [["one", "three"]]);
    assert_eq!(built.rows[0].origin.raters, ["r1", "r2"]);
    assert_eq!(left_out(&built), [(LeftOut::NoPair, 2)]);
    assert_eq!(build(&given, &Query { margin: 0.25, ..Query::default() }).rows.len(), 3);
    let widest = build(&given, &Query { margin: 0.25, max_pairs_per_prompt: 1, ..Query::default() });
    assert_eq!(widest.rows.iter().map(texts).collect::<Vec<_>>(), [["one", "three"]]);
}

/// Answers to one prompt with these ratings.
fn rated(means: &[f64]) -> Gathered {
    let mut given = gathered(vec![]);
    for (number, mean) in means.iter().enumerate() {
        let target = 100 + number as u128;
        given.targets.extend([answer(target, "ann", "p", &format!("answer {number:06}"))]);
        given.feedback.push(feedback(10_000 + target, Kind::Rating, "r", &[target], json!(mean)));
    }
    given
}

proptest! {
    #[test]
    fn the_widest_pairs_of_ratings_are_found_without_comparing_all(
        means in proptest::collection::vec(0..11_u8, 1..25), most in 1..12_usize, margin in 1..6_u8,
    ) {
        let means: Vec<f64> = means.into_iter().map(|mean| f64::from(mean) / 10.0).collect();
        let margin = f64::from(margin) / 10.0;
        let built = build(&rated(&means), &Query { margin, max_pairs_per_prompt: most, ..Query::default() });
        let apart = |row: &Row| {
            let mean = |text: &str| means[text["answer ".len()..].parse::<usize>().unwrap()];
            let texts = texts(row);
            ((mean(&texts[0]) - mean(&texts[1])) * 10.0).round() as i64
        };
        let mut found: Vec<i64> = built.rows.iter().map(apart).collect();
        let all = means.iter().flat_map(|high| means.iter().map(move |low| high - low));
        let mut widest: Vec<i64> = all.filter(|apart| *apart >= margin - 1e-9).map(|apart| (apart * 10.0).round() as i64).collect();
        found.sort_unstable_by(|a, b| b.cmp(a));
        widest.sort_unstable_by(|a, b| b.cmp(a));
        widest.truncate(most);
        prop_assert_eq!(found, widest);
    }
}

#[test]
fn many_rated_answers_to_one_prompt_are_not_paired_all_with_all() {
    // All pairs of them would be ten gigabytes.
    let means: Vec<f64> = (0..40_000).map(|number| f64::from(number % 1000) / 1000.0).collect();
    let built = build(&rated(&means), &Query::default());
    assert_eq!((built.rows.len(), built.counts.judgements), (8, 40_000));
}

#[test]
fn thumbs_and_metrics_make_unpaired_rows() {
    let thumb = |number, author, up: bool| feedback(number, Kind::Thumb, author, &[1], json!(up));
    let mut metric = feedback(4, Kind::Metric, "", &[2], json!(0.2));
    metric.metric = Some("errors".into());
    let given = gathered(vec![thumb(1, "r1", true), thumb(2, "r2", true), thumb(3, "r3", false), metric]);
    let labels = vec![MetricLabel { name: "errors".into(), good: 0.5, bad: 2.0 }];
    let built = build(&given, &Query { labels: labels.clone(), ..Query::default() });
    let found: Vec<_> = built.rows.iter().map(|row| (texts(row)[0].clone(), row.origin.source.clone())).collect();
    assert_eq!(found, [("one".into(), "thumb".into()), ("two".into(), "metric:errors".to_owned())]);
    for row in &built.rows {
        assert!(matches!(row.example, Example::Unpaired { label: true, .. }));
    }
    let even = build(&gathered(vec![thumb(1, "r1", true), thumb(2, "", false)]), &Query::default());
    assert_eq!(left_out(&even), [(LeftOut::Undecided, 2)]);
    // Without a label for it, a metric is nobody's judgement.
    assert_eq!(build(&given, &Query::default()).counts.judgements, 3);
}

#[test]
fn filters_leave_out_what_they_name() {
    let given = gathered(vec![comparison(1, "r1", &[&[1], &[2]]), comparison(2, "r2", &[&[1], &[3]])]);
    let rows = |query: Query| build(&given, &query).rows.iter().map(texts).collect::<Vec<_>>();
    assert_eq!(rows(Query { exclude_raters: vec!["r1".into()], ..Query::default() }), [["one", "three"]]);
    assert_eq!(rows(Query { exclude_users: vec!["bob".into()], ..Query::default() }), [["one", "three"]]);
    assert_eq!(rows(Query { variants: vec!["v1".into()], ..Query::default() }), [["one", "three"]]);
    assert_eq!(rows(Query { since: Some(1002), ..Query::default() }), [["one", "three"]]);
    assert_eq!(rows(Query { until: Some(1002), ..Query::default() }), [["one", "two"]]);
    assert!(rows(Query { models: vec!["other".into()], ..Query::default() }).is_empty());
    assert!(rows(Query { tags: vec!["x".into()], ..Query::default() }).is_empty());
    assert!(rows(Query { from: vec![Material::Thumb], ..Query::default() }).is_empty());
    assert_eq!(rows(Query { sources: vec!["api".into()], ..Query::default() }).len(), 2);
    let mut gold = given.clone();
    gold.feedback[0].tags = vec!["gold".into()];
    assert_eq!(build(&gold, &Query::default()).rows.len(), 1);
}

#[test]
fn what_cannot_be_taught_as_good_is_not() {
    let mut given = gathered(vec![comparison(1, "r", &[&[1], &[2]]), feedback(2, Kind::Thumb, "r", &[1], json!(false))]);
    let change = |given: &mut Gathered, change: fn(&mut Answer)| {
        if let Some(Target::Answer(answer)) = given.targets.get_mut(&id(1).to_string()) {
            change(answer);
        }
    };
    change(&mut given, |answer| answer.cut_off = true);
    let built = build(&given, &Query::default());
    assert_eq!(left_out(&built), [(LeftOut::CutOff, 1)]);
    // As a bad answer it is welcome, and known for one that the model did not end.
    assert_eq!(built.rows.len(), 1);
    let ends = |built: &Built| {
        built.rows.iter().flat_map(|row| row.example.answers()).map(|said| !said[0].is_cut_off()).collect::<Vec<_>>()
    };
    assert_eq!(ends(&built), [false]);
    assert_eq!(build(&given, &Query { truncated: true, ..Query::default() }).rows.len(), 2);
    change(&mut given, |answer| answer.whole = false);
    assert_eq!(left_out(&build(&given, &Query::default())), [(LeftOut::Incomplete, 1)]);
    change(&mut given, |answer| answer.cut_off = false);
    assert_eq!(ends(&build(&given, &Query::default())), [false]);
    change(&mut given, |answer| answer.whole = true);
    assert!(!ends(&build(&given, &Query::default())).contains(&false));

    let mut metric = feedback(3, Kind::Metric, "", &[1], json!(5.0));
    metric.metric = Some("seconds".into());
    let given = gathered(vec![comparison(1, "r", &[&[1], &[2]]), metric]);
    let ask =
        |max| Query { metrics: vec![MetricRange { name: "seconds".into(), min: None, max: Some(max) }], ..Query::default() };
    assert_eq!(build(&given, &ask(5.0)).rows.len(), 1);
    assert_eq!(left_out(&build(&given, &ask(4.0))), [(LeftOut::OutOfRange, 1)]);
}

#[test]
fn targets_that_cannot_be_used_are_counted_by_why() {
    let mut given = gathered(vec![
        comparison(1, "r", &[&[1], &[4]]),
        comparison(2, "r", &[&[1], &[9]]),
        comparison(3, "r", &[&[1], &[7]]),
        comparison(4, "r", &[&[1], &[8]]),
        feedback(5, Kind::Comparison, "r", &[1], json!("one")),
    ]);
    let mut conversation = feedback(6, Kind::Thumb, "r", &[1], json!(true));
    conversation.target_kind = TargetKind::Conversation;
    given.feedback.push(conversation);
    given.targets.insert(id(7).to_string(), Target::NotRecorded);
    given.targets.insert(id(8).to_string(), Target::TextCompletion);
    given.feedback.push(comparison(7, "r", &[&[1], &[10]]));
    given.targets.insert(id(10).to_string(), Target::NotText);
    let reasons = left_out(&build(&given, &Query::default()));
    use LeftOut::*;
    let expected = [Malformed, Conversation, UnknownAnswer, NotRecorded, NotText, TextCompletion, DifferentPrompts];
    assert_eq!(reasons, expected.map(|reason| (reason, 1)));
}

#[test]
fn caps_keep_the_newest_rows_of_a_person() {
    let given =
        gathered(vec![comparison(1, "r", &[&[1], &[2]]), comparison(2, "r", &[&[1], &[3]]), comparison(3, "s", &[&[2], &[3]])]);
    let built = build(&given, &Query { max_rows_per_rater: Some(1), ..Query::default() });
    assert_eq!(built.rows.iter().map(texts).collect::<Vec<_>>(), [["one", "three"], ["two", "three"]]);
    assert_eq!(built.counts.rows_over_cap, 1);
    // "three" is cid's: both of the newest rows hold it, so only one of them stays.
    let built = build(&given, &Query { max_rows_per_user: Some(1), ..Query::default() });
    assert_eq!(built.rows.iter().map(texts).collect::<Vec<_>>(), [["two", "three"]]);
}

/// Kind, author, two answers, and what fills the value.
type Drawn = (u8, u8, u128, u128, bool, u8, bool);

fn histories() -> impl Strategy<Value = Vec<Feedback>> {
    let one = (0..5_u8, 0..4_u8, 1..6_u128, 1..6_u128, any::<bool>(), 0..5_u8, any::<bool>());
    proptest::collection::vec(one, 0..30).prop_map(|judgements| {
        let make = |(number, (kind, author, a, b, flag, level, withdrawn)): (usize, Drawn)| {
            let author = ["", "r1", "r2", "r3"][usize::from(author)];
            let number = number as u128;
            let mut made = match kind {
                0 | 1 if flag => comparison(number, author, &[&[a], &[b]]),
                0 | 1 => comparison(number, author, &[&[a, b]]),
                2 => feedback(number, Kind::Correction, author, &[a], json!(["better", "one", ""][usize::from(level) % 3])),
                3 => feedback(number, Kind::Rating, author, &[a], json!(f64::from(level) / 4.0)),
                _ => feedback(number, Kind::Thumb, author, &[a], json!(flag)),
            };
            made.withdrawn = withdrawn && level == 0;
            made
        };
        judgements.into_iter().enumerate().map(make).collect()
    })
}

proptest! {
    #[test]
    fn every_judgement_is_behind_a_row_or_counted(history in histories(), each in any::<bool>(), least in 1..3_usize) {
        let raters = if each { Raters::Each } else { Raters::Majority };
        let query = Query { raters, min_raters: least, ..Query::default() };
        let built = build(&gathered(history.clone()), &query);
        prop_assert_eq!(built.counts.used + built.counts.left_out.values().sum::<usize>(), built.counts.judgements);
        // Lineage: what is behind a row exists, was not withdrawn, and its people are named.
        for row in &built.rows {
            for feedback in &row.origin.feedback {
                let found = history.iter().find(|known| known.id.to_string() == *feedback);
                prop_assert!(found.is_some_and(|found| !found.withdrawn
                    && found.author.as_ref().is_none_or(|author| row.origin.raters.contains(author))));
            }
            prop_assert!(!row.origin.feedback.is_empty());
        }
    }

    #[test]
    fn the_order_in_which_feedback_is_read_does_not_matter(history in histories(), turn in 0..30_usize) {
        let built = build(&gathered(history.clone()), &Query::default());
        let mut turned = history;
        if !turned.is_empty() {
            let by = turn % turned.len();
            turned.rotate_left(by);
        }
        prop_assert_eq!(build(&gathered(turned), &Query::default()), built);
    }
}
