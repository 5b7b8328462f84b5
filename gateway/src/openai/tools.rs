//! `tools`, `tool_choice`, `parallel_tool_calls`, and the older `functions` and `function_call`, which say the same.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::{Map, Value, json};

/// Most tools of a request, as OpenAI has it.
const MAX_TOOLS: usize = 128;
/// Longest name, in characters.
const MAX_NAME: usize = 64;

/// A function that the model may ask to have called.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// What it does, for the model.
    pub description: Option<String>,
    /// JSON schema of its arguments, an object; `None` takes none.
    pub parameters: Option<Value>,
    /// Arguments must fit the schema.
    pub strict: bool,
    /// The field of the request that holds the schema, for errors.
    pub param: String,
}

/// Whether and what the model may call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// Nothing.
    None,
    /// What it likes.
    #[default]
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
    /// Of these only; with `required` at least one.
    Allowed {
        /// Whether it must.
        required: bool,
        /// Which.
        names: Vec<String>,
    },
}

impl ToolChoice {
    /// Whether the answer must be a call.
    pub fn is_forced(&self) -> bool {
        matches!(self, Self::Required | Self::Named(_) | Self::Allowed { required: true, .. })
    }

    /// Whether a tool of this name may be called.
    pub fn allows(&self, name: &str) -> bool {
        match self {
            Self::None => false,
            Self::Auto | Self::Required => true,
            Self::Named(named) => named == name,
            Self::Allowed { names, .. } => names.iter().any(|allowed| allowed == name),
        }
    }
}

/// All that a request says about tools.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ToolUse {
    /// In the request's order.
    pub tools: Vec<Tool>,
    /// Which of them.
    pub choice: ToolChoice,
    /// Several calls in one answer.
    pub parallel: bool,
    /// Said with `functions`: the answer says it with `function_call`.
    pub legacy: bool,
}

impl Tool {
    /// Reads name, description, parameters and strictness from `fields`, and that nothing else is there.
    pub fn parse(mut fields: Fields<'_>) -> Result<Self, ApiError> {
        let name = name(&fields.require("name")?)?.to_owned();
        let description = fields.string("description")?.map(str::to_owned);
        let param = fields.path("parameters").into_owned();
        let parameters = fields.get("parameters").map(|field| schema(&field)).transpose()?;
        let strict = fields.bool_or("strict", false)?;
        fields.finish()?;
        Ok(Self { name, description, parameters, strict, param })
    }

    /// As chat templates read it.
    pub fn to_template(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".into(), self.name.as_str().into());
        if let Some(description) = &self.description {
            function.insert("description".into(), description.as_str().into());
        }
        function.insert("parameters".into(), self.schema());
        json!({"type": "function", "function": function})
    }

    /// The schema of its arguments.
    pub fn schema(&self) -> Value {
        self.parameters.clone().unwrap_or_else(|| json!({"type": "object", "properties": {}}))
    }
}

/// A function's name.
pub fn name<'a>(field: &Field<'a>) -> Result<&'a str, ApiError> {
    let name = field.short_string(MAX_NAME)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || !name.chars().all(plain) {
        let why = "string does not match pattern. Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'.";
        return Err(field.invalid("invalid_value", why));
    }
    Ok(name)
}

/// The schema of a function's arguments: those are always an object.
pub fn schema(field: &Field<'_>) -> Result<Value, ApiError> {
    match field.map()?.get("type") {
        None => {}
        Some(Value::String(kind)) if kind == "object" => {}
        Some(_) => {
            let why = "the arguments of a function are an object: the schema needs \"type\": \"object\".";
            return Err(field.invalid("invalid_value", why));
        }
    }
    Ok(field.value.clone())
}

/// Fails when two tools have one name; `at` says where the tools lie.
pub fn distinct(tools: &[Tool], at: &Field<'_>) -> Result<(), ApiError> {
    for (i, tool) in tools.iter().enumerate() {
        if tools.iter().take(i).any(|other| other.name == tool.name) {
            return Err(
                at.invalid("invalid_value", format!("two tools are called '{}'; give each a name of its own.", tool.name))
            );
        }
    }
    Ok(())
}

/// Fails when no tool has the name that `field` holds.
pub fn known(tools: &[Tool], name: &str, field: &Field<'_>) -> Result<(), ApiError> {
    if tools.iter().any(|tool| tool.name == name) {
        return Ok(());
    }
    Err(field.invalid("invalid_value", format!("'{name}' is not the name of a function in 'tools'.")))
}

/// How an API of OpenAI's spells tools and the choice between them.
#[derive(Clone, Copy, Debug)]
pub struct Spelling {
    /// What is said of a kind lies in an object of its own beside `type`, else in the same.
    nested: bool,
    /// Kinds of tools that OpenAI has there and this server has not.
    elsewhere: &'static [&'static str],
}

