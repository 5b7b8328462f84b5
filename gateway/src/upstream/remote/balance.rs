//! Which of several servers is asked first, and which after it. Pure: the draw and the loads are arguments.

/// How one of several servers is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// By chance, in proportion to the weights.
    Weighted,
    /// The one that answers the fewest requests for its weight.
    #[default]
    LeastLoaded,
    /// The one that has seen the conversation's beginning, unless it has much more to do than the others.
    Prefix,
}

/// What is known of one of the servers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Replica {
    /// Fixed by its name.
    pub seed: u64,
    /// Share of the requests; 0 is asked only when the others cannot.
    pub weight: u32,
    /// Requests that it is answering.
    pub running: usize,
}

/// A server may have this much more than its share of what runs before conversations are moved to others. Mirrokni, Thorup and
/// Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2018), with c = 1.25.
const SLACK: f64 = 1.25;
/// Nobody is overloaded below this many.
const FEW: usize = 4;

/// The servers by preference. `prefix` is a hash of the conversation's beginning, `draw` is drawn for each request.
pub fn order(balance: Balance, replicas: &[Replica], prefix: u64, draw: u64) -> Vec<usize> {
    let race = |key: u64| move |replica: &Replica| arrival(mix(key, replica.seed), replica.weight);
    let mut order: Vec<usize> = (0..replicas.len()).collect();
    let mut by = |rank: &dyn Fn(&Replica) -> (f64, f64)| {
        let ranks: Vec<(f64, f64)> = replicas.iter().map(rank).collect();
        order.sort_by(|a, b| {
            let (a, b) = (ranks.get(*a).copied().unwrap_or_default(), ranks.get(*b).copied().unwrap_or_default());
            a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
    };
    match balance {
        Balance::Weighted => by(&|replica| (0.0, race(draw)(replica))),
        Balance::LeastLoaded => {
            by(&|replica| ((replica.running + 1) as f64 / f64::from(replica.weight), race(draw)(replica)));
        }
        Balance::Prefix => {
            let weights: f64 = replicas.iter().map(|replica| f64::from(replica.weight)).sum();
            let total = (replicas.iter().map(|replica| replica.running).sum::<usize>() + 1) as f64;
            let overloaded = |replica: &Replica| {
                let share = total * f64::from(replica.weight) / weights.max(1.0);
                (replica.running + 1) as f64 > (SLACK * share).ceil().max(FEW as f64)
            };
            by(&|replica| (f64::from(u8::from(overloaded(replica))), race(prefix)(replica)));
        }
    }
    order
}

/// The moment at which a runner of this speed arrives: the first of several is one with a chance in proportion to its weight, and it
/// stays the first when others leave or come later. With a fixed key this is weighted rendezvous hashing, with a drawn one sampling
/// without replacement (Efraimidis and Spirakis, 2006).
fn arrival(hash: u64, weight: u32) -> f64 {
    // 53 bits, in the middle of their interval: never 0 nor 1.
    let uniform = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -uniform.ln() / f64::from(weight)
}

/// SplitMix64's finalizer over both.
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicas(weights: &[u32], running: &[usize]) -> Vec<Replica> {
        let one = |(seed, (weight, running)): (usize, (&u32, &usize))| Replica {
            seed: 77 + seed as u64,
            weight: *weight,
            running: *running,
        };
        weights.iter().zip(running).enumerate().map(one).collect()
    }

    fn firsts(balance: Balance, replicas: &[Replica], draws: u64) -> Vec<usize> {
        let mut counts = vec![0; replicas.len()];
        (0..draws).for_each(|draw| counts[order(balance, replicas, draw, draw)[0]] += 1);
        counts
    }

    #[test]
    fn chance_and_prefixes_follow_the_weights() {
        let three = replicas(&[1, 3, 0], &[0, 0, 0]);
        for balance in [Balance::Weighted, Balance::Prefix] {
            let counts = firsts(balance, &three, 10_000);
            // The draws are fixed; six standard deviations of a binomial with p = 1/4 are 260.
            assert!((2240..2760).contains(&counts[0]) && counts[2] == 0, "{balance:?} {counts:?}");
        }
        assert!((0..100).all(|draw| order(Balance::Weighted, &three, 0, draw)[2] == 2), "nobody is left out");
    }

    #[test]
    fn the_least_loaded_goes_first_for_its_weight() {
        assert_eq!(order(Balance::LeastLoaded, &replicas(&[1, 1, 1], &[4, 2, 3]), 0, 0), [1, 2, 0]);
        assert_eq!(order(Balance::LeastLoaded, &replicas(&[4, 1], &[6, 1]), 0, 0), [0, 1]);
        let even = firsts(Balance::LeastLoaded, &replicas(&[1, 1], &[0, 0]), 1000);
        assert!(even.iter().all(|count| *count > 400), "ties are drawn: {even:?}");
    }

    #[test]
    fn a_conversation_stays_where_it_was_when_another_server_leaves() {
        let all = replicas(&[1, 1, 1, 1], &[0; 4]);
        let fewer: Vec<Replica> = all[..3].to_vec();
        for prefix in 0..1000 {
            let first = order(Balance::Prefix, &all, prefix, 1)[0];
            assert_eq!(first, order(Balance::Prefix, &all, prefix, 2)[0], "whatever was drawn");
            if first < 3 {
                assert_eq!(first, order(Balance::Prefix, &fewer, prefix, 3)[0]);
            }
        }
    }

    #[test]
    fn a_server_with_much_more_than_its_share_is_spared() {
        let prefix = (0..).find(|prefix| order(Balance::Prefix, &replicas(&[1, 1], &[0, 0]), *prefix, 0)[0] == 0).unwrap();
        for (running, first) in [([3, 0], 0), ([4, 0], 1), ([20, 20], 0), ([30, 10], 1), ([24, 17], 0)] {
            assert_eq!(order(Balance::Prefix, &replicas(&[1, 1], &running), prefix, 0)[0], first, "{running:?}");
        }
    }
}
