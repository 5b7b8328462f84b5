//! The plots of the page, as SVG that takes its colours from the page, and the numbers that they show.

use std::fmt::Write;

use super::{
    Bin, Limit, Share,
    html::{escape, number, thousands},
    reliability::Rater,
};
use crate::chart::{Fragment, WIDTH, cut, svg};
use crate::statistics::Interval;

/// Left edge of bars that have names beside them.
const NAMES: f64 = 150.0;
const RIGHT: f64 = 56.0;
const ROW: f64 = 22.0;
const TOP: f64 = 22.0;

/// A plot, and what it shows in numbers, for those who do not see it or want them exactly.
#[derive(Clone, Debug)]
pub struct Drawing {
    /// What it shows.
    pub title: &'static str,
    /// The picture.
    pub picture: Fragment,
    /// The names of the columns of `rows`.
    pub head: &'static [&'static str],
    /// The numbers as text, as many in each row as there are columns.
    pub rows: Vec<Vec<String>>,
}

// Writing to a string cannot fail, so results of `write!` are dropped here and below.
/// Bars over the difference of lengths; to the right of zero the chosen answer is the longer one.
pub(super) fn lengths(title: &'static str, bins: &[Bin]) -> Option<Drawing> {
    const HEIGHT: f64 = 240.0;
    const BASE: f64 = 190.0;
    let (first, last) = (bins.first()?, bins.last()?);
    let most = bins.iter().map(|bin| bin.count).max().unwrap_or(1).max(1) as f64;
    let (left, right) = (44.0, WIDTH - 12.0);
    let x = |value: f64| left + (value - first.low) / (last.high - first.low) * (right - left);
    let y = |count: f64| BASE - count / most * (BASE - TOP);
    let mut body = String::new();
    for part in [0.5, 1.0] {
        let at = y(most * part);
        let _ = write!(
            body,
            "<path class=grid d=\"M{left} {at:.1}H{right}\"/><text class=tick x=\"{:.0}\" y=\"{:.1}\" text-anchor=end>{:.0}</text>",
            left - 6.0,
            at + 4.0,
            most * part
        );
    }
    for bin in bins {
        let (from, to) = (x(bin.low) + 0.75, x(bin.high) - 0.75);
        let side = if bin.low + bin.high > 1e-9 { "more" } else { "less" };
        let top = y(bin.count as f64);
        let _ = write!(
            body,
            "<rect class={side} x=\"{from:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{:.0} to {:.0} characters: {} \
             pairs</title></rect>",
            to - from,
            BASE - top,
            bin.low,
            bin.high,
            bin.count
        );
    }
    let _ = write!(body, "<path class=axis d=\"M{left} {BASE}H{right}\"/><path class=zero d=\"M{0:.1} {TOP}V{BASE}\"/>", x(0.0));
    for value in [first.low, first.low / 2.0, 0.0, last.high / 2.0, last.high] {
        let anchor = if value == first.low {
            "start"
        } else if value == last.high {
            "end"
        } else {
            "middle"
        };
        let _ = write!(
            body,
            "<text class=tick x=\"{:.1}\" y=\"{:.1}\" text-anchor={anchor}>{}</text>",
            x(value),
            BASE + 16.0,
            number(value.round())
        );
    }
    let _ = write!(
        body,
        "<text class=note x=\"{left}\" y=\"{0:.0}\">← rejected is longer</text><text class=note x=\"{right}\" y=\"{0:.0}\" \
         text-anchor=end>chosen is longer →</text>",
        BASE + 38.0
    );
    let whole = |value: f64| number(value.round());
    let row = |bin: &Bin| vec![format!("{} to {}", whole(bin.low), whole(bin.high)), thousands(bin.count)];
    let picture = svg(HEIGHT, "Characters of the chosen answer less those of the rejected", &body);
    let rows = bins.iter().map(row).collect();
    Some(Drawing { title, picture: Fragment::new(picture), head: &["Characters", "Pairs"], rows })
}

/// A bar per person, and the thresholds.
pub(super) fn shares(title: &'static str, shares: &[Share], limit: Option<Limit>) -> Option<Drawing> {
    let largest = shares.iter().map(|share| share.share).reduce(f64::max)?;
    let reach = (1.15 * largest).max(limit.map_or(0.0, |limit| 1.1 * limit.warn)).min(1.0);
    let x = |value: f64| NAMES + value / reach * (WIDTH - NAMES - RIGHT);
    let bottom = TOP + ROW * shares.len() as f64;
    let mut body = String::new();
    for (place, share) in shares.iter().enumerate() {
        let y = TOP + ROW * place as f64;
        let class = limit.map_or("more", |limit| bar(limit, share.share));
        let _ = write!(
            body,
            "{}<rect class={class} x=\"{NAMES}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{:.1} rows</title></rect><text \
             class=value x=\"{:.1}\" y=\"{:.1}\">{:.1} %</text>",
            name(&share.person, y),
            y + 3.0,
            (x(share.share) - NAMES).max(1.0),
            ROW - 6.0,
            share.rows,
            x(share.share) + 6.0,
            y + 15.5,
            100.0 * share.share
        );
    }
    let _ = write!(body, "<path class=axis d=\"M{NAMES} {TOP}V{bottom:.1}\"/>");
    for (word, value) in limit.map(|limit| [("warn", limit.warn), ("fail", limit.fail)]).into_iter().flatten() {
        if value <= reach {
            let _ = write!(body, "{}", threshold(word, x(value), bottom));
        }
    }
    let row = |share: &Share| vec![share.person.clone(), format!("{:.1} %", 100.0 * share.share), number(share.rows)];
    let (picture, rows) = (svg(bottom + 6.0, title, &body), shares.iter().map(row).collect());
    Some(Drawing { title, picture: Fragment::new(picture), head: &["Person", "Share", "Rows"], rows })
}

