//! The comparison as a picture: grouped bars as SVG, one panel per prefix, whiskers from the smallest to the largest round.

use crate::markdown::{Report, streams_text};
use crate::results::Spread;
use std::fmt::Write;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const PANEL: f64 = 300.0;
const PANEL_TOP: f64 = 34.0;
const PANEL_BOTTOM: f64 = 30.0;
const LEGEND_ROW: f64 = 22.0;
const LEGEND_COLUMNS: usize = 3;

/// Ours first in a strong colour, the others told apart by the palette of Okabe and Ito, which colour-blind readers can.
const OURS: &str = "#0b3d91";
const PEERS: &[&str] = &["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#999999", "#f0e442", "#7f5f00"];

/// The picture of output tokens per second.
pub fn svg(report: &Report<'_>) -> String {
    let prefixes = report.prefixes();
    let legend = 14.0 + LEGEND_ROW * report.results.len().div_ceil(LEGEND_COLUMNS) as f64;
    let height = legend + PANEL * prefixes.len() as f64;
    // Writing to a string cannot fail, so the results of `write!` are dropped here and below.
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (at, server) in report.results.iter().enumerate() {
        let x = LEFT + (at % LEGEND_COLUMNS) as f64 * (WIDTH - LEFT - RIGHT) / LEGEND_COLUMNS as f64;
        let y = 12.0 + (at / LEGEND_COLUMNS) as f64 * LEGEND_ROW;
        let note = if server.rounds.is_empty() { " (did not run)" } else { "" };
        let _ = writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"14\" height=\"14\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.1}\">{}{note}</text>",
            colour(report, at),
            x + 20.0,
            y + 11.5,
            escape(&server.name),
        );
    }
    for (at, &prefix) in prefixes.iter().enumerate() {
        let panel = Panel {
            title: format!("Output tokens per second, {} prefix", prefix.name()),
            top: legend + PANEL * at as f64,
            groups: report.streams(prefix),
            bars: report
                .results
                .iter()
                .enumerate()
                .map(|(at, server)| {
                    let values = report.streams(prefix).into_iter().map(|streams| server.output(prefix, streams)).collect();
                    (colour(report, at), values)
                })
                .collect(),
        };
        panel.draw(&mut out);
    }
    out + "</svg>\n"
}

fn colour(report: &Report<'_>, at: usize) -> &'static str {
    if report.results[at].ours {
        return OURS;
    }
    let before = report.results[..at].iter().filter(|server| !server.ours).count();
    PEERS[before % PEERS.len()]
}

struct Panel {
    title: String,
    top: f64,
    /// Stream counts.
    groups: Vec<usize>,
    /// Per server its colour and a value per group.
    bars: Vec<(&'static str, Vec<Option<Spread>>)>,
}

impl Panel {
    fn draw(&self, out: &mut String) {
        let largest = self.bars.iter().flat_map(|(_, values)| values).flatten().map(|at| at.max).fold(1.0, f64::max);
        let step = step(largest);
        let top_value = (largest / step).ceil() * step;
        let (top, bottom) = (self.top + PANEL_TOP, self.top + PANEL - PANEL_BOTTOM);
        let y = |value: f64| bottom - (bottom - top) * value / top_value;
        let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"bold\">{}</text>", self.top + 18.0, self.title);
        for line in 0..=(top_value / step).round() as u32 {
            let value = f64::from(line) * step;
            let _ = writeln!(
                out,
                "<line x1=\"{LEFT}\" x2=\"{0:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#dddddd\"/>\
                 <text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{value:.0}</text>",
                WIDTH - RIGHT,
                y(value),
                LEFT - 6.0,
                y(value) + 4.0,
            );
        }
        let group_width = (WIDTH - LEFT - RIGHT) / self.groups.len().max(1) as f64;
        let bar = group_width * 0.9 / self.bars.len().max(1) as f64;
        for (group, streams) in self.groups.iter().enumerate() {
            let left = LEFT + group_width * (group as f64 + 0.05);
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                left + group_width * 0.45,
                bottom + 18.0,
                streams_text(*streams),
            );
            for (at, (colour, values)) in self.bars.iter().enumerate() {
                let Some(value) = values.get(group).copied().flatten() else { continue };
                let (x, middle) = (left + bar * at as f64, left + bar * (at as f64 + 0.5));
                let _ = writeln!(
                    out,
                    "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
                     <line x1=\"{middle:.1}\" x2=\"{middle:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"black\"/>\
                     <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"10\">{:.0}</text>",
                    y(value.median),
                    bar * 0.9,
                    bottom - y(value.median),
                    y(value.min),
                    y(value.max),
                    y(value.max) - 4.0,
                    value.median,
                );
            }
        }
    }
}

/// A round step that gives four to ten lines up to `largest`.
fn step(largest: f64) -> f64 {
    let magnitude = 10_f64.powf(largest.log10().floor());
    [0.1, 0.2, 0.5, 1.0, 2.0].into_iter().map(|part| part * magnitude).find(|step| largest / step <= 9.0).unwrap_or(magnitude)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::markdown::tests::sample;

    #[test]
    fn the_picture_has_a_bar_per_number_and_none_for_a_server_that_did_not_run() {
        let (plan, results) = sample();
        let picture = svg(&Report { plan: &plan, results: &results, interrupted: false });
        // Three legend squares, the background, and 2 servers × 3 loads.
        assert_eq!(picture.matches("<rect ").count(), 3 + 1 + 6);
        assert_eq!(picture.matches("</text>").count(), picture.matches("<text ").count());
        assert!(picture.contains("Peer &amp; co") && picture.contains("Absent (did not run)"));
        assert!(picture.contains("Output tokens per second, shared prefix"));
    }

    #[test]
    fn steps_are_round_and_give_few_lines() {
        for (largest, wanted) in [(1.0, 0.2), (85.0, 10.0), (99.0, 20.0), (690.0, 100.0), (1234.0, 200.0), (5000.0, 1000.0)] {
            assert!((step(largest) - wanted).abs() < 1e-9, "{} for {largest}", step(largest));
        }
    }
}
