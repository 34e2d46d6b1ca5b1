//! Threads that run guests.
//!
//! A worker owns the instances it runs (wasmer's stores stay on one thread); everybody else talks
//! to it through its queue. It takes whoever is first in line, wakes or makes its guest, delivers a
//! turn of mail and puts the guest back.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use futures::channel::oneshot;

use crate::abi::EventKind;
use crate::config::Child;
use crate::guest::{Ended, Guest, Program, Services};
use crate::scheduler::{ReadyQueue, TURN_EVENTS, TURN_TIME};
use crate::session::Session;
use crate::timers::Timers;

/// A session to be run.
struct Start {
    program: Program,
    session: Arc<Session>,
    ended: oneshot::Sender<Ended>,
}

enum Command {
    Start(Start),
    Drop(u64),
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
    ) -> std::io::Result<Self> {
        let mut queues = Vec::with_capacity(count);
        for index in 0..count {
            let queue = Arc::new(Queue::default());
            let worker = (queue.clone(), services.clone(), timers.clone());
            std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    let (queue, services, timers) = worker;
                    let _essential = Essential;
                    Worker {
                        queue,
                        services,
                        timers,
                        thread: thread_id(),
                        guests: HashMap::new(),
                    }
                    .run();
                })?;
            queues.push(queue);
        }
        Ok(Self { queues })
    }

    /// Starts a new life of `child` on the worker that has the fewest.
    pub fn run(&self, child: Arc<Child>, program: Program) -> Option<Running> {
        let worker = self
            .queues
            .iter()
            .min_by_key(|q| q.sessions.load(Ordering::Relaxed))?
            .clone();
        worker.sessions.fetch_add(1, Ordering::Relaxed);
        let bell = worker.clone();
        let session = Session::new(child, |id| Box::new(move || bell.ready(id)));
        let (sender, ended) = oneshot::channel();
        let start = Start {
            program,
            session: session.clone(),
            ended: sender,
        };
        worker.command(Command::Start(start));
        // Rings the bell for the first time, after the worker knows the session.
        session.mailbox.send_control(EventKind::Start);
        Some(Running {
            session,
            ended,
            worker,
        })
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

/// A guest and what its worker has to know beside it.
struct Seat {
    /// `None` until the first turn.
    guest: Option<Guest>,
    start: Start,
    /// `stop` was delivered.
    told_to_stop: bool,
}

struct Worker {
    queue: Arc<Queue>,
    services: Arc<Services>,
    timers: Arc<Timers>,
    thread: libc::pid_t,
    guests: HashMap<u64, Seat>,
}

impl Worker {
    fn run(mut self) {
        loop {
            match self.queue.next() {
                Task::Command(Command::Start(start)) => {
                    self.guests.insert(
                        start.session.id,
                        Seat {
                            guest: None,
                            start,
                            told_to_stop: false,
                        },
                    );
                }
                Task::Command(Command::Drop(session)) => self.end(session, Ended::Stopped),
                Task::Turn(session) => {
                    let Some(seat) = self.guests.get_mut(&session) else {
                        self.queue.lock().ready.forget(session);
                        continue;
                    };
                    match turn(seat, &self.services, &self.timers, self.thread) {
                        Ok(more) => self.queue.lock().ready.done(session, more),
                        Err(ended) => self.end(session, ended),
                    }
                }
            }
        }
    }

    fn end(&mut self, session: u64, ended: Ended) {
        let Some(Seat { guest, start, .. }) = self.guests.remove(&session) else {
            return;
        };
        drop(guest);
        start.session.close();
        self.timers.set(session, None, &start.session.mailbox);
        self.queue.lock().ready.forget(session);
        self.queue.sessions.fetch_sub(1, Ordering::Relaxed);
        // Nobody listens any more when the process is about to end.
        let _ = start.ended.send(ended);
    }
}

/// Gives a guest its turn; whether it has mail left.
fn turn(
    seat: &mut Seat,
    services: &Services,
    timers: &Timers,
    thread: libc::pid_t,
) -> Result<bool, Ended> {
    let Start {
        program, session, ..
    } = &seat.start;
    let guest = match &mut seat.guest {
        Some(guest) => guest,
        empty => {
            let guest = Guest::start(program.clone(), session.clone(), services, thread)?;
            empty.insert(guest)
        }
    };
    let mailbox = &session.mailbox;
    // Every event drops the deadline: it must not come due during the turn.
    timers.set(session.id, None, mailbox);
    let started = Instant::now();
    let mut delivered = 0;
    while delivered < TURN_EVENTS && started.elapsed() < TURN_TIME {
        let Some(event) = mailbox.pop() else { break };
        if session.admits(event.operation, event.kind) {
            log::trace!(target: &session.child.name, "{:?} of operation {}", event.kind, event.operation);
            guest.deliver(&event, services, thread)?;
            seat.told_to_stop |= event.kind == EventKind::Stop;
            delivered += 1;
        }
    }
    let deadline = guest.deadline();
    timers.set(session.id, deadline, mailbox);
    if seat.told_to_stop && session.is_finished(deadline) {
        return Err(Ended::Stopped);
    }
    Ok(!mailbox.is_empty())
}

/// The kernel's number of the calling thread; 0 without a usable `/proc`.
pub fn thread_id() -> libc::pid_t {
    // /proc/thread-self is a link to PID/task/TID (proc(5)).
    let link = std::fs::read_link("/proc/thread-self").ok();
    link.and_then(|l| l.file_name()?.to_str()?.parse().ok())
        .unwrap_or(0)
}
