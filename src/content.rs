//! What a sleeping child's memory is, without the memory.
//!
//! In units of chunks: those that the guest has written to are in a file, with a hash each; of the
//! others, the first are as in the module's image, and the rest are zeros.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

/// The granularity of hashes.
pub const CHUNK_BYTES: usize = 65_536;

/// Hash of a chunk: BLAKE3, cut to 128 bits. Against accidents, and against whoever can write the
/// file but does not choose what the guest has in memory.
pub type ChunkHash = [u8; 16];

/// The hash of a chunk's content.
pub fn chunk_hash(chunk: &[u8]) -> ChunkHash {
    let hash = blake3::hash(chunk);
    hash.as_bytes().first_chunk().copied().unwrap_or_default()
}

/// The hash of a chunk of zeros.
pub fn zero_chunk_hash() -> ChunkHash {
    static HASH: OnceLock<ChunkHash> = OnceLock::new();
    *HASH.get_or_init(|| chunk_hash(&[0; CHUNK_BYTES]))
}

/// A chunk that is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// Its place in the memory, in chunks.
    pub number: u32,
    /// What it has to be.
    pub hash: ChunkHash,
}

impl StoredChunk {
    /// Its place in the memory and in the file, in bytes.
    pub fn offset(&self) -> usize {
        self.number as usize * CHUNK_BYTES
    }

    /// Whether it is in that file as it was. For signal handlers: no allocation, no lock, little
    /// stack.
    pub fn is_sound_in(&self, file: &File) -> bool {
        const PIECE_BYTES: usize = 16 << 10;
        let mut hasher = blake3::Hasher::new();
        let mut piece = [0; PIECE_BYTES];
        for start in (0..CHUNK_BYTES).step_by(PIECE_BYTES) {
            let offset = (self.offset() + start) as u64;
            if file.read_exact_at(&mut piece, offset).is_err() {
                return false;
            }
            hasher.update(&piece);
        }
        hasher.finalize().as_bytes().starts_with(&self.hash)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Content {
    /// Size of the memory, in bytes.
    pub bytes: usize,
    /// Nobody else writes to it.
    pub file: Arc<File>,
    /// In order of their numbers.
    pub stored: Box<[StoredChunk]>,
}
