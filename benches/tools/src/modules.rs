//! Copies of a module that are all different, as operators of different people are.
//!
//! The lineage compiles its benchmark's guest N times with another constant in it. A custom section
//! does the same for the parent: the module's bytes differ, and by their hash the compiled form is
//! kept, so each copy is compiled, has a file of its own and code pages of its own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::parent::{self, Child};
use crate::say;

/// Unique modules made from one, and a cache directory for what the parent compiles them to.
#[derive(Debug)]
pub struct Modules {
    directory: PathBuf,
    wasm: Vec<u8>,
}

impl Modules {
    /// Kept under `cache` in a directory named after the guest and its bytes; those of other bytes
    /// are removed. `fresh` begins with an empty one.
    ///
    /// # Errors
    /// When files cannot be read, made or removed.
    pub fn open(cache: &Path, guest: &str, module: &Path, fresh: bool) -> Result<Self> {
        let context = || cache.display().to_string();
        let wasm = fs::read(module).with_context(|| module.display().to_string())?;
        let prefix = format!("{guest}@");
        let name = format!("{prefix}{:016x}", fingerprint(&wasm));
        fs::create_dir_all(cache).with_context(context)?;
        for entry in fs::read_dir(cache).with_context(context)? {
            let entry = entry.with_context(context)?;
            let found = entry.file_name();
            let found = found.to_string_lossy();
            if found.starts_with(&prefix) && (fresh || found != name) {
                fs::remove_dir_all(entry.path())
                    .with_context(|| entry.path().display().to_string())?;
            }
        }
        let directory = cache.join(name);
        fs::create_dir_all(directory.join("wasm")).with_context(context)?;
        Ok(Self { directory, wasm })
    }

    /// The module of that number.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn module(&self, number: usize) -> Result<PathBuf> {
        let path = self.directory.join(format!("wasm/{number}.wasm"));
        let wasm = unique(&self.wasm, number);
        let is_there = fs::metadata(&path).is_ok_and(|found| found.len() == wasm.len() as u64);
        if !is_there {
            fs::write(&path, wasm).with_context(|| path.display().to_string())?;
        }
        Ok(path)
    }

    /// For the parent's `--cache-dir`.
    pub fn artifacts(&self) -> PathBuf {
        self.directory.join("artifacts")
    }

    /// Has the modules of children compiled, as far as they are not.
    ///
    /// # Errors
    /// When one cannot be compiled.
    pub async fn compile(
        &self,
        program: &Path,
        directory: &Path,
        children: &[Child],
    ) -> Result<()> {
        let before = self.compiled();
        let progress = || {
            let compiled = self.compiled();
            if compiled != before {
                say(format_args!("{compiled} modules are compiled"));
            }
        };
        parent::compile(program, directory, &self.artifacts(), children, progress).await
    }

    /// How many modules have been compiled.
    pub fn compiled(&self) -> usize {
        // What is written last.
        self.of_kind("manifest").count()
    }

    /// What a compiled module takes of the disk, in bytes: code, and first content of the memory.
    /// Means of all.
    pub fn disk(&self) -> [u64; 2] {
        ["elf", "image"].map(|kind| {
            // Images are sparse: what counts is what they occupy.
            let bytes = |file: PathBuf| fs::metadata(file).map_or(0, |file| file.blocks() * 512);
            let sizes: Vec<_> = self.of_kind(kind).map(bytes).collect();
            sizes.iter().sum::<u64>() / (sizes.len() as u64).max(1)
        })
    }

    fn of_kind(&self, kind: &'static str) -> impl Iterator<Item = PathBuf> {
        let entries = fs::read_dir(self.artifacts()).into_iter().flatten();
        let paths = entries.flatten().map(|entry| entry.path());
        paths.filter(move |path| path.extension().is_some_and(|found| found == kind))
    }
}

/// The module with a custom section `unique` that holds the number, always of the same length.
fn unique(wasm: &[u8], number: usize) -> Vec<u8> {
    const NAME: &[u8] = b"unique";
    let content = format!("{number:08}");
    // Both lengths fit into one byte of LEB128.
    let mut section = vec![0, (1 + NAME.len() + content.len()) as u8, NAME.len() as u8];
    section.extend(NAME);
    section.extend(content.as_bytes());
    [wasm, &section].concat()
}

/// FNV-1a: to tell builds apart, not to keep anybody out.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_differ_by_a_custom_section() {
        let empty = b"\0asm\x01\0\0\0";
        let copy = unique(empty, 7);
        assert_eq!(&copy[8..], b"\0\x0f\x06unique00000007");
        assert_ne!(unique(empty, 8), copy);
    }
}
