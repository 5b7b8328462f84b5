//! Follows the ties between records.

use crate::datasets::public;
use crate::feedback::answer_id;
use crate::http::{file_name, job_name};
use crate::lineage::{AdapterFacts, AnswerFacts, DatasetFacts, JobFacts, Offspring, RolloutFacts, RowFacts, Total, Trace, Use};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tidemill_rlhf::dataset::{DatasetError, Datasets, StoredRow};
use tidemill_rlhf::registry::{Registry, RegistryError};
use tidemill_store::records::{Exposure, Inference};
use tidemill_store::{
    AdapterOrigin, Adapters, FineTunings, RegisteredAdapter, RolloutRefusal, Rollouts, Snapshot, Snapshots, Store, StoreError,
    Viewer,
};
use uuid::Uuid;

/// Most adapters of one line of ancestors or descendants; rows of ours never form a longer one, nor a circle.
const MAX_DEPTH: usize = 64;
/// Most rows that are read to find one by its id, the newest datasets first.
const MAX_READ: usize = 200_000;
/// Snapshots listed at once on the way.
const PAGE: usize = 100;

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Nothing is called so.
    #[error(
        "nothing here is called '{0}'; name an answer's id, an adapter, a dataset as NAME@VERSION, a job, a judgement's id, a row's id, or \
         a person as rater:NAME"
    )]
    NotFound(String),
    /// Several adapters are.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The database is away, slow or broken.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A dataset's rows cannot be read.
    #[error("{}", public(.0))]
    Dataset(DatasetError),
}

impl From<DatasetError> for TraceError {
    fn from(error: DatasetError) -> Self {
        match error {
            DatasetError::Store(error) => Self::Store(error),
            error => Self::Dataset(error),
        }
    }
}

/// How much is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// Ids of rows and raters beside the counts: at most so many rows of each dataset.
    pub rows: Option<usize>,
}

/// Follows the ties of a store. Cloning is cheap.
#[derive(Clone)]
pub struct Tracer {
    store: Store,
    datasets: Datasets,
    registry: Registry,
    snapshots: Snapshots,
    adapters: Adapters,
}

impl Tracer {
    /// Over a store, its datasets and its registry.
    pub fn new(store: &Store, datasets: &Datasets, registry: &Registry) -> Self {
        Self {
            store: store.clone(),
            datasets: datasets.clone(),
            registry: registry.clone(),
            snapshots: Snapshots::new(store.database()),
            adapters: Adapters::new(store),
        }
    }

