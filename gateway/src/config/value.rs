//! Settings as text to settings as values. Errors say what was expected.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// A whole number, at least `least`.
pub fn count(text: &str, least: usize) -> Result<usize, String> {
    let expected = || format!("expected a whole number of at least {least}");
    text.parse().ok().filter(|n| *n >= least).ok_or_else(expected)
}

/// A port; 0 lets the system choose.
pub fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| "expected a port from 0 to 65535".to_owned())
}

/// An address, or `localhost`.
pub fn host(text: &str) -> Result<IpAddr, String> {
    if text == "localhost" {
        return Ok(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    text.trim_matches(['[', ']']).parse().map_err(|_| "expected an address such as 127.0.0.1, 0.0.0.0 or ::1".to_owned())
}

/// Any 64 bits.
pub fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "expected a whole number of at least 0".to_owned())
}

/// A share with a name, as `2026=0.05`.
pub fn named_share(text: &str) -> Result<(String, f64), String> {
    let named = text.split_once('=').filter(|(name, _)| !name.trim().is_empty());
    let read = named.and_then(|(name, number)| Some((name.trim().to_owned(), share(number.trim()).ok()?)));
    read.ok_or_else(|| "expected a name and a share from 0 to 1, such as 2026=0.05".to_owned())
}

/// `true` or `false`.
pub fn switch(text: &str) -> Result<bool, String> {
    choice(text, &[("true", true), ("false", false)])
}

/// One of the words.
pub fn choice<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    let expected = || {
        let list: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        format!("expected one of {}", list.join(", "))
    };
    words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(expected)
}

/// Bytes: `2GiB`, `512MB`, `1.5G` (= GiB), or a plain number.
pub fn size(text: &str) -> Result<usize, String> {
    let expected = "expected a size such as 2GiB, 512MiB or a number of bytes";
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(expected.to_owned()),
    };
    let bytes = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor),
        // Below 2⁵³ a double counts bytes exactly enough; beyond, nobody writes fractions.
        Err(_) => number.parse::<f64>().ok().map(|n| n * factor as f64).filter(|n| *n < 9.0e15).map(|n| n as u64),
    };
    bytes.and_then(|b| usize::try_from(b).ok()).filter(|b| *b > 0).ok_or_else(|| expected.to_owned())
}

/// The same, or 0.
pub fn size_or_none(text: &str) -> Result<usize, String> {
    if text == "0" { Ok(0) } else { size(text).map_err(|expected| format!("{expected}, or 0")) }
}

/// Time: `30s`, `500ms`, `2m`, or a plain number of seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let expected = || "expected a time such as 30s, 500ms or 2m".to_owned();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| expected())?;
    let limit = Duration::from_secs(366 * 24 * 3600);
    let time = match unit.trim() {
        "ms" => Duration::from_millis(number),
        "" | "s" => Duration::from_secs(number),
        "m" | "min" => Duration::from_secs(number.saturating_mul(60)),
        "h" => Duration::from_secs(number.saturating_mul(3600)),
        _ => return Err(expected()),
    };
    Some(time).filter(|t| *t <= limit).ok_or_else(expected)
}

/// The same, and not nothing.
pub fn some_time(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|time| if time.is_zero() { Err("expected a time above 0".to_owned()) } else { Ok(time) })
}

/// Where something answers over HTTP.
pub fn web_address(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let expected = || "expected an address such as http://localhost:4318".to_owned();
    host.filter(|host| !host.is_empty() && !host.starts_with('/')).map(|_| text.to_owned()).ok_or_else(expected)
}

/// A share of the whole, from 0 to 1.
pub fn share(text: &str) -> Result<f64, String> {
    let expected = || "expected a share from 0 to 1, such as 0.1".to_owned();
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(expected)
}

/// How long something is kept: `90d`, `12h`, `4w` or `2y`.
pub fn age(text: &str) -> Result<Duration, String> {
    let expected = || "expected a time such as 90d, 12h, 4w or 2y".to_owned();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().ok().filter(|n| (1..=1_000_000).contains(n)).ok_or_else(expected)?;
    let hours = match unit.trim() {
        "h" => 1,
        "d" => 24,
        "w" => 7 * 24,
        "y" => 365 * 24,
        _ => return Err(expected()),
    };
    Ok(Duration::from_secs(number * hours * 3600))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("2GiB", 2 << 30), ("512M", 512 << 20), ("1.5k", 1536), ("3 MB", 3_000_000), ("77", 77)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "2 lbs", "-1", "0", "99999999999TiB", "1e9", "1.2.3G"] {
            assert!(size(text).is_err(), "{text}");
        }
        assert_eq!((size_or_none("0"), size_or_none("1k")), (Ok(0), Ok(1024)));
        assert!(size_or_none("none").unwrap_err().ends_with("or 0"));
    }

    #[test]
    fn durations() {
        for (text, ms) in [("30", 30_000), ("30s", 30_000), ("500ms", 500), ("2m", 120_000), ("0", 0)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "1.5s", "3 weeks", "99999999999999999999s", "18446744073709551615h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ages_and_shares() {
        assert_eq!(age("90d"), Ok(Duration::from_secs(90 * 86_400)));
        assert_eq!(age("2y"), Ok(Duration::from_secs(730 * 86_400)));
        for text in ["", "90", "0d", "d", "-1d", "1.5d", "99999999999y"] {
            assert!(age(text).is_err(), "{text}");
        }
        assert_eq!((share("0"), share("0.25"), share("1")), (Ok(0.0), Ok(0.25), Ok(1.0)));
        for text in ["-0.1", "1.1", "NaN", "half"] {
            assert!(share(text).is_err(), "{text}");
        }
    }
}
