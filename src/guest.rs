//! One live instance of a child's module.
//!
//! Belongs to one worker's thread. Knows how to make the instance, call into it under a CPU budget
//! and put any way in which a guest can end into words; when to call is the worker's business.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;
use wasmer::{FunctionEnv, Imports, Instance, Memory, RuntimeError, Store, TypedFunction};
use wasmer_wasix::WasiFunctionEnv;

use crate::abi::Event;
use crate::api::Api;
use crate::artifact::LoadedModule;
use crate::files::{Descriptors, Tree};
use crate::host::{self, HostState};
use crate::memory::{Region, with_limit};
use crate::module::Shape;
use crate::session::Session;
use crate::syscalls::GuestExit;
use crate::wasi::{self, Wasi};
use crate::watchdog::Watchdog;

/// A module that can be instantiated, with what is known of it.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its code.
    pub module: Arc<LoadedModule>,
    /// Its imports and entry point.
    pub shape: Arc<Shape>,
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
    /// It was asked to stop, and was done.
    #[error("stopped")]
    Stopped,
}

/// What all guests of this process share.
#[derive(Debug)]
pub struct Services {
    /// The API server.
    pub api: Api,
    /// Stops guests that do not return.
    pub watchdog: Watchdog,
    /// wasmer-wasix.
    pub wasi: Wasi,
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
}

impl Guest {
    /// Makes the instance and runs its entry point.
    ///
    /// # Errors
    /// [`Ended`], when it does not live to see its first event.
    pub fn start(
        program: Program,
        session: Arc<Session>,
        services: &Services,
        thread: libc::pid_t,
    ) -> Result<Self, Ended> {
        let mut guest = Self::instantiate(program, session, services)?;
        let entry: TypedFunction<(), ()> = guest
            .instance
            .exports
            .get_typed_function(&guest.store, &guest.program.shape.entry)
            .map_err(|e| Ended::Instantiation(e.to_string()))?;
        guest.call(services, thread, "its entry point", |store| {
            entry.call(store)
        })?;
        Ok(guest)
    }

    fn instantiate(
        program: Program,
        session: Arc<Session>,
        services: &Services,
    ) -> Result<Self, Ended> {
        let failed = |error: String| Ended::Instantiation(error);
        let module = program.module.clone();
        let (module, engine) = module
            .parts()
            .ok_or_else(|| failed("its module is gone".into()))?;
        let mut store = Store::new(engine.clone());
        let child = session.child.clone();
        let tree = Arc::new(Tree::for_child(&child.namespace));
        let state = HostState::new(
            session.clone(),
            services.api.clone(),
            Descriptors::new(tree),
        );
        let env = FunctionEnv::new(&mut store, state);
        let mut imports = Imports::new();
        host::define(&mut store, &env, &mut imports);
        let mut wasix: Option<WasiFunctionEnv> = None;
        if program.shape.uses_wasi() {
            let environment = services
                .wasi
                .environment(&mut store, &child)
                .map_err(failed)?;
            wasi::define(&mut store, module, &environment, &env, &mut imports);
            wasix = Some(environment);
        }
        // No code of the guest runs here: modules with a start function are refused.
        let (result, regions) = with_limit(child.limits.memory_bytes, || {
            catch_unwind(AssertUnwindSafe(|| {
                Instance::new(&mut store, module, &imports).map_err(|e| failed(e.to_string()))
            }))
        });
        let instance = match result {
            Ok(made) => made?,
            Err(panic) => return Err(failed(panic_text(panic.as_ref()))),
        };
        let exports = &instance.exports;
        let export = |e: wasmer::ExportError| failed(e.to_string());
        let memory = exports.get_memory("memory").map_err(export)?.clone();
        let alloc = exports
            .get_typed_function(&store, "alloc")
            .map_err(export)?;
        let on_event = exports
            .get_typed_function(&store, "on_event")
            .map_err(export)?;
        env.as_mut(&mut store).memory = Some(memory.clone());
        if let Some(mut wasix) = wasix {
            wasix
                .initialize(&mut store, instance.clone())
                .map_err(export)?;
        }
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
        if matches!(error, Ended::Trap { .. }) && self.regions.iter().any(|r| r.was_poked()) {
            return Err(Ended::Budget {
                call,
                seconds: budget.as_secs_f64().to_string(),
            });
        }
        Err(error)
    }
}

fn trap(call: &'static str, error: &RuntimeError) -> Ended {
    if let Some(GuestExit(code)) = error.downcast_ref::<GuestExit>() {
        return Ended::Exit(*code);
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
