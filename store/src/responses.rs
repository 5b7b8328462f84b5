//! Responses: answers that the next request goes on from, and those that are made in the background.

use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Connection, Row};
use uuid::Uuid;

use crate::commit;
use crate::error::StoreError;
use crate::inferences::{json, parse};
use crate::patience::patiently;
use crate::statement::{clean_option, list};
use crate::store::{Store, now_us};

/// Most responses of one conversation that are read back, the latest ones.
pub const MAX_CHAIN: usize = 2000;
/// Most bytes of them, beside the last one: what is read back stands in memory, several times over.
pub const MAX_CHAIN_BYTES: usize = 32 << 20;
/// Responses that one statement reads by their ids.
const PART: usize = 16;

/// How far a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseStatus {
    /// The model has ended it.
    Completed,
    /// It is being made, in the background.
    InProgress,
    /// It reached a limit.
    Incomplete,
    /// It broke.
    Failed,
    /// It was called off.
    Cancelled,
}

impl ResponseStatus {
    /// The API's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::InProgress => "in_progress",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Completed, Self::InProgress, Self::Incomplete, Self::Failed, Self::Cancelled]
            .into_iter()
            .find(|status| status.as_str() == word)
    }
}

/// A response that can be read again.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredResponse {
    /// The API shows it after `resp_`.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// Id of the key that asked; empty on a server without keys.
    pub owner: String,
    /// The person whom erasure is about.
    pub user_key: Option<String>,
    /// The response that this one goes on from.
    pub previous: Option<Uuid>,
    /// How far it is.
    pub status: ResponseStatus,
    /// In progress: until when its server has promised to be there, in microseconds since 1970.
    pub alive_until: Option<i64>,
    /// The request's input items.
    pub input: Vec<Value>,
    /// The response object, as it was sent last.
    pub body: Value,
}

impl StoredResponse {
    /// It says that it is being made, and nobody makes it any more.
    pub fn is_abandoned(&self, now: i64) -> bool {
        self.status == ResponseStatus::InProgress && self.alive_until.is_none_or(|until| until < now)
    }
}

/// A conversation that was read back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chain {
    /// The earliest first; empty when the owner has no such response.
    pub responses: Vec<StoredResponse>,
    /// There are earlier ones, more than [`MAX_CHAIN`] or [`MAX_CHAIN_BYTES`] allow. Otherwise, where the first one goes on from
    /// another, that was deleted.
    pub cut: bool,
}

