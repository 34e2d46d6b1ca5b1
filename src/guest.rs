//! One live instance of a child's module.
//!
//! Belongs to one worker's thread. Knows how to make the instance, call into it under a CPU budget,
//! take it apart and put it together again ([`Asleep`]), and how to put any way in which a guest can
//! end into words; when to do so is the worker's business.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;
use wasmer::{FunctionEnv, Imports, Instance, Memory, RuntimeError, Store, TypedFunction, Value};
use wasmer_wasix::WasiFunctionEnv;

use crate::abi::Event;
use crate::api::Api;
use crate::artifact::{Artifact, LoadedModule};
use crate::certificates::Certificates;
use crate::files::{Descriptors, Tree};
use crate::hibernation::{Hibernation, Saved, Saving};
use crate::host::{self, HostState};
use crate::memory::creating;
use crate::module::Shape;
use crate::prediction::Predictor;
use crate::prepare::global_name;
use crate::region::{Origin, Region, fault_handler};
use crate::session::Session;
use crate::starting::{Entry, Overslept};
use crate::syscalls::GuestExit;
use crate::wasi::{self, Wasi};
use crate::watchdog::Watchdog;

/// A module that can be instantiated, with what is known of it.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its code, in memory only while an instance uses it.
    pub artifact: Arc<Artifact>,
}

impl Program {
    /// Its imports and entry point.
    pub fn shape(&self) -> &Shape {
        self.artifact.shape()
    }
}

/// How an instance ended.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Ended {
    /// It could not be made.
    #[error("cannot be instantiated: {0}")]
    Instantiation(String),
    /// It called `proc_exit`.
    #[error("exited with code {0}")]
    Exit(u32),
    /// It wanted to sleep too long before it was started.
    #[error("{0} (package initialisers of a Go program run there)")]
    Overslept(Overslept),
    /// It trapped; a panic of a Rust or Go program ends in one.
    #[error("trapped in {call}: {reason}")]
    Trap {
        /// The export that was called.
        call: &'static str,
        /// wasmer's words for it.
        reason: String,
    },
    /// It used up the CPU time of an event.
    #[error(
        "used more than {seconds} s of CPU time in one call of {call} and was stopped (limits.eventSeconds)"
    )]
    Budget {
        /// The export that was called.
        call: &'static str,
        /// The budget in seconds.
        seconds: String,
    },
    /// It had no memory for an event.
    #[error("has no memory for an event of {bytes} bytes: `alloc` failed (limits.memory)")]
    Memory {
        /// Size of the event.
        bytes: usize,
    },
    /// Its memory could not be read back.
    #[error("cannot be woken: {0}")]
    Damaged(String),
    /// It was asked to stop, and was done.
    #[error("stopped")]
    Stopped,
}

/// What all guests of this process share.
#[derive(Debug)]
pub struct Services {
    /// The API server.
    pub api: Api,
    /// What children find in files.
    pub certificates: Certificates,
    /// Stops guests that do not return.
    pub watchdog: Watchdog,
    /// wasmer-wasix.
    pub wasi: Wasi,
    /// Keeps the memory of children that sleep.
    pub hibernation: Hibernation,
    /// Says when they will be woken.
    pub predictor: Predictor,
}

/// A guest without an instance: what it takes to put it together again.
#[derive(Debug)]
pub struct Asleep {
    memory: Saving,
    /// Of each mutable global, by its index.
    globals: Vec<(u32, Value)>,
    host: HostState,
}

/// See the module's documentation.
pub struct Guest {
    // Dropped in this order: the module's code goes last, under its lock.
    alloc: TypedFunction<u32, u32>,
    on_event: TypedFunction<(u64, u32, u32, u32), ()>,
    env: FunctionEnv<HostState>,
    memory: Memory,
    instance: Instance,
    store: Store,
    regions: Vec<Arc<Region>>,
    session: Arc<Session>,
    program: Program,
    module: Arc<LoadedModule>,
}

impl Guest {
    /// Makes the instance and runs its entry point, where it `may_wait` for events.
    ///
    /// # Errors
    /// [`Ended`], when it does not live to see its first event.
    pub fn start(
        program: Program,
        session: Arc<Session>,
        services: &Services,
        thread: libc::pid_t,
        may_wait: bool,
    ) -> Result<Self, Ended> {
        let image = program.artifact.image().map_err(failed)?;
        let origin = image.map_or(Origin::Zeros, Origin::Image);
        let mut guest = Self::instantiate(program, session, services, origin, None)?;
        let entry: TypedFunction<(), ()> = guest
            .instance
            .exports
            .get_typed_function(&guest.store, guest.program.shape().entry.name())
            .map_err(failed)?;
        let host = guest.env.as_mut(&mut guest.store);
        host.entry = may_wait.then(Entry::default);
        guest.call(services, thread, "its entry point", |store| {
            entry.call(store)
        })?;
        guest.env.as_mut(&mut guest.store).entry = None;
        Ok(guest)
    }

