//! Compiled modules, kept on disk between starts. (Room 3 of 3 for `unsafe`.)
//!
//! An artifact is native code that is loaded without verification, so the cache trusts nothing but
//! what it wrote itself: the directory belongs to this user alone, a file's name is made of
//! everything that shaped the code, and the checksums of its files are verified when a process
//! first uses it. Whatever is off is compiled anew.
//!
//! ```text
//! KEY.elf        code, mapped when it is loaded: its pages stay clean and belong to the file
//! KEY.image      the memory's first content, mapped copy-on-write by instances
//! KEY.manifest   checksum of the rest of this file, then sizes, checksums and layout; written last
//! ```
//!
//! Every module has an engine of its own: wasmer frees code only when its engine goes.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use thiserror::Error;
use wasmer::sys::{NativeEngineExt, Target};
use wasmer::{Engine, Module};

use crate::compile::{CompileError, Compiler, Output};
use crate::memory::RegionTunables;
use crate::postlink::Layout;
use crate::region::PAGE_BYTES;
use crate::stamp::Stamp;
use crate::{directory, postlink, preemption, prepare};

/// The version of wasmer whose code this is; `Cargo.toml` pins it, a test compares.
const WASMER_VERSION: &str = "7.4.2";

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
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// A file of the artifact.
    #[error("compiled module {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The code is there but cannot be loaded.
    #[error("compiled module {path} cannot be loaded: {reason}")]
    Load {
        /// Its file.
        path: PathBuf,
        /// wasmer's words for it.
        reason: String,
    },
}

/// A file whose checksum was right.
#[derive(Debug)]
struct Checked {
    path: PathBuf,
    stamp: Stamp,
}

impl Checked {
    /// Opens it, if it is still what was checked.
    fn open(&self) -> Result<File, ArtifactError> {
        let failed = |source| ArtifactError::File {
            path: self.path.clone(),
            source,
        };
        let file = File::open(&self.path).map_err(failed)?;
        if Stamp::of(&file).map_err(failed)? == self.stamp {
            Ok(file)
        } else {
            let what = "it was changed by somebody else since it was checked";
            Err(failed(io::Error::new(io::ErrorKind::InvalidData, what)))
        }
    }
}

/// A compiled module on disk. Small: its code is in memory only while somebody uses it.
#[derive(Debug)]
pub struct Artifact {
    code: Checked,
    /// `None` when the module keeps its data itself.
    image: Option<Checked>,
    layout: Layout,
    loaded: Mutex<Weak<LoadedModule>>,
    /// Keeps the files of a process without a cache.
    _directory: Option<Arc<TempDir>>,
}

impl Artifact {
    /// Its code, loaded if no instance uses it yet: the children of one module share it.
    ///
    /// # Errors
    /// [`ArtifactError::File`] or [`ArtifactError::Load`].
    pub fn load(&self) -> Result<Arc<LoadedModule>, ArtifactError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = loaded.upgrade() {
            return Ok(loaded);
        }
        // Held while wasmer opens the path again, in a directory that is ours alone.
        let _file = self.code.open()?;
        let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut engine = <Engine as NativeEngineExt>::headless();
        engine.set_tunables(RegionTunables::default());
        // SAFETY: this file was written by this program's compiler; its checksum was right, it has
        // not changed since, and it lies in a directory that only this user can write to, under a
        // name made of the versions, target and settings it was compiled with. Nobody changes it
        // while it is mapped: artifacts are only ever replaced by renaming.
        let module = unsafe { Module::deserialize_from_file(&engine, &self.code.path) };
        let module = module.map_err(|e| ArtifactError::Load {
            path: self.code.path.clone(),
            reason: e.to_string(),
        })?;
        let made = Arc::new(LoadedModule {
            parts: Some((module, engine)),
            layout: self.layout.clone(),
        });
        *loaded = Arc::downgrade(&made);
        Ok(made)
    }

    /// The first content of its memory, a file of whole pages; `None` if there is none.
    ///
    /// # Errors
    /// [`ArtifactError::File`].
    pub fn image(&self) -> Result<Option<File>, ArtifactError> {
        self.image.as_ref().map(Checked::open).transpose()
    }
}

/// A module ready to be instantiated, together with its engine.
#[derive(Debug)]
pub struct LoadedModule {
    /// Always `Some`; taken in `drop`, under the lock.
    parts: Option<(Module, Engine)>,
    layout: Layout,
}