    /// What is known of `text`: an answer (with or without the prefix of its id), a judgement, an adapter, a dataset, a job, a row, or
    /// `rater:NAME`.
    pub async fn trace(&self, text: &str, want: Want) -> Result<Trace, TraceError> {
        if let Some(rater) = text.strip_prefix("rater:") {
            let used_in = self.uses("rater", [rater.to_owned()], want).await?;
            let total = Total::of(&used_in);
            return Ok(Trace::Rater { rater: rater.to_owned(), used_in, total });
        }
        // A row's id is a hash; written without dashes, a UUID would look the same.
        if text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return self.row(&text.to_ascii_lowercase(), want).await;
        }
        if let Some(id) = text.strip_prefix("ftjob-").and_then(|id| Uuid::try_parse(id).ok()) {
            return self.job(id, text).await;
        }
        if let Some(id) = answer_id(text)
            && let Some(trace) = self.by_id(id, want).await?
        {
            return Ok(trace);
        }
        self.by_name(text, want).await
    }

    async fn by_id(&self, id: Uuid, want: Want) -> Result<Option<Trace>, TraceError> {
        if let Some(inference) = self.store.inference(id).await? {
            return Ok(Some(self.answer(inference, want).await?));
        }
        if let Some(feedback) = self.store.feedback(id).await? {
            let used_in = self.uses("feedback", [id.to_string()], want).await?;
            let (kind, target) = (Some(feedback.kind.as_str().to_owned()), Some(feedback.target));
            let total = Total::of(&used_in);
            return Ok(Some(Trace::Feedback { feedback: id.to_string(), kind, target, used_in, total }));
        }
        if let Some(adapter) = self.adapters.find(id).await? {
            return Ok(Some(self.adapter(&adapter, want).await?));
        }
        Ok(match self.snapshots.by_id(id).await? {
            Some(snapshot) => Some(Trace::Dataset(self.used(&snapshot, want).await?)),
            None => None,
        })
    }

    /// `NAME@VERSION` is a dataset before it is an adapter, a bare name the other way round.
    async fn by_name(&self, text: &str, want: Want) -> Result<Trace, TraceError> {
        let dataset = async || match self.datasets.find(text).await {
            Ok(snapshot) => Ok(Some(Trace::Dataset(self.used(&snapshot, want).await?))),
            Err(DatasetError::NotFound(_)) => Ok(None),
            Err(error) => Err(TraceError::from(error)),
        };
        if text.contains('@')
            && let Some(trace) = dataset().await?
        {
            return Ok(trace);
        }
        match self.registry.get(text).await {
            Ok(adapter) => self.adapter(&adapter, want).await,
            Err(RegistryError::NotFound(_)) => dataset().await?.ok_or_else(|| TraceError::NotFound(text.to_owned())),
            Err(RegistryError::Store(error)) => Err(error.into()),
            Err(error) => Err(error.into()),
        }
    }

    async fn answer(&self, inference: Inference, want: Want) -> Result<Trace, TraceError> {
        let rollout = match inference.exposure {
            Some(exposure) => Some(self.rollout(exposure).await?),
            None => None,
        };
        let mut adapters = Vec::new();
        if inference.adapter != 0 {
            let mut known = self.adapters.made_from(AdapterOrigin::Generation(inference.adapter)).await?;
            // The same contents may be registered for another base; those of this one are meant, where there are any.
            if known.iter().any(|adapter| adapter.base == inference.model) {
                known.retain(|adapter| adapter.base == inference.model);
            }
            for adapter in &known {
                adapters.push(self.ancestry(adapter, want).await?);
            }
        }
        let ids: BTreeSet<String> =
            inference.choices.iter().map(|choice| choice.id.to_string()).chain([inference.id.to_string()]).collect();
        let used_in = self.uses("inference", ids, want).await?;
        let answer = AnswerFacts {
            id: inference.id.to_string(),
            created_at: seconds(inference.created),
            endpoint: inference.endpoint,
            model: inference.model,
            variant: inference.variant,
            generation: (inference.adapter != 0).then(|| format!("{:016x}", inference.adapter)),
            status: inference.status.as_str(),
            key_id: inference.key_id,
            config_hash: inference.config_hash,
        };
        Ok(Trace::Answer { answer, rollout, adapters, used_in })
    }

    async fn rollout(&self, exposure: Exposure) -> Result<RolloutFacts, TraceError> {
        let id = exposure.rollout.to_string();
        let facts = RolloutFacts { id: id.clone(), name: None, model: None, kind: None, arm: exposure.arm, variant: None };
        match Rollouts::new(&self.store).find(&id).await {
            Ok(rollout) => {
                let arm = &rollout.spec["arms"][exposure.arm as usize]["variant"];
                Ok(RolloutFacts {
                    name: Some(rollout.name),
                    model: Some(rollout.model),
                    kind: text(&rollout.spec["kind"]),
                    variant: text(arm),
                    ..facts
                })
            }
            Err(RolloutRefusal::Store(error)) => Err(error.into()),
            Err(_) => Ok(facts),
        }
    }

    async fn adapter(&self, adapter: &RegisteredAdapter, want: Want) -> Result<Trace, TraceError> {
        let facts = self.ancestry(adapter, want).await?;
        let made = self.offspring(vec![adapter.clone()]).await?.pop();
        let made = made.ok_or_else(|| TraceError::NotFound(adapter.reference()))?;
        Ok(Trace::Adapter { adapter: Box::new(facts), made: Box::new(made) })
    }

    async fn job(&self, id: Uuid, text: &str) -> Result<Trace, TraceError> {
        let name = job_name(id);
        let made = self.adapters.made_from(AdapterOrigin::Job(&name)).await?;
        let job = self.job_facts(&name).await?;
        if job.state.is_none() && made.is_empty() {
            return Err(TraceError::NotFound(text.to_owned()));
        }
        Ok(Trace::Job { job, made: self.offspring(made).await? })
    }

    async fn job_facts(&self, name: &str) -> Result<JobFacts, StoreError> {
        let id = name.strip_prefix("ftjob-").and_then(|id| Uuid::try_parse(id).ok());
        let row = match id {
            Some(id) => FineTunings::new(self.store.database()).find(id, &Viewer::Anyone).await?,
            None => None,
        };
        Ok(JobFacts {
            id: name.to_owned(),
            state: row.as_ref().map(|job| job.state.as_str()),
            method: row.as_ref().and_then(|job| text(&job.draft.method["type"])),
            training_file: row.as_ref().map(|job| file_name(job.draft.training_file)),
            created_at: row.as_ref().map(|job| seconds(job.draft.created)),
            key_id: row.and_then(|job| job.draft.key_id),
        })
    }

    /// An adapter with all that it comes from.
    async fn ancestry(&self, adapter: &RegisteredAdapter, want: Want) -> Result<AdapterFacts, TraceError> {
        let mut line = vec![adapter.clone()];
        while let Some(parent) = line.last().and_then(|last| last.parent).filter(|_| line.len() < MAX_DEPTH) {
            match self.adapters.find(parent).await? {
                Some(parent) => line.push(parent),
                None => break,
            }
        }
        let mut facts: Option<Box<AdapterFacts>> = None;
        for adapter in line.iter().rev() {
            facts = Some(Box::new(AdapterFacts { parent: facts, ..self.facts(adapter, want).await? }));
        }
        facts.map(|facts| *facts).ok_or_else(|| TraceError::NotFound(adapter.reference()))
    }

    async fn facts(&self, adapter: &RegisteredAdapter, want: Want) -> Result<AdapterFacts, TraceError> {
        let job = match &adapter.job {
            Some(job) => Some(self.job_facts(job).await?),
            None => None,
        };
        let snapshot = match adapter.snapshot {
            Some(id) => self.snapshots.by_id(id).await?,
            None => None,
        };
        let dataset = match &snapshot {
            Some(snapshot) => Some(self.dataset(snapshot, want).await?),
            None => None,
        };
        let data = &adapter.lineage["config"]["data"];
        let file = || json!({"source": data["source"], "content_hash": data["content_hash"]});
        Ok(AdapterFacts {
            id: adapter.reference(),
            registered: adapter.id.to_string(),
            base: adapter.base.clone(),
            base_hash: adapter.base_hash.clone(),
            content_hash: adapter.content_hash.clone(),
            state: adapter.state.as_str(),
            tainted: adapter.tainted.clone(),
            created_at: seconds(adapter.created),
            code_version: text(&adapter.lineage["code_version"]),
            method: text(&adapter.lineage["config"]["train"]["method"]),
            job,
            trained_on: (dataset.is_none() && data["source"].is_string()).then(file),
            dataset,
            parent: None,
        })
    }

    async fn dataset(&self, snapshot: &Snapshot, want: Want) -> Result<DatasetFacts, TraceError> {
        let (mut raters, mut rows, mut has_more) = (None, None, None);
        if want.rows.is_some() {
            raters = Some(self.snapshots.sources(snapshot.id, "rater").await?);
        }
        // The table of a snapshot that holds rows of an erased person still names them.
        if let Some(limit) = want.rows.filter(|_| snapshot.tainted.is_none()) {
            let mut stream = self.datasets.rows(snapshot).await?;
            let mut found = Vec::new();
            while found.len() <= limit
                && let Some(part) = stream.next_rows().await?
            {
                found.extend(part.iter().map(row_facts));
            }
            has_more = Some(found.len() > limit);
            found.truncate(limit);
            rows = Some(found);
        }
        Ok(DatasetFacts {
            id: format!("{}@{}", snapshot.name, snapshot.version),
            snapshot: snapshot.id.to_string(),
            content_hash: snapshot.content_hash.clone(),
            verdict: snapshot.verdict.clone(),
            tainted: snapshot.tainted.clone(),
            created_at: seconds(snapshot.created),
            rows: snapshot.row_counts["rows"].as_u64().unwrap_or_default(),
            sources: self.snapshots.source_counts(snapshot.id).await?,
            raters,
            row_ids: rows,
            has_more,
        })
    }

    /// The datasets made from any of these, each once, with what came of them.
    async fn uses(&self, kind: &str, sources: impl IntoIterator<Item = String>, want: Want) -> Result<Vec<Use>, TraceError> {
        let (mut seen, mut uses) = (BTreeSet::new(), Vec::new());
        for source in sources {
            for snapshot in self.snapshots.made_from(kind, &source).await? {
                if seen.insert(snapshot.id) {
                    uses.push(self.used(&snapshot, want).await?);
                }
            }
        }
        Ok(uses)
    }

    async fn used(&self, snapshot: &Snapshot, want: Want) -> Result<Use, TraceError> {
        let trained = self.adapters.made_from(AdapterOrigin::Snapshot(snapshot.id)).await?;
        Ok(Use { dataset: self.dataset(snapshot, want).await?, adapters: self.offspring(trained).await? })
    }

    /// Adapters with what they answered and what came of them.
    async fn offspring(&self, roots: Vec<RegisteredAdapter>) -> Result<Vec<Offspring>, TraceError> {
        // Level by level, then put together from the last: async functions that call themselves would need a box for each call.
        let mut levels: Vec<Vec<(usize, Offspring)>> = Vec::new();
        let mut level: Vec<(usize, RegisteredAdapter)> = roots.into_iter().map(|root| (0, root)).collect();
        while !level.is_empty() && levels.len() < MAX_DEPTH {
            let (mut made, mut next) = (Vec::with_capacity(level.len()), Vec::new());
            for (index, (parent, adapter)) in level.into_iter().enumerate() {
                let children = self.adapters.made_from(AdapterOrigin::Parent(adapter.id)).await?;
                next.extend(children.into_iter().map(|child| (index, child)));
                made.push((
                    parent,
                    Offspring {
                        id: adapter.reference(),
                        registered: adapter.id.to_string(),
                        answers: self.store.answers_of(adapter.generation).await?.into(),
                        base: adapter.base,
                        state: adapter.state.as_str(),
                        tainted: adapter.tainted.is_some(),
                        continued: Vec::new(),
                    },
                ));
            }
            levels.push(made);
            level = next;
        }
        let mut below = levels.pop().unwrap_or_default();
        while let Some(mut above) = levels.pop() {
            for (parent, child) in below {
                if let Some((_, parent)) = above.get_mut(parent) {
                    parent.continued.push(child);
                }
            }
            below = above;
        }
        Ok(below.into_iter().map(|(_, root)| root).collect())
    }

    /// Rows are not indexed: the datasets are read, the newest first, without those that hold rows of an erased person.
    async fn row(&self, id: &str, want: Want) -> Result<Trace, TraceError> {
        let (mut before, mut read, mut complete) = (None, 0, true);
        let (mut row, mut used_in) = (None, Vec::new());
        'all: loop {
            let page = self.datasets.list(None, before, PAGE).await?;
            let Some(last) = page.last() else { break };
            before = Some(last.id);
            for snapshot in &page {
                if snapshot.tainted.is_some() {
                    complete = false;
                    continue;
                }
                let mut stream = self.datasets.rows(snapshot).await?;
                while let Some(rows) = stream.next_rows().await? {
                    read += rows.len();
                    if let Some(found) = rows.iter().find(|stored| stored.row.id == id) {
                        row = row.or_else(|| Some(row_facts(found)));
                        used_in.push(self.used(snapshot, want).await?);
                        break;
                    }
                    if read >= MAX_READ {
                        complete = false;
                        break 'all;
                    }
                }
            }
        }
        let total = Total::of(&used_in);
        row.map(|row| Trace::Row { row, used_in, total, complete }).ok_or_else(|| TraceError::NotFound(id.to_owned()))
    }
}

fn row_facts(stored: &StoredRow) -> RowFacts {
    let origin = &stored.row.origin;
    RowFacts {
        id: stored.row.id.clone(),
        kind: stored.kind().as_str(),
        raters: origin.raters.clone(),
        feedback: origin.feedback.clone(),
        answers: origin.inferences.clone(),
    }
}

fn seconds(micros: i64) -> i64 {
    micros.div_euclid(1_000_000)
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}
