//! `wasm-operator check`: everything that is wrong with a configuration, without a cluster.

use std::path::Path;

use crate::child::Source;
use crate::config::{self, Problem};
use crate::module::inspect;

/// What was found.
#[derive(Debug)]
pub struct Report {
    /// How many children are in order.
    pub good: usize,
    /// All problems, in the order of the file.
    pub problems: Vec<Problem>,
}

/// Checks the configuration in `directory`, and every module it names.
pub fn check(directory: &Path) -> Report {
    let (children, mut problems) = config::load(directory, "default");
    let mut good = 0;
    for child in children {
        // What a URL names is checked when it is fetched.
        let found: Vec<String> = match &child.wasm {
            Source::Url { .. } => Vec::new(),
            Source::File(path) => match std::fs::read(path) {
                Ok(wasm) => inspect(&wasm)
                    .err()
                    .into_iter()
                    .flatten()
                    .map(|p| p.to_string())
                    .collect(),
                Err(error) => vec![error.to_string()],
            },
        };
        if found.is_empty() {
            good += 1;
        }
        problems.extend(found.into_iter().map(|problem| Problem {
            origin: child.wasm_origin.clone(),
            field: "wasm".into(),
            message: format!("{} {problem}", child.wasm),
        }));
    }
    problems.sort_by_key(|p| (p.origin.document, p.origin.line));
    Report { good, problems }
}
