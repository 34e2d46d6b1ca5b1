//! Compiled modules, kept on disk between starts. (Room 2 of 2 for `unsafe`.)
//!
//! An artifact is native code that is loaded without verification, so the cache trusts nothing but
//! what it wrote itself: the directory belongs to this user alone, a file's name is made of
//! everything that shaped the code, and a checksum of the content is verified before it is loaded.
//! Whatever is off is compiled anew.
//!
//! Every module has an engine of its own: wasmer frees code only when its engine goes.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use thiserror::Error;
use wasmer::sys::{
    CompilerConfig, Cranelift, CraneliftOptLevel, EngineBuilder, Features, NativeEngineExt, Target,
};
use wasmer::{Engine, Module};

use crate::memory::RegionTunables;
use crate::preemption::{self, Preemption};

/// The version of wasmer whose code this is; `Cargo.toml` pins it, a test compares.
const WASMER_VERSION: &str = "7.4.2";
/// Compilation that takes longer is reported while it goes on.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// Starts every artifact file: this format, then the BLAKE3 hash of what follows it.
const MAGIC: &[u8; 16] = b"wasm-operator 1\n";
const HEADER_BYTES: usize = MAGIC.len() + blake3::OUT_LEN;

/// wasmer frees code and its frame registry in two steps, and loading in between panics in it: one
/// load or final drop at a time.
static LOADING: Mutex<()> = Mutex::new(());

/// What can go wrong with an artifact.
#[derive(Debug, Error)]
pub enum ArtifactError {
    /// The cache directory cannot be used.
    #[error("cache directory {path}: {source} (choose another with --cache-dir)")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The module does not compile.
    #[error("cannot be compiled: {0}")]
    Compile(String),
    /// The code was compiled but cannot be loaded.
    #[error("cannot be loaded: {0}")]
    Load(String),
}

/// A module ready to be instantiated, together with its engine.
#[derive(Debug)]
pub struct LoadedModule {
    /// Always `Some`; taken in `drop`, under the lock.
    parts: Option<(Module, Engine)>,
}

impl LoadedModule {
    /// wasmer's module and the engine whose stores it can live in.
    pub fn parts(&self) -> Option<(&Module, &Engine)> {
        self.parts.as_ref().map(|(module, engine)| (module, engine))
    }
}

impl Drop for LoadedModule {
    fn drop(&mut self) {
        let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        self.parts = None;
    }
}

/// The cache directory.
#[derive(Debug)]
pub struct Cache {
    /// `None`: nothing is kept.
    directory: Option<PathBuf>,
    /// Compilers use all cores and hundreds of MiB: one at a time.
    compiling: Mutex<()>,
    /// Modules that are in use, by artifact: children of one module share its code.
    loaded: Mutex<HashMap<String, Weak<LoadedModule>>>,
}

