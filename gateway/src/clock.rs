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

/// `2026-11-22 14:05` in universal time, of microseconds since 1970.
pub fn when(micros: i64) -> String {
    let days = micros.div_euclid(DAY);
    // Days to a date by eras of 400 years that begin in March: http://howardhinnant.github.io/date_algorithms.html#civil_from_days
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {}", &time_of_day(micros)[..5])
}

/// `14:05:33` of the same day.
pub fn time_of_day(micros: i64) -> String {
    let second = micros.rem_euclid(DAY) / 1_000_000;
    format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

/// Microseconds of a day.
const DAY: i64 = 86_400_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_at_leap_days_and_year_ends() {
        // Seconds from `date -u -d '…' +%s`.
        for (seconds, date) in [
            (0, "1970-01-01 00:00"),
            (951_782_399, "2000-02-28 23:59"),
            (951_782_400, "2000-02-29 00:00"),
            (1_735_689_599, "2024-12-31 23:59"),
            (1_795_356_300, "2026-11-22 14:05"),
        ] {
            assert_eq!(when(seconds * 1_000_000), date);
        }
        assert_eq!(time_of_day(1_735_689_599_999_999), "23:59:59");
        assert_eq!(time_of_day(-1), "23:59:59");
    }
}
