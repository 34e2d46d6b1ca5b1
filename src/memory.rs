//! Linear memory of our own, with a poll page. (Room 1 of 2 for `unsafe`.)
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

use std::cell::RefCell;
use std::cell::UnsafeCell;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use wasmer::sys::vm::{
    LinearMemory, MemoryStyle, TableStyle, VMMemory, VMMemoryDefinition, VMTable, VMTableDefinition,
};
use wasmer::sys::{BaseTunables, Tunables};
use wasmer::{MemoryError, MemoryType, Pages, TableType};

/// Offset of the poll page in every memory.
pub const POLL_PAGE: u32 = 0x7ffe_0000;
const POLL_PAGE_BYTES: usize = 4096;
/// Largest limit a memory may have, in bytes: what lies before the poll page.
pub const MAX_MEMORY_BYTES: u64 = POLL_PAGE as u64;
/// Largest number of elements in a table. 35,000 functions make a large Go program; an element
/// costs the host 8 to 16 bytes.
const MAX_TABLE_ELEMENTS: u32 = 1 << 20;
const WASM_PAGE_BYTES: usize = 65_536;

/// The address range of one linear memory. Unmapped when the last handle is dropped.
pub struct Region {
    base: NonNull<u8>,
    reserved_bytes: usize,
    budget: Arc<Budget>,
    size_bytes: AtomicUsize,
    poked: AtomicBool,
}

/// What all memories of an instance may have together.
#[derive(Debug)]
struct Budget {
    limit_bytes: usize,
    used_bytes: AtomicUsize,
}

