//! What the loop needs of a model.

use candle_core::{Result, Tensor, Var};

pub use crate::model::Pass;
use crate::{
    batch::Packed,
    model::Model,
    parameters::{Parameter, Parameters},
    random::Random,
};

/// A model that is trained. The same parameters, batch and pass give the same numbers, bit for bit.
pub trait Policy: Sync {
    /// Names all that its numbers are a function of beside the parameters, the reference included: a training goes on with the same alone, and
    /// reference log-probabilities are kept under it.
    fn frozen(&self) -> Result<String>;

    /// What training changes.
    fn parameters(&self) -> &Parameters;

    /// log π(label.token | everything that label.row sees), `[labels]` f32, in the order of the batch's labels.
    fn log_probs(&self, batch: &Packed, pass: Pass) -> Result<Tensor>;

    /// Hidden states behind the last norm, `[rows, width]` f32.
    fn hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<Tensor>;

    /// Both at once, for what costs one forward pass where a model shares it.
    fn log_probs_and_hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<(Tensor, Tensor)> {
        Ok((self.log_probs(batch, pass)?, self.hidden(batch, rows, pass)?))
    }

    /// Width of a hidden state.
    fn width(&self) -> usize;
}

impl Policy for Model {
    fn frozen(&self) -> Result<String> {
        self.frozen().map_err(Into::into)
    }

    fn parameters(&self) -> &Parameters {
        self.parameters()
    }

    fn log_probs(&self, batch: &Packed, pass: Pass) -> Result<Tensor> {
        self.log_probs(batch, pass).map_err(Into::into)
    }

    fn hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<Tensor> {
        self.hidden(batch, rows, pass).map_err(Into::into)
    }

    fn log_probs_and_hidden(&self, batch: &Packed, rows: &[u32], pass: Pass) -> Result<(Tensor, Tensor)> {
        self.log_probs_and_hidden(batch, rows, pass).map_err(Into::into)
    }

    fn width(&self) -> usize {
        self.files().config().hidden
    }
}

/// A linear function of a hidden state: the reward of a completion, read off its last token, or the value of what stands so far.
#[derive(Clone, Debug)]
pub struct Head {
    /// `[width]`, named as transformers names it.
    pub weight: Parameter,
}

impl Head {
    /// Normal with deviation 0.02, as transformers initialises it; the draws are our own.
    pub fn new(width: usize, seed: u64) -> Result<Self> {
        let mut random = Random::new(seed);
        let values: Vec<f32> = (0..width).map(|_| (0.02 * random.normal()) as f32).collect();
        let var = Var::from_vec(values, width, &candle_core::Device::Cpu)?;
        Ok(Self { weight: Parameter { name: "score.weight".to_owned(), var } })
    }

    /// One that says 0 of everything, under a name of its own: an estimate of value before anything was learnt.
    pub fn zero(name: &str, width: usize) -> Result<Self> {
        let var = Var::from_vec(vec![0f32; width], width, &candle_core::Device::Cpu)?;
        Ok(Self { weight: Parameter { name: name.to_owned(), var } })
    }

    /// `[rows]` of hidden states `[rows, width]`.
    pub fn rewards(&self, hidden: &Tensor) -> Result<Tensor> {
        hidden.matmul(&self.weight.var.as_tensor().unsqueeze(1)?)?.squeeze(1)
    }
}
