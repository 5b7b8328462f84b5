//! Opening the store for a command, where `serve` would open it.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use tidemill_store::{DataDir, Store, StoreError};

use crate::config::{Config, ConfigError, Layer};

/// Which store. Without these flags: what the environment or `tidemill.toml` says, as for `serve`.
#[derive(Debug, Default, clap::Args)]
pub struct StoreArgs {
    /// Directory for models and records [default: ./data]
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<String>,
    /// Where records are kept: postgres://USER:PASSWORD@HOST/NAME [default: SQLite in the data directory]
    #[arg(long, global = true, value_name = "URL")]
    database: Option<String>,
    /// Configuration file [default: tidemill.toml where there is one]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The same for commands that read datasets.
#[derive(Debug, clap::Args)]
pub struct DatasetStoreArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Folder or URL that holds the datasets' tables [default: datasets in the data directory]
    #[arg(long, global = true, value_name = "PLACE")]
    datasets: Option<String>,
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
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file that is not the JSON that was asked for.
    #[error("{} is not what it should be: {reason}", path.display())]
    Json {
        /// Which.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Something that only a person can put right.
    #[error("{0}")]
    Usage(String),
}

impl StoreCommandError {
    /// For `map_err`.
    pub fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { path: path.to_owned(), source }
    }
}

/// What a file of JSON says.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, StoreCommandError> {
    let text = std::fs::read_to_string(path).map_err(StoreCommandError::file(path))?;
    serde_json::from_str(&text).map_err(|error| StoreCommandError::Json { path: path.to_owned(), reason: error.to_string() })
}

impl DatasetStoreArgs {
    /// What `serve` would be told.
    pub fn config(&self) -> Result<Config, StoreCommandError> {
        let mut layer = Layer::default();
        layer.flag("datasets", self.datasets.as_ref());
        self.store.load(layer)
    }
}

impl StoreArgs {
    fn load(&self, mut layer: Layer) -> Result<Config, StoreCommandError> {
        layer.flag("data", self.data.as_ref());
        layer.flag("database", self.database.as_ref());
        Ok(Config::load(layer, self.config.as_deref(), super::serve::utf8_environment())?)
    }

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
        let config = self.load(Layer::default())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let store = Store::open_for_command(&DataDir::new(&config.data), config.database.as_deref()).await?;
            let result = work(store.clone(), config).await;
            store.close().await;
            result
        })
    }
}
