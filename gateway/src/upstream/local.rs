//! A model served by the engine in this process: text to tokens, limits, submission.

use crate::http::error::ApiError;
use crate::openai::chat::ChatPrompt;
use crate::openai::completions::PromptInput;
use crate::openai::parse::{ParserChoice, Parsers};
use crate::openai::response_format::Constrained;
use crate::openai::tool_prompt;
use crate::openai::tools::Tool;
use crate::upstream::Events;
use crate::upstream::grammars::Grammars;
use crate::upstream::remote::request::put_before;
use serde_json::Value;
use std::borrow::Cow;
use std::sync::Arc;
use tidemill_engine::{
    AdapterLease, ChatInput, ChatTemplate, Engine, GenerationDefaults, Grammar, Request, TemplateError, Tokenizer,
};

/// A loaded model.
pub struct LocalModel {
    name: String,
    fingerprint: String,
    created: u64,
    engine: Engine,
    parsers: Arc<Parsers>,
    shown_special: Arc<[u32]>,
    grammars: Arc<Grammars>,
    /// Set for an adapter of the model.
    adapter: Option<AdapterLease>,
    /// A system prompt that is put before every conversation.
    prompt_prefix: Option<Arc<str>>,
}

impl LocalModel {
    /// The model that `engine` runs, under its served name. `created` is in seconds since 1970.
    pub fn new(engine: Engine, created: u64) -> Self {
        let options = engine.options();
        // Whatever changes the answers: the weights, their form, the form of keys and values, this program.
        let configuration = format!(
            "{} {} {:?} {:?} {:?} {}",
            engine.description(),
            engine.memory().backend,
            options.weight_format,
            options.activations,
            options.kv_dtype,
            env!("CARGO_PKG_VERSION")
        );
        let (name, fingerprint) = (options.served_name.clone(), fingerprint(&configuration));
        let (parsers, shown_special, grammars) = (Arc::default(), Arc::default(), Arc::default());
        let model =
            Self { name, fingerprint, created, parsers, shown_special, engine, grammars, adapter: None, prompt_prefix: None };
        model.reading_as(ParserChoice::default())
    }

    /// The same with its calls and reasoning read as `choice` says.
    pub fn reading_as(mut self, choice: ParserChoice) -> Self {
        let template = self.engine.chat_template();
        let source = template.map_or("", |template| template.source());
        let tool_source = template.and_then(ChatTemplate::tool_source).unwrap_or_default();
        self.parsers = Arc::new(Parsers::choose(choice, source, tool_source));
        self.shown_special = self.parsers.marks().iter().filter_map(|mark| self.control_token(mark)).collect();
        self
    }

    /// The same with an adapter, under the name that the request used.
    pub fn adapted(&self, asked: &str, adapter: AdapterLease) -> Self {
        Self {
            name: asked.to_owned(),
            fingerprint: fingerprint(&format!("{} {}", self.fingerprint, adapter.generation())),
            created: adapter.created(),
            engine: self.engine.clone(),
            parsers: Arc::clone(&self.parsers),
            shown_special: Arc::clone(&self.shown_special),
            grammars: Arc::clone(&self.grammars),
            adapter: Some(adapter),
            prompt_prefix: self.prompt_prefix.clone(),
        }
    }

    /// The same under the name that a client knows it by, with a system prompt that is put before every conversation.
    pub fn called(&self, public: &str, prompt_prefix: Option<Arc<str>>) -> Self {
        let fingerprint = match &prompt_prefix {
            Some(prefix) => fingerprint(&format!("{} {prefix}", self.fingerprint)),
            None => self.fingerprint.clone(),
        };
        Self {
            name: public.to_owned(),
            fingerprint,
            created: self.created,
            engine: self.engine.clone(),
            parsers: Arc::clone(&self.parsers),
            shown_special: Arc::clone(&self.shown_special),
            grammars: Arc::clone(&self.grammars),
            adapter: self.adapter.clone(),
            prompt_prefix,
        }
    }

    /// Name that clients use.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of the base model: limits, prices and records go by it.
    pub fn base(&self) -> &str {
        &self.engine.options().served_name
    }

    /// The adapter that its requests use.
    pub fn adapter(&self) -> Option<&AdapterLease> {
        self.adapter.as_ref()
    }

