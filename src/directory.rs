//! Directories that only the user who runs this process may write to.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Makes the directory if it is not there, and checks whose it is.
///
/// # Errors
/// When it cannot be made or used, or when others may write to it.
pub fn own(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let metadata = fs::metadata(directory)?;
    // The owner of a file this process makes is the user it runs as.
    let probe = directory.join(format!(".probe-{}", std::process::id()));
    // `create_new` follows no link that somebody may have put there.
    fs::File::create_new(&probe)?;
    let owner = fs::metadata(&probe).map(|m| m.uid());
    fs::remove_file(&probe)?;
    if owner? != metadata.uid() || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it must belong to the user that runs wasm-operator, and nobody else may write to it",
        ));
    }
    Ok(())
}

/// The user's cache directory (XDG base directories), if the environment names one.
pub fn user_cache() -> Option<PathBuf> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        own(directory.path()).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = own(directory.path()).unwrap_err();
        assert!(
            error.to_string().contains("nobody else may write"),
            "{error}"
        );
    }
}
