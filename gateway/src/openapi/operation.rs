//! One method of one path.

use crate::openapi::schema::named;
use serde_json::{Map, Value, json};
use tidemill_store::Scope;

/// Who may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Everybody.
    Open,
    /// Every key.
    AnyKey,
    /// Keys with this scope.
    Scoped(Scope),
    /// Keys with one of these scopes.
    Either([Scope; 2]),
}

/// An operation: what it takes and every way in which it answers.
#[derive(Clone, Debug)]
pub struct Operation {
    /// `get`, `post`, …
    pub method: &'static str,
    /// Such as `/v1/feedback/{id}`.
    pub path: &'static str,
    tag: &'static str,
    summary: &'static str,
    access: Access,
    parameters: Vec<Value>,
    body: Option<Value>,
    answers: Map<String, Value>,
    /// Schema of its errors.
    error: &'static str,
}

impl Operation {
    fn new(method: &'static str, path: &'static str, tag: &'static str, summary: &'static str) -> Self {
        let parameters = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let parameters =
            parameters.map(|name| parameter("path", name, true, json!({"type": "string", "minLength": 1}))).collect();
        let answers = Map::new();
        Self { method, path, tag, summary, access: Access::AnyKey, parameters, body: None, answers, error: "Error" }
            .refuses(&[500])
    }

    /// `GET`
    pub fn get(path: &'static str, tag: &'static str, summary: &'static str) -> Self {
        Self::new("get", path, tag, summary)
    }

    /// `POST`
    pub fn post(path: &'static str, tag: &'static str, summary: &'static str) -> Self {
        Self::new("post", path, tag, summary)
    }

    /// `PATCH`
    pub fn patch(path: &'static str, tag: &'static str, summary: &'static str) -> Self {
        Self::new("patch", path, tag, summary)
    }

    /// `DELETE`
    pub fn delete(path: &'static str, tag: &'static str, summary: &'static str) -> Self {
        Self::new("delete", path, tag, summary)
    }

    /// Refuses in a form of its own.
    pub fn words_of(self, error: &'static str) -> Self {
        Self { error, answers: Map::new(), ..self }.refuses(&[500])
    }

    /// The body may be left out.
    pub fn optional_body(mut self) -> Self {
        if let Some(body) = &mut self.body {
            body["required"] = false.into();
        }
        self
    }

    /// Needs no key.
    pub fn open(self) -> Self {
        Self { access: Access::Open, ..self }
    }

    /// Needs a key with this scope.
    pub fn scope(self, scope: Scope) -> Self {
        Self { access: Access::Scoped(scope), ..self }.refuses(&[403])
    }

    /// Needs a key with one of these scopes.
    pub fn either_scope(self, scopes: [Scope; 2]) -> Self {
        Self { access: Access::Either(scopes), ..self }.refuses(&[403])
    }

    /// The scopes of which a key needs one; none: every key may.
    #[cfg(test)]
    pub fn scopes(&self) -> Vec<Scope> {
        match self.access {
            Access::Open | Access::AnyKey => Vec::new(),
            Access::Scoped(scope) => vec![scope],
            Access::Either(scopes) => scopes.to_vec(),
        }
    }

    /// A parameter behind the question mark, which may be left out.
    pub fn query(self, name: &str, schema: Value) -> Self {
        self.parameter("query", name, schema)
    }

    /// A header, which may be left out.
    pub fn header(self, name: &str, schema: Value) -> Self {
        self.parameter("header", name, schema)
    }

    fn parameter(mut self, place: &str, name: &str, schema: Value) -> Self {
        self.parameters.push(parameter(place, name, false, schema));
        self.refuses(&[400])
    }

    /// A JSON body.
    pub fn takes(self, schema: Value) -> Self {
        self.takes_as("application/json", schema)
    }

    /// A body of this type.
    pub fn takes_as(mut self, kind: &str, schema: Value) -> Self {
        self.body = Some(json!({"required": true, "content": {kind: {"schema": schema}}}));
        // Not understood, not in time, too large, leaving.
        self.refuses(&[400, 408, 413, 503])
    }

    /// Answers with JSON.
    pub fn answers(self, status: u16, description: &str, schema: Value) -> Self {
        self.answers_as(status, description, "application/json", schema)
    }

    /// Answers with this type; further types of one status add up.
    pub fn answers_as(mut self, status: u16, description: &str, kind: &str, schema: Value) -> Self {
        let answer = self.answers.entry(status.to_string()).or_insert_with(|| json!({"content": {}}));
        answer["description"] = description.into();
        answer["content"][kind] = json!({"schema": schema});
        self
    }

    /// Refuses with these statuses, in the error shape.
    pub fn refuses(mut self, statuses: &[u16]) -> Self {
        for status in statuses {
            let meaning = match status {
                400 => "The request is wrong; `param` names the field.",
                401 => "No key, or an unknown one.",
                403 => "The key may not do this.",
                404 => "There is no such thing.",
                408 => "The body did not arrive in time.",
                409 => "It is in another state.",
                410 => "It is no longer given out.",
                413 => "The body is too large.",
                422 => "Understood, and cannot be done.",
                429 => "A limit is reached; `Retry-After` says when to come again.",
                503 => "Busy, loading, leaving, or without its database; `Retry-After` says when to come again.",
                _ => "A fault of the server.",
            };
            let answer = json!({"description": meaning, "content": {"application/json": {"schema": named(self.error)}}});
            self.answers.entry(status.to_string()).or_insert(answer);
        }
        self
    }

    /// The operation object. Its id is made of method and path.
    pub fn to_json(&self) -> Value {
        let keyed = if self.access == Access::Open { self.clone() } else { self.clone().refuses(&[401, 503]) };
        let words = self.path.split(['/', '{', '}', '-', '.']).filter(|word| !word.is_empty() && *word != "v1");
        let id: Vec<&str> = std::iter::once(self.method).chain(words).collect();
        let mut answers: Vec<_> = keyed.answers.into_iter().collect();
        answers.sort_by(|a, b| a.0.cmp(&b.0));
        let mut object = json!({
            "operationId": id.join("_"),
            "tags": [self.tag],
            "summary": self.summary,
            "parameters": self.parameters,
            "responses": Map::from_iter(answers),
        });
        if let Some(body) = &self.body {
            object["requestBody"] = body.clone();
        }
        match self.access {
            Access::Open => object["security"] = json!([]),
            Access::AnyKey => {}
            Access::Either([one, other]) => {
                object["description"] = format!("Needs the scope `{}` or `{}`.", one.as_str(), other.as_str()).into();
            }
            Access::Scoped(scope) => object["description"] = format!("Needs the scope `{}`.", scope.as_str()).into(),
        }
        object
    }
}

fn parameter(place: &str, name: &str, required: bool, schema: Value) -> Value {
    json!({"name": name, "in": place, "required": required, "schema": schema})
}
