//! Go modules that do not know `wasip1`: what is known of them, and what a build's errors mean.
//!
//! Most Go code is portable; some modules have a file for each system they know, and none for
//! others. They are built with what is missing. To teach one more, add it to
//! [`PATCHES`]: files of the module that are right for `wasip1` too, or new ones beneath
//! `guests/go/_modules/MODULE/`.

use std::collections::{BTreeMap, BTreeSet};
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

/// A module to be built with what it lacks.
#[derive(Debug, PartialEq, Eq)]
pub struct Replacement {
    /// As it is.
    pub module: Module,
    /// Its files, and where the content of each is.
    pub files: BTreeMap<PathBuf, PathBuf>,
    /// What was done to it, for people.
    pub why: &'static str,
}

impl Replacement {
    /// A directory's name for it.
    pub fn directory(&self) -> String {
        format!("{}@{}", self.module.path, self.module.version)
    }
}

type Release = (u64, u64, u64);

/// What is missing in some versions of a module.
struct Patch {
    module: &'static str,
    /// The first version that it is for, and the first one after those.
    versions: (Release, Release),
    why: &'static str,
    /// Files that are right for `wasip1`, though their build constraint does not say so.
    constrained: &'static [&'static str],
    /// Files to be added, or to stand in for those of that name.
    files: &'static [Carried],
}

/// Versions to come are taken to be as the last known one.
const OPEN: Release = (u64::MAX, 0, 0);

const PATCHES: &[Patch] = &[
    Patch {
        module: "github.com/adrg/xdg",
        versions: ((0, 3, 0), OPEN),
        why: "takes its Unix paths for wasip1 too",
        constrained: &[
            "paths_unix.go",
            "internal/pathutil/pathutil_unix.go",
            "internal/userdirs/config_unix.go",
        ],
        files: &[],
    },
    Patch {
        module: "github.com/fsnotify/fsnotify",
        versions: ((1, 8, 0), OPEN),
        why: "gets a watcher that has nothing to report, instead of an error",
        constrained: &[],
        files: carried!("../guests/go/_modules/github.com/fsnotify/fsnotify/v1.8": "backend_other.go"),
    },
    Patch {
        module: "github.com/fsnotify/fsnotify",
        versions: ((1, 7, 0), (1, 8, 0)),
        why: "gets a watcher that has nothing to report, instead of an error",
        constrained: &[],
        files: carried!("../guests/go/_modules/github.com/fsnotify/fsnotify/v1.7": "backend_other.go"),
    },
    Patch {
        module: "github.com/fsnotify/fsnotify",
        versions: ((1, 6, 0), (1, 7, 0)),
        why: "gets a watcher that has nothing to report, instead of an error",
        constrained: &[],
        files: carried!("../guests/go/_modules/github.com/fsnotify/fsnotify/v1.6": "backend_other.go"),
    },
    Patch {
        module: "github.com/sirupsen/logrus",
        versions: ((1, 2, 0), (1, 9, 4)),
        why: "gets the terminal check that it lacks for wasip1",
        constrained: &[],
        files: carried!("../guests/go/_modules/github.com/sirupsen/logrus": "terminal_check_wasip1.go"),
    },
];

/// Finds the modules that lack something; `directory` gets what differs from theirs.
///
/// # Errors
/// [`ToolError::File`].
pub fn replacements(modules: &[Module], directory: &Path) -> Result<Vec<Replacement>, ToolError> {
    let mut replacements = Vec::new();
    for module in modules {
        let Some(patch) = patch(module) else { continue };
        let mut replacement = Replacement {
            module: module.clone(),
            files: BTreeMap::new(),
            why: patch.why,
        };
        list_files(&module.directory, Path::new(""), &mut replacement.files)?;
        let changed = directory.join(replacement.directory());
        for file in patch.constrained {
            // Some versions lack it.
            if let Some(source) = replacement.files.get_mut(Path::new(file)) {
                let text = fs::read_to_string(&source).map_err(ToolError::file(&*source))?;
                let target = changed.join(file);
                toolchain::write_if_changed(&target, permit(&text).as_bytes())?;
                *source = target;
            }
        }
        toolchain::unpack(patch.files, &changed)?;
        for file in patch.files {
            let path = PathBuf::from(file.path);
            replacement.files.insert(path, changed.join(file.path));
        }
        replacements.push(replacement);
    }
    Ok(replacements)
}

fn patch(module: &Module) -> Option<&'static Patch> {
    let version = release(&module.version);
    PATCHES.iter().find(|patch| {
        let (first, end) = patch.versions;
        patch.module == module.path && first <= version && version < end
    })
}