impl LoadedModule {
    /// wasmer's module and the engine whose stores it can live in.
    pub fn parts(&self) -> Option<(&Module, &Engine)> {
        self.parts.as_ref().map(|(module, engine)| (module, engine))
    }

    /// Gives the pages of its code back. They come again from the file when they are needed.
    pub fn evict(&self) {
        let extents = self
            .parts()
            .and_then(|(module, _)| module.sys_artifact())
            .and_then(|artifact| artifact.finished_function_extents());
        let Some(base) = extents
            .as_ref()
            .and_then(|all| all.first())
            .and_then(|(_, first)| {
                (*first.ptr as usize).checked_sub(self.layout.first_function as usize)
            })
        else {
            return;
        };
        for range in &self.layout.read_only {
            // Whole pages of the segment alone: its first and last may be another's, too.
            let start = (base + range.start as usize).next_multiple_of(PAGE_BYTES);
            let end = (base + range.end as usize) / PAGE_BYTES * PAGE_BYTES;
            if start < end {
                // SAFETY: the range lies in a read-only private mapping of the artifact's file, which
                // stays mapped as long as `self.parts`: dropping its pages changes no content, it
                // only makes the next access read them from the file again.
                unsafe {
                    libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED)
                };
            }
        }
    }
}

impl Drop for LoadedModule {
    fn drop(&mut self) {
        let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        self.parts = None;
    }
}

/// What a manifest says.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    code: Sum,
    image: Sum,
    layout: Layout,
}

/// Size and BLAKE3 hash of a file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sum {
    bytes: u64,
    hash: String,
}

impl Sum {
    fn of(file: &mut File) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&mut *file)?;
        Ok(Self {
            bytes: hasher.count(),
            hash: hasher.finalize().to_hex().to_string(),
        })
    }
}

/// The cache directory.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
    /// For a process without a cache: removed at its end.
    temporary: Option<Arc<TempDir>>,
    compiler: Compiler,
    /// Compilers use all cores and hundreds of MiB: one at a time.
    compiling: Mutex<()>,
    /// Artifacts in use, by key.
    artifacts: Mutex<HashMap<String, Weak<Artifact>>>,
}

impl Cache {
    /// Opens the cache, creating the directory if it is not there.
    ///
    /// # Errors
    /// [`ArtifactError::Directory`] when it cannot be made, or when others may write to it.
    pub fn open(directory: &Path, compiler: Compiler) -> Result<Self, ArtifactError> {
        directory::own(directory).map_err(|source| ArtifactError::Directory {
            path: directory.to_owned(),
            source,
        })?;
        remove_unfinished(directory);
        Ok(Self::new(directory.to_owned(), None, compiler))
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn new(directory: PathBuf, temporary: Option<Arc<TempDir>>, compiler: Compiler) -> Self {
        Self {
            directory,
            temporary,
            compiler,
            compiling: Mutex::new(()),
            artifacts: Mutex::default(),
        }
    }

    /// Opens the cache in the user's cache directory. Where that cannot be used, compiled modules
    /// are kept as long as this process lives only.
    ///
    /// # Errors
    /// [`ArtifactError::Directory`] when there is no temporary directory either.
    pub fn open_default(compiler: Compiler) -> Result<Self, ArtifactError> {
        let opened = match directory::user_cache() {
            Some(caches) => Self::open(&caches.join("wasm-operator/artifacts"), compiler)
                .map_err(|error| error.to_string()),
            None => Err("there is no HOME for a cache directory (see --cache-dir)".to_owned()),
        };
        opened.or_else(|error| {
            log::warn!("{error}; compiled modules are not kept");
            // Owner-only, by tempfile's contract.
            let temporary = TempDir::with_prefix("wasm-operator-").map_err(|source| {
                let path = std::env::temp_dir();
                ArtifactError::Directory { path, source }
            })?;
            let path = temporary.path().to_owned();
            Ok(Self::new(path, Some(Arc::new(temporary)), compiler))
        })
    }

    /// The compiled form of a valid module, compiling it if the cache has none that is sound.
    /// Blocks for seconds: not for an executor's thread.
    ///
    /// # Errors
    /// [`ArtifactError`].
    pub fn artifact(&self, name: &str, wasm: &[u8]) -> Result<Arc<Artifact>, ArtifactError> {
        let key = key(wasm);
        let in_use = || self.artifacts().get(&key).and_then(Weak::upgrade);
        if let Some(artifact) = in_use() {
            return Ok(artifact);
        }
        let _compiling = self
            .compiling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Another child with the same module may have compiled it meanwhile.
        if let Some(artifact) = in_use() {
            return Ok(artifact);
        }
        let artifact = match self.sound(name, &key) {
            Some(artifact) => artifact,
            None => self.compile(name, &key, wasm)?,
        };
        let artifact = Arc::new(artifact);
        let mut all = self.artifacts();
        all.retain(|_, artifact| artifact.strong_count() > 0);
        all.insert(key, Arc::downgrade(&artifact));
        Ok(artifact)
    }

    fn artifacts(&self) -> std::sync::MutexGuard<'_, HashMap<String, Weak<Artifact>>> {
        self.artifacts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, key: &str, kind: &str) -> PathBuf {
        self.directory.join(format!("{key}.{kind}"))
    }

