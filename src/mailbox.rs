//! A child's queue of undelivered events.
//!
//! Bounded by number and by bytes. A sender waits for room, so a full mailbox slows down the watch
//! stream behind it (its HTTP/2 window closes) and nothing is ever dropped. The queue does not know
//! who delivers: it rings the bell it was given.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

use crate::abi::{Event, EventKind};

/// Most undelivered events. A turn delivers 16, so this is enough to keep a child busy while its
/// senders are woken, and small enough that a slow child costs its neighbours nothing.
const MAX_EVENTS: usize = 128;
/// Most undelivered payload bytes. One event is always let in, however large.
const MAX_BYTES: usize = 4 << 20;

/// Called after something was put into an empty mailbox.
pub type Bell = Box<dyn Fn() + Send + Sync>;

/// The mailbox is closed: its child's instance has ended.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the instance has ended")]
pub struct Closed;

/// See the module's documentation.
pub struct Mailbox {
    /// Held for the time of a push or a pop, never while waiting or ringing.
    state: Mutex<State>,
    room: event_listener::Event,
    bell: Bell,
}

#[derive(Default)]
struct State {
    /// `start` and `stop`: not counted, delivered before anything else.
    control: VecDeque<Event>,
    timer: bool,
    queue: VecDeque<Event>,
    bytes: usize,
    closed: bool,
}

impl State {
    fn has_room_for(&self, event: &Event) -> bool {
        self.queue.is_empty()
            || (self.queue.len() < MAX_EVENTS && self.bytes + event.payload.len() <= MAX_BYTES)
    }

    fn is_empty(&self) -> bool {
        self.control.is_empty() && !self.timer && self.queue.is_empty()
    }
}

