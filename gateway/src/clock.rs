//! The wall clock, as records hold it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970, as the API tells them.
pub fn seconds() -> u64 {
    now().unsigned_abs() / 1_000_000
}

/// Microseconds since 1970.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| i64::try_from(time.as_micros()).unwrap_or(i64::MAX))
}
