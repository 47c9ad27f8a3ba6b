//! The vision tower of transformers' `Qwen2_5_VLForConditionalGeneration` (Bai et al. 2025), and its text model with pictures among
//! the words.

use std::path::Path;

use flowtape_engine::nn::{self, Activation, Init, Linear, Param, ParamBuilder, Params, RmsNorm};
use flowtape_engine::ops::{RopeLayout, attention};
use flowtape_engine::platform::math::{powf, sin_cos};
use flowtape_engine::{DType, Device, Result as EngineResult, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::blocks::RopeTables;
use crate::config::{check_heads, check_layers, check_sizes, object, parse, product};
use crate::text::{DecoderConfig, DecoderModel, QWEN25_VL, TextModel, TextModelOutput, activation, open};
use crate::{Error, Result};

/// Epsilon of the norms.
const EPS: f64 = 1e-6;
/// Base of the rotations.
const THETA: f32 = 10_000.0;

/// `vision_config`, with transformers' names.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(default)]
pub struct Qwen25VisionConfig {
    /// Number of blocks.
    pub depth: usize,
    /// Width of the tower.
    pub hidden_size: usize,
    /// Width of a feed-forward layer.
    pub intermediate_size: usize,
    /// Number of heads.
    pub num_heads: usize,
    /// Channels of a picture.
    pub in_channels: usize,
    /// Sides of a patch in pixels.
    pub patch_size: usize,
    /// Sides of what becomes one token, in patches.
    pub spatial_merge_size: usize,
    /// Frames of a patch.
    pub temporal_patch_size: usize,
    /// Sides of a window in pixels.
    pub window_size: usize,
    /// Width of the text model.
    pub out_hidden_size: usize,
    /// Blocks that attend to the whole picture.
    pub fullatt_block_indexes: Vec<usize>,
    /// The function of a feed-forward layer.
    pub hidden_act: String,
}

impl Default for Qwen25VisionConfig {
    fn default() -> Self {
        Self {
            depth: 32,
            hidden_size: 1280,
            intermediate_size: 3420,
            num_heads: 16,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            out_hidden_size: 3584,
            fullatt_block_indexes: vec![7, 15, 23, 31],
            hidden_act: "silu".into(),
        }
    }
}

impl Qwen25VisionConfig {
    /// Reads and checks `vision_config`; other keys are passed over.
    ///
    /// # Errors
    /// When a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse("vision_config", "Qwen2_5_VLVisionConfig", object(value)?)?;
        check_sizes([
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("out_hidden_size", config.out_hidden_size),
            ("patch_size", config.patch_size),
            ("spatial_merge_size", config.spatial_merge_size),
            ("sizes of a patch", config.patch_width()),
            ("window_size / spatial_merge_size / patch_size", config.window()),
        ])?;
        check_heads(("hidden_size", config.hidden_size), ("num_heads", config.num_heads))?;
        check_layers(1, [("depth", config.depth)])?;
        Ok(config)
    }

    fn patch_width(&self) -> usize {
        product(&[self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size])
    }

    /// Sides of a window in tokens.
    fn window(&self) -> usize {
        self.window_size / product(&[self.spatial_merge_size, self.patch_size]).max(1)
    }
}

/// Attention within runs of patches, then a gated feed-forward layer, each normalised before.
#[derive(Clone, Debug)]
struct Block {
    norm1: RmsNorm,
    qkv: Linear,
    proj: Linear,
    norm2: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
    act: Activation,
    heads: usize,
}

