//! Datasets as the server builds them: one at a time, as jobs that outlive the request.

mod jobs;

pub use jobs::{DatasetJobs, Refused, public};
