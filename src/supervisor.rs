//! Keeps a child running: loads its module, starts it, and starts it again when it has ended.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_lock::Semaphore;
use async_std::future::timeout;
use event_listener::{Event, listener};
use futures::future::{Either, select};
use thiserror::Error;

use crate::artifact::ArtifactError;
use crate::backoff::Backoff;
use crate::cache::{Cache, LARGE_MODULE_BYTES};
use crate::child::{Child, Source};
use crate::download::{DownloadError, Downloader};
use crate::guest::{Ended, Program};
use crate::worker::{Running, Workers};

/// The pause before a child is started again: doubles from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(5 * 60);
/// After that long, a child that has not slept yet no longer keeps others from starting.
const LONGEST_START: Duration = Duration::from_secs(2);
/// A life of that length makes up for all failures before it.
const HEALTHY_LIFE: Duration = Duration::from_secs(10 * 60);

/// Tells everybody, once, that the process is to end.
#[derive(Debug, Default)]
pub struct Shutdown {
    grace_end: OnceLock<Instant>,
    begun: Event,
}

impl Shutdown {
    /// Begins the end, which children may take until `grace_end` for.
    pub fn begin(&self, grace_end: Instant) {
        if self.grace_end.set(grace_end).is_ok() {
            self.begun.notify(usize::MAX);
        }
    }

    /// Waits for the beginning; returns the end of the grace period.
    pub async fn wait(&self) -> Instant {
        loop {
            listener!(self.begun => begun);
            if let Some(grace_end) = self.grace_end.get() {
                return *grace_end;
            }
            begun.await;
        }
    }
}

/// Why a module cannot be had.
#[derive(Debug, Error)]
enum LoadError {
    #[error("{from}: {source}")]
    Read {
        from: String,
        source: std::io::Error,
    },
    #[error("{from}: {source}")]
    Download { from: String, source: DownloadError },
    #[error("{from}: looking at it panicked; please report this")]
    Panic { from: String },
    #[error("{from} {source}")]
    Artifact { from: String, source: ArtifactError },
}

/// What supervisors share.
pub struct Supervisor {
    /// Compiled modules.
    pub cache: Cache,
    /// Modules from elsewhere.
    pub downloader: Downloader,
    /// Where children run.
    pub workers: Workers,
    /// The end of it all.
    pub shutdown: Shutdown,
    /// Children that start at a time: what they need until they sleep for the first time is to be
    /// used by the next ones.
    pub starting: Arc<Semaphore>,
    /// Modules that are read, checked or compiled at a time.
    pub loading: Semaphore,
    /// The same for large ones, which take minutes: small ones do not wait for them.
    pub loading_large: Semaphore,
}

