//! What the operators' pages are made of.

use crate::clock::when;
use crate::console::html::{Element, Html, all, tag};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tidemill_rlhf::chart::{Chart, Fragment, Line, Point, significant, thousands};
use tidemill_rlhf::quality::Drawing;
use tidemill_rlhf::statistics::Interval;

/// All but what RFC 3986 calls unreserved.
const ENCODED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// Rows of numbers beneath a picture; older ones are left out.
const NUMBERS: usize = 200;
/// Points of a line.
const POINTS: usize = 400;

/// The main part of a page, which the page fetches with the visitor's key.
#[derive(Clone, Debug)]
pub struct Part {
    /// Of the window.
    pub title: String,
    /// What is shown.
    pub body: Html,
}

impl Part {
    /// With a heading and what follows it.
    pub fn new(title: &str, lead: impl Into<Html>, rest: impl IntoIterator<Item = Html>) -> Self {
        let heading = tag("h1").attr("id", "part-title").attr("tabindex", "-1").with(title);
        let header = tag("header").with(heading).with(tag("p").class("lead").with(lead));
        Self { title: title.to_owned(), body: tag("div").class("panel").with(header).with_all(rest).into() }
    }

    /// As a document of its own.
    pub fn document(&self) -> String {
        let title = Html::from(tag("title").with(&self.title));
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">{}</head><body>{}</body></html>\n",
            title.as_str(),
            self.body.as_str()
        )
    }
}

/// A part with a heading of its own.
pub fn block(title: &str) -> Element {
    tag("section").class("block card").with(tag("h2").with(title))
}

/// Numbers side by side: what it is, the number, and what there is to know about it.
pub fn tiles(tiles: impl IntoIterator<Item = (&'static str, String, String)>) -> Html {
    let tile = |(name, value, words): (&str, String, String)| {
        let name = tag("h2").class("caption").with(name);
        tag("section").class("figure card").with(name).with(tag("b").with(value)).with(tag("small").with(words))
    };
    tag("div").class("figures").with_all(tiles.into_iter().map(tile)).into()
}

/// A table of this name; the first column names the row.
pub fn table<const N: usize>(name: &str, head: [&str; N], rows: impl IntoIterator<Item = [Html; N]>) -> Html {
    columns(name, &head, rows)
}

/// The same where the columns are known only now.
fn columns(name: &str, head: &[&str], rows: impl IntoIterator<Item = impl IntoIterator<Item = Html>>) -> Html {
    let head = tag("tr").with_all(head.iter().map(|name| tag("th").attr("scope", "col").with(*name)));
    let body =
        tag("tbody").with_all(rows.into_iter().map(|row| tag("tr").with_all(row.into_iter().map(|cell| tag("td").with(cell)))));
    let table = tag("table").class("sheet told").with(tag("thead").with(head)).with(body);
    scrolled(name, table)
}

/// What may be wider than the page is scrolled by itself, by keyboard, too.
pub fn scrolled(name: &str, inside: impl Into<Html>) -> Html {
    tag("div").class("scroll").attr("tabindex", "0").attr("role", "group").attr("aria-label", name).with(inside).into()
}

/// Names and what they stand for.
pub fn facts(facts: impl IntoIterator<Item = (&'static str, Html)>) -> Html {
    let known = facts.into_iter().filter(|(_, fact)| !fact.is_empty());
    let fact = |(name, fact): (&str, Html)| tag("div").with(tag("dt").with(name)).with(tag("dd").with(fact));
    tag("dl").class("facts").with_all(known.map(fact)).into()
}

/// A state in a word, coloured by what it means.
pub fn chip(mood: Mood, word: &str) -> Element {
    tag("span").class(&format!("chip {}", mood.class())).with(word)
}

/// What a state means to who looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// As it should be.
    Good,
    /// Somebody should look.
    Warn,
    /// Wrong.
    Bad,
    /// Neither.
    Plain,
}

impl Mood {
    fn class(self) -> &'static str {
        match self {
            Self::Good => "pass",
            Self::Warn => "warn",
            Self::Bad => "fail",
            Self::Plain => "none",
        }
    }

    /// Of a job's or build's state.
    pub fn of_state(state: &str) -> Self {
        match state {
            "succeeded" | "ready" | "serving" | "pass" | "promoted" | "completed" => Self::Good,
            "failed" | "stopped" | "revoked" | "fail" => Self::Bad,
            "paused" | "cancelled" | "draining" | "loading" | "warn" | "refused" => Self::Warn,
            _ => Self::Plain,
        }
    }
}

