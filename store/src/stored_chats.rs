//! Chat answers that clients asked to be kept (`store: true`).

use serde_json::{Map, Value};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Connection, Row};
use uuid::Uuid;

use crate::error::StoreError;
use crate::inferences::{json, parse};
use crate::page::{self, Order, Page};
use crate::patience::patiently;
use crate::statement::{Select, clean, clean_option};
use crate::store::Store;
use crate::{Database, commit};

/// A chat answer that can be read again.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredChat {
    /// The answer's.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// Id of the key that asked; empty on a server without keys.
    pub owner: String,
    /// The person whom erasure is about.
    pub user_key: Option<String>,
    /// Served name.
    pub model: String,
    /// Texts by name.
    pub metadata: Map<String, Value>,
    /// The request's messages, as they were sent.
    pub messages: Value,
    /// The answer, as it was sent.
    pub body: Value,
}

/// Which chats of an owner; everything absent is any.
#[derive(Clone, Debug, Default)]
pub struct ChatFilter {
    /// Whose.
    pub owner: String,
    /// Served model.
    pub model: Option<String>,
    /// Names and values that the metadata has.
    pub metadata: Vec<(String, String)>,
    /// The last id of the page before.
    pub after: Option<Uuid>,
    /// 20 unless said, at most [`crate::MAX_PAGE`].
    pub limit: Option<usize>,
    /// Which end first.
    pub order: Order,
}

