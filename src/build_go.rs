//! `build-go`: makes a child module of an ordinary Go program, without a change of its source.
//!
//! The program's own `go build` does the work, for `wasip1` as a c-shared library. What makes the
//! result a child is added on the way by `-overlay`: a blank import of the support package
//! (`guests/go`), that package, a few lines of the standard library, and modules that do not know
//! `wasip1` with what they lack ([`go_modules`]). They are required by `-modfile`, or by a `go.work` of
//! our own. Everything that is written goes to the build directory; to Go, the added modules stand in
//! a directory of the checkout that is not there, so that no place on this machine gets into the
//! module's build information.
//!
//! [`go_modules`]: crate::go_modules

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Deserialize;
use serde_json::json;
use thiserror::Error;

use crate::carried;
use crate::go_hints;
use crate::go_modules::{self, Module, Replacement};
use crate::go_standard::{self, StandardError};
use crate::go_toolchain::{Environment, GO, GO_HELP, GoError, answer};
use crate::toolchain::{self, Carried, ToolError, digest, short_hash};

/// Path of the support package's module.
const SUPPORT: &str = "wasm-operator.invalid/support";
/// Where its module and others stand in the checkout, as Go sees it.
const ADDED: &str = ".wasm-operator";
const SUPPORT_DIRECTORY: &str = "support";
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// The support package.
const SUPPORT_FILES: &[Carried] = carried!("../guests/go":
    "doc.go",
    "go.mod",
    "host_wasip1.go",
    "operation.go",
    "start_wasip1.go",
    "transport.go",
);

/// What to build.
#[derive(Args, Debug)]
pub struct Options {
    /// Checkout of the operator, with its go.mod.
    #[arg(value_name = "PROJECT")]
    pub project: PathBuf,
    /// Its package main, as for `go build` [default: the only one there is].
    #[arg(value_name = "PACKAGE")]
    pub package: Option<String>,
    /// The module to be made.
    #[arg(short, long, value_name = "OUT.wasm")]
    pub output: PathBuf,
    /// Build tags, as for `go build`.
    #[arg(long, value_name = "LIST")]
    pub tags: Option<String>,
    /// Flags of Go's linker, such as "-X main.version=1", besides those that a child needs.
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    pub ldflags: Option<String>,
}

