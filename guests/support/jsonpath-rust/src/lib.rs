//! Stands in for jsonpath-rust, to keep a regular-expression engine and a parser generator out of
//! every child. kube-client uses it for credential plug-ins only, and credentials are the parent's.

/// The trait that kube-client calls.
pub trait JsonPath {
    /// Always an error.
    ///
    /// # Errors
    /// [`Unsupported`].
    fn query(&self, path: &str) -> Result<Vec<&serde_json::Value>, Unsupported>;
}

/// There are no JSON paths in a child.
#[derive(Clone, Copy, Debug)]
pub struct Unsupported;

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON paths are not available in a child operator")
    }
}

impl std::error::Error for Unsupported {}

impl JsonPath for serde_json::Value {
    fn query(&self, _: &str) -> Result<Vec<&serde_json::Value>, Unsupported> {
        Err(Unsupported)
    }
}
