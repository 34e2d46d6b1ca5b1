//! The guest ABI, version 1: what crosses the border between host and guest.
//!
//! Owns the constants, event kinds, error codes and payloads of `docs/abi.md`, which is the
//! reference. What a guest asks for is read in `calls`.

use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;

/// Import module of the Kubernetes functions.
pub const KUBE_MODULE: &str = "kube_v1";
/// Import module of the other host functions.
pub const HOST_MODULE: &str = "host_v1";

/// The reserved WASI descriptor whose polling means "I am idle".
pub const IDLE_DESCRIPTOR: u32 = 65_536;

/// Longest body chunk in one `data` event, in bytes.
pub const MAX_DATA_BYTES: usize = 65_536;
/// Longest descriptor or raw request a guest may hand over, in bytes. Above the API server's own
/// limit of 3 MiB for a request body.
pub const MAX_REQUEST_BYTES: u32 = 8 << 20;
/// Longest answer of a typed verb, in bytes. A full page of 500 large objects fits.
pub const MAX_RESULT_BYTES: usize = 16 << 20;
/// Longest line a guest may log with `host_v1.log`, in bytes.
pub const MAX_LOG_BYTES: u32 = 65_536;

/// What an event tells the guest; the numbers of `docs/abi.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum EventKind {
    /// The first event of every instance.
    Start = 1,
    /// The guest should finish and exit.
    Stop = 2,
    /// The guest's deadline has come.
    Timer = 3,
    /// A typed verb's answer. Ends the operation.
    Result = 4,
    /// One step of a `watch`.
    Item = 5,
    /// Status and headers of a raw response.
    Head = 6,
    /// A part of a raw response's body.
    Data = 7,
    /// A raw response is complete. Ends the operation.
    End = 8,
    /// The operation failed. Ends it.
    Error = 9,
}

impl EventKind {
    /// Whether no event of the same operation follows.
    pub fn is_last(self) -> bool {
        matches!(self, Self::Result | Self::End | Self::Error)
    }
}

/// One event on its way to a guest.
#[derive(Clone, Debug)]
pub struct Event {
    /// The operation it belongs to, 0 for none.
    pub operation: u64,
    /// What it says.
    pub kind: EventKind,
    /// Its payload, empty for none.
    pub payload: Bytes,
}

impl Event {
    /// An event that belongs to no operation.
    pub fn plain(kind: EventKind) -> Self {
        Self {
            operation: 0,
            kind,
            payload: Bytes::new(),
        }
    }
}

/// Why a host function refused a call; the negative numbers of `docs/abi.md`.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CallError {
    /// The pointer and length leave the guest's memory.
    #[error("pointer {pointer:#x} with length {length} is outside the memory")]
    Fault {
        /// Offset in linear memory.
        pointer: u32,
        /// Length in bytes.
        length: u32,
    },
    /// The descriptor, request or level is malformed.
    #[error("{0}")]
    Invalid(String),
    /// The guest has too many open operations.
    #[error("more than {operations} open operations (limits.operations), or {bytes} bytes in them")]
    TooMany {
        /// The limit in number.
        operations: usize,
        /// The limit in bytes.
        bytes: usize,
    },
    /// The call is too large.
    #[error("{length} bytes are more than the {limit} allowed")]
    TooLarge {
        /// Length in bytes.
        length: u32,
        /// Limit in bytes.
        limit: u32,
    },
    /// There is no such operation.
    #[error("no open operation {0}")]
    Unknown(u64),
    /// A child may not ask for this.
    #[error("refused: {0}")]
    Refused(String),
    /// Nothing came in time.
    #[error("nothing came within {} s: an entry point may wait for that long in all", .0.as_secs())]
    TimedOut(Duration),
}

impl CallError {
    /// The number the guest gets.
    pub fn code(&self) -> i32 {
        match self {
            Self::Fault { .. } => -1,
            Self::Invalid(_) => -2,
            Self::TooMany { .. } => -3,
            Self::TooLarge { .. } => -4,
            Self::Unknown(_) => -5,
            Self::Refused(_) => -6,
            Self::TimedOut(_) => -7,
        }
    }
}

/// The payload of a `head` event.
pub fn encode_head(status: http::StatusCode, headers: &http::HeaderMap) -> Bytes {
    let mut head = format!("{}\n", status.as_u16()).into_bytes();
    for (name, value) in headers {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.push(b'\n');
    }
    head.into()
}

/// The payload of an `error` event that the host itself makes, with `code` 0.
pub fn encode_failure(reason: &str, message: &str) -> Bytes {
    serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 0, "reason": reason, "message": message})
        .to_string()
        .into()
}
