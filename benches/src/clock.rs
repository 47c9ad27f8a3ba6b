//! Time on a device that may run behind the host.

use std::time::{Duration, Instant};

use flowtape_engine::{DType, Device, Tensor};

use crate::Result;

/// Seconds of one measurement at least, and of a single wait for a device that runs behind.
const ROUND: f64 = 2e-3;
/// Prepared inputs held at once at most: they take memory.
const PREPARED: usize = 8;

/// What one call takes.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Seconds of a call in the fastest round: what others do on the machine hardly moves it.
    pub best: f64,
    /// Seconds of a call in the median round.
    pub median: f64,
    /// Calls that were measured.
    pub calls: usize,
}

/// A clock of a device's own work.
#[derive(Debug)]
pub struct Clock {
    probe: Tensor,
    /// Seconds of waiting for a device that has nothing to do.
    idle: f64,
    /// Seconds that an operation is measured for.
    seconds: f64,
}

impl Clock {
    /// A clock that measures each operation for some seconds.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: &Device, seconds: f64) -> Result<Self> {
        let mut clock = Self { probe: Tensor::ones(&[1], DType::F32, device)?, idle: 0.0, seconds };
        let waits = (0..10).map(|_| clock.time(|| Ok(()))).collect::<Result<Vec<f64>>>()?;
        clock.idle = waits.into_iter().fold(f64::INFINITY, f64::min);
        Ok(clock)
    }

    /// Waits for all work so far: reads a value that was computed after it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn wait(&self) -> Result<()> {
        Ok(self.probe.add_scalar(1.0)?.item().map(|_| ())?)
    }

    /// Seconds of some work and all that it started.
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let started = Instant::now();
        work()?;
        self.wait()?;
        Ok((started.elapsed().as_secs_f64() - self.idle).max(1e-9))
    }

    /// What `work` takes on what `prepare` makes; preparing is not counted.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure_prepared<S>(
        &self,
        mut prepare: impl FnMut() -> Result<S>,
        mut work: impl FnMut(S) -> Result<()>,
    ) -> Result<Times> {
        let [(times, _)] = self.measure_in_turns(|_| prepare(), |_, state| work(state))?;
        Ok(times)
    }

    /// The same of several sides in turns, each called by its number: what moves the machine moves all of them. With each side's times
    /// the seconds of its rounds.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure_in_turns<S, const N: usize>(
        &self,
        mut prepare: impl FnMut(usize) -> Result<S>,
        mut work: impl FnMut(usize, S) -> Result<()>,
    ) -> Result<[(Times, Vec<f64>); N]> {
        let mut run = |side: usize, calls: usize| -> Result<f64> {
            let mut states = (0..calls).map(|_| prepare(side)).collect::<Result<Vec<S>>>()?;
            self.wait()?;
            Ok(self.time(|| states.drain(..).try_for_each(|state| work(side, state)))? / calls as f64)
        };
        let wanted = ROUND.max(20.0 * self.idle);
        let mut calls = [1; N];
        for (side, calls) in calls.iter_mut().enumerate() {
            // The first call finds cold caches, fresh memory and kernels that are not compiled yet.
            run(side, 1)?;
            let first = run(side, 1)?;
            *calls = ((wanted / first).ceil() as usize).clamp(1, if size_of::<S>() == 0 { 4096 } else { PREPARED });
        }
        let (mut rounds, deadline) =
            ([const { Vec::new() }; N], Instant::now() + Duration::from_secs_f64(self.seconds));
        while rounds[0].len() < 3 || Instant::now() < deadline {
            for (side, rounds) in rounds.iter_mut().enumerate() {
                rounds.push(run(side, calls[side])?);
            }
        }
        let mut calls = calls.into_iter();
        Ok(rounds.map(|rounds: Vec<f64>| {
            let mut sorted = rounds.clone();
            sorted.sort_by(f64::total_cmp);
            let calls = calls.next().unwrap_or(0) * rounds.len();
            (Times { best: sorted[0], median: sorted[sorted.len() / 2], calls }, rounds)
        }))
    }

    /// What `work` takes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure(&self, mut work: impl FnMut() -> Result<()>) -> Result<Times> {
        self.measure_prepared(|| Ok(()), |()| work())
    }
}
