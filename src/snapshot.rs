//! What a sleeping child's memory is kept in: a sparse file without a name.
//!
//! The file is unlinked from the beginning, so nothing is left behind however the process ends, and
//! nobody finds it to look into it. Nothing is copied on the way: pages go from the memory to the
//! file, and only those of chunks that are not as in the module's image. The next snapshot of a memory
//! that came from one goes into the same file and has only the pages that were written since; that
//! is safe while the memory is mapped, since a written page is a private copy, which no longer sees
//! the file.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;

use crate::content::{CHUNK_BYTES, Content, StoredChunk, chunk_hash, zero_chunk_hash};
use crate::directory;
use crate::region::{PAGE_BYTES, Region};
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
        let image_bytes = region.image_bytes();
        let file = match earlier {
            Some(file) => file,
            None => tempfile::tempfile_in(&self.directory)
                .map(Arc::new)
                .map_err(failed)?,
        };
        file.set_len(size as u64).map_err(failed)?;
        let mut volume = Volume {
            memory: size,
            written: 0,
        };
        let mut stored = Vec::new();
        let mut recent = Vec::new();
        let mut changes = written;
        for (number, start) in (0_u32..).zip((0..size).step_by(CHUNK_BYTES)) {
            if cancelled.load(Ordering::Acquire) {
                return Err(SaveError::Cancelled);
            }
            let chunk = start..start + CHUNK_BYTES;
            let before = region.chunk(number as usize);
            while let [first, rest @ ..] = changes
                && first.end <= chunk.start
            {
                changes = rest;
            }
            // A chunk of a snapshot without access cannot have been, whatever `written` says.
            let has_access = before.is_none_or(|(_, was_touched)| was_touched);
            let is_written = has_access && changes.first().is_some_and(|c| c.start < chunk.end);
            if !is_written {
                if let Some((before, was_touched)) = before {
                    stored.push(before);
                    recent.extend(was_touched.then_some(number));
                }
                continue;
            }
            let content = region.bytes(chunk.clone()).map_err(failed)?;
            let hash = chunk_hash(content);
            // Without a file it would be zeros, too.
            if hash == zero_chunk_hash() && chunk.start >= image_bytes {
                continue;
            }
            stored.push(StoredChunk { number, hash });
            recent.push(number);
            // The file has the whole chunk: to read a hole may take room.
            for page in (0..CHUNK_BYTES).step_by(PAGE_BYTES) {
                let address = chunk.start + page;
                let bytes = content.get(page..page + PAGE_BYTES).unwrap_or_default();
                let is_changed = changes
                    .iter()
                    .take_while(|c| c.start <= address)
                    .any(|c| c.contains(&address));
                if is_changed || before.is_none() {
                    file.write_all_at(bytes, address as u64).map_err(failed)?;
                    volume.written += bytes.len();
                }
            }
        }
        let stamp = Stamp::of(&file).map_err(failed)?;
        let content = Content {
            bytes: size,
            file,
            stored: stored.into(),
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
    fn every_snapshot_is_right_and_what_is_as_in_the_image_or_zero_is_in_none() {
        let directory = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(directory.path()).unwrap();
        // The image ends in the third chunk.
        let mut content: Vec<_> = (1..=CHUNKS as u8)
            .flat_map(|i| vec![i; CHUNK_BYTES])
            .collect();
        let end = 2 * CHUNK_BYTES + PAGE_BYTES;
        content.get_mut(end..).unwrap().fill(0);
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&content[..end], 0).unwrap();
        let image = || Some(image.try_clone().unwrap());
        let all = std::iter::once(0..content.len()).collect::<Vec<_>>();
        let never = AtomicBool::new(false);
        let first = PAGE_BYTES..2 * PAGE_BYTES;
        let last = content.len() - PAGE_BYTES..content.len();
        let none = last.end..last.end;
        for (kernel_says, stored) in [
            // Without a pagemap all may have been written.
            ([&all[..], &all, &all], [3, 3, 3]),
            ([&[none][..], &[first], &[last]], [0, 1, 1]),
        ] {
            let mut region_now = region(Origin::Image(image().unwrap()));
            for (written, stored) in kernel_says.into_iter().zip(stored) {
                let (snapshot, volume) = snapshots
                    .save_written(&mut region_now, written, &never)
                    .unwrap();
                assert_eq!(volume.memory, content.len());
                let saved = snapshot.open().unwrap();
                assert_eq!(saved.stored.len(), stored);
                region_now = region(Origin::Snapshot {
                    content: saved,
                    image: image(),
                });
                assert!(region_now.admit_range(0, 1));
            }
            assert!(region_now.admit_range(0, content.len()));
            assert_eq!(region_now.bytes(0..content.len()).unwrap(), content);
        }
    }
}
