//! Threads that run guests.
//!
//! A worker owns the instances it runs (wasmer's stores stay on one thread); everybody else talks
//! to it through its queue. It takes whoever is first in line, wakes or makes its guest, delivers a
//! turn of mail and puts the guest back. Which guests go to sleep, `residency` says.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use futures::channel::oneshot;

use crate::abi::EventKind;
use crate::child::Child;
use crate::forecast::{Forecast, History};
use crate::guest::{Asleep, Ended, Guest, Program, Services};
use crate::metrics;
use crate::residency::{Messenger, Order, Residency};
use crate::scheduler::{ReadyQueue, TURN_EVENTS, TURN_TIME};
use crate::session::Session;
use crate::starting::Starter;
use crate::timers::Timers;

/// A session to be run.
struct Start {
    program: Program,
    session: Arc<Session>,
    ended: oneshot::Sender<Ended>,
}

impl Start {
    /// Runs the guest's entry point here.
    fn begin(&self, services: &Services, may_wait: bool) -> Result<Guest, Ended> {
        let (program, session) = (self.program.clone(), self.session.clone());
        Guest::start(program, session, services, thread_id(), may_wait)
    }
}

enum Command {
    /// The guest, if it was made elsewhere.
    Start(Start, Option<Box<Asleep>>),
    Drop(u64),
    /// Valid if the child has been idle since then.
    Order(u64, Order, Instant),
    /// Wake it ahead of a predicted event.
    Ahead(u64, Ahead),
}

/// What a worker has to do.
#[derive(Default)]
struct Queue {
    /// Held for the time of a queue access, never while a guest runs.
    state: Mutex<QueueState>,
    work: Condvar,
    /// Sessions on this worker.
    sessions: AtomicUsize,
}

#[derive(Default)]
struct QueueState {
    ready: ReadyQueue,
    commands: VecDeque<Command>,
}

/// A predicted event.
struct Ahead {
    /// Number of the sleep that it will end.
    sleep: u64,
    /// How long it is worth waiting for it.
    until: Instant,
}

enum Task {
    Command(Command),
    Turn(u64),
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, command: Command) {
        self.lock().commands.push_back(command);
        self.work.notify_one();
    }

    fn ready(&self, session: u64) {
        if self.lock().ready.ready(session) {
            self.work.notify_one();
        }
    }

    fn next(&self) -> Task {
        let mut state = self.lock();
        loop {
            if let Some(command) = state.commands.pop_front() {
                return Task::Command(command);
            }
            if let Some(session) = state.ready.take_next() {
                return Task::Turn(session);
            }
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// All workers. Cheap to share.
pub struct Workers {
    services: Arc<Services>,
    queues: Vec<Arc<Queue>>,
}

/// A session that runs.
pub struct Running {
    /// Its shared half.
    pub session: Arc<Session>,
    /// Resolves to how it ended.
    pub ended: oneshot::Receiver<Ended>,
    worker: Arc<Queue>,
}

impl Running {
    /// Ends the session now.
    pub fn drop_instance(&self) {
        self.worker.command(Command::Drop(self.session.id));
    }
}

impl Workers {
    /// Starts that many threads.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(
        count: usize,
        services: &Arc<Services>,
        timers: &Arc<Timers>,
        residency: &Arc<Residency>,
    ) -> std::io::Result<Self> {
        let mut queues = Vec::with_capacity(count);
        for index in 0..count {
            let queue = Arc::new(Queue::default());
            let postbox = queue.clone();
            let messenger: Messenger = Arc::new(move |session, order, since| {
                postbox.command(Command::Order(session, order, since));
            });
            let queue_of_worker = queue.clone();
            let shared = (services.clone(), timers.clone(), residency.clone());
            std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    let _essential = Essential;
                    let (services, timers, residency) = shared;
                    Worker {
                        queue: queue_of_worker,
                        services,
                        timers,
                        residency,
                        messenger,
                        thread: thread_id(),
                        seats: HashMap::new(),
                    }
                    .run();
                })?;
            queues.push(queue);
        }
        let services = services.clone();
        Ok(Self { services, queues })
    }

    /// Starts a new life of `child` on the worker that has the fewest.
    pub fn run(&self, child: Arc<Child>, program: Program) -> Option<Running> {
        let worker = self
            .queues
            .iter()
            .min_by_key(|q| q.sessions.load(Ordering::Relaxed))?
            .clone();
        worker.sessions.fetch_add(1, Ordering::Relaxed);
        let (bell, starter) = (worker.clone(), Starter::default());
        let started = starter.clone();
        let session = Session::new(child, |id| {
            Box::new(move || {
                bell.ready(id);
                starter.ring();
            })
        });
        let (sender, ended) = oneshot::channel();
        let start = Start {
            program,
            session: session.clone(),
            ended: sender,
        };
        let can_move = start.program.shape().state.obstacle.is_none();
        if start.program.shape().waits_at_start && can_move {
            self.start_elsewhere(start, started, worker.clone());
        } else {
            // After the worker knows the session.
            worker.command(Command::Start(start, None));
            session.mailbox.send_control(EventKind::Start);
        }
        Some(Running {
            session,
            ended,
            worker,
        })
    }

    /// Starts a guest on a thread of its own; its worker gets it when its entry point has returned.
    fn start_elsewhere(&self, start: Start, starter: Starter, worker: Arc<Queue>) {
        let services = self.services.clone();
        // Without a thread, `start` is dropped, and its supervisor tries again later.
        let thread = std::thread::Builder::new().name("start".into());
        let spawned = thread.spawn(move || {
            let made = starter.run(|| start.begin(&services, true).and_then(Guest::leave));
            match made {
                Ok(made) => {
                    let mailbox = start.session.mailbox.clone();
                    worker.command(Command::Start(start, Some(Box::new(made))));
                    mailbox.send_control(EventKind::Start);
                }
                Err(ended) => {
                    start.session.close();
                    worker.sessions.fetch_sub(1, Ordering::Relaxed);
                    let _ = start.ended.send(ended);
                }
            }
        });
        if let Err(error) = spawned {
            log::error!("a thread for a child's start: {error}");
        }
    }
}

