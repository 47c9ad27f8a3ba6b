//! What adapters make of a batch: sides of the latents, texts, dropped conditioning, times and a guidance.

use flowtape_engine::ops::{pointwise, pointwise_to};
use flowtape_engine::{DType, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext};

use crate::{Error, Result};

/// A tensor of the batch with a batch axis, which a single sample may lack, in the compute dtype.
///
/// # Errors
/// When the device fails.
pub fn with_batch_axis(tensor: &Tensor, rank: usize, dtype: DType) -> Result<Tensor> {
    let tensor = if tensor.rank() + 1 == rank { tensor.unsqueeze(0)? } else { tensor.clone() };
    Ok(tensor.to_dtype(dtype)?)
}

/// Samples, channels, rows and columns of the noisy latents of images.
///
/// # Errors
/// When they are not 4-D; `adapter` is named.
pub fn image_dims(cx: &FlowMatchingContext<'_>, adapter: &str) -> Result<[usize; 4]> {
    let dims = cx.noisy_latents.dims();
    dims.try_into()
        .map_err(|_| Error::adapter(adapter, "4-D latents [B, C, H, W]", format!("{}-D latents {dims:?}", dims.len())))
}

/// Samples, channels, frames, rows and columns of the noisy latents of videos.
///
/// # Errors
/// When they are not 5-D or have no frame; `adapter` is named.
pub fn video_dims(cx: &FlowMatchingContext<'_>, adapter: &str) -> Result<[usize; 5]> {
    match *cx.noisy_latents.dims() {
        [b, c, f @ 1..=usize::MAX, h, w] => Ok([b, c, f, h, w]),
        ref dims => {
            Err(Error::adapter(adapter, "5-D latents [B, C, F, H, W]", format!("{}-D latents {dims:?}", dims.len())))
        }
    }
}

/// The batch's `text_embeddings` `[B, T, D]` in the compute dtype; a single sample may lack its batch axis.
///
/// # Errors
/// When they are missing, or not one text a sample; `adapter` is named.
pub fn text_embeddings(cx: &FlowMatchingContext<'_>, adapter: &str) -> Result<Tensor> {
    let (text, batch) = (cx.batch.require("text_embeddings")?, cx.noisy_latents.dim(0)?);
    let text = with_batch_axis(text, 3, cx.dtype)?;
    if text.rank() != 3 || text.dim(0)? != batch {
        let got = format!("{:?}", text.dims());
        return Err(Error::adapter(adapter, format!("`text_embeddings` [B, T, D] of {batch} samples"), got));
    }
    Ok(text)
}

/// The batch's `text_attention_mask` `[B, T]` for a text `[B, T, D]`, where it is there: 0 at padding. A single sample may lack
/// its batch axis.
///
/// # Errors
/// When it has another shape; `adapter` is named.
pub fn text_attention_mask(cx: &FlowMatchingContext<'_>, adapter: &str, text: &Tensor) -> Result<Option<Tensor>> {
    let Some(mask) = cx.batch.get("text_attention_mask") else { return Ok(None) };
    let mask = with_batch_axis(mask, 2, mask.dtype())?;
    if mask.dims() != &text.dims()[..2] {
        let expected = format!("`text_attention_mask` {:?}, as the text has tokens", &text.dims()[..2]);
        return Err(Error::adapter(adapter, expected, format!("{:?}", mask.dims())));
    }
    Ok(Some(mask))
}

/// The batch's list `context_latents`: clean latents `[B, C, H, W]` of reference images in the compute dtype, with the samples and
/// channels of the noisy latents, each with sides of its own that are multiples of `multiple`.
///
/// # Errors
/// When there is none, or one has another shape; `adapter` is named.
pub fn reference_latents(cx: &FlowMatchingContext<'_>, adapter: &str, multiple: usize) -> Result<Vec<Tensor>> {
    let [batch, channels, ..] = image_dims(cx, adapter)?;
    let references = cx.batch.list("context_latents");
    if references.is_empty() {
        return Err(Error::adapter(adapter, "a list of one or more `context_latents` in the batch", "none"));
    }
    let checked = |(i, reference): (usize, &Tensor)| match *reference.dims() {
        [b, c, h, w] if [b, c] == [batch, channels] && h % multiple == 0 && w % multiple == 0 => {
            Ok(reference.to_dtype(cx.dtype)?)
        }
        _ => {
            let sides =
                if multiple > 1 { format!(" with sides that are multiples of {multiple}") } else { String::new() };
            let expected = format!("`context_latents[{i}]` [{batch}, {channels}, H, W]{sides}");
            Err(Error::adapter(adapter, expected, format!("{:?}", reference.dims())))
        }
    };
    references.iter().enumerate().map(checked).collect()
}

/// The same of a model that needs one.
///
/// # Errors
/// As above, and when it is missing.
pub fn required_text_mask(cx: &FlowMatchingContext<'_>, adapter: &str, text: &Tensor) -> Result<Tensor> {
    let expected = "`text_attention_mask` [B, T] in the batch, 0 at padding";
    text_attention_mask(cx, adapter, text)?.ok_or_else(|| Error::adapter(adapter, expected, "none"))
}

/// Zeroes all of the tensors `[B, ..]` of a sample where the sample's draw falls below the context's `cfg_dropout_prob`;
/// nothing is drawn where that is 0.
///
/// # Errors
/// When the draws run out, or a tensor has another number of samples.
pub fn drop_samples<const N: usize>(
    cx: &FlowMatchingContext<'_>,
    tensors: [Tensor; N],
    draws: &mut dyn Draws,
) -> Result<[Tensor; N]> {
    let (mut tensors, batch) = (tensors, cx.noisy_latents.dim(0)?);
    if cx.cfg_dropout_prob > 0.0 {
        let drawn = Tensor::from_vec(draws.uniform(batch)?, &[batch], &cx.device)?;
        for tensor in &mut tensors {
            let mut dims = vec![1; tensor.rank()];
            dims[0] = batch;
            let drawn = drawn.reshape(&dims)?;
            *tensor =
                pointwise_to(tensor.dtype(), [&*tensor, &drawn], |[x, u]| u.select_lt(cx.cfg_dropout_prob, 0.0, x))?;
        }
    }
    Ok(tensors)
}

/// Times `[B]` from 0 to 1, f32: the context's are 0 to 1000.
///
/// # Errors
/// When memory runs out.
pub fn unit_times(cx: &FlowMatchingContext<'_>) -> Result<Tensor> {
    Ok(pointwise([&cx.timesteps], |[t]| t / 1000.0)?)
}

/// A guidance scale for each sample, f32 `[B]`.
///
/// # Errors
/// When memory runs out.
pub fn guidance(cx: &FlowMatchingContext<'_>, scale: f64) -> Result<Tensor> {
    Ok(Tensor::full(&[cx.noisy_latents.dim(0)?], scale, DType::F32, &cx.device)?)
}
