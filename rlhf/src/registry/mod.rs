//! Adapters that are kept: their files in the data directory, their lineage and state in the store.
//!
//! An adapter is registered by copying its folder to `adapters/GENERATION` and then writing its row, so that a row always has its
//! files; a folder whose row was never written is used again by the next registration of the same contents. The generation names the
//! contents, so what is read back is what was registered, or an error.

mod error;
mod folder;
mod reference;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tidemill_engine::{Adapter, ModelConfig, ModelFiles};
use tidemill_store::{
    Actor, AdapterFilter, AdapterRefusal, AdapterState, Adapters, Alias, DataDir, RegisteredAdapter, Rollout, ServedAdapter,
    Snapshots, Store, StoreError,
};
use uuid::Uuid;

pub use error::RegistryError;
use reference::Reference;

use crate::dataset::snapshot::now;
use crate::job::{ADAPTER, LINEAGE};

/// What an adapter was made for.
#[derive(Clone, Debug)]
pub struct Base {
    /// The base model, as it is served.
    pub name: String,
    /// Names its weights.
    pub hash: Option<String>,
    /// Its sizes; the adapter must fit them.
    pub config: Option<ModelConfig>,
}

impl Base {
    /// A base model of which only the name is known here.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), hash: None, config: None }
    }

    /// A base model whose files are at hand; reads all of them once.
    pub fn of(name: impl Into<String>, files: &ModelFiles) -> Self {
        Self { name: name.into(), hash: Some(files.digest()), config: Some(files.config().clone()) }
    }
}

/// Where an adapter comes from.
#[derive(Clone, Debug)]
pub struct Lineage {
    /// What requests will call it: letters, digits, '.', '_' and '-'.
    pub name: String,
    /// What it was made for.
    pub base: Base,
    /// The dataset that it was trained on, `NAME@VERSION`, of this store.
    pub snapshot: Option<String>,
    /// The job that trained it.
    pub job: Option<String>,
    /// The adapter that its training went on from, as [`Registry::get`] takes it.
    pub parent: Option<String>,
    /// Who judged; empty for everybody behind the snapshot.
    pub raters: Vec<String>,
    /// What the training was told.
    pub config: Value,
    /// Version of the code that made it.
    pub code_version: String,
    /// What its training or an evaluation measured.
    pub metrics: Value,
}

impl Lineage {
    /// Of an adapter about which nothing else is known; this program is taken to have made it.
    pub fn new(name: impl Into<String>, base: Base) -> Self {
        Self {
            name: name.into(),
            base,
            snapshot: None,
            job: None,
            parent: None,
            raters: Vec::new(),
            config: Value::Null,
            code_version: concat!("tidemill ", env!("CARGO_PKG_VERSION")).to_owned(),
            metrics: json!({}),
        }
    }
}

/// The adapters of a store and a data directory. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Registry {
    store: Store,
    adapters: Adapters,
    data: DataDir,
    actor: Actor,
}

impl Registry {
    /// Over a store and the data directory beside it; what is done here is the server's doing in the audit.
    pub fn new(store: &Store, data: &DataDir) -> Self {
        Self { store: store.clone(), adapters: Adapters::new(store), data: data.clone(), actor: "server".into() }
    }

    /// The same on somebody's behalf, as the audit names them.
    pub fn acting_as(&self, actor: impl Into<Actor>) -> Self {
        Self { actor: actor.into(), ..self.clone() }
    }

