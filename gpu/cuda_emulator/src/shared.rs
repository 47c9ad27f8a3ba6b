//! Shared memory of a block, and who used it since the last barrier.

use crate::machine::Trap;

/// Bytes that uses are told apart by.
const GRAIN: usize = 2;
/// Stands for more than one warp.
const MANY: u32 = 0xff;

/// Uses of a grain: in which interval between barriers and by which warp it was last written, and read.
#[derive(Clone, Copy, Default)]
struct Use {
    written: (u32, u32),
    read: (u32, u32),
}

/// Shared memory. Two warps that use the same bytes between two barriers, one of them to write, are a mistake: on a GPU
/// they would come in either order. Within a warp the order is that of the program.
pub(crate) struct Shared {
    bytes: Vec<u8>,
    uses: Vec<Use>,
    /// Counts barriers, from 1.
    interval: u32,
}

impl Shared {
    /// Uninitialised: NaN in every float.
    pub fn new(size: usize) -> Self {
        Self { bytes: vec![0xff; size], uses: vec![Use::default(); size.div_ceil(GRAIN)], interval: 1 }
    }

    /// All threads have met.
    pub fn barrier(&mut self) {
        self.interval += 1;
    }

    fn place(&self, at: u64, size: usize) -> Result<usize, Trap> {
        let fits = at.checked_add(size as u64).is_some_and(|end| end <= self.bytes.len() as u64);
        if fits { Ok(at as usize) } else { Err(format!("Shared address {at:#x} is past the end")) }
    }

    /// Bytes that a warp reads.
    pub fn read(&mut self, warp: u32, at: u64, size: usize) -> Result<&[u8], Trap> {
        let at = self.place(at, size)?;
        for one in &mut self.uses[at / GRAIN..(at + size).div_ceil(GRAIN)] {
            let (interval, by) = one.written;
            if interval == self.interval && by != warp {
                return Err(format!(
                    "a race: shared {at:#x} is read by warp {warp}, written by warp {by} since the barrier"
                ));
            }
            let others = one.read.0 == self.interval && one.read.1 != warp;
            one.read = (self.interval, if others { MANY } else { warp });
        }
        Ok(&self.bytes[at..at + size])
    }

    /// Bytes that a warp writes.
    pub fn write(&mut self, warp: u32, at: u64, size: usize) -> Result<&mut [u8], Trap> {
        let at = self.place(at, size)?;
        for one in &mut self.uses[at / GRAIN..(at + size).div_ceil(GRAIN)] {
            for (what, (interval, by)) in [("written", one.written), ("read", one.read)] {
                if interval == self.interval && by != warp {
                    return Err(format!(
                        "a race: shared {at:#x} is written by warp {warp}, {what} by warp {by} since the barrier"
                    ));
                }
            }
            one.written = (self.interval, warp);
        }
        Ok(&mut self.bytes[at..at + size])
    }
}
