//! Where the time of a step goes.

use std::cell::Cell;

use flowtape_engine::optim::StepSink;
use flowtape_engine::platform::Instant;
use flowtape_engine::{GradientSink, Result, Tensor, VarId};

/// Seconds that the parts of a step took. On a device that runs behind the host they are what it took to hand the work over.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct StepTimes {
    /// Batches: waiting for samples, putting them side by side, encoding them.
    pub data: f64,
    /// From a batch to its loss.
    pub forward: f64,
    /// Backward, without the updates on its way.
    pub backward: f64,
    /// Clipping and updates, on the way of backward and behind it.
    pub optimizer: f64,
    /// Bytes in use when the loss was there, the most of all micro-batches, where the device counts them.
    pub forward_bytes: u64,
}

/// Counts the seconds of what is behind it in a chain of sinks.
pub(crate) struct Timed<'a, S> {
    pub sink: S,
    pub seconds: &'a Cell<f64>,
}

impl<S> Timed<'_, S> {
    fn time<R>(&mut self, work: impl FnOnce(&mut S) -> R) -> R {
        let started = Instant::now();
        let result = work(&mut self.sink);
        self.seconds.set(self.seconds.get() + started.elapsed().as_secs_f64());
        result
    }
}

impl<S: GradientSink> GradientSink for Timed<'_, S> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        self.time(|sink| sink.gradient(var, gradient))
    }
}

impl<S: StepSink> StepSink for Timed<'_, S> {
    fn end(&mut self) -> Result<Option<Tensor>> {
        self.time(StepSink::end)
    }
}
