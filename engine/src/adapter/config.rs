//! `adapter_config.json`.

use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value, json};

use super::error::AdapterError;
use super::modules::{Modules, Names, ending, first, whole};
use super::projection::Projection;

/// Most entries of `rank_pattern` and of `alpha_pattern`.
const MAX_PATTERNS: usize = 4096;

/// How an adapter was made. [`LoraConfig::default`] is rank 16, alpha 32, dropout 0.05 on every matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank, ≥ 1, where no pattern says otherwise.
    pub r: usize,
    /// The scale is `alpha / r`, or `alpha / √r`.
    pub alpha: f64,
    /// Part of the inputs of `A` that training sets to 0.
    pub dropout: f64,
    /// Rank-stabilised scale, `alpha / √r` (Kalajdzievski 2023).
    pub rslora: bool,
    /// Adapted matrices, ascending.
    pub targets: Vec<Projection>,
    /// Adapted layers, ascending; `None` is all.
    pub layers: Option<Vec<usize>>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { r: 16, alpha: 32.0, dropout: 0.05, rslora: false, targets: Projection::ALL.to_vec(), layers: None }
    }
}

impl LoraConfig {
    /// What `B A` is multiplied with at this configuration's own rank and alpha.
    pub fn scale(&self) -> f32 {
        scale(self.alpha, self.r, self.rslora)
    }
}

/// The scale of a matrix.
pub(super) fn scale(alpha: f64, rank: usize, rslora: bool) -> f32 {
    let rank = rank as f64;
    (alpha / if rslora { rank.sqrt() } else { rank }) as f32
}

/// What a configuration file says.
pub(super) struct Described {
    /// Without targets: the tensors tell them.
    pub config: LoraConfig,
    pub base: String,
    pub modules: Modules,
    pub fields: Map<String, Value>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

impl Described {
    /// Rank and scale of a module.
    pub fn rank_and_scale(&self, module: &str) -> (usize, f32) {
        let rank = first(&self.ranks, module).unwrap_or(self.config.r);
        let alpha = first(&self.alphas, module).unwrap_or(self.config.alpha);
        (rank, scale(alpha, rank, self.config.rslora))
    }

    /// Understands the file's content, or refuses it by the field's name.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, AdapterError> {
        let value: Value =
            serde_json::from_slice(text).map_err(|error| AdapterError::config(path, "content", error.to_string()))?;
        let Value::Object(mut fields) = value else {
            return Err(AdapterError::config(path, "content", "is not a JSON object"));
        };
        let fields = &mut fields;
        let kind = fields.get("peft_type").and_then(Value::as_str).unwrap_or_default();
        if kind != "LORA" {
            return Err(AdapterError::unsupported(path, "peft_type", format!("\"{kind}\""), "only LORA adapters are served"));
        }
        refuse_others(path, fields)?;
        let mut reader = Reader { path, fields };
        let (ranks, alphas) = (reader.patterns("rank_pattern", rank)?, reader.patterns("alpha_pattern", Value::as_f64)?);
        let r = reader.number("r", rank, "a whole number from 1")?;
        let config = LoraConfig {
            r,
            alpha: reader.number("lora_alpha", Value::as_f64, "a number")?,
            dropout: reader.optional("lora_dropout").map_or(Some(0.0), |value| value.as_f64()).unwrap_or(0.0),
            rslora: reader.optional("use_rslora") == Some(Value::Bool(true)),
            targets: Vec::new(),
            layers: reader.layers()?,
        };
        let targets = match reader.names("target_modules")? {
            Some(targets) => targets,
            None => return Err(AdapterError::config(path, "target_modules", "is missing")),
        };
        let excluded = reader.names("exclude_modules")?.unwrap_or_else(Names::none);
        let modules = Modules { targets, excluded, layers: config.layers.clone() };
        let base = reader.optional("base_model_name_or_path");
        let base = base.and_then(|base| base.as_str().map(str::to_owned)).unwrap_or_default();
        let fields = std::mem::take(reader.fields);
        Ok(Self { config, base, modules, fields, ranks, alphas })
    }
}

