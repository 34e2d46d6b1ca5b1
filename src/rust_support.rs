//! What makes a kube-rs program a child: the crates of `guests/support`, which this program
//! carries, and a copy of tokio under another name.
//!
//! A crate there whose version ends in `.999` stands in for the one of that name on crates.io.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::toolchain::{Carried, ToolError, output, write_if_changed};

/// How to get cargo.
pub const CARGO_HELP: &str = "install Rust with rustup";

/// The workspace of the sample operators: its profile is that of all children.
const GUESTS: &str = include_str!("../guests/Cargo.toml");

const SUPPORT: &[Carried] = crate::carried!("../guests/support":
    "abi/Cargo.toml",
    "abi/src/lib.rs",
    "gloo-timers/Cargo.toml",
    "gloo-timers/src/lib.rs",
    "guest/Cargo.toml",
    "guest/src/executor.rs",
    "guest/src/exports.rs",
    "guest/src/lib.rs",
    "guest/src/stop.rs",
    "guest/src/transport.rs",
    "home/Cargo.toml",
    "home/src/lib.rs",
    "hostname/Cargo.toml",
    "hostname/src/lib.rs",
    "hyper-openssl/Cargo.toml",
    "hyper-openssl/src/lib.rs",
    "hyper-rustls/Cargo.toml",
    "hyper-rustls/src/lib.rs",
    "hyper-util/Cargo.toml",
    "hyper-util/src/lib.rs",
    "hyper/Cargo.toml",
    "hyper/src/lib.rs",
    "jsonpath-rust/Cargo.toml",
    "jsonpath-rust/src/lib.rs",
    "openssl/Cargo.toml",
    "openssl/src/lib.rs",
    "rustls-platform-verifier/Cargo.toml",
    "rustls-platform-verifier/src/lib.rs",
    "rustls/Cargo.toml",
    "rustls/src/lib.rs",
    "serde-saphyr/Cargo.toml",
    "serde-saphyr/src/lib.rs",
    "tokio/Cargo.toml",
    "tokio/fetch/Cargo.lock",
    "tokio/fetch/Cargo.toml",
    "tokio/fetch/src/lib.rs",
    "tokio/src/lib.rs",
);

/// A crate that replaces another of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandIn {
    /// Its name, and that of its folder.
    pub name: &'static str,
    /// What the versions that it replaces begin with, such as `0.1.`.
    pub series: &'static str,
}

/// All of them.
pub fn stand_ins() -> impl Iterator<Item = StandIn> {
    SUPPORT.iter().filter_map(|file| {
        let name = file.path.strip_suffix("/Cargo.toml")?;
        let version = quoted(file.content, "version = ")?;
        let series = &version[..version.find("999")?];
        Some(StandIn { name, series })
    })
}

/// What stands in quotes behind `key` at the beginning of a line.
fn quoted<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().strip_prefix('"')?.strip_suffix('"')
}

/// The lines of a section of the sample operators' manifest.
fn section(name: &str) -> impl Iterator<Item = &'static str> {
    let header = format!("[{name}]");
    GUESTS
        .lines()
        .skip_while(move |line| *line != header)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Settings of the release profile, each as cargo's `--config` wants it.
pub fn profile() -> Vec<String> {
    let set = section("profile.release").map(str::to_owned);
    // What a project may have set and these do not go together with.
    let unset = ["debug = false", "incremental = false"].map(str::to_owned);
    let lines = set.chain(unset);
    lines
        .map(|line| format!("profile.release.{line}"))
        .collect()
}

