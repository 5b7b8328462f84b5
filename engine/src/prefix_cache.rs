//! Names of computed blocks.
//!
//! A full block is named by a blake3 hash over (parent's name, its token ids); the first block's parent is a root over (adapter
//! generation, cache salt). All 256 bits are kept: with a short hash a collision would show one tenant another's text.

use crate::request::AdapterGeneration;

/// Name of a full block: fixes every token up to its end, the weights, and the salt.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

impl std::fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockHash({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}

impl BlockHash {
    /// Parent of all first blocks of one adapter generation and salt. No salt and the empty salt are different.
    pub fn root(adapter: AdapterGeneration, salt: Option<&str>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("tidemill 2026 prefix cache root");
        hasher.update(&adapter.0.to_le_bytes());
        if let Some(salt) = salt {
            hasher.update(&[1]);
            hasher.update(salt.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// Name of the block that holds `tokens` after this one.
    pub fn child(&self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_depends_on_tokens_order_parent_adapter_and_salt() {
        let base = BlockHash::root(AdapterGeneration(0), None);
        let names = [
            base.child(&[1, 2, 3]),
            base.child(&[3, 2, 1]),
            base.child(&[1, 2]),
            base.child(&[1, 2]).child(&[3]),
            BlockHash::root(AdapterGeneration(1), None).child(&[1, 2, 3]),
            BlockHash::root(AdapterGeneration(0), Some("")).child(&[1, 2, 3]),
            BlockHash::root(AdapterGeneration(0), Some("tenant")).child(&[1, 2, 3]),
        ];
        for (i, a) in names.iter().enumerate() {
            for b in &names[i + 1..] {
                assert_ne!(a, b);
            }
        }
        assert_eq!(names[0], BlockHash::root(AdapterGeneration(0), None).child(&[1, 2, 3]));
    }
}
