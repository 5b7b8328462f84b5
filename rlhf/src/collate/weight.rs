//! How much each sample counts, so that no person steers the model.

use std::collections::BTreeMap;

use super::sample::Sample;

/// Rounds after which shares are taken as they are. Each round is exact for samples of one person; those of several take a few more.
const ROUNDS: usize = 200;

/// What is known and wanted of people.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Caps {
    /// Factor of the samples that a rater judged; of several raters the mean.
    pub rater_weights: BTreeMap<String, f64>,
    /// Factor of the samples from a user's requests.
    pub user_weights: BTreeMap<String, f64>,
    /// Largest share of the loss that one rater may have.
    pub max_rater_share: Option<f64>,
    /// Largest share of the loss that one user may have.
    pub max_user_share: Option<f64>,
}

/// Weights of samples, 1 on average over the mass.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// One per sample.
    pub weights: Vec<f64>,
    /// The largest share that a rater has under them; 0 when no sample names one.
    pub rater_share: f64,
    /// The largest share that a user has.
    pub user_share: f64,
}

/// Weights under which nobody has more of the loss than the caps allow. `mass` is what a sample counts without weight: 1, or its
/// tokens where the loss is a mean over tokens.
///
/// Water-filling: a person's mass above the level is cut to it, the level being the cap's share of what is left. With fewer than
/// 1 / cap people nobody can be below the cap; they then count alike.
pub fn weights(samples: &[Sample], mass: &[f64], caps: &Caps) -> Weights {
    let given = |people: &[String], weights: &BTreeMap<String, f64>| {
        let sum: f64 = people.iter().map(|person| weights.get(person).copied().unwrap_or(1.0)).sum();
        if people.is_empty() { 1.0 } else { sum / people.len() as f64 }
    };
    let mut masses: Vec<f64> = samples
        .iter()
        .zip(mass)
        .map(|(sample, mass)| mass * given(&sample.raters, &caps.rater_weights) * given(&sample.users, &caps.user_weights))
        .collect();
    let raters: Vec<&[String]> = samples.iter().map(|sample| sample.raters.as_slice()).collect();
    let users: Vec<&[String]> = samples.iter().map(|sample| sample.users.as_slice()).collect();
    let kinds = [(&raters, caps.max_rater_share), (&users, caps.max_user_share)];
    for _ in 0..ROUNDS {
        let mut level = true;
        for (people, cap) in kinds {
            if let Some(cap) = cap {
                level &= cut(&mut masses, people, cap);
            }
        }
        if level {
            break;
        }
    }
    let scale = mass.iter().sum::<f64>() / masses.iter().sum::<f64>();
    let scale = if scale.is_finite() { scale } else { 0.0 };
    let weights = masses.iter().zip(mass).map(|(now, before)| if *before > 0.0 { now / before * scale } else { 1.0 }).collect();
    Weights { weights, rater_share: largest_share(&masses, &raters), user_share: largest_share(&masses, &users) }
}

/// Mass per person; a sample of several counts for each by its part.
fn of_people<'a>(masses: &[f64], people: &[&'a [String]]) -> BTreeMap<&'a str, f64> {
    let mut sums: BTreeMap<&str, f64> = BTreeMap::new();
    for (mass, group) in masses.iter().zip(people) {
        group.iter().for_each(|person| *sums.entry(person).or_default() += mass / group.len() as f64);
    }
    sums
}

fn largest_share(masses: &[f64], people: &[&[String]]) -> f64 {
    let total: f64 = masses.iter().sum();
    of_people(masses, people).values().fold(0.0, |largest, mass| if total > 0.0 { f64::max(largest, mass / total) } else { 0.0 })
}

/// One round: cuts everybody above the level to it. Returns whether nobody was.
fn cut(masses: &mut [f64], people: &[&[String]], cap: f64) -> bool {
    let sums = of_people(masses, people);
    let mut sorted: Vec<f64> = sums.values().copied().filter(|mass| *mass > 0.0).collect();
    sorted.sort_by(f64::total_cmp);
    let total: f64 = masses.iter().sum();
    let unnamed = (total - sorted.iter().sum::<f64>()).max(0.0);
    let Some(level) = level(&sorted, unnamed, cap) else { return true };
    // Above the level by more than rounding.
    let factor = |person: &String| {
        sums.get(person.as_str()).map_or(1.0, |mass| if *mass > level * (1.0 + 1e-9) { level / mass } else { 1.0 })
    };
    let mut nobody = true;
    for (mass, group) in masses.iter_mut().zip(people) {
        let factor = group.iter().map(factor).fold(1.0, f64::min);
        nobody &= factor == 1.0;
        *mass *= factor;
    }
    nobody
}

/// The largest t ≤ cap · (unnamed + Σ min(mass, t)) of ascending masses; the smallest mass where there is none. `None` of nobody.
fn level(sorted: &[f64], unnamed: f64, cap: f64) -> Option<f64> {
    let (mut below, mut found) = (unnamed + sorted.iter().sum::<f64>(), None);
    for (above, mass) in sorted.iter().rev().enumerate() {
        // With the `above` largest at the level t and the others whole: t = cap · (below + above · t).
        let rest = 1.0 - cap * above as f64;
        if rest > 0.0 {
            let t = cap * below / rest;
            if t >= *mass {
                // Everybody from here down is below the level.
                found = Some(t.max(*mass));
                break;
            }
        }
        below -= mass;
    }
    let all = sorted.len() as f64;
    // Everybody at the level: possible beside unnamed mass only.
    let even = (cap * all < 1.0 && unnamed > 0.0).then(|| cap * unnamed / (1.0 - cap * all));
    found.or(even.filter(|t| *t > 0.0)).or(sorted.first().copied())
}
