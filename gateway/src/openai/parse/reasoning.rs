//! Reasoning between marks at the start of an answer.

use super::marker::{Found, find};
use super::piece::{Advance, Pieces};

/// Marks around reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasoningTags {
    /// Name in the configuration.
    pub name: &'static str,
    /// Begins it.
    pub open: &'static str,
    /// Ends it.
    pub close: &'static str,
}

impl ReasoningTags {
    /// DeepSeek R1, Qwen 3, QwQ, SmolLM 3 and most others.
    pub const THINK: Self = Self { name: "think", open: "<think>", close: "</think>" };
    /// Magistral.
    pub const MAGISTRAL: Self = Self { name: "magistral", open: "[THINK]", close: "[/THINK]" };
    /// Seed OSS.
    pub const SEED: Self = Self { name: "seed", open: "<seed:think>", close: "</seed:think>" };
    /// EXAONE Deep.
    pub const THOUGHT: Self = Self { name: "thought", open: "<thought>", close: "</thought>" };
    /// Kimi VL.
    pub const KIMI_VL: Self = Self { name: "kimi_vl", open: "◁think▷", close: "◁/think▷" };

    /// Every pair, those first that only a reasoning model's template holds.
    pub const ALL: [Self; 5] = [Self::SEED, Self::MAGISTRAL, Self::KIMI_VL, Self::THINK, Self::THOUGHT];
}

/// Splits off the reasoning; is over when the rest is the answer.
#[derive(Debug)]
pub(super) struct Reasoning {
    tags: ReasoningTags,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing but white space yet.
    Start,
    /// Behind the opening mark, before the first word.
    Opened,
    Inside,
    /// Behind the closing mark, before the first word.
    Closed,
}

impl Reasoning {
    /// `open`: the prompt holds the opening mark.
    pub(super) fn new(tags: ReasoningTags, open: bool) -> Self {
        Self { tags, stage: if open { Stage::Opened } else { Stage::Start } }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Opened | Stage::Inside)
    }

    pub(super) fn advance(&mut self, pending: &mut String, last: bool, out: &mut Pieces) -> Advance {
        let ReasoningTags { open, close, .. } = self.tags;
        match self.stage {
            Stage::Start => {
                let text = pending.trim_start();
                let space = pending.len() - text.len();
                if text.starts_with(open) {
                    pending.drain(..space + open.len());
                    self.stage = Stage::Opened;
                    return Advance::Again;
                }
                if open.starts_with(text) && !last { Advance::Wait } else { Advance::Over }
            }
            Stage::Opened => {
                // Models whose template opens the reasoning for them sometimes do it again.
                let space = pending.len() - pending.trim_start().len();
                pending.drain(..space);
                if let Some(rest) = pending.strip_prefix(open) {
                    *pending = rest.to_owned();
                    return Advance::Again;
                }
                if open.starts_with(pending.as_str()) && !last {
                    return Advance::Wait;
                }
                self.stage = Stage::Inside;
                Advance::Again
            }
            Stage::Inside => match find(pending, &[close], last) {
                Found::Marker { text, after, .. } => {
                    out.reasoning(&pending[..text]);
                    pending.drain(..after);
                    self.stage = Stage::Closed;
                    Advance::Again
                }
                Found::Certain(end) => {
                    out.reasoning(&pending[..end]);
                    pending.drain(..end);
                    Advance::Wait
                }
            },
            Stage::Closed => {
                let space = pending.len() - pending.trim_start().len();
                pending.drain(..space);
                if pending.is_empty() { Advance::Wait } else { Advance::Over }
            }
        }
    }
}
