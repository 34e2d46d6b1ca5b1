//! The exports that the ABI asks for: `alloc` and `on_event`. `_start` is the program's own `main`.

use wasm_operator_abi::{allocate, event, payload};

use crate::{executor, stop, transport};

#[unsafe(no_mangle)]
extern "C" fn alloc(length: u32) -> *mut u8 {
    allocate(length)
}

#[unsafe(no_mangle)]
extern "C" fn on_event(operation: u64, kind: u32, pointer: *mut u8, length: u32) {
    // SAFETY: the parent passes what `alloc` returned for that length, once (docs/abi.md).
    let payload = unsafe { payload(pointer, length) };
    match kind {
        // Nothing to hand over: tokio looks at the clock itself.
        event::START | event::TIMER => {}
        event::STOP => stop::request(),
        // What is of no known kind, or of no open operation, is dropped there.
        _ => transport::deliver(operation, kind, payload),
    }
    executor::step();
}
