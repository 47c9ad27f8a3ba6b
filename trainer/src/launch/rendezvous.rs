//! How ranks find each other: all come to rank 0, and get what it has for them. What they exchange later is none of this; the lines
//! stay, so that each hears when one ends ([`Lifeline`]).

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::{Address, Lifeline, World};
use crate::{Error, Result};

/// What a rank says first, so that nobody else is taken for one; the last byte counts versions of what follows.
const HELLO: [u8; 8] = *b"flowtap\x01";
/// How long one that has come may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(50);
/// Longest message.
const LONGEST: usize = 1 << 16;

/// Gives all ranks the `bytes` of rank 0 (at most 65,536; those of the others do not matter), and the line by which they hear of each
/// other. Returns when all are there, so it is a first meeting, too.
///
/// # Errors
/// When some do not come within `limit`: all that came are told which ones. When one comes twice or counts other ranks, or rank 0
/// can't listen there.
pub fn rendezvous(world: &World, bytes: &[u8], limit: Duration) -> Result<(Vec<u8>, Lifeline)> {
    let end = Instant::now() + limit;
    match world.rank {
        _ if world.size == 1 => Ok((bytes.to_vec(), Lifeline::of(0, Vec::new()))),
        0 => receive_all(world, bytes, end, limit),
        _ => visit(world, end, limit),
    }
}

fn failed(what: String) -> Error {
    Error::Launch(what)
}

/// Rank 0: waits for all, then answers all.
fn receive_all(world: &World, bytes: &[u8], end: Instant, limit: Duration) -> Result<(Vec<u8>, Lifeline)> {
    let master = world.master()?;
    let is_local = matches!(master.host.as_str(), "localhost" | "127.0.0.1");
    let host = if is_local { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
    let listener =
        TcpListener::bind((host, master.port)).and_then(|l| l.set_nonblocking(true).map(|()| l)).map_err(|e| {
            failed(format!(
                "rank 0 can't wait for the others at {master}: {e}; set MASTER_PORT to a free port, for all ranks"
            ))
        })?;
    let mut came: Vec<Option<TcpStream>> = (1..world.size).map(|_| None).collect();
    let answer = loop {
        let missing: Vec<usize> = (1..world.size).filter(|rank| came[rank - 1].is_none()).collect();
        if missing.is_empty() {
            break Ok(bytes);
        }
        if Instant::now() > end {
            break Err(format!(
                "{} of {} did not come to {master} within {} s: look at what became of {}",
                ranks(&missing),
                world.size,
                limit.as_secs(),
                if missing.len() == 1 { "it" } else { "them" }
            ));
        }
        let (stream, from) = match listener.accept() {
            Ok(found) => found,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(RETRY);
                continue;
            }
            // One that has gone again is none of ours.
            Err(_) => continue,
        };
        let Some((rank, size)) = hello(&stream) else { continue };
        if size != world.size {
            break Err(format!("rank {rank} from {from} counts {size} ranks, rank 0 counts {}", world.size));
        }
        match rank.checked_sub(1).and_then(|at| came.get_mut(at)) {
            Some(place @ None) => *place = Some(stream),
            _ => break Err(format!("rank {rank} came twice, the second time from {from}: each rank is one process")),
        }
    };
    let (good, text) = match &answer {
        Ok(bytes) => (0, *bytes),
        Err(what) => (1, what.as_bytes()),
    };
    // Who has gone meanwhile is missed by the first exchange.
    came.iter().flatten().for_each(|stream| {
        let _ = reply(stream, good, text);
    });
    let lines = came.into_iter().enumerate().filter_map(|(at, stream)| Some((at + 1, stream?))).collect();
    answer.map(|bytes| (bytes.to_vec(), Lifeline::of(0, lines))).map_err(failed)
}

/// Another rank: comes to rank 0 as soon as that is there.
fn visit(world: &World, end: Instant, limit: Duration) -> Result<(Vec<u8>, Lifeline)> {
    let (master, rank) = (world.master()?, world.rank);
    let mut why = String::new();
    while Instant::now() < end {
        match meet(world, master, end) {
            Ok((0, bytes, line)) => return Ok((bytes, Lifeline::of(rank, vec![(0, line)]))),
            Ok((_, text, _)) => return Err(failed(String::from_utf8_lossy(&text).into_owned())),
            Err(e) => why = e.to_string(),
        }
        std::thread::sleep(RETRY);
    }
    let seconds = limit.as_secs();
    Err(failed(format!(
        "rank {rank} did not find rank 0 at {master} within {seconds} s ({why}): look at what became of it, and whether \
         {} can be reached from here",
        master.host
    )))
}

