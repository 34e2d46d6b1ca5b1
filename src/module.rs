//! What a wasm module needs and offers, read without compiling it.
//!
//! `check` and loading share this: everything that would make a module unusable is found here and
//! said in words, all of it at once.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use wasmer::sys::wasmparser::{
    CompositeInnerType, ExternalKind, FuncType, Parser, Payload, TypeRef, ValType, Validator,
    WasmFeatures,
};

use crate::abi::{HOST_MODULE, KUBE_MODULE};
use crate::calls::Verb;
use crate::prepare;
use crate::region::MAX_MEMORY_BYTES;

/// Part of an artifact's key: change it with what [`inspect`] finds.
pub const VERSION: &str = "module-1";
/// Import modules of WASI, served by `wasi` and `syscalls`.
pub const WASI_MODULES: [&str; 2] = ["wasi_snapshot_preview1", "wasix_32v1"];

/// Most tables a module may have; compilers make one.
const MAX_TABLES: usize = 16;

/// One reason why a module cannot be a child.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Problem {
    /// The file is no core WebAssembly module at all.
    #[error("not a WebAssembly module: {0}")]
    NotWasm(String),
    /// It is a component, not a core module.
    #[error("is a WebAssembly component; build it as a core module for wasm32-wasip1")]
    Component,
    /// An export is missing.
    #[error("lacks the export `{0}` (see docs/abi.md)")]
    MissingExport(&'static str),
    /// Both or none of the entry points.
    #[error("must export exactly one of `_start` and `_initialize` (see docs/abi.md)")]
    EntryPoint,
    /// An export or import has another type.
    #[error("{what} `{name}` has the type {found}, not {expected}")]
    Type {
        /// `export` or `import`.
        what: &'static str,
        /// Its name.
        name: String,
        /// Its type.
        found: String,
        /// The type it should have.
        expected: &'static str,
    },
    /// An import of a later or unheard-of ABI version.
    #[error(
        "imports `{0}`: this wasm-operator serves `{KUBE_MODULE}` and `{HOST_MODULE}`; use a version of it that serves that ABI, or rebuild the module"
    )]
    AbiVersion(String),
    /// An import nobody serves.
    #[error("imports `{module}.{name}`, which nothing here provides{hint}")]
    UnknownImport {
        /// Import module.
        module: String,
        /// Import name.
        name: String,
        /// What to do, if something is known.
        hint: &'static str,
    },
    /// It has a start function, which would run before anything can stop it.
    #[error("has a start function; let the work begin in `_start` or `_initialize`")]
    StartFunction,
    /// The memory cannot be had.
    #[error("{0}")]
    Memory(String),
}

/// The export that runs before anything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryPoint {
    /// `_start`, of a command.
    #[default]
    Start,
    /// `_initialize`, of a reactor.
    Initialize,
}

impl EntryPoint {
    /// The export's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "_start",
            Self::Initialize => "_initialize",
        }
    }
}

/// What instantiation needs to know of a usable module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Its entry point.
    pub entry: EntryPoint,
    /// Whether any function of WASI is imported.
    pub uses_wasi: bool,
    /// Whether it may wait for events in its entry point.
    pub waits_at_start: bool,
    /// What must be saved beside its memory.
    pub state: prepare::State,
}

const I32: ValType = ValType::I32;
const I64: ValType = ValType::I64;

