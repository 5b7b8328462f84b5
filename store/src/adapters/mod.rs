//! Adapters that were registered, what state they are in, and the names that lead to them.
//!
//! An adapter's row never changes but for its state, what was measured of it, and the marks of an erasure. Every change is written with its audit row, or not at
//! all. Whoever decides by an adapter's state holds its row while doing so: an adapter cannot be retired in the moment in which an alias
//! is led to it.

mod lineage;
mod row;

use serde::Serialize;
use serde_json::{Value, json};
use sqlx::{AnyConnection, AssertSqlSafe};
use uuid::Uuid;

use crate::Store;
use crate::audit::Actor;
use crate::error::StoreError;
use crate::page::{self, Page};
use crate::patience::{at_length, patiently};
use crate::rollouts::moment;
use crate::statement::{Select, clean, clean_option};
use crate::store::now_us;

pub use lineage::AdapterOrigin;
pub(crate) use lineage::rename_in_lineage;

/// What is done with an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterState {
    /// Registered, and not served.
    Candidate,
    /// Served by every server that has its base.
    Serving,
    /// Was served.
    Retired,
    /// Must not be served again.
    Revoked,
}

/// An adapter, its lineage included.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RegisteredAdapter {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// When its state last changed, in microseconds since 1970.
    pub updated: i64,
    /// What requests call it.
    pub name: String,
    /// Names its contents, 63 bits.
    pub generation: u64,
    /// The base model, as it is served.
    pub base: String,
    /// Names the base's weights, where the base was at hand.
    pub base_hash: Option<String>,
    /// BLAKE3 of the factors, of which the generation is a part.
    pub content_hash: String,
    /// Its folder, within the data directory.
    pub location: String,
    /// What is done with it.
    pub state: AdapterState,
    /// When it was last put into service, in microseconds since 1970.
    pub served: Option<i64>,
    /// The snapshot that it was trained on.
    pub snapshot: Option<Uuid>,
    /// The job that trained it.
    pub job: Option<String>,
    /// The adapter that its training went on from.
    pub parent: Option<Uuid>,
    /// Names of dataset and parent, raters, configuration, version of the code.
    pub lineage: Value,
    /// What its training or an evaluation measured.
    pub metrics: Value,
    /// Why it should not be served, such as an erasure.
    pub tainted: Option<Value>,
    /// When its files were removed, in microseconds since 1970.
    pub files_removed: Option<i64>,
}

impl RegisteredAdapter {
    /// `NAME@GENERATION`.
    pub fn reference(&self) -> String {
        reference(&self.name, self.generation as i64)
    }
}

/// What serving an adapter needs, with the aliases that lead to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedAdapter {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// What requests call it.
    pub name: String,
    /// Names its contents.
    pub generation: u64,
    /// The base model, as it is served.
    pub base: String,
    /// Names the base's weights that it was registered for, where they are known.
    pub base_hash: Option<String>,
    /// Its folder, within the data directory.
    pub location: String,
    /// Ascending.
    pub aliases: Vec<String>,
}

/// A name that leads to an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alias {
    /// The base model of the adapter.
    pub base: String,
    /// What requests say.
    pub name: String,
    /// The adapter.
    pub adapter: Uuid,
    /// When it was led there, in microseconds since 1970.
    pub updated: i64,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AdapterRefusal {
    /// The database is away, slow or broken.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The adapter is gone from the table.
    #[error("there is no adapter {0}; `tidemill adapter list` shows those that there are")]
    Unknown(Uuid),
    /// Revoked for good.
    #[error("{0} was revoked and stays so; train or import another one")]
    Revoked(String),
    /// A person behind it was erased.
    #[error(
        "{0} was made from records of a person who was erased since; train it again, or say that it may be served all the same"
    )]
    Tainted(String),
    /// Names lead to it.
    #[error("{adapter} is what {} leads to; lead it to another adapter first, or remove it", aliases.join(", "))]
    Aliased {
        /// The adapter.
        adapter: String,
        /// Its aliases.
        aliases: Vec<String>,
    },
    /// An alias needs an adapter that is served.
    #[error("{adapter} is not served (it is {}); serve it first", state.as_str())]
    NotServed {
        /// The adapter.
        adapter: String,
        /// What it is.
        state: AdapterState,
    },
    /// Only what was taken out of service loses its files.
    #[error("{adapter} is {}; its files stay until it is retired or revoked", state.as_str())]
    InUse {
        /// The adapter.
        adapter: String,
        /// What it is.
        state: AdapterState,
    },
    /// Its state changed not long ago.
    #[error("{0} was changed meanwhile; its files stay")]
    Changed(String),
    /// There is nothing to serve.
    #[error("the files of {0} were removed; import the same adapter again, or train it again")]
    FilesRemoved(String),
    /// The folder could not be taken away.
    #[error("the files of {adapter} cannot be removed: {source}")]
    Folder {
        /// The adapter.
        adapter: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The name means something else already.
    #[error("'{name}' is {taken_by}; choose another name")]
    NameTaken {
        /// The name.
        name: String,
        /// By what.
        taken_by: &'static str,
    },
    /// No such alias.
    #[error("there is no alias '{0}'; `tidemill adapter list` shows those that there are")]
    NoAlias(String),
}

