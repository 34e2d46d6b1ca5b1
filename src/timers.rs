//! The children's deadlines: one map and one task for all of them.
//!
//! A child has one deadline at most. It lives here and not in the guest, so it comes due whether or
//! not the child is in memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::mailbox::Mailbox;

/// See the module's documentation. Cheap to share.
#[derive(Debug, Default)]
pub struct Timers {
    /// Held for the time of a map access.
    state: Mutex<State>,
    earlier: event_listener::Event,
}

#[derive(Debug, Default)]
struct State {
    by_time: BTreeMap<(Instant, u64), Weak<Mailbox>>,
    by_session: HashMap<u64, Instant>,
}

impl Timers {
    /// Sets, replaces or drops (`None`) the deadline of a session.
    pub fn set(&self, session: u64, deadline: Option<Instant>, mailbox: &Arc<Mailbox>) {
        let is_first = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(old) = state.by_session.remove(&session) {
                state.by_time.remove(&(old, session));
            }
            let Some(deadline) = deadline else { return };
            state.by_session.insert(session, deadline);
            state
                .by_time
                .insert((deadline, session), Arc::downgrade(mailbox));
            state
                .by_time
                .first_key_value()
                .is_some_and(|((_, first), _)| *first == session)
        };
        if is_first {
            self.earlier.notify(usize::MAX);
        }
    }

    /// Sends what is due at `now`; says how long it is to the next deadline.
    fn fire(&self, now: Instant) -> Option<Duration> {
        let mut due = Vec::new();
        let next = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let Some(entry) = state.by_time.first_entry() else {
                    break None;
                };
                let (deadline, session) = *entry.key();
                if deadline > now {
                    break Some(deadline - now);
                }
                due.extend(entry.remove().upgrade());
                state.by_session.remove(&session);
            }
        };
        for mailbox in due {
            mailbox.send_timer();
        }
        next
    }

    /// Serves the deadlines; never returns.
    pub async fn run(&self) {
        loop {
            let listener = self.earlier.listen();
            match self.fire(Instant::now()) {
                Some(wait) => {
                    // An error is the time-out itself: something is due.
                    let _ = async_std::future::timeout(wait, listener).await;
                }
                None => listener.await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::EventKind;

    fn mailbox() -> Arc<Mailbox> {
        Arc::new(Mailbox::new(Box::new(|| ())))
    }

    #[test]
    fn the_latest_deadline_replaces_the_one_before() {
        let timers = Timers::default();
        let mailbox = mailbox();
        let start = Instant::now();
        let second = Duration::from_secs(1);
        timers.set(1, Some(start + second), &mailbox);
        timers.set(1, Some(start + second * 3), &mailbox);
        assert_eq!(timers.fire(start + second * 2), Some(second));
        assert!(mailbox.is_empty());
        assert_eq!(timers.fire(start + second * 3), None);
        assert_eq!(mailbox.pop().map(|e| e.kind), Some(EventKind::Timer));
    }

    #[test]
    fn a_dropped_deadline_does_not_come() {
        let timers = Timers::default();
        let mailbox = mailbox();
        let start = Instant::now();
        timers.set(1, Some(start), &mailbox);
        timers.set(1, None, &mailbox);
        assert_eq!(timers.fire(start + Duration::from_secs(9)), None);
        assert!(mailbox.is_empty());
    }

    #[test]
    fn sessions_with_the_same_deadline_all_get_theirs() {
        let timers = Timers::default();
        let mailboxes: Vec<_> = (0..5).map(|_| mailbox()).collect();
        let now = Instant::now();
        for (i, m) in mailboxes.iter().enumerate() {
            timers.set(i as u64, Some(now), m);
        }
        assert_eq!(timers.fire(now), None);
        assert!(mailboxes.iter().all(|m| !m.is_empty()));
    }
}
