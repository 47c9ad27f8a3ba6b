//! What asks a run to stop: Ctrl-C and its kin.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::terminal::note;

/// The signals that end a run with a checkpoint: those that a terminal and a scheduler send.
#[cfg(unix)]
const SIGNALS: [i32; 4] = [SIGINT, SIGTERM, signal_hook::consts::SIGHUP, signal_hook::consts::SIGUSR1];
#[cfg(not(unix))]
const SIGNALS: [i32; 2] = [SIGINT, SIGTERM];
/// What a shell adds to a signal's number: 130 for SIGINT, 143 for SIGTERM.
const EXIT: i32 = 128;

/// The first signal ends the run after the current step, a second one at once. So does the first, until a run has begun:
/// there is nothing to save yet.
pub struct Stop {
    asked: Arc<AtomicBool>,
    at_once: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
    /// Says that the first one was heard.
    teller: JoinHandle<()>,
}

impl Stop {
    /// Listens from now on.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn listen() -> io::Result<Self> {
        let [asked, at_once] = [false, true].map(|value| Arc::new(AtomicBool::new(value)));
        let number = Arc::new(AtomicUsize::new(0));
        for signal in SIGNALS.into_iter().filter(|signal| !is_left_alone(*signal)) {
            // They run in this order.
            flag::register_conditional_shutdown(signal, EXIT + signal, at_once.clone())?;
            flag::register(signal, at_once.clone())?;
            flag::register_usize(signal, number.clone(), signal as usize)?;
            flag::register(signal, asked.clone())?;
        }
        // A handler must not print, and a step may be long: a thread looks.
        let heard = asked.clone();
        let teller = std::thread::Builder::new().name("signals".into()).spawn(move || {
            while !heard.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
            }
            note!("stopping after this step; press again to quit now");
        })?;
        Ok(Self { asked, at_once, signal: number, teller })
    }

    /// Set when a run is asked to stop.
    pub fn asked(&self) -> &AtomicBool {
        &self.asked
    }

    /// From now on the first signal waits for a checkpoint.
    pub fn run_begins(&self) {
        self.at_once.store(false, Ordering::Relaxed);
    }

    /// The exit code of a run that was stopped: 128 and the signal's number.
    pub fn exit_code(self) -> ExitCode {
        // It has been asked to stop, so this thread ends.
        let _ = self.teller.join();
        let signal = self.signal.load(Ordering::Relaxed);
        u8::try_from(EXIT as usize + signal).map_or(ExitCode::FAILURE, ExitCode::from)
    }
}

/// Whether a signal was made to do nothing before this program began: `nohup` does that with SIGHUP, so that a run outlives its
/// terminal.
#[cfg(target_os = "linux")]
fn is_left_alone(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    signal == signal_hook::consts::SIGHUP && ignored >> (signal - 1) & 1 == 1
}

#[cfg(not(target_os = "linux"))]
fn is_left_alone(_: i32) -> bool {
    false
}
