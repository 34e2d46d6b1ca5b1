//! What the benchmarks share.
//!
//! - [`options`]: what their scripts tell them, and the machine they run on.
//! - [`cluster`]: a control plane of their own, and rings of namespaces in it.
//! - [`parent`]: the parent operator as a process, its log and its metrics.
//! - [`modules`]: copies of a module, each unlike all others.
//! - [`process`]: processes that end with the benchmark, and what they use.
//! - [`settled`]: their memory over time.
//! - [`waking`]: a child that is put to sleep and woken again and again.
//! - [`statistics`](mod@statistics): quantiles.
//! - [`plot`]: memory against N, as SVG.

pub mod cluster;
pub mod modules;
pub mod options;
pub mod parent;
pub mod plot;
pub mod process;
pub mod settled;
pub mod statistics;
pub mod waking;

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Tells whoever waits where the benchmark is. The results alone go to stdout.
pub fn say(what: impl std::fmt::Display) {
    eprintln!("bench: {what}");
}

/// Nothing that a benchmark waits for may stand still for that long.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Notices when nothing happens any more.
#[derive(Debug)]
pub struct Patience<T> {
    seen: Option<T>,
    since: Instant,
}

impl<T> Default for Patience<T> {
    fn default() -> Self {
        Self {
            seen: None,
            since: Instant::now(),
        }
    }
}

impl<T: PartialEq> Patience<T> {
    /// Takes what the progress is measured by.
    ///
    /// # Errors
    /// When that has been the same for [`PATIENCE`].
    pub fn check(&mut self, what: &str, progress: T) -> Result<()> {
        if self.seen.as_ref() != Some(&progress) {
            self.seen = Some(progress);
            self.since = Instant::now();
        } else if self.since.elapsed() > PATIENCE {
            bail!("no progress for {} s: {what}", PATIENCE.as_secs());
        }
        Ok(())
    }
}

/// Runs a benchmark until it ends or is told to (Ctrl-C, SIGTERM, SIGHUP): its future is dropped
/// then, and with it every process it has started.
///
/// # Errors
/// The benchmark's, or that it was interrupted.
pub async fn until_interrupted<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let listen = |kind| signal(kind).context("signal handlers");
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hang_up = listen(SignalKind::hangup())?;
    tokio::select! {
        result = work => result,
        _ = interrupt.recv() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
        _ = hang_up.recv() => bail!("the terminal is gone"),
    }
}