    fn compile(&self, name: &str, key: &str, wasm: &[u8]) -> Result<Artifact, ArtifactError> {
        let unfinished = |kind| self.file(key, &format!("{kind}.{}.tmp", std::process::id()));
        let output = Output {
            code: unfinished("elf"),
            image: unfinished("image"),
        };
        let manifest = unfinished("manifest");
        let remove = || {
            for file in [&output.code, &output.image, &manifest] {
                // Most often it is not there.
                let _ = fs::remove_file(file);
            }
        };
        // Of a process with our number that did not live to rename it.
        remove();
        let made = self
            .compiler
            .compile(name, wasm, &output)
            .map_err(ArtifactError::from)
            .and_then(|layout| self.keep(key, &output, &manifest, layout));
        if made.is_err() {
            remove();
        }
        made
    }

    /// Gives finished files their names, the manifest last.
    fn keep(
        &self,
        key: &str,
        output: &Output,
        manifest_path: &Path,
        layout: Layout,
    ) -> Result<Artifact, ArtifactError> {
        let sum = |path: &Path| File::open(path).and_then(|mut file| Sum::of(&mut file));
        let at = |path: &Path| {
            let path = path.to_owned();
            |source| ArtifactError::File { path, source }
        };
        let manifest = Manifest {
            code: sum(&output.code).map_err(at(&output.code))?,
            image: sum(&output.image).map_err(at(&output.image))?,
            layout,
        };
        let write = || {
            let text = serde_json::to_string(&manifest)?;
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(manifest_path)?;
            writeln!(file, "{}", blake3::hash(text.as_bytes()).to_hex())?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().map_err(at(manifest_path))?;
        for (from, kind) in [
            (output.code.as_path(), "elf"),
            (&output.image, "image"),
            (manifest_path, "manifest"),
        ] {
            fs::rename(from, self.file(key, kind)).map_err(at(from))?;
        }
        self.open_artifact(key, manifest)
            .map_err(at(&self.file(key, "manifest")))
    }

    /// The artifact in the cache, if there is one and it is what we wrote.
    fn sound(&self, name: &str, key: &str) -> Option<Artifact> {
        let path = self.file(key, "manifest");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    log::warn!(target: name, "artifact {}: {error}; compiling anew", path.display());
                }
                return None;
            }
        };
        let manifest: Option<Manifest> = text.split_once('\n').and_then(|(hash, rest)| {
            let sound = hash == blake3::hash(rest.as_bytes()).to_hex().as_str();
            sound.then(|| serde_json::from_str(rest).ok())?
        });
        let opened = manifest
            .ok_or_else(|| io::Error::other("damaged manifest"))
            .and_then(|manifest| self.open_artifact(key, manifest));
        match opened {
            Ok(artifact) => Some(artifact),
            Err(error) => {
                log::warn!(target: name, "artifact {} is damaged ({error}); compiling anew", path.display());
                None
            }
        }
    }

    /// Checks an artifact's files.
    fn open_artifact(&self, key: &str, manifest: Manifest) -> io::Result<Artifact> {
        let check = |kind: &str, sum: &Sum| {
            let path = self.file(key, kind);
            let mut file = File::open(&path)?;
            let stamp = Stamp::of(&file)?;
            if Sum::of(&mut file)? != *sum {
                return Err(io::Error::other(format!("checksum of {}", path.display())));
            }
            Ok(Checked { path, stamp })
        };
        let code = check("elf", &manifest.code)?;
        let image = check("image", &manifest.image)?;
        Ok(Artifact {
            code,
            image: (manifest.image.bytes > 0).then_some(image),
            layout: manifest.layout,
            loaded: Mutex::default(),
            _directory: self.temporary.clone(),
        })
    }
}

