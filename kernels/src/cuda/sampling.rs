//! The step's sampled rows to the device and back.

use super::device::{Address, Device, Kernel, Launch, Params, Source};
use super::params as p;
use super::room::Room;
use crate::error::KernelError;
use crate::ops::{SampleRow, Sampled, StepBatch};
use crate::random::uniform;

const SAMPLE: Kernel = Kernel::new(Source::Sampling, "sample", 512);
/// Shared memory of a block: `Scratch` in the kernel.
const SCRATCH: usize = 16 * 8 + 256 * 8 + 8 + 2 * 4;
/// No token, no mask.
const NONE: u32 = u32::MAX;

/// Memory for sampling.
#[derive(Default)]
pub(super) struct SamplingRoom {
    lists: Room,
    values: Room,
    results: Room,
    drew: Drew,
}

/// What was drawn for a step, as it lies on the device.
#[derive(Clone, Copy, Default)]
pub(super) struct Drew {
    rows: usize,
    most_top: usize,
}

impl SamplingRoom {
    pub(super) fn rooms(&self) -> [Room; 3] {
        [self.lists, self.values, self.results]
    }

    /// Launches the sampling of the step's rows. Waits for the masks that are still being made; the step runs meanwhile.
    pub(super) fn run<D: Device>(
        &mut self,
        device: &mut D,
        batch: &StepBatch,
        logits: Address,
        width: usize,
        vocabulary: usize,
    ) -> Result<(), KernelError> {
        self.drew = Drew { rows: batch.samples.len(), most_top: 0 };
        if self.drew.rows == 0 {
            return Ok(());
        }
        let mut masks: Vec<u32> = Vec::new();
        let mut row = |wanted: &SampleRow| {
            let mut mask = (NONE, 0);
            if let (None, Some(allowed)) = (wanted.score, &wanted.mask) {
                let words = allowed.wait();
                mask = (masks.len() as u32, words.len() as u32);
                masks.extend_from_slice(words);
            }
            p::SampleRow {
                uniform: uniform(wanted.seed, wanted.counter),
                score: wanted.score.unwrap_or(NONE),
                top_k: wanted.top_k,
                temperature: wanted.temperature,
                top_p: wanted.top_p,
                min_p: wanted.min_p,
                repetition: wanted.repetition_penalty,
                presence: wanted.presence_penalty,
                frequency: wanted.frequency_penalty,
                history_from: wanted.history.start,
                history_to: wanted.history.end,
                bias_from: wanted.bias.start,
                bias_to: wanted.bias.end,
                mask: mask.0,
                mask_words: mask.1,
                top_n: wanted.top_n.unwrap_or(0).min(vocabulary as u32),
                unused: 0,
            }
        };
        let rows: Vec<p::SampleRow> = batch.samples.iter().map(&mut row).collect();
        self.drew.most_top = rows.iter().map(|row| row.top_n as usize).max().unwrap_or(0);
        let history = batch.history.iter();
        let history = history.map(|h| p::TokenCount { token: h.token, in_prompt: h.in_prompt.into(), generated: h.generated });
        let bias = batch.bias.iter().map(|&(token, value)| p::TokenBias { token, value });
        let lists = [
            p::all_bytes(&rows),
            p::all_bytes(&history.collect::<Vec<_>>()),
            p::all_bytes(&bias.collect::<Vec<_>>()),
            masks.iter().flat_map(|word| word.to_le_bytes()).collect(),
        ];
        let start = self.lists.write(device, "sampling", &lists.concat())?;
        let mut at = start;
        let [rows, history, bias, masks] = lists.each_ref().map(|list| {
            let own = at;
            at = at.plus(list.len());
            own
        });
        let drew = self.drew;
        let values = self.values.reserve(device, "sampling", drew.rows * vocabulary * 4)?;
        let sampled = self.results.reserve(device, "sampling", drew.bytes())?;
        let params = p::Sample {
            logits,
            values,
            rows,
            history,
            bias,
            masks,
            sampled,
            top: sampled.plus(drew.drawn_bytes()),
            vocabulary: vocabulary as u32,
            width: width as u32,
            most_top: drew.most_top as u32,
            unused: 0,
        };
        device.launch(SAMPLE, Launch::blocks(drew.rows).with_shared(SCRATCH), params.bytes())
    }

    /// What was drawn last.
    pub(super) fn drew(&self) -> Drew {
        self.drew
    }

    /// Where it lies, and the words of a row, of which the first is the token.
    pub(super) fn drawn(&self) -> (Address, u32) {
        (self.results.at, (size_of::<p::Drawn>() / 4) as u32)
    }
}

impl Drew {
    fn drawn_bytes(self) -> usize {
        self.rows * size_of::<p::Drawn>()
    }

    /// Bytes on the device: what was drawn, then the likeliest.
    pub(super) fn bytes(self) -> usize {
        self.drawn_bytes() + self.rows * 2 * self.most_top * size_of::<p::Likely>()
    }

    /// Makes samples of them.
    pub(super) fn read(self, bytes: &[u8], out: &mut Vec<Sampled>) {
        let (drawn, top) = bytes.split_at(self.drawn_bytes());
        let words = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect::<Vec<u32>>();
        let (drawn, top) = (words(drawn), words(top));
        for (row, fields) in drawn.chunks_exact(size_of::<p::Drawn>() / 4).enumerate() {
            let &[token, rank, logprob, processed, raw_top, processed_top] = fields else { continue };
            let list = |which: usize, count: u32| -> Vec<(u32, f32)> {
                let first = (row * 2 + which) * self.most_top * 2;
                let pairs = top[first..first + count as usize * 2].as_chunks::<2>().0.iter();
                pairs.map(|[token, logprob]| (*token, f32::from_bits(*logprob))).collect()
            };
            out.push(Sampled {
                token,
                logprob: f32::from_bits(logprob),
                processed_logprob: f32::from_bits(processed),
                rank,
                top: list(0, raw_top),
                processed_top: list(1, processed_top),
            });
        }
    }
}
