//! `tidemill adapter prune`

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use tidemill_rlhf::registry::{Registry, RegistryError};
use tidemill_store::{
    AdapterFilter, AdapterOrigin, AdapterState, Adapters, DataDir, FineTunings, Loops, RegisteredAdapter, Store,
};
use uuid::Uuid;

use super::adapter::AdapterCommandError;
use super::store_args::{StoreArgs, StoreCommandError};
use super::{COMMAND_LINE, when};
use crate::clock::now;
use crate::config::value::age;
use crate::flywheel::{named_by_rollouts, standing_of};
use crate::http::job_name;

/// What is pruned.
#[derive(Debug, Args)]
pub(super) struct PruneArgs {
    /// Only these, however long ago they were retired or revoked [default: all that nothing needs]
    adapters: Vec<String>,
    /// Only what was retired or revoked at least so long ago, such as 90d or 12h
    #[arg(long, value_name = "AGE", value_parser = age, default_value = "30d", conflicts_with = "adapters")]
    older_than: Duration,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// What was removed, or would be.
#[derive(Default)]
struct Total {
    adapters: usize,
    bytes: u64,
}

/// Runs the command.
pub(super) fn run(args: &PruneArgs) -> Result<(), AdapterCommandError> {
    args.store.with_config(async |store, config| {
        let registry = Registry::new(&store, &DataDir::new(&config.data)).acting_as(COMMAND_LINE);
        Ok(prune(&store, &registry, args).await)
    })?
}

async fn prune(store: &Store, registry: &Registry, args: &PruneArgs) -> Result<(), AdapterCommandError> {
    let needed = needed(store, registry).await?;
    let mut total = Total::default();
    if args.adapters.is_empty() {
        let age = i64::try_from(args.older_than.as_micros()).unwrap_or(i64::MAX);
        let before = now().saturating_sub(age);
        for adapter in idle(registry, before).await? {
            match needed.get(&adapter.id) {
                Some(why) => say(&format!("{} stays: {why}", adapter.reference())),
                None => remove(registry, &adapter, Some(before), args.dry_run, &mut total).await?,
            }
        }
    }
    for text in &args.adapters {
        let adapter = registry.get(text).await?;
        if let Some(why) = needed.get(&adapter.id) {
            return Err(StoreCommandError::Usage(format!("{} is needed: {why}", adapter.reference())).into());
        }
        remove(registry, &adapter, None, args.dry_run, &mut total).await?;
    }
    let (adapters, megabytes) = (total.adapters, total.bytes as f64 / 1e6);
    let did = if args.dry_run { "would be removed" } else { "removed" };
    say(&format!("files of {adapters} {}, {megabytes:.1} MB, {did}", if adapters == 1 { "adapter" } else { "adapters" }));
    Ok(())
}

/// Adapters out of service since before then that have their files, the newest first.
async fn idle(registry: &Registry, before: i64) -> Result<Vec<RegisteredAdapter>, AdapterCommandError> {
    let mut found = Vec::new();
    for state in [AdapterState::Retired, AdapterState::Revoked] {
        let mut filter = AdapterFilter { state: Some(state), limit: Some(100), ..AdapterFilter::default() };
        loop {
            let page = registry.list(&filter).await?;
            filter.before = page.items.last().map(|last| last.id);
            found.extend(page.items.into_iter().filter(|one| one.updated <= before && one.files_removed.is_none()));
            if !page.has_more {
                break;
            }
        }
    }
    Ok(found)
}

async fn remove(
    registry: &Registry,
    adapter: &RegisteredAdapter,
    unchanged_since: Option<i64>,
    dry_run: bool,
    total: &mut Total,
) -> Result<(), AdapterCommandError> {
    let folder = registry.folder(&adapter.location);
    let bytes = size(&folder);
    let removed = match dry_run {
        true => adapter.clone(),
        false => registry.remove_files(adapter.id, unchanged_since).await?,
    };
    let shared = !dry_run && folder.exists();
    let end = if shared { "; another adapter has the same files, which stay" } else { "" };
    say(&format!("{}  {} since {}{end}", removed.reference(), removed.state.as_str(), when(removed.updated)));
    total.adapters += 1;
    total.bytes += if shared { 0 } else { bytes };
    Ok(())
}

/// Bytes of a folder's files; 0 where it cannot be read.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum()
}

