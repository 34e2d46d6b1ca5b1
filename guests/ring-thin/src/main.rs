//! `ring` without kube-rs: the same work on the guest ABI alone (`docs/abi.md`).
//!
//! The parent lists, watches and reconnects; this guest hears of each object, reads its counterpart,
//! and writes that when its nonce is smaller. All it remembers is what is under way.
//!
//! | environment | |
//! |---|---|
//! | `IN_NAMESPACE` | where from (`default`) |
//! | `OUT_NAMESPACE` | where to (`default`) |
//!
//! - `json`: what is sent and what is read.
//! - `clock`: the present time as text.

mod clock;
mod json;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use wasm_operator_abi::{self as abi, Verb, event};

use json::{Descriptor, Item, Object, Status};

/// After a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// After a failure that only a change in the cluster can mend.
const LONG_PAUSE: Duration = Duration::from_secs(30);

/// The counterpart of an object whose nonce may have to be raised.
struct Work {
    /// The nonce that it shall have.
    nonce: i64,
    stage: Stage,
}

enum Stage {
    /// A `get` is under way.
    Reading,
    /// A `create` or `patch` with that nonce is under way.
    Writing(i64),
    /// It starts again at that time.
    Failed(Instant),
}

struct Guest {
    source: String,
    target: String,
    /// By name; what is done is removed.
    work: BTreeMap<String, Work>,
    /// The names that the open operations are about.
    operations: BTreeMap<u64, String>,
}

impl Guest {
    fn new() -> Self {
        let variable = |name| std::env::var(name).unwrap_or_else(|_| "default".to_owned());
        let guest = Self {
            source: variable("IN_NAMESPACE"),
            target: variable("OUT_NAMESPACE"),
            work: BTreeMap::new(),
            operations: BTreeMap::new(),
        };
        let watch = Descriptor::new(&guest.source);
        if let Err(refused) = abi::start(Verb::Watch, &watch.to_json()) {
            abi::log(1, &format!("watch: {refused}"));
            std::process::exit(1);
        }
        guest
    }

