//! Ids that every replica recognises as issued by one of them, without asking the database.
//!
//! A UUIDv7 (RFC 9562): 48 bits of milliseconds; 12 bits of the fraction of a millisecond, so that ids sort by time and new rows land
//! at the end of an index; 30 random bits; and 32 bits of keyed BLAKE3 over the rest. An id made up elsewhere passes once in 4 × 10⁹.

use std::time::Duration;

use sqlx::AnyConnection;
use uuid::Uuid;

/// The secret that all replicas of one database share.
#[derive(Clone)]
pub(crate) struct IdKey([u8; 32]);

impl IdKey {
    #[cfg(test)]
    pub(crate) fn new(secret: [u8; 32]) -> Self {
        Self(secret)
    }

    /// As the database keeps it for all replicas.
    pub(crate) async fn load(sql: &mut AnyConnection) -> Result<Self, sqlx::Error> {
        let (kept,): (String,) = sqlx::query_as("SELECT value FROM meta WHERE name = 'id_key'").fetch_one(sql).await?;
        let hash = blake3::Hash::from_hex(&kept).map_err(|error| sqlx::Error::Decode(error.to_string().into()))?;
        Ok(Self(*hash.as_bytes()))
    }

    /// The id of a moment since 1970, told apart from others of the same moment by `random`.
    pub(crate) fn make(&self, since_1970: Duration, random: u32) -> Uuid {
        let millis = since_1970.as_millis() as u64;
        let fraction = u64::from(since_1970.subsec_nanos() % 1_000_000) * 4096 / 1_000_000;
        let high = (millis << 16) | 0x7000 | fraction;
        // The variant's two bits, then 30 random bits, then the check.
        let middle = 0x8000_0000 | (random >> 2);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&high.to_be_bytes());
        bytes[8..12].copy_from_slice(&middle.to_be_bytes());
        let check = self.check(&bytes);
        bytes[12..].copy_from_slice(&check);
        Uuid::from_bytes(bytes)
    }

    /// Whether `make` of this key made it.
    pub(crate) fn made(&self, id: Uuid) -> bool {
        let bytes = id.as_bytes();
        id.get_version_num() == 7 && bytes[12..] == self.check(bytes)
    }

    /// A name that says nothing to who does not have the key: for audit rows about people.
    pub(crate) fn pseudonym(&self, name: &str) -> String {
        let mut hash = blake3::Hasher::new_keyed(&self.0);
        hash.update(b"person\0").update(name.as_bytes());
        hash.finalize().to_hex()[..32].to_owned()
    }

    /// A number for a key of an assignment, the same on every replica, that says nothing to who does not have the secret.
    pub(crate) fn unit(&self, key: &str) -> i64 {
        let mut hash = blake3::Hasher::new_keyed(&self.0);
        hash.update(b"unit\0").update(key.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finalize().as_bytes()[..8]);
        i64::from_le_bytes(first)
    }

    fn check(&self, bytes: &[u8; 16]) -> [u8; 4] {
        let hash = blake3::keyed_hash(&self.0, &bytes[..12]);
        let mut check = [0; 4];
        check.copy_from_slice(&hash.as_bytes()[..4]);
        check
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_issued_id_is_recognised_and_any_other_bit_pattern_is_not(
            secret: [u8; 32], nanos in 0u64..4_000_000_000_000_000_000, random: u32, bit in 0usize..128,
        ) {
            let key = IdKey::new(secret);
            let id = key.make(Duration::from_nanos(nanos), random);
            prop_assert!(key.made(id));
            prop_assert_eq!(id.get_version_num(), 7);
            prop_assert_eq!(id.get_variant(), uuid::Variant::RFC4122);
            prop_assert!(!key.made(Uuid::from_u128(id.as_u128() ^ (1 << bit))));
            let mut other = secret;
            other[0] ^= 1;
            prop_assert!(!IdKey::new(other).made(id));
        }

        #[test]
        fn ids_sort_by_time(nanos in 0u64..4_000_000_000_000_000_000, step in 1_000u64..1_000_000_000, a: u32, b: u32) {
            let key = IdKey::new([7; 32]);
            let (early, late) = (key.make(Duration::from_nanos(nanos), a), key.make(Duration::from_nanos(nanos + step), b));
            prop_assert!(early < late);
            prop_assert!(early.to_string() < late.to_string());
        }
    }
}
