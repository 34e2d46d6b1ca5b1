//! Puts the parts together, and takes them apart again when the process is to end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_global_executor::GlobalExecutorConfig;
use async_lock::Semaphore;
use async_signal::{Signal, Signals};
use futures::StreamExt;
use futures::future::select;
use futures::stream::FuturesUnordered;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;

use crate::api::{Api, ConnectError};
use crate::artifact::ArtifactError;
use crate::cache::Cache;
use crate::certificates::{CertificateError, Certificates};
use crate::cli::{CacheOptions, RunOptions};
use crate::compile::Compiler;
use crate::config;
use crate::guest::Services;
use crate::hibernation::Hibernation;
use crate::loader::Loader;
use crate::prediction::{self, Predictor};
use crate::region::keep_memory_together;
use crate::residency::Residency;
use crate::snapshot::Snapshots;
use crate::supervisor::{Shutdown, Supervisor};
use crate::timers::Timers;
use crate::wasi::Wasi;
use crate::watchdog::Watchdog;
use crate::worker::Workers;
use crate::{predictor, serve};

/// Name directories where the options do not.
const CACHE_VARIABLE: &str = "WASM_OPERATOR_CACHE_DIR";
const PREDICTION_VARIABLE: &str = "PREDICTION_SERVER";
const SNAPSHOT_VARIABLE: &str = "WASM_OPERATOR_SNAPSHOT_DIR";

/// How many children start at a time.
const STARTING_PER_WORKER: usize = 32;

/// A thread that does HTTP and TLS keeps that many workers busy: a child's own code takes several
/// times as long. More threads than that only wake each other up (BENCHMARKS.md, "Go operators").
const WORKERS_PER_NETWORK_THREAD: usize = 4;

/// Prepares the process for many children: where its memory comes from, and async-std's threads, fewer
/// than it would start by itself. `$ASYNC_STD_THREAD_COUNT` has precedence, as ever.
pub fn prepare(options: &RunOptions) {
    keep_memory_together();
    let threads = options
        .workers
        .unwrap_or_else(cores)
        .div_ceil(WORKERS_PER_NETWORK_THREAD);
    let config = GlobalExecutorConfig::default()
        .with_env_var("ASYNC_STD_THREAD_COUNT")
        .with_min_threads(threads)
        .with_thread_name_fn(|| "network".into());
    async_global_executor::init_with_config(config);
}

/// Why the parent operator does not run.
#[derive(Debug, Error)]
pub enum OperatorError {
    /// No way to the API server.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// None of the configured children can be used.
    #[error("no child in {} can be started", .0.display())]
    NoChild(PathBuf),
    /// Files of children.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// Some modules are not as they should be.
    #[error("{0} of them cannot be used")]
    NotCompiled(usize),
    /// The artifact cache.
    #[error(transparent)]
    Cache(#[from] ArtifactError),
    /// The directory for snapshots.
    #[error("snapshot directory {path}: {source} (choose another with --snapshot-dir)")]
    SnapshotDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        source: std::io::Error,
    },
    /// The variable that names a prediction server.
    #[error("{PREDICTION_VARIABLE}: {0}")]
    PredictionServer(String),
    /// Threads or signal handlers cannot be had.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
}