    /// Takes an idle guest apart: its instance goes at once, its memory when it is saved.
    ///
    /// # Errors
    /// [`Ended`], when something of it cannot be kept; it is gone, then.
    pub fn sleep(self, services: &Services, since: Instant) -> Result<Asleep, Ended> {
        let name = self.session.child.name.clone();
        self.take_apart(|region| services.hibernation.save(&name, region, since))
    }

    /// Takes a guest apart so that it can move to another thread.
    ///
    /// # Errors
    /// As [`Guest::sleep`].
    pub fn leave(self) -> Result<Asleep, Ended> {
        self.take_apart(Saving::in_memory)
    }

    fn take_apart(self, keep: impl FnOnce(Region) -> Saving) -> Result<Asleep, Ended> {
        let Self {
            alloc,
            on_event,
            env,
            memory,
            instance,
            mut store,
            mut regions,
            session: _,
            program,
            module,
        } = self;
        let mut globals = Vec::with_capacity(program.shape().state.mutable_globals.len());
        for index in &program.shape().state.mutable_globals {
            let global = instance.exports.get_global(&global_name(*index));
            let global = global.map_err(failed)?;
            globals.push((*index, global.get(&mut store)));
        }
        let host = env.as_mut(&mut store).suspend();
        // The code goes last.
        drop((alloc, on_event, env, memory, instance));
        drop(store);
        drop(module);
        let region = regions.pop().and_then(Arc::into_inner);
        let region = region.ok_or_else(|| failed("its memory is in use"))?;
        Ok(Asleep {
            memory: keep(region),
            globals,
            host,
        })
    }

    /// Puts a guest together again as it was.
    ///
    /// # Errors
    /// [`Ended::Damaged`] or [`Ended::Instantiation`]; nothing of it is left, then.
    pub fn wake(
        program: Program,
        session: Arc<Session>,
        services: &Services,
        asleep: Asleep,
        prefetch: bool,
    ) -> Result<Self, Ended> {
        let damaged = |reason: &dyn std::fmt::Display| Ended::Damaged(reason.to_string());
        let Asleep {
            memory,
            globals,
            host,
        } = asleep;
        let mut recent = Box::default();
        let origin = match memory.take() {
            Some(Saved::Region(region)) => Origin::Region(region),
            Some(Saved::Snapshot(mut snapshot)) => {
                recent = std::mem::take(&mut snapshot.recent);
                Origin::Snapshot {
                    content: snapshot.open().map_err(|e| damaged(&e))?,
                    image: program.artifact.image().map_err(failed)?,
                }
            }
            None => return Err(damaged(&"its memory is lost")),
        };
        let mut guest = Self::instantiate(program, session, services, origin, Some(host))?;
        for (index, value) in globals {
            let global = guest.instance.exports.get_global(&global_name(index));
            let set = global.map_err(failed)?.set(&mut guest.store, value);
            set.map_err(failed)?;
        }
        if prefetch {
            for region in &guest.regions {
                region.read_ahead(&recent);
            }
        }
        Ok(guest)
    }

    /// Whether it can be put to sleep, and may.
    pub fn may_sleep(&self) -> bool {
        self.session.child.hibernation.allowed && self.program.shape().state.obstacle.is_none()
    }

    /// Gives the pages back, until it runs again, that are in a file: its code, and what it has not
    /// written to of its memory.
    pub fn evict(&self) {
        self.module.evict();
        for region in &self.regions {
            region.evict();
        }
    }

