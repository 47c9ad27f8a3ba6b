//! What platforms differ in for a run, in one place each: the room on a disk, processes, and what is done beside the training. Clock,
//! files and whether there are threads are the engine's `platform`.

use std::path::Path;
use std::process::Child;
use std::thread::JoinHandle;

use flowtape_engine::platform::HAS_THREADS;

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

/// The number of this process; 0 where the platform has no processes.
pub(crate) fn process() -> u32 {
    // WebAssembly's standard library panics.
    if cfg!(target_family = "wasm") { 0 } else { std::process::id() }
}

/// Work that another thread does meanwhile.
#[derive(Debug)]
pub(crate) enum Aside<T> {
    Begun(JoinHandle<T>),
    /// There are no other threads, so it was done at once.
    Done(T),
}

impl<T: Send + 'static> Aside<T> {
    /// Begins `work` on a thread of this name.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn begin(name: &str, work: impl FnOnce() -> T + Send + 'static) -> std::io::Result<Self> {
        if HAS_THREADS {
            Ok(Self::Begun(std::thread::Builder::new().name(name.into()).spawn(work)?))
        } else {
            Ok(Self::Done(work()))
        }
    }

    /// Whether it is through.
    pub fn is_finished(&self) -> bool {
        match self {
            Self::Begun(thread) => thread.is_finished(),
            Self::Done(_) => true,
        }
    }

    /// Waits for its end; an error holds what it panicked with.
    pub fn join(self) -> std::thread::Result<T> {
        match self {
            Self::Begun(thread) => thread.join(),
            Self::Done(result) => Ok(result),
        }
    }
}

/// The process that started this one.
#[cfg(unix)]
pub(crate) fn parent() -> u32 {
    std::os::unix::process::parent_id()
}

#[cfg(not(unix))]
pub(crate) fn parent() -> u32 {
    0
}
