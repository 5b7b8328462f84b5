//! API keys: made here, shown once, kept as a hash.
//!
//! A secret is 32 random bytes. Nobody can try 2²⁵⁶ of them, so a plain fast hash keeps a stolen table useless; the slow, salted hashes
//! that passwords need would only make every request slower.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::Row;
use sqlx::any::AnyRow;
use uuid::Uuid;

use crate::Database;
use crate::audit::Act;
use crate::error::StoreError;
use crate::inferences::{json as text_of, parse};
use crate::key_terms::KeyTerms;
use crate::statement::clean;

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Ask the models.
    Chat,
    /// Send and read feedback.
    Feedback,
    /// Work on labeling queues.
    Label,
    /// Build datasets, train.
    Train,
    /// Look at what is governed: rollouts, loops, audit, lineage, adapters, datasets, jobs. Acts on nothing.
    Look,
    /// Everything.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Chat, Self::Feedback, Self::Label, Self::Train, Self::Look, Self::Admin];

    /// The word that the command line uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Feedback => "feedback",
            Self::Label => "label",
            Self::Train => "train",
            Self::Look => "look",
            Self::Admin => "admin",
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = StoreError;

    fn from_str(word: &str) -> Result<Self, StoreError> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == word).ok_or_else(|| StoreError::Scope(word.to_owned()))
    }
}

/// A key, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ApiKey {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// The person's or application's.
    pub name: String,
    /// How the secret begins, to tell keys apart.
    pub prefix: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// When it was revoked, in microseconds since 1970.
    pub revoked: Option<i64>,
    /// When it ends by itself, in microseconds since 1970.
    pub expires: Option<i64>,
    /// Models, limits, urgency.
    pub terms: KeyTerms,
}

impl ApiKey {
    /// Whether it has ended by itself at `now`, in microseconds since 1970.
    pub fn has_expired(&self, now: i64) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    /// Whether it may do this; `Admin` may do everything.
    pub fn allows(&self, scope: Scope) -> bool {
        self.revoked.is_none() && (self.scopes.contains(&scope) || self.scopes.contains(&Scope::Admin))
    }
}

/// `tm-` and 43 digits and letters, from 32 random bytes.
pub(crate) fn secret_of(random: [u8; 32]) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut number = random;
    // 62⁴³ > 2²⁵⁶: long division by 62, most significant byte first.
    let mut digits = [0u8; 43];
    for digit in digits.iter_mut().rev() {
        let mut remainder = 0u32;
        for byte in &mut number {
            let value = remainder * 256 + u32::from(*byte);
            *byte = (value / 62) as u8;
            remainder = value % 62;
        }
        *digit = DIGITS[remainder as usize];
    }
    let mut secret = String::with_capacity(46);
    secret.push_str("tm-");
    secret.extend(digits.iter().map(|digit| char::from(*digit)));
    secret
}

/// What is kept of a secret.
pub(crate) fn hash_of(secret: &str) -> String {
    blake3::hash(secret.as_bytes()).to_hex().to_string()
}

/// What the audit tells of a key beside its name.
fn granted(key: &ApiKey) -> Value {
    json!({"id": key.id, "scopes": key.scopes, "expires": key.expires, "terms": key.terms})
}

pub(crate) async fn insert(database: &Database, key: &ApiKey, secret: &str, act: Act) -> Result<(), StoreError> {
    let mut transaction = database.write().begin().await?;
    let text = "INSERT INTO api_keys (id, created, name, prefix, hash, scopes, expires, terms) \
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING";
    let made = sqlx::query(text)
        .bind(key.id.to_string())
        .bind(key.created)
        .bind(clean(&key.name).into_owned())
        .bind(key.prefix.clone())
        .bind(hash_of(secret))
        .bind(text_of(&key.scopes))
        .bind(key.expires)
        .bind(text_of(&key.terms))
        .execute(&mut *transaction)
        .await?;
    if made.rows_affected() == 0 {
        return Err(StoreError::KeyName(key.name.clone()));
    }
    act.to(&key.name).with(granted(key)).write(&mut transaction).await?;
    transaction.commit().await?;
    Ok(())
}