impl Spelling {
    /// Of chat completions.
    pub const CHAT: Self = Self { nested: true, elsewhere: &["custom"] };
    /// Of responses.
    pub const RESPONSES: Self = Self {
        nested: false,
        elsewhere: &[
            "file_search",
            "web_search_preview",
            "web_search_preview_2025_03_11",
            "web_search",
            "computer_use_preview",
            "computer",
            "code_interpreter",
            "image_generation",
            "mcp",
            "custom",
            "shell",
            "apply_patch",
        ],
    };

    /// `tools`.
    pub fn tools(self, field: &Field<'_>) -> Result<Vec<Tool>, ApiError> {
        list(field, |mut fields| {
            self.function_kind(&fields.require("type")?, &["function"])?;
            Tool::parse(self.inner(fields, "function")?)
        })
    }

    /// `tool_choice`.
    pub fn choice(self, field: &Field<'_>, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
        let choice = if field.value.is_string() {
            match field.one_of(&["none", "auto", "required"])? {
                "none" => ToolChoice::None,
                "required" => ToolChoice::Required,
                _ => ToolChoice::Auto,
            }
        } else {
            let mut fields = field.object()?;
            let kind = fields.require("type")?;
            if kind.string()? == "allowed_tools" {
                self.allowed(self.inner(fields, "allowed_tools")?, tools)?
            } else {
                self.function_kind(&kind, &["function", "allowed_tools"])?;
                ToolChoice::Named(named(self.inner(fields, "function")?, tools)?)
            }
        };
        if choice.is_forced() && tools.is_empty() {
            return Err(field.invalid("invalid_value", "asks for a call, but there are no 'tools' to call."));
        }
        Ok(choice)
    }

    fn allowed(self, mut fields: Fields<'_>, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
        let required = fields.require("mode")?.one_of(&["auto", "required"])? == "required";
        let list = fields.require("tools")?;
        fields.finish()?;
        let one = |(i, value)| {
            let mut fields = list.item(i, value).object()?;
            self.function_kind(&fields.require("type")?, &["function"])?;
            named(self.inner(fields, "function")?, tools)
        };
        let names = list.filled_array(MAX_TOOLS)?.iter().enumerate().map(one).collect::<Result<_, ApiError>>()?;
        Ok(ToolChoice::Allowed { required, names })
    }

    /// `function`, the only kind of tool that runs on the caller's side with JSON arguments.
    fn function_kind(self, kind: &Field<'_>, supported: &[&str]) -> Result<(), ApiError> {
        match kind.string()? {
            "function" => Ok(()),
            word if self.elsewhere.contains(&word) => {
                Err(kind.unsupported(&format!("can only be 'function' here: this server has no tool of type '{word}'.")))
            }
            other => Err(kind.unknown_value(other, supported)),
        }
    }

    /// Where the fields lie that belong to the kind.
    fn inner<'a>(self, mut fields: Fields<'a>, kind: &'static str) -> Result<Fields<'a>, ApiError> {
        if !self.nested {
            return Ok(fields);
        }
        let inner = fields.require(kind)?.object()?;
        fields.finish()?;
        Ok(inner)
    }
}

fn list<'a>(field: &Field<'a>, one: impl Fn(Fields<'a>) -> Result<Tool, ApiError>) -> Result<Vec<Tool>, ApiError> {
    let items = field.array(MAX_TOOLS)?.iter().enumerate();
    let tools: Vec<Tool> = items.map(|(i, value)| one(field.item(i, value).object()?)).collect::<Result<_, _>>()?;
    distinct(&tools, field)?;
    Ok(tools)
}

/// Reads the fields of a chat request.
pub fn parse(fields: &mut Fields<'_>) -> Result<ToolUse, ApiError> {
    let parallel = fields.bool_or("parallel_tool_calls", true)?;
    let modern = fields.get("tools").map_or(Ok(Vec::new()), |field| Spelling::CHAT.tools(&field))?;
    let choice = fields.get("tool_choice");
    let older = fields.get("functions").map_or(Ok(Vec::new()), |field| list(&field, Tool::parse))?;
    let older_choice = fields.get("function_call");
    if !modern.is_empty() && !older.is_empty() {
        let message = "Invalid 'functions': the older name of 'tools', and a request has only one of them.";
        return Err(ApiError::invalid("functions", "invalid_value", message));
    }
    let legacy = !older.is_empty();
    let tools = if legacy { older } else { modern };
    // Clients that moved on from `functions` may still send `"function_call": "none"`.
    let older_choice = older_choice.map(|field| legacy_choice(&field, &tools)).transpose()?;
    let choice = choice.map(|field| Spelling::CHAT.choice(&field, &tools)).transpose()?;
    let choice = if legacy { older_choice } else { choice };
    Ok(ToolUse { tools, choice: choice.unwrap_or_default(), parallel: parallel && !legacy, legacy })
}

fn named(mut fields: Fields<'_>, tools: &[Tool]) -> Result<String, ApiError> {
    let field = fields.require("name")?;
    let name = field.string()?;
    fields.finish()?;
    known(tools, name, &field)?;
    Ok(name.to_owned())
}

