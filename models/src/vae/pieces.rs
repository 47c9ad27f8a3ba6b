//! Clips that pass through a causal network piece by piece: what its layers remember of the frames before.

use flowtape_engine::nn::{Conv, ParamBuilder};
use flowtape_engine::ops::{ConvAxis, Padding};
use flowtape_engine::{Result as EngineResult, Tensor};

use super::video::{FIRST, LAST};

/// Frames that a convolution along time, of three taps, remembers.
pub(super) const REMEMBERED: usize = 2;

/// What one place in the network remembers of the frames before.
#[derive(Clone, Debug, Default)]
pub(super) enum Seen {
    #[default]
    Nothing,
    /// That there was a first piece.
    First,
    /// The last frames, or what else is needed of them.
    Frames(Tensor),
}

/// What the network remembers from piece to piece, in the order in which it asks.
#[derive(Debug, Default)]
pub(super) struct Memory {
    places: Vec<Seen>,
    at: usize,
    pieces: usize,
}

impl Memory {
    /// Goes on to the next piece.
    pub(super) fn next_piece(&mut self) {
        self.at = 0;
        self.pieces += 1;
    }

    pub(super) fn is_first(&self) -> bool {
        self.pieces == 1
    }

    /// What the next place remembers; `put` writes over it.
    pub(super) fn take(&mut self) -> Seen {
        if self.at == self.places.len() {
            self.places.push(Seen::Nothing);
        }
        std::mem::take(&mut self.places[self.at])
    }

    pub(super) fn put(&mut self, seen: Seen) {
        self.places[self.at] = seen;
        self.at += 1;
    }
}

/// The last frames of `[B, C, T, H, W]`, at most so many.
pub(super) fn tail(x: &Tensor, frames: usize) -> EngineResult<Tensor> {
    let count = x.dims()[2];
    x.narrow(2, count.saturating_sub(frames), frames.min(count))
}

/// A convolution whose taps along time are all at or before their place.
#[derive(Debug)]
pub(super) struct CausalConv(Conv);

impl CausalConv {
    /// What lies beyond the sides, and before the first frame, is as the padding says.
    pub(super) fn new(
        params: &ParamBuilder,
        inputs: usize,
        outputs: usize,
        kernel: [usize; 3],
        padding: Padding,
    ) -> EngineResult<Self> {
        let [time, height, width] = kernel;
        let space = |kernel: usize| (kernel, ConvAxis::same(kernel).with_padding(padding));
        let axes = [(time, ConvAxis::causal(time).with_padding(padding)), space(height), space(width)];
        Ok(Self(Conv::new(params, inputs, outputs, &axes)?))
    }

    /// Of a piece before which there was nothing.
    pub(super) fn first(&self, x: &Tensor) -> EngineResult<Tensor> {
        self.0.forward(x)
    }

    /// Of a piece, after the frames that were seen, which take the place of padding; and those frames with the piece.
    pub(super) fn after(&self, before: &Tensor, x: &Tensor) -> EngineResult<(Tensor, Tensor)> {
        let joined = Tensor::cat(&[before, x], 2)?;
        let mut axes = self.0.axes().to_vec();
        axes[0].before = axes[0].before.saturating_sub(before.dims()[2]);
        Ok((self.0.walk(&joined, &axes)?, joined))
    }

    /// Of the next piece.
    pub(super) fn forward(&self, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let (y, seen) = match memory.take() {
            Seen::Frames(before) => self.after(&before, x)?,
            _ => (self.0.forward(x)?, x.clone()),
        };
        // A copy, so that the rest of the frames may go.
        memory.put(Seen::Frames(tail(&seen, REMEMBERED)?.permute(&LAST)?.contiguous()?.permute(&FIRST)?));
        Ok(y)
    }
}