/// The numbers of `v1.9.3` or `v1.9.3-pre+incompatible`.
fn release(version: &str) -> Release {
    let numbers = version.trim_start_matches('v').split(['-', '+']).next();
    let mut numbers = numbers
        .unwrap_or_default()
        .split('.')
        .map(|n| n.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

fn list_files(
    directory: &Path,
    below: &Path,
    files: &mut BTreeMap<PathBuf, PathBuf>,
) -> Result<(), ToolError> {
    for entry in fs::read_dir(directory).map_err(ToolError::file(directory))? {
        let entry = entry.map_err(ToolError::file(directory))?;
        let (source, path) = (entry.path(), below.join(entry.file_name()));
        let kind = entry.file_type().map_err(ToolError::file(&source))?;
        if kind.is_dir() {
            list_files(&source, &path, files)?;
        } else if kind.is_file() {
            files.insert(path, source);
        }
    }
    Ok(())
}

/// Adds `wasip1` to a file's build constraint.
fn permit(text: &str) -> String {
    text.lines()
        .map(|line| match line.strip_prefix("//go:build ") {
            Some(constraint) if !constraint.contains("wasip1") => {
                format!("//go:build ({constraint}) || wasip1\n")
            }
            _ => format!("{line}\n"),
        })
        .collect()
}

/// What commonly helps with what a failed build said: a line for each, each after a line feed.
pub fn hints(messages: &[String], modules: &[Module]) -> String {
    let hints: BTreeSet<String> = messages
        .iter()
        .filter_map(|message| hint(message, modules))
        .collect();
    hints
        .into_iter()
        .map(|hint| format!("\n  {hint}"))
        .collect()
}

fn hint(message: &str, modules: &[Module]) -> Option<String> {
    let module = modules.iter().find(|module| {
        let directory = format!("/{}@{}/", module.path, module.version);
        message.contains(&directory)
    });
    if let (Some(module), Some((_, symbol))) = (module, message.split_once("undefined: ")) {
        return Some(format!(
            "{} {} has no `{}` for wasip1: a newer version may have, or `replace` it by a copy with that in a file whose name ends in _wasip1.go",
            module.path,
            module.version,
            symbol.trim(),
        ));
    }
    if message.contains("build constraints exclude all Go files")
        || message.contains("C source files not allowed")
    {
        let package = message
            .split_whitespace()
            .map(|word| word.trim_end_matches(':'))
            .find(|word| word.contains('/'))
            .unwrap_or("a package");
        return Some(format!(
            "{package} is for other systems alone, or in C (cgo), neither of which a child can have: leave out what imports it by a build tag (--tags), or use a version or module in pure Go"
        ));
    }
    if let Some((_, symbol)) = message.split_once("undefined: ")
        && ["syscall.", "unix."]
            .iter()
            .any(|package| symbol.starts_with(package))
    {
        return Some(format!(
            "`{}` is a system call that a child does not have: put it into a file with `//go:build !wasip1`, and what a child does instead into one ending in _wasip1.go",
            symbol.trim(),
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str, version: &str) -> Module {
        Module {
            path: path.into(),
            version: version.into(),
            directory: PathBuf::new(),
        }
    }

    #[test]
    fn patches_are_for_some_versions() {
        let why = |path, version| {
            patch(&module(path, version)).map(|p| p.files.first().map(|f| f.content))
        };
        assert!(why("github.com/sirupsen/logrus", "v1.9.3").is_some());
        assert!(why("github.com/sirupsen/logrus", "v1.9.4").is_none());
        assert!(
            why(
                "github.com/sirupsen/logrus",
                "v1.8.2-0.20210101000000-abcdef"
            )
            .is_some()
        );
        assert!(why("github.com/fsnotify/fsnotify", "v1.4.9").is_none());
        let [six, seven, eight, later] = ["v1.6.0", "v1.7.0", "v1.8.0", "v1.99.0"]
            .map(|version| why("github.com/fsnotify/fsnotify", version).flatten());
        assert!(six != seven && seven != eight && eight == later);
    }

    #[test]
    fn a_copy_has_what_its_module_lacks() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("source");
        fs::create_dir_all(source.join("internal/pathutil")).unwrap();
        let text = "// Comment.\n\n//go:build aix || linux\n\npackage xdg\n";
        for file in [
            "paths_unix.go",
            "internal/pathutil/pathutil_unix.go",
            "xdg.go",
        ] {
            fs::write(source.join(file), text).unwrap();
        }
        let mut xdg = module("github.com/adrg/xdg", "v0.5.3");
        xdg.directory = source;
        let made =
            replacements(&[xdg, module("example.com/x", "v1.0.0")], directory.path()).unwrap();
        assert_eq!(made.len(), 1);
        let read = |file| fs::read_to_string(&made[0].files[Path::new(file)]).unwrap();
        assert!(read("paths_unix.go").contains("//go:build (aix || linux) || wasip1\n\npackage"));
        assert!(read("internal/pathutil/pathutil_unix.go").contains("wasip1"));
        assert_eq!(read("xdg.go"), text);
    }

    #[test]
    fn a_failed_build_is_explained() {
        let modules = [module("github.com/a/b", "v1.2.3")];
        let messages = [
            "# github.com/a/b",
            "../../go/pkg/mod/github.com/a/b@v1.2.3/tty.go:12:5: undefined: isTerminal",
            "../../go/pkg/mod/github.com/a/b@v1.2.3/tty.go:19:5: undefined: isTerminal",
            "main.go:9:2: undefined: syscall.Kill",
            "package example.com/x imports github.com/c/d: build constraints exclude all Go files in /c/d",
            "main.go:10:2: undefined: typo",
        ];
        let hints = hints(&messages.map(str::to_owned), &modules);
        let lines: Vec<_> = hints.lines().filter(|l| !l.is_empty()).collect();
        assert_eq!(lines.len(), 3, "{hints}");
        for part in [
            "github.com/a/b v1.2.3 has no `isTerminal`",
            "`syscall.Kill`",
            "(cgo)",
        ] {
            assert!(hints.contains(part), "{part} in {hints}");
        }
    }
}
