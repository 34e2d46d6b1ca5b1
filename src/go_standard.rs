//! What Go's standard library needs to run in a child: a few lines, and files that are added to it.
//!
//! - `time`: tickers that only keep house come once an hour, so that they wake nobody.
//! - `net/http`: requests to the API server go to the parent, from whatever transport.
//! - `os/signal`: no loop that waits for signals, which would spin.
//! - `runtime`: a goroutine that polls lets the others run; nobody else would interrupt it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::carried;
use crate::toolchain::{self, Carried, ToolError, digest, short_hash};

/// Why it cannot be made.
#[derive(Debug, Error)]
pub enum StandardError {
    /// A file.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Go is too new, or changed.
    #[error(
        "the standard library of {version} is not one that wasm-operator knows ({file} differs): build with Go 1.26 (GOTOOLCHAIN=go1.26.0), or use a newer wasm-operator"
    )]
    Unknown {
        /// Go's version.
        version: String,
        /// Below GOROOT/src.
        file: &'static str,
    },
}

/// Files that are added to packages of the standard library.
const STANDARD_FILES: &[Carried] = carried!("../guests/go/_overlay":
    "net/http/wasm_operator.go",
    "os/signal/wasm_operator.go",
    "runtime/wasm_operator.go",
    "time/wasm_operator.go",
);

/// Changes of one file of the standard library.
#[derive(Debug)]
struct Edit {
    file: &'static str,
    /// What is found exactly once, and what stands there instead.
    changes: &'static [(&'static str, &'static str)],
}

/// Where the standard library calls what [`STANDARD_FILES`] add.
const STANDARD_EDITS: &[Edit] = &[
    Edit {
        file: "time/tick.go",
        changes: &[(
            "func NewTicker(d Duration) *Ticker {\n",
            "func NewTicker(d Duration) *Ticker {\n\td = wasmOperatorPeriod(d)\n",
        )],
    },
    Edit {
        file: "net/http/roundtrip.go",
        changes: &[(
            "\treturn t.roundTrip(req)\n",
            "\tif wasmOperatorRoundTrip != nil {\n\t\tif resp, ok, err := wasmOperatorRoundTrip(req); ok {\n\t\t\treturn resp, err\n\t\t}\n\t}\n\treturn t.roundTrip(req)\n",
        )],
    },
    // The loop spins in wasip1, for it waits in runtime.notetsleepg; and there are no signals.
    Edit {
        file: "os/signal/signal_unix.go",
        changes: &[("\twatchSignalLoop = loop\n", "")],
    },
    // Goroutines that poll let the others run: see runtime/wasm_operator.go.
    Edit {
        file: "runtime/runtime2.go",
        changes: &[(
            "\tgcAssistBytes int64\n",
            "\tgcAssistBytes int64\n\twasmOperator wasmOperatorPolls\n",
        )],
    },
    Edit {
        file: "runtime/proc.go",
        changes: &[
            (
                "\tgp.waitreason = reason\n\tmp.waitTraceBlockReason",
                "\tgp.wasmOperator.count = 0\n\tgp.waitreason = reason\n\tmp.waitTraceBlockReason",
            ),
            (
                "\tgp.waitreason = waitReasonZero\n",
                "\tgp.wasmOperator.count = 0\n\tgp.waitreason = waitReasonZero\n",
            ),
        ],
    },
    Edit {
        file: "runtime/select.go",
        changes: &[(
            "nsends, nrecvs int, block bool) (int, bool) {\n",
            "nsends, nrecvs int, block bool) (int, bool) {\n\twasmOperatorPoll()\n",
        )],
    },
    Edit {
        file: "runtime/chan.go",
        changes: &[
            (
                "block bool, callerpc uintptr) bool {\n",
                "block bool, callerpc uintptr) bool {\n\twasmOperatorPoll()\n",
            ),
            (
                "block bool) (selected, received bool) {\n",
                "block bool) (selected, received bool) {\n\twasmOperatorPoll()\n",
            ),
        ],
    },
];

/// What `-overlay` replaces in the standard library of that version, and by what; `directory` gets the
/// changed files.
///
/// # Errors
/// [`StandardError`].
pub fn overlay(
    goroot: &Path,
    version: &str,
    directory: &Path,
) -> Result<BTreeMap<PathBuf, PathBuf>, StandardError> {
    let source = goroot.join("src");
    // Builds of another wasm-operator may go on at the same time.
    let copies = directory.join(format!(
        "standard-{}-{}-{}",
        version.replace(' ', "-"),
        digest(STANDARD_FILES),
        short_hash(format!("{STANDARD_EDITS:?}").as_bytes()),
    ));
    toolchain::unpack(STANDARD_FILES, &copies)?;
    let mut overlay: BTreeMap<_, _> = STANDARD_FILES
        .iter()
        .map(|file| (source.join(file.path), copies.join(file.path)))
        .collect();
    for edit in STANDARD_EDITS {
        let original = source.join(edit.file);
        let mut text = fs::read_to_string(&original).map_err(ToolError::file(&original))?;
        for (find, replace) in edit.changes {
            if text.matches(find).count() != 1 {
                return Err(StandardError::Unknown {
                    version: version.to_owned(),
                    file: edit.file,
                });
            }
            text = text.replacen(find, replace, 1);
        }
        let copy = copies.join(edit.file);
        toolchain::write_if_changed(&copy, text.as_bytes())?;
        overlay.insert(original, copy);
    }
    Ok(overlay)
}
