//! A mirror of a checkout, in which nothing is different but the lock file.
//!
//! cargo has no way yet to use a lock file that lies elsewhere, and a child's differs from the
//! project's: the replaced crates are in it. So cargo is shown a directory tree of ours, in which
//! the path from `/` to the workspace's root is real directories and everything beside it is a
//! symbolic link. Paths that lead out of the workspace (`../library`), configuration and toolchain
//! files of outer directories are found as ever, and what cargo writes stays in the mirror.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::rust_support::{self, StandIn};
use crate::toolchain::ToolError;

/// In the mirror's root; leads to the crates of ours. Inside the root, since cargo hashes the path
/// of a crate outside it into its symbols, and the same input shall give the same bytes.
pub const SUPPORT_LINK: &str = ".wasm-operator";

/// What the mirror of a workspace's root leaves out.
const NOT_MIRRORED: &[&str] = &[
    // Programs that ask git for the state of the tree would write into it.
    ".git",
    // Ours is different.
    "Cargo.lock",
    // Large, and of no use to a build elsewhere.
    "target",
    SUPPORT_LINK,
];

/// Files of outer directories that mean something to cargo and rustup.
const OUTER_FILES: &[&str] = &["Cargo.toml", "rust-toolchain", "rust-toolchain.toml"];

/// A mirror.
#[derive(Debug)]
pub struct Mirror {
    /// Stands for `/`.
    tree: PathBuf,
    /// Stands for the workspace's root.
    pub root: PathBuf,
    stamp: PathBuf,
}

impl Mirror {
    /// Makes or updates a mirror, in a directory of its own, of the workspace at `root`, an absolute
    /// path without links.
    ///
    /// # Errors
    /// [`ToolError::File`].
    pub fn update(directory: &Path, root: &Path, support: &Path) -> Result<Self, ToolError> {
        let tree = directory.join("tree");
        // cargo reads the configuration there in any case, and would read it twice.
        let cargo_home = cargo_home();
        let (mut real, mut copy) = (PathBuf::from("/"), tree.clone());
        for name in root.iter().skip(1) {
            let mut links = BTreeMap::new();
            // Directories may be entered that may not be listed.
            for entry in fs::read_dir(&real).into_iter().flatten().flatten() {
                let (entry, path) = (entry.file_name(), entry.path());
                let wanted = path.is_dir() || OUTER_FILES.iter().any(|f| entry == *f);
                if wanted && entry != name && cargo_home.as_ref() != Some(&path) {
                    links.insert(entry, path);
                }
            }
            link(&copy, &links, &[name])?;
            real.push(name);
            copy.push(name);
        }
        let mut links = BTreeMap::new();
        for entry in fs::read_dir(root).map_err(ToolError::file(root))? {
            let entry = entry.map_err(ToolError::file(root))?;
            if !NOT_MIRRORED.iter().any(|name| entry.file_name() == *name) {
                links.insert(entry.file_name(), entry.path());
            }
        }
        links.insert(SUPPORT_LINK.into(), support.to_owned());
        link(&copy, &links, &[OsStr::new("Cargo.lock")])?;
        let mirror = Self {
            tree,
            root: copy,
            stamp: directory.join("lock-made-from"),
        };
        mirror.update_lock(root)?;
        Ok(mirror)
    }

    /// Where the mirror has a file.
    pub fn path(&self, real: &Path) -> PathBuf {
        self.tree.join(real.strip_prefix("/").unwrap_or(real))
    }

    /// Which file it is that the mirror has there.
    pub fn real(&self, path: &Path) -> PathBuf {
        match path.strip_prefix(&self.tree) {
            Ok(path) => Path::new("/").join(path),
            Err(_) => path.to_owned(),
        }
    }

    /// Stands for `/`.
    pub fn tree(&self) -> &Path {
        &self.tree
    }

    fn lock(&self) -> PathBuf {
        self.root.join("Cargo.lock")
    }

