//! `tidemill serve`

mod args;

use crate::adapters::AdapterKeeper;
use crate::batches::Batches;
use crate::cli::banner;
use crate::cli::shutdown::{Ended, leave_in_good_order};
use crate::clock;
use crate::config::{Config, ConfigError, ModelSpec};
use crate::datasets::DatasetJobs;
use crate::fine_tuning::{FineTuning, FineTuningOptions, take_back};
use crate::flywheel::{FlywheelOptions, Flywheels, planned_rollout};
use crate::http::drain::Drain;
use crate::http::limits::BodyLimits;
use crate::http::responses::background::Background;
use crate::http::server::Server;
use crate::http::tls::{Tls, TlsError};
use crate::http::{App, Auth};
use crate::limits::Limiter;
use crate::rollout::assignment::Holdout;
use crate::rollout::keeper::{Keeper, KeeperRules, declared};
use crate::rollout::scorer::Scorer;
use crate::telemetry::{self, Observer, TelemetryError};
use crate::upstream::remote::RemoteError;
use crate::upstream::{LocalModel, Registry, RemoteModel, Upstream};
use metrics_exporter_prometheus::PrometheusHandle;
use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidemill_engine::{AdapterRefused, Engine, StartError};
use tidemill_kernels::cuda::driver;
use tidemill_store::{DataDir, Files, Retention, Store, StoreOptions};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

pub use args::ServeArgs;