/// Runs the children of a directory until SIGTERM or SIGINT.
///
/// # Errors
/// [`OperatorError`], when it cannot start.
pub async fn run(options: RunOptions) -> Result<(), OperatorError> {
    let system = |what| move |source| OperatorError::System { what, source };
    raise_descriptor_limit();
    if cfg!(feature = "without-checks") {
        log::warn!("built without checks, for a benchmark: no guest can be stopped");
    }
    let signals = Signals::new([Signal::Term, Signal::Int]).map_err(system("signal handlers"))?;
    let api = Api::connect(options.context.as_deref()).await?;
    let directory = options.directory;
    let (children, problems) = config::load(&directory, api.default_namespace());
    for problem in &problems {
        log::error!("{problem}");
    }
    if children.is_empty() {
        return Err(OperatorError::NoChild(directory));
    }
    let cache = open_cache(CacheOptions {
        cache_dir: options.cache_dir,
        cache_budget: options.cache_budget,
    })?;
    let snapshot_directory = chosen(options.snapshot_dir, SNAPSHOT_VARIABLE)
        .unwrap_or_else(|| cache.directory().join("snapshots"));
    let snapshots = Snapshots::open(&snapshot_directory).map_err(|source| {
        OperatorError::SnapshotDirectory {
            path: snapshot_directory,
            source,
        }
    })?;
    let prediction_server = match options.prediction_server {
        Some(server) => server,
        None => {
            let server = std::env::var(PREDICTION_VARIABLE).unwrap_or_default();
            prediction::server(&server).map_err(OperatorError::PredictionServer)?
        }
    };
    if let Some(address) = options.metrics_listen {
        let listener = serve::listen(address).await.map_err(system("metrics"))?;
        let address = listener.local_addr().map_err(system("metrics"))?;
        log::info!("metrics at http://{address}/metrics");
        async_std::task::spawn(serve::serve(listener, serve::metrics));
    }
    let services = Arc::new(Services {
        certificates: Certificates::make(api.authorities())?,
        api,
        watchdog: Watchdog::default(),
        wasi: Wasi::default(),
        hibernation: Hibernation::new(snapshots),
        predictor: Predictor::new(prediction_server),
    });
    let timers = Arc::new(Timers::default());
    let residency = Arc::new(Residency::new(options.memory_budget));
    let worker_count = options.workers.unwrap_or_else(cores);
    let workers = Workers::start(worker_count, &services, &timers, &residency)
        .map_err(system("worker threads"))?;
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    let hibernation = services.clone();
    thread("hibernation")
        .spawn(move || hibernation.hibernation.run())
        .map_err(system("hibernation thread"))?;
    thread("watchdog")
        .spawn(move || services.watchdog.run())
        .map_err(system("watchdog thread"))?;
    async_std::task::spawn(async move { timers.run().await });
    async_std::task::spawn(async move { residency.run().await });
    log::info!(
        "wasm-operator {} runs {} of {}, {}",
        env!("CARGO_PKG_VERSION"),
        counted(children.len(), "child", "children"),
        directory.display(),
        counted(worker_count, "worker", "workers"),
    );
    let supervisor = Arc::new(Supervisor {
        loader: Arc::new(Loader::new(cache, cores())),
        workers,
        shutdown: Shutdown::default(),
        starting: Arc::new(Semaphore::new(STARTING_PER_WORKER * worker_count)),
    });
    let grace = Duration::from_secs(options.grace_period);
    async_std::task::spawn(obey(signals, supervisor.clone(), grace));
    let lives: FuturesUnordered<_> = children
        .into_iter()
        .map(|child| async_std::task::spawn(supervisor.clone().run(Arc::new(child))))
        .collect();
    lives.for_each(|()| std::future::ready(())).await;
    log::info!("all children have stopped");
    Ok(())
}

/// Compiles the modules of a directory's children, so that their first start finds them compiled.
///
/// # Errors
/// [`OperatorError`]: all modules are tried first.
pub async fn compile(directory: PathBuf, options: CacheOptions) -> Result<(), OperatorError> {
    let (children, problems) = config::load(&directory, "default");
    for problem in &problems {
        log::error!("{problem}");
    }
    let loader = Arc::new(Loader::new(open_cache(options)?, cores()));
    let mut failed = problems.len();
    for child in children.into_iter().map(Arc::new) {
        match loader.clone().load(child.clone()).await {
            Ok(_) => log::info!(target: &child.name, "is compiled"),
            Err(error) => {
                failed += 1;
                log::error!(target: &child.name, "{error}");
            }
        }
    }
    match failed {
        0 => Ok(()),
        failed => Err(OperatorError::NotCompiled(failed)),
    }
}

fn open_cache(options: CacheOptions) -> Result<Cache, OperatorError> {
    let cache = match chosen(options.cache_dir, CACHE_VARIABLE) {
        Some(chosen) => Cache::open(&chosen, Compiler::Process)?,
        None => Cache::open_default(Compiler::Process)?,
    };
    Ok(cache.with_budget(options.cache_budget))
}

/// An option's value, or that of an environment variable. Not left to clap: one with an environment
/// variable would count as given everywhere.
fn chosen(option: Option<PathBuf>, variable: &str) -> Option<PathBuf> {
    option.or_else(|| Some(std::env::var_os(variable)?.into()))
}

/// Runs a prediction server until SIGTERM or SIGINT.
///
/// # Errors
/// [`OperatorError::System`], when it cannot listen there.
pub async fn predictor(address: SocketAddr) -> Result<(), OperatorError> {
    let system = |what| move |source| OperatorError::System { what, source };
    let mut signals =
        Signals::new([Signal::Term, Signal::Int]).map_err(system("signal handlers"))?;
    let listener = serve::listen(address).await.map_err(system("listening"))?;
    let address = listener.local_addr().map_err(system("listening"))?;
    log::info!("predictions at http://{address}/prediction");
    let serving = Box::pin(serve::serve(listener, predictor::answer));
    select(signals.next(), serving).await;
    Ok(())
}

/// Every sleeping child has an open file, so the soft limit (1,024 on most systems) is soon in the
/// way; the hard limit is the administrator's word.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!("open files are limited to {:?}: {error}", limit.current);
    }
}

fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The first signal begins the shutdown, the second one ends the process at once.
async fn obey(mut signals: Signals, supervisor: Arc<Supervisor>, grace: Duration) {
    let mut first = true;
    while let Some(signal) = signals.next().await {
        let Ok(signal) = signal else { continue };
        if first {
            let seconds = grace.as_secs();
            log::info!(
                "{signal:?}: stopping; children have {seconds} s, a second signal ends at once"
            );
            supervisor.shutdown.begin(Instant::now() + grace);
            first = false;
        } else {
            log::warn!("{signal:?} again: ending at once");
            // 128 + the signal's number, as shells report it.
            std::process::exit(128 + signal as i32);
        }
    }
}
