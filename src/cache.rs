//! Artifacts of compiled modules, kept on disk between starts.
//!
//! An artifact is native code that is loaded without verification, so the cache trusts nothing but
//! what it wrote itself: the directory belongs to this user alone, a file's name is made of
//! everything that shaped the code, and the checksums of its files are verified when a process
//! first uses it. Whatever is off is compiled anew.
//!
//! ```text
//! KEY.elf        code, mapped when it is loaded: its pages stay clean and belong to the file
//! KEY.image      the memory's first content, mapped copy-on-write by instances
//! KEY.manifest   checksum of the rest of this file, then sizes, checksums, layout and shape; written last
//! large.lock     held by who compiles a large module: one process at a time
//! ```

use std::collections::HashMap;
use std::fs::{self, File, FileTimes};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use wasmer::sys::Target;

use crate::artifact::{Artifact, ArtifactError, Checked};
use crate::compile::{Compiler, Output};
use crate::module::{self, Shape, inspect};
use crate::postlink::{self, Layout};
use crate::stamp::Stamp;
use crate::{directory, preemption, prepare};

/// The version of wasmer whose code this is; `Cargo.toml` pins it, a test compares.
const WASMER_VERSION: &str = "7.4.2";
/// Compiling modules of that size takes a gigabyte: one at a time, whoever does it.
pub const LARGE_MODULE_BYTES: u64 = 16 << 20;