/// Why the server did not start or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// Logs or metrics could not be set up.
    #[error("{0}")]
    Telemetry(#[from] TelemetryError),
    /// The data directory is taken or unwritable.
    #[error("{0}")]
    Store(#[from] tidemill_store::StoreError),
    /// Others could reach it, and nobody would be asked who they are.
    #[error(
        "there is no API key yet, so this server may only listen on this machine, not on {0}; make a key with `tidemill key create --name NAME --scope chat,feedback`, or leave out --host"
    )]
    NoKey(IpAddr),
    /// The certificate cannot be used.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// The system gives no threads.
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
    /// The system does not say which program this is, and fine-tuning jobs are run by it.
    #[error("cannot tell where this program lies: {0}; see that /proc is there")]
    Program(std::io::Error),
    /// The testers' secret cannot be read.
    #[error("cannot read the testers' secret from {}: {source}; see --tester-secret-file", path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The address is taken or not ours.
    #[error("cannot listen on {address}: {source}; choose another --port or --host")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// A card cannot be had back from a training.
    #[error("cannot see in {} whether a training of an earlier server has a card: {source}", folder.display())]
    Turn {
        /// The data directory.
        folder: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A model cannot be loaded.
    #[error("cannot load the model `{name}`: {source}")]
    Load {
        /// Which.
        name: String,
        /// Why not, and the next step.
        source: StartError,
    },
    /// An adapter cannot be loaded.
    #[error("cannot load the adapter `{name}`: {source}")]
    Adapter {
        /// As it was given.
        name: String,
        /// Why not, and the next step.
        source: Box<AdapterRefused>,
    },
    /// A remote model cannot be asked.
    #[error("{0}")]
    Remote(#[from] RemoteError),
    /// A fault of ours while loading.
    #[error("loading broke off because of an internal error, reported above; please tell us which model it was")]
    Loader,
}

/// Starts the server and returns when it has left in good order.
pub fn run(args: &ServeArgs) -> Result<(), ServeError> {
    let config = Config::load(args.to_layer(), args.config.as_deref(), utf8_environment())?;
    telemetry::init_logs(&config.log, config.log_format)?;
    let metrics = telemetry::init_metrics()?;
    let spans = match &config.otlp_endpoint {
        Some(endpoint) => telemetry::exporting(endpoint, config.trace_share).map_err(TelemetryError::from)?,
        None => telemetry::silent(),
    };
    let observer = Observer::new(spans, config.log_content);
    let models = config.resolve_models()?;
    training_card(&config)?;
    let _lock = DataDir::new(&config.data).lock()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(network_threads())
        .thread_name("tidemill-net")
        .enable_all()
        .build()
        .map_err(ServeError::Threads)?;
    let result = runtime.block_on(async {
        let app = open(&config, &models, metrics, observer.clone()).await?;
        let (store, datasets, batches) = (app.store.clone(), app.datasets.clone(), app.batches.clone());
        let fine_tuning = app.fine_tuning.clone();
        let limits = Arc::clone(&app.limits);
        tokio::spawn(batches.clone().run(app.clone(), config.retention_age));
        let loops = app.loops.clone();
        tokio::spawn(fine_tuning.clone().run(app.clone()));
        tokio::spawn(loops.clone().run(app.clone()));
        let rollouts = app.rollouts.clone();
        let result = serve(config, models, app).await;
        loops.close().await;
        rollouts.close().await;
        batches.close().await;
        fine_tuning.close().await;
        datasets.close().await;
        if let Err(error) = limits.ledger().flush().await {
            tracing::error!(%error, "what keys have used in the last moment is lost");
        }
        // Last of all: answers that were cut off on the way out are records, too.
        store.close().await;
        result
    });
    observer.close();
    // Work that nobody waits for any more must not hold up the exit.
    runtime.shutdown_background();
    result
}

/// Opens the store and puts together what handlers see.
async fn open(config: &Config, models: &[ModelSpec], metrics: PrometheusHandle, observer: Observer) -> Result<App, ServeError> {
    let data = DataDir::new(&config.data);
    let retention = Retention { max_age: config.retention_age, max_bytes: config.retention_size };
    let defaults = StoreOptions::new(data);
    let options = StoreOptions { url: config.database.clone(), spill_bytes: config.spill_size, retention, ..defaults };
    let store = Store::open(options).await?;
    let has_key = store.any_key().await?;
    if !has_key && !config.host.is_loopback() {
        return Err(ServeError::NoKey(config.host));
    }
    let files = Files::open(&store, &DataDir::new(&config.data)).await?;
    let remotes = RemoteModel::all(&config.remotes, clock::seconds())?;
    let registry = Arc::new(Registry::new(models.iter().map(|model| model.name.clone())).with_remotes(remotes));
    let adapters = AdapterKeeper::new(&store, &DataDir::new(&config.data), Arc::clone(&registry));
    let feedback_metrics = Arc::new(config.metrics.clone());
    let holdouts = config.holdout.iter().map(|(name, share)| Holdout::new(name, *share)).collect();
    let rules = KeeperRules { holdouts, four_eyes: config.four_eyes, recording: config.recording.clone() };
    let rollouts = Keeper::with_rules(&store, Arc::clone(&registry), adapters.clone(), Arc::clone(&feedback_metrics), rules);
    // Before the first request: what was promoted is what the names serve.
    rollouts.follow().await?;
    Ok(App {
        adapters,
        registry,
        drain: Drain::default(),
        origins: config.origins.clone(),
        body: BodyLimits { bytes: config.max_body, time: config.body_timeout },
        observer,
        metrics: Some(metrics),
        auth: Auth::with_grace(store.clone(), has_key, config.auth_grace),
        limits: Arc::new(Limiter::new(store.clone(), config.model_limits.clone(), config.prices.clone())),
        datasets: DatasetJobs::new(store.clone(), &config.datasets_root()),
        files,
        file_limits: config.file_limits,
        batches: Batches::new(&store),
        loops: Flywheels::new(&store, flywheel_options(config, models)?),
        fine_tuning: FineTuning::new(&store, fine_tuning_options(config, models)?),
        store,
        background: Background::default(),
        recording: Arc::new(config.recording.clone()),
        feedback_metrics,
        rollouts,
        tester_secret: tester_secret(config)?,
    })
}

/// What testers send; a file without any text lets nobody in.
fn tester_secret(config: &Config) -> Result<Option<Arc<str>>, ServeError> {
    let Some(path) = &config.tester_secret_file else { return Ok(None) };
    let text = std::fs::read_to_string(path).map_err(|source| ServeError::Secret { path: path.clone(), source })?;
    Ok(Some(text.trim()).filter(|secret| !secret.is_empty()).map(Arc::from))
}

/// Whether the card is there that jobs are to train on, before anybody makes one.
fn training_card(config: &Config) -> Result<(), ServeError> {
    let Some(card) = config.training_device.card() else { return Ok(()) };
    driver::check_card(card).map_err(|error| {
        // The driver speaks of the device that serves, which has no part in this.
        let error = error.to_string().replace("--device", "--training-device");
        let fix = "for trainings on the processor leave `training_device` out";
        ServeError::Config(ConfigError::Value { place: "`training_device`".to_owned(), message: format!("{error}; {fix}") })
    })
}

/// How jobs train: by this very program, beside a server that needs the other half of the cores.
fn fine_tuning_options(config: &Config, models: &[ModelSpec]) -> Result<FineTuningOptions, ServeError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(FineTuningOptions {
        root: DataDir::new(&config.data).root().join("fine_tuning"),
        program: std::env::current_exe().map_err(ServeError::Program)?,
        jobs: config.training_jobs,
        jobs_per_key: config.training_jobs_per_key,
        threads: config.training_threads.unwrap_or((cores / 2).max(1)),
        device: config.training_device.clone(),
        priority: config.training_priority,
        data: config.data.clone(),
        models: models.iter().map(|model| (model.name.clone(), model.path.clone())).collect(),
    })
}

