//! Rewards from a reward model: the base with an adapter and a head, or a model of its own with one, as the trainer of reward models
//! leaves them.

use std::sync::Arc;

use tidemill_engine::ModelFiles;

use super::{Answer, RewardError, Score};
use crate::{
    collate::{EncodeOptions, Encoder, Item, Layout, Sample, Teaches, batches, pack},
    dataset::{Example, Message, Origin, Row},
    parameters::read,
    train::{Head, Pass, Policy},
};

/// Each answer alone, and its last token's row, which the reward is read off.
const LAYOUT: Layout = Layout { share_prompt: true, last_row: true };

/// A model that judges.
pub struct RewardModel {
    /// Base and adapter, or the model that was trained whole.
    pub model: Box<dyn Policy + Send>,
    /// Reads the reward off a hidden state.
    pub head: Head,
    /// The model's tokenizer and template.
    pub files: Arc<ModelFiles>,
    /// How conversations became tokens when it was trained.
    pub encoding: EncodeOptions,
    /// Tokens that are computed at once.
    pub budget: usize,
    /// Names base, adapter and head by their contents.
    pub digest: String,
}

impl RewardModel {
    /// The conversations with their answers as it was taught to read them; none for one that the template refuses.
    fn encode(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<Sample>>, RewardError> {
        let Some(template) = self.files.chat_template() else {
            let detail = "it has no chat template, so it cannot read conversations".to_owned();
            return Err(RewardError::Model { path: self.files.path().to_owned(), detail });
        };
        let encoder = Encoder::new(template, self.files.tokenizer(), self.encoding.clone());
        let one = |answer: &Answer<'_>| {
            let said = Message::assistant(answer.text);
            let (prompt, completion) = (answer.prompt.to_vec(), vec![if answer.ended { said } else { said.cut_off() }]);
            let row = Row::new(Example::Demonstration { prompt, completion }, Origin::default());
            encoder.rows(std::slice::from_ref(&row), Teaches::Imitation).samples.pop()
        };
        Ok(answers.iter().map(one).collect())
    }
}

impl Score for RewardModel {
    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<f64>>, RewardError> {
        let samples = self.encode(answers)?;
        let items: Vec<Item<'_>> =
            samples.iter().enumerate().flat_map(|(index, sample)| Some(Item::of(index, sample.as_ref()?))).collect();
        let sizes: Vec<usize> = items.iter().map(|item| item.rows(LAYOUT)).collect();
        let mut found = vec![None; answers.len()];
        for batch in batches(&sizes, self.budget) {
            let micro = pack(batch.iter().map(|place| items[*place]), LAYOUT);
            let rows: Vec<u32> = micro.spans.iter().map(|span| span.last_row).collect();
            let rewards = self.head.rewards(&self.model.hidden(&micro.batch, &rows, Pass::EVALUATE)?)?;
            read(&rewards, |rewards| {
                micro.spans.iter().zip(rewards).for_each(|(span, reward)| found[span.sample] = Some(f64::from(*reward)));
            })?;
        }
        Ok(found)
    }

    fn digest(&self) -> Option<String> {
        Some(self.digest.clone())
    }
}
