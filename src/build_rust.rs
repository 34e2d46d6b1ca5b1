//! `wasm-operator build-rust`: makes a child module of an ordinary kube-rs operator's checkout, in
//! which nothing is changed and nothing written.
//!
//! cargo builds a [mirror](crate::rust_mirror) of the checkout, with the
//! [crates](crate::rust_support) that make a program a child in place of those that need an
//! operating system. What a child cannot have is [looked for](crate::rust_review) before.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use serde::Deserialize;
use thiserror::Error;

use crate::rust_mirror::{Mirror, SUPPORT_LINK, cargo_home};
use crate::rust_review::{self, Finding, Metadata, Package, Used};
use crate::rust_support::{self, CARGO_HELP, StandIn, toolchain_command};
use crate::toolchain::{ToolError, build_directory, install, output};

const TARGET: &str = "wasm32-wasip1";

/// A child's stack is empty between events, and each page of it that was ever touched is memory
/// that a child keeps.
const STACK: &str = "link-arg=-zstack-size=262144";

/// The crates of ours are in edition 2024.
const OLDEST_RUST: u32 = 85;

/// What to build.
#[derive(Args, Debug)]
pub struct Options {
    /// The operator's checkout: a directory with Cargo.toml.
    #[arg(value_name = "PROJECT")]
    pub project: PathBuf,
    /// A package of its workspace, by name or directory; needed when several have programs.
    #[arg(value_name = "PACKAGE")]
    pub package: Option<String>,
    /// The module to be made.
    #[arg(short, long, value_name = "OUT.wasm")]
    pub output: PathBuf,
    /// The program, when the package has several.
    #[arg(long, value_name = "NAME")]
    pub bin: Option<String>,
    /// Features of the package to build with, as cargo takes them.
    #[arg(long, value_name = "FEATURES")]
    pub features: Vec<String>,
    /// Leave out the package's default features.
    #[arg(long)]
    pub no_default_features: bool,
}

/// Why no child was made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// A tool, or a file of ours.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// No checkout.
    #[error("{}: there is no Cargo.toml; name the directory of a Rust project", .0.display())]
    NoManifest(PathBuf),
    /// What cargo says is not understood.
    #[error("`cargo metadata`: {0}")]
    Metadata(#[from] serde_json::Error),
    /// Nothing in the workspace is a program.
    #[error("there is no program in {}: a child needs a `main`", .0.display())]
    NoProgram(PathBuf),
    /// There are several.
    #[error("which {what}? there are: {candidates}; name it {how}")]
    Ambiguous {
        /// Package or program.
        what: &'static str,
        /// Those that it may be.
        candidates: String,
        /// Where on the command line.
        how: &'static str,
    },
    /// There is none of that name.
    #[error("there is no {what} `{name}`; there are: {candidates}")]
    Unknown {
        /// Package or program.
        what: &'static str,
        /// What was asked for.
        name: String,
        /// Those that there are.
        candidates: String,
    },
    /// The toolchain is too old.
    #[error(
        "{version} is too old for a child, which needs 1.{OLDEST_RUST}; if the project's rust-toolchain file asks for it, try: RUSTUP_TOOLCHAIN=stable wasm-operator build-rust ..."
    )]
    OldRust {
        /// What it calls itself.
        version: String,
    },
    /// A child cannot have it.
    #[error("this cannot become a child:\n{}", list(.0))]
    Refused(Vec<Finding>),
    /// rustc has said why.
    #[error("cargo build failed{}", likely(.0))]
    Failed(Vec<Finding>),
}

fn list(findings: &[Finding]) -> String {
    let lines: Vec<_> = findings.iter().map(|f| format!("- {f}")).collect();
    lines.join("\n")
}

fn likely(findings: &[Finding]) -> String {
    if findings.is_empty() {
        // Whatever it is, rustc named it.
        return "; guests/README.md says what a child cannot have".to_owned();
    }
    format!(
        "; what a child cannot have is likely why:\n{}",
        list(findings)
    )
}

