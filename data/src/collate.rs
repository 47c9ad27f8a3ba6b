//! From samples to a batch on the device.

use std::collections::BTreeMap;
use std::sync::Arc;

use flowtape_engine::{Device, Philox, Tensor};
use flowtape_flowmatch::{Batch, DataType};

use crate::{Error, LatentCodec, Loaded, Media, Result, Sample, Text, TextEmbeddings, TextEncoder};

/// The stream of draws that drop captions: a fork of the seed, and of it one for each place in the sequence.
const DROPOUT: u64 = 2;

/// Puts samples side by side, on the device, and encodes what is not encoded yet.
#[derive(Clone)]
pub struct Collator {
    /// Pixels to latents.
    pub codec: Arc<dyn LatentCodec>,
    /// Captions to embeddings.
    pub text: Arc<dyn TextEncoder>,
    /// Share of the samples whose caption is dropped, for classifier-free guidance.
    pub caption_dropout_prob: f64,
    /// Which are dropped follows from it and from their places.
    pub seed: u64,
}

impl Collator {
    /// The batch of loaded samples.
    ///
    /// # Errors
    /// When samples do not fit together, a caption is not taken, or memory runs out.
    pub fn batch(&self, loaded: &Loaded, device: &Device) -> Result<Batch> {
        let samples = &loaded.samples;
        let media: Vec<&Tensor> = samples.iter().map(|sample| sample.media.tensor()).collect();
        let tensor = stack("media", &media, device)?;
        let encoded = samples.iter().filter(|sample| matches!(sample.media, Media::Latents(_))).count();
        let latents = match encoded {
            0 => self.codec.encode(&tensor)?,
            n if n == samples.len() => tensor,
            n => {
                return Err(Error::batch(
                    "media",
                    "pixels alone or latents alone",
                    format!("{n} of {}", samples.len()),
                ));
            }
        };
        let dropout = Philox::new(self.seed).fork(DROPOUT);
        let dropped: Vec<bool> = loaded
            .plan
            .picks
            .iter()
            .map(|pick| dropout.fork(pick.place).next_f64() < self.caption_dropout_prob)
            .collect();
        let text = self.text(samples, &dropped, device)?;
        let data_type = data_type(latents.dims())?;
        let mut batch = text.into_batch(Batch::new(latents, data_type));
        let mut lists = BTreeMap::<&str, BTreeMap<usize, Tensor>>::new();
        for name in names(samples, |sample| sample.tensors.keys())? {
            let tensors: Vec<&Tensor> = samples.iter().filter_map(|sample| sample.tensors.get(name)).collect();
            let tensor = stack(name, &tensors, device)?;
            // `context_latents.0`, `.1`, … are a list.
            match name.rsplit_once('.').and_then(|(list, number)| Some((list, number.parse::<usize>().ok()?))) {
                Some((list, number)) => drop(lists.entry(list).or_default().insert(number, tensor)),
                None => batch = batch.with(name, tensor),
            }
        }
        for (list, tensors) in lists {
            batch = batch.with_list(list, tensors.into_values().collect());
        }
        Ok(batch)
    }

    fn text(&self, samples: &[Sample], dropped: &[bool], device: &Device) -> Result<TextEmbeddings> {
        let captions: Vec<Option<&str>> = samples
            .iter()
            .zip(dropped)
            .filter_map(|(sample, drop)| match &sample.text {
                Text::Caption(caption) => Some((!drop).then_some(caption.as_str())),
                Text::Embeddings(_) => None,
            })
            .collect();
        if captions.len() == samples.len() {
            return self.text.encode(&captions, device);
        }
        let embeddings: Vec<&TextEmbeddings> = samples
            .iter()
            .filter_map(|sample| match &sample.text {
                Text::Caption(_) => None,
                Text::Embeddings(embeddings) => Some(embeddings),
            })
            .collect();
        if embeddings.len() != samples.len() {
            return Err(Error::batch(
                "text",
                "captions alone or embeddings alone",
                format!("{} captions of {}", captions.len(), samples.len()),
            ));
        }
        let mut all = TextEmbeddings::default();
        for name in names(&embeddings, |embeddings| embeddings.tensors.keys())? {
            let tensors = embeddings.iter().zip(dropped).filter_map(|(embeddings, drop)| {
                let tensor = embeddings.tensors.get(name)?;
                Some(if *drop && !name.contains("mask") {
                    Tensor::zeros(tensor.dims(), tensor.dtype(), tensor.device())
                } else {
                    Ok(tensor.clone())
                })
            });
            let tensors = padded(tensors.collect::<Result<Vec<Tensor>, _>>()?)?;
            all = all.with(name, stack(name, &tensors.iter().collect::<Vec<_>>(), device)?);
        }
        Ok(all)
    }
}

