//! The guest ABI, version 1 (`docs/abi.md`): its numbers and functions, and nothing else.
//!
//! A kube-rs program never sees this; a guest that does without kube-rs is written on it, as
//! `guests/ring-thin` is. Such a guest exports `alloc` and `on_event` itself, by [`allocate`] and
//! [`payload`].

/// Event kinds.
pub mod event {
    /// The first event.
    pub const START: u32 = 1;
    /// Finish and exit.
    pub const STOP: u32 = 2;
    /// The deadline has come.
    pub const TIMER: u32 = 3;
    /// The answer of a typed verb.
    pub const RESULT: u32 = 4;
    /// A step of a typed watch.
    pub const ITEM: u32 = 5;
    /// Status and headers of a raw response.
    pub const HEAD: u32 = 6;
    /// A part of a raw response's body.
    pub const DATA: u32 = 7;
    /// The end of a raw response.
    pub const END: u32 = 8;
    /// The operation failed.
    pub const ERROR: u32 = 9;
}

/// The typed verbs and the raw request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the verbs of the Kubernetes API")]
pub enum Verb {
    Get,
    List,
    Watch,
    Create,
    Replace,
    Patch,
    Delete,
    Request,
}

/// A host function refused a call; the number is the ABI's error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub i64);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.0 {
            -2 => "malformed",
            -3 => "too many open operations",
            -4 => "too large",
            -6 => "not available to a child operator",
            _ => "refused",
        };
        write!(f, "{what} (error code {})", self.0)
    }
}

impl std::error::Error for Refused {}

#[link(wasm_import_module = "kube_v1")]
unsafe extern "C" {
    safe fn get(pointer: *const u8, length: usize) -> i64;
    safe fn list(pointer: *const u8, length: usize) -> i64;
    safe fn watch(pointer: *const u8, length: usize) -> i64;
    safe fn create(pointer: *const u8, length: usize) -> i64;
    safe fn replace(pointer: *const u8, length: usize) -> i64;
    safe fn patch(pointer: *const u8, length: usize) -> i64;
    safe fn delete(pointer: *const u8, length: usize) -> i64;
    safe fn request(pointer: *const u8, length: usize) -> i64;
}

#[link(wasm_import_module = "host_v1")]
unsafe extern "C" {
    #[link_name = "timer"]
    safe fn host_timer(nanoseconds: u64) -> i32;
    #[link_name = "cancel"]
    safe fn host_cancel(operation: u64) -> i32;
    #[link_name = "log"]
    safe fn host_log(level: u32, pointer: *const u8, length: usize) -> i32;
}

/// Starts an operation; returns its number.
///
/// # Errors
/// [`Refused`]; what was wrong is in the parent's log.
pub fn start(verb: Verb, descriptor: &[u8]) -> Result<u64, Refused> {
    let function = match verb {
        Verb::Get => get,
        Verb::List => list,
        Verb::Watch => watch,
        Verb::Create => create,
        Verb::Replace => replace,
        Verb::Patch => patch,
        Verb::Delete => delete,
        Verb::Request => request,
    };
    let number = function(descriptor.as_ptr(), descriptor.len());
    u64::try_from(number).map_err(|_| Refused(number))
}

/// Sets the deadline; the latest call counts, and every event drops it.
pub fn timer(nanoseconds: u64) {
    host_timer(nanoseconds);
}

/// Ends an operation. One that has ended already is no error.
pub fn cancel(operation: u64) {
    host_cancel(operation);
}

/// Writes a line to the parent's log; 1 error, 2 warn, 3 info, 4 debug, 5 trace.
pub fn log(level: u32, text: &str) {
    host_log(level, text.as_ptr(), text.len());
}

/// Memory for an event's payload; what an `alloc` export returns.
pub fn allocate(length: u32) -> *mut u8 {
    // A boxed slice and not a raw allocation: freeing it needs no remembered layout.
    Box::into_raw(vec![0_u8; length as usize].into_boxed_slice()).cast()
}

/// Takes the payload of an event back.
///
/// # Safety
/// `pointer` must come from [`allocate`] with the same length, and not have been taken before. Of a
/// host that keeps the ABI, the arguments of `on_event` do.
pub unsafe fn payload(pointer: *mut u8, length: u32) -> Box<[u8]> {
    if length == 0 {
        return Box::default();
    }
    // SAFETY: by the caller's promise this is the box that `allocate` gave away.
    unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(pointer, length as usize)) }
}
