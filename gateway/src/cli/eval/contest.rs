//! What is compared, and on what: the command line's adapters, rows, prompts and rules as values.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tidemill_rlhf::dataset::control::shuffle_labels;
use tidemill_rlhf::dataset::{Datasets, Row};
use tidemill_rlhf::evaluate::{Contender, Entrant, Evaluation, TrainedOn};
use tidemill_rlhf::job::{LINEAGE, Rows};
use tidemill_rlhf::registry::Registry;
use tidemill_store::{DataDir, RegisteredAdapter, Store};

use super::{EvalArgs, EvalCommandError};
use crate::cli::store_args::{StoreCommandError, read_json};
use crate::config::Config;

/// An adapter of the command line.
pub(super) struct Named {
    pub entrant: Entrant,
    /// Its row, where it is registered.
    pub row: Option<RegisteredAdapter>,
}

/// Everything that comes out of the store.
pub(super) struct Contest {
    pub adapters: Vec<Named>,
    pub rows: Vec<Row>,
    pub source: String,
}

/// Looks adapters and rows up. The store is opened only where one of them is in it.
pub(super) async fn look_up(args: &EvalArgs, config: &Config) -> Result<Contest, EvalCommandError> {
    let folders: Vec<Option<Named>> = args.adapter.iter().map(|text| folder(text)).collect::<Result<_, _>>()?;
    let missing = args.adapter.iter().zip(&folders).find(|(_, found)| found.is_none()).map(|(text, _)| text);
    let data = DataDir::new(&config.data);
    if let Some(text) = missing.filter(|_| !Store::is_there(&data, config.database.as_deref())) {
        let place = data.root().display();
        let text =
            format!("--adapter {text}: there is no such folder, and no store in {place} that would know a registered adapter");
        return Err(StoreCommandError::Usage(text).into());
    }
    let store = match missing.is_some() || args.dataset.is_some() {
        true => Some(Store::open_for_command(&data, config.database.as_deref()).await?),
        false => None,
    };
    let found = in_store(args, config, store.as_ref(), folders).await;
    if let Some(store) = store {
        store.close().await;
    }
    found
}

async fn in_store(
    args: &EvalArgs,
    config: &Config,
    store: Option<&Store>,
    folders: Vec<Option<Named>>,
) -> Result<Contest, EvalCommandError> {
    let mut adapters = Vec::new();
    for (text, found) in args.adapter.iter().zip(folders) {
        adapters.push(match (found, store) {
            (Some(named), _) => named,
            (None, Some(store)) => registered(text, &Registry::new(store, &DataDir::new(&config.data))).await?,
            (None, None) => return Err(StoreCommandError::Usage(format!("--adapter {text}: there is no such folder")).into()),
        });
    }
    // Two generations of one name.
    if let [first, second] = adapters.as_mut_slice()
        && first.entrant.name == second.entrant.name
    {
        second.entrant.name.push_str("-2");
    }
    let (mut rows, source) = match (&args.file, &args.dataset, store) {
        (Some(path), ..) => Rows::unseen(path).await?,
        (None, Some(name), Some(store)) => Rows::held_out_of(name, &Datasets::new(store.clone(), config.datasets_root())).await?,
        _ => (Vec::new(), "no rows".to_owned()),
    };
    let source = if args.shuffled_labels { format!("{source}, half of its labels turned around") } else { source };
    if args.shuffled_labels {
        shuffle_labels(&mut rows, args.seed);
    }
    Ok(Contest { adapters, rows, source })
}

/// `NAME=FOLDER`, or a folder that is called as its training is. None for what is no folder.
fn folder(text: &str) -> Result<Option<Named>, EvalCommandError> {
    let (name, folder) = match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() => (Some(name.to_owned()), PathBuf::from(folder)),
        _ => (None, PathBuf::from(text)),
    };
    if !folder.is_dir() {
        // What has an equals sign in it is no adapter's name.
        return match name {
            Some(_) => Err(StoreCommandError::Usage(format!("--adapter {text}: there is no such folder")).into()),
            None => Ok(None),
        };
    }
    let own = folder.file_name().filter(|own| *own != "adapter");
    let called = own.or_else(|| folder.parent()?.file_name()).unwrap_or_default().to_string_lossy().into_owned();
    let name = name.unwrap_or(if called.is_empty() { "adapter".to_owned() } else { called });
    let lineage = folder.parent().map(|training| training.join(LINEAGE)).filter(|path| path.is_file());
    let lineage = lineage.map(|path| read_json::<Value>(&path)).transpose()?;
    let trained_on = lineage.and_then(|lineage| TrainedOn::of(&lineage["data"]));
    Ok(Some(Named { entrant: Entrant { name, folder, trained_on }, row: None }))
}

