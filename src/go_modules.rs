//! Modules of a Go program that are built with changes, for they do not know `wasip1`.
//!
//! Most Go code is portable; some modules have a file for each system they know, and none for
//! others. What is done about which is in [`go_patches`].
//!
//! [`go_patches`]: crate::go_patches

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::go_patches::{self, Patch, Step};
use crate::toolchain::{self, ToolError};

/// A module of the program's build list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Module {
    /// Its path.
    pub path: String,
    /// Its version.
    pub version: String,
    /// Path and version of what it is built from: the program may replace it.
    pub source: (String, String),
    /// Replaced by a directory of the program's: its own affair.
    pub is_local: bool,
    /// Where its source is.
    pub directory: PathBuf,
}

impl Module {
    /// What `go list -f` prints for [`Module::parse`].
    pub const FORMAT: &str = "{{with .Module}}{{if .Version}}{{.Path}}\t{{.Version}}\t{{.Dir}}\t{{with .Replace}}{{.Path}}\t{{.Version}}{{end}}{{end}}{{end}}";

    /// Reads a line of [`Module::FORMAT`].
    pub fn parse(line: &str) -> Option<Self> {
        let mut parts = line.split('\t');
        let (path, version, directory) = (parts.next()?, parts.next()?, parts.next()?);
        let source = match (parts.next().filter(|p| !p.is_empty()), parts.next()) {
            (Some(path), Some(version)) => (path.to_owned(), version.to_owned()),
            _ => (path.to_owned(), version.to_owned()),
        };
        Some(Self {
            is_local: source.1.is_empty(),
            path: path.into(),
            version: version.into(),
            source,
            directory: directory.into(),
        })
    }
}

/// A module to be built with changes.
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

/// Finds the modules that need changes; `directory` gets the files that differ from theirs.
///
/// # Errors
/// [`ToolError::File`].
pub fn replacements(modules: &[Module], directory: &Path) -> Result<Vec<Replacement>, ToolError> {
    let mut replacements = Vec::new();
    for module in modules.iter().filter(|module| !module.is_local) {
        let Some(patch) = go_patches::find(&module.source.0, &module.source.1) else {
            continue;
        };
        if let Some(files) = patched(module, patch, directory)? {
            replacements.push(Replacement {
                module: module.clone(),
                files,
                why: patch.why,
            });
        }
    }
    Ok(replacements)
}

/// The files of a module with its patch; none when nothing is to be done.
fn patched(
    module: &Module,
    patch: &Patch,
    directory: &Path,
) -> Result<Option<BTreeMap<PathBuf, PathBuf>>, ToolError> {
    // What is written for a file; nothing for one that is left out.
    let mut changed: Vec<(PathBuf, Option<Vec<u8>>)> = Vec::new();
    for step in patch.steps {
        match step {
            Step::Add(files) => changed.extend(
                files
                    .iter()
                    .map(|file| (file.path.into(), Some(file.content.into()))),
            ),
            Step::Like(file) => {
                if let Some(text) = read(&module.directory.join(file))? {
                    changed.push((for_wasip1(file), Some(unconstrained(&text).into())));
                }
            }
            Step::Without(file) => changed.push((file.into(), None)),
            Step::Change(file, find, replace) => {
                let before = match changed.iter().position(|(path, _)| path == Path::new(file)) {
                    Some(at) => changed.swap_remove(at).1,
                    None => read(&module.directory.join(file))?.map(String::into_bytes),
                };
                let Some(text) = before.and_then(|text| String::from_utf8(text).ok()) else {
                    continue;
                };
                changed.push((file.into(), Some(text.replace(find, replace).into())));
            }
        }
    }
    changed.retain(|(path, content)| {
        fs::read(module.directory.join(path)).ok().as_ref() != content.as_ref()
    });
    if changed.is_empty() {
        return Ok(None);
    }
    let (path, version) = &module.source;
    let ours = directory.join(format!("{path}@{version}"));
    let mut files = list_files(&module.directory)?;
    // Modules from before there were modules have none.
    if !files.contains_key(Path::new("go.mod")) {
        let content = format!("module {path}\n").into_bytes();
        changed.push(("go.mod".into(), Some(content)));
    }
    for (path, content) in changed {
        let Some(content) = content else {
            files.remove(&path);
            continue;
        };
        let target = ours.join(&path);
        toolchain::write_if_changed(&target, &content)?;
        files.insert(path, target);
    }
    Ok(Some(files))
}

fn read(path: &Path) -> Result<Option<String>, ToolError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ToolError::file(path)(error)),
    }
}

/// `a/b_js.go` as `a/b_js_wasip1.go`, which is built for `wasip1` only.
fn for_wasip1(file: &str) -> PathBuf {
    format!("{}_wasip1.go", file.trim_end_matches(".go")).into()
}

/// A Go file without its build constraints.
fn unconstrained(text: &str) -> String {
    text.split_inclusive('\n')
        .filter(|line| !line.starts_with("//go:build") && !line.starts_with("// +build"))
        .collect()
}

/// All files below a directory, by their path in it.
fn list_files(root: &Path) -> Result<BTreeMap<PathBuf, PathBuf>, ToolError> {
    let mut files = BTreeMap::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        let source = root.join(&directory);
        for entry in fs::read_dir(&source).map_err(ToolError::file(&source))? {
            let entry = entry.map_err(ToolError::file(&source))?;
            let path = directory.join(entry.file_name());
            let kind = entry.file_type().map_err(ToolError::file(entry.path()))?;
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_file() {
                files.insert(path, entry.path());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_gets_what_it_lacks_and_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("source");
        fs::create_dir_all(source.join("internal/pathutil")).unwrap();
        let text = "// Comment.\n\n//go:build aix || linux\n\npackage xdg\n";
        let names = [
            "paths_unix.go",
            "internal/pathutil/pathutil_unix.go",
            "xdg.go",
        ];
        for name in names {
            fs::write(source.join(name), text).unwrap();
        }
        let line = |path: &str| format!("{path}\tv0.5.3\t{}", source.display());
        let module = |path| Module::parse(&line(path)).unwrap();
        let modules = [module("github.com/adrg/xdg"), module("example.com/x")];
        let made = replacements(&modules, directory.path()).unwrap();
        assert_eq!(made.len(), 1);
        let read = |file: &str| fs::read_to_string(&made[0].files[Path::new(file)]).unwrap();
        for name in names {
            assert_eq!(read(name), text);
        }
        let added = "internal/pathutil/pathutil_unix_wasip1.go";
        assert_eq!(read(added), "// Comment.\n\n\npackage xdg\n");
        assert!(!source.join(added).exists());
    }
}