/// What loops do, with the means of the fine-tuning jobs. What they name must be there before anybody waits for it.
fn flywheel_options(config: &Config, models: &[ModelSpec]) -> Result<FlywheelOptions, ServeError> {
    for (name, policy) in &config.loops {
        let wrong = |field: &str, message: String| {
            ServeError::Config(ConfigError::Value { place: format!("`loop.{name}.{field}`"), message })
        };
        if !models.iter().any(|model| model.name == policy.base) {
            let served: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
            let message = format!("`{}` is no model that is served here; name one of {}", policy.base, served.join(", "));
            return Err(wrong("base", message));
        }
        if let Some(text) = &policy.measuring.text
            && let Err(error) = std::fs::metadata(text)
        {
            return Err(wrong("evaluate.text", format!("cannot read `{text}`: {error}; name a file of ordinary text")));
        }
        let rollout = planned_rollout(policy, name).map_err(|error| wrong("rollout", error.message))?;
        if let Err(error) = declared(&rollout, &config.metrics) {
            return Err(wrong("rollout.metrics", error.to_string()));
        }
    }
    let FineTuningOptions { program, threads, device, priority, models, .. } = fine_tuning_options(config, models)?;
    Ok(FlywheelOptions {
        policies: config.loops.clone(),
        root: config.data.join("loops"),
        program,
        threads,
        device,
        priority,
        models,
        data: config.data.clone(),
        database: config.database.clone(),
        datasets: config.datasets_root(),
    })
}

/// Variables that are text; others cannot be ours.
pub(super) fn utf8_environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
}

/// Few: they parse, render and copy; the cores belong to the engine.
fn network_threads() -> usize {
    match std::thread::available_parallelism().map_or(1, usize::from) {
        0..=4 => 1,
        5..=16 => 2,
        _ => 4,
    }
}

async fn serve(config: Config, models: Vec<ModelSpec>, app: App) -> Result<(), ServeError> {
    let tls = config.tls.as_ref().map(|(certificate, key)| Tls::open(certificate, key)).transpose()?;
    let address = SocketAddr::new(config.host, config.port);
    let listen = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    tracing::info!(%address, models = models.len(), "listening; loading models");
    let (failed, failure) = oneshot::channel();
    if let Some(tls) = &tls {
        tokio::spawn(tls.clone().keep_fresh());
    }
    let server = Server::new(listener, app.clone(), config.connections, tls);
    let drain_timeout = config.drain_timeout;
    let loader = {
        let (app, runtime) = (app.clone(), tokio::runtime::Handle::current());
        move || {
            let loaded = catch_unwind(AssertUnwindSafe(|| load_all(&config, &models, &app, address, &runtime)));
            if let Err(error) = loaded.unwrap_or(Err(ServeError::Loader)) {
                // The receiver is gone only when the server is leaving anyway.
                let _ = failed.send(error);
            }
        }
    };
    if let Some(metrics) = app.metrics.clone() {
        tokio::spawn(fold_metrics(metrics));
    }
    tokio::spawn(Arc::clone(app.limits.ledger()).keep_writing());
    tokio::spawn(crate::labeling::filler::keep_filling(app.clone()));
    tokio::spawn(app.adapters.clone().keep_following());
    tokio::spawn(app.rollouts.clone().keep_following());
    tokio::spawn(app.rollouts.clone().keep_leading());
    let scorer = Scorer::new(&app.store, Arc::clone(&app.registry), app.rollouts.clone(), app.drain.clone());
    tokio::spawn(scorer.keep_scoring());
    std::thread::Builder::new().name("tidemill-load".into()).spawn(loader).map_err(ServeError::Threads)?;
    let (ended, result) = oneshot::channel();
    let leave = async {
        let _ = ended.send(leave_in_good_order(&app, failure, drain_timeout).await);
    };
    server.run(leave).await;
    match result.await {
        Ok(Ended::LoadFailed(error)) => Err(error),
        Ok(Ended::Signal) | Err(_) => Ok(()),
    }
}

