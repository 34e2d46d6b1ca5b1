//! wasm-operator runs many Kubernetes operators as WebAssembly modules in one small process.
//!
//! # Words
//! - **parent operator**: this process. **child operator**, **guest**: one controller, a module
//!   plus its configuration.
//! - **module**: compiled code. **instance**: a module with its own linear memory. **session**: one
//!   life of a child, from instantiation to its end.
//! - **operation**: something a child asked for, known by a number. **event**: what it is told.
//! - **mailbox**: a child's queue of undelivered events. **turn**: a few events delivered in a row.
//!   **worker**: a thread that runs children.
//!
//! # The way of an event
//! ```text
//! API server
//!    |                                                    ^
//! transport   connections, HTTP/2 streams                 |
//!    |                                                    |
//!   api       credentials, identity                       |
//!    |                                                    |
//! watch, operations   lines and pages become events       |   requests start here
//!    |                                                    |
//! mailbox     bounded; a full one stops the stream        |
//!    |                                                    |
//! scheduler   whose turn it is                            |
//!    |                                                    |
//! worker ---> guest  on_event -----------------------> host, wasi   host functions
//! ```
//!
//! # Rooms
//! - Settings: [`cli`], [`config`] (over [`yaml`] and [`quantity`]), which makes a [`child`];
//!   [`logging`], [`check`].
//! - Code: [`loader`] brings it, over [`download`]; [`module`] looks at wasm, [`cache`] keeps what [`compile`]
//!   makes of it in a process of its own, an [`artifact`]: [`prepare`] rewrites the module, [`preemption`] puts
//!   checks into it, [`postlink`] trims the result.
//! - Running: [`region`] and [`memory`], [`files`] with [`certificates`], [`abi`], [`calls`], [`host`], [`wasi`],
//!   [`syscalls`], [`guest`], [`watchdog`].
//! - Life: [`session`], [`starting`], [`worker`], [`supervisor`], [`timers`], [`operator`], which puts everything
//!   together.
//! - Sleep: [`residency`] says who sleeps, [`hibernation`] saves them as [`snapshot`]s ([`content`]),
//!   [`forecast`] and [`prediction`] say when they will be woken; [`predictor`] says so to others.
//! - Outside: [`transport`] (on [`hyper_io`]) connects, [`frames`] and [`lines`] cut streams,
//!   [`outbound`] is for all but the API server, [`serve`] answers, with [`metrics`].
//! - Building children, with [`toolchain`]: [`build_go`] with [`go_toolchain`], [`go_standard`],
//!   [`go_modules`] (by [`go_patches`]) and [`go_hints`]; [`build_rust`] has
//!   cargo look at a [`rust_mirror`], with the crates of [`rust_support`], after a [`rust_review`].

#![deny(unsafe_code)]
#![deny(missing_docs)]
#![deny(rustdoc::broken_intra_doc_links)]

pub mod abi;
pub mod api;
#[expect(unsafe_code, reason = "loads native code; room 3 of 3")]
pub mod artifact;
pub mod backoff;
pub mod build_go;
pub mod build_rust;
pub mod cache;
pub mod calls;
pub mod certificates;
pub mod check;
pub mod child;
pub mod cli;
pub mod compile;
pub mod config;
pub mod content;
pub mod directory;
pub mod download;
pub mod files;
pub mod forecast;
pub mod frames;
pub mod go_hints;
pub mod go_modules;
pub mod go_patches;
pub mod go_standard;
pub mod go_toolchain;
pub mod guest;
pub mod hibernation;
pub mod host;
pub mod hyper_io;
pub mod lines;
pub mod loader;
pub mod logging;
pub mod mailbox;
#[expect(unsafe_code, reason = "is wasmer's linear memory; room 2 of 3")]
pub mod memory;
pub mod metrics;
pub mod module;
pub mod operations;
pub mod operator;
pub mod outbound;
pub mod postlink;
pub mod prediction;
pub mod predictor;
pub mod preemption;
pub mod prepare;
pub mod quantity;
#[expect(unsafe_code, reason = "maps memory; room 1 of 3")]
pub mod region;
pub mod residency;
pub mod rust_mirror;
pub mod rust_review;
pub mod rust_support;
pub mod scheduler;
pub mod serve;
pub mod session;
pub mod snapshot;
pub mod stamp;
pub mod starting;
pub mod supervisor;
pub mod syscalls;
pub mod timers;
pub mod toolchain;
pub mod transport;
pub mod wasi;
pub mod watch;
pub mod watchdog;
pub mod worker;
pub mod yaml;
