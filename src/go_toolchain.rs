//! The Go toolchain of a checkout: which one it is, and how it is called.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use thiserror::Error;

use crate::toolchain::{self, ToolError, short_hash};

/// The oldest Go that can make a child: it brought `go:wasmexport`.
const OLDEST_GO: (u32, u32) = (1, 24);
/// The program.
pub const GO: &str = "go";
/// What helps who does not have it.
pub const GO_HELP: &str = "install Go 1.24 or later, see https://go.dev/doc/install";

/// Why there is no Go for a checkout.
#[derive(Debug, Error)]
pub enum GoError {
    /// A file or a tool.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Go is too old.
    #[error(
        "{found} cannot build children: Go 1.24 or later can (a `toolchain` line in go.mod chooses one)"
    )]
    Version {
        /// What `go env GOVERSION` says.
        found: String,
    },
    /// An answer of Go that cannot be read.
    #[error("cannot read what `go {command}` says: {reason}")]
    Answer {
        /// The command.
        command: &'static str,
        /// Why.
        reason: String,
    },
    /// Not a Go module.
    #[error("{} is not in a Go module: it needs a go.mod", project.display())]
    NoModule {
        /// The checkout.
        project: PathBuf,
    },
}

/// What Go says of itself and of a checkout.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub struct Environment {
    /// Where Go is.
    pub goroot: PathBuf,
    /// Where it keeps modules.
    pub gomodcache: PathBuf,
    /// Such as `go1.26.8`.
    pub goversion: String,
    /// The program's go.mod; empty in a directory of a go.work that is none of its modules.
    pub gomod: PathBuf,
    /// The go.work around it, or empty.
    pub gowork: PathBuf,
    /// Without those that say where modules come from.
    pub goflags: String,
}

/// GOFLAGS without those that say where modules come from: a `-mod=vendor` there would leave out what
/// is added.
fn other_flags(flags: &str) -> String {
    let is_other = |flag: &&str| {
        let name = flag.trim_start_matches('-').split('=').next();
        !["mod", "modfile", "overlay"].map(Some).contains(&name)
    };
    flags
        .split_whitespace()
        .filter(is_other)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Major and minor of `go1.26.8` and the like.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.strip_prefix("go")?.split(['.', '-', ' ', 'r', 'b']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Reads what a Go command has answered.
///
/// # Errors
/// [`GoError::Answer`].
pub fn answer<'a, T: Deserialize<'a>>(command: &'static str, text: &'a str) -> Result<T, GoError> {
    serde_json::from_str(text).map_err(|e| GoError::Answer {
        command,
        reason: e.to_string(),
    })
}

/// A Go command in a directory, for a child's platform.
fn go(program: &OsStr, directory: &Path) -> Command {
    let mut go = Command::new(program);
    // Go believes PWD, which may be another name of the directory.
    go.current_dir(directory).env("PWD", directory).envs([
        ("GOOS", "wasip1"),
        ("GOARCH", "wasm"),
        ("CGO_ENABLED", "0"),
        // All runtimes have these instructions. Go 1.26 uses them without being told.
        ("GOWASM", "satconv,signext"),
    ]);
    go
}

impl Environment {
    /// Asks about a checkout.
    ///
    /// # Errors
    /// [`GoError`].
    pub fn of(project: &Path) -> Result<Self, GoError> {
        let mut go = go(GO.as_ref(), project);
        go.args([
            "env",
            "-json",
            "GOROOT",
            "GOMODCACHE",
            "GOVERSION",
            "GOMOD",
            "GOWORK",
            "GOFLAGS",
        ]);
        let text = toolchain::output(GO, GO_HELP, &mut go)?;
        let mut environment: Self = answer("env", &text)?;
        environment.goflags = other_flags(&environment.goflags);
        if environment.gowork == Path::new("off") {
            environment.gowork = PathBuf::new();
        }
        if version(&environment.goversion).is_none_or(|version| version < OLDEST_GO) {
            return Err(GoError::Version {
                found: environment.goversion,
            });
        }
        let has_module = !environment.gomod.as_os_str().is_empty()
            && environment.gomod != Path::new("/dev/null");
        if !has_module && environment.gowork.as_os_str().is_empty() {
            return Err(GoError::NoModule {
                project: project.to_owned(),
            });
        }
        Ok(environment)
    }

    /// A Go command in a directory: of the very toolchain that was asked about itself.
    pub fn go(&self, directory: &Path) -> Command {
        let program = self.goroot.join("bin").join(GO);
        let mut go = go(program.as_ref(), directory);
        go.env("GOROOT", &self.goroot).env("GOTOOLCHAIN", "local");
        go
    }

    /// Go replaces nothing beneath its module cache, and a toolchain that it has fetched by itself is
    /// there: it gets another name.
    ///
    /// # Errors
    /// [`ToolError`].
    pub fn name_toolchain(&mut self, directory: &Path) -> Result<(), ToolError> {
        if !self.goroot.starts_with(&self.gomodcache) {
            return Ok(());
        }
        let names = directory.join("toolchains");
        fs::create_dir_all(&names).map_err(ToolError::file(&names))?;
        let name = names.join(short_hash(self.goroot.as_os_str().as_encoded_bytes()));
        match std::os::unix::fs::symlink(&self.goroot, &name) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(ToolError::file(name)(error));
            }
            _ => self.goroot = name,
        }
        Ok(())
    }
}
