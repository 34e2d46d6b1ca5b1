//! Stands in for serde-saphyr, with which kube-client reads kubeconfig files: JSON only, which is
//! YAML too. A child finds in-cluster files, so this is not used at all unless it brings its own.

use serde::de::DeserializeOwned;

/// A parse error.
pub type Error = serde_json::Error;

/// Reads a document.
///
/// # Errors
/// When it is not JSON, or not of that type.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    serde_json::from_str(text)
}

/// Reads a document.
///
/// # Errors
/// When it is not JSON, or not of that type.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes)
}

/// Reads the one document.
///
/// # Errors
/// When it is not JSON, or not of that type.
pub fn from_multiple<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, Error> {
    serde_json::from_str(text).map(|document| vec![document])
}