impl Budget {
    fn new(limit_bytes: usize) -> Arc<Self> {
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
    fn new(reserved_bytes: usize, size_bytes: usize, budget: Arc<Budget>) -> io::Result<Self> {
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
        let region = Self {
            base,
            reserved_bytes,
            budget,
            size_bytes: AtomicUsize::new(0),
            poked: AtomicBool::new(false),
        };
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        region.protect(POLL_PAGE as usize, POLL_PAGE_BYTES, writable)?;
        region.grow_to(size_bytes)?;
        Ok(region)
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
    fn grow_to(&self, bytes: usize) -> io::Result<()> {
        let old = self.size_bytes();
        if bytes as u64 > MAX_MEMORY_BYTES || !self.budget.take(bytes.saturating_sub(old)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if bytes > old {
            self.protect(old, bytes - old, libc::PROT_READ | libc::PROT_WRITE)?;
            self.size_bytes.store(bytes, Ordering::Release);
        }
        Ok(())
    }

    /// Size of the memory now, in bytes.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Stops the guest at its next check. It does not come back from that: its instance has to
    /// be thrown away.
    pub fn poke(&self) {
        self.poked.store(true, Ordering::Release);
        if let Err(error) = self.protect(POLL_PAGE as usize, POLL_PAGE_BYTES, libc::PROT_NONE) {
            log::error!("cannot stop a guest, mprotect: {error}");
        }
    }

    /// Whether [`Region::poke`] was called.
    pub fn was_poked(&self) -> bool {
        self.poked.load(Ordering::Acquire)
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

/// Where wasmer wants a memory's base and length kept.
#[derive(Debug)]
enum Definition {
    /// Inside the instance.
    Instance(NonNull<VMMemoryDefinition>),
    /// With the memory, for one that a host made.
    Own(Box<UnsafeCell<VMMemoryDefinition>>),
}

/// A [`Region`] as wasmer sees it.
#[derive(Debug)]
struct RegionMemory {
    region: Arc<Region>,
    ty: MemoryType,
    style: MemoryStyle,
    definition: Definition,
    /// wasmer calls `grow` with `&mut self`, but its `Sync` bound lets nobody rely on that.
    growing: Mutex<()>,
}

// SAFETY: the raw pointer of `Definition::Instance` is to the instance that owns this memory; both
// live in one store, which one thread uses at a time. `Region` is `Send` and `Sync` itself.
unsafe impl Send for RegionMemory {}
// SAFETY: as above. Shared references only read the pointer; writing happens under `growing`.
unsafe impl Sync for RegionMemory {}

impl RegionMemory {
    fn new(
        ty: MemoryType,
        style: &MemoryStyle,
        location: Option<NonNull<VMMemoryDefinition>>,
    ) -> Result<Self, MemoryError> {
        if ty.shared || *style != MemoryStyle::Static {
            return Err(MemoryError::Generic(
                "only unshared 32-bit memory is available".into(),
            ));
        }
        let guard_bytes = usize::try_from(MemoryStyle::static_offset_guard_size())
            .map_err(|_| MemoryError::Region("the host is not 64-bit".into()))?;
        let reserved_bytes = MemoryStyle::static_bound().bytes().0 + guard_bytes;
        let budget = CREATING
            .with_borrow(|creating| creating.budget.clone())
            .ok_or_else(|| MemoryError::Region("no instance is being made".into()))?;
        let size_bytes = ty.minimum.bytes().0;
        let limit_bytes = budget.limit_bytes;
        let region = Region::new(reserved_bytes, size_bytes, budget).map(Arc::new).map_err(|error| {
            if error.kind() == io::ErrorKind::OutOfMemory {
                MemoryError::Generic(format!(
                    "the module needs more memory than its limit of {limit_bytes} bytes; raise `limits.memory`"
                ))
            } else {
                MemoryError::Region(error.to_string())
            }
        })?;
        let definition = VMMemoryDefinition {
            base: region.base.as_ptr(),
            current_length: size_bytes,
        };
        let definition = match location {
            Some(location) => {
                // SAFETY: wasmer passes a valid, uninitialised slot of the instance in the making
                // (contract of `Tunables::create_vm_memory`).
                unsafe { location.as_ptr().write(definition) };
                Definition::Instance(location)
            }
            None => Definition::Own(Box::new(UnsafeCell::new(definition))),
        };
        CREATING.with_borrow_mut(|c| c.regions.push(region.clone()));
        Ok(Self {
            region,
            ty,
            style: *style,
            definition,
            growing: Mutex::new(()),
        })
    }

    fn definition(&self) -> NonNull<VMMemoryDefinition> {
        match &self.definition {
            Definition::Instance(location) => *location,
            Definition::Own(cell) => {
                // SAFETY: a pointer from a box is never null.
                unsafe { NonNull::new_unchecked(cell.get()) }
            }
        }
    }
}

impl LinearMemory for RegionMemory {
    fn ty(&self) -> MemoryType {
        MemoryType {
            minimum: self.size(),
            ..self.ty
        }
    }

    fn size(&self) -> Pages {
        Pages(u32::try_from(self.region.size_bytes() / WASM_PAGE_BYTES).unwrap_or(u32::MAX))
    }

    fn style(&self) -> MemoryStyle {
        self.style
    }

    fn grow(&mut self, delta: Pages) -> Result<Pages, MemoryError> {
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.size();
        let refused = MemoryError::CouldNotGrow {
            current,
            attempted_delta: delta,
        };
        let wanted = current
            .0
            .checked_add(delta.0)
            .ok_or_else(|| refused.clone())?;
        if self.ty.maximum.is_some_and(|maximum| wanted > maximum.0) {
            return Err(refused);
        }
        let bytes = wanted as usize * WASM_PAGE_BYTES;
        self.region.grow_to(bytes).map_err(|_| refused)?;
        // SAFETY: the definition lives as long as the instance, whose memory this is, and only the
        // thread that runs the instance reads or writes it.
        unsafe { self.definition().as_mut().current_length = bytes };
        Ok(current)
    }

    fn vmmemory(&self) -> NonNull<VMMemoryDefinition> {
        self.definition()
    }

    fn try_clone(&self) -> Result<Box<dyn LinearMemory + Send + Sync>, MemoryError> {
        Err(MemoryError::MemoryNotShared)
    }

    fn copy(&self) -> Result<Box<dyn LinearMemory + Send + Sync>, MemoryError> {
        Err(MemoryError::MemoryNotShared)
    }
}

thread_local! {
    /// What the instance in the making on this thread may have, and what it got: wasmer's tunables
    /// belong to an engine, limits belong to a child.
    static CREATING: RefCell<Creating> = const { RefCell::new(Creating { budget: None, regions: Vec::new() }) };
}

struct Creating {
    budget: Option<Arc<Budget>>,
    regions: Vec<Arc<Region>>,
}

/// Runs `instantiate`, giving the memories it makes that limit together; returns the memories made.
pub fn with_limit<T>(limit_bytes: u64, instantiate: impl FnOnce() -> T) -> (T, Vec<Arc<Region>>) {
    let budget = Budget::new(usize::try_from(limit_bytes).unwrap_or(usize::MAX));
    CREATING.set(Creating {
        budget: Some(budget),
        regions: Vec::new(),
    });
    let result = instantiate();
    let made = CREATING.replace(Creating {
        budget: None,
        regions: Vec::new(),
    });
    (result, made.regions)
}

/// wasmer's tunables with our memory, and tables that cannot eat the host's.
pub struct RegionTunables(BaseTunables);

impl Default for RegionTunables {
    fn default() -> Self {
        Self(BaseTunables::new())
    }
}

impl Tunables for RegionTunables {
    fn memory_style(&self, _memory: &MemoryType) -> MemoryStyle {
        MemoryStyle::Static
    }

    fn table_style(&self, table: &TableType) -> TableStyle {
        self.0.table_style(table)
    }

    fn create_host_memory(
        &self,
        ty: &MemoryType,
        style: &MemoryStyle,
    ) -> Result<VMMemory, MemoryError> {
        RegionMemory::new(*ty, style, None).map(|memory| VMMemory(Box::new(memory)))
    }

    unsafe fn create_vm_memory(
        &self,
        ty: &MemoryType,
        style: &MemoryStyle,
        location: NonNull<VMMemoryDefinition>,
    ) -> Result<VMMemory, MemoryError> {
        RegionMemory::new(*ty, style, Some(location)).map(|memory| VMMemory(Box::new(memory)))
    }

    fn create_host_table(&self, ty: &TableType, style: &TableStyle) -> Result<VMTable, String> {
        self.0.create_host_table(&bounded(ty)?, style)
    }

    unsafe fn create_vm_table(
        &self,
        ty: &TableType,
        style: &TableStyle,
        location: NonNull<VMTableDefinition>,
    ) -> Result<VMTable, String> {
        // SAFETY: the caller's promise about `location` is passed on.
        unsafe { self.0.create_vm_table(&bounded(ty)?, style, location) }
    }
}

fn bounded(ty: &TableType) -> Result<TableType, String> {
    if ty.minimum > MAX_TABLE_ELEMENTS {
        return Err(format!(
            "a table of {} elements is above {MAX_TABLE_ELEMENTS}",
            ty.minimum
        ));
    }
    let maximum = ty
        .maximum
        .map_or(MAX_TABLE_ELEMENTS, |m| m.min(MAX_TABLE_ELEMENTS));
    Ok(TableType {
        maximum: Some(maximum),
        ..*ty
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_grows_to_its_limit_and_not_beyond() {
        let region =
            Region::new(6 << 30, WASM_PAGE_BYTES, Budget::new(3 * WASM_PAGE_BYTES)).unwrap();
        assert_eq!(region.size_bytes(), WASM_PAGE_BYTES);
        region.grow_to(3 * WASM_PAGE_BYTES).unwrap();
        region.grow_to(4 * WASM_PAGE_BYTES).unwrap_err();
        assert_eq!(region.size_bytes(), 3 * WASM_PAGE_BYTES);
    }

    #[test]
    fn memories_of_one_instance_share_their_limit() {
        let budget = Budget::new(3 * WASM_PAGE_BYTES);
        let first = Region::new(6 << 30, 2 * WASM_PAGE_BYTES, budget.clone()).unwrap();
        let second = Region::new(6 << 30, WASM_PAGE_BYTES, budget).unwrap();
        first.grow_to(3 * WASM_PAGE_BYTES).unwrap_err();
        second.grow_to(2 * WASM_PAGE_BYTES).unwrap_err();
    }

    #[test]
    fn a_module_that_needs_more_than_its_limit_is_told_so() {
        let ty = MemoryType::new(10, None, false);
        let (result, regions) =
            with_limit(65_536, || RegionMemory::new(ty, &MemoryStyle::Static, None));
        assert!(
            result
                .unwrap_err()
                .to_string()
                .contains("raise `limits.memory`")
        );
        assert!(regions.is_empty());
    }
}
