//! Rollouts, where they stand, and what was decided on the way.
//!
//! A rollout's row changes as a whole and by version: whoever takes it on has read a version and writes the next one, together with the
//! decision that led there and, where a person wanted it, the audit. Of two who read the same version the first wins and the other is
//! told, so several gateways and a person at the command line never overwrite each other's decision.

use serde::Serialize;
use serde_json::{Value, json};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};
use uuid::Uuid;

use crate::Store;
use crate::audit::Actor;
use crate::error::StoreError;
use crate::page::{self, Page};
use crate::patience::{at_length, patiently};
use crate::statement::{Select, clean};

const COLUMNS: &str = "id, created, updated, ended, name, model, spec, state, version, latest";
/// Whether `later` stands on the promotion of `rollouts`: it was promoted after it, or it runs and began with what that left as its control.
const STANDS_ON: &str = "later.id <> rollouts.id AND later.model = rollouts.model AND (later.promoted > rollouts.promoted \
                         OR (later.promoted = rollouts.promoted AND later.id > rollouts.id) \
                         OR (later.ended IS NULL AND later.created >= rollouts.ended))";

/// A rollout.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rollout {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// When it last changed, in microseconds since 1970.
    pub updated: i64,
    /// When it was over, in microseconds since 1970.
    pub ended: Option<i64>,
    /// By which people know it; of those that run, no two have the same.
    pub name: String,
    /// The public model name.
    pub model: String,
    /// What was asked for.
    pub spec: Value,
    /// Where it stands.
    pub state: Value,
    /// Counts the states.
    pub version: i64,
    /// The newest decision.
    pub latest: Value,
}

/// A decision as it is written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RolloutDecision {
    /// The version of the state that it led to.
    pub version: i64,
    /// Microseconds since 1970.
    pub at: i64,
    /// What was done.
    pub action: String,
    /// Who wanted it; `None` for the rollout itself.
    pub actor: Option<String>,
    /// All of it.
    pub body: Value,
}

/// The next state of a rollout.
#[derive(Clone, Debug)]
pub struct RolloutChange {
    /// Where it stands from now on.
    pub state: Value,
    /// It is over.
    pub over: bool,
    /// An arm was promoted: the public model name serves it from now on.
    pub promoted: bool,
    /// What was decided; its version is that of the new state.
    pub decision: RolloutDecision,
    /// Whether the decision is worth a row of its own. One that a person wanted always is.
    pub keep: bool,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RolloutRefusal {
    /// The database is away, slow or broken.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another one of this name runs.
    #[error("a rollout named '{0}' is running; end it first, or choose another name")]
    NameTaken(String),
    /// Somebody else has changed it since it was read.
    #[error("the rollout has changed since it was read; look at it again")]
    Changed,
    /// No such rollout.
    #[error("there is no rollout '{0}'; `tidemill rollout list` shows those that there are")]
    Unknown(String),
}

impl From<sqlx::Error> for RolloutRefusal {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// Which rollouts are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RolloutFilter {
    /// Of this public model name.
    pub model: Option<String>,
    /// Only those that are over, or only those that are not.
    pub over: Option<bool>,
    /// Older than this one.
    pub before: Option<Uuid>,
    /// At most so many.
    pub limit: Option<usize>,
}

/// The rollouts of a store. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Rollouts {
    store: Store,
}

impl Rollouts {
    /// Over a store.
    pub fn new(store: &Store) -> Self {
        Self { store: store.clone() }
    }

