//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::build_go;
use crate::build_rust;
use crate::prediction::{self, Server};
use crate::quantity;

/// Runs many Kubernetes operators as WebAssembly modules in one small process.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do; `run` when it is left out.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of `run`.
    #[command(flatten)]
    pub run: Option<RunOptions>,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the child operators that DIR/wasm_config.yaml lists.
    Run(Box<RunOptions>),
    /// Serve predictions of wake-ups: POST /prediction, as the WASM-operator prototype's server.
    Predictor {
        /// Address to listen at.
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:5000")]
        listen: SocketAddr,
    },
    /// Make a child module of a Go operator, whose checkout is not changed.
    BuildGo(build_go::Options),
    /// Compile a module from standard input; for the program's own use.
    #[command(hide = true)]
    CompileModule {
        /// ELF image to be made.
        code: PathBuf,
        /// Memory image to be made.
        image: PathBuf,
    },
    /// Compile the modules that DIR/wasm_config.yaml names, so that children start at once.
    Compile {
        /// Directory with wasm_config.yaml.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Compiled modules.
        #[command(flatten)]
        cache: CacheOptions,
    },
    /// Check DIR/wasm_config.yaml and the modules it names, without a cluster.
    Check {
        /// Directory with wasm_config.yaml.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Make a child module of a kube-rs operator's checkout, without a change in it.
    BuildRust(build_rust::Options),
}

/// Options about compiled modules.
#[derive(Args, Debug)]
pub struct CacheOptions {
    /// Where compiled modules are kept [default: $WASM_OPERATOR_CACHE_DIR, else
    /// wasm-operator/artifacts in the user's cache directory].
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Disk space for compiled modules, such as 10Gi; those that were used least recently go.
    #[arg(long, value_name = "BYTES", value_parser = bytes, default_value = "10Gi")]
    pub cache_budget: u64,
}

/// Options of `run`.
#[derive(Args, Debug)]
pub struct RunOptions {
    /// Directory with wasm_config.yaml.
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Context of the kubeconfig to use instead of its current one.
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    // Not by `flatten`: clap finds no optional options that have further ones in them.
    /// Where compiled modules are kept [default: $WASM_OPERATOR_CACHE_DIR, else
    /// wasm-operator/artifacts in the user's cache directory].
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Disk space for compiled modules, such as 10Gi; those that were used least recently go.
    #[arg(long, value_name = "BYTES", value_parser = bytes, default_value = "10Gi")]
    pub cache_budget: u64,
    /// Where the memory of sleeping children is kept, in files without a name [default:
    /// $WASM_OPERATOR_SNAPSHOT_DIR, else beside the compiled modules].
    #[arg(long, value_name = "DIR")]
    pub snapshot_dir: Option<PathBuf>,
    /// Memory of the process, such as 200Mi, above which idle children go to sleep at once, the
    /// longest idle first.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub memory_budget: Option<u64>,
    /// Serve metrics for Prometheus there, under /metrics, and /healthz.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// Ask this server when children will be woken, instead of the built-in models
    /// [default: $PREDICTION_SERVER].
    #[arg(long, value_name = "URL", value_parser = prediction::server)]
    pub prediction_server: Option<Server>,
    /// Threads that run children [default: one per core].
    #[arg(long, value_name = "N", value_parser = worker_count)]
    pub workers: Option<usize>,
    /// Seconds that children have to stop in.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub grace_period: u64,
}

fn bytes(text: &str) -> Result<u64, String> {
    quantity::bytes(text).ok_or_else(|| "must be a number of bytes such as 200Mi".into())
}

fn worker_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=256) => Ok(count),
        _ => Err("must be a number from 1 to 256".into()),
    }
}
