//! What platforms differ in for a run, in one place each: the room on a disk, and processes. Clock and files are the engine's `platform`.

use std::path::Path;
use std::process::Child;

/// Bytes that are free where a folder is, or would be, if the platform says so.
#[cfg(any(unix, windows))]
pub(crate) fn free_space(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|path| path.exists()).filter(|path| !path.as_os_str().is_empty());
    fs4::available_space(there.unwrap_or(Path::new("."))).ok()
}

#[cfg(not(any(unix, windows)))]
pub(crate) fn free_space(_: &Path) -> Option<u64> {
    None
}

/// Sends SIGTERM, at which a run saves and ends.
#[cfg(unix)]
pub(crate) fn ask_to_end(child: &Child) {
    use rustix::process::{Pid, Signal, kill_process};
    if let Some(process) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // One that has ended meanwhile hears nothing.
        let _ = kill_process(process, Signal::TERM);
    }
}

/// Elsewhere a terminal asks all processes itself.
#[cfg(not(unix))]
pub(crate) fn ask_to_end(_: &Child) {}

/// The process that started this one.
#[cfg(unix)]
pub(crate) fn parent() -> u32 {
    std::os::unix::process::parent_id()
}

#[cfg(not(unix))]
pub(crate) fn parent() -> u32 {
    0
}