    /// Writes a new rollout with its first decision, which somebody wanted. Returns it as it was written: it is made after all that has
    /// happened to its model ([`moment`]).
    pub async fn insert(
        &self,
        new: &Rollout,
        first: &RolloutDecision,
        actor: impl Into<Actor>,
    ) -> Result<Rollout, RolloutRefusal> {
        let actor = actor.into();
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let created = moment(&mut transaction, &new.model, new.created).await?;
            let new = &Rollout { created, ..new.clone() };
            let text = format!(
                "INSERT INTO rollouts ({COLUMNS}) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10) ON CONFLICT (name) WHERE ended IS NULL DO NOTHING"
            );
            let made = sqlx::query(AssertSqlSafe(text))
                .bind(new.id.to_string())
                .bind(new.created)
                .bind(new.updated)
                .bind(new.ended)
                .bind(clean(&new.name).into_owned())
                .bind(clean(&new.model).into_owned())
                .bind(text_of(&new.spec))
                .bind(text_of(&new.state))
                .bind(new.version)
                .bind(text_of(&new.latest))
                .execute(&mut *transaction)
                .await?;
            if made.rows_affected() == 0 {
                return Err(RolloutRefusal::NameTaken(new.name.clone()));
            }
            write_decision(&mut transaction, new.id, first).await?;
            let detail = json!({"model": new.model, "spec": new.spec});
            self.audit(&mut transaction, &actor, first, new, detail).await?;
            transaction.commit().await?;
            Ok(new.clone())
        })
        .await
    }

    /// Takes a rollout that was read at the version before to the change's. `actor` is the person who wanted it.
    pub async fn advance(
        &self,
        read: &Rollout,
        change: &RolloutChange,
        actor: Option<&Actor>,
    ) -> Result<Rollout, RolloutRefusal> {
        self.write(read, change, actor, "ended IS NULL").await
    }

    /// Takes a promotion back that was read at the version before: the model serves what was promoted before it, if anything was. Nothing
    /// changes where something newer stands on it ([`Rollouts::standing_on`]).
    pub async fn take_back(&self, read: &Rollout, change: &RolloutChange, actor: &Actor) -> Result<Rollout, RolloutRefusal> {
        let condition = format!("promoted IS NOT NULL AND NOT EXISTS (SELECT 1 FROM rollouts later WHERE {STANDS_ON})");
        self.write(read, change, Some(actor), &condition).await
    }

    /// What keeps a promotion from being taken back: a later promotion of its model, or a rollout that began on it since and runs.
    pub async fn standing_on(&self, promoted: Uuid) -> Result<Option<Rollout>, StoreError> {
        patiently(async {
            let columns = COLUMNS.split(", ").map(|column| format!("later.{column}")).collect::<Vec<_>>().join(", ");
            let text = format!(
                "SELECT {columns} FROM rollouts, rollouts later WHERE rollouts.id = $1 AND rollouts.promoted IS NOT NULL AND {STANDS_ON} \
                 ORDER BY later.ended IS NULL DESC, later.promoted DESC, later.id DESC LIMIT 1"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(promoted.to_string());
            query.fetch_optional(self.store.database().read()).await?.as_ref().map(read_row).transpose()
        })
        .await
    }

    /// Writes the change where the row is as it was read and `condition` holds.
    async fn write(
        &self,
        read: &Rollout,
        change: &RolloutChange,
        actor: Option<&Actor>,
        condition: &str,
    ) -> Result<Rollout, RolloutRefusal> {
        let RolloutChange { state, over, promoted, decision, keep } = change;
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let ended = match *promoted {
                true => moment(&mut transaction, &read.model, decision.at).await?,
                false => decision.at,
            };
            let text = format!(
                "UPDATE rollouts SET updated = $3, ended = $4, state = $5, version = $6, latest = $7, \
                 promoted = CASE WHEN $8 = 1 THEN (SELECT COALESCE(MAX(promoted), 0) + 1 FROM rollouts) ELSE NULL END \
                 WHERE id = $1 AND version = $2 AND {condition} RETURNING {COLUMNS}"
            );
            let changed = sqlx::query(AssertSqlSafe(text))
                .bind(read.id.to_string())
                .bind(read.version)
                .bind(decision.at)
                .bind(over.then_some(ended))
                .bind(text_of(state))
                .bind(read.version + 1)
                .bind(text_of(&decision.body))
                .bind(i64::from(*promoted))
                .fetch_optional(&mut *transaction)
                .await?;
            let changed = changed.as_ref().map(read_row).transpose()?.ok_or(RolloutRefusal::Changed)?;
            if *keep || actor.is_some() {
                write_decision(&mut transaction, read.id, &RolloutDecision { version: changed.version, ..decision.clone() })
                    .await?;
            }
            if let Some(actor) = actor {
                let detail = json!({"version": changed.version});
                self.audit(&mut transaction, actor, decision, read, detail).await?;
            }
            transaction.commit().await?;
            Ok(changed)
        })
        .await
    }

    /// The rollout of this id, or else the newest of this name.
    pub async fn find(&self, id_or_name: &str) -> Result<Rollout, RolloutRefusal> {
        patiently(async {
            // One that runs before those that are over.
            let text = format!("SELECT {COLUMNS} FROM rollouts WHERE id = $1 OR name = $1 ORDER BY id = $1 DESC, ended IS NULL DESC, id DESC LIMIT 1");
            let query = sqlx::query(AssertSqlSafe(text)).bind(clean(id_or_name).into_owned());
            let found = query.fetch_optional(self.store.database().read()).await?.as_ref().map(read_row).transpose()?;
            found.ok_or_else(|| RolloutRefusal::Unknown(id_or_name.to_owned()))
        })
        .await
    }

    /// All that run, in the order in which they began.
    pub async fn running(&self) -> Result<Vec<Rollout>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM rollouts WHERE ended IS NULL ORDER BY id");
            let rows = sqlx::query(AssertSqlSafe(text)).fetch_all(self.store.database().read()).await?;
            rows.iter().map(read_row).collect()
        })
        .await
    }

    /// Of each model that a rollout was promoted for, the newest such rollout.
    pub async fn promotions(&self) -> Result<Vec<Rollout>, StoreError> {
        self.promotions_but(Uuid::nil()).await
    }

    /// The same as if this rollout had not been promoted.
    pub async fn promotions_but(&self, taken_back: Uuid) -> Result<Vec<Rollout>, StoreError> {
        patiently(async {
            let text = format!(
                "SELECT {COLUMNS} FROM rollouts WHERE promoted IS NOT NULL AND id <> $1 AND NOT EXISTS (SELECT 1 FROM rollouts later \
                 WHERE later.model = rollouts.model AND later.promoted IS NOT NULL AND later.id <> $1 \
                 AND (later.promoted > rollouts.promoted OR (later.promoted = rollouts.promoted AND later.id > rollouts.id))) ORDER BY id"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(taken_back.to_string());
            let rows = query.fetch_all(self.store.database().read()).await?;
            rows.iter().map(read_row).collect()
        })
        .await
    }

    /// Whether what a running rollout's model serves has changed since it began: something else was promoted, or an alias of that name was
    /// led elsewhere. Its control is then another one than it began with, or not what is served.
    pub async fn is_displaced(&self, running: &Rollout) -> Result<bool, StoreError> {
        patiently(async {
            let text = "SELECT CAST(COUNT(*) AS BIGINT) FROM (\
                     SELECT id FROM rollouts WHERE model = $1 AND promoted IS NOT NULL AND ended > $2 \
                     UNION ALL SELECT name FROM adapter_aliases WHERE name = $1 AND updated > $2\
                 ) AS moves";
            let query = sqlx::query(text).bind(clean(&running.model).into_owned()).bind(running.created);
            Ok(query.fetch_one(self.store.database().read()).await?.try_get::<i64, _>(0)? > 0)
        })
        .await
    }

    /// A number that grows with every change of any rollout. Rollouts that are read after it are at least as new.
    pub async fn clock(&self) -> Result<i64, StoreError> {
        patiently(async {
            let text = "SELECT CAST(COALESCE(SUM(version + 1), 0) AS BIGINT) FROM rollouts";
            Ok(sqlx::query(text).fetch_one(self.store.database().read()).await?.try_get(0)?)
        })
        .await
    }

    /// A page of rollouts, the newest first.
    pub async fn list(&self, filter: &RolloutFilter) -> Result<Page<Rollout>, StoreError> {
        at_length(async {
            let limit = page::limit(filter.limit);
            let mut select = Select::new(&format!("SELECT {COLUMNS} FROM rollouts"));
            select.text_option("model = ?", filter.model.as_deref());
            select.text_option("id < ?", filter.before.map(|id| id.to_string()).as_deref());
            match filter.over {
                Some(true) => select.plain("ended IS NOT NULL"),
                Some(false) => select.plain("ended IS NULL"),
                None => {}
            }
            select.end(&format!(" ORDER BY id DESC LIMIT {}", limit + 1));
            let rows = select.query().fetch_all(self.store.database().read()).await?;
            Ok(Page::of(rows.iter().map(read_row).collect::<Result<_, _>>()?, limit))
        })
        .await
    }

    /// The decisions of a rollout that have rows, the oldest first.
    pub async fn decisions(&self, id: Uuid) -> Result<Vec<RolloutDecision>, StoreError> {
        at_length(async {
            let text = "SELECT version, at, action, actor, body FROM rollout_decisions WHERE rollout_id = $1 ORDER BY version";
            let rows = sqlx::query(text).bind(id.to_string()).fetch_all(self.store.database().read()).await?;
            rows.iter().map(read_decision).collect()
        })
        .await
    }

    async fn audit(
        &self,
        sql: &mut AnyConnection,
        actor: &Actor,
        decision: &RolloutDecision,
        rollout: &Rollout,
        mut detail: Value,
    ) -> Result<(), sqlx::Error> {
        detail["id"] = rollout.id.to_string().into();
        let act = self.store.act(actor, format!("rollout.{}", decision.action));
        act.at(decision.at).to(&rollout.name).with(detail).write(sql).await
    }
}