impl Block {
    fn new(params: &ParamBuilder, config: &Qwen25VisionConfig) -> Result<Self> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let (attention, mlp) = (params.sub("attn"), params.sub("mlp"));
        Ok(Self {
            norm1: RmsNorm::new(&params.sub("norm1"), width, EPS)?,
            qkv: Linear::new(&attention.sub("qkv"), width, 3 * width, true)?,
            proj: Linear::new(&attention.sub("proj"), width, width, true)?,
            norm2: RmsNorm::new(&params.sub("norm2"), width, EPS)?,
            gate: Linear::new(&mlp.sub("gate_proj"), width, inner, true)?,
            up: Linear::new(&mlp.sub("up_proj"), width, inner, true)?,
            down: Linear::new(&mlp.sub("down_proj"), inner, width, true)?,
            act: activation(&config.hidden_act)?,
            heads: config.num_heads,
        })
    }

    /// x `[N, D]`; `runs` are the lengths of what attends to itself.
    fn forward(&self, x: &Tensor, rope: &RopeTables, runs: &[usize]) -> EngineResult<Tensor> {
        let (count, width) = (x.dim(0)?, x.dim(1)?);
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?;
        let qkv = qkv.reshape(&[1, count, 3, self.heads, width / self.heads])?;
        // [1, H, N, D]
        let part = |i| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2);
        let (q, k, v) = (rope.apply(&part(0)?)?, rope.apply(&part(1)?)?, part(2)?);
        let (mut start, mut attended) = (0, Vec::with_capacity(runs.len()));
        for run in runs {
            let of = |x: &Tensor| x.narrow(2, start, *run);
            attended.push(attention(&of(&q)?, &of(&k)?, &of(&v)?, None, None)?);
            start += run;
        }
        let attended =
            Tensor::cat(&attended.iter().collect::<Vec<_>>(), 2)?.transpose(1, 2)?.reshape(&[count, width])?;
        let x = x.add(&self.proj.forward(&attended)?)?;
        let h = self.norm2.forward(&x)?;
        let gated = self.act.forward(&self.gate.forward(&h)?)?.mul(&self.up.forward(&h)?)?;
        x.add(&self.down.forward(&gated)?)
    }
}

/// Frames, rows and columns of a picture in patches, as `image_grid_thw` has them.
pub type Grid = [usize; 3];

/// The vision tower.
#[derive(Debug)]
pub struct Qwen25VisionTransformer {
    config: Qwen25VisionConfig,
    patch_embed: Param,
    blocks: nn::Blocks<Block>,
    ln_q: RmsNorm,
    merge: [Linear; 2],
}

/// What the tower makes of pictures.
#[derive(Clone, Debug)]
pub struct VisionOutput {
    /// States of the patches `[N, D]` after the last block, in the order of windows.
    pub blocks_out: Tensor,
    /// Tokens `[N / merge^2, out_hidden_size]`, picture by picture, row by row.
    pub merged: Tensor,
}

