//! `tidemill lineage`

use std::io::Write;

use serde_json::json;
use tidemill_rlhf::dataset::Datasets;
use tidemill_rlhf::registry::Registry;
use tidemill_store::{DataDir, Store};

use crate::cli::store_args::{DatasetStoreArgs, StoreCommandError};
use crate::lineage::{TraceError, Tracer, Want};

/// Where an answer comes from: model, adapter, job, dataset, rows and raters. And back: what came of a rater, a row, a judgement, a
/// dataset.
#[derive(Debug, clap::Args)]
pub struct LineageArgs {
    /// An answer's id (chatcmpl-…), an adapter, a dataset as NAME@VERSION, a job (ftjob-…), a judgement's id, a row's id, or rater:NAME
    id: String,
    /// With the ids of rows and raters, at most so many rows of each dataset
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "100")]
    rows: Option<usize>,
    /// As GET /v1/lineage/ID has it
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: DatasetStoreArgs,
}

/// Why there is no lineage to show.
#[derive(Debug, thiserror::Error)]
pub enum LineageCommandError {
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreCommandError),
    /// Nothing was found, or it cannot be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

/// Runs the command.
pub fn run(args: &LineageArgs) -> Result<(), LineageCommandError> {
    let config = args.place.config()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(StoreCommandError::from)?;
    let trace = runtime.block_on(async {
        let data = DataDir::new(&config.data);
        let store = Store::open_for_command(&data, config.database.as_deref()).await.map_err(StoreCommandError::from)?;
        let datasets = Datasets::new(store.clone(), config.datasets_root());
        let tracer = Tracer::new(&store, &datasets, &Registry::new(&store, &data));
        let trace = tracer.trace(&args.id, Want { rows: args.rows }).await;
        store.close().await;
        Ok::<_, LineageCommandError>(trace?)
    })?;
    let text = if args.json { format!("{}\n", json!(trace)) } else { trace.tree().to_string() };
    // A closed standard output is no reason to fail.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}