impl From<sqlx::Error> for AdapterRefusal {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// Which adapters are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterFilter {
    /// Of this base.
    pub base: Option<String>,
    /// Of this name.
    pub name: Option<String>,
    /// In this state.
    pub state: Option<AdapterState>,
    /// Older than this one.
    pub before: Option<Uuid>,
    /// At most so many.
    pub limit: Option<usize>,
}

/// The adapters of a store. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Adapters {
    store: Store,
}

/// `NAME@GENERATION` of a row.
pub(crate) fn reference(name: &str, generation: i64) -> String {
    format!("{name}@{generation:016x}")
}

impl AdapterState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Candidate, Self::Serving, Self::Retired, Self::Revoked];

    /// The word that rows and requests use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Candidate => "candidate",
            Self::Serving => "serving",
            Self::Retired => "retired",
            Self::Revoked => "revoked",
        }
    }
}

impl Adapters {
    /// Over a store.
    pub fn new(store: &Store) -> Self {
        Self { store: store.clone() }
    }

    /// Writes a new adapter. The same contents under the same name and base are one adapter: then what is there is returned and stays as
    /// it is. One of a tainted snapshot or parent is tainted from the start, and does not name a person who was erased.
    pub async fn insert(&self, new: &RegisteredAdapter, actor: impl Into<Actor>) -> Result<RegisteredAdapter, AdapterRefusal> {
        let actor: &Actor = &actor.into();
        let database = self.store.database();
        patiently(async {
            let mut transaction = database.write().begin().await?;
            // Whoever takes away files that lie there waits until this row is seen, or this row until they are gone.
            row::hold_located(&mut transaction, &new.location).await?;
            let made = row::insert(&mut transaction, new).await?;
            let taken = "SELECT 1 FROM adapter_aliases WHERE base = $1 AND name = $2";
            if exists(&mut transaction, taken, &new.base, &new.name).await? {
                return Err(AdapterRefusal::NameTaken { name: new.name.clone(), taken_by: "an alias of this base model" });
            }
            if made {
                lineage::taint_by_origin(&mut transaction, new).await?;
                let detail = json!({"base": new.base, "generation": new.reference(), "job": new.job, "lineage": new.lineage});
                self.audit(&mut transaction, actor, "adapter.register", new, detail).await?;
                lineage::forget_erased(&mut transaction, database.dialect(), new.id, &new.lineage).await?;
            }
            let mut there = row::same(&mut transaction, new).await?.ok_or(AdapterRefusal::Unknown(new.id))?;
            if there.files_removed.is_some() && there.state != AdapterState::Revoked {
                // Whoever registers has put them into their place again.
                there = row::set_files_removed(&mut transaction, there.id, None).await?;
                self.audit(&mut transaction, actor, "adapter.restore", &there, json!({"base": there.base})).await?;
            }
            transaction.commit().await?;
            if there.state == AdapterState::Revoked { Err(AdapterRefusal::Revoked(there.reference())) } else { Ok(there) }
        })
        .await
    }

    /// The adapter of this id.
    pub async fn find(&self, id: Uuid) -> Result<Option<RegisteredAdapter>, StoreError> {
        patiently(async {
            let text = format!("SELECT {} FROM adapters WHERE id = $1", row::COLUMNS);
            let found =
                sqlx::query(AssertSqlSafe(text)).bind(id.to_string()).fetch_optional(self.store.database().read()).await?;
            found.as_ref().map(row::read).transpose()
        })
        .await
    }

    /// A page of adapters, the newest first.
    pub async fn list(&self, filter: &AdapterFilter) -> Result<Page<RegisteredAdapter>, StoreError> {
        at_length(async {
            let limit = page::limit(filter.limit);
            let mut select = Select::new(&format!("SELECT {} FROM adapters", row::COLUMNS));
            select.text_option("base = ?", filter.base.as_deref());
            select.text_option("name = ?", filter.name.as_deref());
            select.text_option("state = ?", filter.state.map(AdapterState::as_str));
            select.text_option("id < ?", filter.before.map(|id| id.to_string()).as_deref());
            select.end(&format!(" ORDER BY id DESC LIMIT {}", limit + 1));
            let rows = select.query().fetch_all(self.store.database().read()).await?;
            Ok(Page::of(rows.iter().map(row::read).collect::<Result<_, _>>()?, limit))
        })
        .await
    }

