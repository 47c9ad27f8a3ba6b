//! Clips that pass through a causal network piece by piece: what its layers remember of the frames before.

use std::ops::Range;

use flowtape_engine::nn::{Conv, ParamBuilder};
use flowtape_engine::ops::{ConvAxis, Padding};
use flowtape_engine::{Result as EngineResult, Tensor};

use super::rows::{in_rows, over_rows};
use super::video::{FIRST, LAST, RmsNorm};

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

/// What is remembered of these frames: a copy of the last ones, so that the others may go.
pub(super) fn remembered(x: &Tensor, frames: usize) -> EngineResult<Seen> {
    Ok(Seen::Frames(tail(x, frames)?.permute(&LAST)?.contiguous()?.permute(&FIRST)?))
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
        self.of(x, |x| Ok(x.clone()), memory)
    }

    /// Of what `make` makes of the next piece, place by place.
    pub(super) fn of(
        &self,
        x: &Tensor,
        make: impl Fn(&Tensor) -> EngineResult<Tensor>,
        memory: &mut Memory,
    ) -> EngineResult<Tensor> {
        self.by_rows(x, make, memory, |rows| in_rows(x, 1, rows))
    }

    /// The same where `join` joins the rows, which it asks for.
    fn by_rows(
        &self,
        x: &Tensor,
        make: impl Fn(&Tensor) -> EngineResult<Tensor>,
        memory: &mut Memory,
        join: impl FnOnce(&dyn Fn(Range<usize>) -> EngineResult<Tensor>) -> EngineResult<Tensor>,
    ) -> EngineResult<Tensor> {
        let before = match memory.take() {
            Seen::Frames(before) => Some(before),
            _ => None,
        };
        let mut axes = self.0.axes().to_vec();
        axes[0].before = axes[0].before.saturating_sub(before.as_ref().map_or(0, |before| before.dims()[2]));
        let y = join(&|rows: Range<usize>| {
            self.0.part(&axes, 1, x.dims()[3], rows, |seen| {
                let rows = |x: &Tensor| x.narrow(3, seen.start, seen.len());
                let made = make(&rows(x)?)?;
                match &before {
                    Some(before) => Tensor::cat(&[&rows(before)?, &made], 2),
                    None => Ok(made),
                }
            })
        })?;
        let before = before.filter(|_| x.dims()[2] < REMEMBERED);
        let last = tail(x, REMEMBERED)?;
        let last = in_rows(&last, 1, |rows| make(&last.narrow(3, rows.start, rows.len())?))?;
        memory.put(match before {
            Some(before) => remembered(&Tensor::cat(&[&before, &last], 2)?, REMEMBERED)?,
            None => remembered(&last, REMEMBERED)?,
        });
        Ok(y)
    }
}

/// Norm, SiLU and convolution, twice, beside a shortcut.
#[derive(Debug)]
pub(super) struct ResidualBlock {
    norm1: RmsNorm,
    conv1: CausalConv,
    norm2: RmsNorm,
    conv2: CausalConv,
    conv_shortcut: Option<Conv>,
}

impl ResidualBlock {
    /// `conv` makes a convolution of three taps on each axis.
    pub(super) fn new(
        params: &ParamBuilder,
        inputs: usize,
        outputs: usize,
        conv: fn(&ParamBuilder, usize, usize) -> EngineResult<CausalConv>,
    ) -> EngineResult<Self> {
        let shortcut = || Conv::new(&params.sub("conv_shortcut"), inputs, outputs, &[(1, ConvAxis::default()); 3]);
        Ok(Self {
            norm1: RmsNorm::new(&params.sub("norm1"), inputs, 3)?,
            conv1: conv(&params.sub("conv1"), inputs, outputs)?,
            norm2: RmsNorm::new(&params.sub("norm2"), outputs, 3)?,
            conv2: conv(&params.sub("conv2"), outputs, outputs)?,
            conv_shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    /// Of the next piece.
    pub(super) fn forward(&self, x: Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let h = self.conv1.of(&x, |x| self.norm1.silu(x), memory)?;
        let join = |h: &dyn Fn(Range<usize>) -> EngineResult<Tensor>| {
            over_rows(x, |x, rows| match &self.conv_shortcut {
                Some(shortcut) => shortcut.forward(x)?.add(&h(rows)?),
                None => x.add(&h(rows)?),
            })
        };
        self.conv2.by_rows(&h, |h| self.norm2.silu(h), memory, join)
    }
}
