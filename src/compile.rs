//! Compiles modules to native code, in a process of its own.
//!
//! Compilers take hundreds of MiB and a hostile module may find a fault in one: neither is to
//! happen to the parent operator. It runs itself with the hidden command `compile-module`, hands the
//! module over on standard input and gets two files: an ELF image with the code, and the module's
//! data as a sparse image of its first memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, setrlimit};
use thiserror::Error;
use wasmer::sys::{
    CompilerConfig, Cranelift, CraneliftOptLevel, EngineBuilder, Features, NativeEngineExt,
};
use wasmer::{Engine, Module};

use crate::memory::RegionTunables;
use crate::postlink::{Layout, PostlinkError, post_link};
use crate::preemption::Preemption;
use crate::prepare::{Prepared, prepare};
use crate::region::PAGE_BYTES;

/// Compilation that takes longer is reported while it goes on.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// Longest piece of a compiler's message that is passed on.
const MAX_MESSAGE_BYTES: u64 = 8 << 10;
/// Of the compiler's process: idle cores are used all the same.
const NICENESS: i32 = 10;
/// Most memory that a compiler may take. The largest known module (138 MB) needs 1.7 GiB, and
/// address space that is not used counts as well.
const MAX_COMPILER_BYTES: u64 = 8 << 30;
/// The program itself, also after its file was replaced.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Why a module was not compiled.
#[derive(Debug, Error)]
pub enum CompileError {
    /// The compiler refuses it.
    #[error("cannot be compiled: {0}")]
    Compiler(String),
    /// What it made cannot be used.
    #[error(transparent)]
    Postlink(#[from] PostlinkError),
    /// A file or the compiler's process.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the system says.
        source: io::Error,
    },
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> CompileError {
    let what = what.into();
    |source| CompileError::System { what, source }
}

/// Where compilation happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// In a process of its own: this program's command `compile-module`.
    Process,
    /// Here, for programs that are not this one (tests, benchmarks).
    Here,
}

/// Files to be made. Neither may exist.
#[derive(Clone, Debug)]
pub struct Output {
    /// ELF image of the code.
    pub code: PathBuf,
    /// The memory's first content, as a sparse file. Empty if the module keeps its data itself.
    pub image: PathBuf,
}

impl Compiler {
    /// Compiles a valid module, telling the log about it when that takes long.
    ///
    /// # Errors
    /// [`CompileError`]; the files may be there, then, and are of no use.
    pub fn compile(self, name: &str, wasm: &[u8], output: &Output) -> Result<Layout, CompileError> {
        let started = Instant::now();
        let done = Arc::new(AtomicBool::new(false));
        let progress = {
            let (done, name, bytes) = (done.clone(), name.to_owned(), wasm.len());
            std::thread::spawn(move || report_progress(&name, bytes, &done))
        };
        let result = match self {
            Self::Process => compile_in_process(wasm, output),
            Self::Here => compile_here(wasm.to_vec(), output),
        };
        done.store(true, Ordering::Release);
        progress.thread().unpark();
        let elapsed = started.elapsed();
        if elapsed >= PROGRESS_AFTER && result.is_ok() {
            log::info!(target: name, "compiled in {:.1} s", elapsed.as_secs_f64());
        }
        result
    }
}

/// The command `compile-module`: a module on standard input, its layout on standard output.
///
/// # Errors
/// [`CompileError`].
pub fn serve(output: &Output) -> Result<(), CompileError> {
    yield_to_others();
    let mut wasm = Vec::new();
    io::stdin()
        .lock()
        .read_to_end(&mut wasm)
        .map_err(system("standard input"))?;
    let layout = compile_here(wasm, output)?;
    serde_json::to_writer(io::stdout().lock(), &layout)
        .map_err(|e| system("standard output")(e.into()))
}

/// Whoever runs children goes first, and when memory is short, compiling can be done again. Neither
/// is vital.
fn yield_to_others() {
    let _ = rustix::process::nice(NICENESS);
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let limit = Some(MAX_COMPILER_BYTES);
    let limit = Rlimit {
        current: limit,
        maximum: limit,
    };
    let _ = setrlimit(Resource::As, limit);
}

