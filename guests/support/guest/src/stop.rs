//! The parent's request to end: to a child it is what SIGTERM is to a process.
//!
//! As with a signal, a program that never listened for it ends at once, and one that did goes on and
//! must end by itself; every listener sees the requests that come after it was made.

use std::process;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_upstream::sync::watch;

/// Requests so far.
static REQUESTS: LazyLock<watch::Sender<u64>> = LazyLock::new(|| watch::Sender::new(0));
/// A request has come and was not passed on yet.
static PENDING: AtomicBool = AtomicBool::new(false);
/// Somebody has listened.
static HANDLED: AtomicBool = AtomicBool::new(false);

/// Takes a request for the step that follows.
pub(crate) fn request() {
    PENDING.store(true, Ordering::Relaxed);
}

/// Passes a request on to the listeners.
pub(crate) fn dispatch() {
    if !PENDING.swap(false, Ordering::Relaxed) {
        return;
    }
    if !HANDLED.load(Ordering::Relaxed) {
        process::exit(0);
    }
    REQUESTS.send_modify(|requests| *requests += 1);
}

/// Sees the requests that come after it was made.
#[derive(Debug)]
pub struct Listener(watch::Receiver<u64>);

impl Listener {
    /// Listens from now on.
    #[expect(
        clippy::new_without_default,
        reason = "it has an effect on the whole program"
    )]
    pub fn new() -> Self {
        HANDLED.store(true, Ordering::Relaxed);
        Self(REQUESTS.subscribe())
    }

    /// Resolves at the next request.
    pub async fn requested(&mut self) {
        // The sender is a static, so it is never gone.
        let _ = self.0.changed().await;
    }
}