/// When something happens to a public model name that happens `now` by this server's clock: after all that is known to have happened to it
/// before, since the clocks of servers differ and what came later has the last word. A rollout of it begins, one is promoted, an alias of
/// the name is led somewhere.
pub(crate) async fn moment(sql: &mut AnyConnection, model: &str, now: i64) -> Result<i64, sqlx::Error> {
    let text = "SELECT CAST(COALESCE(MAX(at), 0) AS BIGINT) FROM (\
             SELECT created AS at FROM rollouts WHERE model = $1 AND ended IS NULL \
             UNION ALL SELECT ended FROM rollouts WHERE model = $1 AND promoted IS NOT NULL \
             UNION ALL SELECT updated FROM adapter_aliases WHERE name = $1\
         ) AS moves";
    let last: i64 = sqlx::query(text).bind(clean(model).into_owned()).fetch_one(sql).await?.try_get(0)?;
    Ok(now.max(last.saturating_add(1)))
}

async fn write_decision(sql: &mut AnyConnection, rollout: Uuid, decision: &RolloutDecision) -> Result<(), sqlx::Error> {
    let text = "INSERT INTO rollout_decisions (rollout_id, version, at, action, actor, body) VALUES ($1, $2, $3, $4, $5, $6)";
    sqlx::query(text)
        .bind(rollout.to_string())
        .bind(decision.version)
        .bind(decision.at)
        .bind(decision.action.clone())
        .bind(decision.actor.as_deref().map(|actor| clean(actor).into_owned()))
        .bind(text_of(&decision.body))
        .execute(sql)
        .await
        .map(drop)
}

