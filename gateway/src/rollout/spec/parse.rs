//! From an operator's words to a rollout; each refusal names the field and what to do.

use crate::http::error::ApiError;
use crate::keys::span;
use crate::openai::fields::{Field, Fields};
use crate::rollout::hash::Range;
use crate::rollout::spec::{Arm, AtDeadline, Kind, LayerPart, Metric, Quantity, Role, Spec, Step, Sticky};
use serde_json::{Map, Value};

const KINDS: [(&str, Kind); 5] = [
    ("ab", Kind::Ab),
    ("canary", Kind::Canary),
    ("shadow", Kind::Shadow),
    ("interleaved", Kind::Interleaved),
    ("bandit", Kind::Bandit),
];
const MAX_NAME: usize = 100;
/// Longest system prompt of a variant, in characters.
const MAX_PREFIX: usize = 20_000;
/// Sampling defaults with their bounds.
const DECIMALS: [(&str, f64, f64); 4] =
    [("temperature", 0.0, 2.0), ("top_p", 0.0, 1.0), ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0)];
const MAX_ARMS: usize = 16;
const MAX_STEPS: usize = 100;
const MAX_METRICS: usize = 50;
/// GrowthBook's N*.
const TUNING: f64 = 5000.0;
const MIN_EXPOSURE: u64 = 100;
/// Seconds between measurements.
const INTERVAL: u64 = 30;
const FLOOR: f64 = 0.05;

impl Spec {
    /// From the text of a JSON object or, when it does not begin as one, of a TOML document.
    pub fn read(text: &str) -> Result<Self, ApiError> {
        let value = if text.trim_start().starts_with('{') {
            serde_json::from_str(text)
                .map_err(|error| ApiError::bad_request(format!("The rollout is not valid JSON: {error}")))?
        } else {
            toml::from_str(text).map_err(|error| ApiError::bad_request(format!("The rollout is not valid TOML: {error}")))?
        };
        Self::parse(&value)
    }

    /// From a JSON object.
    pub fn parse(value: &Value) -> Result<Self, ApiError> {
        let mut fields = Fields::root(value)?;
        let name = name(&fields.require("name")?)?;
        let model = name_of(&fields.require("model")?)?;
        let kind = fields.require("kind")?;
        let word = kind.one_of(&KINDS.map(|(word, _)| word))?;
        let kind = KINDS.iter().find(|(known, _)| *known == word).map_or(Kind::Ab, |(_, kind)| *kind);
        let arms = arms(&fields.require("arms")?, kind)?;
        let steps = steps(&mut fields, kind)?;
        let traffic = match (kind, fields.get("traffic")) {
            (Kind::Canary, Some(field)) => {
                return Err(
                    field.invalid("invalid_value", "the steps of a canary say its traffic. Leave it out, or use set_weight.")
                );
            }
            (_, None) => 1.0,
            (_, Some(field)) => share(&field)?,
        };
        let metrics = metrics(&fields.require("metrics")?, kind)?;
        let sticky = match fields.get("sticky").map(|field| field.one_of(&["user", "conversation", "request"])).transpose()? {
            Some("conversation") => Sticky::Conversation,
            Some("request") => Sticky::Request,
            _ => Sticky::User,
        };
        let layer = fields.get("layer").map(|field| layer(&field)).transpose()?;
        let seed = fields.get("seed").map(|field| field.short_string(MAX_NAME)).transpose()?.unwrap_or(&name).to_owned();
        let alpha = fields.get("alpha").map(|field| field.double(1e-6..=0.5)).transpose()?.unwrap_or(0.05);
        let tuning = fields.get("tuning").map(|field| field.double(10.0..=1e9)).transpose()?.unwrap_or(TUNING);
        let min_exposure = fields.integer("min_exposure", 1..=1_000_000_000)?.map_or(MIN_EXPOSURE, i64::unsigned_abs);
        let interval = fields.get("interval").map(|field| seconds(&field)).transpose()?.unwrap_or(INTERVAL);
        let deadline = fields.get("deadline").map(|field| seconds(&field)).transpose()?;
        let at_deadline = match fields.get("at_deadline").map(|field| field.one_of(&["pause", "rollback"])).transpose()? {
            Some("rollback") => AtDeadline::RollBack,
            _ => AtDeadline::Pause,
        };
        let four_eyes = fields.bool_or("four_eyes", false)?;
        let approval = match fields.get("approval") {
            Some(field) => {
                let said = field.bool()?;
                if four_eyes && !said {
                    let why = "with four_eyes a second key approves. Leave it out, or set it to true.";
                    return Err(field.invalid("invalid_value", why));
                }
                said
            }
            None => four_eyes,
        };
        let floor = match (kind, fields.get("floor")) {
            (Kind::Bandit, Some(field)) => field.double(1e-4..=1.0 / arms.len() as f64)?,
            (Kind::Bandit, None) => FLOOR.min(0.5 / arms.len() as f64),
            (_, Some(field)) => {
                return Err(field.invalid("invalid_value", "only a bandit has a floor. Leave it out, or set kind to 'bandit'."));
            }
            (_, None) => 0.0,
        };
        fields.finish()?;
        Ok(Self {
            name,
            model,
            kind,
            arms,
            traffic,
            steps,
            metrics,
            sticky,
            layer,
            seed,
            alpha,
            tuning,
            min_exposure,
            interval,
            deadline,
            at_deadline,
            approval,
            four_eyes,
            floor,
        })
    }
}

