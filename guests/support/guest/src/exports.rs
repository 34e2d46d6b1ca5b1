//! The exports of a kube-rs guest: `alloc` and `on_event`. `_start` is the program's own `main`.

use wasm_operator_abi::{allocate, event, payload};

use crate::{executor, transport};

#[unsafe(no_mangle)]
extern "C" fn alloc(length: u32) -> *mut u8 {
    allocate(length)
}

#[unsafe(no_mangle)]
extern "C" fn on_event(operation: u64, kind: u32, pointer: *mut u8, length: u32) {
    // SAFETY: the host passes what `alloc` returned, once (docs/abi.md).
    let payload = unsafe { payload(pointer, length) };
    match kind {
        // Nothing to hand over: timers look at the clock themselves.
        event::START | event::TIMER => {}
        event::STOP => executor::stop(),
        _ => transport::deliver(operation, kind, payload),
    }
    executor::step();
}
