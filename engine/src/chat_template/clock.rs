//! Dates for `strftime_now`.

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];

/// A moment of the proleptic Gregorian calendar, UTC.
struct Moment {
    year: u64,
    /// 1 to 12.
    month: usize,
    /// 1 to 31.
    day: u64,
    /// 1 to 366.
    day_of_year: u64,
    /// 0 is Sunday.
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Moment {
    /// From seconds since 1970, without leap seconds.
    fn new(seconds: u64) -> Self {
        // Later than the year 9999 is a broken clock.
        let seconds = seconds.min(253_402_300_799);
        let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
        let weekday = usize::try_from((days + 4) % 7).unwrap_or(0);
        let mut year = 1970;
        while days >= year_length(year) {
            days -= year_length(year);
            year += 1;
        }
        let day_of_year = days + 1;
        let mut month = 1;
        while days >= month_length(year, month) {
            days -= month_length(year, month);
            month += 1;
        }
        Self {
            year,
            month,
            day: days + 1,
            day_of_year,
            weekday,
            hour: of_day / 3600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
        }
    }
}

const fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

const fn year_length(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

const fn month_length(year: u64, month: usize) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// C's `strftime` in the C locale, UTC; a code that it lacks stays as it is.
pub(super) fn format(format: &str, now: u64) -> String {
    let moment = Moment::new(now);
    let day_name = DAYS[moment.weekday % 7];
    let month_name = MONTHS[(moment.month - 1) % 12];
    let twelve = (moment.hour + 11) % 12 + 1;
    let mut text = String::with_capacity(format.len() + 16);
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let mut code = characters.next();
        // glibc's "%-d": without the leading zero.
        let bare = code == Some('-');
        if bare {
            code = characters.next();
        }
        let number = |value: u64, width: usize| if bare { value.to_string() } else { format!("{value:0width$}") };
        let written = match code {
            Some('Y') => moment.year.to_string(),
            Some('y') => number(moment.year % 100, 2),
            Some('m') => number(moment.month as u64, 2),
            Some('d') => number(moment.day, 2),
            Some('e') => format!("{:2}", moment.day),
            Some('j') => number(moment.day_of_year, 3),
            Some('H') => number(moment.hour, 2),
            Some('I') => number(twelve, 2),
            Some('M') => number(moment.minute, 2),
            Some('S') => number(moment.second, 2),
            Some('p') => if moment.hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('F') => format!("{}-{:02}-{:02}", moment.year, moment.month, moment.day),
            Some('T') => format!("{:02}:{:02}:{:02}", moment.hour, moment.minute, moment.second),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        };
        text.push_str(&written);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_python_writes_them() {
        // datetime.fromtimestamp(t, timezone.utc).strftime("%d %b %Y %A %B %j %I:%M:%S %p %H %y %m")
        let all = "%d %b %Y %A %B %j %I:%M:%S %p %H %y %m";
        assert_eq!(format(all, 0), "01 Jan 1970 Thursday January 001 12:00:00 AM 00 70 01");
        assert_eq!(format(all, 951_782_400), "29 Feb 2000 Tuesday February 060 12:00:00 AM 00 00 02");
        assert_eq!(format(all, 1_735_689_599), "31 Dec 2024 Tuesday December 366 11:59:59 PM 23 24 12");
        assert_eq!(format(all, 4_107_542_400), "01 Mar 2100 Monday March 060 12:00:00 AM 00 00 03");
    }

    #[test]
    fn codes_that_it_lacks_stay() {
        assert_eq!(format("100% %Q %% %-d/%-m %F %T", 86_399), "100% %Q % 1/1 1970-01-01 23:59:59");
        assert_eq!(format("%", 0), "%");
    }
}