    /// Keeps the adapter in `folder`, as a candidate. The same contents under the same name and base are kept once, with the lineage
    /// that they came with first.
    pub async fn register(&self, folder: &Path, lineage: Lineage) -> Result<RegisteredAdapter, RegistryError> {
        check_name(&lineage.name)?;
        let snapshot = match &lineage.snapshot {
            Some(reference) => Some(self.snapshot(reference).await?),
            None => None,
        };
        let parent = match &lineage.parent {
            Some(reference) => Some(self.get(reference).await?),
            None => None,
        };
        let mut raters = lineage.raters;
        if let Some(snapshot) = snapshot.filter(|_| raters.is_empty()) {
            raters = Snapshots::new(self.store.database()).sources(snapshot, "rater").await?;
        }
        let kept = self.keep(folder, lineage.base.config.clone()).await?;
        let (adapter, id, now) = (kept.adapter, self.store.issue_id(), now());
        let lora = json!({
            "r": adapter.config.r,
            "lora_alpha": adapter.config.alpha,
            "use_rslora": adapter.config.rslora,
            "target_modules": adapter.config.targets.iter().map(|target| target.name()).collect::<Vec<_>>(),
        });
        let new = RegisteredAdapter {
            id,
            created: now,
            updated: now,
            name: lineage.name,
            generation: adapter.generation().0,
            base: lineage.base.name,
            base_hash: lineage.base.hash,
            content_hash: content_hash(&adapter),
            location: kept.location,
            state: AdapterState::Candidate,
            served: None,
            snapshot,
            job: lineage.job,
            parent: parent.as_ref().map(|parent| parent.id),
            lineage: json!({
                "dataset": lineage.snapshot,
                "parent": parent.as_ref().map(RegisteredAdapter::reference),
                "raters": raters,
                "config": lineage.config,
                "code_version": lineage.code_version,
                "lora": lora,
                "trained_on": adapter.base,
            }),
            metrics: lineage.metrics,
            tainted: None,
            files_removed: None,
        };
        let made = self.adapters.insert(&new, &self.actor).await?;
        if !self.folder(&made.location).exists() {
            // Somebody removed the same files before the row was written.
            self.keep(folder, lineage.base.config).await?;
        }
        Ok(made)
    }

    async fn keep(&self, folder: &Path, config: Option<ModelConfig>) -> Result<folder::Kept, RegistryError> {
        let (source, root) = (folder.to_owned(), self.data.adapters());
        let kept = move || folder::keep(&source, &root, config.as_ref());
        tokio::task::spawn_blocking(kept).await.map_err(|_| RegistryError::Interrupted)?
    }

    /// Keeps what a training made in `folder`, with the lineage that it wrote down; refused for a base with other weights than those that it
    /// was trained on, where both are known. `job` is the job that ran it.
    pub async fn register_training(
        &self,
        folder: &Path,
        name: &str,
        base: Base,
        job: Option<String>,
    ) -> Result<RegisteredAdapter, RegistryError> {
        let lineage = self.lineage_of(folder, name, base, job).await?;
        self.register(&folder.join(ADAPTER), lineage).await
    }

    /// The lineage that a training wrote down in `folder`, for its adapter or one of its earlier epochs.
    pub async fn lineage_of(&self, folder: &Path, name: &str, base: Base, job: Option<String>) -> Result<Lineage, RegistryError> {
        let path = folder.join(LINEAGE);
        let text = std::fs::read(&path).map_err(|source| RegistryError::Folder { path: path.clone(), source })?;
        let told: Value = serde_json::from_slice(&text)
            .map_err(|error| RegistryError::Folder { path: path.clone(), source: std::io::Error::other(error) })?;
        check_base(&folder.display().to_string(), told["base"]["digest"].as_str(), base.hash.as_deref())?;
        let plain = Lineage::new(name, base);
        Ok(Lineage {
            snapshot: self.trained_on(&told).await?,
            parent: self.trained_from(&told, &plain.base.name).await?,
            raters: serde_json::from_value(told["data"]["raters"].clone()).unwrap_or_default(),
            config: json!({ "train": told["config"], "lora": told["lora"], "data": told["data"] }),
            code_version: told["code_version"]
                .as_str()
                .map_or(plain.code_version.clone(), |version| format!("tidemill {version}")),
            metrics: told["metrics"].clone(),
            job,
            ..plain
        })
    }

