//! What people and requests call an adapter.

use tidemill_store::{AdapterState, Alias, RegisteredAdapter};

use super::RegistryError;

/// `[BASE:]NAME[@GENERATION]`, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference<'a> {
    text: &'a str,
    /// Without the generation; an alias may be all of it.
    head: &'a str,
    pub base: Option<&'a str>,
    pub name: &'a str,
    pub generation: Option<&'a str>,
}

impl<'a> Reference<'a> {
    pub fn parse(text: &'a str) -> Self {
        let (head, generation) = match text.rsplit_once('@') {
            Some((head, generation)) => (head, Some(generation)),
            None => (text, None),
        };
        // Names of adapters hold no colon, those of base models may.
        let (base, name) = match head.rsplit_once(':') {
            Some((base, name)) => (Some(base), name),
            None => (None, head),
        };
        Self { text, head, base, name, generation }
    }

    /// Whether it could mean this alias.
    pub fn means(&self, alias: &Alias) -> bool {
        let of_base = self.head.strip_prefix(alias.base.as_str()).and_then(|rest| rest.strip_prefix(':'));
        self.head == alias.name || of_base == Some(&alias.name)
    }

    /// The one that is meant, of adapters that have the name, the newest first.
    pub fn choose(&self, mut named: Vec<RegisteredAdapter>) -> Result<RegisteredAdapter, RegistryError> {
        let digits = |adapter: &RegisteredAdapter| format!("{:016x}", adapter.generation);
        if let Some(generation) = self.generation {
            named.retain(|adapter| !generation.is_empty() && digits(adapter).starts_with(&generation.to_ascii_lowercase()));
        }
        let whole = |adapter: &RegisteredAdapter| format!("{}:{}", adapter.base, adapter.reference());
        let mut bases: Vec<&str> = named.iter().map(|adapter| adapter.base.as_str()).collect();
        bases.dedup();
        if bases.iter().any(|base| *base != bases[0]) || (self.generation.is_some() && named.len() > 1) {
            let meanings = named.iter().map(whole).collect();
            return Err(RegistryError::Ambiguous { reference: self.text.to_owned(), meanings });
        }
        let serving = named.iter().enumerate().filter(|(_, adapter)| adapter.state == AdapterState::Serving);
        let best = serving.max_by_key(|(_, adapter)| adapter.served).map_or(0, |(index, _)| index);
        if best < named.len() { Ok(named.swap_remove(best)) } else { Err(RegistryError::NotFound(self.text.to_owned())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(base: &str, generation: u64, served: Option<i64>) -> RegisteredAdapter {
        let state = if served.is_some() { AdapterState::Serving } else { AdapterState::Candidate };
        RegisteredAdapter { name: "a".into(), base: base.into(), generation, served, state, ..Default::default() }
    }

    #[test]
    fn a_reference_is_taken_apart_from_its_ends() {
        let parts = |text| {
            let Reference { base, name, generation, .. } = Reference::parse(text);
            (base, name, generation)
        };
        assert_eq!(parts("a"), (None, "a", None));
        assert_eq!(parts("a@12"), (None, "a", Some("12")));
        assert_eq!(parts("org/b:x:a@12"), (Some("org/b:x"), "a", Some("12")));
        let alias =
            |base: &str, name: &str| Alias { base: base.into(), name: name.into(), adapter: Default::default(), updated: 0 };
        assert!(Reference::parse("ft:b:x:1").means(&alias("b", "ft:b:x:1")));
        assert!(Reference::parse("b:champion").means(&alias("b", "champion")));
        assert!(!Reference::parse("c:champion").means(&alias("b", "champion")));
    }

    #[test]
    fn a_name_means_the_one_that_is_served_and_else_the_newest() {
        let newest_first = vec![adapter("b", 3, None), adapter("b", 2, Some(9)), adapter("b", 1, Some(5))];
        let choose =
            |text: &str, named: &[RegisteredAdapter]| Reference::parse(text).choose(named.to_vec()).map(|a| a.generation);
        assert_eq!(choose("a", &newest_first).unwrap(), 2);
        assert_eq!(choose("a", &newest_first[..1]).unwrap(), 3);
        assert_eq!(choose("a@0000000000000001", &newest_first).unwrap(), 1);
        assert!(matches!(choose("a@000", &newest_first), Err(RegistryError::Ambiguous { meanings, .. }) if meanings.len() == 3));
        for nothing in ["a@1", "a@", "a@x"] {
            assert!(matches!(choose(nothing, &newest_first), Err(RegistryError::NotFound(text)) if text == nothing));
        }
        let of_two = [adapter("b", 3, None), adapter("c", 3, Some(1))];
        assert!(
            matches!(choose("a", &of_two), Err(RegistryError::Ambiguous { meanings, .. }) if meanings[1] == "c:a@0000000000000003")
        );
    }
}
