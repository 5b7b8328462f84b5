//! From a tier to a place in the engine's line.

use tidemill_store::Tier;

/// Between two tiers there is room for the requests' own priorities.
const STEP: i32 = 1 << 20;
/// Requests of batches: after all tiers.
pub const BATCH_PRIORITY: i32 = 2 * STEP;
/// What nobody sees: after everything.
pub const SHADOW_PRIORITY: i32 = 3 * STEP;

/// The engine's priority, lower first, of a request in `tier` that gives itself `own`. A caller that may not hurry can put its requests
/// behind others', never ahead; nobody leaves the tier that way.
pub fn priority(tier: Tier, own: i32, may_hurry: bool) -> i32 {
    let base = match tier {
        Tier::Priority => -STEP,
        Tier::Default => 0,
        Tier::Flex => STEP,
    };
    let least = if may_hurry { 1 - STEP / 2 } else { 0 };
    base + own.clamp(least, STEP / 2 - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_priority_leaves_its_tier_and_only_some_may_hurry() {
        for own in [i32::MIN, -7, 0, 7, i32::MAX] {
            for hurry in [false, true] {
                let [first, second, third] = Tier::ALL.map(|tier| priority(tier, own, hurry));
                assert!(first < second && second < third && third < BATCH_PRIORITY && BATCH_PRIORITY < SHADOW_PRIORITY);
            }
        }
        assert!(priority(Tier::Priority, i32::MAX, true) < priority(Tier::Default, i32::MIN, true));
        assert_eq!((priority(Tier::Default, -5, true), priority(Tier::Default, -5, false)), (-5, 0));
        assert_eq!(priority(Tier::Default, 5, false), 5);
    }
}
