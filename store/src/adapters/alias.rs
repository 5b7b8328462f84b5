//! Names that lead to adapters.

use serde_json::json;
use uuid::Uuid;

use super::{AdapterRefusal, AdapterState, Adapters, RegisteredAdapter, exists, row};
use crate::audit::Actor;
use crate::patience::patiently;
use crate::rollouts::{Rollout, moment};
use crate::statement::clean;
use crate::store::now_us;

fn is_served(adapter: &RegisteredAdapter) -> Result<(), AdapterRefusal> {
    match adapter.state {
        AdapterState::Serving => Ok(()),
        AdapterState::Revoked => Err(AdapterRefusal::Revoked(adapter.reference())),
        state => Err(AdapterRefusal::NotServed { adapter: adapter.reference(), state }),
    }
}

impl Adapters {
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

    /// Leads the alias of a rollout's public name from the adapter that it has led to since a moment to what the rollout promoted, as if that
    /// had been done when it was promoted. Returns whether the promotion and the alias were still as they were read; if not, nothing changed.
    pub async fn finish_promotion(
        &self,
        promoted: &Rollout,
        (from, since): (Uuid, i64),
        to: Uuid,
        actor: impl Into<Actor>,
    ) -> Result<bool, AdapterRefusal> {
        let actor = actor.into();
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let adapter = row::hold(&mut transaction, to).await?.ok_or(AdapterRefusal::Unknown(to))?;
            is_served(&adapter)?;
            // Another version: who is about to take the promotion back has seen the alias as it was, and looks again.
            let stands = "UPDATE rollouts SET version = version + 1 WHERE id = $1 AND version = $2 AND promoted IS NOT NULL";
            let stands = sqlx::query(stands).bind(promoted.id.to_string()).bind(promoted.version);
            if stands.execute(&mut *transaction).await?.rows_affected() == 0 {
                return Ok(false);
            }
            let name = clean(&promoted.model).into_owned();
            let led = "UPDATE adapter_aliases SET adapter_id = $3, updated = $4 \
                       WHERE base = $1 AND name = $2 AND adapter_id = $5 AND updated = $6";
            let led = sqlx::query(led)
                .bind(clean(&adapter.base).into_owned())
                .bind(name.clone())
                .bind(to.to_string())
                .bind(promoted.ended.unwrap_or(since))
                .bind(from.to_string())
                .bind(since);
            if led.execute(&mut *transaction).await?.rows_affected() == 0 {
                return Ok(false);
            }
            let detail = json!({"base": adapter.base, "adapter": adapter.reference(), "before": from});
            self.audit_subject(&mut transaction, &actor, "adapter.alias", &name, detail).await?;
            transaction.commit().await?;
            Ok(true)
        })
        .await
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
            is_served(&adapter)?;
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
        self.end_alias(base, name, false, &actor.into()).await
    }

    /// Removes an alias, and takes the adapter that it led to out of service where no other leads there. Returns the adapter.
    pub async fn withdraw_alias(&self, base: &str, name: &str, actor: impl Into<Actor>) -> Result<Uuid, AdapterRefusal> {
        self.end_alias(base, name, true, &actor.into()).await
    }

    async fn end_alias(&self, base: &str, name: &str, retire: bool, actor: &Actor) -> Result<Uuid, AdapterRefusal> {
        patiently(async {
            let (base, name) = (clean(base).into_owned(), clean(name).into_owned());
            let led = sqlx::query("SELECT base, name, adapter_id, updated FROM adapter_aliases WHERE base = $1 AND name = $2");
            let led = led.bind(base.clone()).bind(name.clone()).fetch_optional(self.store.database().read()).await?;
            let led = led.as_ref().map(row::alias).transpose()?.ok_or_else(|| AdapterRefusal::NoAlias(name.clone()))?;
            let mut transaction = self.store.database().write().begin().await?;
            // The adapter before the alias, as everybody does who leads one.
            let adapter = row::hold(&mut transaction, led.adapter).await?;
            let gone = sqlx::query(
                "DELETE FROM adapter_aliases WHERE base = $1 AND name = $2 RETURNING base, name, adapter_id, updated",
            )
            .bind(base.clone())
            .bind(name.clone())
            .fetch_optional(&mut *transaction)
            .await?;
            let gone = gone.as_ref().map(row::alias).transpose()?.ok_or_else(|| AdapterRefusal::NoAlias(name.clone()))?;
            let detail = json!({"base": base, "adapter_id": gone.adapter});
            self.audit_subject(&mut transaction, actor, "adapter.unalias", &name, detail).await?;
            if let Some(adapter) = adapter.filter(|adapter| retire && adapter.id == gone.adapter)
                && adapter.state == AdapterState::Serving
                && row::aliases_of(&mut transaction, adapter.id).await?.is_empty()
            {
                let adapter = row::set_state(&mut transaction, adapter.id, AdapterState::Retired, now_us()).await?;
                self.audit(&mut transaction, actor, "adapter.retire", &adapter, json!({"base": adapter.base})).await?;
            }
            transaction.commit().await?;
            Ok(gone.adapter)
        })
        .await
    }
}
