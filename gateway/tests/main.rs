//! The gateway through its routes, with a model that recites a script; one program, since linking takes longer than compiling.

mod adapters;
mod answers;
mod base_scores;
mod batches;
mod connections;
mod console;
mod datasets;
mod decisions;
mod embeddings;
mod feedback;
mod files;
mod fine_tuning;
mod governance;
mod interchange;
mod keys;
mod labeling;
mod limits;
mod loops;
mod messages;
mod openapi;
mod promotions;
mod records;
mod rejections;
mod responses;
mod rollouts;
mod shadow;
mod stored_chats;
mod tools;
mod upstream;

#[path = "support/far.rs"]
mod far;
#[path = "support/rollout.rs"]
mod rollout;
#[path = "../src/fine_tuning/stand_in.rs"]
mod stand_in;
mod support;
#[path = "support/tiny.rs"]
mod tiny;