/// A number between −1 and 1, and what it may as well be.
pub(super) struct Dot<'a> {
    /// What stands beside it.
    pub(super) name: &'a str,
    pub(super) value: f64,
    pub(super) interval: Interval,
    /// What is told of it besides.
    pub(super) about: String,
}

impl<'a> Dot<'a> {
    /// How good a rater is, from against the others (−1) to always right (1).
    pub(super) fn of_rater(rater: &'a Rater) -> Self {
        let Rater { skill, accuracy, judgements, interval, .. } = rater;
        let about = format!("skill {skill:.2}, accuracy {accuracy:.2}, {judgements} judgements");
        Self { name: &rater.rater, value: *skill, interval: *interval, about }
    }
}

/// A dot and an interval per number.
pub(super) fn dots(title: &'static str, dots: &[Dot<'_>], limit: Option<Limit>) -> Option<Drawing> {
    if dots.is_empty() {
        return None;
    }
    let lowest = dots.iter().map(|dot| dot.interval.low).fold(0.0, f64::min).max(-1.0);
    let x = |value: f64| NAMES + (value.clamp(lowest, 1.0) - lowest) / (1.0 - lowest) * (WIDTH - NAMES - RIGHT);
    let bottom = TOP + ROW * dots.len() as f64;
    let mut body = String::new();
    for value in [-1.0, -0.5, 0.0, 0.5, 1.0].into_iter().filter(|value| *value >= lowest) {
        let _ = write!(
            body,
            "<path class=grid d=\"M{0:.1} {TOP}V{bottom:.1}\"/><text class=tick x=\"{0:.1}\" y=\"{1:.1}\" text-anchor=middle>{2}</text>",
            x(value),
            bottom + 16.0,
            number(value)
        );
    }
    for (place, dot) in dots.iter().enumerate() {
        let y = TOP + ROW * place as f64;
        let class = limit.map_or("more", |limit| bar(limit, dot.interval.high));
        let (middle, text) = (y + 11.0, y + 15.5);
        let (low, high, at) = (x(dot.interval.low), x(dot.interval.high), x(dot.value));
        let _ = write!(
            body,
            "{}<path class=\"whisker {class}\" d=\"M{low:.1} {middle:.1}H{high:.1}\"/><circle class={class} cx=\"{at:.1}\" \
             cy=\"{middle:.1}\" r=\"5\"><title>{}</title></circle><text class=value x=\"{:.1}\" y=\"{text:.1}\">{:.2}</text>",
            name(dot.name, y),
            escape(&dot.about),
            WIDTH - RIGHT + 12.0,
            dot.value,
        );
    }
    for (word, value) in limit.map(|limit| [("warn", limit.warn), ("fail", limit.fail)]).into_iter().flatten() {
        let _ = write!(body, "{}", threshold(word, x(value), bottom));
    }
    let two = |value: f64| format!("{value:.2}").replace('-', "−");
    let row = |dot: &Dot<'_>| {
        let interval = format!("{} to {}", two(dot.interval.low), two(dot.interval.high));
        vec![dot.name.to_owned(), two(dot.value), interval, dot.about.clone()]
    };
    let picture = svg(bottom + 22.0, &format!("{title}, with 95 % intervals"), &body);
    let head = &["Of", "Value", "95 % interval", "About it"];
    Some(Drawing { title, picture: Fragment::new(picture), head, rows: dots.iter().map(row).collect() })
}

/// A person's name at the left of a row, cut to fit.
fn name(person: &str, y: f64) -> String {
    const LETTERS: usize = 18;
    format!(
        "<text class=name x=\"{:.0}\" y=\"{:.1}\" text-anchor=end>{}<title>{}</title></text>",
        NAMES - 8.0,
        y + 15.5,
        escape(&cut(person, LETTERS)),
        escape(person)
    )
}

fn threshold(word: &str, x: f64, bottom: f64) -> String {
    format!(
        "<path class=\"limit {word}\" d=\"M{x:.1} {:.1}V{bottom:.1}\"/><text class=\"tick {word}\" x=\"{x:.1}\" y=\"{:.1}\" \
         text-anchor=middle>{word}</text>",
        TOP - 4.0,
        TOP - 8.0
    )
}

fn bar(limit: Limit, evidence: f64) -> &'static str {
    match limit.status(evidence) {
        super::Status::Fail => "fail",
        super::Status::Warn => "warn",
        _ => "more",
    }
}
