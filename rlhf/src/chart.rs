//! Lines with their intervals as SVG that takes its colours from the page: a function of values.
//!
//! A page styles `curve`, `band`, `rule`, `mark`, `grid`, `tick` and `note`; the lines of one chart are told apart by `c0`, `c1`, ….

use std::fmt::Write;

pub use crate::quality::html::{escape, number, thousands};
use crate::statistics::Interval;

/// Units across of every picture.
pub(crate) const WIDTH: f64 = 560.0;
/// The plot's left edge, beside which the scale stands.
const LEFT: f64 = 64.0;
const RIGHT: f64 = WIDTH - 12.0;
/// The plot's height.
const PLOT: f64 = 174.0;
const LEGEND_ROW: f64 = 16.0;
/// Columns of a legend and the letters that a name has room for in them: as many columns as the longest name allows.
const LEGENDS: [(usize, usize); 3] = [(3, 20), (2, 31), (1, 66)];
/// Intervals before this part of the points do not widen the scale: the first are so wide that nothing else would be seen.
const SETTLED: f64 = 1.0 / 3.0;

/// HTML or SVG that is whole, and in which every text is escaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fragment(String);

impl Fragment {
    /// Of a text that its maker has escaped.
    pub(crate) fn new(text: String) -> Self {
        Self(text)
    }

    /// The markup.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Lines over one scale.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What it shows, also to those who do not see it.
    pub title: String,
    /// Writes a place along the chart, such as a step or a time.
    pub place: fn(f64) -> String,
    /// Writes a value.
    pub value: fn(f64) -> String,
    /// What is drawn.
    pub lines: Vec<Line>,
    /// Values that something depends on.
    pub rules: Vec<Rule>,
    /// Places where something happened.
    pub marks: Vec<Mark>,
    /// From where to where it is drawn along, also where there are no points; else from the first to the last.
    pub span: Option<(f64, f64)>,
    /// Where it is there, the scale goes from zero to at least this.
    pub reach: Option<f64>,
}

/// A line of a chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// What it shows.
    pub name: String,
    /// Ascending by place.
    pub points: Vec<Point>,
}

/// A point of a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Where along the chart.
    pub at: f64,
    /// The value there.
    pub value: f64,
    /// What the value may as well be.
    pub interval: Option<Interval>,
}

/// A value that something depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// The value.
    pub value: f64,
    /// What it means, in a word or two.
    pub name: String,
}

/// A place where something happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// Where along the chart.
    pub at: f64,
    /// What it is called on the chart, in a letter or two.
    pub sign: String,
    /// What happened.
    pub name: String,
}

impl Point {
    /// A value without an interval.
    pub fn new(at: f64, value: f64) -> Self {
        Self { at, value, interval: None }
    }

    fn is_finite(&self) -> bool {
        let ends = self.interval.is_none_or(|interval| interval.low.is_finite() && interval.high.is_finite());
        self.at.is_finite() && self.value.is_finite() && ends
    }
}

impl Line {
    /// Those of its points that can be drawn.
    pub fn finite(&self) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(|point| point.is_finite())
    }
}

/// Lowest and highest, with room around where they are the same, so that a flat line stands in the middle.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    let room = if high > low { 0.0 } else { (0.1 * low.abs()).max(1e-12) };
    low.is_finite().then_some((low - room, high + room))
}

/// Two to four round numbers between these.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 3.0;
    let unit = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|part| part * unit).find(|step| *step >= rough).unwrap_or(rough);
    // Of a tick on the edge rounding leaves a little more or less; to add zero takes the sign from one that is none.
    let (first, last) = ((low / step - 1e-9).ceil() + 0.0, (high / step + 1e-9).floor());
    std::iter::successors(Some(first), |at| Some(at + 1.0)).take_while(|at| *at <= last).take(8).map(|at| at * step).collect()
}

/// Places on the picture.
struct Scale {
    first: f64,
    last: f64,
    low: f64,
    high: f64,
    top: f64,
}

impl Scale {
    fn x(&self, at: f64) -> f64 {
        LEFT + (at - self.first) / (self.last - self.first) * (RIGHT - LEFT)
    }

    fn y(&self, value: f64) -> f64 {
        let height = (value.clamp(self.low, self.high) - self.low) / (self.high - self.low);
        self.base() - height * PLOT
    }

    fn base(&self) -> f64 {
        self.top + PLOT
    }
}

