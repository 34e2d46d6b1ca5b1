//! Stands in for hostname, which asks the operating system: a child's host name is its own name.

use std::ffi::OsString;
use std::io;

/// The child's name, which the parent puts into `HOSTNAME`.
///
/// # Errors
/// When the variable is not set.
pub fn get() -> io::Result<OsString> {
    std::env::var_os("HOSTNAME").ok_or_else(|| io::ErrorKind::NotFound.into())
}
