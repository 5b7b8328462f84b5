//! `tidemill adapter`

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::Value;
use tidemill_engine::{Container, LoadError, MergeError, MergeOptions, ModelFiles, merge};
use tidemill_kernels::Format;
use tidemill_rlhf::job::LINEAGE;
use tidemill_rlhf::registry::{Base, Lineage, Registry, RegistryError};
use tidemill_store::{AdapterFilter, AdapterState, Alias, DataDir, RegisteredAdapter};

use crate::cli::prune::{self, PruneArgs};
use crate::cli::store_args::{StoreArgs, StoreCommandError};
use crate::cli::{COMMAND_LINE, when};
use crate::config::value::choice;
use crate::config::{Config, ConfigError, ModelSpec, Origin, model_spec};

/// Adapters that are kept, and which of them are served. A running server follows within two seconds.
#[derive(Debug, Args)]
pub struct AdapterArgs {
    #[command(subcommand)]
    command: AdapterCommand,
}

#[derive(Debug, Subcommand)]
enum AdapterCommand {
    /// List the adapters, the newest first, and what aliases lead to.
    List(ListArgs),
    /// Show an adapter and where it comes from.
    Show(One),
    /// Keep what PEFT or `tidemill train` wrote, as a candidate.
    Import(ImportArgs),
    /// Put an adapter into service in the place of others of its name; those that an alias leads to stay.
    Serve(ServeArgs),
    /// Take an adapter out of service, for now.
    Retire(One),
    /// Take an adapter out of service for good, and its aliases with it.
    Revoke(One),
    /// Remove the files of adapters that were retired or revoked and that nothing needs; what is known of them stays.
    Prune(PruneArgs),
    /// Lead a name such as `champion` to an adapter that is served; every request finds the one or the other.
    Alias(AliasArgs),
    /// Remove an alias.
    Unalias(UnaliasArgs),
    /// Write the base model with the adapter in it, as a model of its own.
    Merge(MergeArgs),
    /// Write the adapter's folder, as PEFT reads it, or a GGUF file, as llama.cpp does.
    Export(ExportArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Only those of this base model
    #[arg(long, value_name = "BASE")]
    base: Option<String>,
    /// Only those in this state: candidate, serving, retired, revoked
    #[arg(long, value_name = "STATE")]
    state: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
}

/// Which adapter.
#[derive(Debug, Args)]
struct One {
    /// NAME, NAME@GENERATION (its first digits are enough), an alias, or an id; BASE: may stand in front
    adapter: String,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Args)]
struct ImportArgs {
    /// What requests will call it
    name: String,
    /// The folder with adapter_config.json and adapter_model.safetensors, or that of a training, with its lineage.json
    folder: PathBuf,
    /// The base model, as for `serve --model` [default: the one that `serve` would serve]
    #[arg(long, value_name = "[NAME=]PATH")]
    base: Option<String>,
    /// Dataset that it was trained on; a training's folder says it
    #[arg(long, value_name = "NAME@VERSION")]
    dataset: Option<String>,
    /// Adapter that its training went on from
    #[arg(long, value_name = "ADAPTER")]
    parent: Option<String>,
    /// Whatever weights it was made for: only its shapes are compared with the base, now and whenever it is served
    #[arg(long)]
    any_base: bool,
    /// Serve it at once
    #[arg(long)]
    serve: bool,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Args)]
struct ServeArgs {
    #[command(flatten)]
    one: One,
    /// Although a person behind it was erased since
    #[arg(long)]
    tainted: bool,
}

#[derive(Debug, Args)]
struct AliasArgs {
    /// What requests will say
    alias: String,
    #[command(flatten)]
    one: One,
}

#[derive(Debug, Args)]
struct UnaliasArgs {
    /// The alias
    alias: String,
    /// Its base model, where several have an alias of this name
    #[arg(long, value_name = "BASE")]
    base: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Args)]