/// A function's parameters and results, and how they are written.
struct Signature(&'static [ValType], &'static [ValType], &'static str);

const NOTHING: Signature = Signature(&[], &[], "() -> ()");
const ALLOC: Signature = Signature(&[I32], &[I32], "(i32) -> i32");
const ON_EVENT: Signature = Signature(&[I64, I32, I32, I32], &[], "(i64, i32, i32, i32) -> ()");
const VERB: Signature = Signature(&[I32, I32], &[I64], "(i32, i32) -> i64");
const TIMER: Signature = Signature(&[I64], &[I32], "(i64) -> i32");
const HOLD: Signature = Signature(&[I64, I32], &[I32], "(i64, i32) -> i32");
const WAIT: Signature = Signature(&[I32], &[I32], "(i32) -> i32");
const TAKE: Signature = Signature(&[I32, I32], &[I32], "(i32, i32) -> i32");
const LOG: Signature = Signature(&[I32, I32, I32], &[I32], "(i32, i32, i32) -> i32");

/// The signature of a function of `kube_v1` or `host_v1`.
fn host_signature(module: &str, name: &str) -> Option<Signature> {
    match (module, name) {
        (KUBE_MODULE, "request") => Some(VERB),
        (KUBE_MODULE, name) if Verb::ALL.iter().any(|(_, verb)| *verb == name) => Some(VERB),
        (HOST_MODULE, "timer" | "cancel") => Some(TIMER),
        (HOST_MODULE, "log") => Some(LOG),
        (HOST_MODULE, "hold") => Some(HOLD),
        (HOST_MODULE, "wait") => Some(WAIT),
        (HOST_MODULE, "take") => Some(TAKE),
        _ => None,
    }
}

/// The proposals that guests may use: what today's compilers emit, without threads and 64-bit
/// memory.
fn features() -> WasmFeatures {
    WasmFeatures::MUTABLE_GLOBAL
        | WasmFeatures::SATURATING_FLOAT_TO_INT
        | WasmFeatures::SIGN_EXTENSION
        | WasmFeatures::REFERENCE_TYPES
        | WasmFeatures::MULTI_VALUE
        | WasmFeatures::BULK_MEMORY
        | WasmFeatures::SIMD
        | WasmFeatures::FLOATS
        | WasmFeatures::GC_TYPES
        | WasmFeatures::MULTI_MEMORY
        | WasmFeatures::TAIL_CALL
        | WasmFeatures::EXTENDED_CONST
}

/// Looks at a module's bytes.
///
/// # Errors
/// All problems found, at least one.
pub fn inspect(wasm: &[u8]) -> Result<Shape, Vec<Problem>> {
    if Parser::is_component(wasm) {
        return Err(vec![Problem::Component]);
    }
    if !wasm.starts_with(b"\0asm") {
        return Err(vec![Problem::NotWasm(
            "it does not begin with \\0asm".into(),
        )]);
    }
    Validator::new_with_features(features())
        .validate_all(wasm)
        .map_err(|e| vec![Problem::NotWasm(e.to_string())])?;
    let sections = Sections::read(wasm).map_err(|e| vec![Problem::NotWasm(e)])?;
    let mut problems = Vec::new();
    sections.check_exports(&mut problems);
    sections.check_imports(&mut problems);
    sections.check_memory(&mut problems);
    if sections.has_start {
        problems.push(Problem::StartFunction);
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(Shape {
        entry: if sections.export_of("_start").is_some() {
            EntryPoint::Start
        } else {
            EntryPoint::Initialize
        },
        uses_wasi: sections
            .imports
            .iter()
            .any(|i| WASI_MODULES.contains(&i.module.as_str())),
        waits_at_start: sections
            .imports
            .iter()
            .any(|i| i.module == HOST_MODULE && i.name == "wait"),
        state: prepare::state(wasm).map_err(|e| vec![Problem::NotWasm(e.to_string())])?,
    })
}

#[derive(Debug)]
struct Import {
    module: String,
    name: String,
    /// `None` for what is not a function.
    ty: Option<FuncType>,
}

/// The parts of a module that matter here.
#[derive(Debug, Default)]
struct Sections {
    imports: Vec<Import>,
    /// Type of each function, imported ones first.
    functions: Vec<FuncType>,
    exports: Vec<(String, ExternalKind, u32)>,
    /// Minimum sizes in bytes.
    memories: Vec<u64>,
    tables: usize,
    has_start: bool,
}

impl Sections {
    fn read(wasm: &[u8]) -> Result<Self, String> {
        let mut types: Vec<Option<FuncType>> = Vec::new();
        let mut sections = Self::default();
        let text = |e: wasmer::sys::wasmparser::BinaryReaderError| e.to_string();
        let function = |types: &[Option<FuncType>], index: u32| {
            types
                .get(index as usize)
                .cloned()
                .flatten()
                .ok_or("a function without a type")
        };
        for payload in Parser::new(0).parse_all(wasm) {
            match payload.map_err(text)? {
                Payload::TypeSection(reader) => {
                    for group in reader {
                        types.extend(group.map_err(text)?.into_types().map(|ty| {
                            match ty.composite_type.inner {
                                CompositeInnerType::Func(function) => Some(function),
                                _ => None,
                            }
                        }));
                    }
                }
                Payload::ImportSection(reader) => {
                    for import in reader.into_imports() {
                        let import = import.map_err(text)?;
                        let ty = match import.ty {
                            TypeRef::Func(index) => Some(function(&types, index)?),
                            _ => None,
                        };
                        sections.functions.extend(ty.clone());
                        let (module, name) = (import.module.to_owned(), import.name.to_owned());
                        sections.imports.push(Import { module, name, ty });
                    }
                }
                Payload::FunctionSection(reader) => {
                    for index in reader {
                        sections
                            .functions
                            .push(function(&types, index.map_err(text)?)?);
                    }
                }
                Payload::StartSection { .. } => sections.has_start = true,
                Payload::TableSection(reader) => sections.tables = reader.count() as usize,
                Payload::MemorySection(reader) => {
                    for memory in reader {
                        sections
                            .memories
                            .push(memory.map_err(text)?.initial.saturating_mul(65_536));
                    }
                }
                Payload::ExportSection(reader) => {
                    for export in reader {
                        let export = export.map_err(text)?;
                        sections
                            .exports
                            .push((export.name.to_owned(), export.kind, export.index));
                    }
                }
                _ => {}
            }
        }
        Ok(sections)
    }

    fn export_of(&self, name: &str) -> Option<(ExternalKind, u32)> {
        self.exports
            .iter()
            .find(|(n, ..)| n == name)
            .map(|(_, kind, index)| (*kind, *index))
    }

    fn check_exports(&self, problems: &mut Vec<Problem>) {
        match self.export_of("memory") {
            Some((ExternalKind::Memory, _)) => {}
            _ => problems.push(Problem::MissingExport("memory")),
        }
        self.check_function("alloc", &ALLOC, problems);
        self.check_function("on_event", &ON_EVENT, problems);
        match (self.export_of("_start"), self.export_of("_initialize")) {
            (Some(_), None) => self.check_function("_start", &NOTHING, problems),
            (None, Some(_)) => self.check_function("_initialize", &NOTHING, problems),
            _ => problems.push(Problem::EntryPoint),
        }
    }

    fn check_function(
        &self,
        name: &'static str,
        expected: &Signature,
        problems: &mut Vec<Problem>,
    ) {
        let Some((ExternalKind::Func, index)) = self.export_of(name) else {
            problems.push(Problem::MissingExport(name));
            return;
        };
        if let Some(found) = self.functions.get(index as usize) {
            check_type("export", name, found, expected, problems);
        }
    }

    fn check_imports(&self, problems: &mut Vec<Problem>) {
        for Import { module, name, ty } in &self.imports {
            let unknown = |hint| Problem::UnknownImport {
                module: module.clone(),
                name: name.clone(),
                hint,
            };
            let Some(ty) = ty else {
                problems.push(unknown(
                    "; a child brings its own memory, tables and globals",
                ));
                continue;
            };
            if WASI_MODULES.contains(&module.as_str()) {
                continue;
            }
            let is_ours = |m: &str| m == KUBE_MODULE || m == HOST_MODULE;
            match host_signature(module, name) {
                Some(expected) => {
                    check_type("import", &format!("{module}.{name}"), ty, &expected, problems);
                }
                None if is_ours(module) => problems.push(unknown("; see docs/abi.md")),
                None if ["kube", "host"].iter().any(|m| module.starts_with(m)) => {
                    problems.push(Problem::AbiVersion(module.clone()));
                }
                None if module == "__wbindgen_placeholder__" => problems
                    .push(unknown("; a dependency was built for browsers (wasm-bindgen): see guests/README.md")),
                None if module.contains("http-proxy-abi") || module == "delay-abi" => problems
                    .push(unknown("; the module was built for the WASM-operator prototype: rebuild it, see guests/README.md")),
                None => problems.push(unknown("")),
            }
        }
        problems.dedup();
    }

    fn check_memory(&self, problems: &mut Vec<Problem>) {
        if let Some(bytes) = self
            .memories
            .iter()
            .find(|bytes| **bytes > MAX_MEMORY_BYTES)
        {
            problems.push(Problem::Memory(format!(
                "needs {bytes} bytes of memory at start; the most there can be is {MAX_MEMORY_BYTES}"
            )));
        }
        if self.tables > MAX_TABLES {
            problems.push(Problem::Memory(format!(
                "has more than {MAX_TABLES} tables"
            )));
        }
    }
}

fn check_type(
    what: &'static str,
    name: &str,
    found: &FuncType,
    expected: &Signature,
    problems: &mut Vec<Problem>,
) {
    if found.params() == expected.0 && found.results() == expected.1 {
        return;
    }
    let list = |types: &[ValType]| {
        types
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    };
    problems.push(Problem::Type {
        what,
        name: name.to_owned(),
        found: format!("({}) -> ({})", list(found.params()), list(found.results())),
        expected: expected.2,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        (memory (export "memory") 1)
        (func (export "_start"))
        (func (export "alloc") (param i32) (result i32) i32.const 8)
        (func (export "on_event") (param i64 i32 i32 i32))"#;

    fn problems(text: &str) -> Vec<String> {
        let wasm = wat::parse_str(text).unwrap();
        inspect(&wasm)
            .unwrap_err()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn a_module_with_the_exports_of_the_abi_is_accepted() {
        let text = format!(
            r#"(module (import "kube_v1" "list" (func (param i32 i32) (result i64)))
                (import "wasi_snapshot_preview1" "sched_yield" (func (result i32))) {GOOD})"#
        );
        let shape = inspect(&wat::parse_str(text).unwrap()).unwrap();
        assert_eq!(shape.entry, EntryPoint::Start);
        assert!(shape.uses_wasi);
    }

    #[test]
    fn all_missing_exports_are_named_at_once() {
        let found = problems(r#"(module (func (export "alloc")))"#);
        assert_eq!(found.len(), 4, "{found:?}");
        for name in [
            "`memory`",
            "`on_event`",
            "`alloc` has the type () -> ()",
            "`_start`",
        ] {
            assert!(found.iter().any(|p| p.contains(name)), "{name}: {found:?}");
        }
    }

    #[test]
    fn unknown_imports_say_what_to_do() {
        for (module, name, part) in [
            ("kube_v2", "list", "rebuild the module"),
            ("host_v1", "fly", "docs/abi.md"),
            ("http-proxy-abi", "request", "prototype"),
            ("env", "f", "nothing here provides"),
        ] {
            let found = problems(&format!(
                r#"(module (import "{module}" "{name}" (func)) {GOOD})"#
            ));
            assert!(found.len() == 1 && found[0].contains(part), "{found:?}");
        }
        let found = problems(&format!(
            r#"(module (import "env" "memory" (global i32)) {GOOD})"#
        ));
        assert!(found[0].contains("brings its own"), "{found:?}");
        let found = problems(&format!(
            r#"(module (import "host_v1" "timer" (func)) {GOOD})"#
        ));
        assert!(found[0].contains("host_v1.timer"), "{found:?}");
    }

    #[test]
    fn what_is_not_a_core_module_is_told_apart() {
        assert!(matches!(
            inspect(b"#!/bin/sh\n").unwrap_err()[0],
            Problem::NotWasm(_)
        ));
        assert!(matches!(inspect(b"").unwrap_err()[0], Problem::NotWasm(_)));
        let component = wat::parse_str("(component)").unwrap();
        assert_eq!(inspect(&component).unwrap_err(), [Problem::Component]);
        let threads = format!("(module (memory $m 1 1 shared) {GOOD})");
        assert!(matches!(
            inspect(&wat::parse_str(threads).unwrap()).unwrap_err()[0],
            Problem::NotWasm(_)
        ));
    }
}