/// A link within the console; `path` is made of parts that are encoded here.
pub fn link(path: &[&str], words: impl Into<Html>) -> Element {
    tag("a").attr("href", href("/console", path)).with(words)
}

/// A path whose parts may hold anything.
pub fn href(root: &str, parts: &[&str]) -> String {
    parts.iter().fold(root.to_owned(), |path, part| format!("{path}/{}", utf8_percent_encode(part, &ENCODED)))
}

/// A moment, in microseconds since 1970.
pub fn moment(micros: i64) -> Html {
    tag("time").attr("datetime", format!("{}Z", when(micros).replace(' ', "T"))).with(when(micros)).into()
}

/// A count, its digits in groups.
pub fn count(count: u64) -> String {
    thousands(usize::try_from(count).unwrap_or(usize::MAX))
}

/// Seconds, of microseconds.
pub fn seconds_of(micros: f64) -> String {
    in_seconds(micros / 1e6)
}

/// Seconds.
pub fn in_seconds(seconds: f64) -> String {
    format!("{} s", significant(seconds))
}

/// `0.1 to 0.3`
pub fn interval(value: fn(f64) -> String, interval: Interval) -> String {
    format!("{} to {}", value(interval.low), value(interval.high))
}

/// A picture with the numbers beneath; nothing where there are none. `id` is unique on the page.
pub fn figure(id: &str, chart: &Chart, note: impl Into<Html>) -> Option<Html> {
    let caption = tag("figcaption").with(note);
    Some(drawn(id, &chart.title, &chart.draw()?, Some(caption), points(chart)))
}

/// The same of a plot of a dataset's quality.
pub fn plot(id: &str, drawing: &Drawing) -> Html {
    let rows = drawing.rows.iter().map(|row| row.iter().map(Html::from));
    drawn(id, drawing.title, &drawing.picture, None, columns(&numbers_of(drawing.title), drawing.head, rows))
}

fn drawn(id: &str, title: &str, picture: &Fragment, caption: Option<Element>, numbers: Html) -> Html {
    let figure = tag("figure").class("block card").with(tag("h3").with(title)).with(scrolled(title, picture)).with(caption);
    let summary = tag("summary").with("Numbers").with(tag("span").class("visually-hidden").with(format!(" of {title}")));
    figure.with(tag("details").attr("id", format!("numbers-{id}")).with(summary).with(numbers)).into()
}

fn numbers_of(title: &str) -> String {
    format!("Numbers of {title}")
}

fn points(chart: &Chart) -> Html {
    let mut all_points: Vec<(&Line, &Point)> =
        chart.lines.iter().flat_map(|line| line.finite().map(move |point| (line, point))).collect();
    all_points.sort_by(|(_, one), (_, other)| other.at.total_cmp(&one.at));
    let found = all_points.len();
    let row = |(line, point): &(&Line, &Point)| {
        let range = point.interval.map(|range| interval(chart.value, range));
        [(chart.place)(point.at).into(), (&line.name).into(), (chart.value)(point.value).into(), range.into()]
    };
    let head = ["At", "Line", "Value", "Interval"];
    let rows = table(&numbers_of(&chart.title), head, all_points.iter().take(NUMBERS).map(row));
    let more = (found > NUMBERS).then(|| tag("p").with(format!("The newest {NUMBERS} of {found}.")));
    all([rows, more.into()])
}

