use proptest::prelude::*;
use serde_json::{Map, json};
use uuid::Uuid;

use super::frame::{Entry, frame_answer, frame_feedback};
use super::*;
use crate::records::{Choice, Exposure, Feedback, Inference, Kind, Status, TargetKind};

fn feedback(id: u128, text: &str) -> Entry {
    Entry::Feedback(Box::new(Feedback {
        id: Uuid::from_u128(id),
        created: 1,
        updated: 1,
        revision: 1,
        withdrawn: false,
        target: "t".into(),
        targets: vec!["t".into()],
        target_kind: TargetKind::Conversation,
        kind: Kind::Comment,
        metric: None,
        value: json!(text),
        number: None,
        author: None,
        source: None,
        latency_ms: None,
        tags: vec![],
        key_id: None,
        idempotency_key: None,
        task_id: None,
    }))
}

fn answer(id: u128, text: &str, ids: &[u32]) -> Entry {
    // Any bits but those of NaN, which equals nothing.
    let floats: Vec<f32> = ids.iter().map(|id| f32::from_bits(id & 0x7F80_0000)).collect();
    let choice = Choice {
        id: Uuid::from_u128(id),
        finish_reason: None,
        output_text: Some(text.into()),
        message: None,
        output_ids: ids.to_vec(),
        logprobs: floats.clone(),
        raw_logprobs: floats,
        mean_logprob: Some(-0.5),
        tokens: ids.len() as u32,
    };
    Entry::Answer(Box::new(Inference {
        id: Uuid::from_u128(id),
        created: 2,
        endpoint: "chat".into(),
        model: "m".into(),
        adapter: u64::MAX,
        variant: None,
        conversation: None,
        key_id: None,
        user_key: Some(text.into()),
        status: Status::Cancelled,
        compare: false,
        prompt_tokens: 0,
        cached_tokens: 0,
        output_tokens: 0,
        first_token_us: None,
        duration_us: 0,
        config_hash: String::new(),
        metadata: Map::new(),
        params: None,
        messages: None,
        prompt_text: None,
        prompt_ids: ids.to_vec(),
        exposure: Some(Exposure { rollout: Uuid::from_u128(9), arm: 1, unit: i64::MIN, refused: Some(false), place: None }),
        choices: vec![choice.clone(), choice],
    }))
}

fn frame_of(entry: &Entry) -> Vec<u8> {
    match entry {
        Entry::Answer(answer) => frame_answer(answer),
        Entry::Feedback(feedback) => frame_feedback(feedback),
    }
}

/// Every record that waits, the oldest first, and the number of damaged places.
fn drain(journal: &Journal) -> (Vec<Entry>, usize) {
    let (mut entries, mut damaged) = (Vec::new(), 0);
    while let Some(number) = journal.oldest() {
        let contents = journal.read(number).unwrap();
        entries.extend(contents.entries);
        damaged += contents.damaged;
        journal.remove(number, false).unwrap();
    }
    (entries, damaged)
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    // Bytes of the mark in texts and tokens: reading must not take them for a frame.
    let text = prop_oneof!["[a-z\u{0}\n]{0,20}", Just("TM\n".to_owned())];
    let one = (any::<bool>(), any::<u128>(), text, prop::collection::vec(prop_oneof![any::<u32>(), Just(0x0A4D_54F1)], 0..6));
    let one = one.prop_map(|(is_answer, id, text, ids)| if is_answer { answer(id, &text, &ids) } else { feedback(id, &text) });
    prop::collection::vec(one, 1..12)
}

proptest! {
    #[test]
    fn whatever_a_crash_leaves_of_the_last_write_every_acknowledged_record_is_there_once(
        written in entries(), torn in entries(), keep in any::<prop::sample::Index>(), later in entries(), zeros in 0usize..40,
    ) {
        let temp = tempfile::tempdir().unwrap();
        let journal = Journal::open(temp.path().into(), 1 << 30).unwrap();
        for entry in &written {
            journal.append(&frame_of(entry)).unwrap().sync().unwrap();
        }
        // A write of several records that was not acknowledged, cut off at any byte; file systems may leave zeros in its place.
        let unfinished: Vec<u8> = torn.iter().flat_map(frame_of).collect();
        let kept = keep.index(unfinished.len());
        let mut tail = unfinished[..kept].to_vec();
        tail.extend(std::iter::repeat_n(0, zeros));
        journal.append(&tail).unwrap();
        drop(journal);

        let journal = Journal::open(temp.path().into(), 1 << 30).unwrap();
        for entry in &later {
            journal.append(&frame_of(entry)).unwrap();
        }
        let (found, damaged) = drain(&journal);
        prop_assert_eq!(damaged, 0, "a cut-off tail is not damage");
        prop_assert!(found.len() >= written.len() + later.len());
        prop_assert_eq!(&found[..written.len()], &written[..]);
        prop_assert_eq!(&found[found.len() - later.len()..], &later[..]);
        // Of the unfinished write only whole records, in order.
        let between = &found[written.len()..found.len() - later.len()];
        prop_assert_eq!(between, &torn[..between.len()]);
        prop_assert_eq!(journal.bytes(), 0);
        prop_assert!(journal.is_empty());
    }

    #[test]
    fn a_damaged_byte_costs_the_record_it_hit_and_is_noticed(
        written in entries(), at in any::<prop::sample::Index>(), flip in 1u8..,
    ) {
        let mut bytes: Vec<u8> = written.iter().flat_map(frame_of).collect();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let mut end = 0;
        let hit = written.iter().position(|entry| { end += frame_of(entry).len(); at < end }).unwrap();
        let contents = frame::read(&bytes);
        let mut expected = written.clone();
        expected.remove(hit);
        prop_assert_eq!(contents.entries, expected);
        prop_assert_eq!(contents.damaged, usize::from(hit + 1 < written.len()));
    }

    #[test]
    fn any_bytes_at_all_can_be_read(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert_eq!(frame::read(&bytes).entries, vec![]);
    }
}