/// Adapters that something leads to or learns from, beside aliases, which nothing that was retired has; and what that is.
async fn needed(store: &Store, registry: &Registry) -> Result<BTreeMap<Uuid, String>, AdapterCommandError> {
    let mut named: Vec<(String, String)> = Vec::new();
    for name in named_by_rollouts(store).await? {
        let why = format!("a rollout leads requests to `{name}`");
        named.push((name, why));
    }
    for row in Loops::new(store).all().await? {
        let standing = standing_of(&row)?;
        if let Some(adapter) = standing.state.adapter() {
            named.push((adapter.to_owned(), format!("the loop {} is about to decide on it", row.name)));
        }
    }
    let mut needed = BTreeMap::new();
    for (name, why) in named {
        match registry.get(&name).await {
            Ok(adapter) => drop(needed.insert(adapter.id, why)),
            Err(RegistryError::Store(error)) => return Err(error.into()),
            Err(RegistryError::Ambiguous { .. }) => {
                let name = name.rsplit_once('@').map_or(name.as_str(), |(name, _)| name);
                let filter = AdapterFilter { name: Some(name.to_owned()), ..AdapterFilter::default() };
                needed.extend(registry.list(&filter).await?.items.into_iter().map(|adapter| (adapter.id, why.clone())));
            }
            // No adapter.
            Err(_) => {}
        }
    }
    let adapters = Adapters::new(store);
    for job in FineTunings::new(store.database()).learnt_from().await? {
        let made = adapters.made_from(AdapterOrigin::Job(&job_name(job))).await?;
        needed.extend(made.into_iter().map(|adapter| (adapter.id, "a fine-tuning job learns from it".to_owned())));
    }
    Ok(needed)
}

