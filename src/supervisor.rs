//! Keeps a child running: has its module loaded, starts it, and starts it again when it has ended.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_lock::Semaphore;
use async_std::future::timeout;
use event_listener::{Event, listener};
use futures::future::{Either, select};

use crate::backoff::Backoff;
use crate::child::Child;
use crate::guest::{Ended, Program};
use crate::loader::Loader;
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

/// What supervisors share.
pub struct Supervisor {
    /// Their modules.
    pub loader: Arc<Loader>,
    /// Where children run.
    pub workers: Workers,
    /// The end of it all.
    pub shutdown: Shutdown,
    /// Children that start at a time: what they need until they sleep for the first time is to be
    /// used by the next ones.
    pub starting: Arc<Semaphore>,
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
                match timeout_by(
                    Box::pin(self.loader.clone().load(child.clone())),
                    &self.shutdown,
                )
                .await
                {
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
