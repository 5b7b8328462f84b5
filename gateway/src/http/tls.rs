//! TLS: certificates that are read again when their files change, so that renewing one needs no restart.

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};
use tokio_rustls::TlsAcceptor;

/// How often the files are looked at. Certificates are renewed days before they end.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or not PEM.
    #[error("cannot read {what} in {}: {reason}; expected a PEM file", path.display())]
    File {
        /// The certificate or the key.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// They do not belong together, or are of a kind that nobody takes.
    #[error("the certificate in {} and the key in {} cannot be used: {source}", certificate.display(), key.display())]
    Pair {
        /// Certificate chain.
        certificate: PathBuf,
        /// Private key.
        key: PathBuf,
        /// What the library said.
        source: rustls::Error,
    },
}

/// When a file was last written and how long it is; whoever replaces it changes one of the two.
pub(crate) type Version = Option<(SystemTime, u64)>;

#[derive(Clone)]
struct Loaded {
    config: Arc<ServerConfig>,
    versions: [Version; 2],
}

/// The server's certificate. Cloning is cheap, and all clones see a renewal.
#[derive(Clone)]
pub struct Tls {
    certificate: Arc<Path>,
    key: Arc<Path>,
    loaded: Arc<RwLock<Loaded>>,
}

impl Tls {
    /// Reads a certificate chain, the server's own first, and its private key.
    pub fn open(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let loaded = load(certificate, key)?;
        Ok(Self { certificate: certificate.into(), key: key.into(), loaded: Arc::new(RwLock::new(loaded)) })
    }

    /// For the next connection.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.loaded().config)
    }

    /// Reads the files again if they changed; `true` when a new certificate is in use. After an error the old one stays.
    pub fn refresh(&self) -> Result<bool, TlsError> {
        if self.loaded().versions == versions(&self.certificate, &self.key) {
            return Ok(false);
        }
        let loaded = load(&self.certificate, &self.key)?;
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(true)
    }

    /// Refreshes for ever. A pair that is half replaced fails and is tried again.
    pub async fn keep_fresh(self) {
        let mut every = tokio::time::interval(LOOK_EVERY);
        let mut said = String::new();
        loop {
            every.tick().await;
            let tls = self.clone();
            match tokio::task::spawn_blocking(move || tls.refresh()).await {
                Ok(Ok(false)) | Err(_) => {}
                Ok(Ok(true)) => {
                    said.clear();
                    tracing::info!(certificate = %self.certificate.display(), "the TLS certificate was renewed");
                }
                Ok(Err(error)) => {
                    let text = error.to_string();
                    if text != said {
                        tracing::error!(%error, "the TLS certificate could not be renewed; the old one stays in use");
                        said = text;
                    }
                }
            }
        }
    }

    fn loaded(&self) -> Loaded {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn versions(certificate: &Path, key: &Path) -> [Version; 2] {
    [certificate, key].map(version)
}

/// Of the file as it is now; `None` where there is none.
pub(crate) fn version(path: &Path) -> Version {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

fn load(certificate: &Path, key: &Path) -> Result<Loaded, TlsError> {
    // Before the reading: what is replaced meanwhile is read again next time.
    let versions = versions(certificate, key);
    let file = |what, path: &Path| {
        let path = path.to_owned();
        move |error: PemError| TlsError::File { what, path, reason: error.to_string() }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain = chain.map_err(file("a certificate", certificate))?;
    if chain.is_empty() {
        return Err(file("a certificate", certificate)(PemError::NoItemsFound));
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(file("a private key", key))?;
    let pair = |source| TlsError::Pair { certificate: certificate.to_owned(), key: key.to_owned(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Loaded { config: Arc::new(config), versions })
}
