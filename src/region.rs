//! The address range of a linear memory. (Room 1 of 3 for `unsafe`.)
//!
//! ```text
//! base                 size        limit            0x7ffe0000               8 GiB
//! |  readable, writable  |  grows to  |   no access    | poll page |  no access  |
//! ```
//!
//! One mapping per memory, reserved whole: the compiler leaves bounds checks to the page tables
//! (a 32-bit index plus a 32-bit offset cannot leave it), and memory grows without moving.
//! The *poll page* lies beyond the largest memory we allow. The preemption middleware stores to it
//! at every function entry and loop head; [`Region::poke`] makes it inaccessible, and the guest
//! traps at its next check. A guest can address that page, which harms nobody: it is its own.
//!
//! A memory may begin as a copy-on-write mapping of files: its module's image, and what an earlier
//! instance has changed of it ([`Origin`]). Their pages are read when they are touched, so a large
//! heap is back as fast as a small one. Those of a snapshot stay without access until then: the first
//! touch of a chunk is a fault, whose handler checks the chunk's hash before it lets the guest see it.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use wasmer::sys::vm::TrapHandlerFn;

use crate::content::{CHUNK_BYTES, Content, StoredChunk};

const WRITABLE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
/// Offset of the poll page in every memory.
pub const POLL_PAGE: u32 = 0x7ffe_0000;
/// The granularity of protections and of copy-on-write.
pub const PAGE_BYTES: usize = 4096;
/// Largest limit a memory may have, in bytes: what lies before the poll page.
pub const MAX_MEMORY_BYTES: u64 = POLL_PAGE as u64;
/// The unit in which memories grow.
pub const WASM_PAGE_BYTES: usize = 65_536;

/// What a new memory begins with.
#[derive(Debug, Default)]
pub enum Origin {
    /// Zeros.
    #[default]
    Zeros,
    /// A file of whole pages that never changes, and zeros after it.
    Image(File),
    /// What an instance left in a file.
    Snapshot {
        /// What it has changed.
        content: Content,
        /// What it began with, if that was an image.
        image: Option<File>,
    },
    /// What an instance left in memory.
    Region(Region),
}

/// A snapshot's chunk.
#[derive(Debug)]
struct MappedChunk {
    stored: StoredChunk,
    /// It was checked and can be accessed.
    is_ready: AtomicBool,
}

/// The snapshot behind a region.
#[derive(Debug)]
struct Mapping {
    file: Arc<File>,
    /// In order of their numbers.
    chunks: Box<[MappedChunk]>,
}

impl Mapping {
    fn chunk(&self, number: usize) -> Option<&MappedChunk> {
        let number = u32::try_from(number).ok()?;
        let found = self
            .chunks
            .binary_search_by_key(&number, |c| c.stored.number);
        self.chunks.get(found.ok()?)
    }
}

/// The address range of one linear memory. Unmapped when the last handle is dropped.
pub struct Region {
    base: NonNull<u8>,
    reserved_bytes: usize,
    budget: Arc<Budget>,
    size_bytes: AtomicUsize,
    poked: AtomicBool,
    /// How many bytes at the beginning came from an image, where no snapshot's chunk is.
    image_bytes: usize,
    snapshot: Option<Mapping>,
    damaged: AtomicBool,
}

/// What all memories of an instance may have together.
#[derive(Debug)]
pub struct Budget {
    /// In bytes.
    pub limit_bytes: usize,
    used_bytes: AtomicUsize,
}

impl Budget {
    /// All of it is there to be taken.
    pub fn new(limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            limit_bytes,
            used_bytes: AtomicUsize::new(0),
        })
    }

    /// Takes bytes from it; whether they were there.
    fn take(&self, bytes: usize) -> bool {
        let more = |used: usize| {
            used.checked_add(bytes)
                .filter(|total| *total <= self.limit_bytes)
        };
        self.used_bytes
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .is_ok()
    }
}

// SAFETY: the pointer is to a mapping that this value owns alone and that stays until it is
// dropped. Its own fields are atomics; the memory behind it is only read and written by wasm code
// and by wasmer, under wasmer's rules.
unsafe impl Send for Region {}
// SAFETY: as above. The methods only change page protections, which the kernel serialises.
unsafe impl Sync for Region {}

