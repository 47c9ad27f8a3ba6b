//! Files that are whole or not there.

use std::fs::File;
use std::path::Path;

use crate::Error;

/// Lets `write` make a file beside `path`, and moves it there when it is whole and on the disk: an older file is
/// replaced at once or stays.
///
/// # Errors
/// Those of `write`, and of the file system.
pub fn write_whole<E: From<Error>>(path: &Path, write: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let io = |source| E::from(Error::Io { path: path.into(), source });
    let written = write(partial)
        .and_then(|()| File::open(partial).and_then(|f| f.sync_all()).map_err(io))
        .and_then(|()| std::fs::rename(partial, path).map_err(io));
    written.inspect_err(|_| {
        // What was begun is of no use.
        let _ = std::fs::remove_file(partial);
    })
}