    /// Starts from the project's lock file when that has changed, else keeps what was made of it.
    fn update_lock(&self, root: &Path) -> Result<(), ToolError> {
        let path = root.join("Cargo.lock");
        let theirs = match fs::read(&path) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(ToolError::file(path)(error)),
        };
        let digest = blake3::hash(theirs.as_deref().unwrap_or_default());
        let stamp = format!("{digest} {}", rust_support::stamp());
        let ours = self.lock();
        if ours.exists() && fs::read_to_string(&self.stamp).is_ok_and(|old| old == stamp) {
            return Ok(());
        }
        match theirs {
            Some(bytes) => fs::write(&ours, bytes).map_err(ToolError::file(&ours))?,
            None => remove(&ours)?,
        }
        fs::write(&self.stamp, stamp).map_err(ToolError::file(&self.stamp))
    }

    /// Takes the crates that are replaced out of the lock file, all other pins stay. Says which
    /// stand-ins the lock file has use for, and whether it was changed.
    ///
    /// # Errors
    /// [`ToolError::File`].
    pub fn replace(&self) -> Result<(Vec<StandIn>, bool), ToolError> {
        let path = self.lock();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Vec::new(), false));
            }
            Err(error) => return Err(ToolError::file(path)(error)),
        };
        let (kept, used) = without_replaced(&text);
        let changed = kept != text;
        if changed {
            fs::write(&path, kept).map_err(ToolError::file(&path))?;
        }
        Ok((used, changed))
    }
}

/// These do as much as kube-client wants of them and no more.
const FOR_KUBE_ONLY: &[&str] = &["home", "jsonpath-rust", "serde-saphyr"];

/// A package of a lock file: what stands behind `[[package]]`.
#[derive(Clone, Copy)]
struct Locked<'a>(&'a str);

impl<'a> Locked<'a> {
    fn value(self, key: &str) -> &'a str {
        let line = self.0.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_default().trim_matches('"')
    }

    fn uses(self, name: &str) -> bool {
        // `"name",`, or with the version when there are several.
        let mut lines = self.0.lines().filter_map(|line| line.strip_prefix(" \""));
        lines.any(|line| line.split(['"', ' ']).next() == Some(name))
    }

    fn stand_in(self, all: &[Self]) -> Option<StandIn> {
        let (name, version) = (self.value("name = "), self.value("version = "));
        let stand_in = rust_support::stand_ins().find(|s| s.name == name)?;
        let mut others = all.iter().filter(|p| p.value("name = ") != "kube-client");
        let wanted = !FOR_KUBE_ONLY.contains(&name) || !others.any(|p| p.uses(name));
        (wanted && version.starts_with(stand_in.series)).then_some(stand_in)
    }
}

/// A lock file without the packages for which there is a stand-in, and which stand-ins those are
/// (together with those that are in it already).
fn without_replaced(lock: &str) -> (String, Vec<StandIn>) {
    const PACKAGE: &str = "[[package]]\n";
    let mut blocks = lock.split(PACKAGE);
    let mut kept = blocks.next().unwrap_or_default().to_owned();
    let all: Vec<_> = blocks.map(Locked).collect();
    let mut used = Vec::new();
    for package in &all {
        let stand_in = package.stand_in(&all);
        used.extend(stand_in);
        if stand_in.is_none() || package.value("source = ").is_empty() {
            kept.push_str(PACKAGE);
            kept.push_str(package.0);
        }
    }
    (kept, used)
}

/// Makes a directory have these links and no others; what is named in `keep` is not a link.
fn link(
    directory: &Path,
    links: &BTreeMap<OsString, PathBuf>,
    keep: &[&OsStr],
) -> Result<(), ToolError> {
    fs::create_dir_all(directory).map_err(ToolError::file(directory))?;
    let mut there = Vec::new();
    for entry in fs::read_dir(directory).map_err(ToolError::file(directory))? {
        let entry = entry.map_err(ToolError::file(directory))?;
        let (name, path) = (entry.file_name(), entry.path());
        let target = fs::read_link(&path).ok();
        if target.is_some() && target.as_ref() == links.get(&name) {
            there.push(name);
        } else if target.is_some() {
            remove(&path)?;
        } else if !keep.contains(&&*name) {
            // A directory of an older version, or what a tool has written into the root.
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => remove(&path)?,
                other => other.map_err(ToolError::file(&path))?,
            }
        }
    }
    for (name, target) in links {
        if !there.contains(name) {
            let path = directory.join(name);
            symlink(target, &path).map_err(ToolError::file(&path))?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), ToolError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ToolError::file(path)(error)),
        _ => Ok(()),
    }
}

