//! The tokens that a draw is confined to, which may still be worked out while the step that draws runs.

use std::sync::{Arc, OnceLock};

/// A set of token ids, promised: whoever needs it waits for the holder of the [`MaskPromise`]. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TokenMask(Arc<OnceLock<Vec<u32>>>);

/// The duty to say what a [`TokenMask`] holds. Dropped without a word, it says that no token is allowed, so nobody waits for ever.
#[derive(Debug)]
pub struct MaskPromise(Arc<OnceLock<Vec<u32>>>);

impl TokenMask {
    /// A set to be said later.
    pub fn promise() -> (MaskPromise, TokenMask) {
        let cell = Arc::new(OnceLock::new());
        (MaskPromise(Arc::clone(&cell)), TokenMask(cell))
    }

    /// A known set: bit `t % 32` of word `t / 32` allows token `t`; what is beyond the words is forbidden.
    pub fn known(words: Vec<u32>) -> TokenMask {
        TokenMask(Arc::new(OnceLock::from(words)))
    }

    /// The words, once they are known.
    pub fn wait(&self) -> &[u32] {
        self.0.wait()
    }

    /// Whether waiting takes no time.
    pub fn is_known(&self) -> bool {
        self.0.get().is_some()
    }
}

impl PartialEq for TokenMask {
    /// Whether both are the same promise.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl MaskPromise {
    /// Says what is allowed; see [`TokenMask::known`].
    pub fn keep(self, words: Vec<u32>) {
        // Nobody else can have said it: there is one promise for a mask.
        let _ = self.0.set(words);
    }
}

impl Drop for MaskPromise {
    fn drop(&mut self) {
        // Does nothing where the promise was kept.
        let _ = self.0.set(Vec::new());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_promise_allows_nothing() {
        let (promise, mask) = TokenMask::promise();
        assert!(!mask.is_known());
        drop(promise);
        assert!(mask.wait().is_empty());
    }

    #[test]
    fn whoever_needs_a_mask_waits_for_it() {
        let (promise, mask) = TokenMask::promise();
        let waiting = mask.clone();
        let waiter = std::thread::spawn(move || waiting.wait().to_vec());
        promise.keep(vec![5]);
        assert_eq!(waiter.join().unwrap(), [5]);
        assert_eq!(mask, mask.clone());
        assert_ne!(mask, TokenMask::known(vec![5]));
    }
}