impl Chart {
    /// Lines over steps.
    pub fn over_steps(title: impl Into<String>, lines: Vec<Line>) -> Self {
        let place = |step: f64| number(step.round());
        let (rules, marks) = (Vec::new(), Vec::new());
        Self { title: title.into(), place, value: significant, lines, rules, marks, span: None, reach: None }
    }

    /// The picture; none without a point.
    pub fn draw(&self) -> Option<Fragment> {
        let points = || self.lines.iter().flat_map(Line::finite);
        let found = range(points().map(|point| point.at))?;
        let (first, last) = self.span.filter(|(first, last)| first < last).unwrap_or(found);
        let settled = first + SETTLED * (last - first);
        let wide = points().filter(|point| point.at >= settled).filter_map(|point| point.interval);
        let values = points().map(|point| point.value).chain(wide.flat_map(|interval| [interval.low, interval.high]));
        let (low, high) = range(values.chain(self.rules.iter().map(|rule| rule.value).filter(|value| value.is_finite())))?;
        let (low, high) = self.reach.map_or((low, high), |least| (0.0, high.max(least)));
        let legend = Legend::of(&self.lines);
        let scale = Scale { first, last, low, high, top: 20.0 + legend.height() };
        let mut body = String::new();
        self.draw_scale(&scale, &mut body);
        for (place, line) in self.lines.iter().enumerate() {
            draw_line(place, line, &scale, &mut body);
        }
        self.draw_rules(&scale, &mut body);
        self.draw_marks(&scale, &mut body);
        legend.draw(&self.lines, &mut body);
        Some(Fragment::new(svg(scale.base() + 34.0, &self.told(), &body)))
    }

    /// What the picture shows, for those who do not see it: where each line begins and ends.
    fn told(&self) -> String {
        let at = |point: &Point| format!("{} at {}", (self.value)(point.value), (self.place)(point.at));
        let line = |line: &Line| {
            let (first, last) = (line.finite().next()?, line.finite().last()?);
            let range = last.interval.map_or_else(String::new, |range| {
                format!(", between {} and {}", (self.value)(range.low), (self.value)(range.high))
            });
            let way = if first.at < last.at { format!("from {} to {}", at(first), at(last)) } else { at(last) };
            Some(format!("{}: {way}{range}.", line.name))
        };
        std::iter::once(format!("{}.", self.title)).chain(self.lines.iter().filter_map(line)).collect::<Vec<_>>().join(" ")
    }

    // Writing to a string cannot fail, so results of `write!` are dropped here and below.
    fn draw_scale(&self, scale: &Scale, body: &mut String) {
        let mut above = String::new();
        for value in ticks(scale.low, scale.high) {
            let (at, text) = (scale.y(value), (self.value)(value));
            // Of two that would read the same one is enough.
            if text == above {
                continue;
            }
            let _ = write!(
                body,
                "<path class=grid d=\"M{LEFT} {at:.1}H{RIGHT}\"/><text class=tick x=\"{:.0}\" y=\"{:.1}\" text-anchor=end>{}</text>",
                LEFT - 6.0,
                at + 4.0,
                escape(&text),
            );
            above = text;
        }
        for (place, anchor) in [(scale.first, "start"), ((scale.first + scale.last) / 2.0, "middle"), (scale.last, "end")] {
            let _ = write!(
                body,
                "<text class=tick x=\"{:.1}\" y=\"{:.1}\" text-anchor={anchor}>{}</text>",
                scale.x(place),
                scale.base() + 16.0,
                escape(&(self.place)(place)),
            );
        }
    }

    fn draw_rules(&self, scale: &Scale, body: &mut String) {
        for rule in self.rules.iter().filter(|rule| rule.value.is_finite()) {
            let at = scale.y(rule.value);
            // Inside the plot on either edge.
            let text = if at < scale.top + 14.0 { at + 13.0 } else { at - 4.0 };
            let _ = write!(
                body,
                "<path class=rule d=\"M{LEFT} {at:.1}H{RIGHT}\"/><text class=\"note rule\" x=\"{:.1}\" y=\"{text:.1}\" text-anchor=end>{}</text>",
                RIGHT - 4.0,
                escape(&rule.name),
            );
        }
    }

    fn draw_marks(&self, scale: &Scale, body: &mut String) {
        let mut free = f64::NEG_INFINITY;
        for mark in self.marks.iter().filter(|mark| (scale.first..=scale.last).contains(&mark.at)) {
            let at = scale.x(mark.at);
            let _ = write!(
                body,
                "<g><title>{}</title><path class=mark d=\"M{at:.1} {:.1}V{:.1}\"/>",
                escape(&mark.name),
                scale.top - 2.0,
                scale.base(),
            );
            // Signs that would lie on each other are left to the title.
            if at >= free {
                let _ = write!(
                    body,
                    "<text class=\"note mark\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=middle>{}</text>",
                    scale.top - 6.0,
                    escape(&mark.sign),
                );
                free = at + 16.0;
            }
            body.push_str("</g>");
        }
    }
}