#[test]
fn a_full_journal_takes_nothing_and_has_room_again_when_a_segment_is_done() {
    let temp = tempfile::tempdir().unwrap();
    let frame = frame_of(&feedback(1, "x"));
    let journal = Journal::open(temp.path().into(), frame.len() as u64 * 2 + 1).unwrap();
    journal.append(&frame).unwrap();
    journal.append(&frame).unwrap();
    assert!(matches!(journal.append(&frame), Err(Refused::Full)));
    assert_eq!(journal.room(), 1);
    let number = journal.oldest().unwrap();
    assert_eq!(journal.read(number).unwrap().entries.len(), 2);
    journal.remove(number, false).unwrap();
    journal.append(&frame).unwrap();
}

#[test]
fn segments_follow_each_other_and_a_damaged_one_is_kept_aside() {
    let temp = tempfile::tempdir().unwrap();
    let journal = Journal::open(temp.path().into(), 1 << 30).unwrap();
    let big = "x".repeat(3 << 20);
    let written: Vec<Entry> = (0..7).map(|id| feedback(id, &big)).collect();
    for entry in &written {
        journal.append(&frame_of(entry)).unwrap();
    }
    let first = journal.oldest().unwrap();
    journal.append(&frame_of(&feedback(9, "later"))).unwrap();
    assert_eq!(journal.read(first).unwrap().entries, written[..3]);
    journal.remove(first, true).unwrap();
    assert!(temp.path().join(format!("{first:016x}.damaged")).exists());
    assert_eq!(drain(&journal).0.len(), 5);
    assert!(Journal::open(temp.path().into(), 1 << 30).unwrap().is_empty());
}

/// The device `path` in place of the segment that is appended to.
fn put_in_place(journal: &Journal, path: &str) {
    let file = OpenOptions::new().append(true).open(path).unwrap();
    let state = &mut *lock(&journal.state);
    state.active = Some(Active { number: state.next, segment: Arc::new(Segment::new(file)), bytes: 0 });
    state.next += 1;
}

#[test]
fn a_full_disk_leaves_no_room_until_a_write_succeeds() {
    let temp = tempfile::tempdir().unwrap();
    let journal = Journal::open(temp.path().into(), 1 << 30).unwrap();
    let frame = frame_of(&feedback(1, "x"));
    put_in_place(&journal, "/dev/full");
    assert!(matches!(journal.append(&frame), Err(Refused::Full)));
    assert_eq!(journal.room(), 0);
    journal.append(&frame).unwrap();
    assert!(journal.room() > 0);
}

#[test]
fn after_a_failed_flush_no_flush_of_the_segment_succeeds_and_a_new_one_follows() {
    let temp = tempfile::tempdir().unwrap();
    let journal = Journal::open(temp.path().into(), 1 << 30).unwrap();
    // It takes every byte and cannot be flushed.
    put_in_place(&journal, "/dev/null");
    let segment = journal.append(&frame_of(&feedback(1, "x"))).unwrap();
    assert!(segment.sync().is_err());
    assert!(segment.sync().unwrap_err().to_string().contains("earlier"));
    let kept = feedback(2, "y");
    journal.append(&frame_of(&kept)).unwrap().sync().unwrap();
    let number = lock(&journal.state).active.as_ref().unwrap().number;
    assert_eq!(journal.read(number).unwrap().entries, [kept]);
}

#[test]
fn a_segments_name_that_cannot_be_had_is_passed_over() {
    let temp = tempfile::tempdir().unwrap();
    let journal = Journal::open(temp.path().into(), 1 << 30).unwrap();
    std::fs::create_dir(journal.path(1)).unwrap();
    let frame = frame_of(&feedback(1, "x"));
    assert!(matches!(journal.append(&frame), Err(Refused::Io(_))));
    journal.append(&frame).unwrap();
}