/// Builds a child.
///
/// # Errors
/// [`BuildError`].
pub fn build(options: &Options) -> Result<(), BuildError> {
    let manifest = manifest(&options.project)?;
    let project = look(&manifest)?;
    let (package, program) = choose(&project, &manifest, options)?;

    let ours = build_directory()?.join("rust");
    let support = ours.join("support");
    let name = project.workspace_root.file_name().unwrap_or_default();
    let digest = blake3::hash(project.workspace_root.as_os_str().as_encoded_bytes()).to_hex();
    let directory = ours.join(format!("{}-{}", name.to_string_lossy(), &digest[..16]));
    fs::create_dir_all(&directory).map_err(ToolError::file(&directory))?;
    let common = lock(&ours.join("lock"))?;
    rust_support::provide(&support)?;
    drop(common);
    let _this_one = lock(&directory.join("lock"))?;
    let mirror = Mirror::update(&directory, &project.workspace_root, &support)?;

    let build = Build {
        manifest: mirror.path(&package.manifest_path),
        target: directory.join("target"),
        mirror,
        features: features(options),
    };
    build.check_toolchain()?;
    let (metadata, stand_ins) = build.resolve()?;
    let (findings, own) = rust_review::crates(&metadata, &build.used(&stand_ins)?, &build.manifest);
    let (fatal, mut likely): (Vec<_>, Vec<_>) = findings.into_iter().partition(|f| f.fatal);
    if !fatal.is_empty() {
        return Err(BuildError::Refused(fatal));
    }
    likely.extend(rust_review::sources(&own, &build.mirror));
    for finding in &likely {
        say(&format!("this may not work in a child: {finding}"));
    }
    let module = build
        .run(program, &stand_ins)?
        .ok_or(BuildError::Failed(likely))?;
    let length = install(&module, &options.output)?;
    println!(
        "build-rust: {:4} KiB  {}",
        length / 1024,
        options.output.display()
    );
    Ok(())
}

fn say(text: &str) {
    eprintln!("build-rust: {text}");
}

/// Held until it is dropped; another build waits.
fn lock(path: &Path) -> Result<fs::File, ToolError> {
    let file = fs::File::create(path).map_err(ToolError::file(path))?;
    file.lock().map_err(ToolError::file(path))?;
    Ok(file)
}

fn manifest(project: &Path) -> Result<PathBuf, BuildError> {
    let directory = fs::canonicalize(project).map_err(ToolError::file(project))?;
    let manifest = match directory.file_name() {
        Some(name) if name == "Cargo.toml" => directory,
        _ => directory.join("Cargo.toml"),
    };
    if manifest.is_file() {
        Ok(manifest)
    } else {
        Err(BuildError::NoManifest(project.to_owned()))
    }
}

/// The workspace, without its dependencies: this writes nothing.
fn look(manifest: &Path) -> Result<Metadata, BuildError> {
    let mut command = toolchain_command("cargo");
    command
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(manifest)
        .current_dir(manifest.parent().unwrap_or(Path::new("/")));
    Ok(serde_json::from_str(&output(
        "cargo",
        CARGO_HELP,
        &mut command,
    )?)?)
}

/// The package and the program that are meant.
fn choose<'a>(
    project: &'a Metadata,
    manifest: &Path,
    options: &'a Options,
) -> Result<(&'a Package, &'a str), BuildError> {
    let members = project
        .packages
        .iter()
        .filter(|p| project.workspace_members.contains(&p.id));
    let runnable: Vec<_> = members.filter(|p| p.programs().next().is_some()).collect();
    let names = || {
        let names: Vec<_> = runnable.iter().map(|p| p.name.as_str()).collect();
        names.join(", ")
    };
    let of_manifest = |path: &Path| runnable.iter().find(|p| p.manifest_path == path).copied();
    let bin = options.bin.as_deref();
    let package = if let Some(name) = &options.package {
        let by_path = || {
            let base = manifest.parent()?.join(name);
            of_manifest(&fs::canonicalize(base).ok()?.join("Cargo.toml"))
        };
        let by_name = runnable.iter().find(|p| p.name == *name).copied();
        by_name
            .or_else(by_path)
            .ok_or_else(|| BuildError::Unknown {
                what: "package with a program",
                name: name.clone(),
                candidates: names(),
            })?
    } else if let Some(package) = of_manifest(manifest) {
        package
    } else {
        let with_bin: Vec<_> = runnable
            .iter()
            .copied()
            .filter(|p| bin.is_none_or(|bin| p.programs().any(|program| program == bin)))
            .collect();
        match with_bin[..] {
            [package] => package,
            _ if runnable.is_empty() => {
                return Err(BuildError::NoProgram(project.workspace_root.clone()));
            }
            _ => {
                return Err(BuildError::Ambiguous {
                    what: "package",
                    candidates: names(),
                    how: "behind PROJECT",
                });
            }
        }
    };
    Ok((package, program(package, bin)?))
}