/// What the lines are called on the picture.
struct Legend {
    columns: usize,
    names: Vec<String>,
}

impl Legend {
    /// Nothing for a single line, which the title names.
    fn of(lines: &[Line]) -> Self {
        let lines = if lines.len() > 1 { lines } else { &[] };
        let longest = lines.iter().map(|line| line.name.chars().count()).max().unwrap_or_default();
        let (columns, letters) = LEGENDS.into_iter().find(|(_, letters)| longest <= *letters).unwrap_or(LEGENDS[2]);
        let mut names: Vec<String> = lines.iter().map(|line| cut(&line.name, letters)).collect();
        let alike = |place: usize| names.iter().filter(|name| **name == names[place]).count() > 1;
        // Where even that reads alike, the places of the lines tell them apart.
        let numbered: Vec<usize> = (0..lines.len()).filter(|place| alike(*place)).collect();
        for place in numbered {
            names[place] = format!("{}. {}", place + 1, cut(&lines[place].name, letters - 4));
        }
        Self { columns, names }
    }

    fn height(&self) -> f64 {
        LEGEND_ROW * self.names.len().div_ceil(self.columns) as f64
    }

    fn draw(&self, lines: &[Line], body: &mut String) {
        let column = (RIGHT - LEFT) / self.columns as f64;
        for (place, (name, line)) in self.names.iter().zip(lines).enumerate() {
            let x = LEFT + column * (place % self.columns) as f64;
            let y = 10.0 + LEGEND_ROW * (place / self.columns) as f64;
            let _ = write!(
                body,
                "<path class=\"curve c{place}\" d=\"M{x:.1} {y}h18\"/><text class=note x=\"{:.1}\" y=\"{}\">{}<title>{}</title></text>",
                x + 24.0,
                y + 4.0,
                escape(name),
                escape(&line.name),
            );
        }
    }
}

fn draw_line(place: usize, line: &Line, scale: &Scale, body: &mut String) {
    let points: Vec<&Point> = line.finite().collect();
    let Some(only) = points.first() else { return };
    // Runs of points that have an interval: where it is missing, the band has a gap.
    for run in points.split(|point| point.interval.is_none()).filter(|run| !run.is_empty()) {
        let edge = |point: &&Point, end: fn(Interval) -> f64| {
            point.interval.map(|interval| format!("{:.1} {:.1}", scale.x(point.at), scale.y(end(interval))))
        };
        let there = run.iter().filter_map(|point| edge(point, |interval| interval.high));
        let back = run.iter().rev().filter_map(|point| edge(point, |interval| interval.low));
        let outline: Vec<String> = there.chain(back).collect();
        // Of a single point the outline is a stroke.
        let _ = write!(body, "<path class=\"band c{place}\" d=\"M{}Z\"/>", outline.join("L"));
    }
    let way: Vec<String> = points.iter().map(|point| format!("{:.1} {:.1}", scale.x(point.at), scale.y(point.value))).collect();
    let _ = write!(body, "<path class=\"curve c{place}\" d=\"M{}\"/>", way.join("L"));
    if points.len() == 1 {
        let (x, y) = (scale.x(only.at), scale.y(only.value));
        let _ = write!(body, "<circle class=\"curve c{place}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
    }
}

/// A picture's frame.
pub(crate) fn svg(height: f64, label: &str, body: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{}\">{body}</svg>", escape(label))
}

/// A name in at most so many letters: its begin and its end, since names of one family differ in either.
pub(crate) fn cut(name: &str, letters: usize) -> String {
    let count = name.chars().count();
    if count <= letters {
        return name.to_owned();
    }
    let end = (letters - 1) / 2;
    name.chars().take(letters - 1 - end).chain(['…']).chain(name.chars().skip(count - end)).collect()
}

/// Three digits, however large or small.
pub fn significant(value: f64) -> String {
    let size = value.abs();
    if size > 0.0 && !(1e-2..1e5).contains(&size) { format!("{value:.2e}").replace('-', "−") } else { number(value) }
}