/// What names this version of the carried files.
pub fn stamp() -> String {
    let mut hasher = blake3::Hasher::new();
    for file in SUPPORT {
        hasher.update(file.path.as_bytes());
        hasher.update(file.content.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Leaves the crates in a directory, ready for use.
///
/// # Errors
/// When files cannot be written, or tokio cannot be fetched.
pub fn provide(to: &Path) -> Result<(), ToolError> {
    for file in SUPPORT {
        let text = stand_alone(file.content);
        write_if_changed(&to.join(file.path), text.as_bytes())?;
    }
    copy_tokio(&to.join("tokio"))
}

/// A manifest that inherits nothing: cargo would look in the operator's workspace.
fn stand_alone(text: &str) -> String {
    section("workspace.package").fold(text.to_owned(), |text, line| {
        let key = line.split(' ').next().unwrap_or_default();
        text.replace(&format!("{key}.workspace = true"), line)
    })
}

/// The part of `cargo metadata`'s answer that says where a crate's source is.
#[derive(Deserialize)]
struct Fetched {
    packages: Vec<FetchedPackage>,
}

#[derive(Deserialize)]
struct FetchedPackage {
    name: String,
    manifest_path: PathBuf,
}

/// Copies tokio to `upstream`, with another name: the same as `guests/prepare.sh` does.
fn copy_tokio(tokio: &Path) -> Result<(), ToolError> {
    let fetch = tokio.join("fetch/Cargo.toml");
    let upstream = tokio.join("upstream");
    let marker = upstream.join(".made-from");
    let manifest = SUPPORT.iter().find(|f| f.path == "tokio/fetch/Cargo.toml");
    let version = manifest.and_then(|f| quoted(f.content, "tokio = "));
    // The number changes with what is done below.
    let made_from = format!("{} 1", version.unwrap_or_default());
    if fs::read_to_string(&marker).is_ok_and(|old| old == made_from) {
        return Ok(());
    }
    // By a manifest of its own, since the patches would replace the very crate that is wanted. Its
    // lock file has the checksum.
    let mut command = toolchain_command("cargo");
    command
        .args([
            "metadata",
            "--locked",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(&fetch)
        .current_dir(tokio);
    let answer = output("cargo", CARGO_HELP, &mut command)?;
    let source = serde_json::from_str::<Fetched>(&answer)
        .ok()
        .and_then(|fetched| fetched.packages.into_iter().find(|p| p.name == "tokio"))
        .and_then(|package| Some(package.manifest_path.parent()?.to_owned()))
        .ok_or(ToolError::Failed {
            tool: "cargo metadata",
        })?;

    // Made beside its place and moved there: what is half made has another name.
    let copy = tempfile::tempdir_in(tokio).map_err(ToolError::file(tokio))?;
    for part in ["src", "Cargo.toml", "LICENSE"] {
        copy_tree(&source.join(part), &copy.path().join(part))?;
    }
    let path = copy.path().join("Cargo.toml");
    let text = fs::read_to_string(&path).map_err(ToolError::file(&path))?;
    fs::write(&path, renamed(&text)).map_err(ToolError::file(&path))?;
    let path = copy.path().join(".made-from");
    fs::write(&path, made_from).map_err(ToolError::file(&path))?;
    match fs::remove_dir_all(&upstream) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(ToolError::file(upstream)(error));
        }
        _ => {}
    }
    fs::rename(copy.keep(), &upstream).map_err(ToolError::file(&upstream))
}

/// tokio's manifest with other names of package and library, and without its tests, which need
/// crates that nobody else does.
fn renamed(manifest: &str) -> String {
    let mut names = ["tokio-upstream", "tokio_upstream"].into_iter();
    let mut skipping = false;
    let mut text = String::with_capacity(manifest.len());
    for line in manifest.lines() {
        if line.starts_with('[') {
            skipping = ["[[test]]", "[[bench]]", "[[example]]"].contains(&line);
        }
        if skipping {
            continue;
        }
        match (line == "name = \"tokio\"").then(|| names.next()).flatten() {
            Some(name) => text.push_str(&format!("name = \"{name}\"")),
            None => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

fn copy_tree(from: &Path, to: &Path) -> Result<(), ToolError> {
    let metadata = match fs::metadata(from) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(ToolError::file(from))?,
    };
    if metadata.is_file() {
        // Not `copy`, which would keep the registry's permissions.
        let content = fs::read(from).map_err(ToolError::file(from))?;
        return fs::write(to, content).map_err(ToolError::file(to));
    }
    fs::create_dir_all(to).map_err(ToolError::file(to))?;
    for entry in fs::read_dir(from).map_err(ToolError::file(from))? {
        let name = entry.map_err(ToolError::file(from))?.file_name();
        copy_tree(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}

/// A tool of Rust, without what this process' environment says about other builds.
pub fn toolchain_command(tool: &str) -> std::process::Command {
    let mut command = std::process::Command::new(tool);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_of_another_build) {
            command.env_remove(name);
        }
    }
    command
}

/// Whether a variable would change a child's code. Those of registries, proxies, wrappers and the
/// number of jobs are the user's to set.
fn is_of_another_build(name: &str) -> bool {
    const PREFIXES: &[&str] = &[
        "CARGO_PROFILE_",
        "CARGO_TARGET_",
        "CARGO_PKG_",
        "CARGO_BIN_",
        "CARGO_FEATURE_",
        "CARGO_CFG_",
        "CARGO_MANIFEST_",
    ];
    const NAMES: &[&str] = &[
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_BUILD_BUILD_DIR",
        "CARGO_INCREMENTAL",
        "CARGO_BUILD_INCREMENTAL",
        "CARGO_CRATE_NAME",
        "CARGO_PRIMARY_PACKAGE",
    ];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn every_support_file_that_git_knows_is_carried() {
        let files = Command::new("git")
            .args(["ls-files", "guests/support"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        let files = String::from_utf8(files.stdout).unwrap();
        let mut known: Vec<_> = files
            .lines()
            .map(|f| f.trim_start_matches("guests/support/"))
            .collect();
        known.sort_unstable();
        let mut carried: Vec<_> = SUPPORT.iter().map(|f| f.path).collect();
        carried.sort_unstable();
        assert_eq!(carried, known);
    }

    #[test]
    fn what_the_samples_patch_stands_in() {
        let all: Vec<_> = stand_ins().collect();
        assert!(all.contains(&StandIn {
            name: "tokio",
            series: "1."
        }));
        assert!(all.contains(&StandIn {
            name: "hyper-util",
            series: "0.1."
        }));
        for line in section("patch.crates-io") {
            let name = line.split(' ').next().unwrap();
            assert!(all.iter().any(|s| s.name == name), "{name}");
        }
        assert!(!all.iter().any(|s| s.name == "abi"));
    }

    #[test]
    fn the_profile_is_that_of_the_samples() {
        let profile = profile();
        assert!(profile.contains(&"profile.release.panic = \"abort\"".to_owned()));
        assert!(profile.contains(&"profile.release.lto = true".to_owned()));
    }

    #[test]
    fn no_crate_inherits() {
        for file in SUPPORT {
            let text = stand_alone(file.content);
            assert!(!text.contains(".workspace = true"), "{}", file.path);
        }
        assert_eq!(
            stand_alone("edition.workspace = true\n"),
            "edition = \"2024\"\n"
        );
    }

    #[test]
    fn tokio_gets_another_name() {
        let manifest = "[package]\nname = \"tokio\"\n\n[lib]\nname = \"tokio\"\n\n[[test]]\nname = \"x\"\n\n[features]\na = []\n";
        assert_eq!(
            renamed(manifest),
            "[package]\nname = \"tokio-upstream\"\n\n[lib]\nname = \"tokio_upstream\"\n\n[features]\na = []\n"
        );
    }
}
