//! The hash that GrowthBook's SDKs use, so that theirs and ours put a unit into the same bucket.
//!
//! The specification is GrowthBook's "Build your own SDK", functions `hash` and `inNamespace`. Strings are hashed by UTF-16 code units, as JavaScript's `charCodeAt` gives them.

use serde::{Deserialize, Serialize};

const OFFSET: u32 = 0x811c_9dc5;
const PRIME: u32 = 0x0100_0193;
/// Buckets of version 2.
const FINE: u32 = 10_000;
/// Buckets of version 1.
const COARSE: u32 = 1_000;

/// Which of GrowthBook's hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashVersion {
    /// Biased: neighbouring experiments see related buckets. For old data and namespaces.
    V1,
    /// For everything else.
    V2,
}

/// FNV-1a of 32 bits over UTF-16 code units; from `state`, so that what is hashed first can be hashed once.
fn absorb(state: u32, text: &str) -> u32 {
    text.encode_utf16().fold(state, |hash, unit| (hash ^ u32::from(unit)).wrapping_mul(PRIME))
}

/// FNV-1a of a number's decimal digits.
fn absorb_decimal(number: u32) -> u32 {
    // 2³² has ten digits.
    let (mut digits, mut first, mut rest) = ([0u8; 10], 10, number);
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    digits[first..].iter().fold(OFFSET, |hash, digit| (hash ^ u32::from(*digit)).wrapping_mul(PRIME))
}

/// A number in [0, 1) that is the same for the same seed and value everywhere.
pub fn bucket(seed: &str, value: &str, version: HashVersion) -> f64 {
    match version {
        HashVersion::V1 => f64::from(absorb(absorb(OFFSET, value), seed) % COARSE) / f64::from(COARSE),
        HashVersion::V2 => Salt::new(seed).bucket(value),
    }
}

/// A seed of version 2 that was hashed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salt(u32);

impl Salt {
    /// The seed comes first, so its part is computed once.
    pub fn new(seed: &str) -> Self {
        Self(absorb(OFFSET, seed))
    }

    /// As [`bucket`].
    pub fn bucket(self, value: &str) -> f64 {
        f64::from(self.place(value)) / f64::from(FINE)
    }

    /// The bucket's number, below 10,000.
    pub fn place(self, value: &str) -> u32 {
        absorb_decimal(absorb(self.0, value)) % FINE
    }
}

/// The number of the first bucket that does not lie below a share. A share's last digit decides nothing, since a database may
/// lose it and all machines must agree.
pub fn edge(share: f64) -> u32 {
    let fine = f64::from(FINE);
    // Clamped to 0..10,000, and 0 for NaN.
    (share * fine - 1e-6).ceil().clamp(0.0, fine) as u32
}

/// Part of a line from 0 to 1, its end excluded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// Where it begins.
    pub from: f64,
    /// Where it ends.
    pub to: f64,
}

impl Range {
    /// Whether a bucket lies in it.
    pub fn holds(self, bucket: f64) -> bool {
        bucket >= self.from && bucket < self.to
    }

    /// Whether the two have a part in common.
    pub fn meets(self, other: Self) -> bool {
        self.from < other.to && other.from < self.to
    }
}

/// Whether a unit has a place in this part of a namespace: experiments in parts that do not meet never share a unit.
pub fn in_namespace(value: &str, namespace: &str, part: Range) -> bool {
    part.holds(bucket(&format!("__{namespace}"), value, HashVersion::V1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The spot values of GrowthBook's test suite for SDKs (`cases.json`, "hash").
    #[test]
    fn buckets_are_those_of_the_other_sdks() {
        for (seed, value, version, expected) in [
            ("", "a", HashVersion::V1, 0.22),
            ("", "b", HashVersion::V1, 0.077),
            ("b", "a", HashVersion::V1, 0.946),
            ("ef", "d", HashVersion::V1, 0.652),
            ("asdf", "8952klfjas09ujk", HashVersion::V1, 0.549),
            ("", "123", HashVersion::V1, 0.011),
            ("", "___)((*\":&", HashVersion::V1, 0.563),
            ("seed", "a", HashVersion::V2, 0.0505),
            ("seed", "b", HashVersion::V2, 0.2696),
            ("foo", "ab", HashVersion::V2, 0.2575),
            ("foo", "def", HashVersion::V2, 0.2019),
            ("89123klj", "8952klfjas09ujkasdf", HashVersion::V2, 0.124),
            ("90850943850283058242805", "123", HashVersion::V2, 0.7516),
            ("()**(%$##$%#$#", "___)((*\":&", HashVersion::V2, 0.0128),
        ] {
            assert_eq!(bucket(seed, value, version), expected, "{seed} {value} {version:?}");
        }
    }

    #[test]
    fn an_edge_separates_buckets_as_comparing_them_with_the_share_would() {
        for share in [0.0, 0.0001, 0.05, 0.15, 1.0 / 3.0, 0.7, 0.99995, 1.0] {
            let below = (0..FINE).filter(|number| f64::from(*number) / f64::from(FINE) < share).count();
            assert_eq!(edge(share) as usize, below, "{share}");
            // A different last digit is the same share.
            assert_eq!(
                (edge(f64::from_bits(share.to_bits() + 1)), edge(share * (1.0 - f64::EPSILON))),
                (edge(share), edge(share))
            );
        }
        assert_eq!((edge(-1.0), edge(2.0), edge(f64::NAN)), (0, FINE, 0));
    }

    #[test]
    fn the_inner_hash_is_fnv_1a() {
        // Noll's reference values for FNV-1a of 32 bits.
        for (text, hash) in [("", 0x811c_9dc5), ("a", 0xe40c_292c), ("foobar", 0xbf9c_f968)] {
            assert_eq!(absorb(OFFSET, text), hash);
        }
        for number in [0u32, 7, 10, 4_294_967_295] {
            assert_eq!(absorb_decimal(number), absorb(OFFSET, &number.to_string()));
        }
    }

    #[test]
    fn letters_beyond_ascii_are_utf_16_units() {
        // By hand: é is one unit, 0xe9, and 😀 two, 0xd83d and 0xde00.
        let step = |hash: u32, unit: u32| (hash ^ unit).wrapping_mul(PRIME);
        assert_eq!(absorb(OFFSET, "é"), step(OFFSET, 0xe9));
        assert_eq!(absorb(OFFSET, "😀"), step(step(OFFSET, 0xd83d), 0xde00));
        // What GrowthBook's JavaScript SDK 1.8.0 gives.
        for (value, first, second) in [("é😀", 0.032, 0.0156), ("日本語", 0.215, 0.4482), ("𝒳y", 0.453, 0.9671)] {
            assert_eq!(
                (bucket("seed", value, HashVersion::V1), bucket("seed", value, HashVersion::V2)),
                (first, second),
                "{value}"
            );
        }
    }

    /// `cases.json`, "inNamespace".
    #[test]
    fn namespaces_are_those_of_the_other_sdks() {
        let (low, high) = (Range { from: 0.0, to: 0.4 }, Range { from: 0.4, to: 1.0 });
        for (user, namespace, first) in [
            ("1", "namespace1", false),
            ("1", "namespace2", false),
            ("2", "namespace1", false),
            ("2", "namespace2", false),
            ("3", "namespace1", false),
            ("3", "namespace2", true),
            ("4", "namespace1", false),
            ("4", "namespace2", true),
        ] {
            assert_eq!(in_namespace(user, namespace, low), first, "{user} {namespace}");
            assert_eq!(in_namespace(user, namespace, high), !first, "{user} {namespace}");
        }
    }
}
