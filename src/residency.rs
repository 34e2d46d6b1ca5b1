//! Which children stay in memory: decides, and tells their workers.
//!
//! - A second after its last event a child's pages are given back that are in a file anyway: code, and
//!   memory as it was in the image.
//! - After its `idleSeconds` it goes to sleep.
//! - Above the process's memory budget, those that have been idle longest go first.
//!
//! It only knows who is in memory and since when each is idle; a worker does not follow an order
//! when the child has got mail meanwhile.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_std::future::timeout;
use event_listener::Event;

use crate::session::Session;

/// A child that was idle for that long does not need its code for now, nor what it only reads.
const EVICT_AFTER: Duration = Duration::from_secs(1);
/// How often the process's size is looked at, while it has a budget and children in memory.
const BUDGET_PERIOD: Duration = Duration::from_millis(200);
/// The part of the children in memory that is put to sleep at a time when it is above its budget.
const BUDGET_SHARE: usize = 8;
/// An order that was not followed (no room for a snapshot, say) is given again after that long.
const REPEAT_AFTER: Duration = Duration::from_secs(30);
/// Whether an order was followed is looked at after that long, or as long as the child was idle.
const CHECK_AT_EARLIEST: Duration = Duration::from_millis(20);
/// Size of a page in /proc/self/statm.
const PAGE_BYTES: u64 = 4096;

/// What a worker is to do with an idle child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Give back the pages that are in a file anyway.
    Evict,
    /// Put it to sleep.
    Hibernate,
}

/// Takes an order to the worker of a session, with the time since when the child was idle: if it is
/// not any more, the order is void.
pub type Messenger = Arc<dyn Fn(u64, Order, Instant) + Send + Sync>;

struct Member {
    session: Arc<Session>,
    messenger: Messenger,
    /// It can be put to sleep, and may.
    may_sleep: bool,
    /// The last order, since when the child was idle then, and when it was given.
    ordered: Option<(Order, Instant, Instant)>,
}

/// See the module's documentation.
pub struct Residency {
    /// Those in memory, by session. Held for the time of a look.
    members: Mutex<HashMap<u64, Member>>,
    joined: Event,
    budget_bytes: Option<u64>,
}

impl Residency {
    /// Nobody is in memory yet. Without a budget only time counts.
    pub fn new(budget_bytes: Option<u64>) -> Self {
        Self {
            members: Mutex::default(),
            joined: Event::new(),
            budget_bytes,
        }
    }

    fn members(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A child's instance has come into memory.
    pub fn join(&self, session: &Arc<Session>, may_sleep: bool, messenger: &Messenger) {
        let member = Member {
            session: session.clone(),
            messenger: messenger.clone(),
            may_sleep,
            ordered: None,
        };
        self.members().insert(session.id, member);
        self.joined.notify(usize::MAX);
    }

    /// It is gone.
    pub fn leave(&self, session: u64) {
        self.members().remove(&session);
    }

    /// Serves for ever.
    pub async fn run(&self) {
        let mut next_weighing = Instant::now();
        loop {
            let joined = self.joined.listen();
            let mut over_budget = false;
            // Not more often: who was told to sleep needs a moment until its memory is free.
            if let Some(budget) = self.budget_bytes
                && Instant::now() >= next_weighing
            {
                next_weighing = Instant::now() + BUDGET_PERIOD;
                over_budget = resident_bytes().is_some_and(|bytes| bytes > budget);
            }
            match self.look(Instant::now(), over_budget) {
                // An error is the time-out itself: there is something to look at.
                Some(wait) => drop(timeout(wait, joined).await),
                None => joined.await,
            }
        }
    }

    /// Gives the orders that are due; says when to look again.
    fn look(&self, now: Instant, over_budget: bool) -> Option<Duration> {
        let mut orders: Vec<(Messenger, u64, Order, Instant)> = Vec::new();
        let mut next = self.budget_bytes.map(|_| BUDGET_PERIOD);
        {
            let mut members = self.members();
            if members.is_empty() {
                return None;
            }
            let urgent = if over_budget {
                longest_idle(&members)
            } else {
                Vec::new()
            };
            for (number, member) in &mut *members {
                let since = member.session.idle_since();
                let idle = now.saturating_duration_since(since);
                let sleep_after = member.may_sleep.then(|| member.session.sleep_after());
                let sleeps =
                    sleep_after.is_some_and(|after| idle >= after) || urgent.contains(number);
                let (order, then) = if sleeps {
                    // The order is void if the child has got mail meanwhile, which nobody tells.
                    let again = sleep_after.unwrap_or_default();
                    let again = again.clamp(CHECK_AT_EARLIEST, EVICT_AFTER);
                    (Some(Order::Hibernate), Some(idle + again))
                } else if idle >= EVICT_AFTER {
                    (Some(Order::Evict), sleep_after)
                } else {
                    let evict = EVICT_AFTER;
                    (
                        None,
                        Some(sleep_after.map_or(evict, |after| after.min(evict))),
                    )
                };
                if let Some(then) = then {
                    let wait = then.saturating_sub(idle);
                    next = Some(next.map_or(wait, |next| next.min(wait)));
                }
                let is_repeated = |(last, idle_since, given): (Order, Instant, Instant)| {
                    Some(last) == order
                        && idle_since == since
                        && (last == Order::Evict || now < given + REPEAT_AFTER)
                };
                if let Some(order) = order
                    && !member.ordered.is_some_and(is_repeated)
                {
                    member.ordered = Some((order, since, now));
                    orders.push((member.messenger.clone(), *number, order, since));
                }
            }
        }
        for (messenger, session, order, since) in orders {
            messenger(session, order, since);
        }
        // Those that were given an order and are busy again come up with their next idle time.
        Some(next.unwrap_or(EVICT_AFTER).max(Duration::from_millis(1)))
    }
}

/// Those to be put to sleep first when memory is short.
fn longest_idle(members: &HashMap<u64, Member>) -> Vec<u64> {
    let mut by_time: Vec<_> = members
        .iter()
        .filter(|(_, member)| member.may_sleep)
        .map(|(number, member)| (member.session.idle_since(), *number))
        .collect();
    by_time.sort_unstable();
    let count = by_time.len().div_ceil(BUDGET_SHARE);
    by_time
        .into_iter()
        .take(count)
        .map(|(_, number)| number)
        .collect()
}

/// The resident set of this process, in bytes (proc_pid_statm(5)).
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::Child;

