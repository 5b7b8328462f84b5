use super::*;
use crate::quality::tests::processor_seconds;
use crate::quality::{generate, report::Status};

fn kinds(text: &str) -> Vec<Kind> {
    find(text).into_iter().map(|place| place.kind).collect()
}

/// A key in the form of one, made here so that no scanner takes this file for a leak.
fn key(prefix: &str, length: usize) -> String {
    let alphabet = b"a7Bq9XzK3mR8tWc5VnY2pLs6Jd4HgFe1";
    prefix.chars().chain((0..length).map(|place| char::from(alphabet[(place * 7 + place / 32) % alphabet.len()]))).collect()
}

#[test]
fn every_pattern_compiles() {
    for pattern in [&EMAIL, &INTERNATIONAL, &AMERICAN, &NAMED, &CARD, &IBAN, &IPV4, &IPV6, &KEY, &ASSIGNED, &LOGIN] {
        assert!(pattern.is_some());
    }
}

#[test]
fn personal_data_is_found() {
    for (text, kind) in [
        ("Write to maria.lopez@correo-lopez.es, please.", Kind::Email),
        ("jane.doe@example.com asked for it", Kind::Email),
        ("Ring +49 30 1234 5678 after noon.", Kind::Phone),
        ("My number is (212) 736-5000.", Kind::Phone),
        ("call 415-826-1234 today", Kind::Phone),
        ("Telefon: 030 / 901820", Kind::Phone),
        ("Pay to DE89 3704 0044 0532 0130 00 by Friday.", Kind::Iban),
        ("IBAN GB82WEST12345698765432 AND more", Kind::Iban),
        ("My card is 4111 1111 1111 1111, valid until May.", Kind::Card),
        ("amex 378282246310005", Kind::Card),
        ("he came from 93.184.216.34 yesterday", Kind::IpAddress),
        ("host 2a00:1450:4001:81b::200e answered", Kind::IpAddress),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl", Kind::Secret),
        ("postgres://admin:hunter2000@db.internal/app", Kind::Secret),
        ("DB_PASSWORD=q8Zt4kPw91xV", Kind::Secret),
    ] {
        assert_eq!(kinds(text), [kind], "{text}");
    }
    for (prefix, length) in [("AKIA", 0), ("ghp_", 36), ("sk-", 48), ("sk-ant-", 60), ("AIza", 35), ("hf_", 34), ("xoxb-", 40)] {
        let text = if length == 0 { format!("{prefix}{}", key("", 16).to_uppercase()) } else { key(prefix, length) };
        assert_eq!(kinds(&format!("use {text} for it")), [Kind::Secret], "{text}");
    }
}

#[test]
fn what_only_looks_like_it_is_left_alone() {
    for text in [
        "mail user@example.com or noreply@shop.org, and clone git@github.com:a/b.git",
        "see icon@2x.png and @decorator, and meet me @ 5",
        "call 555-0123, or (212) 555-0123",
        "The population rose by +1000000 people, from 2019-2020 to 2021-2022.",
        "ISBN 978-3-16-148410-0, order 1234567890123456, part 123-456-7890",
        "card 4111 1111 1111 1112 fails the checksum; so does DE89 3704 0044 0532 0130 01",
        "pi is 3.14159265358979323846, and 2 + 2345678 = 2345680",
        "bind to 127.0.0.1, 192.168.1.17, 10.1.2.3, 0.0.0.0 or 203.0.113.9; ask 8.8.8.8; route 93.184.216.0/24",
        "version 4.18.22.31 and v1.22.33.44 and foo-4.18.22.31",
        "at 12:34:56 or 01:02:03:04:05:06, in std::collections::map and ::1 and 2001:db8::1:2:3",
        "password: your_password_here, api_key = os.environ['API_KEY_2024'], token is required1 here",
        "The secret is simplicity. The password is at least ten characters long.",
        "postgres://user:password@localhost/db",
        "uuid 0190a5c2-7d3e-7b1a-9f00-3c2d1e4f5a6b and sha 3b18e512dba79e4c8300dd08aeb37f8e728b8dad",
        "1700000000000000 microseconds, 2026-11-22T14:00:00Z, $4,000,000,000",
    ] {
        assert_eq!(kinds(text), [], "{text}");
    }
}

#[test]
fn a_long_text_full_of_findings_takes_no_longer_per_finding() {
    let text = "mail maria.lopez@correo-lopez.es from 93.184.216.34 ".repeat(20_000);
    let start = processor_seconds();
    assert_eq!(find(&text).len(), 40_000);
    let used = processor_seconds() - start;
    assert!(used < 10.0, "{used:.1} s of one core");
}

#[test]
fn redacted_text_keeps_the_rest_and_nothing_of_what_was_found() {
    let text = "Grüße an maria.lopez@correo-lopez.es, DE89 3704 0044 0532 0130 00 — danke";
    assert_eq!(redact(text), "Grüße an [e-mail address], [IBAN] — danke");
    assert_eq!(redact("nothing"), "nothing");
}

#[test]
fn clean_rows_are_silent_and_planted_rows_are_named_without_the_data() {
    let mut rows = generate::clean(1000, 1);
    let run = |rows: &[crate::dataset::Row]| {
        let mut findings = Findings::new(rows);
        let checks = check(&Corpus::new(rows, 0.6), &Thresholds::default(), &mut findings);
        (checks, findings)
    };
    assert!(run(&rows).0.iter().all(|check| check.status == Status::Pass && check.value == Some(0.0)));
    rows[4] = generate::with_prompt(&rows[4], |own| format!("{own} I am at maria.lopez@correo-lopez.es."));
    rows[9] = generate::with_answers(&rows[9], |chosen, rejected| (chosen.to_owned(), format!("{rejected} 4111 1111 1111 1111")));
    let (checks, findings) = run(&rows);
    assert_eq!((findings.of("personal_data"), findings.of("secrets")), (vec![4], vec![9]));
    assert!(checks.iter().all(|check| check.status == Status::Warn));
    let verdicts = findings.into_rows();
    assert_eq!((verdicts[4].verdict, verdicts[9].verdict), (Keep::Review, Keep::Drop));
    assert!(!serde_json::to_string(&verdicts).unwrap().contains("4111"));
}
