//! tokio, run in steps: no live stack between two events.
//!
//! A stock current-thread runtime lives in a static. A step lets it run until it has nothing to do,
//! tells the host when its next timer is due, and returns. All tasks, timers and channels are
//! tokio's own; only the moment of idleness is caught:
//!
//! - tokio parks its thread when nothing can run. Without threads, a park with a timer ends in
//!   `std::thread::sleep`, that is in libc's `clock_nanosleep`. The one below takes its place: it
//!   notes the time and returns at once.
//! - The step's root future ends the step when that has happened. When the park was too short for
//!   a sleep, timers were due: the root future waits for another park.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio_upstream::runtime::{Builder, Runtime};
use tokio_upstream::sync::watch;

use wasm_operator_abi as abi;
use crate::transport;

static RUNTIME: OnceLock<Runtime> = OnceLock::new();
/// tokio is about to park, or parks.
static PARKING: AtomicBool = AtomicBool::new(false);
/// How long the present park wanted to sleep, in nanoseconds; 0: it did not.
static SLEPT: AtomicU64 = AtomicU64::new(0);
static ROOT: Mutex<Option<Waker>> = Mutex::new(None);
static STOP: OnceLock<watch::Sender<bool>> = OnceLock::new();

const LONG: Duration = Duration::from_secs(365 * 24 * 3600);

/// The one runtime of a guest.
pub fn runtime() -> &'static Runtime {
    RUNTIME.get_or_init(|| {
        let runtime = Builder::new_current_thread()
            .enable_time()
            .on_thread_park(|| {
                SLEPT.store(0, Ordering::Relaxed);
                PARKING.store(true, Ordering::Relaxed);
            })
            .on_thread_unpark(|| {
                PARKING.store(false, Ordering::Relaxed);
                if let Some(root) = &*ROOT.lock().unwrap_or_else(PoisonError::into_inner) {
                    root.wake_by_ref();
                }
            })
            .build()
            .expect("a runtime without threads and sockets can always be made");
        // Without any timer tokio would wait on a condition variable, which panics without
        // threads: there is always one.
        runtime.spawn(async {
            loop {
                tokio_upstream::time::sleep(LONG).await;
            }
        });
        runtime
    })
}

/// Runs whatever can run, sets the next deadline, returns.
pub fn step() {
    let mut first = true;
    runtime().block_on(poll_fn(|context| {
        if !std::mem::take(&mut first) {
            let slept = SLEPT.swap(0, Ordering::Relaxed);
            if slept > 0 {
                abi::timer(slept);
                return Poll::Ready(());
            }
        }
        *ROOT.lock().unwrap_or_else(PoisonError::into_inner) = Some(context.waker().clone());
        // Here and not in `on_event`: inside `block_on`, a woken task goes to the local run queue.
        transport::dispatch();
        Poll::Pending
    }));
    *ROOT.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// The host asks the guest to end: [`stopped`] resolves.
pub(crate) fn stop() {
    stop_sender().send_replace(true);
}

fn stop_sender() -> &'static watch::Sender<bool> {
    STOP.get_or_init(|| watch::Sender::new(false))
}

/// Resolves once the host has asked the guest to end.
pub async fn stopped() {
    let mut receiver = stop_sender().subscribe();
    // The sender is a static: it is never dropped.
    let _ = receiver.wait_for(|stop| *stop).await;
}

/// What `main` may return, so that it can return before its future has ended.
pub trait MainOutput: Sized + 'static {
    /// The value of a `main` that goes on in steps.
    fn pending() -> Self;
    /// The exit code of a `main` that has ended.
    fn exit_code(self) -> i32;
}

impl MainOutput for () {
    fn pending() -> Self {}

    fn exit_code(self) -> i32 {
        0
    }
}

impl<T: MainOutput, E: std::fmt::Debug + 'static> MainOutput for Result<T, E> {
    fn pending() -> Self {
        Ok(T::pending())
    }

    fn exit_code(self) -> i32 {
        match self {
            Ok(value) => value.exit_code(),
            Err(error) => {
                // As the standard library reports it.
                eprintln!("Error: {error:?}");
                1
            }
        }
    }
}

/// A future of `main`'s, which need not be `Send`.
struct OnThisThread<F>(Pin<Box<F>>);

// SAFETY: a guest has one thread; nothing in it can be sent to another.
unsafe impl<F> Send for OnThisThread<F> {}

impl<F: Future> Future for OnThisThread<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        self.0.as_mut().poll(context)
    }
}

/// Takes `main`'s future over and runs it up to the first idle point; its end is the guest's.
pub fn run_main<F>(main: F) -> F::Output
where
    F: Future + 'static,
    F::Output: MainOutput,
{
    let main = OnThisThread(Box::pin(main));
    runtime().spawn(async move { std::process::exit(main.await.exit_code()) });
    step();
    F::Output::pending()
}

/// C's `struct timespec` of wasi-libc.
#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i32,
}

/// Takes the place of wasi-libc's: see the module's documentation.
#[unsafe(no_mangle)]
extern "C" fn clock_nanosleep(
    _clock: *const u8,
    _flags: i32,
    request: &Timespec,
    _rest: *mut Timespec,
) -> i32 {
    assert!(
        PARKING.load(Ordering::Relaxed),
        "a child operator cannot block: use tokio::time::sleep(..).await for std::thread::sleep"
    );
    let seconds = u64::try_from(request.seconds).unwrap_or(0);
    let nanoseconds = u64::try_from(request.nanoseconds).unwrap_or(0);
    let slept = seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds);
    SLEPT.store(slept.max(1), Ordering::Relaxed);
    0
}