/// Histograms keep every sample until they are folded into buckets; without this, only a scrape would do it.
async fn fold_metrics(metrics: PrometheusHandle) {
    let mut every = tokio::time::interval(Duration::from_secs(5));
    loop {
        every.tick().await;
        metrics.run_upkeep();
    }
}

/// The adapter's name on the model `model`, if that is where it belongs: `MODEL:NAME`, and without a model the first.
fn own_adapter<'a>(name: &'a str, model: &str, models: &[ModelSpec]) -> Option<&'a str> {
    let of = |base: &str| name.strip_prefix(base).and_then(|rest| rest.strip_prefix(':'));
    match models.iter().find_map(|other| Some((&other.name, of(&other.name)?))) {
        Some((base, adapter)) => (base == model).then_some(adapter),
        None => models.first().is_some_and(|first| first.name == model).then_some(name),
    }
}

fn load_all(
    config: &Config,
    models: &[ModelSpec],
    app: &App,
    address: SocketAddr,
    runtime: &tokio::runtime::Handle,
) -> Result<(), ServeError> {
    let _turns =
        take_back(&config.data, &config.device).map_err(|source| ServeError::Turn { folder: config.data.clone(), source })?;
    for model in models {
        let start = Instant::now();
        let engine = Engine::start(config.engine_options(model, models.len()), &mut |_, _| {})
            .map_err(|source| ServeError::Load { name: model.name.clone(), source })?;
        let created = clock::seconds();
        for module in &config.lora_modules {
            let Some(adapter) = own_adapter(&module.name, &model.name, models) else { continue };
            // Who names it at start wants it to stay.
            engine
                .load_adapter(adapter, &module.path, true, created)
                .map_err(|source| ServeError::Adapter { name: module.name.clone(), source: Box::new(source) })?;
        }
        let loaded = LocalModel::new(engine, created).reading_as(config.parsers.of(&model.name));
        // The base is served all the same, and its adapters as soon as the store answers.
        if let Err(error) = runtime.block_on(app.adapters.prepare(&loaded)) {
            tracing::warn!(%error, "cannot see which adapters are to be served");
        }
        banner::loaded(&loaded, &model.path, start.elapsed());
        app.registry.loaded(&model.name, Upstream::Local(Arc::new(loaded)));
    }
    if let Some((first, _)) = app.registry.states().next() {
        banner::ready(first, address, app.auth.has_keys(), config.tls.is_some());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layer;

    #[test]
    fn a_card_for_trainings_that_is_not_there_ends_the_start_and_is_named_with_the_fix() {
        let checked = |device: &str| {
            let mut flags = Layer::default();
            flags.flag("training_device", Some(&device.to_owned()));
            training_card(&Config::load(flags, None, []).unwrap())
        };
        checked("cpu").unwrap();
        let refused = checked("cuda:4095").unwrap_err().to_string();
        assert!(refused.starts_with("`training_device`: no "), "{refused}");
        assert!(refused.contains("NVIDIA driver") && refused.contains("leave `training_device` out"), "{refused}");
        assert!(!refused.contains("--device"), "{refused}");
    }
}
