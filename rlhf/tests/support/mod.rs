//! A store with answers and judgements in it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tidemill_rlhf::dataset::Datasets;
use tidemill_store::records::{Choice, Feedback, Inference, Kind, Status, TargetKind};
use tidemill_store::{DataDir, Store, StoreOptions};
use uuid::Uuid;

/// A store in a folder of its own.
pub struct Fixture {
    pub store: Store,
    pub folder: TempDir,
}

impl Fixture {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(StoreOptions::new(DataDir::new(folder.path()))).await.unwrap();
        Self { store, folder }
    }

    pub fn datasets(&self) -> Datasets {
        Datasets::new(self.store.clone(), self.folder.path().join("datasets").to_string_lossy())
    }

    /// Records an answer with one choice per text and returns the choices' ids.
    pub async fn answer(&self, user: &str, prompt: &str, texts: &[&str]) -> Vec<Uuid> {
        let id = self.store.issue_id();
        let ids: Vec<Uuid> = std::iter::once(id).chain((1..texts.len()).map(|_| self.store.issue_id())).collect();
        let choice = |(id, text): (&Uuid, &&str)| Choice {
            id: *id,
            finish_reason: Some("stop".into()),
            output_text: Some((*text).to_owned()),
            message: None,
            output_ids: vec![1, 2],
            logprobs: vec![-0.1, -0.2],
            raw_logprobs: vec![-0.1, -0.2],
            mean_logprob: Some(-0.15),
            tokens: 2,
        };
        let inference = Inference {
            id,
            created: 1_700_000_000_000_000,
            endpoint: "chat".into(),
            model: "small".into(),
            adapter: 0,
            variant: Some("base".into()),
            conversation: None,
            key_id: None,
            user_key: Some(user.into()),
            status: Status::Ok,
            compare: texts.len() > 1,
            prompt_tokens: 3,
            cached_tokens: 0,
            output_tokens: 2,
            first_token_us: Some(5),
            duration_us: 10,
            config_hash: "c".into(),
            metadata: Map::new(),
            params: None,
            messages: Some(json!([{"role": "user", "content": prompt}])),
            prompt_text: Some(prompt.into()),
            prompt_ids: vec![7, 8, 9],
            exposure: None,
            choices: ids.iter().zip(texts).map(choice).collect(),
        };
        self.store.record(inference).unwrap();
        self.store.flush().await;
        ids
    }

    pub async fn judge(&self, kind: Kind, author: &str, targets: &[Uuid], value: Value) -> Uuid {
        let id = self.store.issue_id();
        let feedback = Feedback {
            id,
            created: 1_700_000_001_000_000,
            updated: 1_700_000_001_000_000,
            revision: 1,
            withdrawn: false,
            target: targets[0].to_string(),
            targets: targets.iter().map(Uuid::to_string).collect(),
            target_kind: TargetKind::Completion,
            kind,
            metric: None,
            number: value.as_f64().or_else(|| value.as_bool().map(f64::from)),
            value,
            author: Some(author.into()),
            source: Some("api".into()),
            latency_ms: None,
            tags: vec![],
            key_id: None,
            idempotency_key: None,
            task_id: None,
        };
        self.store.add_feedback(vec![feedback]).await.unwrap();
        id
    }

    /// Of two answers, the first is better.
    pub async fn prefer(&self, author: &str, better: Uuid, worse: Uuid) -> Uuid {
        let value = json!({"candidates": [better, worse], "ranking": [[better], [worse]], "shown": [worse, better]});
        self.judge(Kind::Comparison, author, &[better, worse], value).await
    }
}
