//! Making snapshots, and finding them again.
//!
//! The order of a build: Parquet files, then the version of the Delta table that names them, then the report beside it, then the row
//! in the store. Cut off anywhere before the last, it leaves a version that no row names: nobody sees it, and the next build replaces
//! it with a version of its own.

use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tidemill_store::{Actor, InferenceFilter, Snapshot, Snapshots, Sources, Store};

use super::answer::Prompt;
use super::build::build;
use super::counts::Counts;
use super::error::DatasetError;
use super::gather::gather;
use super::import::{BadLines, Input};
use super::query::Query;
use super::stored::StoredRow;
use super::table::{RowStream, Table};
use super::watch::{Stage, Watch};
use super::{Row, format};
use crate::quality::{self, Keep, Plots, QualityOptions, QualityReport, Split, Verdict};

/// Rows that a report looks at; of larger imports it takes a sample of this size. Also the most rows held in memory.
pub const CHECKED: usize = 100_000;
/// Live prompts that drift is measured against.
const LIVE: usize = 500;

/// The datasets of a store.
#[derive(Clone, Debug)]
pub struct Datasets {
    store: Store,
    root: String,
    actor: Actor,
}

/// How an import goes.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// Leave bad lines out instead of refusing the file.
    pub skip_bad: bool,
    /// Share to hold out; without it, rows keep the part that they come with, which is training unless they say.
    pub held_out: Option<f64>,
    /// For the choice of what is held out.
    pub seed: u64,
}

/// What was imported.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Lines that were left out.
    pub skipped: BadLines,
}

/// Which rows of a snapshot there are.
#[derive(Clone, Debug, Default, Serialize)]
struct RowCounts {
    rows: u64,
    kinds: BTreeMap<&'static str, u64>,
    splits: BTreeMap<&'static str, u64>,
    raters: usize,
    users: usize,
    /// Rows that the quality report looked at.
    checked: usize,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    judgements: Option<Counts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bad_lines: Option<u64>,
}

/// What is being put together for the row in the store.
#[derive(Default)]
struct Draft {
    counts: RowCounts,
    sources: Sources,
    hash: blake3::Hasher,
}

/// A quality report and its page.
struct Assessed {
    report: QualityReport,
    page: String,
}

impl Assessed {
    fn new(rows: &[Row], options: &QualityOptions) -> Self {
        let report = quality::assess(rows, options);
        let page = report.to_html(rows);
        Self { report, page }
    }
}

impl Draft {
    fn add(&mut self, stored: &StoredRow) {
        let StoredRow { row, split, .. } = stored;
        let part = match split {
            Split::Train => "train",
            Split::HeldOut => "held_out",
        };
        self.counts.rows += 1;
        *self.counts.kinds.entry(stored.kind().as_str()).or_default() += 1;
        *self.counts.splits.entry(part).or_default() += 1;
        let origin = &row.origin;
        for (kind, ids) in [
            ("inference", &origin.inferences),
            ("feedback", &origin.feedback),
            ("rater", &origin.raters),
            ("user", &origin.users),
        ] {
            self.sources.entry(kind).or_default().extend(ids.iter().cloned());
        }
        // Erasure knows the texts of a labeling task by the task.
        let tasks = origin.inferences.iter().filter_map(|id| id.split_once(':')).map(|(task, _)| task.to_owned());
        self.sources.entry("task").or_default().extend(tasks);
        // Strings and numbers are always JSON. The verdict is no content: better checks do not make another dataset.
        let line = serde_json::to_vec(&(&row.id, part, origin)).unwrap_or_default();
        self.hash.update(&(line.len() as u64).to_le_bytes());
        self.hash.update(&line);
    }
}

impl Datasets {
    /// Over a store, with tables under `root`, a path or URL; what is made here is the server's doing in the audit.
    pub fn new(store: Store, root: impl Into<String>) -> Self {
        Self { store, root: root.into(), actor: "server".into() }
    }

    /// The same on somebody's behalf, as the audit names them.
    pub fn acting_as(&self, actor: impl Into<Actor>) -> Self {
        Self { actor: actor.into(), ..self.clone() }
    }

    fn snapshots(&self) -> Snapshots {
        Snapshots::new(self.store.database())
    }

    /// Whether a dataset may be called so.
    pub fn check_name(&self, name: &str) -> Result<(), DatasetError> {
        self.location(name).map(drop)
    }

