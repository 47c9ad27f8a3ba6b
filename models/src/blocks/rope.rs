//! Tables of rotary position embeddings, made on the host.

use flowtape_engine::ops::{RopeLayout, rope};
use flowtape_engine::platform::math::{powf, sin_cos};
use flowtape_engine::{Device, Result, Tensor};
use flowtape_flowmatch::ModelInputs;

/// The numbers in which angles are computed. A reference that works in f32 is met to the last digits in f32 alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopePrecision {
    /// 32 bits.
    F32,
    /// 64 bits.
    F64,
    /// 64 bits, but angles are rounded to 32 before their cosine and sine are taken.
    RoundedAngles,
}

impl RopePrecision {
    /// Cosine and sine of `position · theta^(-2 i / dim)`.
    fn rotation(self, position: f32, theta: f64, i: usize, dim: usize) -> (f32, f32) {
        let exponent = (2 * i) as f64 / dim as f64;
        match self {
            Self::F32 => {
                let frequency = 1.0 / powf(theta as f32, exponent as f32);
                let (sin, cos) = sin_cos(position * frequency);
                (cos, sin)
            }
            Self::F64 => {
                let (sin, cos) = (f64::from(position) * theta.powf(-exponent)).sin_cos();
                (cos as f32, sin as f32)
            }
            Self::RoundedAngles => {
                let (sin, cos) = sin_cos((f64::from(position) * theta.powf(-exponent)) as f32);
                (cos, sin)
            }
        }
    }
}

/// Cosines and sines `[L, D]`, or `[B, L, D]` where samples have positions of their own, f32, each angle at both places of its
/// pair.
#[derive(Clone, Debug)]
pub struct RopeTables {
    /// Cosines.
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
    /// Which elements make a pair.
    pub layout: RopeLayout,
}