fn compile_in_process(wasm: &[u8], output: &Output) -> Result<Layout, CompileError> {
    let mut process = Command::new(THIS_PROGRAM)
        .arg("compile-module")
        .args([&output.code, &output.image])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(system("the compiler's process"))?;
    let (stdin, stdout, stderr) = (
        process.stdin.take(),
        process.stdout.take(),
        process.stderr.take(),
    );
    let (layout, message) = std::thread::scope(|scope| {
        let layout = scope.spawn(|| read_some(stdout));
        let message = scope.spawn(|| read_some(stderr));
        if let Some(mut stdin) = stdin {
            // A compiler that is gone says why on stderr.
            let _ = stdin.write_all(wasm);
        }
        (
            layout.join().unwrap_or_default(),
            message.join().unwrap_or_default(),
        )
    });
    let status = process.wait().map_err(system("the compiler's process"))?;
    if status.success() {
        return serde_json::from_slice(&layout)
            .map_err(|e| CompileError::Compiler(format!("the compiler's answer: {e}")));
    }
    let message = String::from_utf8_lossy(&message);
    Err(CompileError::Compiler(match message.trim() {
        "" => format!("the compiler ended with {status}"),
        // A panic or a crash: what it said last is not meant for users, but all there is.
        message if status.code() != Some(1) => {
            format!("the compiler ended with {status}: {message}")
        }
        message => message.to_owned(),
    }))
}

/// The first [`MAX_MESSAGE_BYTES`]; the rest is read too, so that nobody waits for room in a pipe.
fn read_some(from: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut from) = from {
        // What could not be read is missing in a message.
        let _ = from
            .by_ref()
            .take(MAX_MESSAGE_BYTES)
            .read_to_end(&mut bytes);
        let _ = io::copy(&mut from, &mut io::sink());
    }
    bytes
}

fn compile_here(wasm: Vec<u8>, output: &Output) -> Result<Layout, CompileError> {
    let invalid = |e: &dyn std::fmt::Display| CompileError::Compiler(e.to_string());
    let Prepared {
        wasm: prepared,
        image,
    } = prepare(&wasm).map_err(|e| invalid(&e))?;
    let create = |path: &Path| create_private(path).map_err(system(path.display().to_string()));
    let write = |path: &Path| system(path.display().to_string());
    let file = create(&output.image)?;
    let mut end = 0;
    for segment in &image {
        let bytes = wasm.get(segment.bytes.clone()).unwrap_or_default();
        file.write_all_at(bytes, segment.address)
            .map_err(write(&output.image))?;
        end = end.max(segment.address + bytes.len() as u64);
    }
    let whole_pages = end.next_multiple_of(PAGE_BYTES as u64);
    file.set_len(whole_pages).map_err(write(&output.image))?;
    file.sync_all().map_err(write(&output.image))?;
    drop((file, wasm));

    let mut compiler = Cranelift::default();
    compiler.opt_level(CraneliftOptLevel::Speed);
    CompilerConfig::experimental_artifact(&mut compiler, true);
    if !cfg!(feature = "without-checks") {
        compiler.push_middleware(Arc::new(Preemption::default()));
    }
    let mut features = Features::new();
    features.threads(false).memory64(false);
    let mut engine: Engine = EngineBuilder::new(compiler)
        .set_features(Some(features))
        .engine()
        .into();
    engine.set_tunables(RegionTunables::default());
    let module = Module::new(&engine, &prepared).map_err(|e| invalid(&e))?;
    let linked = module.serialize().map_err(|e| invalid(&e))?;
    drop(prepared);
    let (code, layout) = post_link(&linked)?;
    let mut file = create(&output.code)?;
    file.write_all(&code).map_err(write(&output.code))?;
    file.sync_all().map_err(write(&output.code))?;
    Ok(layout)
}

fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn report_progress(name: &str, bytes: usize, done: &AtomicBool) {
    let started = Instant::now();
    let mut next = PROGRESS_AFTER;
    while !done.load(Ordering::Acquire) {
        std::thread::park_timeout(next.saturating_sub(started.elapsed()));
        if !done.load(Ordering::Acquire) && started.elapsed() >= next {
            #[expect(clippy::cast_precision_loss, reason = "a size for people")]
            let megabytes = bytes as f64 / 1e6;
            log::info!(target: name, "compiling {megabytes:.1} MB of WebAssembly, {} s so far", started.elapsed().as_secs());
            next += PROGRESS_EVERY;
        }
    }
}
