//! Answers that are being learnt from, and their way into a checkpoint and back.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use crate::collate::Completion;

/// An answer with all that its loss needs. Lists have one entry per token; where a method needs none, they are empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Rollout {
    #[serde(with = "packed")]
    pub(super) tokens: Vec<u32>,
    /// Log-probabilities under the distribution that the engine drew from.
    #[serde(with = "packed")]
    pub(super) sampled: Vec<f32>,
    /// It was not cut off.
    pub(super) ended: bool,
    /// How much better it was than expected: one number, or one per token.
    #[serde(with = "packed")]
    pub(super) advantage: Vec<f32>,
    /// The trainer's log-probabilities before the first step that learns from it; empty where that step is the only one.
    #[serde(with = "packed")]
    pub(super) old: Vec<f32>,
    /// The reference's.
    #[serde(with = "packed")]
    pub(super) reference: Vec<f32>,
    /// Estimates of value before that step.
    #[serde(with = "packed")]
    pub(super) values: Vec<f32>,
    /// What the values should have been.
    #[serde(with = "packed")]
    pub(super) returns: Vec<f32>,
}

/// Answers to one prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Group {
    /// Which prompt.
    pub(super) prompt: usize,
    pub(super) answers: Vec<Rollout>,
}

/// All answers that are learnt from at a time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Turn {
    /// Counted from 0.
    pub(super) number: u64,
    pub(super) groups: Vec<Group>,
}

impl Rollout {
    pub(super) fn completion(&self) -> Completion {
        Completion { tokens: self.tokens.clone(), learnt: None }
    }

    /// Whether nothing can be learnt from it beside its divergence.
    pub(super) fn is_indifferent(&self) -> bool {
        self.advantage.iter().all(|advantage| *advantage == 0.0)
    }
}

impl Group {
    pub(super) fn completions(&self, members: &[usize]) -> Vec<Completion> {
        members.iter().map(|member| self.answers[*member].completion()).collect()
    }
}

impl Turn {
    /// Every answer's place, in order.
    pub(super) fn places(&self) -> Vec<(usize, usize)> {
        let group = |(index, group): (usize, &Group)| (0..group.answers.len()).map(move |answer| (index, answer));
        self.groups.iter().enumerate().flat_map(group).collect()
    }
}

/// 32-bit numbers as base64: JSON's decimals do not come back exactly, and take five times the room.
mod packed {
    use super::*;

    pub(super) trait Word: Copy {
        fn word(self) -> [u8; 4];
        fn from(bytes: [u8; 4]) -> Self;
    }

    impl Word for u32 {
        fn word(self) -> [u8; 4] {
            self.to_le_bytes()
        }

        fn from(bytes: [u8; 4]) -> Self {
            Self::from_le_bytes(bytes)
        }
    }

    impl Word for f32 {
        fn word(self) -> [u8; 4] {
            self.to_le_bytes()
        }

        fn from(bytes: [u8; 4]) -> Self {
            Self::from_le_bytes(bytes)
        }
    }

    pub(super) fn serialize<T: Word, S: Serializer>(words: &[T], serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.word()).collect();
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, T: Word, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(D::Error::custom)?;
        let (words, rest) = bytes.as_chunks::<4>();
        if rest.is_empty() {
            Ok(words.iter().map(|word| T::from(*word)).collect())
        } else {
            Err(D::Error::custom("half a number"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_back_bit_for_bit() {
        let rollout = Rollout {
            tokens: vec![0, 1, u32::MAX],
            sampled: vec![-0.1, f32::MIN_POSITIVE, -0.0],
            ended: true,
            advantage: vec![0.865_875],
            returns: vec![f32::NAN],
            ..Rollout::default()
        };
        let json = serde_json::to_string(&Turn { number: 3, groups: vec![Group { prompt: 1, answers: vec![rollout.clone()] }] })
            .unwrap();
        let read: Turn = serde_json::from_str(&json).unwrap();
        let again = &read.groups[0].answers[0];
        assert_eq!((&again.tokens, again.ended, read.number), (&rollout.tokens, true, 3));
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&again.sampled), bits(&rollout.sampled));
        assert_eq!(bits(&again.returns), bits(&rollout.returns));
        assert!(serde_json::from_str::<Turn>(&json.replace("AAAAAAEAAAD", "AAAAAAEAAA")).is_err());
    }
}