/// Ends the process when its thread panics, which is a fault of ours: the children of a worker that
/// is gone would hang, and a restart of the process cures them.
struct Essential;

impl Drop for Essential {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("a worker has panicked, which is a bug: ending the process");
            // EX_SOFTWARE of sysexits(3).
            std::process::exit(70);
        }
    }
}

/// Where a child's guest is.
enum Occupant {
    /// Not made yet.
    New,
    /// Made on another thread, and not seen here yet.
    Made(Asleep),
    Awake(Guest),
    Asleep(Asleep),
    /// Being exchanged; what was there is lost if that fails.
    Gone,
}

/// A guest and what its worker has to know beside it.
struct Seat {
    occupant: Occupant,
    start: Start,
    /// `stop` was delivered.
    told_to_stop: bool,
    /// When it was woken by events.
    history: History,
    /// An event has come since the last prediction: there may be another one.
    has_news: bool,
    /// How often it has gone to sleep.
    sleeps: u64,
    /// It was woken ahead, and the event has not come yet.
    is_ahead: bool,
}

struct Worker {
    queue: Arc<Queue>,
    services: Arc<Services>,
    timers: Arc<Timers>,
    residency: Arc<Residency>,
    messenger: Messenger,
    thread: libc::pid_t,
    seats: HashMap<u64, Seat>,
}

impl Worker {
    fn run(mut self) {
        loop {
            let (session, outcome) = match self.queue.next() {
                Task::Command(Command::Start(start, made)) => {
                    let seat = Seat {
                        occupant: made.map_or(Occupant::New, |made| Occupant::Made(*made)),
                        start,
                        told_to_stop: false,
                        history: History::default(),
                        has_news: false,
                        sleeps: 0,
                        is_ahead: false,
                    };
                    let session = seat.start.session.clone();
                    self.seats.insert(session.id, seat);
                    // What came during the start rang for nobody.
                    if !session.mailbox.is_empty() {
                        self.queue.ready(session.id);
                    }
                    continue;
                }
                Task::Command(Command::Drop(session)) => (session, Err(Ended::Stopped)),
                Task::Command(Command::Order(session, order, since)) => {
                    (session, self.obey(session, order, since))
                }
                Task::Command(Command::Ahead(session, ahead)) => {
                    (session, self.wake_ahead(session, &ahead))
                }
                Task::Turn(session) => {
                    let Some(seat) = self.seats.remove(&session) else {
                        self.queue.lock().ready.forget(session);
                        continue;
                    };
                    let (seat, outcome) = self.turn(seat);
                    self.seats.insert(session, seat);
                    let more = *outcome.as_ref().unwrap_or(&false);
                    self.queue.lock().ready.done(session, more);
                    (session, outcome.map(drop))
                }
            };
            if let Err(ended) = outcome {
                self.end(session, ended);
            }
        }
    }

