//! Rows to tokens, as the model will meet them when it serves: the prompt with the header of the answer's turn, then the answer as the
//! template goes on with it, end of turn included. An answer that was cut off has no such end: the model wrote none, so none is
//! taught or, of a rejected answer, taught away.

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};
use tidemill_engine::{ChatInput, ChatTemplate, Tokenizer};

use super::sample::{Completion, Sample, Truncation};
use crate::dataset::{Example, Message, Row};

/// A character for private use, which no text that people read ends with.
const MARK: char = '\u{10fffd}';

/// What a trainer takes from rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Teaches {
    /// Answers to imitate: demonstrations, and the chosen answers of comparisons.
    Imitation,
    /// Pairs: comparisons.
    Comparison,
    /// Answers judged by themselves: thumbs, and both answers of comparisons.
    Judgement,
}

/// How rows become tokens.
#[derive(Clone, Debug)]
pub struct EncodeOptions {
    /// Most tokens of a prompt with a completion.
    pub max_length: Option<usize>,
    /// What gives way above that.
    pub truncation_mode: Truncation,
    /// Learn every turn of the assistant, those in the prompt too, and nothing else.
    pub assistant_only_loss: bool,
    /// More variables for the template.
    pub chat_template_kwargs: Map<String, Value>,
}

/// Why a row is not trained on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dropped {
    /// It has no example of what this trainer learns from.
    Unsuitable,
    /// The template refuses the conversation.
    Template(String),
    /// What the template writes for the whole conversation does not begin with what it writes for the prompt.
    Prefix,
    /// The tokenizer cannot cut the text between prompt and completion.
    Boundary,
    /// Nothing of the completion fits, or it is empty.
    NothingToLearn,
    /// The text cannot be tokenised.
    Tokenizer(String),
    /// The answer was cut off, and the template does not let its text through.
    CutOff,
    /// The prompt leaves no room for an answer: its tokens, and the most that it may have.
    TooLong(usize, usize),
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsuitable => f.write_str("it is not a kind of row that this trainer learns from"),
            Self::Template(detail) => write!(f, "the chat template refuses it: {detail}"),
            Self::Prefix => f.write_str(
                "the chat template changes what stands before an answer once the answer is there, so prompt and answer cannot be told \
                 apart; use a template that only appends",
            ),
            Self::Boundary => f.write_str("the tokenizer joins the end of the prompt with the beginning of the answer"),
            Self::NothingToLearn => f.write_str("its answer is empty, or nothing of it fits into max_length"),
            Self::Tokenizer(detail) => f.write_str(detail),
            Self::CutOff => f.write_str("its answer was cut off, and what the chat template makes of it does not say where its text ends"),
            Self::TooLong(tokens, limit) => write!(
                f,
                "its prompt has {tokens} tokens, and beside max_completion_length no more than {limit} fit into max_length"
            ),
        }
    }
}

/// The rows of a dataset as tokens.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// What is trained on, in the order of the rows, with weight 1.
    pub samples: Vec<Sample>,
    /// Ids of rows that are not, and why.
    pub dropped: Vec<(String, Dropped)>,
    /// Samples that were cut to `max_length`.
    pub truncated: usize,
}

impl Encoded {
    /// How many rows were dropped for each reason, most first, in words.
    pub fn reasons(&self) -> Vec<(String, usize)> {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        self.dropped.iter().for_each(|(_, why)| *counts.entry(why.to_string()).or_default() += 1);
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        counts
    }
}

/// A model's template and tokenizer.
pub struct Encoder<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    options: EncodeOptions,
}

impl<'a> Encoder<'a> {
    /// With the template and tokenizer that the model serves with.
    pub fn new(template: &'a ChatTemplate, tokenizer: &'a Tokenizer, options: EncodeOptions) -> Self {
        Self { template, tokenizer, options }
    }

    /// All rows. One that cannot be used is listed with the reason; it stops nothing.
    pub fn rows(&self, rows: &[Row], teaches: Teaches) -> Encoded {
        let mut encoded = Encoded::default();
        for row in rows {
            match self.row(row, teaches) {
                Ok(samples) => {
                    for mut sample in samples {
                        if let Some(max) = self.options.max_length {
                            encoded.truncated += usize::from(sample.cut(max, self.options.truncation_mode));
                        }
                        if sample.teaches() {
                            encoded.samples.push(sample);
                        } else {
                            encoded.dropped.push((row.id.clone(), Dropped::NothingToLearn));
                        }
                    }
                }
                Err(why) => encoded.dropped.push((row.id.clone(), why)),
            }
        }
        encoded
    }

