//! Counter-based random numbers: the draw of a token depends on its request's seed and its index, on nothing else.
//!
//! Philox4x32-10 of Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). There is no state to
//! keep, so a request that is preempted, moved or batched with others draws the same tokens again.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The Philox4x32-10 block function.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
    }
    c
}

/// A uniform number in `[0, 1)` with 53 random bits, fixed by `seed` and `counter`.
///
/// Samplers use it by inverse CDF over the kept tokens in the order of their ids: with weights `w_i` summed to `W` (f64, in id
/// order), the token is the first `t` for which `w_0 + … + w_t > uniform * W`, or the last kept one if rounding lets none exceed.
pub fn uniform(seed: u64, counter: u64) -> f64 {
    let [a, b, ..] = philox4x32([counter as u32, (counter >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    // The known-answer vectors of the authors' library (Random123, `kat_vectors`, "philox4x32 10").
    #[test]
    fn philox_gives_the_published_numbers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_fills_the_unit_interval_evenly() {
        let draws = 100_000;
        let mut bins = [0u32; 16];
        for counter in 0..draws {
            let u = uniform(7, counter);
            assert!((0.0..1.0).contains(&u));
            bins[(u * 16.0) as usize] += 1;
        }
        // 15 degrees of freedom: a chi-square above 37.7 has a chance of 0.001; the numbers are fixed, so this cannot flake.
        let expected = draws as f64 / 16.0;
        let chi: f64 = bins.iter().map(|&b| (f64::from(b) - expected).powi(2) / expected).sum();
        assert!(chi < 37.7, "{chi}");
    }

    #[test]
    fn seeds_and_counters_are_separate_streams() {
        assert_ne!(uniform(1, 0), uniform(0, 1));
        assert_ne!(uniform(1 << 32, 0), uniform(1, 0));
        assert_ne!(uniform(0, 1 << 32), uniform(0, 1));
    }
}
