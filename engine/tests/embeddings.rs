//! Vectors of texts against what `transformers` made of the same files (`tests/goldens`, see its README).

#![cfg(test)]

use std::path::{Path, PathBuf};

use serde_json::Value;
use tidemill_engine::{EmbedRequest, Engine, EngineOptions, Pooling, PoolingMode, RequestId, Tenant};
use tidemill_kernels::{KvDtype, WeightFormat};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens")
}

/// The family's model in a directory of its own, with what a model that was trained to embed has beside it.
fn embedder(family: &str, mode: &str, normalize: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(goldens().join(family)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension != "gguf") {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let module = |kind: &str, path: &str| format!(r#"{{"path": "{path}", "type": "sentence_transformers.models.{kind}"}}"#);
    let mut modules = vec![module("Transformer", ""), module("Pooling", "1_Pooling")];
    if normalize {
        modules.push(module("Normalize", "2_Normalize"));
    }
    std::fs::write(folder.path().join("modules.json"), format!("[{}]", modules.join(","))).unwrap();
    std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
    std::fs::write(folder.path().join("1_Pooling/config.json"), format!(r#"{{"pooling_mode_{mode}": true}}"#)).unwrap();
    folder
}

fn start(model: &Path) -> Engine {
    let options = EngineOptions {
        weight_format: WeightFormat::F32,
        kv_dtype: KvDtype::F32,
        kv_memory: Some(8 << 20),
        threads: Some(1),
        max_seqs: 4,
        // Less than the longest text has tokens: it comes in chunks.
        max_batch_tokens: 16,
        ..EngineOptions::new(model)
    };
    Engine::start(options, &mut |_, _| {}).unwrap()
}

fn expected(family: &str) -> Vec<Value> {
    let text = std::fs::read(goldens().join(family).join("embeddings.json")).unwrap();
    let value: Value = serde_json::from_slice(&text).unwrap();
    value["texts"].as_array().unwrap().clone()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Waits for the vector without a runtime.
fn vector(engine: &Engine, id: u128, tokens: Vec<u32>) -> Vec<f32> {
    let embedding = engine
        .embed(EmbedRequest { id: RequestId(id), tokens, adapter: None, priority: 0, tenant: Tenant::default(), deadline: None })
        .unwrap();
    wait_for(embedding.wait()).unwrap()
}

/// A future that is woken by the engine's thread.
fn wait_for<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::task::Waker::from(std::sync::Arc::new(Unpark(std::thread::current())));
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn vectors_equal_those_of_transformers_in_both_poolings() {
    for family in ["llama", "qwen3"] {
        for (mode, key) in [("lasttoken", "last"), ("mean_tokens", "mean")] {
            let folder = embedder(family, mode, false);
            let engine = start(folder.path());
            assert!(!engine.pooling().as_ref().unwrap().normalize);
            for (index, text) in expected(family).iter().enumerate() {
                let tokens = engine.tokenizer().encode(text["text"].as_str().unwrap(), true, true).unwrap();
                assert_eq!(tokens, ids(&text["ids"]), "{family}");
                // Twice: the second finds its prefix in the cache where the pooling may use it.
                for again in 0..2 {
                    let vector = vector(&engine, (2 * index + again) as u128, tokens.clone());
                    let wanted = numbers(&text[key]);
                    assert_eq!(vector.len(), wanted.len());
                    let worst = vector.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst <= 1e-3, "{family} {mode}: the largest difference is {worst}");
                }
            }
        }
    }
}

#[test]
fn a_chat_model_gives_normalised_vectors_of_the_last_token() {
    let engine = start(&goldens().join("qwen3"));
    let pooling = engine.pooling().clone().unwrap();
    assert_eq!(pooling, Pooling { mode: PoolingMode::Last, normalize: true, ..Pooling::default() });
    let text = &expected("qwen3")[1];
    let scaled = pooling.finish(vector(&engine, 1, ids(&text["ids"])), None);
    let wanted = numbers(&text["last"]);
    let length = wanted.iter().map(|x| x * x).sum::<f32>().sqrt();
    for (a, b) in scaled.iter().zip(&wanted) {
        assert!((a - b / length).abs() < 1e-4);
    }
}

#[test]
fn many_texts_at_once_do_not_mix() {
    let folder = embedder("llama", "mean_tokens", true);
    let engine = start(folder.path());
    let texts = expected("llama");
    let all: Vec<_> = (0..24)
        .map(|n| {
            let tokens = ids(&texts[n % texts.len()]["ids"]);
            engine
                .embed(EmbedRequest {
                    id: RequestId(n as u128),
                    tokens,
                    adapter: None,
                    priority: 0,
                    tenant: Tenant::default(),
                    deadline: None,
                })
                .unwrap()
        })
        .collect();
    for (n, embedding) in all.into_iter().enumerate() {
        let vector = wait_for(embedding.wait()).unwrap();
        let wanted = numbers(&texts[n % texts.len()]["mean"]);
        let worst = vector.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-3, "text {n}: {worst}");
    }
}