impl RopeTables {
    /// Of positions `[L, axes]` (row-major), for pairs `(2i, 2i + 1)`: axis `a` fills `axes_dim[a]` columns with
    /// `position / theta^(2i / dim)`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(
        positions: &[f32],
        axes_dim: &[usize],
        theta: f64,
        precision: RopePrecision,
        device: &Device,
    ) -> Result<Self> {
        let columns: Vec<(usize, usize)> =
            axes_dim.iter().enumerate().flat_map(|(axis, &dim)| (0..dim / 2).map(move |i| (axis, i))).collect();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions.chunks(axes_dim.len()) {
            for &(axis, i) in &columns {
                let (c, s) = precision.rotation(position[axis], theta, i, axes_dim[axis]);
                cos.extend([c; 2]);
                sin.extend([s; 2]);
            }
        }
        let dims = [positions.len() / axes_dim.len(), axes_dim.iter().sum()];
        Ok(Self {
            cos: Tensor::from_vec(cos, &dims, device)?,
            sin: Tensor::from_vec(sin, &dims, device)?,
            layout: RopeLayout::Interleaved,
        })
    }

    /// Of the places of a grid, the last axis fastest: a position axis for each axis of the grid.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn of_grid(
        grid: &[usize],
        axes_dim: &[usize],
        theta: f64,
        precision: RopePrecision,
        device: &Device,
    ) -> Result<Self> {
        Self::new(&grid_positions(grid), axes_dim, theta, precision, device)
    }

    /// Of the positions in inputs of these names, one behind the other: each `[L, axes]` or alike in all samples `[B, L, axes]`, on
    /// the device of `hidden_states`. They are read: best they are on the host.
    ///
    /// # Errors
    /// When one is missing or has another shape.
    pub fn of_ids(
        inputs: &ModelInputs,
        names: &[&str],
        axes_dim: &[usize],
        theta: f64,
    ) -> flowtape_flowmatch::Result<Self> {
        let mut positions = Vec::new();
        for name in names {
            let ids = inputs.tensor(name)?;
            let first = if ids.rank() == 3 { ids.narrow(0, 0, 1)?.squeeze(0)? } else { ids.clone() };
            if first.rank() != 2 || first.dim(1)? != axes_dim.len() {
                let expected = "positions [L, axes], an axis for each of the rotary tables";
                let got = format!("{:?} for {} axes", first.dims(), axes_dim.len());
                return Err(flowtape_flowmatch::Error::Input { name: (*name).into(), expected, got });
            }
            positions.extend(first.to_vec::<f32>()?);
        }
        let device = inputs.tensor("hidden_states")?.device();
        Ok(Self::new(&positions, axes_dim, theta, RopePrecision::F64, device)?)
    }

    /// Tables of each sample: `[B, L, D]` of B tables `[L, D]`; where they are one, that.
    ///
    /// # Errors
    /// When there is none, or they differ in length.
    pub fn of_samples(samples: &[Self]) -> Result<Self> {
        match samples {
            [one] => Ok(one.clone()),
            _ => Self::joined(samples, |tables| Tensor::stack(tables, 0)),
        }
    }

    /// Tables of `samples` samples that stand one behind the other, each with as many places; of one sample they stay as they are.
    ///
    /// # Errors
    /// When the places can't be shared out.
    pub fn per_sample(&self, samples: usize) -> Result<Self> {
        if samples == 1 {
            return Ok(self.clone());
        }
        let split = |table: &Tensor| table.reshape(&[samples, table.dim(0)? / samples.max(1), table.dim(1)?]);
        Ok(Self { cos: split(&self.cos)?, sin: split(&self.sin)?, layout: self.layout })
    }

    /// The tables of places one behind the other. Where some are `[B, L, D]`, so is the result.
    ///
    /// # Errors
    /// When there is none, or they do not fit.
    pub fn cat(parts: &[Self]) -> Result<Self> {
        Self::joined(parts, |tables| {
            let Some(samples) = tables.iter().find(|t| t.rank() == 3).map(|t| t.dims()[0]) else {
                return Tensor::cat(tables, 0);
            };
            let each =
                |t: &&Tensor| if t.rank() == 3 { Ok((*t).clone()) } else { t.expand(&[&[samples], t.dims()].concat()) };
            Tensor::cat(&tables.iter().map(each).collect::<Result<Vec<_>>>()?.iter().collect::<Vec<_>>(), 1)
        })
    }

    fn joined(parts: &[Self], join: impl Fn(&[&Tensor]) -> Result<Tensor>) -> Result<Self> {
        let layout = parts.first().map_or(RopeLayout::Interleaved, |part| part.layout);
        let table = |of: fn(&Self) -> &Tensor| join(&parts.iter().map(of).collect::<Vec<_>>());
        Ok(Self { cos: table(|part| &part.cos)?, sin: table(|part| &part.sin)?, layout })
    }

    /// The tables of `len` places from `start` on.
    ///
    /// # Errors
    /// When there are not as many.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        let part = |table: &Tensor| table.narrow(table.rank().saturating_sub(2), start, len);
        Ok(Self { cos: part(&self.cos)?, sin: part(&self.sin)?, layout: self.layout })
    }

    /// Rotates x `[B, H, L, D]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        // Tables of each sample have no axis of heads.
        let table =
            |table: &Tensor| if table.rank() == 3 && x.rank() == 4 { table.unsqueeze(1) } else { Ok(table.clone()) };
        rope(x, &table(&self.cos)?, &table(&self.sin)?, self.layout)
    }
}

/// Positions `[places, axes]`, row-major, of the places of a grid, the last axis fastest.
pub fn grid_positions(grid: &[usize]) -> Vec<f32> {
    // How many places one step along an axis passes.
    let stride = |axis: usize| grid[axis + 1..].iter().product::<usize>();
    let place = |i: usize| (0..grid.len()).map(move |axis| (i / stride(axis) % grid[axis]) as f32);
    (0..grid.iter().product()).flat_map(place).collect()
}

/// Positions `(0, y, x)` of the 2 x 2 tokens of latents with these sides: f32 `[H/2 W/2, 3]` on the host, where they are read.
///
/// # Errors
/// When memory runs out.
pub fn latent_image_ids(height: usize, width: usize) -> Result<Tensor> {
    let (rows, cols) = (height / 2, width / 2);
    let ids = (0..rows * cols).flat_map(|i| [0.0, (i / cols) as f32, (i % cols) as f32]).collect();
    Tensor::from_vec(ids, &[rows * cols, 3], &Device::cpu())
}
