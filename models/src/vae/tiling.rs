//! Pictures in tiles, and clips in parts, that overlap and are blended, as diffusers does it: memory is bounded by the size of a tile.

use flowtape_engine::Tensor;
use flowtape_engine::ops::pointwise;
use serde_json::Value;

use super::Autoencoder;
use crate::{Error, Result};

/// How pictures are cut, with the arguments of diffusers' `enable_tiling`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Tiling {
    /// Neighbours share a part of a tile.
    Overlap {
        /// Height and width of a tile, in pixels.
        tile: [usize; 2],
        /// The same in latents, where it does not follow from the pixels.
        latent_tile: Option<[usize; 2]>,
        /// What neighbours share, in tiles.
        factor: f64,
    },
    /// Tiles begin at multiples of a stride.
    Stride {
        /// Height and width of a tile, in pixels.
        tile: [usize; 2],
        /// From one tile to the next, in pixels.
        stride: [usize; 2],
    },
}

impl Tiling {
    /// Tiles of `size` x `size` pixels that share a quarter.
    pub fn square(size: usize) -> Self {
        Self::Overlap { tile: [size; 2], latent_tile: None, factor: 0.25 }
    }

    /// From the arguments of `enable_tiling`, by their names.
    ///
    /// # Errors
    /// When an argument is missing, unknown or not a number.
    pub fn from_json(arguments: &Value) -> Result<Self> {
        let wrong = || {
            let expected = "tile_sample_min_size, or tile_sample_min_height and tile_sample_min_width, with \
                            tile_overlap_factor or both tile_sample_strides";
            Error::config("tiling", expected, arguments)
        };
        let number = |key: &str| arguments[key].as_u64().and_then(|n| usize::try_from(n).ok());
        let pair = |name: &str| {
            let side = |side: &str| number(&format!("tile_{name}_{side}"));
            Some([side("height")?, side("width")?])
        };
        let tile = pair("sample_min").or_else(|| Some([number("tile_sample_min_size")?; 2])).ok_or_else(wrong)?;
        match (arguments["tile_overlap_factor"].as_f64(), pair("sample_stride")) {
            (Some(factor), None) => Ok(Self::Overlap { tile, latent_tile: pair("latent_min"), factor }),
            (None, Some(stride)) => Ok(Self::Stride { tile, stride }),
            _ => Err(wrong()),
        }
    }

    /// Tiles of pixels and of latents, for an encoder that makes sides `ratio` times smaller.
    ///
    /// # Errors
    /// When a tile has less than one latent, or tiles do not go on.
    pub(super) fn tiles(&self, ratio: usize) -> Result<Sides> {
        let each = |f: &dyn Fn(usize) -> Tiles| [f(0), f(1)];
        let sides = match *self {
            Self::Overlap { tile, latent_tile, factor } => {
                let latent = |i: usize| latent_tile.map_or(tile[i] / ratio, |latents| latents[i]);
                // Python's int() of a product.
                let part = |size: usize, factor: f64| (size as f64 * factor) as usize;
                let tiles = |from: usize, to: usize| {
                    let blend = part(to, factor);
                    Tiles { size: from, step: part(from, 1.0 - factor), blend, keep: to.saturating_sub(blend) }
                };
                Sides { pixels: each(&|i| tiles(tile[i], latent(i))), latents: each(&|i| tiles(latent(i), tile[i])) }
            }
            Self::Stride { tile, stride } => {
                let tiles = |size: usize, step: usize, to_size: usize, keep: usize| Tiles {
                    size,
                    step,
                    blend: to_size.saturating_sub(keep),
                    keep,
                };
                let latents = |i: usize| (tile[i] / ratio, stride[i] / ratio);
                Sides {
                    pixels: each(&|i| tiles(tile[i], stride[i], latents(i).0, latents(i).1)),
                    latents: each(&|i| tiles(latents(i).0, latents(i).1, tile[i], stride[i])),
                }
            }
        };
        let goes_on = |tiles: &Tiles| tiles.size > 0 && tiles.step > 0 && tiles.keep > 0;
        if !sides.pixels.iter().chain(&sides.latents).all(goes_on) {
            let expected = format!("tiles and strides of at least {ratio} pixels, the side of a latent");
            return Err(Error::config("tiling", expected, format!("{self:?}")));
        }
        Ok(sides)
    }
}

