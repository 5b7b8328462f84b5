//! The statistics of rollouts: functions of values. No clock, no input or output, no chance of their own: random numbers come in.
//!
//! [`Sample`] is what an arm gave, [`contrast`] compares two of them, and the rest says what the comparison is worth:
//! [`confidence_sequence`] however often one looks, [`welch`] when one looks once, [`posterior`] as a chance, [`sample_ratio`]
//! whether the arms got the traffic that they should have. Nothing divides by nothing: what is not defined is `None`, never NaN.

mod bayes;
mod binomial;
mod cuped;
mod pairwise;
mod plan;
mod sample;
mod sample_ratio;
mod sequence;
#[cfg(test)]
mod simulation;
pub mod special;
mod thompson;
mod welch;

pub use bayes::{Posterior, posterior};
pub use binomial::{bounded_sequence, exact_sequence, quantile_weights};
pub use cuped::{Covariate, Cuped, cuped};
pub use pairwise::{Pairwise, Verdicts, pairwise};
pub use plan::{Outcome, Plan, Question, plan};
pub use sample::{Effect, Estimate, Sample, contrast};
pub use sample_ratio::{SampleRatio, sample_ratio};
pub use sequence::{Level, Sequence, confidence_sequence, relative_sequence};
pub use thompson::{Belief, floored, thompson};
pub use welch::{Welch, welch};
