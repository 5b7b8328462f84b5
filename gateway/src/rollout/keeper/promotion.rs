//! What a promotion does to the alias that the public name may be, and the way back from it.

use crate::rollout::decision::{AliasMove, State, Status};
use crate::rollout::keeper::{Keeper, KeeperError};
use crate::rollout::spec::Spec;
use crate::rollout::table::{self, Tables, Variant};
use std::collections::HashMap;
use std::sync::PoisonError;
use tidemill_rlhf::registry::RegistryError;
use tidemill_store::{Actor, AdapterRefusal, Alias, Rollout, StoreError};
use uuid::Uuid;

/// How long a promotion has been seen without its alias before nobody can be on the way to lead it, or to take the promotion back, any more.
/// Microseconds.
const ABANDONED: i64 = 10_000_000;

/// Promotions by what was seen of their aliases: since when they are not led, or that somebody has led them. Microseconds since 1970.
pub(super) type Followed = HashMap<Uuid, Option<i64>>;

impl Keeper {
    /// Where the public name is an alias and the promoted variant a registered adapter as it is, the alias is to lead there: then
    /// everything that knows the name by the registry agrees.
    pub(super) async fn alias_move(&self, spec: &Spec, status: Status) -> Result<Option<AliasMove>, StoreError> {
        let Status::Promoted { arm } = status else { return Ok(None) };
        let Some(variant) = spec.arms.get(arm).map(Variant::of) else { return Ok(None) };
        let registry = self.0.adapters.registry();
        let plain = variant.prompt_prefix.is_none() && variant.defaults.is_empty();
        let aliases = registry.aliases().await?;
        let Some(alias) = aliases.iter().find(|alias| alias.name == spec.model).filter(|_| plain) else { return Ok(None) };
        let prefix = format!("{}:", alias.base);
        let reference = variant.model.strip_prefix(&prefix).unwrap_or(&variant.model);
        match registry.get(reference).await {
            Ok(adapter) if adapter.base == alias.base => {
                Ok(Some(AliasMove { from: alias.adapter, since: alias.updated, to: adapter.id }))
            }
            // The variant is no adapter, or of another base: the rollout's row says what the name serves.
            _ => Ok(None),
        }
    }

    /// Leads the public name's alias to what was promoted.
    pub(super) async fn lead_alias(&self, model: &str, moved: AliasMove) {
        let named = self.0.adapters.registry().acting_as("rollouts").alias(model, &moved.to.to_string()).await;
        match named {
            Ok(_) => {
                if let Err(error) = self.0.adapters.follow().await {
                    tracing::warn!(%error, "a change of adapters is not in force yet");
                }
            }
            // The rollout's row says what the name serves.
            Err(error) => tracing::info!(alias = model, %error, "the alias stays where it is"),
        }
    }

    /// Leads aliases to what was promoted where a server wrote the promotion and was killed before it did. For the leader, again and again:
    /// only what stays undone for ten seconds is done here, as another server may be about to.
    pub async fn finish_promotions(&self, now: i64) -> Result<(), StoreError> {
        let promoted = self.0.rollouts.promotions().await?;
        let unseen: Vec<(&Rollout, AliasMove)> = {
            let mut followed = self.0.followed.lock().unwrap_or_else(PoisonError::into_inner);
            followed.retain(|id, _| promoted.iter().any(|row| row.id == *id));
            let waits = |row: &&Rollout| followed.get(&row.id).is_none_or(Option::is_some);
            let moved = |row| Some((row, table::read(row).ok()?.1.alias?));
            promoted.iter().filter(waits).filter_map(moved).collect()
        };
        if unseen.is_empty() {
            return Ok(());
        }
        let aliases = self.0.adapters.registry().aliases().await?;
        for (row, moved) in unseen {
            let as_before = |alias: &Alias| (&alias.name, alias.adapter, alias.updated) == (&row.model, moved.from, moved.since);
            let undone = aliases.iter().any(as_before);
            let since = {
                let mut followed = self.0.followed.lock().unwrap_or_else(PoisonError::into_inner);
                *followed.entry(row.id).and_modify(|since| *since = since.filter(|_| undone)).or_insert(undone.then_some(now))
            };
            if since.is_none_or(|since| now.saturating_sub(since) < ABANDONED) {
                continue;
            }
            let registry = self.0.adapters.registry().acting_as("rollouts");
            match registry.finish_promotion(row, (moved.from, moved.since), moved.to).await {
                // The next look sees what has changed.
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!(rollout = row.name, alias = row.model, "a promotion that was broken off is finished");
                    self.0.adapters.follow().await?;
                }
                Err(RegistryError::Store(error) | RegistryError::Refused(AdapterRefusal::Store(error))) => return Err(error),
                Err(error) => {
                    tracing::info!(alias = row.model, %error, "the alias stays where it is");
                    self.0.followed.lock().unwrap_or_else(PoisonError::into_inner).insert(row.id, None);
                }
            }
        }
        Ok(())
    }

    /// Leads the public name's alias back to where it led before a promotion. Refused where something newer stands on the promotion, or
    /// where what was served before cannot answer any more. When this was done and the row is not written yet, doing it again does no harm.
    pub(super) async fn clear_way_back(&self, promoted: &Rollout, state: &State, by: &Actor) -> Result<(), KeeperError> {
        let model = &promoted.model;
        let built = |why: String| KeeperError::Built { rollout: promoted.name.clone(), why };
        if let Some(newer) = self.0.rollouts.standing_on(promoted.id).await? {
            let name = newer.name;
            return Err(built(match newer.ended {
                None => format!("`{name}` runs on `{model}` with what was promoted as its control; roll that back first"),
                Some(_) => format!("`{name}` was promoted on `{model}` since; roll that back first"),
            }));
        }
        let registry = self.0.adapters.registry();
        let mut aliases = registry.aliases().await?;
        let mut back = None;
        // An alias that was last led somewhere before the promotion has no say in what the name serves.
        let moved = |updated: i64| promoted.ended.is_none_or(|end| updated >= end);
        if let Some(alias) = aliases.iter_mut().find(|alias| alias.name == *model && moved(alias.updated)) {
            match state.alias {
                Some(moved) if alias.adapter == moved.to => {
                    (alias.adapter, alias.updated) = (moved.from, moved.since);
                    back = Some(moved);
                }
                Some(moved) if alias.adapter == moved.from => {}
                _ => {
                    let why =
                        format!("somebody has led the alias `{model}` elsewhere since; `tidemill adapter alias` leads it on");
                    return Err(built(why));
                }
            }
        }
        let before = self.0.rollouts.promotions_but(promoted.id).await?;
        let variant = Tables::new(&[], &before, &aliases, &[]).0.stable(model);
        if let Err(error) = self.0.models.find(Some(&variant.model)) {
            return Err(built(format!("`{}`, which was served before, cannot answer: {}", variant.name, error.message)));
        }
        if let Some(moved) = back {
            // What is not served any more is refused here.
            let led = registry.acting_as(by.clone()).alias_back(model, moved.from, moved.since).await;
            led.map_err(|error| built(format!("the alias `{model}` cannot be led back: {error}")))?;
            self.0.adapters.follow().await?;
        }
        Ok(())
    }
}
