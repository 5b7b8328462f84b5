//! A terminal chat against any OpenAI-compatible server.
//!
//! [`client`] speaks HTTP, [`conversation`] holds what was said, [`terminal`] reads and prints.

pub mod client;
pub mod conversation;
pub mod terminal;
