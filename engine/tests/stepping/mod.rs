//! The plainest way to step a decoder: every sequence has its own run of blocks.

use tidemill_engine::Decoder;
use tidemill_engine::model::Model;
use tidemill_kernels::{KvDtype, NO_ADAPTER, SampleRow, Sampled, SequenceSpan, StepBatch, StepOutput};

const BLOCK: usize = 32;
const BLOCKS_PER_SEQUENCE: usize = 32;
const SEQUENCES: usize = 32;

pub struct Stepper<M: Model = Decoder> {
    decoder: M,
    /// Slot of each sequence's adapter; those beyond the list have none.
    adapters: Vec<u32>,
}

impl<M: Model> Stepper<M> {
    pub fn new(mut decoder: M) -> Self {
        decoder.alloc_kv(BLOCKS_PER_SEQUENCE * SEQUENCES, BLOCK, KvDtype::F32).unwrap();
        Self { decoder, adapters: Vec::new() }
    }

    /// The decoder.
    pub fn decoder(&mut self) -> &mut M {
        &mut self.decoder
    }

    /// Gives each sequence an adapter's slot or `NO_ADAPTER`.
    pub fn use_adapters(&mut self, slots: &[u32]) {
        self.adapters = slots.to_vec();
    }

    fn add_rows(&self, batch: &mut StepBatch, sequence: usize, start: usize, tokens: &[u32]) {
        add_rows(batch, sequence, start, tokens);
        if !self.adapters.is_empty() {
            let slot = self.adapters.get(sequence).copied().unwrap_or(NO_ADAPTER);
            batch.adapters.resize(batch.tokens.len(), slot);
        }
    }

    /// The log-probability of every token after the tokens at `positions`, all computed in one step.
    pub fn log_probabilities(&mut self, tokens: &[u32], positions: &[u32]) -> Vec<Vec<f32>> {
        let vocabulary = self.decoder.vocabulary();
        let mut batch = StepBatch::default();
        self.add_rows(&mut batch, 0, 0, tokens);
        let every = |&row: &u32| SampleRow { score: Some(0), top_n: Some(vocabulary as u32), ..SampleRow::greedy(row) };
        batch.samples = positions.iter().map(every).collect();
        let mut out = StepOutput::default();
        self.decoder.forward(&batch, &mut out).unwrap();
        let row = |sampled: &Sampled| {
            let mut row = vec![f32::NAN; vocabulary];
            sampled.top.iter().for_each(|(token, logprob)| row[*token as usize] = *logprob);
            row
        };
        out.samples.iter().map(row).collect()
    }

    /// At most `length` tokens for each prompt, up to and including one of `ends`: prompts one by one, then all answers together.
    pub fn greedy(&mut self, prompts: &[&[u32]], length: usize, ends: &[u32]) -> Vec<Vec<u32>> {
        let mut out = StepOutput::default();
        let mut answers: Vec<Vec<u32>> = Vec::new();
        for (sequence, prompt) in prompts.iter().enumerate() {
            let mut batch = StepBatch::default();
            self.add_rows(&mut batch, sequence, 0, prompt);
            batch.samples.push(SampleRow::greedy(prompt.len() as u32 - 1));
            self.decoder.forward(&batch, &mut out).unwrap();
            answers.push(vec![out.samples[0].token]);
        }
        loop {
            let goes_on = |answer: &Vec<u32>| answer.len() < length && !ends.contains(answer.last().unwrap());
            let running: Vec<usize> = (0..answers.len()).filter(|&sequence| goes_on(&answers[sequence])).collect();
            if running.is_empty() {
                return answers;
            }
            let mut batch = StepBatch::default();
            for &sequence in &running {
                let answer = &answers[sequence];
                batch.samples.push(SampleRow::greedy(batch.tokens.len() as u32));
                self.add_rows(&mut batch, sequence, prompts[sequence].len() + answer.len() - 1, &answer[answer.len() - 1..]);
            }
            self.decoder.forward(&batch, &mut out).unwrap();
            for (&sequence, sampled) in running.iter().zip(&out.samples) {
                answers[sequence].push(sampled.token);
            }
        }
    }
}

impl Stepper {
    /// Logits after the tokens at `positions`, all computed in one step.
    pub fn logits(&mut self, tokens: &[u32], positions: &[u32]) -> Vec<Vec<f32>> {
        let mut batch = StepBatch::default();
        self.add_rows(&mut batch, 0, 0, tokens);
        batch.samples = positions.iter().map(|&row| SampleRow::greedy(row)).collect();
        self.decoder.forward(&batch, &mut StepOutput::default()).unwrap();
        let logits = self.decoder.logits().unwrap();
        let width = self.decoder.vocabulary();
        assert_eq!(logits.len(), positions.len() * width);
        logits.chunks(width).map(<[f32]>::to_vec).collect()
    }
}

fn add_rows(batch: &mut StepBatch, sequence: usize, start: usize, tokens: &[u32]) {
    let first_block = sequence * BLOCKS_PER_SEQUENCE;
    batch.sequences.push(SequenceSpan {
        first_row: batch.tokens.len() as u32,
        rows: tokens.len() as u32,
        context_len: (start + tokens.len()) as u32,
        first_block: batch.blocks.len() as u32,
    });
    batch.blocks.extend((first_block..first_block + BLOCKS_PER_SEQUENCE).map(|block| block as u32));
    for (offset, &token) in tokens.iter().enumerate() {
        batch.tokens.push(token);
        batch.positions.push((start + offset) as u32);
        batch.slots.push((first_block * BLOCK + start + offset) as i64);
    }
}
