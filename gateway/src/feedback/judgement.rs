//! The value of a judgement, by kind.

use crate::feedback::{Metric, MetricKind, Rules};
use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::{Value, json};
use tidemill_store::records::Kind;
use uuid::Uuid;

/// Most candidates of a comparison.
const MAX_CANDIDATES: usize = 16;

/// A checked value in the form in which records hold it.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// See [`tidemill_store::records::Kind`].
    pub value: Value,
    /// As a number where it is one.
    pub number: Option<f64>,
    /// Of a comparison, its candidates.
    pub candidates: Option<Vec<Uuid>>,
}

impl Judgement {
    fn plain(value: impl Into<Value>, number: Option<f64>) -> Self {
        Self { value: value.into(), number, candidates: None }
    }

    /// Reads `value`, and the fields that belong to it: `scale` of a rating, `shown` of a comparison. An edit that leaves these out
    /// means those of the value `before`.
    pub fn parse(
        fields: &mut Fields<'_>,
        value: &Field<'_>,
        kind: Kind,
        metric: Option<&Metric>,
        rules: &Rules<'_>,
        before: Option<&Value>,
    ) -> Result<Self, ApiError> {
        let earlier = |key: &'static str| Some(Field { value: before?.get(key)?, path: key.into() });
        let (scale, shown) = (fields.get("scale"), fields.get("shown"));
        if let Some(scale) = scale.as_ref().filter(|_| kind != Kind::Rating) {
            return Err(scale.invalid("invalid_value", "only allowed for the kind 'rating'."));
        }
        if let Some(shown) = shown.as_ref().filter(|_| kind != Kind::Comparison) {
            return Err(shown.invalid("invalid_value", "only allowed for the kind 'comparison'."));
        }
        match kind {
            Kind::Thumb => thumb(value),
            Kind::Rating => rating(value, scale.or_else(|| earlier("scale")).as_ref()),
            Kind::Comparison => comparison(value, shown.as_ref(), earlier("shown").as_ref(), rules),
            Kind::Correction | Kind::Comment => {
                let text = value.string()?;
                if text.trim().is_empty() && kind == Kind::Comment || text.is_empty() {
                    return Err(value.invalid("string_below_min_length", "empty string. Expected at least 1 character."));
                }
                Ok(Self::plain(text, None))
            }
            Kind::Metric => match metric {
                Some(metric) => measured(value, metric),
                None => Err(value.invalid("invalid_value", "belongs to a metric that is no longer declared.")),
            },
        }
    }
}

fn thumb(value: &Field<'_>) -> Result<Judgement, ApiError> {
    let up = match value.value {
        Value::String(_) => value.one_of(&["up", "down"])? == "up",
        _ => value.bool()?,
    };
    Ok(Judgement::plain(up, Some(f64::from(u8::from(up)))))
}

/// Kept as it was given when it came with a scale; the number is from 0 to 1 in any case.
fn rating(value: &Field<'_>, scale: Option<&Field<'_>>) -> Result<Judgement, ApiError> {
    let Some(scale) = scale else {
        let number = value.double(0.0..=1.0)?;
        return Ok(Judgement::plain(number, Some(number)));
    };
    let ends = scale.array(2)?;
    let [low, high] = ends else {
        return Err(scale.invalid("array_below_min_length", "expected two numbers, the worst and the best, such as [1, 5]."));
    };
    let end = |index, value| scale.item(index, value).double(-1e9..=1e9);
    let (low, high) = (end(0, low)?, end(1, high)?);
    if low >= high {
        return Err(scale.invalid("invalid_value", "the first number must be below the second."));
    }
    let given = value.double(low..=high)?;
    Ok(Judgement::plain(json!({"given": value.value, "scale": scale.value}), Some((given - low) / (high - low))))
}

fn measured(value: &Field<'_>, metric: &Metric) -> Result<Judgement, ApiError> {
    match metric.kind {
        MetricKind::Boolean => {
            let on = value.bool()?;
            Ok(Judgement::plain(on, Some(f64::from(u8::from(on)))))
        }
        MetricKind::Number => {
            let number = value.double(metric.min.unwrap_or(f64::MIN)..=metric.max.unwrap_or(f64::MAX))?;
            Ok(Judgement::plain(value.value.clone(), Some(number)))
        }
    }
}

