//! The Responses API: a request's items become a conversation, and its answer's events become items.

pub mod conversation;
pub mod id;
pub mod item;
pub mod object;
pub mod output;
pub mod request;
pub mod stream;
pub mod tools;

pub use object::{Ending, Template};
pub use output::Output;
pub use request::ResponseRequest;