fn say(text: &str) {
    // A closed standard output is no reason to fail: the work is done.
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flywheel::read_policy;
    use crate::flywheel::tests::table;
    use crate::rollout::spec::Spec;
    use serde_json::json;
    use tidemill_rlhf::flywheel::{Cycle, Flywheel, State};
    use tidemill_rlhf::registry::{Base, Lineage};
    use tidemill_store::{
        FileDraft, Files, FineTuningCheckpoint, FineTuningDraft, Made, Rollout, RolloutDecision, Rollouts, StoreOptions,
    };

    struct Bench {
        folder: tempfile::TempDir,
        store: Store,
        registry: Registry,
    }

    impl Bench {
        async fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let data = DataDir::new(folder.path());
            let store = Store::open(StoreOptions::new(data.clone())).await.unwrap();
            let registry = Registry::new(&store, &data).acting_as(COMMAND_LINE);
            Self { folder, store, registry }
        }

        /// One that was in service.
        async fn retired(&self, name: &str, job: Option<&str>) -> RegisteredAdapter {
            let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama/adapters/all");
            let lineage = Lineage { job: job.map(str::to_owned), ..Lineage::new(name, Base::named("m")) };
            self.registry.register(&files, lineage).await.unwrap();
            self.registry.retire(name).await.unwrap()
        }

        async fn prune(&self, adapters: &[&str], older_than: Duration, dry_run: bool) -> Result<(), String> {
            let adapters = adapters.iter().map(|name| (*name).to_owned()).collect();
            let store = StoreArgs::default();
            let args = PruneArgs { adapters, older_than, dry_run, store };
            prune(&self.store, &self.registry, &args).await.map_err(|error| error.to_string())
        }

        async fn has_files(&self, name: &str) -> bool {
            self.registry.get(name).await.unwrap().files_removed.is_none()
        }
    }

    #[tokio::test]
    async fn what_is_long_out_of_service_goes_and_its_row_stays() {
        let bench = Bench::new().await;
        let (one, twin) = (bench.retired("one", None).await, bench.retired("twin", None).await);
        let place = bench.registry.folder(&one.location);
        assert_eq!(one.location, twin.location);
        bench.prune(&[], Duration::from_secs(86_400), false).await.unwrap();
        bench.prune(&[], Duration::ZERO, true).await.unwrap();
        assert!(bench.has_files("one").await && bench.has_files("twin").await && place.is_dir());
        // Files that two have stay until both are gone.
        bench.prune(&["one"], Duration::ZERO, false).await.unwrap();
        assert!(!bench.has_files("one").await && place.is_dir());
        bench.prune(&[], Duration::ZERO, false).await.unwrap();
        assert!(!bench.has_files("twin").await && !place.exists());
        assert_eq!(std::fs::read_dir(bench.folder.path().join("adapters")).unwrap().count(), 0);
        let refused = bench.registry.serve("one", false).await.unwrap_err().to_string();
        assert!(refused.contains("the files of one@") && refused.contains("import the same adapter again"), "{refused}");
        // The same contents mend it.
        let again = bench.retired("one", None).await;
        assert_eq!((again.id, again.files_removed, place.is_dir()), (one.id, None, true));
        bench.registry.serve("one", false).await.unwrap();
        let refused = bench.prune(&["one"], Duration::ZERO, false).await.unwrap_err();
        assert!(refused.contains("is serving; its files stay"), "{refused}");
    }

    #[tokio::test]
    async fn what_a_rollout_a_loop_or_a_job_needs_stays() {
        let bench = Bench::new().await;
        let store = &bench.store;
        for name in ["arm", "tried", "free"] {
            bench.retired(name, None).await;
        }
        let files = Files::open(store, &DataDir::new(bench.folder.path())).await.unwrap();
        let content = files.receive(store.issue_id()).await.unwrap();
        let draft = FileDraft { key_id: None, filename: "f".into(), purpose: "fine-tune".into(), expires: None };
        let file = content.finish(draft, 1).await.unwrap();
        let jobs = FineTunings::new(store.database());
        let make = async |model: &str| {
            let draft = FineTuningDraft {
                id: store.issue_id(),
                created: 1,
                key_id: None,
                model: model.to_owned(),
                base: "m".into(),
                method: json!({"type": "dpo"}),
                suffix: None,
                seed: 1,
                training_file: file.id,
                validation_file: None,
                metadata: None,
                result_file: store.issue_id(),
                place: files.place().to_owned(),
            };
            assert!(jobs.insert(&draft, &[], store.act("ann", "fine_tuning.create")).await.unwrap());
            draft.id
        };
        let first = make("m").await;
        jobs.validated(first, &json!({"type": "dpo"}), 1, &[], 1).await.unwrap();
        jobs.begin(first, 1, &[], 1).await.unwrap();
        let checkpoint = FineTuningCheckpoint { step: 1, created: 1, model: "ft:m::1".into(), metrics: json!({}) };
        let made = Made { model: "ft:m::1".into(), result: None, checkpoints: vec![checkpoint] };
        assert!(jobs.succeed(first, &made, &[], 1).await.unwrap());
        bench.retired("learnt", Some(&job_name(first))).await;
        let second = make("ft:m::1").await;

        let spec = json!({
            "name": "r", "model": "assistant", "kind": "ab", "arms": [{"variant": "m"}, {"variant": "arm"}],
            "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
        });
        let spec = json!(Spec::parse(&spec).unwrap());
        let rollout = Rollout {
            id: store.issue_id(),
            created: 1,
            updated: 1,
            ended: None,
            name: "r".into(),
            model: "assistant".into(),
            spec,
            state: json!({}),
            version: 0,
            latest: json!({}),
        };
        let start = RolloutDecision { version: 0, at: 1, action: "start".into(), actor: None, body: json!({}) };
        Rollouts::new(store).insert(&rollout, &start, "server").await.unwrap();
        let cycle = Box::new(Cycle { started: 1, policy: read_policy("l", &table()).unwrap(), attempts: 0 });
        let tried = bench.registry.get("tried").await.unwrap().reference();
        let state = State::Evaluation { cycle, dataset: "d@1".into(), adapter: tried };
        let wheel = Flywheel { cycle: 1, state, ..Flywheel::new(1) };
        Loops::new(store).open("l", wheel.state.word().as_str(), &json!(wheel), 1).await.unwrap();

        bench.prune(&[], Duration::ZERO, false).await.unwrap();
        for (name, stays) in [("arm", true), ("tried", true), ("learnt", true), ("free", false)] {
            assert_eq!(bench.has_files(name).await, stays, "{name}");
        }
        for (name, why) in [("arm", "a rollout"), ("tried", "the loop l"), ("learnt", "a fine-tuning job")] {
            let refused = bench.prune(&[name], Duration::ZERO, false).await.unwrap_err();
            assert!(refused.contains(&format!("is needed: {why}")), "{refused}");
        }
        // When the job has ended, nobody learns from it any more.
        jobs.fail(second, &json!({}), &[], 2).await.unwrap();
        bench.prune(&["learnt"], Duration::ZERO, false).await.unwrap();
        assert!(!bench.has_files("learnt").await);
    }
}
