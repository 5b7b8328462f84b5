//! Records as bytes of the spill log.
//!
//! A frame is a mark of 4 bytes, the length of the payload (u32, little endian), the first 8 bytes of BLAKE3 over kind and payload,
//! the kind, the payload. Reading goes on at the next valid frame after bytes that are none, so a torn write or a bad sector costs the
//! records it hit and no other.
//!
//! An answer's payload is the length of its JSON (u32), the JSON without tokens and log-probabilities, and those as arrays of 4-byte
//! words, each after its count: JSON has no infinities, and ten digits for a token are five times its size.

use crate::records::{Choice, Feedback, Inference};

const MARK: [u8; 4] = [0xF1, b'T', b'M', b'\n'];
const HEAD: usize = 17;
const ANSWER: u8 = 1;
const FEEDBACK: u8 = 2;

/// A record of the spill log.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Entry {
    Answer(Box<Inference>),
    Feedback(Box<Feedback>),
}

/// What is in a segment.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Contents {
    pub(crate) entries: Vec<Entry>,
    /// Places before the last frame where bytes are no frame: damage, not a write that was cut off.
    pub(crate) damaged: usize,
}

pub(crate) fn frame_answer(answer: &Inference) -> Vec<u8> {
    let plain = Inference {
        prompt_ids: Vec::new(),
        choices: answer
            .choices
            .iter()
            .map(|choice| Choice { output_ids: Vec::new(), logprobs: Vec::new(), raw_logprobs: Vec::new(), ..choice.clone() })
            .collect(),
        ..answer.clone()
    };
    let json = serde_json::to_vec(&plain).unwrap_or_default();
    let mut payload = Vec::with_capacity(json.len() + 64);
    payload.extend((json.len() as u32).to_le_bytes());
    payload.extend(json);
    words(&mut payload, answer.prompt_ids.iter().copied());
    for choice in &answer.choices {
        words(&mut payload, choice.output_ids.iter().copied());
        words(&mut payload, choice.logprobs.iter().map(|float| float.to_bits()));
        words(&mut payload, choice.raw_logprobs.iter().map(|float| float.to_bits()));
    }
    frame(ANSWER, &payload)
}

pub(crate) fn frame_feedback(feedback: &Feedback) -> Vec<u8> {
    frame(FEEDBACK, &serde_json::to_vec(feedback).unwrap_or_default())
}

fn words(payload: &mut Vec<u8>, words: impl ExactSizeIterator<Item = u32>) {
    payload.extend((words.len() as u32).to_le_bytes());
    words.for_each(|word| payload.extend(word.to_le_bytes()));
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + payload.len());
    bytes.extend(MARK);
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(check(kind, payload));
    bytes.push(kind);
    bytes.extend(payload);
    bytes
}

fn check(kind: u8, payload: &[u8]) -> [u8; 8] {
    let mut hash = blake3::Hasher::new();
    hash.update(&[kind]).update(payload);
    let mut check = [0; 8];
    check.copy_from_slice(&hash.finalize().as_bytes()[..8]);
    check
}

/// The records of a segment, whatever happened to its bytes.
pub(crate) fn read(bytes: &[u8]) -> Contents {
    let mut contents = Contents::default();
    let (mut at, mut lost) = (0, false);
    while at < bytes.len() {
        match frame_at(&bytes[at..]) {
            Some((kind, payload, length)) => {
                // Lost bytes before a frame that is whole were not the end of the file.
                contents.damaged += usize::from(std::mem::take(&mut lost));
                match entry(kind, payload) {
                    Some(entry) => contents.entries.push(entry),
                    None => contents.damaged += 1,
                }
                at += length;
            }
            None => {
                lost = true;
                at += 1;
                at += bytes[at..].windows(4).position(|four| four == MARK).unwrap_or(bytes.len() - at);
            }
        }
    }
    contents
}

fn frame_at(bytes: &[u8]) -> Option<(u8, &[u8], usize)> {
    let (head, rest) = bytes.split_at_checked(HEAD)?;
    if head[..4] != MARK {
        return None;
    }
    let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
    let payload = rest.get(..length)?;
    (head[8..16] == check(head[16], payload)).then_some((head[16], payload, HEAD + length))
}

fn entry(kind: u8, payload: &[u8]) -> Option<Entry> {
    match kind {
        ANSWER => {
            let (length, rest) = payload.split_first_chunk::<4>()?;
            let (json, mut rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            let mut answer: Inference = serde_json::from_slice(json).ok()?;
            answer.prompt_ids = take_words(&mut rest)?;
            for choice in &mut answer.choices {
                choice.output_ids = take_words(&mut rest)?;
                choice.logprobs = take_words(&mut rest)?.into_iter().map(f32::from_bits).collect();
                choice.raw_logprobs = take_words(&mut rest)?.into_iter().map(f32::from_bits).collect();
            }
            Some(Entry::Answer(Box::new(answer)))
        }
        FEEDBACK => serde_json::from_slice(payload).ok().map(|feedback| Entry::Feedback(Box::new(feedback))),
        _ => None,
    }
}

fn take_words(bytes: &mut &[u8]) -> Option<Vec<u32>> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let (words, rest) = rest.split_at_checked((u32::from_le_bytes(*count) as usize).checked_mul(4)?)?;
    *bytes = rest;
    Some(words.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}
