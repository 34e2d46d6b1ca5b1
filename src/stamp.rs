//! Tells whether a file is still what it was.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// A file at some time. Every write to it since, every change of its length and every exchange for
/// another one shows in it (the kernel sets the time of change, no program can).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl Stamp {
    /// Of the file as it is now.
    ///
    /// # Errors
    /// What the system says of it.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}
