//! Feedback in the database.

use std::collections::{HashMap, HashSet};

use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Connection, Row};
use uuid::Uuid;

use crate::error::StoreError;
use crate::inferences::{json, parse};
use crate::page::{self, Order, Page};
use crate::records::{Feedback, Kind, TargetKind};
use crate::statement::{Insert, Select, clean, clean_option, list, number};
use crate::{Database, Dialect};

/// What became of a feedback that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    /// Its id; of a duplicate, the first one's.
    pub id: Uuid,
    /// Its idempotency key had been used: nothing was written.
    pub duplicate: bool,
}

/// Which feedback; everything absent is any.
#[derive(Clone, Debug, Default)]
pub struct FeedbackFilter {
    /// Bare id of an answer, choice or conversation; of a comparison, any of its candidates.
    pub target: Option<String>,
    /// What sort.
    pub kind: Option<Kind>,
    /// Name of a metric.
    pub metric: Option<String>,
    /// Who judged.
    pub author: Option<String>,
    /// Where.
    pub source: Option<String>,
    /// Has this tag.
    pub tag: Option<String>,
    /// Of this labeling task.
    pub task_id: Option<Uuid>,
    /// Created at or after, in microseconds since 1970.
    pub since: Option<i64>,
    /// Created before.
    pub until: Option<i64>,
    /// Only what is withdrawn, or only what is not.
    pub withdrawn: Option<bool>,
    /// The last id of the page before.
    pub after: Option<Uuid>,
    /// 20 unless said, at most [`crate::MAX_PAGE`].
    pub limit: Option<usize>,
    /// Which end first.
    pub order: Order,
}

/// What an edit sets; everything absent stays.
#[derive(Clone, Debug, Default)]
pub struct FeedbackChange {
    /// The value, with its form as a number (`None`: it has none).
    pub value: Option<(Value, Option<f64>)>,
    /// All targets with the first in front, when a comparison's candidates change.
    pub targets: Option<Vec<String>>,
    /// The tags.
    pub tags: Option<Vec<String>>,
    /// Who judged.
    pub author: Option<String>,
    /// Where.
    pub source: Option<String>,
    /// From seeing to judging, in milliseconds.
    pub latency_ms: Option<i64>,
}

const FEEDBACK: Insert = Insert {
    table: "feedback",
    columns: &[
        "id",
        "created",
        "updated",
        "revision",
        "withdrawn",
        "target",
        "target_kind",
        "kind",
        "metric",
        "value",
        "number:number",
        "author",
        "source",
        "latency_ms",
        "tags",
        "key_id",
        "idempotency_key",
        "task_id",
    ],
};

const TARGETS: Insert = Insert { table: "feedback_targets", columns: &["feedback_id", "target"] };

/// Writes what is not there yet, within the caller's transaction, and says in order what became of each.
pub(crate) async fn insert(connection: &mut AnyConnection, rows: &[&Feedback]) -> Result<Vec<Acknowledged>, sqlx::Error> {
    let mut new: HashSet<String> = HashSet::with_capacity(rows.len());
    for part in Insert::parts(rows) {
        let mut query = sqlx::query(AssertSqlSafe(FEEDBACK.text(part.len())));
        for row in part {
            query = query
                .bind(row.id.to_string())
                .bind(row.created)
                .bind(row.updated)
                .bind(row.revision)
                .bind(i64::from(row.withdrawn))
                .bind(clean(&row.target).into_owned())
                .bind(row.target_kind.as_str())
                .bind(row.kind.as_str())
                .bind(clean_option(row.metric.as_deref()))
                .bind(json(&row.value))
                .bind(number(row.number))
                .bind(clean_option(row.author.as_deref()))
                .bind(clean_option(row.source.as_deref()))
                .bind(row.latency_ms)
                .bind(json(&row.tags))
                .bind(row.key_id.as_deref())
                .bind(clean_option(row.idempotency_key.as_deref()))
                .bind(row.task_id.map(|id| id.to_string()));
        }
        for row in query.fetch_all(&mut *connection).await? {
            new.insert(row.try_get(0)?);
        }
    }
    let mut targets = Vec::with_capacity(rows.len());
    for row in rows.iter().filter(|row| new.contains(&row.id.to_string())) {
        targets.extend(row.targets.iter().map(|target| (row.id, target)));
    }
    insert_targets(connection, &targets).await?;

    let mut first: HashMap<String, Uuid> = HashMap::new();
    let again: Vec<String> = rows
        .iter()
        .filter(|row| !new.contains(&row.id.to_string()))
        .filter_map(|row| clean_option(row.idempotency_key.as_deref()))
        .collect();
    for part in again.chunks(500) {
        let text = format!("SELECT idempotency_key, id FROM feedback WHERE idempotency_key IN {}", list(1, part.len()));
        let mut query = sqlx::query(AssertSqlSafe(text));
        for key in part {
            query = query.bind(key.clone());
        }
        for row in query.fetch_all(&mut *connection).await? {
            let id: String = row.try_get(1)?;
            first.insert(row.try_get(0)?, Uuid::try_parse(&id).map_err(|error| sqlx::Error::Decode(error.into()))?);
        }
    }
    // A row that is there under its own id was written by an attempt whose answer got lost: that is no duplicate.
    Ok(rows
        .iter()
        .map(|row| {
            let earlier = row.idempotency_key.as_deref().and_then(|key| first.get(&*clean(key))).copied();
            let id = earlier.unwrap_or(row.id);
            Acknowledged { id, duplicate: id != row.id }
        })
        .collect())
}