    fn location(&self, name: &str) -> Result<String, DatasetError> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        // The API has its builds under that name.
        let fits = name != "builds"
            && name.len() <= 64
            && name.starts_with(plain)
            && name.chars().all(|c| plain(c) || "._-".contains(c));
        if !fits {
            return Err(DatasetError::Name(name.to_owned()));
        }
        if self.root.contains("://") {
            return Ok(format!("{}/{name}", self.root.trim_end_matches('/')));
        }
        let root =
            std::path::absolute(&self.root).map_err(|source| DatasetError::File { path: self.root.clone().into(), source })?;
        Ok(root.join(name).to_string_lossy().into_owned())
    }

    /// A query over feedback becomes a snapshot.
    pub async fn build(
        &self,
        name: &str,
        query: &Query,
        options: &QualityOptions,
        watch: &Watch,
    ) -> Result<Snapshot, DatasetError> {
        query.check()?;
        let location = self.location(name)?;
        let gathered = gather(&self.store, query, watch).await?;
        let mut options = options.clone();
        if options.live_sample.is_empty() {
            options.live_sample = self.live_sample().await?;
        }
        watch.go_on()?;
        watch.enter(Stage::Checking, None);
        let (built, split, assessed) = {
            let query = query.clone();
            blocking(move || {
                let mut built = build(&gathered, &query);
                options.judgements = std::mem::take(&mut built.judgements);
                let split = quality::split::by_prompt_cluster(&built.rows, query.held_out, query.seed);
                let assessed = Assessed::new(&built.rows, &options);
                (built, split, assessed)
            })
            .await?
        };
        if built.rows.is_empty() {
            return Err(DatasetError::Empty(why_empty(&built.counts)));
        }
        let mut draft = Draft::default();
        draft.counts.judgements = Some(built.counts);
        draft.counts.checked = built.rows.len();
        let verdicts: Vec<Option<Keep>> = assessed.report.rows.iter().map(|row| Some(row.verdict)).collect();
        watch.enter(Stage::Writing, Some(built.rows.len() as u64));
        let mut writing = Table::open_or_create(&location, name).await?.write()?;
        for (index, (row, split)) in built.rows.into_iter().zip(split).enumerate() {
            watch.go_on()?;
            let stored = StoredRow { row, split, verdict: verdicts.get(index).copied().flatten() };
            draft.add(&stored);
            writing.add(stored).await?;
            watch.add(1);
        }
        let query = json!({ "feedback": query });
        self.finish(name, location, query, draft, writing, assessed, true).await
    }

    /// A file or table becomes a snapshot. Nothing is kept when a line is bad, unless bad lines are to be skipped.
    pub async fn import(
        &self,
        name: &str,
        input: &Input,
        import: &ImportOptions,
        options: &QualityOptions,
        watch: &Watch,
    ) -> Result<Imported, DatasetError> {
        Query { held_out: import.held_out.unwrap_or_default(), ..Query::default() }.check()?;
        let location = self.location(name)?;
        let mut sample = Sample::default();
        let mut skipped = BadLines::default();
        watch.enter(Stage::Reading, input.bytes());
        let mut reading = input.open().await?;
        while let Some(portion) = reading.next().await? {
            watch.go_on()?;
            watch.add(portion.bytes);
            for row in portion.rows {
                match row {
                    Ok(stored) => sample.add(stored),
                    Err(bad) => skipped.push(bad),
                }
            }
        }
        if skipped.count > 0 && !import.skip_bad {
            return Err(DatasetError::Lines(skipped));
        }
        if sample.seen == 0 {
            return Err(DatasetError::Empty(format!("{} holds none", input.name())));
        }

        watch.enter(Stage::Checking, None);
        let Sample { seen, kept } = sample;
        let (indices, stored): (Vec<u64>, Vec<StoredRow>) = {
            let mut kept: Vec<Sampled> = kept.into_vec();
            kept.sort_by_key(|sampled| sampled.index);
            kept.into_iter().map(|sampled| (sampled.index, sampled.row)).unzip()
        };
        let whole = seen == indices.len() as u64;
        let (held_out, seed, options) = (import.held_out, import.seed, options.clone());
        let (stored, split, assessed) = blocking(move || {
            let rows: Vec<Row> = stored.iter().map(|stored| stored.row.clone()).collect();
            let split = held_out.filter(|_| whole).map(|share| quality::split::by_prompt_cluster(&rows, share, seed));
            (stored, split, Assessed::new(&rows, &options))
        })
        .await?;
        let verdicts: HashMap<u64, Keep> =
            indices.iter().zip(&assessed.report.rows).map(|(index, verdict)| (*index, verdict.verdict)).collect();

        watch.enter(Stage::Writing, Some(seen));
        let mut draft = Draft::default();
        draft.counts.checked = indices.len();
        draft.counts.bad_lines = Some(skipped.count);
        let mut writing = Table::open_or_create(&location, name).await?.write()?;
        if whole {
            for (index, mut stored) in stored.into_iter().enumerate() {
                watch.go_on()?;
                if let Some(split) = &split {
                    stored.split = split[index];
                }
                stored.verdict = verdicts.get(&(index as u64)).copied();
                draft.add(&stored);
                writing.add(stored).await?;
                watch.add(1);
            }
        } else {
            drop(stored);
            let mut reading = input.open().await?;
            let mut index = 0;
            while let Some(portion) = reading.next().await? {
                watch.go_on()?;
                for mut stored in portion.rows.into_iter().flatten() {
                    if let Some(share) = held_out {
                        stored.split = by_prompt(&stored.row, share, seed);
                    }
                    stored.verdict = verdicts.get(&index).copied();
                    draft.add(&stored);
                    writing.add(stored).await?;
                    watch.add(1);
                    index += 1;
                }
            }
            if index != seen {
                return Err(DatasetError::Unreadable {
                    what: input.name(),
                    reason: "it changed while it was read; import it again".to_owned(),
                });
            }
        }
        let query = json!({ "import": input, "held_out": held_out, "seed": seed });
        let snapshot = self.finish(name, location, query, draft, writing, assessed, false).await?;
        Ok(Imported { snapshot, skipped })
    }

    #[expect(clippy::too_many_arguments, reason = "the end of two ways that have these seven things in hand")]
    async fn finish(
        &self,
        name: &str,
        location: String,
        query: Value,
        mut draft: Draft,
        writing: super::table::Writing,
        assessed: Assessed,
        from_feedback: bool,
    ) -> Result<Snapshot, DatasetError> {
        let snapshots = self.snapshots();
        let report = &assessed.report;
        let count = |kind: &str| draft.sources.get(kind).map_or(0, BTreeSet::len);
        (draft.counts.raters, draft.counts.users) = (count("rater"), count("user"));
        let content_hash = draft.hash.finalize().to_hex().to_string();
        let mut metadata = Map::new();
        metadata.insert("tidemill.content_hash".to_owned(), json!(content_hash));
        let table = writing.commit(metadata).await?;
        let version = i64::try_from(table.version()).unwrap_or(i64::MAX);
        if let Some(newest) = snapshots.find(name, None).await?
            && newest.version >= version
        {
            return Err(DatasetError::Location {
                location,
                reason: format!("{name}@{} is known, but the table was emptied or replaced; use another name", newest.version),
            });
        }
        // A list of small structs with string keys is always JSON.
        table.put_beside(&format!("{version}/report.json"), serde_json::to_vec_pretty(report).unwrap_or_default()).await?;
        table.put_beside(&format!("{version}/report.html"), assessed.page.into_bytes()).await?;
        let mut summary = serde_json::to_value(report).unwrap_or_default();
        if let Some(summary) = summary.as_object_mut() {
            summary.remove("rows");
            summary.remove("plots");
        }
        let snapshot = Snapshot {
            id: self.store.issue_id(),
            name: name.to_owned(),
            version,
            created: now(),
            query,
            content_hash,
            location,
            table_version: version,
            row_counts: serde_json::to_value(&draft.counts).unwrap_or_default(),
            verdict: verdict_name(report.verdict).to_owned(),
            report: summary,
            tainted: None,
        };
        let detail = json!({
            "id": snapshot.id, "rows": draft.counts.rows, "verdict": snapshot.verdict, "content_hash": snapshot.content_hash,
        });
        let act = self.store.act(&self.actor, "dataset.make").to(format!("{name}@{version}")).with(detail);
        snapshots.insert(&snapshot, &draft.sources, from_feedback, act).await?;
        // As it was written: an erasure in the meantime has marked it.
        Ok(snapshots.find(name, Some(version)).await?.unwrap_or(snapshot))
    }

    /// A snapshot by `NAME` (its newest) or `NAME@VERSION`.
    pub async fn find(&self, reference: &str) -> Result<Snapshot, DatasetError> {
        let missing = || DatasetError::NotFound(reference.to_owned());
        let (name, version) = match reference.rsplit_once('@') {
            None => (reference, None),
            Some((name, version)) => (name, Some(version.parse().map_err(|_| missing())?)),
        };
        self.snapshots().find(name, version).await?.ok_or_else(missing)
    }

    /// At most `limit` snapshots older than `before`, the newest first.
    pub async fn list(
        &self,
        name: Option<&str>,
        before: Option<uuid::Uuid>,
        limit: usize,
    ) -> Result<Vec<Snapshot>, DatasetError> {
        Ok(self.snapshots().list(name, before, limit).await?)
    }

    async fn table(&self, snapshot: &Snapshot) -> Result<Table, DatasetError> {
        let version = u64::try_from(snapshot.table_version).unwrap_or_default();
        let moved = !snapshot.location.contains("://") && !std::path::Path::new(&snapshot.location).exists();
        // The data directory may have been moved since.
        let location = if moved { self.location(&snapshot.name)? } else { snapshot.location.clone() };
        Table::open(&location, Some(version)).await
    }

    /// The rows of a snapshot.
    pub async fn rows(&self, snapshot: &Snapshot) -> Result<RowStream, DatasetError> {
        self.table(snapshot).await?.rows().await
    }

    /// Its quality report, as JSON or as a page.
    pub async fn report(&self, snapshot: &Snapshot, page: bool) -> Result<Vec<u8>, DatasetError> {
        let file = if page { "report.html" } else { "report.json" };
        self.table(snapshot).await?.get_beside(&format!("{}/{file}", snapshot.version)).await
    }

    /// The numbers behind the plots of its quality report, out of the report's file: the row in the store is without them.
    pub async fn plots(&self, snapshot: &Snapshot) -> Result<Plots, DatasetError> {
        #[derive(Deserialize)]
        struct Drawn {
            plots: Plots,
        }
        let report = self.report(snapshot, false).await?;
        let unreadable = |error: serde_json::Error| DatasetError::Unreadable {
            what: format!("the quality report of {}@{}", snapshot.name, snapshot.version),
            reason: error.to_string(),
        };
        Ok(serde_json::from_slice::<Drawn>(&report).map_err(unreadable)?.plots)
    }

    /// Texts of the last prompts of users.
    async fn live_sample(&self) -> Result<Vec<String>, DatasetError> {
        let newest = self.store.list_inferences(&InferenceFilter { limit: Some(LIVE), ..InferenceFilter::default() }).await?;
        let last = |messages: Value| {
            let messages = format::messages(&messages)?;
            messages.into_iter().rev().find(|message| message.role == "user").map(|message| message.content)
        };
        Ok(newest.items.into_iter().filter_map(|inference| last(inference.messages?)).collect())
    }
}