    /// The dataset that a training names, where it is one of this store and not a file.
    async fn trained_on(&self, told: &Value) -> Result<Option<String>, RegistryError> {
        let Some(source) = told["data"]["source"].as_str() else { return Ok(None) };
        let Some((name, Ok(version))) = source.rsplit_once('@').map(|(name, version)| (name, version.parse())) else {
            return Ok(None);
        };
        let found = Snapshots::new(self.store.database()).find(name, Some(version)).await?;
        let same = found.is_some_and(|found| told["data"]["content_hash"].as_str() == Some(&found.content_hash));
        Ok(same.then(|| source.to_owned()))
    }

    /// The registered adapter that a training went on from: it names the folder, which is called as its contents are.
    async fn trained_from(&self, told: &Value, base: &str) -> Result<Option<String>, RegistryError> {
        let folder = told["parent"].as_str().and_then(|path| Path::new(path).file_name()?.to_str());
        let Some(generation) = folder.and_then(|name| u64::from_str_radix(name, 16).ok()) else { return Ok(None) };
        let limit = Some(tidemill_store::MAX_PAGE);
        let known = self.adapters.list(&AdapterFilter { base: Some(base.to_owned()), limit, ..AdapterFilter::default() }).await?;
        Ok(known.items.into_iter().find(|adapter| adapter.generation == generation).map(|adapter| adapter.id.to_string()))
    }

    /// The adapter that `NAME`, `NAME@GENERATION`, an alias or an id means, each with or without `BASE:` in front. A generation may be
    /// shortened. A name alone means the one that is served, else the newest.
    pub async fn get(&self, text: &str) -> Result<RegisteredAdapter, RegistryError> {
        if let Ok(id) = Uuid::parse_str(text) {
            return self.adapters.find(id).await?.ok_or_else(|| RegistryError::NotFound(text.to_owned()));
        }
        let reference = Reference::parse(text);
        if reference.generation.is_none() {
            let aliases = self.adapters.aliases().await?;
            let mut meant = aliases.iter().filter(|alias| reference.means(alias));
            match (meant.next(), meant.next()) {
                (Some(alias), None) => {
                    let found = self.adapters.find(alias.adapter).await?;
                    return found.ok_or_else(|| RegistryError::NotFound(text.to_owned()));
                }
                (Some(one), Some(two)) => {
                    let bases = vec![one.base.clone(), two.base.clone()];
                    return Err(RegistryError::Ambiguous { reference: text.to_owned(), meanings: bases });
                }
                (None, _) => {}
            }
        }
        let filter = AdapterFilter {
            name: Some(reference.name.to_owned()),
            base: reference.base.map(str::to_owned),
            limit: Some(tidemill_store::MAX_PAGE),
            ..AdapterFilter::default()
        };
        reference.choose(self.adapters.list(&filter).await?.items)
    }

    /// A page of adapters, the newest first.
    pub async fn list(&self, filter: &AdapterFilter) -> Result<tidemill_store::Page<RegisteredAdapter>, StoreError> {
        self.adapters.list(filter).await
    }

    /// All aliases, by base and name.
    pub async fn aliases(&self) -> Result<Vec<Alias>, StoreError> {
        self.adapters.aliases().await
    }

    /// What is to be served at this moment.
    pub async fn served(&self) -> Result<Vec<ServedAdapter>, StoreError> {
        self.adapters.served().await
    }

    /// Puts an adapter into service in the place of others of its name, which are retired unless an alias leads to them; returns both.
    pub async fn serve(
        &self,
        reference: &str,
        though_tainted: bool,
    ) -> Result<(RegisteredAdapter, Vec<RegisteredAdapter>), RegistryError> {
        let adapter = self.get(reference).await?;
        // What cannot be read cannot be served.
        self.open(&adapter).await?;
        Ok(self.adapters.serve(adapter.id, though_tainted, &self.actor).await?)
    }

