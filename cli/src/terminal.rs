//! The one place that prints.
//!
//! Output is never worth a run: a reader that went away, or a disk without room behind a redirection, stops nothing. What
//! was lost on standard output is remembered, for commands that do nothing else than print.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write, stderr, stdout};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use indicatif::ProgressBar;

/// Whether only errors are told on standard error.
static QUIET: AtomicBool = AtomicBool::new(false);

/// From now on nothing but errors is told on standard error.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Whether nothing but errors is told.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// A progress bar, hidden where nothing is to be told or there is no terminal.
pub fn bar(steps: u64) -> ProgressBar {
    if is_quiet() { ProgressBar::hidden() } else { ProgressBar::new(steps) }
}

/// Why standard output was lost first.
static LOST: OnceLock<std::io::Error> = OnceLock::new();

/// Prints a line to standard output.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::terminal::out(format_args!("{}\n", format_args!($($text)*)))
    };
}
/// Prints a line to standard error, where that is wanted.
macro_rules! note {
    ($($text:tt)*) => {
        if !$crate::terminal::is_quiet() {
            $crate::terminal::err(format_args!("{}\n", format_args!($($text)*)))
        }
    };
}
pub(crate) use {note, say};

/// Prints to standard output.
pub fn out(text: Arguments<'_>) {
    let mut to = stdout().lock();
    if let Err(error) = to.write_fmt(text).and_then(|()| to.flush()) {
        LOST.get_or_init(|| error);
    }
}

/// Prints to standard error.
pub fn err(text: Arguments<'_>) {
    // There is nowhere left to tell of it.
    let _ = stderr().lock().write_fmt(text);
}

/// The end of a command that only prints: success if all that went to standard output arrived. A reader that had enough,
/// such as `head`, is no error.
///
/// # Errors
/// When something else was in the way, such as a full disk.
pub fn delivered() -> Result<ExitCode> {
    match LOST.get() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => bail!("standard output: {error}"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Standard error for what writes by itself, such as logs; it never fails.
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = stderr().lock().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
