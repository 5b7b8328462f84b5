//! Graders as OpenAI's API has them: what an answer is worth by comparison with its row, by a served model's opinion, or by a formula
//! over several of these.
//!
//! [`Grader`] is configuration and knows no network: whoever runs one that asks a model brings an [`Oracle`].

mod formula;
mod model;
mod similarity;
mod stem;
mod template;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Answer, RewardError, Score, in_parallel};

pub use formula::{Formula, is_name};
pub use model::{Oracle, Question, Reply, Role, SamplingParams, Turn};
pub use similarity::Similarity;
pub use template::{Graded, Template, Unrendered, Variable};

/// Questions to a model at once.
const QUESTIONS: usize = 8;

/// How two texts are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// They are the same.
    Eq,
    /// They differ.
    Ne,
    /// The input contains the reference.
    Like,
    /// The same, upper and lower case being one.
    Ilike,
}

impl Operation {
    fn holds(self, input: &str, reference: &str) -> bool {
        match self {
            Self::Eq => input == reference,
            Self::Ne => input != reference,
            Self::Like => input.contains(reference),
            Self::Ilike => input.to_lowercase().contains(&reference.to_lowercase()),
        }
    }
}

/// What an answer is worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Grader {
    /// 1 where the operation holds, else 0.
    StringCheck {
        /// Its name in metrics.
        name: String,
        /// What is looked at.
        input: Template,
        /// What it is compared with.
        reference: Template,
        /// How.
        operation: Operation,
    },
    /// How alike two texts are, from 0 to 1.
    TextSimilarity {
        /// Its name in metrics.
        name: String,
        /// What is looked at.
        input: Template,
        /// What it is compared with.
        reference: Template,
        /// How.
        evaluation_metric: Similarity,
    },
    /// The score that a served model gives.
    ScoreModel {
        /// Its name in metrics.
        name: String,
        /// The model.
        model: String,
        /// What it is told.
        input: Vec<Turn>,
        /// Least and greatest score.
        #[serde(default = "unit")]
        range: [f64; 2],
        /// How it samples.
        #[serde(default)]
        sampling_params: SamplingParams,
    },
    /// 1 where a served model gives a label that passes, else 0.
    LabelModel {
        /// Its name in metrics.
        name: String,
        /// The model.
        model: String,
        /// What it is told.
        input: Vec<Turn>,
        /// All labels.
        labels: Vec<String>,
        /// Those that pass.
        passing_labels: Vec<String>,
    },
    /// A formula over others.
    Multi {
        /// Its name in metrics.
        name: String,
        /// By the names that the formula has for them.
        graders: BTreeMap<String, Grader>,
        /// The formula.
        calculate_output: Formula,
    },
}

fn unit() -> [f64; 2] {
    [0.0, 1.0]
}

/// What is wrong with a grader, and in which field of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// As `graders.a.range`.
    pub path: String,
    /// What would be right.
    pub detail: String,
}

/// What kept a grader from its opinion; it then gave 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The row has nothing for a place of a template.
    Variable,
    /// The answer has nothing for it: it is no JSON, or other JSON.
    Sample,
    /// The formula's value is no finite number.
    Formula,
    /// A model's reply says nothing.
    Reply,
    /// A model could not be asked.
    Model,
}

/// The same with where and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The grader's name.
    pub grader: String,
    /// Which.
    pub kind: FaultKind,
    /// For people.
    pub detail: String,
}

/// A grader's opinion of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grade {
    /// What it is worth.
    pub reward: f64,
    /// What the parts of a formula are, by name.
    pub parts: BTreeMap<String, f64>,
    /// What went wrong.
    pub faults: Vec<Fault>,
    /// Tokens that models computed, by model.
    pub tokens: BTreeMap<String, u64>,
}

