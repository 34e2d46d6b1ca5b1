//! `build-go`: makes a child module of an ordinary Go program, without a change of its source.
//!
//! The program's own `go build` does the work, for `wasip1` as a c-shared library. What makes the
//! result a child is added on the way: a blank import of the support package (`guests/go`) by
//! `-overlay`, its requirement by `-modfile` (or a `go.work` of our own), a few lines of the standard
//! library by `-overlay` again, and copies of modules that do not know `wasip1` ([`go_modules`]).
//! Everything that is written goes to the build directory.
//!
//! [`go_modules`]: crate::go_modules

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Deserialize;
use serde_json::json;
use thiserror::Error;

use crate::carried;
use crate::go_hints;
use crate::go_modules::{self, Module, Replacement};
use crate::toolchain::{self, Carried, ToolError};

/// Path of the support package's module.
const SUPPORT: &str = "wasm-operator.invalid/support";
/// The oldest Go that can make a child: it brought `go:wasmexport`.
const OLDEST_GO: (u32, u32) = (1, 24);
const PROGRESS_EVERY: Duration = Duration::from_secs(10);
const GO: &str = "go";
const GO_HELP: &str = "install Go 1.24 or later, see https://go.dev/doc/install";

/// The support package.
const SUPPORT_FILES: &[Carried] = carried!("../guests/go":
    "doc.go",
    "go.mod",
    "host_wasip1.go",
    "operation.go",
    "start_wasip1.go",
    "transport.go",
);
/// Files that are added to packages of the standard library.
const STANDARD_FILES: &[Carried] = carried!("../guests/go/_overlay":
    "net/http/wasm_operator.go",
    "os/signal/wasm_operator.go",
    "runtime/wasm_operator.go",
    "time/wasm_operator.go",
);

/// Changes of one file of the standard library.
#[derive(Debug)]
struct Edit {
    file: &'static str,
    /// What is found exactly once, and what stands there instead.
    changes: &'static [(&'static str, &'static str)],
}

