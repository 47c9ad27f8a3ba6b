//! The functions of the CUDA driver, loaded on first use.
//!
//! `cust_raw` declares 353 functions and leaves it to the linker to find them in `libcuda`. Here they are defined, each
//! as a trampoline that opens the driver's library when it is first called. So a binary needs no toolkit to build and
//! no driver to start: without a driver every call returns `CUDA_ERROR_NO_DEVICE`, and [`driver`] says why.
//!
//! A program that embeds Flowtape with CUDA copies two lines to its own manifest, since a patch holds in its own
//! workspace alone:
//!
//! ```toml
//! [patch.crates-io]
//! find_cuda_helper = { git = "<flowtape's repository>" }
//! ```

mod trampolines;

use std::cell::Cell;
use std::error::Error;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use cust_raw::CUresult;
use libloading::Library;

/// Where the driver's functions come from.
enum Source {
    /// The driver's library.
    Library(Library),
    /// Functions of this process, by name: null where there is none.
    Table(fn(&str) -> *mut c_void),
}

static SOURCE: OnceLock<Result<Source, String>> = OnceLock::new();

thread_local! {
    static UNLISTED: Cell<i32> = const { Cell::new(0) };
}

/// Names of the library. `FLOWTAPE_LIBCUDA` names another one.
const NAMES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

fn open() -> Result<Source, String> {
    // SAFETY: it is the NVIDIA driver, or what the user named in its place.
    unsafe { open_library(std::env::var("FLOWTAPE_LIBCUDA").ok(), NAMES) }.map(Source::Library)
}

/// Opens a library by the first of its names that is there, or by the user's own.
///
/// # Safety
/// Loading runs the library's initialisers.
///
/// # Errors
/// With the loader's reason for the first name.
pub unsafe fn open_library(own: Option<String>, names: &[&str]) -> Result<Library, String> {
    let names = own.as_deref().map_or_else(|| names.to_vec(), |name| vec![name]);
    let mut why = String::new();
    for name in names {
        // SAFETY: the caller's promise.
        match unsafe { Library::new(name) } {
            Ok(library) => return Ok(library),
            Err(error) if why.is_empty() => {
                let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                why = format!("{name} can't be loaded: {reason}");
            }
            Err(_) => {}
        }
    }
    Err(why)
}

fn source() -> Result<&'static Source, &'static str> {
    SOURCE.get_or_init(open).as_ref().map_err(String::as_str)
}

/// Whether there is an NVIDIA driver.
///
/// # Errors
/// The loader's reason when there is none.
pub fn driver() -> Result<(), &'static str> {
    source().map(|_| ())
}

/// Lets functions of this process answer in place of the driver: for emulation in tests. `table` gives a function's
/// address by name, or null. Returns `false` when the driver was asked for before.
///
/// # Safety
/// Each function that `table` gives must have the signature that `cust_raw` declares under its name.
pub unsafe fn provide(table: fn(&str) -> *mut c_void) -> bool {
    SOURCE.set(Ok(Source::Table(table))).is_ok()
}

/// The same, but only where there is no driver. Returns whether the functions of this process answer.
///
/// # Safety
/// As [`provide`].
pub unsafe fn stand_in(table: fn(&str) -> *mut c_void) -> bool {
    let source = SOURCE.get_or_init(|| Ok(open().unwrap_or(Source::Table(table))));
    matches!(source, Ok(Source::Table(_)))
}

/// The address of any function of the driver, also of those newer than `cust_raw` (`cuLaunchKernelEx`); `None` when
/// there is no driver or it is too old.
pub fn symbol(name: &str) -> Option<*mut c_void> {
    let found = match source().ok()? {
        Source::Table(table) => table(name),
        Source::Library(library) => {
            let name = CString::new(name).ok()?;
            // SAFETY: the symbol is a function, of which the address alone is taken.
            unsafe { *library.get::<*mut c_void>(name.as_bytes_with_nul()).ok()? }
        }
    };
    (!found.is_null()).then_some(found)
}

/// The raw code of this thread's last call that failed with one which `cust_raw`, being of CUDA 11.4, does not list; 0
/// when there was none. Such codes are returned as `CUDA_ERROR_UNKNOWN`.
pub fn last_unlisted_error() -> i32 {
    UNLISTED.get()
}

/// A code as the enumeration has it. The enumeration is a Rust `enum`: any other number in it would be undefined.
fn result(code: c_int) -> CUresult {
    let listed = trampolines::LISTED.binary_search(&code).is_ok();
    if !listed {
        UNLISTED.set(code);
    }
    let code = if listed { code } else { CUresult::CUDA_ERROR_UNKNOWN as c_int };
    // SAFETY: the code is one of the enumeration's.
    unsafe { std::mem::transmute::<c_int, CUresult>(code) }
}

/// Marks a function that was looked for and is not there: no address of a function.
const ABSENT: *mut c_void = std::ptr::without_provenance_mut(1);

/// The function in `slot`, looked for when it is first called.
fn resolve(slot: &AtomicPtr<c_void>, name: &str) -> Result<*mut c_void, CUresult> {
    let mut found = slot.load(Ordering::Acquire);
    if found.is_null() {
        found = symbol(name).unwrap_or(ABSENT);
        slot.store(found, Ordering::Release);
    }
    match found {
        ABSENT if driver().is_err() => Err(CUresult::CUDA_ERROR_NO_DEVICE),
        ABSENT => Err(CUresult::CUDA_ERROR_NOT_FOUND),
        found => Ok(found),
    }
}

/// The text of an error. `cust` panics when it prints an error and this fails: so it always answers.
///
/// # Safety
/// `text` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: CUresult, text: *mut *const c_char) -> CUresult {
    if let Some(function) = symbol("cuGetErrorString") {
        // SAFETY: the driver's function has this signature; `text` is writable.
        let code = unsafe {
            let function =
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int>(function);
            function(error as c_int, text)
        };
        if code == 0 {
            return CUresult::CUDA_SUCCESS;
        }
    }
    let answer = if driver().is_err() { c"no NVIDIA driver" } else { c"an error that this driver has no text for" };
    // SAFETY: the caller's promise.
    unsafe { *text = answer.as_ptr() };
    CUresult::CUDA_SUCCESS
}