/// Where cargo keeps its registry.
pub fn cargo_home() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    let home = variable("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cargo")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_shows_the_checkout_and_what_is_around_it() {
        let directory = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(directory.path()).unwrap();
        let (root, work) = (base.join("checkout/operator"), base.join("work"));
        for file in [
            "checkout/library/src/lib.rs",
            "checkout/operator/src/main.rs",
        ] {
            fs::create_dir_all(base.join(file).parent().unwrap()).unwrap();
            fs::write(base.join(file), file).unwrap();
        }
        fs::create_dir_all(root.join(".git")).unwrap();
        fs::write(root.join("Cargo.lock"), "version = 4\n").unwrap();
        fs::write(base.join("checkout/rust-toolchain"), "stable").unwrap();
        fs::create_dir_all(&work).unwrap();
        let mirror = Mirror::update(&work, &root, &base).unwrap();
        let read = |path: &str| fs::read_to_string(mirror.root.join(path));
        assert_eq!(
            read("src/main.rs").unwrap(),
            "checkout/operator/src/main.rs"
        );
        assert_eq!(
            read("../library/src/lib.rs").unwrap(),
            "checkout/library/src/lib.rs"
        );
        assert_eq!(read("../rust-toolchain").unwrap(), "stable");
        assert_eq!(read("Cargo.lock").unwrap(), "version = 4\n");
        assert!(!mirror.root.join(".git").exists());
        assert_eq!(mirror.real(&mirror.path(&root)), root);
        // What cargo makes of the lock file stays until the project's changes.
        fs::write(mirror.root.join("Cargo.lock"), "version = 4\n# ours\n").unwrap();
        fs::rename(root.join("src"), root.join("source")).unwrap();
        Mirror::update(&work, &root, &base).unwrap();
        assert!(read("Cargo.lock").unwrap().ends_with("# ours\n"));
        assert!(read("src/main.rs").is_err());
        assert!(read("source/main.rs").is_ok());
        fs::write(root.join("Cargo.lock"), "version = 3\n").unwrap();
        Mirror::update(&work, &root, &base).unwrap();
        assert_eq!(read("Cargo.lock").unwrap(), "version = 3\n");
    }

    #[test]
    fn only_what_has_a_stand_in_leaves_the_lock_file() {
        let package = |name: &str, version: &str, source: &str| {
            format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n{source}\n")
        };
        let registry = "source = \"registry+x\"\n";
        let lock = format!(
            "version = 4\n\n{}{}{}{}",
            package("hyper", "0.14.32", registry),
            package("hyper", "1.6.0", registry),
            package("serde", "1.0.0", registry),
            package("tokio", "1.999.0", ""),
        );
        let (kept, used) = without_replaced(&lock);
        let names: Vec<_> = used.iter().map(|s| s.name).collect();
        assert_eq!(names, ["hyper", "tokio"]);
        assert!(kept.contains("0.14.32") && kept.contains("serde") && kept.contains("1.999.0"));
        assert!(!kept.contains("1.6.0"));
        assert_eq!(without_replaced(&kept).0, kept);
        // What does for kube-client may not do for others.
        let user = |name| package(name, "1.0.0", "dependencies = [\n \"home 0.5.9\",\n]\n");
        let home = package("home", "0.5.9", registry);
        for (lock, count) in [
            (format!("{home}{}", user("kube-client")), 1),
            (format!("{home}{}{}", user("kube-client"), user("mine")), 0),
        ] {
            assert_eq!(without_replaced(&lock).1.len(), count);
        }
    }
}