impl Store {
    /// Keeps a response; when it returns, the response is on the disk. What a person erased since has asked is not kept, nor what
    /// goes on from it.
    pub async fn save_response(&self, response: &StoredResponse) -> Result<(), StoreError> {
        patiently(async {
            let text = "INSERT INTO responses (id, created, owner, user_key, previous, status, alive_until, input, body, bytes) \
                        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";
            let (input, body) = (json(&response.input), json(&response.body));
            let bytes = 200 + input.len() + body.len();
            let mut connection = self.database().write().acquire().await?;
            let mut transaction = connection.begin().await?;
            sqlx::query(text)
                .bind(response.id.to_string())
                .bind(response.created)
                .bind(response.owner.clone())
                .bind(clean_option(response.user_key.as_deref()))
                .bind(response.previous.map(|id| id.to_string()))
                .bind(response.status.as_str())
                .bind(response.alive_until)
                .bind(input)
                .bind(body)
                .bind(i64::try_from(bytes).unwrap_or(i64::MAX))
                .execute(&mut *transaction)
                .await?;
            let user = response.user_key.as_deref();
            if commit::erased_since(&mut transaction, self.ids(), user, response.created).await? {
                return Ok(());
            }
            // It was made with the texts of those before it.
            if let Some(previous) = response.previous
                && commit::is_erased(&mut transaction, self.ids(), &previous.to_string()).await?
            {
                return Ok(());
            }
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// Ends a response that is in progress. `false`: it is not any more, because it was cancelled, deleted or erased.
    pub async fn end_response(&self, id: Uuid, status: ResponseStatus, body: &Value) -> Result<bool, StoreError> {
        patiently(async {
            let text = "UPDATE responses SET status = $2, body = $3, bytes = 200 + LENGTH(input) + $4, alive_until = NULL \
                        WHERE id = $1 AND status = 'in_progress'";
            let body = json(body);
            let bytes = i64::try_from(body.len()).unwrap_or(i64::MAX);
            let query = sqlx::query(text).bind(id.to_string()).bind(status.as_str()).bind(body).bind(bytes);
            Ok(query.execute(self.database().write()).await?.rows_affected() > 0)
        })
        .await
    }

    /// Promises to be there until `until` for those of `ids` that are in progress; returns the others, which nobody waits for.
    pub async fn keep_alive(&self, ids: &[Uuid], until: i64) -> Result<Vec<Uuid>, StoreError> {
        patiently(async {
            let mut over = Vec::new();
            for id in ids {
                let text = "UPDATE responses SET alive_until = $2 WHERE id = $1 AND status = 'in_progress'";
                let query = sqlx::query(text).bind(id.to_string()).bind(until);
                if query.execute(self.database().write()).await?.rows_affected() == 0 {
                    over.push(*id);
                }
            }
            Ok(over)
        })
        .await
    }

    /// The response of this id, if it is the owner's.
    pub async fn response(&self, owner: &str, id: Uuid) -> Result<Option<StoredResponse>, StoreError> {
        patiently(async {
            let query = sqlx::query("SELECT * FROM responses WHERE id = $1 AND owner = $2");
            let row = query.bind(id.to_string()).bind(owner.to_owned()).fetch_optional(self.database().read()).await?;
            row.as_ref().map(read).transpose()
        })
        .await
    }

    /// The owner's among the responses of these ids.
    pub async fn responses(&self, owner: &str, ids: &[Uuid]) -> Result<Vec<StoredResponse>, StoreError> {
        patiently(async {
            let mut found = Vec::new();
            for part in ids.chunks(PART) {
                let text = format!("SELECT * FROM responses WHERE owner = $1 AND id IN {}", list(2, part.len()));
                let query = sqlx::query(AssertSqlSafe(text)).bind(owner.to_owned());
                let query = part.iter().fold(query, |query, id| query.bind(id.to_string()));
                for row in query.fetch_all(self.database().read()).await? {
                    found.push(read(&row)?);
                }
            }
            Ok(found)
        })
        .await
    }

    /// The response of this id and those that it goes on from, as far as they are the owner's: the latest, within [`MAX_CHAIN`] and
    /// [`MAX_CHAIN_BYTES`].
    pub async fn response_chain(&self, owner: &str, id: Uuid) -> Result<Chain, StoreError> {
        patiently(async {
            let text = format!(
                "WITH RECURSIVE chain (id, previous, depth, bytes) AS (\
                 SELECT id, previous, 1, CAST(0 AS BIGINT) FROM responses WHERE id = $1 AND owner = $2 \
                 UNION ALL SELECT responses.id, responses.previous, chain.depth + 1, chain.bytes + responses.bytes FROM chain \
                 JOIN responses ON responses.id = chain.previous WHERE responses.owner = $2 AND chain.depth < {MAX_CHAIN} \
                 AND chain.bytes + responses.bytes <= {MAX_CHAIN_BYTES}) \
                 SELECT responses.* FROM chain JOIN responses ON responses.id = chain.id ORDER BY chain.depth DESC"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(id.to_string()).bind(owner.to_owned());
            let rows = query.fetch_all(self.database().read()).await?;
            let responses = rows.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            let mut cut = false;
            if let Some(before) = responses.first().and_then(|first| first.previous) {
                let query = sqlx::query("SELECT 1 FROM responses WHERE id = $1 AND owner = $2").bind(before.to_string());
                cut = query.bind(owner.to_owned()).fetch_optional(self.database().read()).await?.is_some();
            }
            Ok(Chain { responses, cut })
        })
        .await
    }

    /// Deletes a response; `false` when the owner has none of this id. The record of the answer, if there is one, stays.
    pub async fn delete_response(&self, owner: &str, id: Uuid) -> Result<bool, StoreError> {
        patiently(async {
            let query = sqlx::query("DELETE FROM responses WHERE id = $1 AND owner = $2");
            let query = query.bind(id.to_string()).bind(owner.to_owned());
            Ok(query.execute(self.database().write()).await?.rows_affected() > 0)
        })
        .await
    }

    /// Whether nobody makes this response any more, although it says so.
    pub fn is_abandoned(&self, response: &StoredResponse) -> bool {
        response.is_abandoned(now_us())
    }
}

fn read(row: &AnyRow) -> Result<StoredResponse, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: &str| StoreError::Row { table: "response", id: id.clone(), reason: reason.to_owned() };
    let (status, previous): (String, Option<String>) = (row.try_get("status")?, row.try_get("previous")?);
    Ok(StoredResponse {
        id: Uuid::try_parse(&id).map_err(|_| bad("its id is no UUID"))?,
        created: row.try_get("created")?,
        owner: row.try_get("owner")?,
        user_key: row.try_get("user_key")?,
        previous: previous
            .map(|id| Uuid::try_parse(&id))
            .transpose()
            .map_err(|_| bad("the one before it has an id that is no UUID"))?,
        status: ResponseStatus::parse(&status).ok_or_else(|| bad("unknown status"))?,
        alive_until: row.try_get("alive_until")?,
        input: parse(row, "input").map_err(|reason| bad(&reason))?.unwrap_or_default(),
        body: parse(row, "body").map_err(|reason| bad(&reason))?.unwrap_or_default(),
    })
}