impl Region {
    /// A region of at least that size, with the content of an `origin` other than a region.
    ///
    /// # Errors
    /// [`io::ErrorKind::OutOfMemory`] above the budget, else what the system says.
    pub fn new(
        reserved_bytes: usize,
        size_bytes: usize,
        budget: Arc<Budget>,
        origin: Origin,
    ) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory
        // that anything else uses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved_bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| io::Error::other("mmap returned address zero"))?;
        let mut region = Self {
            base,
            reserved_bytes,
            budget,
            size_bytes: AtomicUsize::new(0),
            poked: AtomicBool::new(false),
            image_bytes: 0,
            snapshot: None,
            damaged: AtomicBool::new(false),
        };
        region.protect(POLL_PAGE as usize, PAGE_BYTES, WRITABLE)?;
        match origin {
            Origin::Zeros | Origin::Region(_) => region.grow_to(size_bytes)?,
            Origin::Image(image) => {
                region.grow_to(size_bytes)?;
                region.map_image(&image)?;
            }
            Origin::Snapshot { content, image } => {
                region.grow_to(size_bytes.max(content.bytes))?;
                if let Some(image) = image {
                    region.map_image(&image)?;
                }
                let follows =
                    |a: &StoredChunk, b: &StoredChunk| a.number.checked_add(1) == Some(b.number);
                for run in content.stored.chunk_by(follows) {
                    let start = run.first().map_or(0, StoredChunk::offset);
                    let end = start + run.len() * CHUNK_BYTES;
                    region.map(&content.file, start..end, libc::PROT_NONE)?;
                }
                let unchecked = |stored| MappedChunk {
                    stored,
                    is_ready: AtomicBool::new(false),
                };
                region.snapshot = Some(Mapping {
                    file: content.file,
                    chunks: content.stored.into_iter().map(unchecked).collect(),
                });
            }
        }
        Ok(region)
    }

    fn map_image(&mut self, image: &File) -> io::Result<()> {
        let bytes = usize::try_from(image.metadata()?.len()).unwrap_or(usize::MAX);
        self.grow_to(bytes)?;
        self.map(image, 0..bytes, WRITABLE)?;
        self.image_bytes = bytes;
        Ok(())
    }

    /// Puts a file's content in the place of a range, which is the same in both.
    fn map(&mut self, file: &File, range: Range<usize>, protection: libc::c_int) -> io::Result<()> {
        if range.end > self.size_bytes() || !range.end.is_multiple_of(PAGE_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if range.is_empty() {
            return Ok(());
        }
        let offset = libc::off_t::try_from(range.start).map_err(io::Error::other)?;
        // SAFETY: replaces pages of our own mapping, which nobody has a pointer into yet. Writes go
        // to private copies, and whoever made the file promises that it does not change.
        let mapped = unsafe {
            libc::mmap(
                self.base.as_ptr().add(range.start).cast(),
                range.len(),
                protection,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn protect(&self, offset: usize, bytes: usize, protection: libc::c_int) -> io::Result<()> {
        debug_assert!(offset + bytes <= self.reserved_bytes);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range lies inside our own mapping (callers pass constants or sizes checked
        // against the limit), so no memory of anybody else changes its protection. Wasm code
        // that hits a page without access gets a signal, which wasmer turns into a trap.
        let result =
            unsafe { libc::mprotect(self.base.as_ptr().add(offset).cast(), bytes, protection) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Makes the first `bytes` accessible. Never shrinks.
    ///
    /// # Errors
    /// [`io::ErrorKind::OutOfMemory`] above the budget, else what the system says.
    pub fn grow_to(&self, bytes: usize) -> io::Result<()> {
        let old = self.size_bytes();
        if bytes as u64 > MAX_MEMORY_BYTES || !self.budget.take(bytes.saturating_sub(old)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if bytes > old {
            self.protect(old, bytes - old, WRITABLE)?;
            self.size_bytes.store(bytes, Ordering::Release);
        }
        Ok(())
    }

    /// Its first byte.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Size of the memory now, in bytes.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Stops the guest at its next check. It does not come back from that: its instance has to
    /// be thrown away.
    pub fn poke(&self) {
        self.poked.store(true, Ordering::Release);
        if let Err(error) = self.protect(POLL_PAGE as usize, PAGE_BYTES, libc::PROT_NONE) {
            log::error!("cannot stop a guest, mprotect: {error}");
        }
    }

    /// Whether [`Region::poke`] was called.
    pub fn was_poked(&self) -> bool {
        self.poked.load(Ordering::Acquire)
    }

    /// Whether a chunk did not have the hash it should have: its guest cannot go on.
    pub fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Acquire)
    }

    /// Lets a chunk be accessed after checking it; whether it can be now and could not before.
    /// Runs in a signal handler: no allocation, no lock, little stack.
    fn admit(&self, number: usize) -> bool {
        let chunk = self.snapshot.as_ref().and_then(|snapshot| {
            let chunk = snapshot.chunk(number)?;
            Some((chunk, &snapshot.file))
        });
        let Some((chunk, file)) = chunk else {
            return false;
        };
        if chunk.is_ready.load(Ordering::Acquire) {
            return false;
        }
        // Read, and not looked at through the mapping: what cannot be read is an error here, and a
        // signal there.
        if !chunk.stored.is_sound_in(file) {
            self.damaged.store(true, Ordering::Release);
            return false;
        }
        let offset = chunk.stored.offset();
        let writable = self.protect(offset, CHUNK_BYTES, WRITABLE).is_ok();
        chunk.is_ready.store(writable, Ordering::Release);
        writable
    }

    /// Whether a fault at that address was only a chunk's first access, which may be repeated now.
    fn explains(&self, address: usize) -> bool {
        address
            .checked_sub(self.base.as_ptr() as usize)
            .is_some_and(|offset| self.admit(offset / CHUNK_BYTES))
    }

    /// Gives the pages back that are as they are in the file, until they are touched again. Only
    /// while no guest runs.
    pub fn evict(&self) {
        let mut start = 0;
        for written in self.written() {
            self.give_back(start..written.start);
            start = written.end;
        }
        self.give_back(start..self.size_bytes());
    }

    /// Drops pages that nobody has written to.
    fn give_back(&self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        // SAFETY: inside our own mapping, which is private and of files that do not change, and no
        // page of the range was written to: the next access finds the same content again.
        unsafe {
            let start = self.base.as_ptr().add(range.start).cast();
            libc::madvise(start, range.len(), libc::MADV_DONTNEED);
        }
    }

    fn contains(&self, address: usize) -> bool {
        let offset = address.checked_sub(self.base.as_ptr() as usize);
        offset.is_some_and(|offset| offset < self.reserved_bytes)
    }

    /// Checks what the host is about to access while no guest runs. (While one does, faults do.)
    /// Whether all of it is sound; what lies outside is not looked at.
    pub fn admit_range(&self, offset: u64, bytes: usize) -> bool {
        if bytes > 0 && self.snapshot.is_some() {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let end = start.saturating_add(bytes).min(self.size_bytes());
            for chunk in start / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) {
                self.admit(chunk);
            }
        }
        !self.is_damaged()
    }

    /// Reads chunks that the guest will want, so that it need not wait for each.
    pub fn read_ahead(&self, chunks: &[u32]) {
        for chunk in chunks {
            if self.admit(*chunk as usize) {
                let offset = *chunk as usize * CHUNK_BYTES;
                // SAFETY: the range is accessible now, and inside our own mapping: mapping pages that
                // would be mapped at their first access changes no content. An older kernel refuses.
                unsafe {
                    let start = self.base.as_ptr().add(offset).cast();
                    libc::madvise(start, CHUNK_BYTES, libc::MADV_POPULATE_READ);
                }
            }
        }
    }

    /// The file of the snapshot that it came from.
    pub fn snapshot_file(&self) -> Option<&Arc<File>> {
        self.snapshot.as_ref().map(|snapshot| &snapshot.file)
    }

    /// How many bytes at the beginning came from an image, where no snapshot's chunk is.
    pub fn image_bytes(&self) -> usize {
        self.image_bytes
    }

    /// A snapshot's chunk, and whether the guest has touched it.
    pub fn chunk(&self, number: usize) -> Option<(StoredChunk, bool)> {
        let chunk = self.snapshot.as_ref()?.chunk(number)?;
        Some((chunk.stored, chunk.is_ready.load(Ordering::Acquire)))
    }

    /// The content of a range. Nobody can write to it meanwhile: an instance would hold a handle of
    /// its own. Chunks that were never touched have to be admitted first.
    ///
    /// # Errors
    /// When the range is not inside the memory, or without access.
    pub fn bytes(&mut self, range: Range<usize>) -> io::Result<&[u8]> {
        let chunks = range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES);
        let no_access = |chunk| self.chunk(chunk).is_some_and(|(_, ready)| !ready);
        if range.start > range.end
            || range.end > self.size_bytes()
            || chunks.into_iter().any(no_access)
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: inside the accessible part, as just checked. The exclusive reference shows that
        // there is no other handle and so no instance that could write to it.
        Ok(unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(range.start), range.len()) })
    }

    /// Which pages the guest has written to, as far as the kernel tells: byte ranges, in order.
    /// Without a usable pagemap these are all pages.
    pub fn written(&self) -> Vec<Range<usize>> {
        let size = self.size_bytes();
        self.read_pagemap(size).unwrap_or_else(|error| {
            log::debug!("/proc/self/pagemap: {error}; all pages count as written");
            std::iter::once(0..size).collect()
        })
    }

    /// See "Documentation/admin-guide/mm/pagemap.rst" of the Linux kernel.
    fn read_pagemap(&self, size: usize) -> io::Result<Vec<Range<usize>>> {
        const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
        const FILE_OR_SHARED: u64 = 1 << 61;
        const ENTRY_BYTES: usize = 8;
        let pagemap = File::open("/proc/self/pagemap")?;
        let first_page = self.base.as_ptr() as usize / PAGE_BYTES;
        let mut written: Vec<Range<usize>> = Vec::new();
        let mut entries = vec![0; 4096 * ENTRY_BYTES];
        let pages = size / PAGE_BYTES;
        let mut page = 0;
        while page < pages {
            let count = (pages - page).min(entries.len() / ENTRY_BYTES);
            let (entries, _) = entries.split_at_mut(count * ENTRY_BYTES);
            pagemap.read_exact_at(entries, ((first_page + page) * ENTRY_BYTES) as u64)?;
            for (entry, _) in entries.as_chunks().0.iter().zip(0..) {
                let entry = u64::from_le_bytes(*entry);
                if entry & PRESENT_OR_SWAPPED != 0 && entry & FILE_OR_SHARED == 0 {
                    let bytes = page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
                    match written.last_mut() {
                        Some(last) if last.end == bytes.start => last.end = bytes.end,
                        _ => written.push(bytes),
                    }
                }
                page += 1;
            }
        }
        Ok(written)
    }
}

/// Has the allocator keep what all threads allocate close together: of what is freed, more are whole
/// pages then, which it can give back. Call it first. musl's allocator is like that by itself.
pub fn keep_memory_together() {
    #[cfg(target_env = "gnu")]
    {
        /// Two, so that the network and a worker seldom wait for each other. (To keep large
        /// allocations apart with `M_MMAP_THRESHOLD`, too, costs a wake-up of a Go child 2 ms.)
        const ARENAS: libc::c_int = 2;
        // SAFETY: sets a number in the allocator, under its lock (mallopt(3)).
        unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    }
}

/// Gives the allocator's free memory back to the system. musl does so by itself.
pub fn give_back_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only walks the allocator's own lists, under its own locks (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// For wasmer's trap handler: lets a guest go on whose fault was the first access of a chunk.
/// A page that cannot be read from its file (SIGBUS) is a trap of the guest that touched it.
pub fn fault_handler(regions: &[Arc<Region>]) -> Box<TrapHandlerFn<'static>> {
    static BUS_ERRORS: Once = Once::new();
    BUS_ERRORS.call_once(catch_bus_errors);
    let regions = regions.to_vec();
    Box::new(move |signal, information, _| {
        // SAFETY: the kernel's own, valid while the handler runs; both signals have an address.
        let address = unsafe { (*information).si_addr() } as usize;
        match signal {
            libc::SIGSEGV => regions.iter().any(|region| region.explains(address)),
            libc::SIGBUS => {
                let hit = regions.iter().find(|region| region.contains(address));
                if let Some(region) = hit {
                    region.damaged.store(true, Ordering::Release);
                }
                false
            }
            _ => false,
        }
    })
}

