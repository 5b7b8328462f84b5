//! The evaluation as one page: numbers side by side, then what the models said.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::duel::Verdict;
use super::report::{Contender, Evaluation};
use crate::quality::html::{escape, excerpt, page};
use crate::statistics::Proportion;

/// Prompts that the page shows with their answers.
const SHOWN: usize = 50;

fn decimals(value: f64) -> String {
    format!("{value:.3}").replace('-', "−")
}

fn percent(value: f64) -> String {
    format!("{:.1} %", 100.0 * value).replace('-', "−")
}

fn share(proportion: &Proportion) -> String {
    let interval = proportion.interval;
    format!("{} <span class=soft>({} to {})</span>", percent(proportion.share), percent(interval.low), percent(interval.high))
}

impl Evaluation {
    /// The page. What looks like personal data in texts is replaced by its name.
    pub fn to_html(&self) -> String {
        let mut body = String::new();
        // Writing to a string cannot fail.
        let _ = write!(
            body,
            "<header><div><h1>Evaluation</h1><p class=soft>{} · {}</p></div></header>",
            escape(&self.base),
            escape(&self.rows)
        );
        self.numbers(&mut body);
        self.decision(&mut body);
        self.passage(&mut body);
        self.texts(&mut body);
        page("Evaluation", &body)
    }

    fn numbers(&self, body: &mut String) {
        type Cell<'a> = &'a dyn Fn(&Contender) -> Option<String>;
        let rows: [(&str, Cell<'_>); 11] = [
            ("held-out comparisons won", &|one| Some(share(&one.preferences?.accuracy))),
            ("mean margin of rewards", &|one| Some(decimals(one.preferences?.margin))),
            ("loss on ordinary text", &|one| Some(decimals(one.text?.loss))),
            ("the same against the base", &|one| self.text_drift(one).map(percent)),
            ("answers", &|one| Some(one.answers?.answers.to_string())),
            ("words of an answer, median", &|one| Some(format!("{:.0}", one.answers?.median_words))),
            ("words of an answer, mean", &|one| Some(format!("{:.1}", one.answers?.mean_words))),
            ("answers that refuse", &|one| Some(share(&one.answers?.refusals))),
            ("answers cut off", &|one| Some(share(&one.answers?.truncated))),
            ("KL to the base per token", &|one| one.answers?.kl_per_token.map(decimals)),
            ("KL to the base per answer", &|one| one.answers?.kl_per_answer.map(decimals)),
        ];
        body.push_str("<h2>Side by side</h2><div class=\"card scroll\"><table><thead><tr><th>");
        for one in &self.contenders {
            let _ = write!(body, "<th>{}", escape(&one.name));
        }
        body.push_str("</tr></thead><tbody>");
        for (name, cell) in rows {
            self.row(body, name, cell);
        }
        let rules: BTreeSet<&String> = self.contenders.iter().flat_map(|one| one.rewards.keys()).collect();
        for rule in rules {
            self.row(body, &format!("mean reward, {rule}"), &|one| one.rewards.get(rule).copied().map(decimals));
        }
        body.push_str("</tbody></table></div>");
    }

    /// A number of each; nothing where none has it.
    fn row(&self, body: &mut String, name: &str, cell: &dyn Fn(&Contender) -> Option<String>) {
        let cells: Vec<Option<String>> = self.contenders.iter().map(cell).collect();
        if cells.iter().all(Option::is_none) {
            return;
        }
        let _ = write!(body, "<tr><td>{}", escape(name));
        for cell in cells {
            let _ = write!(body, "<td>{}", cell.unwrap_or_else(|| "<span class=soft>–</span>".to_owned()));
        }
        body.push_str("</tr>");
    }

    fn decision(&self, body: &mut String) {
        let (Some(duel), Some(judge), [first, second, ..]) = (&self.duel, &self.judge, self.contenders.as_slice()) else {
            return;
        };
        let decided = duel.decided.map_or_else(String::new, |interval| {
            format!(
                " Of those decided, {} to {} would go to {} (95 %).",
                percent(interval.low),
                percent(interval.high),
                escape(&first.name)
            )
        });
        let _ = write!(
            body,
            "<h2>Duel</h2><p>{} against {}, judged by {}: {} won, {} lost, {} tied; win rate {}.{decided}</p>",
            escape(&first.name),
            escape(&second.name),
            escape(judge),
            duel.won,
            duel.lost,
            duel.tied,
            percent(duel.win_rate)
        );
    }

    /// What the gates said.
    fn passage(&self, body: &mut String) {
        let Some(report) = &self.gates else { return };
        let (mark, word) = if report.passed { ("keep", "pass") } else { ("drop", "refused") };
        let _ = write!(body, "<h2>Gates <span class=\"chip {mark}\">{word}</span></h2><div class=\"card scroll\"><table><tbody>");
        for check in &report.checks {
            let (mark, word) = if check.passed { ("keep", "open") } else { ("drop", "shut") };
            let change = check.change.as_deref().map_or_else(String::new, |change| format!("<br><i>{}</i>", escape(change)));
            let (gate, finding) = (escape(&check.gate), escape(&check.finding));
            let _ = write!(body, "<tr><td><span class=\"chip {mark}\">{word}</span><td>{gate}<td>{finding}{change}</tr>");
        }
        body.push_str("</tbody></table></div>");
    }

    fn texts(&self, body: &mut String) {
        if self.examples.is_empty() {
            return;
        }
        body.push_str("<h2>Answers</h2>");
        for example in self.examples.iter().take(SHOWN) {
            body.push_str("<section class=card><div class=texts>");
            let names = self.contenders.iter().map(|one| one.name.as_str());
            let winner = match example.verdict {
                Some(Verdict::First) => Some(0),
                Some(Verdict::Second) => Some(1),
                _ => None,
            };
            let prompt = std::iter::once((None, "Prompt", &example.prompt));
            let answers = names.zip(&example.answers).enumerate().map(|(place, (name, text))| (Some(place), name, text));
            for (place, name, text) in prompt.chain(answers) {
                let mark = if place.is_some() && place == winner { " <span class=\"chip keep\">better</span>" } else { "" };
                let text = if text.trim().is_empty() { "<i class=soft>empty</i>".to_owned() } else { escape(&excerpt(text)) };
                let _ = write!(body, "<div><h4>{}{mark}</h4><pre dir=auto>{text}</pre></div>", escape(name));
            }
            body.push_str("</div></section>");
        }
        if self.examples.len() > SHOWN {
            let _ = write!(body, "<p class=soft>{} more are in evaluation.json.</p>", self.examples.len() - SHOWN);
        }
    }
}