/// A rollout's own name goes into addresses and salts.
fn name(field: &Field<'_>) -> Result<String, ApiError> {
    let text = name_of(field)?;
    if !text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        return Err(field.invalid("invalid_value", "use letters, digits, '-', '_' and '.' only."));
    }
    Ok(text)
}

fn name_of(field: &Field<'_>) -> Result<String, ApiError> {
    let text = field.short_string(MAX_NAME)?;
    if text.trim().is_empty() {
        return Err(field.invalid("invalid_value", "it is empty. Give a name."));
    }
    Ok(text.to_owned())
}

fn share(field: &Field<'_>) -> Result<f64, ApiError> {
    let share = field.double(0.0..=1.0)?;
    if share < 1e-4 {
        return Err(field.invalid("decimal_below_min_value", "a share is counted in ten-thousandths. Give at least 0.0001."));
    }
    Ok(share)
}

/// A number of seconds, or a time such as `10m`; at least one second.
fn seconds(field: &Field<'_>) -> Result<u64, ApiError> {
    let seconds = match field.value {
        Value::String(text) => span(text).map_err(|why| field.invalid("invalid_value", format!("{why}.")))?.as_secs(),
        _ => field.integer(1..=366 * 86_400)?.unsigned_abs(),
    };
    if seconds == 0 {
        return Err(field.invalid("integer_below_min_value", "the shortest time is one second."));
    }
    Ok(seconds)
}

fn arms(field: &Field<'_>, kind: Kind) -> Result<Vec<Arm>, ApiError> {
    let items = field.filled_array(MAX_ARMS)?;
    let two = matches!(kind, Kind::Canary | Kind::Shadow | Kind::Interleaved);
    if items.len() < 2 || (two && items.len() > 2) {
        let wanted = if two { "exactly two arms" } else { "at least two arms" };
        let why = format!("this kind compares {wanted}: first the control, which serves now, then what is new.");
        return Err(field.invalid("invalid_value", why));
    }
    let mut arms: Vec<Arm> = Vec::with_capacity(items.len());
    let mut weighted = 0;
    for (index, item) in items.iter().enumerate() {
        let arm = field.item(index, item);
        let mut fields = arm.object()?;
        let named = fields.require("variant")?;
        let variant = name_of(&named)?;
        if arms.iter().any(|other| other.variant == variant) {
            return Err(named.invalid("invalid_value", format!("'{variant}' is an arm already. Name each variant once.")));
        }
        let weight = fields.get("weight").map(|field| field.double(1e-4..=1e6)).transpose()?;
        weighted += usize::from(weight.is_some());
        let model = fields.get("model").map(|field| name_of(&field)).transpose()?;
        let prompt_prefix = fields.get("prompt_prefix").map(|field| field.short_string(MAX_PREFIX)).transpose()?;
        let prompt_prefix = prompt_prefix.filter(|text| !text.is_empty()).map(str::to_owned);
        let defaults = fields.get("defaults").map_or(Ok(Map::new()), |field| defaults(&field))?;
        fields.finish()?;
        arms.push(Arm { variant, weight: weight.unwrap_or(1.0), model, prompt_prefix, defaults });
    }
    if weighted > 0 && weighted < arms.len() {
        return Err(field.invalid("invalid_value", "some arms have a weight and some have none. Give all of them one, or none."));
    }
    if weighted > 0 && matches!(kind, Kind::Shadow | Kind::Interleaved) {
        return Err(field.invalid("invalid_value", "both arms answer each request of this kind. Leave the weights out."));
    }
    let total: f64 = arms.iter().map(|arm| arm.weight).sum();
    arms.iter_mut().for_each(|arm| arm.weight /= total);
    Ok(arms)
}

/// Sampling parameters that every endpoint has in some form, each within its bounds.
fn defaults(field: &Field<'_>) -> Result<Map<String, Value>, ApiError> {
    let mut fields = field.object()?;
    let mut defaults = Map::new();
    for (key, low, high) in DECIMALS {
        if let Some(value) = fields.get(key) {
            defaults.insert(key.to_owned(), value.double(low..=high)?.into());
        }
    }
    if let Some(most) = fields.integer("max_tokens", 1..=i64::from(u32::MAX))? {
        defaults.insert("max_tokens".to_owned(), most.into());
    }
    fields.finish()?;
    Ok(defaults)
}