impl Grader {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::StringCheck { name, .. }
            | Self::TextSimilarity { name, .. }
            | Self::ScoreModel { name, .. }
            | Self::LabelModel { name, .. }
            | Self::Multi { name, .. } => name,
        }
    }

    /// The word of the API.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::StringCheck { .. } => "string_check",
            Self::TextSimilarity { .. } => "text_similarity",
            Self::ScoreModel { .. } => "score_model",
            Self::LabelModel { .. } => "label_model",
            Self::Multi { .. } => "multi",
        }
    }

    /// The models that it asks, with the path of the field that names each.
    pub fn models<'a>(&'a self) -> Vec<(String, &'a str)> {
        match self {
            Self::StringCheck { .. } | Self::TextSimilarity { .. } => Vec::new(),
            Self::ScoreModel { model, .. } | Self::LabelModel { model, .. } => vec![("model".to_owned(), model)],
            Self::Multi { graders, .. } => {
                let of = |(key, grader): (&String, &'a Self)| {
                    let key = key.clone();
                    grader.models().into_iter().map(move |(path, model)| (format!("graders.{key}.{path}"), model))
                };
                graders.iter().flat_map(of).collect()
            }
        }
    }

    /// Whether what the fields say makes sense together.
    pub fn check(&self) -> Result<(), Wrong> {
        let wrong = |path: &str, detail: String| Err(Wrong { path: path.to_owned(), detail });
        match self {
            Self::StringCheck { .. } | Self::TextSimilarity { .. } => Ok(()),
            Self::ScoreModel { input, .. } | Self::LabelModel { input, .. } if input.is_empty() => {
                wrong("input", "it has no message; say what the model is to grade".to_owned())
            }
            Self::ScoreModel { range: [low, high], .. } if !(low.is_finite() && high.is_finite() && low < high) => {
                wrong("range", format!("expected two numbers, the smaller one first, but got [{low}, {high}]"))
            }
            Self::ScoreModel { .. } => Ok(()),
            Self::LabelModel { labels, passing_labels, .. } => {
                if labels.is_empty() {
                    return wrong("labels", "it has no label; name at least one".to_owned());
                }
                match passing_labels.iter().find(|label| !labels.contains(label)) {
                    Some(label) => wrong("passing_labels", format!("'{label}' is none of the labels")),
                    None => Ok(()),
                }
            }
            Self::Multi { graders, calculate_output, .. } => {
                if graders.is_empty() {
                    return wrong("graders", "it has no grader; name at least one".to_owned());
                }
                for (key, grader) in graders {
                    if !is_name(key) {
                        return wrong("graders", format!("'{key}' cannot stand in a formula; use letters, digits and '_'"));
                    }
                    if matches!(grader, Self::Multi { .. }) {
                        return wrong(&format!("graders.{key}.type"), "'multi' holds no other 'multi'".to_owned());
                    }
                    grader.check().map_err(|inner| Wrong { path: format!("graders.{key}.{}", inner.path), ..inner })?;
                }
                match calculate_output.names().into_iter().find(|name| !graders.contains_key(*name)) {
                    Some(name) => {
                        let known: Vec<&str> = graders.keys().map(String::as_str).collect();
                        wrong("calculate_output", format!("'{name}' is none of the graders, which are {}", known.join(", ")))
                    }
                    None => Ok(()),
                }
            }
        }
    }

    /// The first place of a template that this row has nothing for.
    pub fn missing(&self, item: &Value) -> Option<&Variable> {
        match self {
            Self::StringCheck { input, reference, .. } | Self::TextSimilarity { input, reference, .. } => {
                input.missing(item).or_else(|| reference.missing(item))
            }
            Self::ScoreModel { input, .. } | Self::LabelModel { input, .. } => {
                input.iter().find_map(|turn| turn.content.missing(item))
            }
            Self::Multi { graders, .. } => graders.values().find_map(|grader| grader.missing(item)),
        }
    }

    /// What an answer is worth. Without an oracle, what asks a model is at fault.
    pub fn grade(&self, graded: &Graded<'_>, oracle: Option<&dyn Oracle>) -> Grade {
        let mut grade = Grade::default();
        let Self::Multi { name, graders, calculate_output } = self else {
            grade.reward = self.single(graded, oracle, &mut grade);
            return grade;
        };
        for (key, grader) in graders {
            let reward = grader.single(graded, oracle, &mut grade);
            grade.parts.insert(key.clone(), reward);
        }
        match calculate_output.value(&|name| grade.parts.get(name).copied()).filter(|value| value.is_finite()) {
            Some(value) => grade.reward = value,
            None => {
                let detail = format!("{} is no finite number for {}", calculate_output.source(), json!(grade.parts));
                grade.faults.push(Fault { grader: name.clone(), kind: FaultKind::Formula, detail });
            }
        }
        grade
    }

    fn single(&self, graded: &Graded<'_>, oracle: Option<&dyn Oracle>, grade: &mut Grade) -> f64 {
        match self.opinion(graded, oracle, &mut grade.tokens) {
            Ok(reward) => reward,
            Err((kind, detail)) => {
                grade.faults.push(Fault { grader: self.name().to_owned(), kind, detail });
                0.0
            }
        }
    }

    fn opinion(
        &self,
        graded: &Graded<'_>,
        oracle: Option<&dyn Oracle>,
        tokens: &mut BTreeMap<String, u64>,
    ) -> Result<f64, (FaultKind, String)> {
        let one_or_none = |holds: bool| f64::from(u8::from(holds));
        match self {
            Self::StringCheck { input, reference, operation, .. } => {
                let (input, reference) =
                    (input.render(graded).map_err(unrendered)?, reference.render(graded).map_err(unrendered)?);
                Ok(one_or_none(operation.holds(&input, &reference)))
            }
            Self::TextSimilarity { input, reference, evaluation_metric, .. } => {
                let (input, reference) =
                    (input.render(graded).map_err(unrendered)?, reference.render(graded).map_err(unrendered)?);
                Ok(evaluation_metric.of(&input, &reference))
            }
            Self::ScoreModel { model, input, range, sampling_params, .. } => {
                let wanted = model::Wanted::Score(*range);
                let question = model::question(model, input, *sampling_params, &wanted, graded).map_err(unrendered)?;
                let reply = ask(oracle, &question, tokens)?;
                model::score(&reply, *range).map_err(|detail| (FaultKind::Reply, detail))
            }
            Self::LabelModel { model, input, labels, passing_labels, .. } => {
                let wanted = model::Wanted::Label(labels);
                let question = model::question(model, input, SamplingParams::default(), &wanted, graded).map_err(unrendered)?;
                let reply = ask(oracle, &question, tokens)?;
                let label = model::label(&reply, labels).map_err(|detail| (FaultKind::Reply, detail))?;
                Ok(one_or_none(passing_labels.iter().any(|passing| passing == label)))
            }
            // Refused by `check`; a formula within a formula says nothing.
            Self::Multi { .. } => Err((FaultKind::Formula, "'multi' holds no other 'multi'".to_owned())),
        }
    }
}

