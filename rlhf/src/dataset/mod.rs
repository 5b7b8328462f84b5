//! Datasets: rows of training examples, each with the feedback and the people behind it.

pub mod row;

pub use row::{Example, Message, Origin, Position, Row};
