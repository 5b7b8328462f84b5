//! Parameters behind the question mark.

use crate::http::error::ApiError;
use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// A parameter, decoded.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// Before the equals sign.
    pub name: Cow<'a, str>,
    /// Behind it.
    pub value: Cow<'a, str>,
}

impl Parameter<'_> {
    /// A rejection that says what would be right.
    pub fn invalid(&self, expected: &str) -> ApiError {
        let message = format!("Invalid '{}': expected {expected}.", self.name);
        ApiError::invalid(self.name.as_ref(), "invalid_value", message)
    }

    /// Something that is written as text; `expected` says what.
    pub fn parse<T: FromStr>(&self, expected: &str) -> Result<T, ApiError> {
        self.value.parse().map_err(|_| self.invalid(expected))
    }

    /// A whole number in the range.
    pub fn number<T: FromStr + PartialOrd + std::fmt::Display>(&self, range: RangeInclusive<T>) -> Result<T, ApiError> {
        let number = self.value.parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| self.invalid(&format!("a whole number from {} to {}", range.start(), range.end())))
    }

    /// A time in seconds since 1970, as microseconds.
    pub fn time(&self) -> Result<i64, ApiError> {
        let seconds: Option<f64> = self.value.parse().ok().filter(|seconds| (0.0..=1e11).contains(seconds));
        // Whole microseconds far below 2⁶³.
        let micros = seconds.map(|seconds| (seconds * 1e6).round() as i64);
        micros.ok_or_else(|| self.invalid("a time in seconds since 1970"))
    }

    /// The meaning of a word; the words are told to whoever uses another one.
    pub fn one_of<T: Copy>(&self, words: &[(&str, T)]) -> Result<T, ApiError> {
        let found = words.iter().find(|(word, _)| *word == self.value).map(|(_, meaning)| *meaning);
        let listed = || words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| self.invalid(&format!("one of {}", listed())))
    }
}

/// The parameters in their order. One whose name is not known is refused, so that a mistyped filter does not list everything.
pub fn parameters<'a>(query: Option<&'a str>, known: &[&str]) -> Result<Vec<Parameter<'a>>, ApiError> {
    let pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    pairs
        .map(|(name, value)| {
            if known.contains(&name.as_ref()) {
                return Ok(Parameter { name, value });
            }
            let shown: String = name.chars().take(100).collect();
            let message = format!("Unknown parameter: '{shown}'. Known here are {}.", known.join(", "));
            Err(ApiError::invalid(shown, "unknown_parameter", message))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded_and_unknown_ones_named() {
        let found = parameters(Some("a=x%20y&b=7"), &["a", "b"]).unwrap();
        assert_eq!((found[0].value.as_ref(), found[1].number(0..=7_usize).unwrap()), ("x y", 7));
        assert!(parameters(None, &[]).unwrap().is_empty());
        assert_eq!(parameters(Some("a=1&c"), &["a", "b"]).unwrap_err().param.as_deref(), Some("c"));
        for number in ["8", "-1", "x", ""] {
            let query = format!("b={number}");
            let error = parameters(Some(&query), &["b"]).unwrap()[0].number(0..=7_usize).unwrap_err();
            assert_eq!((error.param.as_deref(), error.message.contains("from 0 to 7")), (Some("b"), true), "{number}");
        }
        let error = parameters(Some("a=maybe"), &["a"]).unwrap()[0].one_of(&[("yes", true), ("no", false)]).unwrap_err();
        assert_eq!(error.message, "Invalid 'a': expected one of yes, no.");
    }
}
