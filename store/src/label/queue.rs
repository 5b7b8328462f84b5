//! A queue: what enters it, how it is worked.

use super::{LabelError, Labels};
use crate::audit::Act;
use crate::patience::patiently;
use crate::statement::{clean, clean_option};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

/// A queue to be.
#[derive(Clone, Debug, PartialEq)]
pub struct NewQueue {
    /// Unique.
    pub name: String,
    /// Which traffic enters; the gateway knows its form.
    pub rule: Value,
    /// Markdown, shown beside the task.
    pub guidelines: String,
    /// People who judge each task.
    pub overlap: u32,
    /// Share of a person's tasks, 0 to 1, that are gold where there are gold tasks left for that person.
    pub gold_share: f64,
    /// How long a task waits for the person who got it.
    pub lease_seconds: u32,
    /// Where the rule starts to read: a bare inference id, or empty for the beginning.
    pub filled_until: String,
}

/// A queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Queue {
    /// UUIDv7.
    pub id: Uuid,
    /// Unique.
    pub name: String,
    /// Microseconds since 1970.
    pub created: i64,
    /// Since when nothing enters or leaves it.
    pub closed: Option<i64>,
    /// Which traffic enters.
    pub rule: Value,
    /// Markdown.
    pub guidelines: String,
    /// People who judge each task.
    pub overlap: u32,
    /// Share of gold tasks.
    pub gold_share: f64,
    /// Length of a lease.
    pub lease_seconds: u32,
    /// The last inference that the rule has seen.
    pub filled_until: String,
}

const COLUMNS: &str = "id, name, created, closed, rule, guidelines, overlap, gold_share, lease_seconds, filled_until";
type Row = (String, String, i64, Option<i64>, String, String, i64, f64, i64, String);

fn queue(row: Row) -> Result<Queue, LabelError> {
    let (id, name, created, closed, rule, guidelines, overlap, gold_share, lease_seconds, filled_until) = row;
    Ok(Queue {
        id: id.parse().map_err(|_| LabelError::corrupt("queue id", &id))?,
        name,
        created,
        closed,
        rule: serde_json::from_str(&rule).map_err(|_| LabelError::corrupt("rule", &rule))?,
        guidelines,
        overlap: u32::try_from(overlap).unwrap_or(u32::MAX),
        gold_share,
        lease_seconds: u32::try_from(lease_seconds).unwrap_or(u32::MAX),
        filled_until,
    })
}

impl Labels {
    /// Makes a queue.
    pub async fn create_queue(&self, new: NewQueue, now: i64, act: Act) -> Result<Queue, LabelError> {
        patiently(async {
            let mut transaction = self.database.write().begin().await?;
            let id = Uuid::now_v7();
            let made = sqlx::query(
                "INSERT INTO label_queues (id, name, created, closed, rule, guidelines, overlap, gold_share, lease_seconds, filled_until)
                 VALUES ($1,$2,$3,NULL,$4,$5,$6,$7,$8,$9) ON CONFLICT (name) DO NOTHING",
            )
            .bind(id.to_string())
            .bind(clean(&new.name).into_owned())
            .bind(now)
            .bind(new.rule.to_string())
            .bind(clean(&new.guidelines).into_owned())
            .bind(i64::from(new.overlap))
            .bind(new.gold_share)
            .bind(i64::from(new.lease_seconds))
            .bind(&new.filled_until)
            .execute(&mut *transaction)
            .await?;
            if made.rows_affected() == 0 {
                return Err(LabelError::NameTaken(new.name));
            }
            act.write(&mut transaction).await?;
            transaction.commit().await?;
            let NewQueue { name, rule, guidelines, overlap, gold_share, lease_seconds, filled_until } = new;
            Ok(Queue { id, name, created: now, closed: None, rule, guidelines, overlap, gold_share, lease_seconds, filled_until })
        })
        .await
    }

    /// The queue with this id or name.
    pub async fn queue(&self, id_or_name: &str) -> Result<Queue, LabelError> {
        patiently(async {
            let sql = sqlx::AssertSqlSafe(format!(
                "SELECT {COLUMNS} FROM label_queues WHERE id = $1 OR name = $1 ORDER BY id = $1 DESC"
            ));
            let row: Option<Row> =
                sqlx::query_as(sql).bind(clean(id_or_name).into_owned()).fetch_optional(self.database.read()).await?;
            row.map_or_else(|| Err(LabelError::NoQueue(id_or_name.to_owned())), queue)
        })
        .await
    }

    /// All queues, the newest last.
    pub async fn list_queues(&self) -> Result<Vec<Queue>, LabelError> {
        patiently(async {
            let sql = sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM label_queues ORDER BY id"));
            let rows: Vec<Row> = sqlx::query_as(sql).fetch_all(self.database.read()).await?;
            rows.into_iter().map(queue).collect()
        })
        .await
    }

    /// Opens or closes a queue, and replaces the guidelines where some are given.
    pub async fn change_queue(
        &self,
        id: Uuid,
        closed: Option<i64>,
        guidelines: Option<&str>,
        act: Act,
    ) -> Result<(), LabelError> {
        patiently(async {
            let mut transaction = self.database.write().begin().await?;
            sqlx::query("UPDATE label_queues SET closed = $2, guidelines = COALESCE($3, guidelines) WHERE id = $1")
                .bind(id.to_string())
                .bind(closed)
                .bind(clean_option(guidelines))
                .execute(&mut *transaction)
                .await?;
            act.write(&mut transaction).await?;
            Ok(transaction.commit().await?)
        })
        .await
    }

    /// Moves the rule's cursor from `from` to `to`; `false` when another gateway has moved it.
    pub async fn advance(&self, id: Uuid, from: &str, to: &str) -> Result<bool, LabelError> {
        patiently(async {
            let done = sqlx::query("UPDATE label_queues SET filled_until = $3 WHERE id = $1 AND filled_until = $2")
                .bind(id.to_string())
                .bind(from)
                .bind(to)
                .execute(self.database.write())
                .await?;
            Ok(done.rows_affected() == 1)
        })
        .await
    }
}
