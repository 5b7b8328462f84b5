//! The HTTP client that servers are asked with.

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_platform_verifier::BuilderVerifierExt;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

/// A connection that nobody uses is closed after this time.
const IDLE: Duration = Duration::from_secs(60);

/// A client with its own connections. Dropping a response, or the wait for it, ends the request at the server.
pub type Client = legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// What is needed to trust servers: the certificates that the machine trusts, a company's own authority too. Where no address begins with
/// `https`, nothing is looked for.
pub fn trust(https: bool) -> Result<ClientConfig, rustls::Error> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()?;
    if https {
        return Ok(config.with_platform_verifier()?.with_no_client_auth());
    }
    Ok(config.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// A client that gives up connecting after `connect_timeout`.
pub fn client(trust: ClientConfig, connect_timeout: Duration) -> Client {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(connect_timeout));
    let connector =
        HttpsConnectorBuilder::new().with_tls_config(trust).https_or_http().enable_all_versions().wrap_connector(http);
    legacy::Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE).pool_timer(TokioTimer::new()).build(connector)
}

/// What an error is about: its innermost cause, since the outer ones only say that there is one.
pub fn cause(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
