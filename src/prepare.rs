//! Makes a module ready for compilation, so that its instances can leave memory and come back.
//!
//! - Custom sections go: nothing reads them, and compiled code would keep some.
//! - Every mutable global is exported under a name of ours: they are saved beside the memory, and
//!   compilers export none of them.
//! - The data segments leave the module. They become an *image*, what the memory looks like at the
//!   start, which instances map copy-on-write instead of each having its own copy.
//!
//! Whether an instance can be put together again from memory and globals alone is found out here
//! too ([`Obstacle`]).

use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use wasmer::sys::wasmparser::{
    BinaryReaderError, Data, DataKind, ExternalKind, Operator, Parser, Payload, ValType,
};

/// Part of an artifact's key: change it with what this module does.
pub const VERSION: &str = "prepare-1";
/// What the names of exported globals begin with.
const GLOBAL_PREFIX: &str = "wasm-operator:global:";
const WASM_PAGE_BYTES: u64 = 65_536;
/// Of a section, in the binary format (WebAssembly core specification, 5.5.2).
const SECTION_CUSTOM: u8 = 0;
const SECTION_EXPORT: u8 = 7;
const SECTION_DATA: u8 = 11;
const SECTION_DATA_COUNT: u8 = 12;

/// Why an instance cannot be saved: part of its state would be lost.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum Obstacle {
    /// More than one memory.
    #[error("has several memories")]
    Memories,
    /// Instructions that change a table.
    #[error("changes its tables at run time")]
    Tables,
    /// Instructions on segments, which can be dropped.
    #[error("uses passive data segments")]
    PassiveSegments,
    /// A reference in a mutable global.
    #[error("keeps references in globals")]
    References,
    /// A data segment whose place is not a plain number, or outside the memory.
    #[error("has a data segment whose place is not a constant inside its memory")]
    SegmentPlace,
    /// It has exports that look like ours.
    #[error("has exports whose names begin with `{GLOBAL_PREFIX}`")]
    Names,
}

/// What is known of a module's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Index of every mutable global.
    pub mutable_globals: Vec<u32>,
    /// Why its instances cannot be saved, if they cannot.
    pub obstacle: Option<Obstacle>,
}

/// A part of the image: where it stands in memory, and which bytes of the module it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Address in the guest's memory.
    pub address: u64,
    /// Place in the module's bytes.
    pub bytes: Range<usize>,
}

/// A module ready to be compiled.
#[derive(Debug)]
pub struct Prepared {
    /// The module.
    pub wasm: Vec<u8>,
    /// What was taken out of it. Empty if the segments had to stay.
    pub image: Vec<Segment>,
}

/// The name under which a global is exported.
pub fn global_name(index: u32) -> String {
    format!("{GLOBAL_PREFIX}{index}")
}

