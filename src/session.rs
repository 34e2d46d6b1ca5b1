//! One life of a child, from instantiation to the end of its instance.
//!
//! Everything that the rest of the parent needs of a running child is here and can be shared
//! between threads: its mailbox and its open operations. The instance itself stays with a worker.
//! A child that is restarted gets a new session, so nothing of the old one can reach it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_lock::{Semaphore, SemaphoreGuard};
use event_listener::{Event, listener};
use futures::stream::{AbortHandle, Abortable};

use crate::abi::{CallError, EventKind};
use crate::child::Child;
use crate::mailbox::{Bell, Mailbox};

/// Most bytes of requests that a child may have under way: they are held until they are answered.
const MAX_REQUEST_BYTES: usize = 32 << 20;
/// Most answers of typed verbs that are received at a time; each is held whole (up to
/// [`crate::abi::MAX_RESULT_BYTES`]). The others wait for their turn.
const MAX_RECEIVING: usize = 8;

/// Requests that may begin at once, in seconds' worth of `limits.requestsPerSecond`.
const BURST: Duration = Duration::from_secs(2);
/// The longest that a request waits to begin. Who makes so many waits behind its own.
const MAX_DELAY: Duration = Duration::from_secs(60);

/// A child that was idle for that long after its start has done what it had to do at first.
const FIRST_IDLE: Duration = Duration::from_millis(300);

static NEXT_SESSION: AtomicU64 = AtomicU64::new(1);

/// See the module's documentation.
#[derive(Debug)]
pub struct Session {
    /// Unique in this process.
    pub id: u64,
    /// Whose life it is.
    pub child: Arc<Child>,
    /// What it has not been told yet.
    pub mailbox: Arc<Mailbox>,
    /// Held for the time of a map access.
    operations: Mutex<Operations>,
    receiving: Semaphore,
    /// Told when a held operation may go on.
    flow: Event,
    /// Held once by each task of an operation.
    alive: Arc<()>,
    /// The child has got through its start.
    is_settled: AtomicBool,
    settled: Event,
    /// When an event was last delivered, in nanoseconds after `began`.
    active: AtomicU64,
    began: Instant,
    /// When the grace period ends, once the child was asked to stop.
    stopping: OnceLock<Instant>,
}

#[derive(Debug, Default)]
struct Operations {
    last: u64,
    open: HashMap<u64, Operation>,
    /// Sum over `open`.
    request_bytes: usize,
    /// When all requests so far would have begun at the child's rate (the generic cell rate
    /// algorithm: a token bucket that is one point in time).
    paced: Option<Instant>,
    closed: bool,
}

impl Operations {
    /// When a request that is made now may begin.
    fn pace(&mut self, now: Instant, per_second: f64) -> Instant {
        let step = Duration::from_secs_f64(per_second.recip());
        let paced = self.paced.map_or(now, |paced| paced.max(now)) + step;
        self.paced = Some(paced.min(now + MAX_DELAY));
        paced.checked_sub(BURST).map_or(now, |begin| begin.max(now))
    }

    fn remove(&mut self, number: u64) -> Option<Operation> {
        let operation = self.open.remove(&number)?;
        self.request_bytes -= operation.request_bytes;
        Some(operation)
    }
}

#[derive(Debug)]
struct Operation {
    task: AbortHandle,
    /// Watches go on for ever; a stopping child does not wait for them.
    is_watch: bool,
    /// The guest wants no more data for now.
    is_held: bool,
    request_bytes: usize,
}

