//! Personal data and secrets in texts: what must not be learned, and must not be repeated in a report.
//!
//! Every pattern is checked beyond its form (checksums, ranges, reserved names), since a finding that is mostly wrong is soon
//! switched off.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::LazyLock,
};

use regex::Regex;
use serde::{Deserialize, Serialize};

use super::{
    Thresholds,
    corpus::{Corpus, Findings},
    report::{Check, Keep},
};

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An e-mail address, but for `user@example.com` and its like.
    Email,
    /// A telephone number: international, North American, or named as one.
    Phone,
    /// A public IP address.
    IpAddress,
    /// An international bank account number with a right checksum.
    Iban,
    /// A payment card number with a known prefix and a right checksum.
    Card,
    /// A key, token, or password.
    Secret,
}

/// A place in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// What is there.
    pub kind: Kind,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Kind {
    /// Its name in findings and in place of redacted text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Email => "e-mail address",
            Self::Phone => "telephone number",
            Self::IpAddress => "IP address",
            Self::Iban => "IBAN",
            Self::Card => "card number",
            Self::Secret => "secret",
        }
    }

    fn is_secret(self) -> bool {
        matches!(self, Self::Iban | Self::Card | Self::Secret)
    }
}

/// Everything found in a text, in order and without overlaps; where two overlap the more dangerous stays.
pub fn find(text: &str) -> Vec<Place> {
    let mut places = Vec::new();
    secrets(text, &mut places);
    if text.bytes().filter(u8::is_ascii_digit).take(7).count() == 7 {
        numbers(text, &mut places);
    }
    if text.contains('@') {
        let emails = EMAIL.iter().flat_map(|pattern| pattern.find_iter(text)).filter(|found| is_email(found.as_str()));
        places.extend(emails.map(|found| Place { kind: Kind::Email, start: found.start(), end: found.end() }));
    }
    addresses(text, &mut places);
    places.sort_by_key(|place| place.start);
    let mut kept: Vec<Place> = Vec::new();
    for place in places {
        match kept.last_mut() {
            Some(last) if place.start < last.end => {
                if place.kind > last.kind {
                    *last = place;
                }
            }
            _ => kept.push(place),
        }
    }
    kept
}

/// The text with everything found replaced by its name in brackets.
pub fn redact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut end = 0;
    for place in find(text) {
        out.push_str(&text[end..place.start]);
        out.push_str(&format!("[{}]", place.kind.name()));
        end = place.end;
    }
    out.push_str(&text[end..]);
    out
}

/// The checks over personal data and over secrets. The system's messages are not searched: they are the application's own.
pub(super) fn check(corpus: &Corpus<'_>, thresholds: &Thresholds, findings: &mut Findings) -> [Check; 2] {
    const PERSONAL: &str = "personal_data";
    const SECRETS: &str = "secrets";
    for row in 0..corpus.rows.len() {
        let parts = std::iter::once(("prompt", &corpus.prompts[row])).chain(
            corpus.answers[row].iter().enumerate().map(|(place, text)| (["answer", "rejected answer"][place.min(1)], text)),
        );
        for (part, text) in parts {
            let mut kinds: Vec<Kind> = find(&text.text).into_iter().map(|place| place.kind).collect();
            kinds.sort_unstable();
            kinds.dedup();
            for kind in kinds {
                let (name, verdict) = if kind.is_secret() { (SECRETS, Keep::Drop) } else { (PERSONAL, Keep::Review) };
                findings.add(row, name, verdict, format!("the {part} has what looks like: {}", kind.name()));
            }
        }
    }
    let size = corpus.rows.len();
    [
        findings.share(PERSONAL, size, thresholds.personal, |found| {
            format!("In {found}: e-mail addresses, telephone numbers, or IP addresses. Remove them, or ask for consent.")
        }),
        findings.share(SECRETS, size, thresholds.secrets, |found| {
            format!("In {found}: bank accounts, cards, keys, or passwords. Leave them out, and change the keys.")
        }),
    ]
}

type Pattern = LazyLock<Option<Regex>>;

static EMAIL: Pattern = LazyLock::new(|| Regex::new(r"[A-Za-z0-9][A-Za-z0-9._%+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\b").ok());
static INTERNATIONAL: Pattern = LazyLock::new(|| Regex::new(r"\+[1-9][0-9 ().\-/]{6,20}[0-9]").ok());
static AMERICAN: Pattern =
    LazyLock::new(|| Regex::new(r"(?:\([2-9][0-9]{2}\) ?|\b[2-9][0-9]{2}[-. ])[2-9][0-9]{2}[-. ][0-9]{4}\b").ok());
