//! Ranks that exchange nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Collective, Comm, Done, Work};
use crate::{Device, Error, Result};

/// One rank alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Comm for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn device(&self) -> Device {
        Device::cpu()
    }

    fn start(&self, collective: Collective) -> Result<Box<dyn Work>> {
        collective.alone()?;
        Ok(Box::new(Done))
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn abort(&self, _: &str) {}

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn split(&self, _: &dyn Fn(usize) -> usize) -> Result<Arc<dyn Comm>> {
        Ok(Arc::new(*self))
    }
}

/// One of several ranks on a device without data, whose others need not be there: what a rank would take is counted.
#[derive(Clone, Debug)]
pub struct Planned {
    rank: usize,
    world_size: usize,
    device: Device,
    sent: Arc<AtomicU64>,
}

impl Planned {
    /// The rank of so many.
    ///
    /// # Errors
    /// When the device has data, or there is no such rank.
    pub fn new(rank: usize, world_size: usize, device: &Device) -> Result<Self> {
        if device.backend().has_data() {
            let name = device.backend().name().to_owned();
            return Err(Error::argument("ranks that are planned", "a device without data", name));
        }
        if rank >= world_size {
            return Err(Error::argument("ranks that are planned", format!("a rank below {world_size}"), rank));
        }
        Ok(Self { rank, world_size, device: device.clone(), sent: Arc::default() })
    }

    /// Bytes that this rank sent since this was asked last, with those in groups that were split off; see [`Collective::sent`].
    pub fn take_sent(&self) -> u64 {
        self.sent.swap(0, Ordering::Relaxed)
    }
}

impl Comm for Planned {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn device(&self) -> Device {
        self.device.clone()
    }

    fn start(&self, collective: Collective) -> Result<Box<dyn Work>> {
        self.sent.fetch_add(collective.sent(self.world_size), Ordering::Relaxed);
        Ok(Box::new(Done))
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn abort(&self, _: &str) {}

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn split(&self, color_of: &dyn Fn(usize) -> usize) -> Result<Arc<dyn Comm>> {
        let alike = |rank: &usize| color_of(*rank) == color_of(self.rank);
        let (before, all) = ((0..self.rank).filter(alike).count(), (0..self.world_size).filter(alike).count());
        Ok(Arc::new(Self { rank: before, world_size: all, ..self.clone() }))
    }
}