    fn instantiate(
        program: Program,
        session: Arc<Session>,
        services: &Services,
        origin: Origin,
        state: Option<HostState>,
    ) -> Result<Self, Ended> {
        let loaded = program.artifact.load().map_err(failed)?;
        let (module, engine) = loaded.parts().ok_or_else(|| failed("its module is gone"))?;
        let mut store = Store::new(engine.clone());
        let child = session.child.clone();
        let state = state.unwrap_or_else(|| {
            let tree = Arc::new(Tree::for_child(&child.namespace, &services.certificates));
            HostState::new(
                session.clone(),
                services.api.clone(),
                Descriptors::new(tree),
            )
        });
        let env = FunctionEnv::new(&mut store, state);
        let mut imports = Imports::new();
        host::define(&mut store, &env, &mut imports);
        let mut wasix: Option<WasiFunctionEnv> = None;
        if program.shape().uses_wasi {
            let environment = services
                .wasi
                .environment(&mut store, &child)
                .map_err(failed)?;
            wasi::define(&mut store, module, &environment, &env, &mut imports);
            wasix = Some(environment);
        }
        // No code of the guest runs here: modules with a start function are refused.
        let (result, regions) = creating(child.limits.memory_bytes, origin, || {
            catch_unwind(AssertUnwindSafe(|| {
                Instance::new(&mut store, module, &imports).map_err(failed)
            }))
        });
        let instance = match result {
            Ok(made) => made?,
            Err(panic) => return Err(failed(panic_text(panic.as_ref()))),
        };
        let exports = &instance.exports;
        let memory = exports.get_memory("memory").map_err(failed)?.clone();
        let alloc = exports
            .get_typed_function(&store, "alloc")
            .map_err(failed)?;
        let on_event = exports
            .get_typed_function(&store, "on_event")
            .map_err(failed)?;
        env.as_mut(&mut store).memory = Some(memory.clone());
        if let Some(mut wasix) = wasix {
            wasix
                .initialize(&mut store, instance.clone())
                .map_err(failed)?;
        }
        store.set_trap_handler(Some(fault_handler(&regions)));
        Ok(Self {
            alloc,
            on_event,
            env,
            memory,
            instance,
            store,
            regions,
            session,
            program,
            module: loaded,
        })
    }

    /// Delivers one event.
    ///
    /// # Errors
    /// [`Ended`], when the instance did not survive it.
    pub fn deliver(
        &mut self,
        event: &Event,
        services: &Services,
        thread: libc::pid_t,
    ) -> Result<(), Ended> {
        self.env.as_mut(&mut self.store).begin_event();
        let bytes = event.payload.len();
        let no_memory = Ended::Memory { bytes };
        let length = u32::try_from(bytes).map_err(|_| no_memory.clone())?;
        let mut pointer = 0;
        if length > 0 {
            let alloc = self.alloc.clone();
            pointer = self.call(services, thread, "alloc", |store| alloc.call(store, length))?;
            if pointer == 0 {
                return Err(no_memory);
            }
            let is_sound = |region: &Arc<Region>| region.admit_range(pointer.into(), bytes);
            if !self.regions.iter().all(is_sound) {
                return Err(damaged_memory());
            }
            let written = self
                .memory
                .view(&self.store)
                .write(u64::from(pointer), &event.payload);
            written.map_err(|e| Ended::Trap {
                call: "alloc",
                reason: format!("returned {pointer:#x}, which has no room for {length} bytes: {e}"),
            })?;
        }
        let on_event = self.on_event.clone();
        self.call(services, thread, "on_event", |store| {
            on_event.call(store, event.operation, event.kind as u32, pointer, length)
        })
    }

    /// The deadline that the guest has set.
    pub fn deadline(&self) -> Option<Instant> {
        self.env.as_ref(&self.store).deadline
    }

    /// Its life.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Calls into the guest: under the watchdog, and with panics of host functions caught.
    fn call<T>(
        &mut self,
        services: &Services,
        thread: libc::pid_t,
        call: &'static str,
        function: impl FnOnce(&mut Store) -> Result<T, RuntimeError>,
    ) -> Result<T, Ended> {
        let budget = self.session.child.limits.event_budget;
        let watched = services.watchdog.watch(thread, &self.regions, budget);
        let result = catch_unwind(AssertUnwindSafe(|| function(&mut self.store)));
        drop(watched);
        let error = match result {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => trap(call, &error),
            Err(panic) => Ended::Trap {
                call,
                reason: panic_text(panic.as_ref()),
            },
        };
        if self.regions.iter().any(|r| r.is_damaged()) {
            return Err(damaged_memory());
        }
        if matches!(error, Ended::Trap { .. }) && self.regions.iter().any(|r| r.was_poked()) {
            return Err(Ended::Budget {
                call,
                seconds: budget.as_secs_f64().to_string(),
            });
        }
        Err(error)
    }
}

fn failed(error: impl std::fmt::Display) -> Ended {
    Ended::Instantiation(error.to_string())
}

fn damaged_memory() -> Ended {
    Ended::Damaged("a part of its snapshot is not what was written".into())
}

fn trap(call: &'static str, error: &RuntimeError) -> Ended {
    if let Some(GuestExit(code)) = error.downcast_ref::<GuestExit>() {
        return Ended::Exit(*code);
    }
    if let Some(overslept) = error.downcast_ref::<Overslept>() {
        return Ended::Overslept(*overslept);
    }
    let reason = match error.clone().to_trap() {
        Some(code) => code.message().to_owned(),
        None => error.message(),
    };
    Ended::Trap { call, reason }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown");
    format!("a host function panicked: {text}; please report this")
}