impl Supervisor {
    /// Runs a child until the shutdown, through all its lives.
    pub async fn run(self: Arc<Self>, child: Arc<Child>) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut program: Option<Program> = None;
        loop {
            let started = Instant::now();
            let failure = match self.clone().one_life(&child, &mut program).await {
                Life::Over => return,
                Life::Failed(reason) => reason,
            };
            if started.elapsed() >= HEALTHY_LIFE {
                backoff.reset();
            }
            let pause = backoff.wait();
            log::warn!(target: &child.name, "{failure}; starting again in {:.1} s", pause.as_secs_f64());
            if timeout(pause, self.shutdown.wait()).await.is_ok() {
                return;
            }
        }
    }

    async fn one_life(self: Arc<Self>, child: &Arc<Child>, program: &mut Option<Program>) -> Life {
        let loaded = match program {
            Some(program) => program.clone(),
            None => {
                match timeout_by(Box::pin(self.clone().load(child.clone())), &self.shutdown).await {
                    Some(Ok(loaded)) => program.insert(loaded).clone(),
                    Some(Err(error)) => return Life::Failed(error.to_string()),
                    None => return Life::Over,
                }
            }
        };
        if self.shutdown.grace_end.get().is_some() {
            return Life::Over;
        }
        let Some(place) = timeout_by(self.starting.acquire_arc(), &self.shutdown).await else {
            return Life::Over;
        };
        let Some(mut running) = self.workers.run(child.clone(), loaded) else {
            return Life::Over;
        };
        log::debug!(target: &child.name, "started");
        let session = running.session.clone();
        async_std::task::spawn(async move {
            // One that stays busy keeps nobody waiting for long.
            let _ = timeout(LONGEST_START, session.settled()).await;
            drop(place);
        });
        let ended = match select(&mut running.ended, Box::pin(self.shutdown.wait())).await {
            Either::Left((ended, _)) => ended,
            Either::Right((grace_end, _)) => {
                stop(&mut running, grace_end).await;
                return Life::Over;
            }
        };
        if matches!(ended, Ok(Ended::Instantiation(_))) {
            // Something may be wrong with the artifact: have it looked at again.
            *program = None;
        }
        match ended {
            Ok(ended) => Life::Failed(ended.to_string()),
            Err(_) => Life::Failed("its worker is gone".into()),
        }
    }

    /// Reads or fetches, checks and compiles a child's module.
    async fn load(self: Arc<Self>, child: Arc<Child>) -> Result<Program, LoadError> {
        let from = child.wasm.to_string();
        let fetched = match &child.wasm {
            Source::File(_) => None,
            Source::Url { url, sha256 } => {
                Some(self.downloader.fetch(url, sha256).await.map_err(|source| {
                    LoadError::Download {
                        from: from.clone(),
                        source,
                    }
                })?)
            }
        };
        // Each holds a whole module in memory and a thread.
        let bytes = match (&fetched, &child.wasm) {
            (Some(wasm), _) => wasm.len() as u64,
            // What cannot be looked at is said when it is read.
            (None, Source::File(path)) => std::fs::metadata(path).map_or(0, |file| file.len()),
            (None, Source::Url { .. }) => 0,
        };
        let places = if bytes >= LARGE_MODULE_BYTES {
            &self.loading_large
        } else {
            &self.loading
        };
        let _place = places.acquire().await;
        let this = self.clone();
        // Compiling takes seconds.
        async_std::task::spawn_blocking(move || {
            // A module may hit a fault of the parser, which must not be the end of all.
            let compiled = catch_unwind(AssertUnwindSafe(|| this.compile(&child, fetched)));
            compiled.unwrap_or_else(|_| Err(LoadError::Panic { from }))
        })
        .await
    }

    fn compile(&self, child: &Child, fetched: Option<Vec<u8>>) -> Result<Program, LoadError> {
        let from = child.wasm.to_string();
        let wasm = match (fetched, &child.wasm) {
            (Some(wasm), _) => wasm,
            (None, Source::File(path)) => {
                std::fs::read(path).map_err(|source| LoadError::Read {
                    from: from.clone(),
                    source,
                })?
            }
            (None, Source::Url { .. }) => Vec::new(),
        };
        let artifact = self
            .cache
            .artifact(&child.name, &wasm)
            .map_err(|source| LoadError::Artifact { from, source })?;
        if let Some(obstacle) = artifact.shape().state.obstacle
            && child.hibernation.allowed
        {
            log::warn!(target: &child.name, "stays in memory when it is idle, because its module {obstacle} (`hibernate: never` says that you know)");
        }
        Ok(Program { artifact })
    }
}

/// The result of `work`, or `None` when the shutdown comes first.
async fn timeout_by<T>(work: impl Future<Output = T>, shutdown: &Shutdown) -> Option<T> {
    match select(pin!(work), pin!(shutdown.wait())).await {
        Either::Left((result, _)) => Some(result),
        Either::Right(_) => None,
    }
}

enum Life {
    /// The shutdown has come.
    Over,
    /// It ended, or did not even begin.
    Failed(String),
}

/// Asks a guest to end, and ends it when it takes too long.
async fn stop(running: &mut Running, grace_end: Instant) {
    let child = running.session.child.clone();
    running.session.stop(grace_end);
    let grace = grace_end.saturating_duration_since(Instant::now());
    match timeout(grace, &mut running.ended).await {
        // 143 is what a program that listens for no signal ends with at SIGTERM.
        Ok(Ok(Ended::Stopped | Ended::Exit(0 | 143))) => {
            log::debug!(target: &child.name, "stopped")
        }
        Ok(Ok(ended)) => log::warn!(target: &child.name, "{ended} while stopping"),
        Ok(Err(_)) => log::warn!(target: &child.name, "its worker is gone"),
        Err(_) => {
            log::warn!(target: &child.name, "did not stop within the grace period, and is dropped");
            running.drop_instance();
        }
    }
}
