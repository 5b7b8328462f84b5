//! Judgements as the API takes and shows them: pure functions from JSON to records and back.

mod filter;
mod judgement;
mod metric;
mod submission;
mod view;

pub use filter::parse as filter;
pub use metric::{Metric, MetricKind, Metrics, Optimize};
pub use submission::{Edit, Rules, Submission, Target, bare as answer_id};
pub use view::to_json;
