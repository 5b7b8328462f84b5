//! What stands beside the weights of a folder, made from a model that came as one file: `config.json`, `generation_config.json`,
//! `tokenizer.json` and `tokenizer_config.json` (with the chat template), under transformers' names.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tidemill_kernels::Format;

use super::{MergeError, at};
use crate::model_config::{Family, ModelConfig, RopeScaling};
use crate::model_files::ModelFiles;

/// What transformers calls a storage.
pub(super) fn torch_name(storage: Format) -> &'static str {
    match storage {
        Format::F16 => "float16",
        Format::Bf16 => "bfloat16",
        _ => "float32",
    }
}

/// Writes all of them. A model whose shape a `config.json` cannot say is refused.
pub(super) fn write(model: &ModelFiles, storage: Format, folder: &Path) -> Result<(), MergeError> {
    let put = |name: &str, text: String| {
        let path = folder.join(name);
        at("write", &path, fs::write(&path, text))
    };
    let path = folder.join("config.json");
    put("config.json", format!("{:#}\n", configuration(model, storage)))?;
    if ModelConfig::from_json(&path)?.0 != *model.config() {
        let scaling = match model.config().rope_scaling {
            RopeScaling::Factors(_) => "the factors of its rotary frequencies",
            _ => "a switch of its layers",
        };
        return Err(MergeError::Unsupported(format!(
            "{}: a config.json cannot say {scaling}; take the publisher's folder of safetensors, or put its config.json and \
             tokenizer.json beside the file",
            model.path().display()
        )));
    }
    let unwritable = |error: crate::tokenizer::EncodeError| MergeError::Unsupported(format!("tokenizer.json: {error}"));
    put("tokenizer.json", model.tokenizer().to_json().map_err(unwritable)?)?;
    put("tokenizer_config.json", format!("{:#}\n", tokenizer_configuration(model)))?;
    put("generation_config.json", format!("{:#}\n", generation_configuration(model)))
}

/// The shortest decimal that is this number: 1e-5, not 9.999999747378752e-6.
fn short(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

fn configuration(model: &ModelFiles, storage: Format) -> Value {
    let config = model.config();
    let (architecture, kind) = match config.family {
        Family::Llama => ("LlamaForCausalLM", "llama"),
        Family::Mistral => ("MistralForCausalLM", "mistral"),
        Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        Family::Mixtral => ("MixtralForCausalLM", "mixtral"),
        Family::Qwen2Moe => ("Qwen2MoeForCausalLM", "qwen2_moe"),
        Family::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
        Family::Dbrx => ("DbrxForCausalLM", "dbrx"),
        Family::Gemma2 => ("Gemma2ForCausalLM", "gemma2"),
        Family::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text"),
        Family::Mpt => ("MptForCausalLM", "mpt"),
    };
    let scaling = match &config.rope_scaling {
        RopeScaling::None | RopeScaling::Factors(_) => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_positions,
        }),
        RopeScaling::Yarn(yarn) => json!({
            "rope_type": "yarn",
            "factor": yarn.factor,
            "attention_factor": yarn.attention,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "truncate": yarn.truncate,
            "original_max_position_embeddings": yarn.original_positions,
        }),
    };
    let mut value = json!({
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": short(config.rms_eps),
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": torch_name(storage),
    });
    match config.family {
        Family::Llama => {
            value["attention_bias"] = json!(config.output_bias);
            value["mlp_bias"] = json!(config.mlp_bias);
        }
        Family::Mistral | Family::Mixtral => value["sliding_window"] = json!(config.sliding_window),
        Family::Qwen2 | Family::Qwen2Moe => value["use_sliding_window"] = json!(false),
        Family::Qwen3 | Family::Qwen3Moe => {
            value["attention_bias"] = json!(config.output_bias);
            value["use_sliding_window"] = json!(false);
        }
        // Models with experts, or query, key and value in one matrix, stay in their container, and so beside their own config.json. No Gemma is
        // written anew.
        Family::Dbrx | Family::Mpt | Family::Gemma2 | Family::Gemma3 => {}
    }
    if let (Some(value), Value::Object(roles)) = (value.as_object_mut(), generation_configuration(model)) {
        value.extend(roles);
    }
    value
}

/// The tokens with a role, by number.
fn generation_configuration(model: &ModelFiles) -> Value {
    let roles = model.tokenizer().special_tokens();
    let named = [("bos_token_id", roles.bos), ("pad_token_id", roles.padding)];
    let mut value: Map<String, Value> = named.into_iter().filter_map(|(name, id)| Some((name.to_owned(), json!(id?)))).collect();
    value.insert("eos_token_id".to_owned(), json!(model.end_of_turn()));
    Value::Object(value)
}

fn tokenizer_configuration(model: &ModelFiles) -> Value {
    let (tokenizer, roles) = (model.tokenizer(), model.tokenizer().special_tokens());
    let mut value = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config().max_positions,
        "clean_up_tokenization_spaces": false,
    });
    let named = [("bos_token", roles.bos), ("eos_token", roles.eos), ("unk_token", roles.unknown), ("pad_token", roles.padding)];
    for (name, token) in named.into_iter().filter_map(|(name, id)| Some((name, tokenizer.token(id?)?))) {
        value[name] = json!(token);
    }
    if let Some(template) = model.chat_template() {
        let with_tools = template.tool_source().filter(|tools| *tools != template.source());
        value["chat_template"] = match with_tools {
            None => json!(template.source()),
            Some(tools) => json!([
                { "name": "default", "template": template.source() },
                { "name": "tool_use", "template": tools },
            ]),
        };
    }
    value
}
