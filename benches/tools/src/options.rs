//! Options that all benchmarks have, and what a reader of figures wants to know of the machine.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Where everything is; the scripts in `benches/` know.
#[derive(Args, Clone, Debug)]
pub struct Places {
    /// The checkout.
    #[arg(long, value_name = "DIR")]
    pub repository: PathBuf,
    /// The parent operator, built with --release.
    #[arg(long, value_name = "FILE")]
    pub parent: PathBuf,
    /// Directory of ring-native and comb-native.
    #[arg(long, value_name = "DIR")]
    pub tools: PathBuf,
    /// Directory for unique modules and their compiled forms, kept between runs.
    #[arg(long, value_name = "DIR")]
    pub cache: PathBuf,
}

impl Places {
    /// The module of that guest.
    ///
    /// # Errors
    /// When it is not built.
    pub fn guest(&self, name: &str) -> Result<PathBuf> {
        let path = self.repository.join(format!("guests/out/{name}.wasm"));
        ensure!(path.is_file(), "{} is missing", path.display());
        Ok(path)
    }

    /// When, what and where, as one line for the head of a table.
    ///
    /// # Errors
    /// When the machine does not say.
    pub fn circumstances(&self, server: &str) -> Result<String> {
        let run = |program: &str, arguments: &[&str]| -> Result<String> {
            let output = Command::new(program)
                .args(arguments)
                .current_dir(&self.repository)
                .output()
                .with_context(|| program.to_owned())?;
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let date = run("date", &["-u", "+%Y-%m-%d"])?;
        let commit = run(
            "git",
            &["describe", "--always", "--dirty", "--exclude", "*"],
        )?;
        let cores = std::thread::available_parallelism().context("number of cores")?;
        let memory = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
        let kibibytes: u64 = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok())
            .context("MemTotal in /proc/meminfo")?;
        let kernel = run("uname", &["-sr"])?;
        Ok(format!(
            "{date}, commit {commit}, {cores} cores ({}), {} GiB, {kernel}, Kubernetes {server}",
            std::env::consts::ARCH,
            kibibytes >> 20,
        ))
    }
}