async fn registered(text: &str, registry: &Registry) -> Result<Named, EvalCommandError> {
    let row = registry.get(text).await?;
    // What cannot be read, or was changed since, is not what would be served.
    registry.open(&row).await?;
    let entrant = Entrant {
        name: row.name.clone(),
        folder: registry.folder(&row.location),
        trained_on: TrainedOn::of(&row.lineage["config"]["data"]),
    };
    Ok(Named { entrant, row: Some(row) })
}

/// Where the report goes without `--out`: beside a training's adapter, or under the registered one's name.
pub(super) fn place(config: &Config, first: &Named) -> PathBuf {
    match &first.row {
        Some(row) => config.data.join("evaluations").join(row.reference()),
        None => first.entrant.folder.parent().unwrap_or(Path::new(".")).join("evaluation"),
    }
}

/// Keeps what was found beside each registered adapter. `page` is where all of it can be read, `by` whom the
/// audit names.
pub(super) async fn attach(
    config: &Config,
    adapters: &[Named],
    found: &Evaluation,
    page: &Path,
    by: &str,
    now: i64,
) -> Result<(), EvalCommandError> {
    let rows: Vec<(usize, &RegisteredAdapter)> =
        adapters.iter().enumerate().filter_map(|(place, named)| Some((place, named.row.as_ref()?))).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let data = DataDir::new(&config.data);
    let store = Store::open_for_command(&data, config.database.as_deref()).await?;
    let registry = Registry::new(&store, &data).acting_as(by);
    let mut kept = Ok(());
    for (place, row) in rows {
        kept = kept.and(registry.evaluated(row.id, &summary(found, place, page, now)).await.map(drop));
    }
    store.close().await;
    Ok(kept?)
}

/// What a row keeps of an evaluation: the adapter's own numbers, and of the first adapter how the duel and the gates went.
fn summary(found: &Evaluation, place: usize, page: &Path, now: i64) -> Value {
    let nobody = Contender::default();
    let one = found.contenders.get(place).unwrap_or(&nobody);
    let mut value = json!({
        "at": now,
        "rows": found.rows,
        "preferences": one.preferences,
        "text": one.text,
        "text_drift": found.text_drift(one),
        "answers": one.answers,
        "rewards": one.rewards,
        "report": page,
    });
    if place == 0 {
        value["against"] = json!(found.contenders.get(1).map(|second| &second.name));
        value["judge"] = json!(found.judge);
        value["duel"] = json!(found.duel);
        value["gates"] = json!(found.gates);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_called_as_its_training_is_and_brings_what_that_wrote_down() {
        let place = tempfile::tempdir().unwrap();
        let training = place.path().join("dpo-thumbs-3");
        let adapter = training.join("adapter");
        std::fs::create_dir_all(&adapter).unwrap();
        let lineage = json!({"data": {"train": 40, "raters": ["ann", "bob"], "largest_rater_share": 0.5}});
        std::fs::write(training.join(LINEAGE), lineage.to_string()).unwrap();
        let named = folder(&adapter.display().to_string()).unwrap().unwrap();
        assert_eq!(named.entrant.name, "dpo-thumbs-3");
        let told = named.entrant.trained_on.unwrap();
        assert_eq!((told.samples, told.raters, told.rater_share, told.shuffled_labels), (40, 2, 0.5, false));
        let other = folder(&format!("mine={}", training.display())).unwrap().unwrap();
        assert_eq!((other.entrant.name.as_str(), other.entrant.trained_on), ("mine", None));
        assert!(folder("thumbs").unwrap().is_none(), "it may be registered");
        assert!(folder("mine=nowhere").is_err());
    }
}