impl Cache {
    /// Opens the cache, creating the directory if it is not there.
    ///
    /// # Errors
    /// [`ArtifactError::Directory`] when it cannot be made, or when others may write to it.
    pub fn open(directory: &Path) -> Result<Self, ArtifactError> {
        let in_directory = |source| ArtifactError::Directory {
            path: directory.to_owned(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(in_directory)?;
        let metadata = fs::metadata(directory).map_err(in_directory)?;
        // The owner of a file this process makes is the user it runs as.
        let probe = directory.join(format!(".probe-{}", std::process::id()));
        // `create_new` follows no link that somebody may have put there.
        fs::File::create_new(&probe).map_err(in_directory)?;
        let owner = fs::metadata(&probe).map(|m| m.uid());
        fs::remove_file(&probe).map_err(in_directory)?;
        if owner.map_err(in_directory)? != metadata.uid() || metadata.mode() & 0o022 != 0 {
            let source = io::Error::new(
                io::ErrorKind::PermissionDenied,
                "it must belong to the user that runs wasm-operator, and nobody else may write to it",
            );
            return Err(in_directory(source));
        }
        Ok(Self {
            directory: Some(directory.to_owned()),
            compiling: Mutex::new(()),
            loaded: Mutex::default(),
        })
    }

    /// Opens the cache in the user's cache directory (XDG base directories). Where that cannot be
    /// used, nothing is kept, which is only slower.
    pub fn open_default() -> Self {
        let variable = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let caches =
            variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
        let opened = match caches {
            Some(caches) => Self::open(&caches.join("wasm-operator/artifacts"))
                .map_err(|error| error.to_string()),
            None => Err("there is no HOME for a cache directory (see --cache-dir)".to_owned()),
        };
        opened.unwrap_or_else(|error| {
            log::warn!("{error}; compiled modules are not kept");
            Self {
                directory: None,
                compiling: Mutex::new(()),
                loaded: Mutex::default(),
            }
        })
    }

    /// Loads the compiled form of a module, compiling it if the cache has none that is sound.
    /// Blocks for seconds: not for an executor's thread.
    ///
    /// # Errors
    /// [`ArtifactError::Compile`] or [`ArtifactError::Load`]. A cache that cannot be written is
    /// only a warning.
    pub fn load(&self, name: &str, wasm: &[u8]) -> Result<Arc<LoadedModule>, ArtifactError> {
        let key = file_name(wasm);
        let in_use = || self.loaded().get(&key).and_then(Weak::upgrade);
        if let Some(loaded) = in_use() {
            return Ok(loaded);
        }
        let _compiling = self
            .compiling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Another child with the same module may have loaded it meanwhile.
        if let Some(loaded) = in_use() {
            return Ok(loaded);
        }
        let path = self
            .directory
            .as_ref()
            .map(|directory| directory.join(&key));
        let loaded = match path.as_ref().and_then(|path| read_sound(name, path)) {
            Some(loaded) => loaded,
            None => {
                let code = compile(name, wasm)?;
                if let Some(path) = &path
                    && let Err(error) = write_artifact(path, &code)
                {
                    log::warn!(target: name, "compiled module not kept in {}: {error}", path.display());
                }
                load_code(&code).map_err(|e| ArtifactError::Load(e.to_string()))?
            }
        };
        let mut all = self.loaded();
        all.retain(|_, module| module.strong_count() > 0);
        all.insert(key, Arc::downgrade(&loaded));
        Ok(loaded)
    }

    fn loaded(&self) -> std::sync::MutexGuard<'_, HashMap<String, Weak<LoadedModule>>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything that shapes the code goes into its name.
fn file_name(wasm: &[u8]) -> String {
    let target = Target::default();
    let key = format!(
        "{WASMER_VERSION} cranelift speed {} {} {:?} {}",
        preemption::VERSION,
        target.triple(),
        target.cpu_features(),
        blake3::hash(wasm).to_hex(),
    );
    format!("{}.artifact", blake3::hash(key.as_bytes()).to_hex())
}

fn compile(name: &str, wasm: &[u8]) -> Result<Vec<u8>, ArtifactError> {
    let started = Instant::now();
    let done = Arc::new(AtomicBool::new(false));
    let progress = {
        let (done, name, bytes) = (done.clone(), name.to_owned(), wasm.len());
        std::thread::spawn(move || report_progress(&name, bytes, &done))
    };
    let mut compiler = Cranelift::default();
    compiler.opt_level(CraneliftOptLevel::Speed);
    compiler.push_middleware(Arc::new(Preemption::default()));
    let mut features = Features::new();
    features.threads(false).memory64(false);
    let engine: Engine = EngineBuilder::new(compiler)
        .set_features(Some(features))
        .engine()
        .into();
    let engine = with_tunables(engine);
    let result = Module::new(&engine, wasm)
        .map_err(|e| ArtifactError::Compile(e.to_string()))
        .and_then(|module| {
            let code = module.serialize().map(|b| b.to_vec());
            drop(LoadedModule {
                parts: Some((module, engine)),
            });
            code.map_err(|e| ArtifactError::Compile(e.to_string()))
        });
    done.store(true, Ordering::Release);
    progress.thread().unpark();
    let elapsed = started.elapsed();
    if elapsed >= PROGRESS_AFTER && result.is_ok() {
        log::info!(target: name, "compiled in {:.1} s", elapsed.as_secs_f64());
    }
    result
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

fn with_tunables(mut engine: Engine) -> Engine {
    engine.set_tunables(RegionTunables::default());
    engine
}

fn write_artifact(path: &Path, code: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    // Of a process with our number that did not live to rename it.
    let _ = fs::remove_file(&temporary);
    let result = (|| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(MAGIC)?;
        file.write_all(blake3::hash(code).as_bytes())?;
        file.write_all(code)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if result.is_err() {
        // Nothing more can be done about a file that cannot even be removed.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// The artifact at `path`, if there is one and it is what we wrote.
fn read_sound(name: &str, path: &Path) -> Option<Arc<LoadedModule>> {
    let file = match fs::read(path) {
        Ok(file) => file,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                log::warn!(target: name, "artifact {}: {error}; compiling anew", path.display());
            }
            return None;
        }
    };
    let sound = file
        .split_at_checked(HEADER_BYTES)
        .and_then(|(header, code)| {
            let (magic, hash) = header.split_at(MAGIC.len());
            (magic == MAGIC && hash == blake3::hash(code).as_bytes()).then_some(code)
        });
    let Some(code) = sound else {
        log::warn!(target: name, "artifact {} is damaged; compiling anew", path.display());
        return None;
    };
    match load_code(code) {
        Ok(loaded) => Some(loaded),
        Err(error) => {
            log::warn!(target: name, "artifact {}: {error}; compiling anew", path.display());
            None
        }
    }
}

fn load_code(code: &[u8]) -> Result<Arc<LoadedModule>, wasmer::DeserializeError> {
    let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    let engine = with_tunables(<Engine as NativeEngineExt>::headless());
    // SAFETY: these bytes are the output of `Module::serialize` in this process, or were read from
    // a file of ours whose checksum is right, in a directory that only this user can write to,
    // under a name made of the versions, target and settings it was compiled with.
    let module = unsafe { Module::deserialize(&engine, code) }?;
    Ok(Arc::new(LoadedModule {
        parts: Some((module, engine)),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wasm() -> Vec<u8> {
        wat::parse_str(r#"(module (memory (export "memory") 1) (func (export "f") (loop)))"#)
            .unwrap()
    }

    fn only_file(directory: &Path) -> PathBuf {
        let files: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    #[test]
    fn the_version_in_the_key_is_the_version_in_use() {
        let lock = include_str!("../Cargo.lock");
        assert!(lock.contains(&format!(
            "name = \"wasmer\"\nversion = \"{WASMER_VERSION}\""
        )));
    }

    #[test]
    fn a_damaged_artifact_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache");
        let cache = Cache::open(&path).unwrap();
        cache.load("a", &wasm()).unwrap();
        let file = only_file(&path);
        let good = fs::read(&file).unwrap();
        for damage in [&good[..good.len() - 1], &good[..10], b""] {
            fs::write(&file, damage).unwrap();
            cache.load("a", &wasm()).unwrap();
            assert_eq!(fs::read(only_file(&path)).unwrap().len(), good.len());
        }
        let mut altered = good.clone();
        *altered.last_mut().unwrap() ^= 1;
        fs::write(&file, &altered).unwrap();
        cache.load("a", &wasm()).unwrap();
        assert_ne!(fs::read(&file).unwrap(), altered);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = Cache::open(directory.path()).unwrap_err();
        assert!(
            error.to_string().contains("nobody else may write"),
            "{error}"
        );
    }

    #[test]
    fn the_same_module_is_compiled_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache");
        let cache = Arc::new(Cache::open(&path).unwrap());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let cache = cache.clone();
                std::thread::spawn(move || cache.load("a", &wasm()).map(drop))
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap().unwrap());
        only_file(&path);
    }
}
