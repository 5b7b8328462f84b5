//! The machine and the day that a measurement belongs to.

use std::time::{SystemTime, UNIX_EPOCH};

/// Instruction sets that decide how fast a CPU multiplies matrices, by their names in `/proc/cpuinfo`.
const TELLING_FLAGS: &[&str] = &[
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
];

/// CPU, cores, instruction sets and memory in a line.
pub fn describe() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    describe_from(&cpu, &memory, std::thread::available_parallelism().map_or(1, usize::from))
}

fn describe_from(cpu: &str, memory: &str, cores: usize) -> String {
    let value = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let model = value(cpu, "model name").unwrap_or_else(|| std::env::consts::ARCH.into());
    let flags = value(cpu, "flags").or_else(|| value(cpu, "Features")).unwrap_or_default();
    let flags: Vec<&str> = flags.split(' ').filter(|flag| TELLING_FLAGS.contains(flag)).collect();
    let memory = value(memory, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<f64>().ok()).unwrap_or_default();
    format!("{model}, {cores} cores ({}), {:.0} GiB", flags.join(" "), memory / 1048576.0)
}

/// Today's date in UTC, as year-month-day.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    date(seconds / 86_400)
}

/// The civil date of a day counted from 1970-01-01 (Hinnant, "chrono-compatible low-level date algorithms").
fn date(days: u64) -> String {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_around_leap_days_are_right() {
        for (days, text) in
            [(0, "1970-01-01"), (11_016, "2000-02-29"), (11_017, "2000-03-01"), (19_722, "2023-12-31"), (19_782, "2024-02-29")]
        {
            assert_eq!(date(days), text);
        }
    }

    #[test]
    fn the_line_names_what_decides_the_speed() {
        let cpu = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 sse amx_int8\n";
        assert_eq!(describe_from(cpu, "MemTotal:       25165824 kB\n", 2), "A CPU, 2 cores (avx2 amx_int8), 24 GiB");
    }
}
