//! What makes an act the same act when it is done again.

use uuid::Uuid;

use super::state::Word;

/// A loop, its cycle and the state: the name of the one act that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The loop.
    pub name: String,
    /// The cycle.
    pub cycle: u64,
    /// The state.
    pub state: Word,
}

impl Key {
    /// An id that the same key always gives, for the `part` of what the act makes. It sorts by `at`, microseconds since 1970, as others do.
    pub fn id(&self, part: &str, at: i64) -> Uuid {
        let hash = blake3::hash(format!("{self}\0{part}").as_bytes());
        let mut random = [0; 10];
        random.copy_from_slice(&hash.as_bytes()[..10]);
        let millis = u64::try_from(at / 1000).unwrap_or_default();
        uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid()
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "loop/{}/{}/{}", self.name, self.cycle, self.state.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_act_has_the_same_ids_and_another_has_others() {
        let key = Key { name: "shorter".into(), cycle: 3, state: Word::Training };
        assert_eq!(key.to_string(), "loop/shorter/3/training");
        let at = 1_767_225_600_000_000;
        assert_eq!(key.id("job", at), key.clone().id("job", at));
        let others = [
            key.id("file", at),
            Key { cycle: 4, ..key.clone() }.id("job", at),
            Key { state: Word::Canary, ..key.clone() }.id("job", at),
            Key { name: "short".into(), ..key.clone() }.id("job", at),
        ];
        assert!(others.iter().all(|other| *other != key.id("job", at)));
        assert_eq!(key.id("job", at).get_version_num(), 7);
        assert!(key.id("job", at).to_string() < key.id("job", at + 1000).to_string());
    }
}
