//! A feedback as it is sent or edited.

use crate::feedback::judgement::Judgement;
use crate::feedback::{Metric, Metrics};
use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use hyper::StatusCode;
use tidemill_store::FeedbackChange;
use tidemill_store::records::{Feedback, Kind, TargetKind};
use uuid::Uuid;

/// Longest target, name of a person, a place or a key, in characters.
const MAX_NAME: usize = 256;
const MAX_TAGS: usize = 32;
const MAX_TAG: usize = 64;
/// A month in milliseconds: nobody looks longer.
const MAX_LATENCY: i64 = 31 * 24 * 3600 * 1000;

/// What a feedback is checked against.
pub struct Rules<'a> {
    /// Metrics that are declared.
    pub metrics: &'a Metrics,
    /// Whether an id is one of ours.
    pub issued: &'a dyn Fn(Uuid) -> bool,
}

/// What is judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// An answer or a choice whose id is ours.
    Completion(Uuid),
    /// A conversation, if there is one of that id.
    Conversation(String),
    /// The candidates of a comparison.
    Candidates(Vec<Uuid>),
}

/// A checked feedback; whether its target exists is still to be asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Submission {
    /// What is judged.
    pub target: Target,
    /// What sort.
    pub kind: Kind,
    /// Name, for metrics.
    pub metric: Option<String>,
    /// The value.
    pub judgement: Judgement,
    /// What comes with it.
    pub around: Around,
    /// The same key again is the same feedback.
    pub idempotency_key: Option<String>,
}

/// What comes with a value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Around {
    author: Option<String>,
    source: Option<String>,
    latency_ms: Option<i64>,
    tags: Option<Vec<String>>,
}

/// A checked change.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    judgement: Option<Judgement>,
    around: Around,
}

impl Rules<'_> {
    /// An id that this server, or another one on its database, gave to an answer or a choice. With or without its prefix.
    pub fn id(&self, field: &Field<'_>) -> Result<Uuid, ApiError> {
        let text = field.string()?;
        bare(text).filter(|id| (self.issued)(*id)).ok_or_else(|| unknown_target(field, text))
    }

    fn metric(&self, field: &Field<'_>) -> Result<(&str, &Metric), ApiError> {
        let name = field.string()?;
        match self.metrics.get_key_value(name) {
            Some((name, metric)) if !metric.closed => Ok((name, metric)),
            Some((name, _)) => {
                Err(field.invalid("metric_closed", format!("the metric `{name}` is closed: it takes no more values.")))
            }
            None => {
                let declared: Vec<&str> = self.metrics.keys().map(String::as_str).collect();
                let shown: String = name.chars().take(100).collect();
                let list =
                    if declared.is_empty() { "none is".to_owned() } else { format!("declared are {}", declared.join(", ")) };
                let why = format!("`{shown}` is not declared in the configuration as [metrics.NAME]; {list}.");
                Err(field.invalid("unknown_metric", why))
            }
        }
    }
}

/// 404 that names the field.
fn unknown_target(field: &Field<'_>, text: &str) -> ApiError {
    let shown: String = text.chars().take(100).collect();
    let why = format!(
        "no answer or conversation `{shown}` is known. Send the `id` of an answer, or the conversation that a request named as 'tidemill.conversation'."
    );
    ApiError { status: StatusCode::NOT_FOUND, ..field.invalid("target_not_found", why) }
}

/// What precedes the UUID in the ids of answers.
const PREFIXES: [&str; 4] = ["chatcmpl-", "cmpl-", "msg_", "resp_"];

/// An answer's id as the API shows it, without its prefix; `None` where it has none.
fn unprefixed(text: &str) -> Option<&str> {
    PREFIXES.iter().find_map(|prefix| text.strip_prefix(prefix))
}

/// The UUID of an answer, with or without its prefix.
pub fn bare(text: &str) -> Option<Uuid> {
    Uuid::try_parse(unprefixed(text).unwrap_or(text)).ok()
}

impl Submission {
    /// Checks the fields.
    pub fn parse(mut fields: Fields<'_>, rules: &Rules<'_>) -> Result<Self, ApiError> {
        let kind = kind(&fields.require("kind")?)?;
        let name = fields.get("metric");
        let metric = match (&name, kind) {
            (Some(field), Kind::Metric) => Some(rules.metric(field)?),
            (None, Kind::Metric) => {
                return Err(fields.require("metric").err().unwrap_or_else(|| ApiError::fault("metric was there")));
            }
            (Some(field), _) => return Err(field.invalid("invalid_value", "only allowed for the kind 'metric'.")),
            (None, _) => None,
        };
        let value = fields.require("value")?;
        let judgement = Judgement::parse(&mut fields, &value, kind, metric.map(|(_, metric)| metric), rules, None)?;
        let target_kind = fields.get("target_kind").map(|field| field.one_of(&["completion", "conversation"])).transpose()?;
        let target = match &judgement.candidates {
            Some(candidates) => {
                if let Some(field) = fields.get("target")
                    && !candidates.contains(&rules.id(&field)?)
                {
                    return Err(field.invalid("invalid_value", "is not one of the candidates."));
                }
                Target::Candidates(candidates.clone())
            }
            None => single_target(&fields.require("target")?, target_kind, rules)?,
        };
        if let Some((level, field)) = metric.and_then(|(_, metric)| metric.level).zip(name.as_ref()) {
            let fits = match target {
                Target::Conversation(_) => level == TargetKind::Conversation,
                Target::Completion(_) | Target::Candidates(_) => level == TargetKind::Completion,
            };
            if !fits {
                return Err(field.invalid("invalid_value", format!("is declared for a {} only.", level.as_str())));
            }
        }
        let around = Around::parse(&mut fields)?;
        let idempotency_key = fields.get("idempotency_key").map(|field| filled(&field, MAX_NAME)).transpose()?;
        fields.finish()?;
        Ok(Self { target, kind, metric: metric.map(|(name, _)| name.to_owned()), judgement, around, idempotency_key })
    }

