//! A language model that fits on a page: a row's hidden state is the mean of the embeddings that it sees, the logits are a frozen
//! matrix plus a pair of low rank.

use candle_core::{D, Device, Result, Tensor, Var};

use crate::{
    batch::Packed,
    collate::{Completion, Sample},
    parameters::Parameters,
    random::Random,
    train::{Pass, Policy},
};

pub(super) const VOCABULARY: usize = 24;
const WIDTH: usize = 12;
const RANK: usize = 6;

pub(super) struct Tiny {
    embedding: Tensor,
    output: Tensor,
    parameters: Parameters,
}

impl Tiny {
    pub(super) fn new() -> Self {
        let mut random = Random::new(17);
        let mut matrix = |rows: usize, columns: usize, scale: f64| -> Vec<f32> {
            (0..rows * columns).map(|_| (scale * random.normal()) as f32).collect()
        };
        let tensor = |values: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        let mut embedding = matrix(VOCABULARY, WIDTH, 1.0);
        // One feature is always there, so that what holds for all prompts can be learnt.
        embedding.iter_mut().step_by(WIDTH).for_each(|value| *value = 1.0);
        let embedding = tensor(embedding, (VOCABULARY, WIDTH));
        let output = tensor(matrix(WIDTH, VOCABULARY, 0.3), (WIDTH, VOCABULARY));
        let mut parameters = Parameters::default();
        let mut var = |name: &str, values: Vec<f32>| {
            parameters.push(name, Var::from_vec(values.clone(), values.len(), &Device::Cpu).unwrap()).unwrap();
        };
        var("lora_a", matrix(WIDTH, RANK, 0.3));
        var("lora_b", vec![0.0; RANK * VOCABULARY]);
        Self { embedding, output, parameters }
    }

    pub(super) fn values(&self) -> Vec<Vec<f32>> {
        self.parameters.iter().map(|parameter| parameter.values().unwrap()).collect()
    }

    /// Row i holds what row i sees, in equal parts.
    fn sees(batch: &Packed) -> Result<Tensor> {
        let rows = batch.rows();
        let mut weights = vec![0f32; rows * rows];
        for segment in &batch.segments {
            for place in 0..segment.len {
                let prefix = segment.prefix.map_or(0..0, |prefix| {
                    let prefix = batch.segments[prefix];
                    prefix.first..prefix.first + prefix.len
                });
                let row = segment.first + place;
                let part = 1.0 / (prefix.len() + place + 1) as f32;
                prefix.chain(segment.first..=row).for_each(|seen| weights[row * rows + seen] = part);
            }
        }
        Tensor::from_vec(weights, (rows, rows), &Device::Cpu)
    }
}

impl Policy for Tiny {
    fn frozen(&self) -> Result<String> {
        Ok("tiny".to_owned())
    }

    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn log_probs(&self, batch: &Packed, pass: Pass) -> Result<Tensor> {
        let rows: Vec<u32> = batch.labels.iter().map(|label| label.row).collect();
        let tokens: Vec<u32> = batch.labels.iter().map(|label| label.token).collect();
        let hidden = self.hidden(batch, &rows, pass)?;
        let logits = hidden.matmul(&self.output)?;
        let chosen = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(1)?;
        let picked = logits.contiguous()?.gather(&chosen, D::Minus1)?.squeeze(1)?;
        picked - logits.log_sum_exp(D::Minus1)?
    }

    /// The adapter is added to the hidden state, so that a reward head feels it too.
    fn hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<Tensor> {
        let tokens = Tensor::new(batch.tokens.as_slice(), &Device::Cpu)?;
        let seen = Self::sees(batch)?.matmul(&self.embedding.index_select(&tokens, 0)?)?;
        let hidden = seen.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        if !pass.adapter {
            return Ok(hidden);
        }
        let mut vars = self.parameters.iter().map(|parameter| parameter.var.as_tensor());
        let (a, b) = (vars.next().unwrap().reshape((WIDTH, RANK))?, vars.next().unwrap().reshape((RANK, VOCABULARY))?);
        let mut entering = hidden.clone();
        if let Some(seed) = pass.dropout {
            let mut random = Random::new(seed);
            let mask: Vec<f32> = (0..rows.len() * WIDTH).map(|_| if random.unit() < 0.1 { 0.0 } else { 1.0 / 0.9 }).collect();
            entering = (entering * Tensor::from_vec(mask, (rows.len(), WIDTH), &Device::Cpu)?)?;
        }
        let b = b.narrow(1, 0, WIDTH)?.contiguous()?;
        hidden + entering.matmul(&a)?.matmul(&b)?
    }

    fn width(&self) -> usize {
        WIDTH
    }
}

/// Comparisons in which the better answer holds low tokens and the worse one high tokens.
pub(super) fn pairs(count: usize, seed: u64) -> Vec<Sample> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|index| {
            let mut answer = |from: usize| -> Completion {
                let length = 2 + random.below(5);
                let tokens = (0..length).map(|_| (from + random.below(VOCABULARY / 2)) as u32).collect();
                Completion { tokens, learnt: None }
            };
            let completions = vec![answer(0), answer(VOCABULARY / 2)];
            let prompt = (0..2 + random.below(6)).map(|_| random.below(VOCABULARY) as u32).collect();
            let (raters, users) = (vec![format!("rater{}", index % 3)], vec![format!("user{}", index % 5)]);
            Sample { id: format!("row{index}"), prompt, completions, good: true, weight: 1.0, raters, users }
        })
        .collect()
}

/// One answer each: the better one is good.
pub(super) fn thumbs(count: usize, seed: u64) -> Vec<Sample> {
    let one = |(index, sample): (usize, Sample)| {
        let good = index % 2 == 0;
        let completion = sample.completions[usize::from(!good)].clone();
        Sample { completions: vec![completion], good, ..sample }
    };
    pairs(count, seed).into_iter().enumerate().map(one).collect()
}
