//! A comparison as Markdown tables.

use crate::machine;
use crate::plan::Plan;
use crate::prompts::Prefix;
use crate::results::{LoadResult, ServerResult, Spread};
use std::fmt::Write;

/// Everything the tables and the plot show.
pub struct Report<'a> {
    /// What was asked.
    pub plan: &'a Plan,
    /// What was found.
    pub results: &'a [ServerResult],
    /// Whether the user ended it early.
    pub interrupted: bool,
}

impl Report<'_> {
    /// The prefixes of the plan's loads, each once, in order.
    pub fn prefixes(&self) -> Vec<Prefix> {
        let mut out = Vec::new();
        for load in &self.plan.loads {
            if !out.contains(&load.prefix) {
                out.push(load.prefix);
            }
        }
        out
    }

    /// The stream counts of the loads with this prefix, in order.
    pub fn streams(&self, prefix: Prefix) -> Vec<usize> {
        self.plan.loads.iter().filter(|load| load.prefix == prefix).map(|load| load.streams).collect()
    }

    /// The whole report; `plot` is the picture's address relative to the document.
    pub fn markdown(&self, plot: Option<&str>) -> String {
        // Writing to a string cannot fail, so the results of `write!` are dropped here and below.
        let mut out = String::new();
        if self.interrupted {
            out += "**Interrupted: what follows is incomplete.**\n\n";
        }
        out += &self.conditions();
        if let Some(plot) = plot {
            let _ = writeln!(out, "\n![Output tokens per second by server and streams]({plot})");
        }
        for prefix in self.prefixes() {
            let _ = writeln!(out, "\n### {}\n", self.title(prefix));
            out += "Output tokens per second; in brackets smallest and largest round; × is ours over theirs.\n\n";
            out += &self.rates(prefix);
            out += "\nMilliseconds, p50 / p99 (medians over the rounds).\n\n";
            out += &self.latencies(prefix);
        }
        out += "\n### Start-up, memory and builds\n\n";
        out += &self.servers();
        let problems = self.problems();
        if !problems.is_empty() {
            let _ = write!(out, "\n### What went wrong\n\n{problems}");
        }
        out
    }

    fn title(&self, prefix: Prefix) -> String {
        match prefix {
            Prefix::Cold => "Cold prefix: no two prompts begin alike".into(),
            Prefix::Shared => format!("Shared prefix: every prompt begins with the same ≈{} tokens", self.plan.shared_tokens),
        }
    }

    fn conditions(&self) -> String {
        let loads: Vec<String> =
            self.plan.loads.iter().map(|load| format!("{} {}×{}", load.prefix.name(), load.streams, load.requests)).collect();
        format!(
            "{}. {}.\n\nClosed loop, streamed, greedy; {} tokens in ({} asked for), {} out; {} rounds, in each of which every server \
             is started, measured and stopped; the generator shares the cores. Loads (streams × requests): {}.\n",
            machine::today(),
            machine::describe(),
            self.prompt_tokens(),
            self.plan.prompt_tokens,
            self.plan.max_tokens,
            self.plan.rounds,
            loads.join(", "),
        )
    }

    /// Mean prompt tokens of cold loads, as the servers count them.
    fn prompt_tokens(&self) -> String {
        let loads = || {
            let all = self.results.iter().flat_map(|server| &server.rounds).flat_map(|round| &round.loads);
            all.filter(|load| load.prefix == Prefix::Cold).map(|load| &load.measurement)
        };
        let (tokens, requests) =
            (loads().map(|sum| sum.prompt_tokens).sum::<u64>(), loads().map(|sum| sum.completed).sum::<u64>());
        if requests == 0 { "?".into() } else { format!("{:.0}", tokens as f64 / requests as f64) }
    }

    fn rates(&self, prefix: Prefix) -> String {
        let streams = self.streams(prefix);
        let ours = self.results.iter().find(|server| server.ours);
        self.table(
            &streams,
            |count| vec![streams_text(count)],
            |server, count| {
                let Some(rate) = server.output(prefix, count) else { return vec!["–".into()] };
                let ratio = match ours.and_then(|ours| ours.output(prefix, count)) {
                    Some(ours) if !server.ours && rate.median > 0.0 => format!(" ×{:.2}", ours.median / rate.median),
                    _ => String::new(),
                };
                let median = if server.ours { format!("**{:.0}**", rate.median) } else { format!("{:.0}", rate.median) };
                vec![format!("{median} ({:.0}–{:.0}){ratio}", rate.min, rate.max)]
            },
        )
    }

    fn latencies(&self, prefix: Prefix) -> String {
        let heads = |count: usize| vec![format!("first token, {count}"), format!("between, {count}")];
        self.table(&self.streams(prefix), heads, |server, count| {
            let pair = |value: fn(&LoadResult, bool) -> Option<f64>| {
                let at = |tail| server.spread(prefix, count, |load| value(load, tail)).map_or("–".into(), short);
                format!("{} / {}", at(false), at(true))
            };
            vec![
                pair(|load, tail| load.measurement.ttft_ms.map(|at| if tail { at.p99 } else { at.p50 })),
                pair(|load, tail| load.measurement.inter_token_ms.map(|at| if tail { at.p99 } else { at.p50 })),
            ]
        })
    }

    fn table(
        &self,
        streams: &[usize],
        heads: impl Fn(usize) -> Vec<String>,
        cells: impl Fn(&ServerResult, usize) -> Vec<String>,
    ) -> String {
        let heads: Vec<String> = streams.iter().flat_map(|&count| heads(count)).collect();
        let mut out = format!("| server | {} |\n|---|{}\n", heads.join(" | "), "--:|".repeat(heads.len()));
        for server in self.results {
            let cells: Vec<String> = streams.iter().flat_map(|&count| cells(server, count)).collect();
            let _ = writeln!(out, "| {} | {} |", server.name, cells.join(" | "));
        }
        out
    }

    fn servers(&self) -> String {
        let mut out = String::from("| server | ready, s | first answer, s | peak memory, MiB | build |\n|---|--:|--:|--:|---|\n");
        for server in self.results {
            let seconds = |spread: Option<Spread>| spread.map_or("–".into(), |at| format!("{:.1}", at.median));
            let ready = seconds(Spread::of(server.rounds.iter().filter_map(|round| round.ready_s)));
            let first = seconds(Spread::of(server.rounds.iter().filter_map(|round| round.first_answer_s)));
            let memory = server.rounds.iter().map(|round| round.peak_memory).filter(|&bytes| bytes > 0);
            let memory =
                Spread::of(memory.map(|bytes| bytes as f64 / 1048576.0)).map_or("–".into(), |at| format!("{:.0}", at.max));
            let _ = writeln!(out, "| {} | {ready} | {first} | {memory} | {} |", server.name, cell(&server.note));
        }
        out
    }

    fn problems(&self) -> String {
        let mut out = String::new();
        for server in self.results {
            for problem in server.failures.iter().cloned().chain(server.warnings()) {
                let _ = writeln!(out, "- {}: {}", server.name, cell(&problem));
            }
        }
        out
    }
}

