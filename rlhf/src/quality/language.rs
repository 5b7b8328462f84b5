//! Rows in a language that the dataset is not about.

use std::collections::{BTreeMap, BTreeSet};

use whatlang::{Lang, Script};

use super::{
    QualityOptions,
    corpus::{Corpus, Findings},
    report::{Check, Keep},
};

const NAME: &str = "language";
const PROMPT: &str = "prompt";
/// Fewest letters that tell a script.
const SCRIPT: usize = 20;
/// Fewest letters of the Latin alphabet that tell a language: in less, a few names decide.
const LATIN: usize = 100;
/// Most letters that are read; more say nothing new.
const MOST: usize = 400;
/// Share of the rows from which a language is expected when none is named.
const EXPECTED: f64 = 0.05;

/// Rows per language, of those whose language was recognised, and the check over rows in a language that is not expected.
pub(super) fn check(corpus: &Corpus<'_>, options: &QualityOptions, findings: &mut Findings) -> (Check, BTreeMap<String, usize>) {
    let thresholds = &options.thresholds;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut rows: Vec<(usize, Vec<(&str, Detected)>)> = Vec::new();
    for row in 0..corpus.rows.len() {
        let prompt = detect(&corpus.prompts[row].text).map(|language| (PROMPT, language));
        let answer = corpus.answers[row].first().and_then(|answer| detect(&answer.text)).map(|language| ("answer", language));
        let parts: Vec<_> = prompt.into_iter().chain(answer).collect();
        // What a row is in is what it teaches to write.
        if let Some((_, detected)) = parts.last() {
            if let Some(language) = detected.language {
                *counts.entry(language.code().to_owned()).or_default() += 1;
            }
            rows.push((row, parts));
        }
    }
    let recognised = rows.len();
    if recognised < thresholds.minimum {
        return (
            Check::not_applicable(NAME, format!("The language of fewer than {} rows is certain.", thresholds.minimum)),
            counts,
        );
    }
    let expected: BTreeSet<String> = if options.languages.is_empty() {
        let common = |count: usize| count as f64 >= EXPECTED * recognised as f64;
        counts.iter().filter(|(_, count)| common(**count)).map(|(language, _)| language.clone()).collect()
    } else {
        options.languages.iter().map(|language| language.to_lowercase()).collect()
    };
    if expected.is_empty() {
        return (Check::not_applicable(NAME, "No language is common among the rows, or is certain."), counts);
    }
    for (row, parts) in rows {
        for (part, detected) in parts {
            let text = if part == PROMPT { Some(&corpus.prompts[row]) } else { corpus.answers[row].first() };
            match detected.language {
                Some(language)
                    if !expected.contains(language.code()) && text.is_some_and(|text| is_confirmed(&text.text, language)) =>
                {
                    findings.add(row, NAME, Keep::Review, format!("the {part} is in {}", language.code()));
                }
                None if detected.script.langs().iter().all(|language| !expected.contains(language.code())) => {
                    findings.add(row, NAME, Keep::Review, format!("the {part} is in {} script", detected.script));
                }
                _ => {}
            }
        }
    }
    let names = expected.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let check = findings.share(NAME, recognised, thresholds.language, |found| {
        format!("Of {recognised} rows that were recognised, {found} in a language that is not expected; expected is {names}.")
    });
    (check, counts)
}

/// What a text is written in.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Detected {
    /// None when the trigrams leave doubt.
    language: Option<Lang>,
    /// Its letters, which are certain.
    script: Script,
}

/// The beginning of a text without its code blocks, and how many letters that has.
fn prose(text: &str) -> (String, usize) {
    let mut prose = String::new();
    let mut letters = 0;
    let parts = text.split("```").step_by(2);
    for character in parts.flat_map(str::chars) {
        prose.push(character);
        letters += usize::from(character.is_alphabetic());
        if letters == MOST {
            break;
        }
    }
    (prose, letters)
}

/// The language and script of a text, if it is long enough.
fn detect(text: &str) -> Option<Detected> {
    let (prose, letters) = prose(text);
    if letters < SCRIPT {
        return None;
    }
    let info = whatlang::detect(&prose)?;
    let certain = info.is_reliable() && (letters >= LATIN || info.script() != Script::Latin);
    Some(Detected { language: certain.then(|| info.lang()), script: info.script() })
}

/// Whether both halves of a text are in the language, each by itself: a few names that look like Catalan are in one half, a Catalan
/// sentence is in both.
fn is_confirmed(text: &str, language: Lang) -> bool {
    halves(&prose(text).0).is_none_or(|halves| halves.into_iter().all(|half| whatlang::detect_lang(half) == Some(language)))
}

/// A text cut at the first space past its middle.
fn halves(text: &str) -> Option<[&str; 2]> {
    let middle = text.char_indices().map(|(at, _)| at).find(|at| *at >= text.len() / 2)?;
    let space = middle + text[middle..].find(char::is_whitespace)?;
    Some([&text[..space], &text[space..]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataset::Row,
        quality::{generate, report::Status},
    };

    const GERMAN: &str = "Zuerst sollte man die Pumpe prüfen, denn ohne Wasser läuft der Ofen nicht lange, und danach das Ventil neben dem Kessel öffnen.";
    const RUSSIAN: &str =
        "Сначала проверьте насос, потому что без воды печь долго не проработает, а затем откройте клапан рядом с котлом.";

    fn run(rows: &[Row], languages: &[&str]) -> (Check, Vec<usize>, BTreeMap<String, usize>) {
        let mut findings = Findings::new(rows);
        let options =
            QualityOptions { languages: languages.iter().map(|l| (*l).to_owned()).collect(), ..QualityOptions::default() };
        let (check, counts) = check(&Corpus::new(rows, 0.6), &options, &mut findings);
        (check, findings.of(NAME), counts)
    }

    fn answered(row: &Row, answer: &str) -> Row {
        generate::with_answers(row, |_, rejected| (answer.to_owned(), rejected.to_owned()))
    }

    #[test]
    fn one_language_is_expected_and_two_common_ones_are_too() {
        let mut rows = generate::clean(400, 1);
        let (check, found, counts) = run(&rows, &[]);
        assert_eq!((check.status, found.len()), (Status::Pass, 0));
        assert_eq!(counts.keys().collect::<Vec<_>>(), ["eng"]);
        for row in &mut rows[..100] {
            *row = answered(row, GERMAN);
        }
        let (check, found, counts) = run(&rows, &[]);
        assert_eq!((check.status, found.len()), (Status::Pass, 0));
        assert!(counts["deu"] == 100 && counts["eng"] >= 290, "{counts:?}");
    }

    #[test]
    fn rows_in_another_language_are_found() {
        let mut rows = generate::clean(400, 2);
        for (index, row) in rows.iter_mut().enumerate().take(12) {
            *row = answered(row, if index % 2 == 0 { GERMAN } else { RUSSIAN });
        }
        let (check, found, _) = run(&rows, &[]);
        assert_eq!((check.status, found), (Status::Warn, (0..12).collect::<Vec<_>>()));
        assert_eq!(run(&rows, &["eng", "deu", "rus"]).0.status, Status::Pass);
        assert_eq!(run(&rows, &["deu"]).0.status, Status::Fail);
    }

    #[test]
    fn code_and_short_texts_have_no_language() {
        assert_eq!(detect("ok, danke"), None);
        assert_eq!(detect(&format!("See:\n```\n{}\n```", GERMAN.repeat(3))), None);
        assert_eq!(detect(GERMAN).unwrap().language, Some(Lang::Deu));
        assert_eq!(detect(RUSSIAN).unwrap().script, Script::Cyrillic);
    }
}
