//! From feedback to rows, as a function of values.
//!
//! The unit is a judgement: one person on one pair of answers, or on one answer. A ranking of three answers is three judgements.
//! Every judgement that the query selects is either behind a row or counted under the reason why not, so that
//! `used + Σ left_out = judgements`.
//!
//! - **Comparisons** vote on a pair of texts under one prompt, whichever ids the texts have. The majority decides; ties count for
//!   neither side; an even split, a tie or "both bad" makes no row.
//! - **Corrections** are preferred over the original, and are demonstrations.
//! - **Ratings** of one text are averaged over their raters; two texts under one prompt whose means differ by the margin make a pair.
//! - **Thumbs** vote on a text; an even split makes no row. **Metrics** that the query names do the same through their mean.
//! - Of several judgements by one person on one thing, the last counts; the same text under another id is the same thing, and an edit
//!   is a new word. Withdrawn ones count nowhere.
//! - Rows that teach the same are one row with the union of their origins, unless the query wants each judgement.
//! - Rows are in the order of time, then id: the same query over the same data gives the same bytes.

use std::collections::{BTreeMap, BTreeSet};

use tidemill_store::records::{Feedback, Kind, TargetKind};

use super::answer::{Answer, Gathered, Target};
use super::counts::{Counts, LeftOut};
use super::lineage::{merge, note, origin, tidy};
use super::metrics::Metrics;
use super::query::{Query, Raters, RowKind};
use super::votes::{self, Ballot, PairVotes};
use super::{Example, Message, Origin, Row};
use crate::quality::Judgement;

/// What a query makes of feedback.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Built {
    /// In order.
    pub rows: Vec<Row>,
    /// Every rater's word on every pair, for measures of agreement; without pairs, on every answer.
    pub judgements: Vec<Judgement>,
    /// What became of the judgements.
    pub counts: Counts,
}

/// Makes rows.
pub fn build(gathered: &Gathered, query: &Query) -> Built {
    let metrics = Metrics::new(gathered, query);
    let mut builder = Builder { gathered, query, metrics, built: Built::default(), merged: BTreeMap::new(), each: Vec::new() };
    let selected = builder.select();
    builder.comparisons(&selected);
    builder.corrections(&selected);
    builder.ratings(&selected);
    builder.thumbs(&selected);
    builder.labels(&selected);
    builder.finish()
}

struct Builder<'a> {
    gathered: &'a Gathered,
    query: &'a Query,
    metrics: Metrics<'a>,
    built: Built,
    merged: BTreeMap<String, Row>,
    each: Vec<Row>,
}

/// Who judged in what way, and what: author, kind, metric, targets.
type Matter<'f> = (&'f str, Kind, Option<&'f str>, Vec<&'f str>);

/// A text, the mean of its ratings, and the ratings.
type Rated<'a> = (&'a str, f64, Vec<Said<'a>>);

/// One judgement of one answer.
#[derive(Clone, Copy)]
struct Said<'a> {
    feedback: &'a Feedback,
    answer: &'a Answer,
    number: f64,
}

impl<'a> Builder<'a> {
    fn leave(&mut self, reason: LeftOut, judgements: usize) {
        self.built.counts.leave(reason, judgements);
    }

    fn used(&mut self, judgements: usize) {
        self.built.counts.use_up(judgements);
    }