/// Looks at a valid module's state.
///
/// # Errors
/// The parser's, for what is no module.
pub fn state(wasm: &[u8]) -> Result<State, BinaryReaderError> {
    let mut found = State::default();
    let mut memories = 0;
    let mut obstacle = |what| {
        found.obstacle.get_or_insert(what);
    };
    let mut memory_bytes = 0;
    for payload in Parser::new(0).parse_all(wasm) {
        match payload? {
            Payload::MemorySection(reader) => {
                memories += reader.count();
                if let Some(memory) = reader.into_iter().next() {
                    memory_bytes = memory?.initial.saturating_mul(WASM_PAGE_BYTES);
                }
            }
            Payload::GlobalSection(reader) => {
                // A child imports no globals, so these are all.
                for (index, global) in (0..).zip(reader) {
                    let ty = global?.ty;
                    if ty.mutable {
                        found.mutable_globals.push(index);
                        if matches!(ty.content_type, ValType::Ref(_)) {
                            obstacle(Obstacle::References);
                        }
                    }
                }
            }
            Payload::ExportSection(reader) => {
                for export in reader {
                    if export?.name.starts_with(GLOBAL_PREFIX) {
                        obstacle(Obstacle::Names);
                    }
                }
            }
            Payload::DataSection(reader) => {
                for data in reader {
                    let data = data?;
                    match data.kind {
                        DataKind::Passive => obstacle(Obstacle::PassiveSegments),
                        DataKind::Active { .. } => {
                            if segment(&data)?.is_none_or(|s| !s.is_inside(memory_bytes)) {
                                obstacle(Obstacle::SegmentPlace);
                            }
                        }
                    }
                }
            }
            Payload::CodeSectionEntry(body) => {
                for operator in body.get_operators_reader()? {
                    match operator? {
                        Operator::TableSet { .. }
                        | Operator::TableGrow { .. }
                        | Operator::TableFill { .. }
                        | Operator::TableCopy { .. }
                        | Operator::TableInit { .. }
                        | Operator::ElemDrop { .. } => obstacle(Obstacle::Tables),
                        Operator::MemoryInit { .. } | Operator::DataDrop { .. } => {
                            obstacle(Obstacle::PassiveSegments);
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if memories > 1 {
        found.obstacle = Some(Obstacle::Memories);
    }
    Ok(found)
}

impl Segment {
    fn is_inside(&self, memory_bytes: u64) -> bool {
        self.address + self.bytes.len() as u64 <= memory_bytes
    }
}

/// The segment, if its place is a constant.
fn segment(data: &Data<'_>) -> Result<Option<Segment>, BinaryReaderError> {
    let DataKind::Active { offset_expr, .. } = &data.kind else {
        return Ok(None);
    };
    let mut operators = offset_expr.get_operators_reader();
    let Operator::I32Const { value } = operators.read()? else {
        return Ok(None);
    };
    if !matches!(operators.read()?, Operator::End) {
        return Ok(None);
    }
    // The content is what the segment's range ends with.
    let end = usize::try_from(data.range.end).unwrap_or(usize::MAX);
    let bytes = end.saturating_sub(data.data.len())..end;
    let address = u64::from(value.cast_unsigned());
    Ok(Some(Segment { address, bytes }))
}

/// Rewrites a valid module.
///
/// # Errors
/// The parser's, for what is no module.
pub fn prepare(wasm: &[u8]) -> Result<Prepared, BinaryReaderError> {
    let state = state(wasm)?;
    let has_image = state.obstacle.is_none();
    let mut image = Vec::new();
    // Magic number and version.
    let mut prepared = wasm.get(..8).unwrap_or_default().to_vec();
    for payload in Parser::new(0).parse_all(wasm) {
        let payload = payload?;
        let Some((id, range)) = payload.as_section() else {
            continue;
        };
        let position = |at| usize::try_from(at).unwrap_or(usize::MAX);
        let content = wasm.get(position(range.start)..position(range.end));
        let content = content.unwrap_or_default();
        match (id, payload) {
            (SECTION_CUSTOM, _) => {}
            (SECTION_DATA_COUNT, _) if has_image => {}
            (SECTION_DATA, Payload::DataSection(reader)) if has_image => {
                for data in reader {
                    image.extend(segment(&data?)?);
                }
            }
            (SECTION_EXPORT, Payload::ExportSection(reader)) if has_image => {
                let mut exports = Vec::with_capacity(content.len());
                let count = reader.count() as usize + state.mutable_globals.len();
                leb128(&mut exports, count);
                let old_count = content.iter().take_while(|b| **b >= 0x80).count() + 1;
                exports.extend(content.iter().skip(old_count));
                for index in &state.mutable_globals {
                    let name = global_name(*index);
                    leb128(&mut exports, name.len());
                    exports.extend(name.as_bytes());
                    exports.push(ExternalKind::Global as u8);
                    leb128(&mut exports, *index as usize);
                }
                section(&mut prepared, id, &exports);
            }
            _ => section(&mut prepared, id, content),
        }
    }
    Ok(Prepared {
        wasm: prepared,
        image,
    })
}

fn section(wasm: &mut Vec<u8>, id: u8, content: &[u8]) {
    wasm.push(id);
    leb128(wasm, content.len());
    wasm.extend(content);
}

/// Unsigned LEB128 (WebAssembly core specification, 5.2.2).
fn leb128(out: &mut Vec<u8>, mut value: usize) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(byte);
            return;
        }
        out.push(byte | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wasmer::sys::wasmparser::Validator;

    fn wasm(text: &str) -> Vec<u8> {
        wat::parse_str(text).unwrap()
    }

    #[test]
    fn segments_and_names_leave_and_mutable_globals_are_exported() {
        let original = wasm(
            r#"(module $name (memory (export "memory") 2)
                (global $a (mut i32) (i32.const 7)) (global i64 (i64.const 1))
                (global $c (mut f64) (f64.const 2))
                (data (i32.const 1024) "abc") (data (i32.const 70000) "d")
                (func (export "f") (global.set $a (i32.const 1))))"#,
        );
        let prepared = prepare(&original).unwrap();
        Validator::new().validate_all(&prepared.wasm).unwrap();
        let content: Vec<_> = prepared
            .image
            .iter()
            .map(|s| (s.address, &original[s.bytes.clone()]))
            .collect();
        assert_eq!(content, [(1024, &b"abc"[..]), (70_000, &b"d"[..])]);
        let again = state(&prepared.wasm).unwrap();
        assert_eq!(again.mutable_globals, [0, 2]);
        assert_eq!(again.obstacle, Some(Obstacle::Names), "ours are there");
        assert!(prepared.wasm.len() < original.len() + 64);
    }

    #[test]
    fn state_that_would_be_lost_is_found() {
        let body = [
            ("(memory 1) (memory 1)", Obstacle::Memories),
            (
                "(memory 1) (table 1 funcref) (func (table.set (i32.const 0) (ref.null func)))",
                Obstacle::Tables,
            ),
            (
                r#"(memory 1) (data $d "x") (func (data.drop $d))"#,
                Obstacle::PassiveSegments,
            ),
            (
                "(memory 1) (global (mut externref) (ref.null extern))",
                Obstacle::References,
            ),
            (
                r#"(memory 1) (data (i32.const 65535) "xy")"#,
                Obstacle::SegmentPlace,
            ),
            (
                r#"(memory 1) (global $g i32 (i32.const 0)) (data (global.get $g) "x")"#,
                Obstacle::SegmentPlace,
            ),
        ];
        for (body, expected) in body {
            let module = wasm(&format!("(module {body} (export \"memory\" (memory 0)))"));
            assert_eq!(state(&module).unwrap().obstacle, Some(expected), "{body}");
            let prepared = prepare(&module).unwrap();
            assert!(prepared.image.is_empty(), "{body}");
            wasmer::sys::wasmparser::Validator::new_with_features(
                wasmer::sys::wasmparser::WasmFeatures::all(),
            )
            .validate_all(&prepared.wasm)
            .unwrap();
        }
    }

    #[test]
    fn numbers_are_written_as_the_specification_says() {
        for (value, bytes) in [
            (0, &[0][..]),
            (127, &[0x7f]),
            (128, &[0x80, 1]),
            (624_485, &[0xe5, 0x8e, 0x26]),
        ] {
            let mut out = Vec::new();
            leb128(&mut out, value);
            assert_eq!(out, bytes);
        }
    }
}
