//! A training as one page: what it was told, where it got to, and the curves of everything that was measured.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::Value;

use super::TrainConfig;
use crate::chart::{Chart, Line, Point, escape, number, percent, thousands};
use crate::quality::html::page;

/// Curves that share a picture, most telling first. Others follow, each in its own.
const GROUPS: [(&str, &[&str]); 11] = [
    ("Reward", &["reward", "eval_reward"]),
    ("Loss", &["loss", "eval_loss"]),
    ("Share of comparisons won", &["rewards/accuracies", "eval_rewards/accuracies"]),
    ("Rewards", &["rewards/chosen", "rewards/rejected", "eval_rewards/chosen", "eval_rewards/rejected"]),
    ("Margin of rewards", &["rewards/margins", "eval_rewards/margins"]),
    ("Log-probabilities", &["logps/chosen", "logps/rejected", "eval_logps/chosen", "eval_logps/rejected"]),
    ("Divergence from the reference", &["kl", "eval_kl"]),
    ("Length of answers", &["completions/mean_length", "eval_completions/mean_length"]),
    ("Imitation", &["nll_loss", "eval_nll_loss"]),
    ("Length of the gradient", &["grad_norm"]),
    ("Learning rate", &["learning_rate"]),
];
/// Not measurements.
const PLACES: [&str; 5] = ["step", "epoch", "num_tokens", "tokens", "total_steps"];

/// The page of a training with this configuration and log (`metrics.jsonl`).
pub fn report(config: &TrainConfig, log: &str) -> String {
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let last = |name: &str| lines.iter().rev().find_map(|line| line[name].as_f64());
    let mut body = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        body,
        "<header><div><h1>Training</h1><p class=soft>{}</p></div></header><section class=tiles>",
        escape(&format!("{:?}", config.method).to_uppercase())
    );
    let whole = |value: f64| thousands(value as usize);
    type Show<'a> = &'a dyn Fn(f64) -> String;
    let fine = |value: f64| format!("{value:.4}").replace('-', "−");
    let tiles: [(&str, &str, Show<'_>); 9] = [
        ("steps", "step", &whole),
        ("epochs", "epoch", &number),
        ("tokens", "num_tokens", &whole),
        ("reward", "reward", &fine),
        ("held-out reward", "eval_reward", &fine),
        ("loss", "loss", &fine),
        ("held-out loss", "eval_loss", &fine),
        ("comparisons won", "rewards/accuracies", &percent),
        ("held-out comparisons won", "eval_rewards/accuracies", &percent),
    ];
    for (title, name, show) in tiles {
        if let Some(value) = last(name) {
            let _ = write!(body, "<div class=card><b>{}</b><span>{title}</span></div>", show(value));
        }
    }
    body.push_str("</section><h2>Curves</h2><div class=plots>");
    for chart in charts(&lines) {
        if let Some(picture) = chart.draw() {
            let (title, picture) = (escape(&chart.title), picture.as_str());
            let _ = write!(body, "<figure class=card style=\"margin:0\"><h3>{title}</h3>{picture}</figure>");
        }
    }
    body.push_str("</div><h2>Configuration</h2><div class=\"card texts\"><pre>");
    body.push_str(&escape(&serde_json::to_string_pretty(config).unwrap_or_default()));
    body.push_str("</pre></div>");
    page("Training", &body)
}

/// Charts of everything that was measured, most telling first. A line is an object with a `step` and numbers by TRL's names.
pub fn charts(lines: &[Value]) -> Vec<Chart> {
    let mut measured: BTreeMap<&str, Vec<Point>> = BTreeMap::new();
    for line in lines {
        let step = line["step"].as_f64().unwrap_or_default();
        for (name, value) in line.as_object().into_iter().flatten() {
            if let Some(value) = value.as_f64().filter(|_| !PLACES.contains(&name.as_str())) {
                measured.entry(name).or_default().push(Point::new(step, value));
            }
        }
    }
    let known: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
    let others: Vec<&str> = measured.keys().copied().filter(|name| !known.contains(name)).collect();
    let others = others.iter().map(|name| (*name, std::slice::from_ref(name)));
    let chart = |(title, names): (&str, &[&str])| {
        let line = |name: &&str| Some(Line { name: part(name).to_owned(), points: measured.get(name)?.clone() });
        Chart::over_steps(title, names.iter().filter_map(line).collect())
    };
    GROUPS.into_iter().chain(others).map(chart).filter(|chart| !chart.lines.is_empty()).collect()
}

/// What a curve shows beside others of its picture.
fn part(name: &str) -> &'static str {
    match (name.starts_with("eval_"), name.ends_with("/chosen"), name.ends_with("/rejected")) {
        (false, true, _) => "chosen",
        (false, _, true) => "rejected",
        (true, true, _) => "held-out chosen",
        (true, _, true) => "held-out rejected",
        (false, ..) => "training",
        (true, ..) => "held-out",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Method;

    #[test]
    fn the_page_has_a_curve_for_everything_that_was_measured_and_needs_nothing_from_elsewhere() {
        let log = "{\"step\":1,\"epoch\":0.5,\"loss\":0.7,\"rewards/chosen\":0.1,\"rewards/rejected\":0.0,\"odd\\\"<b>\":1.0,\"num_tokens\":5}\n\
                   {\"step\":2,\"epoch\":1.0,\"loss\":null,\"num_tokens\":1234567}\n{\"step\":2,\"epoch\":1.0,\"eval_loss\":0.6}\n{\"step\":3";
        let page = report(&TrainConfig::new(Method::Dpo), log);
        for title in ["Loss", "Rewards", "odd&quot;&lt;b&gt;"] {
            assert!(page.contains(&format!("<h3>{title}</h3>")), "{title}");
        }
        assert!(page.contains("1\u{202f}234\u{202f}567") && page.contains("0.6000") && !page.contains("<b>\""));
        assert!(!page.contains("Learning rate</h3>") && !page.contains("NaN") && !page.contains("inf"));
        for needle in ["http://", "https://", "src=", "<script"] {
            assert!(!page.contains(needle), "{needle}");
        }
    }
}
