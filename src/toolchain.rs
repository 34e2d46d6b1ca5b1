//! What building children shares: files that this program carries, and tools of other makers.
//!
//! A build writes into the user's cache directory, never into the checkout that is built.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use thiserror::Error;

use crate::directory;

/// Overrides where builds keep what they make on the way.
const DIRECTORY_VARIABLE: &str = "WASM_OPERATOR_BUILD_DIR";

/// Why a child was not built.
#[derive(Debug, Error)]
pub enum ToolError {
    /// The environment names no place for what is made on the way.
    #[error("no directory for builds: set HOME or {DIRECTORY_VARIABLE}")]
    NoDirectory,
    /// A tool that is not there.
    #[error("{tool} is missing: {help}")]
    Missing {
        /// Its name.
        tool: &'static str,
        /// How to get it.
        help: &'static str,
    },
    /// It ended without success; it has said why.
    #[error("{tool} failed")]
    Failed {
        /// Its name.
        tool: &'static str,
    },
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl ToolError {
    /// Names the file that an error is about.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::File { path, source }
    }
}

/// A file that this program carries.
#[derive(Clone, Copy, Debug)]
pub struct Carried {
    /// Relative to its root.
    pub path: &'static str,
    /// What is in it.
    pub content: &'static str,
}

/// Files of this repository, by their root (relative to `src/`) and their paths in it.
#[macro_export]
macro_rules! carried {
    ($root:literal: $($path:literal),* $(,)?) => {
        &[$($crate::toolchain::Carried {
            path: $path,
            content: include_str!(concat!($root, "/", $path)),
        }),*]
    };
}

/// Where builds keep what they make on the way: `WASM_OPERATOR_BUILD_DIR`, else
/// `wasm-operator/build` in the user's cache directory.
///
/// # Errors
/// [`ToolError::NoDirectory`], or [`ToolError::File`] when it cannot be made or is not ours.
pub fn build_directory() -> Result<PathBuf, ToolError> {
    let directory = match std::env::var_os(DIRECTORY_VARIABLE).filter(|v| !v.is_empty()) {
        Some(directory) => PathBuf::from(directory),
        None => directory::user_cache()
            .ok_or(ToolError::NoDirectory)?
            .join("wasm-operator/build"),
    };
    directory::own(&directory).map_err(ToolError::file(&directory))?;
    fs::canonicalize(&directory).map_err(ToolError::file(&directory))
}

/// Writes a file unless it is there with that content: what is built from it stays up to date.
///
/// # Errors
/// [`ToolError::File`].
pub fn write_if_changed(path: &Path, content: &[u8]) -> Result<(), ToolError> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(ToolError::file(parent))?;
    // Another build may be reading the old one.
    let mut new = tempfile::NamedTempFile::new_in(parent).map_err(ToolError::file(parent))?;
    io::Write::write_all(&mut new, content).map_err(ToolError::file(path))?;
    new.persist(path)
        .map_err(|e| ToolError::file(path)(e.error))?;
    Ok(())
}

/// Leaves a finished module where it was asked for; its size in bytes.
///
/// # Errors
/// [`ToolError::File`].
pub fn install(module: &Path, to: &Path) -> Result<u64, ToolError> {
    let directory = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(directory).map_err(ToolError::file(directory))?;
    let mut from = fs::File::open(module).map_err(ToolError::file(module))?;
    // A copy beside its place and a rename: a parent operator may be reading the old one.
    let mut new = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .map_err(ToolError::file(directory))?;
    let bytes = io::copy(&mut from, &mut new).map_err(ToolError::file(to))?;
    new.persist(to).map_err(|e| ToolError::file(to)(e.error))?;
    Ok(bytes)
}

/// Leaves carried files in a directory.
///
/// # Errors
/// [`ToolError::File`].
pub fn unpack(files: &[Carried], to: &Path) -> Result<(), ToolError> {
    for file in files {
        write_if_changed(&to.join(file.path), file.content.as_bytes())?;
    }
    Ok(())
}

/// A short name for some content.
pub fn short_hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

/// A short name for carried files.
pub fn digest(files: &[Carried]) -> String {
    let parts = files
        .iter()
        .flat_map(|file| [file.path, "\n", file.content]);
    short_hash(parts.collect::<String>().as_bytes())
}

/// Runs a tool to its end; what it writes to its standard output.
///
/// # Errors
/// [`ToolError::Missing`] with `help`, [`ToolError::Failed`].
pub fn output(
    tool: &'static str,
    help: &'static str,
    command: &mut Command,
) -> Result<String, ToolError> {
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ToolError::Missing { tool, help },
            _ => ToolError::file(tool)(error),
        })?;
    if !output.status.success() {
        return Err(ToolError::Failed { tool });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