/// Changes scopes, end and terms of the key of this id or name that is in use.
pub(crate) async fn change(
    database: &Database,
    id_or_name: &str,
    change: impl FnOnce(&mut ApiKey) + Send,
    act: Act,
) -> Result<Option<ApiKey>, StoreError> {
    let mut transaction = database.write().begin().await?;
    let text = "SELECT * FROM api_keys WHERE revoked IS NULL AND (id = $1 OR name = $1)";
    let found = sqlx::query(text).bind(clean(id_or_name).into_owned()).fetch_optional(&mut *transaction).await?;
    let Some(mut key) = found.as_ref().map(read).transpose()? else { return Ok(None) };
    let before = granted(&key);
    change(&mut key);
    let row = sqlx::query("UPDATE api_keys SET scopes = $2, expires = $3, terms = $4 WHERE id = $1 RETURNING *")
        .bind(key.id.to_string())
        .bind(text_of(&key.scopes))
        .bind(key.expires)
        .bind(text_of(&key.terms))
        .fetch_one(&mut *transaction)
        .await?;
    let mut detail = granted(&key);
    detail["before"] = before;
    act.to(&key.name).with(detail).write(&mut transaction).await?;
    transaction.commit().await?;
    Ok(Some(read(&row)?))
}

/// Gives the key of this id or name another secret; the one it had works until `overlap_ends`. Earlier ones that still work keep
/// their end, or get this one if it comes sooner.
pub(crate) async fn rotate(
    database: &Database,
    id_or_name: &str,
    secret: &str,
    now: i64,
    overlap_ends: i64,
    act: Act,
) -> Result<Option<ApiKey>, StoreError> {
    let mut transaction = database.write().begin().await?;
    let text = "SELECT id, hash FROM api_keys WHERE revoked IS NULL AND (id = $1 OR name = $1)";
    let found: Option<(String, String)> =
        sqlx::query_as(text).bind(clean(id_or_name).into_owned()).fetch_optional(&mut *transaction).await?;
    let Some((id, old)) = found else { return Ok(None) };
    sqlx::query("UPDATE key_secrets SET expires = $2 WHERE key_id = $1 AND expires > $2")
        .bind(id.clone())
        .bind(overlap_ends)
        .execute(&mut *transaction)
        .await?;
    sqlx::query("DELETE FROM key_secrets WHERE expires <= $1").bind(now).execute(&mut *transaction).await?;
    sqlx::query("INSERT INTO key_secrets (hash, key_id, expires) VALUES ($1, $2, $3)")
        .bind(old.clone())
        .bind(id.clone())
        .bind(overlap_ends)
        .execute(&mut *transaction)
        .await?;
    // Of two rotations at once the later finds the hash changed and makes nothing.
    let row = sqlx::query("UPDATE api_keys SET hash = $3, prefix = $4 WHERE id = $1 AND hash = $2 RETURNING *")
        .bind(id)
        .bind(old)
        .bind(hash_of(secret))
        .bind(secret[..8].to_owned())
        .fetch_optional(&mut *transaction)
        .await?;
    let Some(row) = row else { return Ok(None) };
    let key = read(&row)?;
    let detail = json!({"id": key.id, "overlap_ends": overlap_ends});
    act.to(&key.name).with(detail).write(&mut transaction).await?;
    transaction.commit().await?;
    Ok(Some(key))
}

pub(crate) async fn list(database: &Database) -> Result<Vec<ApiKey>, StoreError> {
    let rows = sqlx::query("SELECT * FROM api_keys ORDER BY id").fetch_all(database.read()).await?;
    rows.iter().map(read).collect()
}

pub(crate) async fn revoke(database: &Database, id_or_name: &str, now: i64, act: Act) -> Result<Option<ApiKey>, StoreError> {
    let mut transaction = database.write().begin().await?;
    let text = "UPDATE api_keys SET revoked = $2 WHERE revoked IS NULL AND (id = $1 OR name = $1) RETURNING *";
    let row = sqlx::query(text).bind(clean(id_or_name).into_owned()).bind(now).fetch_optional(&mut *transaction).await?;
    let Some(key) = row.as_ref().map(read).transpose()? else { return Ok(None) };
    act.to(&key.name).with(json!({"id": key.id})).write(&mut transaction).await?;
    transaction.commit().await?;
    Ok(Some(key))
}

