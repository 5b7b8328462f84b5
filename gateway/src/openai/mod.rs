//! OpenAI's wire format: requests checked field by field, answers written as clients expect them.

pub mod about;
pub mod chat;
pub mod chat_answer;
pub mod chat_output;
pub mod chat_stream;
pub mod collected;
pub mod completion_answer;
pub mod completion_stream;
pub mod completions;
pub mod embeddings;
pub mod fields;
pub mod generation;
pub mod listing;
pub mod messages;
pub mod parse;
pub mod response_format;
pub mod tool_grammar;
pub mod tool_prompt;
pub mod tools;
pub mod wire;