    fn on_event(&mut self, operation: u64, kind: u32, payload: &[u8]) {
        match kind {
            event::STOP => std::process::exit(0),
            event::TIMER => self.retry(),
            event::ITEM => self.item(payload),
            event::RESULT | event::ERROR => match self.operations.remove(&operation) {
                Some(name) if kind == event::RESULT => self.result(name, payload),
                Some(name) => self.error(name, payload),
                // The watch, which ends only when it can never work.
                None => {
                    abi::log(1, &format!("watch: {}", Status::parse(payload).message));
                    std::process::exit(1);
                }
            },
            _ => {}
        }
        // Every event drops the deadline.
        let times = self.work.values().filter_map(|work| match work.stage {
            Stage::Failed(time) => Some(time),
            _ => None,
        });
        if let Some(next) = times.min() {
            let wait = next.saturating_duration_since(Instant::now());
            abi::timer(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
        }
    }

    /// An object was seen.
    fn item(&mut self, payload: &[u8]) {
        let Some(Item {
            kind,
            object: Some(object),
        }) = Item::parse(payload)
        else {
            return;
        };
        let (name, nonce) = (object.metadata.name, object.spec.nonce);
        match self.work.get_mut(&name) {
            Some(Work {
                stage: Stage::Failed(_),
                ..
            }) if kind == "Delete" => {
                self.work.remove(&name);
            }
            _ if kind == "Delete" => {}
            // The answer that is under way leads on to this nonce.
            Some(Work {
                nonce: wanted,
                stage: Stage::Reading | Stage::Writing(_),
            }) => {
                *wanted = nonce;
            }
            _ => self.read(name, nonce),
        }
    }

    fn read(&mut self, name: String, nonce: i64) {
        let mut get = Descriptor::new(&self.target);
        get.name = Some(&name);
        let get = get.to_json();
        self.start(
            Verb::Get,
            &get,
            name,
            Work {
                nonce,
                stage: Stage::Reading,
            },
        );
    }

    /// Creates the counterpart, or changes the version of it that was read.
    fn write(&mut self, name: String, nonce: i64, read: Option<Object>) {
        let now = clock::now();
        let body = json::Body::new(&name, nonce, &now, read.as_ref());
        let mut descriptor = Descriptor::new(&self.target);
        descriptor.body = Some(body);
        let verb = if read.is_some() {
            descriptor.name = Some(&name);
            descriptor.patch_type = Some("merge");
            Verb::Patch
        } else {
            Verb::Create
        };
        let descriptor = descriptor.to_json();
        self.start(
            verb,
            &descriptor,
            name,
            Work {
                nonce,
                stage: Stage::Writing(nonce),
            },
        );
    }

    fn start(&mut self, verb: Verb, descriptor: &[u8], name: String, work: Work) {
        match abi::start(verb, descriptor) {
            Ok(operation) => {
                self.operations.insert(operation, name.clone());
                self.work.insert(name, work);
            }
            Err(refused) => self.fail(name, work.nonce, &refused.to_string(), PAUSE),
        }
    }

    fn result(&mut self, name: String, payload: &[u8]) {
        let Some(Work { nonce, stage }) = self.work.remove(&name) else {
            return;
        };
        match stage {
            Stage::Reading => match Object::parse(payload) {
                Some(object) if object.spec.nonce < nonce => self.write(name, nonce, Some(object)),
                _ => {}
            },
            Stage::Writing(written) => {
                let (source, target) = (&self.source, &self.target);
                abi::log(3, &format!("{source}/{name}: nonce {written} -> {target}"));
                if written < nonce {
                    self.read(name, nonce);
                }
            }
            Stage::Failed(_) => {}
        }
    }

    fn error(&mut self, name: String, payload: &[u8]) {
        let Some(Work { nonce, stage }) = self.work.remove(&name) else {
            return;
        };
        let Status { code, message } = Status::parse(payload);
        match stage {
            Stage::Reading if code == 404 => self.write(name, nonce, None),
            // No such namespace, since nothing else is looked up by a `create`; and a `patch` of
            // what has just been deleted may wait too.
            Stage::Writing(_) if code == 404 => self.fail(name, nonce, &message, LONG_PAUSE),
            _ => self.fail(name, nonce, &message, PAUSE),
        }
    }

    fn fail(&mut self, name: String, nonce: i64, why: &str, pause: Duration) {
        let target = &self.target;
        abi::log(
            2,
            &format!(
                "{name} -> {target}: {why}; trying again in {} s",
                pause.as_secs()
            ),
        );
        self.work.insert(
            name,
            Work {
                nonce,
                stage: Stage::Failed(Instant::now() + pause),
            },
        );
    }

    fn retry(&mut self) {
        let now = Instant::now();
        let is_due = |work: &Work| matches!(work.stage, Stage::Failed(time) if time <= now);
        let due = self.work.iter().filter(|(_, work)| is_due(work));
        let due: Vec<_> = due.map(|(name, work)| (name.clone(), work.nonce)).collect();
        for (name, nonce) in due {
            self.read(name, nonce);
        }
    }
}

thread_local! {
    /// Made at the first event, `start`.
    static GUEST: RefCell<Option<Guest>> = const { RefCell::new(None) };
}

#[unsafe(no_mangle)]
extern "C" fn alloc(length: u32) -> *mut u8 {
    abi::allocate(length)
}

#[unsafe(no_mangle)]
extern "C" fn on_event(operation: u64, kind: u32, pointer: *mut u8, length: u32) {
    // SAFETY: the parent passes what `alloc` returned for that length, once (docs/abi.md).
    let payload = unsafe { abi::payload(pointer, length) };
    GUEST.with_borrow_mut(|guest| {
        guest
            .get_or_insert_with(Guest::new)
            .on_event(operation, kind, &payload);
    });
}

/// `_start` has set up the standard library; the work begins with the `start` event.
fn main() {}