    fn end(&mut self, session: u64, ended: Ended) {
        let Some(Seat {
            occupant, start, ..
        }) = self.seats.remove(&session)
        else {
            return;
        };
        match occupant {
            Occupant::Awake(_) => metrics::AWAKE.add(-1),
            Occupant::Asleep(_) => metrics::ASLEEP.add(-1),
            Occupant::New | Occupant::Made(_) | Occupant::Gone => {}
        }
        drop(occupant);
        self.residency.leave(session);
        start.session.close();
        self.timers.set(session, None, &start.session.mailbox);
        self.queue.lock().ready.forget(session);
        self.queue.sessions.fetch_sub(1, Ordering::Relaxed);
        // Nobody listens any more when the process is about to end.
        let _ = start.ended.send(ended);
    }

    /// Gives a guest its turn; whether it has mail left.
    fn turn(&self, mut seat: Seat) -> (Seat, Result<bool, Ended>) {
        let session = seat.start.session.clone();
        let mailbox = &session.mailbox;
        let next_event = || {
            std::iter::from_fn(|| mailbox.pop())
                .find(|event| session.admits(event.operation, event.kind))
        };
        let Some(first) = next_event() else {
            return (seat, Ok(false));
        };
        if std::mem::take(&mut seat.is_ahead) {
            metrics::WAKES_AHEAD_USED.add(1);
            seat.history.push(SystemTime::now());
        }
        seat.has_news = true;
        let guest = match self.awake(&mut seat, false) {
            Ok(guest) => guest,
            Err(ended) => return (seat, Err(ended)),
        };
        // Every event drops the deadline: it must not come due during the turn.
        self.timers.set(session.id, None, mailbox);
        let started = Instant::now();
        let mut told_to_stop = false;
        let mut delivered = 0;
        let mut event = Some(first);
        while let Some(current) = event {
            log::trace!(target: &session.child.name, "{:?} of operation {}", current.kind, current.operation);
            if let Err(ended) = guest.deliver(&current, &self.services, self.thread) {
                return (seat, Err(ended));
            }
            told_to_stop |= current.kind == EventKind::Stop;
            delivered += 1;
            let goes_on = delivered < TURN_EVENTS && started.elapsed() < TURN_TIME;
            event = if goes_on { next_event() } else { None };
        }
        let deadline = guest.deadline();
        self.timers.set(session.id, deadline, mailbox);
        session.touch();
        seat.told_to_stop |= told_to_stop;
        if seat.told_to_stop && session.is_finished(deadline) {
            return (seat, Err(Ended::Stopped));
        }
        let more = !mailbox.is_empty();
        (seat, Ok(more))
    }

    /// Wakes a child that sleeps, so that it is there when its event comes.
    fn wake_ahead(&mut self, session: u64, ahead: &Ahead) -> Result<(), Ended> {
        let Some(mut seat) = self.seats.remove(&session) else {
            return Ok(());
        };
        let mut woken = Ok(());
        if matches!(seat.occupant, Occupant::Asleep(_)) && seat.sleeps == ahead.sleep {
            seat.is_ahead = true;
            woken = self.awake(&mut seat, true).map(drop);
            seat.start.session.stay_until(ahead.until);
            metrics::WAKES_AHEAD.add(1);
        }
        self.seats.insert(session, seat);
        woken
    }

