//! The start of guests that wait in their entry point.
//!
//! Initialisers of Go packages may call the API server, and `on_event` cannot be called before they
//! are done. For this phase alone there is a host function that waits for an event. Such guests start
//! on a thread of their own, where they hold up nobody, and move to their worker as sleepers do.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use thiserror::Error;

use crate::abi::{CallError, Event};
use crate::session::Session;

/// How long one start may wait and sleep, all in all.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A guest asked its entry point to sleep for longer than it may: it ends.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("its entry point wants to sleep for {} s, and may for {} s in all", .wanted.as_secs(), LONGEST_WAIT.as_secs())]
pub struct Overslept {
    /// What it asked for last.
    pub wanted: Duration,
}

/// The thread on which a guest starts, as long as it does.
#[derive(Clone, Debug, Default)]
pub struct Starter(Arc<Mutex<Option<Thread>>>);

impl Starter {
    fn set(&self, thread: Option<Thread>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }

    /// Something has come for the guest.
    pub fn ring(&self) {
        let thread = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = &*thread {
            thread.unpark();
        }
    }

    /// Runs `start` as the start of a guest, on the calling thread.
    pub fn run<T>(&self, start: impl FnOnce() -> T) -> T {
        self.set(Some(std::thread::current()));
        let result = start();
        self.set(None);
        result
    }
}

/// What a guest may still do in its entry point.
#[derive(Debug)]
pub struct Entry {
    waited: Duration,
    /// Payload of the event that it was told of last.
    payload: Bytes,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            waited: Duration::ZERO,
            payload: Bytes::new(),
        }
    }
}

impl Entry {
    /// Waits for an answer to one of the guest's operations.
    ///
    /// # Errors
    /// [`CallError::TimedOut`].
    pub fn wait(&mut self, session: &Session) -> Result<Event, CallError> {
        let began = Instant::now();
        let left = LONGEST_WAIT.saturating_sub(self.waited);
        let event = loop {
            let answer = std::iter::from_fn(|| session.mailbox.pop_answer())
                .find(|event| session.admits(event.operation, event.kind));
            let rest = left.saturating_sub(began.elapsed());
            if answer.is_some() || rest.is_zero() || session.is_stopping() {
                break answer;
            }
            std::thread::park_timeout(rest);
        };
        self.waited += began.elapsed();
        let event = event.ok_or(CallError::TimedOut(LONGEST_WAIT))?;
        self.payload = event.payload.clone();
        Ok(event)
    }

    /// The payload of the event that came last, once.
    ///
    /// # Errors
    /// [`CallError::Invalid`] when it has another length.
    pub fn take(&mut self, length: u32) -> Result<Bytes, CallError> {
        if self.payload.len() != length as usize {
            let message = format!("the event's payload has {} bytes", self.payload.len());
            return Err(CallError::Invalid(message));
        }
        Ok(std::mem::take(&mut self.payload))
    }

    /// Sleeps, if that much is left to wait.
    ///
    /// # Errors
    /// [`Overslept`].
    pub fn sleep(&mut self, wait: Duration) -> Result<(), Overslept> {
        if wait > LONGEST_WAIT.saturating_sub(self.waited) {
            return Err(Overslept { wanted: wait });
        }
        self.waited += wait;
        std::thread::sleep(wait);
        Ok(())
    }
}
