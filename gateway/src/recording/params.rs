//! Sampling parameters as they are recorded.

use serde_json::{Map, Value, json};
use tidemill_engine::{Constraint, SamplingParams};

/// The parameters in force, under the API's names and with the seed that was drawn. What was not set is not there.
pub fn to_json(sampling: &SamplingParams) -> Value {
    let mut map = Map::new();
    let mut set = |key: &str, value: Value| drop(map.insert(key.to_owned(), value));
    set("n", json!(sampling.n));
    if let Some(max) = sampling.max_tokens {
        set("max_tokens", json!(max));
    }
    set("temperature", decimal(sampling.temperature));
    set("top_p", decimal(sampling.top_p));
    let off = SamplingParams::default();
    if sampling.top_k != off.top_k {
        set("top_k", json!(sampling.top_k));
    }
    for (key, value, off) in [
        ("min_p", sampling.min_p, off.min_p),
        ("repetition_penalty", sampling.repetition_penalty, off.repetition_penalty),
        ("presence_penalty", sampling.presence_penalty, off.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty, off.frequency_penalty),
    ] {
        if value.to_bits() != off.to_bits() {
            set(key, decimal(value));
        }
    }
    if sampling.min_tokens > 0 {
        set("min_tokens", json!(sampling.min_tokens));
    }
    if let Some(seed) = sampling.seed {
        // Signed, as the API takes it.
        set("seed", json!(seed.cast_signed()));
    }
    if !sampling.stop.is_empty() {
        set("stop", json!(sampling.stop));
    }
    if !sampling.stop_token_ids.is_empty() {
        set("stop_token_ids", json!(sampling.stop_token_ids));
    }
    for (key, on, default) in [
        ("include_stop_str_in_output", sampling.include_stop_str_in_output, false),
        ("ignore_eos", sampling.ignore_eos, false),
        ("skip_special_tokens", sampling.skip_special_tokens, true),
    ] {
        if on != default {
            set(key, json!(on));
        }
    }
    if !sampling.logit_bias.is_empty() {
        let bias: Map<String, Value> =
            sampling.logit_bias.iter().map(|(token, bias)| (token.to_string(), decimal(*bias))).collect();
        set("logit_bias", Value::Object(bias));
    }
    Value::Object(map)
}

/// What constrained the answer, under the API's name: the record's parameters can be sent again.
pub fn constrained(params: &mut Option<Value>, constraint: &Constraint) {
    let Some(Value::Object(map)) = params else { return };
    let output = match constraint {
        Constraint::JsonSchema { schema, .. } => json!({"json": schema}),
        Constraint::JsonObject => json!({"json_object": true}),
        Constraint::Regex(regex) => json!({"regex": regex}),
        Constraint::Choice(choices) => json!({"choice": choices}),
        Constraint::Lark(grammar) => json!({"grammar": grammar}),
    };
    map.insert("structured_outputs".to_owned(), output);
}

/// The double with the fewest digits that names this single: 0.2 stays 0.2.
fn decimal(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constraint_is_written_as_it_can_be_sent() {
        let mut params = Some(json!({"n": 1}));
        constrained(&mut params, &Constraint::Choice(vec!["a".into()]));
        assert_eq!(params, Some(json!({"n": 1, "structured_outputs": {"choice": ["a"]}})));
    }

    #[test]
    fn what_was_set_is_written_and_the_seed_can_be_sent_again() {
        let sampling =
            SamplingParams { temperature: 0.2, top_p: 0.9, seed: Some(u64::MAX), max_tokens: Some(7), ..Default::default() };
        assert_eq!(to_json(&sampling), json!({"n": 1, "max_tokens": 7, "temperature": 0.2, "top_p": 0.9, "seed": -1}));
        let sampling = SamplingParams { stop: vec!["x".into()], logit_bias: vec![(3, -1.5)], ignore_eos: true, ..sampling };
        let written = to_json(&sampling);
        assert_eq!(
            (&written["stop"], &written["logit_bias"], &written["ignore_eos"]),
            (&json!(["x"]), &json!({"3": -1.5}), &json!(true))
        );
    }
}
