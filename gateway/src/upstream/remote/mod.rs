//! Models that other servers answer: any that speaks OpenAI's API.
//!
//! What is decided is decided by functions of values: which server is asked ([`balance`]), when one is left alone ([`breaker`]), what
//! follows a failure ([`retry`]), what is sent ([`request`]) and what is passed on ([`chunk`]). [`server`] and [`stream`] touch the network.

pub mod balance;
pub mod breaker;
pub mod chunk;
mod client;
pub mod request;
pub mod retry;
pub mod secret;
pub mod server;
pub mod spec;
mod sse_reader;
pub mod stream;

pub use spec::{KeySource, Kind, RemoteSpec, Remotes, ServerSpec};

use crate::upstream::fingerprint;
use secret::SecretError;
use server::{Server, Turn};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Why a remote model cannot be asked at all.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// A server's key cannot be had.
    #[error("the upstream `{0}`: {1}")]
    Key(String, SecretError),
    /// This machine trusts nobody.
    #[error("cannot tell which certificates this machine trusts: {0}")]
    Trust(#[from] rustls::Error),
    /// A model names a server that is not there.
    #[error("the model `{model}` names the upstream `{server}`, which the configuration does not have")]
    NoServer {
        /// The model.
        model: String,
        /// What it names.
        server: String,
    },
}

/// A model that remote servers answer.
pub struct RemoteModel {
    spec: RemoteSpec,
    servers: Vec<Arc<Server>>,
    fingerprint: String,
    created: u64,
}

impl RemoteModel {
    /// All models of a configuration; models that name the same server share it. `created` is in seconds since 1970.
    pub fn all(remotes: &Remotes, created: u64) -> Result<Vec<Arc<Self>>, RemoteError> {
        if remotes.models.is_empty() {
            return Ok(Vec::new());
        }
        let trust = client::trust(remotes.servers.iter().any(|server| server.url.starts_with("https:")))?;
        let mut servers = HashMap::new();
        for spec in &remotes.servers {
            let server = Server::new(spec.clone(), trust.clone()).map_err(|error| RemoteError::Key(spec.name.clone(), error))?;
            servers.insert(spec.name.as_str(), Arc::new(server));
        }
        let model = |spec: &RemoteSpec| {
            let find = |name: &String| {
                let missing = || RemoteError::NoServer { model: spec.name.clone(), server: name.clone() };
                servers.get(name.as_str()).cloned().ok_or_else(missing)
            };
            let servers = spec.servers.iter().map(find).collect::<Result<Vec<_>, _>>()?;
            // Whatever changes the answers, as far as it is known here.
            let whom: Vec<_> = servers.iter().map(|server| (&server.spec().url, spec.model_at(server.spec()))).collect();
            let fingerprint = fingerprint(&format!("{whom:?} {:?} {:?}", spec.prompt_prefix, spec.defaults));
            Ok(Arc::new(Self { spec: spec.clone(), servers, fingerprint, created }))
        };
        remotes.models.iter().map(model).collect()
    }

    /// Name that clients use.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// As configured.
    pub fn spec(&self) -> &RemoteSpec {
        &self.spec
    }

    /// Who answers it.
    pub fn servers(&self) -> &[Arc<Server>] {
        &self.servers
    }

    /// Names the configuration, for records.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Seconds since 1970.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// A place at the server that is to be asked next, one that is not among `asked` where there is one. The second says whether yet
    /// another one is left; `None` when all are full or left alone. For a copy that nobody waits for, see [`Server::enter`].
    pub fn choose(&self, prefix: u64, draw: u64, asked: &[String], is_copy: bool) -> Option<(Turn, bool)> {
        let replicas: Vec<_> = self.servers.iter().map(|server| server.replica()).collect();
        let order = balance::order(self.spec.balance, &replicas, prefix, draw);
        let known = |server: &&Arc<Server>| asked.contains(&server.spec().name);
        let (again, fresh): (Vec<_>, Vec<_>) = order.iter().filter_map(|at| self.servers.get(*at)).partition(known);
        let turn = fresh.iter().chain(&again).find_map(|server| server.enter(is_copy))?;
        let left = fresh.iter().any(|server| server.spec().name != turn.server().spec().name && server.has_room());
        Some((turn, left))
    }

    /// After which one of the servers has a chance again.
    pub fn wait(&self) -> Duration {
        self.servers.iter().map(|server| server.wait()).min().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remotes() -> Remotes {
        let servers = vec![ServerSpec::new("a", "http://127.0.0.1:1"), ServerSpec::new("b", "http://127.0.0.1:1")];
        Remotes { servers, models: vec![RemoteSpec::new("m", vec!["a".into(), "b".into()])] }
    }

    #[test]
    fn a_server_that_was_asked_comes_last() {
        let model = &RemoteModel::all(&remotes(), 0).unwrap()[0];
        for draw in 0..20 {
            let (first, left) = model.choose(0, draw, &[], false).unwrap();
            let name = first.server().spec().name.clone();
            assert!(left);
            let (second, left) = model.choose(0, draw, std::slice::from_ref(&name), false).unwrap();
            assert!(!left && second.server().spec().name != name);
            assert!(model.choose(0, draw, &["a".into(), "b".into()], false).is_some(), "better twice than not at all");
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_named_and_models_share_servers() {
        let mut remotes = remotes();
        remotes.models.push(RemoteSpec::new("n", vec!["a".into()]));
        let models = RemoteModel::all(&remotes, 0).unwrap();
        assert!(Arc::ptr_eq(&models[0].servers()[0], &models[1].servers()[0]));
        assert_ne!(models[0].fingerprint(), models[1].fingerprint());
        remotes.models[1].servers = vec!["c".into()];
        let error = RemoteModel::all(&remotes, 0).err().unwrap().to_string();
        assert!(error.contains("`n`") && error.contains("`c`"), "{error}");
    }
}