impl Session {
    /// A new life of `child`; `bell` is told the session's number and makes its mailbox's bell.
    pub fn new(child: Arc<Child>, bell: impl FnOnce(u64) -> Bell) -> Arc<Self> {
        let id = NEXT_SESSION.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self {
            id,
            child,
            mailbox: Arc::new(Mailbox::new(bell(id))),
            operations: Mutex::default(),
            receiving: Semaphore::new(MAX_RECEIVING),
            flow: Event::new(),
            alive: Arc::default(),
            is_settled: AtomicBool::new(false),
            settled: Event::new(),
            active: AtomicU64::new(0),
            began: Instant::now(),
            stopping: OnceLock::new(),
        })
    }

    fn operations(&self) -> std::sync::MutexGuard<'_, Operations> {
        self.operations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens an operation, whose request has that many bytes, and starts its task in the background.
    ///
    /// # Errors
    /// [`CallError::TooMany`] at the child's limits.
    pub fn open<F>(
        &self,
        is_watch: bool,
        request_bytes: usize,
        task: impl FnOnce(u64) -> F,
    ) -> Result<u64, CallError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut operations = self.operations();
        let limit = self.child.limits.max_operations;
        // A cancelled operation counts as long as its task is still there.
        if operations.closed
            || operations.open.len() >= limit
            || Arc::strong_count(&self.alive) > 2 * limit
            || operations.request_bytes + request_bytes > MAX_REQUEST_BYTES
        {
            return Err(CallError::TooMany {
                operations: limit,
                bytes: MAX_REQUEST_BYTES,
            });
        }
        operations.last += 1;
        operations.request_bytes += request_bytes;
        let begin = operations.pace(Instant::now(), self.child.limits.requests_per_second);
        let number = operations.last;
        let (handle, registration) = AbortHandle::new_pair();
        let operation = Operation {
            task: handle,
            is_watch,
            is_held: false,
            request_bytes,
        };
        operations.open.insert(number, operation);
        // In a box: each layer around it would hold room for it twice.
        let task = Box::pin(task(number));
        let paced = async move {
            let wait = begin.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                async_std::task::sleep(wait).await;
            }
            task.await;
        };
        let task = Abortable::new(paced, registration);
        drop(operations);
        let alive = self.alive.clone();
        async_std::task::spawn(async move {
            let _alive = alive;
            // An abort is a cancelled operation: nobody waits for its outcome.
            let _ = task.await;
        });
        Ok(number)
    }

    /// Waits until one more answer may be received whole; holds the place until it is dropped.
    pub async fn receive(&self) -> SemaphoreGuard<'_> {
        self.receiving.acquire().await
    }

    /// Cancels an operation: its task ends, and no event of it is delivered any more.
    ///
    /// # Errors
    /// [`CallError::Unknown`] when it is not open.
    pub fn cancel(&self, number: u64) -> Result<(), CallError> {
        let operation = self.operations().remove(number);
        operation.ok_or(CallError::Unknown(number))?.task.abort();
        Ok(())
    }

    /// Stops the data of an operation, or lets it flow again.
    ///
    /// # Errors
    /// [`CallError::Unknown`] when it is not open.
    pub fn hold(&self, number: u64, held: bool) -> Result<(), CallError> {
        let mut operations = self.operations();
        let operation = operations.open.get_mut(&number);
        operation.ok_or(CallError::Unknown(number))?.is_held = held;
        drop(operations);
        if !held {
            self.flow.notify(usize::MAX);
        }
        Ok(())
    }

    /// Waits until data of the operation is wanted.
    pub async fn flows(&self, number: u64) {
        loop {
            listener!(self.flow => flow);
            let is_held = |operation: &Operation| operation.is_held;
            if !self.operations().open.get(&number).is_some_and(is_held) {
                return;
            }
            flow.await;
        }
    }

    /// Whether an event may be delivered now: its operation is open, or it belongs to none. The
    /// last event of an operation closes it.
    pub fn admits(&self, operation: u64, kind: EventKind) -> bool {
        if operation == 0 {
            return true;
        }
        let mut operations = self.operations();
        if kind.is_last() {
            operations.remove(operation).is_some()
        } else {
            operations.open.contains_key(&operation)
        }
    }

    /// Notes that it has got through its start: it went to sleep, was idle for a while, or ended.
    pub fn settle(&self) {
        if !self.is_settled.swap(true, Ordering::AcqRel) {
            self.settled.notify(usize::MAX);
        }
    }

    /// Waits for that.
    pub async fn settled(&self) {
        loop {
            listener!(self.settled => settled);
            if self.is_settled.load(Ordering::Acquire) {
                return;
            }
            settled.await;
        }
    }

    /// How long it has to be idle before it is put to sleep: less until it has settled.
    pub fn sleep_after(&self) -> Duration {
        let idle = self.child.hibernation.idle;
        if self.is_settled.load(Ordering::Acquire) {
            idle
        } else {
            idle.min(FIRST_IDLE)
        }
    }

    /// Notes that the child is at work now.
    pub fn touch(&self) {
        self.set_active(Instant::now());
    }

    /// Has it stay awake until then at least, though nothing happens.
    pub fn stay_until(&self, until: Instant) {
        let idle = self.child.hibernation.idle;
        let now = Instant::now();
        self.set_active(
            until
                .checked_sub(idle)
                .map_or(now, |active| active.max(now)),
        );
    }

    fn set_active(&self, active: Instant) {
        let age = active.saturating_duration_since(self.began);
        let nanoseconds = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
        self.active.store(nanoseconds, Ordering::Relaxed);
    }

    /// Since when it has had nothing to do.
    pub fn idle_since(&self) -> Instant {
        self.began + Duration::from_nanos(self.active.load(Ordering::Relaxed))
    }

    /// Whether a call, other than a watch, is still unanswered.
    pub fn has_calls(&self) -> bool {
        self.operations()
            .open
            .values()
            .any(|operation| !operation.is_watch)
    }

    /// Asks the guest to end, which it may take until `grace_end` for.
    pub fn stop(&self, grace_end: Instant) {
        if self.stopping.set(grace_end).is_ok() {
            self.mailbox.send_control(EventKind::Stop);
        }
    }

    /// Whether the guest was asked to end.
    pub fn is_stopping(&self) -> bool {
        self.stopping.get().is_some()
    }

    /// Whether a stopping child has nothing left to do: no call is unanswered, nothing undelivered,
    /// and it wants nothing done before its grace period ends.
    pub fn is_finished(&self, deadline: Option<Instant>) -> bool {
        let Some(grace_end) = self.stopping.get() else {
            return false;
        };
        deadline.is_none_or(|deadline| deadline > *grace_end)
            && self.mailbox.is_empty()
            && !self.has_calls()
    }

    /// The instance is gone: cancels everything.
    pub fn close(&self) {
        self.settle();
        let open = {
            let mut operations = self.operations();
            operations.closed = true;
            std::mem::take(&mut operations.open)
        };
        for operation in open.into_values() {
            operation.task.abort();
        }
        self.mailbox.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Event;

    fn session() -> Arc<Session> {
        Session::new(Arc::new(Child::for_test("a")), |_| Box::new(|| ()))
    }

    #[test]
    fn numbers_start_at_one_and_are_not_reused() {
        let session = session();
        let open = || session.open(false, 1, |_| std::future::pending::<()>());
        assert_eq!(open(), Ok(1));
        session.cancel(1).unwrap();
        assert_eq!(open(), Ok(2));
        assert_eq!(session.cancel(1), Err(CallError::Unknown(1)));
    }

    #[test]
    fn nothing_of_a_cancelled_operation_is_delivered() {
        let session = session();
        let number = session
            .open(false, 1, |_| std::future::pending::<()>())
            .unwrap();
        assert!(session.admits(number, EventKind::Data));
        session.cancel(number).unwrap();
        assert!(!session.admits(number, EventKind::Data));
        assert!(session.admits(0, EventKind::Timer));
    }

    #[test]
    fn the_last_event_closes_its_operation() {
        let session = session();
        let number = session
            .open(false, 1, |_| std::future::pending::<()>())
            .unwrap();
        assert!(session.has_calls());
        assert!(session.admits(number, EventKind::Result));
        assert!(!session.admits(number, EventKind::Result));
        assert!(!session.has_calls());
    }

    #[test]
    fn the_limit_of_operations_holds_and_watches_are_not_waited_for() {
        let session = session();
        let limit = session.child.limits.max_operations;
        for _ in 0..limit {
            session
                .open(true, 1, |_| std::future::pending::<()>())
                .unwrap();
        }
        let refused = session.open(true, 1, |_| std::future::pending::<()>());
        assert!(matches!(refused, Err(CallError::TooMany { .. })));
        assert!(!session.has_calls());
    }

    #[test]
    fn requests_under_way_are_bounded_by_their_bytes() {
        let session = session();
        let open = |bytes| session.open(false, bytes, |_| std::future::pending::<()>());
        let first = open(MAX_REQUEST_BYTES).unwrap();
        assert!(open(1).is_err());
        session.cancel(first).unwrap();
        assert!(open(1).is_ok());
    }

    #[test]
    fn data_of_a_held_operation_waits() {
        use futures::FutureExt;
        let session = session();
        let number = session
            .open(false, 1, |_| std::future::pending::<()>())
            .unwrap();
        session.hold(number, true).unwrap();
        let mut flows = Box::pin(session.flows(number));
        assert!(flows.as_mut().now_or_never().is_none());
        session.hold(number, false).unwrap();
        async_std::task::block_on(flows);
        assert_eq!(session.hold(9, true), Err(CallError::Unknown(9)));
    }

    #[test]
    fn requests_begin_at_once_in_a_burst_and_at_their_rate_after_it() {
        let mut operations = Operations::default();
        let now = Instant::now();
        let waits: Vec<_> = (0..30).map(|_| operations.pace(now, 10.0) - now).collect();
        assert!(waits[..20].iter().all(Duration::is_zero), "{waits:?}");
        assert_eq!(waits[29].as_millis(), 1000);
        let later = now + Duration::from_secs(3600);
        assert_eq!(operations.pace(later, 10.0), later);
        for _ in 0..10_000 {
            assert!(operations.pace(later, 10.0) - later <= MAX_DELAY);
        }
    }

    #[test]
    fn closing_ends_tasks_and_mailbox() {
        let session = session();
        let (sender, receiver) = futures::channel::oneshot::channel::<()>();
        session
            .open(false, 1, |_| async move {
                let _held = sender;
                std::future::pending::<()>().await;
            })
            .unwrap();
        session.close();
        assert!(
            async_std::task::block_on(receiver).is_err(),
            "the task was dropped"
        );
        let event = Event::plain(EventKind::Timer);
        assert!(async_std::task::block_on(session.mailbox.send(event)).is_err());
        assert!(session.open(false, 1, |_| async {}).is_err());
    }
}
