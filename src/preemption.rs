//! Compiles checks into a guest by which it can be stopped.
//!
//! At each function entry and loop head stands one store to the poll page (see `memory`): no state
//! in the guest, no branch, and a guest that runs for ever passes one of them for ever. One stands
//! also before every operation that a single instruction can make long: calls of host functions,
//! and copies and fills of memory and tables. What they cost, `just bench-checks` measures (see
//! BENCHMARKS.md); wasmer's metering doubled code and compile time in a trial.

use std::sync::atomic::{AtomicU32, Ordering};

use wasmer::sys::wasmparser::{MemArg, Operator};
use wasmer::sys::{FunctionMiddleware, MiddlewareError, MiddlewareReaderState, ModuleMiddleware};
use wasmer::{LocalFunctionIndex, ModuleInfo};

use crate::region::POLL_PAGE;

/// Part of an artifact's key: change it with the checks.
pub const VERSION: &str = if cfg!(feature = "without-checks") {
    "none"
} else {
    "poll-page-2"
};

/// The compiler middleware that puts the checks in. One module each.
#[derive(Debug, Default)]
pub struct Preemption {
    /// Functions below that number are the host's.
    imported_functions: AtomicU32,
}

impl ModuleMiddleware for Preemption {
    fn generate_function_middleware<'a>(
        &self,
        _: LocalFunctionIndex,
    ) -> Box<dyn FunctionMiddleware<'a> + 'a> {
        Box::new(Checks {
            at_entry: true,
            imported_functions: self.imported_functions.load(Ordering::Relaxed),
        })
    }

    fn transform_module_info(&self, info: &mut ModuleInfo) -> Result<(), MiddlewareError> {
        let imported = u32::try_from(info.num_imported_functions).unwrap_or(u32::MAX);
        self.imported_functions.store(imported, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Debug)]
struct Checks {
    at_entry: bool,
    imported_functions: u32,
}

impl Checks {
    fn may_take_long(&self, operator: &Operator<'_>) -> bool {
        match operator {
            Operator::Call { function_index } | Operator::ReturnCall { function_index } => {
                *function_index < self.imported_functions
            }
            Operator::CallIndirect { .. }
            | Operator::ReturnCallIndirect { .. }
            | Operator::MemoryFill { .. }
            | Operator::MemoryCopy { .. }
            | Operator::MemoryInit { .. }
            | Operator::MemoryGrow { .. }
            | Operator::TableFill { .. }
            | Operator::TableCopy { .. }
            | Operator::TableInit { .. }
            | Operator::TableGrow { .. } => true,
            _ => false,
        }
    }
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
        if std::mem::take(&mut self.at_entry) || self.may_take_long(&operator) {
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
