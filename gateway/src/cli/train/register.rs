//! What a training leaves goes into the registry, where there is one.

use std::io::Write;
use std::path::Path;

use serde_json::Value;
use tidemill_engine::ModelFiles;
use tidemill_rlhf::job::{ADAPTER, LINEAGE, Spec};
use tidemill_rlhf::registry::{Base, Registry};
use tidemill_rlhf::train::Method;
use tidemill_store::{DataDir, RegisteredAdapter, Store};

use super::TrainArgs;
use crate::cli::COMMAND_LINE;
use crate::cli::adapter::{AdapterCommandError, registered};
use crate::cli::store_args::{StoreCommandError, read_json};
use crate::config::Config;

/// Keeps the adapter of a training that has ended as a candidate. What goes wrong is said and takes nothing away: the adapter is in its folder.
pub(super) fn register(args: &TrainArgs, config: &Config, spec: &Spec, folder: &Path) {
    // A reward model is no model to be served, and neither is a control.
    let serves = spec.config.method != Method::Reward && !spec.shuffled_labels;
    let ended = folder.join(LINEAGE).is_file() && folder.join(ADAPTER).is_dir();
    if args.no_register || !serves || !ended || !Store::is_there(&DataDir::new(&config.data), config.database.as_deref()) {
        return;
    }
    let name = args.name.clone().unwrap_or_else(|| name_of(folder));
    let _ = match keep(config, spec, folder, &name) {
        Ok(adapter) => {
            writeln!(std::io::stdout(), "{}; `tidemill adapter serve {}` serves it", registered(&adapter), adapter.reference())
        }
        Err(error) => writeln!(
            std::io::stderr(),
            "note: the adapter is not registered: {error}. `tidemill adapter import NAME {}` does it",
            folder.display()
        ),
    };
}

fn keep(config: &Config, spec: &Spec, folder: &Path, name: &str) -> Result<RegisteredAdapter, AdapterCommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(StoreCommandError::Runtime)?;
    let told: Value = read_json(&folder.join(LINEAGE))?;
    let base = Base {
        // Known since the training read the weights; hashing reads all of them again.
        hash: told["base"]["digest"].as_str().map(str::to_owned),
        config: Some(ModelFiles::open(&spec.base.path)?.config().clone()),
        ..Base::named(&spec.base.name)
    };
    runtime.block_on(async {
        let data = DataDir::new(&config.data);
        let store = Store::open_for_command(&data, config.database.as_deref()).await?;
        let registry = Registry::new(&store, &data).acting_as(COMMAND_LINE);
        let kept = registry.register_training(folder, name, base, None).await;
        store.close().await;
        Ok(kept?)
    })
}

/// The folder's name with what cannot be in an adapter's put out.
fn name_of(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let fits = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = name.chars().map(fits).take(100).collect();
    name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_called_as_its_folder_is() {
        for (folder, name) in [("data/training/dpo-thumbs-3", "dpo-thumbs-3"), ("/a/.my training é", "my-training--")] {
            assert_eq!(name_of(Path::new(folder)), name);
        }
    }
}