impl Qwen25VisionTransformer {
    /// A tower whose parameters are the builder's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: Qwen25VisionConfig, root: &ParamBuilder) -> Result<Self> {
        let (blocks, merger) = (root.sub("blocks"), root.sub("merger"));
        let Qwen25VisionConfig { hidden_size, in_channels, patch_size, temporal_patch_size, .. } = config;
        let merged = hidden_size * config.spatial_merge_size.pow(2);
        let kernel = [hidden_size, in_channels, temporal_patch_size, patch_size, patch_size];
        Ok(Self {
            patch_embed: root.sub("patch_embed").sub("proj").get("weight", &kernel, Init::Normal { std: 0.02 })?,
            blocks: nn::Blocks::new(&blocks, config.depth, |params, _| Block::new(params, &config))?,
            ln_q: RmsNorm::new(&merger.sub("ln_q"), hidden_size, EPS)?,
            merge: [
                Linear::new(&merger.sub("mlp").sub(0), merged, merged, true)?,
                Linear::new(&merger.sub("mlp").sub(2), merged, config.out_hidden_size, true)?,
            ],
            config,
        })
    }

    /// Sides of what becomes one token, in patches.
    pub fn merge_size(&self) -> usize {
        self.config.spatial_merge_size
    }

    /// Flattened patches `[N, C T P P]` as the image processor makes them: those of a token side by side, tokens row by row, pictures one
    /// after the other.
    ///
    /// # Errors
    /// When the grids are not those of the patches.
    pub fn forward(&self, pixel_values: &Tensor, grids: &[Grid]) -> Result<VisionOutput> {
        let merge = self.config.spatial_merge_size;
        let whole = grids.iter().all(|[_, h, w]| h.is_multiple_of(merge) && w.is_multiple_of(merge));
        let (count, expected) =
            (grids.iter().map(|grid| grid.iter().product::<usize>()).sum::<usize>(), pixel_values.dims());
        if !whole || expected != [count, self.config.patch_width()] {
            let expected = format!("patches [N, {}] of whole tokens, as {grids:?} says", self.config.patch_width());
            return Err(flowtape_engine::Error::shape("pixel_values", expected, pixel_values.dims()).into());
        }
        let device = pixel_values.device();
        let weight = self.patch_embed.value()?.flatten(1, 4)?;
        let x = pixel_values.to_dtype(weight.dtype())?.matmul(&weight.t()?)?;
        let (order, windows) = self.windows(grids);
        let unit = merge * merge;
        let by_window = |x: &Tensor| {
            let index = Tensor::from_slice(&order, &[order.len()], device)?;
            let width = x.dim(1)?;
            x.reshape(&[count / unit, unit * width])?.index_select(0, &index)?.reshape(&[count, width])
        };
        let mut x = by_window(&x)?;
        let rope = self.rotations(grids, &by_window, device)?;
        let frames: Vec<usize> = grids.iter().flat_map(|[t, h, w]| vec![h * w; *t]).collect();
        for (i, block) in self.blocks.iter().enumerate() {
            let runs = if self.config.fullatt_block_indexes.contains(&i) { &frames } else { &windows };
            x = block.forward(&x, &rope, runs)?;
        }
        let h = self.ln_q.forward(&x)?.reshape(&[count / unit, unit * self.config.hidden_size])?;
        let h = self.merge[1].forward(&Activation::Gelu.forward(&self.merge[0].forward(&h)?)?)?;
        let mut back = vec![0u32; order.len()];
        order.iter().enumerate().for_each(|(place, token)| back[*token as usize] = place as u32);
        let back = Tensor::from_vec(back, &[order.len()], device)?;
        Ok(VisionOutput { blocks_out: x, merged: h.index_select(0, &back)? })
    }

    /// The order of tokens by window, and how many patches each window has.
    fn windows(&self, grids: &[Grid]) -> (Vec<u32>, Vec<usize>) {
        let (merge, side) = (self.config.spatial_merge_size, self.config.window());
        let (mut order, mut runs, mut start) = (Vec::new(), Vec::new(), 0);
        for [frames, h, w] in grids {
            let (rows, columns) = (h / merge, w / merge);
            for frame in 0..*frames {
                for (top, left) in (0..rows).step_by(side).flat_map(|y| (0..columns).step_by(side).map(move |x| (y, x)))
                {
                    let before = order.len();
                    for y in top..rows.min(top + side) {
                        let row = start + (frame * rows + y) * columns;
                        order.extend((left..columns.min(left + side)).map(|x| (row + x) as u32));
                    }
                    runs.push((order.len() - before) * merge * merge);
                }
            }
            start += frames * rows * columns;
        }
        (order, runs)
    }

    /// Rotations by row and column: each takes a half of the pairs of a head.
    fn rotations(
        &self,
        grids: &[Grid],
        by_window: &dyn Fn(&Tensor) -> EngineResult<Tensor>,
        device: &Device,
    ) -> EngineResult<RopeTables> {
        let merge = self.config.spatial_merge_size;
        let dim = self.config.hidden_size / self.config.num_heads;
        let pairs = dim / 4;
        let frequency = |i: usize| 1.0 / powf(THETA, (2 * i) as f32 / (dim / 2) as f32);
        let frequencies: Vec<f32> = (0..pairs).map(frequency).collect();
        let mut angles = Vec::new();
        for [frames, h, w] in grids {
            for _ in 0..*frames {
                for token in 0..h / merge * (w / merge) {
                    let (y, x) = (token / (w / merge) * merge, token % (w / merge) * merge);
                    for (y, x) in (0..merge).flat_map(|i| (0..merge).map(move |j| (y + i, x + j))) {
                        let half = [y, x].into_iter().flat_map(|at| frequencies.iter().map(move |f| at as f32 * f));
                        angles.extend(half.clone().chain(half));
                    }
                }
            }
        }
        let count = angles.len() / (4 * pairs).max(1);
        let table = |function: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|angle| function(*angle)).collect();
            by_window(&Tensor::from_vec(values, &[count, 4 * pairs], device)?)
        };
        Ok(RopeTables { cos: table(|x| sin_cos(x).1)?, sin: table(|x| sin_cos(x).0)?, layout: RopeLayout::Split })
    }
}

/// How the tokens of a picture count as positions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Positions {
    /// One after the other, as words: what diffusers' pipelines come to.
    Plain,
    /// By frame, row and column, as the model was trained: what follows counts on from the greatest.
    Multimodal,
}

