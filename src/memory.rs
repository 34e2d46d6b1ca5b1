//! Linear memory of our own for wasmer's instances. (Room 2 of 3 for `unsafe`.)
//!
//! Every memory is a [`Region`]. wasmer asks for memories through its engine's tunables, while
//! limits and contents belong to a child: [`creating`] says what the instance in the making on this
//! thread gets.

use std::cell::{RefCell, UnsafeCell};
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use wasmer::sys::vm::{
    LinearMemory, MemoryStyle, TableStyle, VMConfig, VMMemory, VMMemoryDefinition, VMTable,
    VMTableDefinition,
};
use wasmer::sys::{BaseTunables, Tunables};
use wasmer::{MemoryError, MemoryType, Pages, TableType};

use crate::region::{Budget, Origin, Region, WASM_PAGE_BYTES};

/// Largest number of elements in a table. 35,000 functions make a large Go program; an element
/// costs the host 8 to 16 bytes.
const MAX_TABLE_ELEMENTS: u32 = 1 << 20;

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
        let limit_bytes = budget.limit_bytes;
        let origin = CREATING.with_borrow_mut(|creating| std::mem::take(&mut creating.origin));
        let region = match origin {
            Origin::Region(region) => Ok(region),
            origin => Region::new(reserved_bytes, ty.minimum.bytes().0, budget, origin),
        };
        let region = region.map(Arc::new).map_err(|error| {
            if error.kind() == io::ErrorKind::OutOfMemory {
                MemoryError::Generic(format!(
                    "the module needs more memory than its limit of {limit_bytes} bytes; raise `limits.memory`"
                ))
            } else {
                MemoryError::Region(error.to_string())
            }
        })?;
        let definition = VMMemoryDefinition {
            base: region.base(),
            current_length: region.size_bytes(),
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
    static CREATING: RefCell<Creating> = const {
        RefCell::new(Creating { budget: None, origin: Origin::Zeros, regions: Vec::new() })
    };
}

#[derive(Default)]
struct Creating {
    budget: Option<Arc<Budget>>,
    /// Of the first memory that is made.
    origin: Origin,
    regions: Vec<Arc<Region>>,
}

/// Runs `instantiate`, giving the memories it makes that limit together, and the first of them
/// that content; returns the memories made.
pub fn creating<T>(
    limit_bytes: u64,
    origin: Origin,
    instantiate: impl FnOnce() -> T,
) -> (T, Vec<Arc<Region>>) {
    let budget = Budget::new(usize::try_from(limit_bytes).unwrap_or(usize::MAX));
    CREATING.set(Creating {
        budget: Some(budget),
        origin,
        regions: Vec::new(),
    });
    let result = instantiate();
    (result, CREATING.take().regions)
}

/// The stack of a call into a guest, in bytes of address space; memory is what was touched of it.
/// wasmer's default is 1 MiB. Go programs may rely on much more: the JSON parsers of Go and of the API
/// server go 10,000 levels deep, and who writes an object decides how deep.
const STACK_BYTES: usize = 16 << 20;

/// wasmer's tunables with our memory, a larger stack, and tables that cannot eat the host's.
pub struct RegionTunables {
    base: BaseTunables,
    config: VMConfig,
}

impl Default for RegionTunables {
    fn default() -> Self {
        Self {
            base: BaseTunables::new(),
            config: VMConfig {
                wasm_stack_size: Some(STACK_BYTES),
            },
        }
    }
}

impl Tunables for RegionTunables {
    fn vmconfig(&self) -> &VMConfig {
        &self.config
    }

    fn memory_style(&self, _memory: &MemoryType) -> MemoryStyle {
        MemoryStyle::Static
    }

    fn table_style(&self, table: &TableType) -> TableStyle {
        self.base.table_style(table)
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
        self.base.create_host_table(&bounded(ty)?, style)
    }

    unsafe fn create_vm_table(
        &self,
        ty: &TableType,
        style: &TableStyle,
        location: NonNull<VMTableDefinition>,
    ) -> Result<VMTable, String> {
        // SAFETY: the caller's promise about `location` is passed on.
        unsafe { self.base.create_vm_table(&bounded(ty)?, style, location) }
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
    fn a_module_that_needs_more_than_its_limit_is_told_so() {
        let ty = MemoryType::new(10, None, false);
        let (result, regions) = creating(65_536, Origin::Zeros, || {
            RegionMemory::new(ty, &MemoryStyle::Static, None)
        });
        assert!(
            result
                .unwrap_err()
                .to_string()
                .contains("raise `limits.memory`")
        );
        assert!(regions.is_empty());
    }
}
