//! Where requests go: a base URL, held to this machine unless the user says otherwise.

use crate::error::LoadtestError;
use hyper::Uri;
use std::net::SocketAddr;

/// A server's address, resolved once so that name look-ups are no part of the measurement.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where to connect.
    pub address: SocketAddr,
    /// The `Host` header.
    pub host: String,
    /// Path of the base URL without a trailing slash, such as `/v1`.
    pub path: String,
}

impl Target {
    /// Resolves `url`; refuses addresses beyond this machine unless `allow_remote`.
    ///
    /// A load generator pointed at the wrong host is an attack on it, so the default is loopback.
    pub async fn resolve(url: &str, allow_remote: bool) -> Result<Self, LoadtestError> {
        let bad = |why: String| LoadtestError::BaseUrl { url: url.to_owned(), why };
        let uri: Uri = url.parse().map_err(|error| bad(format!("{error}; write it like http://127.0.0.1:8080/v1")))?;
        if uri.scheme_str() != Some("http") {
            return Err(bad("only http:// is supported; put a plain port beside a TLS one".into()));
        }
        let authority = uri.authority().ok_or_else(|| bad("it names no host".into()))?;
        let (name, port) = (authority.host(), authority.port_u16().unwrap_or(80));
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        let addresses: Vec<SocketAddr> =
            tokio::net::lookup_host((bare, port)).await.map_err(|error| bad(format!("{name}: {error}")))?.collect();
        let address = *addresses.first().ok_or_else(|| bad(format!("{name} has no address")))?;
        if !allow_remote && addresses.iter().any(|address| !address.ip().is_loopback()) {
            return Err(bad(format!("{name} is not this machine; add --allow-remote if the load is welcome there")));
        }
        Ok(Self { address, host: format!("{name}:{port}"), path: uri.path().trim_end_matches('/').to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn loopback_is_accepted_with_its_path() {
        for (url, path) in [("http://127.0.0.1:8080/v1/", "/v1"), ("http://localhost:1", ""), ("http://[::1]:9/a/b", "/a/b")] {
            let target = Target::resolve(url, false).await.unwrap();
            assert!(target.address.ip().is_loopback());
            assert_eq!(target.path, path);
        }
    }

    #[tokio::test]
    async fn another_machine_needs_the_flag() {
        let refused = Target::resolve("http://192.0.2.1:8080/v1", false).await.unwrap_err();
        assert!(refused.to_string().contains("--allow-remote"), "{refused}");
        assert!(Target::resolve("http://192.0.2.1:8080/v1", true).await.is_ok());
    }

    #[tokio::test]
    async fn other_schemes_and_half_urls_are_refused() {
        for url in ["https://127.0.0.1/v1", "127.0.0.1:8080", "/v1", "http://"] {
            assert!(Target::resolve(url, false).await.is_err(), "{url}");
        }
    }
}