/// Where the standard library calls what [`STANDARD_FILES`] add.
const STANDARD_EDITS: &[Edit] = &[
    Edit {
        file: "time/tick.go",
        changes: &[(
            "func NewTicker(d Duration) *Ticker {\n",
            "func NewTicker(d Duration) *Ticker {\n\td = wasmOperatorPeriod(d)\n",
        )],
    },
    Edit {
        file: "net/http/roundtrip.go",
        changes: &[(
            "\treturn t.roundTrip(req)\n",
            "\tif wasmOperatorRoundTrip != nil {\n\t\tif resp, ok, err := wasmOperatorRoundTrip(req); ok {\n\t\t\treturn resp, err\n\t\t}\n\t}\n\treturn t.roundTrip(req)\n",
        )],
    },
    // The loop spins in wasip1, for it waits in runtime.notetsleepg; and there are no signals.
    Edit {
        file: "os/signal/signal_unix.go",
        changes: &[("\twatchSignalLoop = loop\n", "")],
    },
    // Goroutines that poll let the others run: see runtime/wasm_operator.go.
    Edit {
        file: "runtime/runtime2.go",
        changes: &[(
            "\tgcAssistBytes int64\n",
            "\tgcAssistBytes int64\n\twasmOperator wasmOperatorPolls\n",
        )],
    },
    Edit {
        file: "runtime/proc.go",
        changes: &[
            (
                "\tgp.waitreason = reason\n\tmp.waitTraceBlockReason",
                "\tgp.wasmOperator.count = 0\n\tgp.waitreason = reason\n\tmp.waitTraceBlockReason",
            ),
            (
                "\tgp.waitreason = waitReasonZero\n",
                "\tgp.wasmOperator.count = 0\n\tgp.waitreason = waitReasonZero\n",
            ),
        ],
    },
    Edit {
        file: "runtime/select.go",
        changes: &[(
            "nsends, nrecvs int, block bool) (int, bool) {\n",
            "nsends, nrecvs int, block bool) (int, bool) {\n\twasmOperatorPoll()\n",
        )],
    },
    Edit {
        file: "runtime/chan.go",
        changes: &[
            (
                "block bool, callerpc uintptr) bool {\n",
                "block bool, callerpc uintptr) bool {\n\twasmOperatorPoll()\n",
            ),
            (
                "block bool) (selected, received bool) {\n",
                "block bool) (selected, received bool) {\n\twasmOperatorPoll()\n",
            ),
        ],
    },
];

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
    /// Go is too old.
    #[error(
        "{found} cannot build children: Go 1.24 or later can (a `toolchain` line in go.mod chooses one)"
    )]
    Version {
        /// What `go env GOVERSION` says.
        found: String,
    },
    /// Go is too new, or changed.
    #[error(
        "the standard library of {version} is not one that wasm-operator knows: {file} has changed; build with an older Go (GOTOOLCHAIN=go1.26.0) or a newer wasm-operator"
    )]
    Standard {
        /// Go's version.
        version: String,
        /// Below GOROOT/src.
        file: &'static str,
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
#[serde(rename_all = "UPPERCASE")]
struct Environment {
    goroot: PathBuf,
    goversion: String,
    gomod: PathBuf,
    gowork: PathBuf,
    goflags: String,
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
    let environment = environment(&project)?;
    let directory = toolchain::build_directory()?.join(GO);
    let support = directory.join(format!("support-{}", digest(SUPPORT_FILES)));
    toolchain::unpack(SUPPORT_FILES, &support)?;
    let standard = standard_library(&environment, &directory)?;

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
        copies: directory.join("modules"),
        environment,
        overlay: standard,
        tags: options.tags.clone(),
        modfile: None,
        work: None,
    };
    build.require_support(&support, &[])?;
    let package = build.package(options.package.as_deref())?;
    let replacements = go_modules::replacements(&build.modules(&package)?, &build.copies)?;
    if !replacements.is_empty() {
        for replacement in &replacements {
            eprintln!(
                "build-go: {} {}: {}",
                replacement.module, replacement.version, replacement.why
            );
        }
        build.require_support(&support, &replacements)?;
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

fn environment(project: &Path) -> Result<Environment, BuildError> {
    let mut go = go(project);
    go.args([
        "env",
        "-json",
        "GOROOT",
        "GOVERSION",
        "GOMOD",
        "GOWORK",
        "GOFLAGS",
    ]);
    let text = toolchain::output(GO, GO_HELP, &mut go)?;
    let mut environment: Environment = answer("env", &text)?;
    environment.goflags = other_flags(&environment.goflags);
    if environment.gowork == Path::new("off") {
        environment.gowork = PathBuf::new();
    }
    if version(&environment.goversion).is_none_or(|version| version < OLDEST_GO) {
        return Err(BuildError::Version {
            found: environment.goversion,
        });
    }
    let has_module =
        !environment.gomod.as_os_str().is_empty() && environment.gomod != Path::new("/dev/null");
    if !has_module && environment.gowork.as_os_str().is_empty() {
        return Err(BuildError::NoModule {
            project: project.to_owned(),
        });
    }
    Ok(environment)
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

fn answer<'a, T: Deserialize<'a>>(command: &'static str, text: &'a str) -> Result<T, BuildError> {
    serde_json::from_str(text).map_err(|e| BuildError::Answer {
        command,
        reason: e.to_string(),
    })
}

/// A Go command in a directory, for a child's platform.
fn go(directory: &Path) -> Command {
    let mut go = Command::new(GO);
    // Go believes PWD, which may be another name of the directory.
    go.current_dir(directory).env("PWD", directory).envs([
        ("GOOS", "wasip1"),
        ("GOARCH", "wasm"),
        ("CGO_ENABLED", "0"),
    ]);
    go
}

fn short_hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

fn digest(files: &[Carried]) -> String {
    let all: String = files
        .iter()
        .flat_map(|file| [file.path, "\n", file.content])
        .collect();
    short_hash(all.as_bytes())
}

/// The changed files of the standard library: what `-overlay` replaces, and by what.
fn standard_library(
    environment: &Environment,
    directory: &Path,
) -> Result<BTreeMap<PathBuf, PathBuf>, BuildError> {
    let source = environment.goroot.join("src");
    // Builds of another wasm-operator may go on at the same time.
    let copies = directory.join(format!(
        "standard-{}-{}-{}",
        environment.goversion.replace(' ', "-"),
        digest(STANDARD_FILES),
        short_hash(format!("{STANDARD_EDITS:?}").as_bytes())
    ));
    toolchain::unpack(STANDARD_FILES, &copies)?;
    let mut overlay: BTreeMap<_, _> = STANDARD_FILES
        .iter()
        .map(|file| (source.join(file.path), copies.join(file.path)))
        .collect();
    for edit in STANDARD_EDITS {
        let original = source.join(edit.file);
        let mut text = fs::read_to_string(&original).map_err(ToolError::file(&original))?;
        for (find, replace) in edit.changes {
            if text.matches(find).count() != 1 {
                return Err(BuildError::Standard {
                    version: environment.goversion.clone(),
                    file: edit.file,
                });
            }
            text = text.replacen(find, replace, 1);
        }
        let copy = copies.join(edit.file);
        toolchain::write_if_changed(&copy, text.as_bytes())?;
        overlay.insert(original, copy);
    }
    Ok(overlay)
}

/// One build of one program.
struct Build {
    project: PathBuf,
    room: PathBuf,
    /// Where our copies of modules are.
    copies: PathBuf,
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
        let mut go = go(&self.project);
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
        go
    }

    /// Adds the support package's module, and replaces others, in copies of go.mod or go.work.
    fn require_support(
        &mut self,
        support: &Path,
        replacements: &[Replacement],
    ) -> Result<(), BuildError> {
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
        let base = original.parent().unwrap_or(Path::new("/"));
        let scratch = self.room.join("scratch");
        fs::create_dir_all(&scratch).map_err(ToolError::file(&scratch))?;
        let new = scratch.join(edited.file_name().unwrap_or_default());
        fs::write(&new, text).map_err(ToolError::file(&new))?;
        self.edit(&new, base, support, replacements)?;
        let text = fs::read(&new).map_err(ToolError::file(&new))?;
        Ok(toolchain::write_if_changed(&edited, &text)?)
    }

    /// Edits a copy of go.mod or go.work that has left its place.
    fn edit(
        &self,
        file: &Path,
        base: &Path,
        support: &Path,
        replacements: &[Replacement],
    ) -> Result<(), BuildError> {
        let is_work = self.work.is_some();
        let mut show = go(&self.project);
        show.args(if is_work {
            ["work", "edit", "-json"]
        } else {
            ["mod", "edit", "-json"]
        })
        .arg(file);
        let text = toolchain::output(GO, GO_HELP, &mut show)?;
        let content: ModuleFile = answer("mod edit -json", &text)?;
        let mut edit = go(&self.project);
        edit.args([if is_work { "work" } else { "mod" }, "edit"]);
        // Directories are named relative to the file.
        for replace in &content.replace {
            if replace.new.version.is_none() && !Path::new(&replace.new.path).is_absolute() {
                let old = replace.old.to_string();
                edit.arg(replace_flag(&old, &base.join(&replace.new.path)));
            }
        }
        for used in content
            .r#use
            .iter()
            .filter(|used| !Path::new(&used.disk_path).is_absolute())
        {
            edit.arg(format!("-dropuse={}", used.disk_path));
            edit.arg(flag("-use=", &base.join(&used.disk_path)));
        }
        if is_work {
            edit.arg(flag("-use=", support));
        } else {
            edit.arg(format!("-require={SUPPORT}@v0.0.0"));
            edit.arg(replace_flag(SUPPORT, support));
        }
        for replacement in replacements {
            let old = format!("{}@{}", replacement.module, replacement.version);
            edit.arg(replace_flag(&old, &replacement.directory));
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
            .map_err(|e| BuildError::Answer {
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
            module.is_local &= !module.directory.starts_with(&self.copies);
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
        let overlay = self.room.join("overlay.json");
        let text = json!({ "Replace": self.overlay }).to_string();
        toolchain::write_if_changed(&overlay, text.as_bytes())?;
        let made = self.room.join("child.wasm");
        let started = Instant::now();
        let mut flags = String::from("-s -w -buildid= -checklinkname=0");
        if let Some(more) = &options.ldflags {
            flags = format!("{flags} {more}");
        }
        let mut build = self.go("build");
        build
            .args(["-v", "-trimpath", "-buildvcs=false", "-buildmode=c-shared"])
            .arg(flag("-overlay=", &overlay))
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
        let bytes = fs::metadata(&made).map_err(ToolError::file(&made))?.len();
        install(&made, &options.output)?;
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

fn install(made: &Path, output: &Path) -> Result<(), ToolError> {
    let parent = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(ToolError::file(parent))?;
    // A copy beside its place and a rename: a parent operator may be reading the old one.
    // Its mode is the umask's affair, as of any compiler's output.
    let mut new = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(parent)
        .map_err(ToolError::file(parent))?;
    let mut from = fs::File::open(made).map_err(ToolError::file(made))?;
    std::io::copy(&mut from, &mut new).map_err(ToolError::file(output))?;
    new.persist(output)
        .map_err(|e| ToolError::file(output)(e.error))?;
    Ok(())
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
