//! A child operator as it was configured: every field is valid.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::api::Identity;
use crate::forecast::Model;

/// What a child may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Largest linear memory, in bytes (`memory`, default `512Mi`, at most just below 2 GiB).
    pub memory_bytes: u64,
    /// CPU time of one event (`eventSeconds`, default 5). A guest that needs more is stopped.
    pub event_budget: Duration,
    /// Open operations (`operations`, default 1,024).
    pub max_operations: usize,
    /// Requests a second to the API server (`requestsPerSecond`, default 500); two seconds' worth
    /// may come at once, what is above waits.
    pub requests_per_second: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 512 << 20,
            event_budget: Duration::from_secs(5),
            max_operations: 1024,
            requests_per_second: 500.0,
        }
    }
}

/// When a child goes to sleep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HibernationSettings {
    /// Whether it does at all (`hibernate`: `auto`, the default, or `never`).
    pub allowed: bool,
    /// How long it has to be idle (`idleSeconds`, default 5).
    pub idle: Duration,
    /// How its next wake-up is predicted (`prediction`, default `ses`); `None` for `never`.
    pub prediction: Option<Model>,
}

impl Default for HibernationSettings {
    fn default() -> Self {
        Self {
            allowed: true,
            idle: Duration::from_secs(5),
            prediction: Some(Model::default()),
        }
    }
}

/// A child operator as configured.
#[derive(Clone, Debug)]
pub struct Child {
    /// Unique name; the target of its log lines.
    pub name: String,
    /// Where its module is.
    pub wasm: Source,
    /// Environment variables, in order.
    pub env: Vec<(String, String)>,
    /// Arguments after the name.
    pub args: Vec<String>,
    /// Namespace it believes to run in.
    pub namespace: String,
    /// On whose behalf its requests are made.
    pub identity: Identity,
    /// What it may use.
    pub limits: Limits,
    /// When it goes to sleep.
    pub hibernation: HibernationSettings,
    /// Where `wasm` stands, for messages.
    pub wasm_origin: Origin,
}

/// Where a module comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// An HTTP server.
    Url {
        /// `https://` or `http://`.
        url: surf::Url,
        /// SHA-256 of the module, 64 hexadecimal digits.
        sha256: String,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Url { url, .. } => write!(f, "{url}"),
        }
    }
}

/// Where in the file something stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: PathBuf,
    /// Number of the document, from 1.
    pub document: usize,
    /// Line, from 1.
    pub line: usize,
}

#[cfg(test)]
impl Child {
    /// A child with nothing but a name.
    pub fn for_test(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            wasm: Source::File(PathBuf::new()),
            env: Vec::new(),
            args: Vec::new(),
            namespace: "default".into(),
            identity: Identity::default(),
            limits: Limits::default(),
            hibernation: HibernationSettings::default(),
            wasm_origin: Origin {
                file: PathBuf::new(),
                document: 1,
                line: 1,
            },
        }
    }
}
