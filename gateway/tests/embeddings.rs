//! `/v1/embeddings` over the whole stack: vectors in order, and the span that tells of them.

#![cfg(test)]

use crate::support::{MODEL, Setup, post};
use opentelemetry::Value as Attribute;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use serde_json::json;
use std::sync::{Arc, Mutex};
use tidemill::http::router;
use tidemill::telemetry::Observer;

const EMBEDDINGS: &str = "/v1/embeddings";

#[derive(Clone, Debug, Default)]
struct Collector(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Collector {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

impl Collector {
    fn attribute(&self, span: &str, key: &str) -> Option<Attribute> {
        let spans = self.0.lock().unwrap();
        let span = spans.iter().find(|seen| seen.name == span).unwrap_or_else(|| panic!("no span {span}"));
        span.attributes.iter().find(|attribute| attribute.key.as_str() == key).map(|attribute| attribute.value.clone())
    }
}

#[tokio::test]
async fn vectors_come_in_order_and_have_a_span() {
    let (collector, mut app) = (Collector::default(), Setup::default().app());
    app.observer = Observer::new(SdkTracerProvider::builder().with_simple_exporter(collector.clone()).build(), false);
    let router = router(app);
    let reply = post(&router, EMBEDDINGS, json!({"model": MODEL, "input": ["ab", "c"], "encoding_format": "float"})).await;
    let body = reply.json();
    assert_eq!((reply.status.as_u16(), &body["usage"]["prompt_tokens"]), (200, &json!(3)));
    // The last token's hidden state, its number and 1, scaled to length 1.
    for (at, token) in [(0, f64::from(b'b')), (1, f64::from(b'c'))] {
        let vector = body["data"][at]["embedding"].as_array().unwrap();
        assert!((vector[0].as_f64().unwrap() / vector[1].as_f64().unwrap() - token).abs() < 0.01, "{body}");
    }
    let span = format!("embeddings {MODEL}");
    for (key, value) in [
        ("gen_ai.operation.name", Attribute::from("embeddings")),
        ("gen_ai.request.model", Attribute::from(MODEL)),
        ("gen_ai.usage.input_tokens", Attribute::I64(3)),
        ("gen_ai.embeddings.dimension.count", Attribute::I64(2)),
    ] {
        assert_eq!(collector.attribute(&span, key), Some(value), "{key}");
    }
    assert_eq!(collector.attribute(&span, "gen_ai.usage.output_tokens"), None, "nothing is written");
    assert_eq!(collector.attribute(&span, "error.type"), None);
}

#[tokio::test]
async fn a_failure_of_the_engine_is_in_the_span() {
    let (collector, mut app) = (Collector::default(), Setup::default().app());
    app.observer = Observer::new(SdkTracerProvider::builder().with_simple_exporter(collector.clone()).build(), false);
    // The parrot chokes on a zero byte.
    let reply = post(&router(app), EMBEDDINGS, json!({"model": MODEL, "input": "\u{0}"})).await;
    assert_eq!(reply.error().0, 500);
    assert_eq!(collector.attribute(&format!("embeddings {MODEL}"), "error.type"), Some(Attribute::from("engine_failed")));
}
