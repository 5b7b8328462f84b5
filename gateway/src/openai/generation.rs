//! The fields that chat and text completions share: how to sample, when to stop, what to report.

use crate::http::error::ApiError;
use crate::openai::about::About;
use crate::openai::fields::{Field, Fields};
use tidemill_engine::{GenerationDefaults, SamplingParams};

/// Most `n`, as OpenAI has it.
pub const MAX_N: i64 = 128;
/// Most alternatives that a log-probability lists.
pub const MAX_TOP_LOGPROBS: i64 = 20;
/// Most stop strings.
const MAX_STOP: usize = 4;

/// The shared fields, checked one by one. What depends on the model is checked later, against the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// `n`.
    pub n: usize,
    /// Tokens to generate, if the request says so.
    pub max_tokens: Option<usize>,
    /// `max_tokens` beyond the context means: up to the context. Otherwise such a request is refused.
    pub shorten: bool,
    /// Send events as they come.
    pub stream: bool,
    /// End the stream with a usage chunk.
    pub include_usage: bool,
    /// Lower runs first.
    pub priority: i32,
    /// Prefix-cache entries are shared only between equal salts.
    pub cache_salt: Option<String>,
    /// Report token ids beside text.
    pub return_token_ids: bool,
    /// Report log-probabilities after penalties, temperature and truncation.
    pub processed_logprobs: bool,
    /// Log-probabilities of the prompt with this many alternatives.
    pub prompt_logprobs: Option<u32>,
    /// The caller, for the record.
    pub about: About,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<u32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) presence_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) min_tokens: usize,
    pub(crate) seed: Option<u64>,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) include_stop_str_in_output: bool,
    pub(crate) ignore_eos: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) logit_bias: Vec<(u32, f32)>,
}

impl Default for Generation {
    /// One choice, nothing said about sampling, nothing reported beside text.
    fn default() -> Self {
        Self {
            n: 1,
            max_tokens: None,
            shorten: false,
            stream: false,
            include_usage: false,
            priority: 0,
            cache_salt: None,
            return_token_ids: false,
            processed_logprobs: false,
            prompt_logprobs: None,
            about: About::default(),
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            repetition_penalty: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            min_tokens: 0,
            seed: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            skip_special_tokens: true,
            logit_bias: Vec::new(),
        }
    }
}