fn text_of(value: &Value) -> String {
    clean(&value.to_string()).into_owned()
}

fn read_row(row: &AnyRow) -> Result<Rollout, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: String| StoreError::Row { table: "rollouts", id: id.clone(), reason };
    let json = |column| value(row, column).map_err(bad);
    Ok(Rollout {
        id: Uuid::try_parse(&id).map_err(|_| bad("its id is no UUID".to_owned()))?,
        created: row.try_get("created")?,
        updated: row.try_get("updated")?,
        ended: row.try_get("ended")?,
        name: row.try_get("name")?,
        model: row.try_get("model")?,
        spec: json("spec")?,
        state: json("state")?,
        version: row.try_get("version")?,
        latest: json("latest")?,
    })
}

fn read_decision(row: &AnyRow) -> Result<RolloutDecision, StoreError> {
    let version: i64 = row.try_get("version")?;
    let bad = |reason| StoreError::Row { table: "rollout_decisions", id: version.to_string(), reason };
    Ok(RolloutDecision {
        version,
        at: row.try_get("at")?,
        action: row.try_get("action")?,
        actor: row.try_get("actor")?,
        body: value(row, "body").map_err(bad)?,
    })
}

fn value(row: &AnyRow, column: &str) -> Result<Value, String> {
    let text: String = row.try_get(column).map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| format!("'{column}': {error}"))
}