/// Qwen2.5-VL without the head that predicts tokens.
#[derive(Debug)]
pub struct Qwen25VL {
    visual: Qwen25VisionTransformer,
    language: DecoderModel,
    image_token: u32,
}

impl Qwen25VL {
    /// Loads a transformers folder, frozen. It computes in `dtype`, or in what its file suggests.
    ///
    /// # Errors
    /// When a file can't be read, or keys do not fit.
    pub fn load(folder: &Path, dtype: Option<DType>, device: &Device) -> Result<Self> {
        let (config, weights, params) = open(folder, "", dtype, device)?;
        let image_token = config["image_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
        let language = DecoderModel::new(DecoderConfig::from_json(&config, QWEN25_VL)?, QWEN25_VL, &params)?;
        // transformers 5 has the tower inside of the model.
        let outer = params.sub("visual").sub("patch_embed").sub("proj").stored_dims("weight").is_some();
        let tower = if outer { params.sub("visual") } else { params.sub("model").sub("visual") };
        let model = Self {
            visual: Qwen25VisionTransformer::new(Qwen25VisionConfig::from_json(&config["vision_config"])?, &tower)?,
            language,
            image_token: image_token.ok_or_else(|| Error::config("image_token_id", "a token", "none"))?,
        };
        let both: Params = params.params();
        both.check_keys(&weights, |name| name.starts_with("lm_head"))
            .map_err(|error| Error::Model { model: QWEN25_VL.class.to_owned(), source: Box::new(error) })?;
        Ok(model)
    }

    /// The vision tower.
    pub fn visual(&self) -> &Qwen25VisionTransformer {
        &self.visual
    }

    /// The text model.
    pub fn language(&self) -> &dyn TextModel {
        &self.language
    }

    /// The token that stands for a part of a picture.
    pub fn image_token(&self) -> u32 {
        self.image_token
    }

    /// States of one text's tokens `[1, T]`, among which stand those of pictures ([`Self::image_token`]), as many as `merged` `[M, D]` has
    /// rows.
    ///
    /// # Errors
    /// When there are not as many.
    pub fn forward(
        &self,
        ids: &[u32],
        merged: &Tensor,
        grids: &[Grid],
        positions: Positions,
    ) -> Result<TextModelOutput> {
        let places: Vec<usize> = (0..ids.len()).filter(|i| ids[*i] == self.image_token).collect();
        if places.len() != merged.dim(0)? {
            let got = format!("{} of them for {} rows", places.len(), merged.dim(0)?);
            return Err(Error::config("input_ids", "as many tokens of pictures as the vision tower gives", got));
        }
        let device = merged.device();
        let words = self.language.embed(&Tensor::from_slice(ids, &[1, ids.len()], device)?)?.squeeze(0)?;
        // Words first, pictures behind them; then each token from where it lies.
        let all = Tensor::cat(&[&words, &merged.to_dtype(words.dtype())?], 0)?;
        let mut from: Vec<u32> = (0..ids.len() as u32).collect();
        places.iter().enumerate().for_each(|(row, place)| from[*place] = (ids.len() + row) as u32);
        let embedded = all.index_select(0, &Tensor::from_vec(from, &[ids.len()], device)?)?.unsqueeze(0)?;
        let positions = match positions {
            Positions::Plain => (0..ids.len()).map(|i| [i as f32; 3]).collect(),
            Positions::Multimodal => self.positions(ids, grids),
        };
        self.language.run(embedded, None, &positions)
    }

    /// Positions by frame, row and column.
    pub fn positions(&self, ids: &[u32], grids: &[Grid]) -> Vec<[f32; 3]> {
        let merge = self.visual.config.spatial_merge_size;
        let (mut out, mut next, mut grids) = (Vec::with_capacity(ids.len()), 0, grids.iter());
        while out.len() < ids.len() {
            match (ids[out.len()] == self.image_token).then(|| grids.next()).flatten() {
                Some([frames, h, w]) => {
                    let (rows, columns) = (h / merge, w / merge);
                    let place =
                        |i: usize| [i / (rows * columns), i / columns % rows, i % columns].map(|at| (next + at) as f32);
                    out.extend((0..frames * rows * columns).map(place));
                    next += rows.max(columns).max(*frames);
                }
                None => {
                    out.push([next as f32; 3]);
                    next += 1;
                }
            }
        }
        out.truncate(ids.len());
        out
    }
}