async fn insert_targets(connection: &mut AnyConnection, targets: &[(Uuid, &String)]) -> Result<(), sqlx::Error> {
    for part in Insert::parts(targets) {
        let mut query = sqlx::query(AssertSqlSafe(TARGETS.text(part.len())));
        for (id, target) in part {
            query = query.bind(id.to_string()).bind(clean(target).into_owned());
        }
        query.fetch_all(&mut *connection).await?;
    }
    Ok(())
}

/// The feedback of this id.
pub(crate) async fn find(database: &Database, id: Uuid) -> Result<Option<Feedback>, StoreError> {
    let mut connection = database.read().acquire().await?;
    let row = sqlx::query("SELECT * FROM feedback WHERE id = $1").bind(id.to_string()).fetch_optional(&mut *connection).await?;
    match row {
        Some(row) => Ok(with_targets(&mut connection, vec![read(&row)?]).await?.pop()),
        None => Ok(None),
    }
}

/// Whether a row has the tag `?`. Tags are a JSON array of strings: a quoted string is in the text exactly when it is one of them.
pub(crate) fn has_tag(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Sqlite => "instr(tags, ?) > 0",
        Dialect::Postgres => "strpos(tags, ?) > 0",
    }
}

/// A page of feedback.
pub(crate) async fn find_all(database: &Database, filter: &FeedbackFilter) -> Result<Page<Feedback>, StoreError> {
    let limit = page::limit(filter.limit);
    let mut select = Select::new("SELECT * FROM feedback");
    select.text_option("id IN (SELECT feedback_id FROM feedback_targets WHERE target = ?)", filter.target.as_deref());
    select.text_option("kind = ?", filter.kind.map(Kind::as_str));
    select.text_option("metric = ?", filter.metric.as_deref());
    select.text_option("author = ?", filter.author.as_deref());
    select.text_option("source = ?", filter.source.as_deref());
    select.text_option("task_id = ?", filter.task_id.map(|id| id.to_string()).as_deref());
    select.text_option(has_tag(database.dialect()), filter.tag.as_ref().map(json).as_deref());
    select.integer("created >= ?", filter.since);
    select.integer("created < ?", filter.until);
    select.integer("withdrawn = ?", filter.withdrawn.map(i64::from));
    select.text_option(&filter.order.after("id"), filter.after.map(|id| id.to_string()).as_deref());
    select.end(&format!(" ORDER BY id {} LIMIT {}", filter.order.sql(), limit + 1));
    let mut connection = database.read().acquire().await?;
    let rows = select.query().fetch_all(&mut *connection).await?;
    let page = Page::of(rows.iter().map(read).collect::<Result<Vec<_>, _>>()?, limit);
    Ok(Page { items: with_targets(&mut connection, page.items).await?, has_more: page.has_more })
}

/// Changes a feedback and keeps what it was. `None`: there is none of this id.
pub(crate) async fn edit(
    database: &Database,
    id: Uuid,
    now: i64,
    change: impl FnOnce(&mut Feedback),
) -> Result<Option<Feedback>, StoreError> {
    let mut connection = database.write().acquire().await?;
    let mut transaction = connection.begin().await?;
    let edited = edit_within(&mut transaction, id, now, change).await?;
    transaction.commit().await?;
    Ok(edited)
}