fn steps(fields: &mut Fields<'_>, kind: Kind) -> Result<Vec<Step>, ApiError> {
    let field = match (kind, fields.get("steps")) {
        (Kind::Canary, Some(field)) => field,
        (Kind::Canary, None) => return fields.require("steps").map(|_| Vec::new()),
        (_, Some(field)) => {
            return Err(field.invalid("invalid_value", "only a canary has steps. Leave them out, or set kind to 'canary'."));
        }
        (_, None) => return Ok(Vec::new()),
    };
    let mut steps = Vec::new();
    let mut weight = 0.0;
    for (index, item) in field.filled_array(MAX_STEPS)?.iter().enumerate() {
        let place = field.item(index, item);
        let step = step(&place)?;
        if let Step::SetWeight(next) = step {
            if next <= weight {
                let why =
                    format!("weights only rise, and the step before set {}. A rollback takes the traffic away.", 100.0 * weight);
                return Err(place.invalid("invalid_value", why));
            }
            weight = next;
        } else if index == 0 {
            return Err(place.invalid(
                "invalid_value",
                "nothing runs before a weight is set. Begin with set_weight, such as {\"set_weight\": 5}.",
            ));
        }
        steps.push(step);
    }
    Ok(steps)
}

fn step(field: &Field<'_>) -> Result<Step, ApiError> {
    let mut fields = field.object()?;
    let given = [fields.get("set_weight"), fields.get("pause"), fields.get("approval")];
    fields.finish()?;
    match given {
        [Some(weight), None, None] => {
            let percent = weight.double(0.01..=100.0)?;
            if percent >= 100.0 {
                return Err(weight.invalid(
                    "decimal_above_max_value",
                    "at 100 no control is left to compare with: promotion gives all the traffic. End below 100.",
                ));
            }
            Ok(Step::SetWeight(percent / 100.0))
        }
        [None, Some(pause), None] => match pause.value {
            Value::Object(_) => {
                let mut fields = pause.object()?;
                let samples = fields.require("samples")?.integer(1..=1_000_000_000)?;
                fields.finish()?;
                Ok(Step::PauseSamples(samples.unsigned_abs()))
            }
            _ => Ok(Step::PauseFor(seconds(&pause)?)),
        },
        [None, None, Some(approval)] => match approval.bool()? {
            true => Ok(Step::Approval),
            false => Err(approval.invalid("invalid_value", "a step without approval is no step. Leave it out.")),
        },
        _ => {
            let why = "a step is one of {\"set_weight\": PERCENT}, {\"pause\": \"10m\"}, {\"pause\": {\"samples\": N}} and {\"approval\": true}.";
            Err(field.invalid("invalid_value", why))
        }
    }
}

fn metrics(field: &Field<'_>, kind: Kind) -> Result<Vec<Metric>, ApiError> {
    let mut metrics: Vec<Metric> = Vec::new();
    for (index, item) in field.filled_array(MAX_METRICS)?.iter().enumerate() {
        let place = field.item(index, item);
        let metric = Metric::parse(&place, kind)?;
        if metrics.iter().any(|other| other.name() == metric.name()) {
            return Err(place.invalid(
                "invalid_value",
                format!("'{}' is there already. Give one condition with both bounds.", metric.name()),
            ));
        }
        metrics.push(metric);
    }
    let goals = metrics.iter().filter(|metric| metric.role == Role::Goal && !metric.dry_run).count();
    let live = metrics.iter().filter(|metric| !metric.dry_run).count();
    let compares = |metric: &Metric| metric.quantity == Quantity::Comparison && metric.role == Role::Goal && !metric.dry_run;
    let missing = match kind {
        Kind::Ab if goals == 0 => {
            "nothing could decide this test. Give a metric a goal, such as {\"metric\": \"feedback.thumb\", \"goal\": {\"min\": 0}}."
        }
        Kind::Bandit if goals != 1 => "a bandit follows one goal. Give exactly one metric a goal that is not dry_run.",
        Kind::Interleaved if !metrics.iter().any(compares) => {
            "an interleaved rollout asks which answer is better. Give {\"metric\": \"comparison\", \"goal\": {\"min\": 0.5}}."
        }
        Kind::Canary | Kind::Shadow if live == 0 => {
            "nothing could stop this rollout. Give at least one metric that is not dry_run."
        }
        _ => return Ok(metrics),
    };
    Err(field.invalid("invalid_value", missing))
}

fn layer(field: &Field<'_>) -> Result<LayerPart, ApiError> {
    let mut fields = field.object()?;
    let name = name_of(&fields.require("name")?)?;
    let from = fields.require("from")?.double(0.0..=1.0)?;
    let end = fields.require("to")?;
    let to = end.double(0.0..=1.0)?;
    fields.finish()?;
    if to <= from {
        return Err(end.invalid("invalid_value", format!("the part ends at {to}, where it has not begun ({from}).")));
    }
    Ok(LayerPart { name, part: Range { from, to } })
}
