//! The first page: who answers how much at what price, what runs now, and how the server is.

use crate::console::html::{Html, all, tag};
use crate::console::part::{
    Mood, Part, block, chip, count, figure, link, moment, nothing, pictures, seconds_of, table, tiles, time_writer,
};
use crate::limits::Price;
use std::collections::BTreeMap;
use tidemill_rlhf::chart::{Chart, Line, Point, percent, significant};
use tidemill_rlhf::statistics::quantile;
use tidemill_store::{Job, JobState, Latency, Money, Rollout, TrafficSum};

/// Hours that can be looked back on, and the minutes of a stretch: lengths for which the database has sums.
pub const WINDOWS: [(&str, (i64, i64)); 4] = [("1", (1, 5)), ("24", (24, 30)), ("168", (168, 180)), ("720", (720, 720))];
/// Lines of a picture.
const LINES: usize = 6;
/// Rows of the table; a server may have had thousands of adapters.
const ROWS: usize = 100;

/// All that the page shows.
pub struct Overview {
    /// Hours looked back on.
    pub hours: i64,
    /// Begin and end of the window, and the length of its stretches, in microseconds.
    pub window: (i64, i64, i64),
    /// Who answered, most answers first.
    pub variants: Vec<Variant>,
    /// Rollouts that are not over.
    pub rollouts: Vec<Rollout>,
    /// What else is at work.
    pub work: Vec<Work>,
    /// Models and what they are: `ready`, `loading`, ….
    pub models: Vec<(String, &'static str)>,
    /// Whether the database answered when it was last needed.
    pub database: bool,
}

/// Somebody who answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// All of it; `start` is that of the first stretch.
    pub total: TrafficSum,
    /// By stretch of time.
    pub stretches: Vec<TrafficSum>,
    /// The servers that answer, where it is not this one.
    pub remote: Option<String>,
    /// What its tokens cost.
    pub price: Price,
    /// How long its newest answers took.
    pub latencies: Vec<Latency>,
}

/// Something that is at work, and where more of it is told.
pub struct Work {
    /// What it is.
    pub what: &'static str,
    /// Its name.
    pub name: String,
    /// Parts of the path of its page, if it has one.
    pub path: Vec<String>,
    /// Where it stands.
    pub state: String,
    /// How far it is.
    pub progress: String,
    /// When it began, in microseconds since 1970.
    pub since: i64,
}

impl Work {
    /// A dataset that is being built.
    pub fn of_build(job: &Job) -> Self {
        let name = job.spec["name"].as_str().unwrap_or_default().to_owned();
        let state = match job.state {
            JobState::Queued => "queued",
            JobState::Running => "running",
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => "ended",
        };
        let progress = job.error.clone().unwrap_or_default();
        Self { what: "dataset", name, path: vec!["datasets".to_owned()], state: state.to_owned(), progress, since: job.created }
    }
}

/// What answers of these sums cost.
fn cost(price: &Price, sum: &TrafficSum) -> Money {
    let tokens = |tokens: u64| usize::try_from(tokens).unwrap_or(usize::MAX);
    price.of(tokens(sum.prompt_tokens), tokens(sum.cached_tokens), tokens(sum.output_tokens))
}

impl Variant {
    /// Of sums in the order of model, variant and time; most answers first.
    pub fn all(sums: Vec<TrafficSum>) -> Vec<Self> {
        let mut found: Vec<Self> = Vec::new();
        for sum in sums {
            match found.last_mut().filter(|last| last.total.model == sum.model && last.total.variant == sum.variant) {
                Some(last) => {
                    let total = &mut last.total;
                    total.answers += sum.answers;
                    total.failed += sum.failed;
                    total.cancelled += sum.cancelled;
                    total.prompt_tokens += sum.prompt_tokens;
                    total.cached_tokens += sum.cached_tokens;
                    total.output_tokens += sum.output_tokens;
                    total.begun += sum.begun;
                    total.first_token_us += sum.first_token_us;
                    last.stretches.push(sum);
                }
                None => found.push(Self {
                    total: sum.clone(),
                    stretches: vec![sum],
                    remote: None,
                    price: Price::default(),
                    latencies: Vec::new(),
                }),
            }
        }
        found.sort_by_key(|variant| std::cmp::Reverse(variant.total.answers));
        found
    }