/// As many of the points as a picture shows, the last among them.
pub fn thinned(points: Vec<Point>) -> Vec<Point> {
    let every = points.len().div_ceil(POINTS).max(1);
    let last = points.len().wrapping_sub(1);
    points.into_iter().enumerate().filter(|(at, _)| (last - at).is_multiple_of(every)).map(|(_, point)| point).collect()
}

/// How a chart over these times writes a time: within a day without its date.
pub fn time_writer(first: i64, last: i64) -> fn(f64) -> String {
    const DAY: i64 = 86_400_000_000;
    if last - first < DAY { |at| crate::clock::time_of_day(at as i64) } else { |at| when(at as i64) }
}

/// What there is to say where there is nothing to show; see [`said`].
pub fn nothing(words: &str) -> Html {
    tag("p").class("nothing").with(said(words)).into()
}

/// A text in which what stands between backticks is code.
pub fn said(words: &str) -> Html {
    let parts: Vec<&str> = words.split('`').collect();
    if parts.len().is_multiple_of(2) {
        // One without another is a character.
        return words.into();
    }
    all(parts
        .iter()
        .enumerate()
        .map(|(place, part)| if place % 2 == 1 { tag("code").with(*part).into() } else { Html::from(*part) }))
}

/// Pictures beside each other; nothing without any.
pub fn pictures(figures: impl IntoIterator<Item = Html>) -> Html {
    let inside = all(figures);
    if inside.is_empty() { inside } else { tag("div").class("plots").with(inside).into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVIL: &str = "<script>alert(1)</script>\"'";

    #[test]
    fn hostile_names_stay_text_in_every_piece() {
        let lines = vec![Line { name: EVIL.into(), points: vec![Point::new(1.0, 2.0), Point::new(2.0, 3.0)] }];
        let chart = Chart::over_steps(EVIL, lines);
        let pieces = [
            block(EVIL).into(),
            tiles([("name", EVIL.into(), EVIL.into())]),
            table(EVIL, [EVIL], [[EVIL.into()]]),
            facts([("name", EVIL.into())]),
            chip(Mood::Bad, EVIL).into(),
            link(&["rollouts", EVIL], EVIL).into(),
            figure("one", &chart, EVIL).unwrap(),
            nothing(EVIL),
        ];
        let part = Part::new(EVIL, EVIL, pieces).document();
        assert!(!part.contains("<script") && part.contains("&lt;script&gt;"), "{part}");
        assert!(part.contains("/console/rollouts/%3Cscript%3Ealert%281%29%3C%2Fscript%3E%22%27"));
    }

    #[test]
    fn what_stands_between_backticks_is_code() {
        assert_eq!(said("`a <b>`, or c").as_str(), "<code>a &lt;b&gt;</code>, or c");
        assert_eq!(said("a ` b").as_str(), "a ` b");
    }

    #[test]
    fn a_figure_has_its_numbers_beneath_the_newest_first() {
        let points = (0..300).map(|at| Point::new(f64::from(at), f64::from(at))).collect();
        let chart = Chart::over_steps("Loss", vec![Line { name: "training".into(), points }]);
        let figure = figure("loss", &chart, "").unwrap();
        assert!(figure.as_str().contains("<td>299</td><td>training</td>") && !figure.as_str().contains("<td>99</td>"));
        assert!(figure.as_str().contains("The newest 200 of 300.") && figure.as_str().contains("id=\"numbers-loss\""));
        assert!(super::figure("none", &Chart::over_steps("Loss", Vec::new()), "").is_none());
    }

    #[test]
    fn few_points_stay_and_many_are_thinned_to_the_last() {
        let points = |count: usize| -> Vec<Point> { (0..count).map(|at| Point::new(at as f64, 0.0)).collect() };
        assert_eq!(thinned(points(0)), []);
        assert_eq!(thinned(points(POINTS)).len(), POINTS);
        let thin = thinned(points(1001));
        assert_eq!((thin.len(), thin.last().map(|point| point.at)), (334, Some(1000.0)));
    }
}
