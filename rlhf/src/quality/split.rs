//! Train and held-out parts that share no prompt, not even a reworded one.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    minhash,
    words::{pairs, sequence, spoken, words},
};
use crate::{
    dataset::Row,
    random::{Random, mix},
};

/// The part of a split that a row belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// To train on.
    Train,
    /// To evaluate on; no prompt of it is in the other part.
    HeldOut,
}

/// Jaccard similarity of word pairs from which two prompts are in one cluster, as in the default thresholds.
pub const SIMILARITY: f64 = 0.6;

/// The part of each row: whole clusters of alike prompts are held out until `held_out_fraction` of the rows is reached.
///
/// The same rows and seed give the same parts, whatever the rows' order. Clusters are taken in the order of a hash of their words: when
/// rows join the dataset, those that were held out stay so but for a few at the edge, and a model of the last version is not
/// evaluated on what it has seen. Clusters that would overshoot by more than they help stay in training, so a giant cluster is not
/// held out to meet a small fraction.
pub fn by_prompt_cluster(rows: &[Row], held_out_fraction: f64, seed: u64) -> Vec<Split> {
    let prompts: Vec<Vec<u32>> = rows.iter().map(|row| words(&spoken(row.example.prompt()))).collect();
    let clusters = cluster_sets(&prompts.iter().map(|prompt| pairs(prompt)).collect::<Vec<_>>(), SIMILARITY);
    // By cluster: the smallest hash of its prompts, and its size.
    let mut found: BTreeMap<usize, (u64, usize)> = BTreeMap::new();
    for (prompt, cluster) in prompts.iter().zip(&clusters) {
        let (smallest, size) = found.entry(*cluster).or_insert((u64::MAX, 0));
        *smallest = (*smallest).min(mix(sequence(prompt) ^ mix(seed)));
        *size += 1;
    }
    let mut order: Vec<(u64, usize, usize)> = found.into_iter().map(|(cluster, (hash, size))| (hash, cluster, size)).collect();
    order.sort_unstable();
    let wanted = held_out_fraction.clamp(0.0, 1.0) * rows.len() as f64;
    let mut held = 0.0;
    let mut held_out = BTreeSet::new();
    for (_, cluster, size) in order {
        let size = size as f64;
        if (held + size - wanted).abs() < wanted - held {
            held += size;
            held_out.insert(cluster);
        }
    }
    clusters.iter().map(|cluster| if held_out.contains(cluster) { Split::HeldOut } else { Split::Train }).collect()
}

/// The cluster of each prompt, given its word pairs, named by the index of its first row. A prompt without words stands alone.
pub(super) fn cluster_sets(prompts: &[Vec<u32>], similarity: f64) -> Vec<usize> {
    // Equal prompts first: datasets hold many comparisons of one prompt, and one signature serves them all.
    let mut first: BTreeMap<&[u32], usize> = BTreeMap::new();
    let mut unique: Vec<Vec<u32>> = Vec::new();
    let mut owner = Vec::new();
    let place: Vec<usize> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| {
            if prompt.is_empty() {
                unique.push(Vec::new());
                owner.push(index);
                return unique.len() - 1;
            }
            *first.entry(prompt).or_insert_with(|| {
                unique.push(prompt.clone());
                owner.push(index);
                unique.len() - 1
            })
        })
        .collect();
    // The hashes of the clusters are fixed: the same rows cluster alike whatever the split's seed.
    let roots = minhash::group_alike(&unique, similarity, 0).roots();
    place.into_iter().map(|place| owner[roots[place]]).collect()
}

/// The fold of each row, whole clusters at a time, each to the fold that has fewest rows.
pub(super) fn folds(clusters: &[usize], count: usize, seed: u64) -> Vec<usize> {
    let mut sizes: BTreeMap<usize, usize> = BTreeMap::new();
    clusters.iter().for_each(|cluster| *sizes.entry(*cluster).or_default() += 1);
    let mut order: Vec<(usize, usize)> = sizes.into_iter().collect();
    Random::new(seed).shuffle(&mut order);
    let mut load = vec![0; count.max(1)];
    let mut fold = BTreeMap::new();
    for (cluster, size) in order {
        let lightest = load.iter().enumerate().min_by_key(|(_, load)| **load).map_or(0, |(index, _)| index);
        load[lightest] += size;
        fold.insert(cluster, lightest);
    }
    clusters.iter().map(|cluster| fold[cluster]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quality::generate;

    #[test]
    fn clusters_stay_together_and_the_fraction_is_met() {
        let mut rows = generate::clean(300, 4);
        // Three more rows for each prompt, one of them with a changed word.
        let copies: Vec<Row> = rows.iter().flat_map(|row| [row.clone(), generate::reword_prompt(row), row.clone()]).collect();
        rows.extend(copies);
        let split = by_prompt_cluster(&rows, 0.2, 9);
        let held = split.iter().filter(|part| **part == Split::HeldOut).count();
        assert!((held as f64 / rows.len() as f64 - 0.2).abs() < 0.01, "{held} of {}", rows.len());
        for index in 0..300 {
            let of_prompt = [index, 300 + 3 * index, 301 + 3 * index, 302 + 3 * index];
            assert!(of_prompt.iter().all(|row| split[*row] == split[index]), "prompt {index} is in both parts");
        }
        assert_eq!(split, by_prompt_cluster(&rows, 0.2, 9));
        assert_ne!(split, by_prompt_cluster(&rows, 0.2, 10));
    }

    #[test]
    fn what_is_held_out_stays_so_when_rows_join_and_whatever_their_order() {
        let rows = generate::clean(600, 4);
        let before = by_prompt_cluster(&rows, 0.2, 9);
        let mut more = generate::clean(60, 5);
        more.extend(rows.clone());
        let after = by_prompt_cluster(&more, 0.2, 9);
        let held = (0..600).filter(|row| before[*row] == Split::HeldOut);
        let (stayed, all) = (held.clone().filter(|row| after[60 + row] == Split::HeldOut).count(), held.count());
        assert!(stayed * 10 >= all * 9, "{stayed} of {all}");
        let backwards: Vec<Row> = rows.into_iter().rev().collect();
        assert_eq!(by_prompt_cluster(&backwards, 0.2, 9).into_iter().rev().collect::<Vec<_>>(), before);
    }

    #[test]
    fn extremes_hold_out_nothing_and_everything() {
        let rows = generate::clean(20, 1);
        assert!(by_prompt_cluster(&rows, 0.0, 1).iter().all(|part| *part == Split::Train));
        assert!(by_prompt_cluster(&rows, 1.0, 1).iter().all(|part| *part == Split::HeldOut));
        assert!(by_prompt_cluster(&[], 0.5, 1).is_empty());
    }

    #[test]
    fn folds_are_even_and_keep_clusters() {
        let clusters: Vec<usize> = (0..1000).map(|row| row - row % 4).collect();
        let folds = folds(&clusters, 5, 3);
        assert!(clusters.iter().zip(&folds).all(|(cluster, fold)| folds[*cluster] == *fold));
        assert!((0..5).all(|fold| folds.iter().filter(|of| **of == fold).count() == 200));
    }
}
