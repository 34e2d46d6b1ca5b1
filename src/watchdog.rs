//! Stops guests that do not return.
//!
//! One thread looks at the workers every few milliseconds while any of them runs a guest, and
//! sleeps while none does. The budget of an event is CPU time of its worker's thread, so a busy
//! machine kills nobody; the clock is only read for calls that take long already.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::region::Region;

/// How often running calls are looked at: the most by which a budget is overrun.
const PERIOD: Duration = Duration::from_millis(10);
/// Kernel clock ticks a second in `/proc`; `USER_HZ` is 100 on every Linux architecture we run on.
const TICKS_PER_SECOND: u64 = 100;

/// A call into a guest, while it runs.
#[derive(Debug)]
struct Call {
    /// Thread whose CPU time counts.
    thread: libc::pid_t,
    regions: Vec<Arc<Region>>,
    budget: Duration,
    started: Instant,
    /// CPU time of the thread when the watchdog first saw the call.
    cpu_at_start: Option<Duration>,
}

#[derive(Debug, Default)]
struct State {
    calls: HashMap<u64, Call>,
    next: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Watchdog {
    /// Held for the time of a map access, and while a guest is poked: its memory cannot be
    /// unmapped in between.
    state: Mutex<State>,
    busy: Condvar,
}

/// Ends the supervision of a call when dropped.
#[derive(Debug)]
pub struct Watched<'a> {
    watchdog: &'a Watchdog,
    id: u64,
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.watchdog.lock().calls.remove(&self.id);
    }
}

impl Watchdog {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Supervises a call that this thread is about to make, until the result is dropped.
    pub fn watch(
        &self,
        thread: libc::pid_t,
        regions: &[Arc<Region>],
        budget: Duration,
    ) -> Watched<'_> {
        let mut state = self.lock();
        let id = state.next;
        state.next += 1;
        let call = Call {
            thread,
            regions: regions.to_vec(),
            budget,
            started: Instant::now(),
            cpu_at_start: None,
        };
        if state.calls.insert(id, call).is_none() && state.calls.len() == 1 {
            self.busy.notify_one();
        }
        Watched { watchdog: self, id }
    }

    /// Serves for ever; give it a thread.
    pub fn run(&self) -> ! {
        loop {
            let state = self.lock();
            let state = self
                .busy
                .wait_while(state, |s| s.calls.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            drop(state);
            std::thread::sleep(PERIOD);
            self.look();
        }
    }

    fn look(&self) {
        for call in self.lock().calls.values_mut() {
            // Short calls, nearly all of them, cost no system call.
            if call.started.elapsed() < PERIOD * 2 {
                continue;
            }
            // Without a readable /proc the clock on the wall has to do.
            let cpu = thread_cpu_time(call.thread).unwrap_or_else(|| call.started.elapsed());
            let start = *call.cpu_at_start.get_or_insert(cpu);
            if cpu.saturating_sub(start) >= call.budget {
                call.regions
                    .iter()
                    .filter(|r| !r.was_poked())
                    .for_each(|r| r.poke());
            }
        }
    }
}

/// CPU time that a thread of this process has used.
fn thread_cpu_time(thread: libc::pid_t) -> Option<Duration> {
    let path = PathBuf::from(format!("/proc/self/task/{thread}/stat"));
    let stat = std::fs::read_to_string(path).ok()?;
    // proc_pid_stat(5): after the command name in parentheses, utime and stime are fields 14, 15.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_of_a_spinning_thread_grows() {
        let thread = crate::worker::thread_id();
        let before = thread_cpu_time(thread).unwrap();
        let started = Instant::now();
        while thread_cpu_time(thread).unwrap() < before + Duration::from_millis(50) {
            assert!(started.elapsed() < Duration::from_secs(60));
            std::hint::black_box((0..10_000).sum::<u64>());
        }
    }
}
