//! Keys with an end, terms and rotation; use that several writers count.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::each;
use std::time::Duration;
use tidemill_store::{KeyTerms, Limits, Money, Scope, Tier, Usage, UsageWriter};

fn terms() -> KeyTerms {
    KeyTerms {
        models: Some(vec!["a/b".into()]),
        limits: Limits { concurrent: Some(2), cost_per_day: Some(Money(1_500_000_000)), ..Limits::default() },
        model_limits: [("a/b".to_owned(), Limits { requests_per_minute: Some(7), ..Limits::default() })].into(),
        tier: Tier::Flex,
        weight: 3,
    }
}

#[test]
fn terms_and_end_are_kept_and_changed() {
    each(async |place| {
        let store = place.open().await;
        let far = 4_000_000_000_000_000;
        let (key, secret) = store.create_key_with("app", &[Scope::Chat], Some(far), terms(), "ann").await.unwrap();
        assert_eq!(store.find_key(&secret).await.unwrap(), Some(key.clone()));
        let changes = store.key_changes();
        let changed = store.change_key("app", |key| (key.expires, key.terms.weight) = (None, 9), "ann").await.unwrap().unwrap();
        assert_eq!((changed.expires, &changed.terms), (None, &KeyTerms { weight: 9, ..terms() }));
        assert!(store.key_changes() > changes, "who remembers keys can tell");
        assert_eq!(store.find_key(&secret).await.unwrap(), Some(changed.clone()));
        assert_eq!(store.list_keys().await.unwrap(), [changed]);
        store.change_key(&key.id.to_string(), |key| key.expires = Some(1), "ann").await.unwrap().unwrap();
        assert_eq!(store.find_key(&secret).await.unwrap(), None, "it has expired");
        assert_eq!(store.change_key("nobody", |_| {}, "ann").await.unwrap(), None);
        store.close().await;
    });
}

#[test]
fn a_rotated_key_is_one_key_with_two_secrets_until_the_overlap_ends() {
    each(async |place| {
        let store = place.open().await;
        let (key, first) = store.create_key_with("app", &[Scope::Chat], None, terms(), "ann").await.unwrap();
        let (rotated, second) = store.rotate_key("app", Duration::from_secs(3600), "boss").await.unwrap().unwrap();
        assert_eq!((rotated.id, &rotated.terms, &rotated.prefix[..]), (key.id, &key.terms, &second[..8]));
        let old = store.find_key(&first).await.unwrap().unwrap();
        let ends = old.expires.unwrap();
        assert_eq!((old.id, store.find_key(&second).await.unwrap()), (key.id, Some(rotated)));
        assert!(ends > key.created && ends < key.created + 3_700_000_000, "the old secret ends with the overlap");
        // A later, longer overlap is the second secret's, not the first's.
        let (_, third) = store.rotate_key("app", Duration::from_secs(86_400), "boss").await.unwrap().unwrap();
        assert_eq!(store.find_key(&first).await.unwrap().unwrap().expires, Some(ends));
        assert!(store.find_key(&second).await.unwrap().unwrap().expires.unwrap() > ends);
        let (_, fourth) = store.rotate_key("app", Duration::ZERO, "boss").await.unwrap().unwrap();
        for ended in [&first, &second, &third] {
            assert_eq!(store.find_key(ended).await.unwrap(), None);
        }
        store.rotate_key("app", Duration::from_secs(3600), "boss").await.unwrap().unwrap();
        assert!(store.find_key(&fourth).await.unwrap().is_some());
        store.revoke_key("app", "boss").await.unwrap().unwrap();
        assert_eq!(store.find_key(&fourth).await.unwrap(), None, "revoking ends all secrets");
        assert!(store.rotate_key("app", Duration::ZERO, "boss").await.unwrap().is_none());
        store.close().await;
    });
}

#[test]
fn use_is_the_sum_of_what_each_writer_wrote_last() {
    each(async |place| {
        let store = place.open().await;
        let [one, two] = [(); 2].map(|()| UsageWriter(store.issue_id()));
        let usage =
            |n: i64| Usage { requests: n, input_tokens: 10 * n, cached_tokens: n, output_tokens: 5 * n, cost: Money(n << 40) };
        assert_eq!(store.usage(None, "key:x", 3).await.unwrap(), Usage::default());
        assert_eq!(store.write_usage(one, "key:x", 3, usage(2)).await.unwrap(), Usage::default());
        assert_eq!(store.write_usage(two, "key:x", 3, usage(4)).await.unwrap(), usage(2));
        // Written again, and more of it: in the place of what was there.
        assert_eq!(store.write_usage(one, "key:x", 3, usage(2)).await.unwrap(), usage(4));
        assert_eq!(store.write_usage(one, "key:x", 3, usage(7)).await.unwrap(), usage(4));
        assert_eq!(store.usage(None, "key:x", 3).await.unwrap(), usage(11));
        assert_eq!(store.usage(Some(two), "key:x", 3).await.unwrap(), usage(7));
        assert_eq!(
            (store.usage(None, "key:x", 4).await.unwrap(), store.usage(None, "key:y", 3).await.unwrap()),
            Default::default()
        );
        store.close().await;
    });
}
