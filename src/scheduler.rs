//! Whose turn it is. Pure: it knows numbers of sessions, not guests.
//!
//! Sessions with mail wait in one line. A turn ends after a few events or a few milliseconds, and
//! who has mail left goes to the end of the line: a child with ten thousand events delays another
//! child's single event by one turn per child in front of it.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// Most events of a turn.
pub const TURN_EVENTS: usize = 16;
/// A turn that has lasted that long ends with the event at hand.
pub const TURN_TIME: Duration = Duration::from_millis(4);

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Waiting for its turn.
    Queued,
    /// Having it. `again` is set when mail came meanwhile.
    Running { again: bool },
}

/// The line of sessions that have mail.
#[derive(Debug, Default)]
pub struct ReadyQueue {
    line: VecDeque<u64>,
    places: HashMap<u64, Place>,
}

impl ReadyQueue {
    /// The session has mail. Whether it was put in line just now.
    pub fn ready(&mut self, session: u64) -> bool {
        match self.places.get_mut(&session) {
            Some(Place::Queued) => false,
            Some(Place::Running { again }) => {
                *again = true;
                false
            }
            None => {
                self.places.insert(session, Place::Queued);
                self.line.push_back(session);
                true
            }
        }
    }

    /// Gives the first in line its turn.
    pub fn take_next(&mut self) -> Option<u64> {
        let session = self.line.pop_front()?;
        self.places.insert(session, Place::Running { again: false });
        Some(session)
    }

    /// The turn is over; `more` says that the session has mail left.
    pub fn done(&mut self, session: u64, more: bool) {
        let again = matches!(
            self.places.remove(&session),
            Some(Place::Running { again: true })
        );
        if more || again {
            self.ready(session);
        }
    }

    /// The session has ended.
    pub fn forget(&mut self, session: u64) {
        self.places.remove(&session);
        self.line.retain(|s| *s != session);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_session_lets_the_others_in_between_its_turns() {
        let mut queue = ReadyQueue::default();
        queue.ready(1);
        assert_eq!(queue.take_next(), Some(1));
        queue.ready(2);
        queue.done(1, true);
        assert_eq!(queue.take_next(), Some(2));
        queue.done(2, false);
        assert_eq!(queue.take_next(), Some(1));
        queue.done(1, false);
        assert_eq!(queue.take_next(), None);
    }

    #[test]
    fn mail_that_comes_during_a_turn_is_not_forgotten() {
        let mut queue = ReadyQueue::default();
        assert!(queue.ready(1));
        assert!(!queue.ready(1), "in line once");
        queue.take_next();
        assert!(!queue.ready(1));
        queue.done(1, false);
        assert_eq!(queue.take_next(), Some(1));
        queue.done(1, false);
        assert_eq!(queue.take_next(), None);
    }

    #[test]
    fn a_forgotten_session_gets_no_turn() {
        let mut queue = ReadyQueue::default();
        queue.ready(1);
        queue.ready(2);
        queue.forget(1);
        assert_eq!(queue.take_next(), Some(2));
        queue.forget(2);
        queue.done(2, false);
        assert_eq!(queue.take_next(), None);
    }
}