    /// Takes an adapter out of service; refused while an alias leads to it.
    pub async fn retire(&self, reference: &str) -> Result<RegisteredAdapter, RegistryError> {
        Ok(self.adapters.retire(self.get(reference).await?.id, &self.actor).await?)
    }

    /// Takes an adapter out of service for good, with the aliases that lead to it, which are returned. Its files stay.
    pub async fn revoke(&self, reference: &str) -> Result<(RegisteredAdapter, Vec<String>), RegistryError> {
        Ok(self.adapters.revoke(self.get(reference).await?.id, &self.actor).await?)
    }

    /// Removes the files of an adapter that was retired or revoked, not after `unchanged_since` where that is given (in microseconds since
    /// 1970); its row stays. Whether something other than an alias needs them is for the caller to know. Files that another adapter has,
    /// too, stay in their place. Done again, it finishes what was begun.
    pub async fn remove_files(&self, id: Uuid, unchanged_since: Option<i64>) -> Result<RegisteredAdapter, RegistryError> {
        let known = self.adapters.find(id).await?.ok_or_else(|| RegistryError::NotFound(id.to_string()))?;
        let place = self.folder(&known.location);
        let taken = std::sync::atomic::AtomicBool::new(false);
        let take = || folder::set_aside(&place).map(|was_there| taken.store(was_there, std::sync::atomic::Ordering::Relaxed));
        let removed = self.adapters.remove_files(id, unchanged_since, &self.actor, take).await;
        if removed.is_err() && taken.into_inner() {
            // The row says that they are there.
            folder::put_back(&place).map_err(|source| RegistryError::Folder { path: place.clone(), source })?;
        }
        let removed = removed?;
        tokio::task::spawn_blocking(move || folder::remove_aside(&place)).await.map_err(|_| RegistryError::Interrupted)??;
        Ok(removed)
    }

    /// Leads an alias to an adapter that is served; returns the adapter and the one before.
    pub async fn alias(&self, alias: &str, reference: &str) -> Result<(RegisteredAdapter, Option<Uuid>), RegistryError> {
        let fits = (1..=200).contains(&alias.chars().count());
        if !fits || alias.chars().any(|c| c.is_control() || c.is_whitespace() || c == '@') {
            return Err(RegistryError::Alias(alias.chars().take(200).collect()));
        }
        Ok(self.adapters.set_alias(alias, self.get(reference).await?.id, &self.actor).await?)
    }

    /// Leads an alias back to the adapter that it led to from `since` on, in microseconds since 1970.
    pub async fn alias_back(&self, alias: &str, adapter: Uuid, since: i64) -> Result<RegisteredAdapter, RegistryError> {
        Ok(self.adapters.lead_alias_back(alias, adapter, since, &self.actor).await?.0)
    }

    /// Leads the alias of a rollout's public name to what it promoted, where that was broken off: [`Adapters::finish_promotion`].
    pub async fn finish_promotion(&self, promoted: &Rollout, before: (Uuid, i64), to: Uuid) -> Result<bool, RegistryError> {
        Ok(self.adapters.finish_promotion(promoted, before, to, &self.actor).await?)
    }

    /// Removes an alias; `base` is needed where several base models have one of this name. Returns what it was.
    pub async fn unalias(&self, alias: &str, base: Option<&str>) -> Result<Alias, RegistryError> {
        let known = self.known_alias(alias, base).await?;
        self.adapters.remove_alias(&known.base, alias, &self.actor).await?;
        Ok(known)
    }

    /// The same, in one step with taking the adapter that it led to out of service, where no other alias leads there.
    pub async fn withdraw(&self, alias: &str, base: Option<&str>) -> Result<Alias, RegistryError> {
        let known = self.known_alias(alias, base).await?;
        self.adapters.withdraw_alias(&known.base, alias, &self.actor).await?;
        Ok(known)
    }

