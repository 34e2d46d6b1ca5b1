//! The host functions `kube_v1` and `host_v1`, and what they know of their guest.
//!
//! They check, note and start; none of them waits, and none calls back into the guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use wasmer::{AsStoreMut, Function, FunctionEnv, FunctionEnvMut, Imports, Memory, MemoryView};

use crate::abi::{CallError, HOST_MODULE, KUBE_MODULE, MAX_LOG_BYTES, MAX_REQUEST_BYTES};
use crate::api::Api;
use crate::calls::Verb;
use crate::files::Descriptors;
use crate::logging::{LineLogger, LogBudget};
use crate::operations::{start_raw, start_typed};
use crate::session::Session;
use crate::starting::Entry;

/// What host functions know of the guest that calls them.
#[derive(Debug)]
pub struct HostState {
    /// Its life.
    pub session: Arc<Session>,
    /// The API server.
    pub api: Api,
    /// Its memory; `None` only while the instance is being made.
    pub memory: Option<Memory>,
    /// The deadline it set during this event.
    pub deadline: Option<Instant>,
    /// Real sleep during this event.
    pub slept: Duration,
    /// How much it may log.
    pub log_budget: LogBudget,
    /// Its output, on its way to the log.
    pub stdout: LineLogger,
    /// Its error output.
    pub stderr: LineLogger,
    /// What it may do in its entry point; `None` once that is over, or where it may not wait.
    pub entry: Option<Entry>,
    /// Its open files.
    pub descriptors: Descriptors,
    /// Refusals that are in the log already.
    pub refused: Vec<String>,
    /// Bad calls that are in the log already.
    logged_errors: usize,
}

/// Bad calls logged in full; a guest that makes more of them would only fill the log.
const MAX_LOGGED_ERRORS: usize = 20;

impl HostState {
    /// The state of a new instance.
    pub fn new(session: Arc<Session>, api: Api, descriptors: Descriptors) -> Self {
        let logger = || LineLogger::new(&session.child.name);
        Self {
            log_budget: LogBudget::new(&session.child.name),
            stdout: logger(),
            stderr: logger(),
            session,
            api,
            memory: None,
            deadline: None,
            slept: Duration::ZERO,
            entry: None,
            descriptors,
            refused: Vec::new(),
            logged_errors: 0,
        }
    }

    /// Takes out what outlives the instance, everything but its memory.
    pub fn suspend(&mut self) -> Self {
        let nothing = Descriptors::new(Arc::default());
        let empty = Self::new(self.session.clone(), self.api.clone(), nothing);
        let mut kept = std::mem::replace(self, empty);
        kept.memory = None;
        kept
    }

    fn log_error(&mut self, function: &str, error: &CallError) {
        let name = &self.session.child.name;
        // Cancelling what has just ended is a race that a guest cannot avoid.
        if matches!(error, CallError::Unknown(_)) {
            log::debug!(target: name, "{function}: {error}");
            return;
        }
        self.logged_errors += 1;
        if self.logged_errors <= MAX_LOGGED_ERRORS {
            log::warn!(target: name, "{function}: {error}");
        }
        if self.logged_errors == MAX_LOGGED_ERRORS {
            log::warn!(target: name, "further bad calls of this instance are not logged");
        }
    }

    /// A new event begins: it drops the deadline.
    pub fn begin_event(&mut self) {
        self.deadline = None;
        self.slept = Duration::ZERO;
    }

    /// Sets the guest's deadline; `u64::MAX` means none.
    pub fn set_deadline(&mut self, nanoseconds: u64) {
        self.deadline = match nanoseconds {
            u64::MAX => None,
            wait => Instant::now().checked_add(Duration::from_nanos(wait)),
        };
    }
}

/// Reads a guest's bytes.
///
/// # Errors
/// [`CallError::Fault`] when they are not all inside the memory.
pub fn read(view: &MemoryView<'_>, pointer: u32, length: u32) -> Result<Vec<u8>, CallError> {
    let fault = CallError::Fault { pointer, length };
    // Checked first: nothing is allocated for a length that cannot be right.
    if u64::from(pointer) + u64::from(length) > view.data_size() {
        return Err(fault);
    }
    let mut bytes = vec![0; length as usize];
    view.read(u64::from(pointer), &mut bytes)
        .map_err(|_| fault)?;
    Ok(bytes)
}

type Context<'a> = FunctionEnvMut<'a, HostState>;

/// Reads a call's argument, whose length is limited.
fn argument(
    context: &Context,
    pointer: u32,
    length: u32,
    limit: u32,
) -> Result<Vec<u8>, CallError> {
    if length > limit {
        return Err(CallError::TooLarge { length, limit });
    }
    let fault = CallError::Fault { pointer, length };
    let memory = context.data().memory.as_ref().ok_or(fault)?;
    read(&memory.view(context), pointer, length)
}

/// A positive operation number, or the code of the error, which is logged.
fn operation(
    context: &mut Context,
    function: &str,
    pointer: u32,
    length: u32,
    start: impl FnOnce(&HostState, Vec<u8>) -> Result<u64, CallError>,
) -> i64 {
    let result = argument(context, pointer, length, MAX_REQUEST_BYTES)
        .and_then(|bytes| start(context.data(), bytes));
    match result {
        Ok(number) => number.cast_signed(),
        Err(error) => {
            context.data_mut().log_error(function, &error);
            i64::from(error.code())
        }
    }
}