/// What rank 0 answers: whether it is an error, the bytes, and the line to it.
fn meet(world: &World, master: &Address, end: Instant) -> std::io::Result<(u8, Vec<u8>, TcpStream)> {
    let mut addresses = (master.host.as_str(), master.port).to_socket_addrs()?;
    let address = addresses.next().ok_or(ErrorKind::NotFound)?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.write_all(&HELLO)?;
    stream.write_all(&(world.rank as u32).to_le_bytes())?;
    stream.write_all(&(world.size as u32).to_le_bytes())?;
    // Rank 0 says who is missing a little later than the limit.
    let left = end.saturating_duration_since(Instant::now()) + PATIENCE * 2;
    stream.set_read_timeout(Some(left))?;
    let (mut kind, mut length) = ([0], [0; 4]);
    stream.read_exact(&mut kind)?;
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok((kind[0], text, stream))
}

/// The rank of one that came, and how many it counts; none where it is no rank.
fn hello(mut stream: &TcpStream) -> Option<(usize, usize)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let (mut hello, mut numbers) = ([0; 8], [[0; 4]; 2]);
    stream.read_exact(&mut hello).ok()?;
    for number in &mut numbers {
        stream.read_exact(number).ok()?;
    }
    let [rank, size] = numbers.map(|bytes| u32::from_le_bytes(bytes) as usize);
    (hello == HELLO).then_some((rank, size))
}

fn reply(mut stream: &TcpStream, kind: u8, text: &[u8]) -> std::io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[kind])?;
    stream.write_all(&(text.len() as u32).to_le_bytes())?;
    stream.write_all(text)
}

fn ranks(of: &[usize]) -> String {
    let all = of.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    format!("{} {all}", if of.len() == 1 { "rank" } else { "ranks" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Launcher;

    const SOON: Duration = Duration::from_secs(20);

    /// A port that was free a moment ago.
    fn master() -> Address {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        Address { host: "127.0.0.1".into(), port }
    }

    fn world(rank: usize, size: usize, master: &Address) -> World {
        let master = Some(master.clone());
        World { launcher: Launcher::Torchrun, rank, size, local_rank: rank, local_size: size, master }
    }

    /// What each of these ranks gets.
    fn meet(worlds: Vec<World>, limit: Duration) -> Vec<Result<Vec<u8>, String>> {
        let one = |world: World| {
            std::thread::spawn(move || {
                // The last ones wait for nobody; the first one comes late.
                std::thread::sleep(Duration::from_millis(if world.rank == 0 { 200 } else { 0 }));
                rendezvous(&world, &[7, 8, world.rank as u8], limit).map(|(bytes, _)| bytes).map_err(|e| e.to_string())
            })
        };
        worlds.into_iter().map(one).collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    #[test]
    fn all_get_what_the_first_one_has() {
        let master = master();
        let got = meet((0..4).map(|rank| world(rank, 4, &master)).collect(), SOON);
        assert!(got.iter().all(|got| got.as_deref() == Ok(&[7, 8, 0])), "{got:?}");
        assert_eq!(rendezvous(&world(0, 1, &master), &[1], SOON).unwrap().0, [1]);
    }

    #[test]
    fn who_does_not_come_is_named_to_all() {
        let address = master();
        let some = [0, 1, 4].map(|rank| world(rank, 5, &address));
        for got in meet(some.into(), Duration::from_secs(1)) {
            assert!(got.unwrap_err().contains("ranks 2, 3 of 5 did not come"));
        }
        let error = rendezvous(&world(2, 4, &master()), &[], Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.contains("rank 2 did not find rank 0 at 127.0.0.1"), "{error}");
    }

    #[test]
    fn strangers_and_doubles_are_told_apart() {
        let address = master();
        let stranger = std::thread::spawn({
            let address = (address.host.clone(), address.port);
            move || {
                for _ in 0..100 {
                    if let Ok(mut stream) = TcpStream::connect(&address) {
                        let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        });
        let got = meet((0..2).map(|rank| world(rank, 2, &address)).collect(), SOON);
        stranger.join().unwrap();
        assert!(got.iter().all(Result::is_ok), "{got:?}");

        let address = master();
        let got = meet([0, 1, 1].map(|rank| world(rank, 3, &address)).into(), SOON);
        assert!(got[0].as_ref().unwrap_err().contains("rank 1 came twice"), "{got:?}");
        let address = master();
        let mut other = world(1, 2, &address);
        other.size = 4;
        let got = meet(vec![world(0, 2, &address), other], Duration::from_secs(2));
        assert!(got[0].as_ref().unwrap_err().contains("rank 1 from 127.0.0.1"), "{got:?}");

        let address = master();
        let taken = TcpListener::bind((address.host.as_str(), address.port)).unwrap();
        let error = rendezvous(&world(0, 2, &address), &[], SOON).unwrap_err().to_string();
        assert!(error.contains("set MASTER_PORT to a free port"), "{error}");
        drop(taken);
    }
}
