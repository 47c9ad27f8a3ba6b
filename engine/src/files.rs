//! Files that are whole or not there, and what files turn out to be.

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

/// Whether there is something at a path. What can't be looked at (no permission, a loop of links) is not taken for missing.
///
/// # Errors
/// When that can't be told.
pub fn exists(path: &Path) -> Result<bool, Error> {
    path.try_exists().map_err(|source| Error::Io { path: path.into(), source })
}

/// What a file is in place of the one that its name promises, and what to do, where its first bytes tell.
pub fn mistaken_for(bytes: &[u8]) -> Option<&'static str> {
    let text = bytes.trim_ascii_start();
    let markup = |rest: &[u8]| rest.first().is_some_and(|c| c.is_ascii_alphabetic() || b"!?".contains(c));
    match text {
        _ if bytes.is_empty() => Some("an empty file: fetch it again"),
        _ if text.starts_with(b"version https://git-lfs") => {
            Some("a Git LFS pointer, not the file that it stands for: fetch that with `git lfs pull`")
        }
        [b'<', rest @ ..] if markup(rest) => {
            Some("a web page: a server sent it instead of the file (a login, a moved address?); fetch the file again")
        }
        _ if bytes.starts_with(b"PK\x03\x04") => {
            Some("a ZIP archive, as torch.save makes them (.bin, .pt, .ckpt): save the weights as safetensors")
        }
        _ if bytes.starts_with(b"GGUF") => Some("a GGUF file: take the weights as safetensors"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_like_something_else_is_named() {
        let what = |bytes: &[u8]| mistaken_for(bytes).unwrap_or_default();
        assert!(what(b"").contains("empty"));
        assert!(what(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n").contains("git lfs pull"));
        for page in [&b"<!DOCTYPE html>"[..], b"\n <html lang=en>", b"<?xml version='1.0'?><Error/>"] {
            assert!(what(page).contains("web page"));
        }
        assert!(what(b"PK\x03\x04\x00\x00").contains("ZIP") && what(b"GGUF\x03").contains("GGUF"));
        // Lengths of headers, and headers cut short.
        assert!(
            [&b"<\0\0\0\0\0\0\0{"[..], b"\x20\0\0\0\0\0\0\0{", b"{\"a\""].iter().all(|b| mistaken_for(b).is_none())
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_file_has_the_rights_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        std::fs::write(folder.path().join("plain"), "x").unwrap();
        crate::safetensors::save(folder.path().join("a.safetensors"), &[], &Default::default()).unwrap();
        assert_eq!(mode("a.safetensors"), mode("plain"));
    }
}
