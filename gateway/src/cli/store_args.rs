//! Opening the store for a command, where `serve` would open it.

use std::path::PathBuf;

use tidemill_store::{DataDir, Store, StoreError};

use crate::config::{Config, ConfigError, Layer};

/// Which store. Without these flags: what the environment or `tidemill.toml` says, as for `serve`.
#[derive(Debug, clap::Args)]
pub struct StoreArgs {
    /// Directory for models and records [default: ./data]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Where records are kept: postgres://USER:PASSWORD@HOST/NAME [default: SQLite in the data directory]
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Configuration file [default: tidemill.toml where there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Why a command on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreCommandError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store cannot be opened, or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The system gives no runtime.
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
    /// Something that only a person can put right.
    #[error("{0}")]
    Usage(String),
}

impl StoreArgs {
    /// Runs `work` on the store, beside a running server or without one.
    pub fn with<T, W: Future<Output = Result<T, StoreCommandError>>>(
        &self,
        work: impl FnOnce(Store) -> W,
    ) -> Result<T, StoreCommandError> {
        self.with_config(|store, _| work(store))
    }

    /// The same for work that needs more of what `serve` would be told.
    pub fn with_config<T>(
        &self,
        work: impl AsyncFnOnce(Store, Config) -> Result<T, StoreCommandError>,
    ) -> Result<T, StoreCommandError> {
        let mut layer = Layer::default();
        layer.flag("data", self.data.as_ref());
        layer.flag("database", self.database.as_ref());
        let config = Config::load(layer, self.config.as_deref(), super::serve::utf8_environment())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let store = Store::open_for_command(&DataDir::new(&config.data), config.database.as_deref()).await?;
            let result = work(store.clone(), config).await;
            store.close().await;
            result
        })
    }
}
