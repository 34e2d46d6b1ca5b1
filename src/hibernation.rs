//! Saves the memories of children that go to sleep, on a thread of its own.
//!
//! A worker only takes the instance apart; writing 90 MiB would hold up its other children. Who
//! wants a child back before its snapshot is finished gets its memory as it is.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::metrics;
use crate::region::{Region, give_back_free_memory};
use crate::snapshot::{SaveError, Snapshot, Snapshots};

/// After a failure nobody is put to sleep for that long.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(30);
/// When nothing was saved for that long, free memory is given back to the system.
const QUIET: Duration = Duration::from_millis(200);

/// Where the memory of a sleeping child is.
#[derive(Debug)]
pub enum Saved {
    /// In a file.
    Snapshot(Snapshot),
    /// Still in memory.
    Region(Region),
}

#[derive(Debug, Default)]
enum Progress {
    Waiting(Region),
    Working,
    Done(Saved),
    #[default]
    Taken,
}

#[derive(Debug)]
struct Slot {
    child: String,
    since: Instant,
    /// Held for the time of an exchange.
    progress: Mutex<Progress>,
    done: Condvar,
    wanted_back: AtomicBool,
}

impl Slot {
    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A memory that is being saved, or was. Dropping it gives it up.
#[derive(Debug)]
pub struct Saving(Arc<Slot>);

impl Saving {
    /// A memory that nobody saves.
    pub fn in_memory(region: Region) -> Self {
        Self(Arc::new(Slot {
            child: String::new(),
            since: Instant::now(),
            progress: Mutex::new(Progress::Done(Saved::Region(region))),
            done: Condvar::new(),
            wanted_back: AtomicBool::new(false),
        }))
    }

    /// The memory, wherever it is by now. Waits for a few pages at most.
    pub fn take(self) -> Option<Saved> {
        self.0.wanted_back.store(true, Ordering::Release);
        let working = |progress: &mut Progress| matches!(progress, Progress::Working);
        let mut progress = self
            .0
            .done
            .wait_while(self.0.lock(), working)
            .unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *progress) {
            Progress::Waiting(region) => Some(Saved::Region(region)),
            Progress::Done(saved) => Some(saved),
            Progress::Working | Progress::Taken => None,
        }
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        self.0.wanted_back.store(true, Ordering::Release);
        let given_up = {
            let mut progress = self.0.lock();
            match *progress {
                Progress::Working => None,
                _ => Some(std::mem::take(&mut *progress)),
            }
        };
        drop(given_up);
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Hibernation {
    snapshots: Snapshots,
    /// Held for the time of a push or a pop.
    queue: Mutex<VecDeque<Arc<Slot>>>,
    work: Condvar,
    failed: Mutex<Option<Instant>>,
}

impl Hibernation {
    /// Makes snapshots there.
    pub fn new(snapshots: Snapshots) -> Self {
        Self {
            snapshots,
            queue: Mutex::default(),
            work: Condvar::new(),
            failed: Mutex::default(),
        }
    }

    /// Whether there is a point in it: snapshots could be made lately.
    pub fn is_possible(&self) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.is_none_or(|at| at.elapsed() >= PAUSE_AFTER_FAILURE)
    }

    /// Begins to save the memory of a child that was found idle at `since`.
    pub fn save(&self, child: &str, region: Region, since: Instant) -> Saving {
        let slot = Arc::new(Slot {
            child: child.to_owned(),
            since,
            progress: Mutex::new(Progress::Waiting(region)),
            done: Condvar::new(),
            wanted_back: AtomicBool::new(false),
        });
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back(slot.clone());
        drop(queue);
        self.work.notify_one();
        Saving(slot)
    }

    /// Serves for ever; give it a thread.
    pub fn run(&self) -> ! {
        let mut has_freed = false;
        loop {
            let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let is_empty = |queue: &mut VecDeque<_>| queue.is_empty();
            let mut queue = if has_freed {
                let waited = self.work.wait_timeout_while(queue, QUIET, is_empty);
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                let waited = self.work.wait_while(queue, is_empty);
                waited.unwrap_or_else(PoisonError::into_inner)
            };
            let slot = queue.pop_front();
            drop(queue);
            match slot {
                Some(slot) => {
                    self.serve(&slot);
                    has_freed = true;
                }
                None => {
                    give_back_free_memory();
                    has_freed = false;
                }
            }
        }
    }

    fn serve(&self, slot: &Slot) {
        let region = {
            let mut progress = slot.lock();
            match std::mem::replace(&mut *progress, Progress::Working) {
                Progress::Waiting(region) => region,
                other => {
                    *progress = other;
                    return;
                }
            }
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| self.save_now(slot, region)));
        let progress = match outcome {
            Ok(saved) => Progress::Done(saved),
            Err(_) => {
                log::error!(target: &slot.child, "saving its memory panicked, which is a bug; its memory is lost");
                Progress::Taken
            }
        };
        *slot.lock() = progress;
        slot.done.notify_all();
    }

    fn save_now(&self, slot: &Slot, mut region: Region) -> Saved {
        let Slot { child, since, .. } = slot;
        match self.snapshots.save(&mut region, &slot.wanted_back) {
            Ok((snapshot, volume)) => {
                drop(region);
                let took = since.elapsed();
                metrics::HIBERNATE_SECONDS.observe(took);
                metrics::HIBERNATIONS.add(1);
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = None;
                log::debug!(
                    target: child,
                    "hibernated in {:.3} ms, {} of {} bytes written",
                    took.as_secs_f64() * 1e3,
                    volume.written,
                    volume.memory,
                );
                Saved::Snapshot(snapshot)
            }
            Err(SaveError::Cancelled) => Saved::Region(region),
            Err(error) => {
                metrics::HIBERNATION_FAILURES.add(1);
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                *failed = Some(Instant::now());
                log::warn!(
                    target: child,
                    "cannot hibernate, and stays in memory: {error}; no child is put to sleep for {} s",
                    PAUSE_AFTER_FAILURE.as_secs(),
                );
                Saved::Region(region)
            }
        }
    }
}