/// Switches that change what an adapter computes, each with what to do instead.
const UNSUPPORTED: [(&str, &str); 14] = [
    ("use_dora", "train without DoRA"),
    ("use_qalora", "train without QALoRA"),
    ("use_bdlora", "train without it"),
    ("lora_bias", "train without biases in the adapter"),
    ("modules_to_save", "train low-rank pairs only"),
    ("trainable_token_indices", "train low-rank pairs only"),
    ("target_parameters", "name modules in target_modules"),
    ("layer_replication", "train on the layers of the base"),
    ("alora_invocation_tokens", "train an adapter that is always active"),
    ("arrow_config", "serve the adapters on their own"),
    ("megatron_config", "export the adapter with PEFT"),
    ("velora_config", "train without it"),
    ("monteclora_config", "train without it"),
    ("kasa_config", "train without it"),
];

/// Starts that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, …) move a part of the base into the adapter.
const PLAIN_STARTS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

fn refuse_others(path: &Path, fields: &Map<String, Value>) -> Result<(), AdapterError> {
    let is_set = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => true,
    };
    for (field, instead) in UNSUPPORTED {
        if let Some(value) = fields.get(field).filter(|value| is_set(value)) {
            return Err(AdapterError::unsupported(path, field, value.to_string(), instead));
        }
    }
    // A switch that came after this was written would change the result without a word.
    let unknown = fields.iter().find(|(name, value)| name.starts_with("use_") && *name != "use_rslora" && is_set(value));
    if let Some((name, value)) = unknown {
        return Err(AdapterError::unsupported(path, name, value.to_string(), "train without it"));
    }
    match fields.get("bias").and_then(Value::as_str) {
        None | Some("none") => {}
        Some(other) => {
            return Err(AdapterError::unsupported(path, "bias", format!("\"{other}\""), "train with bias \"none\""));
        }
    }
    match fields.get("init_lora_weights").and_then(Value::as_str) {
        Some(start) if !PLAIN_STARTS.contains(&start) => {
            let instead = "it needs a changed base; save it converted to plain LoRA \
                           (PEFT: save_pretrained with path_initial_model_for_weight_conversion)";
            Err(AdapterError::unsupported(path, "init_lora_weights", format!("\"{start}\""), instead))
        }
        _ => Ok(()),
    }
}

fn rank(value: &Value) -> Option<usize> {
    // PEFT itself knows no limit; this keeps products of sizes far from overflow.
    value.as_u64().filter(|rank| (1..=1 << 20).contains(rank)).and_then(|rank| usize::try_from(rank).ok())
}

/// Takes fields out; what is left is kept as it is.
struct Reader<'a> {
    path: &'a Path,
    fields: &'a mut Map<String, Value>,
}