    async fn known_alias(&self, alias: &str, base: Option<&str>) -> Result<Alias, RegistryError> {
        let aliases = self.adapters.aliases().await?;
        let mut named = aliases.into_iter().filter(|known| known.name == alias && base.is_none_or(|base| known.base == base));
        let known = named.next().ok_or_else(|| AdapterRefusal::NoAlias(alias.to_owned()))?;
        if let Some(other) = named.next() {
            return Err(RegistryError::Ambiguous { reference: alias.to_owned(), meanings: vec![known.base, other.base] });
        }
        Ok(known)
    }

    /// Keeps what an evaluation found of an adapter beside its training's metrics.
    pub async fn evaluated(&self, id: Uuid, found: &Value) -> Result<RegisteredAdapter, RegistryError> {
        Ok(self.adapters.evaluated(id, found, &self.actor).await?)
    }

    /// The folder of an adapter.
    pub fn folder(&self, location: &str) -> PathBuf {
        self.data.root().join(location)
    }

    /// Reads an adapter's files, which must be what was registered.
    pub async fn open(&self, adapter: &RegisteredAdapter) -> Result<Adapter, RegistryError> {
        if adapter.files_removed.is_some() {
            return Err(AdapterRefusal::FilesRemoved(adapter.reference()).into());
        }
        let (folder, wanted, reference) = (self.folder(&adapter.location), adapter.content_hash.clone(), adapter.reference());
        let read = move || {
            let adapter = Adapter::read(&folder)?;
            if content_hash(&adapter) == wanted { Ok(adapter) } else { Err(RegistryError::Changed { reference, folder }) }
        };
        tokio::task::spawn_blocking(read).await.map_err(|_| RegistryError::Interrupted)?
    }

    /// Writes an adapter's files to a new folder.
    pub async fn export(&self, adapter: &RegisteredAdapter, to: &Path) -> Result<(), RegistryError> {
        self.open(adapter).await?;
        let (from, to) = (self.folder(&adapter.location), to.to_owned());
        tokio::task::spawn_blocking(move || folder::export(&from, &to)).await.map_err(|_| RegistryError::Interrupted)?
    }

    async fn snapshot(&self, reference: &str) -> Result<Uuid, RegistryError> {
        let (name, version) = match reference.rsplit_once('@') {
            Some((name, version)) => (name, version.parse().ok()),
            None => (reference, None),
        };
        let found = Snapshots::new(self.store.database()).find(name, version).await?;
        found.map(|snapshot| snapshot.id).ok_or_else(|| RegistryError::Dataset(reference.to_owned()))
    }
}

/// All of the digest of which the generation is a part.
fn content_hash(adapter: &Adapter) -> String {
    blake3::Hash::from_bytes(adapter.digest()).to_hex().to_string()
}

/// Fails for a base with other weights than those that an adapter was registered for. Shapes alone do not tell: an adapter fits every model of
/// its base's sizes, and makes sense on one. Where one of the hashes is unknown, nothing can be said.
pub fn check_base(adapter: &str, wanted: Option<&str>, found: Option<&str>) -> Result<(), RegistryError> {
    match (wanted, found) {
        (Some(wanted), Some(found)) if wanted != found => {
            Err(RegistryError::OtherBase { adapter: adapter.to_owned(), wanted: wanted.to_owned(), found: found.to_owned() })
        }
        _ => Ok(()),
    }
}

/// An adapter's name stands in paths, in `base:name` and before `@generation`.
fn check_name(name: &str) -> Result<(), RegistryError> {
    let fits = (1..=100).contains(&name.len()) && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    // What looks like an id would never be found by its name.
    let fits = fits && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) && Uuid::parse_str(name).is_err();
    if fits { Ok(()) } else { Err(RegistryError::Name(name.chars().take(100).collect())) }
}

#[cfg(test)]
mod tests;