    /// The seat's guest, made or woken if need be; `ahead` of its event or for it.
    fn awake<'a>(&self, seat: &'a mut Seat, ahead: bool) -> Result<&'a mut Guest, Ended> {
        let Start {
            program, session, ..
        } = &seat.start;
        let (program, session) = (program.clone(), session.clone());
        let services = &self.services;
        let guest = match std::mem::replace(&mut seat.occupant, Occupant::Gone) {
            Occupant::Awake(guest) => guest,
            Occupant::New => {
                let guest = seat.start.begin(services, false)?;
                self.has_come(&guest);
                guest
            }
            Occupant::Made(made) => {
                let guest = Guest::wake(program, session, services, made, false)?;
                self.has_come(&guest);
                guest
            }
            Occupant::Asleep(asleep) => {
                metrics::ASLEEP.add(-1);
                let name = session.child.name.clone();
                let since = Instant::now();
                let guest = Guest::wake(program, session, services, asleep, ahead)
                    .inspect_err(|_| metrics::WAKE_FAILURES.add(1))?;
                let took = since.elapsed();
                metrics::WAKES.add(1);
                metrics::WAKE_SECONDS.observe(took);
                if !ahead {
                    seat.history.push(SystemTime::now());
                }
                let why = if ahead { " ahead of its event" } else { "" };
                log::debug!(target: &name, "woken{why} in {:.3} ms", took.as_secs_f64() * 1e3);
                self.has_come(&guest);
                guest
            }
            Occupant::Gone => return Err(Ended::Stopped),
        };
        seat.occupant = Occupant::Awake(guest);
        match &mut seat.occupant {
            Occupant::Awake(guest) => Ok(guest),
            _ => Err(Ended::Stopped),
        }
    }

    /// A guest's instance is in memory now.
    fn has_come(&self, guest: &Guest) {
        metrics::AWAKE.add(1);
        let session = guest.session();
        session.touch();
        self.residency
            .join(session, guest.may_sleep(), &self.messenger);
    }

    fn obey(&mut self, session: u64, order: Order, since: Instant) -> Result<(), Ended> {
        let Some(seat) = self.seats.get_mut(&session) else {
            return Ok(());
        };
        // It may have been at work while the order was on its way, and idle again since.
        let idle_since = seat.start.session.idle_since();
        let long_enough = seat.start.session.sleep_after() / 2;
        if idle_since != since && idle_since.elapsed() < long_enough {
            return Ok(());
        }
        seat.start.session.settle();
        match (&seat.occupant, order) {
            (Occupant::Awake(guest), Order::Evict) => guest.evict(),
            (Occupant::Awake(guest), Order::Hibernate)
                if guest.session().mailbox.is_empty()
                    && !seat.told_to_stop
                    && self.services.hibernation.is_possible() =>
            {
                let occupant = std::mem::replace(&mut seat.occupant, Occupant::Gone);
                if let Occupant::Awake(guest) = occupant {
                    metrics::AWAKE.add(-1);
                    self.residency.leave(session);
                    let asleep = guest.sleep(&self.services, Instant::now())?;
                    metrics::ASLEEP.add(1);
                    seat.occupant = Occupant::Asleep(asleep);
                    seat.sleeps += 1;
                    seat.is_ahead = false;
                    if std::mem::take(&mut seat.has_news) {
                        predict(seat, &self.services, &self.queue);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Has a child woken shortly before its next event, if that can be foretold.
fn predict(seat: &Seat, services: &Arc<Services>, queue: &Arc<Queue>) {
    let session = &seat.start.session;
    let Some(model) = session.child.hibernation.prediction else {
        return;
    };
    let (services, queue) = (services.clone(), queue.clone());
    let (child, number, sleep) = (session.child.clone(), session.id, seat.sleeps);
    let history = seat.history.clone();
    async_std::task::spawn(async move {
        let forecast = services
            .predictor
            .next_wake(&child.name, model, &history)
            .await;
        let Some(Forecast { at, margin }) = forecast else {
            return;
        };
        let wait = at
            .checked_sub(margin)
            .and_then(|at| at.duration_since(SystemTime::now()).ok());
        if let Some(wait) = wait {
            async_std::task::sleep(wait).await;
            let until = Instant::now() + margin * 2;
            queue.command(Command::Ahead(number, Ahead { sleep, until }));
        }
    });
}

/// The kernel's number of the calling thread; 0 without a usable `/proc`.
pub fn thread_id() -> libc::pid_t {
    // /proc/thread-self is a link to PID/task/TID (proc(5)).
    let link = std::fs::read_link("/proc/thread-self").ok();
    link.and_then(|l| l.file_name()?.to_str()?.parse().ok())
        .unwrap_or(0)
}
