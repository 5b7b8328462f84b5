//! What tokens cost.

use std::collections::BTreeMap;
use tidemill_store::Money;

/// Billionths of a dollar per token, which is thousandths of a dollar per million tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Price {
    /// Of a prompt.
    pub input: i64,
    /// Of a prompt, found in the prefix cache.
    pub cached_input: i64,
    /// Generated.
    pub output: i64,
}

impl Price {
    /// Of a prompt with `input` tokens, `cached` of them found in the cache, and of `output` tokens.
    pub fn of(&self, input: usize, cached: usize, output: usize) -> Money {
        let cached = cached.min(input);
        let part = |tokens: usize, price: i64| i64::try_from(tokens).unwrap_or(i64::MAX).saturating_mul(price);
        let sum = part(input - cached, self.input).saturating_add(part(cached, self.cached_input));
        Money(sum.saturating_add(part(output, self.output)))
    }
}

/// By served model; what is not in it costs nothing.
pub type Prices = BTreeMap<String, Price>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_tokens_have_their_own_price() {
        // $0.15, $0.075 and $0.60 per million.
        let price = Price { input: 150, cached_input: 75, output: 600 };
        assert_eq!(price.of(1_000_000, 400_000, 1_000_000), Money(90_000_000 + 30_000_000 + 600_000_000));
        assert_eq!(price.of(1, 5, 0), Money(75));
    }
}