/// A share in per cent, with as many digits as it takes to tell small ones apart.
pub fn percent(share: f64) -> String {
    format!("{} %", significant(100.0 * share))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVIL: &str = "\"><script>alert('x')</script>&";

    fn point(at: f64, value: f64, width: f64) -> Point {
        Point { at, value, interval: Some(Interval { low: value - width, high: value + width }) }
    }

    fn chart(lines: Vec<Line>) -> Chart {
        Chart::over_steps("A chart", lines)
    }

    fn line(name: &str, points: Vec<Point>) -> Line {
        Line { name: name.to_owned(), points }
    }

    /// The numbers of the first path of this class.
    fn numbers(picture: &str, class: &str) -> Vec<f64> {
        let path = picture.split(&format!("<path class=\"{class}\" d=\"")).nth(1).unwrap().split('"').next().unwrap();
        path.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-')).filter_map(|part| part.parse().ok()).collect()
    }

    #[test]
    fn a_line_runs_from_edge_to_edge_and_its_band_around_it() {
        let points = vec![point(1.0, 0.0, 9.0), point(2.0, 1.0, 1.0), point(3.0, 2.0, 0.5), point(4.0, 1.0, 0.25)];
        let picture = chart(vec![line("only", points)]).draw().unwrap();
        let picture = picture.as_str();
        let way = numbers(picture, "curve c0");
        assert_eq!((way[0], way[way.len() - 2]), (LEFT, RIGHT));
        // The scale is that of the later points, from 0 to 2.5; what the first may be is cut at the edges.
        let (top, base) = (20.0, 20.0 + PLOT);
        assert_eq!(numbers(picture, "band c0").len(), 16);
        assert_eq!(&numbers(picture, "band c0")[..2], [LEFT, top]);
        assert_eq!(way[1], base);
        assert!((way[5] - (base - 2.0 / 2.5 * PLOT)).abs() < 0.06, "{way:?}");
        assert!(picture.contains("aria-label=\"A chart. only: from 0 at 1 to 1 at 4, between 0.75 and 1.25.\""), "{picture}");
        assert!(!picture.contains("class=note"), "one line needs no legend");
    }

    #[test]
    fn the_scale_has_round_numbers() {
        for (low, high, expected) in [
            (0.0, 19.0, vec![0.0, 10.0]),
            (0.0, 3.0, vec![0.0, 1.0, 2.0, 3.0]),
            (-0.286, 0.253, vec![-0.2, 0.0, 0.2]),
            (6.19, 10.9, vec![8.0, 10.0]),
            (0.0, 0.01, vec![0.0, 0.005, 0.01]),
        ] {
            let found = ticks(low, high);
            assert_eq!(found.len(), expected.len(), "{low} to {high}: {found:?}");
            assert!(found.iter().zip(&expected).all(|(one, other)| (one - other).abs() < 1e-9), "{found:?}");
        }
        assert!(ticks(0.0, 19.0)[0].is_sign_positive(), "nobody reads −0");
        assert!(ticks(f64::MAX / -2.0, f64::MAX / 2.0).len() <= 8);
    }

    #[test]
    fn a_span_holds_also_for_one_point_and_a_reach_begins_at_zero() {
        let one = vec![line("a", vec![Point::new(5.0, 0.0)])];
        let placed = Chart { span: Some((0.0, 10.0)), reach: Some(0.01), value: percent, ..chart(one) };
        let picture = placed.draw().unwrap();
        assert_eq!(numbers(picture.as_str(), "curve c0"), [(LEFT + RIGHT) / 2.0, 20.0 + PLOT]);
        assert!(picture.as_str().contains(">1 %</text>") && picture.as_str().contains(">10</text>"));
    }

    #[test]
    fn what_is_no_number_is_not_drawn() {
        let gap = [point(1.0, 1.0, 0.1), Point::new(2.0, f64::NAN), Point::new(3.0, 2.0), point(4.0, 1.5, f64::INFINITY)];
        let with_rule =
            Chart { rules: vec![Rule { value: f64::NAN, name: "none".into() }], ..chart(vec![line("a", gap.to_vec())]) };
        let picture = with_rule.draw().unwrap();
        assert_eq!(numbers(picture.as_str(), "curve c0").len(), 4);
        assert!(!picture.as_str().contains("NaN") && !picture.as_str().contains("inf") && !picture.as_str().contains("rule"));
        assert_eq!(chart(vec![line("a", vec![Point::new(1.0, f64::NAN)])]).draw(), None);
        assert_eq!(chart(Vec::new()).draw(), None);
    }

    #[test]
    fn a_single_point_and_a_flat_line_stand_in_the_middle() {
        for points in [vec![point(5.0, 0.0, 0.0)], vec![Point::new(1.0, 3.0), Point::new(2.0, 3.0)]] {
            let count = points.len();
            let picture = chart(vec![line("a", points)]).draw().unwrap();
            assert!((numbers(picture.as_str(), "curve c0")[1] - (20.0 + PLOT / 2.0)).abs() < 0.06);
            assert_eq!(picture.as_str().matches("<circle").count(), usize::from(count == 1));
        }
    }

    #[test]
    fn hostile_names_stay_text_everywhere() {
        let points = vec![Point::new(1.0, 1.0), Point::new(2.0, 2.0)];
        let all = Chart {
            title: EVIL.to_owned(),
            place: |_| EVIL.to_owned(),
            value: |_| EVIL.to_owned(),
            lines: vec![line(EVIL, points.clone()), line("b", points)],
            rules: vec![Rule { value: 1.0, name: EVIL.to_owned() }],
            marks: vec![Mark { at: 1.5, sign: EVIL.to_owned(), name: EVIL.to_owned() }],
            span: None,
            reach: None,
        };
        let picture = all.draw().unwrap();
        assert!(!picture.as_str().contains("<script") && !picture.as_str().contains("\"><s"));
        assert!(picture.as_str().contains("&lt;script&gt;") && picture.as_str().contains("&quot;"));
    }

    #[test]
    fn a_legend_tells_names_of_one_family_apart() {
        let points = || vec![Point::new(1.0, 1.0), Point::new(2.0, 2.0)];
        let names = |names: &[String]| Legend::of(&names.iter().map(|name| line(name, points())).collect::<Vec<_>>());
        let short = names(&["training".into(), "held-out".into(), "a".into(), "b".into()]);
        assert_eq!((short.columns, short.height(), short.names[1].as_str()), (3, 2.0 * LEGEND_ROW, "held-out"));
        // Whole, in fewer columns.
        let family = ["smollm2-135m-instruct:brief@01", "smollm2-135m-instruct:brief@02"].map(str::to_owned);
        let found = names(&family);
        assert_eq!((found.columns, found.names.as_slice()), (2, family.as_slice()));
        // Begin and end, in one.
        let long = ["a", "b"].map(|end| format!("{}{end}", "x".repeat(80)));
        let found = names(&long);
        assert_eq!((found.columns, found.names[0].chars().count()), (1, 66));
        assert!(found.names[0].ends_with("xa") && found.names[1].ends_with("xb"), "{:?}", found.names);
        // What differs only in the middle has a number.
        let middle = ["a", "b"].map(|middle| format!("{0}{middle}{0}", "x".repeat(60)));
        let found = names(&middle);
        assert!(found.names[0].starts_with("1. x") && found.names[1].starts_with("2. x"), "{:?}", found.names);
        assert_eq!(names(&["alone".into()]).height(), 0.0);
        assert_eq!((cut("abcdef", 5), cut("abcde", 5)), ("ab…ef".to_owned(), "abcde".to_owned()));
        let picture = chart(long.iter().map(|name| line(name, points())).collect()).draw().unwrap();
        assert!(long.iter().all(|name| picture.as_str().contains(&format!("<title>{name}</title>"))));
    }

    #[test]
    fn marks_outside_are_left_out_and_signs_do_not_lie_on_each_other() {
        let mark = |at: f64| Mark { at, sign: "s".into(), name: format!("at {at}") };
        let points = vec![Point::new(0.0, 1.0), Point::new(100.0, 2.0)];
        let marked = Chart { marks: vec![mark(-1.0), mark(10.0), mark(10.5), mark(90.0)], ..chart(vec![line("a", points)]) };
        let picture = marked.draw().unwrap();
        assert_eq!(picture.as_str().matches("<path class=mark").count(), 3);
        assert_eq!(picture.as_str().matches("class=\"note mark\"").count(), 2);
        assert!(picture.as_str().contains("<title>at 10.5</title>"));
    }

    #[test]
    fn a_rule_is_within_the_scale() {
        let points = vec![Point::new(0.0, 0.001), Point::new(1.0, 0.002)];
        let ruled = Chart {
            rules: vec![Rule { value: 0.02, name: "at most 2 %".into() }],
            value: percent,
            ..chart(vec![line("error_rate", points)])
        };
        let picture = ruled.draw().unwrap();
        assert!(picture.as_str().contains("<path class=rule d=\"M64 20.0H548\"") && picture.as_str().contains(">at most 2 %<"));
        assert!(picture.as_str().contains(">2 %</text>") && picture.as_str().contains(">1 %</text>"));
    }
}