    /// Feedback that the query asks for, the last of each person on each thing, in the order of time.
    fn select(&mut self) -> Vec<&'a Feedback> {
        let query = self.query;
        let mut last: BTreeMap<Matter<'_>, &Feedback> = BTreeMap::new();
        let mut selected = Vec::new();
        let mut feedback: Vec<&Feedback> = self.gathered.feedback.iter().filter(|feedback| query.asks_for(feedback)).collect();
        feedback.sort_by_key(|feedback| (feedback.updated, feedback.id));
        for feedback in feedback {
            if feedback.withdrawn {
                self.leave(LeftOut::Withdrawn, 1);
                continue;
            }
            match &feedback.author {
                // Two anonymous judgements may be two people's.
                None => selected.push(feedback),
                Some(author) => {
                    let mut targets: Vec<&str> = feedback.targets.iter().map(String::as_str).collect();
                    targets.sort_unstable();
                    if last.insert((author, feedback.kind, feedback.metric.as_deref(), targets), feedback).is_some() {
                        self.leave(LeftOut::Superseded, 1);
                    }
                }
            }
        }
        selected.extend(last.into_values());
        selected.sort_by_key(|feedback| (feedback.updated, feedback.id));
        selected
    }

    fn answer(&self, id: &str) -> Result<&'a Answer, LeftOut> {
        let answer = match self.gathered.targets.get(id) {
            None => return Err(LeftOut::UnknownAnswer),
            Some(Target::NotRecorded) => return Err(LeftOut::NotRecorded),
            Some(Target::NotText) => return Err(LeftOut::NotText),
            Some(Target::TextCompletion) => return Err(LeftOut::TextCompletion),
            Some(Target::Answer(answer)) => answer,
        };
        let listed = |list: &[String], name: &Option<String>| name.as_ref().is_some_and(|name| list.contains(name));
        let query = self.query;
        let wanted = (query.models.is_empty() || listed(&query.models, &answer.model))
            && (query.variants.is_empty() || listed(&query.variants, &answer.variant))
            && !listed(&query.exclude_users, &answer.user);
        if wanted { Ok(answer) } else { Err(LeftOut::NotSelected) }
    }

    /// Whether an answer may be taught as good. `ids` are all under which its text was judged.
    fn good(&self, answer: &Answer, ids: &[&str]) -> Result<(), LeftOut> {
        if !answer.whole {
            return Err(LeftOut::Incomplete);
        }
        if answer.cut_off && !self.query.truncated {
            return Err(LeftOut::CutOff);
        }
        if ids.iter().any(|id| self.metrics.in_range(id)) { Ok(()) } else { Err(LeftOut::OutOfRange) }
    }

    fn comparisons(&mut self, selected: &[&'a Feedback]) {
        let mut pairs: BTreeMap<(&str, &str, &str), PairVotes<'a>> = BTreeMap::new();
        for feedback in selected.iter().copied().filter(|feedback| feedback.kind == Kind::Comparison) {
            let Some(ballots) = votes::ballots(feedback) else {
                self.leave(LeftOut::Malformed, 1);
                continue;
            };
            for ballot in ballots {
                match (self.answer(ballot.ids[0]), self.answer(ballot.ids[1])) {
                    (Err(reason), _) | (_, Err(reason)) => self.leave(reason, 1),
                    (Ok(a), Ok(b)) if a.prompt.key != b.prompt.key => self.leave(LeftOut::DifferentPrompts, 1),
                    (Ok(a), Ok(b)) if a.text == b.text => self.leave(LeftOut::SameText, 1),
                    (Ok(a), Ok(b)) => {
                        let (ballot, low, high) = if a.text < b.text { (ballot, a, b) } else { (ballot.turned(), b, a) };
                        let key = (low.prompt.key.as_str(), low.text.as_str(), high.text.as_str());
                        pairs.entry(key).or_insert_with(|| PairVotes::new(low, high)).ballots.push(ballot);
                    }
                }
            }
        }
        for (index, mut pair) in pairs.into_values().enumerate() {
            self.leave(LeftOut::Superseded, last_words(&mut pair.ballots, |ballot| ballot.feedback));
            let item = format!("pair-{index}");
            for ballot in &pair.ballots {
                if let Some(rater) = &ballot.feedback.author {
                    self.built.judgements.push(Judgement::new(rater, &item, ballot.verdict.label()));
                }
            }
            self.pair(&pair);
        }
    }

    fn pair(&mut self, pair: &PairVotes<'a>) {
        if raters(pair.ballots.iter().map(|ballot| ballot.feedback)) < self.query.min_raters {
            return self.leave(LeftOut::TooFewRaters, pair.ballots.len());
        }
        let good = [0, 1].map(|side| {
            let ids: Vec<&str> = pair.ballots.iter().map(|ballot| ballot.ids[side]).collect();
            self.good(pair.answers[side], &ids)
        });
        if self.query.raters == Raters::Each {
            for ballot in &pair.ballots {
                match ballot.verdict.winner() {
                    None => self.leave(ballot.verdict.why_no_row(), 1),
                    Some(side) => match good[side] {
                        Err(reason) => self.leave(reason, 1),
                        Ok(()) => self.preference(pair, side, std::slice::from_ref(ballot)),
                    },
                }
            }
            return;
        }
        match pair.majority() {
            None => {
                let decided = pair.ballots.iter().any(|ballot| ballot.verdict.winner().is_some());
                for ballot in &pair.ballots {
                    self.leave(if decided { LeftOut::Undecided } else { ballot.verdict.why_no_row() }, 1);
                }
            }
            Some(side) => match good[side] {
                Err(reason) => self.leave(reason, pair.ballots.len()),
                Ok(()) => self.preference(pair, side, &pair.ballots),
            },
        }
    }

    fn preference(&mut self, pair: &PairVotes<'a>, winner: usize, ballots: &[Ballot<'a>]) {
        self.used(ballots.len());
        let (chosen, rejected) = (pair.answers[winner], pair.answers[1 - winner]);
        let mut origin = origin("comparison", ballots.iter().map(|ballot| ballot.feedback));
        for ballot in ballots {
            for id in ballot.ids {
                if let Ok(answer) = self.answer(id) {
                    note(&mut origin, answer);
                }
            }
        }
        let positions: BTreeSet<_> = ballots
            .iter()
            .filter(|ballot| ballot.verdict.winner() == Some(winner))
            .map(|ballot| ballot.position(winner))
            .collect();
        origin.chosen_position = if positions.len() == 1 { positions.into_iter().next().flatten() } else { None };
        self.row(pair_example(chosen, chosen.message(), rejected.message()), origin);
    }

    fn corrections(&mut self, selected: &[&'a Feedback]) {
        for feedback in selected.iter().copied().filter(|feedback| feedback.kind == Kind::Correction) {
            let Some(better) = feedback.value.as_str().filter(|better| !better.trim().is_empty()) else {
                self.leave(LeftOut::Malformed, 1);
                continue;
            };
            let answer = match self.about(feedback) {
                Err(reason) => {
                    self.leave(reason, 1);
                    continue;
                }
                Ok(answer) if answer.text == better => {
                    self.leave(LeftOut::SameText, 1);
                    continue;
                }
                Ok(answer) => answer,
            };
            self.used(1);
            let mut origin = origin("correction", [feedback]);
            note(&mut origin, answer);
            if self.query.wants(RowKind::Preference) {
                self.row(pair_example(answer, Message::assistant(better), answer.message()), origin.clone());
            }
            if self.query.wants(RowKind::Demonstration) {
                let example = Example::Demonstration {
                    prompt: answer.prompt.messages.clone(),
                    completion: vec![Message::assistant(better)],
                };
                self.row(example, origin);
            }
        }
    }

    /// The answer that a judgement of one answer is about.
    fn about(&self, feedback: &Feedback) -> Result<&'a Answer, LeftOut> {
        if feedback.target_kind == TargetKind::Conversation {
            return Err(LeftOut::Conversation);
        }
        self.answer(&feedback.target)
    }

    /// Numbers by prompt and text.
    fn said(
        &mut self,
        selected: &[&'a Feedback],
        kind: Kind,
        metric: Option<&str>,
    ) -> BTreeMap<(&'a str, &'a str), Vec<Said<'a>>> {
        let mut found: BTreeMap<_, Vec<Said<'a>>> = BTreeMap::new();
        for feedback in selected.iter().copied().filter(|of| of.kind == kind && of.metric.as_deref() == metric) {
            match (self.about(feedback), feedback.number.filter(|number| number.is_finite())) {
                (Err(reason), _) => self.leave(reason, 1),
                (Ok(_), None) => self.leave(LeftOut::Malformed, 1),
                (Ok(answer), Some(number)) => {
                    let key = (answer.prompt.key.as_str(), answer.text.as_str());
                    found.entry(key).or_default().push(Said { feedback, answer, number });
                }
            }
        }
        // A metric is a measurement of each answer and nobody's vote.
        if kind != Kind::Metric {
            for said in found.values_mut() {
                self.leave(LeftOut::Superseded, last_words(said, |said| said.feedback));
            }
        }
        let few: Vec<_> = found
            .iter()
            .filter(|(_, said)| raters(said.iter().map(|said| said.feedback)) < self.query.min_raters)
            .map(|(key, _)| *key)
            .collect();
        for key in few {
            let judgements = found.remove(&key).map_or(0, |said| said.len());
            self.leave(LeftOut::TooFewRaters, judgements);
        }
        found
    }

    fn ratings(&mut self, selected: &[&'a Feedback]) {
        let said = self.said(selected, Kind::Rating, None);
        let mut prompts: BTreeMap<&str, Vec<Rated<'a>>> = BTreeMap::new();
        for ((prompt, text), said) in said {
            prompts.entry(prompt).or_default().push((text, mean(&said), said));
        }
        for texts in prompts.into_values() {
            let mut ascending: Vec<usize> = (0..texts.len()).collect();
            ascending.sort_by(|a, b| texts[*a].1.total_cmp(&texts[*b].1));
            // Ratings are halves, fifths and tenths: a margin that they meet exactly is met.
            let apart = |better: usize, worse: usize| {
                Some(texts[better].1 - texts[worse].1).filter(|apart| *apart >= self.query.margin - 1e-9)
            };
            let mut unfit: BTreeMap<usize, LeftOut> = BTreeMap::new();
            let mut good = Vec::new();
            for better in ascending.iter().rev().copied().take_while(|better| apart(*better, ascending[0]).is_some()) {
                let said = &texts[better].2;
                let ids: Vec<&str> = said.iter().map(|said| said.feedback.target.as_str()).collect();
                match self.good(said[0].answer, &ids) {
                    Ok(()) => good.push(better),
                    Err(reason) => drop(unfit.insert(better, reason)),
                }
            }
            // Not all with all: of the `most` widest pairs, the one of the i-th best and the j-th worst has i·j at least as wide, itself
            // among them, so it can be one of them only where i·j is no more than `most`.
            let most = self.query.max_pairs_per_prompt;
            let mut pairs = Vec::new();
            for (place, better) in good.into_iter().enumerate().take(most) {
                let worst = ascending.iter().take(most / (place + 1));
                pairs.extend(worst.map_while(|worse| apart(better, *worse).map(|apart| (apart, better, *worse))));
            }
            pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
            pairs.truncate(most);
            let behind: BTreeSet<usize> = pairs.iter().flat_map(|(_, better, worse)| [*better, *worse]).collect();
            for (index, (_, _, said)) in texts.iter().enumerate() {
                if behind.contains(&index) {
                    self.used(said.len());
                } else {
                    self.leave(unfit.get(&index).copied().unwrap_or(LeftOut::NoPair), said.len());
                }
            }
            for (_, better, worse) in pairs {
                let ((_, _, high), (_, _, low)) = (&texts[better], &texts[worse]);
                let origin = origin_of("rating", &[high.as_slice(), low.as_slice()].concat());
                self.row(pair_example(high[0].answer, high[0].answer.message(), low[0].answer.message()), origin);
            }
        }
    }

    fn thumbs(&mut self, selected: &[&'a Feedback]) {
        let found = self.said(selected, Kind::Thumb, None);
        let pairs = !self.built.judgements.is_empty();
        for (index, said) in found.into_values().enumerate() {
            if !pairs {
                let item = format!("answer-{index}");
                for one in &said {
                    if let Some(rater) = &one.feedback.author {
                        let label = if one.number > 0.5 { "up" } else { "down" };
                        self.built.judgements.push(Judgement::new(rater, &item, label));
                    }
                }
            }
            if self.query.raters == Raters::Each {
                for one in &said {
                    self.unpaired("thumb", std::slice::from_ref(one), one.number > 0.5);
                }
                continue;
            }
            let up = said.iter().filter(|one| one.number > 0.5).count();
            if 2 * up == said.len() {
                self.leave(LeftOut::Undecided, said.len());
            } else {
                self.unpaired("thumb", &said, 2 * up > said.len());
            }
        }
    }

    fn labels(&mut self, selected: &[&'a Feedback]) {
        let query = self.query;
        for label in &query.labels {
            for said in self.said(selected, Kind::Metric, Some(&label.name)).into_values() {
                // Mirrored, a metric where less is better is one where more is.
                let sign = (label.good - label.bad).signum();
                let value = mean(&said) * sign;
                if value >= label.good * sign {
                    self.unpaired(&format!("metric:{}", label.name), &said, true);
                } else if value <= label.bad * sign {
                    self.unpaired(&format!("metric:{}", label.name), &said, false);
                } else {
                    self.leave(LeftOut::InBetween, said.len());
                }
            }
        }
    }

    fn unpaired(&mut self, source: &str, said: &[Said<'a>], label: bool) {
        let answer = said[0].answer;
        let ids: Vec<&str> = said.iter().map(|said| said.feedback.target.as_str()).collect();
        if label && let Err(reason) = self.good(answer, &ids) {
            return self.leave(reason, said.len());
        }
        self.used(said.len());
        let example = Example::Unpaired { prompt: answer.prompt.messages.clone(), completion: vec![answer.message()], label };
        self.row(example, origin_of(source, said));
    }

    fn row(&mut self, example: Example, mut origin: Origin) {
        tidy(&mut origin);
        let row = Row::new(example, origin);
        if self.query.raters == Raters::Each {
            return self.each.push(row);
        }
        match self.merged.get_mut(&row.id) {
            None => drop(self.merged.insert(row.id.clone(), row)),
            Some(known) => merge(&mut known.origin, row.origin),
        }
    }

    fn finish(self) -> Built {
        let Self { query, mut built, merged, each, .. } = self;
        let mut rows: Vec<Row> = merged.into_values().chain(each).collect();
        rows.sort_by(|a, b| key(a).cmp(&key(b)));
        let before = rows.len();
        for (most, people) in [
            (query.max_rows_per_user, (|row| &row.origin.users) as fn(&Row) -> &Vec<String>),
            (query.max_rows_per_rater, |row| &row.origin.raters),
        ] {
            if let Some(most) = most {
                rows = capped(rows, most, people);
            }
        }
        built.counts.rows_over_cap = before - rows.len();
        built.rows = rows;
        built
    }
}

fn key(row: &Row) -> (i64, &str, &[String]) {
    (row.origin.judged_at, &row.id, &row.origin.feedback)
}

/// The newest `most` rows of each person; a row of several people counts for each of them.
fn capped(rows: Vec<Row>, most: usize, people: fn(&Row) -> &Vec<String>) -> Vec<Row> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut kept: Vec<Row> = rows
        .into_iter()
        .rev()
        .filter(|row| {
            let room = people(row).iter().all(|person| counts.get(person).is_none_or(|count| *count < most));
            if room {
                people(row).iter().for_each(|person| *counts.entry(person.clone()).or_default() += 1);
            }
            room
        })
        .collect();
    kept.reverse();
    kept
}

/// Different people; whoever gave no name counts as one person each time.
fn raters<'f>(feedback: impl Iterator<Item = &'f Feedback>) -> usize {
    let mut named = BTreeSet::new();
    let mut anonymous = 0;
    for feedback in feedback {
        match &feedback.author {
            Some(author) => drop(named.insert(author)),
            None => anonymous += 1,
        }
    }
    named.len() + anonymous
}

/// Keeps the last word of each person, of words in the order of time, and says how many went. Whoever gave no name keeps all.
fn last_words<'f, T>(words: &mut Vec<T>, feedback: impl Fn(&T) -> &'f Feedback) -> usize {
    let before = words.len();
    let mut seen = BTreeSet::new();
    words.reverse();
    words.retain(|word| feedback(word).author.as_ref().is_none_or(|author| seen.insert(author)));
    words.reverse();
    before - words.len()
}

fn mean(said: &[Said<'_>]) -> f64 {
    said.iter().map(|said| said.number).sum::<f64>() / said.len() as f64
}

fn pair_example(answer: &Answer, chosen: Message, rejected: Message) -> Example {
    Example::Preference { prompt: answer.prompt.messages.clone(), chosen: vec![chosen], rejected: vec![rejected] }
}

fn origin_of(source: &str, said: &[Said<'_>]) -> Origin {
    let mut origin = origin(source, said.iter().map(|said| said.feedback));
    said.iter().for_each(|said| note(&mut origin, said.answer));
    origin
}

#[cfg(test)]
mod tests;