impl Mailbox {
    /// An empty mailbox that rings `bell`.
    pub fn new(bell: Bell) -> Self {
        Self {
            state: Mutex::default(),
            room: event_listener::Event::new(),
            bell,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an event in, waiting for room.
    ///
    /// # Errors
    /// [`Closed`] once the instance has ended.
    pub async fn send(&self, event: Event) -> Result<(), Closed> {
        let mut event = Some(event);
        loop {
            let listener = {
                let mut state = self.lock();
                if state.closed {
                    return Err(Closed);
                }
                if let Some(fitting) = event.take_if(|e| state.has_room_for(e)) {
                    let was_empty = state.is_empty();
                    state.bytes += fitting.payload.len();
                    state.queue.push_back(fitting);
                    let more = state.queue.len() < MAX_EVENTS && state.bytes < MAX_BYTES;
                    drop(state);
                    if more {
                        // Hand the notification on: one pop may have made room for several.
                        self.room.notify(1);
                    }
                    if was_empty {
                        (self.bell)();
                    }
                    return Ok(());
                }
                self.room.listen()
            };
            listener.await;
        }
    }

    /// Puts in `start` or `stop`, which need no room and go first.
    pub fn send_control(&self, kind: EventKind) {
        let was_empty = {
            let mut state = self.lock();
            let was_empty = state.is_empty();
            // Somebody may have been asked to stop before the start was over.
            if kind == EventKind::Start {
                state.control.push_front(Event::plain(kind));
            } else {
                state.control.push_back(Event::plain(kind));
            }
            was_empty
        };
        if was_empty {
            (self.bell)();
        }
    }

    /// Puts in the `timer` event, at most once.
    pub fn send_timer(&self) {
        let was_empty = {
            let mut state = self.lock();
            let was_empty = state.is_empty();
            state.timer = true;
            was_empty
        };
        if was_empty {
            (self.bell)();
        }
    }

    /// Takes the next event: control events, then a due timer, then the queue. Every event drops
    /// the deadline, so a pending `timer` is forgotten with it.
    pub fn pop(&self) -> Option<Event> {
        let mut state = self.lock();
        let timer = std::mem::take(&mut state.timer);
        if let Some(event) = state.control.pop_front() {
            return Some(event);
        }
        if timer {
            return Some(Event::plain(EventKind::Timer));
        }
        drop(state);
        self.pop_answer()
    }

    /// Takes the next event of an operation, and nothing else.
    pub fn pop_answer(&self) -> Option<Event> {
        let mut state = self.lock();
        let event = state.queue.pop_front()?;
        state.bytes -= event.payload.len();
        drop(state);
        self.room.notify(1);
        Some(event)
    }

    /// Whether there is nothing to deliver.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Throws everything away and refuses what is sent from now on.
    pub fn close(&self) {
        let mut state = self.lock();
        *state = State {
            closed: true,
            ..State::default()
        };
        drop(state);
        self.room.notify(usize::MAX);
    }
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Mailbox")
            .field("events", &state.queue.len())
            .field("bytes", &state.bytes)
            .field("closed", &state.closed)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_std::task::{block_on, spawn};
    use bytes::Bytes;

    use super::*;

    fn event(operation: u64, bytes: usize) -> Event {
        Event {
            operation,
            kind: EventKind::Data,
            payload: Bytes::from(vec![0; bytes]),
        }
    }

    fn silent() -> Mailbox {
        Mailbox::new(Box::new(|| ()))
    }

    #[test]
    fn control_comes_first_and_any_event_forgets_the_timer() {
        let mailbox = silent();
        block_on(mailbox.send(event(7, 1))).unwrap();
        mailbox.send_timer();
        mailbox.send_timer();
        mailbox.send_control(EventKind::Start);
        let kinds: Vec<_> = std::iter::from_fn(|| mailbox.pop())
            .map(|e| e.kind)
            .collect();
        assert_eq!(kinds, [EventKind::Start, EventKind::Data]);
        mailbox.send_timer();
        assert_eq!(mailbox.pop().map(|e| e.kind), Some(EventKind::Timer));
        assert!(mailbox.is_empty());
    }

    #[test]
    fn the_bell_rings_once_per_filling() {
        let rings = Arc::new(AtomicUsize::new(0));
        let counter = rings.clone();
        let mailbox = Mailbox::new(Box::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        block_on(async {
            mailbox.send(event(1, 1)).await.unwrap();
            mailbox.send(event(2, 1)).await.unwrap();
        });
        assert_eq!(rings.load(Ordering::SeqCst), 1);
        while mailbox.pop().is_some() {}
        mailbox.send_timer();
        assert_eq!(rings.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_full_mailbox_makes_senders_wait_and_loses_nothing() {
        let mailbox = Arc::new(silent());
        let senders: Vec<_> = (0..8_u64)
            .map(|s| {
                let mailbox = mailbox.clone();
                spawn(async move {
                    for i in 0..1_000 {
                        mailbox.send(event(s * 1_000 + i, 5_000)).await.unwrap();
                    }
                })
            })
            .collect();
        let mut seen = Vec::new();
        while seen.len() < 8_000 {
            {
                let state = mailbox.lock();
                assert!(state.queue.len() <= MAX_EVENTS && state.bytes <= MAX_BYTES);
            }
            match mailbox.pop() {
                Some(event) => seen.push(event.operation),
                None => std::thread::yield_now(),
            }
        }
        block_on(async {
            for sender in senders {
                sender.await;
            }
        });
        for s in 0..8 {
            let of_one: Vec<_> = seen.iter().filter(|o| **o / 1_000 == s).collect();
            assert!(of_one.is_sorted(), "the order of one sender is kept");
            assert_eq!(of_one.len(), 1_000);
        }
    }

    #[test]
    fn an_event_above_the_limit_passes_alone_and_closing_frees_senders() {
        let mailbox = Arc::new(silent());
        block_on(mailbox.send(event(1, MAX_BYTES * 2))).unwrap();
        let waiting = {
            let mailbox = mailbox.clone();
            spawn(async move { mailbox.send(event(2, 1)).await })
        };
        mailbox.close();
        assert_eq!(block_on(waiting), Err(Closed));
        assert_eq!(mailbox.pop().map(|e| e.operation), None);
    }
}
