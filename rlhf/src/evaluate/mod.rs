//! What an adapter is worth, beside its base or another adapter: on comparisons nobody taught it ([`preferences`]), on ordinary text
//! ([`text`]), in answers of its own ([`answers`]) and in duels over them ([`duel`]).

pub mod answers;
pub mod duel;
mod page;
pub mod preferences;
mod report;
mod run;
#[cfg(test)]
mod tests;
pub mod text;

pub use report::{Contender, Evaluation, Example};
pub use run::{EvaluateError, Judge, Referee, Trial, Work, evaluate};