    /// The tokens of a row's prompt with the header of the answer's turn: what a server would compute. None where the template or the
    /// tokenizer refuses it.
    pub fn prompt(&self, row: &Row) -> Option<Vec<u32>> {
        let now = u64::try_from(row.origin.judged_at / 1_000_000).unwrap_or(0);
        self.opening(row.example.prompt(), now).ok()
    }

    fn row(&self, row: &Row, teaches: Teaches) -> Result<Vec<Sample>, Dropped> {
        let sample = |prompt: &[Message], answers: &[&[Message]], good: bool| {
            // The template's clock stands where the judgement was given: the same row has the same tokens tomorrow.
            let now = u64::try_from(row.origin.judged_at / 1_000_000).unwrap_or(0);
            let (raters, users) = (row.origin.raters.clone(), row.origin.users.clone());
            let (prompt, completions) = self.conversation(prompt, answers, now)?;
            Ok(Sample { id: row.id.clone(), prompt, completions, good, weight: 1.0, raters, users })
        };
        match (teaches, &row.example) {
            (Teaches::Imitation, Example::Demonstration { prompt, completion }) => Ok(vec![sample(prompt, &[completion], true)?]),
            (Teaches::Imitation, Example::Preference { prompt, chosen, .. }) => Ok(vec![sample(prompt, &[chosen], true)?]),
            (Teaches::Comparison, Example::Preference { prompt, chosen, rejected }) => {
                Ok(vec![sample(prompt, &[chosen, rejected], true)?])
            }
            (Teaches::Judgement, Example::Unpaired { prompt, completion, label }) => {
                Ok(vec![sample(prompt, &[completion], *label)?])
            }
            (Teaches::Judgement, Example::Preference { prompt, chosen, rejected }) => {
                Ok(vec![sample(prompt, &[chosen], true)?, sample(prompt, &[rejected], false)?])
            }
            _ => Err(Dropped::Unsuitable),
        }
    }

    /// A prompt alone, up to where an answer begins; `now` is the template's clock, in seconds since 1970.
    pub fn opening(&self, messages: &[Message], now: u64) -> Result<Vec<u32>, Dropped> {
        let opening = self.render(&values(messages), true, now)?;
        self.tokenizer.encode(&opening, false, true).map_err(|error| Dropped::Tokenizer(error.to_string()))
    }

    /// Prompt and completions as tokens.
    fn conversation(&self, prompt: &[Message], answers: &[&[Message]], now: u64) -> Result<(Vec<u32>, Vec<Completion>), Dropped> {
        if self.options.assistant_only_loss {
            let answer = answers.first().copied().unwrap_or_default();
            let (prompt, completion) = self.turns(prompt, answer, now)?;
            return Ok((prompt, vec![completion]));
        }
        let opening = self.render(&values(prompt), true, now)?;
        let mut tokens: Option<Vec<u32>> = None;
        let mut completions = Vec::with_capacity(answers.len());
        for answer in answers {
            let whole = self.answered(prompt, answer, now)?;
            if !whole.starts_with(&opening) {
                return Err(Dropped::Prefix);
            }
            let mut parts = self.pieces(&whole, &[opening.len()])?;
            completions.push(Completion { tokens: parts.pop().unwrap_or_default(), learnt: None });
            let first = parts.pop().unwrap_or_default();
            if tokens.get_or_insert_with(|| first.clone()) != &first {
                return Err(Dropped::Boundary);
            }
        }
        Ok((tokens.unwrap_or_default(), completions))
    }

