//! What requests call the registered adapters of a base model.

use std::collections::{BTreeMap, HashMap};

use tidemill_store::ServedAdapter;
use uuid::Uuid;

/// Names and what they lead to; a value that is replaced as a whole, so that a name never leads nowhere while it is moved. `T` is what
/// keeps an adapter in the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterNames<T>(BTreeMap<String, Named<T>>);

/// What a name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named<T> {
    /// The adapter's id.
    pub id: Uuid,
    /// The adapter in the engine.
    pub adapter: T,
    /// Shown in lists; an adapter's generation can be asked for by name and is not.
    pub listed: bool,
}

impl<T> Default for AdapterNames<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Clone> AdapterNames<T> {
    /// Names of those of `served` that are in the engine: the name (of several generations the one that was put into service last),
    /// `NAME@GENERATION`, and aliases. Where the one that was put into service last is not in the engine, the name leads where it led
    /// `before`, if that is. An alias whose adapter is not in the engine does so, too, if that is still served.
    pub fn new(served: &[&ServedAdapter], loaded: &HashMap<Uuid, T>, before: &Self) -> Self {
        let mut names = BTreeMap::new();
        let named = |id: Uuid, listed| Some(Named { id, adapter: loaded.get(&id)?.clone(), listed });
        for adapter in served {
            if let Some(own) = named(adapter.id, true) {
                names.insert(format!("{}@{:016x}", adapter.name, adapter.generation), Named { listed: false, ..own.clone() });
                names.insert(adapter.name.clone(), own);
            } else if let Some(was) = before.id_of(&adapter.name).and_then(|id| named(id, true)) {
                names.insert(adapter.name.clone(), was);
            }
        }
        for (adapter, alias) in served.iter().flat_map(|adapter| adapter.aliases.iter().map(move |alias| (adapter, alias))) {
            let was = || {
                let id = before.id_of(alias)?;
                named(served.iter().find(|adapter| adapter.id == id)?.id, true)
            };
            if let Some(meant) = named(adapter.id, true).or_else(was) {
                names.insert(alias.clone(), meant);
            }
        }
        Self(names)
    }

    /// The id of the adapter that a name leads to.
    pub fn id_of(&self, name: &str) -> Option<Uuid> {
        self.0.get(name).map(|named| named.id)
    }

    /// What a name leads to.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0.get(name).map(|named| &named.adapter)
    }

    /// The names that lists show, ascending.
    pub fn listed(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().filter(|(_, named)| named.listed).map(|(name, named)| (name.as_str(), &named.adapter))
    }

    /// Whether another one's names lead to the same adapters.
    pub fn same_as(&self, other: &Self) -> bool {
        let ids = |names: &Self| names.0.iter().map(|(name, named)| (name.clone(), named.id)).collect::<Vec<_>>();
        ids(self) == ids(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(id: u128, name: &str, aliases: &[&str]) -> ServedAdapter {
        ServedAdapter {
            base_hash: None,
            id: Uuid::from_u128(id),
            created: 0,
            name: name.into(),
            generation: id as u64,
            base: "b".into(),
            location: String::new(),
            aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        }
    }

    fn names(served: &[ServedAdapter], loaded: &[u128], before: &AdapterNames<u128>) -> AdapterNames<u128> {
        let loaded = loaded.iter().map(|id| (Uuid::from_u128(*id), *id)).collect();
        AdapterNames::new(&served.iter().collect::<Vec<_>>(), &loaded, before)
    }

    #[test]
    fn a_name_leads_to_the_generation_that_was_put_into_service_last() {
        let all = [served(1, "a", &["champion"]), served(2, "a", &[])];
        let found = names(&all, &[1, 2], &AdapterNames::default());
        assert_eq!((found.get("a"), found.get("champion")), (Some(&2), Some(&1)));
        assert_eq!((found.get("a@0000000000000001"), found.get("a@0000000000000002")), (Some(&1), Some(&2)));
        assert_eq!(found.get("b"), None);
        assert_eq!(found.listed().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "champion"]);
        assert!(found.same_as(&names(&all, &[1, 2], &found)) && !found.same_as(&names(&all, &[2], &AdapterNames::default())));
    }

    #[test]
    fn a_name_stays_until_its_new_generation_is_there_for_as_long_as_the_old_one_is() {
        let first = names(&[served(1, "a", &[])], &[1], &AdapterNames::default());
        let replaced = [served(2, "a", &[])];
        let waiting = names(&replaced, &[1], &first);
        assert_eq!((waiting.get("a"), waiting.get("a@0000000000000001")), (Some(&1), None));
        assert_eq!(names(&replaced, &[1, 2], &waiting).get("a"), Some(&2));
        assert_eq!(names(&replaced, &[], &waiting).get("a"), None);
    }

    #[test]
    fn an_alias_stays_until_its_new_adapter_is_there_but_never_on_one_that_is_not_served() {
        let first = names(&[served(1, "a", &["champion"])], &[1], &AdapterNames::default());
        let moved = [served(1, "a", &[]), served(2, "b", &["champion"])];
        let waiting = names(&moved, &[1], &first);
        assert_eq!((waiting.get("champion"), waiting.get("b")), (Some(&1), None));
        assert_eq!(names(&moved, &[1, 2], &waiting).get("champion"), Some(&2));
        // The first was revoked meanwhile; the engine may still have it.
        assert_eq!(names(&moved[1..], &[1], &waiting).get("champion"), None);
    }
}