/// Removes what processes left that did not live to finish it.
fn remove_unfinished(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let process = name
            .to_str()
            .and_then(|name| name.strip_suffix(".tmp")?.rsplit_once('.'))
            .map(|(_, process)| Path::new("/proc").join(process));
        if process.is_some_and(|process| !process.exists()) {
            // Somebody else may have done so at the same time.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Everything that shapes the code goes into its name.
fn key(wasm: &[u8]) -> String {
    let target = Target::default();
    let key = format!(
        "{WASMER_VERSION} cranelift speed elf {} {} {} {} {:?} {}",
        prepare::VERSION,
        preemption::VERSION,
        postlink::VERSION,
        target.triple(),
        target.cpu_features(),
        blake3::hash(wasm).to_hex(),
    );
    blake3::hash(key.as_bytes()).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wasm() -> Vec<u8> {
        wat::parse_str(
            r#"(module (memory (export "memory") 1) (data (i32.const 8) "hello")
                (func (export "f") (loop)))"#,
        )
        .unwrap()
    }

    fn files(directory: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        files.sort();
        files
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
        let load = || {
            let cache = Cache::open(&path, Compiler::Here).unwrap();
            cache.artifact("a", &wasm()).unwrap().load().unwrap();
        };
        load();
        for file in files(&path) {
            let good = fs::read(&file).unwrap();
            let mut altered = good.clone();
            *altered.last_mut().unwrap() ^= 1;
            for damage in [&good[..good.len() - 1], &good[..10], b"", &altered] {
                // A file that is mapped is never changed in place, not even here.
                fs::remove_file(&file).unwrap();
                fs::write(&file, damage).unwrap();
                load();
                assert_eq!(fs::read(&file).unwrap().len(), good.len());
                assert_ne!(fs::read(&file).unwrap(), damage);
            }
        }
        assert_eq!(files(&path).len(), 3);
    }

    #[test]
    fn an_artifact_that_changes_while_it_is_in_use_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), Compiler::Here).unwrap();
        let artifact = cache.artifact("a", &wasm()).unwrap();
        drop(artifact.load().unwrap());
        let code = files(directory.path()).remove(0);
        let content = fs::read(&code).unwrap();
        fs::write(&code, content).unwrap();
        let error = artifact.load().unwrap_err();
        assert!(error.to_string().contains("changed by somebody"), "{error}");
    }

    #[test]
    fn the_image_is_the_first_content_of_the_memory() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), Compiler::Here).unwrap();
        let artifact = cache.artifact("a", &wasm()).unwrap();
        let mut image = artifact.image().unwrap().unwrap();
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut image, &mut bytes).unwrap();
        assert_eq!(bytes.len(), PAGE_BYTES);
        assert_eq!(&bytes[8..13], b"hello");
    }

    #[test]
    fn the_code_is_where_the_layout_says() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), Compiler::Here).unwrap();
        let Layout {
            first_function,
            read_only,
        } = cache.artifact("a", &wasm()).unwrap().layout.clone();
        assert!(
            read_only
                .iter()
                .any(|range| range.contains(&first_function))
        );
    }

    #[test]
    fn what_a_dead_process_left_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        // No process has a number above 2^22 (proc(5), pid_max).
        let left = directory.path().join("key.elf.99999999.tmp");
        let ours = directory
            .path()
            .join(format!("key.elf.{}.tmp", std::process::id()));
        fs::write(&left, "").unwrap();
        fs::write(&ours, "").unwrap();
        Cache::open(directory.path(), Compiler::Here).unwrap();
        assert_eq!(files(directory.path()), [ours]);
    }

    #[test]
    fn the_same_module_is_compiled_once() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Arc::new(Cache::open(directory.path(), Compiler::Here).unwrap());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let cache = cache.clone();
                std::thread::spawn(move || cache.artifact("a", &wasm()).unwrap())
            })
            .collect();
        let all: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert!(all.iter().all(|a| Arc::ptr_eq(a, &all[0])));
    }
}
