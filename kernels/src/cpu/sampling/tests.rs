//! Against a sampler by definition: f64, full sorts.

use proptest::prelude::*;

use super::*;
use crate::token_mask::TokenMask;

fn greedy() -> SampleRow {
    SampleRow::greedy(0)
}

fn run_on(isa: Isa, logits: &[f32], row: &SampleRow, history: &[TokenCount], bias: &[(u32, f32)]) -> Sampled {
    let mut working = logits.to_vec();
    let mut out = Sampled::default();
    // SAFETY: callers pass paths of this machine.
    unsafe {
        sample_row(isa, &mut working, row, history, bias, &mut out, &mut SamplingScratch::new(logits.len()));
    }
    let finite = |x: &f32| if *x == f32::INFINITY { f32::MAX.to_bits() } else { x.to_bits() };
    assert!(working.iter().map(finite).eq(logits.iter().map(finite)), "logits were not restored");
    out
}

fn run(logits: &[f32], row: &SampleRow) -> Sampled {
    run_on(Isa::detect(), logits, row, &[], &[])
}

fn noise(seed: u64, n: usize, spread: f32) -> Vec<f32> {
    (0..n as u64).map(|i| ((0..6).map(|k| uniform(seed, i * 6 + k)).sum::<f64>() - 3.0) as f32 * spread).collect()
}

/// A sorted view: (token, log-probability), likeliest first, −∞ dropped.
fn sorted(values: &[f64]) -> Vec<(u32, f64)> {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = values.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
    let mut list: Vec<(u32, f64)> = values.iter().enumerate().map(|(t, v)| (t as u32, v - max - total)).collect();
    list.retain(|(_, p)| *p > f64::NEG_INFINITY);
    list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    list
}

