//! What platforms differ in, in one place each: the clock, threads, how the bytes of a file come to memory, and the last digit of a sine.
//!
//! What threads do together is in `cpu::awake`; instruction sets are the CPU backend's.

use std::io::Result;
use std::ops::Deref;
use std::path::Path;

/// The standard library's clocks, and the page's where a browser is the machine: `std::time::Instant::now` panics there.
pub use web_time::{Instant, SystemTime, UNIX_EPOCH};

/// Whether a program can start threads: one of WebAssembly has the thread that it is called on, and no other.
pub const HAS_THREADS: bool = !cfg!(target_family = "wasm");

/// Sine and cosine, the same bits on every platform: by those of f64, whose last digits are rounded away. C's libraries differ in the
/// last digit of one f32 in eighty.
pub fn sin_cos(x: f32) -> (f32, f32) {
    let (sin, cos) = f64::from(x).sin_cos();
    (sin as f32, cos as f32)
}

/// The bytes of a file: mapped where the system maps files (and the feature `mmap` is on), else read to memory.
#[derive(Debug)]
pub(crate) struct FileBytes(Held);

#[derive(Debug)]
enum Held {
    #[cfg(all(feature = "mmap", any(unix, windows)))]
    Mapped(memmap2::Mmap),
    Read(Vec<u8>),
}

impl FileBytes {
    #[cfg(all(feature = "mmap", any(unix, windows)))]
    pub fn open(path: &Path) -> Result<Self> {
        let file = std::fs::File::open(path)?;
        // SAFETY: files are replaced by renaming, never written in place; whoever truncates one while it is read
        // gets a bus error, as with every mapped file.
        let map = unsafe { memmap2::Mmap::map(&file) }?;
        Ok(Self(Held::Mapped(map)))
    }

    #[cfg(not(all(feature = "mmap", any(unix, windows))))]
    pub fn open(path: &Path) -> Result<Self> {
        Ok(std::fs::read(path)?.into())
    }
}

impl From<Vec<u8>> for FileBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Held::Read(bytes))
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            #[cfg(all(feature = "mmap", any(unix, windows)))]
            Held::Mapped(map) => map,
            Held::Read(bytes) => bytes,
        }
    }
}