/// 0, or the code of the error, which is logged.
fn outcome(context: &mut Context, function: &str, result: Result<(), CallError>) -> i32 {
    result.map_or_else(
        |error| {
            context.data_mut().log_error(function, &error);
            error.code()
        },
        |()| 0,
    )
}

fn log_line(context: &mut Context, level: u32, pointer: u32, length: u32) -> Result<(), CallError> {
    let level = match level {
        1 => log::Level::Error,
        2 => log::Level::Warn,
        3 => log::Level::Info,
        4 => log::Level::Debug,
        5 => log::Level::Trace,
        other => return Err(CallError::Invalid(format!("{other} is not a log level"))),
    };
    let bytes = argument(context, pointer, length, MAX_LOG_BYTES)?;
    if !context.data_mut().log_budget.allow(bytes.len()) {
        return Ok(());
    }
    let child = &context.data().session.child;
    log::log!(target: &child.name, level, "{}", crate::logging::printable(&bytes));
    Ok(())
}

/// Waits for an event in the entry point, and tells what it is: operation, kind, length.
fn wait(context: &mut Context, head: u32) -> Result<(), CallError> {
    let state = context.data_mut();
    let session = state.session.clone();
    let event = state.entry.as_mut().ok_or_else(not_now)?.wait(&session)?;
    // An event is far shorter than 4 GiB.
    let length = u32::try_from(event.payload.len()).unwrap_or(u32::MAX);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&event.operation.to_le_bytes());
    bytes[8..12].copy_from_slice(&(event.kind as u32).to_le_bytes());
    bytes[12..].copy_from_slice(&length.to_le_bytes());
    write(context, head, &bytes)
}

/// Copies the payload of the event that was waited for.
fn take(context: &mut Context, pointer: u32, length: u32) -> Result<(), CallError> {
    let entry = context.data_mut().entry.as_mut();
    let payload = entry.ok_or_else(not_now)?.take(length)?;
    write(context, pointer, &payload)
}

fn not_now() -> CallError {
    CallError::Refused(
        "only the entry point may wait for events, and only of a module that can hibernate".into(),
    )
}

/// Writes into the guest's memory.
fn write(context: &Context, pointer: u32, bytes: &[u8]) -> Result<(), CallError> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let fault = CallError::Fault { pointer, length };
    let memory = context.data().memory.as_ref().ok_or(fault.clone())?;
    let written = memory.view(context).write(u64::from(pointer), bytes);
    written.map_err(|_| fault)
}

/// Adds the functions of both modules to `imports`.
pub fn define(store: &mut impl AsStoreMut, env: &FunctionEnv<HostState>, imports: &mut Imports) {
    for (verb, name) in Verb::ALL {
        let function = Function::new_typed_with_env(
            store,
            env,
            move |mut context: Context, pointer: u32, length: u32| -> i64 {
                operation(&mut context, name, pointer, length, |state, bytes| {
                    start_typed(&state.session, &state.api, verb, &bytes)
                })
            },
        );
        imports.define(KUBE_MODULE, name, function);
    }
    let request = Function::new_typed_with_env(
        store,
        env,
        |mut context: Context, pointer: u32, length: u32| -> i64 {
            operation(&mut context, "request", pointer, length, |state, bytes| {
                start_raw(&state.session, &state.api, &Bytes::from(bytes))
            })
        },
    );
    imports.define(KUBE_MODULE, "request", request);
    let timer =
        Function::new_typed_with_env(store, env, |mut context: Context, wait: u64| -> i32 {
            context.data_mut().set_deadline(wait);
            0
        });
    imports.define(HOST_MODULE, "timer", timer);
    let cancel =
        Function::new_typed_with_env(store, env, |mut context: Context, number: u64| -> i32 {
            let result = context.data().session.cancel(number);
            outcome(&mut context, "cancel", result)
        });
    imports.define(HOST_MODULE, "cancel", cancel);
    let hold = Function::new_typed_with_env(
        store,
        env,
        |mut context: Context, number: u64, held: u32| -> i32 {
            let result = context.data().session.hold(number, held != 0);
            outcome(&mut context, "hold", result)
        },
    );
    imports.define(HOST_MODULE, "hold", hold);
    let wait = Function::new_typed_with_env(store, env, |mut context: Context, head: u32| -> i32 {
        let result = wait(&mut context, head);
        outcome(&mut context, "wait", result)
    });
    imports.define(HOST_MODULE, "wait", wait);
    let take = Function::new_typed_with_env(
        store,
        env,
        |mut context: Context, pointer: u32, length: u32| -> i32 {
            let result = take(&mut context, pointer, length);
            outcome(&mut context, "take", result)
        },
    );
    imports.define(HOST_MODULE, "take", take);
    let log = Function::new_typed_with_env(
        store,
        env,
        |mut context: Context, level: u32, pointer: u32, length: u32| -> i32 {
            let result = log_line(&mut context, level, pointer, length);
            outcome(&mut context, "log", result)
        },
    );
    imports.define(HOST_MODULE, "log", log);
}