    /// The record, made at `now` in microseconds since 1970.
    pub fn into_feedback(self, id: Uuid, now: i64, key_id: Option<String>) -> Feedback {
        let (targets, target_kind) = match self.target {
            Target::Completion(id) => (vec![id.to_string()], TargetKind::Completion),
            Target::Conversation(id) => (vec![id], TargetKind::Conversation),
            Target::Candidates(ids) => (ids.iter().map(Uuid::to_string).collect(), TargetKind::Completion),
        };
        Feedback {
            id,
            created: now,
            updated: now,
            revision: 1,
            withdrawn: false,
            target: targets.first().cloned().unwrap_or_default(),
            targets,
            target_kind,
            kind: self.kind,
            metric: self.metric,
            value: self.judgement.value,
            number: self.judgement.number,
            author: self.around.author,
            source: self.around.source.or_else(|| Some("api".to_owned())),
            latency_ms: self.around.latency_ms,
            tags: self.around.tags.unwrap_or_default(),
            key_id,
            idempotency_key: self.idempotency_key,
            task_id: None,
        }
    }
}

impl Edit {
    /// Checks a change of `before`.
    pub fn parse(mut fields: Fields<'_>, before: &Feedback, rules: &Rules<'_>) -> Result<Self, ApiError> {
        let metric = before.metric.as_ref().and_then(|name| rules.metrics.get(name));
        let judgement = match fields.get("value") {
            Some(value) => Some(Judgement::parse(&mut fields, &value, before.kind, metric, rules, Some(&before.value))?),
            None => None,
        };
        if judgement.is_none() {
            for key in ["scale", "shown"] {
                if let Some(field) = fields.get(key) {
                    return Err(field.invalid("invalid_value", "says how 'value' is meant; send both."));
                }
            }
        }
        for key in ["target", "target_kind", "kind", "metric", "idempotency_key"] {
            if let Some(field) = fields.get(key) {
                return Err(field.invalid("invalid_value", "cannot be changed; withdraw this feedback and send another."));
            }
        }
        let around = Around::parse(&mut fields)?;
        fields.finish()?;
        Ok(Self { judgement, around })
    }

    /// Candidates of a comparison, if they are said anew.
    pub fn candidates(&self) -> Option<&[Uuid]> {
        self.judgement.as_ref()?.candidates.as_deref()
    }

    /// For the store.
    pub fn into_change(self) -> FeedbackChange {
        let (value, targets) = match self.judgement {
            None => (None, None),
            Some(new) => {
                let targets = new.candidates.map(|ids| ids.iter().map(Uuid::to_string).collect());
                (Some((new.value, new.number)), targets)
            }
        };
        let Around { author, source, latency_ms, tags } = self.around;
        FeedbackChange { value, targets, tags, author, source, latency_ms }
    }
}

impl Around {
    fn parse(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let mut name = |key| fields.get(key).map(|field| filled(&field, MAX_NAME)).transpose();
        let (author, source) = (name("author")?, name("source")?);
        let tags = match fields.get("tags") {
            None => None,
            Some(field) => {
                let tags = field.array(MAX_TAGS)?.iter().enumerate();
                Some(tags.map(|(i, tag)| filled(&field.item(i, tag), MAX_TAG)).collect::<Result<Vec<_>, _>>()?)
            }
        };
        Ok(Self { author, source, latency_ms: fields.integer("latency_ms", 0..=MAX_LATENCY)?, tags })
    }
}

fn kind(field: &Field<'_>) -> Result<Kind, ApiError> {
    let word = field.one_of(&Kind::ALL.map(Kind::as_str))?;
    Kind::parse(word).ok_or_else(|| ApiError::fault("a kind without a name"))
}

/// An id of ours is an answer's; anything else can only be a conversation's.
fn single_target(field: &Field<'_>, kind: Option<&str>, rules: &Rules<'_>) -> Result<Target, ApiError> {
    let text = filled(field, MAX_NAME)?;
    let prefixed = unprefixed(&text).is_some();
    match kind {
        Some("completion") => rules.id(field).map(Target::Completion),
        Some(_) => Ok(Target::Conversation(text)),
        None => match rules.id(field) {
            Ok(id) => Ok(Target::Completion(id)),
            Err(error) if prefixed => Err(error),
            Err(_) => Ok(Target::Conversation(text)),
        },
    }
}

fn filled(field: &Field<'_>, max: usize) -> Result<String, ApiError> {
    let text = field.short_string(max)?;
    if text.trim().is_empty() {
        return Err(field.invalid("string_below_min_length", "empty string. Expected at least 1 character."));
    }
    Ok(text.to_owned())
}

impl Submission {
    /// 404 for a conversation that nobody has had.
    pub fn no_such_conversation(id: &str, prefix: Option<usize>) -> ApiError {
        let value = serde_json::Value::String(id.to_owned());
        let path = prefix.map_or_else(|| "target".to_owned(), |index| format!("{index}.target"));
        unknown_target(&Field { value: &value, path: path.into() }, id)
    }
}

#[cfg(test)]
mod tests;
