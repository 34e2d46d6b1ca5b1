//! Compiles checks into a guest by which it can be stopped.
//!
//! At each function entry and loop head stands one store to the poll page (see `memory`): no state
//! in the guest, no branch, and a guest that runs for ever passes one of them for ever. Measured
//! against wasmer's metering it costs a few per cent of code and time instead of doubling them.

use wasmer::LocalFunctionIndex;
use wasmer::sys::wasmparser::{MemArg, Operator};
use wasmer::sys::{FunctionMiddleware, MiddlewareError, MiddlewareReaderState, ModuleMiddleware};

use crate::memory::POLL_PAGE;

/// Part of an artifact's key: change it with the checks.
pub const VERSION: &str = "poll-page-1";

/// The compiler middleware that puts the checks in.
#[derive(Debug)]
pub struct Preemption;

impl ModuleMiddleware for Preemption {
    fn generate_function_middleware<'a>(
        &self,
        _: LocalFunctionIndex,
    ) -> Box<dyn FunctionMiddleware<'a> + 'a> {
        Box::new(Checks { at_entry: true })
    }
}

#[derive(Debug)]
struct Checks {
    at_entry: bool,
}

fn check(state: &mut MiddlewareReaderState<'_>) {
    let memarg = MemArg {
        align: 2,
        max_align: 2,
        offset: u64::from(POLL_PAGE),
        memory: 0,
    };
    state.extend(&[
        Operator::I32Const { value: 0 },
        Operator::I32Const { value: 0 },
        Operator::I32Store { memarg },
    ]);
}

impl<'a> FunctionMiddleware<'a> for Checks {
    fn feed(
        &mut self,
        operator: Operator<'a>,
        state: &mut MiddlewareReaderState<'a>,
    ) -> Result<(), MiddlewareError> {
        if std::mem::take(&mut self.at_entry) {
            check(state);
        }
        let is_loop = matches!(operator, Operator::Loop { .. });
        state.push_operator(operator);
        if is_loop {
            check(state);
        }
        Ok(())
    }
}