fn legacy_choice(field: &Field<'_>, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
    if !field.value.is_string() {
        return Ok(ToolChoice::Named(named(field.object()?, tools)?));
    }
    Ok(match field.one_of(&["none", "auto"])? {
        "none" => ToolChoice::None,
        _ => ToolChoice::Auto,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(body: Value) -> Result<ToolUse, ApiError> {
        let mut fields = Fields::root(&body)?;
        let tools = parse(&mut fields)?;
        fields.finish()?;
        Ok(tools)
    }

    fn weather() -> Value {
        json!({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}})
    }

    #[test]
    fn tools_and_their_older_name_mean_the_same() {
        let function = json!({"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true});
        let new = run(json!({"tools": [{"type": "function", "function": function}], "tool_choice": {"type": "function", "function": {"name": "f"}}})).unwrap();
        let old = run(json!({"functions": [function], "function_call": {"name": "f"}})).unwrap();
        assert_eq!(
            (new.tools[0].param.as_str(), old.tools[0].param.as_str()),
            ("tools.0.function.parameters", "functions.0.parameters")
        );
        assert_eq!((new.tools[0].to_template(), &new.choice), (old.tools[0].to_template(), &old.choice));
        assert_eq!((new.parallel, new.legacy, old.parallel, old.legacy), (true, false, false, true));
        assert!(new.tools[0].strict && new.choice == ToolChoice::Named("f".into()));
        assert_eq!(
            new.tools[0].to_template(),
            json!({"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}})
        );
    }

    #[test]
    fn a_request_may_say_that_it_has_no_tools() {
        for body in [
            json!({}),
            json!({"tools": [], "tool_choice": "auto"}),
            json!({"tools": null, "tool_choice": "none", "parallel_tool_calls": false, "function_call": "none", "functions": []}),
        ] {
            assert!(run(body).unwrap().tools.is_empty());
        }
    }

    #[test]
    fn allowed_tools_are_a_part_of_them() {
        let allowed = |mode: &str| json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": "weather"}}]}});
        let choice = run(json!({"tools": [weather()], "tool_choice": allowed("required")})).unwrap().choice;
        assert!(choice.is_forced() && choice.allows("weather") && !choice.allows("other"));
        assert!(!run(json!({"tools": [weather()], "tool_choice": allowed("auto")})).unwrap().choice.is_forced());
    }

    #[test]
    fn each_rejection_names_its_path() {
        let function = |f: Value| json!({"tools": [{"type": "function", "function": f}]});
        let choice = |c: Value| json!({"tools": [weather()], "tool_choice": c});
        for (body, param, code) in [
            (json!({"tools": {}}), "tools", "invalid_type"),
            (json!({"tools": [{}]}), "tools.0.type", "missing_required_parameter"),
            (json!({"tools": [{"type": "custom", "custom": {}}]}), "tools.0.type", "unsupported_parameter"),
            (json!({"tools": [{"type": "web_search"}]}), "tools.0.type", "invalid_value"),
            (json!({"tools": [{"type": "function"}]}), "tools.0.function", "missing_required_parameter"),
            (function(json!({})), "tools.0.function.name", "missing_required_parameter"),
            (function(json!({"name": ""})), "tools.0.function.name", "invalid_value"),
            (function(json!({"name": "a b"})), "tools.0.function.name", "invalid_value"),
            (function(json!({"name": "a".repeat(65)})), "tools.0.function.name", "string_above_max_length"),
            (function(json!({"name": "f", "parameters": []})), "tools.0.function.parameters", "invalid_type"),
            (function(json!({"name": "f", "parameters": {"type": "string"}})), "tools.0.function.parameters", "invalid_value"),
            (function(json!({"name": "f", "strict": 1})), "tools.0.function.strict", "invalid_type"),
            (function(json!({"name": "f", "colour": 1})), "tools.0.function.colour", "unknown_parameter"),
            (json!({"tools": [weather(), weather()]}), "tools", "invalid_value"),
            (json!({"tools": vec![weather(); 129]}), "tools", "array_above_max_length"),
            (json!({"tools": [weather()], "functions": [{"name": "f"}]}), "functions", "invalid_value"),
            (json!({"tool_choice": "required"}), "tool_choice", "invalid_value"),
            (choice(json!("any")), "tool_choice", "invalid_value"),
            (choice(json!({"type": "function", "function": {"name": "x"}})), "tool_choice.function.name", "invalid_value"),
            (choice(json!({"type": "custom"})), "tool_choice.type", "unsupported_parameter"),
            (
                choice(json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}})),
                "tool_choice.allowed_tools.tools",
                "empty_array",
            ),
            (json!({"functions": [{"name": "f"}], "function_call": {"name": "g"}}), "function_call.name", "invalid_value"),
            (json!({"parallel_tool_calls": 1}), "parallel_tool_calls", "invalid_type"),
        ] {
            let error = run(body.clone()).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{body}");
        }
    }
}