/// The key with this secret; an older secret of a rotated key counts until its overlap is over, and shows as the key's end.
pub(crate) async fn find(database: &Database, hash: &str, now: i64) -> Result<Option<ApiKey>, StoreError> {
    let text = "SELECT * FROM api_keys WHERE hash = $1 AND revoked IS NULL";
    let current = sqlx::query(text).bind(hash.to_owned()).fetch_optional(database.read()).await?;
    if let Some(row) = current {
        return Ok(Some(read(&row)?));
    }
    let text = "SELECT api_keys.*, key_secrets.expires AS overlap_ends FROM key_secrets JOIN api_keys ON api_keys.id = key_secrets.key_id \
                WHERE key_secrets.hash = $1 AND key_secrets.expires > $2 AND api_keys.revoked IS NULL";
    let query = sqlx::query(text).bind(hash.to_owned()).bind(now);
    let Some(row) = query.fetch_optional(database.read()).await? else { return Ok(None) };
    let mut key = read(&row)?;
    let overlap_ends: i64 = row.try_get("overlap_ends")?;
    key.expires = Some(key.expires.map_or(overlap_ends, |expires| expires.min(overlap_ends)));
    Ok(Some(key))
}

pub(crate) async fn find_by_id(database: &Database, id: &str) -> Result<Option<ApiKey>, StoreError> {
    let text = "SELECT * FROM api_keys WHERE id = $1 AND revoked IS NULL";
    sqlx::query(text).bind(id.to_owned()).fetch_optional(database.read()).await?.as_ref().map(read).transpose()
}

pub(crate) async fn any(database: &Database) -> Result<bool, StoreError> {
    Ok(sqlx::query("SELECT 1 FROM api_keys LIMIT 1").fetch_optional(database.read()).await?.is_some())
}

fn read(row: &AnyRow) -> Result<ApiKey, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: &str| StoreError::Row { table: "api_key", id: id.clone(), reason: reason.to_owned() };
    Ok(ApiKey {
        id: Uuid::try_parse(&id).map_err(|_| bad("its id is no UUID"))?,
        created: row.try_get("created")?,
        name: row.try_get("name")?,
        prefix: row.try_get("prefix")?,
        scopes: parse(row, "scopes").map_err(|reason| bad(&reason))?.unwrap_or_default(),
        revoked: row.try_get("revoked")?,
        expires: row.try_get("expires")?,
        terms: parse(row, "terms").map_err(|reason| bad(&reason))?.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_holds_all_of_its_random_bits() {
        assert_eq!(secret_of([0; 32]), format!("tm-{}", "0".repeat(43)));
        let mut one = [0; 32];
        one[31] = 61;
        assert_eq!(secret_of(one), format!("tm-{}z", "0".repeat(42)));
        one[30] = 1; // 256 + 61 = 5 × 62 + 7
        assert_eq!(secret_of(one), format!("tm-{}57", "0".repeat(41)));
        // 2²⁵⁶ - 1 needs every digit and does not overflow them.
        assert_ne!(secret_of([255; 32]).as_bytes()[3], b'0');
    }

    #[test]
    fn admin_may_do_everything_and_a_revoked_key_nothing() {
        let key = |scopes: &[Scope], revoked| ApiKey {
            id: Uuid::nil(),
            created: 0,
            name: "a".into(),
            prefix: "tm-".into(),
            scopes: scopes.to_vec(),
            revoked,
            expires: None,
            terms: KeyTerms::default(),
        };
        for scope in Scope::ALL {
            assert!(key(&[Scope::Admin], None).allows(scope));
            assert_eq!(key(&[Scope::Label], None).allows(scope), scope == Scope::Label);
            assert!(!key(&[Scope::Admin], Some(1)).allows(scope));
            assert_eq!(scope.as_str().parse::<Scope>().unwrap(), scope);
        }
        assert!("root".parse::<Scope>().is_err());
    }
}
