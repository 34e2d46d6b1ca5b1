//! What a sleeping child's memory is kept in: a sparse file without a name.
//!
//! The file is unlinked from the beginning, so nothing is left behind however the process ends, and
//! nobody finds it to look into it. Nothing is copied on the way: pages go from the memory to the
//! file. The next snapshot of a memory that came from one goes into the same file and has only
//! the pages that were written since; that is safe while the memory is mapped, since a written page
//! is a private copy, which no longer sees the file.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;

use crate::directory;
use crate::region::{CHUNK_BYTES, Content, PAGE_BYTES, Region, chunk_hash, zero_chunk_hash};
use crate::stamp::Stamp;

/// Why there is no snapshot.
#[derive(Debug, Error)]
pub enum SaveError {
    /// The child is wanted back.
    #[error("cancelled")]
    Cancelled,
    /// The file cannot be written.
    #[error("snapshot in {directory}: {source}")]
    Write {
        /// Where.
        directory: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// The snapshot is not what was written.
#[derive(Debug, Error)]
pub enum DamageError {
    /// Somebody wrote to the file.
    #[error("its snapshot was changed by somebody else")]
    Changed,
    /// It cannot even be looked at.
    #[error("its snapshot cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// A saved memory.
#[derive(Debug)]
pub struct Snapshot {
    content: Content,
    stamp: Stamp,
    /// Numbers of the chunks that were in use when it was made.
    pub recent: Box<[u32]>,
}

impl Snapshot {
    /// Its content, to be mapped.
    ///
    /// # Errors
    /// [`DamageError`]. A later change of the file shows in the hash of its chunk.
    pub fn open(self) -> Result<Content, DamageError> {
        if Stamp::of(&self.content.file)? == self.stamp {
            Ok(self.content)
        } else {
            Err(DamageError::Changed)
        }
    }
}

/// Where snapshots are made.
#[derive(Debug)]
pub struct Snapshots {
    directory: PathBuf,
}

/// How much a snapshot was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// Size of the memory, in bytes.
    pub memory: usize,
    /// Bytes written to the file.
    pub written: usize,
}

impl Snapshots {
    /// Uses that directory, making it if it is not there.
    ///
    /// # Errors
    /// When it cannot be made or written to, or when others may write to it.
    pub fn open(directory: &Path) -> io::Result<Self> {
        directory::own(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    /// Saves a memory that no instance uses any more. After an error it is as good as before.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(
        &self,
        region: &mut Region,
        cancelled: &AtomicBool,
    ) -> Result<(Snapshot, Volume), SaveError> {
        let written = region.written();
        self.save_written(region, &written, cancelled)
    }

    /// The same, given what the guest has written to, or more than that.
    fn save_written(
        &self,
        region: &mut Region,
        written: &[Range<usize>],
        cancelled: &AtomicBool,
    ) -> Result<(Snapshot, Volume), SaveError> {
        let failed = |source| SaveError::Write {
            directory: self.directory.clone(),
            source,
        };
        let size = region.size_bytes();
        let earlier = region.snapshot_file().cloned();
        let is_new = earlier.is_none();
        let file = match earlier {
            Some(file) => file,
            None => tempfile::tempfile_in(&self.directory)
                .map(Arc::new)
                .map_err(failed)?,
        };
        file.set_len(size as u64).map_err(failed)?;
        // An image's pages are in no snapshot yet.
        let mapped = region.mapped_bytes();
        let image = 0..if is_new { mapped } else { 0 };
        let mut volume = Volume {
            memory: size,
            written: 0,
        };
        let mut hashes = Vec::with_capacity(size / CHUNK_BYTES);
        let mut recent = Vec::new();
        let mut changes = written;
        let zeros = zero_chunk_hash();
        for (number, start) in (0_u32..).zip((0..size).step_by(CHUNK_BYTES)) {
            if cancelled.load(Ordering::Acquire) {
                return Err(SaveError::Cancelled);
            }
            let chunk = start..start + CHUNK_BYTES;
            let known = region.chunk(number as usize);
            let (before, was_touched) = known.unwrap_or((zeros, false));
            while let [first, rest @ ..] = changes
                && first.end <= chunk.start
            {
                changes = rest;
            }
            // A chunk of a snapshot without access cannot have been, whatever `written` says.
            let has_access = known.is_none() || was_touched;
            let is_written = has_access && changes.first().is_some_and(|c| c.start < chunk.end);
            if !is_written && chunk.start >= image.end {
                if was_touched && before != zeros {
                    recent.push(number);
                }
                hashes.push(before);
                continue;
            }
            let content = region.bytes(chunk.clone()).map_err(failed)?;
            let hash = chunk_hash(content);
            hashes.push(hash);
            // Zeros need no file. Else the file has the whole chunk: to read a hole may take room.
            if hash == zeros {
                continue;
            }
            recent.push(number);
            for page in (0..CHUNK_BYTES).step_by(PAGE_BYTES) {
                let address = chunk.start + page;
                let bytes = content.get(page..page + PAGE_BYTES).unwrap_or_default();
                let is_changed = changes
                    .iter()
                    .take_while(|c| c.start <= address)
                    .any(|c| c.contains(&address));
                if is_changed || before == zeros {
                    file.write_all_at(bytes, address as u64).map_err(failed)?;
                    volume.written += bytes.len();
                }
            }
        }
        let stamp = Stamp::of(&file).map_err(failed)?;
        let content = Content {
            file,
            hashes: hashes.into(),
        };
        let recent = recent.into();
        let snapshot = Snapshot {
            content,
            stamp,
            recent,
        };
        Ok((snapshot, volume))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::{Budget, Origin};

    const CHUNKS: usize = 4;

    fn region(origin: Origin) -> Region {
        let bytes = CHUNKS * CHUNK_BYTES;
        Region::new(6 << 30, bytes, Budget::new(bytes), origin).unwrap()
    }

    #[test]
    fn without_a_pagemap_every_snapshot_is_right_and_the_untouched_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(directory.path()).unwrap();
        let content: Vec<_> = (0..CHUNKS)
            .flat_map(|i| vec![i as u8; CHUNK_BYTES])
            .collect();
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&content, 0).unwrap();
        let all = std::iter::once(0..content.len()).collect::<Vec<_>>();
        let never = AtomicBool::new(false);
        let mut region_now = region(Origin::Image(image));
        for touched in [0, 3, 1] {
            let (snapshot, volume) = snapshots
                .save_written(&mut region_now, &all, &never)
                .unwrap();
            assert_eq!(volume.memory, content.len());
            region_now = region(Origin::Snapshot(snapshot.open().unwrap()));
            assert!(region_now.admit_range((touched * CHUNK_BYTES) as u64, 1));
        }
        assert!(region_now.admit_range(0, content.len()));
        assert_eq!(region_now.bytes(0..content.len()).unwrap(), content);
    }
}
