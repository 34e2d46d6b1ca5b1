//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

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
    Run(RunOptions),
    /// Check DIR/wasm_config.yaml and the modules it names, without a cluster.
    Check {
        /// Directory with wasm_config.yaml.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
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
    /// Where compiled modules are kept [default: $WASM_OPERATOR_CACHE_DIR, else
    /// wasm-operator/artifacts in the user's cache directory].
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Threads that run children [default: one per core].
    #[arg(long, value_name = "N", value_parser = worker_count)]
    pub workers: Option<usize>,
    /// Seconds that children have to stop in.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub grace_period: u64,
}

fn worker_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=256) => Ok(count),
        _ => Err("must be a number from 1 to 256".into()),
    }
}