/// `pass`, `warn` or `fail`.
pub fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, DatasetError> {
    // It ends without a result only when the runtime is going down.
    tokio::task::spawn_blocking(work).await.map_err(|_| DatasetError::Interrupted)
}

fn why_empty(counts: &Counts) -> String {
    if counts.judgements == 0 {
        return "no feedback matches the query; widen it, or see GET /v1/feedback for what there is".to_owned();
    }
    let reasons: Vec<String> = counts
        .left_out
        .iter()
        .map(|(reason, count)| {
            let name = serde_json::to_value(reason).unwrap_or_default();
            format!("{count} {}", name.as_str().unwrap_or_default().replace('_', " "))
        })
        .collect();
    format!("of {} judgements none makes a row: {}", counts.judgements, reasons.join(", "))
}

/// Microseconds since 1970.
pub(crate) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64)
}

/// For files too large to cluster: equal prompts on one side, each side by a hash of the prompt.
fn by_prompt(row: &Row, share: f64, seed: u64) -> Split {
    let key = Prompt::new(row.example.prompt().to_vec()).key;
    let hash = blake3::hash(format!("{seed}:{key}").as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    if (u64::from_le_bytes(first) as f64) < share * u64::MAX as f64 { Split::HeldOut } else { Split::Train }
}

/// Of any number of rows, those with the smallest ids: a sample of fixed size that does not depend on the order of the rows.
#[derive(Default)]
struct Sample {
    seen: u64,
    kept: BinaryHeap<Sampled>,
}

struct Sampled {
    index: u64,
    row: StoredRow,
}

impl Sampled {
    fn key(&self) -> (&str, u64) {
        (&self.row.row.id, self.index)
    }
}

impl PartialEq for Sampled {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Sampled {}

impl PartialOrd for Sampled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Sampled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl Sample {
    fn add(&mut self, row: StoredRow) {
        self.kept.push(Sampled { index: self.seen, row });
        self.seen += 1;
        if self.kept.len() > CHECKED {
            self.kept.pop();
        }
    }
}