    /// The conversation cut before the first turn of the assistant; behind it, turns of the assistant are learnt and others are not.
    fn turns(&self, prompt: &[Message], answer: &[Message], now: u64) -> Result<(Vec<u32>, Completion), Dropped> {
        let messages = values(prompt.iter().chain(answer));
        let whole = self.answered(prompt, answer, now)?;
        let mut cuts = Vec::new();
        for (index, message) in prompt.iter().chain(answer).enumerate().filter(|(_, message)| message.role == "assistant") {
            debug_assert_eq!(messages[index]["role"].as_str(), Some(message.role.as_str()));
            let start = self.render(&messages[..index], true, now)?;
            let last = index + 1 == messages.len();
            let end = if last { whole.clone() } else { self.render(&messages[..=index], false, now)? };
            let begins = cuts.last().is_none_or(|last| *last <= start.len());
            if !whole.starts_with(&start) || !whole.starts_with(&end) || start.len() > end.len() || !begins {
                return Err(Dropped::Prefix);
            }
            cuts.extend([start.len(), end.len()]);
        }
        if cuts.is_empty() {
            return Err(Dropped::NothingToLearn);
        }
        let parts = self.pieces(&whole, &cuts)?;
        let (mut tokens, mut learnt) = (Vec::new(), Vec::new());
        for (place, part) in parts.iter().enumerate().skip(1) {
            learnt.extend(std::iter::repeat_n(place % 2 == 1, part.len()));
            tokens.extend_from_slice(part);
        }
        // What the others say last teaches nothing and predicts nothing.
        let end = learnt.iter().rposition(|learnt| *learnt).map_or(0, |last| last + 1);
        tokens.truncate(end);
        learnt.truncate(end);
        let learnt = if learnt.iter().all(|learnt| *learnt) { None } else { Some(learnt) };
        Ok((parts.into_iter().next().unwrap_or_default(), Completion { tokens, learnt }))
    }

    /// The tokens of `text`, cut at byte places `cuts`, which ascend.
    ///
    /// Where the tokens of the whole text have a boundary at every cut, they are those of the whole text. Where a token would span a
    /// cut, each piece is tokenised by itself: that is how the model meets them, since it goes on from the prompt's tokens.
    fn pieces(&self, text: &str, cuts: &[usize]) -> Result<Vec<Vec<u32>>, Dropped> {
        let encode = |text: &str| self.tokenizer.encode(text, false, true).map_err(|error| Dropped::Tokenizer(error.to_string()));
        let whole = encode(text)?;
        let mut places = Vec::with_capacity(cuts.len());
        for cut in cuts {
            let before = encode(&text[..*cut])?;
            if !whole.starts_with(&before) {
                break;
            }
            places.push(before.len());
        }
        let bounds = |places: &[usize], end: usize| -> Vec<(usize, usize)> {
            let starts = std::iter::once(0).chain(places.iter().copied());
            starts.zip(places.iter().copied().chain([end])).collect()
        };
        if places.len() == cuts.len() {
            return Ok(bounds(&places, whole.len()).into_iter().map(|(from, to)| whole[from..to].to_vec()).collect());
        }
        let mut parts = Vec::with_capacity(cuts.len() + 1);
        for (from, to) in bounds(cuts, text.len()) {
            let part = encode(&text[from..to])?;
            // A tokenizer that begins every text with a space would put one between the pieces.
            let bytes: Vec<u8> = part.iter().flat_map(|token| self.tokenizer.token_bytes(*token)).copied().collect();
            if from > 0 && bytes != text.as_bytes()[from..to] {
                return Err(Dropped::Boundary);
            }
            parts.push(part);
        }
        Ok(parts)
    }

    /// The conversation with its answer, as far as that goes.
    fn answered(&self, prompt: &[Message], answer: &[Message], now: u64) -> Result<String, Dropped> {
        let mut messages = values(prompt.iter().chain(answer));
        let cut_off = answer.last().filter(|last| last.is_cut_off());
        let (Some(last), Some(value)) = (cut_off, messages.last_mut()) else { return self.render(&messages, false, now) };
        // Whatever the template does to a text, a mark behind it shows where it ends.
        value["content"] = Value::String(format!("{}{MARK}", last.content));
        let mut whole = self.render(&messages, false, now)?;
        whole.truncate(whole.rfind(MARK).ok_or(Dropped::CutOff)?);
        Ok(whole)
    }

    fn render(&self, messages: &[Value], add_generation_prompt: bool, now: u64) -> Result<String, Dropped> {
        let variables = Some(&self.options.chat_template_kwargs).filter(|variables| !variables.is_empty());
        let input = ChatInput { messages, add_generation_prompt, variables, now: Some(now), ..ChatInput::default() };
        self.template.render(&input).map_err(|error| Dropped::Template(error.to_string()))
    }
}

fn values<'a>(messages: impl IntoIterator<Item = &'a Message>) -> Vec<Value> {
    // Strings and maps with string keys: always JSON.
    messages.into_iter().map(|message| serde_json::to_value(message).unwrap_or_default()).collect()
}