/// How clips are cut along time: diffusers' `use_framewise_decoding`, with the arguments of its `enable_tiling`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameTiling {
    /// Frames of a part.
    pub tile: usize,
    /// From one part to the next.
    pub stride: usize,
}

impl FrameTiling {
    /// Parts of so many frames that share a half.
    pub fn of(frames: usize) -> Self {
        Self { tile: frames, stride: frames / 2 }
    }

    /// From the arguments of `enable_tiling`, by their names.
    ///
    /// # Errors
    /// When an argument is missing or no whole number.
    pub fn from_json(arguments: &Value) -> Result<Self> {
        let number = |key: &'static str| {
            let number = arguments[key].as_u64().and_then(|n| usize::try_from(n).ok());
            number.ok_or_else(|| Error::config(key, "a number of frames", &arguments[key]))
        };
        Ok(Self { tile: number("tile_sample_min_num_frames")?, stride: number("tile_sample_stride_num_frames")? })
    }

    /// Parts of frames and of latents, for an encoder that makes one latent of `ratio` frames.
    ///
    /// # Errors
    /// When these are no whole latents, or parts do not go on.
    pub(super) fn tiles(&self, ratio: usize) -> Result<[Tiles; 2]> {
        let Self { tile, stride } = *self;
        let whole = |frames: usize| frames > 0 && frames.is_multiple_of(ratio);
        if !whole(tile) || !whole(stride) || stride > tile {
            let expected = format!("parts and strides of {ratio} frames or multiples, the stride at most a part");
            return Err(Error::config("tiling", expected, format!("{self:?}")));
        }
        let tiles = |size, step, to, keep| Tiles { size, step, blend: to - keep, keep };
        let latents = [tile / ratio, stride / ratio];
        Ok([tiles(tile, stride, latents[0], latents[1]), tiles(latents[0], latents[1], tile, stride)])
    }
}

/// How much of a picture or film an autoencoder takes at once, so that memory is bounded; all of it where nothing is said.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TileSizes {
    /// Pixels a side of tiles, which share a quarter.
    pub side: Option<usize>,
    /// Frames of parts, which share a half, where frames do not pass one after the other anyway.
    pub frames: Option<usize>,
}

impl TileSizes {
    /// Lets an autoencoder work so.
    ///
    /// # Errors
    /// When a tile or part is no whole number of its latents.
    pub fn apply(self, autoencoder: &mut dyn Autoencoder) -> Result<()> {
        autoencoder.set_tiling(self.side.map(Tiling::square))?;
        autoencoder.set_frame_tiling(self.frames.map(FrameTiling::of))
    }
}

/// Which end of what is made of a part, but for the first one, is left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Spare {
    First,
    Last,
}

/// Makes `[B, C, T, H, W]` part by part, each with a frame (or latent) more than its size, and blends each with the one before, as that is
/// after its own blending.
///
/// # Errors
/// Those of `make`.
pub(super) fn run_frames(
    x: &Tensor,
    tiles: &Tiles,
    spare: Spare,
    make: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    const TIME: usize = 2;
    let frames = x.dims()[TIME];
    let (mut before, mut kept): (Option<Tensor>, Vec<Tensor>) = (None, Vec::new());
    for start in (0..frames).step_by(tiles.step) {
        let count = (tiles.size + 1).min(frames - start);
        // The others have one more than they add.
        if count == 1 && before.is_some() {
            break;
        }
        let mut part = make(&x.narrow(TIME, start, count)?)?;
        let mut keep = tiles.keep + 1;
        if let Some(before) = &before {
            let from = usize::from(spare == Spare::First);
            part = blended(before, &part.narrow(TIME, from, part.dims()[TIME] - 1)?, TIME, tiles.blend)?;
            keep = tiles.keep;
        }
        kept.push(part.narrow(TIME, 0, keep.min(part.dims()[TIME]))?.contiguous()?);
        before = Some(part);
    }
    Ok(Tensor::cat(&kept.iter().collect::<Vec<_>>(), TIME)?)
}

/// Tiles for encoding and decoding, height then width.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sides {
    pub pixels: [Tiles; 2],
    pub latents: [Tiles; 2],
}