impl Generation {
    /// Reads the shared fields. `max_tokens` is the endpoint's own affair.
    pub fn parse(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let stream = fields.bool_or("stream", false)?;
        let include_usage = stream_options(fields, stream)?;
        let prompt_logprobs = count(fields, "prompt_logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| u32::try_from(n).unwrap_or(0));
        if stream && prompt_logprobs.is_some() {
            return Err(ApiError::invalid(
                "prompt_logprobs",
                "invalid_value",
                "Invalid 'prompt_logprobs': not available when 'stream' is true.",
            ));
        }
        Ok(Self {
            n: count(fields, "n", 1..=MAX_N)?.unwrap_or(1),
            stream,
            include_usage,
            return_token_ids: fields.bool_or("return_token_ids", false)?,
            processed_logprobs: match fields.get("logprobs_mode") {
                None => false,
                Some(field) => field.one_of(&["raw_logprobs", "processed_logprobs"])? == "processed_logprobs",
            },
            prompt_logprobs,
            ..Self::sampled(fields)?
        })
    }

    /// Reads the fields about the caller, sampling and stopping, which every endpoint that generates takes. The rest is as if nobody
    /// had asked for it.
    pub fn sampled(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let about = About::parse(fields)?;
        Ok(Self {
            priority: fields
                .integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?
                .and_then(|p| i32::try_from(p).ok())
                .unwrap_or(0),
            cache_salt: cache_salt(fields)?,
            about,
            temperature: fields.decimal("temperature", 0.0..=2.0)?,
            top_p: fields.decimal("top_p", 0.0..=1.0)?,
            // −1 is how vLLM's clients say "off"; the engine says 0.
            top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| u32::try_from(k).unwrap_or(0)),
            min_p: fields.decimal("min_p", 0.0..=1.0)?,
            repetition_penalty: repetition_penalty(fields)?,
            presence_penalty: fields.decimal("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.decimal("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            min_tokens: count(fields, "min_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(0),
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
            stop: fields.get("stop").map_or(Ok(Vec::new()), |f| stop_strings(&f))?,
            stop_token_ids: fields.get("stop_token_ids").map_or(Ok(Vec::new()), |f| f.token_ids(1024))?,
            include_stop_str_in_output: fields.bool_or("include_stop_str_in_output", false)?,
            ignore_eos: fields.bool_or("ignore_eos", false)?,
            skip_special_tokens: fields.bool_or("skip_special_tokens", true)?,
            logit_bias: fields.get("logit_bias").map_or(Ok(Vec::new()), |f| logit_bias(&f))?,
            ..Self::default()
        })
    }

    /// What the engine is asked for.
    ///
    /// Where the request is silent, as vLLM does: a value in the model's `generation_config.json` takes the place of OpenAI's
    /// default (temperature 1, top_p 1, nothing else). `do_sample` has no part in it: clients of this API turn sampling off with
    /// temperature 0.
    pub fn sampling(&self, defaults: &GenerationDefaults, logprobs: Option<u32>) -> SamplingParams {
        let off = SamplingParams::default();
        SamplingParams {
            n: self.n,
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            temperature: self.temperature.or(defaults.temperature).unwrap_or(off.temperature),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(off.top_k),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(off.top_p),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(off.min_p),
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(off.repetition_penalty),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            include_stop_str_in_output: self.include_stop_str_in_output,
            ignore_eos: self.ignore_eos,
            skip_special_tokens: self.skip_special_tokens,
            shown_special: off.shown_special,
            logprobs,
            prompt_logprobs: self.prompt_logprobs,
            grammar: None,
        }
    }
}

/// An integer in a range without negative numbers, as a size.
pub fn count(
    fields: &mut Fields<'_>,
    key: &'static str,
    range: std::ops::RangeInclusive<i64>,
) -> Result<Option<usize>, ApiError> {
    Ok(fields.integer(key, range)?.and_then(|n| usize::try_from(n).ok()))
}

/// Whether a stream's end is to say how many tokens there were.
pub fn stream_options(fields: &mut Fields<'_>, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.get("stream_options") else { return Ok(false) };
    if !stream {
        return Err(options.invalid("invalid_value", "only allowed when 'stream' is true."));
    }
    let mut options = options.object()?;
    let include_usage = options.bool_or("include_usage", false)?;
    // Padding against traffic analysis, which OpenAI's edge adds; there is nothing to turn off here.
    options.bool_or("include_obfuscation", false)?;
    options.finish()?;
    Ok(include_usage)
}

fn cache_salt(fields: &mut Fields<'_>) -> Result<Option<String>, ApiError> {
    let Some(salt) = fields.get("cache_salt") else { return Ok(None) };
    match salt.short_string(512)? {
        "" => Err(salt.invalid("string_below_min_length", "empty string. Expected at least 1 character.")),
        text => Ok(Some(text.to_owned())),
    }
}

fn repetition_penalty(fields: &mut Fields<'_>) -> Result<Option<f32>, ApiError> {
    let Some(field) = fields.get("repetition_penalty") else { return Ok(None) };
    let penalty = field.decimal(0.0..=100.0)?;
    if penalty <= 0.0 {
        return Err(field.invalid("decimal_below_min_value", "decimal below minimum value. Expected a value > 0; 1 is off."));
    }
    Ok(Some(penalty))
}

fn stop_strings(field: &Field<'_>) -> Result<Vec<String>, ApiError> {
    let one = |field: &Field<'_>| match field.string()? {
        "" => Err(field.invalid("string_below_min_length", "empty string. Expected at least 1 character.")),
        text => Ok(text.to_owned()),
    };
    if field.value.is_string() {
        return Ok(vec![one(field)?]);
    }
    let items = field.array(MAX_STOP)?;
    items.iter().enumerate().map(|(i, value)| one(&field.item(i, value))).collect()
}

fn logit_bias(field: &Field<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
    let map = field.map()?;
    map.iter()
        .map(|(key, value)| {
            let entry = field.entry(key, value);
            let token: u32 =
                key.parse().map_err(|_| entry.invalid("invalid_value", "keys must be token ids, such as \"1734\"."))?;
            Ok((token, entry.decimal(-100.0..=100.0)?))
        })
        .collect()
}