    /// What a record calls the adapter: `base:adapter`, without the generation, which stands beside it.
    pub fn variant(&self) -> Option<String> {
        let plain = |adapter: &AdapterLease| adapter.name().split('@').next().unwrap_or_default().to_owned();
        self.adapter.as_ref().map(|adapter| format!("{}:{}", self.base(), plain(adapter)))
    }

    /// `system_fingerprint`.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Seconds since 1970.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.engine.tokenizer()
    }

    /// Sampling defaults.
    pub fn defaults(&self) -> &GenerationDefaults {
        self.engine.generation_defaults()
    }

    /// How the model writes reasoning and calls.
    pub fn parsers(&self) -> &Parsers {
        &self.parsers
    }

    /// The id of a mark that is a control token.
    pub fn control_token(&self, mark: &str) -> Option<u32> {
        let tokenizer = self.engine.tokenizer();
        tokenizer.id(mark).filter(|&token| tokenizer.is_special(token))
    }

    /// Control tokens that the parsers need to see.
    pub fn shown_special(&self) -> &Arc<[u32]> {
        &self.shown_special
    }

    /// Most tokens of prompt and output together.
    pub fn context(&self) -> usize {
        self.engine.limits().max_model_len
    }

    /// The conversation as the model's template writes it.
    pub fn render(&self, prompt: &ChatPrompt, tools: &[&Tool]) -> Result<String, ApiError> {
        let Some(template) = self.engine.chat_template() else {
            let message = format!("The model `{}` has no chat template: use /v1/completions.", self.name);
            return Err(ApiError::invalid("messages", "unsupported_parameter", message));
        };
        let mut variables = Cow::Borrowed(&prompt.template_kwargs);
        if let Some(effort) = &prompt.reasoning_effort {
            if !template.source().contains("reasoning_effort") {
                let message =
                    format!("Unsupported parameter: 'reasoning_effort' is not supported with the model `{}`.", self.name);
                return Err(ApiError::unsupported("reasoning_effort", message));
            }
            variables.to_mut().insert("reasoning_effort".into(), Value::from(effort.as_str()));
        }
        let tools: Vec<Value> = tools.iter().map(|tool| tool.to_template()).collect();
        let mut messages = Cow::Borrowed(&prompt.messages);
        if let Some(prefix) = &self.prompt_prefix {
            put_before(prefix, messages.to_mut());
        }
        let mut offered = (!tools.is_empty()).then_some(tools.as_slice());
        if template.tool_source().is_none() && (offered.is_some() || messages.iter().any(speaks_of_tools)) {
            let has_system = template.source().contains("system");
            messages = Cow::Owned(tool_prompt::without_tool_roles(&messages, &tools, has_system));
            offered = None;
        }
        let render = |messages: &[Value]| {
            template.render(&ChatInput {
                messages,
                tools: offered,
                documents: None,
                add_generation_prompt: prompt.add_generation_prompt,
                continue_final_message: prompt.continue_final_message,
                variables: Some(&variables),
                now: None,
            })
        };
        let rendered = match render(&messages) {
            // Some templates join the arguments of earlier calls to a text, as if they were one.
            Err(TemplateError::Failed(_)) if messages.iter().any(|message| message["tool_calls"].is_array()) => {
                render(&with_argument_texts(&messages))
            }
            rendered => rendered,
        };
        rendered.map_err(|error| {
            let param = match error {
                TemplateError::Continue(_) => "continue_final_message",
                _ => "messages",
            };
            ApiError::invalid(param, "invalid_value", format!("Invalid '{param}': {error}"))
        })
    }

    /// The conversation as text and as tokens.
    pub fn chat_tokens(&self, prompt: &ChatPrompt, tools: &[&Tool]) -> Result<(String, Vec<u32>), ApiError> {
        let text = self.render(prompt, tools)?;
        // The template writes the BOS token itself: a second one would change the answer.
        let tokens = self.encode(&text, false, "messages")?;
        Ok((text, tokens))
    }

    /// Text as tokens; control tokens in it are recognised by name.
    pub fn encode(&self, text: &str, add_special: bool, param: &'static str) -> Result<Vec<u32>, ApiError> {
        let encoded = self.engine.tokenizer().encode(text, add_special, true);
        encoded.map_err(|error| ApiError::invalid(param, "invalid_value", format!("Invalid '{param}': {error}")))
    }

    /// A prompt as tokens, all of which the model knows.
    pub fn prompt_tokens(&self, prompt: &PromptInput, add_special: bool) -> Result<Vec<u32>, ApiError> {
        match prompt {
            PromptInput::Text(text) => self.encode(text, add_special, "prompt"),
            PromptInput::Tokens(tokens) => {
                self.check_tokens(tokens, "prompt")?;
                Ok(tokens.clone())
            }
        }
    }

    /// Fails on a token id beyond the vocabulary.
    pub fn check_tokens(&self, tokens: &[u32], param: &'static str) -> Result<(), ApiError> {
        let vocabulary = self.engine.limits().vocabulary;
        match tokens.iter().find(|&&token| token as usize >= vocabulary) {
            None => Ok(()),
            Some(token) => {
                let message =
                    format!("Invalid '{param}': token id {token} is not below {vocabulary}, the size of the vocabulary.");
                Err(ApiError::invalid(param, "invalid_value", message))
            }
        }
    }

    /// Fails when the prompt is empty or leaves no room for an answer of the length asked for.
    pub fn check_fit(&self, prompt: usize, output: Option<usize>, param: &'static str) -> Result<(), ApiError> {
        let context = self.context();
        if prompt == 0 {
            return Err(ApiError::invalid(param, "invalid_value", format!("Invalid '{param}': the prompt has no tokens.")));
        }
        if prompt >= context {
            return Err(ApiError::context_length(context, prompt, None, param));
        }
        match output {
            Some(output) if prompt.saturating_add(output) > context => {
                Err(ApiError::context_length(context, prompt, Some(output), param))
            }
            _ => Ok(()),
        }
    }

    /// Fails when a request brings more prompts than can ever wait at once.
    pub fn check_prompts(&self, prompts: usize) -> Result<(), ApiError> {
        let limit = self.engine.limits().max_waiting;
        if prompts > limit {
            let message = format!(
                "Invalid 'prompt': array too long. Expected an array with maximum length {limit}, the length of this server's queue, but got an array with length {prompts} instead."
            );
            return Err(ApiError::invalid("prompt", "array_above_max_length", message));
        }
        Ok(())
    }

    /// Fails when more choices are asked for than can run at once.
    pub fn check_choices(&self, n: usize, param: &'static str) -> Result<(), ApiError> {
        let limit = self.engine.limits().max_seqs;
        if n > limit {
            let message = format!(
                "Invalid '{param}': integer above maximum value. Expected a value <= {limit}, the most that this server runs at once, but got {n} instead."
            );
            return Err(ApiError::invalid(param, "integer_above_max_value", message));
        }
        Ok(())
    }

    /// The constraint, compiled for this model: from memory when it was asked for before.
    pub async fn grammar(&self, constrained: &Constrained) -> Result<Arc<Grammar>, ApiError> {
        self.grammars.get(&self.engine, constrained).await
    }

    /// Hands the requests to the engine. When one is refused, those before it are cancelled.
    pub fn submit(&self, requests: Vec<Request>) -> Result<Events, ApiError> {
        let receivers: Result<Vec<_>, _> = requests.into_iter().map(|request| self.engine.submit(request)).collect();
        Ok(Events::new(receivers?))
    }
}

/// Whether a message is a call's or a result's.
fn speaks_of_tools(message: &Value) -> bool {
    message["role"] == "tool" || message["tool_calls"].is_array()
}

/// The messages with the arguments of calls as JSON texts.
fn with_argument_texts(messages: &[Value]) -> Vec<Value> {
    let mut messages = messages.to_vec();
    for message in &mut messages {
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(arguments) = call.pointer_mut("/function/arguments").filter(|arguments| !arguments.is_string()) {
                *arguments = arguments.to_string().into();
            }
        }
    }
    messages
}

/// `fp_` and ten hexadecimal digits of FNV-1a (Fowler, Noll, Vo): stable over builds, which the standard hasher is not.
pub(super) fn fingerprint(configuration: &str) -> String {
    let hash = configuration
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("fp_{:010x}", hash & 0xff_ffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_is_stable_and_tells_configurations_apart() {
        // FNV-1a of "a" is af63dc4c8601ec8c.
        assert_eq!(fingerprint("a"), "fp_4c8601ec8c");
        assert_ne!(fingerprint("tiny int8"), fingerprint("tiny bf16"));
        assert_eq!(fingerprint("tiny int8").len(), 13);
    }
}
