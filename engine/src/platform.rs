//! What platforms differ in, in one place each: the clock, threads, how the bytes of a file come to memory, and the last digits of
//! elementary functions.
//!
//! What threads do together is in `cpu::awake`; instruction sets are the CPU backend's.

use std::io::Result;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use rayon::{ThreadBuilder, ThreadPoolBuilder};

/// The standard library's clocks, and the page's where a browser is the machine: `std::time::Instant::now` panics there.
pub use web_time::{Instant, SystemTime, UNIX_EPOCH};

/// Whether a program can start threads: one of WebAssembly has the thread that it is called on, and those that are lent to it
/// ([`lend_thread`]), which share operations alone.
pub const HAS_THREADS: bool = !cfg!(target_family = "wasm");

/// What lent threads are to become: threads of rayon's pool.
static WANTED: Mutex<Vec<ThreadBuilder>> = Mutex::new(Vec::new());
/// Tells them that there is something.
static CALL: Condvar = Condvar::new();
/// Those in the pool.
static LENT: AtomicUsize = AtomicUsize::new(0);

/// Lends the calling thread to a program that can start none itself, such as one in a page, whose workers are started by the page: it
/// waits until [`share_lent_threads`] takes it, and works then as a thread of rayon's global pool, which lives as long as the program.
pub fn lend_thread() {
    let wanted = WANTED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut wanted = CALL.wait_while(wanted, |wanted| wanted.is_empty()).unwrap_or_else(PoisonError::into_inner);
    let thread = wanted.pop();
    drop(wanted);
    if let Some(thread) = thread {
        thread.run();
    }
}

/// Makes rayon's global pool of the calling thread and `others` that are lent, and waits until these are there. Operations that the
/// calling thread starts are shared by all of them, in [`awake`](crate::cpu::awake).
///
/// # Errors
/// When there is such a pool already.
pub fn share_lent_threads(others: usize) -> Result<()> {
    let pool = ThreadPoolBuilder::new().num_threads(1 + others).use_current_thread().spawn_handler(|thread| {
        WANTED.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        CALL.notify_one();
        Ok(())
    });
    pool.build_global().map_err(std::io::Error::other)?;
    LENT.store(others, Ordering::Relaxed);
    Ok(())
}

/// Cores that this program may use. Where the system does not say, one, and one for each thread that is lent.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or_else(|_| 1 + LENT.load(Ordering::Relaxed), usize::from)
}

/// Elementary functions of f32, the same bits on every platform; `clippy.toml` forbids those of the standard library.
///
/// Those are the C library's, and C's libraries differ in the last digit of one sine in eighty. They differ in f64's functions too, which
/// are used here, but rounding to f32 nearly always removes that digit.
pub mod math {
    /// `e^x`.
    pub fn exp(x: f32) -> f32 {
        f64::from(x).exp() as f32
    }

    /// The natural logarithm.
    pub fn ln(x: f32) -> f32 {
        f64::from(x).ln() as f32
    }

    /// `x^y`.
    pub fn powf(x: f32, y: f32) -> f32 {
        f64::from(x).powf(f64::from(y)) as f32
    }

    /// Sine and cosine.
    pub fn sin_cos(x: f32) -> (f32, f32) {
        let (sin, cos) = f64::from(x).sin_cos();
        (sin as f32, cos as f32)
    }
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