impl Store {
    /// Keeps a chat answer; when it returns, the answer is on the disk. What a person erased since has asked is not kept.
    pub async fn save_chat(&self, chat: &StoredChat) -> Result<(), StoreError> {
        patiently(async {
            let mut connection = self.database().write().acquire().await?;
            let mut transaction = connection.begin().await?;
            insert(&mut transaction, chat).await?;
            if commit::erased_since(&mut transaction, self.ids(), chat.user_key.as_deref(), chat.created).await? {
                return Ok(());
            }
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// The chat of this id, if it is the owner's.
    pub async fn chat(&self, owner: &str, id: Uuid) -> Result<Option<StoredChat>, StoreError> {
        patiently(find(self.database(), owner, id)).await
    }

    /// A page of the owner's chats, without their messages, which no list shows.
    pub async fn list_chats(&self, filter: &ChatFilter) -> Result<Page<StoredChat>, StoreError> {
        patiently(async {
            let limit = page::limit(filter.limit);
            let mut select =
                Select::new("SELECT id, created, owner, user_key, model, metadata, 'null' AS messages, body FROM stored_chats");
            select.text("owner = ?", filter.owner.as_str());
            select.text_option("model = ?", filter.model.as_deref());
            for (name, value) in &filter.metadata {
                let one = "EXISTS (SELECT 1 FROM stored_chat_metadata WHERE chat_id = stored_chats.id AND pair = ?)";
                select.text(one, &pair(name, value));
            }
            select.text_option(&filter.order.after("id"), filter.after.map(|id| id.to_string()).as_deref());
            select.end(&format!(" ORDER BY id {} LIMIT {}", filter.order.sql(), limit + 1));
            let rows = select.query().fetch_all(self.database().read()).await?;
            Ok(Page::of(rows.iter().map(read).collect::<Result<Vec<_>, _>>()?, limit))
        })
        .await
    }

    /// Replaces a chat's metadata. `None`: the owner has no such chat.
    pub async fn set_chat_metadata(
        &self,
        owner: &str,
        id: Uuid,
        metadata: &Map<String, Value>,
    ) -> Result<Option<StoredChat>, StoreError> {
        patiently(async {
            let mut connection = self.database().write().acquire().await?;
            let mut transaction = connection.begin().await?;
            let text = "UPDATE stored_chats SET metadata = $3 WHERE id = $1 AND owner = $2 RETURNING *";
            let query = sqlx::query(text).bind(id.to_string()).bind(owner.to_owned()).bind(json(metadata));
            let Some(row) = query.fetch_optional(&mut *transaction).await? else { return Ok(None) };
            let chat = read(&row)?;
            sqlx::query("DELETE FROM stored_chat_metadata WHERE chat_id = $1")
                .bind(id.to_string())
                .execute(&mut *transaction)
                .await?;
            insert_metadata(&mut transaction, id, metadata).await?;
            transaction.commit().await?;
            Ok(Some(chat))
        })
        .await
    }

    /// Deletes a chat; `false` when the owner has none of this id. The record of the answer, if there is one, stays.
    pub async fn delete_chat(&self, owner: &str, id: Uuid) -> Result<bool, StoreError> {
        patiently(async {
            let mut connection = self.database().write().acquire().await?;
            let mut transaction = connection.begin().await?;
            let text = "DELETE FROM stored_chats WHERE id = $1 AND owner = $2";
            let query = sqlx::query(text).bind(id.to_string()).bind(owner.to_owned());
            let found = query.execute(&mut *transaction).await?.rows_affected() > 0;
            if found {
                sqlx::query("DELETE FROM stored_chat_metadata WHERE chat_id = $1")
                    .bind(id.to_string())
                    .execute(&mut *transaction)
                    .await?;
            }
            transaction.commit().await?;
            Ok(found)
        })
        .await
    }
}

async fn insert(sql: &mut AnyConnection, chat: &StoredChat) -> Result<(), sqlx::Error> {
    let text = "INSERT INTO stored_chats (id, created, owner, user_key, model, metadata, messages, body, bytes) \
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)";
    let (metadata, messages, body) = (json(&chat.metadata), json(&chat.messages), json(&chat.body));
    let bytes = 200 + metadata.len() + messages.len() + body.len();
    sqlx::query(text)
        .bind(chat.id.to_string())
        .bind(chat.created)
        .bind(chat.owner.clone())
        .bind(clean_option(chat.user_key.as_deref()))
        .bind(clean(&chat.model).into_owned())
        .bind(metadata)
        .bind(messages)
        .bind(body)
        .bind(i64::try_from(bytes).unwrap_or(i64::MAX))
        .execute(&mut *sql)
        .await?;
    insert_metadata(sql, chat.id, &chat.metadata).await
}

async fn insert_metadata(sql: &mut AnyConnection, id: Uuid, metadata: &Map<String, Value>) -> Result<(), sqlx::Error> {
    for (name, value) in metadata {
        sqlx::query("INSERT INTO stored_chat_metadata (chat_id, pair) VALUES ($1, $2)")
            .bind(id.to_string())
            .bind(pair(name, value.as_str().unwrap_or_default()))
            .execute(&mut *sql)
            .await?;
    }
    Ok(())
}

/// How a name and its value are looked for; JSON keeps the two apart and has no NUL.
pub(crate) fn pair(name: &str, value: &str) -> String {
    json(&[name, value])
}

async fn find(database: &Database, owner: &str, id: Uuid) -> Result<Option<StoredChat>, StoreError> {
    let query = sqlx::query("SELECT * FROM stored_chats WHERE id = $1 AND owner = $2");
    let row = query.bind(id.to_string()).bind(owner.to_owned()).fetch_optional(database.read()).await?;
    row.as_ref().map(read).transpose()
}

fn read(row: &AnyRow) -> Result<StoredChat, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: &str| StoreError::Row { table: "stored chat", id: id.clone(), reason: reason.to_owned() };
    Ok(StoredChat {
        id: Uuid::try_parse(&id).map_err(|_| bad("its id is no UUID"))?,
        created: row.try_get("created")?,
        owner: row.try_get("owner")?,
        user_key: row.try_get("user_key")?,
        model: row.try_get("model")?,
        metadata: parse(row, "metadata").map_err(|reason| bad(&reason))?.unwrap_or_default(),
        messages: parse(row, "messages").map_err(|reason| bad(&reason))?.unwrap_or_default(),
        body: parse(row, "body").map_err(|reason| bad(&reason))?.unwrap_or_default(),
    })
}