/// What a manifest says.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    code: Sum,
    image: Sum,
    layout: Layout,
    shape: Shape,
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
    /// Compilers use all cores and hundreds of MiB: one at a time, and one of large modules, for
    /// which the others do not wait.
    compiling: Mutex<()>,
    compiling_large: Mutex<()>,
    /// Artifacts in use, by key.
    artifacts: Mutex<HashMap<String, Weak<Artifact>>>,
    /// Most bytes of files.
    budget: Option<u64>,
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

    /// Keeps its files below that many bytes: what was used least recently goes, but nothing that is
    /// in use by this process.
    pub fn with_budget(mut self, bytes: u64) -> Self {
        self.budget = Some(bytes);
        self
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
            compiling_large: Mutex::new(()),
            artifacts: Mutex::default(),
            budget: None,
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
        let compiling = if is_large(wasm.len()) {
            &self.compiling_large
        } else {
            &self.compiling
        };
        let _compiling = compiling.lock().unwrap_or_else(PoisonError::into_inner);
        // Another child with the same module may have compiled it meanwhile.
        if let Some(artifact) = in_use() {
            return Ok(artifact);
        }
        let artifact = match self.sound(name, &key) {
            Some(artifact) => artifact,
            None => self.make(name, &key, wasm)?,
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

    /// Compiles a module that the cache does not have.
    fn make(&self, name: &str, key: &str, wasm: &[u8]) -> Result<Artifact, ArtifactError> {
        let shape = inspect(wasm).map_err(ArtifactError::Module)?;
        let large = self.turn_of_large(name, wasm.len());
        let made = match large.as_ref().and_then(|_| self.sound(name, key)) {
            Some(artifact) => artifact,
            None => self.compile(name, key, wasm, shape)?,
        };
        drop(large);
        self.keep_budget(key);
        Ok(made)
    }

    /// Waits until no other process compiles a large module here.
    fn turn_of_large(&self, name: &str, bytes: usize) -> Option<File> {
        if !is_large(bytes) {
            return None;
        }
        let path = self.directory.join("large.lock");
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .and_then(|lock| lock.lock().map(|()| lock));
        // Without it, two may compile at a time, which costs memory and nothing else.
        lock.inspect_err(|e| log::warn!(target: name, "{}: {e}", path.display()))
            .ok()
    }

    /// Removes the artifacts that were used least recently, until the others fit the budget.
    fn keep_budget(&self, newest: &str) {
        let Some(budget) = self.budget else { return };
        let mut kept: Vec<_> = stored(&self.directory);
        kept.sort_by_key(|stored| std::cmp::Reverse(stored.used));
        let in_use = self.artifacts();
        let mut total = 0;
        for artifact in kept {
            total += artifact.bytes;
            let is_needed = artifact.key == newest
                || in_use
                    .get(&artifact.key)
                    .is_some_and(|a| a.strong_count() > 0);
            if total <= budget || is_needed {
                continue;
            }
            total -= artifact.bytes;
            // The manifest first: without it, the others are nothing.
            for kind in ["manifest", "elf", "image"] {
                // Another process may have been faster.
                let _ = fs::remove_file(self.file(&artifact.key, kind));
            }
            log::info!(
                "compiled modules are above --cache-budget: removed {} bytes that were not used since {}",
                artifact.bytes,
                jiff::Timestamp::try_from(artifact.used)
                    .map_or_else(|_| "long ago".into(), |t| t.to_string())
            );
        }
    }

    fn compile(
        &self,
        name: &str,
        key: &str,
        wasm: &[u8],
        shape: Shape,
    ) -> Result<Artifact, ArtifactError> {
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
            .and_then(|layout| self.keep(key, &output, &manifest, layout, shape));
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
        shape: Shape,
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
            shape,
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
            Ok(artifact) => {
                note_use(&path);
                Some(artifact)
            }
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
        Ok(Artifact::new(
            code,
            (manifest.image.bytes > 0).then_some(image),
            manifest.layout,
            manifest.shape,
            self.temporary.clone(),
        ))
    }
}

fn is_large(bytes: usize) -> bool {
    bytes as u64 >= LARGE_MODULE_BYTES
}

/// An artifact's files.
struct Stored {
    key: String,
    bytes: u64,
    used: SystemTime,
}

fn stored(directory: &Path) -> Vec<Stored> {
    let manifests = fs::read_dir(directory).into_iter().flatten().flatten();
    manifests
        .filter_map(|entry| {
            let key = entry
                .file_name()
                .to_str()?
                .strip_suffix(".manifest")?
                .to_owned();
            let used = entry.metadata().ok()?.modified().ok()?;
            let size = |kind| {
                let file = directory.join(format!("{key}.{kind}"));
                // Images are sparse: what counts is what they occupy.
                fs::metadata(file).map_or(0, |file| file.blocks() * 512)
            };
            let bytes = size("manifest") + size("elf") + size("image");
            Some(Stored { key, bytes, used })
        })
        .collect()
}

/// A manifest's time of change says when its artifact was last used. Without it, an artifact counts
/// as older than it is.
fn note_use(manifest: &Path) {
    let times = FileTimes::new().set_modified(SystemTime::now());
    let noted = File::options()
        .write(true)
        .open(manifest)
        .and_then(|file| file.set_times(times));
    if let Err(error) = noted {
        log::debug!("{}: {error}", manifest.display());
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
        "{WASMER_VERSION} cranelift speed elf {} {} {} {} {} {:?} {}",
        module::VERSION,
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
    use crate::region::PAGE_BYTES;

    fn wasm() -> Vec<u8> {
        wat::parse_str(
            r#"(module (memory (export "memory") 1) (data (i32.const 8) "hello")
                (func (export "_initialize") (loop))
                (func (export "alloc") (param i32) (result i32) i32.const 0)
                (func (export "on_event") (param i64 i32 i32 i32)))"#,
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
        } = cache.artifact("a", &wasm()).unwrap().layout().clone();
        assert!(
            read_only
                .iter()
                .any(|range| range.contains(&first_function))
        );
    }

    #[test]
    fn above_the_budget_goes_what_was_used_least_recently() {
        let directory = tempfile::tempdir().unwrap();
        let open = |budget| {
            let cache = Cache::open(directory.path(), Compiler::Here).unwrap();
            cache.with_budget(budget)
        };
        let module = |nonce: u32| {
            let text = format!(
                r#"(module (memory (export "memory") 1) (func (export "_initialize"))
                (func (export "alloc") (param i32) (result i32) i32.const {nonce})
                (func (export "on_event") (param i64 i32 i32 i32)))"#
            );
            wat::parse_str(text).unwrap()
        };
        let keys = [0, 1, 2].map(|nonce| key(&module(nonce)));
        let there = || {
            keys.clone()
                .map(|key| directory.path().join(format!("{key}.elf")).exists())
        };
        for nonce in [0, 1] {
            drop(open(u64::MAX).artifact("a", &module(nonce)).unwrap());
        }
        // Used again, and so younger than the other one.
        drop(open(u64::MAX).artifact("a", &module(0)).unwrap());
        let all: u64 = stored(directory.path()).iter().map(|s| s.bytes).sum();
        drop(open(all).artifact("a", &module(2)).unwrap());
        assert_eq!(there(), [true, false, true]);
        // What is in use stays, whatever the budget.
        let cache = open(1);
        let _used = cache.artifact("a", &module(0)).unwrap();
        let _new = cache.artifact("a", &module(1)).unwrap();
        assert_eq!(there(), [true, true, false]);
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
