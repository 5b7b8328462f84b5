//! Spans on their way to a collector: OTLP over HTTP, out of a bounded queue. A collector that is slow or away costs spans, which are
//! counted, and never a request's time.

use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter as OtlpExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use ureq::tls::{RootCerts, TlsConfig};

/// Spans that may wait; further ones are dropped.
const QUEUE: usize = 4096;
/// Most spans of one message.
const BATCH: usize = 512;
/// How long the first span of a message waits for others.
const LINGER: Duration = Duration::from_secs(1);
/// A collector answers within this time or is away.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// The endpoint is not a URL.
    #[error("cannot export spans to {endpoint}: {reason}")]
    Endpoint {
        /// As configured.
        endpoint: String,
        /// What the library said.
        reason: String,
    },
    /// The system gives no thread.
    #[error("cannot start the thread that exports spans: {0}")]
    Thread(#[from] std::io::Error),
}

/// Gives every request a trace, and exports the share `share` of those that begin here; callers decide about their own.
pub fn exporting(endpoint: &str, share: f64) -> Result<SdkTracerProvider, OutboxError> {
    let url = match endpoint.trim_end_matches('/') {
        whole if whole.ends_with("/v1/traces") => whole.to_owned(),
        base => format!("{base}/v1/traces"),
    };
    let exporter = OtlpExporter::builder()
        .with_http()
        .with_http_client(Client::new())
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(url)
        .with_timeout(ANSWER_TIME)
        .build();
    let mut exporter =
        exporter.map_err(|error| OutboxError::Endpoint { endpoint: endpoint.to_owned(), reason: error.to_string() })?;
    let resource = Resource::builder()
        .with_service_name("tidemill")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    exporter.set_resource(&resource);
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(share)));
    let outbox = Outbox::start(exporter, QUEUE, BATCH)?;
    Ok(SdkTracerProvider::builder().with_resource(resource).with_sampler(sampler).with_span_processor(outbox).build())
}

/// Gives every request a trace that nobody records: its id is in the logs.
pub fn silent() -> SdkTracerProvider {
    SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOff).build()
}

/// Sends spans in batches from a thread of its own.
#[derive(Debug)]
struct Outbox {
    /// Gone once the outbox is closed.
    queue: Mutex<Option<flume::Sender<SpanData>>>,
    /// Disconnected once everything is sent.
    sent: flume::Receiver<()>,
    dropped: Arc<AtomicU64>,
}

impl Outbox {
    fn start<E: SpanExporter + 'static>(exporter: E, queue: usize, batch: usize) -> Result<Self, std::io::Error> {
        let (sender, spans) = flume::bounded(queue);
        let (ended, sent) = flume::bounded(0);
        let dropped = Arc::new(AtomicU64::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let worker = Worker { exporter, spans, batch, dropped: Arc::clone(&dropped), failing: false };
        std::thread::Builder::new().name("tidemill-spans".into()).spawn(move || {
            runtime.block_on(worker.run());
            drop(ended);
        })?;
        Ok(Self { queue: Mutex::new(Some(sender)), sent, dropped })
    }
}

impl SpanProcessor for Outbox {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.as_ref().is_none_or(|queue| queue.try_send(span).is_err()) {
            lost(&self.dropped, 1, "queue_full");
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        // Nothing is ever sent here: the thread's end is the message.
        let _ = self.sent.recv_timeout(timeout);
        Ok(())
    }
}

fn lost(count: &AtomicU64, spans: usize, reason: &'static str) {
    count.fetch_add(spans as u64, Ordering::Relaxed);
    metrics::counter!("tidemill:spans_dropped_total", "reason" => reason).increment(spans as u64);
}

struct Worker<E> {
    exporter: E,
    spans: flume::Receiver<SpanData>,
    batch: usize,
    dropped: Arc<AtomicU64>,
    /// The last message was not taken, which was said.
    failing: bool,
}

impl<E: SpanExporter> Worker<E> {
    async fn run(mut self) {
        while let Ok(first) = self.spans.recv() {
            let deadline = Instant::now() + LINGER;
            let mut batch = vec![first];
            while batch.len() < self.batch {
                let Ok(span) = self.spans.recv_deadline(deadline) else { break };
                batch.push(span);
            }
            let count = batch.len();
            match self.exporter.export(batch).await {
                Ok(()) => {
                    metrics::counter!("tidemill:spans_exported_total").increment(count as u64);
                    if std::mem::take(&mut self.failing) {
                        tracing::info!("spans reach the collector again");
                    }
                }
                Err(error) => {
                    lost(&self.dropped, count, "not_taken");
                    if !std::mem::replace(&mut self.failing, true) {
                        tracing::warn!(%error, "spans do not reach the collector; they are dropped until it answers");
                    }
                }
            }
        }
    }
}

/// Waits for the collector on the exporting thread.
#[derive(Debug)]
struct Client(ureq::Agent);

impl Client {
    fn new() -> Self {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let agent = ureq::Agent::config_builder().tls_config(tls).timeout_global(Some(ANSWER_TIME)).http_status_as_error(false);
        Self(agent.build().new_agent())
    }

    fn post(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let response = self.0.run(request.map(|body| body.to_vec()))?;
        let (parts, mut body) = response.into_parts();
        Ok(Response::from_parts(parts, Bytes::from(body.read_to_vec()?)))
    }
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

// What `#[async_trait]` would write.
impl HttpClient for Client {
    fn send_bytes<'life0, 'async_trait>(&'life0 self, request: Request<Bytes>) -> Answer<'async_trait>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(async move { self.post(request) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{Span as _, Tracer, TracerProvider};
    use opentelemetry_sdk::error::OTelSdkError;

    /// Takes a message when it is given leave, and refuses every other one.
    #[derive(Debug)]
    struct Collector {
        leave: flume::Receiver<()>,
        taken: flume::Sender<usize>,
    }

    impl SpanExporter for Collector {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            let leave = self.leave.recv();
            let _ = self.taken.send(batch.len());
            leave.map_err(|error| OTelSdkError::InternalFailure(error.to_string()))
        }
    }

    #[test]
    fn a_collector_that_hangs_or_is_away_costs_spans_and_no_time() {
        let ((go, leave), (taken, sizes)) = (flume::bounded(1), flume::unbounded());
        let outbox = Outbox::start(Collector { leave, taken }, 10, 4).unwrap();
        let dropped = Arc::clone(&outbox.dropped);
        let provider = SdkTracerProvider::builder().with_span_processor(outbox).build();
        let tracer = provider.tracer("test");
        // It hangs on the first four at most; ten wait; the others are dropped without a wait for leave that never comes.
        for _ in 0..100 {
            tracer.start("span").end();
        }
        let lost = dropped.load(Ordering::Relaxed);
        assert!((86..=90).contains(&lost), "{lost}");
        // One message is taken, then the collector goes away: the rest is counted as well, and the end is an end.
        go.send(()).unwrap();
        let first = sizes.recv_timeout(Duration::from_secs(60)).unwrap() as u64;
        drop(go);
        provider.shutdown().unwrap();
        assert_eq!(dropped.load(Ordering::Relaxed), 100 - first);
    }

    #[test]
    fn endpoints_that_are_no_urls_are_refused() {
        assert!(matches!(exporting("http://[", 1.0), Err(OutboxError::Endpoint { .. })));
    }
}
