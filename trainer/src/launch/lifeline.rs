//! Lines between rank 0 and all others, by which each hears when one ends or no longer answers. Libraries of collectives wait then,
//! and some wait for ever.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often each says that it is there.
const PULSE: Duration = Duration::from_secs(2);
/// After how long a silence it is taken for stopped.
const SILENCE: Duration = Duration::from_secs(30);

/// What goes over a line.
const ALIVE: u8 = b'.';
/// Ends in order.
const DONE: u8 = b'=';
/// A rank, a length and a text follow: why that rank failed.
const FAILED: u8 = b'!';
/// Longest text.
const LONGEST: usize = 4096;

/// The lines of a rank. Dropping it says that this rank ends in order.
#[derive(Debug)]
pub struct Lifeline(Arc<Lines>);

#[derive(Debug)]
struct Lines {
    rank: usize,
    /// Ranks that are heard of here, to be written to.
    streams: Mutex<Vec<(usize, TcpStream)>>,
    /// Whether this rank is done, or knows already that another failed.
    over: AtomicBool,
}

impl Lines {
    fn streams(&self) -> MutexGuard<'_, Vec<(usize, TcpStream)>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to all lines but one; who can't be written to is heard of by reading.
    fn send(&self, bytes: &[u8], but: Option<usize>) {
        for (_, stream) in self.streams().iter_mut().filter(|(rank, _)| Some(*rank) != but) {
            let _ = stream.write_all(bytes);
        }
    }

    fn tell(&self, rank: usize, cause: &str, but: Option<usize>) {
        let mut end = cause.len().min(LONGEST);
        while !cause.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = vec![FAILED];
        bytes.extend((rank as u32).to_le_bytes());
        bytes.extend((end as u32).to_le_bytes());
        bytes.extend(&cause.as_bytes()[..end]);
        self.send(&bytes, but);
    }

    /// Listens to one line until its end; then, unless that was in order, which rank failed, and why.
    fn listen(&self, rank: usize, mut stream: TcpStream) -> Option<(usize, String)> {
        loop {
            let mut kind = [0];
            let failed = match stream.read_exact(&mut kind) {
                Ok(()) if kind[0] == ALIVE => continue,
                Ok(()) if kind[0] == DONE => return None,
                Ok(()) if kind[0] == FAILED => told(&mut stream),
                Ok(()) => Err(ErrorKind::InvalidData.into()),
                Err(e) => Err(e),
            };
            let is_over = self.over.load(Ordering::Relaxed);
            return match failed {
                Ok(failed) => Some(failed),
                Err(_) if is_over => None,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    Some((rank, format!("does not answer since {} s", SILENCE.as_secs())))
                }
                Err(_) => Some((rank, "its process ended".into())),
            };
        }
    }
}

fn told(stream: &mut TcpStream) -> std::io::Result<(usize, String)> {
    let mut numbers = [[0; 4]; 2];
    for number in &mut numbers {
        stream.read_exact(number)?;
    }
    let [rank, length] = numbers.map(|bytes| u32::from_le_bytes(bytes) as usize);
    let mut text = vec![0; length.min(LONGEST)];
    stream.read_exact(&mut text)?;
    Ok((rank, String::from_utf8_lossy(&text).into_owned()))
}

impl Lifeline {
    /// Of a rank, with lines to others: to all for rank 0, to that for the others.
    pub(super) fn of(rank: usize, streams: Vec<(usize, TcpStream)>) -> Self {
        Self(Arc::new(Lines { rank, streams: Mutex::new(streams), over: AtomicBool::new(false) }))
    }

    /// From now on this rank says that it is there, and `on_failure` hears of the first one that failed: its rank and why. Rank 0
    /// hands that on to all others.
    ///
    /// # Errors
    /// When there are no threads for it.
    pub fn watch(&self, on_failure: impl Fn(usize, &str) + Send + Sync + 'static) -> std::io::Result<()> {
        let on_failure = Arc::new(on_failure);
        let mut listeners = Vec::new();
        for (rank, stream) in self.0.streams().iter() {
            stream.set_read_timeout(Some(SILENCE))?;
            // A machine that is gone takes no more bytes.
            stream.set_write_timeout(Some(PULSE))?;
            stream.set_nodelay(true)?;
            listeners.push((*rank, stream.try_clone()?));
        }
        for (rank, stream) in listeners {
            let (lines, on_failure) = (self.0.clone(), on_failure.clone());
            let listen = move || {
                let Some((failed, cause)) = lines.listen(rank, stream) else { return };
                if !lines.over.swap(true, Ordering::Relaxed) {
                    if lines.rank == 0 {
                        lines.tell(failed, &cause, Some(rank));
                    }
                    on_failure(failed, &cause);
                }
            };
            std::thread::Builder::new().name("lifeline".into()).spawn(listen)?;
        }
        let lines = Arc::downgrade(&self.0);
        let pulse = move || {
            while let Some(lines) = lines.upgrade().filter(|lines| !lines.over.load(Ordering::Relaxed)) {
                lines.send(&[ALIVE], None);
                drop(lines);
                std::thread::sleep(PULSE);
            }
        };
        std::thread::Builder::new().name("pulse".into()).spawn(pulse).map(|_| ())
    }

    /// Tells all others why this rank fails, once.
    pub fn fail(&self, cause: &str) {
        if !self.0.over.swap(true, Ordering::Relaxed) {
            self.0.tell(self.0.rank, cause, None);
        }
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        if !self.0.over.swap(true, Ordering::Relaxed) {
            self.0.send(&[DONE], None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Instant;

    use super::*;

    /// Rank 0 and two others, with what each hears.
    fn three() -> Vec<(Lifeline, Receiver<(usize, String)>)> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let pairs: Vec<_> =
            (1..3).map(|rank| (rank, TcpStream::connect(address).unwrap(), listener.accept().unwrap().0)).collect();
        let (mut at_zero, mut lines) = (Vec::new(), Vec::new());
        for (rank, other, zero) in pairs {
            at_zero.push((rank, zero));
            lines.push(Lifeline::of(rank, vec![(0, other)]));
        }
        lines.insert(0, Lifeline::of(0, at_zero));
        let watched = |line: Lifeline| {
            let (tell, heard) = channel();
            line.watch(move |rank, cause| tell.send((rank, cause.to_owned())).unwrap()).unwrap();
            (line, heard)
        };
        lines.into_iter().map(watched).collect()
    }

    #[test]
    fn all_hear_why_one_fails() {
        for failing in 0..3 {
            let mut all = three();
            let (line, _heard) = all.remove(failing);
            line.fail("the disk is full");
            for (_, heard) in &all {
                let found = heard.recv_timeout(Duration::from_secs(10)).unwrap();
                assert_eq!(found, (failing, "the disk is full".into()));
            }
        }
    }

    #[test]
    fn all_hear_that_one_is_gone_but_not_that_one_is_done() {
        let started = Instant::now();
        let mut all = three();
        let (gone, _) = all.remove(1);
        // As the system does it for a process that was killed.
        gone.0.over.store(true, Ordering::Relaxed);
        for (_, stream) in gone.0.streams().iter() {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
        for (_, heard) in &all {
            assert_eq!(heard.recv_timeout(Duration::from_secs(10)).unwrap(), (1, "its process ended".into()));
        }
        let mut all = three();
        drop(all.remove(2));
        drop(all.remove(1));
        assert!(all[0].1.recv_timeout(Duration::from_millis(300)).is_err());
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}