/// What latents are, by their axes.
///
/// # Errors
/// When they are neither `[B, C, H, W]` nor `[B, C, F, H, W]`.
pub fn data_type(latents: &[usize]) -> Result<DataType> {
    match latents.len() {
        4 => Ok(DataType::Image),
        5 => Ok(DataType::Video),
        _ => Err(Error::batch("latents", "[B, C, H, W] or [B, C, F, H, W]", format!("{latents:?}"))),
    }
}

/// Texts `[T, ..]`, padded with zeros to the longest.
pub(crate) fn padded(tensors: Vec<Tensor>) -> Result<Vec<Tensor>> {
    let length = |tensor: &Tensor| tensor.dims().first().copied().unwrap_or(1);
    let longest = tensors.iter().map(length).max().unwrap_or(0);
    let pad = |tensor: Tensor| match longest - length(&tensor) {
        0 => Ok(tensor),
        missing => Ok(tensor.pad(0, 0, missing)?),
    };
    tensors.into_iter().map(pad).collect()
}

/// Tensors side by side along a new first axis, on the device.
fn stack(name: &str, tensors: &[&Tensor], device: &Device) -> Result<Tensor> {
    let kind = |tensor: &Tensor| format!("{} {:?}", tensor.dtype(), tensor.dims());
    if let Some(other) = tensors.iter().find(|t| kind(t) != kind(tensors[0])) {
        return Err(Error::batch(name, format!("{} in all samples of a batch", kind(tensors[0])), kind(other)));
    }
    Ok(Tensor::stack(tensors, 0)?.to_device(device)?)
}