fn unrendered(why: Unrendered) -> (FaultKind, String) {
    match why {
        Unrendered::Absent(variable) => {
            let kind = if variable.is_of_answer() { FaultKind::Sample } else { FaultKind::Variable };
            (kind, format!("there is no {variable}"))
        }
        Unrendered::TooLong => {
            (FaultKind::Variable, format!("with its places filled, a text is longer than {} MiB", template::MAX_RENDERED >> 20))
        }
    }
}

fn ask(
    oracle: Option<&dyn Oracle>,
    question: &Question,
    tokens: &mut BTreeMap<String, u64>,
) -> Result<String, (FaultKind, String)> {
    let oracle = oracle.ok_or_else(|| {
        (FaultKind::Model, "there is no server to ask; graders with models are for a server's fine-tuning jobs".to_owned())
    })?;
    let reply = oracle.ask(question).map_err(|detail| (FaultKind::Model, detail))?;
    *tokens.entry(question.model.clone()).or_default() += reply.tokens;
    Ok(reply.text)
}

/// A grader that judges the answers of a training.
pub struct Grading {
    /// Which.
    pub grader: Grader,
    /// Who is asked.
    pub oracle: Option<Arc<dyn Oracle>>,
}

impl Grading {
    fn grade(&self, answer: &Answer<'_>) -> Grade {
        let mut item = answer.columns.clone();
        item.entry("messages").or_insert_with(|| json!(answer.prompt));
        self.grader.grade(&Graded::new(Cow::Owned(Value::Object(item)), answer.text), self.oracle.as_deref())
    }
}

impl Score for Grading {
    /// An answer that a grader cannot judge gets 0 from it; where no model could be asked about any answer, something is wrong with the
    /// server or the model, not with the answers.
    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<f64>>, RewardError> {
        let threads = if self.grader.models().is_empty() { 1 } else { QUESTIONS };
        let grades = in_parallel(answers, threads, |answer| self.grade(answer));
        let unasked = |grade: &Grade| grade.faults.iter().find(|fault| fault.kind == FaultKind::Model).cloned();
        if let Some(fault) = grades.first().and_then(unasked).filter(|_| grades.iter().all(|grade| unasked(grade).is_some())) {
            return Err(RewardError::Grader { name: fault.grader, detail: fault.detail });
        }
        let failed = grades.iter().filter(|grade| !grade.faults.is_empty()).count();
        if let Some(Fault { grader, detail, .. }) = grades.iter().find_map(|grade| grade.faults.first()) {
            tracing::warn!(grader, failed, of = answers.len(), detail, "a grader could not judge; those answers get 0 from it");
        }
        Ok(grades.into_iter().map(|grade| Some(grade.reward)).collect())
    }
}

#[cfg(test)]
mod tests;
