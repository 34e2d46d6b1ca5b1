//! What the integration tests share.
//!
//! - [`cluster`]: a real API server, and a plain client for it.
//! - [`operator`]: the parent operator as a process, and what it logs.
//! - [`fault_proxy`]: a proxy between the two that breaks what networks break.
//! - [`wat`]: small guests, written in the text format.
//!
//! Nothing waits for a fixed time: [`wait_for`] polls a condition and says which one never came.

#![allow(dead_code, reason = "no test binary uses all of it")]

pub mod cluster;
pub mod fault_proxy;
pub mod http;
pub mod operator;
pub mod wat;

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Long enough for anything that works, on a machine that does other things too.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls until `condition` holds; returns what it returned.
///
/// # Panics
/// With `what`, when `patience` is over.
pub fn wait_for<T>(what: &str, patience: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            started.elapsed() < patience,
            "still waiting after {} s: {what}",
            patience.as_secs()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The path of a guest that `guests/build.sh` makes.
///
/// # Panics
/// When it was not built: a test without its guest has not passed.
pub fn guest(name: &str) -> PathBuf {
    let path = repository().join(format!("guests/out/{name}.wasm"));
    assert!(
        path.is_file(),
        "guests/out/{name}.wasm is missing: run guests/build.sh"
    );
    path
}

/// The root of the checkout.
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