/// Tiles along one axis: sizes of what is cut, then of what is made of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    /// Of a tile, before.
    pub size: usize,
    /// From tile to tile, before.
    pub step: usize,
    /// What neighbours share, after.
    pub blend: usize,
    /// What is kept of a tile, after.
    pub keep: usize,
}

/// Whether `[.., H, W]` is more than one tile.
pub(super) fn exceeds(x: &Tensor, tiles: &[Tiles; 2]) -> bool {
    x.dims().iter().rev().zip(tiles.iter().rev()).any(|(size, tile)| *size > tile.size)
}

/// Makes `[.., H, W]` tile by tile where there are tiles and it is more than one, else at once.
///
/// # Errors
/// Those of `make`.
pub(super) fn tiled(x: &Tensor, tiles: Option<[Tiles; 2]>, make: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    match tiles.filter(|tiles| exceeds(x, tiles)) {
        Some(tiles) => run(x, &tiles, make),
        None => make(x),
    }
}

/// Makes `[.., H, W]` tile by tile. Each is blended with the one above, then with the one on its left, both as they are after
/// their own blending.
///
/// # Errors
/// Those of `make`.
pub(super) fn run(x: &Tensor, tiles: &[Tiles; 2], make: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let [down, right] = [x.rank() - 2, x.rank() - 1];
    let part = |axis: usize, x: &Tensor, tile: &Tiles, start: usize| {
        x.narrow(axis, start, tile.size.min(x.dims()[axis] - start))
    };
    let kept = |axis: usize, x: &Tensor, tile: &Tiles| x.narrow(axis, 0, tile.keep.min(x.dims()[axis]));
    let (mut above, mut rows): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
    for i in (0..x.dims()[down]).step_by(tiles[0].step) {
        let strip = part(down, x, &tiles[0], i)?;
        let (mut row, mut results): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for (column, j) in (0..x.dims()[right]).step_by(tiles[1].step).enumerate() {
            let mut tile = make(&part(right, &strip, &tiles[1], j)?)?;
            if let Some(neighbour) = above.get(column) {
                tile = blended(neighbour, &tile, down, tiles[0].blend)?;
            }
            if let Some(neighbour) = row.last() {
                tile = blended(neighbour, &tile, right, tiles[1].blend)?;
            }
            results.push(kept(right, &kept(down, &tile, &tiles[0])?, &tiles[1])?);
            row.push(tile);
        }
        rows.push(Tensor::cat(&results.iter().collect::<Vec<_>>(), right)?);
        above = row;
    }
    Ok(Tensor::cat(&rows.iter().collect::<Vec<_>>(), down)?)
}

/// `[.., H, W]` without what exceeds these sides.
pub(super) fn cut(x: &Tensor, sides: [usize; 2]) -> Result<Tensor> {
    let [down, right] = [x.rank() - 2, x.rank() - 1];
    let [height, width] = [sides[0].min(x.dims()[down]), sides[1].min(x.dims()[right])];
    Ok(x.narrow(down, 0, height)?.narrow(right, 0, width)?)
}

/// `b`, its first `extent` places along an axis mixed with the last ones of `a`: the first is all of `a`.
pub(super) fn blended(a: &Tensor, b: &Tensor, axis: usize, extent: usize) -> Result<Tensor> {
    let extent = extent.min(a.dims()[axis]).min(b.dims()[axis]);
    if extent == 0 {
        return Ok(b.clone());
    }
    let mut dims = vec![1; b.rank()];
    dims[axis] = extent;
    let shares = |f: &dyn Fn(f64) -> f64| -> Result<Tensor> {
        let shares: Vec<f32> = (0..extent).map(|i| f(i as f64 / extent as f64) as f32).collect();
        Ok(Tensor::from_slice(&shares, &dims, b.device())?.to_dtype(b.dtype())?)
    };
    let (of_a, of_b) = (shares(&|share| 1.0 - share)?, shares(&|share| share)?);
    let (end, start) = (a.narrow(axis, a.dims()[axis] - extent, extent)?, b.narrow(axis, 0, extent)?);
    let mixed = pointwise([&end, &of_a, &start, &of_b], |[a, p, b, q]| a * p + b * q)?;
    Ok(Tensor::cat(&[&mixed, &b.narrow(axis, extent, b.dims()[axis] - extent)?], axis)?)
}
