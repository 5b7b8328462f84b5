//! The reward model's loss.

use candle_core::{Result, Tensor};

use super::log_sigmoid;

/// −log σ(chosen − rejected − margin) + centring · (chosen + rejected)², `[pairs]`, of rewards `[pairs]` (Bradley and Terry 1952;
/// Touvron et al. 2023, eq. 2 for the margin; Eisenstein et al. 2023 for the centring).
pub fn bradley_terry(chosen: &Tensor, rejected: &Tensor, margin: Option<&Tensor>, centring: f64) -> Result<Tensor> {
    let mut logits = (chosen - rejected)?;
    if let Some(margin) = margin {
        logits = (logits - margin)?;
    }
    let loss = log_sigmoid(&logits)?.neg()?;
    if centring == 0.0 { Ok(loss) } else { loss + ((chosen + rejected)?.sqr()? * centring)? }
}