/// The names that all of these have.
fn names<'a, T, N: Iterator<Item = &'a String>>(all: &'a [T], of: impl Fn(&'a T) -> N) -> Result<Vec<&'a str>> {
    let mut lists = all.iter().map(|one| of(one).map(String::as_str).collect::<Vec<_>>());
    let first = lists.next().unwrap_or_default();
    match lists.find(|names| *names != first) {
        Some(other) => {
            Err(Error::batch("tensors", format!("{first:?} in all samples of a batch"), format!("{other:?}")))
        }
        None => Ok(first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BatchPlan, Cursor, Pick, PixelCodec};

    /// The number of letters, or -1 for a dropped caption.
    struct Lengths;

    impl TextEncoder for Lengths {
        fn encode(&self, captions: &[Option<&str>], device: &Device) -> Result<TextEmbeddings> {
            let lengths: Vec<f32> = captions.iter().map(|c| c.map_or(-1.0, |c| c.len() as f32)).collect();
            Ok(TextEmbeddings::default()
                .with("text_embeddings", Tensor::from_vec(lengths, &[captions.len(), 1, 1], device)?))
        }
    }

    /// Twice the pixels.
    struct Twice;

    impl LatentCodec for Twice {
        fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
            Ok(pixels.mul_scalar(2.0)?)
        }

        fn decode(&self, latents: &Tensor) -> Result<Tensor> {
            Ok(latents.mul_scalar(0.5)?)
        }

        fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
            pixels.to_vec()
        }
    }

    fn collator(codec: impl LatentCodec + 'static, caption_dropout_prob: f64) -> Collator {
        Collator { codec: Arc::new(codec), text: Arc::new(Lengths), caption_dropout_prob, seed: 4 }
    }

    fn loaded(samples: Vec<Sample>) -> Loaded {
        let picks = (0..samples.len()).map(|index| Pick { index, place: index as u64 }).collect();
        Loaded { plan: BatchPlan { picks, next: Cursor::default() }, samples }
    }

    fn tensor(values: &[f32], dims: &[usize]) -> Tensor {
        Tensor::from_slice(values, dims, &Device::cpu()).unwrap()
    }

    fn values(batch: &Batch, name: &str) -> Vec<f32> {
        batch.require(name).unwrap().to_vec::<f32>().unwrap()
    }

    #[test]
    fn pixels_and_captions_are_encoded_and_ready_made_ones_are_taken() {
        let cpu = Device::cpu();
        let dims = [1, 1, 2];
        let caption =
            |pixels: &[f32], text: &str| Sample::new(Media::Pixels(tensor(pixels, &dims)), Text::Caption(text.into()));
        let raw = loaded(vec![caption(&[1.0, 2.0], "ab"), caption(&[3.0, 4.0], "abc")]);
        let batch = collator(Twice, 0.0).batch(&raw, &cpu).unwrap();
        assert_eq!((batch.latents.dims(), batch.data_type.as_str()), (&[2, 1, 1, 2][..], "image"));
        assert_eq!(batch.latents.to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0, 8.0]);
        assert_eq!(values(&batch, "text_embeddings"), [2.0, 3.0]);
        assert_eq!(values(&collator(Twice, 1.0).batch(&raw, &cpu).unwrap(), "text_embeddings"), [-1.0, -1.0]);

        let ready = |latents: &[f32], text: f32| {
            let embeddings = TextEmbeddings::default().with("text_embeddings", tensor(&[text], &[1, 1]));
            let mut sample = Sample::new(Media::Latents(tensor(latents, &[1, 1, 1, 2])), Text::Embeddings(embeddings));
            sample.tensors.insert("loss_mask".into(), tensor(&[text + 1.0], &[1]));
            sample
        };
        let ready = loaded(vec![ready(&[1.0, 2.0], 7.0), ready(&[3.0, 4.0], 8.0)]);
        let batch = collator(Twice, 0.0).batch(&ready, &cpu).unwrap();
        assert_eq!(batch.latents.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(batch.data_type.as_str(), "video");
        assert_eq!((values(&batch, "text_embeddings"), values(&batch, "loss_mask")), (vec![7.0, 8.0], vec![8.0, 9.0]));
        let dropped = collator(Twice, 1.0).batch(&ready, &cpu).unwrap();
        assert_eq!(
            (values(&dropped, "text_embeddings"), values(&dropped, "loss_mask")),
            (vec![0.0; 2], vec![8.0, 9.0])
        );
    }

    #[test]
    fn numbered_tensors_are_a_list_in_the_order_of_their_numbers() {
        let sample = |value: f32| {
            let mut sample = Sample::new(Media::Pixels(tensor(&[0.0], &[1, 1, 1])), Text::Caption("a".into()));
            for i in [0usize, 1, 2, 10] {
                sample.tensors.insert(format!("context_latents.{i}"), tensor(&vec![value + i as f32; i + 1], &[i + 1]));
            }
            sample
        };
        let batch = collator(Twice, 0.0).batch(&loaded(vec![sample(0.0), sample(20.0)]), &Device::cpu()).unwrap();
        let lists: Vec<(Vec<usize>, f32)> = batch
            .list("context_latents")
            .iter()
            .map(|tensor| (tensor.dims().to_vec(), *tensor.to_vec::<f32>().unwrap().last().unwrap()))
            .collect();
        assert_eq!(lists, [(vec![2, 1], 20.0), (vec![2, 2], 21.0), (vec![2, 3], 22.0), (vec![2, 11], 30.0)]);
        assert!(batch.get("context_latents.0").is_none());
    }

    #[test]
    fn about_the_share_that_is_asked_for_is_dropped() {
        let sample = || Sample::new(Media::Pixels(tensor(&[0.0], &[1, 1, 1])), Text::Caption("a".into()));
        let batch = collator(PixelCodec, 0.3).batch(&loaded((0..1000).map(|_| sample()).collect()), &Device::cpu());
        let dropped = values(&batch.unwrap(), "text_embeddings").iter().filter(|v| **v < 0.0).count();
        // Four standard deviations.
        assert!(dropped.abs_diff(300) < 58, "{dropped}");
    }

    #[test]
    fn samples_that_do_not_fit_are_told() {
        let cpu = Device::cpu();
        let caption = || Text::Caption(String::new());
        let one = Sample::new(Media::Pixels(tensor(&[0.0], &[1, 1, 1])), caption());
        let wide = Sample::new(Media::Pixels(tensor(&[0.0; 2], &[1, 1, 2])), caption());
        let latents = Sample::new(Media::Latents(tensor(&[0.0], &[1, 1, 1])), caption());
        let ready = Sample::new(one.media.clone(), Text::Embeddings(TextEmbeddings::default()));
        let mut more = one.clone();
        more.tensors.insert("extra".into(), tensor(&[0.0], &[1]));
        let flat = Sample::new(Media::Pixels(tensor(&[0.0], &[1])), caption());
        for (samples, part) in [
            (vec![one.clone(), wide], "[1, 1, 2]"),
            (vec![one.clone(), latents], "latents alone"),
            (vec![one.clone(), ready], "embeddings alone"),
            (vec![one, more], "extra"),
            (vec![flat], "[B, C, H, W]"),
        ] {
            let error = collator(PixelCodec, 0.0).batch(&loaded(samples), &cpu).unwrap_err().to_string();
            assert!(error.contains(part), "{part:?} in {error}");
        }
    }
}