/// `candidates` with one of `ranking` (best first, ties in a list), `winner` or `tie`, or with `both_bad` alone or beside them.
fn comparison(
    value: &Field<'_>,
    shown: Option<&Field<'_>>,
    earlier: Option<&Field<'_>>,
    rules: &Rules<'_>,
) -> Result<Judgement, ApiError> {
    let mut inner = value.object()?;
    let field = inner.require("candidates")?;
    let candidates = ids(&field, MAX_CANDIDATES, rules)?;
    if candidates.len() < 2 {
        return Err(field.invalid("array_below_min_length", "expected at least 2 candidates."));
    }
    let candidate = |field: &Field<'_>| {
        let id = rules.id(field)?;
        if candidates.contains(&id) { Ok(id) } else { Err(field.invalid("invalid_value", "is not one of the candidates.")) }
    };
    let both_bad = inner.bool_or("both_bad", false)?;
    let (ranking, winner, tie) = (inner.get("ranking"), inner.get("winner"), inner.get("tie"));
    let tie_given = tie.as_ref().map(Field::bool).transpose()?.unwrap_or(false);
    let said = usize::from(ranking.is_some()) + usize::from(winner.is_some()) + usize::from(tie_given);
    if said > 1 {
        return Err(value.invalid("invalid_value", "expected only one of 'ranking', 'winner' and 'tie'."));
    }
    let ranking: Vec<Vec<Uuid>> = match (ranking, winner) {
        (Some(ranking), _) => places(&ranking, &candidates, &candidate)?,
        (None, Some(winner)) => {
            let best = candidate(&winner)?;
            vec![vec![best], candidates.iter().copied().filter(|id| *id != best).collect()]
        }
        (None, None) if tie_given || both_bad => vec![candidates.clone()],
        (None, None) => return Err(value.invalid("invalid_value", "expected one of 'ranking', 'winner', 'tie' and 'both_bad'.")),
    };
    let shown = match (inner.get("shown"), shown) {
        (Some(field), _) => Some(field),
        (None, field) => field.cloned(),
    };
    inner.finish()?;
    let mut record = json!({"candidates": candidates, "ranking": ranking, "both_bad": both_bad});
    let of_all = |order: &[Uuid]| order.len() == candidates.len() && order.iter().all(|id| candidates.contains(id));
    if let Some(field) = shown {
        let order = ids(&field, MAX_CANDIDATES, rules)?;
        if !of_all(&order) {
            return Err(field.invalid("invalid_value", "expected every candidate once, in the order in which they were shown."));
        }
        record["shown"] = json!(order);
    } else if let Some(order) = earlier.and_then(|field| ids(field, MAX_CANDIDATES, rules).ok()).filter(|order| of_all(order)) {
        record["shown"] = json!(order);
    }
    Ok(Judgement { value: record, number: None, candidates: Some(candidates) })
}

/// Every candidate once, in places; a place is an id or a list of tied ones.
fn places(
    ranking: &Field<'_>,
    candidates: &[Uuid],
    candidate: &dyn Fn(&Field<'_>) -> Result<Uuid, ApiError>,
) -> Result<Vec<Vec<Uuid>>, ApiError> {
    let mut places = Vec::new();
    for (i, place) in ranking.filled_array(MAX_CANDIDATES)?.iter().enumerate() {
        let place = ranking.item(i, place);
        places.push(match place.value {
            Value::Array(_) => {
                let tied = place.filled_array(MAX_CANDIDATES)?.iter().enumerate();
                tied.map(|(i, id)| candidate(&place.item(i, id))).collect::<Result<Vec<_>, _>>()?
            }
            _ => vec![candidate(&place)?],
        });
    }
    let mut ranked: Vec<Uuid> = places.iter().flatten().copied().collect();
    let all = ranked.len();
    ranked.sort_unstable();
    ranked.dedup();
    if ranked.len() != all || all != candidates.len() {
        return Err(ranking.invalid("invalid_value", "expected every candidate exactly once."));
    }
    Ok(places)
}

/// Ids of ours, each once.
fn ids(field: &Field<'_>, max: usize, rules: &Rules<'_>) -> Result<Vec<Uuid>, ApiError> {
    let mut ids = Vec::new();
    for (i, value) in field.filled_array(max)?.iter().enumerate() {
        let item = field.item(i, value);
        let id = rules.id(&item)?;
        if ids.contains(&id) {
            return Err(item.invalid("invalid_value", "is there twice."));
        }
        ids.push(id);
    }
    Ok(ids)
}