/// The definition; panics where `got` differs by more than rounding.
fn check(got: &Sampled, logits: &[f32], row: &SampleRow, history: &[TokenCount], bias: &[(u32, f32)]) {
    let close = |a: f32, b: f64| (f64::from(a) - b).abs() < 2e-4 * (1.0 + b.abs());
    let mut values: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    let raw = sorted(&values);
    let place = raw.iter().position(|(t, _)| *t == got.token).expect("a possible token");
    assert_eq!(got.rank as usize, place + 1);
    assert!(close(got.logprob, raw[place].1), "{} {}", got.logprob, raw[place].1);
    let same_list = |list: &[(u32, f32)], expected: &[(u32, f64)]| {
        assert_eq!(list.len(), expected.len().min(row.top_n.unwrap_or(0) as usize));
        for (a, b) in list.iter().zip(expected) {
            assert!(a.0 == b.0 && close(a.1, b.1), "{list:?} {expected:?}");
        }
    };
    same_list(&got.top, &raw);

    for &(token, add) in bias {
        values[token as usize] = f64::from(values[token as usize] as f32 + add);
    }
    for seen in history {
        // In f32 as the sampler does, so that equal values stay equal.
        let x = values[seen.token as usize] as f32;
        let x = if x > 0.0 { x / row.repetition_penalty } else { x * row.repetition_penalty };
        let x = x - row.frequency_penalty * seen.generated as f32;
        values[seen.token as usize] = f64::from(x - if seen.generated > 0 { row.presence_penalty } else { 0.0 });
    }
    if let Some(mask) = &row.mask {
        let allowed = |t: usize| mask.wait().get(t / 32).is_some_and(|word| (word >> (t % 32)) & 1 == 1);
        assert!(allowed(got.token as usize), "{got:?} is forbidden");
        values.iter_mut().enumerate().filter(|(t, _)| !allowed(*t)).for_each(|(_, v)| *v = f64::NEG_INFINITY);
    }
    if row.temperature == 0.0 {
        let all = sorted(&values);
        assert_eq!(got.token, all[0].0);
        assert!(close(got.processed_logprob, all[0].1));
        same_list(&got.processed_top, &all);
        return;
    }
    values.iter_mut().for_each(|v| *v /= f64::from(row.temperature));
    let all = sorted(&values);
    let mut kept = if row.top_k > 0 { all.len().min(row.top_k as usize) } else { all.len() };
    let mass: f64 = all[..kept].iter().map(|(_, p)| p.exp()).sum();
    if row.top_p < 1.0 {
        let mut sum = 0.0;
        let at = all[..kept].iter().position(|(_, p)| {
            sum += p.exp() / mass;
            sum >= f64::from(row.top_p)
        });
        kept = at.map_or(kept, |at| at + 1);
    }
    let likely = all[..kept].iter().take_while(|(_, p)| (p - all[0].1).exp() >= f64::from(row.min_p)).count().max(1);
    kept = kept.min(likely);

    // A threshold may fall on either side of a token by rounding: accept one more or one less.
    let agrees = [kept, kept + 1, kept.max(2) - 1].into_iter().any(|kept| {
        let kept = &all[..kept.min(all.len())];
        let mass: f64 = kept.iter().map(|(_, p)| p.exp()).sum();
        let Some(place) = kept.iter().position(|(t, _)| *t == got.token) else { return false };
        let before: f64 = kept.iter().filter(|(t, _)| *t < got.token).map(|(_, p)| p.exp() / mass).sum();
        let own = kept[place].1.exp() / mass;
        let u = uniform(row.seed, row.counter);
        let listed: Vec<u32> = kept.iter().take(row.top_n.unwrap_or(0) as usize).map(|(t, _)| *t).collect();
        close(got.processed_logprob, own.ln())
            && u > before - 1e-5
            && u < before + own + 1e-5
            && got.processed_top.iter().map(|(t, _)| *t).eq(listed)
            && got.processed_top.iter().zip(kept).all(|(a, b)| close(a.1, b.1 - mass.ln()))
    });
    assert!(agrees, "{got:?} is not what {row:?} asks for; {kept} tokens remain");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn every_path_does_what_the_row_asks_for(
        seed in 0u64..1 << 40,
        vocabulary in prop_oneof![1usize..40, 40usize..3000, Just(5000usize)],
        // Coarse logits tie often.
        coarse in any::<bool>(),
        spread in prop_oneof![Just(0.0f32), Just(0.3), Just(1.5), Just(6.0)],
        temperature in prop_oneof![Just(0.0f32), Just(1.0), 0.05f32..3.0],
        top_k in prop_oneof![Just(0u32), 1u32..60, 200u32..2000],
        top_p in prop_oneof![Just(1.0f32), 0.01f32..0.999],
        min_p in prop_oneof![Just(0.0f32), 0.0001f32..0.9],
        repetition_penalty in prop_oneof![Just(1.0f32), 0.5f32..2.0],
        presence_penalty in prop_oneof![Just(0.0f32), -2.0f32..2.0],
        frequency_penalty in prop_oneof![Just(0.0f32), -2.0f32..2.0],
        top_n in prop_oneof![Just(None), Just(Some(0u32)), (1u32..30).prop_map(Some)],
        seen in proptest::collection::btree_map(0u32..5000, (any::<bool>(), 0u32..4), 0..20),
        bias in proptest::collection::btree_map(0u32..5000, prop_oneof![Just(f32::NEG_INFINITY), -5.0f32..5.0], 0..6),
        // One token in this many is allowed; 1 is no mask.
        one_in in prop_oneof![Just(1u64), Just(2u64), 3u64..200],
    ) {
        let mut logits = noise(seed, vocabulary, spread);
        if coarse {
            logits.iter_mut().for_each(|x| *x = (*x * 2.0).round() / 2.0);
        }
        let bound = vocabulary as u32;
        let history: Vec<TokenCount> = seen
            .into_iter()
            .filter(|(token, (in_prompt, generated))| *token < bound && (*in_prompt || *generated > 0))
            .map(|(token, (in_prompt, generated))| TokenCount { token, in_prompt, generated })
            .collect();
        // One token at least stays allowed.
        let bias: Vec<(u32, f32)> = bias.into_iter().filter(|(token, _)| *token > 0 && *token < bound).collect();
        let mask = (one_in > 1).then(|| {
            let mut words = vec![0u32; vocabulary.div_ceil(32)];
            // The mask may be longer than the row, and holds one token that no bias forbids.
            let allowed = (0..vocabulary + 20).filter(|t| *t == 0 || uniform(seed, 1 << 40 | *t as u64) * (one_in as f64) < 1.0);
            allowed.filter(|t| t / 32 < words.len()).collect::<Vec<_>>().into_iter().for_each(|t| words[t / 32] |= 1 << (t % 32));
            TokenMask::known(words)
        });
        let row = SampleRow {
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, top_n, mask,
            history: 0..history.len() as u32, bias: 0..bias.len() as u32, seed, counter: seed % 7, ..greedy()
        };
        let first = run_on(Isa::Portable, &logits, &row, &history, &bias);
        check(&first, &logits, &row, &history, &bias);
        for isa in Isa::available() {
            prop_assert_eq!(&run_on(isa, &logits, &row, &history, &bias), &first, "{:?}", isa);
        }
    }

    #[test]
    fn scoring_reports_the_token_asked_for(seed in 0u64..1 << 40, vocabulary in 1usize..3000, pick in any::<u32>(), n in 0u32..9) {
        let logits = noise(seed, vocabulary, 2.0);
        let token = pick % vocabulary as u32;
        let row = SampleRow { score: Some(token), top_n: Some(n), temperature: 0.7, top_k: 3, ..greedy() };
        let got = run(&logits, &row);
        let raw = sorted(&logits.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        let place = raw.iter().position(|(t, _)| *t == token).unwrap();
        prop_assert_eq!((got.token, got.rank as usize), (token, place + 1));
        prop_assert!((f64::from(got.logprob) - raw[place].1).abs() < 1e-4);
        prop_assert_eq!(got.processed_logprob, got.logprob);
        prop_assert!(got.top.iter().map(|(t, _)| *t).eq(raw.iter().take(n as usize).map(|(t, _)| *t)));
    }
}

#[test]
fn large_vocabularies_take_every_way_to_a_token() {
    let bases = [noise(1, 49_152, 0.2), noise(2, 49_152, 2.5), noise(3, 151_936, 0.8), vec![0.25; 49_152]];
    for (index, logits) in bases.iter().enumerate() {
        for (temperature, top_k, top_p, min_p) in [
            (1.0, 0, 1.0, 0.0),
            (0.7, 0, 0.95, 0.0),
            (2.0, 0, 0.9, 0.0),
            (1.0, 0, 0.999, 0.001),
            (1.0, 0, 1.0, 0.05),
            (1.0, 50, 0.9, 0.0),
            (1.3, 20_000, 1.0, 0.0),
            (0.001, 0, 0.5, 0.0),
        ] {
            for counter in 0..3 {
                let row = SampleRow { temperature, top_k, top_p, min_p, seed: 9, counter, top_n: Some(20), ..greedy() };
                let first = run_on(Isa::Portable, logits, &row, &[], &[]);
                check(&first, logits, &row, &[], &[]);
                for isa in Isa::available() {
                    assert_eq!(run_on(isa, logits, &row, &[], &[]), first, "{isa:?}, logits {index}");
                }
            }
        }
    }
}

#[test]
fn draws_follow_the_probabilities() {
    // Plain temperature walks chunks, top-k a list; both must hit each token as often as its weight says.
    let logits: Vec<f32> = (0..3000).map(|i| if i % 300 == 7 { 2.0 + (i / 300) as f32 * 0.3 } else { -30.0 }).collect();
    let weights: Vec<f64> = (0..10).map(|i| (f64::from(i) * 0.3).exp()).collect();
    let total: f64 = weights.iter().sum();
    for top_k in [0, 10] {
        let mut counts = [0u32; 10];
        let draws = 20_000;
        for counter in 0..draws {
            let row = SampleRow { temperature: 1.0, top_k, seed: 42 + counter % 3, counter, ..greedy() };
            counts[run(&logits, &row).token as usize / 300] += 1;
        }
        let chi: f64 = counts
            .iter()
            .zip(&weights)
            .map(|(&count, w)| {
                let expected = draws as f64 * w / total;
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        // 9 degrees of freedom: above 27.9 has a chance of 0.001, and the draws are fixed by their seeds.
        assert!(chi < 27.9, "chi-square {chi} with top_k {top_k}: {counts:?}");
    }
}

#[test]
fn ties_go_to_the_smaller_id() {
    let mut logits = vec![0.0f32; 5000];
    logits[1500] = 3.0;
    logits[70] = 3.0;
    logits[4000] = 3.0;
    let got = run(&logits, &SampleRow { top_n: Some(3), ..greedy() });
    assert_eq!((got.token, got.rank), (70, 1));
    assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [70, 1500, 4000]);
    assert_eq!(run(&logits, &SampleRow { temperature: 1.0, top_k: 1, ..greedy() }).token, 70);
}

#[test]
fn broken_logits_give_a_token_all_the_same() {
    let rows = [
        SampleRow { top_n: Some(5), ..greedy() },
        SampleRow { temperature: 1.0, top_n: Some(5), ..greedy() },
        SampleRow { temperature: 1.0, top_p: 0.9, top_n: Some(5), ..greedy() },
        SampleRow { temperature: 1.0, top_k: 4, min_p: 0.1, ..greedy() },
        SampleRow { temperature: 1.0, min_p: 0.1, ..greedy() },
        SampleRow { temperature: 1e-40, top_p: 0.0, ..greedy() },
        SampleRow { temperature: f32::NAN, top_p: f32::NAN, min_p: f32::NAN, ..greedy() },
        SampleRow { score: Some(3), ..greedy() },
        SampleRow { score: Some(3_000_000), ..greedy() },
    ];
    for row in &rows {
        for isa in Isa::available() {
            for fill in [f32::NAN, f32::NEG_INFINITY] {
                let got = run_on(isa, &vec![fill; 2000], row, &[], &[]);
                assert!(row.score.is_some() || got.token == 0);
                assert_eq!((got.logprob, got.processed_logprob), (f32::NEG_INFINITY, f32::NEG_INFINITY));
                let mut logits = vec![fill; 2000];
                logits[1234] = -7.0;
                let got = run_on(isa, &logits, row, &[], &[]);
                if row.score.is_none() {
                    assert_eq!((got.token, got.rank, got.logprob, got.processed_logprob), (1234, 1, 0.0, 0.0), "{row:?}");
                }
            }
            let mut logits = vec![0.0; 2000];
            logits[777] = f32::INFINITY;
            let got = run_on(isa, &logits, row, &[], &[]);
            assert!(row.score.is_some() || (got.token, got.logprob) == (777, 0.0));
        }
    }
}

#[test]
fn a_mask_confines_the_draw_and_leaves_raw_log_probabilities_alone() {
    let logits: Vec<f32> = (0..2000).map(|t| t as f32 / 100.0).collect();
    let free = run(&logits, &SampleRow { top_n: Some(2), ..greedy() });
    assert_eq!(free.token, 1999);
    for isa in Isa::available() {
        for (words, token) in [(vec![0b1010], 3), (vec![u32::MAX; 50], 1599), (vec![0, 1 << 31], 63)] {
            let allowed: Vec<f64> = logits
                .iter()
                .take(words.len() * 32)
                .enumerate()
                .filter(|(t, _)| words[t / 32] >> (t % 32) & 1 == 1)
                .map(|(_, x)| f64::from(*x))
                .collect();
            let row = SampleRow { mask: Some(TokenMask::known(words)), top_n: Some(2), ..greedy() };
            let got = run_on(isa, &logits, &row, &[], &[]);
            assert_eq!((got.token, &got.top), (token, &free.top));
            assert_eq!(got.rank, 2000 - token);
            assert!((got.logprob - (free.logprob - (1999 - token) as f32 / 100.0)).abs() < 1e-4);
            let best = allowed.iter().copied().fold(f64::MIN, f64::max);
            let expected = -allowed.iter().map(|x| (x - best).exp()).sum::<f64>().ln();
            assert!((f64::from(got.processed_logprob) - expected).abs() < 1e-4);
            assert_eq!(got.processed_top[0].0, token);
            assert_eq!(got.processed_top.len(), allowed.len().min(2));
        }
    }
}

#[test]
fn where_nothing_is_possible_the_first_allowed_token_is_given() {
    for isa in Isa::available() {
        for temperature in [0.0, 1.0] {
            for (words, token) in [(vec![0, 4], 34), (vec![], 0), (vec![!1; 63], 1)] {
                let row = SampleRow { mask: Some(TokenMask::known(words)), temperature, ..greedy() };
                let got = run_on(isa, &vec![f32::NEG_INFINITY; 2000], &row, &[], &[]);
                assert_eq!((got.token, got.processed_logprob), (token, f32::NEG_INFINITY));
            }
        }
    }
}

#[test]
fn forbidden_tokens_are_never_drawn() {
    let logits = vec![1.0f32; 64];
    let bias: Vec<(u32, f32)> = (0..64).filter(|t| *t != 63).map(|t| (t, f32::NEG_INFINITY)).collect();
    for counter in 0..50 {
        let row = SampleRow { temperature: 1.0, bias: 0..63, counter, top_n: Some(4), ..greedy() };
        let got = run_on(Isa::detect(), &logits, &row, &[], &bias);
        assert_eq!((got.token, got.processed_logprob), (63, 0.0));
        assert_eq!(got.processed_top, [(63, 0.0)]);
        assert!((got.logprob + 64f32.ln()).abs() < 1e-5);
    }
}
