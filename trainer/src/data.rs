//! What a run trains on: still or moving digits, with captions.

use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_flowmatch::{Batch, DataType};

use crate::digits::{CAPTIONS, Digits, SIDE};
use crate::moving::VideoSize;
use crate::recipe::DataConfig;
use crate::text::TokenTable;
use crate::{Error, Result};

/// Streams of random numbers of a source, each its own fork of its seed.
const MOTION: u64 = 1;
const DROPOUT: u64 = 2;

/// Samples with captions. Every batch follows from the seed and its place, so a resumed run sees what an uninterrupted
/// one would have seen.
#[derive(Clone, Debug)]
pub struct Data {
    /// The still digits.
    pub digits: Digits,
    /// Sizes of the videos, where digits move.
    pub video: Option<VideoSize>,
    table: TokenTable,
    caption_dropout_prob: f64,
    random: Philox,
}

impl Data {
    /// The source of a recipe.
    ///
    /// # Errors
    /// When the embedded data is damaged.
    pub fn new(config: &DataConfig, seed: u64) -> Result<Self> {
        Ok(Self {
            digits: Digits::load(seed)?,
            video: config.video,
            table: TokenTable::new(&CAPTIONS, config.text_dim),
            caption_dropout_prob: config.caption_dropout_prob,
            random: Philox::new(seed),
        })
    }

    /// Sizes of `n` samples: `[n, C, H, W]` or `[n, C, F, H, W]`.
    pub fn dims(&self, n: usize) -> Vec<usize> {
        match self.video {
            Some(VideoSize { frames, height, width }) => vec![n, 1, frames, height, width],
            None => vec![n, 1, SIDE, SIDE],
        }
    }

    fn data_type(&self) -> DataType {
        if self.video.is_some() { DataType::Video } else { DataType::Image }
    }

    /// The samples `from..from + size` of the endless sequence of shuffled epochs.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn batch(&self, from: usize, size: usize, device: &Device) -> Result<Batch> {
        let (mut pixels, mut captions) = (Vec::new(), Vec::with_capacity(size));
        for (place, index) in (from..).zip(self.digits.sequence(from, size)) {
            let digit = self.digits.image(index);
            match &self.video {
                Some(video) => pixels.extend(video.animate(digit, &mut self.random.fork(MOTION).fork(place as u64))),
                None => pixels.extend_from_slice(digit),
            }
            let drop = self.random.fork(DROPOUT).fork(place as u64).next_f64() < self.caption_dropout_prob;
            captions.push((!drop).then_some(CAPTIONS[usize::from(self.digits.labels[index])]));
        }
        let latents = Tensor::from_vec(pixels, &self.dims(size), device)?;
        self.table.embed(Batch::new(latents, self.data_type()), &captions)
    }

    /// What samples are conditioned on: one prompt each (none: a dropped caption) and, for image-to-video, the first frame
    /// of each; the latents are zero but for it.
    ///
    /// # Errors
    /// When a prompt has an unknown word.
    pub fn conditioning(
        &self,
        prompts: &[Option<&str>],
        first_frames: Option<&[f32]>,
        dtype: DType,
        device: &Device,
    ) -> Result<Batch> {
        let dims = self.dims(prompts.len());
        let latents = match (first_frames, self.video) {
            (Some(frames), Some(video)) => {
                let mut pixels = vec![0f32; prompts.len() * video.pixels()];
                let starts = pixels.chunks_exact_mut(video.pixels()).zip(frames.chunks_exact(video.frame()));
                starts.for_each(|(sample, frame)| sample[..video.frame()].copy_from_slice(frame));
                Tensor::from_vec(pixels, &dims, device)?.to_dtype(dtype)?
            }
            _ => Tensor::zeros(&dims, dtype, device)?,
        };
        self.table.embed(Batch::new(latents, self.data_type()), prompts)
    }

    /// First frames of videos of these classes, one after the other.
    ///
    /// # Errors
    /// When the samples are no videos.
    pub fn first_frames(&self, classes: &[u8], seed: u64) -> Result<Vec<f32>> {
        let video = self.video.ok_or_else(|| Error::Recipe {
            path: "data.video".into(),
            what: "image-to-video needs a source of videos, such as moving_digits".into(),
        })?;
        let mut random = Philox::new(seed);
        let mut frames = Vec::new();
        for class in classes {
            let of_class: Vec<usize> = (0..self.digits.len()).filter(|i| self.digits.labels[*i] == *class).collect();
            let index = of_class[(random.next_f64() * of_class.len() as f64) as usize];
            frames.extend_from_slice(&video.animate(self.digits.image(index), &mut random)[..video.frame()]);
        }
        Ok(frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_its_place_in_the_sequence() -> Result<()> {
        let video = Some(VideoSize { frames: 3, height: 10, width: 9 });
        let config = DataConfig { video, caption_dropout_prob: 0.5, ..DataConfig::digits(4) };
        let (data, cpu) = (Data::new(&config, 7)?, Device::cpu());
        let (all, rest) = (data.batch(1790, 14, &cpu)?, data.batch(1797, 7, &cpu)?);
        assert_eq!(all.latents.dims(), [14, 1, 3, 10, 9]);
        let tail =
            |b: &Batch, key: &str| b.require(key).and_then(|t| Ok(t.narrow(0, t.dim(0)? - 7, 7)?.to_vec::<f32>()?));
        assert_eq!(all.latents.narrow(0, 7, 7)?.to_vec::<f32>()?, rest.latents.to_vec::<f32>()?);
        assert_eq!(tail(&all, "text_embeddings")?, tail(&rest, "text_embeddings")?);
        // Half of the captions are dropped: zero, with all their tensors.
        let text = data.batch(0, 200, &cpu)?;
        let zero = |key: &str| -> Result<usize> {
            let values = text.require(key)?.to_vec::<f32>()?;
            Ok(values.chunks(values.len() / 200).filter(|c| c.iter().all(|v| *v == 0.0)).count())
        };
        let dropped = zero("text_embeddings")?;
        assert!((70..130).contains(&dropped), "{dropped}");
        assert_eq!((zero("pooled_prompt_embeds")?, zero("text_embeddings_2")?), (dropped, dropped));
        Ok(())
    }

    #[test]
    fn a_first_frame_is_a_digit_of_its_class() -> Result<()> {
        let video = VideoSize { frames: 2, height: 12, width: 12 };
        let data = Data::new(&DataConfig { video: Some(video), ..DataConfig::digits(4) }, 1)?;
        let frames = data.first_frames(&[3, 8], 5)?;
        for (frame, class) in frames.chunks_exact(video.frame()).zip([3, 8]) {
            let real = |crop: Vec<f32>| (0..data.digits.len()).find(|i| data.digits.image(*i) == crop);
            let found = video.crops(frame).find_map(|c| real(c.pixels())).unwrap();
            assert_eq!(data.digits.labels[found], class);
        }
        let batch =
            data.conditioning(&[Some("a handwritten three"), None], Some(&frames), DType::F32, &Device::cpu())?;
        let latents = batch.latents.to_vec::<f32>()?;
        assert_eq!(latents[..144], frames[..144]);
        assert!(latents[144..288].iter().all(|v| *v == 0.0));
        assert!(Data::new(&DataConfig::digits(4), 1)?.first_frames(&[1], 0).is_err());
        Ok(())
    }
}