/// Has wasmer's handler of SIGSEGV handle SIGBUS too, which it only asks for on other systems.
fn catch_bus_errors() {
    // SAFETY: sigaction(2) reads and writes the structure that it is given; all zeros is a valid
    // one. wasmer's handler, which is there since the first instance was made, expects SIGBUS, and
    // passes on what does not come from a guest.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut action) == 0
            && libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) == 0
    };
    if !done {
        log::warn!("SIGBUS: {}", io::Error::last_os_error());
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and this was the last handle: instances hold one each, so
        // no wasm code can still run in it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.reserved_bytes) };
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Region({} of {} bytes)",
            self.size_bytes(),
            self.budget.limit_bytes
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::chunk_hash;

    fn region(pages: usize, limit_pages: usize, origin: Origin) -> io::Result<Region> {
        let budget = Budget::new(limit_pages * WASM_PAGE_BYTES);
        Region::new(6 << 30, pages * WASM_PAGE_BYTES, budget, origin)
    }

    fn write(region: &mut Region, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= region.size_bytes());
        // SAFETY: inside the accessible part, and nobody else has the region.
        unsafe {
            region
                .base()
                .add(offset)
                .copy_from(bytes.as_ptr(), bytes.len())
        };
    }

    #[test]
    fn a_region_grows_to_its_limit_and_not_beyond() {
        let region = region(1, 3, Origin::Zeros).unwrap();
        assert_eq!(region.size_bytes(), WASM_PAGE_BYTES);
        region.grow_to(3 * WASM_PAGE_BYTES).unwrap();
        region.grow_to(4 * WASM_PAGE_BYTES).unwrap_err();
        assert_eq!(region.size_bytes(), 3 * WASM_PAGE_BYTES);
    }

    #[test]
    fn memories_of_one_instance_share_their_limit() {
        let budget = Budget::new(3 * WASM_PAGE_BYTES);
        let new = |pages| {
            Region::new(
                6 << 30,
                pages * WASM_PAGE_BYTES,
                budget.clone(),
                Origin::Zeros,
            )
            .unwrap()
        };
        let (first, second) = (new(2), new(1));
        first.grow_to(3 * WASM_PAGE_BYTES).unwrap_err();
        second.grow_to(2 * WASM_PAGE_BYTES).unwrap_err();
    }

    #[test]
    fn written_pages_are_found_and_read_ones_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(WASM_PAGE_BYTES as u64).unwrap();
        let mut region = region(3, 3, Origin::Image(file)).unwrap();
        assert_eq!(region.bytes(0..WASM_PAGE_BYTES).unwrap()[5], 0);
        write(&mut region, PAGE_BYTES + 7, b"x");
        write(&mut region, 2 * WASM_PAGE_BYTES, b"y");
        let after_file = 2 * WASM_PAGE_BYTES;
        let written = [
            PAGE_BYTES..2 * PAGE_BYTES,
            after_file..after_file + PAGE_BYTES,
        ];
        assert_eq!(region.written(), written);
        region.evict();
        assert_eq!(region.written(), written);
        assert_eq!(region.bytes(PAGE_BYTES + 7..PAGE_BYTES + 8).unwrap(), b"x");
        assert_eq!(region.bytes(after_file..after_file + 1).unwrap(), b"y");
    }

    #[test]
    fn a_chunk_of_a_snapshot_is_admitted_when_its_hash_is_right() {
        let file = tempfile::tempfile().unwrap();
        let mut content = vec![1; 2 * CHUNK_BYTES];
        file.write_all_at(&content, 0).unwrap();
        let stored = |(chunk, number)| StoredChunk {
            number,
            hash: chunk_hash(chunk),
        };
        let stored = content.chunks(CHUNK_BYTES).zip(0..).map(stored).collect();
        content[CHUNK_BYTES] = 2;
        file.write_all_at(&content, 0).unwrap();
        let snapshot = Content {
            bytes: content.len(),
            file: Arc::new(file),
            stored,
        };
        let image = None;
        let mut region = region(
            2,
            2,
            Origin::Snapshot {
                content: snapshot,
                image,
            },
        )
        .unwrap();
        region.bytes(0..1).unwrap_err();
        assert!(region.admit_range(5, 10));
        assert_eq!(region.bytes(0..1).unwrap(), [1]);
        assert!(!region.is_damaged());
        assert!(!region.admit_range(CHUNK_BYTES as u64 - 1, 2));
        assert!(region.is_damaged());
        region.bytes(CHUNK_BYTES..CHUNK_BYTES + 1).unwrap_err();
    }
}