/// A stream count with its noun.
pub fn streams_text(count: usize) -> String {
    format!("{count} {}", if count == 1 { "stream" } else { "streams" })
}

/// Three digits, and a decimal only below ten.
fn short(at: Spread) -> String {
    if at.median < 10.0 { format!("{:.1}", at.median) } else { format!("{:.0}", at.median) }
}

/// Text that stays inside its table cell or list item.
fn cell(text: &str) -> String {
    text.trim().replace('|', "\\|").replace('\n', "<br>")
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::client::Exchange;
    use crate::measurement::Measurement;
    use crate::results::Round;
    use std::time::Duration;

    /// Two servers, one of them ours and twice as fast, and one that did not run.
    pub fn sample() -> (Plan, Vec<ServerResult>) {
        let plan: Plan = toml::from_str(
            "[[load]]\nprefix = \"cold\"\nstreams = 1\nrequests = 2\n[[load]]\nprefix = \"cold\"\nstreams = 8\nrequests = 8\n\
             [[load]]\nprefix = \"shared\"\nstreams = 8\nrequests = 8\n[[server]]\nname = \"Ours\"\ncommand = [\"a\"]\n",
        )
        .unwrap();
        let load = |prefix, streams, tokens| {
            let exchange = Exchange {
                first: Some(Duration::from_millis(50)),
                gaps: vec![Duration::from_millis(7)],
                chunks: tokens,
                usage: Some(crate::chunk::Usage { prompt_tokens: 127, completion_tokens: tokens }),
                error: None,
            };
            let measurement = Measurement::of(streams, 2, Duration::from_secs(1), &[exchange], false);
            LoadResult { prefix, cpu_per_s: 1.5, measurement }
        };
        let round = |scale: u64| Round {
            ready_s: Some(1.25),
            first_answer_s: Some(1.5),
            peak_memory: 300 << 20,
            loads: vec![
                load(Prefix::Cold, 1, 100 * scale),
                load(Prefix::Cold, 8, 200 * scale),
                load(Prefix::Shared, 8, 300 * scale),
            ],
        };
        let server = |name: &str, ours, failures: &[&str], rounds| ServerResult {
            name: name.into(),
            ours,
            note: "v1 | Q4".into(),
            failures: failures.iter().map(|&text| text.into()).collect(),
            rounds,
        };
        let results = vec![
            server("Ours", true, &[], vec![round(2), round(2), round(3)]),
            server("Peer & co", false, &[], vec![round(1)]),
            server("Absent", false, &["not installed: no wheel\nfor this Python"], Vec::new()),
        ];
        (plan, results)
    }

    #[test]
    fn medians_spreads_ratios_and_problems_are_in_the_tables() {
        let (plan, results) = sample();
        let text = Report { plan: &plan, results: &results, interrupted: false }.markdown(Some("plot.svg"));
        for line in [
            "| server | 1 stream | 8 streams |",
            "| Ours | **200** (200–300) | **400** (400–600) |",
            "| Peer & co | 100 (100–100) ×2.00 | 200 (200–200) ×2.00 |",
            "| Absent | – | – |",
            "| Ours | 50 / 50 | 7.0 / 7.0 | 50 / 50 | 7.0 / 7.0 |",
            "| Ours | 1.2 | 1.5 | 300 | v1 \\| Q4 |",
            "- Absent: not installed: no wheel<br>for this Python",
            "](plot.svg)",
            "127 tokens in (128 asked for), 64 out; 3 rounds",
            "cold 1×2, cold 8×8, shared 8×8",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
        assert!(!text.contains("Interrupted"));
    }
}