    /// All aliases, by base and name.
    pub async fn aliases(&self) -> Result<Vec<Alias>, StoreError> {
        patiently(async {
            let text = "SELECT base, name, adapter_id, updated FROM adapter_aliases ORDER BY base, name";
            let rows = sqlx::query(text).fetch_all(self.store.database().read()).await?;
            rows.iter().map(row::alias).collect()
        })
        .await
    }

    /// What is to be served at this moment: in the order in which it was put into service.
    pub async fn served(&self) -> Result<Vec<ServedAdapter>, StoreError> {
        patiently(async {
            // One statement: an alias is seen together with what it leads to.
            let text = "SELECT a.id, a.created, a.name, a.generation, a.base, a.base_hash, a.location, s.name AS alias FROM adapters a \
                        LEFT JOIN adapter_aliases s ON s.adapter_id = a.id AND s.base = a.base WHERE a.state = 'serving' \
                        ORDER BY a.served, a.id, s.name";
            let rows = sqlx::query(text).fetch_all(self.store.database().read()).await?;
            row::served(&rows)
        })
        .await
    }

    /// Puts an adapter into service in the place of others of its name, which are retired unless an alias leads to them. Returns it and
    /// those that were retired.
    pub async fn serve(
        &self,
        id: Uuid,
        though_tainted: bool,
        actor: impl Into<Actor>,
    ) -> Result<(RegisteredAdapter, Vec<RegisteredAdapter>), AdapterRefusal> {
        let actor: &Actor = &actor.into();
        let known = self.find(id).await?.ok_or(AdapterRefusal::Unknown(id))?;
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            // Held, all in one statement, so that two who serve of one name wait for each other.
            let held = row::hold_named(&mut transaction, &known.base, &known.name).await?;
            let (mut others, mut own): (Vec<_>, Vec<_>) = held.into_iter().partition(|adapter| adapter.id != id);
            let adapter = own.pop().ok_or(AdapterRefusal::Unknown(id))?;
            if adapter.state == AdapterState::Revoked {
                return Err(AdapterRefusal::Revoked(adapter.reference()));
            }
            if adapter.tainted.is_some() && !though_tainted {
                return Err(AdapterRefusal::Tainted(adapter.reference()));
            }
            if adapter.files_removed.is_some() {
                return Err(AdapterRefusal::FilesRemoved(adapter.reference()));
            }
            let now = now_us();
            let mut retired = Vec::new();
            others.retain(|other| other.state == AdapterState::Serving);
            for other in others {
                if row::aliases_of(&mut transaction, other.id).await?.is_empty() {
                    retired.push(row::set_state(&mut transaction, other.id, AdapterState::Retired, now).await?);
                }
            }
            let adapter = row::set_state(&mut transaction, id, AdapterState::Serving, now).await?;
            let names: Vec<String> = retired.iter().map(RegisteredAdapter::reference).collect();
            let detail = json!({"base": adapter.base, "retired": names, "though_tainted": though_tainted});
            self.audit(&mut transaction, actor, "adapter.serve", &adapter, detail).await?;
            transaction.commit().await?;
            Ok((adapter, retired))
        })
        .await
    }

    /// Takes an adapter out of service, for now.
    pub async fn retire(&self, id: Uuid, actor: impl Into<Actor>) -> Result<RegisteredAdapter, AdapterRefusal> {
        let actor: &Actor = &actor.into();
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let adapter = row::hold(&mut transaction, id).await?.ok_or(AdapterRefusal::Unknown(id))?;
            if adapter.state == AdapterState::Revoked {
                return Err(AdapterRefusal::Revoked(adapter.reference()));
            }
            let aliases = row::aliases_of(&mut transaction, id).await?;
            if !aliases.is_empty() {
                return Err(AdapterRefusal::Aliased { adapter: adapter.reference(), aliases });
            }
            let adapter = row::set_state(&mut transaction, id, AdapterState::Retired, now_us()).await?;
            self.audit(&mut transaction, actor, "adapter.retire", &adapter, json!({"base": adapter.base})).await?;
            transaction.commit().await?;
            Ok(adapter)
        })
        .await
    }

    /// Takes an adapter out of service for good, together with the aliases that lead to it, which are returned.
    pub async fn revoke(&self, id: Uuid, actor: impl Into<Actor>) -> Result<(RegisteredAdapter, Vec<String>), AdapterRefusal> {
        let actor: &Actor = &actor.into();
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let adapter = row::hold(&mut transaction, id).await?.ok_or(AdapterRefusal::Unknown(id))?;
            let aliases = row::aliases_of(&mut transaction, id).await?;
            let removed = sqlx::query("DELETE FROM adapter_aliases WHERE adapter_id = $1").bind(id.to_string());
            removed.execute(&mut *transaction).await?;
            let adapter = match adapter.state {
                AdapterState::Revoked => adapter,
                _ => row::set_state(&mut transaction, id, AdapterState::Revoked, now_us()).await?,
            };
            let detail = json!({"base": adapter.base, "aliases": aliases});
            self.audit(&mut transaction, actor, "adapter.revoke", &adapter, detail).await?;
            transaction.commit().await?;
            Ok((adapter, aliases))
        })
        .await
    }

    /// Writes down that the files of an adapter go that was retired or revoked, not after `unchanged_since` where that is given (in
    /// microseconds since 1970). The row stays. `take` takes the folder out of its place while nobody else can register or serve what lies
    /// there; it is not asked while another adapter has the same files.
    pub async fn remove_files(
        &self,
        id: Uuid,
        unchanged_since: Option<i64>,
        actor: impl Into<Actor>,
        take: impl FnOnce() -> std::io::Result<()> + Send,
    ) -> Result<RegisteredAdapter, AdapterRefusal> {
        let actor: &Actor = &actor.into();
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let adapter = row::hold(&mut transaction, id).await?.ok_or(AdapterRefusal::Unknown(id))?;
            // A statement of its own, which sees what was registered until this one was held.
            let mut others = row::hold_located(&mut transaction, &adapter.location).await?;
            others.retain(|other| other.id != id);
            if !matches!(adapter.state, AdapterState::Retired | AdapterState::Revoked) {
                return Err(AdapterRefusal::InUse { adapter: adapter.reference(), state: adapter.state });
            }
            let aliases = row::aliases_of(&mut transaction, id).await?;
            if !aliases.is_empty() {
                return Err(AdapterRefusal::Aliased { adapter: adapter.reference(), aliases });
            }
            if unchanged_since.is_some_and(|since| adapter.updated > since) {
                return Err(AdapterRefusal::Changed(adapter.reference()));
            }
            let (gone, alone) = (adapter.files_removed, others.iter().all(|other| other.files_removed.is_some()));
            let removed = match gone {
                Some(_) => adapter,
                None => row::set_files_removed(&mut transaction, id, Some(now_us())).await?,
            };
            if gone.is_none() {
                let detail = json!({"base": removed.base, "location": removed.location, "shared": !alone});
                self.audit(&mut transaction, actor, "adapter.remove_files", &removed, detail).await?;
            }
            if alone {
                take().map_err(|source| AdapterRefusal::Folder { adapter: removed.reference(), source })?;
            }
            transaction.commit().await?;
            Ok(removed)
        })
        .await
    }

    /// Keeps what an evaluation found, as `evaluation` of the metrics, in the place of the one before; that stays in the audit.
    pub async fn evaluated(&self, id: Uuid, found: &Value, actor: impl Into<Actor>) -> Result<RegisteredAdapter, AdapterRefusal> {
        let actor: &Actor = &actor.into();
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let adapter = row::hold(&mut transaction, id).await?.ok_or(AdapterRefusal::Unknown(id))?;
            let mut metrics = adapter.metrics.as_object().cloned().unwrap_or_default();
            metrics.insert("evaluation".to_owned(), found.clone());
            let adapter = row::set_metrics(&mut transaction, id, &Value::Object(metrics)).await?;
            self.audit(&mut transaction, actor, "adapter.evaluate", &adapter, json!({"base": adapter.base, "found": found}))
                .await?;
            transaction.commit().await?;
            Ok(adapter)
        })
        .await
    }

    /// Leads an alias of the adapter's base to an adapter that is served: after all that has happened to the name, whatever the clocks of
    /// servers say. Returns the adapter, and the one that it led to before.
    pub async fn set_alias(
        &self,
        name: &str,
        id: Uuid,
        actor: impl Into<Actor>,
    ) -> Result<(RegisteredAdapter, Option<Uuid>), AdapterRefusal> {
        self.lead_alias(name, id, None, &actor.into()).await
    }

    /// Leads an alias back to where it led from `since` on, in microseconds since 1970, as if it had not been moved.
    pub async fn lead_alias_back(
        &self,
        name: &str,
        id: Uuid,
        since: i64,
        actor: impl Into<Actor>,
    ) -> Result<(RegisteredAdapter, Option<Uuid>), AdapterRefusal> {
        self.lead_alias(name, id, Some(since), &actor.into()).await
    }

    async fn lead_alias(
        &self,
        name: &str,
        id: Uuid,
        since: Option<i64>,
        actor: &Actor,
    ) -> Result<(RegisteredAdapter, Option<Uuid>), AdapterRefusal> {
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let adapter = row::hold(&mut transaction, id).await?.ok_or(AdapterRefusal::Unknown(id))?;
            match adapter.state {
                AdapterState::Serving => {}
                AdapterState::Revoked => return Err(AdapterRefusal::Revoked(adapter.reference())),
                state => return Err(AdapterRefusal::NotServed { adapter: adapter.reference(), state }),
            }
            let taken = "SELECT 1 FROM adapters WHERE base = $1 AND name = $2 LIMIT 1";
            let taken_by = match name == adapter.base {
                true => Some("the base model itself"),
                false => exists(&mut transaction, taken, &adapter.base, name).await?.then_some("an adapter's name"),
            };
            if let Some(taken_by) = taken_by {
                return Err(AdapterRefusal::NameTaken { name: name.to_owned(), taken_by });
            }
            let since = match since {
                Some(since) => since,
                None => moment(&mut transaction, name, now_us()).await?,
            };
            let before = row::lead(&mut transaction, &adapter, name, since).await?;
            let detail = json!({"base": adapter.base, "adapter": adapter.reference(), "before": before});
            self.audit_subject(&mut transaction, actor, "adapter.alias", name, detail).await?;
            transaction.commit().await?;
            Ok((adapter, before))
        })
        .await
    }

    /// Removes an alias. Returns the adapter that it led to.
    pub async fn remove_alias(&self, base: &str, name: &str, actor: impl Into<Actor>) -> Result<Uuid, AdapterRefusal> {
        let actor: &Actor = &actor.into();
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let gone = sqlx::query(
                "DELETE FROM adapter_aliases WHERE base = $1 AND name = $2 RETURNING base, name, adapter_id, updated",
            )
            .bind(clean(base).into_owned())
            .bind(clean(name).into_owned())
            .fetch_optional(&mut *transaction)
            .await?;
            let gone = gone.as_ref().map(row::alias).transpose()?.ok_or_else(|| AdapterRefusal::NoAlias(name.to_owned()))?;
            let detail = json!({"base": base, "adapter_id": gone.adapter});
            self.audit_subject(&mut transaction, actor, "adapter.unalias", name, detail).await?;
            transaction.commit().await?;
            Ok(gone.adapter)
        })
        .await
    }

    async fn audit(
        &self,
        sql: &mut AnyConnection,
        actor: &Actor,
        action: &str,
        adapter: &RegisteredAdapter,
        detail: Value,
    ) -> Result<(), sqlx::Error> {
        self.audit_subject(sql, actor, action, &adapter.reference(), detail).await
    }

    async fn audit_subject(
        &self,
        sql: &mut AnyConnection,
        actor: &Actor,
        action: &str,
        subject: &str,
        mut detail: Value,
    ) -> Result<(), sqlx::Error> {
        // The audit is for good: what names people stays in the adapter's own row, where an erasure finds it.
        if let Some(detail) = detail.as_object_mut() {
            detail.remove("lineage");
        }
        self.store.act(actor, action).to(subject).with(detail).write(sql).await
    }
}

async fn exists(sql: &mut AnyConnection, text: &'static str, base: &str, name: &str) -> Result<bool, sqlx::Error> {
    let query = sqlx::query(text).bind(clean(base).into_owned()).bind(clean(name).into_owned());
    Ok(query.fetch_optional(sql).await?.is_some())
}

/// A candidate of which nothing is known.
impl Default for RegisteredAdapter {
    fn default() -> Self {
        Self {
            id: Uuid::nil(),
            created: 0,
            updated: 0,
            name: String::new(),
            generation: 0,
            base: String::new(),
            base_hash: None,
            content_hash: String::new(),
            location: String::new(),
            state: AdapterState::Candidate,
            served: None,
            snapshot: None,
            job: None,
            parent: None,
            lineage: json!({}),
            metrics: json!({}),
            tainted: None,
            files_removed: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_shows_all_digits_of_a_generation() {
        assert_eq!(
            RegisteredAdapter { name: "a".into(), generation: 0x2f, ..Default::default() }.reference(),
            "a@000000000000002f"
        );
    }
}