fn program<'a>(package: &'a Package, bin: Option<&'a str>) -> Result<&'a str, BuildError> {
    let programs: Vec<_> = package.programs().collect();
    let there = |name: &str| programs.iter().find(|p| **p == name).copied();
    match bin {
        Some(name) => there(name).ok_or_else(|| BuildError::Unknown {
            what: "program",
            name: name.to_owned(),
            candidates: programs.join(", "),
        }),
        None if programs.len() == 1 => Ok(programs[0]),
        // The usual helper beside the operator prints its custom resource definitions.
        None => package
            .default_run
            .as_deref()
            .and_then(there)
            .or_else(|| there(&package.name))
            .ok_or_else(|| BuildError::Ambiguous {
                what: "program",
                candidates: programs.join(", "),
                how: "by --bin",
            }),
    }
}

fn features(options: &Options) -> Vec<String> {
    let mut arguments = Vec::new();
    for features in &options.features {
        arguments.extend(["--features".to_owned(), features.clone()]);
    }
    if options.no_default_features {
        arguments.push("--no-default-features".to_owned());
    }
    arguments
}

/// A line of `--message-format=json`.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<rust_review::Target>,
}

struct Build {
    mirror: Mirror,
    /// In the mirror.
    manifest: PathBuf,
    target: PathBuf,
    features: Vec<String>,
}

impl Build {
    /// A tool, as the project's own configuration and toolchain file would have it.
    fn tool(&self, tool: &str) -> Command {
        let mut command = toolchain_command(tool);
        command.current_dir(&self.mirror.root);
        command
    }

    fn check_toolchain(&self) -> Result<(), BuildError> {
        let version = output("rustc", CARGO_HELP, self.tool("rustc").arg("--version"))?;
        let minor = version
            .split([' ', '.'])
            .nth(2)
            .and_then(|minor| minor.parse().ok());
        if minor.is_some_and(|minor: u32| minor < OLDEST_RUST) {
            let version = version.trim().to_owned();
            return Err(BuildError::OldRust { version });
        }
        let mut command = self.tool("rustc");
        let sysroot = output("rustc", CARGO_HELP, command.args(["--print", "sysroot"]))?;
        if !Path::new(sysroot.trim())
            .join("lib/rustlib")
            .join(TARGET)
            .is_dir()
        {
            say(&format!("installing Rust's {TARGET} target"));
            let mut command = self.tool("rustup");
            let help = "it installs Rust's wasm32-wasip1 target, which is not there";
            output("rustup", help, command.args(["target", "add", TARGET]))?;
        }
        Ok(())
    }

    fn cargo(&self, subcommand: &str, stand_ins: &[StandIn]) -> Command {
        let mut command = self.tool("cargo");
        command
            .arg(subcommand)
            .arg("--manifest-path")
            .arg(&self.manifest)
            .args(&self.features);
        let support = self.mirror.root.join(SUPPORT_LINK);
        for StandIn { name, .. } in stand_ins {
            // A string of TOML is one of JSON.
            let path = serde_json::Value::from(support.join(name).to_string_lossy());
            command
                .arg("--config")
                .arg(format!("patch.crates-io.{name}.path={path}"));
        }
        command
    }

    /// Brings the lock file about; what it leads to.
    fn resolve(&self) -> Result<(Metadata, Vec<StandIn>), BuildError> {
        let (mut stand_ins, _) = self.mirror.replace()?;
        // A crate that was not in the lock file may bring others that are to be replaced. One whose
        // user wants an exact version comes back each time; the review names it.
        let mut left = 3;
        loop {
            let mut command = self.cargo("metadata", &stand_ins);
            command.args(["--format-version", "1", "--filter-platform", TARGET]);
            let metadata = serde_json::from_str(&output("cargo", CARGO_HELP, &mut command)?)?;
            left -= 1;
            if left == 0 {
                return Ok((metadata, stand_ins));
            }
            let (now, changed) = self.mirror.replace()?;
            if !changed {
                return Ok((metadata, stand_ins));
            }
            stand_ins = now;
        }
    }

