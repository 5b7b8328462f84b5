//! Whether a model still knows what it knew: the loss on ordinary text.

use candle_core::Result;
use serde::{Deserialize, Serialize};

use crate::batch::{Label, Packed};
use crate::parameters::read;
use crate::train::{Pass, Policy};

/// Tokens of a window; each is predicted from those before it in the window.
pub const WINDOW: usize = 512;
/// Windows computed at once.
const TOGETHER: usize = 8;

/// Loss on a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextLoss {
    /// Mean negative log-probability of a token, in nats.
    pub loss: f64,
    /// Tokens that were predicted.
    pub tokens: u64,
}

/// The loss over `tokens`, cut into windows. Nothing is predicted of fewer than two.
pub fn loss(model: &dyn Policy, tokens: &[u32], pass: Pass) -> Result<Option<TextLoss>> {
    let windows: Vec<&[u32]> = tokens.chunks(WINDOW).filter(|window| window.len() > 1).collect();
    let (mut sum, mut count) = (0.0, 0);
    for together in windows.chunks(TOGETHER) {
        let mut batch = Packed::default();
        for window in together {
            let first = batch.rows() as u32;
            batch.push(&window[..window.len() - 1], None);
            let labels = window[1..].iter().zip(first..).map(|(token, row)| Label { row, token: *token });
            batch.labels.extend(labels);
        }
        sum -= read(&model.log_probs(&batch, pass)?, |values| values.iter().map(|value| f64::from(*value)).sum::<f64>())?;
        count += batch.labels.len() as u64;
    }
    Ok((count > 0).then(|| TextLoss { loss: sum / count as f64, tokens: count }))
}