static NAMED: Pattern = LazyLock::new(|| {
    Regex::new(r"(?i)\b(?:tel|telephone|phone|mobile|cell|handy|telefon|fon|whatsapp|call me (?:at|on))\b[^0-9\n+]{0,12}(\(?0[0-9 ()/.\-]{6,16}[0-9])").ok()
});
static CARD: Pattern = LazyLock::new(|| Regex::new(r"\b[3-6](?:[ -]?[0-9]){12,18}\b").ok());
static IBAN: Pattern = LazyLock::new(|| Regex::new(r"\b[A-Z]{2}[0-9]{2} ?[A-Z0-9]{4}").ok());
static IPV4: Pattern = LazyLock::new(|| Regex::new(r"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b").ok());
static IPV6: Pattern = LazyLock::new(|| Regex::new(r"\b[0-9A-Fa-f]{1,4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{1,4}\b").ok());
static KEY: Pattern = LazyLock::new(|| {
    Regex::new(concat!(
        r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
        r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        r"|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{40,}|\bglpat-[A-Za-z0-9_-]{20,}",
        r"|\bxox[abprs]-[A-Za-z0-9-]{20,}",
        r"|\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}|\b[rs]k_live_[A-Za-z0-9]{20,}",
        r"|\bAIza[0-9A-Za-z_-]{35}|\bhf_[A-Za-z0-9]{30,}|\bnpm_[A-Za-z0-9]{36}|\bSG\.[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{20,}",
        r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    ))
    .ok()
});
static ASSIGNED: Pattern = LazyLock::new(|| {
    Regex::new(r#"(?i)\b(?:[a-z0-9]+[_-])*(?:api_?-?key|secret(?:_?-?key)?|access_?-?token|auth_?-?token|password|passwd)["']?\s*(?:[:=]|is)\s*["'`]?([A-Za-z0-9/+_.!@#$%^&*=-]{10,})"#).ok()
});
static LOGIN: Pattern = LazyLock::new(|| Regex::new(r"\b[a-z][a-z0-9+]{1,15}://[^\s:/@]+:([^\s:/@]{4,})@[^\s/]+").ok());

fn secrets(text: &str, places: &mut Vec<Place>) {
    let mut add = |start, end| places.push(Place { kind: Kind::Secret, start, end });
    for found in KEY.iter().flat_map(|pattern| pattern.find_iter(text)) {
        if !found.as_str().contains("EXAMPLE") && (found.as_str().starts_with('-') || is_random(found.as_str(), 3.0)) {
            add(found.start(), found.end());
        }
    }
    for value in ASSIGNED.iter().flat_map(|pattern| pattern.captures_iter(text)).filter_map(|found| found.get(1)) {
        if is_random(value.as_str(), 3.0) && !is_placeholder(value.as_str()) {
            add(value.start(), value.end());
        }
    }
    if text.contains("://") {
        for value in LOGIN.iter().flat_map(|pattern| pattern.captures_iter(text)).filter_map(|found| found.get(1)) {
            if !is_placeholder(value.as_str()) {
                add(value.start(), value.end());
            }
        }
    }
}

fn numbers(text: &str, places: &mut Vec<Place>) {
    let bytes = text.as_bytes();
    let is_clear = |start: usize, end: usize| {
        let word = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
        !(word(start.checked_sub(1).and_then(|at| bytes.get(at))) || word(bytes.get(end)))
    };
    for found in IBAN.iter().flat_map(|pattern| pattern.find_iter(text)) {
        if let Some(end) = iban_end(text, found.start()).filter(|end| is_clear(found.start(), *end)) {
            places.push(Place { kind: Kind::Iban, start: found.start(), end });
        }
    }
    for found in CARD.iter().flat_map(|pattern| pattern.find_iter(text)).filter(|found| is_card(found.as_str())) {
        // A decimal fraction or a part of a longer number is no card.
        let before = found.start().checked_sub(1).and_then(|at| bytes.get(at));
        if is_clear(found.start(), found.end()) && !before.is_some_and(|byte| matches!(byte, b'.' | b'-' | b'/')) {
            places.push(Place { kind: Kind::Card, start: found.start(), end: found.end() });
        }
    }
    let international = INTERNATIONAL.iter().flat_map(|pattern| pattern.find_iter(text)).filter(|found| {
        let digits = digits(found.as_str());
        let opens = found.start() == 0
            || matches!(bytes[found.start() - 1], b' ' | b'\n' | b'\t' | b'(' | b':' | b',' | b';' | b'"' | b'\'' | b'<' | b'[');
        (9..=15).contains(&digits.len()) && !digits.windows(5).any(|run| run == b"00000") && opens
    });
    let american = AMERICAN.iter().flat_map(|pattern| pattern.find_iter(text)).filter(|found| {
        // 555-0100 to 555-0199 are reserved for fiction.
        let digits = digits(found.as_str());
        is_clear(found.start(), found.end()) && !(digits[3..].starts_with(b"55501"))
    });
    let named = NAMED.iter().flat_map(|pattern| pattern.captures_iter(text)).filter_map(|found| found.get(1));
    for found in international.chain(american).chain(named.filter(|found| (8..=13).contains(&digits(found.as_str()).len()))) {
        places.push(Place { kind: Kind::Phone, start: found.start(), end: found.end() });
    }
}

fn addresses(text: &str, places: &mut Vec<Place>) {
    let bytes = text.as_bytes();
    for found in IPV4.iter().flat_map(|pattern| pattern.find_iter(text)) {
        let around = |at: Option<usize>| at.and_then(|at| bytes.get(at)).copied().unwrap_or(b' ');
        let before = around(found.start().checked_sub(1));
        let after = around(Some(found.end()));
        // Versions (v1.2.3.4, foo-1.2.3.4), longer numbers, and networks (10.0.0.0/8) are not somebody's address.
        let stands = !matches!(before, b'.' | b'-' | b'_' | b'=') && !matches!(after, b'/' | b'-' | b'_');
        let longer = after == b'.' && around(Some(found.end() + 1)).is_ascii_digit();
        let words = bytes[..found.start()].trim_ascii_end();
        let named = words.len() >= 7 && words[words.len() - 7..].eq_ignore_ascii_case(b"version");
        if stands && !longer && !named && found.as_str().parse().is_ok_and(is_public_v4) {
            places.push(Place { kind: Kind::IpAddress, start: found.start(), end: found.end() });
        }
    }
    if text.contains(':') {
        for found in IPV6.iter().flat_map(|pattern| pattern.find_iter(text)) {
            if found.as_str().parse().is_ok_and(is_public_v6) {
                places.push(Place { kind: Kind::IpAddress, start: found.start(), end: found.end() });
            }
        }
    }
}

fn is_email(email: &str) -> bool {
    const GENERIC: &[&str] = &[
        "user", "name", "you", "me", "email", "test", "example", "foo", "bar", "admin", "info", "someone", "username", "your",
        "noreply", "no-reply", "git", "support", "contact", "hello", "sales", "alice", "bob",
    ];
    let lower = email.to_ascii_lowercase();
    let Some((local, domain)) = lower.split_once('@') else { return false };
    let top = domain.rsplit('.').next().unwrap_or_default();
    // Names of files that have a scale in them, such as icon@2x.png.
    if ["png", "jpg", "jpeg", "svg", "gif", "webp", "js", "css", "py", "rs"].contains(&top) {
        return false;
    }
    // Reserved for documentation (RFC 2606), and what examples call their company.
    let reserved = ["example", "test", "invalid", "localhost"].contains(&top)
        || ["example.com", "example.org", "example.net", "domain.com", "company.com", "email.com", "yourdomain.com", "host.com"]
            .iter()
            .any(|name| domain == *name || domain.ends_with(&format!(".{name}")));
    let generic = GENERIC
        .iter()
        .any(|name| local == *name || local.strip_prefix(name).is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit())));
    !(reserved && generic || matches!(local, "git" | "noreply" | "no-reply"))
}

