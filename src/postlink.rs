//! What happens to a compiled module's ELF image before it is kept.
//!
//! - Debug information and symbol tables go: half of the file, and only debuggers read them.
//! - `.eh_frame` gets another name, so that nobody registers it with the unwinder: it would cost
//!   memory for every module, and musl's unwinder cannot take it. Traps do not need it.
//! - Where code and read-only data will be in memory is noted ([`Layout`]).
//!
//! The format is that of the System V ABI's "Object Files" chapter (gABI 4.1).

use std::ops::Range;

use object::elf::{FileHeader64, SHF_ALLOC, SHT_NOBITS, SectionHeader64};
use object::elf::{PF_W, PT_LOAD, ProgramHeader64, SymbolSection};
use object::pod::bytes_of;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{Endianness, U16, U32, U64};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Part of an artifact's key: change it with what this module does.
pub const VERSION: &str = "postlink-2";
const FUNCTION_OFFSETS: &[u8] = b".w.fn_offsets";
const EH_FRAME: &[u8] = b".eh_frame";
const RENAMED_EH_FRAME: &[u8] = b".unregistered_eh_frame\0";
const ALIGNMENT: usize = 8;

/// The image is not what the compiler of this version makes.
#[derive(Debug, Error)]
pub enum PostlinkError {
    /// It cannot be read.
    #[error("the compiled image cannot be read: {0}")]
    Read(#[from] object::read::Error),
    /// Something is not where it should be.
    #[error("the compiled image has no usable {0}")]
    Missing(&'static str),
}

/// Where things are, relative to the address that the image is loaded at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The first function of the module.
    pub first_function: u64,
    /// Segments that are never written to.
    pub read_only: Vec<Range<u64>>,
}

type Header = FileHeader64<Endianness>;
type Section = SectionHeader64<Endianness>;

/// The image without what is not needed.
///
/// # Errors
/// [`PostlinkError`].
pub fn post_link(image: &[u8]) -> Result<(Vec<u8>, Layout), PostlinkError> {
    let header = Header::parse(image)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, image)?;
    let names = header.shstrndx(endian, image)? as usize;
    let is_loaded = |s: &Section| s.sh_flags(endian).contains(SHF_ALLOC);
    let end_of = |s: &Section| {
        let (start, size) = s.file_range(endian)?;
        usize::try_from(start.checked_add(size)?).ok()
    };
    let loaded_end = sections
        .iter()
        .filter(|s| is_loaded(s) && s.sh_type(endian) != SHT_NOBITS)
        .filter_map(end_of)
        .max()
        .ok_or(PostlinkError::Missing("content"))?;
    let loaded = image.get(..loaded_end);
    let mut out = loaded.ok_or(PostlinkError::Missing("content"))?.to_vec();
    let mut kept: Vec<Section> = Vec::new();
    let mut new_numbers = vec![0_u32; sections.len()];
    let mut new_names = 0;
    let mut first_function = None;
    for (number, section) in sections.iter().enumerate() {
        let name = sections.section_name(endian, section)?;
        let has_a_use =
            number == 0 || number == names || is_loaded(section) || name.starts_with(b".w.");
        if !has_a_use {
            continue;
        }
        if name == FUNCTION_OFFSETS {
            let data = section.data(endian, image)?;
            first_function = data.first_chunk().map(|b| u64::from_le_bytes(*b));
        }
        let mut section = *section;
        if number == names {
            new_names = kept.len();
        } else if !is_loaded(&section) && number != 0 {
            let data = section.data(endian, image)?;
            place(&mut out, &mut section, data, endian);
        }
        if let Some(new) = new_numbers.get_mut(number) {
            *new = u32::try_from(kept.len()).unwrap_or(u32::MAX);
        }
        kept.push(section);
    }
    let mut strings = match sections
        .section(object::SectionIndex(names))?
        .data(endian, image)?
    {
        [] => return Err(PostlinkError::Missing("section names")),
        strings => strings.to_vec(),
    };
    let renamed = u32::try_from(strings.len()).unwrap_or(u32::MAX);
    strings.extend(RENAMED_EH_FRAME);
    for section in &mut kept {
        let link = section.sh_link.get(endian) as usize;
        let link = new_numbers.get(link).copied().unwrap_or_default();
        section.sh_link = U32::new(endian, link);
        let name = sections.section_name(endian, section)?;
        if name == EH_FRAME {
            section.sh_name = U32::new(endian, renamed);
        }
    }
    if let Some(section) = kept.get_mut(new_names) {
        place(&mut out, section, &strings, endian);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    let mut new_header = *header;
    let number = |n: usize| U16::new(endian, u16::try_from(n).unwrap_or(u16::MAX));
    new_header.e_shoff = U64::new(endian, out.len() as u64);
    new_header.e_shnum = number(kept.len());
    new_header.e_shstrndx = U16::new(
        endian,
        SymbolSection(u16::try_from(new_names).unwrap_or(u16::MAX)),
    );
    kept.iter()
        .for_each(|section| out.extend(bytes_of(section)));
    let header_bytes = bytes_of(&new_header);
    out.get_mut(..header_bytes.len())
        .ok_or(PostlinkError::Missing("header"))?
        .copy_from_slice(header_bytes);
    let layout = Layout {
        first_function: first_function.ok_or(PostlinkError::Missing("functions"))?,
        read_only: read_only(header, endian, image)?,
    };
    Ok((out, layout))
}

/// Appends a section's content.
fn place(out: &mut Vec<u8>, section: &mut Section, data: &[u8], endian: Endianness) {
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    section.sh_offset = U64::new(endian, out.len() as u64);
    section.sh_size = U64::new(endian, data.len() as u64);
    out.extend(data);
}

fn read_only(
    header: &Header,
    endian: Endianness,
    image: &[u8],
) -> Result<Vec<Range<u64>>, PostlinkError> {
    let segments: &[ProgramHeader64<Endianness>] = header.program_headers(endian, image)?;
    let is_read_only = |s: &&ProgramHeader64<Endianness>| {
        s.p_type(endian) == PT_LOAD && !s.p_flags(endian).contains(PF_W)
    };
    Ok(segments
        .iter()
        .filter(is_read_only)
        .map(|s| s.p_vaddr(endian)..s.p_vaddr(endian).saturating_add(s.p_memsz(endian)))
        .collect())
}