/// Why a Go program was not built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// A file or a tool.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Go itself.
    #[error(transparent)]
    Go(#[from] GoError),
    /// A Go that is not known.
    #[error(transparent)]
    Standard(#[from] StandardError),
    /// Which program?
    #[error("{}", choose(found))]
    Package {
        /// The packages main that there are.
        found: Vec<String>,
    },
    /// The named package is a library.
    #[error("{package} is package {name}, not a program (package main)")]
    NotMain {
        /// Its import path.
        package: String,
        /// Its name.
        name: String,
    },
    /// `go build` said no, and why.
    #[error("go build failed")]
    Build,
}

fn choose(found: &[String]) -> String {
    match found {
        [] => "there is no program (package main) in this module".into(),
        found => format!(
            "there are several programs in this module; name one after PROJECT: {}",
            found.join(", ")
        ),
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Package {
    dir: PathBuf,
    import_path: String,
    name: String,
}

/// Builds a child module.
///
/// # Errors
/// [`BuildError`]; the output is untouched, then.
pub fn build(options: &Options) -> Result<(), BuildError> {
    let project = fs::canonicalize(&options.project).map_err(ToolError::file(&options.project))?;
    let mut environment = Environment::of(&project)?;
    let directory = toolchain::build_directory()?.join(GO);
    environment.name_toolchain(&directory)?;
    let Environment {
        goroot, goversion, ..
    } = &environment;
    let standard = go_standard::overlay(goroot, goversion, &directory)?;

    // One place per program: what it holds is written again only if it changes, so Go's build cache
    // stays warm.
    let identity = format!("{}\n{:?}", environment.gomod.display(), options.package);
    let room = directory
        .join("programs")
        .join(short_hash(identity.as_bytes()));
    let _lock = lock(&room)?;
    let mut build = Build {
        project,
        room,
        environment,
        overlay: standard,
        tags: options.tags.clone(),
        modfile: None,
        work: None,
    };
    build.add_support(&directory)?;
    build.require(&[])?;
    let package = build.package(options.package.as_deref())?;
    let modules = build.modules(&package)?;
    let replacements = go_modules::replacements(&modules, &directory.join("modules"))?;
    if !replacements.is_empty() {
        for replacement in &replacements {
            let Module { path, version, .. } = &replacement.module;
            eprintln!("build-go: {path} {version}: {}", replacement.why);
            let directory = build.added(&replacement.directory());
            for (file, source) in &replacement.files {
                build.overlay.insert(directory.join(file), source.clone());
            }
        }
        build.require(&replacements)?;
    }
    build.import_support(&package)?;
    build.compile(&package, options)
}

/// Keeps a second build of the same program waiting, until the file is dropped.
fn lock(room: &Path) -> Result<fs::File, ToolError> {
    fs::create_dir_all(room).map_err(ToolError::file(room))?;
    let path = room.join("lock");
    let file = fs::File::create(&path).map_err(ToolError::file(&path))?;
    if file.try_lock().is_err() {
        eprintln!("build-go: waiting for another build of this program");
        file.lock().map_err(ToolError::file(&path))?;
    }
    Ok(file)
}

/// One build of one program.
struct Build {
    project: PathBuf,
    room: PathBuf,
    environment: Environment,
    overlay: BTreeMap<PathBuf, PathBuf>,
    tags: Option<String>,
    /// Stands in for the program's go.mod.
    modfile: Option<PathBuf>,
    /// Stands in for the program's go.work, if there is one: Go takes no `-modfile` then.
    work: Option<PathBuf>,
}

impl Build {
    /// A Go command that sees the program with what we add.
    fn go(&self, command: &str) -> Command {
        let mut go = self.environment.go(&self.project);
        go.env("GOFLAGS", &self.environment.goflags);
        if let Some(work) = &self.work {
            go.env("GOWORK", work);
        }
        go.arg(command);
        if let Some(modfile) = &self.modfile {
            go.arg("-mod=mod").arg(flag("-modfile=", modfile));
        }
        if let Some(tags) = &self.tags {
            go.arg(format!("-tags={tags}"));
        }
        go.arg(flag("-overlay=", &self.overlay_file()));
        go
    }

    fn overlay_file(&self) -> PathBuf {
        self.room.join("overlay.json")
    }

    fn save_overlay(&self) -> Result<(), ToolError> {
        let text = json!({ "Replace": self.overlay }).to_string();
        toolchain::write_if_changed(&self.overlay_file(), text.as_bytes())
    }

    /// Where go.mod or go.work is.
    fn base(&self) -> &Path {
        let Environment { gomod, gowork, .. } = &self.environment;
        let file = if gowork.as_os_str().is_empty() {
            gomod
        } else {
            gowork
        };
        file.parent().unwrap_or(Path::new("/"))
    }

    /// Where Go believes an added module to be.
    fn added(&self, name: &str) -> PathBuf {
        self.base().join(ADDED).join(name)
    }

    /// The same for go.mod, which is taken to be where it was; our go.work is elsewhere.
    fn added_reference(&self, name: &str) -> PathBuf {
        if self.work.is_some() {
            self.added(name)
        } else {
            Path::new(".").join(ADDED).join(name)
        }
    }

    /// Adds the support package's module to the checkout.
    fn add_support(&mut self, directory: &Path) -> Result<(), BuildError> {
        let source = directory.join(format!("support-{}", digest(SUPPORT_FILES)));
        toolchain::unpack(SUPPORT_FILES, &source)?;
        let support = self.added(SUPPORT_DIRECTORY);
        for file in SUPPORT_FILES {
            self.overlay
                .insert(support.join(file.path), source.join(file.path));
        }
        Ok(())
    }

    /// Requires the support package's module, and replaces others, in copies of go.mod or go.work.
    fn require(&mut self, replacements: &[Replacement]) -> Result<(), BuildError> {
        self.save_overlay()?;
        let (edited, original) = if self.environment.gowork.as_os_str().is_empty() {
            let sums = self.environment.gomod.with_extension("sum");
            match fs::read(&sums) {
                Ok(sums) => toolchain::write_if_changed(&self.room.join("go.sum"), &sums)?,
                Err(_) => toolchain::write_if_changed(&self.room.join("go.sum"), b"")?,
            }
            let modfile = self.room.join("go.mod");
            self.modfile = Some(modfile.clone());
            (modfile, self.environment.gomod.clone())
        } else {
            let sums = self.environment.gowork.with_extension("work.sum");
            if let Ok(sums) = fs::read(&sums) {
                toolchain::write_if_changed(&self.room.join("go.work.sum"), &sums)?;
            }
            let work = self.room.join("go.work");
            self.work = Some(work.clone());
            (work, self.environment.gowork.clone())
        };
        let text = fs::read(&original).map_err(ToolError::file(&original))?;
        let scratch = self.room.join("scratch");
        fs::create_dir_all(&scratch).map_err(ToolError::file(&scratch))?;
        let new = scratch.join(edited.file_name().unwrap_or_default());
        fs::write(&new, text).map_err(ToolError::file(&new))?;
        self.edit(&new, replacements)?;
        let text = fs::read(&new).map_err(ToolError::file(&new))?;
        Ok(toolchain::write_if_changed(&edited, &text)?)
    }

    /// Edits a copy of go.mod or go.work that has left its place.
    fn edit(&self, file: &Path, replacements: &[Replacement]) -> Result<(), BuildError> {
        let is_work = self.work.is_some();
        let base = self.base();
        let mut show = self.environment.go(&self.project);
        show.args(if is_work {
            ["work", "edit", "-json"]
        } else {
            ["mod", "edit", "-json"]
        })
        .arg(file);
        let text = toolchain::output(GO, GO_HELP, &mut show)?;
        let content: ModuleFile = answer("mod edit -json", &text)?;
        let mut edit = self.environment.go(&self.project);
        edit.args([if is_work { "work" } else { "mod" }, "edit"]);
        // In go.work, directories are named relative to the file; in go.mod, to the module.
        for replace in &content.replace {
            let is_relative = !Path::new(&replace.new.path).is_absolute();
            if is_work && replace.new.version.is_none() && is_relative {
                let old = replace.old.to_string();
                edit.arg(replace_flag(&old, &joined(base, &replace.new.path)));
            }
        }
        for used in content
            .r#use
            .iter()
            .filter(|used| !Path::new(&used.disk_path).is_absolute())
        {
            edit.arg(format!("-dropuse={}", used.disk_path));
            edit.arg(flag("-use=", &joined(base, &used.disk_path)));
        }
        let support = self.added_reference(SUPPORT_DIRECTORY);
        if is_work {
            edit.arg(flag("-use=", &support));
        } else {
            edit.arg(format!("-require={SUPPORT}@v0.0.0"));
            edit.arg(replace_flag(SUPPORT, &support));
        }
        for replacement in replacements {
            let Module { path, version, .. } = &replacement.module;
            let directory = self.added_reference(&replacement.directory());
            edit.arg(replace_flag(&format!("{path}@{version}"), &directory));
        }
        edit.arg(file);
        toolchain::output(GO, GO_HELP, &mut edit)?;
        Ok(())
    }

    /// The program to be built.
    fn package(&self, named: Option<&str>) -> Result<Package, BuildError> {
        if let Some(named) = named {
            return self.list(named);
        }
        if let Ok(package) = self.list(".")
            && package.name == "main"
        {
            return Ok(package);
        }
        let mut list = self.go("list");
        list.args([
            "-e",
            "-f",
            "{{if eq .Name \"main\"}}{{.ImportPath}}{{end}}",
            "./...",
        ]);
        let text = toolchain::output(GO, GO_HELP, &mut list)?;
        match &text.lines().collect::<Vec<_>>()[..] {
            [only] => self.list(only),
            found => Err(BuildError::Package {
                found: found.iter().map(|&f| f.to_owned()).collect(),
            }),
        }
    }

    fn list(&self, pattern: &str) -> Result<Package, BuildError> {
        let mut list = self.go("list");
        list.args(["-find", "-json=Dir,ImportPath,Name", pattern]);
        if pattern == "." {
            list.stderr(Stdio::null());
        }
        let text = toolchain::output(GO, GO_HELP, &mut list)?;
        let mut found = serde_json::Deserializer::from_str(&text)
            .into_iter()
            .collect::<Result<Vec<Package>, _>>()
            .map_err(|e| GoError::Answer {
                command: "list",
                reason: e.to_string(),
            })?;
        // Only a pattern such as ./... finds several.
        if found.len() > 1 {
            found.retain(|package| package.name == "main");
        }
        match found.pop() {
            Some(package) if !found.is_empty() => {
                found.push(package);
                Err(BuildError::Package {
                    found: found.into_iter().map(|p| p.import_path).collect(),
                })
            }
            None => Err(BuildError::Package { found: Vec::new() }),
            Some(package) if package.name == "main" || pattern == "." => Ok(package),
            Some(package) => Err(BuildError::NotMain {
                package: package.import_path,
                name: package.name,
            }),
        }
    }

    /// The modules from which the program's packages come.
    fn modules(&self, package: &Package) -> Result<Vec<Module>, BuildError> {
        let mut list = self.go("list");
        list.args(["-e", "-deps", "-f", Module::FORMAT, &package.import_path]);
        eprintln!("build-go: fetching what {} is made of", package.import_path);
        let text = toolchain::output(GO, GO_HELP, &mut list)?;
        let mut modules: Vec<_> = text.lines().filter_map(Module::parse).collect();
        for module in &mut modules {
            module.is_local &= !module.directory.starts_with(self.base().join(ADDED));
        }
        modules.sort();
        modules.dedup();
        Ok(modules)
    }

    /// Adds the import to package main.
    fn import_support(&mut self, package: &Package) -> Result<(), BuildError> {
        let import = self.room.join("wasm_operator.go");
        let text = format!("package main\n\nimport _ \"{SUPPORT}\"\n");
        toolchain::write_if_changed(&import, text.as_bytes())?;
        self.overlay
            .insert(package.dir.join("zz_wasm_operator.go"), import);
        Ok(())
    }

    fn compile(&self, package: &Package, options: &Options) -> Result<(), BuildError> {
        self.save_overlay()?;
        let made = self.room.join("child.wasm");
        let started = Instant::now();
        let mut flags = String::from("-s -w -buildid= -checklinkname=0");
        if let Some(more) = &options.ldflags {
            flags = format!("{flags} {more}");
        }
        let mut build = self.go("build");
        build
            .args(["-v", "-trimpath", "-buildvcs=false", "-buildmode=c-shared"])
            .arg(format!("-ldflags={flags}"))
            .arg(flag("-o=", &made))
            .arg(&package.import_path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        eprintln!(
            "build-go: building {} (some minutes the first time)",
            package.import_path
        );
        let mut process = build.spawn().map_err(ToolError::file(GO))?;
        let messages = process.stderr.take().map(follow).unwrap_or_default();
        let status = process.wait().map_err(ToolError::file(GO))?;
        if !status.success() {
            // Go's messages stand above already.
            for hint in go_hints::hints(&messages, &self.modules(package)?) {
                eprintln!("build-go: {hint}");
            }
            return Err(BuildError::Build);
        }
        let bytes = toolchain::install(&made, &options.output)?;
        eprintln!(
            "build-go: {:.1} MB in {} s: {}",
            bytes as f64 / 1e6,
            started.elapsed().as_secs(),
            options.output.display()
        );
        Ok(())
    }
}

/// Passes Go's messages on and counts the packages, which it names one per line when it begins them.
fn follow(messages: impl std::io::Read) -> Vec<String> {
    let mut said = Vec::new();
    let mut packages = 0;
    let mut next = Instant::now() + PROGRESS_EVERY;
    for line in BufReader::new(messages).lines().map_while(Result::ok) {
        if is_package(&line) {
            packages += 1;
        } else {
            eprintln!("{line}");
            said.push(line);
        }
        if Instant::now() >= next {
            eprintln!("build-go: {packages} packages compiled so far");
            next += PROGRESS_EVERY;
        }
    }
    said
}

/// Whether a line is an import path and nothing else.
fn is_package(line: &str) -> bool {
    !line.is_empty() && !line.contains([' ', ':', '\t']) && !line.starts_with('#')
}

/// A path without the `.` and `..` that Go would not recognise it by.
fn joined(base: &Path, path: &str) -> PathBuf {
    let mut joined = base.to_owned();
    for component in Path::new(path).components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(joined.pop()),
            other => joined.push(other),
        }
    }
    joined
}

fn flag(name: &str, path: &Path) -> OsString {
    let mut flag = OsString::from(name);
    flag.push(path);
    flag
}

fn replace_flag(old: &str, new: &Path) -> OsString {
    flag(&format!("-replace={old}="), new)
}

/// What `go mod edit -json` and `go work edit -json` have in common.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ModuleFile {
    #[serde(default, deserialize_with = "null_is_empty")]
    replace: Vec<Replace>,
    #[serde(default, deserialize_with = "null_is_empty")]
    r#use: Vec<Used>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Replace {
    old: Versioned,
    new: Versioned,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Versioned {
    path: String,
    version: Option<String>,
}

impl std::fmt::Display for Versioned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.path)?;
        self.version
            .iter()
            .try_for_each(|version| write!(f, "@{version}"))
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Used {
    disk_path: String,
}

fn null_is_empty<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