/// The same within the caller's transaction.
pub(crate) async fn edit_within(
    transaction: &mut AnyConnection,
    id: Uuid,
    now: i64,
    change: impl FnOnce(&mut Feedback),
) -> Result<Option<Feedback>, StoreError> {
    // The update comes first: it takes the row's lock, so that of two edits at once the second sees the first.
    let text = "UPDATE feedback SET revision = revision + 1 WHERE id = $1 RETURNING *";
    let Some(row) = sqlx::query(text).bind(id.to_string()).fetch_optional(&mut *transaction).await? else {
        return Ok(None);
    };
    let mut before = read(&row)?;
    before.revision -= 1;
    let Some(before) = with_targets(transaction, vec![before]).await?.pop() else { return Ok(None) };
    let mut after = before.clone();
    change(&mut after);
    if after == before {
        sqlx::query("UPDATE feedback SET revision = revision - 1 WHERE id = $1")
            .bind(id.to_string())
            .execute(&mut *transaction)
            .await?;
        return Ok(Some(before));
    }
    after.revision = before.revision + 1;
    after.updated = now;
    sqlx::query("INSERT INTO feedback_revisions (feedback_id, revision, at, body) VALUES ($1, $2, $3, $4)")
        .bind(id.to_string())
        .bind(before.revision)
        .bind(now)
        .bind(json(&before))
        .execute(&mut *transaction)
        .await?;
    sqlx::query(
        "UPDATE feedback SET updated = $2, withdrawn = $3, target = $4, value = $5, number = NULLIF($6,'NaN'), author = $7, \
         source = $8, latency_ms = $9, tags = $10 WHERE id = $1",
    )
    .bind(id.to_string())
    .bind(now)
    .bind(i64::from(after.withdrawn))
    .bind(clean(&after.target).into_owned())
    .bind(json(&after.value))
    .bind(number(after.number))
    .bind(clean_option(after.author.as_deref()))
    .bind(clean_option(after.source.as_deref()))
    .bind(after.latency_ms)
    .bind(json(&after.tags))
    .execute(&mut *transaction)
    .await?;
    if after.targets != before.targets {
        sqlx::query("DELETE FROM feedback_targets WHERE feedback_id = $1")
            .bind(id.to_string())
            .execute(&mut *transaction)
            .await?;
        let targets: Vec<_> = after.targets.iter().map(|target| (id, target)).collect();
        insert_targets(transaction, &targets).await?;
    }
    Ok(Some(after))
}

impl FeedbackChange {
    /// Sets what is there.
    pub(crate) fn apply(self, feedback: &mut Feedback) {
        if let Some((value, number)) = self.value {
            (feedback.value, feedback.number) = (value, number);
        }
        if let Some(targets) = self.targets {
            if let Some(first) = targets.first() {
                feedback.target.clone_from(first);
            }
            feedback.targets = targets;
        }
        if let Some(tags) = self.tags {
            feedback.tags = tags;
        }
        feedback.author = self.author.or(feedback.author.take());
        feedback.source = self.source.or(feedback.source.take());
        feedback.latency_ms = self.latency_ms.or(feedback.latency_ms);
    }
}

async fn with_targets(connection: &mut AnyConnection, mut feedback: Vec<Feedback>) -> Result<Vec<Feedback>, StoreError> {
    let mut of: HashMap<String, Vec<String>> = HashMap::new();
    // Only comparisons have other targets than the one in their row.
    let several: Vec<String> = feedback.iter().filter(|row| row.kind == Kind::Comparison).map(|row| row.id.to_string()).collect();
    for part in several.chunks(500) {
        let text = format!(
            "SELECT feedback_id, target FROM feedback_targets WHERE feedback_id IN {} ORDER BY target",
            list(1, part.len())
        );
        let mut query = sqlx::query(AssertSqlSafe(text));
        for id in part {
            query = query.bind(id.clone());
        }
        for row in query.fetch_all(&mut *connection).await? {
            of.entry(row.try_get(0)?).or_default().push(row.try_get(1)?);
        }
    }
    for row in &mut feedback {
        row.targets = match of.remove(&row.id.to_string()) {
            Some(mut targets) => {
                // The first candidate in front, as it was sent; the rest has no order of its own here.
                targets.retain(|target| *target != row.target);
                targets.insert(0, row.target.clone());
                targets
            }
            None => vec![row.target.clone()],
        };
    }
    Ok(feedback)
}

fn read(row: &AnyRow) -> Result<Feedback, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: &str| StoreError::Row { table: "feedback", id: id.clone(), reason: reason.to_owned() };
    let target_kind: String = row.try_get("target_kind")?;
    let kind: String = row.try_get("kind")?;
    let task_id: Option<String> = row.try_get("task_id")?;
    Ok(Feedback {
        id: Uuid::try_parse(&id).map_err(|_| bad("its id is no UUID"))?,
        created: row.try_get("created")?,
        updated: row.try_get("updated")?,
        revision: row.try_get("revision")?,
        withdrawn: row.try_get::<i64, _>("withdrawn")? != 0,
        target: row.try_get("target")?,
        targets: Vec::new(),
        target_kind: TargetKind::parse(&target_kind).ok_or_else(|| bad("unknown kind of target"))?,
        kind: Kind::parse(&kind).ok_or_else(|| bad("unknown kind"))?,
        metric: row.try_get("metric")?,
        value: parse(row, "value").map_err(|reason| bad(&reason))?.unwrap_or_default(),
        number: row.try_get("number")?,
        author: row.try_get("author")?,
        source: row.try_get("source")?,
        latency_ms: row.try_get("latency_ms")?,
        tags: parse(row, "tags").map_err(|reason| bad(&reason))?.unwrap_or_default(),
        key_id: row.try_get("key_id")?,
        idempotency_key: row.try_get("idempotency_key")?,
        task_id: task_id.map(|id| Uuid::try_parse(&id)).transpose().map_err(|_| bad("its task is no UUID"))?,
    })
}
