//! What makes a kube-rs program a child operator.
//!
//! - [`executor`]: tokio, run in steps; between two steps nothing is on the stack.
//! - [`transport`]: HTTP requests that the parent carries out.
//!
//! A program depends on none of this by name: the patched `tokio` and `hyper-util` do.

pub mod executor;
mod exports;
pub mod transport;