struct MergeArgs {
    #[command(flatten)]
    one: One,
    /// A new .gguf file, or a new folder for safetensors
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Form of the merged matrices: f32, f16, bf16, and in GGUF q8_0, q4_1, q4_0 [default: the base's own, or 16 bits where that is
    /// quantised]
    #[arg(long, value_name = "FORMAT")]
    dtype: Option<String>,
    /// The base model, as for `serve --model` [default: the model of the name that the adapter was registered for]
    #[arg(long, value_name = "[NAME=]PATH")]
    base: Option<String>,
    /// Folder with config.json and tokenizer for safetensors out of a base in GGUF
    #[arg(long, value_name = "DIR")]
    files_from: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ExportArgs {
    #[command(flatten)]
    one: One,
    /// A new folder, or a new .gguf file
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// The base model of a .gguf file, as for `serve --model` [default: the model of the name that the adapter was registered for]
    #[arg(long, value_name = "[NAME=]PATH")]
    base: Option<String>,
}

/// Why the command ended without what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AdapterCommandError {
    /// The store or its configuration.
    #[error(transparent)]
    Store(#[from] StoreCommandError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The base model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The base model's files.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The merge.
    #[error(transparent)]
    Merge(#[from] MergeError),
}

impl From<tidemill_store::StoreError> for AdapterCommandError {
    fn from(error: tidemill_store::StoreError) -> Self {
        StoreCommandError::from(error).into()
    }
}

/// Runs the command.
pub fn run(args: &AdapterArgs) -> Result<(), AdapterCommandError> {
    match &args.command {
        AdapterCommand::List(args) => with(&args.store, async |registry, _| list(&registry, args).await),
        AdapterCommand::Show(one) => with(&one.store, async |registry, _| {
            let (adapter, aliases) = (registry.get(&one.adapter).await?, registry.aliases().await?);
            say(&described(&adapter, &aliases));
            Ok(())
        }),
        AdapterCommand::Import(args) => with(&args.store, async |registry, config| import(&registry, &config, args).await),
        AdapterCommand::Serve(args) => with(&args.one.store, async |registry, _| {
            let (adapter, retired) = registry.serve(&args.one.adapter, args.tainted).await?;
            told_served(&adapter, &retired);
            Ok(())
        }),
        AdapterCommand::Retire(one) => with(&one.store, async |registry, _| {
            say(&format!("{} is retired", registry.retire(&one.adapter).await?.reference()));
            Ok(())
        }),
        AdapterCommand::Revoke(one) => with(&one.store, async |registry, _| {
            let (adapter, aliases) = registry.revoke(&one.adapter).await?;
            let gone = if aliases.is_empty() { String::new() } else { format!(", and with it {}", aliases.join(", ")) };
            say(&format!("{} is revoked{gone}", adapter.reference()));
            Ok(())
        }),
        AdapterCommand::Prune(args) => prune::run(args),
        AdapterCommand::Alias(args) => with(&args.one.store, async |registry, _| {
            let (adapter, _) = registry.alias(&args.alias, &args.one.adapter).await?;
            say(&format!("{}:{} leads to {}", adapter.base, args.alias, adapter.reference()));
            Ok(())
        }),
        AdapterCommand::Unalias(args) => with(&args.store, async |registry, _| {
            let gone = registry.unalias(&args.alias, args.base.as_deref()).await?;
            say(&format!("{}:{} leads nowhere any more", gone.base, gone.name));
            Ok(())
        }),
        AdapterCommand::Merge(args) => with(&args.one.store, async |registry, config| merged(&registry, &config, args).await),
        AdapterCommand::Export(args) => with(&args.one.store, async |registry, config| {
            let adapter = registry.get(&args.one.adapter).await?;
            if is_gguf(&args.out) {
                // Its rows lie as the base's do.
                let base = ModelFiles::open(&base_of(&config, &adapter, args.base.as_deref())?.path)?;
                registry.open(&adapter).await?.write_gguf(base.config(), &args.out).map_err(RegistryError::from)?;
            } else {
                registry.export(&adapter, &args.out).await?;
            }
            say(&format!("{} is in {}", adapter.reference(), args.out.display()));
            Ok(())
        }),
    }
}

fn with(
    store: &StoreArgs,
    work: impl AsyncFnOnce(Registry, Config) -> Result<(), AdapterCommandError>,
) -> Result<(), AdapterCommandError> {
    store.with_config(async |store, config| {
        let registry = Registry::new(&store, &DataDir::new(&config.data)).acting_as(COMMAND_LINE);
        Ok(work(registry, config).await)
    })?
}

async fn list(registry: &Registry, args: &ListArgs) -> Result<(), AdapterCommandError> {
    let states = AdapterState::ALL.map(|state| (state.as_str(), state));
    let state = args.state.as_deref().map(|text| choice(text, &states)).transpose();
    let state = state.map_err(|why| StoreCommandError::Usage(format!("--state: {why}")))?;
    let aliases = registry.aliases().await?;
    let mut filter = AdapterFilter { base: args.base.clone(), state, limit: Some(100), ..AdapterFilter::default() };
    loop {
        let page = registry.list(&filter).await?;
        for adapter in &page.items {
            let tainted = if adapter.tainted.is_some() { "  tainted" } else { "" };
            let gone = if adapter.files_removed.is_some() { "  files removed" } else { "" };
            let names = names(adapter, &aliases);
            let (reference, state) = (adapter.reference(), adapter.state.as_str());
            say(&format!("{reference:40}  {state:9}  {:24}  {}  {names}{tainted}{gone}", adapter.base, when(adapter.created)));
        }
        filter.before = page.items.last().map(|last| last.id);
        if !page.has_more {
            return Ok(());
        }
    }
}

fn names(adapter: &RegisteredAdapter, aliases: &[Alias]) -> String {
    let own = aliases.iter().filter(|alias| alias.adapter == adapter.id).map(|alias| alias.name.as_str());
    own.collect::<Vec<_>>().join(", ")
}

/// Several lines about an adapter.
fn described(adapter: &RegisteredAdapter, aliases: &[Alias]) -> String {
    let lineage = &adapter.lineage;
    let text = |key: &str| lineage[key].as_str().unwrap_or("unknown").to_owned();
    let raters = lineage["raters"].as_array().map_or(0, Vec::len);
    let mut lines = vec![
        format!("{}  {}", adapter.reference(), when(adapter.created)),
        format!("  id           {}", adapter.id),
        format!("  state        {}", adapter.state.as_str()),
        format!("  aliases      {}", names(adapter, aliases)),
        format!("  base         {}", adapter.base),
        format!(
            "  base hash    {}",
            adapter.base_hash.as_deref().unwrap_or("unknown; only shapes are compared when it is served")
        ),
        format!("  content      {}", adapter.content_hash),
        match adapter.files_removed {
            Some(at) => format!("  folder       {}, removed {}", adapter.location, when(at)),
            None => format!("  folder       {}", adapter.location),
        },
        format!("  dataset      {}", text("dataset")),
        format!("  raters       {raters}"),
        format!("  parent       {}", lineage["parent"].as_str().unwrap_or("none")),
        format!("  job          {}", adapter.job.as_deref().unwrap_or("none")),
        format!("  made by      {}", text("code_version")),
        format!("  lora         {}", lineage["lora"]),
        format!("  config       {}", lineage["config"]),
        format!("  metrics      {}", without_evaluation(&adapter.metrics)),
    ];
    if let Some(found) = adapter.metrics.get("evaluation") {
        lines.push(format!("  evaluation   {}", evaluated(found)));
    }
    if let Some(tainted) = &adapter.tainted {
        lines.push(format!("  tainted      {}; think twice before it is served", tainted["reason"].as_str().unwrap_or("yes")));
    }
    lines.join("\n")
}

fn without_evaluation(metrics: &Value) -> Value {
    let mut metrics = metrics.clone();
    metrics.as_object_mut().map(|metrics| metrics.shift_remove("evaluation"));
    metrics
}

/// What `tidemill eval` kept of its last look at the adapter, in a line.
fn evaluated(found: &Value) -> String {
    let number = |value: &Value, decimals: usize| value.as_f64().map(|value| format!("{value:.decimals$}"));
    let parts = [
        found["at"].as_i64().map(when),
        found["rows"].as_str().map(|rows| format!("on {rows}")),
        number(&found["preferences"]["accuracy"]["share"], 3).map(|share| format!("accuracy {share}")),
        number(&found["duel"]["win_rate"], 3)
            .map(|rate| format!("win rate {rate} against {} by {}", text_of(&found["against"]), text_of(&found["judge"]))),
        number(&found["text_drift"], 4).map(|drift| format!("loss on text {drift}")),
        found["gates"]["passed"]
            .as_bool()
            .map(|passed| if passed { "gates passed".to_owned() } else { "refused by the gates".to_owned() }),
        found["report"].as_str().map(str::to_owned),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}

/// What is said of an adapter that is kept now.
pub(super) fn registered(adapter: &RegisteredAdapter) -> String {
    format!("{} is registered for {}, as a {}", adapter.reference(), adapter.base, adapter.state.as_str())
}

fn told_served(adapter: &RegisteredAdapter, retired: &[RegisteredAdapter]) {
    say(&format!("{} is to be served; a running server follows within two seconds", adapter.reference()));
    for other in retired {
        say(&format!("{} is retired", other.reference()));
    }
}

/// A model as `serve --model` takes it; without one, those that `serve` would serve.
fn models(config: &Config, named: Option<&str>) -> Result<Vec<ModelSpec>, ConfigError> {
    match named {
        Some(text) => model_spec::resolve_all(&[(text.to_owned(), Origin::Flag("base"))], &config.data),
        None => config.resolve_models(),
    }
}

/// The base model of an adapter: the one that is named, else the model of the name that the adapter was registered for.
pub(super) fn base_of(config: &Config, adapter: &RegisteredAdapter, named: Option<&str>) -> Result<ModelSpec, ConfigError> {
    let of_name = models(config, named).ok().and_then(|models| models.into_iter().find(|model| model.name == adapter.base));
    match of_name {
        Some(model) => Ok(model),
        // Called otherwise here, or pulled under this name.
        None => Ok(models(config, Some(named.unwrap_or(&adapter.base)))?.remove(0)),
    }
}

async fn import(registry: &Registry, config: &Config, args: &ImportArgs) -> Result<(), AdapterCommandError> {
    let models = models(config, args.base.as_deref())?;
    let Some(model) = models.first() else { return Err(StoreCommandError::Usage("no model was found".to_owned()).into()) };
    let files = ModelFiles::open(&model.path)?;
    let base = match args.any_base {
        false => Base::of(&model.name, &files),
        true => Base { config: Some(files.config().clone()), ..Base::named(&model.name) },
    };
    let adapter = match args.folder.join(LINEAGE).is_file() {
        true if args.dataset.is_some() || args.parent.is_some() => {
            let text = "the training's lineage.json says what --dataset and --parent would say; leave them out";
            return Err(StoreCommandError::Usage(text.to_owned()).into());
        }
        true => registry.register_training(&args.folder, &args.name, base, None).await?,
        false => {
            let lineage = Lineage {
                snapshot: args.dataset.clone(),
                parent: args.parent.clone(),
                code_version: "unknown".to_owned(),
                ..Lineage::new(&args.name, base)
            };
            registry.register(&args.folder, lineage).await?
        }
    };
    say(&registered(&adapter));
    if args.serve {
        let (adapter, retired) = registry.serve(&adapter.id.to_string(), false).await?;
        told_served(&adapter, &retired);
    }
    Ok(())
}

async fn merged(registry: &Registry, config: &Config, args: &MergeArgs) -> Result<(), AdapterCommandError> {
    let registered = registry.get(&args.one.adapter).await?;
    let adapter = registry.open(&registered).await?;
    let model = base_of(config, &registered, args.base.as_deref())?;
    let base = ModelFiles::open(&model.path)?;
    if registered.base_hash.as_ref().is_some_and(|hash| *hash != base.digest()) {
        let _ = writeln!(
            std::io::stderr(),
            "note: {} are other weights than those that the adapter was registered with; where they are the same model in another form, that is fine",
            model.path.display()
        );
    }
    let container = if is_gguf(&args.out) { Container::Gguf } else { Container::Safetensors };
    let storage = args.dtype.as_deref().map(|text| choice(text, &FORMATS)).transpose();
    let storage = storage.map_err(|why| StoreCommandError::Usage(format!("--dtype: {why}")))?;
    let options = MergeOptions { container, storage, files_from: args.files_from.clone() };
    let written = merge(&base, &adapter, &args.out, &options)?;
    let size = written.bytes as f64 / 1e6;
    say(&format!("{} matrices merged; {} ({size:.0} MB)", written.matrices, args.out.display()));
    Ok(())
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"))
}

const FORMATS: [(&str, Format); 6] = [
    ("f32", Format::F32),
    ("f16", Format::F16),
    ("bf16", Format::Bf16),
    ("q8_0", Format::Q8_0),
    ("q4_1", Format::Q4_1),
    ("q4_0", Format::Q4_0),
];

fn say(text: &str) {
    // A closed standard output is no reason to fail: the work is done.
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_an_adapter_is_shown() {
        let adapter = RegisteredAdapter {
            name: "support".into(),
            generation: 7,
            base: "b".into(),
            lineage: serde_json::json!({"dataset": "thumbs@2", "raters": ["ann", "bob"], "config": {"method": "dpo"}}),
            metrics: serde_json::json!({"eval_loss": 0.5, "evaluation": {
                "at": 0, "rows": "thumbs@2", "preferences": {"accuracy": {"share": 0.75}}, "against": "base", "judge": "json",
                "duel": {"win_rate": 0.625}, "gates": {"passed": false},
            }}),
            tainted: Some(serde_json::json!({"reason": "erasure"})),
            ..RegisteredAdapter::default()
        };
        let alias = |name: &str, adapter| Alias { base: "b".into(), name: name.into(), adapter, updated: 0 };
        let aliases = [alias("champion", adapter.id), alias("other", uuid::Uuid::max())];
        let text = described(&adapter, &aliases);
        for part in [
            "support@0000000000000007",
            "champion\n",
            "thumbs@2",
            "raters       2",
            "\"dpo\"",
            "erasure",
            "metrics      {\"eval_loss\":0.5}",
            "1970-01-01 00:00, on thumbs@2, accuracy 0.750, win rate 0.625 against base by json, refused by the gates",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("other"), "{text}");
    }
}
