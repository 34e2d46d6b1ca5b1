//! From a child's `wasm` to a program: reads or fetches a module, and has it compiled.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use async_lock::Semaphore;
use thiserror::Error;

use crate::artifact::ArtifactError;
use crate::cache::{Cache, LARGE_MODULE_BYTES};
use crate::child::{Child, Source};
use crate::download::{DownloadError, Downloader};
use crate::guest::Program;

/// Why a module cannot be had.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file.
    #[error("{from}: {source}")]
    Read {
        /// Its path.
        from: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The server.
    #[error("{from}: {source}")]
    Download {
        /// The URL.
        from: String,
        /// Why there is nothing.
        source: DownloadError,
    },
    /// A fault of ours.
    #[error("{from}: looking at it panicked; please report this")]
    Panic {
        /// Where the module is from.
        from: String,
    },
    /// It is not usable.
    #[error("{from} {source}")]
    Artifact {
        /// Where it is from.
        from: String,
        /// Why not.
        source: ArtifactError,
    },
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Loader {
    cache: Cache,
    downloader: Downloader,
    /// Modules that are read, checked or compiled at a time.
    loading: Semaphore,
    /// The same for large ones, which take minutes: small ones do not wait for them.
    loading_large: Semaphore,
}

impl Loader {
    /// Loads that many small modules at a time, and one large one.
    pub fn new(cache: Cache, at_a_time: usize) -> Self {
        Self {
            cache,
            downloader: Downloader::default(),
            loading: Semaphore::new(at_a_time),
            loading_large: Semaphore::new(1),
        }
    }

    /// Reads or fetches, checks and compiles a child's module.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn load(self: Arc<Self>, child: Arc<Child>) -> Result<Program, LoadError> {
        let from = child.wasm.to_string();
        let fetched = match &child.wasm {
            Source::File(_) => None,
            Source::Url { url, sha256 } => {
                Some(self.downloader.fetch(url, sha256).await.map_err(|source| {
                    LoadError::Download {
                        from: from.clone(),
                        source,
                    }
                })?)
            }
        };
        // Each holds a whole module in memory and a thread.
        let bytes = match (&fetched, &child.wasm) {
            (Some(wasm), _) => wasm.len() as u64,
            // What cannot be looked at is said when it is read.
            (None, Source::File(path)) => std::fs::metadata(path).map_or(0, |file| file.len()),
            (None, Source::Url { .. }) => 0,
        };
        let places = if bytes >= LARGE_MODULE_BYTES {
            &self.loading_large
        } else {
            &self.loading
        };
        let _place = places.acquire().await;
        let this = self.clone();
        // Compiling takes seconds.
        async_std::task::spawn_blocking(move || {
            // A module may hit a fault of the parser, which must not be the end of all.
            let compiled = catch_unwind(AssertUnwindSafe(|| this.compile(&child, fetched)));
            compiled.unwrap_or_else(|_| Err(LoadError::Panic { from }))
        })
        .await
    }

    fn compile(&self, child: &Child, fetched: Option<Vec<u8>>) -> Result<Program, LoadError> {
        let from = child.wasm.to_string();
        let wasm = match (fetched, &child.wasm) {
            (Some(wasm), _) => wasm,
            (None, Source::File(path)) => {
                std::fs::read(path).map_err(|source| LoadError::Read {
                    from: from.clone(),
                    source,
                })?
            }
            (None, Source::Url { .. }) => Vec::new(),
        };
        let artifact = self
            .cache
            .artifact(&child.name, &wasm)
            .map_err(|source| LoadError::Artifact { from, source })?;
        if let Some(obstacle) = artifact.shape().state.obstacle
            && child.hibernation.allowed
        {
            log::warn!(target: &child.name, "stays in memory when it is idle, because its module {obstacle} (`hibernate: never` says that you know)");
        }
        Ok(Program { artifact })
    }
}
