//! tokio, run in steps: no live stack between two events.
//!
//! A stock current-thread runtime lives in a static. A step lets it run until it has nothing to do,
//! tells the parent when its next timer is due, and returns. All tasks, timers and channels are
//! tokio's own; only the moment of idleness is caught:
//!
//! - tokio parks its thread when nothing can run. Without threads, a park with a timer ends in
//!   `std::thread::sleep`, that is in libc's `clock_nanosleep`. The one below takes its place: it
//!   notes the time and returns at once. (Changing this in the copy of tokio would do as well; the
//!   symbol leaves tokio as it is, and catches a program's own blocking sleep too.)
//! - The step's root future ends the step when that has happened. When tokio parked without a sleep,
//!   timers were due and have made something runnable: the root future waits for another park.

use std::fmt::Debug;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio_upstream::runtime::{Builder, Runtime};
use wasm_operator_abi as abi;

use crate::{stop, transport};

static RUNTIME: OnceLock<Runtime> = OnceLock::new();
/// tokio is about to park, or parks.
static PARKING: AtomicBool = AtomicBool::new(false);
/// How long the present park wanted to sleep, in nanoseconds; 0: it did not.
static SLEPT: AtomicU64 = AtomicU64::new(0);
/// Wakes the root future of the present step.
static ROOT: Mutex<Option<Waker>> = Mutex::new(None);

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// The one runtime of a child.
///
/// # Panics
/// Never: a runtime without threads and sockets can always be made.
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
                if let Some(root) = root().as_ref() {
                    root.wake_by_ref();
                }
            })
            .build()
            .expect("no threads, no sockets");
        // A park without any timer waits on a condition variable, which panics where there are no
        // threads: so there is always a timer.
        runtime.spawn(async {
            loop {
                tokio_upstream::time::sleep(YEAR).await;
            }
        });
        runtime
    })
}

fn root() -> std::sync::MutexGuard<'static, Option<Waker>> {
    ROOT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs whatever can run, sets the next deadline, returns.
pub(crate) fn step() {
    let mut first = true;
    runtime().block_on(poll_fn(|context| {
        // A sleep that an earlier step noted is not this one's.
        if !std::mem::take(&mut first) {
            let slept = SLEPT.swap(0, Ordering::Relaxed);
            if slept > 0 {
                abi::timer(slept);
                return Poll::Ready(());
            }
        }
        *root() = Some(context.waker().clone());
        // Here and not in `on_event`: inside `block_on` a woken task goes to the local run queue.
        stop::dispatch();
        transport::dispatch();
        Poll::Pending
    }));
    *root() = None;
}

/// What `main` may return. Its value must exist before its future has ended, since `main` itself
/// returns when there is nothing to do for the first time.
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

impl MainOutput for ExitCode {
    fn pending() -> Self {
        Self::SUCCESS
    }

    fn exit_code(self) -> i32 {
        // The standard library does not give the number away.
        (0..=u8::MAX)
            .find(|code| Self::from(*code) == self)
            .map_or(1, i32::from)
    }
}

impl<T: MainOutput, E: Debug + 'static> MainOutput for Result<T, E> {
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

/// `main`'s future, which need not be `Send`.
struct OnThisThread<F>(Pin<Box<F>>);

// SAFETY: a child has one thread, so nothing in it can be sent to another.
unsafe impl<F> Send for OnThisThread<F> {}

impl<F: Future> Future for OnThisThread<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        self.0.as_mut().poll(context)
    }
}

/// Takes `main`'s future over and runs it up to the first idle point; its end is the child's.
pub fn run_main<F>(main: F) -> F::Output
where
    F: Future + 'static,
    F::Output: MainOutput,
{
    let main = OnThisThread(Box::pin(main));
    runtime().spawn(async move { process::exit(main.await.exit_code()) });
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
    let seconds = u64::try_from(request.seconds).unwrap_or(0);
    let nanoseconds = u64::try_from(request.nanoseconds).unwrap_or(0);
    let duration = seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds);
    assert!(
        PARKING.load(Ordering::Relaxed) || duration == 0,
        "a child operator cannot block: instead of std::thread::sleep, use tokio::time::sleep(..).await"
    );
    SLEPT.store(duration, Ordering::Relaxed);
    0
}
