//! Loading and unloading adapters.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{Object, any, filled, flag, text};
use tidemill_store::Scope;

const TAG: &str = "adapters";

/// vLLM's two calls.
pub fn topic() -> Topic {
    let of_admin = |path, summary| {
        let operation = Operation::post(path, TAG, summary).scope(Scope::Admin);
        operation.refuses(&[404]).answers_as(200, "Done.", "text/plain", text())
    };
    let load = Object::request()
        .with("lora_name", filled(200))
        .with("lora_path", filled(4096))
        .may("load_inplace", flag())
        .may("pinned", flag())
        .may("base_model_name", text());
    let unload = Object::request().with("lora_name", filled(200)).may("base_model_name", text()).may("lora_int_id", any());
    let operations = vec![
        of_admin("/v1/load_lora_adapter", "Load an adapter from a folder of the server's machine")
            .takes(load.schema())
            .refuses(&[409]),
        of_admin("/v1/unload_lora_adapter", "Take an adapter away; requests that use it finish").takes(unload.schema()),
    ];
    Topic { operations, schemas: Vec::new() }
}