    fn name(&self) -> String {
        match &self.total.variant {
            // What records call an adapter begins with its base. The base in a rollout has its own name twice, which tells it from itself
            // without one.
            Some(variant) if variant.starts_with(&self.total.model) && *variant != self.total.model => variant.clone(),
            Some(variant) => format!("{} · {variant}", self.total.model),
            None => self.total.model.clone(),
        }
    }

    /// A line over all stretches; `value` says what a stretch is worth, and `empty` what one without answers is.
    fn line(
        &self,
        (first, last, width): (i64, i64, i64),
        empty: Option<f64>,
        value: impl Fn(&TrafficSum) -> Option<f64>,
    ) -> Line {
        let by_start: BTreeMap<i64, &TrafficSum> = self.stretches.iter().map(|sum| (sum.start, sum)).collect();
        let starts = std::iter::successors(Some(first / width * width), |start| Some(start + width)).take_while(|at| *at < last);
        let point = |start: i64| Some(Point::new(start as f64, by_start.get(&start).map_or(empty, |sum| value(sum))?));
        Line { name: self.name(), points: starts.filter_map(point).collect() }
    }
}

/// Dollars, with as many digits as small amounts need.
fn dollars(money: Money) -> String {
    written(money.dollars())
}

fn written(dollars: f64) -> String {
    if dollars >= 1.0 {
        return format!("${dollars:.2}");
    }
    // Three digits, however small: nobody reads an exponent on a bill.
    let decimals = if dollars > 0.0 { (2.0 - dollars.log10().floor()).clamp(2.0, 9.0) as usize } else { 0 };
    let text = format!("{dollars:.decimals$}");
    format!("${}", if decimals > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { &text })
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// The median and what one in twenty exceeds.
fn spread(mut micros: Vec<f64>) -> Html {
    micros.sort_by(f64::total_cmp);
    match (quantile(&micros, 0.5), quantile(&micros, 0.95)) {
        (Some(median), Some(most)) => {
            all([Html::from(seconds_of(median)), tag("small").with(format!(" {}", seconds_of(most))).into()])
        }
        _ => "–".into(),
    }
}

impl Overview {
    /// The page.
    pub fn part(&self) -> Part {
        let blocks = [self.figures(), self.charts(), self.comparison(), self.at_work(), self.health()];
        Part::new("Overview", self.lead(), blocks)
    }

    fn lead(&self) -> Html {
        let window = |(word, (hours, _)): (&str, (i64, i64))| {
            let name = if hours < 48 { format!("{hours} h") } else { format!("{} days", hours / 24) };
            let here = if hours == self.hours { "true" } else { "false" };
            tag("a").attr("href", format!("/console?hours={word}")).attr("aria-current", here).with(name)
        };
        let windows = tag("span").class("windows").attr("role", "group").attr("aria-label", "Time to look back on");
        let windows = windows.with_all(WINDOWS.map(window));
        all([Html::from("Answers that this server's database has recorded, of the last "), windows.into()])
    }

    fn cost(&self) -> Money {
        Money(self.variants.iter().map(|variant| cost(&variant.price, &variant.total).0).sum())
    }

    fn figures(&self) -> Html {
        let sum = |of: fn(&TrafficSum) -> u64| self.variants.iter().map(|variant| of(&variant.total)).sum::<u64>();
        let (answers, failed, cancelled) = (sum(|sum| sum.answers), sum(|sum| sum.failed), sum(|sum| sum.cancelled));
        let (prompt, cached, output) = (sum(|sum| sum.prompt_tokens), sum(|sum| sum.cached_tokens), sum(|sum| sum.output_tokens));
        let money = self.cost();
        let priced = match money.0 == 0 && answers > 0 {
            true => "no model has a price: [prices.NAME] in tidemill.toml",
            false => "by the price table",
        };
        let failures = share(failed, answers).map_or_else(|| "–".to_owned(), percent);
        let found = share(cached, prompt).map_or_else(String::new, |share| format!(", {} of them cached", percent(share)));
        tiles([
            ("Answers", count(answers), format!("{} broken off by the client", count(cancelled))),
            ("Failed", failures, format!("{} answers", count(failed))),
            ("Tokens", count(prompt + output), format!("{} in{found}; {} out", count(prompt), count(output))),
            ("Cost", dollars(money), priced.to_owned()),
        ])
    }

    fn charts(&self) -> Html {
        let (first, last, _) = self.window;
        let place = time_writer(first, last);
        let chart = |title: &str, value: fn(f64) -> String, least: f64, line: &dyn Fn(&Variant) -> Line| Chart {
            value,
            place,
            span: Some((first as f64, last as f64)),
            reach: Some(least),
            ..Chart::over_steps(title, self.variants.iter().take(LINES).map(line).collect())
        };
        let minutes = self.window.2 / 60_000_000;
        let found = self.variants.len();
        let busiest = if found > LINES { format!("; the {LINES} busiest of {found}") } else { String::new() };
        let each = |what: &str| format!("{what} in stretches of {minutes} min (UTC){busiest}");
        let answers =
            chart("Answers", significant, 4.0, &|variant| variant.line(self.window, Some(0.0), |sum| Some(sum.answers as f64)));
        let costs = chart("Cost", written, 0.0, &|variant| {
            variant.line(self.window, Some(0.0), |sum| Some(cost(&variant.price, sum).dollars()))
        });
        let failed =
            chart("Failed", percent, 0.01, &|variant| variant.line(self.window, None, |sum| share(sum.failed, sum.answers)));
        let waited = chart("Time to the first token", seconds_of, 0.0, &|variant| {
            let mean = |sum: &TrafficSum| (sum.begun > 0).then(|| sum.first_token_us as f64 / sum.begun as f64);
            variant.line(self.window, None, mean)
        });
        let figures = [
            figure("answers", &answers, each("Answers")),
            figure("waited", &waited, each("Mean over the answers")),
            figure("failed", &failed, each("Share of the answers")),
            figure("cost", &costs, each("Dollars")).filter(|_| self.cost().0 > 0),
        ];
        pictures(figures.into_iter().flatten())
    }

    fn comparison(&self) -> Html {
        let block = block("By model and variant");
        if self.variants.is_empty() {
            let words = "Nothing was recorded in this time. Answers of `POST /v1/chat/completions` are, unless the server runs with \
                         `--record off`.";
            return block.with(nothing(words)).into();
        }
        let row = |variant: &Variant| {
            let total = &variant.total;
            let money = cost(&variant.price, total);
            let each = share(1000, total.answers).map(|part| dollars(Money((money.0 as f64 * part) as i64)));
            let times = |of: fn(&Latency) -> Option<i64>| variant.latencies.iter().filter_map(of).map(|us| us as f64).collect();
            [
                (&total.model).into(),
                total.variant.as_ref().map_or_else(|| "–".into(), Html::from),
                variant.remote.as_ref().map_or_else(|| "here".into(), |servers| chip(Mood::Plain, servers).into()),
                count(total.answers).into(),
                share(total.failed, total.answers).map(percent).into(),
                count(total.prompt_tokens).into(),
                count(total.output_tokens).into(),
                spread(times(|latency| latency.first_token_us)),
                spread(times(|latency| Some(latency.duration_us))),
                dollars(money).into(),
                each.into(),
            ]
        };
        let head = [
            "Model",
            "Variant",
            "Answered",
            "Answers",
            "Failed",
            "Tokens in",
            "Tokens out",
            "First token",
            "Whole answer",
            "Cost",
            "per 1,000 answers",
        ];
        let words = "Times are the median and, smaller, what one in twenty exceeds, over the newest 1,000 complete answers.";
        let table =
            tag("div").class("compare").with(table("By model and variant", head, self.variants.iter().take(ROWS).map(row)));
        let left_out = self.variants.len().saturating_sub(ROWS);
        let more = (left_out > 0).then(|| tag("p").with(format!("{left_out} more answered less often.")));
        block.with(table).with(more).with(tag("p").with(words)).into()
    }

    fn at_work(&self) -> Html {
        let block = block("At work now");
        let rollout = |rollout: &Rollout| Work {
            what: "rollout",
            name: rollout.name.clone(),
            path: vec!["rollouts".to_owned(), rollout.id.to_string()],
            state: rollout.state["status"]["kind"].as_str().unwrap_or_default().to_owned(),
            progress: rollout.latest["reason"].as_str().unwrap_or_default().to_owned(),
            since: rollout.created,
        };
        let rollouts: Vec<Work> = self.rollouts.iter().map(rollout).collect();
        let row = |work: &Work| {
            let path: Vec<&str> = work.path.iter().map(String::as_str).collect();
            let name: Html = if path.is_empty() { (&work.name).into() } else { link(&path, &work.name).into() };
            let state = chip(Mood::of_state(&work.state), &work.state.replace('_', " "));
            [name, work.what.into(), state.into(), (&work.progress).into(), moment(work.since)]
        };
        let rows: Vec<_> = rollouts.iter().chain(&self.work).map(row).collect();
        if rows.is_empty() {
            return block.with(nothing("No rollout, training or build.")).into();
        }
        block.with(table("At work now", ["Name", "What", "State", "Where it is", "Since (UTC)"], rows)).into()
    }

    fn health(&self) -> Html {
        let (mood, word) = if self.database { (Mood::Good, "ready") } else { (Mood::Bad, "away") };
        let database: [Html; 2] = ["Database".into(), chip(mood, word).into()];
        let model = |(name, state): &(String, &'static str)| [name.into(), chip(Mood::of_state(state), state).into()];
        let rows = std::iter::once(database).chain(self.models.iter().map(model));
        block("Health").with(table("Health", ["Part", "State"], rows)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use uuid::Uuid;

    const EVIL: &str = "<b>\"m\"</b>";

    fn sum(model: &str, variant: Option<&str>, start: i64, answers: u64) -> TrafficSum {
        TrafficSum {
            model: model.into(),
            variant: variant.map(str::to_owned),
            start,
            answers,
            failed: 1,
            prompt_tokens: 1_000_000,
            output_tokens: 500_000,
            begun: answers,
            first_token_us: 200_000 * answers,
            ..TrafficSum::default()
        }
    }

    fn overview(variants: Vec<Variant>) -> Overview {
        Overview {
            hours: 24,
            window: (100, 500, 100),
            variants,
            rollouts: Vec::new(),
            work: Vec::new(),
            models: vec![(EVIL.into(), "ready")],
            database: true,
        }
    }

    #[test]
    fn stretches_add_up_and_the_busiest_comes_first() {
        let sums = vec![sum("a", None, 100, 4), sum("a", None, 300, 8), sum("a", Some("a:x"), 100, 20), sum("b", None, 100, 2)];
        let variants = Variant::all(sums);
        let answers: Vec<_> = variants.iter().map(|variant| (variant.name(), variant.total.answers)).collect();
        assert_eq!(answers, [("a:x".to_owned(), 20), ("a".to_owned(), 12), ("b".to_owned(), 2)]);
        let line = variants[1].line((100, 500, 100), Some(0.0), |sum| Some(sum.answers as f64));
        let values: Vec<_> = line.points.iter().map(|point| (point.at, point.value)).collect();
        assert_eq!(values, [(100.0, 4.0), (200.0, 0.0), (300.0, 8.0), (400.0, 0.0)]);
        assert_eq!(variants[1].line((100, 500, 100), None, |sum| share(sum.failed, sum.answers)).points.len(), 2);
    }

    #[test]
    fn the_price_is_that_of_the_tokens_and_names_stay_text() {
        let mut variants = Variant::all(vec![sum(EVIL, Some(EVIL), 100, 4)]);
        variants[0].price = Price { input: 150, cached_input: 75, output: 600 };
        variants[0].remote = Some(EVIL.into());
        variants[0].latencies =
            (1..=100).map(|ms| Latency { first_token_us: Some(ms * 1000), duration_us: ms * 10_000 }).collect();
        let mut page = overview(variants);
        page.work.push(Work {
            what: "training",
            name: EVIL.into(),
            path: vec!["trainings".into(), EVIL.into()],
            state: EVIL.into(),
            progress: EVIL.into(),
            since: 0,
        });
        let text = page.part().document();
        assert!(!text.contains("<b>\"m"), "{text}");
        // 1 M tokens in at $0.15 and half a million out at $0.60.
        assert!(text.contains("<b>$0.45</b>") && text.contains("<td>$112.50</td>"), "{text}");
        assert!(text.contains("0.05 s<small> 0.1 s</small>"), "{text}");
        assert!(text.contains("<td><span class=\"chip none\">&lt;b&gt;") && text.contains("<td>25 %</td>"), "{text}");
        assert!(text.contains("/console/trainings/%3Cb%3E%22m%22%3C%2Fb%3E"));
        assert!(text.contains("<h3>Cost</h3>") && !text.contains("has a price"));
    }

    #[test]
    fn a_bill_has_no_exponents_and_without_prices_it_says_how_to_set_them() {
        for (dollars, expected) in [(0.0, "$0"), (0.000_282, "$0.000282"), (0.09, "$0.09"), (0.4567, "$0.457"), (12.0, "$12.00")]
        {
            assert_eq!(written(dollars), expected);
        }
        let text = overview(Variant::all(vec![sum("a", None, 100, 4), sum("a", Some("a"), 100, 4)])).part().document();
        assert!(text.contains("no model has a price: [prices.NAME]") && !text.contains("<h3>Cost</h3>"), "{text}");
        assert!(text.contains(">a · a<"), "the base in a rollout is told from the base: {text}");
    }

    #[test]
    fn of_thousands_the_busiest_are_shown_and_the_rest_is_counted() {
        let sums: Vec<TrafficSum> = (0..2000).map(|place| sum(&format!("m{place}"), None, 100, 5000 - place)).collect();
        let text = overview(Variant::all(sums)).part().document();
        assert!(text.contains("<td>m99</td>") && !text.contains("<td>m100</td>") && text.contains("1900 more answered"));
        assert!(text.contains("; the 6 busiest of 2000<") && text.contains("8\u{202f}001\u{202f}000"), "all are counted");
    }

    #[test]
    fn an_empty_server_says_so() {
        let mut page = overview(Vec::new());
        let text = page.part().document();
        assert!(text.contains("Nothing was recorded") && text.contains("No rollout, training or build."));
        assert!(!text.contains("<svg"));
        page.database = false;
        assert!(page.part().document().contains(">away</span>"));
        let job = Job {
            id: Uuid::nil(),
            created: 0,
            updated: 0,
            kind: "dataset.build".into(),
            state: JobState::Running,
            spec: json!({"name": "short"}),
            progress: json!({}),
            error: None,
        };
        page.work.push(Work::of_build(&job));
        assert!(page.part().document().contains("<a href=\"/console/datasets\">short</a>"));
    }
}
