//! What an adapter is worth, beside its base or another adapter: on comparisons nobody taught it ([`preferences`]), on ordinary text
//! ([`text`]), in answers of its own ([`answers`]) and in duels over them ([`duel`]); and whether that is enough ([`gate`]).

pub mod answers;
pub mod duel;
pub mod gate;
mod page;
pub mod preferences;
mod report;
mod run;
#[cfg(test)]
mod tests;
pub mod text;

pub use gate::{GateCheck, GateReport, Gates};
pub use report::{Contender, Evaluation, Example, TrainedOn};
pub use run::{Entrant, EvaluateError, Judge, Referee, Rules, Trial, Work, evaluate};
