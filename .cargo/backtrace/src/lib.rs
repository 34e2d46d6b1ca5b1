//! Stands in for the crate of that name below wasmer, and captures nothing.
//!
//! wasmer 7.4 captures a native backtrace for every trap, some of them on the guest's own stack
//! (`wasmer_vm::Trap::lib`). The real crate holds a lock of the whole process meanwhile. A guest that
//! traps with its stack nearly used up would overflow it with that lock held: the capture is
//! abandoned, the lock is not, and the next trap of any other guest waits for ever. We show a trap's
//! code and no frames, so nothing is lost; and no trap reads debug information into memory.

#![forbid(unsafe_code)]

use std::ffi::c_void;

/// The stack at some time; always empty.
#[derive(Clone, Debug, Default)]
pub struct Backtrace;

impl Backtrace {
    /// An empty one.
    #[must_use]
    pub fn new_unresolved() -> Self {
        Self
    }

    /// No frames.
    #[must_use]
    pub fn frames(&self) -> &[BacktraceFrame] {
        &[]
    }
}

impl From<Vec<BacktraceFrame>> for Backtrace {
    fn from(_: Vec<BacktraceFrame>) -> Self {
        Self
    }
}

/// A frame; there are none.
#[derive(Clone, Debug)]
pub enum BacktraceFrame {}

impl BacktraceFrame {
    /// Its instruction pointer.
    #[must_use]
    pub fn ip(&self) -> *mut c_void {
        match *self {}
    }
}
