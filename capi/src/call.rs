//! What stands around each function: errors as text, panics that stop here.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a call came to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowtapeStatus {
    /// It did what it says.
    Ok = 0,
    /// It failed; `flowtape_last_error` says why.
    Error = 1,
    /// It was cancelled, and did not get to the end.
    Cancelled = 2,
}

/// Why a call ends early.
pub(crate) enum Failure {
    Cancelled,
    Error(String),
}

impl<E: Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Error(error.to_string())
    }
}

thread_local! {
    /// The text of the last error on this thread.
    static LAST: RefCell<CString> = RefCell::default();
}

fn remember(text: &str) {
    let text = CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default();
    // Nobody is told where the thread is ending already.
    let _ = LAST.try_with(|last| last.replace(text));
}

/// Runs the body of a function: an error's text is remembered, and so is a panic's.
pub(crate) fn call(body: impl FnOnce() -> Result<(), Failure>) -> FlowtapeStatus {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => FlowtapeStatus::Ok,
        Ok(Err(Failure::Cancelled)) => {
            remember("cancelled");
            FlowtapeStatus::Cancelled
        }
        Ok(Err(Failure::Error(text))) => {
            remember(&text);
            FlowtapeStatus::Error
        }
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            remember(&format!("a fault of the library, please report it: {text}"));
            FlowtapeStatus::Error
        }
    }
}

/// The text of the last error of this thread, in UTF-8; empty where there was none. It stays until the thread's next call that fails.
#[unsafe(no_mangle)]
pub extern "C" fn flowtape_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// What a pointer points to.
///
/// # Safety
/// It is null, or points to a `T` that nobody writes for as long as the result is used.
pub(crate) unsafe fn reference<'a, T>(pointer: *const T, name: &str) -> Result<&'a T, Failure> {
    if !pointer.is_null() && !pointer.is_aligned() {
        return Err(Failure::Error(format!("{name}: expected a pointer that is aligned")));
    }
    // SAFETY: the caller's.
    unsafe { pointer.as_ref() }.ok_or_else(|| Failure::Error(format!("{name}: expected a pointer, got null")))
}

/// Puts a value where a caller wants it.
///
/// # Safety
/// The pointer is null, or points to memory of a `T` that nobody else uses.
pub(crate) unsafe fn put<T>(pointer: *mut T, name: &str, value: T) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::Error(format!("{name}: expected a pointer, got null")));
    }
    // SAFETY: the caller's; it may lie anywhere.
    unsafe { pointer.write_unaligned(value) };
    Ok(())
}

/// Values of an array; none where there are none, whatever the pointer is then.
///
/// # Safety
/// The pointer is null, or points to `len` values of `T` that nobody writes for as long as the result is used.
pub(crate) unsafe fn array<'a, T>(pointer: *const T, len: usize, name: &str) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: the caller's.
    unsafe { reference(pointer, name)? };
    if len.checked_mul(size_of::<T>()).is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(Failure::Error(format!("{name}: {len} values are more than the address space")));
    }
    // SAFETY: the caller's; it is neither null nor unaligned, and not too long.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

/// A text.
///
/// # Safety
/// The pointer is null, or points to a text that ends in a zero and that nobody writes for as long as the result is used.
pub(crate) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str, Failure> {
    // SAFETY: the caller's.
    unsafe { reference(pointer, name)? };
    // SAFETY: the caller's; it is not null.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|error| Failure::Error(format!("{name}: expected UTF-8: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last() -> String {
        // SAFETY: the text of this thread's last error, which stays until the next one.
        unsafe { CStr::from_ptr(flowtape_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_text_and_each_thread_has_its_own() {
        assert_eq!(last(), "");
        assert_eq!(call(|| panic!("on purpose")), FlowtapeStatus::Error);
        assert!(last().contains("fault of the library") && last().contains("on purpose"), "{}", last());
        assert_eq!(call(|| Err("a\0b".into())), FlowtapeStatus::Error);
        assert_eq!(last(), "a\u{fffd}b");
        assert_eq!(call(|| Ok(())), FlowtapeStatus::Ok);
        assert_eq!(call(|| Err(Failure::Cancelled)), FlowtapeStatus::Cancelled);
        std::thread::spawn(|| assert_eq!(last(), "")).join().unwrap();
    }
}
