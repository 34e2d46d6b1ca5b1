//! What makes a kube-rs program a child operator.
//!
//! - `exports`: the functions that the parent calls.
//! - [`executor`]: tokio, run in steps; between two steps nothing is on the stack.
//! - [`stop`]: the parent's request to end, which is what a signal is to a child.
//! - [`transport`]: HTTP requests that the parent carries out.
//!
//! A program names none of this: the patched `tokio` and `hyper-util` do.

pub mod executor;
mod exports;
pub mod stop;
pub mod transport;