impl Reader<'_> {
    fn optional(&mut self, field: &str) -> Option<Value> {
        self.fields.shift_remove(field).filter(|value| !value.is_null())
    }

    fn number<T>(&mut self, field: &str, read: impl Fn(&Value) -> Option<T>, wanted: &str) -> Result<T, AdapterError> {
        let value = self.optional(field).unwrap_or_default();
        read(&value).ok_or_else(|| AdapterError::config(self.path, field, format!("is {value}, but should be {wanted}")))
    }

    fn patterns<T>(&mut self, field: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Regex, T)>, AdapterError> {
        let entries = match self.optional(field) {
            None => return Ok(Vec::new()),
            Some(Value::Object(entries)) => entries,
            Some(other) => return Err(AdapterError::config(self.path, field, format!("is {other}, but should be an object"))),
        };
        if entries.len() > MAX_PATTERNS {
            let detail = format!("has {} entries, more than {MAX_PATTERNS}", entries.len());
            return Err(AdapterError::config(self.path, field, detail));
        }
        let entry = |(key, value): (String, Value)| {
            let bad = |detail: String| AdapterError::config(self.path, format!("{field}.{key}"), detail);
            let number = read(&value).ok_or_else(|| bad(format!("{value} is out of range")))?;
            Ok((ending(&key).map_err(|error| bad(error.to_string()))?, number))
        };
        entries.into_iter().map(entry).collect()
    }

    fn names(&mut self, field: &str) -> Result<Option<Names>, AdapterError> {
        let bad = |path: &Path, detail: String| Err(AdapterError::config(path, field, detail));
        match self.optional(field) {
            None => Ok(None),
            Some(Value::String(word)) if word == "all-linear" => Ok(Some(Names::AllLinear)),
            Some(Value::String(pattern)) => match whole(&pattern) {
                Ok(pattern) => Ok(Some(Names::Pattern(pattern))),
                Err(error) => bad(self.path, format!("\"{pattern}\": {error}; a list of names does without a pattern")),
            },
            Some(Value::Array(items)) => {
                let names: Option<Vec<String>> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
                match names {
                    Some(names) => Ok(Some(Names::Listed(self.known(field, names)?))),
                    None => bad(self.path, "should be a list of names".to_owned()),
                }
            }
            Some(other) => bad(self.path, format!("is {other}, but should be a list of names or a pattern")),
        }
    }

    /// Refuses names of modules that cannot be adapted here.
    fn known(&self, field: &str, names: Vec<String>) -> Result<Vec<String>, AdapterError> {
        let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
        let unknown = names.iter().find(|name| Projection::every().all(|projection| projection.name() != last(name)));
        match unknown.filter(|_| field == "target_modules") {
            None => Ok(names),
            Some(name) => {
                let known = Projection::every().map(Projection::name).collect::<Vec<_>>().join(", ");
                Err(AdapterError::unsupported(self.path, field, format!("\"{name}\""), format!("adapted are {known}")))
            }
        }
    }

    /// `layers_to_transform`: a number or a list; an empty list is all.
    fn layers(&mut self) -> Result<Option<Vec<usize>>, AdapterError> {
        let field = "layers_to_transform";
        // Where the layers lie in the model's tree; there is one such place.
        self.fields.shift_remove("layers_pattern");
        let number = |value: &Value| value.as_u64().and_then(|layer| usize::try_from(layer).ok());
        let layers = match self.optional(field) {
            None => return Ok(None),
            Some(Value::Array(items)) => items.iter().map(number).collect(),
            Some(one) => number(&one).map(|layer| vec![layer]),
        };
        match layers {
            None => Err(AdapterError::config(self.path, field, "should be a layer's number or a list of them")),
            Some(layers) if layers.is_empty() => Ok(None),
            Some(mut layers) => {
                layers.sort_unstable();
                layers.dedup();
                Ok(Some(layers))
            }
        }
    }
}

/// The file's content for an adapter that adapts `targets` (names) in `layers`, with the given exceptions from rank and alpha.
pub(super) fn render(
    config: &LoraConfig,
    base: &str,
    targets: Vec<String>,
    layers: Option<&[usize]>,
    ranks: Map<String, Value>,
    alphas: Map<String, Value>,
    extra: &Map<String, Value>,
) -> Vec<u8> {
    // PEFT writes whole alphas as integers.
    let alpha =
        if config.alpha.fract() == 0.0 && config.alpha.abs() < 1e15 { json!(config.alpha as i64) } else { json!(config.alpha) };
    let ours = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "target_modules": targets,
        "exclude_modules": null,
        "layers_to_transform": layers,
        "layers_pattern": null,
        "modules_to_save": null,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    });
    let mut all: Map<String, Value> = ours.as_object().cloned().unwrap_or_default();
    all.extend(extra.iter().map(|(name, value)| (name.clone(), value.clone())));
    let mut sorted: Vec<(String, Value)> = all.into_iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let sorted: Map<String, Value> = sorted.into_iter().collect();
    // The alternate form of a value's text is its indented one.
    format!("{:#}\n", Value::Object(sorted)).into_bytes()
}