    /// What will be compiled for the child.
    fn used(&self, stand_ins: &[StandIn]) -> Result<Used, BuildError> {
        let mut command = self.cargo("tree", stand_ins);
        command
            .args(["--locked", "--target", TARGET])
            .args(Used::ARGUMENTS);
        Ok(Used::read(&output("cargo", CARGO_HELP, &mut command)?))
    }

    /// Runs the build; the module, unless it failed.
    fn run(&self, program: &str, stand_ins: &[StandIn]) -> Result<Option<PathBuf>, BuildError> {
        let mut command = self.cargo("build", stand_ins);
        for setting in rust_support::profile() {
            command.arg("--config").arg(setting);
        }
        command
            .args([
                "--release",
                "--locked",
                "--target",
                TARGET,
                "--bin",
                program,
            ])
            .arg("--message-format=json-render-diagnostics")
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_BUILD_BUILD_DIR", &self.target)
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags())
            .stdout(Stdio::piped());
        let file = ToolError::file("cargo");
        let mut cargo = match command.spawn() {
            Ok(cargo) => cargo,
            Err(error) => return Err(file(error).into()),
        };
        let mut module = None;
        for line in cargo
            .stdout
            .take()
            .into_iter()
            .flat_map(|o| BufReader::new(o).lines())
        {
            let line = line.map_err(ToolError::file("cargo"))?;
            if let Ok(message) = serde_json::from_str::<Message>(&line)
                && message.target.is_some_and(|target| target.name == program)
                && message.executable.is_some()
            {
                module = message.executable;
            }
        }
        let status = cargo.wait().map_err(ToolError::file("cargo"))?;
        Ok(module.filter(|_| status.success()))
    }

    fn flags(&self) -> String {
        let mut flags = vec!["-C".to_owned(), STACK.to_owned()];
        // No path of this machine enters the module: the same input, the same bytes.
        let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        flags.extend(cargo_home().map(|home| remap(&home, "/cargo")));
        flags.push(remap(self.mirror.tree(), ""));
        // The last that fits is taken.
        flags.push(remap(&self.mirror.root, "/operator"));
        flags.join("\u{1f}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn options(package: Option<&str>, bin: Option<&str>) -> Options {
        Options {
            project: "/w".into(),
            package: package.map(str::to_owned),
            output: "out.wasm".into(),
            bin: bin.map(str::to_owned),
            features: Vec::new(),
            no_default_features: false,
        }
    }

    fn project() -> Metadata {
        let package = |name: &str, programs: &[&str]| {
            let targets: Vec<_> = programs
                .iter()
                .map(|p| json!({"name": p, "kind": ["bin"]}))
                .collect();
            json!({
                "id": name, "name": name, "version": "1.0.0", "source": null, "links": null,
                "manifest_path": format!("/w/{name}/Cargo.toml"), "targets": targets,
                "default_run": null, "dependencies": [],
            })
        };
        serde_json::from_value(json!({
            "packages": [package("a", &["a", "crdgen"]), package("b", &["x", "y"]), package("c", &[])],
            "workspace_members": ["a", "b", "c"], "workspace_root": "/w", "resolve": null,
        }))
        .unwrap()
    }

    #[test]
    fn what_is_meant_is_found_or_asked_for() {
        let project = project();
        let chosen = |manifest: &str, package, bin| {
            choose(&project, Path::new(manifest), &options(package, bin))
                .map(|(package, program)| format!("{} {program}", package.name))
                .map_err(|error| error.to_string())
        };
        let root = "/w/Cargo.toml";
        assert_eq!(
            chosen(root, None, None).unwrap_err(),
            "which package? there are: a, b; name it behind PROJECT"
        );
        assert_eq!(chosen(root, Some("a"), None).unwrap(), "a a");
        assert_eq!(chosen(root, None, Some("y")).unwrap(), "b y");
        assert_eq!(
            chosen("/w/a/Cargo.toml", None, Some("crdgen")).unwrap(),
            "a crdgen"
        );
        assert_eq!(
            chosen(root, Some("b"), None).unwrap_err(),
            "which program? there are: x, y; name it by --bin"
        );
        assert_eq!(
            chosen(root, Some("c"), None).unwrap_err(),
            "there is no package with a program `c`; there are: a, b"
        );
        assert_eq!(
            chosen(root, Some("a"), Some("b")).unwrap_err(),
            "there is no program `b`; there are: a, crdgen"
        );
    }
}