    type Orders = Arc<Mutex<Vec<(u64, Order)>>>;

    fn residency(budget: Option<u64>, children: u64, may_sleep: bool) -> (Residency, Orders) {
        let residency = Residency::new(budget);
        let orders = Orders::default();
        let taken = orders.clone();
        let messenger: Messenger =
            Arc::new(move |session, order, _| taken.lock().unwrap().push((session, order)));
        for _ in 0..children {
            let session = Session::new(Arc::new(Child::for_test("a")), |_| Box::new(|| ()));
            residency.join(&session, may_sleep, &messenger);
        }
        (residency, orders)
    }

    fn taken(orders: &Orders) -> Vec<Order> {
        let taken = std::mem::take(&mut *orders.lock().unwrap());
        taken.into_iter().map(|(_, order)| order).collect()
    }

    #[test]
    fn an_idle_child_gives_back_its_code_and_then_sleeps_each_once() {
        let (residency, orders) = residency(None, 1, true);
        let start = Instant::now();
        let idle = Child::for_test("a").hibernation.idle;
        residency
            .members()
            .values()
            .for_each(|m| m.session.settle());
        assert!(residency.look(start, false).unwrap() <= EVICT_AFTER);
        assert!(taken(&orders).is_empty());
        let wait = residency.look(start + EVICT_AFTER, false).unwrap();
        assert_eq!(taken(&orders), [Order::Evict]);
        assert!(wait > Duration::ZERO && wait <= idle);
        residency.look(start + EVICT_AFTER, false);
        assert!(taken(&orders).is_empty());
        residency.look(start + idle, false);
        assert_eq!(taken(&orders), [Order::Hibernate]);
        residency.look(start + idle * 2, false);
        assert!(taken(&orders).is_empty());
        residency.look(start + idle + REPEAT_AFTER, false);
        assert_eq!(taken(&orders), [Order::Hibernate]);
    }

    #[test]
    fn who_was_at_work_when_the_order_came_is_looked_at_soon_again() {
        let (residency, orders) = residency(None, 1, true);
        let idle = Child::for_test("a").hibernation.idle;
        let soon = residency.look(Instant::now() + idle, false).unwrap();
        assert_eq!(taken(&orders), [Order::Hibernate]);
        assert!(soon <= EVICT_AFTER, "{soon:?}");
        residency.members().values().for_each(|m| m.session.touch());
        residency.look(Instant::now() + idle, false);
        assert_eq!(taken(&orders), [Order::Hibernate]);
    }

    #[test]
    fn a_child_that_must_not_sleep_only_gives_back_its_code() {
        let (residency, orders) = residency(Some(0), 1, false);
        residency.look(Instant::now() + Duration::from_secs(3600), true);
        assert_eq!(taken(&orders), [Order::Evict]);
    }

    #[test]
    fn above_the_budget_those_that_are_idle_longest_go_first() {
        let (residency, orders) = residency(Some(1), 16, true);
        let mut numbers: Vec<_> = residency.members().keys().copied().collect();
        numbers.sort_unstable();
        residency.look(Instant::now(), true);
        let mut first: Vec<_> = orders.lock().unwrap().iter().map(|(n, _)| *n).collect();
        first.sort_unstable();
        assert_eq!(first, numbers[..2]);
    }

    #[test]
    fn nobody_in_memory_needs_no_look() {
        let (residency, _) = residency(Some(1), 0, true);
        assert_eq!(residency.look(Instant::now(), true), None);
    }
}
