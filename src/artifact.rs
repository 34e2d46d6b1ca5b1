//! Compiled modules: native code on disk, in memory while somebody uses it. (Room 3 of 3 for
//! `unsafe`.)
//!
//! Native code is loaded without verification, so nothing is loaded but what [`cache`] has made or
//! checked, and only while it is still that very file. Every module has an engine of its own: wasmer
//! frees code only when its engine goes.
//!
//! [`cache`]: crate::cache

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tempfile::TempDir;
use thiserror::Error;
use wasmer::sys::NativeEngineExt;
use wasmer::{Engine, Module};

use crate::compile::CompileError;
use crate::memory::RegionTunables;
use crate::module::{Problem, Shape};
use crate::postlink::Layout;
use crate::region::PAGE_BYTES;
use crate::stamp::Stamp;

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
    /// The module cannot be a child.
    #[error("{}", join(.0))]
    Module(Vec<Problem>),
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

fn join(problems: &[Problem]) -> String {
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    problems.join("; ")
}

/// A file whose checksum was right.
#[derive(Debug)]
pub struct Checked {
    /// Where it is.
    pub path: PathBuf,
    /// What it was then.
    pub stamp: Stamp,
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
    shape: Arc<Shape>,
    loaded: Mutex<Weak<LoadedModule>>,
    /// Keeps the files of a process without a cache.
    _directory: Option<Arc<TempDir>>,
}

impl Artifact {
    /// Of files that the cache has just checked; `directory` goes with the last of its users.
    pub fn new(
        code: Checked,
        image: Option<Checked>,
        layout: Layout,
        shape: Shape,
        directory: Option<Arc<TempDir>>,
    ) -> Self {
        Self {
            code,
            image,
            layout,
            shape: Arc::new(shape),
            loaded: Mutex::default(),
            _directory: directory,
        }
    }

    /// What is known of its module.
    pub fn shape(&self) -> &Arc<Shape> {
        &self.shape
    }

    /// Where its code is in its file, and in memory.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

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