/// Decimal digits of a text.
fn digits(text: &str) -> Vec<u8> {
    text.bytes().filter(u8::is_ascii_digit).collect()
}

/// A length and prefix that an issuer uses, and Luhn's checksum (ISO/IEC 7812-1).
fn is_card(text: &str) -> bool {
    let digits: Vec<u32> = digits(text).into_iter().map(|digit| u32::from(digit - b'0')).collect();
    let prefix = |count: usize| digits.iter().take(count).fold(0, |number, digit| 10 * number + digit);
    let known = match digits.len() {
        13 | 19 => prefix(1) == 4,
        14 => matches!(prefix(2), 36 | 38 | 39) || (300..=305).contains(&prefix(3)),
        15 => matches!(prefix(2), 34 | 37),
        16 => {
            prefix(1) == 4
                || (51..=55).contains(&prefix(2))
                || (2221..=2720).contains(&prefix(4))
                || (3528..=3589).contains(&prefix(4))
                || matches!(prefix(2), 65)
                || prefix(4) == 6011
                || (644..=649).contains(&prefix(3))
        }
        _ => false,
    };
    let doubled = |digit: u32| if digit > 4 { 2 * digit - 9 } else { 2 * digit };
    let sum: u32 =
        digits.iter().rev().enumerate().map(|(place, digit)| if place % 2 == 1 { doubled(*digit) } else { *digit }).sum();
    known && sum.is_multiple_of(10) && digits.iter().any(|digit| *digit != digits[0])
}

/// Where an IBAN that starts here ends: the length of its country (SWIFT IBAN registry), and 1 modulo 97 (ISO 7064).
fn iban_end(text: &str, start: usize) -> Option<usize> {
    const LENGTHS: &str = "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 \
        FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 \
        MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 \
        TN24 TR26 UA29 VA22 VG24 XK20";
    let country = text.get(start..start + 2)?;
    let length: usize = LENGTHS.split_whitespace().find_map(|entry| entry.strip_prefix(country))?.parse().ok()?;
    let mut code = Vec::with_capacity(length);
    let mut end = start;
    for (at, byte) in text.bytes().enumerate().skip(start) {
        match byte {
            b'A'..=b'Z' | b'0'..=b'9' => code.push(byte),
            b' ' if text.as_bytes().get(at + 1) != Some(&b' ') => continue,
            _ => return None,
        }
        end = at + 1;
        if code.len() == length {
            break;
        }
    }
    let moved = code.get(4..)?.iter().chain(&code[..4]);
    let remainder = moved.fold(0u32, |remainder, byte| match byte {
        b'0'..=b'9' => (remainder * 10 + u32::from(byte - b'0')) % 97,
        _ => (remainder * 100 + u32::from(byte - b'A') + 10) % 97,
    });
    (code.len() == length && remainder == 1).then_some(end)
}

/// Not private, reserved, a network's name, or a resolver that everybody writes in examples.
fn is_public_v4(address: Ipv4Addr) -> bool {
    let [first, second, .., last] = address.octets();
    let reserved = address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_broadcast()
        || address.is_documentation()
        || address.is_unspecified()
        || first == 0
        || first >= 224
        || (first == 100 && (64..128).contains(&second))
        || (first == 198 && (18..20).contains(&second));
    let resolvers = [[8, 8, 8, 8], [8, 8, 4, 4], [1, 1, 1, 1], [1, 0, 0, 1], [9, 9, 9, 9], [1, 2, 3, 4]];
    !reserved && last != 0 && !resolvers.contains(&address.octets())
}

/// Global unicast, but for documentation and well-known resolvers.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let documentation = segments[0] == 0x2001 && segments[1] == 0xdb8;
    let resolver = matches!((segments[0], segments[1]), (0x2001, 0x4860) | (0x2606, 0x4700) | (0x2620, 0xfe));
    segments[0] & 0xe000 == 0x2000 && !documentation && !resolver && segments.iter().filter(|segment| **segment != 0).count() > 2
}

/// Whether the letters are as mixed as in a key: letters and digits both, and so many bits per character.
fn is_random(text: &str, bits: f64) -> bool {
    let mut counts = [0u64; 256];
    text.bytes().for_each(|byte| counts[usize::from(byte)] += 1);
    let mixed = text.bytes().any(|byte| byte.is_ascii_digit()) && text.bytes().any(|byte| byte.is_ascii_alphabetic());
    mixed && crate::statistics::entropy(counts) / std::f64::consts::LN_2 >= bits
}

fn is_placeholder(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    let words = [
        "your",
        "example",
        "xxxx",
        "changeme",
        "placeholder",
        "secret",
        "password",
        "redacted",
        "getenv",
        "environ",
        "process.env",
        "config",
        "12345",
        "dummy",
        "sample",
        "****",
        "...",
        "test",
        "<",
        "{",
        "$(",
    ];
    words.iter().any(|word| lower.contains(word)) || lower == "pass"
}

#[cfg(test)]
#[path = "pii/tests.rs"]
mod tests;
